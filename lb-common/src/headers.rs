//! Headers as they are on the wire: byte arrays behind accessors, so that no byte order can be mistaken.
//!
//! Where a name says *word*, it is network bytes read as a native integer: good for comparing, copying and
//! one's-complement sums, not for arithmetic.

use crate::frame::Plain;

/// 16 bits in network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Be16([u8; 2]);

impl Be16 {
    /// From a number.
    #[inline(always)]
    pub const fn new(number: u16) -> Self {
        Self(number.to_be_bytes())
    }

    /// As a number.
    #[inline(always)]
    pub const fn get(self) -> u16 {
        u16::from_be_bytes(self.0)
    }

    /// From a word.
    #[inline(always)]
    pub const fn from_word(word: u16) -> Self {
        Self(word.to_ne_bytes())
    }

    /// As a word.
    #[inline(always)]
    pub const fn word(self) -> u16 {
        u16::from_ne_bytes(self.0)
    }
}

/// 32 bits in network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Be32([u8; 4]);

impl Be32 {
    /// From a number.
    #[inline(always)]
    pub const fn new(number: u32) -> Self {
        Self(number.to_be_bytes())
    }

    /// As a number.
    #[inline(always)]
    pub const fn get(self) -> u32 {
        u32::from_be_bytes(self.0)
    }

    /// From a word.
    #[inline(always)]
    pub const fn from_word(word: u32) -> Self {
        Self(word.to_ne_bytes())
    }

    /// As a word.
    #[inline(always)]
    pub const fn word(self) -> u32 {
        u32::from_ne_bytes(self.0)
    }
}

/// 64 bits as they are on the wire, half of an IPv6 address.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Be64([u8; 8]);

impl Be64 {
    /// From a word.
    #[inline(always)]
    pub const fn from_word(word: u64) -> Self {
        Self(word.to_ne_bytes())
    }

    /// As a word.
    #[inline(always)]
    pub const fn word(self) -> u64 {
        u64::from_ne_bytes(self.0)
    }
}

/// A MAC address.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Mac([u8; 6]);

impl Mac {
    /// From six bytes.
    pub const fn new(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    /// As the lower 48 bits of a word whose first byte in memory order is the address's first.
    pub const fn number(self) -> u64 {
        let [a, b, c, d, e, f] = self.0;
        u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
    }

    /// From the lower 48 bits of a number.
    pub const fn from_number(number: u64) -> Self {
        let [a, b, c, d, e, f, _, _] = number.to_le_bytes();
        Self([a, b, c, d, e, f])
    }

    /// The six bytes.
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }
}

/// Destination and source of a frame: the part of its header that a router changes. Both as [`Mac::number`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MacPair {
    // The destination and the source's first two bytes: each piece is one load, or one store.
    first: [u8; 8],
    last: [u8; 4],
}

impl MacPair {
    /// To and from these.
    #[inline(always)]
    pub const fn new(destination: u64, source: u64) -> Self {
        let first = (destination & MAC) | source << 48;
        Self { first: first.to_le_bytes(), last: ((source >> 16) as u32).to_le_bytes() }
    }

    /// Destination address.
    #[inline(always)]
    pub const fn destination(self) -> u64 {
        u64::from_le_bytes(self.first) & MAC
    }

    /// Source address.
    #[inline(always)]
    pub const fn source(self) -> u64 {
        u64::from_le_bytes(self.first) >> 48 | (u32::from_le_bytes(self.last) as u64) << 16
    }
}

/// The bits of a [`Mac::number`].
const MAC: u64 = 0xffff_ffff_ffff;

/// An Ethernet II header.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ethernet {
    /// Destination and source address.
    pub macs: MacPair,
    /// EtherType of the network header, or of the first tag.
    pub kind: Be16,
}

/// A VLAN tag after its EtherType (IEEE 802.1Q).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct VlanTag {
    /// Priority (3 bits), drop eligible (1), VLAN id (12).
    pub control: Be16,
    /// EtherType of the network header, or of the next tag.
    pub kind: Be16,
}

/// EtherType of a VLAN tag.
pub const VLAN: u16 = 0x8100;
/// EtherType of an outer ("service") VLAN tag, 802.1ad.
pub const SERVICE_VLAN: u16 = 0x88a8;
/// EtherType of IPv4.
pub const IPV4: u16 = 0x0800;
/// EtherType of IPv6.
pub const IPV6: u16 = 0x86dd;

/// IP protocol numbers.
pub mod protocol {
    /// Hop-by-hop options (IPv6).
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// Routing header (IPv6).
    pub const ROUTING: u8 = 43;
    /// Fragment header (IPv6).
    pub const FRAGMENT: u8 = 44;
    /// ICMPv6.
    pub const ICMP6: u8 = 58;
    /// Destination options (IPv6).
    pub const DESTINATION_OPTIONS: u8 = 60;
}

