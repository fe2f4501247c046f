//! Operating it: reload, drain, maintenance, flows, events, with the real daemon between real clients and servers.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::ensure;
use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::{Daemon, Settings, program},
    hold::{Holder, Order, SOME_AT_EACH},
    lab::{eventually, process::Signal, run},
    load::{self, Asker, Crowd, Report},
    stub::PORT,
    transfer::SlowTransfer,
};

/// More than anything here takes on a busy machine.
const MOMENT: Duration = Duration::from_secs(60);
/// A closed slot rests for a minute, and the table is looked through every few seconds.
const SLOT_RESTS: Duration = Duration::from_secs(120);

/// Writes another configuration where the daemon has its own.
fn write(cluster: &Cluster, text: &str) {
    fs::write(cluster.daemon_directory().join("sheave.toml"), text).unwrap();
}

fn write_settings(cluster: &Cluster, settings: &Settings) {
    write(cluster, &settings.to_toml(&cluster.daemon_directory()));
}

/// The usual settings, with only these apiservers.
fn only(cluster: &Cluster, names: &[&str]) -> Settings {
    let mut settings = cluster.settings().unwrap();
    settings.backends.retain(|(name, _)| names.contains(&name.as_str()));
    settings
}

/// Runs `sheave <command> <arguments>` against the daemon.
fn sheave(daemon: &Daemon, command: &str, arguments: &[&str]) -> Output {
    daemon.command(command).unwrap().args(arguments).output().unwrap()
}

/// The same, which must succeed; returns what it printed.
fn succeed(daemon: &Daemon, command: &str, arguments: &[&str]) -> String {
    run(daemon.command(command).unwrap().args(arguments)).unwrap()
}

/// The same, which must end with this code; returns what it complained about.
fn complain(daemon: &Daemon, command: &str, arguments: &[&str], code: i32) -> String {
    let output = sheave(daemon, command, arguments);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{command} {arguments:?}: {error}");
    error
}

/// Connections from the client that stay open, and the servers they are at.
fn crowd(cluster: &Cluster, vip: IpAddr, count: usize) -> (Crowd, Report) {
    let mut crowd = Crowd::open(&cluster.client, &cluster.client_of(vip).unwrap(), count).unwrap();
    let report = crowd.ask_names();
    report.require_all(count).unwrap();
    (crowd, report)
}

/// All of them are where they were.
fn require_unmoved((crowd, before): &mut (Crowd, Report)) {
    let now = crowd.ask_names();
    now.require_all(before.outcomes.len()).unwrap();
    assert_eq!(now.by_server(), before.by_server());
}

/// Asks through `vip`, all of which is answered, and never by `without`.
fn require_without(cluster: &Cluster, vip: IpAddr, without: &str) {
    let report = load::sequential(&cluster.client, &cluster.client_of(vip).unwrap(), 60).unwrap();
    report.require_all(60).unwrap();
    assert!(!report.by_server().contains_key(without), "{:?}", report.by_server());
}

