//! What becomes of the sockets of this host's processes that the connect hook has redirected.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{net::SocketAddr, time::Duration};

use anyhow::ensure;
use aya::maps::{HashMap, Map, MapData, PerCpuArray};
use lb_common::layout::Followed;
use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::{BackendStatus, Daemon, Settings},
    hold::{Holder, Order, SOME_AT_EACH, Said},
    lab::{cgroup::Group, cgroup_of, eventually, process::sibling_program},
    stub::{Health, PORT},
};

/// A verdict takes a few checks and `reset_after`, with room for a busy machine.
const VERDICT: Duration = Duration::from_secs(30);
const LOCAL4: &str = "127.0.0.1:16443";
const LOCAL6: &str = "[::1]:16443";
const MAPPED: &str = "[::ffff:127.0.0.1]:16443";

fn at(address: &str) -> SocketAddr {
    address.parse().unwrap()
}

/// A node: its processes reach the apiservers by its loopback addresses. Nobody has a VIP.
fn node(apiservers: u8) -> Cluster {
    Cluster::start_without_vips(Shape::OneArm, apiservers).unwrap()
}

fn settings(cluster: &Cluster) -> Settings {
    let mut settings = cluster.settings().unwrap();
    settings.listen = vec![at(LOCAL4), at(LOCAL6)];
    settings.check = ["interval = \"1s\"", "fast_interval = \"100ms\"", "connect_timeout = \"500ms\""]
        .map(str::to_owned)
        .to_vec();
    settings
}

fn start(cluster: &Cluster, settings: &Settings, ready: usize) -> Daemon {
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), settings).unwrap();
    daemon.wait_ready(ready).unwrap();
    daemon
}

fn holder(cluster: &Cluster, to: &str) -> Holder {
    Holder::start(&cluster.lb, true, &cluster.ca_file(), at(to)).unwrap()
}

/// A server by its name, added up over the families: each has an address in both.
fn counts(daemon: &Daemon, server: &str) -> (u64, u64) {
    let status = daemon.status().unwrap();
    let of_server = |it: &&BackendStatus| it.name == server;
    let backends = status.services.iter().flat_map(|service| &service.backends);
    backends
        .filter(of_server)
        .fold((0, 0), |(active, total), it| (active + it.active_flows, total + it.total_flows))
}

