//! Frames in the names of others: what an attacker on a load balancer's segment can send.

use std::{
    net::{IpAddr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use etherparse::{Icmpv4Type, Icmpv6Type, PacketBuilder, PacketBuilderStep, icmpv4::DestUnreachableHeader};
use lb_common::hash::split_mix;

use crate::lab::{
    Host,
    capture::{Capture, mac},
};

const TTL: u8 = 64;
const WINDOW: u16 = 64_240;
/// Where a TCP header has its flags.
const FLAGS: usize = 13;
const ETHERNET_HEADER: usize = 14;

/// TCP's flags, as in the thirteenth byte of a header.
pub mod flag {
    /// FIN
    pub const FIN: u8 = 1;
    /// SYN
    pub const SYN: u8 = 2;
    /// RST
    pub const RST: u8 = 4;
    /// PSH
    pub const PSH: u8 = 8;
    /// ACK
    pub const ACK: u8 = 16;
}

/// Numbers without a pattern, the same in every run, so that a failure happens again.
#[derive(Clone, Copy, Debug)]
pub struct Noise(u64);

impl Noise {
    /// Another seed, other numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(1);
        (split_mix(self.0) >> 32) as u32
    }

    /// The next number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        self.number() as usize % bound
    }
}

/// A TCP segment to be forged.
#[derive(Clone, Copy, Debug)]
pub struct Forged<'a> {
    /// In whose name.
    pub from: SocketAddr,
    /// To whom.
    pub to: SocketAddr,
    /// [`flag`]s.
    pub flags: u8,
    /// Its sequence number.
    pub sequence: u32,
    /// Its acknowledgement number, whether `flags` has ACK or not.
    pub acknowledgement: u32,
    /// What it carries.
    pub payload: &'a [u8],
}

/// An ICMP error "fragmentation needed" or "packet too big" to be forged.
#[derive(Clone, Copy, Debug)]
pub struct TooBig {
    /// Who says so: the host of this address.
    pub reporter: IpAddr,
    /// The sender of the packet that was too big.
    pub from: SocketAddr,
    /// Whom it was for.
    pub to: SocketAddr,
    /// The sequence number of the quoted segment.
    pub sequence: u32,
    /// What it is said to be too big for, in bytes.
    pub mtu: u16,
}

/// A place from which frames are forged towards a load balancer.
#[derive(Debug)]
pub struct Attacker {
    wire: Capture,
    /// Of the interface the frames leave by.
    own: [u8; 6],
    /// Of the load balancer.
    target: [u8; 6],
}

impl Attacker {
    /// Sends by the first interface of `host` to `target_interface` of `target`.
    ///
    /// # Errors
    /// When there is no such interface.
    pub fn new(host: &Host, target: &Host, target_interface: &str) -> Result<Self> {
        let interface = &host.link()?.interface;
        Ok(Self {
            wire: Capture::open(host, interface)?,
            own: mac(host, interface)?,
            target: mac(target, target_interface)?,
        })
    }

    /// Its own MAC.
    pub fn mac(&self) -> [u8; 6] {
        self.own
    }

    /// A segment as a frame from this MAC to the load balancer.
    ///
    /// # Errors
    /// When both ends are not of one family.
    pub fn frame(&self, mac: [u8; 6], segment: &Forged<'_>) -> Result<Vec<u8>> {
        let Forged { from, to, sequence, acknowledgement, flags, payload } = *segment;
        let mut builder = self.ip(mac, from.ip(), to.ip())?.tcp(from.port(), to.port(), sequence, WINDOW);
        if flags & flag::FIN != 0 {
            builder = builder.fin();
        }
        if flags & flag::SYN != 0 {
            builder = builder.syn();
        }
        if flags & flag::RST != 0 {
            builder = builder.rst();
        }
        if flags & flag::PSH != 0 {
            builder = builder.psh();
        }
        // The number is written also where the flag is not set.
        builder = builder.ack(acknowledgement);
        let mut frame = Vec::with_capacity(builder.size(payload.len()));
        builder.write(&mut frame, payload)?;
        if flags & flag::ACK == 0 {
            clear_ack(&mut frame, from.is_ipv4());
        }
        Ok(frame)
    }

