//! Whether each backend can be reached on the link level.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};

use super::{Finding, failure, ok};
use crate::{
    config::{Config, Service},
    network::{Network, NetworkError, NextHop, display_mac},
};

/// A neighbour that does not answer within this time is missing: the kernel itself asks three times, once a second.
const PATIENCE: Duration = Duration::from_millis(1500);

pub(super) async fn examine(network: &Network, config: &Config) -> Vec<Finding> {
    let services = config.services.iter();
    let pairs = services.flat_map(|service| service.backends.iter().map(move |backend| (service, backend)));
    let findings = pairs.map(|(service, backend)| {
        let subject = format!("backend {}/{}", service.name, backend.name);
        reach(network, service, backend.address, subject)
    });
    join_all(findings).await
}

async fn reach(network: &Network, service: &Service, backend: SocketAddr, subject: String) -> Finding {
    match resolved(network, backend).await {
        Ok(NextHop { mac: Some(mac), neighbour, .. }) => {
            ok(subject, format!("next hop {neighbour} is at {}", display_mac(&mac)))
        }
        Ok(NextHop { neighbour, .. }) => {
            failure(subject, format!("its next hop {neighbour} does not answer on the link"))
                .fix(format!("check that it is up and in this VLAN: ip neigh show {neighbour}"))
        }
        Err(NetworkError::Local(_)) => local(service, backend, subject),
        Err(error) => failure(subject, error.to_string()).fix(format!("ip route get {}", backend.ip())),
    }
}

async fn resolved(network: &Network, backend: SocketAddr) -> Result<NextHop, NetworkError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let hop = network.next_hop(backend.ip()).await?;
        if hop.mac.is_some() || Instant::now() >= deadline {
            return Ok(hop);
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// A backend on this host is reached by leaving the packet as it is: only possible on the listener's own port.
fn local(service: &Service, backend: SocketAddr, subject: String) -> Finding {
    let other: BTreeSet<u16> = service
        .listen
        .iter()
        .filter(|listener| listener.is_ipv4() == backend.is_ipv4())
        .map(SocketAddr::port)
        .filter(|port| *port != backend.port())
        .collect();
    match other.first() {
        None => ok(subject, "is this host: its packets are passed to the local socket untouched"),
        Some(port) => failure(
            subject,
            format!(
                "is this host, on port {}, while the service listens on {port}: XDP cannot translate to it",
                backend.port()
            ),
        )
        .fix(format!(
            "let the service listen on port {}, or leave this host out of its backends",
            backend.port()
        )),
    }
}
