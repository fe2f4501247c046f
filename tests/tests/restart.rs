//! The daemon comes and goes; packets do not notice.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{fs, io::ErrorKind, os::unix::net::UnixDatagram, path::Path, time::Duration};

use anyhow::{Context as _, ensure};
use aya::{
    Ebpf,
    maps::{Array, MapData},
    programs::{Xdp, XdpMode},
};
use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::{Daemon, Settings, has_xdp, program},
    hold::{Holder, Order},
    lab::{
        Host, eventually,
        process::{Signal, said},
    },
    load::{self, Asker, Crowd},
    stub::Health,
    transfer::SlowTransfer,
};
use lb_userspace::dataplane::OBJECT;

/// More than a start, an end or a verdict needs.
const MOMENT: Duration = Duration::from_secs(30);

/// New connections all the time, open ones and a transfer over both families, while something happens to the daemon.
/// None of them fails, none is reset, none moves.
fn nobody_notices(cluster: &Cluster, mut daemon: Daemon, event: impl FnOnce(Daemon) -> Daemon) -> Daemon {
    let mut crowds = cluster.vips().map(|vip| {
        let mut crowd = Crowd::open(&cluster.client, &cluster.client_of(vip).unwrap(), 40).unwrap();
        let servers = crowd.ask_names();
        servers.require_all(40).unwrap();
        (crowd, servers)
    });
    let transfers = cluster.vips().map(|vip| SlowTransfer::start(cluster, vip).unwrap());
    let resets = cluster.client_resets().unwrap();
    let askers = cluster.vips().map(|vip| {
        Asker::start(&cluster.client, &cluster.client_of(vip).unwrap(), 2, Duration::from_millis(5))
    });
    let asked = || askers.iter().map(|asker| asker.report().answered()).sum::<usize>();
    let more = |count: usize| {
        let enough = asked() + count;
        eventually(MOMENT, "more requests are answered", || {
            ensure!(asked() >= enough, "{} of {enough}", asked());
            Ok(())
        })
        .unwrap();
    };
    more(20);
    daemon = event(daemon);
    more(20);
    // Before curl ends: it resets its own connection.
    assert_eq!(cluster.client_resets().unwrap(), resets, "nobody is reset");
    for transfer in transfers {
        transfer.finish().unwrap();
    }
    for asker in askers {
        let report = asker.stop();
        report.require_all(report.outcomes.len()).unwrap();
    }
    for (crowd, servers) in &mut crowds {
        let again = crowd.ask_names();
        again.require_all(40).unwrap();
        assert_eq!(again.by_server(), servers.by_server(), "a connection stays where it is");
    }
    cluster.require_no_own_resets().unwrap();
    daemon
}

fn start_again(cluster: &Cluster, arguments: &[&str]) -> Daemon {
    let settings = cluster.settings().unwrap();
    let mut daemon =
        Daemon::start_arguing(&cluster.lb, cluster.lab.directory(), &settings, arguments).unwrap();
    daemon.wait_ready(cluster.apiservers.len()).unwrap();
    daemon
}

/// Runs `sheave run` where it is expected to refuse: what it said.
fn refused(cluster: &Cluster, settings: &Settings) -> String {
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), settings).unwrap();
    assert_eq!(daemon.process().wait(MOMENT).unwrap().code(), Some(1), "{}", daemon.log());
    daemon.log()
}

fn require_served(cluster: &Cluster, count: usize) {
    for vip in cluster.vips() {
        let client = cluster.client_of(vip).unwrap();
        load::sequential(&cluster.client, &client, count).unwrap().require_all(count).unwrap();
    }
}

/// The kernel's id of the XDP program on a host's interface.
fn xdp_program(host: &Host) -> u64 {
    let shown = host.run("ip -j -details link show dev eth0").unwrap();
    let json: serde_json::Value = serde_json::from_str(&shown).unwrap();
    json[0]["xdp"]["prog"]["id"].as_u64().with_context(|| shown.clone()).unwrap()
}

fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn a_daemon_that_is_killed_and_started_again_costs_nothing() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let daemon = cluster.balance().unwrap();
    let before = xdp_program(&cluster.lb);
    nobody_notices(&cluster, daemon, |mut daemon| {
        daemon.process().kill().unwrap();
        start_again(&cluster, &[])
    });
    assert_ne!(xdp_program(&cluster.lb), before, "its own program is in the place of the old one");
}

#[test]
fn a_daemon_that_is_stopped_and_started_again_costs_nothing() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let daemon = cluster.balance().unwrap();
    nobody_notices(&cluster, daemon, |daemon| {
        assert!(daemon.stop().unwrap().success());
        start_again(&cluster, &[])
    });
}

#[test]
fn another_build_takes_over_without_a_packet_in_between() {
    let cluster = Cluster::start(Shape::TwoArm, 3).unwrap();
    let daemon = cluster.balance().unwrap();
    nobody_notices(&cluster, daemon, |daemon| {
        assert!(daemon.stop().unwrap().success());
        // With packets logged it is another program: other constants, other instructions.
        let other = start_again(&cluster, &["--log-packets", "1000000"]);
        assert!(other.stop().unwrap().success());
        start_again(&cluster, &[])
    });
}

#[test]
fn stopping_leaves_packets_flowing_and_says_so() {
    let cluster = Cluster::start_without_vips(Shape::OneArm, 2).unwrap();
    let settings = cluster.settings_with_own_vips().unwrap();
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    daemon.wait_ready(2).unwrap();
    require_served(&cluster, 5);
    daemon.process().signal(Signal::SIGTERM).unwrap();
    assert!(daemon.process().wait(MOMENT).unwrap().success());
    assert!(daemon.log().contains("packets still flow"), "{}", daemon.log());
    assert!(daemon.log().contains("sheave unload"), "{}", daemon.log());
    assert!(!daemon.socket().exists(), "its socket is gone");
    assert!(!daemon.is_alive().unwrap());
    assert!(
        cluster.vips().into_iter().all(|vip| cluster.lb.has_address(vip).unwrap()),
        "the VIP goes with the packets"
    );
    require_served(&cluster, 20);
}

#[test]
fn whoever_served_before_serves_until_the_checks_have_a_verdict() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let mut daemon = cluster.balance().unwrap();
    let client = cluster.client_of(cluster.vip4).unwrap();
    let asker = Asker::start(&cluster.client, &client, 2, Duration::from_millis(5));
    daemon.process().kill().unwrap();
    for apiserver in &cluster.apiservers {
        apiserver.stub.health(Health::Never).unwrap();
    }
    let settings = cluster.settings().unwrap();
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    for apiserver in &cluster.apiservers {
        daemon.wait_state(apiserver.stub.name(), "draining", MOMENT).unwrap();
    }
    let report = asker.stop();
    assert!(report.answered() > 50, "{}", report.answered());
    report.require_all(report.outcomes.len()).unwrap();
}

