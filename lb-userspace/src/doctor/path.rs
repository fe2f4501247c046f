//! Whether a client's SYN goes all the way: through listener and flow table to a backend, and the answer back. The daemon's checks
//! leave from this host's own sockets and see neither; so a SYN is put through the program as if it had come in by the VIP's
//! interface, and the flow table says what became of it. The flow is ended at once.

use std::{
    hash::{BuildHasher as _, RandomState},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use ipnet::IpNet;

use super::{Finding, note, ok, warning};
use crate::{
    admin::{Client, Flow, FlowFilter, KillOrder},
    config::{Config, Service},
    dataplane::inject,
    network::{Network, Port},
    resets,
};

/// For one answer of the daemon.
const LIMIT: Duration = Duration::from_secs(5);
/// Long enough for a second SYN, after a second: one that is lost is no verdict.
const PATIENCE: Duration = Duration::from_millis(2500);
/// Between two SYNs.
const AGAIN: Duration = Duration::from_secs(1);
/// Between two looks at the flow table.
const LOOK: Duration = Duration::from_millis(50);

pub(super) async fn examine(network: &Network, config: &Config) -> Vec<Finding> {
    if !config.forwards_packets() {
        return Vec::new();
    }
    let daemon = Client::new(&config.admin.socket, LIMIT);
    if let Err(error) = daemon.alive().await {
        let why = if error.is_no_daemon() { "no daemon runs".to_owned() } else { error.to_string() };
        return vec![note(
            "path",
            format!("whether connections pass the data path is tried when it serves: {why}"),
        )];
    }
    let tried = config.services.iter().flat_map(|service| {
        let first = |ipv6: bool| {
            let of_family =
                |listener: &&SocketAddr| listener.is_ipv6() == ipv6 && !listener.ip().is_loopback();
            service.listen.iter().find(of_family)
        };
        [first(false), first(true)].into_iter().flatten().map(move |listener| (service, *listener))
    });
    let findings = tried.map(|(service, listener)| try_listener(network, config, &daemon, service, listener));
    join_all(findings).await
}

async fn try_listener(
    network: &Network,
    config: &Config,
    daemon: &Client,
    service: &Service,
    listener: SocketAddr,
) -> Finding {
    let subject = format!("path through {listener}");
    let Some(interface) = network.interface_carrying(listener.ip()) else {
        return note(
            subject,
            "not tried, as the VIP is not on this host: that backends answer its SNAT addresses is proven, and that the listener \
             takes a client's SYN is not",
        );
    };
    let Ok(port) = network.port_of(interface) else {
        return note(subject, "not tried, as the VIP is on no interface that clients are behind");
    };
    let client = client(network, service, listener.ip(), interface);
    let frame = frame(&port, &resets::syn(client, listener, random()));
    let started = Instant::now();
    let (mut sent, mut flow) = (None::<Instant>, None);
    while started.elapsed() < PATIENCE {
        if sent.is_none_or(|sent| sent.elapsed() >= AGAIN) {
            if let Err(error) = inject(&config.dataplane.pin_dir, port.index, &frame) {
                return note(subject, format!("cannot be tried: {error}"));
            }
            sent = Some(Instant::now());
        }
        match find(daemon, client).await {
            Ok(found) => flow = found.or(flow),
            Err(error) => return note(subject, format!("cannot be tried: {error}")),
        }
        if flow.as_ref().is_some_and(|flow: &Flow| flow.answered) {
            break;
        }
        tokio::time::sleep(LOOK).await;
    }
    if flow.is_some() {
        // What is left of it otherwise is a half-open flow, which ages.
        let order = KillOrder { client: Some(client.to_string()), ..KillOrder::default() };
        let _ = daemon.kill(&order).await;
    }
    report(subject, client, flow.as_ref(), network)
}

fn report(subject: String, client: SocketAddr, flow: Option<&Flow>, network: &Network) -> Finding {
    let Some(flow) = flow else {
        return warning(subject, format!("a SYN in the name of {client} made no flow: the service has no usable backend, or its source may have no more flows"))
            .fix("sheave status\nsheave status --json | jq .packets");
    };
    let backend = flow.backend.as_deref().unwrap_or("a backend");
    let at = flow.backend_address.map_or_else(String::new, |address| format!(" ({address})"));
    if flow.answered {
        return ok(
            subject,
            format!(
                "a SYN went through listener and flow table to {backend}{at}, and its answer came back to {}",
                flow.source
            ),
        );
    }
    if flow.backend_address.is_some_and(|address| network.interface_carrying(address.ip()).is_some()) {
        return note(
            subject,
            format!("a SYN went to {backend}, which is this host: its answer does not pass the data path"),
        );
    }
    warning(
        subject,
        format!(
            "a SYN was given to {backend}{at} from {}, and no answer came back: clients that are sent there hang. Or the card's driver \
             cannot send frames that are handed to it, as in generic mode: then only a client can tell",
            flow.source
        ),
    )
    .fix("see the SNAT address above, and connect from a client")
}

async fn find(daemon: &Client, client: SocketAddr) -> Result<Option<Flow>, crate::admin::FlowsError> {
    let filter = FlowFilter { client: Some(client.ip()), ..FlowFilter::default() };
    let mut found = None;
    daemon
        .flows(&filter, |flow| {
            if flow.client == client {
                found = Some(flow);
            }
            Ok(found.is_none())
        })
        .await?;
    Ok(found)
}

/// In whose name the SYN is: this host's own address beside the VIP, so that what leaves in its flow is nobody else's; or, where the
/// service does not allow that, an address that it allows.
fn client(network: &Network, service: &Service, vip: IpAddr, interface: u32) -> SocketAddr {
    let local = network.local_addresses();
    let same_family = local.iter().filter(|it| it.address.is_ipv4() == vip.is_ipv4());
    let own =
        same_family.filter(|it| it.interface == interface && it.address != vip).map(|it| it.address).next();
    SocketAddr::new(allowed(own.unwrap_or(vip), &service.allow), port_of_client(random()))
}

/// This address, or another that is in one of the prefixes; without prefixes all are allowed.
fn allowed(own: IpAddr, allow: &[IpNet]) -> IpAddr {
    let of_family = || allow.iter().filter(|prefix| prefix.addr().is_ipv4() == own.is_ipv4());
    if of_family().any(|prefix| prefix.contains(&own)) {
        return own;
    }
    of_family().find_map(|prefix| prefix.hosts().next()).unwrap_or(own)
}

/// An ephemeral port (RFC 6335 §6).
fn port_of_client(random: u32) -> u16 {
    49_152 + (random % 16_384) as u16
}

/// Other in every run: hashers are seeded by the kernel's random numbers.
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
    fn the_client_is_one_that_the_service_allows() {
        let own: IpAddr = "10.0.0.2".parse().unwrap();
        let prefixes =
            |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpNet>>();
        assert_eq!(allowed(own, &[]), own);
        assert_eq!(allowed(own, &prefixes(&["10.0.0.0/8"])), own);
        assert_eq!(
            allowed(own, &prefixes(&["fd00::/8", "192.0.2.0/24"])),
            "192.0.2.1".parse::<IpAddr>().unwrap()
        );
        assert_eq!(allowed(own, &prefixes(&["fd00::/8"])), own, "nobody of this family is allowed");
        assert!((49_152..=65_535).contains(&port_of_client(u32::MAX)));
    }

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
