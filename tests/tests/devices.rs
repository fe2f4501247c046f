//! Interfaces that are not as one would like them: late, gone, back, in another network namespace.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{
    io::{Read as _, Write as _},
    path::PathBuf,
    process::Output,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf,
    programs::{Xdp, XdpMode},
};
use lb_tests::{
    attacks::{Arena, exchange_all},
    cluster::{Cluster, Shape},
    daemon::{self, Daemon, has_xdp},
    lab::{cgroup::detach, eventually, run},
    load,
};
use lb_userspace::dataplane::OBJECT;

/// More than anything here takes.
const LIMIT: Duration = Duration::from_secs(60);

fn index_of(cluster: &Cluster, interface: &str) -> u32 {
    let shown = cluster.lb.run(&format!("ip -o link show dev {interface}")).unwrap();
    shown.split(':').next().unwrap().parse().unwrap()
}

fn config(cluster: &Cluster) -> PathBuf {
    cluster.daemon_directory().join("sheave.toml")
}

fn require_served(cluster: &Cluster) {
    for vip in cluster.vips() {
        load::sequential(&cluster.client, &cluster.client_of(vip).unwrap(), 20)
            .unwrap()
            .require_all(20)
            .unwrap();
    }
}

fn logged(daemon: &Daemon, words: &str) -> Result<()> {
    let log = daemon.log();
    ensure!(log.contains(words), "{words:?} is not in the log: {log}");
    Ok(())
}

#[test]
fn own_mode_starts_on_a_link_that_comes_up_late() {
    let cluster = Cluster::start_without_vips(Shape::OneArm, 2).unwrap();
    cluster.lab.unplug(&cluster.lb).unwrap();
    eventually(LIMIT, "the carrier goes", || {
        let shown = cluster.lb.run("ip link show dev eth0")?;
        ensure!(shown.contains("NO-CARRIER"), "{shown}");
        Ok(())
    })
    .unwrap();
    let settings = cluster.settings_with_own_vips().unwrap();
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    eventually(LIMIT, "it waits", || logged(&daemon, "eth0: no carrier, waiting for it")).unwrap();
    cluster.lab.replug(&cluster.lb).unwrap();
    daemon.wait_ready(cluster.apiservers.len()).unwrap();
    require_served(&cluster);
    assert!(!daemon.log().contains("ERROR"), "{}", daemon.log());
}

#[test]
fn an_interface_that_comes_back_has_the_program_again() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let mut daemon = cluster.balance().unwrap();
    require_served(&cluster);
    let before = index_of(&cluster, "eth0");

    let mac = cluster.lab.remove_link(&cluster.lb).unwrap();
    daemon.wait_flag("interface eth0 is gone", LIMIT).unwrap();
    assert!(!daemon.is_alive().unwrap());
    cluster.lab.restore_link(&cluster.lb, &mac).unwrap();
    for vip in cluster.vips() {
        cluster.lb.add_vip(vip).unwrap();
    }
    eventually(LIMIT, "it is attached", || {
        ensure!(has_xdp(&cluster.lb, "eth0")?, "no program on eth0: {}", daemon.log());
        Ok(())
    })
    .unwrap();
    assert_ne!(index_of(&cluster, "eth0"), before);
    daemon.wait_ready(cluster.apiservers.len()).unwrap();
    eventually(LIMIT, "it is alive", || {
        ensure!(daemon.is_alive()?, "it is not");
        Ok(())
    })
    .unwrap();
    require_served(&cluster);
    cluster.require_no_own_resets().unwrap();
    assert!(!daemon.flags().unwrap().contains("is gone"));
    let events = run(&mut daemon.command("events").unwrap()).unwrap();
    assert!(events.contains("interface eth0") && events.contains("is back"), "{events}");

    // The next one finds it where it is, and nothing of the one before.
    daemon.process().kill().unwrap();
    let daemon = cluster.balance().unwrap();
    require_served(&cluster);
    assert!(daemon.unload().unwrap().status.success());
    assert!(!has_xdp(&cluster.lb, "eth0").unwrap());
}

