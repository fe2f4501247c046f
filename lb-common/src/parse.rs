//! Reads headers, and no more of them than it takes to see that a packet is not ours.

use crate::{
    checksum::fold,
    flow::family::Family,
    frame::Frame,
    headers::{Ethernet, IPV4, IPV6, Ipv4, Ipv6, SERVICE_VLAN, Tcp, TcpStart, VLAN, VlanTag, protocol},
    layout::family,
    segment::Segment,
    subprograms::Subprograms,
};

/// VLAN tags that are looked through.
const TAGS: usize = 2;
/// IPv6 extension headers that are looked through.
const EXTENSION_HEADERS: usize = 4;
/// The VLAN id in a tag's control field.
const VLAN_ID: u16 = 0x0fff;
/// The fragment offset and "more fragments" of an IPv4 header, as a number.
const FRAGMENTED: u16 = 0x3fff;
/// The fragment offset alone.
const FRAGMENT_OFFSET: u16 = 0x1fff;

/// The Ethernet header and its VLAN tags.
#[derive(Clone, Copy)]
pub struct Link {
    /// Destination address: see [`crate::headers::Mac::number`].
    pub destination: u64,
    /// VLAN ids, as in [`crate::layout::Interface::vlan`].
    pub vlan: u32,
    /// The EtherType of the network header, as a number.
    pub kind: u16,
    /// Where the network header begins.
    pub network: usize,
}

/// Reads the Ethernet header and up to two VLAN tags.
#[inline(always)]
pub fn link<S: Subprograms>(frame: &mut S::Frame) -> Option<Link> {
    let ethernet = *frame.at::<Ethernet>(0)?;
    let untagged = Tags { kind: ethernet.kind.get(), network: size_of::<Ethernet>(), vlan: 0 };
    let tags = if is_tag(untagged.kind) { Tags::unpack(S::tags(frame))? } else { untagged };
    let destination = ethernet.macs.destination();
    Some(Link { destination, vlan: tags.vlan, kind: tags.kind, network: tags.network })
}

/// The source MAC address: see [`crate::headers::Mac::number`]. Not in [`Link`], as few packets need it.
#[inline(always)]
pub fn source_mac<F: Frame>(frame: &mut F) -> u64 {
    frame.at::<Ethernet>(0).map_or(0, |ethernet| ethernet.macs.source())
}

/// The VLAN tags of a frame that has some.
#[derive(Clone, Copy)]
struct Tags {
    kind: u16,
    network: usize,
    vlan: u32,
}

impl Tags {
    #[inline(always)]
    fn pack(self) -> u64 {
        u64::from(self.kind) | (self.network as u64 & 0xff) << 16 | u64::from(self.vlan) << 32
    }

    #[inline(always)]
    fn unpack(word: u64) -> Option<Self> {
        let network = (word >> 16) as usize & 0xff;
        (network != 0).then_some(Self { kind: word as u16, network, vlan: (word >> 32) as u32 })
    }
}

/// Reads the tags of a frame that has some, as one word; 0: it is cut short. See [`Subprograms::tags`].
#[inline(always)]
pub fn tags<F: Frame>(frame: &mut F) -> u64 {
    let mut tags = Tags { kind: VLAN, network: size_of::<Ethernet>(), vlan: 0 };
    for _ in 0..TAGS {
        if !is_tag(tags.kind) {
            break;
        }
        let Some(tag) = frame.at::<VlanTag>(tags.network) else {
            return 0;
        };
        tags.vlan = tags.vlan << 16 | u32::from(tag.control.get() & VLAN_ID);
        tags.kind = tag.kind.get();
        tags.network += size_of::<VlanTag>();
    }
    tags.pack()
}

#[inline(always)]
const fn is_tag(kind: u16) -> bool {
    kind == VLAN || kind == SERVICE_VLAN
}

/// A packet's addresses, and where its TCP header or ICMP message begins. Addresses are words: an IPv4 address is
/// the lower half of the first.
#[derive(Clone, Copy)]
pub struct Packet {
    /// See [`family`].
    pub family: u8,
    /// Source address.
    pub source: [u64; 2],
    /// Destination address.
    pub destination: [u64; 2],
    /// Where the network header begins.
    pub network: usize,
    /// Where the transport header begins.
    pub transport: usize,
    /// Where the packet ends by its own length field, without padding. Wrong if that is beyond the frame.
    pub end: usize,
    /// The first fragment of several.
    pub fragment: bool,
    /// TTL or hop limit.
    pub ttl: u8,
}