#[test]
fn a_reload_exchanges_a_backend_and_nobody_notices() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let settings = only(&cluster, &["api-1", "api-2"]);
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    daemon.wait_ready(2).unwrap();
    let mut crowds = cluster.vips().map(|vip| crowd(&cluster, vip, 40));
    assert!(crowds.iter().all(|(_, report)| report.by_server().contains_key("api-1")));
    let transfers: Vec<_> = (cluster.vips().into_iter().chain(cluster.vips()))
        .map(|vip| SlowTransfer::start(&cluster, vip).unwrap())
        .collect();
    let askers = cluster.vips().map(|vip| {
        let client = cluster.client_of(vip).unwrap();
        Asker::start(&cluster.client, &client, 4, Duration::from_millis(10))
    });

    // There and back, a few times: api-1 comes back while its flows live on.
    for backends in [["api-2", "api-3"], ["api-1", "api-3"], ["api-2", "api-3"]] {
        write_settings(&cluster, &only(&cluster, &backends));
        let said = succeed(&daemon, "reload", &[]);
        assert!(said.contains("is new") && said.contains("is gone"), "{said}");
        daemon.wait_ready(2).unwrap();
    }
    let reloaded = Instant::now();
    for vip in cluster.vips() {
        require_without(&cluster, vip, "api-1");
    }
    crowds.iter_mut().for_each(require_unmoved);
    for asker in askers {
        let report = asker.stop();
        report.require_all(report.outcomes.len()).unwrap();
        let after = report.outcomes.into_iter().filter(|outcome| outcome.started > reloaded).collect();
        let after = Report { outcomes: after };
        let servers: Vec<_> = after.by_server().into_keys().collect();
        assert_eq!(servers, ["api-2", "api-3"]);
    }
    for transfer in transfers {
        transfer.finish().unwrap();
    }
    let status = daemon.status().unwrap();
    assert_eq!(status.states("api-1"), Vec::<&str>::new());
    let again = succeed(&daemon, "reload", &[]);
    assert!(again.contains("nothing to change"), "{again}");
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn a_reload_that_cannot_be_changes_nothing_and_says_why() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let mut daemon = cluster.balance().unwrap();
    let good = cluster.settings().unwrap().to_toml(&cluster.daemon_directory());
    let mut connections = crowd(&cluster, cluster.vip4, 20);
    let asker = Asker::start(
        &cluster.client,
        &cluster.client_of(cluster.vip4).unwrap(),
        2,
        Duration::from_millis(10),
    );

    let line = 1 + good.lines().count();
    write(&cluster, &format!("{good}colour = \"red\"\n"));
    let error = complain(&daemon, "reload", &[], 2);
    assert!(error.contains("unknown key \"colour\"") && error.contains(&format!(":{line}")), "{error}");
    fs::remove_file(cluster.daemon_directory().join("sheave.toml")).unwrap();
    let error = complain(&daemon, "reload", &[], 2);
    assert!(error.contains("cannot read the configuration"), "{error}");

    // Half of this file could be applied. It is not.
    let mut settings = only(&cluster, &["api-1"]);
    settings.dataplane.push("xdp_mode = \"generic\"".to_owned());
    write_settings(&cluster, &settings);
    let error = complain(&daemon, "reload", &[], 1);
    assert!(error.contains("dataplane.xdp_mode") && error.contains("restart"), "{error}");
    daemon.wait_ready(2).unwrap();

    // A signal has no answer, but a line in the log.
    daemon.process().signal(Signal::SIGHUP).unwrap();
    eventually(MOMENT, "the log says why", || {
        let told = daemon.log().matches("was not reloaded, nothing has changed").count();
        ensure!(told == 4, "{told} refusals");
        Ok(())
    })
    .unwrap();
    write_settings(&cluster, &only(&cluster, &["api-1"]));
    daemon.process().signal(Signal::SIGHUP).unwrap();
    daemon.wait_ready(1).unwrap();
    require_without(&cluster, cluster.vip4, "api-2");
    require_unmoved(&mut connections);
    let report = asker.stop();
    report.require_all(report.outcomes.len()).unwrap();
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn listeners_come_and_go_and_their_connections_stay() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let daemon = cluster.balance().unwrap();
    let before = cluster.settings().unwrap();
    let mut old = crowd(&cluster, cluster.vip4, 20);
    let refused_at = |port: u16| {
        let url = format!("https://{}/name", SocketAddr::new(cluster.vip4, port));
        let mut curl = cluster.client.command("curl");
        curl.args(["--silent", "--max-time", "20", "--cacert"]).arg(cluster.ca_file()).arg(url);
        let code = curl.output().unwrap().status.code();
        assert!(matches!(code, Some(0 | 7)), "{code:?}: served or refused, nothing else");
        code == Some(7)
    };
    assert!(refused_at(9345));
    let own_resets = cluster.own_resets().unwrap();
    assert_eq!(own_resets, 1, "not sheave's port yet: the kernel refused");

    let mut settings = before.clone();
    settings.listen.push(SocketAddr::new(cluster.vip4, 9345));
    write_settings(&cluster, &settings);
    let said = succeed(&daemon, "reload", &[]);
    assert!(said.contains(":9345 is new"), "{said}");
    assert!(!refused_at(9345));

    settings.listen.retain(|listener| listener.port() == 9345 || listener.is_ipv6());
    write_settings(&cluster, &settings);
    succeed(&daemon, "reload", &[]);
    assert!(refused_at(6443), "no new connections");
    assert!(!refused_at(9345));
    require_unmoved(&mut old);

    write_settings(&cluster, &before);
    succeed(&daemon, "reload", &[]);
    assert!(!refused_at(6443), "it came back");
    require_unmoved(&mut old);
    // A listener without connections is soon nobody's: its number is another's then, its port the host's again.
    for port in [9000, 9001] {
        let mut settings = before.clone();
        settings.listen.push(SocketAddr::new(cluster.vip4, port));
        write_settings(&cluster, &settings);
        succeed(&daemon, "reload", &[]);
        assert!(port == 9000 || !refused_at(port));
        write_settings(&cluster, &before);
        succeed(&daemon, "reload", &[]);
        if port == 9000 {
            let ended = format!("the last flow of the removed listener {}:{port} has ended", cluster.vip4);
            eventually(MOMENT, "the listener is unlinked", || {
                ensure!(daemon.log().contains(&ended));
                Ok(())
            })
            .unwrap();
            assert_eq!(cluster.own_resets().unwrap(), own_resets);
            assert!(refused_at(port));
            assert_eq!(cluster.own_resets().unwrap(), own_resets + 1, "by the host itself");
        }
    }
    require_unmoved(&mut old);
    // Whose connections were not by name but by service: the service gets another name, and keeps them.
    let renamed =
        before.to_toml(&cluster.daemon_directory()).replace("name = \"kube-apiserver\"", "name = \"api\"");
    write(&cluster, &renamed);
    succeed(&daemon, "reload", &[]);
    assert!(!refused_at(6443));
    require_unmoved(&mut old);
    assert_eq!(cluster.own_resets().unwrap(), own_resets + 1);
}

#[test]
fn a_listener_does_not_take_the_port_of_a_flow() {
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let daemon = cluster.balance().unwrap();
    let mut old = crowd(&cluster, cluster.vip4, 1);
    let flow = flows(&daemon, &[]).into_iter().find(|flow| flow["service"] == "kube-apiserver").unwrap();
    let slot: SocketAddr = flow["source"].as_str().unwrap().parse().unwrap();

    let mut settings = cluster.settings().unwrap();
    settings.listen.push(SocketAddr::new(cluster.vip4, slot.port()));
    write_settings(&cluster, &settings);
    let error = complain(&daemon, "reload", &[], 1);
    let client = flow["client"].as_str().unwrap();
    assert!(error.contains(&format!("port {} is in use", slot.port())) && error.contains(client), "{error}");
    require_unmoved(&mut old);

    drop(old);
    eventually(SLOT_RESTS, "the listener opens when the slot is free", || {
        run(&mut daemon.command("reload")?).map(drop)
    })
    .unwrap();
    let url = format!("https://{slot}/name");
    let mut curl = cluster.client.command("curl");
    run(curl.args(["--silent", "--max-time", "20", "--cacert"]).arg(cluster.ca_file()).arg(url)).unwrap();
}

