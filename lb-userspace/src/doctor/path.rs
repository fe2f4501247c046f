//! Whether a client's SYN goes all the way: through listener and flow table to a backend, and the answer back. The daemon's checks
//! leave from this host's own sockets and see neither; so a SYN is put through the program as if it had come in by the VIP's
//! interface, and the flow table says what became of it. The flow is ended at once.

use std::{
    hash::{BuildHasher as _, RandomState},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use futures_util::future::join_all;

use super::{Finding, note, ok, warning};
use crate::{
    admin::{Client, Flow, FlowFilter, InterfaceStatus, KillOrder},
    config::{Config, Service},
    dataplane::{Mode, inject},
    network::{Network, Port},
    resets,
};

/// For one answer of the daemon.
const LIMIT: Duration = Duration::from_secs(5);
/// Long enough for a second SYN, after a second: one that is lost is no verdict.
const PATIENCE: Duration = Duration::from_millis(2500);
/// Between two SYNs.
const AGAIN: Duration = Duration::from_secs(1);
/// Ports of the client that are tried for one without a flow.
const OTHER_PORTS: usize = 8;
/// Between two looks at the flow table.
const LOOK: Duration = Duration::from_millis(50);

pub(super) async fn examine(network: &Network, config: &Config) -> Vec<Finding> {
    if !config.forwards_packets() {
        return Vec::new();
    }
    let daemon = Client::new(&config.admin.socket, LIMIT);
    let untried =
        |why: String| vec![note("path", format!("not tried whether connections pass the data path: {why}"))];
    match daemon.alive().await {
        Ok(alive) if alive.alive => {}
        Ok(alive) => return untried(alive.reasons.join("; ")),
        Err(error) if error.is_no_daemon() => return untried("no daemon runs".to_owned()),
        Err(error) => return untried(error.to_string()),
    }
    // The program's frames leave by the driver's own function for frames that are handed to it, which may be missing there.
    let attached = match daemon.status().await {
        Ok(status) => status.interfaces,
        Err(error) => return untried(error.to_string()),
    };
    if let Some(generic) = attached.iter().find(|it| it.xdp_mode == Mode::Generic.name()) {
        return untried(format!("{} is in generic mode, where no frame can be put in", generic.name));
    }
    let tried = config.services.iter().flat_map(|service| {
        let first = |ipv6: bool| {
            let of_family =
                |listener: &&SocketAddr| listener.is_ipv6() == ipv6 && !listener.ip().is_loopback();
            service.listen.iter().find(of_family)
        };
        [first(false), first(true)].into_iter().flatten().map(move |listener| (service, *listener))
    });
    join_all(tried.map(|(service, listener)| {
        let look = Look { network, config, daemon: &daemon, attached: &attached, service, listener };
        async move { look.examine().await }
    }))
    .await
}

/// One listener.
struct Look<'a> {
    network: &'a Network,
    config: &'a Config,
    daemon: &'a Client,
    attached: &'a [InterfaceStatus],
    service: &'a Service,
    listener: SocketAddr,
}

impl Look<'_> {
    async fn examine(&self) -> Finding {
        let subject = format!("path through {}", self.listener);
        let Some(interface) = self.network.interface_carrying(self.listener.ip()) else {
            return note(
                subject,
                "not tried, as the VIP is not on this host: that backends answer its SNAT addresses is proven, and that \
                 the listener takes a client's SYN is not",
            );
        };
        let Ok(port) = self.network.port_of(interface) else {
            return note(subject, "not tried, as the VIP is on no interface that clients are behind");
        };
        let name = self.network.interface(port.index).map_or_else(|_| "?".to_owned(), |it| it.name);
        if !self.attached.iter().any(|it| it.name == name) {
            let what = format!("the VIP is on {name}, which sheave is not attached to: clients are refused");
            return warning(subject, what).fix("restart sheave");
        }
        let Some(client) = self.client(interface) else {
            return note(subject, "not tried, as the service's `allow` has no address of this host");
        };
        match self.open(&port, client).await {
            Ok(Some(flow)) => report(subject, &flow, self.network),
            Ok(None) => warning(
                subject,
                format!(
                    "a SYN in the name of {client} made no flow: the service has no usable backend, does not allow it \
                     as it is loaded, or its source may have no more flows"
                ),
            )
            .fix("sheave status\nsheave status --json | jq .packets"),
            Err(why) => note(subject, format!("cannot be tried: {why}")),
        }
    }

    /// Puts SYNs in until the flow is answered, and ends it. Returns it as it was last seen; None: there was none.
    async fn open(&self, port: &Port, mut client: SocketAddr) -> Result<Option<Flow>, String> {
        // Those of doctor's last runs rest for a while.
        for _ in 0..OTHER_PORTS {
            if self.flow_of(client).await?.is_none() {
                break;
            }
            client.set_port(client_port(random()));
        }
        if self.flow_of(client).await?.is_some() {
            return Err(format!("flows of {OTHER_PORTS} earlier tries still rest: try again in a minute"));
        }
        let frame = frame(port, &resets::syn(client, self.listener, random()));
        let started = Instant::now();
        let (mut sent, mut flow) = (None::<Instant>, None);
        while started.elapsed() < PATIENCE && !flow.as_ref().is_some_and(|flow: &Flow| flow.answered) {
            if sent.is_none_or(|sent| sent.elapsed() >= AGAIN) {
                inject(&self.config.dataplane.pin_dir, port.index, &frame)
                    .map_err(|error| error.to_string())?;
                sent = Some(Instant::now());
            }
            tokio::time::sleep(LOOK).await;
            flow = self.flow_of(client).await?.or(flow);
        }
        if flow.is_some() {
            // One that was not answered is left: it makes way for others, and ages.
            let order = KillOrder { client: Some(client.to_string()), ..KillOrder::default() };
            let _ = self.daemon.kill(&order).await;
        }
        Ok(flow)
    }

    async fn flow_of(&self, client: SocketAddr) -> Result<Option<Flow>, String> {
        let filter = FlowFilter { client: Some(client.ip()), ..FlowFilter::default() };
        let mut found = None;
        let take = |flow: Flow| {
            if flow.client == client && flow.listener == Some(self.listener) {
                found = Some(flow);
            }
            Ok(found.is_none())
        };
        self.daemon.flows(&filter, take).await.map_err(|error| error.to_string())?;
        Ok(found)
    }

    /// In whose name the SYN is: an address of this host beside the VIP, so that what leaves in its flow is nobody else's, which the
    /// service allows, and a port that no process of this host has unless it asked for it.
    fn client(&self, interface: u32) -> Option<SocketAddr> {
        let (vip, local) = (self.listener.ip(), self.network.local_addresses());
        let own =
            local.iter().filter(|it| it.interface == interface && it.address.is_ipv4() == vip.is_ipv4());
        let (vips, others): (Vec<IpAddr>, Vec<IpAddr>) = own.map(|it| it.address).partition(|it| *it == vip);
        let allowed = |address: &IpAddr| {
            self.service.allow.is_empty() || self.service.allow.iter().any(|it| it.contains(address))
        };
        let address = others.into_iter().chain(vips).find(allowed)?;
        Some(SocketAddr::new(address, client_port(random())))
    }
}

