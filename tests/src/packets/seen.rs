//! Packets that came out, taken apart.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result, bail, ensure};
use etherparse::{Icmpv4Slice, Icmpv6Slice, Ipv4Header, Ipv6Header, TcpSlice, checksum::Sum16BitWords};

use super::frame::{ACK, FIN, PSH, RST, SYN, Tag};

/// A packet that is right in every length and checksum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// MAC addresses: from whom, to whom.
    pub macs: ([u8; 6], [u8; 6]),
    /// VLAN tags, outermost first.
    pub tags: Vec<Tag>,
    /// From which address; the port is 0 where there is none.
    pub source: SocketAddr,
    /// To which.
    pub destination: SocketAddr,
    /// TTL or hop limit.
    pub ttl: u8,
    /// What is between the fixed IP header and the transport header.
    pub options: Vec<u8>,
    /// What it carries.
    pub inside: Inside,
}

/// What a packet carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Inside {
    /// A TCP segment.
    Tcp {
        /// TCP flags.
        flags: u8,
        /// Sequence number.
        sequence: u32,
        /// Acknowledgement number.
        acknowledgement: u32,
        /// TCP options.
        options: Vec<u8>,
        /// What follows.
        payload: Vec<u8>,
    },
    /// An ICMP error.
    Icmp {
        /// Type and code.
        kind: (u8, u8),
        /// The second word.
        word: [u8; 4],
        /// Source of the quoted packet.
        source: SocketAddr,
        /// Its destination.
        destination: SocketAddr,
        /// Its TCP header from behind the ports.
        rest: Vec<u8>,
    },
}

impl Seen {
    /// Takes a frame apart.
    ///
    /// # Errors
    /// What is wrong with it: a length that is not true, a checksum that does not hold.
    pub fn parse(frame: &[u8]) -> Result<Self> {
        ensure!(frame.len() >= 14, "{} bytes are no frame", frame.len());
        let mac = |at: usize| -> Result<[u8; 6]> { Ok(frame[at..at + 6].try_into()?) };
        let macs = (mac(6)?, mac(0)?);
        let mut tags = Vec::new();
        let mut at = 12;
        let mut kind = half(frame, at)?;
        while kind == 0x8100 || kind == 0x88a8 {
            tags.push((kind, half(frame, at + 2)?));
            at += 4;
            kind = half(frame, at)?;
        }
        let packet = &frame[at + 2..];
        let (addresses, ttl, options, carried, rest) = match kind {
            0x0800 => ipv4(packet)?,
            0x86dd => ipv6(packet)?,
            other => bail!("EtherType {other:#06x}"),
        };
        let (ports, inside) = match (carried, addresses) {
            (6, _) => tcp(rest, addresses)?,
            (1, (IpAddr::V4(_), _)) => ((0, 0), icmp4(rest)?),
            (58, (IpAddr::V6(source), IpAddr::V6(destination))) => {
                ((0, 0), icmp6(rest, source, destination)?)
            }
            (other, _) => bail!("protocol {other}"),
        };
        Ok(Self {
            macs,
            tags,
            source: SocketAddr::new(addresses.0, ports.0),
            destination: SocketAddr::new(addresses.1, ports.1),
            ttl,
            options,
            inside,
        })
    }

    /// TCP flags, of a packet that has some.
    ///
    /// # Panics
    /// When it carries something else.
    pub fn flags(&self) -> u8 {
        match &self.inside {
            Inside::Tcp { flags, .. } => *flags,
            other @ Inside::Icmp { .. } => panic!("no segment: {other:?}"),
        }
    }

    /// What follows the TCP header.
    ///
    /// # Panics
    /// When it carries something else.
    pub fn payload(&self) -> &[u8] {
        match &self.inside {
            Inside::Tcp { payload, .. } => payload,
            other @ Inside::Icmp { .. } => panic!("no segment: {other:?}"),
        }
    }
}

type Network<'a> = ((IpAddr, IpAddr), u8, Vec<u8>, u8, &'a [u8]);

fn ipv4(packet: &[u8]) -> Result<Network<'_>> {
    let (header, _) = Ipv4Header::from_slice(packet)?;
    ensure!(header.header_checksum == header.calc_header_checksum(), "wrong IPv4 header checksum");
    let total = usize::from(header.total_len);
    ensure!(total >= header.header_len() && total <= packet.len(), "IPv4 total length {total}");
    let addresses = (IpAddr::from(header.source), IpAddr::from(header.destination));
    let rest = &packet[header.header_len()..total];
    Ok((addresses, header.time_to_live, header.options.to_vec(), header.protocol.0, rest))
}

fn ipv6(packet: &[u8]) -> Result<Network<'_>> {
    let (header, after) = Ipv6Header::from_slice(packet)?;
    let length = usize::from(header.payload_length);
    let mut rest = after.get(..length).with_context(|| format!("IPv6 payload length {length}"))?;
    let (mut next, mut options) = (header.next_header.0, Vec::new());
    while [0, 43, 60].contains(&next) {
        let size = 8 + 8 * usize::from(*rest.get(1).context("a cut extension header")?);
        let (extension, after) = rest.split_at_checked(size).context("a cut extension header")?;
        options.extend(extension);
        (next, rest) = (extension[0], after);
    }
    let addresses = (IpAddr::from(header.source), IpAddr::from(header.destination));
    Ok((addresses, header.hop_limit, options, next, rest))
}