#[test]
fn a_drained_backend_keeps_its_connections_and_gets_no_more() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let mut daemon = cluster.balance().unwrap();
    let mut crowds = cluster.vips().map(|vip| crowd(&cluster, vip, 30));

    let error = complain(&daemon, "drain", &["api-1"], 2);
    assert!(error.contains("kube-apiserver/api-1") && error.contains("--all-services"), "{error}");
    let error = complain(&daemon, "drain", &["api-9"], 2);
    assert!(error.contains("there is no backend \"api-9\"") && error.contains("api-2"), "{error}");

    let said = succeed(&daemon, "drain", &["api-1", "--all-services"]);
    assert_eq!(said.matches("is drain").count(), 2, "{said}");
    assert_eq!(daemon.status().unwrap().states("api-1"), ["drain", "drain"]);
    for vip in cluster.vips() {
        require_without(&cluster, vip, "api-1");
    }
    crowds.iter_mut().for_each(require_unmoved);

    // Nobody else: the drained one is better than none, one in maintenance is not.
    let said = succeed(&daemon, "maint", &["api-2", "--all-services"]);
    assert!(said.contains("warning: ") && said.contains("drained ones"), "{said}");
    for vip in cluster.vips() {
        require_without(&cluster, vip, "api-2");
    }
    succeed(&daemon, "maint", &["api-1", "--all-services"]);
    for vip in cluster.vips() {
        let curl = cluster.curl(vip, "/name").output().unwrap();
        assert_eq!(curl.status.code(), Some(7), "refused at once: {curl:?}");
    }
    crowds.iter_mut().for_each(require_unmoved);
    for name in ["api-1", "api-2"] {
        succeed(&daemon, "ready", &[name, "--all-services"]);
    }
    daemon.wait_ready(2).unwrap();

    let address = only(&cluster, &["api-2"]).backends[0].1.to_string();
    let said = succeed(&daemon, "weight", &[&address, "0"]);
    assert!(said.contains("weight 0"), "{said}");
    require_without(&cluster, cluster.vip4, "api-2");
    succeed(&daemon, "weight", &[&address, "configured"]);
    let report = load::sequential(&cluster.client, &cluster.client_of(cluster.vip4).unwrap(), 60).unwrap();
    assert!(report.by_server().contains_key("api-2"), "{:?}", report.by_server());
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn what_the_operator_said_and_what_happened_is_known_after_a_crash() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let mut daemon = cluster.balance().unwrap();
    succeed(&daemon, "drain", &["api-1", "--all-services"]);
    succeed(&daemon, "weight", &["api-2", "7", "--service", "kube-apiserver"]);
    daemon.process().kill().unwrap();

    let mut daemon =
        Daemon::start(&cluster.lb, cluster.lab.directory(), &cluster.settings().unwrap()).unwrap();
    daemon.wait_state("api-2", "ready", MOMENT).unwrap();
    assert_eq!(daemon.status().unwrap().states("api-1"), ["drain", "drain"]);
    for vip in cluster.vips() {
        require_without(&cluster, vip, "api-1");
    }
    let events = succeed(&daemon, "events", &[]);
    let told = |what: &str| assert!(events.contains(what), "{what:?} is missing in\n{events}");
    told("kube-apiserver/api-1 was drained: no new flows, unless there is nobody else, by root");
    told("kube-apiserver/api-2 was given weight 7, by root");
    told("Server kube-apiserver/api-2 is UP");
    told("began to balance");
    told("goes on from where another ended");
    let json: serde_json::Value =
        serde_json::from_str(&succeed(&daemon, "events", &["--json", "--last", "3"])).unwrap();
    assert_eq!(json.as_array().unwrap().len(), 3);

    // A backend that leaves the configuration takes its orders with it.
    write_settings(&cluster, &only(&cluster, &["api-2"]));
    succeed(&daemon, "reload", &[]);
    write_settings(&cluster, &cluster.settings().unwrap());
    succeed(&daemon, "reload", &[]);
    daemon.wait_ready(2).unwrap();
}

/// `sheave flows --json`, as values.
fn flows(daemon: &Daemon, arguments: &[&str]) -> Vec<serde_json::Value> {
    let lines = succeed(daemon, "flows", &[&["--json"], arguments].concat());
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn flows_are_listed_with_their_clients_and_backends() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let daemon = cluster.balance().unwrap();
    let crowds = cluster.vips().map(|vip| crowd(&cluster, vip, 700));
    for (vip, (_, report)) in cluster.vips().into_iter().zip(&crowds) {
        let service = if vip.is_ipv4() { "kube-apiserver" } else { "kube-apiserver-v6" };
        let client = cluster.client.address(vip).unwrap();
        let mut seen = 0;
        for (server, count) in report.by_server() {
            let listed = flows(&daemon, &["--service", service, "--backend", server]);
            assert_eq!(listed.len(), count, "{service} {server}");
            seen += count;
            for flow in listed {
                assert_eq!((&flow["backend"], &flow["state"]), (&server.into(), &"established".into()));
                let from: SocketAddr = flow["client"].as_str().unwrap().parse().unwrap();
                assert_eq!(from.ip(), client);
            }
        }
        assert_eq!(seen, 700);
        assert_eq!(flows(&daemon, &["--client", &client.to_string()]).len(), 700);
    }
    assert!(flows(&daemon, &["--min-age", "1h"]).is_empty());
    eventually(MOMENT, "all of them are a second old", || {
        let listed = flows(&daemon, &["--min-age", "1s", "--service", "kube-apiserver"]);
        ensure!(listed.len() == 700, "{} of 700", listed.len());
        Ok(())
    })
    .unwrap();
    assert!(flows(&daemon, &["--client", "192.0.2.1"]).is_empty());
    let table = succeed(&daemon, "flows", &["--service", "kube-apiserver"]);
    assert!(table.starts_with("CLIENT") && table.lines().count() == 701, "{}", &table[..200]);
    let error = complain(&daemon, "flows", &["--backend", "api-9"], 2);
    assert!(error.contains("api-9") && error.contains("api-1"), "{error}");
    // A reader that has enough is no failure.
    let mut command = daemon.command("flows").unwrap();
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0; 100]).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}

