//! A packet for a listener: finds its flow or begins one, and sends it to the backend.

use crate::{
    cell::Cell32,
    checksum::{Delta, sum64},
    context::{self, Context},
    disposition::Disposition,
    flight_recorder::{FlowEvent, Note, Refusal, mapped, state},
    flow::{
        claim::claim,
        claimer::{Claimer, Clock},
        close::close,
        family::Family,
        look_up::Hit,
        query::Query,
        slot::{Found, Slot},
    },
    frame::Frame,
    hash::FlowHash,
    headers::tcp_flag,
    layout::{Backend, Listener, NextHop, Service, backend_flag},
    meta::{BACKEND_FIN, CLIENT_FIN, Kind, Meta, RESET, RETRANSMITTED, SYN_ACK},
    next_hop,
    outcome::{Event, Outcome},
    parse::{self, Ports, Segment},
    rewrite,
    sequence::SendSequence,
    subprograms::Subprograms,
    transition::{self, ClientTransition},
    witness,
};

/// Entries of the selection table that are tried to find another backend than the one that refused.
const ALTERNATIVES: u32 = 8;

/// Forwards a packet for a listener; `hit` is its flow's slot, if it has one.
#[inline(always)]
pub fn forward<A: Family, S: Subprograms>(
    frame: &mut S::Frame,
    maps: &S,
    context: &Context<'_>,
    listener: &Listener,
    query: &Query<A::Tuple>,
    hit: Hit<'_, A>,
) -> Disposition {
    if listener.interfaces & 1 << (context.interface & 31) == 0 {
        return Disposition::NOT_OURS;
    }
    match send::<A, S>(frame, maps, context, listener, query, hit) {
        Ok(done) => done,
        Err(outcome) => {
            let refusal = Refusal::of(outcome);
            if refusal != 0 {
                maps.note(note::<A>(FlowEvent::Refused, query).detail(refusal));
            }
            Disposition::with(outcome, listener.service)
        }
    }
}

/// A record about the flow of `query`.
#[inline(always)]
fn note<A: Family>(event: FlowEvent, query: &Query<A::Tuple>) -> Note {
    Note::new::<A>(event, A::parts(query.tuple))
}

#[inline(always)]
fn send<A: Family, S: Subprograms>(
    frame: &mut S::Frame,
    maps: &S,
    context: &Context<'_>,
    listener: &Listener,
    query: &Query<A::Tuple>,
    hit: Hit<'_, A>,
) -> Result<Disposition, Outcome> {
    let segment = parse::segment(frame, &context.packet);
    if !segment.valid {
        return Err(if hit.ways.is_some() { Outcome::Malformed } else { Outcome::NoFlow });
    }
    if hit.ways.is_none() && context.config.hold != 0 {
        return Err(Outcome::Held);
    }
    if hit.ways.is_none() {
        // By a barrier, or LLVM puts both conditions together by arithmetic, which takes four times as long.
        let flags = maps.barrier_var(segment.flags.into()) as u8;
        if !(Segment { flags, ..segment }).opens() {
            return Err(Outcome::NoFlow);
        }
    }
    context::check::<A, S>(frame, &context.packet)?;
    let flow = if hit.ways.is_some() {
        existing_flow::<A, S>(frame, maps, context, listener, query, &hit, &segment)?
    } else {
        new_flow::<A, S>(frame, maps, context, listener, query, &segment)?
    };
    transmit::<A, S>(frame, maps, context, listener, query, flow, &segment)
}

/// A flow's slot, and its word as it is now.
type Flow = (Slot, Meta);

