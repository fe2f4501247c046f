//! Other SNAT addresses while there are flows: old ones stay where they are, new ones leave from the new.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::ensure;
use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::{Daemon, Settings},
    lab::{eventually, run},
    load::Crowd,
};

/// Enough for every address to have some, were there four.
const CONNECTIONS: usize = 60;
/// A slot rests for a minute after its flow; the table is looked through every few seconds.
const REST: Duration = Duration::from_secs(150);

/// An address of each family.
type Pair = [IpAddr; 2];

/// The load balancer's address on the backends' side, and others beside it, which it gets.
fn addresses(cluster: &Cluster) -> [Pair; 3] {
    let inside = cluster.lb.links().last().unwrap();
    let beside = |offset: u32| -> Pair {
        let v4 = Ipv4Addr::from(u32::from(inside.v4) + offset);
        let v6 = Ipv6Addr::from(u128::from(inside.v6) + u128::from(offset));
        [v4.into(), v6.into()]
    };
    let (two, three) = (beside(100), beside(101));
    for [v4, v6] in [two, three] {
        cluster.lb.run(&format!("ip addr add {v4}/24 dev {}", inside.interface)).unwrap();
        cluster.lb.run(&format!("ip addr add {v6}/64 dev {} nodad", inside.interface)).unwrap();
    }
    [beside(0), two, three]
}

fn leaving_from(cluster: &Cluster, pairs: &[Pair]) -> Settings {
    let mut settings = cluster.settings().unwrap();
    let addresses: Vec<_> = pairs.iter().flatten().map(ToString::to_string).collect();
    settings.dataplane = vec![format!("snat_addresses = {addresses:?}"), "snat_addresses_max = 2".to_owned()];
    settings
}

/// How many open connections leave from each address.
fn sources(daemon: &Daemon) -> BTreeMap<IpAddr, usize> {
    let listed = run(daemon.command("flows").unwrap().arg("--json")).unwrap();
    let mut sources = BTreeMap::new();
    for line in listed.lines() {
        let flow: serde_json::Value = serde_json::from_str(line).unwrap();
        if flow["state"] == "established" {
            let source: SocketAddr = flow["source"].as_str().unwrap().parse().unwrap();
            *sources.entry(source.ip()).or_default() += 1;
        }
    }
    sources
}

/// Connections over both families that stay open.
fn open(cluster: &Cluster) -> [Crowd; 2] {
    cluster.vips().map(|vip| {
        let client = cluster.client_of(vip).unwrap();
        let mut crowd = Crowd::open(&cluster.client, &client, CONNECTIONS).unwrap();
        crowd.ask_names().require_all(CONNECTIONS).unwrap();
        crowd
    })
}

/// Opens connections. Returns them, and how many leave from each address.
fn open_and_see(cluster: &Cluster, daemon: &Daemon) -> ([Crowd; 2], BTreeMap<IpAddr, usize>) {
    let before = sources(daemon);
    let crowds = open(cluster);
    let mut after = sources(daemon);
    for (address, count) in before {
        *after.entry(address).or_default() -= count;
    }
    after.retain(|_, count| *count > 0);
    (crowds, after)
}

fn require_alive(crowds: &mut [[Crowd; 2]]) {
    for crowd in crowds.iter_mut().flatten() {
        crowd.ask_names().require_all(CONNECTIONS).unwrap();
    }
}

/// All of these and no others, with a good part of the connections each.
fn require_spread(seen: &BTreeMap<IpAddr, usize>, pairs: &[Pair]) {
    let mut expected: Vec<_> = pairs.iter().flatten().collect();
    expected.sort();
    assert_eq!(seen.keys().collect::<Vec<_>>(), expected, "{seen:?}");
    assert!(seen.values().all(|count| *count >= CONNECTIONS / pairs.len() / 3), "{seen:?}");
}

fn reload(daemon: &Daemon, settings: &Settings) -> Result<String, String> {
    let output = daemon.reload(settings).unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    if output.status.success() { Ok(said) } else { Err(said) }
}

