//! Interfaces that go while sheave runs, and come back: a card that is reset or plugged in again, a veth or VLAN that is made
//! anew. To the kernel the one that comes is another interface, with another index and no program, and without the VIP that was
//! on it.

use std::net::IpAddr;

use super::{Controller, ControllerError};
use crate::{admin::JournalKind, dataplane::Attached};

impl Controller {
    /// Takes in that interfaces have gone or come back. Call it after `ports` has been told.
    pub(super) async fn follow_interfaces(&mut self) {
        let here = |index: u32| self.network.interface(index).is_ok();
        let gone: Vec<Attached> =
            self.dataplane.attached().iter().filter(|it| !here(it.interface)).cloned().collect();
        for Attached { name, interface, .. } in gone {
            if let Err(error) = self.dataplane.forget_interface(interface) {
                tracing::warn!("{error}");
            }
            self.note_gone(name, interface);
        }
        self.attach_to_returned().await;
        self.look_at_veths().await;
    }

    /// Says that an interface is gone.
    pub(super) fn note_gone(&mut self, name: String, index: u32) {
        let line =
            format!("interface {name} (index {index}) is gone: sheave attaches to it again when it is back");
        tracing::error!("{line}");
        self.journal.note(JournalKind::Daemon, None, line);
        self.gone_interfaces.insert(name);
    }

    /// Attaches to interfaces that lead to listeners or backends and have no program yet. What fails is tried again later.
    pub(super) async fn attach_to_returned(&mut self) {
        let is_attached =
            |index: u32| self.dataplane.attached().iter().any(|attached| attached.interface == index);
        let is_bare = |index: &u32| !is_attached(*index) && !self.taken_off.holds(*index);
        let bare: Vec<u32> = self.ports.bases().into_iter().filter(is_bare).collect();
        for index in bare {
            let Ok(interface) = self.network.interface(index) else { continue };
            let before = self.gone_interfaces.contains(&interface.name);
            let line = match self.attach_to(index).await {
                Ok(_) => {
                    self.gone_interfaces.remove(&interface.name);
                    self.unattached.remove(&index);
                    let back = if before { "is back" } else { "is new" };
                    let line = format!(
                        "interface {} (index {index}) {back}: sheave is attached to it",
                        interface.name
                    );
                    tracing::info!("{line}");
                    line
                }
                // It went again meanwhile.
                Err(ControllerError::Network(_)) => continue,
                Err(error) => {
                    let line = format!(
                        "interface {} (index {index}) is back, and sheave cannot attach to it: {error}",
                        interface.name
                    );
                    // Said once, tried again and again.
                    if !self.unattached.insert(index) {
                        continue;
                    }
                    tracing::error!("{line}");
                    line
                }
            };
            self.journal.note(JournalKind::Daemon, None, line);
        }
        self.unattached.retain(|index| self.ports.bases().contains(index));
    }
    /// Says that a VIP is not on this host, and what will become of it.
    pub(super) fn miss_vip(&mut self, vip: IpAddr) {
        let Some(owner) = &mut self.owner else {
            tracing::info!("the VIP {vip} is not on this host; its owner may bring it here");
            return;
        };
        match owner.lose(vip) {
            Some(interface) => tracing::error!(
                "the VIP {vip} is not on this host any more, as {interface} is gone or was set down: sheave puts it back when \
                 {interface} is up with an address in the VIP's subnet"
            ),
            None => tracing::error!(
                "the VIP {vip} is not on this host any more: another program has removed it. Restart sheave to put it \
                 back"
            ),
        }
    }

    /// Puts VIPs back whose interface has come back, once the program is on it.
    pub(super) async fn put_vips_back(&mut self) {
        let Some(owner) = &mut self.owner else { return };
        let attached: Vec<u32> = self.dataplane.attached().iter().map(|it| it.interface).collect();
        let (network, forwards) = (self.network.clone(), self.config.forwards_packets());
        let served =
            |index: u32| !forwards || network.port_of(index).is_ok_and(|port| attached.contains(&port.index));
        for placed in owner.put_back(served).await {
            let line = format!("put the VIP {} back on {}", placed.vip, placed.interface);
            tracing::info!("{line}");
            self.journal.note(JournalKind::Daemon, None, line);
        }
    }
}