    fn ip(&self, mac: [u8; 6], from: IpAddr, to: IpAddr) -> Result<PacketBuilderStep<etherparse::IpHeaders>> {
        let ethernet = PacketBuilder::ethernet2(mac, self.target);
        Ok(match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => ethernet.ipv4(from.octets(), to.octets(), TTL),
            (IpAddr::V6(from), IpAddr::V6(to)) => ethernet.ipv6(from.octets(), to.octets(), TTL),
            _ => anyhow::bail!("{from} and {to} are of different families"),
        })
    }

    /// An ICMP error as a frame from this MAC to the load balancer. It quotes a whole header, as today's hosts do.
    ///
    /// # Errors
    /// When the addresses are not of one family.
    pub fn too_big(&self, mac: [u8; 6], error: &TooBig) -> Result<Vec<u8>> {
        let quoted = self.frame(
            mac,
            &Forged {
                from: error.from,
                to: error.to,
                flags: flag::ACK | flag::PSH,
                sequence: error.sequence,
                acknowledgement: 1,
                payload: &[0; 8],
            },
        )?;
        let ip = self.ip(mac, error.reporter, error.from.ip())?;
        let quoted = &quoted[ETHERNET_HEADER..];
        let mut frame = Vec::new();
        if error.reporter.is_ipv4() {
            let needed = DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: error.mtu };
            ip.icmpv4(Icmpv4Type::DestinationUnreachable(needed)).write(&mut frame, quoted)?;
        } else {
            ip.icmpv6(Icmpv6Type::PacketTooBig { mtu: error.mtu.into() }).write(&mut frame, quoted)?;
        }
        Ok(frame)
    }

    /// Puts a frame on the wire.
    ///
    /// # Errors
    /// When the interface does not take it.
    pub fn send_frame(&self, frame: &[u8]) -> Result<()> {
        self.wire.send(frame)
    }

    /// Forges a segment, from its own MAC.
    ///
    /// # Errors
    /// When the interface does not take it.
    pub fn send(&self, segment: &Forged<'_>) -> Result<()> {
        self.send_frame(&self.frame(self.own, segment)?)
    }

    /// Sends all of these frames, evenly, at this rate a second, again and again for as long as `time`. Returns how
    /// many that were.
    ///
    /// # Errors
    /// When there are none.
    pub fn repeat(&self, frames: &[Vec<u8>], rate: u32, time: Duration) -> Result<u64> {
        /// Between two looks at the clock, so that a look is cheap and a burst short.
        const BURST: u64 = 64;
        ensure!(!frames.is_empty(), "nothing to send");
        let begin = Instant::now();
        let mut sent = 0u64;
        for frame in frames.iter().cycle() {
            if sent.is_multiple_of(BURST) {
                let elapsed = begin.elapsed();
                if elapsed >= time {
                    break;
                }
                let due = Duration::from_secs_f64(sent as f64 / f64::from(rate));
                thread::sleep(due.saturating_sub(elapsed));
            }
            // A full queue is the attacker's own trouble.
            let _ = self.wire.send(frame);
            sent += 1;
        }
        Ok(sent)
    }

    /// As [`Capture::make_room`].
    ///
    /// # Errors
    /// As there.
    pub fn make_room(&self, bytes: usize) -> Result<()> {
        self.wire.make_room(bytes)
    }

    /// As [`Capture::lost`].
    ///
    /// # Errors
    /// As there.
    pub fn lost(&self) -> Result<u32> {
        self.wire.lost()
    }

    /// Has `hear` told of each SYN-ACK that arrives and of the MAC it is for, until it says that it has heard enough or
    /// `time` is over.
    pub fn hear_syn_acks(&self, time: Duration, mut hear: impl FnMut([u8; 6], &SynAck) -> bool) {
        let enough = |frame: &[u8]| {
            let mac = frame.first_chunk();
            mac.zip(SynAck::of(frame)).is_some_and(|(mac, answer)| hear(*mac, &answer))
        };
        // An error says that the time is over, or that nothing arrives any more.
        let _ = self.wire.receive(time, enough);
    }

    /// The sequence number of the next byte that `from` will send to `to`, once it has sent a segment with data.
    ///
    /// # Errors
    /// When none comes within `time`.
    pub fn next_number(&self, from: SocketAddr, to: SocketAddr, time: Duration) -> Result<u32> {
        let mut next = None;
        self.wire.receive(time, |frame| {
            next = data_of(frame, from, to);
            next.is_some()
        })?;
        next.context("no segment with data")
    }
}