/// A packet of a flow that has a slot.
#[inline(always)]
fn existing_flow<A: Family, S: Subprograms>(
    frame: &mut S::Frame,
    maps: &S,
    context: &Context<'_>,
    listener: &Listener,
    query: &Query<A::Tuple>,
    hit: &Hit<'_, A>,
    segment: &Segment,
) -> Result<Flow, Outcome> {
    let (slot, meta) = (hit.slot, hit.meta);
    let ways = hit.ways.ok_or(Outcome::Malformed)?;
    let numbers = A::numbers(maps, ways, slot).ok_or(Outcome::Malformed)?;
    let word = A::meta(ways, slot.way);
    let clock = Clock::read(maps, context.config);
    let sequence = numbers.load();
    let (transition, now) = transition::client(meta, sequence, segment);
    // Before the word says that they are known.
    numbers.store(sequence, now);
    match transition {
        ClientTransition::Acknowledge => {
            // Once a second is enough to follow a client to another router: on every packet it cost 8 of 80 ns.
            if meta.seen() != clock.seen || meta.has(RETRANSMITTED) {
                refresh::<A, S>(frame, maps, context, listener, hit, sequence, segment, clock);
            }
            Ok((slot, meta))
        }
        ClientTransition::None => Ok((slot, meta)),
        ClientTransition::Alive => {
            if meta.seen() != clock.seen {
                word.store_high(clock.seen);
            }
            Ok((slot, meta))
        }
        ClientTransition::OutOfSequence => {
            maps.count_event(listener.service, Event::ClientNumbersOdd);
            Ok((slot, meta))
        }
        ClientTransition::RetransmitSyn if !restarts_local_flow(maps, meta) => {
            // Of several SYNs the last holds.
            if !meta.has(SYN_ACK) {
                numbers.next.store(segment.sequence.wrapping_add(1));
                next_hop::remember::<A, S>(maps, listener.service, ways, slot, arrived_from(frame, context));
            }
            Ok((slot, retry::<A, S>(maps, listener, query, hit.found())?))
        }
        ClientTransition::RetransmitSyn | ClientTransition::Reopen => {
            reopen::<A, S>(frame, maps, context, listener, query, hit.found(), segment, clock)
        }
        ClientTransition::AnswerWithReset => Err(Outcome::ResetClient),
        changed => {
            let meta = change::<A, S>(maps, listener, query, hit, word, changed, segment);
            // A slot rests from when it was closed.
            if meta.seen() != clock.seen && changed != ClientTransition::SuspectReset {
                word.store_high(clock.seen);
            }
            if matches!(changed, ClientTransition::Establish(_)) {
                next_hop::remember::<A, S>(maps, listener.service, ways, slot, arrived_from(frame, context));
            }
            Ok((slot, meta))
        }
    }
}

/// Notes that the client is there, and follows it to another router.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "a function of its own only to keep its caller on a screen")]
fn refresh<A: Family, S: Subprograms>(
    frame: &mut S::Frame,
    maps: &S,
    context: &Context<'_>,
    listener: &Listener,
    hit: &Hit<'_, A>,
    before: SendSequence,
    segment: &Segment,
    clock: Clock,
) {
    let (slot, meta) = (hit.slot, hit.meta);
    let Some(ways) = hit.ways else { return };
    let word = A::meta(ways, slot.way);
    if transition::moves_way_back(meta, before, segment.acknowledgement) {
        next_hop::remember::<A, S>(maps, listener.service, ways, slot, arrived_from(frame, context));
        if meta.has(RETRANSMITTED) {
            // Where the word has changed meanwhile the next segment does it.
            word.compare_exchange(meta.0, meta.without(RETRANSMITTED).at(clock.seen).0);
            return;
        }
    }
    if meta.seen() != clock.seen {
        word.store_high(clock.seen);
    }
}

