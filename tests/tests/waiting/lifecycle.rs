//! An apiserver's life: it starts in its own time, and stops in its own time. No request is lost to either.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader},
    net::IpAddr,
    process::{Child, Stdio},
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::ensure;
use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::{Daemon, Status},
    idle::Idle,
    lab::eventually,
    load::{Asker, Report},
    stub::Startup,
};

/// More than a verdict, a start or an end needs.
const MOMENT: Duration = Duration::from_secs(30);
/// `--request-timeout`: 60 s on a real server.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
/// Long enough for a verdict, and for a look at what is still served, on a busy machine.
const SHUTDOWN_DELAY: Duration = Duration::from_secs(15);
/// Between two looks: each is a process, and the servers share this machine.
const PAUSE: Duration = Duration::from_millis(50);
/// Requests at a time at each VIP.
const LANES: usize = 2;
/// Idle connections at each VIP: of three servers each has some.
const IDLE: usize = 30;

/// A running watch: `curl` prints a line for each event.
struct Watch {
    lines: Arc<Mutex<Vec<String>>>,
    child: Child,
    reader: JoinHandle<()>,
}

impl Watch {
    /// Opens watches through a VIP until one is at `server`.
    fn at(cluster: &Cluster, vip: IpAddr, server: &str) -> Self {
        for _ in 0..100 {
            let watch = Self::open(cluster, vip);
            let first = eventually(MOMENT, "the watch begins", || {
                watch.lines().into_iter().next().ok_or_else(|| anyhow::anyhow!("no event"))
            });
            if first.unwrap() == format!("{server} 0") {
                return watch;
            }
            watch.give_up();
        }
        panic!("no connection comes to {server}");
    }

    fn open(cluster: &Cluster, vip: IpAddr) -> Self {
        let mut curl = cluster.curl(vip, "/watch");
        let mut child =
            curl.args(["--no-buffer", "--max-time", "600"]).stdout(Stdio::piped()).spawn().unwrap();
        let stream = BufReader::new(child.stdout.take().unwrap());
        let lines = Arc::<Mutex<Vec<String>>>::default();
        let seen = Arc::clone(&lines);
        let reader = thread::spawn(move || {
            for line in stream.lines() {
                seen.lock().unwrap().push(line.unwrap());
            }
        });
        Self { lines, child, reader }
    }

    fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    fn give_up(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.reader.join().unwrap();
    }

    /// Waits until more events have come.
    fn require_going_on(&self) {
        let before = self.lines().len();
        eventually(MOMENT, "the watch goes on", || {
            let now = self.lines().len();
            ensure!(now >= before + 3, "{now} events, {before} before");
            Ok(())
        })
        .unwrap();
    }

    fn require_running(&mut self) {
        assert!(self.child.try_wait().unwrap().is_none(), "the watch has ended: this came too late");
    }

    /// It was ended by the server as an answer ends, and no event of it is missing.
    fn require_ended_in_order(mut self, server: &str) {
        let status = self.child.wait().unwrap();
        self.reader.join().unwrap();
        assert!(status.success(), "the end of the answer, no reset: {status}");
        for (number, line) in self.lines.lock().unwrap().iter().enumerate() {
            assert_eq!(*line, format!("{server} {number}"));
        }
    }
}

/// Asks through every VIP all the time.
fn askers(cluster: &Cluster) -> Vec<Asker> {
    let ask = |vip| {
        let client = cluster.client_of(vip).unwrap();
        Asker::start(&cluster.client, &client, LANES, Duration::from_millis(10))
    };
    cluster.vips().map(ask).into()
}

/// The fates of all requests so far.
fn so_far(askers: &[Asker]) -> Report {
    Report { outcomes: askers.iter().flat_map(|asker| asker.report().outcomes).collect() }
}

/// The fates of the requests that were begun after `moment`.
fn since(askers: &[Asker], moment: Instant) -> Report {
    let mut report = so_far(askers);
    report.outcomes.retain(|outcome| outcome.started > moment);
    report
}

/// Waits until so many more requests have been begun and answered.
fn wait_answers(askers: &[Asker], count: usize) -> Report {
    let begin = Instant::now();
    eventually(MOMENT, "more requests are answered", || {
        let report = since(askers, begin);
        ensure!(report.answered() >= count, "{} of {count}", report.answered());
        Ok(report)
    })
    .unwrap()
}

