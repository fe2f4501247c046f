//! Backends that the cluster lists: the real daemon follows EndpointSlices through the stubs, whatever becomes of them.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::{Daemon, Settings, program},
    dial::dial,
    hold::{Holder, Order, SOME_AT_EACH},
    lab::{Process, cgroup_of, eventually, pins_of, run},
    load::{self, Crowd},
    stub::{PORT, answers},
};
use serde_json::{Value, json};

/// For a list to be heard of, new backends to be checked and a verdict to be reached, on a busy machine.
const MOMENT: Duration = Duration::from_secs(40);
const LOCAL: &str = "127.0.0.1:16443";

/// An address in the apiservers' network where nobody is.
fn nobody(cluster: &Cluster, last: u8) -> SocketAddr {
    let SocketAddr::V4(first) = address(cluster, 1) else { unreachable!("IPv4") };
    let [a, b, c, _] = first.ip().octets();
    ([a, b, c, last], PORT).into()
}

/// Of `api-N`.
fn address(cluster: &Cluster, number: usize) -> SocketAddr {
    SocketAddr::new(cluster.apiservers[number - 1].host.address(cluster.vip4).unwrap(), PORT)
}

/// Lets every apiserver that runs list these, as they do when one of them writes it into etcd.
fn list(cluster: &Cluster, addresses: &[SocketAddr]) {
    put(cluster, &answers::endpoint_slices(addresses));
}

fn put(cluster: &Cluster, slices: &[Value]) {
    cluster.apiservers.iter().for_each(|apiserver| apiserver.stub.slices(slices).unwrap());
}

/// The apiservers with these numbers.
fn numbered(cluster: &Cluster, numbers: &[usize]) -> Vec<SocketAddr> {
    numbers.iter().map(|number| address(cluster, *number)).collect()
}

/// A kubeconfig of an administrator in the lab's directory, for this server.
fn kubeconfig(cluster: &Cluster, server: &str) -> PathBuf {
    let path = cluster.lab.directory().join("discover.conf");
    let admin = cluster.authority.client("admin", &["system:masters"]).unwrap();
    let text = json!({
        "current-context": "lab",
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "admin"}}],
        "clusters": [{"name": "lab", "cluster": {
            "server": format!("https://{server}"),
            "certificate-authority": cluster.ca_file(),
            "tls-server-name": "kubernetes",
        }}],
        "users": [{"name": "admin", "user": {
            "client-certificate": admin.certificate, "client-key": admin.key,
        }}],
    });
    fs::write(&path, text.to_string()).unwrap();
    path
}

/// An edge for the IPv4 VIP: what the file says, and what is discovered.
fn edge(cluster: &Cluster, own: &[(&str, SocketAddr)], discover: &str) -> Settings {
    let mut settings = cluster.settings().unwrap();
    settings.listen.retain(SocketAddr::is_ipv4);
    settings.backends = own.iter().map(|(name, address)| ((*name).to_owned(), *address)).collect();
    settings.service.push(format!("discover = {{ {discover} }}"));
    settings
}

/// The file names the first apiserver, the cluster lists the others. With the kubeconfig's path.
fn one_named(cluster: &Cluster) -> (PathBuf, Settings) {
    let first = address(cluster, 1);
    let conf = kubeconfig(cluster, &first.to_string());
    let settings = edge(cluster, &[("master-1", first)], &format!("kubeconfig = {conf:?}"));
    (conf, settings)
}

fn start(cluster: &Cluster, settings: &Settings) -> Daemon {
    Daemon::start(&cluster.lb, cluster.lab.directory(), settings).unwrap()
}

/// The addresses of a service's backends that are in a state; `""`: in any.
fn backends(status: &Value, service: usize, state: &str) -> BTreeSet<SocketAddr> {
    let backends = status["services"][service]["backends"].as_array().into_iter().flatten();
    let wanted = backends.filter(|it| state.is_empty() || it["state"] == state);
    wanted.map(|it| it["address"].as_str().unwrap().parse().unwrap()).collect()
}

