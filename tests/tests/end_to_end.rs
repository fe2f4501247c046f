//! The product: the real daemon between real clients and TLS servers.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{fs, net::IpAddr, process::Stdio, time::Duration};

use anyhow::ensure;
use lb_tests::{
    cluster::{Apiserver, Cluster, Router, Shape},
    daemon::{Daemon, has_xdp},
    lab::{Host, eventually, run},
    load::{self, Asker, Crowd},
    pattern::Checker,
    stub::{Door, Health, TOKEN},
};

/// A verdict takes at most a reply timeout (5 s), a fresh connection's (1 s) and the pauses between; some times that
/// on a busy machine.
const VERDICT: Duration = Duration::from_secs(60);
/// More than the first checks, a start or a takeover need.
const MOMENT: Duration = Duration::from_secs(60);

/// Downloads `length` bytes through `vip` with curl and compares every one.
fn download(cluster: &Cluster, vip: IpAddr, length: u64) {
    let mut curl = cluster.curl(vip, &format!("/bytes/{length}"));
    let mut child = curl.args(["--max-time", "300"]).stdout(Stdio::piped()).spawn().unwrap();
    let position = Checker::default().check_all(child.stdout.take().unwrap()).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(position, length);
}

/// Sends `length` bytes through `vip` with curl, has them sent back, and compares every one.
fn upload_and_back(cluster: &Cluster, vip: IpAddr, length: u64) {
    let file = cluster.lab.directory().join("upload");
    let mut sent = Vec::new();
    while (sent.len() as u64) < length {
        sent.extend_from_slice(&lb_tests::pattern::piece(sent.len() as u64, length - sent.len() as u64));
    }
    fs::write(&file, &sent).unwrap();
    let mut curl = cluster.curl(vip, "/echo");
    let output = curl.arg("--data-binary").arg(format!("@{}", file.display())).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout == sent, "every byte as it was sent");
}

/// Asks `count` times through each VIP, all of which must be answered.
fn require_served(cluster: &Cluster, count: usize) {
    for vip in cluster.vips() {
        let client = cluster.client_of(vip).unwrap();
        load::sequential(&cluster.client, &client, count).unwrap().require_all(count).unwrap();
    }
}

/// How many connections with requests other than checks a server has seen.
fn connections(apiserver: &Apiserver) -> u64 {
    apiserver.stub.connections().unwrap().values().sum()
}

