//! A client's segment that is more than an acknowledgement: it changes its flow's state, or proves nothing.
//!
//! The step has a function of its own. So the path of the many segments that only acknowledge stays short, and needs little
//! stack.

use crate::{
    cell::Cell32,
    client_answer::ClientAnswer,
    flight_recorder::{FlowEvent, Note, state},
    flow::{
        claimer::Clock,
        close::{close, mark_closed},
        family::Family,
        query::Query,
        slot::{Found, Slot},
    },
    headers::tcp_flag,
    layout::{Numbers, backend_flag},
    meta::{BACKEND_FIN, CLIENT_FIN, Meta, NUMBERED, RESET, SYN_ACK},
    outcome::Event,
    segment::Segment,
    subprograms::Subprograms,
    transition::{self, ClientTransition, DOUBT_LIMIT, RESET_QUARANTINE},
};

/// A flow, as a segment of its client meets it.
struct Met<'a, A: Family> {
    query: &'a Query<A::Tuple>,
    slot: Slot,
    meta: Meta,
    word: &'a Cell32,
    service: u16,
}

impl<A: Family> Met<'_, A> {
    /// A note about the flow.
    #[inline(always)]
    fn note(&self, event: FlowEvent) -> Note {
        let note = Note::new::<A>(event, A::parts(self.query.tuple));
        note.of(self.meta.backend()).at(self.slot)
    }

    /// Exchanges the word, if it has not changed. Returns what it is now.
    #[inline(always)]
    fn exchange<S: Subprograms>(&self, maps: &S, next: Meta, event: FlowEvent) -> Option<Meta> {
        if self.word.compare_exchange(self.meta.0, next.0) != self.meta.0 {
            return None;
        }
        maps.note(self.note(event).detail(state(self.meta)));
        Some(next)
    }
}

/// Takes a segment of the flow with this tuple, which was `found`, to what is to be done with it.
#[inline(always)]
pub fn client_event<A: Family, S: Subprograms>(
    maps: &S,
    query: &Query<A::Tuple>,
    found: Found,
    segment: &Segment,
    service: u16,
) -> ClientAnswer {
    let (slot, meta) = (found.slot(), found.meta());
    let forward = ClientAnswer::new(ClientAnswer::FORWARD, meta);
    let (Some(config), Some(ways)) = (maps.config(), A::set(maps, slot.set)) else {
        return forward;
    };
    let Some(numbers) = A::numbers(maps, ways, slot) else {
        return forward;
    };
    let met = Met::<A> { query, slot, meta, word: A::meta(ways, slot.way), service };
    let clock = Clock::read(maps, config);
    let before = numbers.load();
    let (transition, now) = transition::client(meta, before, segment, clock.seen);
    // Before the word says that they are known.
    numbers.store(before, now);
    match transition {
        ClientTransition::None => forward,
        ClientTransition::Alive | ClientTransition::Acknowledge => {
            met.word.store_high(clock.seen);
            forward
        }
        ClientTransition::Hold => hold(&met, clock),
        ClientTransition::OutOfSequence => {
            maps.count_event(service, Event::ClientNumbersOdd);
            forward
        }
        ClientTransition::SuspectReset => {
            maps.count_event(service, Event::ResetDoubted);
            met.word.fetch_or(RESET);
            // A SYN that follows is held until the backend was asked, from now on.
            if meta.age(clock.seen) >= DOUBT_LIMIT {
                met.word.store_high(clock.seen);
            }
            forward
        }
        ClientTransition::RetransmitSyn => retransmit::<A, S>(maps, &met, numbers, segment, clock),
        ClientTransition::Reopen => ClientAnswer::new(ClientAnswer::REOPEN, meta),
        ClientTransition::AskBackend => {
            // What is repeated may be lost then, but a backend that drains gets no new flow. That its FIN is not acknowledged
            // says nothing: clients that have closed answer it by a RST.
            if !accepts(maps, meta) {
                return ClientAnswer::new(ClientAnswer::REOPEN, meta);
            }
            mark_closed(met.word, meta);
            ClientAnswer::new(ClientAnswer::ASK_BACKEND, meta)
        }
        ClientTransition::AnswerWithReset => ClientAnswer::new(ClientAnswer::RESET, meta),
        ClientTransition::Establish(next) => establish::<A, S>(maps, &met, next, clock),
        ClientTransition::Reset(next) => {
            let now = met.exchange(maps, next, FlowEvent::ResetByClient).unwrap_or(meta);
            rests(&met, now, clock)
        }
        ClientTransition::Close(kind) => {
            let before = Meta(met.word.fetch_or(CLIENT_FIN));
            // Of two CPUs that see it at the same time one notes it.
            if !before.has(BACKEND_FIN) && !before.has(CLIENT_FIN) {
                maps.note(met.note(FlowEvent::ClosedByClient).detail(state(meta)));
            }
            rests(&met, close(met.word, before.with(CLIENT_FIN), BACKEND_FIN, kind), clock)
        }
        ClientTransition::GiveUp => {
            let before = Meta(met.word.fetch_or(CLIENT_FIN));
            let reset = segment.has(tcp_flag::RST);
            let event = if reset { FlowEvent::ResetByClient } else { FlowEvent::ClosedByClient };
            if !before.has(CLIENT_FIN) {
                maps.note(met.note(event).detail(state(meta)));
            }
            rests(&met, before.with(CLIENT_FIN), clock)
        }
    }
}