/// Asks for the status as user and group 65534.
fn ask_as_nobody(daemon_socket: &std::path::Path) -> Output {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "curl", "--silent", "--show-error"]);
    command.args(["--max-time", "10", "--unix-socket"]).arg(daemon_socket);
    command.arg("http://sheave/v1/events").output().unwrap()
}

#[test]
fn only_root_and_the_named_group_may_use_the_admin_socket() {
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let daemon = cluster.balance().unwrap();
    for path in [cluster.lab.directory(), &cluster.daemon_directory()] {
        // As /run and /run/sheave are.
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let socket = daemon.socket().to_owned();
    let refused = ask_as_nobody(&socket);
    assert_eq!(refused.status.code(), Some(7), "{refused:?}");
    // And nothing that root's clients do wrong keeps others from their answers.
    let _silent: Vec<_> = (0..40).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let mut garbage = UnixStream::connect(&socket).unwrap();
    garbage.write_all(&[0xff; 4096]).unwrap();
    assert!(succeed(&daemon, "events", &[]).contains("began to balance"));
    assert!(daemon.stop().unwrap().success());

    let toml = cluster.settings().unwrap().to_toml(&cluster.daemon_directory());
    write(&cluster, &toml.replace("[admin]\n", "[admin]\ngroup = \"nogroup\"\n"));
    let mut command = cluster.lb.command(program().unwrap());
    command.arg("run").arg("--config").arg(cluster.daemon_directory().join("sheave.toml"));
    let _daemon = cluster.lb.start("sheave-of-a-group", command).unwrap();
    eventually(MOMENT, "the group is served", || {
        let answer = ask_as_nobody(&socket);
        let text = String::from_utf8_lossy(&answer.stdout).into_owned();
        ensure!(text.contains("began to balance"), "{answer:?}");
        Ok(())
    })
    .unwrap();
}

/// How many of these connections still answer.
fn alive(crowd: &mut Crowd) -> usize {
    crowd.ask_names().outcomes.iter().filter(|outcome| outcome.result.is_ok()).count()
}

#[test]
fn a_drained_backend_keeps_its_connections_until_its_time_is_over() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let daemon = cluster.balance().unwrap();
    let (mut both, before) = crowd(&cluster, cluster.vips()[0], 40);
    let drained = before.by_server()["api-1"];
    let said = succeed(&daemon, "drain", &["api-1", "--all-services"]);
    assert!(!said.contains("are reset in"), "without a timeout nobody is ever reset: {said}");
    let said = complain(&daemon, "ready", &["api-1", "--timeout", "1s"], 2);
    assert!(said.contains("unexpected argument"), "who is handed back keeps its flows: {said}");

    let said = succeed(&daemon, "drain", &["api-1", "--all-services", "--timeout", "1s"]);
    assert!(said.contains("are reset in"), "{said}");
    wait_flows_gone(&daemon, "api-1");
    assert_eq!(alive(&mut both), 40 - drained, "those of others, and only those");
    let said = succeed(&daemon, "drain", &["api-1", "--all-services"]);
    assert!(!said.contains("are reset in"), "it was done once: {said}");
}

#[test]
fn a_drained_backend_loses_the_sockets_of_this_host_wherever_the_vip_is() {
    // A worker that dials the VIP, and a load balancer that waits for it.
    for worker in [true, false] {
        let cluster = Cluster::start_without_vips(Shape::OneArm, 2).unwrap();
        let mut settings = cluster.settings().unwrap();
        if worker {
            settings.dataplane.push("interfaces = []".to_owned());
        }
        let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
        daemon.wait_ready(2).unwrap();
        let vip = SocketAddr::new(cluster.vip4, PORT);
        let mut holder = Holder::start(&cluster.lb, true, &cluster.ca_file(), vip).unwrap();
        holder.order(Order::Open(SOME_AT_EACH)).unwrap();
        assert!(holder.opened_to("api-1") > 0);
        succeed(&daemon, "drain", &["api-1", "--all-services", "--timeout", "1s"]);
        eventually(MOMENT, "its connections are ended", || {
            let (ended, opened) = (holder.ended().len(), holder.opened_to("api-1"));
            ensure!(ended == opened, "{ended} of {opened}");
            Ok(())
        })
        .unwrap();
        assert!(holder.ended().iter().all(|(of, _)| of.as_deref() == Some("api-1")));
        let end = if worker {
            "the flows it still has are reset"
        } else {
            "the flows of this host's processes are reset, those of others left to the host that has the VIP"
        };
        let told = |daemon: &Daemon| times(daemon, &format!("api-1: the time to drain is over; {end}")).len();
        eventually(MOMENT, "it is said for each service", || {
            ensure!(told(&daemon) == 2);
            Ok(())
        })
        .unwrap();
        // What is done is done; what waits for the VIP is said once, and done when that comes.
        if worker {
            eventually(MOMENT, "nothing is left to do", || {
                ensure!(
                    daemon.log().contains("flows of kube-apiserver/api-1 were reset"),
                    "{}",
                    daemon.log()
                );
                Ok(())
            })
            .unwrap();
        } else {
            cluster.vips().into_iter().for_each(|vip| cluster.lb.add_vip(vip).unwrap());
            eventually(MOMENT, "the flows of others are reset, too", || {
                let told =
                    times(&daemon, "the time to drain is over; the flows it still has are reset").len();
                ensure!(told == 2, "{told}");
                Ok(())
            })
            .unwrap();
        }
        assert_eq!(told(&daemon), 2);
    }
}

