//! The connect hook: connections of processes on the host that sheave runs on.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::ensure;
use aya_obj::generated::bpf_attach_type;
use lb_common::outcome::{Counter, Event};
use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::{Daemon, Settings, has_xdp, program},
    dial::{ASKING, Dialled, dial},
    lab::{
        Host, Lab, Process,
        authority::Authority,
        cgroup::{attached, detach, occupy},
        cgroup_of, eventually, pins_of, run,
    },
    load,
    stub::PORT,
};
use lb_userspace::{
    dataplane::{self, Dataplane, Listener, OBJECT},
    hook::own_network,
};

/// A verdict takes at most a reply timeout (5 s), a fresh connection's (1 s) and the pauses between; some times that
/// on a busy machine.
const VERDICT: Duration = Duration::from_secs(60);
const REFUSED: &str = "Connection refused (os error 111)";
const LOCAL4: &str = "127.0.0.1:16443";
const LOCAL6: &str = "[::1]:16443";

fn at(address: &str) -> SocketAddr {
    address.parse().unwrap()
}

/// A node: its processes reach the apiservers by its loopback addresses. Nobody has a VIP.
fn node(apiservers: u8) -> Cluster {
    Cluster::start_without_vips(Shape::OneArm, apiservers).unwrap()
}

fn settings(cluster: &Cluster) -> Settings {
    cluster.settings_of_a_node().unwrap()
}

fn start(cluster: &Cluster, settings: &Settings) -> Daemon {
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), settings).unwrap();
    daemon.wait_ready(cluster.apiservers.len()).unwrap();
    daemon
}

/// Connections of a process on `host` that the daemon's hook sees.
fn connect(cluster: &Cluster, host: &Host, to: &str, count: usize) -> Dialled {
    dial(host, true, &cluster.ca_file(), at(to), count).unwrap()
}

#[test]
fn a_loopback_listener_serves_the_host_without_any_xdp() {
    let cluster = node(3);
    let daemon = start(&cluster, &settings(&cluster));
    assert!(!has_xdp(&cluster.lb, "eth0").unwrap());
    for to in [LOCAL4, LOCAL6] {
        let dialled = connect(&cluster, &cluster.lb, to, 60);
        dialled.require_all(60, at(to)).unwrap();
        assert_eq!(dialled.servers.len(), 3, "{dialled:?}");
        // curl asks the kernel by itself where it is connected to.
        let mut curl = cluster.lb.hooked_command("curl").unwrap();
        curl.args(["--silent", "--show-error", "--http2", "--max-time", "20", "--cacert"])
            .arg(cluster.ca_file());
        curl.args([if to == LOCAL4 { "-4" } else { "-6" }, "--write-out", " %{remote_ip} %{remote_port}"]);
        let answer = run(curl.arg("https://localhost:16443/name")).unwrap();
        assert!(answer.starts_with("api-"), "{answer}");
        assert!(answer.ends_with(&format!(" {} 16443", at(to).ip())), "{answer}");
    }
    // An IPv6 socket that dials an IPv4 address.
    let mapped = "[::ffff:127.0.0.1]:16443";
    connect(&cluster, &cluster.lb, mapped, 20).require_all(20, at(mapped)).unwrap();
    // Whoever is not in the cgroup is not served, and nobody listens there.
    let outside = dial(&cluster.lb, false, &cluster.ca_file(), at(LOCAL4), 1).unwrap();
    assert_eq!(outside.servers.len(), 0, "{outside:?}");
    // Other addresses are left alone, on the listener's port as well.
    let direct = SocketAddr::new(cluster.apiservers[0].host.address(at(LOCAL4).ip()).unwrap(), PORT);
    let dialled = connect(&cluster, &cluster.lb, &direct.to_string(), 3);
    dialled.require_all(3, direct).unwrap();
    assert_eq!(dialled.servers.get("api-1"), Some(&3));
    let status = daemon.status_table().unwrap();
    assert!(status.contains("connect hook on "), "{status}");
}

#[test]
fn two_thousand_connections_are_open_at_once() {
    let cluster = node(3);
    let _daemon = start(&cluster, &settings(&cluster));
    let dialled = connect(&cluster, &cluster.lb, LOCAL4, 2000);
    dialled.require_all(2000, at(LOCAL4)).unwrap();
    assert_eq!(dialled.servers.len(), 3, "{dialled:?}");
    for (server, count) in &dialled.servers {
        // By lot, each gets 67 of those that ask, give or take 7 (one standard deviation).
        assert!((30..110).contains(count), "{server} got {count} of {ASKING}");
    }
}

