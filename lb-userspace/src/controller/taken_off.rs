//! Interfaces that another program has taken ours off, with `bpftool link detach` for one. It is put back where nothing has its
//! place: `sheave unload` is the way to take it away. Meanwhile this host's own kernel, which has no sockets for the flows, may
//! not reset them. It resets those whose packets arrive before this is noticed, which takes 25 ms.

use std::{
    collections::BTreeMap,
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
    /// Since when the guard is up.
    guarded: Option<Instant>,
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
        // One that is gone is attached to when it comes back.
        self.taken_off.off.retain(|index, _| network.interface(*index).is_ok() && !is_attached(index));
        let is_long = |since: Instant| since.elapsed() >= GUARD_AT_MOST;
        if self.taken_off.off.is_empty() || self.taken_off.guarded.is_some_and(is_long) {
            self.lower_guard().await;
        }
    }

    /// Lets this host answer for itself, if the guard is up.
    pub async fn lower_guard(&mut self) {
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
        if self.taken_off.off.is_empty() {
            match self.network.raise_guard(&self.silenced()).await {
                Ok(()) => self.taken_off.guarded = Some(Instant::now()),
                Err(error) => tracing::warn!(
                    "this host may reset flows while the program is off {}: {error}",
                    interface.name
                ),
            }
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

    /// All that flows have on this host: listeners, and slots, older ones too. Slots that the daemon's own checks leave from are
    /// left out: backends that cannot be checked would be dead, and their flows reset for that.
    pub(super) fn silenced(&self) -> Vec<Silenced> {
        let slots = self.dataplane.snat_ports();
        let addresses = if self.checks_use_slots { Vec::new() } else { self.dataplane.snat_places() };
        let slots = addresses.into_iter().map(|address| (address, slots.clone()));
        let listeners = self.roster.listeners().values().map(|seat| seat.address);
        let listeners = listeners.map(|address| (address.ip(), address.port()..=address.port()));
        slots.chain(listeners).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