/// Whether the last check of a backend found nobody, in every service that has it.
fn require_silent_checks(daemon: &Daemon, backend: &str) -> anyhow::Result<()> {
    let status = daemon.status()?;
    let backends = status.services.iter().flat_map(|service| &service.backends);
    for check in backends.filter(|it| it.name == backend).map(|it| &it.check) {
        let code = check.as_ref().and_then(|check| check.code.as_deref());
        ensure!(code.is_some_and(|code| code.ends_with("TOUT")), "{check:?}");
    }
    Ok(())
}

#[test]
fn a_backend_that_an_operator_has_taken_out_keeps_its_flows_however_long_it_is_silent() {
    const RESET_AFTER: Duration = Duration::from_secs(2);
    for order in ["maint", "drain"] {
        let mut cluster = Cluster::start(Shape::OneArm, 3).unwrap();
        let mut settings = cluster.settings().unwrap();
        settings.service.push(format!("reset_after = \"{}s\"", RESET_AFTER.as_secs()));
        settings.check = ["interval = \"300ms\"", "fast_interval = \"100ms\"", "connect_timeout = \"500ms\""]
            .map(str::to_owned)
            .to_vec();
        settings.check.push("timeout = \"2s\"".to_owned());
        let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
        daemon.wait_ready(3).unwrap();
        let mut crowds = cluster.vips().map(|vip| crowd(&cluster, vip, 30));
        assert!(crowds.iter().all(|(_, report)| report.by_server().contains_key("api-1")));
        // A process of this host, by the connect hook.
        let vip = SocketAddr::new(cluster.vip4, PORT);
        let mut holder = Holder::start(&cluster.lb, true, &cluster.ca_file(), vip).unwrap();
        holder.order(Order::Open(SOME_AT_EACH)).unwrap();
        assert!(holder.opened_to("api-1") > 0);
        let before = cluster.client_resets().unwrap();
        succeed(&daemon, order, &["api-1", "--all-services"]);

        cluster.apiserver("api-1").unwrap().stub.freeze().unwrap();
        eventually(MOMENT, "its checks find nobody", || require_silent_checks(&daemon, "api-1")).unwrap();
        let since = Instant::now();
        while since.elapsed() < 3 * RESET_AFTER {
            assert_eq!(daemon.status().unwrap().states("api-1"), [order, order], "{}", daemon.log());
            assert_eq!(cluster.client_resets().unwrap(), before, "{order}: {}", daemon.log());
        }
        require_silent_checks(&daemon, "api-1").unwrap();
        cluster.apiserver("api-1").unwrap().stub.thaw().unwrap();
        crowds.iter_mut().for_each(require_unmoved);
        holder.catch_up().unwrap();
        assert_eq!(holder.ended(), [], "{order}");
        succeed(&daemon, "ready", &["api-1", "--all-services"]);
        daemon.wait_ready(3).unwrap();
        cluster.require_no_own_resets().unwrap();
    }
}

