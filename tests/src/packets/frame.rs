//! Packets to send, as plain values with everything in them to be changed.

#![expect(clippy::unwrap_used, reason = "the tests decide what is built, and it fits")]

use std::net::{IpAddr, SocketAddr};

use etherparse::{
    EtherType, Ethernet2Header, Icmpv4Type, Icmpv6Type, IpFragOffset, IpNumber, Ipv4Header, Ipv6FlowLabel,
    Ipv6Header, TcpHeader,
};
pub use lb_common::headers::tcp_flag::{ACK, FIN, RST, SYN};

use super::world::{BACKEND_START, CLIENT_START, LB_MAC, ROUTER_MAC};

/// "Push", which changes nothing for us.
pub const PSH: u8 = 1 << 3;

/// A VLAN tag: protocol, priority and id.
pub type Tag = (u16, u16);

/// IPv6 extension headers, by number.
pub mod extension {
    pub use lb_common::headers::protocol::{DESTINATION_OPTIONS, HOP_BY_HOP, ROUTING};
}

/// Which part of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    /// The beginning, with the ports.
    First,
    /// What comes after.
    Later,
}

/// A TCP packet.
#[derive(Clone, Debug)]
pub struct Frame {
    /// MAC addresses: from whom, to whom.
    pub macs: ([u8; 6], [u8; 6]),
    /// VLAN tags, outermost first.
    pub tags: Vec<Tag>,
    /// From whom.
    pub source: SocketAddr,
    /// To whom.
    pub destination: SocketAddr,
    /// TTL or hop limit.
    pub ttl: u8,
    /// IPv4 options, whole words of them.
    pub options: Vec<u8>,
    /// IPv6 extension headers, eight bytes each.
    pub extensions: Vec<u8>,
    /// Only a part of the packet.
    pub fragment: Option<Fragment>,
    /// TCP flags.
    pub flags: u8,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledgement: u32,
    /// TCP options, whole words of them.
    pub tcp_options: Vec<u8>,
    /// What follows the TCP header.
    pub payload: Vec<u8>,
    /// Bytes behind the packet, as short Ethernet frames have them.
    pub padding: usize,
}

impl Frame {
    /// A bare ACK from the router to the load balancer.
    pub fn new(source: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            macs: (ROUTER_MAC, LB_MAC),
            tags: Vec::new(),
            source,
            destination,
            ttl: 64,
            options: Vec::new(),
            extensions: Vec::new(),
            fragment: None,
            flags: ACK,
            sequence: CLIENT_START,
            acknowledgement: BACKEND_START + 1,
            tcp_options: Vec::new(),
            payload: Vec::new(),
            padding: 0,
        }
    }

    /// A SYN with the options that Linux sends.
    pub fn syn(source: SocketAddr, destination: SocketAddr) -> Self {
        let tcp_options = [2, 4, 5, 180, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7].to_vec();
        Self { flags: SYN, acknowledgement: 0, tcp_options, ..Self::new(source, destination) }
    }

    /// Its bytes, checksums and all.
    pub fn bytes(&self) -> Vec<u8> {
        let segment = self.segment();
        let mut bytes = link(self.macs, &self.tags, self.source.ip());
        self.network(&mut bytes, &segment, IpNumber::TCP);
        bytes.extend(segment);
        bytes.resize(bytes.len() + self.padding, 0xee);
        bytes
    }

    /// Where the network header begins.
    pub fn network_offset(&self) -> usize {
        14 + 4 * self.tags.len()
    }

    /// Where the TCP header begins.
    pub fn transport_offset(&self) -> usize {
        let header = if self.source.is_ipv4() { 20 } else { 40 };
        let fragment = if self.source.is_ipv6() && self.fragment.is_some() { 8 } else { 0 };
        self.network_offset() + header + self.options.len() + 8 * self.extensions.len() + fragment
    }

    /// The TCP header and what follows.
    fn segment(&self) -> Vec<u8> {
        let mut header = TcpHeader::new(self.source.port(), self.destination.port(), self.sequence, 64_000);
        header.acknowledgment_number = self.acknowledgement;
        header.fin = self.flags & FIN != 0;
        header.syn = self.flags & SYN != 0;
        header.rst = self.flags & RST != 0;
        header.psh = self.flags & PSH != 0;
        header.ack = self.flags & ACK != 0;
        header.set_options_raw(&self.tcp_options).unwrap();
        header.checksum = match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                header.calc_checksum_ipv4_raw(source.octets(), destination.octets(), &self.payload).unwrap()
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                header.calc_checksum_ipv6_raw(source.octets(), destination.octets(), &self.payload).unwrap()
            }
            _ => panic!("{} and {} are of two families", self.source, self.destination),
        };
        [&header.to_bytes()[..], &self.payload].concat()
    }

    fn network(&self, bytes: &mut Vec<u8>, segment: &[u8], carried: IpNumber) {
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let mut header = Ipv4Header {
                    total_len: (20 + self.options.len() + segment.len()) as u16,
                    identification: 0x1234,
                    dont_fragment: self.fragment.is_none(),
                    more_fragments: self.fragment == Some(Fragment::First),
                    time_to_live: self.ttl,
                    protocol: carried,
                    source: source.octets(),
                    destination: destination.octets(),
                    options: self.options[..].try_into().unwrap(),
                    ..Ipv4Header::default()
                };
                if self.fragment == Some(Fragment::Later) {
                    header.fragment_offset = IpFragOffset::try_new(100).unwrap();
                }
                header.header_checksum = header.calc_header_checksum();
                header.write(bytes).unwrap();
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let extensions = self.extension_headers(carried);
                Ipv6Header {
                    traffic_class: 0x0a,
                    flow_label: Ipv6FlowLabel::try_new(0xabcde).unwrap(),
                    payload_length: (extensions.1.len() + segment.len()) as u16,
                    next_header: extensions.0,
                    hop_limit: self.ttl,
                    source: source.octets(),
                    destination: destination.octets(),
                }
                .write(bytes)
                .unwrap();
                bytes.extend(extensions.1);
            }
            _ => panic!("{} and {} are of two families", self.source, self.destination),
        }
    }

    /// The number of the first, and all of them.
    fn extension_headers(&self, carried: IpNumber) -> (IpNumber, Vec<u8>) {
        let mut kinds = self.extensions.clone();
        if self.fragment.is_some() {
            kinds.push(IpNumber::IPV6_FRAGMENTATION_HEADER.0);
        }
        let mut bytes = Vec::new();
        for (index, kind) in kinds.iter().enumerate() {
            let next = kinds.get(index + 1).copied().unwrap_or(carried.0);
            bytes.extend(match (IpNumber(*kind), self.fragment) {
                (IpNumber::IPV6_FRAGMENTATION_HEADER, Some(Fragment::First)) => [next, 0, 0, 1, 1, 2, 3, 4],
                (IpNumber::IPV6_FRAGMENTATION_HEADER, _) => [next, 0, 3, 0, 1, 2, 3, 4],
                (IpNumber::IPV6_ROUTE_HEADER, _) => [next, 0, 0, 0, 0, 0, 0, 0],
                // Options: four bytes of padding.
                _ => [next, 0, 1, 4, 0, 0, 0, 0],
            });
        }
        (kinds.first().map_or(carried, |kind| IpNumber(*kind)), bytes)
    }
}