#[test]
fn an_own_vip_comes_back_with_its_interface() {
    let cluster = Cluster::start_without_vips(Shape::OneArm, 2).unwrap();
    let settings = cluster.settings_with_own_vips().unwrap();
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    daemon.wait_ready(cluster.apiservers.len()).unwrap();
    require_served(&cluster);
    let vips_are_here = || {
        let shown = cluster.lb.run("ip address show dev eth0")?;
        let missing = cluster.vips().into_iter().find(|vip| !shown.contains(&format!("{vip}/")));
        ensure!(missing.is_none(), "{missing:?} is not there: {shown}");
        Ok(())
    };
    vips_are_here().unwrap();

    let mac = cluster.lab.remove_link(&cluster.lb).unwrap();
    daemon.wait_flag("interface eth0 is gone", LIMIT).unwrap();
    cluster.lab.restore_link(&cluster.lb, &mac).unwrap();
    eventually(LIMIT, "the VIPs are back", vips_are_here).unwrap();
    require_served(&cluster);
    let events = run(&mut daemon.command("events").unwrap()).unwrap();
    for vip in cluster.vips() {
        assert!(events.contains(&format!("put the VIP {vip} back on eth0")), "{events}");
    }

    // From an interface that is set down the kernel takes the IPv6 addresses, also the host's own.
    let gone =
        format!("the VIP {} is not on this host any more, as eth0 is gone or was set down", cluster.vip6);
    let times = daemon.log().matches(&gone).count();
    cluster.lb.ip("link set eth0 down").unwrap();
    cluster.lb.ip("link set eth0 up").unwrap();
    let own = cluster.lb.address(cluster.vip6).unwrap();
    cluster.lb.ip(&format!("address add {own}/64 dev eth0 nodad")).unwrap();
    eventually(LIMIT, "it is noticed", || {
        ensure!(daemon.log().matches(&gone).count() > times, "{}", daemon.log());
        Ok(())
    })
    .unwrap();
    eventually(LIMIT, "the VIPs are back", vips_are_here).unwrap();
    require_served(&cluster);

    // What another program does is let be.
    cluster.lb.ip(&format!("address del {}/32 dev eth0", cluster.vip4)).unwrap();
    eventually(LIMIT, "it is noticed", || {
        let line =
            format!("the VIP {} is not on this host any more: another program has removed it", cluster.vip4);
        logged(&daemon, &line)
    })
    .unwrap();
    assert!(daemon.unload().unwrap().status.success());
    let shown = cluster.lb.run("ip address show dev eth0").unwrap();
    assert!(cluster.vips().iter().all(|vip| !shown.contains(&format!("{vip}/"))), "{shown}");
}

#[test]
fn pins_of_another_network_namespace_are_left_alone() {
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let mut daemon = cluster.balance().unwrap();
    daemon.process().kill().unwrap();
    // One that went on would run until it is told to stop.
    let mut elsewhere = cluster.client.command("timeout");
    elsewhere.arg("30").arg(daemon::program().unwrap()).arg("run").arg("--config").arg(config(&cluster));
    let Output { status, stderr, .. } = elsewhere.output().unwrap();
    let said = String::from_utf8_lossy(&stderr).into_owned();
    assert!(!status.success() && said.contains("another network namespace"), "{said}");
    require_served(&cluster);
}