/// Waits until the time of a backend is over, and its flows are reset for it.
fn wait_flows_gone(daemon: &Daemon, backend: &str) {
    let over = format!("{backend}: the time to drain is over");
    eventually(MOMENT, "the time is over", || {
        let events = succeed(daemon, "events", &[]);
        ensure!(events.contains(&over), "{events}");
        Ok(())
    })
    .unwrap();
    eventually(MOMENT, "its flows are gone", || {
        let left = succeed(daemon, "flows", &["--backend", backend, "--json"]);
        ensure!(!left.contains("established"), "{left}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn the_time_is_the_orders_and_else_the_configurations() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let mut settings = cluster.settings().unwrap();
    settings.service = vec!["drain_timeout = \"1h\"".to_owned()];
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    daemon.wait_ready(3).unwrap();
    let (mut all, before) = crowd(&cluster, cluster.vip4, 60);
    let at = |server: &str| before.by_server()[server];
    let seconds = |said: &str| -> u64 {
        let (_, rest) = said.split_once("are reset in ").unwrap_or_else(|| panic!("{said}"));
        rest.split_once(' ').unwrap().0.parse().unwrap()
    };

    // The configuration's, where the order has none; both for drain and for maint.
    for order in ["drain", "maint"] {
        let said = succeed(&daemon, order, &["api-1", "--service", "kube-apiserver"]);
        assert!((3500..=3600).contains(&seconds(&said)), "{said}");
        assert_eq!(alive(&mut all), 60, "an hour has not passed");
    }
    // The order's own goes before it.
    let said = succeed(&daemon, "maint", &["api-1", "--service", "kube-apiserver", "--timeout", "1s"]);
    assert!(seconds(&said) <= 1, "{said}");
    wait_flows_gone(&daemon, "api-1");
    assert_eq!(alive(&mut all), 60 - at("api-1"), "those of others, and only those");

    settings.service = vec!["drain_timeout = \"1s\"".to_owned()];
    assert!(daemon.reload(&settings).unwrap().status.success());
    let said = succeed(&daemon, "drain", &["api-2", "--service", "kube-apiserver", "--timeout", "1h"]);
    assert!(seconds(&said) > 3500, "{said}");
    let said = succeed(&daemon, "drain", &["api-3", "--service", "kube-apiserver"]);
    assert!(seconds(&said) <= 1, "{said}");
    // api-3 has a second; nobody else is left but one who is drained as well, and has an hour.
    succeed(&daemon, "ready", &["api-1", "--service", "kube-apiserver"]);
    wait_flows_gone(&daemon, "api-3");
    assert_eq!(alive(&mut all), at("api-2"));
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn an_operator_ends_the_flows_of_a_client_or_a_backend_and_no_others() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let daemon = cluster.balance().unwrap();
    for vip in cluster.vips() {
        let (mut crowd, before) = crowd(&cluster, vip, 30);
        let at_first = before.by_server()["api-1"];
        // One, as `sheave flows` shows it.
        let listed = succeed(&daemon, "flows", &["--backend", "api-1", "--json"]);
        let flows: Vec<serde_json::Value> =
            listed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let established: Vec<_> = flows
            .iter()
            .filter(|flow| {
                flow["state"] == "established" && flow["listener"].as_str().unwrap().starts_with(&host(vip))
            })
            .collect();
        let client = established[0]["client"].as_str().unwrap();
        assert_eq!(succeed(&daemon, "kill", &["--client", client]), "1 flow was reset\n");
        assert_eq!(alive(&mut crowd), 29);
        // All of a backend's, of both families.
        let said = succeed(&daemon, "kill", &["api-1", "--all-services"]);
        assert_eq!(
            said,
            format!("{} flow{} reset\n", at_first - 1, if at_first == 2 { " was" } else { "s were" })
        );
        assert_eq!(alive(&mut crowd), 30 - at_first);
        let left = crowd.ask_names();
        assert!(!left.by_server().contains_key("api-1"), "{:?}", left.by_server());
    }
    assert_eq!(succeed(&daemon, "kill", &["--client", "192.0.2.1"]), "0 flows were reset\n");
    let events = succeed(&daemon, "events", &[]);
    assert!(events.contains("at api-1 were reset, by root"), "{events}");
    for (arguments, what) in [
        (&["api-9"][..], "there is no backend"),
        (&["--client", "node-7"], "is no client"),
        (&["--client", "192.0.2.1", "--service", "etcd"], "there is no service"),
        (&[], "required"),
    ] {
        let said = complain(&daemon, "kill", arguments, 2);
        assert!(said.contains(what), "{arguments:?}: {said}");
    }
}

/// As it begins an address and port.
fn host(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => format!("{address}:"),
        IpAddr::V6(address) => format!("[{address}]:"),
    }
}

/// When events that say this happened, since 1970.
fn times(daemon: &Daemon, what: &str) -> Vec<Duration> {
    let events: serde_json::Value = serde_json::from_str(&succeed(daemon, "events", &["--json"])).unwrap();
    let said = |event: &&serde_json::Value| event["text"].as_str().unwrap().contains(what);
    let time = |event: &serde_json::Value| Duration::from_millis(event["time_ms"].as_u64().unwrap());
    events.as_array().unwrap().iter().filter(said).map(time).collect()
}

/// `api-1` is drained, and its connections through both VIPs have so long.
struct Draining {
    crowds: [(Crowd, Report); 2],
    resets: u64,
    ordered: Instant,
    timeout: Duration,
}

impl Draining {
    fn begin(cluster: &Cluster, daemon: &Daemon, timeout: Duration) -> Self {
        let crowds = cluster.vips().map(|vip| crowd(cluster, vip, 30));
        let (resets, ordered) = (cluster.client_resets().unwrap(), Instant::now());
        let seconds = format!("{}s", timeout.as_secs());
        succeed(daemon, "drain", &["api-1", "--all-services", "--timeout", &seconds]);
        Self { crowds, resets, ordered, timeout }
    }

    /// Its flows are reset, and nobody else's, and not before their time.
    fn wait_over(&mut self, cluster: &Cluster) {
        let drained: usize = self.crowds.iter().map(|(_, report)| report.by_server()["api-1"]).sum();
        eventually(MOMENT, "the flows of the drained one are reset", || {
            let (reset, elapsed) = (cluster.client_resets().unwrap() - self.resets, self.ordered.elapsed());
            assert!(reset == 0 || elapsed >= self.timeout, "{reset} after {elapsed:?}");
            ensure!(reset == drained as u64, "{reset} of {drained}");
            Ok(())
        })
        .unwrap();
        for (crowd, before) in &mut self.crowds {
            assert_eq!(alive(crowd), before.by_server()["api-2"]);
        }
        cluster.require_no_own_resets().unwrap();
    }
}

#[test]
fn the_time_of_a_drained_backend_goes_on_while_the_daemon_is_dead() {
    const TIMEOUT: Duration = Duration::from_secs(12);
    /// Nobody is there for half of it: a clock that began anew would be late by so much.
    const ABSENCE: Duration = Duration::from_secs(6);
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let mut daemon = cluster.balance().unwrap();
    let mut draining = Draining::begin(&cluster, &daemon, TIMEOUT);
    daemon.process().kill().unwrap();
    std::thread::sleep(ABSENCE);

    let mut daemon =
        Daemon::start(&cluster.lb, cluster.lab.directory(), &cluster.settings().unwrap()).unwrap();
    daemon.wait_state("api-2", "ready", MOMENT).unwrap();
    assert_eq!(daemon.status().unwrap().states("api-1"), ["drain", "drain"]);
    draining.wait_over(&cluster);
    let began_again = *times(&daemon, "goes on from where another ended").last().unwrap();
    let over = times(&daemon, "api-1: the time to drain is over");
    assert_eq!(over.len(), 2, "once a service");
    for over in over {
        assert!(over < began_again + TIMEOUT, "the time began anew: {over:?} after {began_again:?}");
    }
}

#[test]
fn the_time_of_a_drained_backend_is_its_own_also_when_it_is_removed() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let daemon = cluster.balance().unwrap();
    let mut draining = Draining::begin(&cluster, &daemon, Duration::from_secs(8));
    let mut settings = cluster.settings().unwrap();
    settings.backends.retain(|(name, _)| name != "api-1");
    let said = daemon.reload(&settings).unwrap();
    assert!(said.status.success(), "{said:?}");
    draining.wait_over(&cluster);
}

/// Ends flows so slowly that something may happen meanwhile.
fn slow(cluster: &Cluster) -> Settings {
    let mut settings = cluster.settings().unwrap();
    settings.service.push("reset_rate = 5".to_owned());
    settings
}

#[test]
fn a_daemon_that_is_killed_while_it_ends_flows_goes_on_with_the_rest() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let settings = slow(&cluster);
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    daemon.wait_ready(2).unwrap();
    let (mut both, before) = crowd(&cluster, cluster.vip4, 60);
    let (drained, at_first) = (before.by_server()["api-1"] as u64, cluster.client_resets().unwrap());
    succeed(&daemon, "drain", &["api-1", "--all-services", "--timeout", "1s"]);
    eventually(MOMENT, "some are reset", || {
        ensure!(cluster.client_resets()? > at_first);
        Ok(())
    })
    .unwrap();
    daemon.process().kill().unwrap();
    let done = cluster.client_resets().unwrap() - at_first;
    assert!(done < drained, "it was to be killed in the middle: {done} of {drained}");

    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    daemon.wait_state("api-2", "ready", MOMENT).unwrap();
    eventually(MOMENT, "all are reset", || {
        let done = cluster.client_resets()? - at_first;
        ensure!(done == drained, "{done} of {drained}");
        Ok(())
    })
    .unwrap();
    assert_eq!(alive(&mut both) as u64, 60 - drained);
    // And then it is done: a later daemon does not begin anew.
    eventually(MOMENT, "the order is carried out", || {
        let orders = fs::read_to_string(cluster.daemon_directory().join("state/orders.json"))?;
        ensure!(orders.contains("api-1") || orders.contains(":6443"), "{orders}");
        ensure!(orders.matches("\"reset_at\": null").count() == 2, "{orders}");
        Ok(())
    })
    .unwrap();
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn a_drained_backend_keeps_its_flows_while_there_is_nobody_else() {
    let mut cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &slow(&cluster)).unwrap();
    daemon.wait_ready(2).unwrap();
    let (_both, before) = crowd(&cluster, cluster.vip4, 120);
    assert!(before.by_server()["api-1"] > 30);
    succeed(&daemon, "drain", &["api-1", "--all-services", "--timeout", "1s"]);
    let left = |daemon: &Daemon| {
        let flows = flows(daemon, &["--backend", "api-1", "--service", "kube-apiserver"]);
        flows.iter().filter(|flow| flow["state"] == "established").count()
    };
    eventually(MOMENT, "some are reset", || {
        ensure!(left(&daemon) < before.by_server()["api-1"]);
        Ok(())
    })
    .unwrap();
    cluster.apiserver("api-2").unwrap().stub.kill().unwrap();
    eventually(MOMENT, "there is nobody else", || {
        let table = daemon.status_table()?;
        ensure!(table.matches("new flows go to drained ones").count() == 2, "{table}");
        Ok(())
    })
    .unwrap();
    let kept = left(&daemon);
    assert!(kept > 0, "it was to happen in the middle");
    // At their rate all would be gone in this time.
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(5) {
        assert_eq!(left(&daemon), kept);
    }
    cluster.apiserver("api-2").unwrap().start().unwrap();
    eventually(2 * MOMENT, "all are reset", || {
        let left = left(&daemon);
        ensure!(left == 0, "{left} are left");
        Ok(())
    })
    .unwrap();
}

