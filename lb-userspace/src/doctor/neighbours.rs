//! Whether each backend can be reached on the link level.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};

use super::{Finding, failure, ok};
use crate::{
    config::{Config, Service},
    controller,
    network::{Network, NetworkError, NextHop, TcpSocket, display_mac, is_out_of_reach, listening_sockets},
};

/// A neighbour that does not answer within this time is missing: the kernel itself asks three times, once a second.
const PATIENCE: Duration = Duration::from_millis(1500);

pub(super) async fn examine(network: &Network, config: &Config) -> Vec<Finding> {
    // Where they cannot be listed nothing is said about them here: `sockets` says that.
    let servers = listening_sockets().await.unwrap_or_default();
    // As packets will go; where it cannot be found out, as this host's own do.
    let snat = controller::snat_addresses(config, network).await.unwrap_or_default();
    let services = config.services.iter();
    let pairs = services.flat_map(|service| service.backends.iter().map(move |backend| (service, backend)));
    let findings = pairs.map(|(service, backend)| {
        let subject = format!("backend {}/{}", service.name, backend.name);
        let from = snat.iter().copied().find(|it| it.is_ipv4() == backend.address.is_ipv4());
        reach((network, from), service, backend.address, (&servers, config.forwards_packets()), subject)
    });
    join_all(findings).await
}

async fn reach(
    (network, from): (&Network, Option<IpAddr>),
    service: &Service,
    backend: SocketAddr,
    (servers, forwards): (&[TcpSocket], bool),
    subject: String,
) -> Finding {
    match resolved(network, from, backend).await {
        Ok(NextHop { mac: Some(mac), neighbour, .. }) => {
            ok(subject, format!("next hop {neighbour} is at {}", display_mac(&mac)))
        }
        Ok(NextHop { neighbour, .. }) => {
            failure(subject, format!("its next hop {neighbour} does not answer on the link"))
                .fix(format!("check that it is up and in this VLAN: ip neigh show {neighbour}"))
        }
        Err(NetworkError::Local(_)) if !forwards => ok(subject, "is this host"),
        Err(NetworkError::Local(_)) => local(service, backend, servers, subject),
        Err(error) => failure(subject, error.to_string()).fix(format!("ip route get {}", backend.ip())),
    }
}

async fn resolved(
    network: &Network,
    from: Option<IpAddr>,
    backend: SocketAddr,
) -> Result<NextHop, NetworkError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let hop = network.next_hop(from, backend.ip()).await?;
        if hop.mac.is_some() || Instant::now() >= deadline {
            return Ok(hop);
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// A backend on this host is reached by leaving the packet as it is: only possible on the listener's own port, and where its
/// server takes what is for the listener's address.
fn local(service: &Service, backend: SocketAddr, servers: &[TcpSocket], subject: String) -> Finding {
    // The connect hook can change a port and an address.
    let listeners = service.listen.iter().filter(|listener| !listener.ip().is_loopback());
    let listeners: Vec<_> = listeners.filter(|it| it.is_ipv4() == backend.is_ipv4()).collect();
    if let Some(other) = listeners.iter().find(|listener| listener.port() != backend.port()) {
        let (is, wanted) = (backend.port(), other.port());
        let what = format!(
            "is this host, on port {is}, while the service listens on {wanted}: XDP cannot translate to it"
        );
        let fix = format!("let the service listen on port {is}, or leave this host out of its backends");
        return failure(subject, what).fix(fix);
    }
    if let Some(listener) = listeners.iter().find(|listener| is_out_of_reach(servers, backend, ***listener)) {
        let every = if listener.is_ipv4() { "0.0.0.0" } else { "::" };
        let what = format!(
            "is this host, and its server listens on {backend} only: packets for {listener} are passed to it untouched, and \
             refused"
        );
        let fix = format!("let it listen on every address: kube-apiserver --bind-address={every}");
        return failure(subject, what).fix(fix);
    }
    ok(subject, "is this host: its packets are passed to the local socket untouched")
}