/// Waits until a service has exactly these backends, and these of them are ready.
fn wait(daemon: &Daemon, service: usize, all: &[SocketAddr], ready: &[SocketAddr]) {
    let set = |addresses: &[SocketAddr]| addresses.iter().copied().collect::<BTreeSet<_>>();
    eventually(MOMENT, &format!("the backends are {all:?}, and {ready:?} are ready"), || {
        let status = daemon.status_json()?;
        let (now, now_ready) = (backends(&status, service, ""), backends(&status, service, "ready"));
        ensure!(now == set(all) && now_ready == set(ready), "{:#}", status["services"][service]);
        Ok(())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.log()));
}

/// Waits until a flag says this, or none does.
fn wait_flag(daemon: &Daemon, words: &str, there: bool) {
    eventually(MOMENT, &format!("{words:?} is said: {there}"), || {
        let flags = daemon.flags()?;
        ensure!(flags.contains(words) == there, "{flags}");
        Ok(())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.log()));
}

fn discovery(daemon: &Daemon, service: usize) -> Value {
    daemon.status_json().unwrap()["services"][service]["discovery"].clone()
}

/// Waits until an apiserver tells of changes; returns its number.
fn wait_told(cluster: &Cluster, daemon: &Daemon) -> usize {
    let mut number = 0;
    eventually(MOMENT, "somebody tells", || {
        let through = discovery(daemon, 0)["through"].clone();
        let through: SocketAddr = through.as_str().context("nobody tells")?.parse()?;
        let mut numbers = 1..=cluster.apiservers.len();
        number = numbers.find(|it| address(cluster, *it) == through).context("a stranger")?;
        Ok(())
    })
    .unwrap();
    number
}

/// How many lists and watches there were.
fn asked(cluster: &Cluster) -> (u64, u64) {
    let each = cluster.apiservers.iter().map(|it| it.stub.listed().unwrap());
    each.fold((0, 0), |(lists, watches), (list, watch)| (lists + list, watches + watch))
}

/// Requests by the VIP, all of which are answered, and never by `without`.
fn require_served(cluster: &Cluster, without: &[&str]) {
    let client = cluster.client_of(cluster.vip4).unwrap();
    let report = load::sequential(&cluster.client, &client, 40).unwrap();
    report.require_all(40).unwrap();
    let servers = report.by_server();
    assert!(without.iter().all(|name| !servers.contains_key(name)), "{servers:?}");
}

/// Watches by the VIP, each at the server that its log names.
struct Watches(Vec<Process>);

impl Watches {
    fn start(cluster: &Cluster, count: usize) -> Self {
        let start = |number| {
            let mut curl = cluster.curl(cluster.vip4, "/watch");
            curl.args(["--no-buffer", "--max-time", "600"]);
            cluster.client.start(&format!("watch-{number}"), curl).unwrap()
        };
        let watches = Self((0..count).map(start).collect());
        watches.require_alive();
        watches
    }

    /// Each of them has a new event.
    fn require_alive(&self) {
        let lines = |watch: &Process| watch.log().lines().count();
        let before: Vec<_> = self.0.iter().map(lines).collect();
        eventually(MOMENT, "every watch goes on", || {
            for (watch, before) in self.0.iter().zip(&before) {
                ensure!(lines(watch) > *before, "{}", watch.log());
            }
            Ok(())
        })
        .unwrap();
    }

    fn are_at(&self, server: &str) -> usize {
        self.0.iter().filter(|watch| watch.log().starts_with(server)).count()
    }
}

