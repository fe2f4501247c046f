//! Segments without payload, as whole IP packets.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// TCP control bits (RFC 9293 §3.1).
const SYN: u8 = 1 << 1;
const RST: u8 = 1 << 2;
const ACK: u8 = 1 << 4;
const TCP: u8 = 6;
const TCP_LENGTH: u16 = 20;
/// The initial TTL, as RFC 1700 recommends it.
const TTL: u8 = 64;
/// What an asking segment offers: so little that a backend in whose window it happens to lie sends no more than its
/// client can take, until the client speaks next.
const ASKING_WINDOW: u16 = 1024;

/// A RST in the name of `from` with just this sequence number.
pub(super) fn reset(from: SocketAddr, to: SocketAddr, sequence: u32) -> Vec<u8> {
    packet(from, to, &Segment { sequence, acknowledgement: 0, flags: RST, window: 0 })
}

/// A SYN in the name of `from`, without options.
pub(crate) fn syn(from: SocketAddr, to: SocketAddr, sequence: u32) -> Vec<u8> {
    packet(from, to, &Segment { sequence, acknowledgement: 0, flags: SYN, window: u16::MAX })
}

/// A bare ACK in the name of `from`.
///
/// The sequence number that its sender has reached is not known, and must not be hit: outside of the window (of the 2³²
/// numbers all but a few thousandths) a living kernel answers with an acknowledgement and changes nothing (RFC 9293
/// §3.10.7.4); one without the connection answers with a RST of sequence number `acknowledgement`.
pub(super) fn question(from: SocketAddr, to: SocketAddr, sequence: u32, acknowledgement: u32) -> Vec<u8> {
    packet(from, to, &Segment { sequence, acknowledgement, flags: ACK, window: ASKING_WINDOW })
}

struct Segment {
    sequence: u32,
    acknowledgement: u32,
    flags: u8,
    window: u16,
}

/// Both ends are of one family; of two, nothing is made.
fn packet(from: SocketAddr, to: SocketAddr, segment: &Segment) -> Vec<u8> {
    match (from.ip(), to.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut packet = ipv4(source, destination);
            let addresses = [source.octets(), destination.octets()].concat();
            packet.extend(tcp(from.port(), to.port(), segment, &addresses));
            packet
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut packet = ipv6(source, destination);
            let addresses = [source.octets(), destination.octets()].concat();
            packet.extend(tcp(from.port(), to.port(), segment, &addresses));
            packet
        }
        _ => Vec::new(),
    }
}

fn tcp(from: u16, to: u16, segment: &Segment, addresses: &[u8]) -> Vec<u8> {
    let mut header = Vec::with_capacity(usize::from(TCP_LENGTH));
    header.extend(from.to_be_bytes());
    header.extend(to.to_be_bytes());
    header.extend(segment.sequence.to_be_bytes());
    header.extend(segment.acknowledgement.to_be_bytes());
    header.extend([5 << 4, segment.flags]);
    header.extend(segment.window.to_be_bytes());
    header.extend([0; 4]);
    // The pseudo-header (RFC 9293 §3.1, RFC 8200 §8.1): of either family the same sum.
    let sum = checksum(&[addresses, &[0, TCP], &TCP_LENGTH.to_be_bytes(), &header]);
    header[16..18].copy_from_slice(&sum.to_be_bytes());
    header
}

fn ipv4(source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
    let mut header = vec![0x45, 0];
    header.extend((20 + TCP_LENGTH).to_be_bytes());
    // Identification 0, "don't fragment".
    header.extend([0, 0, 0x40, 0, TTL, TCP, 0, 0]);
    header.extend(source.octets());
    header.extend(destination.octets());
    let sum = checksum(&[&header]);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header
}

fn ipv6(source: Ipv6Addr, destination: Ipv6Addr) -> Vec<u8> {
    let mut header = vec![0x60, 0, 0, 0];
    header.extend(TCP_LENGTH.to_be_bytes());
    header.extend([TCP, TTL]);
    header.extend(source.octets());
    header.extend(destination.octets());
    header
}

/// RFC 1071, over parts of an even length each.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks_exact(2));
    let mut sum: u32 = words.map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};

    use super::*;

    fn ends() -> [(SocketAddr, SocketAddr); 2] {
        [
            ("10.0.0.100:6443".parse().unwrap(), "192.0.2.7:40001".parse().unwrap()),
            ("[fd00::100]:6443".parse().unwrap(), "[2001:db8::7]:40001".parse().unwrap()),
        ]
    }

    /// Ports, sequence, acknowledgement, RST and ACK of a packet that is right in every length and checksum.
    fn read(packet: &[u8]) -> (u16, u16, u32, u32, bool, bool) {
        let sliced = SlicedPacket::from_ip(packet).unwrap();
        let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { panic!("no TCP") };
        match sliced.net.unwrap() {
            NetSlice::Ipv4(ip) => {
                let header = ip.header();
                assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum());
                assert_eq!(usize::from(header.total_len()), packet.len());
                assert_eq!(Ok(tcp.checksum()), tcp.calc_checksum_ipv4(header.source(), header.destination()));
            }
            NetSlice::Ipv6(ip) => {
                let header = ip.header();
                assert_eq!(usize::from(header.payload_length()) + 40, packet.len());
                assert_eq!(Ok(tcp.checksum()), tcp.calc_checksum_ipv6(header.source(), header.destination()));
            }
            NetSlice::Arp(_) => panic!("ARP"),
        }
        assert!(tcp.payload().is_empty() && !tcp.syn() && !tcp.fin());
        let (sequence, acknowledgement) = (tcp.sequence_number(), tcp.acknowledgment_number());
        (tcp.source_port(), tcp.destination_port(), sequence, acknowledgement, tcp.rst(), tcp.ack())
    }

    #[test]
    fn a_reset_has_the_number_that_is_expected_and_acknowledges_nothing() {
        for (from, to) in ends() {
            let packet = reset(from, to, 0xffff_fffe);
            assert_eq!(read(&packet), (6443, 40001, 0xffff_fffe, 0, true, false));
        }
    }

    #[test]
    fn a_question_acknowledges_what_the_client_did() {
        for (from, to) in ends() {
            assert_eq!(read(&question(from, to, 7, 8)), (6443, 40001, 7, 8, false, true));
        }
    }

    #[test]
    fn there_is_nothing_between_the_families() {
        let [(four, _), (six, _)] = ends();
        assert!(reset(four, six, 1).is_empty());
    }
}