#[test]
fn a_backend_that_fails_its_checks_gets_no_connection_and_without_any_they_are_refused_at_once() {
    let mut cluster = node(3);
    let mut daemon = start(&cluster, &settings(&cluster));
    cluster.apiservers[0].stub.kill().unwrap();
    daemon.wait_state("api-1", "draining", VERDICT).unwrap();
    for to in [LOCAL4, LOCAL6] {
        let dialled = connect(&cluster, &cluster.lb, to, 100);
        dialled.require_all(100, at(to)).unwrap();
        assert!(!dialled.servers.contains_key("api-1"), "{dialled:?}");
    }
    for apiserver in &mut cluster.apiservers[1..] {
        apiserver.host.cut_off().unwrap();
    }
    for name in ["api-2", "api-3"] {
        daemon.wait_state(name, "silent", VERDICT).unwrap();
    }
    for to in [LOCAL4, LOCAL6, "[::ffff:127.0.0.1]:16443"] {
        let dialled = connect(&cluster, &cluster.lb, to, 50);
        let refused = dialled.failures.get(REFUSED);
        assert_eq!(refused, Some(&50), "{dialled:?}");
    }
    // By us, at once: nobody listens there anyway.
    let status = daemon.status().unwrap();
    assert_eq!(status.packets.get("connects_refused"), Some(&150), "{:?}", status.packets);
    cluster.apiservers[1].host.reconnect().unwrap();
    daemon.wait_state("api-2", "ready", VERDICT).unwrap();
    let dialled = connect(&cluster, &cluster.lb, LOCAL4, 10);
    dialled.require_all(10, at(LOCAL4)).unwrap();
}

#[test]
fn pods_are_served_when_the_service_says_so() {
    for pods in [false, true] {
        // The client's namespace stands for a pod's: it has a way to the backends, and nobody has the VIP.
        let cluster = node(2);
        let mut settings = settings(&cluster);
        settings.listen.extend(cluster.vips().map(|vip| SocketAddr::new(vip, PORT)));
        settings.dataplane.push("interfaces = []".to_owned());
        settings.service.push(format!("pods = {pods}"));
        let _daemon = start(&cluster, &settings);
        for vip in cluster.vips().map(|vip| SocketAddr::new(vip, PORT).to_string()) {
            connect(&cluster, &cluster.lb, &vip, 10).require_all(10, at(&vip)).unwrap();
            let dialled = connect(&cluster, &cluster.client, &vip, 10);
            if pods {
                dialled.require_all(10, at(&vip)).unwrap();
            } else {
                assert_eq!(dialled.servers.len(), 0, "{dialled:?}");
            }
        }
        // A pod has a loopback interface of its own.
        let dialled = connect(&cluster, &cluster.client, LOCAL4, 1);
        assert_eq!(dialled.failures.get(REFUSED), Some(&1), "{dialled:?}");
    }
}

#[test]
fn an_edge_serves_its_own_clients_of_the_vip() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let _daemon = cluster.balance().unwrap();
    assert!(has_xdp(&cluster.lb, "eth0").unwrap());
    for vip in cluster.vips().map(|vip| SocketAddr::new(vip, PORT).to_string()) {
        connect(&cluster, &cluster.lb, &vip, 20).require_all(20, at(&vip)).unwrap();
        // And others, whose packets come from elsewhere.
        dial(&cluster.client, false, &cluster.ca_file(), at(&vip), 20)
            .unwrap()
            .require_all(20, at(&vip))
            .unwrap();
    }
}

#[test]
fn a_server_that_nobody_reaches_any_more_is_named() {
    let cluster = node(1);
    let server = cluster.lb.in_namespace(|| std::net::TcpListener::bind(LOCAL4)).unwrap().unwrap();
    let daemon = start(&cluster, &settings(&cluster));
    let status = daemon.status_table().unwrap();
    assert!(status.contains(&format!("listens on {LOCAL4}")), "{status}");
    connect(&cluster, &cluster.lb, LOCAL4, 5).require_all(5, at(LOCAL4)).unwrap();
    drop(server);
}