#[test]
fn who_leaves_the_list_drains_and_comes_back_and_no_watch_breaks() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    list(&cluster, &numbered(&cluster, &[1, 2, 3]));
    let daemon = start(&cluster, &one_named(&cluster).1);
    let all = numbered(&cluster, &[1, 2, 3]);
    wait(&daemon, 0, &all, &all);
    let table = daemon.status_table().unwrap();
    assert!(table.contains("cluster: default/kubernetes: 3 addresses, told by"), "{table}");
    assert!(table.contains("FROM") && table.contains("master-1"), "{table}");

    let watches = Watches::start(&cluster, 30);
    let client = cluster.client_of(cluster.vip4).unwrap();
    let mut crowd = Crowd::open(&cluster.client, &client, 40).unwrap();
    let before = crowd.ask_names();
    assert!(watches.are_at("api-3") > 0 && before.by_server().contains_key("api-3"));

    let two = numbered(&cluster, &[1, 2]);
    list(&cluster, &two);
    wait(&daemon, 0, &two, &two);
    require_served(&cluster, &["api-3"]);
    watches.require_alive();
    assert_eq!(crowd.ask_names().by_server(), before.by_server());
    // What the file names stays, whatever the list says.
    list(&cluster, &numbered(&cluster, &[3]));
    wait(&daemon, 0, &numbered(&cluster, &[1, 3]), &numbered(&cluster, &[1, 3]));
    list(&cluster, &all);
    wait(&daemon, 0, &all, &all);
    watches.require_alive();
    assert_eq!(crowd.ask_names().by_server(), before.by_server());
    let status = daemon.status().unwrap();
    assert_eq!((status.packets["reset_client"], status.packets["reset_backend"]), (0, 0));
    cluster.require_no_own_resets().unwrap();
    // A drain outlasts that the apiserver is not listed while it restarts.
    let name = address(&cluster, 3).to_string();
    assert!(daemon.command("drain").unwrap().arg(&name).output().unwrap().status.success());
    list(&cluster, &two);
    wait(&daemon, 0, &two, &two);
    list(&cluster, &all);
    wait(&daemon, 0, &all, &two);
    assert_eq!(daemon.status_json().unwrap()["services"][0]["backends"][2]["state"], "drain");
}

