//! ICMP errors about flows. Their sender saw our addresses, so it sends them to us. The end that sent the quoted segment
//! must receive them, or a path with a smaller MTU would swallow every full segment (RFC 5508 REQ-4, RFC 7690).
//!
//! The quoted packet is translated back to what the receiver has sent. The outer packet is sent on as if we were the
//! router in question. Eight quoted bytes of TCP are enough; receivers do not verify the quoted TCP checksum.

use crate::{
    checksum::{Delta, sum64},
    destination,
    disposition::Disposition,
    flow::{
        family::Family,
        look_up::{self, is_owner},
        query::Query,
    },
    frame::Frame,
    headers::{Be16, Be32, Be64, Icmp, Ipv4, Ipv6, TcpStart, protocol},
    layout::{Config, NextHop, backend_flag, family},
    meta::{Meta, NUMBERED},
    next_hop::learned,
    outcome::Outcome,
    parse::{self, Link, Packet, Ports},
    rewrite,
    subprograms::Subprograms,
};

/// ICMP types that quote a packet: unreachable (with "fragmentation needed"), time exceeded, parameter problem.
const ERRORS: [u8; 3] = [3, 11, 12];
/// ICMPv6 types that do: unreachable, packet too big, time exceeded, parameter problem.
const ERRORS6: core::ops::RangeInclusive<u8> = 1..=4;

/// Type and code of an ICMP error that asks for smaller packets (RFC 1191).
const FRAGMENTATION_NEEDED: (u8, u8) = (3, 4);
/// The ICMPv6 type that does (RFC 8201).
const PACKET_TOO_BIG: u8 = 2;
/// The smallest MTU of a link that carries IPv6 (RFC 8200 §5).
const IPV6_MINIMUM_MTU: u32 = 1280;

/// The two ends of the quoted packet, as words.
#[derive(Clone, Copy)]
struct Quoted {
    source: [u64; 2],
    destination: [u64; 2],
    ports: Ports,
    /// Where its network header begins.
    network: usize,
    /// Where its TCP header begins.
    transport: usize,
    /// Its sequence number.
    sequence: u32,
}

/// What the quoted packet was before it was translated, and where to send the error.
struct Target {
    service: u16,
    /// The quoted packet's source: the error's new destination.
    source: [u64; 2],
    destination: [u64; 2],
    ports: Ports,
    /// The address of ours on that side.
    from: [u64; 2],
    hop: NextHop,
    /// Can only one who sees the flow have quoted it, as far as that is known here?
    in_flight: bool,
}

/// Translates an ICMP error about a flow; anything else is not ours.
#[inline(always)]
pub fn translate<A: Family, S: Subprograms>(frame: &mut S::Frame, maps: &S) -> Disposition {
    let (Some(config), Some(link)) = (maps.config(), parse::link::<S>(frame)) else {
        return Disposition::NOT_OURS;
    };
    let Some((packet, _)) = parse::packet::<A, S>(frame, &link) else {
        return Disposition::NOT_OURS;
    };
    let Some(quoted) = quoted::<A, S>(frame, &packet) else {
        return Disposition::NOT_OURS;
    };
    if quoted.source != packet.destination
        || maps.arrival(frame.interface(), link.vlan, link.destination).interface().is_none()
    {
        return Disposition::NOT_OURS;
    }
    let target = match maps.find_listener(A::NUMBER, quoted.source, quoted.ports.source) {
        0 => to_client::<A, S>(maps, config, &quoted),
        id => to_backend::<A, S>(maps, config, &quoted, id),
    };
    let Some(target) = target else {
        return Disposition::NOT_OURS;
    };
    if !target.in_flight && is_too_big::<A, S>(frame, &packet) {
        return Disposition::with(Outcome::IcmpUnproven, target.service);
    }
    let sent = send::<A, S>(frame, maps, config, &link, &packet, &quoted, &target);
    match sent {
        Ok(interface) => Disposition::leaving(Outcome::IcmpTranslated, target.service, interface),
        Err(outcome) => Disposition::with(outcome, target.service),
    }
}

/// Does the error say that a packet was too big for some link?
#[inline(always)]
fn is_too_big<A: Family, S: Subprograms>(frame: &mut S::Frame, packet: &Packet) -> bool {
    let Some(icmp) = frame.at::<Icmp>(packet.transport) else {
        return false;
    };
    if A::NUMBER == family::IPV4 {
        (icmp.kind, icmp.code) == FRAGMENTATION_NEEDED
    } else {
        icmp.kind == PACKET_TOO_BIG
    }
}