#[test]
fn another_configuration_after_a_restart_moves_nobody() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let daemon = cluster.balance().unwrap();
    let client = cluster.client_of(cluster.vip4).unwrap();
    let mut crowd = Crowd::open(&cluster.client, &client, 60).unwrap();
    let servers = crowd.ask_names();
    assert_eq!(servers.by_server().len(), 3);
    assert!(daemon.stop().unwrap().success());
    // The first is left out, the others change places.
    let mut settings = cluster.settings().unwrap();
    settings.backends.retain(|(name, _)| name != "api-1");
    settings.backends.reverse();
    settings.listen.reverse();
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    daemon.wait_ready(2).unwrap();
    let again = crowd.ask_names();
    again.require_all(60).unwrap();
    assert_eq!(again.by_server(), servers.by_server(), "a connection stays where it is");
    let new = load::sequential(&cluster.client, &client, 40).unwrap();
    new.require_all(40).unwrap();
    assert_eq!(new.by_server().keys().copied().collect::<Vec<_>>(), ["api-2", "api-3"]);
    // And back again, with somebody in the place that api-1 had.
    assert!(daemon.stop().unwrap().success());
    start_again(&cluster, &[]);
    let again = crowd.ask_names();
    again.require_all(60).unwrap();
    assert_eq!(again.by_server(), servers.by_server());
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn a_second_daemon_is_refused_and_told_whose_the_first_is() {
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let mut daemon = cluster.balance().unwrap();
    let owner = format!("(process {})", daemon.process().pid());
    let second = |change: &dyn Fn(String) -> String| {
        let directory = cluster.daemon_directory();
        let config = cluster.lab.directory().join("second.toml");
        let text = fs::read_to_string(directory.join("sheave.toml")).unwrap();
        fs::write(&config, change(text)).unwrap();
        let mut command = cluster.lb.command(program().unwrap());
        let output = command.arg("run").arg("--config").arg(&config).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        said(&output)
    };
    let same = second(&|text| text);
    assert!(same.contains("another sheave is running") && same.contains(&owner), "{same}");
    let pins_only = second(&|text| {
        let own = cluster.daemon_directory();
        let [state, socket] = ["state", "admin.sock"].map(|name| own.join(name).display().to_string());
        text.replace(&state, &format!("{state}-of-another")).replace(&socket, &format!("{socket}-of-another"))
    });
    assert!(pins_only.contains("pin_dir") && pins_only.contains(&owner), "{pins_only}");
    assert!(daemon.is_alive().unwrap());
    require_served(&cluster, 5);
    // A lock does not outlive its owner, however that one ended.
    daemon.process().kill().unwrap();
    start_again(&cluster, &[]);
}

#[test]
fn a_layout_of_another_version_is_refused_until_the_operator_gives_it_up() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let mut daemon = cluster.balance().unwrap();
    let settings = cluster.settings().unwrap();
    let before = xdp_program(&cluster.lb);
    daemon.process().kill().unwrap();
    let pins = daemon.pins();
    let layout = names_in(&pins).pop().unwrap();
    fs::rename(pins.join(&layout), pins.join("layout_0123456789abcdef")).unwrap();
    let message = refused(&cluster, &settings);
    assert!(message.contains("layout_0123456789abcdef") && message.contains("--replace-layout"), "{message}");
    assert_eq!(xdp_program(&cluster.lb), before, "the other version's program is left alone");
    require_served(&cluster, 10);

    let _daemon = start_again(&cluster, &["--replace-layout"]);
    assert_eq!(names_in(&pins), [layout]);
    assert_ne!(xdp_program(&cluster.lb), before);
    require_served(&cluster, 10);
}

#[test]
fn open_connections_are_counted_right_when_a_layout_was_replaced() {
    const LISTENER: &str = "127.0.0.1:16443";
    let cluster = Cluster::start_without_vips(Shape::OneArm, 2).unwrap();
    let settings = cluster.settings_of_a_node().unwrap();
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    daemon.wait_ready(2).unwrap();
    let hold = |count| {
        let address = LISTENER.parse().unwrap();
        let mut holder = Holder::start(&cluster.lb, true, &cluster.ca_file(), address).unwrap();
        holder.order(Order::OpenPlain(count)).unwrap();
        holder
    };
    let wait_open = |daemon: &Daemon, count: u64| {
        eventually(MOMENT, &format!("{count} connections are open"), || {
            let status = daemon.status()?;
            let backends = status.services.iter().flat_map(|service| &service.backends);
            let open: u64 = backends.map(|backend| backend.active_flows).sum();
            ensure!(open == count, "{open}");
            Ok(())
        })
        .unwrap();
    };
    let before = hold(5);
    wait_open(&daemon, 5);
    daemon.process().kill().unwrap();
    let pins = daemon.pins();
    let layout = names_in(&pins).pop().unwrap();
    fs::rename(pins.join(&layout), pins.join("layout_0123456789abcdef")).unwrap();
    let arguments = ["--replace-layout"];
    let mut daemon =
        Daemon::start_arguing(&cluster.lb, cluster.lab.directory(), &settings, &arguments).unwrap();
    daemon.wait_ready(2).unwrap();
    let after = hold(7);
    wait_open(&daemon, 7);
    drop(before);
    drop(after);
    wait_open(&daemon, 0);
}