#[test]
fn watches_that_end_versions_that_are_gone_and_servers_that_fail_or_freeze() {
    let mut cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    list(&cluster, &numbered(&cluster, &[1, 2, 3]));
    let daemon = start(&cluster, &one_named(&cluster).1);
    let all = numbered(&cluster, &[1, 2, 3]);
    wait(&daemon, 0, &all, &all);

    // 410 Gone in the middle of a watch.
    wait_told(&cluster, &daemon);
    let before = asked(&cluster);
    cluster.apiservers.iter().for_each(|apiserver| apiserver.stub.compact().unwrap());
    eventually(MOMENT, "it lists again", || {
        let now = asked(&cluster);
        ensure!(now.0 > before.0 && now.1 > before.1, "{before:?}, {now:?}");
        Ok(())
    })
    .unwrap();
    let two = numbered(&cluster, &[1, 2]);
    list(&cluster, &two);
    wait(&daemon, 0, &two, &two);

    // Nobody lists any more; the last list stands.
    for apiserver in &cluster.apiservers {
        apiserver.stub.list_status(503).unwrap();
        apiserver.stub.compact().unwrap();
    }
    wait_flag(&daemon, "the apiserver answered 503; ", true);
    wait_flag(&daemon, &format!("the last list is used: {}, {}", two[0], two[1]), true);
    wait(&daemon, 0, &two, &two);
    cluster.apiservers.iter().for_each(|apiserver| apiserver.stub.list_status(200).unwrap());
    wait_flag(&daemon, "the last list is used", false);
    list(&cluster, &all);
    wait(&daemon, 0, &all, &all);

    // A frozen one keeps its connections, and tells nothing.
    let frozen = wait_told(&cluster, &daemon);
    cluster.apiservers[frozen - 1].stub.freeze().unwrap();
    let others: Vec<_> = (1..=3).filter(|number| *number != frozen).collect();
    eventually(MOMENT, "another tells", || {
        let through = discovery(&daemon, 0)["through"].clone();
        let told = numbered(&cluster, &others).iter().any(|it| through == it.to_string());
        ensure!(told, "{through}");
        Ok(())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.log()));
    let stays = others[0];
    let slices = answers::endpoint_slices(&numbered(&cluster, &[stays]));
    others.iter().for_each(|it| cluster.apiservers[it - 1].stub.slices(&slices).unwrap());
    let expected: BTreeSet<_> = [address(&cluster, 1), address(&cluster, stays)].into();
    eventually(MOMENT, "the list is followed", || {
        let now = backends(&daemon.status_json()?, 0, "");
        ensure!(now == expected, "{now:?}");
        Ok(())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.log()));
    cluster.apiservers[frozen - 1].stub.thaw().unwrap();
    // Killed, the next one is asked.
    let killed = wait_told(&cluster, &daemon);
    cluster.apiservers[killed - 1].stub.kill().unwrap();
    eventually(MOMENT, "another tells", || {
        let through = discovery(&daemon, 0)["through"].clone();
        ensure!(through.is_string() && through != address(&cluster, killed).to_string(), "{through}");
        Ok(())
    })
    .unwrap();
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn who_may_list_and_not_watch_lists_ever_more_seldom() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let both = numbered(&cluster, &[1, 2]);
    list(&cluster, &both);
    let daemon = start(&cluster, &one_named(&cluster).1);
    wait(&daemon, 0, &both, &both);
    wait_told(&cluster, &daemon);
    // As the apiservers' priority and fairness does to those who are too many.
    for apiserver in &cluster.apiservers {
        apiserver.stub.watch_status(429).unwrap();
        apiserver.stub.compact().unwrap();
    }
    wait_flag(&daemon, "the apiserver answered 429; ", true);
    let (before, begin) = (asked(&cluster).0, Instant::now());
    eventually(MOMENT, "it lists four times more", || {
        let now = asked(&cluster).0;
        ensure!(now >= before + 4, "{before}, {now}");
        Ok(())
    })
    .unwrap();
    // Pauses of 1, 2, 4 and 8 s at least; where each is the first, they are 6 s at most.
    let time = begin.elapsed();
    assert!(time >= Duration::from_secs(10), "{time:?}\n{}", daemon.log());
    // What is listed is followed all the same, and a watch is begun as soon as one is to be had.
    let first = numbered(&cluster, &[1]);
    list(&cluster, &first);
    wait(&daemon, 0, &first, &first);
    cluster.apiservers.iter().for_each(|apiserver| apiserver.stub.watch_status(200).unwrap());
    eventually(2 * MOMENT, "a watch is begun", || {
        let flags = daemon.flags()?;
        ensure!(!flags.contains("answered 429"), "{flags}");
        Ok(())
    })
    .unwrap();
    list(&cluster, &both);
    wait(&daemon, 0, &both, &both);
}

#[test]
fn who_is_frozen_when_it_leaves_the_list_goes_when_it_is_dead_and_its_watches_are_reset() {
    let mut cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let all = numbered(&cluster, &[1, 2, 3]);
    list(&cluster, &all);
    let mut settings = one_named(&cluster).1;
    // Seldom enough for the list to be quicker than a verdict: it is taken off while it still counts as ready.
    settings.check.push("interval = \"10s\"".to_owned());
    let daemon = start(&cluster, &settings);
    wait(&daemon, 0, &all, &all);
    let mut watches = Watches::start(&cluster, 30);
    // Not the one that tells, and not the one that the file names.
    let told = wait_told(&cluster, &daemon);
    let frozen = if told == 3 { 2 } else { 3 };
    let name = format!("api-{frozen}");
    assert!(watches.are_at(&name) > 0);

    cluster.apiservers[frozen - 1].stub.freeze().unwrap();
    let others: Vec<_> = (1..=3).filter(|number| *number != frozen).collect();
    let left = numbered(&cluster, &others);
    let slices = answers::endpoint_slices(&left);
    others.iter().for_each(|number| cluster.apiservers[number - 1].stub.slices(&slices).unwrap());
    let said = format!("{} is not on the cluster's list any more and does not answer", all[frozen - 1]);
    wait_flag(&daemon, &said, true);
    assert_eq!(discovery(&daemon, 0)["held"], json!([all[frozen - 1]]), "{}", daemon.log());
    let is_there = |watch: &&mut Process| watch.log().starts_with(&name);
    eventually(MOMENT, "its watches are reset", || {
        for watch in watches.0.iter_mut().filter(is_there) {
            ensure!(watch.exited()?.is_some(), "{}", watch.log());
        }
        Ok(())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.log()));
    wait(&daemon, 0, &left, &left);
    wait_flag(&daemon, &said, false);
    watches.0.retain(|watch| !watch.log().starts_with(&name));
    watches.require_alive();
    require_served(&cluster, &[&name]);
    cluster.apiservers[frozen - 1].stub.thaw().unwrap();
}