/// Reads what the error quotes, if it is an error and quotes TCP.
#[inline(always)]
fn quoted<A: Family, S: Subprograms>(frame: &mut S::Frame, packet: &Packet) -> Option<Quoted> {
    if packet.fragment {
        return None;
    }
    let kind = frame.at::<Icmp>(packet.transport)?.kind;
    let network = packet.transport + size_of::<Icmp>();
    let (source, destination, transport) = if A::NUMBER == family::IPV4 {
        if !ERRORS.contains(&kind) {
            return None;
        }
        let header = *frame.at::<Ipv4>(network)?;
        let [_, carried] = header.ttl_protocol.get().to_be_bytes();
        let length = usize::from(header.version_length & 0x0f) * 4;
        if header.version_length >> 4 != 4
            || length < size_of::<Ipv4>()
            || carried != protocol::TCP
            || header.fragment.get() & 0x1fff != 0
        {
            return None;
        }
        let words = [header.source, header.destination].map(|address| [u64::from(address.word()), 0]);
        (words[0], words[1], network + length)
    } else {
        if !ERRORS6.contains(&kind) {
            return None;
        }
        let header = *frame.at::<Ipv6>(network)?;
        if header.next_header != protocol::TCP {
            return None;
        }
        (header.source.map(Be64::word), header.destination.map(Be64::word), network + size_of::<Ipv6>())
    };
    // The verifier's comparison first: after ours, LLVM would leave it out.
    let ports = parse::ports(frame, transport)?;
    // What is read must be the packet's, not padding behind it, and all of the packet must be there.
    if transport + size_of::<TcpStart>() > packet.end || frame.remaining(packet.end) < 0 {
        return None;
    }
    let sequence = frame.at::<TcpStart>(transport)?.sequence.get();
    Some(Quoted { source, destination, ports, network, transport, sequence })
}

/// The quoted packet was on its way to a client: the error goes to its backend.
#[inline(always)]
fn to_backend<A: Family, S: Subprograms>(
    maps: &S,
    config: &Config,
    quoted: &Quoted,
    id: u16,
) -> Option<Target> {
    let listener = maps.listener(id)?;
    let tuple = A::tuple(quoted.destination, quoted.ports.destination, id);
    let query = Query::new::<A>(config, tuple);
    let hit = look_up::find::<A, S>(maps, config, &query);
    let numbers = A::numbers(maps, hit.ways?, hit.slot)?.load();
    let backend = maps.backend(hit.meta.backend())?;
    if backend.flags.load() & backend_flag::LOCAL != 0 {
        return None;
    }
    let snat = A::snat(config, hit.slot.address());
    Some(Target {
        service: listener.service,
        source: backend.address,
        destination: snat,
        ports: Ports { source: backend.port, destination: hit.slot.port_word() },
        from: snat,
        hop: NextHop(backend.next_hop.load()),
        in_flight: hit.meta.has(NUMBERED) && numbers.has_in_flight(quoted.sequence),
    })
}

/// The quoted packet was on its way to a backend: the error goes to its client.
#[inline(always)]
fn to_client<A: Family, S: Subprograms>(maps: &S, config: &Config, quoted: &Quoted) -> Option<Target> {
    let slot = destination::slot::<A, S>(maps, config, quoted.source, quoted.ports.source)?;
    let ways = A::set(maps, slot.set)?;
    let meta = Meta(A::meta(ways, slot.way).load());
    let backend = maps.backend(meta.backend())?;
    if !meta.is_live() || backend.address != quoted.destination || backend.port != quoted.ports.destination {
        return None;
    }
    let tuple = A::load(ways, slot.way);
    let (address, port, listener_id) = A::parts(tuple);
    if !is_owner::<A>(ways, slot.way, meta, tuple) {
        return None;
    }
    let listener = maps.listener(listener_id)?;
    Some(Target {
        service: listener.service,
        source: address,
        destination: listener.address,
        ports: Ports { source: port, destination: listener.port },
        from: listener.address,
        hop: learned(maps, A::return_hop(maps, ways, slot).map_or(0, |index| index.load())),
        // The client's own kernel compares the number; what it believes is about its own connections alone.
        in_flight: true,
    })
}