/// What a packet carries.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Carries {
    /// TCP, with its ports.
    Tcp,
    /// ICMP or ICMPv6.
    Icmp,
    /// Nothing of interest.
    Other,
    /// More extension headers than are looked through: the ports were not seen.
    TooMuch,
}

/// Reads an IPv4 header. None: cut short, or not IPv4.
#[inline(always)]
pub fn ipv4<F: Frame>(frame: &mut F, network: usize) -> Option<(Packet, Carries)> {
    let header = *frame.at::<Ipv4>(network)?;
    let header_length = usize::from(header.version_length & 0x0f) * 4;
    if header.version_length >> 4 != 4 || header_length < size_of::<Ipv4>() {
        return None;
    }
    let [ttl, proto] = header.ttl_protocol.get().to_be_bytes();
    let fragment = header.fragment.get();
    let carries = match proto {
        _ if fragment & FRAGMENT_OFFSET != 0 => Carries::Other,
        protocol::TCP => Carries::Tcp,
        protocol::ICMP => Carries::Icmp,
        _ => Carries::Other,
    };
    let end = network + usize::from(header.total_length.get());
    let packet = Packet {
        family: family::IPV4,
        source: [u64::from(header.source.word()), 0],
        destination: [u64::from(header.destination.word()), 0],
        network,
        transport: network + header_length,
        end,
        fragment: fragment & FRAGMENTED != 0,
        ttl,
    };
    Some((packet, carries))
}

/// Reads an IPv6 header and what extension headers follow. None: cut short, or not IPv6.
#[inline(always)]
pub fn ipv6<S: Subprograms>(frame: &mut S::Frame, network: usize) -> Option<(Packet, Carries)> {
    let header = *frame.at::<Ipv6>(network)?;
    if header.version_class_flow.get() >> 28 != 6 {
        return None;
    }
    let mut upper = Upper { next: header.next_header, fragment: 0, transport: network + size_of::<Ipv6>() };
    if is_extension(upper.next) {
        upper = Upper::unpack(S::upper_layer(frame, upper.transport, upper.next))?;
    }
    let carries = match upper.next {
        _ if upper.fragment == LATER_FRAGMENT => Carries::Other,
        protocol::TCP => Carries::Tcp,
        protocol::ICMP6 => Carries::Icmp,
        other if is_extension(other) => Carries::TooMuch,
        _ => Carries::Other,
    };
    let end = network + size_of::<Ipv6>() + usize::from(header.payload_length.get());
    let packet = Packet {
        family: family::IPV6,
        source: header.source.map(|half| half.word()),
        destination: header.destination.map(|half| half.word()),
        network,
        transport: upper.transport,
        end,
        fragment: upper.fragment != 0,
        ttl: header.hop_limit,
    };
    Some((packet, carries))
}

/// [`Upper::fragment`] of a first fragment.
const FIRST_FRAGMENT: u8 = 1;
/// [`Upper::fragment`] of another.
const LATER_FRAGMENT: u8 = 2;

/// What follows the extension headers.
#[derive(Clone, Copy)]
struct Upper {
    next: u8,
    /// 0: no fragment.
    fragment: u8,
    transport: usize,
}

impl Upper {
    #[inline(always)]
    fn pack(self) -> u64 {
        u64::from(self.next) | u64::from(self.fragment) << 8 | (self.transport as u64 & 0x3fff) << 16
    }

    #[inline(always)]
    fn unpack(word: u64) -> Option<Self> {
        let transport = (word >> 16) as usize & 0x3fff;
        (transport != 0).then_some(Self { next: word as u8, fragment: (word >> 8) as u8, transport })
    }
}

/// Walks the extension headers from `transport` on, the first of which is a `next`. The result is one word; 0: the
/// packet is cut short. See [`Subprograms::upper_layer`].
#[inline(always)]
pub fn upper_layer<F: Frame>(frame: &mut F, transport: usize, next: u8) -> u64 {
    let mut upper = Upper { next, fragment: 0, transport };
    for _ in 0..EXTENSION_HEADERS {
        if !is_extension(upper.next) {
            break;
        }
        let Some(start) = frame.at::<[u8; 8]>(upper.transport & 0x3fff) else {
            return 0;
        };
        let size = if upper.next == protocol::FRAGMENT {
            let field = u16::from_be_bytes([start[2], start[3]]);
            if field & 0xfff8 != 0 {
                upper.fragment = LATER_FRAGMENT;
            } else if field & 1 != 0 {
                upper.fragment = FIRST_FRAGMENT;
            }
            8
        } else {
            8 + usize::from(start[1]) * 8
        };
        upper.next = start[0];
        upper.transport += size;
    }
    upper.pack()
}