/// An ICMP message that quotes a packet.
#[derive(Clone, Debug)]
pub struct Icmp {
    /// The frame around it; of its TCP part nothing is used.
    pub outer: Frame,
    /// Type and code.
    pub kind: (u8, u8),
    /// The second word: an MTU.
    pub word: [u8; 4],
    /// What is quoted.
    pub quoted: Vec<u8>,
}

impl Icmp {
    /// "Your packet is too big", said by `router` to the sender of `sent`, quoting its first `bytes` bytes of TCP.
    pub fn too_big(router: IpAddr, sent: &Frame, bytes: usize) -> Self {
        let network = sent.network_offset();
        let quoted = sent.bytes()[network..sent.transport_offset() + bytes].to_vec();
        let kind = if router.is_ipv4() { (3, 4) } else { (2, 0) };
        let outer = Frame::new(SocketAddr::new(router, 0), SocketAddr::new(sent.source.ip(), 0));
        Self { outer, kind, word: [0, 0, 5, 0], quoted }
    }

    /// Its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let message = self.message();
        let carried = if self.outer.source.is_ipv4() { IpNumber::ICMP } else { IpNumber::IPV6_ICMP };
        let mut bytes = link(self.outer.macs, &self.outer.tags, self.outer.source.ip());
        self.outer.network(&mut bytes, &message, carried);
        bytes.extend(message);
        bytes.resize(bytes.len() + self.outer.padding, 0xee);
        bytes
    }

    fn message(&self) -> Vec<u8> {
        let ((type_u8, code_u8), bytes5to8) = (self.kind, self.word);
        let checksum = match (self.outer.source.ip(), self.outer.destination.ip()) {
            (IpAddr::V4(_), IpAddr::V4(_)) => {
                Icmpv4Type::Unknown { type_u8, code_u8, bytes5to8 }.calc_checksum(&self.quoted)
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                Icmpv6Type::Unknown { type_u8, code_u8, bytes5to8 }
                    .calc_checksum(source.octets(), destination.octets(), &self.quoted)
                    .unwrap()
            }
            _ => panic!("one family"),
        };
        [&[type_u8, code_u8], &checksum.to_be_bytes()[..], &bytes5to8, &self.quoted].concat()
    }
}

/// An Ethernet header and its tags.
fn link((source, destination): ([u8; 6], [u8; 6]), tags: &[Tag], address: IpAddr) -> Vec<u8> {
    let inner = if address.is_ipv4() { EtherType::IPV4 } else { EtherType::IPV6 };
    let kind = |index: usize| tags.get(index).map_or(inner, |(protocol, _)| EtherType(*protocol));
    let mut bytes = Ethernet2Header { source, destination, ether_type: kind(0) }.to_bytes().to_vec();
    for (index, (_, control)) in tags.iter().enumerate() {
        bytes.extend(control.to_be_bytes());
        bytes.extend(kind(index + 1).0.to_be_bytes());
    }
    bytes
}