#[test]
fn junk_is_no_list() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let both = numbered(&cluster, &[1, 2]);
    list(&cluster, &both);
    let daemon = start(&cluster, &one_named(&cluster).1);
    wait(&daemon, 0, &both, &both);
    let https = json!([{"name": "https", "protocol": "TCP", "port": PORT}]);
    let many: Vec<_> = (0..3000).map(|n| format!("10.99.{}.{}", n / 250, n % 250 + 1)).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let second = both[1].ip().to_string();
    let mut broken = answers::slice("kubernetes-ipv4", &[&second], &https);
    broken["endpoints"] = "all of them".into();
    for (slice, said) in [
        (answers::slice("kubernetes-ipv4", &["master-2", "\u{1b}[2J"], &https), "is no address"),
        (
            answers::slice("kubernetes-ipv4", &[&second], &json!([{"name": "metrics", "port": 9}])),
            "has no TCP port",
        ),
        (
            answers::slice("kubernetes-ipv4", &[&second], &json!([{"name": "https", "port": 70_000}])),
            "has no TCP port",
        ),
        (answers::slice("kubernetes-ipv4", &many, &https), "more than 128 addresses"),
        (broken, "EndpointSlice"),
    ] {
        put(&cluster, &[slice]);
        wait_flag(&daemon, said, true);
        wait(&daemon, 0, &both, &both);
        list(&cluster, &both);
        wait_flag(&daemon, "cannot learn from the cluster", false);
    }
    // Beside what is right, junk costs only itself; and what can be no backend is none.
    let vip = cluster.vip4.to_string();
    put(
        &cluster,
        &[answers::slice("kubernetes-ipv4", &[&second, "127.0.0.1", &vip, "224.0.0.1", "x"], &https)],
    );
    for said in ["is no address, and is left out", "it is a VIP", "loopback", "not the address of one host"] {
        wait_flag(&daemon, said, true);
    }
    wait(&daemon, 0, &both, &both);
    require_served(&cluster, &[]);
}

#[test]
fn the_last_list_serves_at_boot_when_nobody_tells_and_the_kubeconfig_may_come_later() {
    let mut cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let all = numbered(&cluster, &[1, 2, 3]);
    list(&cluster, &all);
    let (conf, settings) = one_named(&cluster);
    let mut daemon = start(&cluster, &settings);
    wait(&daemon, 0, &all, &all);
    let kept = cluster.daemon_directory().join("state/discovered.json");
    let text = fs::read_to_string(&kept).unwrap();
    assert!(all.iter().all(|address| text.contains(&address.to_string())), "{text}");
    daemon.process().kill().unwrap();
    assert!(daemon.unload().unwrap().status.success());

    // The only one that the file names is gone, and the others do not list.
    cluster.apiservers[0].stub.kill().unwrap();
    cluster.apiservers[1..].iter().for_each(|apiserver| apiserver.stub.list_status(503).unwrap());
    let mut daemon = start(&cluster, &settings);
    wait(&daemon, 0, &all, &all[1..]);
    require_served(&cluster, &["api-1"]);
    wait_flag(&daemon, "cannot learn from the cluster", true);
    daemon.process().kill().unwrap();

    let elsewhere = conf.with_extension("later");
    fs::rename(&conf, &elsewhere).unwrap();
    cluster.apiservers[1..].iter().for_each(|apiserver| apiserver.stub.list_status(200).unwrap());
    let file = cluster.daemon_directory().join("sheave.toml");
    let checked = run(cluster.lb.command(program().unwrap()).arg("check-config").arg(file)).unwrap();
    assert!(checked.contains("discover.conf does not exist"), "{checked}");
    assert!(checked.contains("1 backend and those that the cluster lists"), "{checked}");
    let daemon = start(&cluster, &settings);
    wait(&daemon, 0, &all, &all[1..]);
    wait_flag(&daemon, "discover.conf does not exist yet", true);
    fs::rename(&elsewhere, &conf).unwrap();
    wait_flag(&daemon, "discover.conf does not exist yet", false);
    let two = numbered(&cluster, &[1, 3]);
    cluster.apiservers[1..].iter().for_each(|it| it.stub.slices(&answers::endpoint_slices(&two)).unwrap());
    wait(&daemon, 0, &two, &two[1..]);
}