/// Changes the state of a flow. Returns its word as it is now.
#[inline(always)]
fn change<A: Family, S: Subprograms>(
    maps: &S,
    listener: &Listener,
    query: &Query<A::Tuple>,
    hit: &Hit<'_, A>,
    word: &Cell32,
    transition: ClientTransition,
    segment: &Segment,
) -> Meta {
    let meta = hit.meta;
    match transition {
        ClientTransition::Establish(next) => {
            if word.compare_exchange(meta.0, next.0) != meta.0 {
                return meta;
            }
            end::<A, S>(maps, FlowEvent::Established, query, hit.found());
            maps.count_event(listener.service, Event::FlowEstablished);
            next
        }
        ClientTransition::Reset(next) => {
            if word.compare_exchange(meta.0, next.0) != meta.0 {
                return meta;
            }
            end::<A, S>(maps, FlowEvent::ResetByClient, query, hit.found());
            next
        }
        ClientTransition::Close(kind) => {
            let before = Meta(word.fetch_or(CLIENT_FIN));
            // Of two that see it at the same time one notes it.
            if !before.has(BACKEND_FIN) && !before.has(CLIENT_FIN) {
                end::<A, S>(maps, FlowEvent::ClosedByClient, query, hit.found());
            }
            close(word, before.with(CLIENT_FIN), BACKEND_FIN, kind)
        }
        ClientTransition::SuspectReset => {
            maps.count_event(listener.service, Event::ResetDoubted);
            Meta(word.fetch_or(RESET)).with(RESET)
        }
        ClientTransition::GiveUp => {
            let before = Meta(word.fetch_or(CLIENT_FIN));
            if !before.has(CLIENT_FIN) {
                let reset = segment.has(tcp_flag::RST);
                let event = if reset { FlowEvent::ResetByClient } else { FlowEvent::ClosedByClient };
                end::<A, S>(maps, event, query, hit.found());
            }
            before.with(CLIENT_FIN)
        }
        _ => meta,
    }
}

/// Notes for later what the client has done to its flow.
#[inline(always)]
fn end<A: Family, S: Subprograms>(maps: &S, event: FlowEvent, query: &Query<A::Tuple>, found: Found) {
    let meta = found.meta();
    maps.note(note::<A>(event, query).of(meta.backend()).at(found.slot()).detail(state(meta)));
}

/// A SYN on a slot that its own tuple has closed, or that was reset on purpose: a new flow, in the same slot.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "what a new flow depends on")]
fn reopen<A: Family, S: Subprograms>(
    frame: &mut S::Frame,
    maps: &S,
    context: &Context<'_>,
    listener: &Listener,
    query: &Query<A::Tuple>,
    found: Found,
    segment: &Segment,
    clock: Clock,
) -> Result<Flow, Outcome> {
    let service = maps.service(listener.service).ok_or(Outcome::Malformed)?;
    if !admits::<A, S>(maps, listener.service, service, context) {
        return Err(Outcome::RefusedNotAllowed);
    }
    let chosen = match A::selection(service) {
        0 => 0,
        half => maps.select(half - 1, query.hash),
    };
    // A listener that was taken from its service has flows that live on, and no new ones.
    if chosen == 0 && (listener.service == 0 || !accepts(maps, found.meta())) {
        return Err(Outcome::RefusedNoBackend);
    }
    let before = found.meta();
    let mut backend = if chosen == 0 { before.backend() } else { chosen };
    if backend == before.backend() && before.is_untold() {
        // The backend still has the old flow under this slot's port, and would answer with a bare ACK.
        let other = maps.another::<A>(listener.service, query.hash, backend);
        backend = if other == 0 { backend } else { other };
    }
    let claimer = claimer(listener, backend, segment, clock);
    let claim = maps.take::<A>(query, &claimer, found);
    if claim.failure().is_some() {
        return Err(Outcome::SynRace);
    }
    Ok(won::<A, S>(frame, maps, context, query, &claimer, claim.slot()))
}

/// A backend with one of these flags keeps a flow whose SYN is repeated. A backend that is this host always does: whether
/// such a flow is established is not seen here, and the local socket refuses by itself.
const KEEPS: u32 = backend_flag::ACCEPTS | backend_flag::LOCAL;

