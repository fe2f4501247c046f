//! Where the program runs, in the driver or in the network stack, and what is said where it may not run.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{
    net::IpAddr,
    process::Stdio,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::{Daemon, Settings, has_xdp},
    lab::run,
    load::{self, Crowd},
    pattern::{self, Checker},
};

/// More than a start that fails needs.
const MOMENT: Duration = Duration::from_secs(60);

/// The usual settings, with this mode.
fn settings(cluster: &Cluster, mode: &str) -> Settings {
    let mut settings = cluster.settings().unwrap();
    settings.dataplane.push(format!("xdp_mode = {mode:?}"));
    settings
}

fn start(cluster: &Cluster, settings: &Settings) -> Daemon {
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), settings).unwrap();
    daemon.wait_ready(cluster.apiservers.len()).unwrap();
    daemon
}

/// Where the program is, and in which mode, as the status says.
fn attached(daemon: &Daemon) -> Vec<(String, String)> {
    let status = daemon.status_json().unwrap();
    let word = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let interfaces = status["interfaces"].as_array().unwrap().iter();
    interfaces.map(|it| (word(&it["name"]), word(&it["xdp_mode"]))).collect()
}

fn on(interface: &str, mode: &str) -> Vec<(String, String)> {
    vec![(interface.to_owned(), mode.to_owned())]
}

/// How the kernel says that the program is attached to an interface.
fn shown(cluster: &Cluster, interface: &str) -> String {
    cluster.lb.run(&format!("ip link show dev {interface}")).unwrap()
}

/// Downloads through `vip` and compares every byte; the same upwards.
fn require_transfers(cluster: &Cluster, vip: IpAddr) {
    const LENGTH: u64 = 8_000_000;
    let mut curl = cluster.curl(vip, &format!("/bytes/{LENGTH}"));
    let mut child = curl.stdout(Stdio::piped()).spawn().unwrap();
    let position = Checker::default().check_all(child.stdout.take().unwrap()).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(position, LENGTH);

    let file = cluster.lab.directory().join("upload");
    let mut sent = Vec::new();
    while (sent.len() as u64) < LENGTH {
        sent.extend_from_slice(&pattern::piece(sent.len() as u64, LENGTH - sent.len() as u64));
    }
    std::fs::write(&file, &sent).unwrap();
    let echo =
        cluster.curl(vip, "/echo").arg("--data-binary").arg(format!("@{}", file.display())).output().unwrap();
    assert!(echo.status.success(), "{}", String::from_utf8_lossy(&echo.stderr));
    assert!(echo.stdout == sent, "every byte as it was sent");
}

/// Both families are served: by curl, at once, and with some data.
fn require_served(cluster: &Cluster) {
    for vip in cluster.vips() {
        let name = run(&mut cluster.curl(vip, "/name")).unwrap();
        assert!(name.starts_with("api-"), "{name}");
        let client = cluster.client_of(vip).unwrap();
        load::sequential(&cluster.client, &client, 30).unwrap().require_all(30).unwrap();
        let mut crowd = Crowd::open(&cluster.client, &client, 60).unwrap();
        let report = crowd.ask_names();
        report.require_all(60).unwrap();
        assert_eq!(report.by_server().len(), cluster.apiservers.len(), "{:?}", report.by_server());
        require_transfers(cluster, vip);
    }
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn generic_mode_serves_as_the_drivers_does() {
    for shape in [Shape::OneArm, Shape::TwoArm] {
        let cluster = Cluster::start(shape, 3).unwrap();
        let mut daemon = start(&cluster, &settings(&cluster, "generic"));
        let arms = cluster.lb.links().iter().map(|link| (link.interface.clone(), "generic".to_owned()));
        let arms: Vec<_> = arms.collect();
        assert_eq!(attached(&daemon), arms);
        assert!(shown(&cluster, "eth0").contains("xdpgeneric"), "{}", shown(&cluster, "eth0"));
        assert!(daemon.status_table().unwrap().contains("eth0 (generic)"));
        require_served(&cluster);

        // The next one goes on in the mode that it finds.
        let old = Crowd::open(&cluster.client, &cluster.client_of(cluster.vip4).unwrap(), 20);
        daemon.process().kill().unwrap();
        let daemon = start(&cluster, &settings(&cluster, "generic"));
        assert_eq!(attached(&daemon), arms);
        old.unwrap().ask_names().require_all(20).unwrap();
        assert!(daemon.unload().unwrap().status.success());
        assert!(!has_xdp(&cluster.lb, "eth0").unwrap() && !shown(&cluster, "eth0").contains("xdp"));
    }
}

/// The kernel's own stack gets the packets while the program is in neither mode, and must not answer.
#[test]
fn a_restart_in_another_mode_costs_no_connection() {
    const CROWD: usize = 40;
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let mut daemon = start(&cluster, &settings(&cluster, "native"));
    let rules = || cluster.lb.run("ip rule").unwrap() + &cluster.lb.run("ip -6 rule").unwrap();
    let (rules_before, resets) = (rules(), cluster.client_resets().unwrap());
    let open = |vip| Crowd::open(&cluster.client, &cluster.client_of(vip).unwrap(), CROWD).unwrap();
    let mut crowds = cluster.vips().map(open);
    for mode in ["generic", "native"] {
        daemon.process().kill().unwrap();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for crowd in &mut crowds {
                let deadline = Instant::now() + MOMENT;
                let over = &over;
                scope.spawn(move || {
                    while !over.load(Ordering::Relaxed) && Instant::now() < deadline {
                        crowd.ask_names().require_all(CROWD).unwrap();
                    }
                });
            }
            daemon = start(&cluster, &settings(&cluster, mode));
            over.store(true, Ordering::Relaxed);
        });
        assert_eq!(attached(&daemon), on("eth0", mode));
        crowds.iter_mut().for_each(|crowd| crowd.ask_names().require_all(CROWD).unwrap());
        assert_eq!(rules(), rules_before);
    }
    assert_eq!(cluster.client_resets().unwrap(), resets);
    cluster.require_no_own_resets().unwrap();
}