#[test]
fn many_flows_are_killed_at_once_and_those_of_a_removed_backend_by_its_address() {
    const MANY: usize = 600;
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let mut daemon = cluster.balance().unwrap();
    daemon.wait_ready(2).unwrap();
    let (mut both, before) = crowd(&cluster, cluster.vip4, MANY);
    let removed = before.by_server()["api-1"];
    write_settings(&cluster, &only(&cluster, &["api-2"]));
    succeed(&daemon, "reload", &[]);
    let address =
        SocketAddr::new(cluster.apiservers[0].host.address(cluster.vip4).unwrap(), 6443).to_string();
    let error = complain(&daemon, "kill", &[&address, "--service", "etcd"], 2);
    assert!(error.contains("there is no service \"etcd\""), "{error}");
    let said = succeed(&daemon, "kill", &[&address, "--service", "kube-apiserver-v6"]);
    assert_eq!(said, "0 flows were reset\n", "they are of another service");
    let said = succeed(&daemon, "kill", &[&address, "--service", "kube-apiserver"]);
    assert_eq!(said, format!("{removed} flows were reset\n"));
    assert_eq!(alive(&mut both), MANY - removed);

    // More than are done in one go.
    let mut more: Vec<_> = (0..3).map(|_| crowd(&cluster, cluster.vip4, MANY).0).collect();
    let client = cluster.client.address(cluster.vip4).unwrap().to_string();
    let said = succeed(&daemon, "kill", &["--client", &client]);
    assert_eq!(said, format!("{} flows were reset\n", 4 * MANY - removed));
    assert_eq!(alive(&mut both) + more.iter_mut().map(alive).sum::<usize>(), 0);
    cluster.require_no_own_resets().unwrap();
}

