//! The frames by which hosts on a link say who has an address: ARP (RFC 826, RFC 5227) for IPv4, neighbour discovery
//! (RFC 4861, RFC 4862) for IPv6. Built and read as bytes, Ethernet header included.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::network::Mac;

const BROADCAST: Mac = [0xff; 6];
const NOBODY: Mac = [0; 6];

pub(super) const ETHERTYPE_ARP: u16 = 0x0806;
pub(super) const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERNET_LENGTH: usize = 14;

const ARP_REQUEST: u16 = 1;

const ICMPV6: u8 = 58;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const OVERRIDE: u8 = 0x20;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// What a frame says about an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Statement {
    /// "I have this address."
    Claim,
    /// "I am about to take this address, unless somebody has it."
    Probe,
}

/// A statement about an address that was heard on the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Heard {
    pub(super) statement: Statement,
    pub(super) address: IpAddr,
    /// Who says so.
    pub(super) mac: Mac,
}

/// Asks whether anybody has `address`, without claiming it: an ARP probe, or a solicitation from `::`.
pub(super) fn probe(address: IpAddr, mac: Mac) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => arp(mac, Ipv4Addr::UNSPECIFIED, address),
        IpAddr::V6(address) => {
            neighbour_discovery(mac, Ipv6Addr::UNSPECIFIED, solicited_node(address), address, None)
        }
    }
}

/// Tells everybody that `address` is at `mac`: an ARP announcement, or an unsolicited neighbour advertisement that
/// overrides what caches hold.
pub(super) fn announcement(address: IpAddr, mac: Mac) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => arp(mac, address, address),
        IpAddr::V6(address) => neighbour_discovery(mac, address, ALL_NODES, address, Some(mac)),
    }
}

/// The group that a solicitation for `address` is sent to.
pub(super) fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., high, low] = address.segments();
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | (high & 0xff), low)
}

fn ethernet(destination: Mac, source: Mac, ethertype: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(86);
    frame.extend(destination);
    frame.extend(source);
    frame.extend(ethertype.to_be_bytes());
    frame
}

/// A broadcast request: announcements are requests too, some hosts ignore replies they did not ask for (RFC 5227 §3).
fn arp(mac: Mac, sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut frame = ethernet(BROADCAST, mac, ETHERTYPE_ARP);
    frame.extend([0, 1, 0x08, 0, 6, 4]); // Ethernet, IPv4, lengths of their addresses
    frame.extend(ARP_REQUEST.to_be_bytes());
    frame.extend(mac);
    frame.extend(sender.octets());
    frame.extend(NOBODY);
    frame.extend(target.octets());
    frame
}

/// An advertisement when it carries a link-layer address, else a solicitation. (A solicitation from `::` must not carry
/// one: RFC 4861 §4.3.)
fn neighbour_discovery(
    mac: Mac,
    source: Ipv6Addr,
    destination: Ipv6Addr,
    target: Ipv6Addr,
    advertised: Option<Mac>,
) -> Vec<u8> {
    let mut icmp = match advertised {
        Some(_) => vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, OVERRIDE, 0, 0, 0],
        None => vec![NEIGHBOUR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0],
    };
    icmp.extend(target.octets());
    if let Some(advertised) = advertised {
        icmp.extend([2, 1]); // target link-layer address, eight bytes in all
        icmp.extend(advertised);
    }
    let checksum = icmpv6_checksum(source, destination, &icmp);
    icmp[2..4].copy_from_slice(&checksum.to_be_bytes());

    let [.., a, b, c, d] = destination.octets();
    let mut frame = ethernet([0x33, 0x33, a, b, c, d], mac, ETHERTYPE_IPV6);
    frame.extend([0x60, 0, 0, 0, 0, icmp.len() as u8, ICMPV6, 255]);
    frame.extend(source.octets());
    frame.extend(destination.octets());
    frame.extend(icmp);
    frame
}

fn icmpv6_checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let pseudo_header = source.octets().into_iter().chain(destination.octets());
    let bytes: Vec<u8> = pseudo_header.chain(message.iter().copied()).collect();
    let mut sum = bytes.chunks(2).fold(message.len() as u32 + u32::from(ICMPV6), |sum, pair| {
        sum + u32::from(pair[0]) * 256 + pair.get(1).map_or(0, |low| u32::from(*low))
    });
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// What a frame from the link says about an address. None when it says nothing, or is malformed.
///
/// ICMPv6 checksums are not looked at: a frame from this very machine (a container, a virtual machine) may not have
/// one yet.
pub(super) fn parse(frame: &[u8]) -> Option<Heard> {
    let source = *frame.get(6..)?.first_chunk()?;
    let payload = frame.get(ETHERNET_LENGTH..)?;
    match u16::from_be_bytes(*frame.get(12..)?.first_chunk()?) {
        ETHERTYPE_ARP => parse_arp(payload),
        ETHERTYPE_IPV6 => parse_neighbour_discovery(payload, source),
        _ => None,
    }
}

