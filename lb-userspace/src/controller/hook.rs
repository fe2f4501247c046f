//! The connect hook, as the controller sees it: where it is, what keeps it from being somewhere, and who listens in vain
//! because of it.

use std::{collections::BTreeSet, time::Duration};

use tokio::sync::mpsc;

use super::{Controller, ControllerError};
use crate::{
    admin::HookStatus,
    hook::{Place, Shadow, own_network, shadows},
    network::{TcpSocket, listening_sockets},
};

/// How often servers at the addresses of listeners are looked for.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// What `sheave unload` says it took away.
pub const HOOK: &str = "the connect hook";

/// The hook, or why there is none.
#[derive(Debug, Default)]
pub(super) struct Hook {
    place: Option<Place>,
    /// What the operator should know, in sentences.
    flags: Vec<String>,
    shadows: BTreeSet<Shadow>,
}

impl Controller {
    /// Puts the connect hook on its cgroup. Where only clients of the VIP on this very host would be served by it, the
    /// others do not wait for whatever is wrong.
    pub(super) async fn attach_hook(&mut self) -> Result<(), ControllerError> {
        match self.try_attach_hook() {
            Ok(place) => self.hook.place = place,
            Err(error) if self.config.needs_hook() => return Err(error),
            Err(error) => {
                tracing::warn!("clients on this host itself are not served: {error}");
                let first = error.to_string().lines().next().unwrap_or_default().to_owned();
                self.hook.flags.push(format!("clients on this host itself are not served: {first}"));
            }
        }
        if let Some(place) = &self.hook.place
            && let Some(reservation) = place.reservation(&self.config.dataplane.cgroup)
        {
            tracing::warn!("{reservation}");
            self.hook.flags.push(reservation);
        }
        if self.looks_for_servers() {
            match listening_sockets().await {
                Ok(found) => self.note_servers(&found),
                Err(error) => tracing::warn!("cannot list the sockets of this host: {error}"),
            }
        }
        Ok(())
    }

    fn try_attach_hook(&mut self) -> Result<Option<Place>, ControllerError> {
        let Some(place) = Place::find(&self.config.dataplane.cgroup)? else {
            self.dataplane.leave_hook()?;
            return Ok(None);
        };
        let network = own_network().map_err(|source| ControllerError::System {
            doing: "find out which network namespace this is",
            source,
        })?;
        self.dataplane.attach_hook(place.directory(), network)?;
        self.start_socket_thread(network)
            .map_err(|source| ControllerError::System { doing: "start the thread for sockets", source })?;
        Ok(Some(place))
    }

    /// Says which services the hook serves pods for.
    pub(super) fn set_pods(&mut self) {
        for (number, service) in self.services.iter() {
            self.dataplane.set_pods(number, service.pods);
        }
        if let Some(flag) = self.pods_flag() {
            tracing::warn!("{flag}");
        }
    }

    fn looks_for_servers(&self) -> bool {
        self.hook.place.is_some() || self.config.forwards_packets()
    }

    /// Takes note of the servers on this host.
    pub(super) fn note_servers(&mut self, servers: &[TcpSocket]) {
        if self.hook.place.is_some() {
            self.note_shadows(servers);
        }
        self.note_local_servers(servers);
    }

    /// The servers on this host, again and again.
    pub(super) fn watch_servers(&self) -> mpsc::Receiver<Vec<TcpSocket>> {
        let (sender, receiver) = mpsc::channel(1);
        if !self.looks_for_servers() {
            return receiver;
        }
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(LOOK_EVERY).await;
                match listening_sockets().await {
                    Ok(found) => {
                        if sender.send(found).await.is_err() {
                            return;
                        }
                    }
                    Err(error) => tracing::warn!("cannot list the sockets of this host: {error}"),
                }
            }
        });
        receiver
    }

    /// Says what is new about servers that nobody on this host reaches.
    fn note_shadows(&mut self, servers: &[TcpSocket]) {
        let listeners: Vec<_> =
            self.config.services.iter().flat_map(|service| service.listen.iter().copied()).collect();
        let local = self.backends.iter().filter(|backend| backend.local);
        let local: Vec<_> = local.map(|backend| backend.address).collect();
        let found = shadows(&listeners, &local, servers);
        for shadow in found.difference(&self.hook.shadows) {
            tracing::warn!("{}", shadow.sentence());
        }
        self.hook.shadows = found;
    }

    /// What keeps the hook from serving, for `sheave alive` and the status. As with the program on an interface, whoever took
    /// it away has done so on purpose: it is said, and not put back.
    pub(super) fn hook_reasons(&self) -> Option<String> {
        let place = self.hook.place.as_ref()?;
        let path = place.path().display();
        if !place.exists() {
            return Some(format!("the cgroup {path} is gone, and the connect hook with it: restart sheave"));
        }
        let lost = self.dataplane.hook_programs_lost();
        (!lost.is_empty()).then(|| {
            format!(
                "the connect hook is not on {path} any more (somebody has detached {}): restart sheave",
                lost.join(", ")
            )
        })
    }

    pub(super) fn hook_status(&self) -> Option<HookStatus> {
        let place = self.hook.place.as_ref()?;
        let attached = self.hook_reasons().is_none();
        Some(HookStatus { cgroup: place.path().display().to_string(), attached })
    }

    pub(super) fn hook_flags(&self) -> impl Iterator<Item = String> {
        let shadows = self.hook.shadows.iter().map(Shadow::sentence);
        self.hook.flags.iter().cloned().chain(self.hook_reasons()).chain(shadows).chain(self.pods_flag())
    }

    /// Where it is, in words.
    pub(super) fn hook_place(&self) -> Option<String> {
        Some(format!("the connect hook on {}", self.hook.place.as_ref()?.path().display()))
    }
}