/// Asks over and over from a process in the lab's cgroup, until dropped; every answer is a line of its log.
fn keep_asking(cluster: &Cluster) -> Process {
    let script = r#"while :; do
        curl -4 --silent --show-error --max-time 20 --cacert "$0" https://localhost:16443/name || echo " failed $?"
        echo
    done"#;
    let mut command = cluster.lb.hooked_command("sh").unwrap();
    command.args(["-c", script]).arg(cluster.ca_file());
    cluster.lb.start("asker", command).unwrap()
}

/// Waits until `more` lines have been added to a log.
fn wait_lines(asker: &Process, more: usize) {
    let before = asker.log().lines().count();
    eventually(VERDICT, "more answers", || {
        let now = asker.log().lines().count();
        ensure!(now >= before + more, "{now} lines, {before} before");
        Ok(())
    })
    .unwrap();
}

#[test]
fn the_hook_outlives_the_daemon_and_the_next_one_takes_over() {
    let cluster = node(2);
    let settings = settings(&cluster);
    let mut daemon = start(&cluster, &settings);
    let asker = keep_asking(&cluster);
    wait_lines(&asker, 5);
    daemon.process().kill().unwrap();
    wait_lines(&asker, 20);
    let dialled = connect(&cluster, &cluster.lb, LOCAL6, 50);
    dialled.require_all(50, at(LOCAL6)).unwrap();
    // Another daemon, and no connection between them that is lost.
    let daemon = start(&cluster, &settings);
    wait_lines(&asker, 20);
    assert!(!asker.log().contains("failed"), "{}", asker.log());
    let before = programs(&cluster);
    assert_eq!(before.len(), PROGRAMS.len(), "one of each: {before:?}");
    drop(asker);
    let unloaded = daemon.unload().unwrap();
    let said = String::from_utf8_lossy(&unloaded.stdout).into_owned();
    assert!(unloaded.status.success() && said.contains("removed the connect hook"), "{unloaded:?}");
    assert_eq!(programs(&cluster), Vec::new());
    let dialled = connect(&cluster, &cluster.lb, LOCAL4, 1);
    assert_eq!(dialled.failures.get(REFUSED), Some(&1), "{dialled:?}");
}

#[test]
fn what_a_killed_daemon_has_left_is_unloaded_without_it() {
    let cluster = node(1);
    let mut daemon = start(&cluster, &settings(&cluster));
    daemon.process().kill().unwrap();
    assert_eq!(programs(&cluster).len(), PROGRAMS.len());
    let unloaded = daemon.unload().unwrap();
    let said = String::from_utf8_lossy(&unloaded.stdout).into_owned();
    assert!(unloaded.status.success() && said.contains("removed the connect hook"), "{unloaded:?}");
    assert_eq!(programs(&cluster), Vec::new());
}

#[test]
fn another_cgroup_takes_the_place_of_the_one_before() {
    let cluster = node(1);
    let mut settings = settings(&cluster);
    let mut daemon = start(&cluster, &settings);
    daemon.process().kill().unwrap();
    let other = cgroup_of(cluster.lab.directory()).unwrap().join("other");
    std::fs::create_dir(&other).unwrap();
    settings.dataplane.push(format!("cgroup = {other:?}"));
    let mut daemon = start(&cluster, &settings);
    assert_eq!(programs(&cluster), Vec::new(), "on the one before");
    assert_eq!(programs_on(&other).len(), PROGRAMS.len());
    assert!(daemon.is_alive().unwrap());
    // What is on a cgroup goes with it.
    std::fs::remove_dir(&other).unwrap();
    assert!(!daemon.is_alive().unwrap());
    daemon.process().kill().unwrap();
    let settings = self::settings(&cluster);
    start(&cluster, &settings);
    assert_eq!(programs(&cluster).len(), PROGRAMS.len());
    connect(&cluster, &cluster.lb, LOCAL4, 5).require_all(5, at(LOCAL4)).unwrap();
}

/// The pin of one of the hook's programs.
fn pin_of(cluster: &Cluster, program: &str) -> PathBuf {
    let name = format!("hook_{program}");
    let layouts = std::fs::read_dir(pins_of(&cluster.daemon_directory())).unwrap();
    let mut pins = layouts.map(|layout| layout.unwrap().path().join(&name));
    pins.find(|pin| pin.exists()).unwrap()
}

