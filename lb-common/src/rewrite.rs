//! Full NAT: both addresses, both ports, TTL and the Ethernet header, with checksums by difference.

use crate::{
    checksum::{Delta, sum64},
    frame::Frame,
    headers::{Be16, Be32, Be64, Ethernet, Ipv4, Ipv6, MacPair, Tcp},
    layout::{Config, INTERFACES, NextHop, family},
    outcome::Outcome,
    parse::{Link, Packet, Ports},
    subprograms::Subprograms,
};

/// What a packet's addresses become.
#[derive(Clone, Copy)]
pub struct Translation {
    /// Source address, as words.
    pub source: [u64; 2],
    /// Destination address, as words.
    pub destination: [u64; 2],
    /// Ports, as words.
    pub ports: Ports,
    /// The change of the TCP checksum by the addresses and ports of both ends.
    pub delta: Delta,
}

/// The one's-complement sum of an address and a port: what listeners and backends keep.
#[inline(always)]
#[must_use]
pub const fn endpoint_sum(address: [u64; 2], port: u16) -> u32 {
    crate::checksum::fold32(sum64(address[0], address[1]) as u64 + port as u64)
}

/// Rewrites a TCP packet and readies it for its next hop. Returns the kernel's index of the interface to leave by.
#[inline(always)]
pub fn send<S: Subprograms>(
    frame: &mut S::Frame,
    config: &Config,
    link: &Link,
    packet: &Packet,
    translation: &Translation,
    hop: NextHop,
) -> Result<u32, Outcome> {
    let tcp = frame.at::<Tcp>(packet.transport).ok_or(Outcome::Malformed)?;
    tcp.source = Be16::from_word(translation.ports.source);
    tcp.destination = Be16::from_word(translation.ports.destination);
    tcp.checksum = Be16::from_word(translation.delta.apply(tcp.checksum.word()));
    network(frame, packet, translation.source, translation.destination).ok_or(Outcome::Malformed)?;
    deliver::<S>(frame, config, link, hop)
}

/// Rewrites the network header: addresses, and one hop less to live.
#[inline(always)]
pub fn network<F: Frame>(
    frame: &mut F,
    packet: &Packet,
    source: [u64; 2],
    destination: [u64; 2],
) -> Option<()> {
    if packet.family == family::IPV4 {
        let header = frame.at::<Ipv4>(packet.network)?;
        let (source, destination) = (source[0] as u32, destination[0] as u32);
        let life = Be16::new(header.ttl_protocol.get().wrapping_sub(1 << 8));
        let delta = Delta::NONE
            .remove(header.source.word())
            .remove(header.destination.word())
            .remove(u32::from(header.ttl_protocol.word()))
            .add(source)
            .add(destination)
            .add(u32::from(life.word()));
        header.ttl_protocol = life;
        header.source = Be32::from_word(source);
        header.destination = Be32::from_word(destination);
        header.checksum = Be16::from_word(delta.apply(header.checksum.word()));
    } else {
        let header = frame.at::<Ipv6>(packet.network)?;
        header.hop_limit = header.hop_limit.wrapping_sub(1);
        header.source = source.map(Be64::from_word);
        header.destination = destination.map(Be64::from_word);
    }
    Some(())
}

/// Readies the Ethernet header and VLAN tags for the next hop. Returns the kernel's index of the interface to leave by.
#[inline(always)]
pub fn deliver<S: Subprograms>(
    frame: &mut S::Frame,
    config: &Config,
    link: &Link,
    hop: NextHop,
) -> Result<u32, Outcome> {
    let interface = &config.interfaces[usize::from(hop.interface()) % INTERFACES];
    let untagged = size_of::<Ethernet>();
    if (link.network != untagged || interface.tag_count != 0)
        && !S::retag(frame, config, link.network, link.kind, hop.interface())
    {
        return Err(Outcome::NoRoom);
    }
    write_macs(frame, hop.mac(), interface.mac).ok_or(Outcome::NoRoom)?;
    Ok(interface.index)
}

/// Writes destination and source of a frame.
#[inline(always)]
pub fn write_macs<F: Frame>(frame: &mut F, destination: u64, source: u64) -> Option<()> {
    *frame.at::<MacPair>(0)? = MacPair::new(destination, source);
    Some(())
}

/// Gives a frame, whose network header of EtherType `kind` begins at `network`, the tags of interface number `interface` in
/// place of its own. The addresses in front are to be written afterwards.
#[inline(always)]
pub fn retag<F: Frame>(frame: &mut F, config: &Config, network: usize, kind: u16, interface: u16) -> bool {
    let interface = &config.interfaces[usize::from(interface) % INTERFACES];
    let had = network as i32 - size_of::<Ethernet>() as i32;
    let needs = interface.tag_count as i32 * 4;
    if had != needs && !frame.grow_front(needs - had) {
        return false;
    }
    let mut offset = size_of::<Ethernet>() - 2;
    for (number, tag) in interface.tags.iter().enumerate() {
        if number as u32 >= interface.tag_count {
            break;
        }
        let Some(place) = frame.at::<Be32>(offset) else {
            return false;
        };
        *place = Be32::from_word(*tag);
        offset += 4;
    }
    let Some(place) = frame.at::<Be16>(offset) else {
        return false;
    };
    *place = Be16::new(kind);
    true
}