#[test]
fn the_clusters_list_replaces_the_files_and_is_held_where_nobody_would_be_left() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    list(&cluster, &numbered(&cluster, &[2, 3]));
    let conf = kubeconfig(&cluster, &address(&cluster, 1).to_string());
    let replace = |own: &[(&str, SocketAddr)], replace: bool| {
        edge(&cluster, own, &format!("kubeconfig = {conf:?}, replace = {replace}"))
    };
    let daemon = start(&cluster, &replace(&[("first", address(&cluster, 1))], true));
    let listed = numbered(&cluster, &[2, 3]);
    wait(&daemon, 0, &listed, &listed);
    require_served(&cluster, &["api-1"]);
    // Where the list leads nowhere, the file's come back.
    let absent = nobody(&cluster, 201);
    list(&cluster, &[absent]);
    wait(&daemon, 0, &[absent, address(&cluster, 1)], &numbered(&cluster, &[1]));
    require_served(&cluster, &["api-2", "api-3"]);

    // Nobody of the file is there.
    let own = nobody(&cluster, 202);
    list(&cluster, &listed);
    assert!(daemon.reload(&replace(&[("first", own)], false)).unwrap().status.success());
    let with_own = [&[own][..], &listed].concat();
    wait(&daemon, 0, &with_own, &listed);
    for told in [&[][..], &[absent]] {
        list(&cluster, told);
        wait_flag(&daemon, "the cluster's list is held", true);
        wait(&daemon, 0, &[&with_own[..], told].concat(), &listed);
        assert_eq!(discovery(&daemon, 0)["held"], json!(listed), "{}", daemon.log());
        require_served(&cluster, &["api-1"]);
    }
    // Somebody new is ready, and the others may go.
    list(&cluster, &numbered(&cluster, &[1]));
    wait(&daemon, 0, &[own, address(&cluster, 1)], &numbered(&cluster, &[1]));
    wait_flag(&daemon, "the cluster's list is held", false);
    require_served(&cluster, &["api-2", "api-3"]);
    cluster.require_no_own_resets().unwrap();
}

/// Two services of a node: one that leads to the apiservers, and one that knows nobody but the first one's listener.
fn node(cluster: &Cluster, conf: &Path, directory: &Path) -> String {
    let check = format!("check = {{ ca_file = {:?}, interval = \"1s\" }}", cluster.ca_file());
    format!(
        "[dataplane]\nstate_dir = {:?}\npin_dir = {:?}\ncgroup = {:?}\n[admin]\nsocket = {:?}\n\
         [[service]]\nname = \"apiservers\"\nlisten = [{LOCAL:?}]\nbackends = [\"{}\"]\n\
         discover = {{ kubeconfig = {conf:?} }}\n{check}\n\
         [[service]]\nname = \"discovered\"\nlisten = [\"127.0.0.1:16444\"]\n\
         discover = {{ kubeconfig = {conf:?} }}\n{check}\n",
        directory.join("state"),
        pins_of(directory),
        cgroup_of(directory).unwrap(),
        directory.join("admin.sock"),
        address(cluster, 1),
    )
}

