//! A packet for a slot: if it comes from the slot's backend, it goes to the slot's client.

use crate::{
    backend_event::answer,
    checksum::{Delta, sum64},
    context::{self, Context},
    disposition::Disposition,
    flow::{
        claimer::Clock,
        family::Family,
        look_up::is_owner,
        slot::{Found, Slot},
    },
    frame::Frame,
    headers::tcp_flag,
    layout::{Backend, Listener, NextHop},
    meta::Meta,
    next_hop::learned,
    outcome::{Event, Outcome},
    parse::{self, Ports},
    rewrite,
    segment::Segment,
    subprograms::Subprograms,
    transition, witness,
};

/// Backends that a packet without a slot is compared with.
const NAMED_BACKENDS: u8 = 12;

/// Sends a backend's packet to the client whose slot it names.
#[inline(always)]
pub fn reply<A: Family, S: Subprograms>(
    frame: &mut S::Frame,
    maps: &S,
    context: &Context<'_>,
    slot: Slot,
) -> Disposition {
    let Some(ways) = A::set(maps, slot.set) else {
        return Disposition::NOT_OURS;
    };
    // Loaded before the slot is looked at.
    let return_hop = A::return_hop(maps, ways, slot).map_or(0, |index| index.load());
    let meta = Meta(A::meta(ways, slot.way).load());
    let Some(backend) = maps.backend(meta.backend()) else {
        return unknown_slot::<A, S>(maps, context);
    };
    let from_backend = backend.family == A::NUMBER
        && backend.address == context.packet.source
        && backend.port == context.ports.source;
    if !from_backend || !meta.is_live() {
        return unknown_slot::<A, S>(maps, context);
    }
    let tuple = A::load(ways, slot.way);
    if !is_owner::<A>(ways, slot.way, meta, tuple) {
        return unknown_slot::<A, S>(maps, context);
    }
    let (address, port, listener_id) = A::parts(tuple);
    let Some(listener) = maps.listener(listener_id) else {
        return Disposition::NOT_OURS;
    };
    let client = Client { backend, listener, address, port, slot, return_hop };
    match send::<A, S>(frame, maps, context, ways, meta, &client) {
        Ok(done) => done,
        Err(outcome) => Disposition::with(outcome, listener.service),
    }
}

/// The flow that a reply belongs to, and its client.
struct Client<'a> {
    backend: &'a Backend,
    listener: &'a Listener,
    address: [u64; 2],
    port: u16,
    slot: Slot,
    return_hop: u16,
}

/// A packet of the flow's own backend.
#[inline(always)]
fn send<A: Family, S: Subprograms>(
    frame: &mut S::Frame,
    maps: &S,
    context: &Context<'_>,
    ways: &A::Set,
    meta: Meta,
    client: &Client<'_>,
) -> Result<Disposition, Outcome> {
    if (context.config.clients_only >> (context.interface & 31)) & 1 != 0 {
        return Err(Outcome::BackendInterface);
    }
    context::check::<A, S>(frame, &context.packet)?;
    let segment = parse::segment(frame, &context.packet);
    if !segment.valid {
        return Err(Outcome::Malformed);
    }
    learn::<A, S>(frame, maps, context, ways, meta, client, &segment)?;
    transmit::<A, S>(frame, maps, context, client)
}

/// Learns what the segment tells of its flow. Err: it is not to be sent to the client.
#[inline(always)]
fn learn<A: Family, S: Subprograms>(
    frame: &mut S::Frame,
    maps: &S,
    context: &Context<'_>,
    ways: &A::Set,
    meta: Meta,
    client: &Client<'_>,
    segment: &Segment,
) -> Result<(), Outcome> {
    let numbers = A::numbers(maps, ways, client.slot).ok_or(Outcome::Malformed)?;
    let clock = Clock::read(maps, context.config);
    let before = numbers.load();
    if transition::is_sign_of_life(meta, before, segment) {
        witness::hear(client.backend, clock.jiffies);
    }
    if !transition::goes_on(meta, before, segment) {
        if segment.has(tcp_flag::SYN) && is_from_elsewhere(frame, context, client.backend) {
            maps.count_event(client.listener.service, Event::BackendNeighbourOdd);
        }
        let found = Found::new(client.slot, meta);
        return match maps.backend_event::<A>(found, segment, client.listener.service) {
            answer::REPLY => Ok(()),
            answer::SECOND_CHANCE => Err(Outcome::SecondChance),
            _ => Err(Outcome::ResetBackend),
        };
    }
    numbers.store(before, before.sent_until(segment.sequence.wrapping_add(segment.payload as u32)));
    // Not in every unit: the client's next packet is to find it old, and to look where it came from.
    let age = meta.age(clock.seen);
    if age >= 2 && !transition::only_answers(meta, age, before, segment) {
        A::meta(ways, client.slot.way).store_high(clock.seen);
    }
    Ok(())
}

