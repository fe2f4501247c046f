//! Flows that end because their backend is dead, flows that are asked, and flows that nobody may touch.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{
    net::IpAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::ensure;
use lb_tests::{
    cluster::{Apiserver, Cluster, Router, Shape},
    daemon::{Daemon, Settings},
    idle::Idle,
    lab::{Host, Process, eventually, run},
    stub::Door,
};

/// Some checks and `reset_after`, with room for a busy machine.
const VERDICT: Duration = Duration::from_secs(30);
/// What is asserted not to happen is watched for so long: twice `reset_after`.
const WATCHED: Duration = Duration::from_secs(5);
/// Between two looks: each is a process, and the servers share this machine.
const PAUSE: Duration = Duration::from_millis(50);
/// Connections at each VIP: of three servers each has some.
const CONNECTIONS: usize = 30;

/// Checks quickly, and finds somebody dead after `reset_after`.
fn settings(cluster: &Cluster, reset_after: &str) -> Settings {
    let mut settings = cluster.settings().unwrap();
    settings.service = vec![format!("reset_after = {reset_after:?}")];
    settings.check = ["interval = \"300ms\"", "fast_interval = \"100ms\"", "connect_timeout = \"500ms\""]
        .map(str::to_owned)
        .to_vec();
    settings.check.push("timeout = \"2s\"".to_owned());
    settings
}

fn start(cluster: &Cluster, settings: &Settings) -> Daemon {
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), settings).unwrap();
    daemon.wait_ready(cluster.apiservers.len()).unwrap();
    daemon
}

fn open_idle(cluster: &Cluster) -> Idle {
    Idle::open(cluster, CONNECTIONS).unwrap()
}

/// None of them becomes dead.
fn require_not_dead(daemon: &Daemon, backends: &[&str]) {
    let begin = Instant::now();
    while begin.elapsed() < WATCHED {
        let status = daemon.status().unwrap();
        for backend in backends {
            assert!(!status.states(backend).contains(&"dead"), "{backend} is dead:\n{}", daemon.log());
        }
        thread::sleep(PAUSE);
    }
}

/// Cuts a server off for good: its connections' clients are told, the others' do not notice.
fn cut_off_for_good(cluster: &Cluster) {
    let mut daemon = start(cluster, &settings(cluster, "2s"));
    let mut idle = open_idle(cluster);
    let doomed = idle.at("api-1");
    assert!(doomed > 0);
    cluster.apiservers[0].host.cut_off().unwrap();
    daemon.wait_state("api-1", "dead", VERDICT).unwrap();
    idle.wait_reset(cluster, doomed, VERDICT).unwrap();
    idle.require_gone_only(&["api-1"]).unwrap();
    assert_eq!(idle.resets(cluster).unwrap(), doomed);
    assert!(daemon.log().contains("silent -> dead"), "{}", daemon.log());
    cluster.require_no_own_resets().unwrap();
    let table = daemon.status_table().unwrap();
    assert!(table.contains("dead"), "{table}");

    // It comes back, and is a backend as any other.
    cluster.apiservers[0].host.reconnect().unwrap();
    daemon.wait_state("api-1", "ready", VERDICT).unwrap();
    // Its kernel still held on to the flows, and hears that they are over.
    wait_forgotten(cluster, &cluster.apiservers[0].host);
    let again = open_idle(cluster);
    assert!(again.at("api-1") > 0);
    cluster.require_no_own_resets().unwrap();
}

/// A server's connections through the load balancer, a line each, by VIP.
fn connections(cluster: &Cluster, host: &Host) -> anyhow::Result<Vec<String>> {
    let mut lines = Vec::new();
    for vip in cluster.vips() {
        let open = host.run(&format!("ss -Htn state established dst {}", as_peer(vip)))?;
        lines.extend(open.lines().map(str::to_owned));
    }
    Ok(lines)
}

/// An address as `ss` takes it.
fn as_peer(address: IpAddr) -> String {
    if address.is_ipv6() { format!("[{address}]") } else { address.to_string() }
}