#[test]
fn a_veth_whose_other_end_takes_nothing_at_once_is_named() {
    const WARNING: &str = "in another network namespace, has no XDP program";
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let daemon = cluster.balance().unwrap();
    let flags = daemon.flags().unwrap();
    assert!(!flags.contains("other end, "), "the lab's switch ports have a program: {flags}");
    let doctor = |level: &str| {
        let mut doctor = cluster.lb.command(daemon::program().unwrap());
        let found = doctor.args(["doctor", "--json", "--config"]).arg(config(&cluster)).output().unwrap();
        let found: serde_json::Value = serde_json::from_slice(&found.stdout).unwrap();
        let findings = found["findings"].as_array().unwrap();
        let is_it = |it: &&serde_json::Value| it["what"].as_str().is_some_and(|what| what.contains(WARNING));
        findings.iter().filter(is_it).filter(|it| it["level"] == level).count()
    };
    assert_eq!(doctor("warning"), 0);

    let mac = cluster.lab.remove_link(&cluster.lb).unwrap();
    daemon.wait_flag("interface eth0 is gone", LIMIT).unwrap();
    cluster.lab.restore_bare_link(&cluster.lb, &mac).unwrap();
    daemon.wait_flag(WARNING, LIMIT).unwrap();
    assert_eq!(doctor("warning"), 1);
    let reloaded = run(daemon.command("reload").unwrap().arg("--json")).unwrap();
    assert!(reloaded.contains(WARNING), "{reloaded}");
}

/// The pin of the program's link to the load balancer's eth0.
fn link_pin(cluster: &Cluster, daemon: &Daemon) -> Result<PathBuf> {
    let name = format!("link_{}", index_of(cluster, "eth0"));
    let layouts = std::fs::read_dir(daemon.pins())?;
    let mut pins = layouts.filter_map(Result::ok).map(|layout| layout.path().join(&name));
    pins.find(|pin| pin.exists()).with_context(|| format!("there is no {name}"))
}

#[test]
fn a_program_that_another_one_takes_off_is_put_back_and_flows_wait_for_it() {
    const TAKEN_OFF: &str = "another program has taken sheave off eth0";
    let arena = Arena::start(2, |_| {}).unwrap();
    let (cluster, daemon) = (&arena.cluster, &arena.daemon);
    let mut pairs: Vec<_> =
        cluster.vips().into_iter().flat_map(|vip| arena.open_and_exchange(vip, 5).unwrap()).collect();
    let rules = || cluster.lb.run("ip rule").unwrap() + &cluster.lb.run("ip -6 rule").unwrap();
    let rules_before = rules();
    detach(&link_pin(cluster, daemon).unwrap()).unwrap();
    eventually(LIMIT, "it is put back", || {
        logged(daemon, "sheave is attached to eth0 again")?;
        ensure!(has_xdp(&cluster.lb, "eth0")? && daemon.is_alive()?);
        Ok(())
    })
    .unwrap();
    assert!(exchange_all(&mut pairs).is_empty());
    eventually(LIMIT, "this host answers again", || {
        ensure!(rules() == rules_before, "{}", rules());
        Ok(())
    })
    .unwrap();

    // Where another has its place it stays there, and clients and servers wait.
    let mut foreign = Ebpf::load(OBJECT).unwrap();
    let other: &mut Xdp = foreign.program_mut("read_clock").unwrap().try_into().unwrap();
    other.load().unwrap();
    // A daemon that was not there lately is faster.
    let link = eventually(LIMIT, "the other program is sooner", || {
        detach(&link_pin(cluster, daemon)?)?;
        Ok(cluster.lb.in_namespace(|| other.attach("eth0", XdpMode::Skb))??)
    })
    .unwrap();
    daemon.wait_flag(TAKEN_OFF, LIMIT).unwrap();
    assert!(!daemon.is_alive().unwrap());
    for pair in &mut pairs {
        pair.client.write_all(b">").unwrap();
        pair.server.write_all(b"<").unwrap();
    }
    eventually(LIMIT, "a try found the other program there", || {
        logged(daemon, "cannot put sheave back on eth0")
    })
    .unwrap();
    assert!(cluster.lb.in_namespace(|| other.detach(link).is_ok()).unwrap(), "the other was left alone");
    for pair in &mut pairs {
        let mut received = [[0]; 2];
        for (stream, byte) in [&mut pair.server, &mut pair.client].into_iter().zip(&mut received) {
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            stream.read_exact(byte).unwrap();
        }
        assert_eq!(received, [*b">", *b"<"]);
    }
    assert!(daemon.is_alive().unwrap());
    assert!(!daemon.flags().unwrap().contains(TAKEN_OFF));
    assert!(exchange_all(&mut pairs).is_empty());
}
