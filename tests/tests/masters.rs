//! Masters that are the load balancer: one of the apiservers is on the load balancer's own host.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{
    io::{self, ErrorKind},
    net::{SocketAddr, TcpListener},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::ensure;
use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::{Daemon, program},
    dial::dial,
    idle::Idle,
    lab::{eventually, run},
    load,
    stub::{Health, PORT, Stub},
};
use socket2::{Domain, Socket, Type};

/// A verdict, with room for a busy machine.
const VERDICT: Duration = Duration::from_secs(30);
/// Its uplink is down for so long: some times `reset_after`.
const DOWN: Duration = Duration::from_secs(10);
/// Between two looks: each is a process, and the servers share this machine.
const PAUSE: Duration = Duration::from_millis(50);
/// Connections at each VIP: of three servers each has some.
const CONNECTIONS: usize = 30;

/// Three masters. The first is the load balancer's host.
struct Masters {
    own: Stub,
    cluster: Cluster,
}

impl Masters {
    fn start() -> Self {
        let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
        let [v4, v6] = cluster.vips();
        let addresses = [v4, v6].map(|vip| cluster.lb.address(vip).unwrap());
        let mut own =
            Stub::new(&cluster.lb, &cluster.authority, &[&[v4, v6][..], &addresses].concat()).unwrap();
        own.start(&cluster.lb).unwrap();
        Self { own, cluster }
    }

    /// With these lines for every check; finds somebody dead soon, and answers probes.
    fn balance(&self, check: &[&str]) -> Daemon {
        let cluster = &self.cluster;
        let mut settings = cluster.settings().unwrap();
        for vip in cluster.vips() {
            let address = SocketAddr::new(cluster.lb.address(vip).unwrap(), PORT);
            settings.backends.push((self.own.name().to_owned(), address));
        }
        settings.service = vec!["reset_after = \"2s\"".to_owned()];
        settings.check = check.iter().map(ToString::to_string).collect();
        let config = |directory: &Path| {
            settings.to_toml(directory).replace("[admin]\n", "[admin]\nlisten = \"127.0.0.1:1936\"\n")
        };
        let command = cluster.lb.command(program().unwrap());
        let mut daemon = Daemon::start_with(&cluster.lb, cluster.lab.directory(), config, command).unwrap();
        daemon.wait_ready(3).unwrap();
        daemon
    }

    /// Status and body of a probe of the first service, asked for on the load balancer.
    fn probe(&self, rest: &str) -> (String, String) {
        let mut curl = self.cluster.lb.command("curl");
        curl.args(["--silent", "--max-time", "20", "--write-out", "\n%{http_code}"]);
        let answer = run(curl.arg(format!("http://127.0.0.1:1936/probe/kube-apiserver/{rest}"))).unwrap();
        let (body, status) = answer.rsplit_once('\n').unwrap();
        (status.to_owned(), body.to_owned())
    }
}

#[test]
fn its_own_apiserver_gets_its_share_and_is_asked_about_as_self() {
    let mut masters = Masters::start();
    let mut daemon = masters.balance(&[]);
    let cluster = &masters.cluster;
    let own = masters.own.name();
    let all = ["api-1", "api-2", own];
    let mut sources = Vec::new();
    for vip in cluster.vips() {
        let client = cluster.client_of(vip).unwrap();
        let report = load::parallel(&cluster.client, &client, 90).unwrap();
        report.require_all(90).unwrap();
        assert_eq!(report.by_server().into_keys().collect::<Vec<_>>(), all);
        let at_own = report.outcomes.iter().filter(|outcome| outcome.result.as_deref() == Ok(own));
        sources.extend(at_own.filter_map(|outcome| outcome.source));
        // The client's address is hidden from the others, not from this one: its packets are left as they are.
        let seen = masters.own.connections().unwrap();
        assert!(seen.contains_key(&cluster.client.address(vip).unwrap()), "{seen:?}");
        // Processes of this host are balanced as everybody else.
        let here = SocketAddr::new(vip, PORT);
        let dialled = dial(&cluster.lb, true, &cluster.ca_file(), here, 60).unwrap();
        dialled.require_all(60, here).unwrap();
        assert_eq!(dialled.servers.keys().collect::<Vec<_>>(), all);
    }
    let status = daemon.status().unwrap();
    assert!(status.packets.get("forwarded_local").is_some_and(|count| *count > 0), "{:?}", status.packets);

    let ready = ("200".to_owned(), "ok".to_owned());
    for path in ["self/readyz", "self/livez", &format!("{own}/readyz"), "api-1/readyz"] {
        assert_eq!(masters.probe(path), ready, "{path}");
    }
    // It is this one that `self` means.
    masters.own.health(Health::Status(500)).unwrap();
    eventually(VERDICT, "the probe says 500", || {
        let (status, body) = masters.probe("self/readyz");
        ensure!(status == "500" && body.contains("[-]informer-sync failed"), "{status} {body}");
        Ok(())
    })
    .unwrap();
    assert_eq!(masters.probe("api-1/readyz"), ready);
    daemon.wait_state(own, "draining", VERDICT).unwrap();
    masters.own.health(Health::Normal).unwrap();
    daemon.wait_state(own, "ready", VERDICT).unwrap();

    // Once it is known to be gone nobody comes to it.
    let own = own.to_owned();
    masters.own.kill().unwrap();
    daemon.wait_state(&own, "draining", VERDICT).unwrap();
    for vip in masters.cluster.vips() {
        let client = masters.cluster.client_of(vip).unwrap();
        let report = load::sequential(&masters.cluster.client, &client, 60).unwrap();
        report.require_all(60).unwrap();
        assert!(!report.by_server().contains_key(own.as_str()), "{:?}", report.by_server());
    }
    // Nor one that uses its port again, whose flow was to this host.
    let used = masters.cluster.client.in_namespace(|| {
        let reused = sources.iter().filter(|source| {
            let vip = if source.is_ipv6() { masters.cluster.vip6 } else { masters.cluster.vip4 };
            connects_from(**source, SocketAddr::new(vip, PORT)).unwrap()
        });
        reused.count()
    });
    assert!(used.unwrap() > 0, "no port of {} could be used again", sources.len());
}

