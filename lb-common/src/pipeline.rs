//! A packet's way through the steps, the same in the kernel and in the tests of this crate.

use crate::{
    class::Class,
    classify::{class_of, classify},
    context::enter,
    destination::{listener_from, slot_of},
    disposition::Disposition,
    flow::{
        family::{Family, V4, V6},
        look_up,
        query::Query,
    },
    forward,
    frame::Frame,
    headers::{IPV4, IPV6},
    outcome::Outcome,
    parse::{self, Carries, Link, Packet},
    reply,
    subprograms::Subprograms,
};

/// Takes a packet from its first byte to its outcome.
#[inline(always)]
pub fn pipeline<S: Subprograms>(frame: &mut S::Frame, maps: &S) -> Disposition {
    let Some(link) = parse::link::<S>(frame) else {
        return Disposition::NOT_OURS;
    };
    match link.kind {
        IPV4 => finish::<V4, S>(frame, maps, &link),
        IPV6 => finish::<V6, S>(frame, maps, &link),
        _ => Disposition::NOT_OURS,
    }
}

#[inline(always)]
fn finish<A: Family, S: Subprograms>(frame: &mut S::Frame, maps: &S, link: &Link) -> Disposition {
    let class = classify::<A, S>(frame, maps, link);
    if class == Class::NOT_OURS {
        return Disposition::NOT_OURS;
    }
    match maps.segments::<A>(frame, class) {
        Disposition::ICMP => maps.translate_icmp::<A>(frame),
        refused if refused.is_refused() => S::refuse::<A>(frame, refused),
        done => done,
    }
}

/// Takes a TCP packet of one family to its outcome. [`Disposition::ICMP`]: it is none, but [`icmp::translate`]'s. Refused: the
/// answer is [`refuse::answer`]'s to write.
///
/// They are apart because together they need more stack than the kernel gives.
#[inline(always)]
pub fn segments<A: Family, S: Subprograms>(frame: &mut S::Frame, maps: &S, class: Class) -> Disposition {
    let Some(link) = parse::link::<S>(frame) else {
        return Disposition::NOT_OURS;
    };
    let Some((packet, carries)) = parse::packet::<A, S>(frame, &link) else {
        return Disposition::NOT_OURS;
    };
    match carries {
        Carries::Tcp => {}
        Carries::Icmp => return Disposition::ICMP,
        Carries::TooMuch => return too_much::<A, S>(frame, maps, &link, &packet),
        Carries::Other => return Disposition::NOT_OURS,
    }
    let Some(ports) = parse::ports(frame, packet.transport) else {
        return Disposition::NOT_OURS;
    };
    let Some(config) = maps.config() else {
        return Disposition::NOT_OURS;
    };
    let class =
        if class == Class::UNSURE { class_of::<A, S>(maps, packet.destination, ports) } else { class };
    let first = class.first_listener();
    if first != 0 {
        // A listener's port is never a slot, at any address: a packet that is for no listener is not ours.
        let Some((id, listener)) = listener_from::<A, S>(maps, first, packet.destination, ports.destination)
        else {
            return Disposition::NOT_OURS;
        };
        // Before everything that can be done without it: the flow's sets may be a cache miss.
        let query = Query::new::<A>(config, A::tuple(packet.source, ports.source, id));
        let hit = look_up::find::<A, S>(maps, config, &query);
        return match enter(frame, maps, config, &link, packet, ports) {
            Ok(context) => forward::forward::<A, S>(frame, maps, &context, listener, &query, hit),
            Err(Outcome::UnknownInterface) => Disposition::with(Outcome::UnknownInterface, listener.service),
            Err(_) => Disposition::NOT_OURS,
        };
    }
    if let Some(slot) = slot_of::<A, S>(maps, config, class.place(), packet.destination, ports.destination) {
        return match enter(frame, maps, config, &link, packet, ports) {
            Ok(context) => reply::reply::<A, S>(frame, maps, &context, slot),
            Err(_) => Disposition::NOT_OURS,
        };
    }
    Disposition::NOT_OURS
}

/// A packet whose ports lie behind too many extension headers: ours if it is for an address of ours.
#[inline(always)]
fn too_much<A: Family, S: Subprograms>(
    frame: &mut S::Frame,
    maps: &S,
    link: &Link,
    packet: &Packet,
) -> Disposition {
    match maps.snat_index::<A>(packet.destination) {
        Some(_) if maps.arrival(frame.interface(), link.vlan, link.destination).interface().is_some() => {
            Disposition::with(Outcome::ExtensionHeaders, 0)
        }
        _ => Disposition::NOT_OURS,
    }
}
