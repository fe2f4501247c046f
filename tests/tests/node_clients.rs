//! Clients of the connect hook as nodes have them: kubelet's long HTTP/2 connection, simple programs, a master's own.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use anyhow::ensure;
use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::Daemon,
    dial::{dial, dial_blocking},
    lab::{Process, eventually, process::sibling_program},
    load,
    stub::{PORT, TOKEN},
};

/// A verdict takes at most a reply timeout (5 s), a fresh connection's (1 s) and the pauses between; some times that
/// on a busy machine.
const VERDICT: Duration = Duration::from_secs(60);
const REFUSED: &str = "Connection refused (os error 111)";
const LOCAL4: &str = "127.0.0.1:16443";
/// As sockets of every kind dial a node's listeners; the last is an IPv6 socket with an IPv4 address.
const LOCAL: [&str; 3] = [LOCAL4, "[::1]:16443", "[::ffff:127.0.0.1]:16443"];

fn at(address: &str) -> SocketAddr {
    address.parse().unwrap()
}

fn start(cluster: &Cluster) -> Daemon {
    let settings = cluster.settings_of_a_node().unwrap();
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    daemon.wait_ready(cluster.apiservers.len()).unwrap();
    daemon
}

/// A kubelet's connection: HTTP/2, a watch and requests beside it.
struct Kubelet(Process);

impl Kubelet {
    fn start(cluster: &Cluster, label: &str) -> Self {
        let mut command = cluster.lb.hooked_command(sibling_program("sheave-watch").unwrap()).unwrap();
        command.arg("--ca").arg(cluster.ca_file()).args(["--token", TOKEN, LOCAL4]);
        Self(cluster.lb.start(label, command).unwrap())
    }

    /// So far, what its log has of this kind.
    fn seen(&self, kind: &str) -> Vec<String> {
        let log = self.0.log();
        log.lines().filter_map(|line| line.strip_prefix(kind)).map(str::to_owned).collect()
    }

    /// Waits until it has had so many more events and answers.
    fn goes_on(&mut self, more: usize) {
        let counts = |it: &Self| ["event ", "answer "].map(|kind| it.seen(kind).len());
        let before = counts(self);
        eventually(VERDICT, "events and answers", || {
            ensure!(self.0.exited()?.is_none(), "it has ended: {}", self.0.log());
            let now = counts(self);
            ensure!((0..2).all(|kind| now[kind] >= before[kind] + more), "{now:?}, {before:?} before");
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn an_http2_connection_is_one_to_a_server_and_nobodys_business_afterwards() {
    let cluster = Cluster::start_without_vips(Shape::OneArm, 3).unwrap();
    let mut daemon = start(&cluster);
    let mut kubelet = Kubelet::start(&cluster, "kubelet");
    kubelet.goes_on(5);
    assert_eq!(kubelet.seen("peer "), [LOCAL4]);

    daemon.process().kill().unwrap();
    kubelet.goes_on(20);
    // Nor does a new one miss the daemon.
    let mut another = Kubelet::start(&cluster, "another");
    another.goes_on(5);
    let mut daemon = start(&cluster);
    kubelet.goes_on(10);
    assert!(daemon.is_alive().unwrap());
    let unloaded = daemon.unload().unwrap();
    assert!(unloaded.status.success(), "{unloaded:?}");
    daemon.process().wait(VERDICT).unwrap();
    kubelet.goes_on(10);
    another.goes_on(10);

    for client in [&kubelet, &another] {
        let lines = client.seen("event ").into_iter().chain(client.seen("answer "));
        let servers: BTreeSet<_> = lines.map(|line| line.split(' ').next().unwrap().to_owned()).collect();
        assert_eq!(servers.len(), 1, "events and answers came by one connection: {servers:?}");
    }
}

#[test]
fn sockets_that_wait_in_connect_are_served_and_refused_like_others() {
    let mut cluster = Cluster::without_vips(Shape::OneArm, 2).unwrap();
    let settings = cluster.settings_of_a_node().unwrap();
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    // No apiserver is up yet, and somebody listens where clients dial: refused is who is refused by the hook.
    for name in ["api-1", "api-2"] {
        daemon.wait_state(name, "draining", VERDICT).unwrap();
    }
    let server = cluster.lb.in_namespace(|| std::net::TcpListener::bind("[::]:16443")).unwrap().unwrap();
    let _closing = std::thread::spawn(move || server.incoming().for_each(drop));
    for to in LOCAL {
        let dialled = dial_blocking(&cluster.lb, &cluster.ca_file(), at(to), 20).unwrap();
        assert_eq!(dialled.failures.get(REFUSED), Some(&20), "{to}: {dialled:?}");
    }
    cluster.apiservers.iter_mut().for_each(|apiserver| apiserver.start().unwrap());
    daemon.wait_ready(2).unwrap();
    for to in LOCAL {
        let dialled = dial_blocking(&cluster.lb, &cluster.ca_file(), at(to), 30).unwrap();
        dialled.require_all(30, at(to)).unwrap();
        assert_eq!(dialled.servers.len(), 2, "{dialled:?}");
    }
}

#[test]
fn a_master_that_is_the_load_balancer_reaches_every_apiserver_by_the_vip() {
    let mut cluster = Cluster::start_without_vips(Shape::OneArm, 3).unwrap();
    let vips = cluster.vips();
    let master = &cluster.apiservers[0].host;
    vips.iter().for_each(|vip| master.add_vip(*vip).unwrap());
    let mut daemon = Daemon::start(master, cluster.lab.directory(), &cluster.settings().unwrap()).unwrap();
    daemon.wait_ready(3).unwrap();
    for vip in vips.map(|vip| SocketAddr::new(vip, PORT)) {
        // Its own apiserver listens on the VIP as well: without the hook, everything would go there.
        let own = dial(master, true, &cluster.ca_file(), vip, 60).unwrap();
        own.require_all(60, vip).unwrap();
        assert_eq!(own.servers.len(), 3, "{own:?}");
        let client = cluster.client_of(vip.ip()).unwrap();
        load::sequential(&cluster.client, &client, 20).unwrap().require_all(20).unwrap();
    }

    cluster.apiservers[0].stub.kill().unwrap();
    daemon.wait_state("api-1", "draining", VERDICT).unwrap();
    let master = &cluster.apiservers[0].host;
    for vip in vips.map(|vip| SocketAddr::new(vip, PORT)) {
        let own = dial(master, true, &cluster.ca_file(), vip, 40).unwrap();
        own.require_all(40, vip).unwrap();
        assert!(own.servers.len() == 2 && !own.servers.contains_key("api-1"), "{own:?}");
        let client = cluster.client_of(vip.ip()).unwrap();
        load::sequential(&cluster.client, &client, 20).unwrap().require_all(20).unwrap();
    }
}
