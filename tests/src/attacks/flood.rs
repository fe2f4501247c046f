//! Floods of forged packets of one kind, and what real clients notice of them.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};

use super::{Arena, Flow, Forged, Noise, Pair, TooBig, exchange_all, flag, flows};
use crate::lab::eventually;

/// Different frames of a flood.
const FRAMES: usize = 16_384;
/// Different SYNs of a flood: more than there are slots, so that none is sent twice before all slots were taken.
const SYNS: usize = 98_304;
/// Of so many SYNs one is on a real flow.
const SPARED: usize = 16;
/// Real clients that connect at the same time.
const TOGETHER: usize = 10;
/// For real clients that were connected to be gone from the list of flows.
const GONE: Duration = Duration::from_secs(10);
/// The same where segments were forged in backends' names. In a handshake one may have cost the flow a FIN: its backend is asked
/// after 70 s.
const GONE_WHEN_ASKED: Duration = Duration::from_secs(90);

/// What a flood consists of. Numbers are always random.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FloodKind {
    /// SYNs of strangers, and on real flows.
    Syn,
    /// Bare ACKs, in clients' names.
    Ack,
    /// Data without ACK, in clients' names.
    Data,
    /// RSTs in clients' names.
    Reset,
    /// FINs in clients' names.
    Fin,
    /// RSTs in backends' names.
    BackendReset,
    /// Data in backends' names.
    BackendData,
    /// FINs in backends' names.
    BackendFin,
    /// SYN-ACKs in backends' names.
    BackendSynAck,
    /// "Too big", about real flows and others.
    TooBig,
}

impl FloodKind {
    /// All of them; SYNs last, as they leave a table full of half-open flows.
    pub const ALL: [Self; 10] = [
        Self::Ack,
        Self::Data,
        Self::Reset,
        Self::Fin,
        Self::BackendReset,
        Self::BackendData,
        Self::BackendFin,
        Self::BackendSynAck,
        Self::TooBig,
        Self::Syn,
    ];

    const fn flags(self) -> u8 {
        match self {
            Self::Syn => flag::SYN,
            Self::Ack | Self::TooBig => flag::ACK,
            Self::BackendSynAck => flag::SYN | flag::ACK,
            Self::Data => flag::PSH,
            Self::BackendData => flag::PSH | flag::ACK,
            Self::Reset | Self::BackendReset => flag::RST,
            Self::Fin | Self::BackendFin => flag::FIN | flag::ACK,
        }
    }

    const fn is_backends(self) -> bool {
        matches!(self, Self::BackendReset | Self::BackendData | Self::BackendFin | Self::BackendSynAck)
    }

    const fn payload(self) -> &'static [u8] {
        match self {
            Self::Data | Self::BackendData => b"forged",
            _ => b"",
        }
    }
}

/// What a flood did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flooded {
    /// What it consisted of.
    pub kind: FloodKind,
    /// Frames.
    pub sent: u64,
    /// Flows that were open, and how many of them ended.
    pub lost: (usize, usize),
    /// Real clients that tried to connect meanwhile, and how many were not connected in time.
    pub refused: (usize, usize),
    /// Established flows afterwards that are nobody's.
    pub left: usize,
    /// Half-open flows afterwards. They are taken when others need them, or forgotten after four minutes.
    pub half_open: usize,
}

impl fmt::Display for Flooded {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, sent, lost, refused, left, half_open } = self;
        write!(
            formatter,
            "{kind:?}: {} of {} flows ended, {} of {} new connections failed, {left} established and {half_open} half-open \
             flows are nobody's, after {sent} frames",
            lost.1, lost.0, refused.1, refused.0
        )
    }
}

impl Flooded {
    /// No flow has ended, 99 % of new connections succeeded, and nothing is left over.
    ///
    /// # Errors
    /// When it is not so.
    pub fn require_unnoticed(&self) -> Result<()> {
        let (tried, failed) = self.refused;
        let unnoticed = self.lost.1 == 0 && self.left == 0 && failed * 100 <= tried;
        ensure!(unnoticed, "{self}");
        Ok(())
    }
}