/// Puts the load balancer's addresses on a bridge over its interface: a driver without XDP.
fn move_to_a_bridge(cluster: &Cluster) {
    let link = cluster.lb.link().unwrap();
    let (v4, v6) = (link.v4, link.v6);
    for command in [
        "link add br0 type bridge forward_delay 0 mcast_snooping 0",
        "address flush dev eth0",
        "link set eth0 master br0",
        "link set br0 up",
        &format!("address add {v4}/24 dev br0"),
        &format!("address add {v6}/64 dev br0 nodad"),
        &format!("address add {}/32 dev br0", cluster.vip4),
        &format!("address add {}/128 dev br0 nodad noprefixroute preferred_lft 0", cluster.vip6),
    ] {
        cluster.lb.ip(command).unwrap();
    }
}

#[test]
fn auto_takes_generic_mode_where_the_driver_has_none_and_says_so() {
    let cluster = Cluster::start_without_vips(Shape::OneArm, 3).unwrap();
    move_to_a_bridge(&cluster);
    let daemon = start(&cluster, &settings(&cluster, "auto"));
    assert_eq!(attached(&daemon), on("br0", "generic"));
    let log = daemon.log();
    assert!(log.contains("br0: driver bridge has no native XDP, attaching in generic mode"), "{log}");
    // What is merged below the bridge has no checksum.
    let off = log.lines().find(|line| line.contains("eth0: switched off ")).unwrap_or_default();
    assert!(off.contains("rx-gro"), "{log}");
    assert!(!merges(&cluster));
    for vip in cluster.vips() {
        let client = cluster.client_of(vip).unwrap();
        load::sequential(&cluster.client, &client, 30).unwrap().require_all(30).unwrap();
        require_transfers(&cluster, vip);
    }
    assert!(daemon.unload().unwrap().status.success());
    assert!(merges(&cluster), "as before");

    // Who asks for the driver's mode does not get another.
    let cluster = Cluster::start_without_vips(Shape::OneArm, 1).unwrap();
    move_to_a_bridge(&cluster);
    let said = refused(&cluster, "native");
    assert!(said.contains("cannot attach to br0 in native mode"), "{said}");
}

/// Whether the load balancer's interface merges segments.
fn merges(cluster: &Cluster) -> bool {
    cluster.lb.run("ethtool -k eth0").unwrap().contains("generic-receive-offload: on")
}

/// Starts a daemon that must not come up: what it said.
fn refused(cluster: &Cluster, mode: &str) -> String {
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings(cluster, mode)).unwrap();
    let ended = daemon.process().wait(MOMENT).unwrap();
    let log = daemon.log();
    assert_eq!(ended.code(), Some(1), "{log}");
    log
}

#[test]
fn auto_does_not_take_generic_mode_where_that_would_lose_data() {
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    cluster.lab.widen(&cluster.lb).unwrap();
    let said = refused(&cluster, "auto");
    for words in [
        "eth0: driver veth does not take the program in native mode",
        "generic mode would corrupt packets with unfinished checksums",
        "lower the MTU to 3498 or below and leave the driver at least one free transmit queue",
        "ethtool -K DEVICE tx off` for the other end of eth0",
    ] {
        assert!(said.contains(words), "{words:?} is missing in\n{said}");
    }
    assert!(!shown(&cluster, "eth0").contains("xdp"), "nothing is attached");

    // After what it says.
    let daemon = start(&cluster, &settings(&cluster, "generic"));
    assert_eq!(attached(&daemon), on("eth0", "generic"));
    require_served(&cluster);
    drop(daemon);
}

#[test]
fn packets_with_unfinished_checksums_are_warned_of_and_no_data_is_lost() {
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    // The client is a virtual machine on the host of the load balancer's; the apiserver is behind a network card, which
    // finishes the checksums.
    for host in [&cluster.client, &cluster.lb] {
        cluster.lab.leave_checksums_unfinished(host).unwrap();
    }
    let daemon = start(&cluster, &settings(&cluster, "generic"));
    let warning = "driver veth hands their packets over before the checksums are finished: run `ethtool -K DEVICE tx off` \
                   for the other end of eth0";
    let flags = daemon.flags().unwrap();
    assert!(flags.contains(warning), "{flags}");
    assert!(daemon.status_table().unwrap().contains(warning), "also for people");
    assert!(daemon.log().contains(warning), "{}", daemon.log());

    // No connection comes about: there is nothing that could be lost.
    let before = cluster.apiservers[0].host.counter("Tcp", "InCsumErrors").unwrap();
    let curl = cluster.curl(cluster.vip4, "/name").args(["--max-time", "3"]).output().unwrap();
    assert_eq!((curl.status.code(), curl.stdout.len()), (Some(28), 0), "it times out: {curl:?}");
    let after = cluster.apiservers[0].host.counter("Tcp", "InCsumErrors").unwrap();
    assert!(after > before, "that was to be the reason");

    // After what it says.
    cluster.lab.finish_checksums_towards(&cluster.lb).unwrap();
    require_served(&cluster);
}