/// Waits until new connections come to `server` again.
fn wait_served_by(askers: &[Asker], server: &str) {
    let begin = Instant::now();
    eventually(MOMENT, "it is used again", || {
        let report = since(askers, begin);
        ensure!(report.by_server().contains_key(server), "{:?}", report.by_server());
        Ok(())
    })
    .unwrap();
}

fn require_all_answered(askers: Vec<Asker>) {
    for asker in askers {
        let report = asker.stop();
        report.require_all(report.outcomes.len()).unwrap();
    }
}

/// What the last check of a server found, in every service.
fn checks<'a>(status: &'a Status, server: &str) -> Vec<(&'a str, Option<u16>, Vec<&'a str>)> {
    let backends = status.services.iter().flat_map(|service| &service.backends);
    backends
        .filter(|backend| backend.name == server)
        .map(|backend| {
            let check = backend.check.as_ref().unwrap();
            let failed = check.failed.iter().map(String::as_str).collect();
            (check.code.as_deref().unwrap_or_default(), check.http_status, failed)
        })
        .collect()
}

/// Waits until a server is draining in every service, its last check with this code, status and failed sub-checks.
fn wait_draining(daemon: &mut Daemon, server: &str, code: &str, http_status: Option<u16>, failed: &[&str]) {
    daemon.wait_state(server, "draining", MOMENT).unwrap();
    eventually(MOMENT, "its check says why", || {
        let status = daemon.status()?;
        let checks = checks(&status, server);
        let expected = (code, http_status, failed.to_vec());
        ensure!(checks.iter().all(|check| *check == expected), "{checks:?} instead of {expected:?}");
        Ok(())
    })
    .unwrap();
}

/// Idle connections through both VIPs, some of them at the first server.
fn open_idle(cluster: &Cluster) -> Idle {
    let idle = Idle::open(cluster, IDLE).unwrap();
    assert!(idle.at("api-1") > 0);
    idle
}

fn require_nothing_was_reset_by_us(cluster: &Cluster, daemon: &Daemon) {
    let log = daemon.log();
    assert!(!log.contains("were reset") && !log.contains("was reset"), "{log}");
    assert!(!log.contains("-> dead"), "{log}");
    cluster.require_no_own_resets().unwrap();
}

/// Three servers, of which the first takes its time to stop.
fn cluster_with_shutdown_delay(delay: Duration) -> Cluster {
    let mut cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let first = &mut cluster.apiservers[0];
    first.stub.kill().unwrap();
    first.stub.set_shutdown_delay(delay);
    first.stub.set_request_timeout(REQUEST_TIMEOUT);
    first.start().unwrap();
    cluster
}

/// The first server's watches end as an answer ends, then the server does, and its idle connections are over.
fn end_in_order<const N: usize>(cluster: &mut Cluster, mut watches: [Watch; N], idle: &mut Idle) {
    watches.iter_mut().for_each(Watch::require_running);
    for watch in watches {
        watch.require_ended_in_order("api-1");
    }
    idle.require_gone_only(&["api-1"]).unwrap();
    assert!(cluster.apiservers[0].stub.wait_end(MOMENT).unwrap().success());
}

/// The first server gets nothing from `drained` on, until it is started again.
fn require_left_out_until_it_is_back(cluster: &mut Cluster, askers: &[Asker], drained: Instant) {
    wait_answers(askers, 20);
    let report = since(askers, drained);
    assert!(!report.by_server().contains_key("api-1"), "{:?}", report.by_server());
    cluster.apiservers[0].start().unwrap();
    wait_served_by(askers, "api-1");
}

#[test]
fn a_server_that_announces_its_end_costs_no_request_and_ends_its_watches_itself() {
    let mut cluster = cluster_with_shutdown_delay(SHUTDOWN_DELAY);
    let mut daemon = cluster.balance().unwrap();
    let mut idle = open_idle(&cluster);
    let watches = cluster.vips().map(|vip| Watch::at(&cluster, vip, "api-1"));
    let before = cluster.client_resets().unwrap();
    let askers = askers(&cluster);
    wait_served_by(&askers, "api-1");

    cluster.apiservers[0].stub.terminate().unwrap();
    wait_draining(&mut daemon, "api-1", "L7STS", Some(500), &["shutdown"]);
    let drained = Instant::now();
    idle.require_gone_only(&[]).unwrap();
    watches.iter().for_each(Watch::require_going_on);

    let first = &cluster.apiservers[0];
    first.stub.wait_closed(&first.host, MOMENT).unwrap();
    wait_draining(&mut daemon, "api-1", "L4CON", None, &[]);
    watches.iter().for_each(Watch::require_going_on);
    // Before curl ends: it resets its own connection. The server has closed its idle ones in order.
    assert_eq!(cluster.client_resets().unwrap(), before, "nobody is reset");
    end_in_order(&mut cluster, watches, &mut idle);
    require_left_out_until_it_is_back(&mut cluster, &askers, drained);
    require_all_answered(askers);
    require_nothing_was_reset_by_us(&cluster, &daemon);
}