#[test]
fn a_kubeconfig_that_points_at_our_own_listener_is_no_circle() {
    let mut cluster = Cluster::without_vips(Shape::OneArm, 3).unwrap();
    let conf = kubeconfig(&cluster, LOCAL);
    // The daemon's own connections pass its hook. It is there before any apiserver.
    let command = cluster.lb.hooked_command(program().unwrap()).unwrap();
    let config = |directory: &Path| node(&cluster, &conf, directory);
    let daemon = Daemon::start_with(&cluster.lb, cluster.lab.directory(), config, command).unwrap();
    wait_flag(&daemon, "cannot learn from the cluster", true);
    let all = numbered(&cluster, &[1, 2, 3]);
    cluster.apiservers.iter_mut().for_each(|apiserver| apiserver.start().unwrap());
    list(&cluster, &all);
    for service in [0, 1] {
        wait(&daemon, service, &all, &all);
    }
    // Only by the hook could that have been learnt.
    let log = daemon.log();
    assert!(log.contains("discovered: backend"), "{log}");
    for to in [LOCAL, "127.0.0.1:16444"] {
        let to: SocketAddr = to.parse().unwrap();
        let dialled = dial(&cluster.lb, true, &cluster.ca_file(), to, 60).unwrap();
        dialled.require_all(60, to).unwrap();
        assert_eq!(dialled.servers.len(), 3, "{dialled:?}");
    }
    let two = numbered(&cluster, &[2, 3]);
    list(&cluster, &two);
    wait(&daemon, 0, &all, &all);
    wait(&daemon, 1, &two, &two);
}

#[test]
fn a_process_on_a_node_keeps_its_connection_to_a_server_that_leaves_the_list() {
    let cluster = Cluster::start_without_vips(Shape::OneArm, 3).unwrap();
    let all = numbered(&cluster, &[1, 2, 3]);
    list(&cluster, &all);
    let conf = kubeconfig(&cluster, &all[0].to_string());
    // Nobody waits for long before somebody is dead.
    let config = |directory: &Path| {
        node(&cluster, &conf, directory).replace("discover = ", "reset_after = \"1s\"\ndiscover = ")
    };
    let command = cluster.lb.command(program().unwrap());
    let daemon = Daemon::start_with(&cluster.lb, cluster.lab.directory(), config, command).unwrap();
    let mut holders = [(0, LOCAL), (1, "127.0.0.1:16444")].map(|(service, listener)| {
        wait(&daemon, service, &all, &all);
        let to = listener.parse().unwrap();
        let mut holder = Holder::start(&cluster.lb, true, &cluster.ca_file(), to).unwrap();
        holder.order(Order::OpenPolling(SOME_AT_EACH)).unwrap();
        assert!(holder.opened_to("api-3") > 0);
        holder
    });

    let two = numbered(&cluster, &[1, 2]);
    list(&cluster, &two);
    for (service, listener) in [(0, LOCAL), (1, "127.0.0.1:16444")] {
        wait(&daemon, service, &two, &two);
        let to = listener.parse().unwrap();
        let dialled = dial(&cluster.lb, true, &cluster.ca_file(), to, 60).unwrap();
        dialled.require_all(60, to).unwrap();
        assert!(!dialled.servers.contains_key("api-3"), "{dialled:?}");
    }
    // Several times as long as until somebody silent is dead: each of them goes on asking meanwhile.
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(5) {
        for holder in &mut holders {
            holder.catch_up().unwrap();
            assert_eq!(holder.ended(), [], "{}", daemon.log());
        }
    }
    // And when it comes back it is the same one.
    list(&cluster, &all);
    for service in [0, 1] {
        wait(&daemon, service, &all, &all);
    }
    for holder in &mut holders {
        holder.catch_up().unwrap();
        assert_eq!(holder.ended(), [], "{}", daemon.log());
    }
}