/// Waits until a server has so many connections, and had so many.
fn wait_counts(daemon: &Daemon, server: &str, active: usize, total: usize) {
    eventually(VERDICT, &format!("{server} has {active} of {total} connections"), || {
        let found = counts(daemon, server);
        ensure!(found == (active as u64, total as u64), "{found:?}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn open_and_total_connections_are_right_also_over_a_restart() {
    let cluster = node(2);
    let settings = settings(&cluster);
    let mut daemon = start(&cluster, &settings, 2);
    let mut holders: Vec<_> = [LOCAL4, LOCAL6, MAPPED].map(|to| holder(&cluster, to)).into();
    let opened =
        |holders: &[Holder], server: &str| holders.iter().map(|it| it.opened_to(server)).sum::<usize>();
    for holder in &mut holders {
        holder.order(Order::Open(10)).unwrap();
    }
    // Somebody who dials a server by its own address is nobody we count.
    let direct = SocketAddr::new(cluster.apiservers[0].host.link().unwrap().v4.into(), PORT);
    let mut other = holder(&cluster, &direct.to_string());
    other.order(Order::OpenPlain(3)).unwrap();
    for server in ["api-1", "api-2"] {
        let opened = opened(&holders, server);
        wait_counts(&daemon, server, opened, opened);
    }
    // Nobody is there to see these.
    daemon.process().kill().unwrap();
    holders[0].order(Order::Open(5)).unwrap();
    drop(holders.remove(1));
    drop(other);
    let of_both: usize = ["api-1", "api-2"].iter().map(|server| opened(&holders, server)).sum();
    assert_eq!(of_both, 25);
    let daemon = start(&cluster, &settings, 2);
    eventually(VERDICT, "25 connections are open", || {
        let (one, two) = (counts(&daemon, "api-1"), counts(&daemon, "api-2"));
        ensure!((one.0 + two.0, one.1 + two.1) == (25, 35), "{one:?}, {two:?}");
        Ok(())
    })
    .unwrap();
    for server in ["api-1", "api-2"] {
        assert_eq!(counts(&daemon, server).0, opened(&holders, server) as u64);
    }
    holders[1].order(Order::Close(10)).unwrap();
    let total = |server: &str| counts(&daemon, server).1 as usize;
    for server in ["api-1", "api-2"] {
        wait_counts(&daemon, server, holders[0].opened_to(server), total(server));
    }
    drop(holders);
    for server in ["api-1", "api-2"] {
        wait_counts(&daemon, server, 0, total(server));
    }
}

#[test]
fn a_backend_that_was_removed_keeps_its_number_until_its_last_connection_is_closed() {
    let cluster = node(4);
    let mut settings = settings(&cluster);
    settings.listen = vec![at(LOCAL4)];
    let all = settings.backends.clone();
    let only = |wanted: &[&str]| {
        let wanted = |(name, _): &&(String, SocketAddr)| wanted.contains(&name.as_str());
        all.iter().filter(wanted).cloned().collect::<Vec<_>>()
    };
    settings.backends = only(&["api-1", "api-2"]);
    let mut daemon = start(&cluster, &settings, 2);
    let mut old = holder(&cluster, LOCAL4);
    old.order(Order::Open(SOME_AT_EACH)).unwrap();
    assert!(old.opened_to("api-1") > 0);
    settings.backends = only(&["api-2", "api-3"]);
    assert!(daemon.reload(&settings).unwrap().status.success());
    // Also for a daemon that knows of it only by the maps.
    daemon.process().kill().unwrap();
    let mut daemon = start(&cluster, &settings, 2);
    let mut new = holder(&cluster, LOCAL4);
    new.order(Order::Open(SOME_AT_EACH)).unwrap();
    let opened = new.opened_to("api-3");
    wait_counts(&daemon, "api-3", opened, opened);
    drop(old);
    eventually(VERDICT, "what is left at api-2 is counted", || {
        let (active, _) = counts(&daemon, "api-2");
        ensure!(active == new.opened_to("api-2") as u64, "{active}");
        Ok(())
    })
    .unwrap();
    // Whoever gets a number that was another's begins with nothing.
    settings.backends = only(&["api-2", "api-3", "api-4"]);
    assert!(daemon.reload(&settings).unwrap().status.success());
    daemon.wait_ready(3).unwrap();
    let mut newest = holder(&cluster, LOCAL4);
    newest.order(Order::Open(SOME_AT_EACH)).unwrap();
    let opened = newest.opened_to("api-4");
    assert!(opened > 0);
    wait_counts(&daemon, "api-4", opened, opened);
}

#[test]
fn sockets_that_another_cgroup_has_left_behind_are_not_counted() {
    let cluster = node(1);
    let mut settings = settings(&cluster);
    let mut daemon = start(&cluster, &settings, 1);
    let mut before = holder(&cluster, LOCAL4);
    before.order(Order::OpenPlain(5)).unwrap();
    wait_counts(&daemon, "api-1", 5, 5);
    daemon.process().kill().unwrap();
    let other = cgroup_of(cluster.lab.directory()).unwrap().join("other");
    std::fs::create_dir(&other).unwrap();
    let place = settings.dataplane.len();
    settings.dataplane.push(format!("cgroup = {other:?}"));
    let mut daemon = start(&cluster, &settings, 1);
    wait_counts(&daemon, "api-1", 0, 5);
    daemon.process().kill().unwrap();
    // Back again, and now the program hears of their end.
    settings.dataplane.truncate(place);
    let daemon = start(&cluster, &settings, 1);
    let mut after = holder(&cluster, LOCAL4);
    after.order(Order::OpenPlain(3)).unwrap();
    drop(before);
    wait_counts(&daemon, "api-1", 3, 8);
    drop(after);
    wait_counts(&daemon, "api-1", 0, 8);
}

#[test]
fn connections_that_come_while_the_hook_goes_to_another_cgroup_leave_no_count() {
    let cluster = node(1);
    let mut settings = settings(&cluster);
    let mut daemon = start(&cluster, &settings, 1);
    let here = cgroup_of(cluster.lab.directory()).unwrap();
    // To one below, whose processes both have for a moment, and back again.
    let below = Group::new(&cluster.lab, "below").unwrap();
    let place = settings.dataplane.len();
    for cgroup in [below.path(), &here] {
        daemon.process().kill().unwrap();
        settings.dataplane.truncate(place);
        settings.dataplane.push(format!("cgroup = {cgroup:?}"));
        let commands = [
            cluster.lb.hooked_command(sibling_program("sheave-hold").unwrap()).unwrap(),
            below.command(&cluster.lb, sibling_program("sheave-hold").unwrap()),
        ];
        let holders = commands.map(|command| {
            let mut holder = Holder::start_with(command, &cluster.ca_file(), at(LOCAL4)).unwrap();
            holder.order(Order::KeepOpening).unwrap();
            holder
        });
        daemon = start(&cluster, &settings, 1);
        drop(holders);
        eventually(VERDICT, "no connection is open", || {
            let (active, _) = counts(&daemon, "api-1");
            ensure!(active == 0, "{active}");
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn a_count_whose_end_no_program_has_heard_of_is_corrected_once() {
    let cluster = node(1);
    let mut settings = settings(&cluster);
    settings.listen = vec![at(LOCAL4)];
    let mut daemon = start(&cluster, &settings, 1);
    let mut holder = holder(&cluster, LOCAL4);
    holder.order(Order::OpenPlain(5)).unwrap();
    wait_counts(&daemon, "api-1", 5, 5);
    daemon.process().kill().unwrap();
    // As if another program on the cgroup had kept ours from hearing of the end of a sixth.
    let pins = daemon.pins();
    let layout = std::fs::read_dir(&pins).unwrap().next().unwrap().unwrap().path();
    let pinned = |name: &str| MapData::from_pin(layout.join(name)).unwrap();
    let mut sockets =
        HashMap::<_, u64, [u64; 7]>::try_from(Map::HashMap(pinned("map_FOLLOWED_SOCKETS"))).unwrap();
    let (_, socket) = sockets.iter().next().unwrap().unwrap();
    let nobody = 1 << 60;
    sockets.insert(nobody, socket, 0).unwrap();
    let backend = Followed::from_words(socket).backend.into();
    let counts_of = Map::PerCpuArray(pinned("map_BACKEND_SOCKETS"));
    let mut counts_of = PerCpuArray::<_, u64>::try_from(counts_of).unwrap();
    let mut counted: Vec<u64> = counts_of.get(&backend, 0).unwrap().iter().copied().collect();
    counted[0] += 1;
    counts_of.set(backend, counted.try_into().unwrap(), 0).unwrap();

    let daemon = start(&cluster, &settings, 1);
    wait_counts(&daemon, "api-1", 5, 5);
    assert!(sockets.get(&nobody, 0).is_err());
    drop(holder);
    wait_counts(&daemon, "api-1", 0, 5);
}

#[test]
fn a_socket_that_was_refused_is_nobodys_when_it_dials_the_server_itself() {
    let mut cluster = node(1);
    let mut settings = seldom(&cluster);
    settings.listen = vec![at(LOCAL4)];
    let daemon = start(&cluster, &settings, 1);
    cluster.apiservers[0].stub.kill().unwrap();
    let mut holder = holder(&cluster, LOCAL4);
    holder.order(Order::BeRefused).unwrap();
    wait_counts(&daemon, "api-1", 0, 1);
    cluster.apiservers[0].start().unwrap();
    let direct = SocketAddr::new(cluster.apiservers[0].host.link().unwrap().v4.into(), PORT);
    holder.order(Order::DialAgain(direct)).unwrap();
    assert_eq!(holder.said()[1], Said::Opened(direct.to_string()), "it sees whom it has dialled");
    wait_counts(&daemon, "api-1", 0, 1);
}

/// With checks so far apart that only connections can hurry them.
fn seldom(cluster: &Cluster) -> Settings {
    let mut settings = settings(cluster);
    settings.check = ["interval = \"10m\"", "fast_interval = \"9m\"", "connect_timeout = \"500ms\""]
        .map(str::to_owned)
        .to_vec();
    settings
}

#[test]
fn a_connection_that_fails_has_its_backend_checked_at_once() {
    for cut in [false, true] {
        let mut cluster = node(3);
        let mut daemon = start(&cluster, &seldom(&cluster), 3);
        if cut {
            cluster.apiservers[0].host.cut_off().unwrap();
        } else {
            cluster.apiservers[0].stub.kill().unwrap();
        }
        // Each of them may be the one that meets it: nobody else notices.
        let mut command = cluster.lb.hooked_command("sh").unwrap();
        let script =
            r#"while :; do curl -4 --silent --max-time 3 --cacert "$0" https://localhost:16443/name; done"#;
        command.args(["-c", script]).arg(cluster.ca_file());
        let asker = cluster.lb.start("asker", command).unwrap();
        let state = if cut { "silent" } else { "draining" };
        eventually(VERDICT, "the server of IPv4 is found", || {
            let status = daemon.status()?;
            let found = status.states("api-1").contains(&state);
            ensure!(found, "{:?}", status.states("api-1"));
            Ok(())
        })
        .unwrap();
        drop(asker);
        daemon.process().kill().unwrap();
    }
}

/// As [`settings`], with somebody dead after a short time.
fn mortal(cluster: &Cluster) -> Settings {
    let mut settings = settings(cluster);
    settings.service = vec!["reset_after = \"1500ms\"".to_owned()];
    settings
}

fn all_ended(holder: &Holder, server: &str) -> usize {
    holder.ended().iter().filter(|(of, _)| of.as_deref() == Some(server)).count()
}

/// Waits until a server's connections were ended, and nobody else's.
fn wait_ended(holder: &Holder, server: &str) {
    eventually(VERDICT, &format!("the connections to {server} are ended"), || {
        let (ended, opened) = (all_ended(holder, server), holder.opened_to(server));
        ensure!(ended == opened, "{ended} of {opened}");
        Ok(())
    })
    .unwrap();
    assert_eq!(holder.ended().len(), holder.opened_to(server), "{:?}", holder.ended());
}

/// What was to be ended is ended, and the holders have said so: then nobody's connection is.
fn require_none_ended(daemon: &Daemon, holders: &mut [&mut Holder]) {
    finish_ending(daemon);
    for holder in holders {
        holder.catch_up().unwrap();
        assert_eq!(holder.ended(), []);
    }
}

/// Waits until the daemon has done what there was to do about sockets: an order about a client whom nobody knows waits behind
/// it.
fn finish_ending(daemon: &Daemon) {
    let killed = daemon.command("kill").unwrap().args(["--client", "192.0.2.1"]).output().unwrap();
    let said = String::from_utf8_lossy(&killed.stdout).into_owned();
    assert!(killed.status.success() && said.contains("0 flow"), "{killed:?}");
}

#[test]
fn idle_connections_to_a_dead_server_are_ended_and_nobody_elses() {
    for frozen in [false, true] {
        let mut cluster = node(3);
        let mut daemon = start(&cluster, &mortal(&cluster), 3);
        let mut holders: Vec<_> = [LOCAL4, LOCAL6, MAPPED].map(|to| holder(&cluster, to)).into();
        for holder in &mut holders {
            holder.order(Order::Open(SOME_AT_EACH)).unwrap();
            assert!(holder.opened_to("api-1") > 0);
        }
        // The same server by its own address, in the same cgroup, and from outside of it.
        let direct = SocketAddr::new(cluster.apiservers[0].host.link().unwrap().v4.into(), PORT);
        let mut other = holder(&cluster, &direct.to_string());
        other.order(Order::OpenPlain(5)).unwrap();
        let mut outside = Holder::start(&cluster.lb, false, &cluster.ca_file(), direct).unwrap();
        outside.order(Order::OpenPlain(5)).unwrap();
        if frozen {
            cluster.apiservers[0].stub.freeze().unwrap();
        } else {
            cluster.apiservers[0].host.cut_off().unwrap();
        }
        daemon.wait_state("api-1", "dead", VERDICT).unwrap();
        for holder in &holders {
            wait_ended(holder, "api-1");
        }
        require_none_ended(&daemon, &mut [&mut other, &mut outside]);
        eventually(VERDICT, "none of them is counted", || {
            let (active, _) = counts(&daemon, "api-1");
            ensure!(active == 0, "{active}");
            Ok(())
        })
        .unwrap();
        daemon.process().kill().unwrap();
    }
}

#[test]
fn sockets_in_the_network_namespaces_of_pods_are_ended_where_pods_are_served() {
    let cluster = node(3);
    // The client's namespace stands for a pod's.
    let mut settings = mortal(&cluster);
    let vip = SocketAddr::new(cluster.vip4, PORT);
    settings.listen = vec![at(LOCAL4), vip];
    settings.dataplane.push("interfaces = []".to_owned());
    settings.service.push("pods = true".to_owned());
    let mut daemon = start(&cluster, &settings, 3);
    let mut pod = Holder::start(&cluster.client, true, &cluster.ca_file(), vip).unwrap();
    let mut host = holder(&cluster, LOCAL4);
    for holder in [&mut pod, &mut host] {
        holder.order(Order::Open(SOME_AT_EACH)).unwrap();
    }
    // A pod that dials the server itself is none of ours, and neither is anybody when pods are not served.
    let direct = SocketAddr::new(cluster.apiservers[0].host.link().unwrap().v4.into(), PORT);
    let mut other = Holder::start(&cluster.client, true, &cluster.ca_file(), direct).unwrap();
    other.order(Order::OpenPlain(5)).unwrap();
    cluster.apiservers[0].host.cut_off().unwrap();
    daemon.wait_state("api-1", "dead", VERDICT).unwrap();
    for holder in [&pod, &host] {
        wait_ended(holder, "api-1");
    }
    require_none_ended(&daemon, &mut [&mut other]);
}

#[test]
fn sockets_in_the_network_namespaces_of_pods_are_left_alone_where_pods_are_not_served() {
    let cluster = node(2);
    let mut settings = mortal(&cluster);
    let vip = SocketAddr::new(cluster.vip4, PORT);
    settings.listen = vec![at(LOCAL4), vip];
    settings.dataplane.push("interfaces = []".to_owned());
    let unserved = settings.clone();
    settings.service.push("pods = true".to_owned());
    let mut daemon = start(&cluster, &settings, 2);
    let mut pod = Holder::start(&cluster.client, true, &cluster.ca_file(), vip).unwrap();
    pod.order(Order::Open(SOME_AT_EACH)).unwrap();
    assert!(pod.opened_to("api-1") > 0);
    // They are known by cookie, and this daemon is one that could end them; but pods are not served any more.
    daemon.process().kill().unwrap();
    let mut daemon = start(&cluster, &unserved, 2);
    let mut host = holder(&cluster, LOCAL4);
    host.order(Order::Open(SOME_AT_EACH)).unwrap();
    cluster.apiservers[0].host.cut_off().unwrap();
    daemon.wait_state("api-1", "dead", VERDICT).unwrap();
    wait_ended(&host, "api-1");
    require_none_ended(&daemon, &mut [&mut pod]);
}

#[test]
fn what_dies_while_no_daemon_runs_is_ended_by_the_next() {
    let cluster = node(2);
    let settings = mortal(&cluster);
    let mut daemon = start(&cluster, &settings, 2);
    let mut holder = holder(&cluster, LOCAL4);
    holder.order(Order::Open(SOME_AT_EACH)).unwrap();
    assert!(holder.opened_to("api-1") > 0);
    daemon.process().kill().unwrap();
    cluster.apiservers[0].host.cut_off().unwrap();
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    daemon.wait_state("api-1", "dead", VERDICT).unwrap();
    wait_ended(&holder, "api-1");
    assert!(holder.opened_to("api-2") > 0, "whose are kept");
}

#[test]
fn a_thousand_sockets_are_ended_at_once() {
    const SOCKETS: usize = 1000;
    let cluster = node(2);
    let mut settings = mortal(&cluster);
    settings.listen = vec![at(LOCAL4)];
    let mut daemon = start(&cluster, &settings, 2);
    let mut holder = holder(&cluster, LOCAL4);
    // Each server has about half of them.
    holder.order(Order::OpenPlain(2 * SOCKETS)).unwrap();
    let active = eventually(VERDICT, "all are counted", || {
        let [(one, _), (two, _)] = ["api-1", "api-2"].map(|server| counts(&daemon, server));
        ensure!(one + two == 2 * SOCKETS as u64, "{one} and {two}");
        Ok(one)
    })
    .unwrap();
    assert!(active > SOCKETS as u64 * 8 / 10, "{active}");
    cluster.apiservers[0].host.cut_off().unwrap();
    daemon.wait_state("api-1", "dead", VERDICT).unwrap();
    eventually(VERDICT, "all of them are ended", || {
        let ended = holder.ended().len();
        ensure!(ended as u64 == active, "{ended} of {active}");
        Ok(())
    })
    .unwrap();
    let times: Vec<_> =
        holder.timed().into_iter().filter(|(_, it)| matches!(it, Said::Ended { .. })).collect();
    let (first, last) = (times.first().unwrap().0, times.last().unwrap().0);
    println!("{active} sockets: from the first to the last {} ms", (last - first).as_millis());
    let log = daemon.log();
    log.lines()
        .filter(|line| line.contains("dead") || line.contains("were ended"))
        .for_each(|line| println!("{line}"));
}

#[test]
fn connections_are_kept_where_on_dead_says_so_and_while_a_server_drains() {
    for keep in [true, false] {
        let cluster = node(2);
        let mut settings = mortal(&cluster);
        if keep {
            settings.service.push("on_dead = \"keep\"".to_owned());
        }
        let mut daemon = start(&cluster, &settings, 2);
        let mut holder = holder(&cluster, LOCAL4);
        holder.order(Order::Open(SOME_AT_EACH)).unwrap();
        if keep {
            cluster.apiservers[0].host.cut_off().unwrap();
            daemon.wait_state("api-1", "dead", VERDICT).unwrap();
        } else {
            cluster.apiservers[0].stub.health(Health::Status(500)).unwrap();
            daemon.wait_state("api-1", "draining", VERDICT).unwrap();
        }
        require_none_ended(&daemon, &mut [&mut holder]);
    }
}

#[test]
fn payload_to_a_process_of_this_host_is_a_veto() {
    let cluster = node(3);
    let mut settings = mortal(&cluster);
    settings.listen = vec![at(LOCAL4)];
    let mut daemon = start(&cluster, &settings, 3);
    let mut holder = holder(&cluster, LOCAL4);
    holder.order(Order::OpenPolling(12)).unwrap();
    assert!(holder.opened_to("api-1") > 0);
    // New connections do not get through, checks among them; those that stand go on.
    cluster.apiservers[0]
        .host
        .nft(
            "add table inet deaf; add chain inet deaf in { type filter hook prerouting priority -400; }; \
             add rule inet deaf in tcp flags & (syn | ack) == syn drop",
        )
        .unwrap();
    daemon.wait_state("api-1", "silent", VERDICT).unwrap();
    // Whoever is silent after it, and has nothing to say, is dead before it.
    cluster.apiservers[1].host.cut_off().unwrap();
    daemon.wait_state("api-2", "dead", VERDICT).unwrap();
    wait_ended(&holder, "api-2");
    assert!(daemon.status().unwrap().states("api-1").contains(&"silent"));
    assert!(!daemon.log().contains("api-1 is dead"), "{}", daemon.log());
    // Until it has nothing to say any more.
    cluster.apiservers[0].host.cut_off().unwrap();
    daemon.wait_state("api-1", "dead", VERDICT).unwrap();
    eventually(VERDICT, "the connections to api-1 are ended as well", || {
        let (ended, opened) = (all_ended(&holder, "api-1"), holder.opened_to("api-1"));
        ensure!(ended == opened, "{ended} of {opened}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn an_operator_ends_sockets_by_backend_and_when_the_time_to_drain_is_over() {
    let cluster = node(2);
    let mut settings = settings(&cluster);
    settings.listen = vec![at(LOCAL4)];
    let daemon = start(&cluster, &settings, 2);
    let mut holder = holder(&cluster, LOCAL4);
    holder.order(Order::Open(SOME_AT_EACH)).unwrap();
    let opened = holder.opened_to("api-1");
    let killed = daemon.command("kill").unwrap().arg("api-1").output().unwrap();
    let said = String::from_utf8_lossy(&killed.stdout).into_owned();
    assert!(killed.status.success() && said.contains(&format!("{opened} flow")), "{killed:?}");
    wait_ended(&holder, "api-1");
    let drained = daemon.command("drain").unwrap().args(["api-2", "--timeout", "1s"]).output().unwrap();
    assert!(drained.status.success(), "{drained:?}");
    eventually(VERDICT, "those of the other are ended", || {
        let ended = all_ended(&holder, "api-2");
        ensure!(ended == holder.opened_to("api-2"), "{ended}");
        Ok(())
    })
    .unwrap();
}