/// The answer to a SYN.
#[derive(Clone, Copy, Debug)]
pub struct SynAck {
    from: SocketAddr,
    to: SocketAddr,
    acknowledgement: u32,
}

impl SynAck {
    fn of(frame: &[u8]) -> Option<Self> {
        let (from, to, tcp) = segment(&etherparse::SlicedPacket::from_ethernet(frame).ok()?)?;
        let is_answer = tcp.syn() && tcp.ack() && !tcp.rst();
        is_answer.then(|| Self { from, to, acknowledgement: tcp.acknowledgment_number() })
    }

    /// Does it answer this SYN?
    pub fn is_to(&self, syn: &Forged<'_>) -> bool {
        (self.from, self.to) == (syn.to, syn.from) && self.acknowledgement == syn.sequence.wrapping_add(1)
    }
}

/// What follows the last byte of a segment with data between these ends.
fn data_of(frame: &[u8], from: SocketAddr, to: SocketAddr) -> Option<u32> {
    let packet = etherparse::SlicedPacket::from_ethernet(frame).ok()?;
    let (sender, receiver, tcp) = segment(&packet)?;
    let payload = tcp.payload().len() as u32;
    ((sender, receiver) == (from, to) && payload > 0).then(|| tcp.sequence_number().wrapping_add(payload))
}

/// A TCP segment with its ends: sender and receiver.
fn segment<'f>(
    packet: &etherparse::SlicedPacket<'f>,
) -> Option<(SocketAddr, SocketAddr, etherparse::TcpSlice<'f>)> {
    let (sender, receiver) = match packet.net.as_ref()? {
        etherparse::NetSlice::Ipv4(ip) => {
            (IpAddr::from(ip.header().source_addr()), IpAddr::from(ip.header().destination_addr()))
        }
        etherparse::NetSlice::Ipv6(ip) => {
            (IpAddr::from(ip.header().source_addr()), IpAddr::from(ip.header().destination_addr()))
        }
        etherparse::NetSlice::Arp(_) => return None,
    };
    let etherparse::TransportSlice::Tcp(tcp) = packet.transport.as_ref()? else { return None };
    let (from, to) = (tcp.source_port(), tcp.destination_port());
    Some((SocketAddr::new(sender, from), SocketAddr::new(receiver, to), tcp.clone()))
}

/// Takes the flag ACK out of a TCP segment, and keeps its checksum right.
fn clear_ack(frame: &mut [u8], is_ipv4: bool) {
    let tcp = ETHERNET_HEADER + if is_ipv4 { 20 } else { 40 };
    let checksum = u16::from_be_bytes([frame[tcp + 16], frame[tcp + 17]]);
    frame[tcp + FLAGS] &= !flag::ACK;
    // RFC 1624, eqn. 3, with m - m' as the one bit that goes.
    let mut sum = u32::from(!checksum) + u32::from(!u16::from(flag::ACK));
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let checksum = !(sum as u16);
    frame[tcp + 16..tcp + 18].copy_from_slice(&checksum.to_be_bytes());
}