#[test]
fn a_hook_that_somebody_detached_is_not_said_to_be_there() {
    let cluster = node(1);
    let settings = settings(&cluster);
    let mut daemon = start(&cluster, &settings);
    assert!(daemon.is_alive().unwrap());
    assert_eq!(daemon.status_json().unwrap()["hook"]["attached"], true);
    detach(&pin_of(&cluster, "connect4")).unwrap();
    assert_eq!(programs(&cluster).len(), PROGRAMS.len() - 1);
    assert!(!daemon.is_alive().unwrap());
    assert_eq!(daemon.status_json().unwrap()["hook"]["attached"], false);
    let table = daemon.status_table().unwrap();
    assert!(
        table.contains("attached nowhere") && table.contains("somebody has detached connect4"),
        "{table}"
    );
    // It is put back by the next start, and not before.
    daemon.process().kill().unwrap();
    let daemon = start(&cluster, &settings);
    assert!(daemon.is_alive().unwrap(), "{}", daemon.log());
    assert_eq!(programs(&cluster).len(), PROGRAMS.len());
    connect(&cluster, &cluster.lb, LOCAL4, 5).require_all(5, at(LOCAL4)).unwrap();
}

#[test]
fn a_kernel_without_errors_of_our_choice_refuses_by_a_port_where_nobody_listens() {
    let lab = Lab::new().unwrap();
    let host = lab.host("old").unwrap();
    let cgroup = std::fs::File::open(cgroup_of(lab.directory()).unwrap()).unwrap();
    let settings = dataplane::Settings {
        snat_addresses: vec![],
        snat_room: 1,
        snat_ports: 1024..=65_535,
        secret: [1, 2],
        log_one_in: None,
        sets_error: false,
    };
    let mut dataplane = Dataplane::load(OBJECT, &settings).unwrap();
    let listeners = [LOCAL4, LOCAL6].map(|address| Listener { address: at(address), service: 0 });
    dataplane.set_listeners(&listeners, 0).unwrap();
    let network = host.in_namespace(own_network).unwrap().unwrap();
    dataplane.attach_hook(&cgroup, network).unwrap();
    // Whatever listens there is not reached: the service has no backend.
    let server = host.in_namespace(|| std::net::TcpListener::bind("[::]:16443")).unwrap().unwrap();
    let _closing = std::thread::spawn(move || server.incoming().for_each(drop));
    let ca = Authority::new(lab.directory()).unwrap();
    for to in [LOCAL4, LOCAL6, "[::ffff:127.0.0.1]:16443"] {
        let dialled = dial(&host, true, &ca.file(), at(to), 5).unwrap();
        assert_eq!(dialled.failures.get(REFUSED), Some(&5), "{to}: {dialled:?}");
    }
    let counted = |event| {
        let counters = dataplane.counters(Some(0)).unwrap();
        counters.into_iter().find(|(counter, _)| *counter == Counter::Event(event)).unwrap().1
    };
    assert_eq!((counted(Event::ConnectRefused), counted(Event::ConnectRedirected)), (15, 0));
}

#[test]
fn a_reload_opens_a_listener_and_lets_pods_in() {
    let cluster = node(1);
    let mut settings = settings(&cluster);
    settings.dataplane.push("interfaces = []".to_owned());
    settings.listen = vec![at(LOCAL4)];
    let daemon = start(&cluster, &settings);
    let vip = SocketAddr::new(cluster.vip4, PORT);
    let dialled = connect(&cluster, &cluster.lb, &vip.to_string(), 1);
    assert!(dialled.servers.is_empty(), "{dialled:?}");
    settings.listen.push(vip);
    settings.service.push("pods = true".to_owned());
    let reloaded = daemon.reload(&settings).unwrap();
    assert!(reloaded.status.success(), "{reloaded:?}");
    for (host, to) in [(&cluster.lb, at(LOCAL4)), (&cluster.lb, vip), (&cluster.client, vip)] {
        connect(&cluster, host, &to.to_string(), 10).require_all(10, to).unwrap();
    }
    settings.service.clear();
    assert!(daemon.reload(&settings).unwrap().status.success());
    let dialled = connect(&cluster, &cluster.client, &vip.to_string(), 1);
    assert!(dialled.servers.is_empty(), "{dialled:?}");
}

