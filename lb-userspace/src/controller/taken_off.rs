//! Interfaces that another program has taken ours off, with `bpftool link detach` for one. It is put back where nothing has its
//! place: `sheave unload` is the way to take it away. Meanwhile this host's own kernel, which has no sockets for the flows, may
//! not reset them. It resets those whose packets arrive before this is noticed, which takes 25 ms.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    ops::RangeInclusive,
    time::{Duration, Instant},
};

use super::Controller;
use crate::{admin::JournalKind, network::Silenced};

/// Between two tries on one interface: some cards lose their link for a second or more when a program comes.
const TRY_EVERY: Duration = Duration::from_secs(5);
/// The guard ends then, for the ports of listeners and slots are perhaps another program's now; most flows have died by themselves.
const GUARD_AT_MOST: Duration = Duration::from_secs(60);

/// The interfaces, by index.
#[derive(Debug, Default)]
pub(super) struct TakenOff {
    /// Their names: the program is not on them.
    off: BTreeMap<u32, String>,
    /// When it was put on each last, or could not be.
    tried: BTreeMap<u32, Instant>,
    /// What the guard silences, and since when; None: it is down.
    guarded: Option<(Vec<Silenced>, Instant)>,
    /// Why the program could not be put back, as was said last.
    said: String,
}

impl TakenOff {
    /// Of which the program is to be put back now.
    fn due(&self, now: Instant) -> Vec<u32> {
        let is_due =
            |index: &u32| self.tried.get(index).is_none_or(|tried| now.duration_since(*tried) >= TRY_EVERY);
        self.off.keys().copied().filter(is_due).collect()
    }

    /// Whether this is one of them.
    pub(super) fn holds(&self, index: u32) -> bool {
        self.off.contains_key(&index)
    }

    /// What keeps these interfaces from being served.
    pub(super) fn reasons(&self) -> impl Iterator<Item = String> {
        self.off.values().map(|name| {
            format!(
                "another program has taken sheave off {name}: sheave puts itself back every {} s if nothing else is there \
                 (`ip link show {name}`)",
                TRY_EVERY.as_secs()
            )
        })
    }
}

impl Controller {
    /// Looks whether the program is still where it was put, and puts it back.
    pub(super) async fn heed_detached(&mut self) {
        let lost = self.dataplane.detached();
        if lost.is_empty() && self.taken_off.off.is_empty() {
            return;
        }
        for index in lost {
            self.note_detached(index).await;
        }
        for index in self.taken_off.due(Instant::now()) {
            self.put_back(index).await;
        }
        let (network, dataplane) = (&self.network, &self.dataplane);
        let is_attached = |index: &u32| dataplane.attached().iter().any(|it| it.interface == *index);
        let is_gone = |index: &u32| network.interface(*index).is_err();
        self.taken_off.off.retain(|index, _| !is_attached(index));
        let gone: Vec<_> = self.taken_off.off.extract_if(.., |index, _| is_gone(index)).collect();
        for (index, name) in gone {
            self.note_gone(name, index);
        }
        let is_long =
            self.taken_off.guarded.as_ref().is_some_and(|(_, since)| since.elapsed() >= GUARD_AT_MOST);
        if self.taken_off.off.is_empty() || is_long {
            self.lower_guard().await;
        } else {
            self.keep_guard().await;
        }
    }

    /// Silences what a reload has brought while the guard is up.
    async fn keep_guard(&mut self) {
        let silenced = self.silenced();
        if let Some((before, _)) = &mut self.taken_off.guarded
            && *before != silenced
        {
            if let Err(error) = self.network.raise_guard(&silenced).await {
                tracing::warn!("this host may reset flows while the program is off an interface: {error}");
            }
            *before = silenced;
        }
    }

    /// Lets this host answer for itself, if the guard is up.
    async fn lower_guard(&mut self) {
        if self.taken_off.guarded.take().is_some()
            && let Err(error) = self.network.lower_guard().await
        {
            tracing::warn!("{error}: see `ip rule`");
        }
    }

