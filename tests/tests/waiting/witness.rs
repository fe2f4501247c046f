//! What flows notice has a backend checked at once, whatever the interval says; and how often backends are checked while
//! nobody notices anything.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::{Daemon, Settings},
    hold::{Holder, Order, SOME_AT_EACH},
    lab::{Host, eventually},
    load::{Asker, sequential},
};

/// With checks so far apart that only flows can hurry them.
const VERDICT: Duration = Duration::from_secs(60);

fn settings(cluster: &Cluster) -> Settings {
    let mut settings = cluster.settings().unwrap();
    settings.check = ["interval = \"10m\"", "fast_interval = \"9m\"", "connect_timeout = \"500ms\""]
        .map(str::to_owned)
        .to_vec();
    settings
}

fn start(cluster: &Cluster) -> Daemon {
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings(cluster)).unwrap();
    daemon.wait_ready(cluster.apiservers.len()).unwrap();
    daemon
}

/// Clients of both VIPs that keep asking.
fn load(cluster: &Cluster) -> [Asker; 2] {
    cluster.vips().map(|vip| {
        let client = cluster.client_of(vip).unwrap();
        Asker::start(&cluster.client, &client, 4, Duration::from_millis(20))
    })
}

#[test]
fn a_refused_connection_is_noticed_by_the_flow_that_meets_it() {
    let mut cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let mut daemon = start(&cluster);
    let client = cluster.client_of(cluster.vip4).unwrap();
    let load = load(&cluster);
    cluster.apiservers[0].stub.kill().unwrap();
    daemon.wait_state("api-1", "draining", VERDICT).unwrap();
    drop(load);
    // And the verdict holds: nobody meets it again.
    let report = sequential(&cluster.client, &client, 60).unwrap();
    report.require_all(60).unwrap();
    assert!(!report.by_server().contains_key("api-1"), "{:?}", report.by_server());
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn a_wait_without_an_answer_is_noticed_on_a_frozen_server_and_on_one_that_is_cut_off() {
    for cut in [false, true] {
        let mut cluster = Cluster::start(Shape::OneArm, 3).unwrap();
        let mut daemon = start(&cluster);
        let client = cluster.client_of(cluster.vip4).unwrap();
        let load = load(&cluster);
        if cut {
            cluster.apiservers[0].host.cut_off().unwrap();
        } else {
            cluster.apiservers[0].stub.freeze().unwrap();
        }
        daemon.wait_state("api-1", "silent", VERDICT).unwrap();
        drop(load);
        let report = sequential(&cluster.client, &client, 60).unwrap();
        report.require_all(60).unwrap();
        assert!(!report.by_server().contains_key("api-1"), "{:?}", report.by_server());
        cluster.require_no_own_resets().unwrap();
    }
}

/// What only clients meet at a server, and no check: packets of flows come from the VIP, those of checks from the load
/// balancer's own address.
fn ill_for_clients(cluster: &Cluster, what: &str) -> String {
    let own = cluster.lb.address(cluster.vip4).unwrap();
    format!(
        "add table inet ill; add counter inet ill met; add counter inet ill checks; \
         add chain inet ill in {{ type filter hook input priority 0; }}; \
         add rule inet ill in ip saddr {own} tcp dport 6443 tcp flags & (syn | ack) == syn counter name checks; \
         add rule inet ill in ip saddr {} tcp dport 6443 {what}",
        cluster.vip4
    )
}

/// How many packets a counter of a table, as that of [`ill_for_clients`], has counted.
fn counted(host: &Host, counter: &str) -> anyhow::Result<u64> {
    let json: serde_json::Value =
        serde_json::from_str(&host.run(&format!("nft -j list counter inet {counter}"))?)?;
    let entries = json["nftables"].as_array().context("no list")?;
    entries.iter().find_map(|entry| entry["counter"]["packets"].as_u64()).context("no counter")
}

#[test]
fn flows_have_a_backend_checked_and_never_decide_by_themselves() {
    // Refused, and kept waiting: by something that the checks do not meet.
    for (what, answered) in [
        ("tcp flags & (syn | ack) == syn counter name met reject with tcp reset", true),
        ("tcp flags & psh == psh counter name met drop", false),
    ] {
        let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
        let daemon = start(&cluster);
        let client = cluster.client_of(cluster.vip4).unwrap();
        let ill = &cluster.apiservers[0].host;
        ill.nft(&ill_for_clients(&cluster, what)).unwrap();
        let load = Asker::start(&cluster.client, &client, 8, Duration::from_millis(20));
        // Some flows meet it, and for each check that they bring about it passes.
        for round in 1..=3 {
            let met = counted(ill, "ill met").unwrap();
            eventually(VERDICT, "flows meet it, and it is checked for that", || {
                let now = (counted(ill, "ill met")?, counted(ill, "ill checks")?);
                // A wait is checked for once, perhaps before this test looks for the first time.
                ensure!(now.0 > met && now.1 > 0, "{now:?}, {met} before in round {round}");
                Ok(())
            })
            .unwrap();
            assert_eq!(daemon.status().unwrap().states("api-1"), ["ready", "ready"], "{}", daemon.log());
        }
        ill.run("nft delete table inet ill").unwrap();
        let report = load.stop();
        // Who is refused is sent to another one. Who waits may have waited for longer than it can.
        if answered {
            report.require_all(report.outcomes.len()).unwrap();
        }
        assert!(!daemon.log().contains("/api-1 is DOWN"), "{}", daemon.log());
        let report = sequential(&cluster.client, &client, 60).unwrap();
        report.require_all(60).unwrap();
        assert!(report.by_server().contains_key("api-1"), "{:?}", report.by_server());
        cluster.require_no_own_resets().unwrap();
    }
}

/// A node, whose processes reach the servers by its loopback addresses. Each check is a connection, which can be counted.
fn node_settings(cluster: &Cluster, interval: &str) -> Settings {
    let mut settings = cluster.settings().unwrap();
    settings.listen = ["127.0.0.1:16443", "[::1]:16443"].map(|it| it.parse().unwrap()).into();
    settings.ca_file = "".into();
    let timing = ["type = \"tcp\"", "fast_interval = \"100ms\"", "connect_timeout = \"500ms\""];
    settings.check = timing.map(str::to_owned).to_vec();
    settings.check.push(format!("interval = {interval:?}"));
    settings
}

fn holder(cluster: &Cluster) -> Holder {
    Holder::start(&cluster.lb, true, &cluster.ca_file(), "127.0.0.1:16443".parse().unwrap()).unwrap()
}

#[test]
fn a_node_checks_more_seldom_while_its_processes_hear_of_a_server() {
    const CHECKS: u64 = 20;
    let cluster = Cluster::start_without_vips(Shape::OneArm, 2).unwrap();
    let mut daemon =
        Daemon::start(&cluster.lb, cluster.lab.directory(), &node_settings(&cluster, "500ms")).unwrap();
    daemon.wait_ready(2).unwrap();
    let mut holder = holder(&cluster);
    holder.order(Order::OpenPolling(12)).unwrap();
    assert!(holder.opened_to("api-1") > 0);
    let server = &cluster.apiservers[0].host;
    let opening = "tcp dport 6443 tcp flags & (syn | ack) == syn counter name";
    let rules = format!(
        "add table inet seen; add counter inet seen heard; add counter inet seen unheard; \
         add chain inet seen in {{ type filter hook input priority 0; }}; \
         add rule inet seen in meta nfproto ipv4 {opening} heard; \
         add rule inet seen in meta nfproto ipv6 {opening} unheard"
    );
    server.nft(&rules).unwrap();
    // Nobody hears anything by IPv6, so that checks come as ever: they are the clock.
    let heard_while = |unheard: u64| {
        let now = || anyhow::Ok((counted(server, "seen heard")?, counted(server, "seen unheard")?));
        let begin = now().unwrap();
        eventually(VERDICT, "checks are made", || {
            let now = now()?;
            ensure!(now.1 - begin.1 >= unheard, "{now:?}");
            Ok(now.0 - begin.0)
        })
        .unwrap()
    };
    let vouched = heard_while(CHECKS);
    assert!((1..=CHECKS * 6 / 10).contains(&vouched), "{vouched} checks, and {CHECKS} without traffic");
    drop(holder);
    // The last of them may be vouched for still.
    heard_while(3);
    let alone = heard_while(CHECKS);
    assert!(alone >= CHECKS * 8 / 10, "{alone} checks without traffic, and {CHECKS} beside");
}

#[test]
fn a_pause_is_no_death_where_checks_are_seldom() {
    let cluster = Cluster::start_without_vips(Shape::OneArm, 2).unwrap();
    let mut settings = node_settings(&cluster, "15s");
    // Those of another service would find it silent at another time.
    settings.listen.truncate(1);
    settings.service.push("reset_after = \"6s\"".to_owned());
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    daemon.wait_ready(2).unwrap();
    let mut holder = holder(&cluster);
    holder.order(Order::Open(SOME_AT_EACH)).unwrap();
    let server = &cluster.apiservers[0].host;
    server
        .nft(
            "add table inet deaf; add chain inet deaf in { type filter hook prerouting priority -400; }; \
             add rule inet deaf in tcp flags & (syn | ack) == syn drop",
        )
        .unwrap();
    let is = |state: &str, daemon: &Daemon| {
        let status = daemon.status().unwrap();
        status.services[0].backends.iter().any(|it| it.name == "api-1" && it.state == state)
    };
    eventually(VERDICT, "a check finds it silent", || {
        ensure!(is("silent", &daemon));
        Ok(())
    })
    .unwrap();
    server.run("nft delete table inet deaf").unwrap();
    // Its next check would come long after it is dead.
    eventually(VERDICT, "it is found to be back", || {
        ensure!(is("ready", &daemon));
        Ok(())
    })
    .unwrap();
    assert!(!daemon.log().contains("-> dead"), "{}", daemon.log());
    assert_eq!(holder.ended(), []);
}