#[inline(always)]
fn flags<S: Subprograms>(maps: &S, meta: Meta) -> u32 {
    maps.backend(meta.backend()).map_or(0, |backend| backend.flags.load())
}

/// Does the slot's backend take new flows?
#[inline(always)]
fn accepts<S: Subprograms>(maps: &S, meta: Meta) -> bool {
    flags(maps, meta) & KEEPS != 0
}

/// Is a SYN of a half-open flow a new flow's? The client has ended its flow to this host, whose own segments are not seen,
/// and uses its port again within seconds. The local socket would refuse it, where it takes no new flows.
#[inline(always)]
fn restarts_local_flow<S: Subprograms>(maps: &S, meta: Meta) -> bool {
    meta.has(CLIENT_FIN) && flags(maps, meta) & KEEPS == backend_flag::LOCAL
}

/// Sends a retransmitted SYN to its backend, or to another if that one takes no new flows any more.
#[inline(always)]
fn retry<A: Family, S: Subprograms>(
    maps: &S,
    listener: &Listener,
    query: &Query<A::Tuple>,
    found: Found,
) -> Result<Meta, Outcome> {
    let mut meta = found.meta();
    let ways = A::set(maps, found.slot().set).ok_or(Outcome::Malformed)?;
    let word = A::meta(ways, found.slot().way);
    if meta.has(CLIENT_FIN) {
        // What the client has ended was an earlier flow: one that its backend still remembered (RFC 5961 §4), or one to
        // this host.
        let begun = meta.without(CLIENT_FIN);
        if word.compare_exchange(meta.0, begun.0) != meta.0 {
            return Ok(meta);
        }
        meta = begun;
    }
    if accepts(maps, meta) || meta.has(SYN_ACK) {
        return Ok(meta);
    }
    let other = maps.another::<A>(listener.service, query.hash, meta.backend());
    if other == 0 {
        return Err(Outcome::RefusedNoBackend);
    }
    if word.compare_exchange(meta.0, meta.on(other).0) != meta.0 {
        return Ok(meta);
    }
    maps.note(note::<A>(FlowEvent::Moved, query).of(meta.backend()).at(found.slot()).other(other));
    maps.count_event(listener.service, Event::Rebalanced);
    maps.count_flow(other);
    Ok(meta.on(other))
}

/// A backend for a flow with this hash that takes new flows and is not `refused`; 0: there is none.
#[inline(always)]
pub fn another<A: Family, S: Subprograms>(maps: &S, service: u16, hash: FlowHash, refused: u8) -> u8 {
    let half = maps.service(service).map_or(0, A::selection);
    if half == 0 {
        return 0;
    }
    for number in 0..ALTERNATIVES {
        let entry = hash.candidate(number, crate::maglev::TABLE_SIZE);
        let id = maps.selected(half - 1, entry);
        if id != 0 && id != refused {
            return id;
        }
    }
    0
}

/// A SYN of a tuple that has no slot.
#[inline(always)]
fn new_flow<A: Family, S: Subprograms>(
    frame: &mut S::Frame,
    maps: &S,
    context: &Context<'_>,
    listener: &Listener,
    query: &Query<A::Tuple>,
    segment: &Segment,
) -> Result<Flow, Outcome> {
    let service = maps.service(listener.service).ok_or(Outcome::Malformed)?;
    if !admits::<A, S>(maps, listener.service, service, context) {
        return Err(Outcome::RefusedNotAllowed);
    }
    let backend = match A::selection(service) {
        0 => return Err(Outcome::RefusedNoBackend),
        half => maps.select(half - 1, query.hash),
    };
    let claimer = claimer(listener, backend, segment, Clock::read(maps, context.config));
    let claim = claim::<A, S>(maps, query, &claimer);
    if let Some(outcome) = claim.failure() {
        return Err(outcome);
    }
    Ok(won::<A, S>(frame, maps, context, query, &claimer, claim.slot()))
}