#[test]
fn a_flow_table_that_does_not_fit_is_refused_with_what_is_different() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let mut daemon = cluster.balance().unwrap();
    let settings = cluster.settings().unwrap();
    daemon.process().kill().unwrap();

    let mut other_ports = settings.clone();
    other_ports.dataplane.push("snat_ports = \"2048-32767\"".to_owned());
    let message = refused(&cluster, &other_ports);
    assert!(message.contains("1024-65535") && message.contains("2048-32767"), "{message}");
    assert!(message.contains("--replace-layout"), "{message}");

    let key = cluster.lab.directory().join("hash.key");
    fs::write(&key, "000102030405060708090a0b0c0d0e0f").unwrap();
    let mut other_key = settings.clone();
    other_key.dataplane.push(format!("hash_key_file = {key:?}"));
    let message = refused(&cluster, &other_key);
    assert!(message.contains("hash key"), "{message}");

    let layout = names_in(&daemon.pins()).pop().unwrap();
    let pin = daemon.pins().join(layout).join("map_NEXT_HOP");
    fs::remove_file(&pin).unwrap();
    Array::<MapData, u64>::create(7, 0).unwrap().pin(&pin).unwrap();
    let message = refused(&cluster, &settings);
    assert!(message.contains("map NEXT_HOP") && message.contains("entries 7 instead of 32768"), "{message}");
    require_served(&cluster, 10);

    let _daemon = start_again(&cluster, &["--replace-layout"]);
    require_served(&cluster, 10);
}

#[test]
fn unloading_after_a_kill_leaves_nothing_of_ours_and_everything_of_others() {
    let cluster = Cluster::start_without_vips(Shape::OneArm, 1).unwrap();
    let settings = cluster.settings_with_own_vips().unwrap();
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    daemon.wait_ready(1).unwrap();
    eventually(MOMENT, "the VIPs are there", || {
        ensure!(cluster.vips().into_iter().all(|vip| cluster.lb.has_address(vip).unwrap()));
        Ok(())
    })
    .unwrap();
    // Somebody else's program on another interface, and somebody else's pins beside ours and in our midst.
    let mut foreign = Ebpf::load(OBJECT).unwrap();
    let other: &mut Xdp = foreign.program_mut("read_clock").unwrap().try_into().unwrap();
    other.load().unwrap();
    cluster.lb.in_namespace(|| other.attach("lo", XdpMode::Skb).unwrap()).unwrap();
    let strangers = [cluster.lab.pins().join("stranger"), daemon.pins().join("stranger")];
    for pin in &strangers {
        Array::<MapData, u64>::create(1, 0).unwrap().pin(pin).unwrap();
    }

    daemon.process().kill().unwrap();
    assert!(has_xdp(&cluster.lb, "eth0").unwrap());
    let output = daemon.unload().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    for what in ["the VIP", "the program from eth0", "pins"] {
        assert!(said(&output).contains(what), "{}", said(&output));
    }
    assert!(!has_xdp(&cluster.lb, "eth0").unwrap());
    assert!(!cluster.vips().into_iter().any(|vip| cluster.lb.has_address(vip).unwrap()));
    assert_eq!(names_in(&daemon.pins()), ["stranger"]);
    assert!(strangers.iter().all(|pin| pin.exists()));
    assert!(has_xdp(&cluster.lb, "lo").unwrap(), "somebody else's program stays");
    let again = daemon.unload().unwrap();
    assert!(again.status.success() && said(&again).contains("nothing of sheave"), "{}", said(&again));
}