#[test]
fn a_server_that_stops_without_a_warning_costs_only_what_it_had_already_accepted() {
    let mut cluster = cluster_with_shutdown_delay(Duration::ZERO);
    let mut daemon = cluster.balance().unwrap();
    let mut idle = open_idle(&cluster);
    let watches = cluster.vips().map(|vip| Watch::at(&cluster, vip, "api-1"));
    let before = cluster.client_resets().unwrap();
    let askers = askers(&cluster);
    wait_served_by(&askers, "api-1");

    let first = &mut cluster.apiservers[0];
    first.stub.terminate().unwrap();
    first.stub.wait_closed(&first.host, MOMENT).unwrap();
    let closed = Instant::now();
    wait_draining(&mut daemon, "api-1", "L4CON", None, &[]);
    let drained = Instant::now();
    watches.iter().for_each(Watch::require_going_on);
    let after = cluster.client_resets().unwrap();
    end_in_order(&mut cluster, watches, &mut idle);
    require_left_out_until_it_is_back(&mut cluster, &askers, drained);
    let report = Report { outcomes: askers.into_iter().flat_map(|asker| asker.stop().outcomes).collect() };
    // Who was refused got a second chance. Connections that were accepted, and not yet answered when the port was
    // closed, are the server's to end: the real one resets such as well.
    for lost in report.failures() {
        let error = lost.result.as_ref().unwrap_err();
        assert!(!error.contains("refused"), "{error}");
        assert!(lost.started < closed, "{error}");
    }
    let lost = report.failures().count();
    assert!(lost <= cluster.vips().len() * LANES, "{lost} requests");
    assert!(after - before <= lost as u64, "{} resets, {lost} requests", after - before);
    require_nothing_was_reset_by_us(&cluster, &daemon);
}

/// As measured with an empty etcd, with the later steps stretched: a larger cluster takes longer, and each step is to
/// be seen by the checks.
fn startup() -> Startup {
    let [tls, roles, ready] = [700, 4_000, 8_000].map(Duration::from_millis);
    Startup::Gradual { tls, roles, ready }
}

/// What the server says before it is ready.
const BEFORE_ROLES: (&str, Option<u16>) = ("L7STS", Some(403));
const BEFORE_HOOKS: (&str, Option<u16>) = ("L7STS", Some(500));

#[test]
fn a_server_that_starts_gets_its_first_request_when_it_is_ready() {
    let mut cluster = cluster_with_shutdown_delay(SHUTDOWN_DELAY);
    let mut daemon = cluster.balance().unwrap();
    let askers = askers(&cluster);
    wait_served_by(&askers, "api-1");
    let first = &mut cluster.apiservers[0];
    first.stub.terminate().unwrap();
    assert!(first.stub.wait_end(MOMENT).unwrap().success());
    wait_draining(&mut daemon, "api-1", "L4CON", None, &[]);

    let first = &mut cluster.apiservers[0];
    first.stub.set_startup(startup());
    first.start().unwrap();
    let started = Instant::now();
    let mut seen = BTreeSet::new();
    eventually(MOMENT, "it is ready", || {
        let status = daemon.status()?;
        let found = checks(&status, "api-1");
        let states = status.states("api-1");
        for (state, (code, http_status, failed)) in states.iter().zip(found) {
            assert!(["draining", "ready"].contains(state), "{state}");
            if http_status == Some(500) {
                assert_eq!(failed, ["poststarthook/rbac/bootstrap-roles"]);
            }
            seen.insert((code.to_owned(), http_status));
        }
        ensure!(states == ["ready", "ready"], "{states:?}");
        Ok(())
    })
    .unwrap();
    for (code, http_status) in [BEFORE_ROLES, BEFORE_HOOKS] {
        assert!(seen.contains(&(code.to_owned(), http_status)), "{seen:?}");
    }
    wait_served_by(&askers, "api-1");
    assert_eq!(cluster.apiservers[0].stub.early_connections().unwrap(), 0);
    let report = since(&askers, started);
    assert!(report.by_server().len() == 3, "{:?}", report.by_server());
    require_all_answered(askers);
    require_nothing_was_reset_by_us(&cluster, &daemon);
}