fn report(subject: String, flow: &Flow, network: &Network) -> Finding {
    let backend = flow.backend.as_deref().unwrap_or("a backend");
    let at = flow.backend_address.map_or_else(String::new, |address| format!(" ({address})"));
    if flow.answered {
        let what = format!(
            "a SYN went through listener and flow table to {backend}{at}, and its answer came back to {}",
            flow.source
        );
        return ok(subject, what);
    }
    if flow.backend_address.is_some_and(|address| network.interface_carrying(address.ip()).is_some()) {
        let what =
            format!("a SYN went to {backend}, which is this host: its answer does not pass the data path");
        return note(subject, what);
    }
    let what = format!(
        "a SYN was given to {backend}{at} from {}, and no SYN-ACK came back: clients that are sent there hang, or are \
         refused. Or the driver does not send frames that are handed to it: then only a client can tell",
        flow.source
    );
    warning(subject, what).fix(
        "see the SNAT address above\nsheave status --json | jq .packets.dropped_backend_interface: if it grows, name the interface in \
         dataplane.backend_interfaces",
    )
}

/// Below the ports that a process is given unasked, and above those of most servers of this host.
fn client_port(random: u32) -> u16 {
    512 + (random % 512) as u16
}

/// Another number each time: hashers are seeded by the kernel's random numbers.
fn random() -> u32 {
    RandomState::new().hash_one(0) as u32
}

/// The packet in a frame from the interface to itself: what the flow sends to its client goes to no other host.
fn frame(port: &Port, packet: &[u8]) -> Vec<u8> {
    const IPV4: u16 = 0x0800;
    const IPV6: u16 = 0x86dd;
    let mut frame = [port.mac, port.mac].concat();
    for tag in &port.tags {
        frame.extend(tag.protocol.ethertype().to_be_bytes());
        frame.extend(tag.id.to_be_bytes());
    }
    let kind = if packet.first().is_some_and(|byte| byte >> 4 == 4) { IPV4 } else { IPV6 };
    frame.extend(kind.to_be_bytes());
    frame.extend(packet);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::{Tag, TagProtocol};

    #[test]
    fn a_frame_has_the_tags_of_its_interface() {
        let (from, to) = ("10.0.0.2:50000".parse().unwrap(), "10.0.0.1:6443".parse().unwrap());
        let tags = vec![Tag { protocol: TagProtocol::Ieee8021Q, id: 7 }];
        let port = Port { index: 2, tags, mac: [2, 0, 0, 0, 0, 1], mtu: 1500 };
        let frame = frame(&port, &resets::syn(from, to, 99));
        let sliced = etherparse::SlicedPacket::from_ethernet(&frame).unwrap();
        assert_eq!(sliced.vlan_ids().first().map(|id| id.value()), Some(7));
        let Some(etherparse::TransportSlice::Tcp(tcp)) = sliced.transport else { panic!("{sliced:?}") };
        assert!(tcp.syn() && !tcp.ack());
        assert_eq!((tcp.sequence_number(), tcp.destination_port()), (99, 6443));
    }
}
