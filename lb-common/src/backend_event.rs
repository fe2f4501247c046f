//! A backend's segment that does more than go on where the last one ended: it changes its flow's state, or proves nothing.
//!
//! The step has a function of its own, for the reason that [`crate::client_event`] has one.

use crate::{
    flight_recorder::{FlowEvent, Note, state},
    flow::{
        claimer::Clock,
        close::{begin_again, close},
        family::Family,
        slot::{Found, Slot},
    },
    headers::tcp_flag,
    meta::{BACKEND_FIN, BACKEND_TOLD, CLIENT_FIN, Kind, Meta, RESET, SYN_ACK},
    outcome::Event,
    segment::Segment,
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
    let Some(numbers) = A::numbers(maps, ways, slot) else {
        return answer::REPLY;
    };
    let word = A::meta(ways, slot.way);
    let clock = Clock::read(maps, config);
    let before = numbers.load();
    let (transition, now) = transition::backend(meta, before, segment, clock.jiffies);
    // Before the word says that they are known.
    numbers.store(before, now);
    let mut answer = answer::REPLY;
    let mut other = 0;
    let event = match transition {
        BackendTransition::None => None,
        BackendTransition::OutOfSequence => {
            maps.count_event(service, Event::BackendNumbersOdd);
            None
        }
        BackendTransition::Set(flags) => {
            word.fetch_or(flags);
            None
        }
        BackendTransition::Become(next) => {
            let found = Meta(word.compare_exchange(meta.0, next.0));
            // The numbers are stored already. If the word differs in its time alone, as another CPU has refreshed it, the flags are
            // set all the same.
            if found.0 != meta.0 && found.at(meta.seen()).0 == meta.0 {
                word.compare_exchange(found.0, next.at(found.seen()).0);
            }
            None
        }
        BackendTransition::Close(flags, kind) => {
            let before = Meta(word.fetch_or(flags | BACKEND_FIN));
            close(word, before.with(flags | BACKEND_FIN), CLIENT_FIN, kind);
            // Of two CPUs that see it at the same time one notes it.
            let is_first = !before.has(CLIENT_FIN) && !before.has(BACKEND_FIN);
            is_first.then_some(FlowEvent::ClosedByBackend)
        }
        BackendTransition::Reset(next) => {
            // It rests from now on.
            let now = next.at(clock.seen);
            (word.compare_exchange(meta.0, now.0) == meta.0).then_some(FlowEvent::ResetByBackend)
        }
        BackendTransition::SuspectReset => {
            maps.count_event(service, Event::ResetDoubted);
            word.fetch_or(RESET);
            None
        }
        BackendTransition::Refuse => {
            if let Some(backend) = maps.backend(meta.backend()) {
                backend.refused.store(clock.jiffies);
            }
            other = second_chance::<A, S>(maps, ways, slot, meta, service);
            if other != 0 {
                answer = answer::SECOND_CHANCE;
                Some(FlowEvent::SecondChance)
            } else {
                let closed = meta.without(RESET).become_kind(Kind::ClosedByClient).at(clock.seen);
                (word.compare_exchange(meta.0, closed.0) == meta.0).then_some(FlowEvent::RefusedByBackend)
            }
        }
        BackendTransition::Reopen => {
            let half_open = Meta::new(Kind::HalfOpen, meta.backend(), clock.seen).with(SYN_ACK);
            let begins = begin_again(word, meta, half_open);
            if begins {
                maps.count_event(service, Event::FlowClaimed);
                maps.count_flow(meta.backend());
            }
            begins.then_some(FlowEvent::Claimed)
        }
        BackendTransition::AnswerWithReset => {
            word.compare_exchange(meta.0, meta.with(BACKEND_TOLD).0);
            return answer::RESET;
        }
    };
    if let Some(event) = event {
        // In one place, as each takes stack of its own.
        let note = Note::new::<A>(event, A::parts(A::load(ways, slot.way))).of(meta.backend()).at(slot);
        maps.note(note.detail(state(meta)).other(other));
    }
    // Not in every unit: the client's next packet is to find it old, and to look where it came from. A RST says nothing of a
    // flow that goes on, and repeated it would keep a doubt from being asked about.
    if answer == answer::REPLY && !segment.has(tcp_flag::RST) && meta.age(clock.seen) >= 2 {
        word.store_high(clock.seen);
    }
    answer
}

/// A backend refused a SYN for the first time: the flow moves to another backend, whose id is returned, and the refusal is
/// swallowed. The client's next SYN goes there. 0: the refusal is the client's.
#[inline(always)]
fn second_chance<A: Family, S: Subprograms>(
    maps: &S,
    ways: &A::Set,
    slot: Slot,
    meta: Meta,
    service: u16,
) -> u8 {
    let Some(config) = maps.config() else {
        return 0;
    };
    if meta.has(RESET) {
        return 0;
    }
    let hash = A::hash(&config.key, A::load(ways, slot.way));
    let other = maps.another::<A>(service, hash, meta.backend());
    let moved = meta.on(other).with(RESET);
    if other == 0 || A::meta(ways, slot.way).compare_exchange(meta.0, moved.0) != meta.0 {
        return 0;
    }
    maps.count_flow(other);
    other
}