/// Sends frames of this kind at this rate for so long at the VIP of `victims`, which are open flows of that VIP.
///
/// # Errors
/// When no frame can be made or sent.
pub fn flood(
    arena: &Arena,
    kind: FloodKind,
    rate: u32,
    time: Duration,
    victims: &mut [Pair],
) -> Result<Flooded> {
    let vip = victims.first().context("no victims")?.to.ip();
    let frames = frames(arena, kind, victims)?;
    let mut refused = (0, 0);
    let sent = thread::scope(|scope| -> Result<u64> {
        let attack = scope.spawn(|| arena.attacker.repeat(&frames, rate, time));
        let begin = Instant::now();
        while begin.elapsed() < time {
            refused.0 += TOGETHER;
            refused.1 += TOGETHER - arena.connected(vip, TOGETHER)?;
        }
        attack.join().map_err(|_| anyhow!("the attacker panicked"))?
    })?;
    let ended = exchange_all(victims).len();
    let known: Vec<SocketAddr> = victims.iter().map(|pair| pair.from).collect();
    let nobodys = |state: &str| -> Result<usize> {
        let is_nobodys = |flow: &&Flow| {
            flow.state == state && flow.client.is_ipv4() == vip.is_ipv4() && !known.contains(&flow.client)
        };
        Ok(flows(&arena.daemon)?.iter().filter(is_nobodys).count())
    };
    // What stays is counted.
    let gone = if kind.is_backends() { GONE_WHEN_ASKED } else { GONE };
    let _ = eventually(gone, "only the victims' flows are established", || {
        let left = nobodys("established")?;
        ensure!(left == 0, "{left}");
        Ok(())
    });
    let (left, half_open) = (nobodys("established")?, nobodys("half-open")?);
    Ok(Flooded { kind, sent, lost: (victims.len(), ended), refused, left, half_open })
}

/// Some of them are about the victims, the others about flows that there are not.
fn frames(arena: &Arena, kind: FloodKind, victims: &[Pair]) -> Result<Vec<Vec<u8>>> {
    let mut noise = Noise::new(kind as u64);
    let to = victims[0].to;
    let segment = arena.cluster.lb.link()?.segment;
    let backends = victims.iter().map(|pair| pair.backend).collect::<Vec<_>>();
    let (count, share) = if kind == FloodKind::Syn { (SYNS, SPARED) } else { (FRAMES, 2) };
    (0..count)
        .map(|number| {
            let victim = number.is_multiple_of(share).then(|| &victims[noise.below(victims.len())]);
            let port = 1024 + noise.below(64_000) as u16;
            let host = 150 + noise.below(100) as u8;
            let stranger: IpAddr =
                if to.is_ipv4() { segment.v4(host).into() } else { segment.v6(host).into() };
            let client = victim.map_or(SocketAddr::new(stranger, port), |pair| pair.from);
            let sequence = noise.number();
            if kind == FloodKind::TooBig {
                let error = TooBig { reporter: client.ip(), from: to, to: client, sequence, mtu: 1_300 };
                return arena.attacker.too_big(arena.attacker.mac(), &error);
            }
            let (from, to) = if kind.is_backends() {
                let backend = backends[noise.below(backends.len())];
                let source = victim.map_or(SocketAddr::new(to.ip(), port), |pair| pair.source);
                (victim.map_or(backend, |pair| pair.backend), source)
            } else {
                (client, to)
            };
            let (flags, payload) = (kind.flags(), kind.payload());
            let acknowledgement = noise.number();
            let forged = Forged { from, to, flags, sequence, acknowledgement, payload };
            arena.attacker.frame(arena.attacker.mac(), &forged)
        })
        .collect()
}