/// `cargo test -p lb-tests --test node costs -- --ignored --nocapture`
#[test]
#[ignore = "a measurement, for a quiet machine"]
fn what_a_connect_to_another_address_costs() {
    let cluster = node(1);
    let mut daemon = start(&cluster, &settings(&cluster));
    let _statistics = aya::sys::enable_stats(aya::sys::Stats::RunTime).unwrap();
    let ours = |name: &str| {
        let programs = aya::programs::loaded_programs().map(Result::unwrap);
        programs.filter(|it| it.name_as_str() == Some(name)).max_by_key(|it| it.id()).unwrap()
    };
    let measured = [
        ("connect4", "127.0.0.1:9"),
        ("connect6", "[::1]:9"),
        ("connect4", LOCAL4),
        ("follow_sockets", "127.0.0.1:9"),
        ("follow_sockets", LOCAL4),
    ];
    for (name, to) in measured {
        let before = ours(name);
        let (time, count) = (before.run_time(), before.run_count());
        for _ in 0..20 {
            connect(&cluster, &cluster.lb, to, 2000);
        }
        let after = ours(name);
        let (time, count) = (after.run_time() - time, after.run_count() - count);
        println!("{name} to {to}: {} ns a run, {count} runs", time.as_nanos() / u128::from(count));
    }
    daemon.process().kill().unwrap();
}

/// What is said of a cgroup that lets no other program on it.
const REFUSED_HOOK: &str = "the kernel does not let program connect4 of the connect hook on the cgroup: ";

#[test]
fn a_hook_that_may_not_be_on_the_cgroup_says_so_and_a_load_balancer_goes_on_without() {
    let cluster = node(1);
    let cgroup = cgroup_of(cluster.lab.directory()).unwrap();
    occupy(&cgroup, bpf_attach_type::BPF_CGROUP_INET4_CONNECT).unwrap();
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings(&cluster)).unwrap();
    let ended = daemon.process().wait(VERDICT).unwrap();
    let log = daemon.log();
    assert_eq!(ended.code(), Some(1), "{log}");
    assert!(log.contains(REFUSED_HOOK), "{log}");
    assert!(log.contains("CAP_BPF and CAP_NET_ADMIN") && log.contains("bpftool cgroup tree"), "{log}");
    assert_eq!(programs(&cluster), [bpf_attach_type::BPF_CGROUP_INET4_CONNECT], "nothing half-attached");

    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let cgroup = cgroup_of(cluster.lab.directory()).unwrap();
    occupy(&cgroup, bpf_attach_type::BPF_CGROUP_INET4_CONNECT).unwrap();
    let daemon = cluster.balance().unwrap();
    let flags = daemon.flags().unwrap();
    assert!(
        flags.contains("clients on this host itself are not served") && flags.contains(REFUSED_HOOK),
        "{flags}"
    );
    let client = cluster.client_of(cluster.vip4).unwrap();
    load::sequential(&cluster.client, &client, 5).unwrap().require_all(5).unwrap();
}

#[test]
fn a_node_without_the_right_to_hook_says_which_right_it_needs() {
    for (without, said) in [("bpf", "CAP_BPF"), ("net_admin", "CAP_NET_ADMIN")] {
        let cluster = node(1);
        let mut command = cluster.lb.command("setpriv");
        // The one contains all the others.
        command.arg(format!("--bounding-set=-sys_admin,-{without}")).arg(program().unwrap());
        let config = |directory: &Path| settings(&cluster).to_toml(directory);
        let mut daemon = Daemon::start_with(&cluster.lb, cluster.lab.directory(), config, command).unwrap();
        let ended = daemon.process().wait(VERDICT).unwrap();
        let log = daemon.log();
        assert_eq!(ended.code(), Some(1), "without {without}: {log}");
        assert!(log.contains(said) && log.contains("not permitted"), "without {without}: {log}");
        assert_eq!(programs(&cluster), Vec::new(), "without {without}");
    }
}

/// What the hook has one program of each of.
const PROGRAMS: [bpf_attach_type; 5] = [
    bpf_attach_type::BPF_CGROUP_INET4_CONNECT,
    bpf_attach_type::BPF_CGROUP_INET6_CONNECT,
    bpf_attach_type::BPF_CGROUP_INET4_GETPEERNAME,
    bpf_attach_type::BPF_CGROUP_INET6_GETPEERNAME,
    bpf_attach_type::BPF_CGROUP_SOCK_OPS,
];

/// The types of the programs that are on the lab's cgroup.
fn programs(cluster: &Cluster) -> Vec<bpf_attach_type> {
    programs_on(&cgroup_of(cluster.lab.directory()).unwrap())
}

fn programs_on(cgroup: &Path) -> Vec<bpf_attach_type> {
    let each = |kind: bpf_attach_type| vec![kind; attached(cgroup, kind).unwrap() as usize];
    PROGRAMS.into_iter().flat_map(each).collect()
}