#[test]
fn addresses_come_and_go_under_open_connections() {
    let cluster = Cluster::start(Shape::TwoArm, 2).unwrap();
    let [one, two, three] = addresses(&cluster);
    let directory = cluster.lab.directory();
    let mut daemon = Daemon::start(&cluster.lb, directory, &leaving_from(&cluster, &[one])).unwrap();
    daemon.wait_ready(2).unwrap();
    let (first, seen) = open_and_see(&cluster, &daemon);
    require_spread(&seen, &[one]);

    let said = reload(&daemon, &leaving_from(&cluster, &[one, two])).unwrap();
    assert!(said.contains(&format!("new connections leave from {}, {} as well", two[0], two[1])), "{said}");
    let (second, seen) = open_and_see(&cluster, &daemon);
    require_spread(&seen, &[one, two]);
    let mut open = [first, second];
    require_alive(&mut open);

    let said = reload(&daemon, &leaving_from(&cluster, &[two])).unwrap();
    assert!(said.contains(&format!("no new connection leaves from {}, {}", one[0], one[1])), "{said}");
    let before = sources(&daemon);
    let (third, seen) = open_and_see(&cluster, &daemon);
    require_spread(&seen, &[two]);
    require_alive(&mut open);
    assert_eq!(sources(&daemon)[&one[0]], before[&one[0]], "they are where they were");

    // There are places for two, and one of them is taken until the last flow of that address has ended.
    let said = reload(&daemon, &leaving_from(&cluster, &[two, three])).unwrap_err();
    assert!(said.contains("dataplane.snat_addresses_max") && said.contains("has no new flows"), "{said}");
    require_alive(&mut open);

    // A daemon that takes over knows where flows are as well.
    daemon.process().kill().unwrap();
    let mut daemon = Daemon::start(&cluster.lb, directory, &leaving_from(&cluster, &[two])).unwrap();
    daemon.wait_ready(2).unwrap();
    require_alive(&mut open);

    drop(open);
    eventually(REST, "the last flows of the first address have ended", || {
        let (log, [v4, v6]) = (daemon.log(), one);
        let left =
            |address: IpAddr| log.contains(&format!("the last flow that left from {address} has ended"));
        ensure!(left(v4) && left(v6));
        Ok(())
    })
    .unwrap();
    reload(&daemon, &leaving_from(&cluster, &[two, three])).unwrap();
    let (fourth, seen) = open_and_see(&cluster, &daemon);
    require_spread(&seen, &[two, three]);
    require_alive(&mut [third, fourth]);
}

#[test]
fn a_restart_with_other_addresses_loses_nothing() {
    let cluster = Cluster::start(Shape::TwoArm, 2).unwrap();
    let [one, two, three] = addresses(&cluster);
    let directory = cluster.lab.directory();
    let mut daemon = Daemon::start(&cluster.lb, directory, &leaving_from(&cluster, &[one])).unwrap();
    daemon.wait_ready(2).unwrap();
    let mut before = [open(&cluster)];
    daemon.process().kill().unwrap();

    let mut daemon = Daemon::start(&cluster.lb, directory, &leaving_from(&cluster, &[two])).unwrap();
    daemon.wait_ready(2).unwrap();
    require_alive(&mut before);
    let (after, seen) = open_and_see(&cluster, &daemon);
    require_spread(&seen, &[two]);
    let [before] = before;
    let mut both = [before, after];
    require_alive(&mut both);

    // Flows are at two addresses: a third cannot be had yet, and that keeps nobody from being served.
    daemon.process().kill().unwrap();
    let mut daemon = Daemon::start(&cluster.lb, directory, &leaving_from(&cluster, &[three])).unwrap();
    daemon.wait_ready(2).unwrap();
    assert!(daemon.log().contains("new flows go on leaving from"), "{}", daemon.log());
    let (after, seen) = open_and_see(&cluster, &daemon);
    require_spread(&seen, &[two]);
    require_alive(&mut both);
    require_alive(&mut [after]);
}

/// From the VIPs to this host's own address there are fewer ports, unless the operator says otherwise; from a flow table with
/// fewer of them everything goes.
#[test]
fn flows_leave_from_vips_and_from_this_hosts_own_address_in_turn() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let own = cluster.lb.link().unwrap();
    let own: Pair = [own.v4.into(), own.v6.into()];
    let leaving_from = |pair: Option<Pair>, ports: Option<&str>| {
        let mut settings = cluster.settings().unwrap();
        let addresses = pair.map(|pair| pair.map(|address| address.to_string()));
        settings.dataplane.extend(addresses.map(|addresses| format!("snat_addresses = {addresses:?}")));
        settings.dataplane.extend(ports.map(|ports| format!("snat_ports = {ports:?}")));
        settings
    };
    let mut daemon = cluster.balance().unwrap();
    let (first, seen) = open_and_see(&cluster, &daemon);
    let vips = cluster.vips();
    require_spread(&seen, &[vips]);
    let said = reload(&daemon, &leaving_from(Some(own), None)).unwrap_err();
    assert!(said.contains("name these as dataplane.snat_ports"), "{said}");
    reload(&daemon, &leaving_from(Some(own), Some("1024-65535"))).unwrap();
    let (second, seen) = open_and_see(&cluster, &daemon);
    require_spread(&seen, &[own]);
    let mut both = [first, second];
    require_alive(&mut both);
    reload(&daemon, &leaving_from(Some(vips), None)).unwrap();
    let (third, seen) = open_and_see(&cluster, &daemon);
    require_spread(&seen, &[vips]);
    require_alive(&mut both);
    require_alive(&mut [third]);
    daemon.process().kill().unwrap();
}