#[test]
fn while_a_whole_cluster_starts_requests_are_refused_or_answered_and_then_all_are_served() {
    let mut cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    for apiserver in &mut cluster.apiservers {
        apiserver.stub.kill().unwrap();
        apiserver.stub.set_startup(startup());
    }
    let mut daemon =
        Daemon::start(&cluster.lb, cluster.lab.directory(), &cluster.settings().unwrap()).unwrap();
    for name in ["api-1", "api-2", "api-3"] {
        wait_draining(&mut daemon, name, "L4CON", None, &[]);
    }
    let askers = askers(&cluster);
    eventually(MOMENT, "requests are refused", || {
        let count = so_far(&askers).failures().count();
        ensure!(count > 20, "{count}");
        Ok(())
    })
    .unwrap();
    for apiserver in &mut cluster.apiservers {
        apiserver.start().unwrap();
    }
    daemon.wait_ready(3).unwrap();
    let ready = Instant::now();
    wait_answers(&askers, 60);
    let report = Report { outcomes: askers.into_iter().flat_map(|asker| asker.stop().outcomes).collect() };
    let early: u64 = cluster.apiservers.iter().map(|api| api.stub.early_connections().unwrap()).sum();
    assert!(early > 0, "nobody is ready: those who complete TLS are asked");
    for failure in report.failures() {
        let error = failure.result.as_ref().unwrap_err();
        assert!(failure.started < ready, "{error}");
        // Who is sent to a server is answered, even if it is with 403: nobody waits for one that is silent.
        assert!(error.contains("refused") || error.contains("403"), "{error}");
    }
    let servers: Vec<_> = report.by_server().into_keys().collect();
    assert_eq!(servers, ["api-1", "api-2", "api-3"]);
    require_nothing_was_reset_by_us(&cluster, &daemon);
}

#[test]
fn a_server_that_cannot_reach_its_etcd_is_never_ready() {
    let mut cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let mut settings = cluster.settings().unwrap();
    settings.service = vec!["reset_after = \"2s\"".to_owned()];
    settings.check = ["interval = \"300ms\"", "fast_interval = \"100ms\"", "connect_timeout = \"500ms\""]
        .map(str::to_owned)
        .into();
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    daemon.wait_ready(3).unwrap();
    let first = &mut cluster.apiservers[0];
    first.stub.kill().unwrap();
    wait_draining(&mut daemon, "api-1", "L4CON", None, &[]);
    let askers = askers(&cluster);

    // 20 s on a real server.
    cluster.apiservers[0].stub.set_startup(Startup::WithoutEtcd(Duration::from_secs(7)));
    let mut seen = BTreeSet::new();
    for _ in 0..3 {
        let first = &mut cluster.apiservers[0];
        first.start().unwrap();
        let process = first.stub.process().unwrap();
        while process.exited().unwrap().is_none() {
            thread::sleep(PAUSE);
            // On a busy machine there may be no answer in time.
            let Ok(status) = daemon.status() else { continue };
            for state in status.states("api-1") {
                assert!(["draining", "silent", "dead"].contains(&state), "{state}:\n{}", daemon.log());
                seen.insert(state.to_owned());
            }
            for other in ["api-2", "api-3"] {
                assert_eq!(status.states(other), ["ready", "ready"], "{}", daemon.log());
            }
        }
        assert_eq!(first.stub.wait_end(MOMENT).unwrap().code(), Some(1));
        wait_draining(&mut daemon, "api-1", "L4CON", None, &[]);
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["dead", "draining", "silent"]);
    let report = so_far(&askers);
    assert_eq!(report.by_server().into_keys().collect::<Vec<_>>(), ["api-2", "api-3"]);

    cluster.apiservers[0].stub.set_startup(Startup::AtOnce);
    cluster.apiservers[0].start().unwrap();
    wait_served_by(&askers, "api-1");
    require_all_answered(askers);
    cluster.require_no_own_resets().unwrap();
}