/// Who claims a slot for the flow that this SYN opens.
#[inline(always)]
fn claimer(listener: &Listener, backend: u8, segment: &Segment, clock: Clock) -> Claimer {
    Claimer {
        clock,
        service: listener.service.into(),
        backend: backend.into(),
        expected: segment.sequence.wrapping_add(1),
        reserved: 0,
    }
}

/// May the client use the service?
#[inline(always)]
fn admits<A: Family, S: Subprograms>(maps: &S, id: u16, service: &Service, context: &Context<'_>) -> bool {
    service.restricted == 0 || maps.allows(id, mapped::<A>(context.packet.source))
}

/// Records and counts a flow that was given a slot, and remembers the way back to its client.
#[inline(always)]
fn won<A: Family, S: Subprograms>(
    frame: &mut S::Frame,
    maps: &S,
    context: &Context<'_>,
    query: &Query<A::Tuple>,
    claimer: &Claimer,
    slot: Slot,
) -> Flow {
    let (service, backend) = (claimer.service as u16, claimer.backend as u8);
    maps.note(note::<A>(FlowEvent::Claimed, query).of(backend).at(slot));
    maps.count_event(service, Event::FlowClaimed);
    maps.count_flow(backend);
    if let Some(ways) = A::set(maps, slot.set) {
        next_hop::remember::<A, S>(maps, service, ways, slot, arrived_from(frame, context));
    }
    (slot, Meta::new(Kind::HalfOpen, backend, claimer.clock.seen))
}

/// The neighbour that sent the packet.
#[inline(always)]
fn arrived_from<F: Frame>(frame: &mut F, context: &Context<'_>) -> NextHop {
    NextHop::new(parse::source_mac(frame), context.interface)
}

/// Sends a flow's packet to its backend.
#[inline(always)]
fn transmit<A: Family, S: Subprograms>(
    frame: &mut S::Frame,
    maps: &S,
    context: &Context<'_>,
    listener: &Listener,
    query: &Query<A::Tuple>,
    (slot, meta): Flow,
    segment: &Segment,
) -> Result<Disposition, Outcome> {
    let backend = maps.backend(meta.backend()).ok_or(Outcome::NextHopUnknown)?;
    if backend.flags.load() & backend_flag::LOCAL != 0 {
        return Ok(Disposition::with(Outcome::ForwardedLocal, listener.service));
    }
    let hop = NextHop(backend.next_hop.load());
    if hop == NextHop::UNKNOWN {
        if segment.opens() {
            let note = note::<A>(FlowEvent::Refused, query).of(meta.backend()).at(slot);
            maps.note(note.detail(Refusal::NoNextHop as u8));
        }
        return Err(Outcome::NextHopUnknown);
    }
    if segment.payload > 0 || segment.opens() {
        witness::ask(backend, Clock::read(maps, context.config).jiffies);
    }
    let translation = to_backend::<A>(context, listener, backend, slot);
    let interface =
        rewrite::send::<S>(frame, context.config, &context.link, &context.packet, &translation, hop)?;
    Ok(Disposition::leaving(Outcome::Forwarded, listener.service, interface))
}

/// The translation of a client's packet on its way to the backend.
#[inline(always)]
pub fn to_backend<A: Family>(
    context: &Context<'_>,
    listener: &Listener,
    backend: &Backend,
    slot: Slot,
) -> rewrite::Translation {
    let snat = A::snat(context.config, slot.address());
    let port = slot.port_word();
    let client = context.packet.source;
    rewrite::Translation {
        source: snat,
        destination: backend.address,
        ports: Ports { source: port, destination: backend.port },
        delta: Delta::NONE
            .remove(sum64(client[0], client[1]))
            .remove(u32::from(context.ports.source))
            .remove(listener.sum)
            .add(sum64(snat[0], snat[1]))
            .add(u32::from(port))
            .add(backend.sum),
    }
}