/// Connects from this address and port, unless an earlier connection still rests there.
fn connects_from(source: SocketAddr, to: SocketAddr) -> io::Result<bool> {
    let socket = Socket::new(Domain::for_address(source), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    match socket.bind(&source.into()).and_then(|()| socket.connect(&to.into())) {
        Err(error) if matches!(error.kind(), ErrorKind::AddrInUse | ErrorKind::AddrNotAvailable) => Ok(false),
        outcome => outcome.map(|()| true),
    }
}

#[test]
fn while_its_uplink_is_down_its_own_apiserver_is_no_proof_that_the_others_are_dead() {
    let masters = Masters::start();
    let mut daemon = masters.balance(&[
        "interval = \"300ms\"",
        "fast_interval = \"100ms\"",
        "connect_timeout = \"500ms\"",
        "timeout = \"2s\"",
    ]);
    let cluster = &masters.cluster;
    let mut idle = Idle::open(cluster, CONNECTIONS).unwrap();
    for server in ["api-1", "api-2", masters.own.name()] {
        assert!(idle.at(server) > 0, "nobody is at {server}");
    }

    cluster.lab.unplug(&cluster.lb).unwrap();
    let begin = Instant::now();
    // Nobody answers but the one beside us, which answers whatever becomes of the network.
    while begin.elapsed() < DOWN {
        let status = daemon.status().unwrap();
        for server in ["api-1", "api-2"] {
            assert!(!status.states(server).contains(&"dead"), "{server} is dead:\n{}", daemon.log());
        }
        assert_eq!(status.states(masters.own.name()), ["ready", "ready"]);
        thread::sleep(PAUSE);
    }
    assert!(!daemon.log().contains("-> dead"), "{}", daemon.log());
    cluster.lab.replug(&cluster.lb).unwrap();
    daemon.wait_ready(3).unwrap();
    idle.require_alive(cluster).unwrap();
}

#[test]
fn a_local_server_that_does_not_take_what_is_for_the_vip_is_said() {
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let own = SocketAddr::new(cluster.lb.address(cluster.vip4).unwrap(), PORT);
    let mut settings = cluster.settings().unwrap();
    settings.listen.retain(SocketAddr::is_ipv4);
    settings.backends.push(("here".to_owned(), own));
    // As with `--bind-address=10.0.0.1`.
    let listen = |address: &str| cluster.lb.in_namespace(|| TcpListener::bind(address).unwrap());
    let server = listen(&own.to_string());
    let daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    let said = format!("here is this host, and its server listens on {own} only");
    let wait = |there: bool| {
        eventually(VERDICT, &format!("{said:?} is said: {there}"), || {
            let flags = daemon.flags()?;
            ensure!(flags.contains(&said) == there, "{flags}");
            Ok(())
        })
        .unwrap();
    };
    wait(true);
    drop(server);
    let _server = listen(&format!("0.0.0.0:{PORT}"));
    wait(false);
}