/// Is there another header behind this one?
#[inline(always)]
pub const fn is_extension(next: u8) -> bool {
    matches!(
        next,
        protocol::HOP_BY_HOP | protocol::ROUTING | protocol::FRAGMENT | protocol::DESTINATION_OPTIONS
    )
}

/// Reads the network header that follows `link`, if it is of this family.
#[inline(always)]
pub fn packet<A: Family, S: Subprograms>(frame: &mut S::Frame, link: &Link) -> Option<(Packet, Carries)> {
    match link.kind {
        IPV4 if A::NUMBER == family::IPV4 => ipv4(frame, link.network),
        IPV6 if A::NUMBER == family::IPV6 => ipv6::<S>(frame, link.network),
        _ => None,
    }
}

/// Source and destination port, as words.
#[derive(Clone, Copy)]
pub struct Ports {
    /// Source port.
    pub source: u16,
    /// Destination port.
    pub destination: u16,
}

/// Reads the ports at `offset`, in a TCP header or in as much of one as an ICMP error quotes.
#[inline(always)]
pub fn ports<F: Frame>(frame: &mut F, offset: usize) -> Option<Ports> {
    let start = frame.at::<TcpStart>(offset)?;
    Some(Ports { source: start.source.word(), destination: start.destination.word() })
}

/// Reads the TCP header of a packet that is ours. [`Segment::NONE`]: it contradicts the packet's length.
///
/// (Not an Option: for None LLVM would copy registers that were never set, which the verifier does not allow.)
#[inline(always)]
pub fn segment<F: Frame>(frame: &mut F, packet: &Packet) -> Segment {
    let remaining = frame.remaining(packet.end);
    let Some(tcp) = frame.at::<Tcp>(packet.transport) else {
        return Segment::NONE;
    };
    let header_length = i64::from(tcp.data_offset >> 4) * 4;
    let options = header_length - size_of::<Tcp>() as i64;
    let payload = packet.end as i64 - packet.transport as i64 - header_length;
    // One comparison for all: which of them is negative does not matter.
    if options | payload | remaining < 0 {
        return Segment::NONE;
    }
    Segment {
        valid: true,
        flags: tcp.flags,
        sequence: tcp.sequence.get(),
        acknowledgement: tcp.acknowledgement.get(),
        payload: payload as usize,
    }
}

/// Is the IPv4 header's checksum right? (RFC 791; a router drops what is not, RFC 1812 §5.2.2.)
#[inline(always)]
pub fn ipv4_checksum_holds<S: Subprograms>(frame: &mut S::Frame, packet: &Packet) -> bool {
    let Some(words) = frame.at::<[[u8; 4]; 5]>(packet.network) else {
        return false;
    };
    let mut sum = 0u64;
    for word in words {
        sum += u64::from(u32::from_ne_bytes(*word));
    }
    let options = packet.network + size_of::<Ipv4>();
    if packet.transport > options {
        sum += S::option_sum(frame, options, packet.transport);
    }
    fold(sum) == 0xffff
}

/// The sum of the option words from `offset` to `end`, at most ten. 0: the packet ends before them.
///
/// One fixed size for each number of words: of a loop LLVM makes a moving pointer, and the verifier loses track of which
/// part of the packet it may read.
#[inline(always)]
pub fn option_sum<F: Frame>(frame: &mut F, offset: usize, end: usize) -> u64 {
    match end.wrapping_sub(offset) / 4 {
        1 => words::<1, F>(frame, offset),
        2 => words::<2, F>(frame, offset),
        3 => words::<3, F>(frame, offset),
        4 => words::<4, F>(frame, offset),
        5 => words::<5, F>(frame, offset),
        6 => words::<6, F>(frame, offset),
        7 => words::<7, F>(frame, offset),
        8 => words::<8, F>(frame, offset),
        9 => words::<9, F>(frame, offset),
        10 => words::<10, F>(frame, offset),
        _ => 0,
    }
}

#[inline(always)]
fn words<const N: usize, F: Frame>(frame: &mut F, offset: usize) -> u64 {
    let mut sum = 0;
    if let Some(words) = frame.at::<[[u8; 4]; N]>(offset) {
        for word in words {
            sum += u64::from(u32::from_ne_bytes(*word));
        }
    }
    sum
}