#[inline(always)]
fn send<A: Family, S: Subprograms>(
    frame: &mut S::Frame,
    maps: &S,
    config: &Config,
    link: &Link,
    packet: &Packet,
    quoted: &Quoted,
    target: &Target,
) -> Result<u32, Outcome> {
    if packet.ttl <= 1 {
        return Err(Outcome::TtlExpired);
    }
    if A::NUMBER == family::IPV4 && !parse::ipv4_checksum_holds::<S>(frame, packet) {
        return Err(Outcome::BadChecksum);
    }
    let hop = match target.hop {
        NextHop::UNKNOWN => NextHop(maps.routed(frame, A::NUMBER, target.source)),
        hop => hop,
    };
    if hop == NextHop::UNKNOWN {
        return Err(Outcome::NextHopUnknown);
    }
    rewrite_quoted::<A, S>(frame, config, packet, quoted, target).ok_or(Outcome::Malformed)?;
    rewrite::network(frame, packet, target.from, target.source).ok_or(Outcome::Malformed)?;
    rewrite::deliver::<S>(frame, config, link, hop)
}

/// Rewrites what is quoted, and the ICMP checksum that covers it.
#[inline(always)]
fn rewrite_quoted<A: Family, S: Subprograms>(
    frame: &mut S::Frame,
    config: &Config,
    packet: &Packet,
    quoted: &Quoted,
    target: &Target,
) -> Option<()> {
    let addresses = Delta::NONE
        .remove(sum64(quoted.source[0], quoted.source[1]))
        .remove(sum64(quoted.destination[0], quoted.destination[1]))
        .add(sum64(target.source[0], target.source[1]))
        .add(sum64(target.destination[0], target.destination[1]));
    let mut delta = addresses;
    if A::NUMBER == family::IPV4 {
        let header = frame.at::<Ipv4>(quoted.network)?;
        header.source = Be32::from_word(target.source[0] as u32);
        header.destination = Be32::from_word(target.destination[0] as u32);
        let old = header.checksum.word();
        header.checksum = Be16::from_word(addresses.apply(old));
        delta = delta.remove(u32::from(old)).add(u32::from(header.checksum.word()));
    } else {
        let header = frame.at::<Ipv6>(quoted.network)?;
        header.source = target.source.map(Be64::from_word);
        header.destination = target.destination.map(Be64::from_word);
        // ICMPv6 has the outer addresses in its checksum, too (RFC 4443 §2.3).
        delta = delta
            .remove(sum64(packet.source[0], packet.source[1]))
            .remove(sum64(packet.destination[0], packet.destination[1]))
            .add(sum64(target.from[0], target.from[1]))
            .add(sum64(target.source[0], target.source[1]));
    }
    let tcp = frame.at::<TcpStart>(quoted.transport)?;
    tcp.source = Be16::from_word(target.ports.source);
    tcp.destination = Be16::from_word(target.ports.destination);
    delta = delta
        .remove(u32::from(quoted.ports.source))
        .remove(u32::from(quoted.ports.destination))
        .add(u32::from(target.ports.source))
        .add(u32::from(target.ports.destination));
    let icmp = frame.at::<Icmp>(packet.transport)?;
    if let Some(rest) = raised_mtu::<A>(config, icmp) {
        delta = delta.remove(icmp.rest.word()).add(rest.word());
        icmp.rest = rest;
    }
    icmp.checksum = Be16::from_word(delta.apply(icmp.checksum.word()));
    Some(())
}

/// What an error must say instead that asks for smaller packets than it may. Whatever it asks for, the sender's kernel heeds
/// for every client behind the same address.
#[inline(always)]
fn raised_mtu<A: Family>(config: &Config, icmp: &Icmp) -> Option<Be32> {
    let rest = icmp.rest.get();
    if A::NUMBER == family::IPV4 {
        // The upper half is not used (RFC 1191 §4). Routers from before that RFC say 0.
        let is_lower = (icmp.kind, icmp.code) == FRAGMENTATION_NEEDED && rest & 0xffff < config.mtu_floor;
        is_lower.then(|| Be32::new(rest & 0xffff_0000 | config.mtu_floor & 0xffff))
    } else {
        (icmp.kind == PACKET_TOO_BIG && rest < IPV6_MINIMUM_MTU).then(|| Be32::new(IPV6_MINIMUM_MTU))
    }
}
