//! The RST that answers a segment at once (RFC 9293 §3.10.7.1): to a SYN it says "connection refused", and to a segment of
//! either side of a flow that was reset on purpose, that the connection is over.
//!
//! Built in the segment's place: 20 bytes of TCP, everything after them cut off. A segment with ACK is answered
//! with exactly the sequence number that its sender expects, which every stateful router on the way lets through. A segment
//! without ACK is answered with RST and ACK, sequence 0, acknowledging all it carried: a client in SYN-SENT accepts no
//! other RST.

use crate::{
    checksum::{Delta, sum64},
    disposition::Disposition,
    flow::family::Family,
    frame::Frame,
    headers::{Be16, Be32, Be64, Ipv4, Ipv6, Tcp, protocol, tcp_flag},
    layout::family,
    outcome::Outcome,
    parse::{self, Link, Packet, Ports},
    rewrite::write_macs,
    segment::Segment,
    subprograms::Subprograms,
};

/// The initial TTL, as RFC 1700 recommends it.
const TTL: u8 = 64;
const TCP_LENGTH: u16 = size_of::<Tcp>() as u16;

/// Turns a segment into the RST that answers it, to be sent back where it came from. (It is no RST itself.)
#[inline(always)]
pub fn answer<A: Family, S: Subprograms>(frame: &mut S::Frame, refused: Disposition) -> Disposition {
    match parsed::<A, S>(frame) {
        Ok(()) => refused.by(frame.interface()),
        Err(outcome) => Disposition::with(outcome, refused.service()),
    }
}

#[inline(always)]
fn parsed<A: Family, S: Subprograms>(frame: &mut S::Frame) -> Result<(), Outcome> {
    let link = parse::link::<S>(frame).ok_or(Outcome::NoRoom)?;
    let (packet, _) = parse::packet::<A, S>(frame, &link).ok_or(Outcome::NoRoom)?;
    let ports = parse::ports(frame, packet.transport).ok_or(Outcome::NoRoom)?;
    let segment = parse::segment(frame, &packet);
    build(frame, &link, &packet, ports, &segment)
}

/// Sequence number, acknowledgement number and, as a number, data offset and flags of the answer.
#[inline(always)]
fn answer_to(segment: &Segment) -> (u32, u32, u16) {
    const OFFSET: u16 = ((size_of::<Tcp>() / 4) << 12) as u16;
    if segment.has(tcp_flag::ACK) {
        return (segment.acknowledgement, 0, OFFSET | tcp_flag::RST as u16);
    }
    // SYN and FIN each take a number of the sequence.
    let (syn, fin) = (segment.flags >> 1 & 1, segment.flags & 1);
    let length = (segment.payload as u32).wrapping_add(u32::from(syn)).wrapping_add(u32::from(fin));
    (0, segment.sequence.wrapping_add(length), OFFSET | (tcp_flag::RST | tcp_flag::ACK) as u16)
}

/// Builds the RST in the packet's place. Err: there is no room, and the packet is dropped.
#[inline(always)]
fn build<F: Frame>(
    frame: &mut F,
    link: &Link,
    packet: &Packet,
    ports: Ports,
    segment: &Segment,
) -> Result<(), Outcome> {
    let client = parse::source_mac(frame);
    write_macs(frame, client, link.destination).ok_or(Outcome::NoRoom)?;
    let transport = if packet.family == family::IPV4 {
        ipv4_header(frame, packet).ok_or(Outcome::NoRoom)?
    } else {
        ipv6_header(frame, packet).ok_or(Outcome::NoRoom)?
    };
    let (sequence, acknowledgement, offset_flags) = answer_to(segment);
    let [data_offset, flags] = offset_flags.to_be_bytes();
    let tcp = frame.at::<Tcp>(transport).ok_or(Outcome::NoRoom)?;
    *tcp = Tcp {
        source: Be16::from_word(ports.destination),
        destination: Be16::from_word(ports.source),
        sequence: Be32::new(sequence),
        acknowledgement: Be32::new(acknowledgement),
        data_offset,
        flags,
        window: Be16::new(0),
        checksum: Be16::new(0),
        urgent: Be16::new(0),
    };
    // Pseudo-header (RFC 9293 §3.1, RFC 8200 §8.1) and the header's words that are not zero.
    let sum = Delta::NONE
        .add(sum64(packet.source[0], packet.source[1]))
        .add(sum64(packet.destination[0], packet.destination[1]))
        .add(u32::from(Be16::new(u16::from(protocol::TCP)).word()))
        .add(u32::from(Be16::new(TCP_LENGTH).word()))
        .add(u32::from(ports.source))
        .add(u32::from(ports.destination))
        .add(Be32::new(sequence).word())
        .add(Be32::new(acknowledgement).word())
        .add(u32::from(Be16::new(offset_flags).word()));
    tcp.checksum = Be16::from_word(sum.apply(0xffff));
    let end = transport + size_of::<Tcp>();
    if frame.length() > end && !frame.truncate(end) {
        return Err(Outcome::NoRoom);
    }
    Ok(())
}

/// Writes the answer's IPv4 header, without options. Returns where it ends.
#[inline(always)]
fn ipv4_header<F: Frame>(frame: &mut F, packet: &Packet) -> Option<usize> {
    let header = frame.at::<Ipv4>(packet.network)?;
    let (source, destination) = (packet.destination[0] as u32, packet.source[0] as u32);
    let (total_length, dont_fragment) = (Be16::new(size_of::<Ipv4>() as u16 + TCP_LENGTH), Be16::new(0x4000));
    let life = Be16::new(u16::from_be_bytes([TTL, protocol::TCP]));
    let version_length = Be16::new(0x4500);
    let sum = Delta::NONE
        .add(u32::from(version_length.word()))
        .add(u32::from(total_length.word()))
        .add(u32::from(dont_fragment.word()))
        .add(u32::from(life.word()))
        .add(source)
        .add(destination);
    *header = Ipv4 {
        version_length: 0x45,
        service: 0,
        total_length,
        id: Be16::new(0),
        fragment: dont_fragment,
        ttl_protocol: life,
        checksum: Be16::from_word(sum.apply(0xffff)),
        source: Be32::from_word(source),
        destination: Be32::from_word(destination),
    };
    Some(packet.network + size_of::<Ipv4>())
}

/// Writes the answer's IPv6 header. Returns where it ends.
#[inline(always)]
fn ipv6_header<F: Frame>(frame: &mut F, packet: &Packet) -> Option<usize> {
    let header = frame.at::<Ipv6>(packet.network)?;
    *header = Ipv6 {
        version_class_flow: Be32::new(6 << 28),
        payload_length: Be16::new(TCP_LENGTH),
        next_header: protocol::TCP,
        hop_limit: TTL,
        source: packet.destination.map(Be64::from_word),
        destination: packet.source.map(Be64::from_word),
    };
    Some(packet.network + size_of::<Ipv6>())
}