    async fn note_detached(&mut self, index: u32) {
        // The kernel tells of one that is gone in a moment.
        let Ok(Some(there)) = self.network.xdp_programs(index).await else { return };
        let Ok(interface) = self.network.interface(index) else { return };
        let silenced = self.silenced();
        match self.network.raise_guard(&silenced).await {
            // Its minute does not begin anew with each program that is taken off.
            Ok(()) => {
                let since = self.taken_off.guarded.take().map_or_else(Instant::now, |(_, since)| since);
                self.taken_off.guarded = Some((silenced, since));
            }
            Err(error) => tracing::warn!(
                "this host may reset flows while the program is off {}: {error}",
                interface.name
            ),
        }
        let instead =
            there.first().map(|it| format!(", where XDP program {} is now", it.program)).unwrap_or_default();
        let line = format!("another program has taken sheave off {}{instead}", interface.name);
        tracing::error!("{line}");
        self.journal.note(JournalKind::Daemon, None, line);
        if let Err(error) = self.dataplane.forget_interface(index) {
            tracing::warn!("{error}");
        }
        self.taken_off.off.insert(index, interface.name);
    }

    async fn put_back(&mut self, index: u32) {
        let Some(name) = self.taken_off.off.get(&index).cloned() else { return };
        self.taken_off.tried.insert(index, Instant::now());
        match self.attach_to(index).await {
            Ok(_) => {
                let line = format!("sheave is attached to {name} again");
                tracing::info!("{line}");
                self.journal.note(JournalKind::Daemon, None, line);
                self.taken_off.said.clear();
            }
            Err(error) => {
                let line = format!("cannot put sheave back on {name}: {error}");
                // Said once, tried again and again.
                if line != self.taken_off.said {
                    tracing::error!("{line}");
                    self.taken_off.said = line;
                }
            }
        }
    }

    /// All that flows have on this host: listeners, and slots, older ones too. Ports that sockets of this host hold are never slots.
    /// Slots that the daemon's own checks leave from are left out: backends that cannot be checked would be dead, and their flows
    /// reset for that.
    pub(super) fn silenced(&self) -> Vec<Silenced> {
        let slots = without(self.dataplane.snat_ports(), &self.used_ports);
        let addresses = if self.checks_use_slots { Vec::new() } else { self.dataplane.snat_places() };
        let of_address = |address: IpAddr| slots.iter().map(move |ports| (address, ports.clone()));
        let listeners = self.roster.listeners().values().map(|seat| seat.address);
        let listeners = listeners.map(|address| (address.ip(), address.port()..=address.port()));
        addresses.into_iter().flat_map(of_address).chain(listeners).collect()
    }
}

/// These ports without those that are used. Where that makes very many ranges, each a routing rule, all of them.
fn without(ports: RangeInclusive<u16>, used: &BTreeSet<u16>) -> Vec<RangeInclusive<u16>> {
    const RULES_AT_MOST: usize = 64;
    let mut ranges = Vec::new();
    let mut first = u32::from(*ports.start());
    let (last, ends) = (u32::from(*ports.end()), used.range(ports.clone()).map(|port| u32::from(*port)));
    for end in ends.chain([last + 1]) {
        if first < end {
            ranges.push(first as u16..=(end - 1) as u16);
        }
        first = end + 1;
    }
    if ranges.len() > RULES_AT_MOST { vec![ports] } else { ranges }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_that_are_used_are_not_silenced() {
        let used = |ports: &[u16]| ports.iter().copied().collect::<BTreeSet<_>>();
        assert_eq!(without(1024..=32_767, &used(&[22, 40_000])), [1024..=32_767]);
        let servers = used(&[1024, 2379, 2380, 32_767]);
        assert_eq!(without(1024..=32_767, &servers), [1025..=2378, 2381..=32_766]);
        assert_eq!(without(1024..=u16::MAX, &used(&[u16::MAX])), [1024..=u16::MAX - 1]);
        let many: BTreeSet<u16> = (2000..4000).step_by(2).collect();
        assert_eq!(without(1024..=32_767, &many), [1024..=32_767]);
    }

    #[test]
    fn it_is_put_back_at_once_and_then_every_five_seconds() {
        let now = Instant::now();
        let mut taken_off = TakenOff { off: BTreeMap::from([(2, "eth0".to_owned())]), ..TakenOff::default() };
        assert_eq!(taken_off.due(now), [2]);
        taken_off.tried.insert(2, now);
        assert_eq!(taken_off.due(now + Duration::from_secs(4)), [0; 0]);
        assert_eq!(taken_off.due(now + TRY_EVERY), [2]);
        taken_off.off.clear();
        assert_eq!(taken_off.due(now + TRY_EVERY), [0; 0]);
    }
}