#[test]
fn unloading_a_running_daemon_leaves_no_pins() {
    let cluster = Cluster::start(Shape::TwoArm, 1).unwrap();
    let mut daemon = cluster.balance().unwrap();
    assert!(daemon.pins().exists());
    let output = daemon.unload().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert!(daemon.process().wait(MOMENT).unwrap().success());
    assert!(!daemon.pins().exists());
    assert!(!has_xdp(&cluster.lb, "eth0").unwrap() && !has_xdp(&cluster.lb, "eth1").unwrap());
}

#[test]
fn a_start_that_fails_leaves_what_was_there() {
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let mut settings = cluster.settings().unwrap();
    settings.dataplane.push("interfaces = [\"nowhere\"]".to_owned());
    let mut nothing = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    assert!(!nothing.process().wait(MOMENT).unwrap().success());
    assert!(!nothing.pins().exists(), "nothing half-made");

    let mut daemon = cluster.balance().unwrap();
    daemon.process().kill().unwrap();
    let mut broken = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    assert!(!broken.process().wait(MOMENT).unwrap().success());
    require_served(&cluster, 10);
}

/// The next message of the daemon to the service manager that contains `what`.
fn told(manager: &UnixDatagram, what: &str) -> String {
    let mut buffer = [0; 4096];
    loop {
        let length = match manager.recv(&mut buffer) {
            Ok(length) => length,
            // A wait with a limit is not begun again by the kernel when the test is stopped and goes on (signal(7)).
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => panic!("waiting for {what}: {error}"),
        };
        let message = String::from_utf8_lossy(&buffer[..length]).into_owned();
        if message.contains(what) {
            return message;
        }
    }
}

/// The unit's bounding set, as setpriv writes it: `,+net_admin,+bpf`.
fn unit_capabilities() -> String {
    let unit = include_str!("../../packaging/sheave.service");
    let line = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).unwrap();
    let names = line.split_whitespace().map(|name| name.strip_prefix("CAP_").unwrap().to_lowercase());
    names.map(|name| format!(",+{name}")).collect()
}

#[test]
fn the_service_manager_hears_of_it_and_the_daemon_keeps_few_capabilities() {
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let path = cluster.lab.directory().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(MOMENT)).unwrap();
    let directory = cluster.lab.directory().join("managed");
    fs::create_dir_all(&directory).unwrap();
    let config = directory.join("sheave.toml");
    fs::write(&config, cluster.settings().unwrap().to_toml(&directory)).unwrap();
    // With what the unit gives it, and no more.
    let mut command = cluster.lb.command("setpriv");
    command.arg(format!("--bounding-set=-all{}", unit_capabilities())).arg(program().unwrap());
    command.arg("run").arg("--config").arg(&config);
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "5000000");
    let mut process = cluster.lb.start("managed", command).unwrap();

    let ready = told(&manager, "READY=1");
    assert!(ready.contains("STATUS=2 of 2 backends ready, on eth0"), "{ready}");
    require_served(&cluster, 5);
    // Twice: it is the controller's turn that says it, not its start.
    told(&manager, "WATCHDOG=1");
    told(&manager, "WATCHDOG=1");

    let threads = fs::read_dir(format!("/proc/{}/task", process.pid())).unwrap();
    for thread in threads {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        for set in ["CapEff", "CapPrm", "CapBnd"] {
            let line = status.lines().find(|line| line.starts_with(set)).unwrap();
            let kept = u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap();
            // CAP_DAC_READ_SEARCH, CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF of linux/capability.h.
            assert_eq!(kept & !(1 << 2 | 1 << 12 | 1 << 13 | 1 << 39), 0, "{line}");
        }
    }
    process.signal(Signal::SIGTERM).unwrap();
    let stopping = told(&manager, "STOPPING=1");
    assert!(stopping.contains("packets still flow"), "{stopping}");
    assert!(process.wait(MOMENT).unwrap().success());
}
