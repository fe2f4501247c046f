//! A packet for a listener: finds its flow or begins one, and sends it to the backend.

use crate::{
    checksum::{Delta, sum64},
    client_answer::ClientAnswer,
    client_event::accepts,
    context::{self, Context},
    disposition::Disposition,
    flight_recorder::{FlowEvent, Note, Refusal, mapped},
    flow::{
        claim::claim,
        claimer::{Claimer, Clock},
        family::Family,
        look_up::Hit,
        query::Query,
        slot::{Found, Slot},
    },
    frame::Frame,
    hash::FlowHash,
    layout::{Backend, Listener, NextHop, Service, backend_flag},
    meta::{CLIENT_FIN, Kind, Meta, RETRANSMITTED},
    next_hop,
    outcome::{Event, Outcome},
    parse::{self, Ports},
    rewrite,
    segment::Segment,
    sequence::SendSequence,
    subprograms::Subprograms,
    transition, witness,
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
    let clock = Clock::read(maps, context.config);
    let sequence = numbers.load();
    if !transition::is_acknowledgement(meta, sequence, segment) {
        let answer = maps.client_event::<A>(query, hit.found(), segment, listener.service);
        return match answer.what() {
            ClientAnswer::FORWARD => Ok((slot, answer.meta())),
            ClientAnswer::FORWARD_AND_LEARN => {
                next_hop::remember::<A, S>(maps, listener.service, ways, slot, arrived_from(frame, context));
                Ok((slot, answer.meta()))
            }
            ClientAnswer::ASK_HOST if maps.has_socket::<A>(frame) => {
                if has_just_ended(answer.meta(), clock) {
                    return Err(Outcome::SynDoubted);
                }
                Ok((slot, answer.meta()))
            }
            ClientAnswer::REOPEN | ClientAnswer::ASK_BACKEND | ClientAnswer::ASK_HOST => {
                let found = Found::new(slot, answer.meta());
                let asks = answer.what() == ClientAnswer::ASK_BACKEND;
                reopen::<A, S>(frame, maps, context, listener, query, found, segment, clock, asks)
            }
            ClientAnswer::REFUSE => Err(Outcome::RefusedNoBackend),
            ClientAnswer::HOLD => Err(Outcome::SynDoubted),
            _ => Err(Outcome::ResetClient),
        };
    }
    numbers.store(sequence, sequence.acknowledged(segment.acknowledgement));
    // Once a second is enough to follow a client to another router: on every packet it cost 8 of 80 ns.
    if meta.seen() != clock.seen || meta.has(RETRANSMITTED) {
        refresh::<A, S>(frame, maps, context, listener, hit, sequence, segment, clock);
    }
    Ok((slot, meta))
}

/// Units after a client's last segment by which a socket of this host has seen it: one may be almost over when it begins.
const BATCH_REST: u16 = 2;

/// Has the client ended its flow to this host a moment ago? A NIC hands its packets over in batches: the socket may not have seen the
/// FIN or RST yet, and the kernel would refuse the SYN after these, or begin a connection at a host that takes no new ones.
#[inline(always)]
const fn has_just_ended(meta: Meta, clock: Clock) -> bool {
    meta.has(CLIENT_FIN) && meta.age(clock.seen) < BATCH_REST
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

/// A SYN on a slot that its own tuple has closed, or that was reset on purpose: a new flow, in the same slot. Where it `asks` its
/// backend, the answer begins the flow.
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
    asks: bool,
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
    if !maps.admit_source(A::NUMBER, A::source(context.packet.source)) {
        return Err(Outcome::SourceBudget);
    }
    if asks {
        return Ok((found.slot(), before));
    }
    let claimer = claimer(listener, backend, segment, clock);
    let claim = maps.take::<A>(query, &claimer, found);
    if claim.failure().is_some() {
        return Err(Outcome::SynRace);
    }
    Ok(won::<A, S>(frame, maps, context, query, &claimer, claim.slot()))
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
    if !maps.admit_source(A::NUMBER, A::source(context.packet.source)) {
        return Err(Outcome::SourceBudget);
    }
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