#[test]
fn curl_is_served_over_both_protocols_and_both_families() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let _daemon = cluster.balance().unwrap();
    for vip in cluster.vips() {
        for (protocol, version) in [("--http1.1", "1.1"), ("--http2", "2")] {
            let mut curl = cluster.curl(vip, "/name");
            curl.args([protocol, "--write-out", " %{http_version}"]);
            curl.args(["--header", &format!("Authorization: Bearer {TOKEN}")]);
            let answer = run(&mut curl).unwrap();
            let (name, spoken) = answer.split_once(' ').unwrap();
            assert!(name.starts_with("api-"), "{answer}");
            assert_eq!(spoken, version);
        }
        upload_and_back(&cluster, vip, 3_000_000);
    }
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn two_hundred_connections_are_open_at_once_and_spread() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let _daemon = cluster.balance().unwrap();
    for vip in cluster.vips() {
        let client = cluster.client_of(vip).unwrap();
        let mut crowd = Crowd::open(&cluster.client, &client, 200).unwrap();
        let report = crowd.ask_names();
        report.require_all(200).unwrap();
        // Consistent hashing gives each a third of the flows, give or take 7 (one standard deviation).
        for (server, count) in report.by_server() {
            assert!((20..=120).contains(&count), "{server} got {count} of 200");
        }
        assert_eq!(report.by_server().len(), 3);
        let again = crowd.ask_names();
        assert_eq!(again.by_server(), report.by_server(), "a connection stays where it is");
    }
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn a_gibibyte_arrives_byte_for_byte() {
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let _daemon = cluster.balance().unwrap();
    download(&cluster, cluster.vip4, 1 << 30);
    download(&cluster, cluster.vip6, 1 << 26);
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn a_narrow_path_to_the_client_is_discovered() {
    let narrow = Router { mtu: Some(1300), ..Router::default() };
    let cluster = Cluster::start(Shape::Routed(narrow), 1).unwrap();
    let _daemon = cluster.balance().unwrap();
    let router = cluster.router.as_ref().unwrap();
    for (vip, group, name) in
        [(cluster.vip4, "Icmp", "OutDestUnreachs"), (cluster.vip6, "Icmp6", "OutPktTooBigs")]
    {
        download(&cluster, vip, 5_000_000);
        assert!(router.counter(group, name).unwrap() > 0, "the path was not narrow");
    }
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn a_masquerading_router_in_front_changes_nothing() {
    let masquerading = Router { masquerades: true, ..Router::default() };
    let cluster = Cluster::start(Shape::Routed(masquerading), 3).unwrap();
    let _daemon = cluster.balance().unwrap();
    require_served(&cluster, 50);
    for vip in cluster.vips() {
        download(&cluster, vip, 5_000_000);
    }
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn clients_and_apiservers_may_be_on_different_interfaces() {
    let cluster = Cluster::start(Shape::TwoArm, 3).unwrap();
    let _daemon = cluster.balance().unwrap();
    require_served(&cluster, 50);
    for vip in cluster.vips() {
        download(&cluster, vip, 5_000_000);
        upload_and_back(&cluster, vip, 3_000_000);
    }
    cluster.require_no_own_resets().unwrap();
}

/// Ten thousand requests one after another, then two thousand at once.
fn endure(family: impl FnOnce(&Cluster) -> IpAddr) {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let _daemon = cluster.balance().unwrap();
    let client = cluster.client_of(family(&cluster)).unwrap();
    load::sequential(&cluster.client, &client, 10_000).unwrap().require_all(10_000).unwrap();
    load::parallel(&cluster.client, &client, 2_000).unwrap().require_all(2_000).unwrap();
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn twelve_thousand_requests_over_ipv4_and_none_is_lost() {
    endure(|cluster| cluster.vip4);
}

#[test]
fn twelve_thousand_requests_over_ipv6_and_none_is_lost() {
    endure(|cluster| cluster.vip6);
}

/// What makes an apiserver lose its place, and the state it is then in.
#[derive(Clone, Copy, Debug)]
enum Illness {
    Health(Health),
    Door(Door),
    CutOff,
    Frozen,
}

impl Illness {
    fn begin(self, Apiserver { stub, host }: &mut Apiserver) {
        match self {
            Self::Health(health) => stub.health(health).unwrap(),
            Self::Door(door) => stub.door(host, door).unwrap(),
            Self::CutOff => host.cut_off().unwrap(),
            Self::Frozen => stub.freeze().unwrap(),
        }
    }

    fn end(self, Apiserver { stub, host }: &mut Apiserver) {
        match self {
            Self::Health(_) => stub.health(Health::Normal).unwrap(),
            Self::Door(_) => stub.door(host, Door::Open).unwrap(),
            Self::CutOff => host.reconnect().unwrap(),
            Self::Frozen => stub.thaw().unwrap(),
        }
    }
}

/// One of three apiservers falls ill: it gets no new connection, the others serve on; it recovers and is used.
fn fall_ill_and_recover(illnesses: &[(Illness, &str)]) {
    let mut cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let mut daemon = cluster.balance().unwrap();
    for &(illness, state) in illnesses {
        illness.begin(&mut cluster.apiservers[0]);
        daemon.wait_state("api-1", state, VERDICT).unwrap_or_else(|error| panic!("{illness:?}: {error:#}"));
        for vip in cluster.vips() {
            let client = cluster.client_of(vip).unwrap();
            let report = load::sequential(&cluster.client, &client, 30).unwrap();
            report.require_all(30).unwrap_or_else(|error| panic!("{illness:?}: {error:#}"));
            assert!(!report.by_server().contains_key("api-1"), "{illness:?}: {:?}", report.by_server());
        }
        illness.end(&mut cluster.apiservers[0]);
        daemon.wait_state("api-1", "ready", VERDICT).unwrap_or_else(|error| panic!("{illness:?}: {error:#}"));
        let client = cluster.client_of(cluster.vip4).unwrap();
        let report = load::sequential(&cluster.client, &client, 60).unwrap();
        report.require_all(60).unwrap();
        assert!(report.by_server().contains_key("api-1"), "{illness:?}: {:?}", report.by_server());
    }
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn an_apiserver_with_the_wrong_answer_or_none_is_left_out() {
    fall_ill_and_recover(&[
        (Illness::Health(Health::Status(401)), "draining"),
        (Illness::Health(Health::Status(403)), "draining"),
        (Illness::Health(Health::Status(500)), "draining"),
        (Illness::Health(Health::Late(Duration::from_secs(7))), "draining"),
        (Illness::Health(Health::Never), "draining"),
    ]);
}

#[test]
fn an_apiserver_that_cannot_be_reached_is_left_out() {
    fall_ill_and_recover(&[
        (Illness::Door(Door::Refusing), "draining"),
        (Illness::Door(Door::TlsSilent), "silent"),
        (Illness::Frozen, "silent"),
        (Illness::CutOff, "silent"),
    ]);
}

#[test]
fn an_apiserver_that_is_slow_but_in_time_keeps_its_place() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let mut daemon = cluster.balance().unwrap();
    cluster.apiservers[0].stub.health(Health::Late(Duration::from_secs(2))).unwrap();
    // The other one's verdict is the clock: it needs as many checks as would have condemned the slow one, and
    // each of the slow one's takes longer than the pause between checks.
    cluster.apiservers[1].stub.health(Health::Never).unwrap();
    daemon.wait_state("api-2", "draining", VERDICT).unwrap();
    assert_eq!(daemon.status().unwrap().states("api-1"), ["ready", "ready"]);
}

#[test]
fn an_apiserver_that_is_about_to_stop_keeps_its_old_connections() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let mut daemon = cluster.balance().unwrap();
    let mut crowds = cluster.vips().map(|vip| {
        let client = cluster.client_of(vip).unwrap();
        let mut crowd = Crowd::open(&cluster.client, &client, 60).unwrap();
        let servers = crowd.ask_names();
        servers.require_all(60).unwrap();
        (crowd, servers)
    });
    let draining = &cluster.apiservers[0];
    draining.stub.health(Health::Status(500)).unwrap();
    daemon.wait_state("api-1", "draining", VERDICT).unwrap();
    let before = connections(draining);
    require_served(&cluster, 60);
    assert_eq!(connections(draining), before, "no new connection");
    for (crowd, servers) in &mut crowds {
        let again = crowd.ask_names();
        again.require_all(60).unwrap();
        assert_eq!(again.by_server(), servers.by_server(), "old connections stay where they are");
        assert!(again.by_server().contains_key("api-1"));
    }
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn when_etcd_hangs_for_all_of_them_nobody_is_refused_and_nothing_is_reset() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let mut daemon = cluster.balance().unwrap();
    let client = cluster.client_of(cluster.vip4).unwrap();
    let mut crowd = Crowd::open(&cluster.client, &client, 60).unwrap();
    crowd.ask_names().require_all(60).unwrap();
    let asker = Asker::start(&cluster.client, &client, 4, Duration::from_millis(20));
    for apiserver in &cluster.apiservers {
        apiserver.stub.health(Health::EtcdHang).unwrap();
    }
    for apiserver in &cluster.apiservers {
        daemon.wait_state(apiserver.stub.name(), "draining", VERDICT).unwrap();
    }
    let before: u64 = cluster.apiservers.iter().map(connections).sum();
    require_served(&cluster, 30);
    crowd.ask_names().require_all(60).unwrap();
    for apiserver in &cluster.apiservers {
        apiserver.stub.health(Health::Normal).unwrap();
    }
    daemon.wait_ready(3).unwrap();
    assert!(cluster.apiservers.iter().map(connections).sum::<u64>() >= before + 60);
    let report = asker.stop();
    report.require_all(report.outcomes.len()).unwrap();
    crowd.ask_names().require_all(60).unwrap();
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn without_a_usable_apiserver_a_connection_is_refused_at_once() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let mut daemon = cluster.balance().unwrap();
    cluster.cut_all_off_and_require_refused(&mut daemon, VERDICT).unwrap();
    cluster.require_no_own_resets().unwrap();
    for apiserver in &cluster.apiservers {
        apiserver.host.reconnect().unwrap();
    }
    daemon.wait_ready(2).unwrap();
    require_served(&cluster, 5);
}

/// An HAProxy as people have it in front of their apiservers, on the load balancer's IPv4 VIP.
fn haproxy(cluster: &Cluster) -> lb_tests::lab::Process {
    let servers: String = cluster
        .apiservers
        .iter()
        .map(|Apiserver { host, .. }| {
            let link = host.link().unwrap();
            format!("  server {} {}:6443\n", host.name(), link.v4)
        })
        .collect();
    let config = format!(
        "global\n  maxconn 2000\n\
         defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\n\
         listen kube-apiserver\n  bind {}:6443\n{servers}",
        cluster.vip4
    );
    let file = cluster.lab.directory().join("haproxy.cfg");
    fs::write(&file, config).unwrap();
    let mut command = cluster.lb.command("haproxy");
    command.arg("-db").arg("-f").arg(&file);
    let process = cluster.lb.start("haproxy", command).unwrap();
    eventually(MOMENT, "haproxy listens", || {
        ensure!(!cluster.lb.run("ss -Hltn sport = :6443")?.is_empty());
        Ok(())
    })
    .unwrap();
    process
}

#[test]
fn coming_under_a_running_haproxy_and_leaving_again_resets_nobody() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let _haproxy = haproxy(&cluster);
    let client = cluster.client_of(cluster.vip4).unwrap();
    let mut old = Crowd::open(&cluster.client, &client, 100).unwrap();
    old.ask_names().require_all(100).unwrap();
    let held = || {
        let sockets = cluster.lb.run("ss -Htn state established sport = :6443").unwrap();
        sockets.lines().filter(|line| line.contains(&cluster.vip4.to_string())).count()
    };
    assert_eq!(held(), 100);

    let daemon = cluster.balance().unwrap();
    old.ask_names().require_all(100).unwrap();
    let mut new = Crowd::open(&cluster.client, &client, 50).unwrap();
    new.ask_names().require_all(50).unwrap();
    assert_eq!(held(), 100, "new connections go past HAProxy, old ones stay with it");
    drop(new);

    assert!(daemon.unload().unwrap().status.success());
    old.ask_names().require_all(100).unwrap();
    let mut later = Crowd::open(&cluster.client, &client, 10).unwrap();
    later.ask_names().require_all(10).unwrap();
    assert_eq!(held(), 110, "HAProxy serves again");
}

#[test]
fn unloading_takes_the_program_away_and_leaves_a_followed_vip() {
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let mut daemon = cluster.balance().unwrap();
    assert!(has_xdp(&cluster.lb, "eth0").unwrap());
    assert!(daemon.is_alive().unwrap());
    let socket = daemon.socket().to_owned();
    assert!(daemon.unload().unwrap().status.success());
    assert!(daemon.process().wait(MOMENT).unwrap().success());
    assert!(!has_xdp(&cluster.lb, "eth0").unwrap());
    assert!(cluster.vips().into_iter().all(|vip| cluster.lb.has_address(vip).unwrap()));
    assert!(!socket.exists(), "its socket is gone");
}

#[test]
fn a_vip_of_our_own_comes_with_the_daemon_and_goes_when_it_is_unloaded() {
    let cluster = Cluster::start_without_vips(Shape::OneArm, 2).unwrap();
    let settings = cluster.settings_with_own_vips().unwrap();
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    daemon.wait_ready(2).unwrap();
    eventually(MOMENT, "the VIPs are there", || {
        ensure!(cluster.vips().into_iter().all(|vip| cluster.lb.has_address(vip).unwrap()));
        Ok(())
    })
    .unwrap();
    require_served(&cluster, 10);
    assert!(daemon.unload().unwrap().status.success());
    assert!(!cluster.vips().into_iter().any(|vip| cluster.lb.has_address(vip).unwrap()));
}

#[test]
fn a_vip_that_somebody_else_answers_for_is_refused() {
    let cluster = Cluster::start_without_vips(Shape::OneArm, 1).unwrap();
    cluster.client.add_vip(cluster.vip4).unwrap();
    let settings = cluster.settings_with_own_vips().unwrap();
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    let status = daemon.process().wait(MOMENT).unwrap();
    assert_eq!(status.code(), Some(1));
    assert!(daemon.log().contains(&cluster.vip4.to_string()), "{}", daemon.log());
    assert!(!has_xdp(&cluster.lb, "eth0").unwrap(), "nothing half-loaded");
    assert!(!cluster.vips().into_iter().any(|vip| cluster.lb.has_address(vip).unwrap()));
}

/// keepalived with a track script that asks sheave.
fn keepalived(cluster: &Cluster, host: &Host, priority: u8, daemon: &Daemon) -> lb_tests::lab::Process {
    let directory = cluster.lab.directory();
    let file = |kind: &str| directory.join(format!("{}-keepalived.{kind}", host.name()));
    let alive = daemon.command("alive").unwrap();
    // keepalived runs in the host's namespace, so the part of the command that enters it is left out.
    let script: Vec<_> = alive.get_args().skip_while(|word| *word != "--").skip(1).collect();
    let script = script.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
    let config = format!(
        "global_defs {{\n  script_user root\n  enable_script_security\n}}\n\
         vrrp_script sheave {{\n  script \"{script}\"\n  interval 1\n  fall 2\n  rise 2\n}}\n\
         vrrp_instance api {{\n  state BACKUP\n  interface eth0\n  virtual_router_id 51\n  \
         priority {priority}\n  advert_int 1\n  virtual_ipaddress {{\n    {}/32\n  }}\n  \
         virtual_ipaddress_excluded {{\n    {}/128\n  }}\n  track_script {{\n    sheave\n  }}\n}}\n",
        cluster.vip4, cluster.vip6
    );
    fs::write(file("conf"), config).unwrap();
    let mut command = host.command("keepalived");
    command.args(["--dont-fork", "--log-console", "--log-detail", "--vrrp"]);
    command.arg("--use-file").arg(file("conf"));
    command.arg("--pid").arg(file("pid")).arg("--vrrp_pid").arg(file("vrrp.pid"));
    host.start("keepalived", command).unwrap()
}

#[test]
fn beside_keepalived_the_vip_moves_and_sheave_follows() {
    let cluster = Cluster::start_without_vips(Shape::OneArm, 2).unwrap();
    let mut other = cluster.lab.host("lb-2").unwrap();
    cluster.lab.plug(&mut other, cluster.lb.link().unwrap().segment, 3).unwrap();
    let settings = cluster.settings().unwrap();
    let mut first = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    let mut second = Daemon::start(&other, cluster.lab.directory(), &settings).unwrap();
    first.wait_ready(2).unwrap();
    second.wait_ready(2).unwrap();
    let lbs = [&cluster.lb, &other];
    for (lb, vip) in lbs.iter().flat_map(|lb| cluster.vips().map(|vip| (lb, vip))) {
        assert!(!lb.has_address(vip).unwrap(), "in follow mode nobody but keepalived adds a VIP");
    }

    let mut preferred = keepalived(&cluster, &cluster.lb, 150, &first);
    let mut standby = keepalived(&cluster, &other, 100, &second);
    let moved_to = |new: &Host, old: &Host| {
        eventually(MOMENT, &format!("the VIPs are on {} alone", new.name()), || {
            for vip in cluster.vips() {
                ensure!(
                    new.has_address(vip).unwrap() && !old.has_address(vip).unwrap(),
                    "{vip}: {} {}",
                    new.has_address(vip).unwrap(),
                    old.has_address(vip).unwrap()
                );
            }
            Ok(())
        })
        .unwrap();
        // Announcements may still be on their way to the client.
        eventually(MOMENT, "the client finds the new owner", || {
            for vip in cluster.vips() {
                run(cluster.curl(vip, "/name").args(["--max-time", "2"]))?;
            }
            Ok(())
        })
        .unwrap();
        require_served(&cluster, 20);
    };
    moved_to(&cluster.lb, &other);

    assert!(first.is_alive().unwrap());
    assert!(first.stop().unwrap().success());
    moved_to(&other, &cluster.lb);

    let mut first = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    first.wait_ready(2).unwrap();
    moved_to(&cluster.lb, &other);

    for keepalived in [&mut preferred, &mut standby] {
        keepalived.signal(lb_tests::lab::process::Signal::SIGTERM).unwrap();
        keepalived.wait(MOMENT).unwrap();
    }
    for (lb, vip) in lbs.iter().flat_map(|lb| cluster.vips().map(|vip| (lb, vip))) {
        assert!(!lb.has_address(vip).unwrap(), "{} still has {vip}", lb.name());
    }
}
