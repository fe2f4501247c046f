//! A backend's segment that does more than go on where the last one ended: it changes its flow's state, or proves nothing.
//!
//! The step has a function of its own, for the reason that [`crate::client_event`] has one.

use crate::{
    flight_recorder::{FlowEvent, Note, state},
    flow::{
        claimer::Clock,
        close::close,
        family::Family,
        slot::{Found, Slot},
    },
    meta::{BACKEND_FIN, BACKEND_TOLD, CLIENT_FIN, Kind, Meta, RESET},
    outcome::Event,
    parse::Segment,
    subprograms::Subprograms,
    transition::{self, BackendTransition},
};

/// What is to be done with the segment.
pub mod answer {
    /// Send it to the client.
    pub const REPLY: u64 = 0;
    /// Drop it: the client's next SYN goes to another backend.
    pub const SECOND_CHANCE: u64 = 1;
    /// Answer it with a RST: the flow was reset on purpose.
    pub const RESET: u64 = 2;
}

/// Takes a segment of the backend of the flow that was `found` to what is to be done with it: see [`answer`].
#[inline(always)]
pub fn backend_event<A: Family, S: Subprograms>(
    maps: &S,
    found: Found,
    segment: &Segment,
    service: u16,
) -> u64 {
    let (slot, meta) = (found.slot(), found.meta());
    let (Some(config), Some(ways)) = (maps.config(), A::set(maps, slot.set)) else {
        return answer::REPLY;
    };
    let (Some(numbers), Some(backend)) = (A::numbers(maps, ways, slot), maps.backend(meta.backend())) else {
        return answer::REPLY;
    };
    let word = A::meta(ways, slot.way);
    let clock = Clock::read(maps, config);
    let before = numbers.load();
    let (transition, now) = transition::backend(meta, before, segment, clock.jiffies);
    // Before the word says that they are known.
    numbers.store(before, now);
    let note = |event| Note::new::<A>(event, A::parts(A::load(ways, slot.way))).of(meta.backend()).at(slot);
    match transition {
        BackendTransition::None => {}
        BackendTransition::OutOfSequence => maps.count_event(service, Event::BackendNumbersOdd),
        BackendTransition::Set(flags) => {
            word.fetch_or(flags);
        }
        BackendTransition::Become(next) => {
            word.compare_exchange(meta.0, next.0);
        }
        BackendTransition::Close(flags, kind) => {
            let before = Meta(word.fetch_or(flags | BACKEND_FIN));
            // Of two CPUs that see it at the same time one notes it.
            if !before.has(CLIENT_FIN) && !before.has(BACKEND_FIN) {
                maps.note(note(FlowEvent::ClosedByBackend).detail(state(meta)));
            }
            close(word, before.with(flags | BACKEND_FIN), CLIENT_FIN, kind);
        }
        BackendTransition::Reset(next) => {
            if word.compare_exchange(meta.0, next.0) == meta.0 {
                maps.note(note(FlowEvent::ResetByBackend).detail(state(meta)));
            }
        }
        BackendTransition::SuspectReset => {
            maps.count_event(service, Event::ResetDoubted);
            word.fetch_or(RESET);
        }
        BackendTransition::Refuse => {
            backend.refused.store(clock.jiffies);
            if second_chance::<A, S>(maps, ways, slot, meta, service) {
                return answer::SECOND_CHANCE;
            }
        }
        BackendTransition::AnswerWithReset => {
            word.compare_exchange(meta.0, meta.with(BACKEND_TOLD).0);
            return answer::RESET;
        }
    }
    // Not in every unit: the client's next packet is to find it old, and to look where it came from.
    if meta.age(clock.seen) >= 2 {
        word.store_high(clock.seen);
    }
    answer::REPLY
}

/// A backend refused a SYN. The first time, the flow moves to another backend and the refusal is swallowed: the client's
/// next SYN goes there. Otherwise the refusal is sent to the client.
#[inline(always)]
fn second_chance<A: Family, S: Subprograms>(
    maps: &S,
    ways: &A::Set,
    slot: Slot,
    meta: Meta,
    service: u16,
) -> bool {
    let Some(config) = maps.config() else {
        return false;
    };
    let (word, tuple) = (A::meta(ways, slot.way), A::load(ways, slot.way));
    let note = |event| Note::new::<A>(event, A::parts(tuple)).of(meta.backend()).at(slot).detail(state(meta));
    if !meta.has(RESET) {
        let other = maps.another::<A>(service, A::hash(&config.key, tuple), meta.backend());
        if other != 0 && word.compare_exchange(meta.0, meta.on(other).with(RESET).0) == meta.0 {
            maps.note(note(FlowEvent::SecondChance).other(other));
            maps.count_flow(other);
            return true;
        }
    }
    if word.compare_exchange(meta.0, meta.without(RESET).become_kind(Kind::ClosedByClient).0) == meta.0 {
        maps.note(note(FlowEvent::RefusedByBackend));
    }
    false
}
