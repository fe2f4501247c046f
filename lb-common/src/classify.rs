//! The first look at a packet: could it be ours?

use crate::{
    class::Class,
    flow::family::Family,
    frame::Frame as _,
    headers::{Ipv4, Ipv6, protocol},
    layout::family,
    parse::{self, Link, Ports},
    subprograms::Subprograms,
};

/// Could this be ours: is its port a listener's, or its address one of ours?
#[inline(always)]
pub fn classify<A: Family, S: Subprograms>(frame: &mut S::Frame, maps: &S, link: &Link) -> Class {
    let (transport, protocol, destination) = if A::NUMBER == family::IPV4 {
        let Some(header) = frame.at::<Ipv4>(link.network) else {
            return Class::NOT_OURS;
        };
        let length = usize::from(header.version_length & 0x0f) * 4;
        let [_, protocol] = header.ttl_protocol.get().to_be_bytes();
        (link.network + length, protocol, [u64::from(header.destination.word()), 0])
    } else {
        let Some(header) = frame.at::<Ipv6>(link.network) else {
            return Class::NOT_OURS;
        };
        let destination = [header.destination[0].word(), header.destination[1].word()];
        (link.network + size_of::<Ipv6>(), header.next_header, destination)
    };
    if protocol != protocol::TCP {
        // An error about a flow, or TCP behind extension headers.
        let hidden = A::NUMBER == family::IPV6 && parse::is_extension(protocol);
        return if protocol == A::ICMP || hidden { Class::UNSURE } else { Class::NOT_OURS };
    }
    let Some(ports) = parse::ports(frame, transport) else {
        return Class::NOT_OURS;
    };
    class_of::<A, S>(maps, destination, ports)
}

/// The class of a TCP packet for this destination (words).
#[inline(always)]
pub fn class_of<A: Family, S: Subprograms>(maps: &S, destination: [u64; 2], ports: Ports) -> Class {
    match maps.first_listener(u16::from_be(ports.destination)) {
        0 => Class::snat(maps.snat_at::<A>(destination)),
        id => Class::listener(id),
    }
}