/// An IPv4 header without its options (RFC 791).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ipv4 {
    /// Version and header length in words.
    pub version_length: u8,
    /// Type of service.
    pub service: u8,
    /// Bytes of header and payload.
    pub total_length: Be16,
    /// Identification.
    pub id: Be16,
    /// Flags and fragment offset.
    pub fragment: Be16,
    /// Time to live and, in the second byte, the protocol.
    pub ttl_protocol: Be16,
    /// Header checksum.
    pub checksum: Be16,
    /// Source address.
    pub source: Be32,
    /// Destination address.
    pub destination: Be32,
}

/// An IPv6 header (RFC 8200).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ipv6 {
    /// Version, traffic class, flow label.
    pub version_class_flow: Be32,
    /// Bytes after this header.
    pub payload_length: Be16,
    /// Protocol of the next header.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source address.
    pub source: [Be64; 2],
    /// Destination address.
    pub destination: [Be64; 2],
}

/// A TCP header without its options (RFC 9293).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Tcp {
    /// Source port.
    pub source: Be16,
    /// Destination port.
    pub destination: Be16,
    /// Sequence number.
    pub sequence: Be32,
    /// Acknowledgement number.
    pub acknowledgement: Be32,
    /// Header length in words, in the upper four bits.
    pub data_offset: u8,
    /// See [`tcp_flag`].
    pub flags: u8,
    /// Receive window.
    pub window: Be16,
    /// Checksum over pseudo-header, header and payload.
    pub checksum: Be16,
    /// Urgent pointer.
    pub urgent: Be16,
}

/// TCP control bits.
pub mod tcp_flag {
    /// No more data from the sender.
    pub const FIN: u8 = 1;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 1 << 1;
    /// Reset the connection.
    pub const RST: u8 = 1 << 2;
    /// The acknowledgement field means something.
    pub const ACK: u8 = 1 << 4;
}

/// The first eight bytes of a TCP header: all of it that an ICMP error must quote.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TcpStart {
    /// Source port.
    pub source: Be16,
    /// Destination port.
    pub destination: Be16,
    /// Sequence number.
    pub sequence: Be32,
}

/// An ICMP or ICMPv6 error's header (RFC 792, RFC 4443); the packet in question follows.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Icmp {
    /// Type.
    pub kind: u8,
    /// Code.
    pub code: u8,
    /// Checksum; for ICMPv6 over a pseudo-header too.
    pub checksum: Be16,
    /// An MTU or a pointer, depending on the type.
    pub rest: Be32,
}

// SAFETY: byte arrays.
unsafe impl Plain for Be16 {}
// SAFETY: as above.
unsafe impl Plain for Be32 {}
// SAFETY: repr(C) structures of bytes and byte arrays: alignment 1, no padding, every bit pattern valid.
unsafe impl Plain for Ethernet {}
// SAFETY: as above.
unsafe impl Plain for MacPair {}
// SAFETY: as above.
unsafe impl Plain for VlanTag {}
// SAFETY: as above.
unsafe impl Plain for Ipv4 {}
// SAFETY: as above.
unsafe impl Plain for Ipv6 {}
// SAFETY: as above.
unsafe impl Plain for Tcp {}
// SAFETY: as above.
unsafe impl Plain for TcpStart {}
// SAFETY: as above.
unsafe impl Plain for Icmp {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_as_long_as_on_the_wire() {
        assert_eq!((size_of::<Ethernet>(), align_of::<Ethernet>()), (14, 1));
        assert_eq!((size_of::<VlanTag>(), align_of::<VlanTag>()), (4, 1));
        assert_eq!((size_of::<Ipv4>(), align_of::<Ipv4>()), (20, 1));
        assert_eq!((size_of::<Ipv6>(), align_of::<Ipv6>()), (40, 1));
        assert_eq!((size_of::<Tcp>(), align_of::<Tcp>()), (20, 1));
        assert_eq!((size_of::<TcpStart>(), align_of::<TcpStart>()), (8, 1));
        assert_eq!((size_of::<Icmp>(), align_of::<Icmp>()), (8, 1));
    }

    #[test]
    fn both_macs_of_a_frame_survive_being_numbers() {
        let (one, other) =
            (Mac::new([1, 2, 3, 4, 5, 6]).number(), Mac::new([0xf1, 0xf2, 7, 8, 9, 10]).number());
        // Whatever is above the 48 bits is no part of an address.
        let pair = MacPair::new(one | 0xffff << 48, other);
        assert_eq!((pair.destination(), pair.source()), (one, other));
        assert_eq!((pair.first, pair.last), ([1, 2, 3, 4, 5, 6, 0xf1, 0xf2], [7, 8, 9, 10]));
        assert_eq!((size_of::<MacPair>(), align_of::<MacPair>()), (12, 1));
    }

    #[test]
    fn a_mac_survives_being_a_number() {
        let mac = Mac::new([1, 2, 3, 4, 5, 6]);
        assert_eq!(Mac::from_number(mac.number()).bytes(), [1, 2, 3, 4, 5, 6]);
        assert!(mac.number() < 1 << 48);
    }
}
