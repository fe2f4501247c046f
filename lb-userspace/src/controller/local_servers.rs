//! Backends that are this very host: packets for a listener are passed to them as they are, so their server must be there.

use std::collections::BTreeSet;

use super::Controller;
use crate::network::{TcpSocket, is_out_of_reach};

impl Controller {
    /// Says what is new about backends on this host whose server does not take what is passed to it.
    pub(super) fn note_local_servers(&mut self, servers: &[TcpSocket]) {
        let mut found = BTreeSet::new();
        for backend in self.backends.iter().filter(|it| it.local && self.config.forwards_packets()) {
            let service = &self.services[backend.target.service];
            let listeners = service.listen.iter().filter(|it| !it.ip().is_loopback());
            let listeners = listeners.filter(|it| it.is_ipv4() == backend.address.is_ipv4());
            for listener in listeners.filter(|it| is_out_of_reach(servers, backend.address, **it)) {
                found.insert(format!(
                    "{}/{} is this host, and its server listens on {} only: it refuses what is for {listener}; let it \
                     listen on every address (kube-apiserver: --bind-address={})",
                    service.name,
                    backend.name,
                    backend.address,
                    if listener.is_ipv4() { "0.0.0.0" } else { "::" }
                ));
            }
        }
        for sentence in found.difference(&self.unreached_servers) {
            tracing::warn!("{sentence}");
        }
        self.unreached_servers = found;
    }
}