#[test]
fn a_signal_to_reload_during_a_reload_is_not_lost() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    let settings = only(&cluster, &["api-1"]);
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    daemon.wait_ready(1).unwrap();
    // The first check of the other takes a second, for which a reload waits.
    cluster.apiservers[1].host.cut_off().unwrap();
    write_settings(&cluster, &cluster.settings().unwrap());
    daemon.process().signal(Signal::SIGHUP).unwrap();
    eventually(MOMENT, "it waits for the other's check", || {
        ensure!(!daemon.status()?.states("api-2").is_empty());
        Ok(())
    })
    .unwrap();
    let mut last = settings.clone();
    last.listen.push(SocketAddr::new(cluster.vip4, 9345));
    write_settings(&cluster, &last);
    daemon.process().signal(Signal::SIGHUP).unwrap();
    eventually(MOMENT, "the last file is in force", || {
        let table = daemon.status_table()?;
        ensure!(table.contains(":9345") && !table.contains("api-2"), "{table}");
        Ok(())
    })
    .unwrap();
    assert!(!daemon.log().contains("was not reloaded"), "{}", daemon.log());
}

/// What one of several operators orders, again and again; the last order stands.
type Orders<'a> = &'a [&'a [&'a str]];

/// Gives orders in turn, and returns what was refused: a code, and why. On a machine that is too busy for an answer in
/// time the order is given again, as an operator would: it can be given twice, it has the same end.
fn give(daemon: &Daemon, orders: Orders<'_>, rounds: usize) -> Vec<(Option<i32>, String)> {
    let once = |order: &[&str]| {
        let output = sheave(daemon, order[0], &order[1..]);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!error.contains("did not answer in time"), "{order:?}: {error}");
        Ok((!output.status.success()).then_some((output.status.code(), error)))
    };
    let all = std::iter::repeat_n(orders, rounds).flatten();
    all.filter_map(|order| eventually(MOMENT, "an answer", || once(order)).unwrap()).collect()
}

/// `state` and `weight` of a backend in every service.
fn ordered(daemon: &Daemon, backend: &str) -> Vec<(String, u64)> {
    let output = sheave(daemon, "status", &["--json"]);
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let services = status["services"].as_array().unwrap();
    let backends = services.iter().flat_map(|service| service["backends"].as_array().unwrap());
    backends
        .filter(|it| it["name"] == backend)
        .map(|it| (it["state"].as_str().unwrap().to_owned(), it["weight"].as_u64().unwrap()))
        .collect()
}

#[test]
fn many_operators_at_once_are_all_obeyed_and_nobody_else_notices() {
    const ROUNDS: usize = 10;
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let mut daemon = cluster.balance().unwrap();
    let mut crowds = cluster.vips().map(|vip| crowd(&cluster, vip, 30));
    let before = cluster.client_resets().unwrap();
    let askers = cluster.vips().map(|vip| {
        let client = cluster.client_of(vip).unwrap();
        Asker::start(&cluster.client, &client, 2, Duration::from_millis(10))
    });
    let mut more = cluster.settings().unwrap();
    more.listen.push(SocketAddr::new(cluster.vip4, 9345));
    let files = [&cluster.settings().unwrap(), &more].map(|it| it.to_toml(&cluster.daemon_directory()));

    let orders: [Orders<'_>; 7] = [
        &[&["ready", "api-1", "--all-services"], &["drain", "api-1", "--all-services"]],
        &[&["drain", "api-2", "--all-services", "--timeout", "1h"], &["ready", "api-2", "--all-services"]],
        &[&["weight", "api-1", "configured", "--all-services"], &["weight", "api-1", "7", "--all-services"]],
        &[&["weight", "api-2", "0", "--all-services"], &["weight", "api-2", "configured", "--all-services"]],
        &[&["reload"]],
        &[&["flows", "--json"], &["events", "--json"]],
        &[&["kill", "--client", "192.0.2.1"]],
    ];
    std::thread::scope(|scope| {
        let daemon = &daemon;
        let operators = orders.map(|orders| scope.spawn(move || give(daemon, orders, ROUNDS)));
        // Another one changes the file between two reloads of its own, whole each time.
        let editor = scope.spawn(|| {
            let mut refused = Vec::new();
            for file in std::iter::repeat_n(&files, ROUNDS).flatten() {
                let next = cluster.daemon_directory().join("next.toml");
                fs::write(&next, file).unwrap();
                fs::rename(&next, cluster.daemon_directory().join("sheave.toml")).unwrap();
                refused.extend(give(daemon, &[&["reload"]], 1));
            }
            refused
        });
        let refused = operators.into_iter().flat_map(|operator| operator.join().unwrap());
        for (code, why) in refused.chain(editor.join().unwrap()) {
            assert!(code == Some(1) && why.contains("another reload is under way"), "{code:?}: {why}");
        }
    });
    eventually(MOMENT, "the last file is in force", || run(&mut daemon.command("reload")?)).unwrap();

    let as_last_ordered = |daemon: &Daemon| {
        assert_eq!(ordered(daemon, "api-1"), [("drain".to_owned(), 7), ("drain".to_owned(), 7)]);
        assert_eq!(ordered(daemon, "api-2"), [("ready".to_owned(), 1), ("ready".to_owned(), 1)]);
        let status: serde_json::Value =
            serde_json::from_slice(&sheave(daemon, "status", &["--json"]).stdout).unwrap();
        let listen = status["services"][0]["listen"].as_array().unwrap();
        assert_eq!(listen.len(), 2, "{listen:?}");
    };
    as_last_ordered(&daemon);
    for vip in cluster.vips() {
        require_without(&cluster, vip, "api-1");
    }
    crowds.iter_mut().for_each(require_unmoved);
    assert_eq!(cluster.client_resets().unwrap(), before, "nobody is reset");
    for asker in askers {
        let report = asker.stop();
        report.require_all(report.outcomes.len()).unwrap();
    }
    // And so it is kept.
    daemon.process().kill().unwrap();
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &more).unwrap();
    daemon.wait_state("api-2", "ready", MOMENT).unwrap();
    as_last_ordered(&daemon);
    cluster.require_no_own_resets().unwrap();
}