/// The client waits for the backend's word: the slot is marked, and made old enough to be asked about at the daemon's next look. If
/// the word has changed meanwhile, the client's next SYN does it.
#[inline(always)]
fn hold<A: Family>(met: &Met<'_, A>, clock: Clock) -> ClientAnswer {
    if !met.meta.has(RESET) || met.meta.age(clock.seen) <= RESET_QUARANTINE {
        let due = met.meta.with(RESET).at(clock.seen.wrapping_sub(RESET_QUARANTINE + 1));
        met.word.compare_exchange(met.meta.0, due.0);
    }
    ClientAnswer::new(ClientAnswer::HOLD, met.meta)
}

/// The flow is, or is about to be, over: its slot rests from now on.
#[inline(always)]
fn rests<A: Family>(met: &Met<'_, A>, meta: Meta, clock: Clock) -> ClientAnswer {
    met.word.store_high(clock.seen);
    ClientAnswer::new(ClientAnswer::FORWARD, meta)
}

/// The client has proven its flow.
#[inline(always)]
fn establish<A: Family, S: Subprograms>(
    maps: &S,
    met: &Met<'_, A>,
    next: Meta,
    clock: Clock,
) -> ClientAnswer {
    let Some(now) = met.exchange(maps, next.at(clock.seen), FlowEvent::Established) else {
        return ClientAnswer::new(ClientAnswer::FORWARD, met.meta);
    };
    maps.count_event(met.service, Event::FlowEstablished);
    ClientAnswer::new(ClientAnswer::FORWARD_AND_LEARN, now)
}

/// Units after which a handshake that was answered was given up, or its SYN forged: its client would have sent another SYN, or data.
const GIVEN_UP: u16 = 8;

/// Units after which a SYN that was answered, and is sent again all the same, tells the way back.
const LATE: u16 = 2;

#[inline(always)]
fn flags<S: Subprograms>(maps: &S, meta: Meta) -> u32 {
    maps.backend(meta.backend()).map_or(0, |backend| backend.flags.load())
}

/// Does the slot's backend take new flows?
#[inline(always)]
pub fn accepts<S: Subprograms>(maps: &S, meta: Meta) -> bool {
    flags(maps, meta) & backend_flag::ACCEPTS != 0
}

/// Sends a retransmitted SYN to its backend, or to another if that one takes no new flows any more.
#[inline(always)]
fn retransmit<A: Family, S: Subprograms>(
    maps: &S,
    met: &Met<'_, A>,
    numbers: &Numbers,
    segment: &Segment,
    clock: Clock,
) -> ClientAnswer {
    let mut meta = met.meta;
    let flags = flags(maps, meta);
    let stays = flags & backend_flag::ACCEPTS != 0;
    // Its segments are not seen here: only its sockets tell whether the flow lives.
    if !stays && flags & backend_flag::LOCAL != 0 {
        return ClientAnswer::new(ClientAnswer::ASK_HOST, meta);
    }
    if meta.has(CLIENT_FIN) {
        // What the client has ended was an earlier flow: one that its backend still remembered (RFC 5961 §4), or one to
        // this host.
        let begun = meta.without(CLIENT_FIN);
        if met.word.compare_exchange(meta.0, begun.0) != meta.0 {
            return ClientAnswer::new(ClientAnswer::FORWARD, meta);
        }
        meta = begun;
    }
    let age = meta.age(clock.seen);
    if meta.has(SYN_ACK) && (stays || age < GIVEN_UP) {
        return retransmit_answered(meta, age);
    }
    if stays {
        // Of several SYNs the last holds.
        numbers.next.store(segment.sequence.wrapping_add(1));
        return ClientAnswer::new(ClientAnswer::FORWARD_AND_LEARN, meta);
    }
    let other = maps.another::<A>(met.service, met.query.hash, meta.backend());
    if other != 0 {
        return move_on(maps, &Met { meta, ..*met }, numbers, segment, clock, other);
    }
    if meta.has(SYN_ACK) {
        return retransmit_answered(meta, age);
    }
    ClientAnswer::new(ClientAnswer::REFUSE, meta)
}

/// Sends a SYN again whose answer may be on its way.
#[inline(always)]
const fn retransmit_answered(meta: Meta, age: u16) -> ClientAnswer {
    // A client whose way has changed does not hear the backend's answer.
    let what = if age >= LATE { ClientAnswer::FORWARD_AND_LEARN } else { ClientAnswer::FORWARD };
    ClientAnswer::new(what, meta)
}

/// Moves a handshake to another backend.
#[inline(always)]
fn move_on<A: Family, S: Subprograms>(
    maps: &S,
    met: &Met<'_, A>,
    numbers: &Numbers,
    segment: &Segment,
    clock: Clock,
    other: u8,
) -> ClientAnswer {
    let meta = met.meta;
    let was_answered = meta.has(SYN_ACK);
    let unanswered = if was_answered { meta.without(SYN_ACK | NUMBERED | BACKEND_FIN) } else { meta };
    let moved = unanswered.on(other);
    if met.word.compare_exchange(meta.0, moved.0) != meta.0 {
        return ClientAnswer::new(ClientAnswer::FORWARD, meta);
    }
    // Not before: another CPU may have established the flow meanwhile.
    numbers.next.store(segment.sequence.wrapping_add(1));
    if was_answered {
        numbers.unacknowledged.store(clock.jiffies);
    }
    maps.note(met.note(FlowEvent::Moved).other(other));
    maps.count_event(met.service, Event::Rebalanced);
    maps.count_flow(other);
    ClientAnswer::new(ClientAnswer::FORWARD_AND_LEARN, moved)
}
