//! Flows that leave from an address that processes of this host use as well: the same port is never both's.

use std::{collections::BTreeSet, fs, net::SocketAddr, time::Duration};

use anyhow::{Context as _, ensure};
use aya::maps::{Array, Map, MapData};
use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::Daemon,
    hold::{Holder, Order},
    lab::{eventually, run},
    load::Crowd,
    stub::PORT,
};

/// Slots, and ports of the host's own connections.
const PORTS: (u16, u16) = (40_000, 44_095);
/// So many that connections which are given any of the ports would meet one of them. Two of them may have the same port,
/// each to another server.
const OWN: usize = 300;
const CLIENTS: usize = 100;
/// Sockets of the host are looked at every ten seconds.
const MOMENT: Duration = Duration::from_secs(40);

/// The ports from which connections of the holder to the apiservers leave: checks have others, and not for long.
fn own_ports(cluster: &Cluster) -> BTreeSet<u16> {
    let sockets = cluster.lb.run(&format!("ss -Htnp state established dport = :{PORT}")).unwrap();
    let held = sockets.lines().filter(|line| line.contains("\"sheave-hold\""));
    let local = held.filter_map(|line| line.split_whitespace().nth(2)?.rsplit_once(':'));
    local.map(|(_, port)| port.parse().unwrap()).collect()
}

/// The ports that the program takes for no slot.
fn blocked(daemon: &Daemon) -> anyhow::Result<BTreeSet<u16>> {
    let layout = fs::read_dir(daemon.pins())?.next().context("nothing is pinned")??.path();
    let words = Array::<_, u64>::try_from(Map::Array(MapData::from_pin(layout.join("map_BLOCKED"))?))?;
    let mut ports = BTreeSet::new();
    for (first, word) in words.iter().enumerate() {
        let word = word?;
        ports.extend((0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| (first * 64 + bit) as u16));
    }
    Ok(ports)
}

#[test]
fn a_port_of_a_process_on_this_host_is_no_flows_slot() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let lb = cluster.lb.link().unwrap();
    let (first, last) = PORTS;
    cluster.lb.namespace().sysctl("net/ipv4/ip_local_port_range", &format!("{first} {last}")).unwrap();
    let mut settings = cluster.settings().unwrap();
    settings.dataplane.push(format!("snat_addresses = [\"{}\", \"{}\"]", lb.v4, lb.v6));
    settings.dataplane.push(format!("snat_ports = \"{first}-{last}\""));
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    daemon.wait_ready(2).unwrap();

    // By the connect hook: they leave from the address that flows leave from, towards the same servers.
    let vip = SocketAddr::new(cluster.vip4, PORT);
    let mut holder = Holder::start(&cluster.lb, true, &cluster.ca_file(), vip).unwrap();
    holder.order(Order::Open(OWN)).unwrap();
    let own = own_ports(&cluster);
    assert!(own.len() >= OWN / 2, "{} ports", own.len());
    eventually(MOMENT, "they are noticed", || {
        let blocked = blocked(&daemon)?;
        let missing: Vec<_> = own.difference(&blocked).collect();
        ensure!(missing.is_empty(), "{} are no slot, without {} of ours", blocked.len(), missing.len());
        Ok(())
    })
    .unwrap();

    for vip in cluster.vips() {
        let mut crowd = Crowd::open(&cluster.client, &cluster.client_of(vip).unwrap(), CLIENTS).unwrap();
        crowd.ask_names().require_all(CLIENTS).unwrap();
        let listed = run(daemon.command("flows").unwrap().arg("--json")).unwrap();
        let flows = listed.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let sources: Vec<SocketAddr> =
            flows.map(|flow| flow["source"].as_str().unwrap().parse().unwrap()).collect();
        let slots: BTreeSet<_> = sources.iter().map(SocketAddr::port).collect();
        assert!(slots.len() >= CLIENTS / 2, "{slots:?}");
        assert!(slots.iter().all(|port| (first..=last).contains(port)), "{slots:?}");
        let both: Vec<_> = slots.intersection(&own).collect();
        assert!(both.is_empty(), "{both:?} are a process's and a flow's");
    }
    holder.catch_up().unwrap();
    assert_eq!(holder.ended(), []);
    assert!(own_ports(&cluster).is_superset(&own));
    daemon.process().kill().unwrap();
}