/// Whether a backend's packet comes from another neighbour than packets to it are sent to. That decides nothing: a backend may
/// answer by another router than it is reached by.
#[inline(always)]
fn is_from_elsewhere<F: Frame>(frame: &mut F, context: &Context<'_>, backend: &Backend) -> bool {
    let hop = NextHop(backend.next_hop.load());
    hop != NextHop::UNKNOWN && hop != NextHop::new(parse::source_mac(frame), context.interface)
}

/// Sends the packet to the client, by the way its own packets came.
#[inline(always)]
fn transmit<A: Family, S: Subprograms>(
    frame: &mut S::Frame,
    maps: &S,
    context: &Context<'_>,
    client: &Client<'_>,
) -> Result<Disposition, Outcome> {
    let translation = to_client(context, client.listener, client.address, client.port);
    let service = client.listener.service;
    let hop = match learned(maps, client.return_hop) {
        NextHop::UNKNOWN => NextHop(maps.routed(frame, A::NUMBER, client.address)),
        hop => hop,
    };
    if hop == NextHop::UNKNOWN {
        return Err(Outcome::NextHopUnknown);
    }
    let interface =
        rewrite::send::<S>(frame, context.config, &context.link, &context.packet, &translation, hop)?;
    Ok(Disposition::leaving(Outcome::Replied, service, interface))
}

/// The translation of a backend's packet on its way to the client at `address` (words) and `port` (word).
#[inline(always)]
fn to_client(
    context: &Context<'_>,
    listener: &Listener,
    address: [u64; 2],
    port: u16,
) -> rewrite::Translation {
    let packet = &context.packet;
    rewrite::Translation {
        source: listener.address,
        destination: address,
        ports: Ports { source: listener.port, destination: port },
        delta: Delta::NONE
            .remove(sum64(packet.source[0], packet.source[1]))
            .remove(u32::from(context.ports.source))
            .remove(sum64(packet.destination[0], packet.destination[1]))
            .remove(u32::from(context.ports.destination))
            .add(listener.sum)
            .add(sum64(address[0], address[1]))
            .add(u32::from(port)),
    }
}

/// A reply to an unknown slot: one that is not its sender's. It is left to the network stack, which may know its socket
/// or answer with a RST. Counted when one of our backends sent it: another load balancer may have the same VIP.
#[inline(always)]
fn unknown_slot<A: Family, S: Subprograms>(maps: &S, context: &Context<'_>) -> Disposition {
    if maps.is_backend(A::NUMBER, context.packet.source, context.ports.source) {
        if context.config.hold != 0 {
            return Disposition::with(Outcome::Held, 0);
        }
        Disposition::with(Outcome::ReplyUnknown, 0)
    } else {
        Disposition::NOT_OURS
    }
}

/// Is this the address (words) and port (word) of one of the first backends?
#[inline(always)]
pub fn is_backend<S: Subprograms>(maps: &S, family: u8, address: [u64; 2], port: u16) -> bool {
    let Some(config) = maps.config() else {
        return false;
    };
    for id in 1..=NAMED_BACKENDS {
        if u32::from(id) > config.last_backend {
            break;
        }
        let Some(backend) = maps.backend(id) else {
            break;
        };
        if backend.family == family && backend.port == port && backend.address == address {
            return true;
        }
    }
    false
}