fn parse_arp(packet: &[u8]) -> Option<Heard> {
    if packet.get(..6)? != [0, 1, 0x08, 0, 6, 4] {
        return None;
    }
    let mac = *packet.get(8..)?.first_chunk()?;
    let sender = Ipv4Addr::from(*packet.get(14..)?.first_chunk::<4>()?);
    let target = Ipv4Addr::from(*packet.get(24..)?.first_chunk::<4>()?);
    let (statement, address) = match sender {
        Ipv4Addr::UNSPECIFIED => (Statement::Probe, target),
        sender => (Statement::Claim, sender),
    };
    Some(Heard { statement, address: address.into(), mac })
}

fn parse_neighbour_discovery(packet: &[u8], mac: Mac) -> Option<Heard> {
    // Neighbour discovery has no extension headers, and hop limit 255 proves that it comes from this link.
    if packet.get(6..8)? != [ICMPV6, 255] {
        return None;
    }
    let source = Ipv6Addr::from(*packet.get(8..)?.first_chunk::<16>()?);
    let icmp = packet.get(40..)?;
    let target = Ipv6Addr::from(*icmp.get(8..)?.first_chunk::<16>()?);
    let (statement, address) = match (icmp.get(..2)?, source) {
        ([NEIGHBOUR_ADVERTISEMENT, 0], _) => (Statement::Claim, target),
        ([NEIGHBOUR_SOLICITATION, 0], Ipv6Addr::UNSPECIFIED) => (Statement::Probe, target),
        ([NEIGHBOUR_SOLICITATION, 0], source) => (Statement::Claim, source),
        _ => return None,
    };
    Some(Heard { statement, address: address.into(), mac })
}

#[cfg(test)]
mod tests {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};

    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 7];

    fn addresses() -> [IpAddr; 2] {
        ["192.168.2.140".parse().unwrap(), "fd00::1:8c".parse().unwrap()]
    }

    #[test]
    fn what_is_built_is_read_back() {
        for address in addresses() {
            let heard = |statement| Some(Heard { statement, address, mac: MAC });
            assert_eq!(parse(&probe(address, MAC)), heard(Statement::Probe));
            assert_eq!(parse(&announcement(address, MAC)), heard(Statement::Claim));
        }
    }

    /// An independent reader agrees on every field, checksum included.
    #[test]
    fn neighbour_discovery_is_well_formed() {
        let [_, address] = addresses();
        for (frame, kind, destination) in [
            (probe(address, MAC), NEIGHBOUR_SOLICITATION, "ff02::1:ff01:8c"),
            (announcement(address, MAC), NEIGHBOUR_ADVERTISEMENT, "ff02::1"),
        ] {
            let packet = SlicedPacket::from_ethernet(&frame).unwrap();
            let Some(NetSlice::Ipv6(ip)) = packet.net else { panic!("not IPv6") };
            assert_eq!(ip.header().destination_addr(), destination.parse::<Ipv6Addr>().unwrap());
            let Some(TransportSlice::Icmpv6(icmp)) = packet.transport else { panic!("not ICMPv6") };
            assert_eq!(icmp.type_u8(), kind);
            assert!(icmp.is_checksum_valid(ip.header().source(), ip.header().destination()));
        }
    }

    /// Byte by byte as RFC 826 and RFC 5227 §1.1 lay them out: a probe, and a padded answer to it.
    #[test]
    fn arp_is_laid_out_as_the_standards_say() {
        let [address, _] = addresses();
        let probe = probe(address, MAC);
        assert_eq!(
            probe,
            [
                &[0xff; 6][..],
                &MAC,
                &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
                &MAC,
                &[0; 4],
                &[0; 6],
                &[192, 168, 2, 140],
            ]
            .concat()
        );
        let reply = [
            &MAC[..],
            &[2, 0, 0, 0, 0, 9],
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2],
            &[2, 0, 0, 0, 0, 9],
            &[192, 168, 2, 140],
            &MAC,
            &[0; 4],
            &[0; 18],
        ]
        .concat();
        let claim = Heard { statement: Statement::Claim, address, mac: [2, 0, 0, 0, 0, 9] };
        assert_eq!(parse(&reply), Some(claim));
    }

    #[test]
    fn a_truncated_frame_says_nothing() {
        for address in addresses() {
            for frame in [probe(address, MAC), announcement(address, MAC)] {
                let meaningful = if address.is_ipv4() { frame.len() } else { 78 };
                for length in 0..meaningful {
                    assert_eq!(parse(&frame[..length]), None, "{length} bytes");
                }
            }
        }
    }

    #[test]
    fn neighbour_discovery_from_beyond_a_router_says_nothing() {
        let [_, address] = addresses();
        let mut frame = announcement(address, MAC);
        frame[ETHERNET_LENGTH + 7] = 254;
        assert_eq!(parse(&frame), None);
    }
}