/// A server has no connection through the load balancer left.
fn wait_forgotten(cluster: &Cluster, host: &Host) {
    eventually(VERDICT, "the server has heard of it", || {
        let open = connections(cluster, host)?;
        ensure!(open.is_empty(), "{open:?}");
        Ok(())
    })
    .unwrap();
}

/// Clients have acknowledged everything that a server has sent.
fn wait_quiet(cluster: &Cluster, host: &Host) {
    eventually(VERDICT, "everything is acknowledged", || {
        let open = connections(cluster, host)?;
        let is_quiet = |line: &String| line.split_whitespace().nth(1) == Some("0");
        ensure!(open.iter().all(is_quiet), "{open:?}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_silent_connection_to_a_server_that_is_cut_off_is_reset() {
    cut_off_for_good(&Cluster::start(Shape::OneArm, 3).unwrap());
}

/// The client is behind a masquerading router, and both drop what conntrack finds invalid.
fn strict() -> Cluster {
    let cluster =
        Cluster::start(Shape::Routed(Router { masquerades: true, ..Router::default() }), 3).unwrap();
    for host in [&cluster.client, cluster.router.as_ref().unwrap()] {
        host.nft(
            "add table inet strict; \
             add chain inet strict in { type filter hook input priority 0; }; \
             add chain inet strict through { type filter hook forward priority 0; }; \
             add rule inet strict in ct state invalid counter drop; \
             add rule inet strict through ct state invalid counter drop",
        )
        .unwrap();
    }
    cluster
}

#[test]
fn also_behind_a_masquerading_router_and_a_client_that_drops_what_conntrack_finds_invalid() {
    cut_off_for_good(&strict());
}

#[test]
fn silence_that_is_shorter_than_reset_after_resets_nobody() {
    let mut cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let mut daemon = start(&cluster, &settings(&cluster, "20s"));
    let mut idle = open_idle(&cluster);
    // A snapshot stops the whole machine; a busy disk stops the process alone.
    cluster.apiservers[0].host.cut_off().unwrap();
    daemon.wait_state("api-1", "silent", VERDICT).unwrap();
    cluster.apiservers[0].host.reconnect().unwrap();
    daemon.wait_state("api-1", "ready", VERDICT).unwrap();
    cluster.apiservers[0].stub.freeze().unwrap();
    daemon.wait_state("api-1", "silent", VERDICT).unwrap();
    cluster.apiservers[0].stub.thaw().unwrap();
    daemon.wait_state("api-1", "ready", VERDICT).unwrap();
    // It was asked about its flows, and knows them.
    idle.require_alive(&cluster).unwrap();
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn all_silent_together_are_not_dead_and_new_connections_are_refused() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let mut daemon = start(&cluster, &settings(&cluster, "2s"));
    let mut idle = open_idle(&cluster);
    cluster.cut_all_off_and_require_refused(&mut daemon, VERDICT).unwrap();
    require_not_dead(&daemon, &["api-1", "api-2", "api-3"]);
    for apiserver in &cluster.apiservers {
        apiserver.host.reconnect().unwrap();
    }
    daemon.wait_ready(3).unwrap();
    idle.require_alive(&cluster).unwrap();
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn when_the_load_balancers_own_link_is_gone_nobody_is_reset() {
    let cluster = Cluster::start(Shape::TwoArm, 3).unwrap();
    let mut daemon = start(&cluster, &settings(&cluster, "2s"));
    let mut idle = open_idle(&cluster);
    cluster.lab.unplug_link(&cluster.lb, 1).unwrap();
    eventually(VERDICT, "nobody is ready", || {
        let status = daemon.status()?;
        let ready = |backend: &&lb_tests::daemon::BackendStatus| backend.state == "ready";
        let backends = status.services.iter().flat_map(|service| &service.backends);
        ensure!(backends.filter(ready).count() == 0, "{status:?}");
        Ok(())
    })
    .unwrap();
    require_not_dead(&daemon, &["api-1", "api-2", "api-3"]);
    cluster.lab.replug_link(&cluster.lb, 1).unwrap();
    daemon.wait_ready(3).unwrap();
    idle.require_alive(&cluster).unwrap();
    cluster.require_no_own_resets().unwrap();
}

/// The code of the last check of each backend, in both services.
fn codes(daemon: &Daemon) -> Vec<String> {
    let status = daemon.status().unwrap();
    let backends = status.services.iter().flat_map(|service| &service.backends);
    backends.filter_map(|backend| backend.check.as_ref()?.code.clone()).collect()
}

#[test]
fn when_the_load_balancer_has_no_route_to_its_servers_that_is_no_verdict_on_them() {
    let cluster = Cluster::start(Shape::TwoArm, 3).unwrap();
    let mut settings = settings(&cluster, "2s");
    // One answer that was under way is lost, and that does not yet mean anything.
    settings.check.push("fall = 3".to_owned());
    let daemon = start(&cluster, &settings);
    let mut idle = open_idle(&cluster);
    let (lb, inside) = (&cluster.lb, cluster.lb.links()[1].clone());
    let (subnet4, subnet6) = (inside.segment.v4(0), inside.segment.v6(0));
    let device = &inside.interface;
    let shown = [lb.run("ip route").unwrap(), lb.run("ip -6 route").unwrap()];
    lb.ip(&format!("route del {subnet4}/24 dev {device}")).unwrap();
    lb.ip(&format!("-6 route del {subnet6}/64 dev {device}")).unwrap();
    eventually(VERDICT, "the status says whose trouble it is", || {
        let codes = codes(&daemon);
        ensure!(codes.len() == 6 && codes.iter().all(|code| code == "SOCKERR"), "{codes:?}");
        Ok(())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{shown:?}\n{}", daemon.log()));
    let table = daemon.status_table().unwrap();
    assert!(table.contains("Network is unreachable"), "{table}");
    let begin = Instant::now();
    while begin.elapsed() < WATCHED {
        let status = daemon.status().unwrap();
        for backend in ["api-1", "api-2", "api-3"] {
            assert_eq!(status.states(backend), ["ready", "ready"], "{}", daemon.log());
        }
        thread::sleep(PAUSE);
    }
    lb.ip(&format!("route add {subnet4}/24 dev {device} proto kernel scope link src {}", inside.v4)).unwrap();
    lb.ip(&format!("-6 route add {subnet6}/64 dev {device} proto kernel metric 256")).unwrap();
    eventually(VERDICT, "the checks pass again", || {
        let codes = codes(&daemon);
        ensure!(codes.iter().all(|code| code == "L7OK"), "{codes:?}");
        Ok(())
    })
    .unwrap();
    idle.require_alive(&cluster).unwrap();
    open_idle(&cluster).require_alive(&cluster).unwrap();
    assert!(!daemon.log().contains("is DOWN"), "{}", daemon.log());
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn whoever_is_behind_a_link_that_is_gone_is_not_dead_though_another_answers() {
    let mut cluster = Cluster::start(Shape::TwoArm, 3).unwrap();
    let front = cluster.lb.links()[0].segment;
    let elsewhere = &mut cluster.apiservers[2].host;
    cluster.lab.plug(elsewhere, front, 30).unwrap();
    let link = elsewhere.links()[1].clone();
    let mut settings = settings(&cluster, "2s");
    // Its certificate has not this address.
    settings.check.push("type = \"tcp\"".to_owned());
    for (_, address) in settings.backends.iter_mut().filter(|(name, _)| name == "api-3") {
        address.set_ip(if address.is_ipv4() { link.v4.into() } else { link.v6.into() });
    }
    let mut daemon = start(&cluster, &settings);
    let mut idle = open_idle(&cluster);
    cluster.lab.unplug_link(&cluster.lb, 1).unwrap();
    for backend in ["api-1", "api-2"] {
        daemon.wait_state(backend, "silent", VERDICT).unwrap();
    }
    require_not_dead(&daemon, &["api-1", "api-2"]);
    assert_eq!(daemon.status().unwrap().states("api-3"), ["ready", "ready"]);
    assert!(daemon.log().contains("eth1 has no carrier"), "{}", daemon.log());
    cluster.lab.replug_link(&cluster.lb, 1).unwrap();
    daemon.wait_ready(3).unwrap();
    idle.require_alive(&cluster).unwrap();
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn a_frozen_server_is_dead_in_time_and_hears_of_it_when_it_thaws() {
    let mut cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let mut daemon = start(&cluster, &settings(&cluster, "2s"));
    let mut idle = open_idle(&cluster);
    let doomed = idle.at("api-1");
    // Its kernel goes on acknowledging.
    cluster.apiservers[0].stub.freeze().unwrap();
    daemon.wait_state("api-1", "dead", VERDICT).unwrap();
    idle.wait_reset(&cluster, doomed, VERDICT).unwrap();
    idle.require_gone_only(&["api-1"]).unwrap();
    cluster.apiservers[0].stub.thaw().unwrap();
    daemon.wait_state("api-1", "ready", VERDICT).unwrap();
    wait_forgotten(&cluster, &cluster.apiservers[0].host);
    cluster.require_no_own_resets().unwrap();
}

/// A connection through a VIP on which this server goes on saying something.
fn watch(cluster: &Cluster, vip: IpAddr, server: &str) -> Process {
    let mut attempts = 0..;
    eventually(VERDICT, &format!("a watch through {vip} is at {server}"), || {
        let mut curl = cluster.curl(vip, "/watch");
        // What is said last holds: for longer than any test.
        curl.args(["--no-buffer", "--max-time", "600"]);
        let family = if vip.is_ipv6() { 6 } else { 4 };
        let label = format!("watch-ipv{family}-{}", attempts.next().unwrap_or(0));
        let process = cluster.client.start(&label, curl)?;
        eventually(VERDICT, "the watch begins", || {
            ensure!(events(&process) > 0, "nothing yet");
            Ok(())
        })?;
        let first = process.log();
        ensure!(first.starts_with(&format!("{server} ")), "it is at {first}");
        Ok(process)
    })
    .unwrap()
}

/// How often the server of a watch has said something.
fn events(watch: &Process) -> usize {
    watch.log().matches('\n').count()
}

#[test]
fn whoever_still_speaks_to_its_clients_is_never_dead_whatever_its_checks_say() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let mut daemon = start(&cluster, &settings(&cluster, "2s"));
    let mut idle = open_idle(&cluster);
    let doomed = idle.at("api-1");
    assert!(doomed > 0);
    // Each family is a service of its own, with a vigil of its own.
    let watches = cluster.vips().map(|vip| watch(&cluster, vip, "api-1"));
    // A client that leaves without having read everything counts, too.
    idle.forget_resets(&cluster).unwrap();
    // No new connection gets beyond TCP.
    let ill = &cluster.apiservers[0];
    ill.stub.door(&ill.host, Door::TlsSilent).unwrap();
    daemon.wait_state("api-1", "silent", VERDICT).unwrap();
    let before = watches.each_ref().map(events);
    require_not_dead(&daemon, &["api-1"]);
    daemon.wait_state("api-1", "silent", VERDICT).unwrap();
    for (watch, before) in watches.iter().zip(before) {
        assert!(events(watch) > before, "the watch stands still");
    }
    assert_eq!(idle.resets(&cluster).unwrap(), 0);
    assert!(!daemon.log().contains("-> dead"), "{}", daemon.log());

    // It has said its last word.
    drop(watches);
    idle.forget_resets(&cluster).unwrap();
    daemon.wait_state("api-1", "dead", VERDICT).unwrap();
    idle.wait_reset(&cluster, doomed, VERDICT).unwrap();
    idle.require_gone_only(&["api-1"]).unwrap();
    cluster.require_no_own_resets().unwrap();
}

/// Its process and its kernel forget everything, and nothing gets out of what they say while they die.
fn power_off(apiserver: &mut Apiserver) {
    apiserver.host.cut_off().unwrap();
    apiserver.stub.kill().unwrap();
    apiserver.host.run("ss -K state all sport = :6443").unwrap();
}

/// A server's kernel forgets its connections while it is silent: their clients are told by nobody but itself.
fn reboot(cluster: &mut Cluster) {
    // So long that nobody is found dead meanwhile.
    let mut daemon = start(cluster, &settings(cluster, "10m"));
    let mut idle = open_idle(cluster);
    let doomed = idle.at("api-1");
    power_off(&mut cluster.apiservers[0]);
    daemon.wait_state("api-1", "silent", VERDICT).unwrap();
    assert_eq!(idle.resets(cluster).unwrap(), 0);
    // The kernel is up and knows nothing; the server is not, yet.
    cluster.apiservers[0].host.reconnect().unwrap();
    daemon.wait_state("api-1", "draining", VERDICT).unwrap();
    idle.wait_reset(cluster, doomed, VERDICT).unwrap();
    idle.require_gone_only(&["api-1"]).unwrap();
    cluster.apiservers[0].start().unwrap();
    daemon.wait_state("api-1", "ready", VERDICT).unwrap();
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn a_server_that_has_rebooted_ends_its_old_connections_itself() {
    reboot(&mut Cluster::start(Shape::OneArm, 3).unwrap());
}

#[test]
fn what_a_rebooted_server_says_gets_through_a_masquerading_router_and_conntrack() {
    reboot(&mut strict());
}

/// The kernel of a server forgets connections and tells nobody, while it goes on taking new ones.
fn forget_flows(cluster: &Cluster, host: &Host) {
    // What a client says now is answered.
    wait_quiet(cluster, host);
    let vips = cluster.vips();
    host.nft(&format!(
        "add table inet mute; add chain inet mute out {{ type filter hook output priority 0; }}; \
         add rule inet mute out ip daddr {} drop; add rule inet mute out ip6 daddr {} drop",
        vips[0], vips[1]
    ))
    .unwrap();
    for vip in vips {
        host.run(&format!("ss -K state established dst {}", as_peer(vip))).unwrap();
    }
    wait_forgotten(cluster, host);
    host.nft("delete table inet mute").unwrap();
}

#[test]
fn a_server_that_refuses_is_asked_what_it_has_forgotten_though_it_never_was_silent() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let mut daemon = start(&cluster, &settings(&cluster, "10m"));
    let mut idle = open_idle(&cluster);
    let doomed = idle.at("api-1");
    assert!(doomed > 0);
    let Apiserver { host, stub } = &cluster.apiservers[0];
    forget_flows(&cluster, host);
    // It is well, as far as anybody can see: nobody asks it.
    assert_eq!(daemon.status().unwrap().states("api-1"), ["ready", "ready"]);
    assert_eq!(idle.resets(&cluster).unwrap(), 0);
    stub.door(host, Door::Refusing).unwrap();
    daemon.wait_state("api-1", "draining", VERDICT).unwrap();
    idle.wait_reset(&cluster, doomed, VERDICT).unwrap();
    idle.require_gone_only(&["api-1"]).unwrap();
    let log = daemon.log();
    assert!(log.contains("refused") && !log.contains("silent"), "{log}");
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn a_server_that_refuses_and_has_forgotten_nothing_keeps_its_connections() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let mut daemon = start(&cluster, &settings(&cluster, "10m"));
    let mut idle = open_idle(&cluster);
    let Apiserver { host, stub } = &cluster.apiservers[0];
    stub.door(host, Door::Refusing).unwrap();
    daemon.wait_state("api-1", "draining", VERDICT).unwrap();
    stub.door(host, Door::Open).unwrap();
    daemon.wait_state("api-1", "ready", VERDICT).unwrap();
    // It was asked, and its kernel said nothing that a client would hear.
    idle.require_alive(&cluster).unwrap();
    cluster.require_no_own_resets().unwrap();
}

/// Ends flows of a server that is well, as an operator, and waits until their clients and the server know.
fn end_by_order(cluster: &Cluster, daemon: &Daemon, order: &[&str]) {
    let mut idle = open_idle(cluster);
    let doomed = idle.at("api-1");
    assert!(doomed > 0);
    let (command, arguments) = order.split_first().unwrap();
    run(daemon.command(command).unwrap().args(arguments)).unwrap();
    idle.wait_reset(cluster, doomed, VERDICT).unwrap();
    idle.require_gone_only(&["api-1"]).unwrap();
    wait_forgotten(cluster, &cluster.apiservers[0].host);
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn what_an_operator_ends_ends_behind_a_masquerading_router_and_conntrack_as_well() {
    let cluster = strict();
    let daemon = start(&cluster, &settings(&cluster, "10m"));
    end_by_order(&cluster, &daemon, &["kill", "api-1", "--all-services"]);
    end_by_order(&cluster, &daemon, &["drain", "api-1", "--all-services", "--timeout", "1s"]);
}

#[test]
fn also_one_that_is_up_and_ready_before_the_next_check_looks() {
    let mut cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let mut daemon = start(&cluster, &settings(&cluster, "10m"));
    let mut idle = open_idle(&cluster);
    let doomed = idle.at("api-1");
    assert!(doomed > 0);
    power_off(&mut cluster.apiservers[0]);
    daemon.wait_state("api-1", "silent", VERDICT).unwrap();
    assert_eq!(idle.resets(&cluster).unwrap(), 0);
    // Nobody sees a port that refuses: all there is to go by is that it was silent.
    cluster.apiservers[0].start().unwrap();
    cluster.apiservers[0].host.reconnect().unwrap();
    daemon.wait_state("api-1", "ready", VERDICT).unwrap();
    idle.wait_reset(&cluster, doomed, VERDICT).unwrap();
    idle.require_gone_only(&["api-1"]).unwrap();
    assert!(!daemon.log().contains("refused"), "{}", daemon.log());
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn also_one_that_did_so_while_nobody_looked() {
    /// Longer than a host takes to reboot, for all that the daemon knows.
    const ABSENCE: Duration = Duration::from_secs(6);
    let mut cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let settings = settings(&cluster, "10m");
    let mut daemon = start(&cluster, &settings);
    let mut idle = open_idle(&cluster);
    let doomed = idle.at("api-1");
    assert!(doomed > 0);
    daemon.process().kill().unwrap();
    let killed = Instant::now();
    power_off(&mut cluster.apiservers[0]);
    cluster.apiservers[0].start().unwrap();
    cluster.apiservers[0].host.reconnect().unwrap();
    thread::sleep(ABSENCE.saturating_sub(killed.elapsed()));
    assert_eq!(idle.resets(&cluster).unwrap(), 0);
    let daemon = start(&cluster, &settings);
    idle.wait_reset(&cluster, doomed, VERDICT).unwrap();
    idle.require_gone_only(&["api-1"]).unwrap();
    for not_seen in ["refused", "silent"] {
        assert!(!daemon.log().contains(not_seen), "{}", daemon.log());
    }
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn a_dead_servers_connections_are_kept_where_the_configuration_says_so() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let mut settings = settings(&cluster, "2s");
    settings.service.push("on_dead = \"keep\"".to_owned());
    let mut daemon = start(&cluster, &settings);
    let mut idle = open_idle(&cluster);
    cluster.apiservers[0].host.cut_off().unwrap();
    daemon.wait_state("api-1", "dead", VERDICT).unwrap();
    cluster.apiservers[0].host.reconnect().unwrap();
    daemon.wait_state("api-1", "ready", VERDICT).unwrap();
    idle.require_alive(&cluster).unwrap();
}

#[test]
fn flows_that_were_kept_are_reset_when_the_configuration_says_otherwise_while_their_server_is_dead() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let reset = settings(&cluster, "2s");
    let mut keep = reset.clone();
    keep.service.push("on_dead = \"keep\"".to_owned());
    let mut daemon = start(&cluster, &keep);
    let mut idle = open_idle(&cluster);
    let doomed = idle.at("api-1");
    cluster.apiservers[0].host.cut_off().unwrap();
    daemon.wait_state("api-1", "dead", VERDICT).unwrap();
    assert!(daemon.log().contains("established ones are kept, as on_dead says"), "{}", daemon.log());
    assert_eq!(idle.resets(&cluster).unwrap(), 0);
    let said = daemon.reload(&reset).unwrap();
    assert!(said.status.success(), "{said:?}");
    idle.wait_reset(&cluster, doomed, VERDICT).unwrap();
    idle.require_gone_only(&["api-1"]).unwrap();
}

/// A server is dead, its connections are kept, and it is removed: the configuration that removes it says what becomes of them.
fn remove_dead(cluster: &Cluster, say: impl Fn(&mut Settings)) -> (Daemon, Idle) {
    let mut settings = settings(cluster, "2s");
    settings.service.push("on_dead = \"keep\"".to_owned());
    let mut daemon = start(cluster, &settings);
    let idle = open_idle(cluster);
    cluster.apiservers[0].host.cut_off().unwrap();
    daemon.wait_state("api-1", "dead", VERDICT).unwrap();
    settings.backends.retain(|(name, _)| name != "api-1");
    say(&mut settings);
    let said = daemon.reload(&settings).unwrap();
    assert!(said.status.success(), "{said:?}");
    (daemon, idle)
}

#[test]
fn connections_of_a_dead_server_that_is_removed_are_kept_where_the_configuration_says_so() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let (daemon, mut idle) = remove_dead(&cluster, |_| {});
    let begin = Instant::now();
    while begin.elapsed() < WATCHED {
        assert_eq!(idle.resets(&cluster).unwrap(), 0, "{}", daemon.log());
        thread::sleep(PAUSE);
    }
    cluster.apiservers[0].host.reconnect().unwrap();
    idle.require_alive(&cluster).unwrap();
}

#[test]
fn connections_of_a_dead_server_that_is_removed_are_reset_where_it_says_nothing_else() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let (daemon, mut idle) = remove_dead(&cluster, |settings| {
        settings.service.retain(|line| !line.starts_with("on_dead"));
    });
    idle.wait_reset(&cluster, idle.at("api-1"), VERDICT).unwrap();
    idle.require_gone_only(&["api-1"]).unwrap();
    assert!(daemon.log().contains("api-1 is dead and was removed"), "{}", daemon.log());
}

#[test]
fn only_flows_whose_vip_is_here_are_reset_or_asked_about() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let mut settings = settings(&cluster, "2s");
    // A service with two VIPs, of which one moves away: nobody is connected to the other.
    let IpAddr::V4(vip) = cluster.vip4 else { panic!("{} is no IPv4 address", cluster.vip4) };
    let other = IpAddr::from(std::net::Ipv4Addr::from(u32::from(vip) + 1));
    settings.listen.push((other, 6443).into());
    cluster.lb.add_vip(other).unwrap();
    let mut daemon = start(&cluster, &settings);
    let mut idle = open_idle(&cluster);
    let at_vip6 = idle.at_vip(1, "api-1");
    let doomed = idle.at("api-1");
    assert!(doomed > at_vip6 && at_vip6 > 0);
    let name = &cluster.lb.link().unwrap().interface;
    cluster.lb.ip(&format!("address del {vip}/32 dev {name}")).unwrap();
    cluster.apiservers[0].host.cut_off().unwrap();
    daemon.wait_state("api-1", "dead", VERDICT).unwrap();
    idle.wait_reset(&cluster, at_vip6, VERDICT).unwrap();
    let begin = Instant::now();
    while begin.elapsed() < WATCHED {
        let reset = idle.resets(&cluster).unwrap();
        assert_eq!(reset, at_vip6, "a VIP that is not here was spoken for");
        thread::sleep(PAUSE);
    }
    // Nobody else had it meanwhile.
    cluster.lb.add_vip(cluster.vip4).unwrap();
    idle.wait_reset(&cluster, doomed, VERDICT).unwrap();
    idle.require_gone_only(&["api-1"]).unwrap();
    cluster.require_no_own_resets().unwrap();
}