fn tcp(segment: &[u8], addresses: (IpAddr, IpAddr)) -> Result<((u16, u16), Inside)> {
    let slice = TcpSlice::from_slice(segment)?;
    let checksum = match addresses {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            slice.calc_checksum_ipv4(source.octets(), destination.octets())?
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            slice.calc_checksum_ipv6(source.octets(), destination.octets())?
        }
        _ => bail!("two families"),
    };
    ensure!(slice.checksum() == checksum, "TCP checksum {:#06x}, not {checksum:#06x}", slice.checksum());
    let flags =
        [(slice.fin(), FIN), (slice.syn(), SYN), (slice.rst(), RST), (slice.psh(), PSH), (slice.ack(), ACK)]
            .into_iter()
            .filter_map(|(set, flag)| set.then_some(flag))
            .sum();
    let inside = Inside::Tcp {
        flags,
        sequence: slice.sequence_number(),
        acknowledgement: slice.acknowledgment_number(),
        options: slice.options().to_vec(),
        payload: slice.payload().to_vec(),
    };
    Ok(((slice.source_port(), slice.destination_port()), inside))
}

fn icmp4(message: &[u8]) -> Result<Inside> {
    let slice = Icmpv4Slice::from_slice(message)?;
    let sum = Sum16BitWords::new().add_slice(message).ones_complement();
    ensure!(sum == 0, "wrong ICMP checksum");
    let (quoted, rest) = Ipv4Header::from_slice(slice.payload())?;
    ensure!(quoted.header_checksum == quoted.calc_header_checksum(), "wrong checksum of the quoted header");
    ensure!(quoted.protocol.0 == 6, "quotes protocol {}", quoted.protocol.0);
    quoting((slice.type_u8(), slice.code_u8()), slice.bytes5to8(), quoted.source, quoted.destination, rest)
}

fn icmp6(message: &[u8], source: Ipv6Addr, destination: Ipv6Addr) -> Result<Inside> {
    let slice = Icmpv6Slice::from_slice(message)?;
    ensure!(slice.is_checksum_valid(source.octets(), destination.octets()), "wrong ICMPv6 checksum");
    let (quoted, rest) = Ipv6Header::from_slice(slice.payload())?;
    ensure!(quoted.next_header.0 == 6, "quotes protocol {}", quoted.next_header.0);
    quoting((slice.type_u8(), slice.code_u8()), slice.bytes5to8(), quoted.source, quoted.destination, rest)
}

fn quoting(
    kind: (u8, u8),
    word: [u8; 4],
    source: impl Into<IpAddr>,
    destination: impl Into<IpAddr>,
    tcp: &[u8],
) -> Result<Inside> {
    ensure!(tcp.len() >= 8, "quotes {} bytes of TCP", tcp.len());
    Ok(Inside::Icmp {
        kind,
        word,
        source: SocketAddr::new(source.into(), half(tcp, 0)?),
        destination: SocketAddr::new(destination.into(), half(tcp, 2)?),
        rest: tcp[4..].to_vec(),
    })
}

/// The number at `at`.
fn half(bytes: &[u8], at: usize) -> Result<u16> {
    let bytes = bytes.get(at..at + 2).with_context(|| format!("no number at {at} of {}", bytes.len()))?;
    Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Frame, Icmp, extension},
        *,
    };

    fn packets() -> Vec<Vec<u8>> {
        let [a, b]: [SocketAddr; 2] = ["10.0.0.1:1000", "10.0.0.2:80"].map(|text| text.parse().unwrap());
        let [c, d]: [SocketAddr; 2] = ["[fd00::1]:1000", "[fd00::2]:80"].map(|text| text.parse().unwrap());
        let plain = Frame { payload: b"hello".to_vec(), ..Frame::new(a, b) };
        let options = Frame { options: vec![1; 8], tags: vec![(0x8100, 5)], ..plain.clone() };
        let six = Frame {
            extensions: vec![extension::HOP_BY_HOP, extension::DESTINATION_OPTIONS],
            ..Frame::new(c, d)
        };
        let errors =
            [&plain, &Frame::new(c, d)].map(|sent| Icmp::too_big(sent.destination.ip(), sent, 8).bytes());
        let mut packets: Vec<_> = [plain, options, six].iter().map(Frame::bytes).collect();
        packets.extend(errors);
        packets
    }

    #[test]
    fn what_is_built_can_be_taken_apart() {
        for packet in packets() {
            Seen::parse(&packet).unwrap();
        }
    }

    #[test]
    fn one_wrong_bit_in_what_checksums_cover_is_noticed() {
        for packet in packets() {
            // Behind link header and TTL; flow labels and hop limits are in no checksum.
            let covered = if half(&packet, 12).unwrap() == 0x86dd { 14 + 8 } else { 14 + 12 };
            for byte in covered..packet.len() {
                let mut wrong = packet.clone();
                wrong[byte] ^= 0x10;
                assert!(Seen::parse(&wrong).map_or(true, |seen| !seen.options.is_empty()), "byte {byte}");
            }
        }
    }
}
