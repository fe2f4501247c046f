//! Backends whose health checks are answered by something broken or hostile: the real daemon has
//! the right word for each, and neither the others nor the daemon itself are the worse for it.

use std::{fs, net::SocketAddr, time::Duration};

use anyhow::{Context as _, ensure};
use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::{Daemon, Status},
    lab::eventually,
    load::Asker,
    stub::{
        PORT,
        hostile::{Harm, Hostile},
    },
};

/// More than a verdict needs.
const MOMENT: Duration = Duration::from_secs(30);
/// More than all the rounds need.
const ROUNDS_LIMIT: Duration = Duration::from_secs(240);
/// Checks that each hostile server has to stand behind, each on a connection of its own.
const ROUNDS: u64 = 30;
/// What a daemon with a few backends may hold beside the mapped tables, in kB: less than three answers of 10 MB.
const MEMORY_MAX: u64 = 24 << 10;
/// And by how much its mapped tables and its own may grow meanwhile.
const GROWTH_MAX: u64 = 24 << 10;
/// The host with the hostile servers, in its segment.
const HOSTILE: u8 = 66;

/// A server, and what is to be said about it.
struct Expected {
    name: &'static str,
    harm: Harm,
    state: &'static str,
    code: &'static str,
    http_status: Option<u16>,
    detail: &'static str,
    failed: &'static [&'static str],
}

/// Every kind of harm; `good` is where a redirect leads to.
fn expected(good: SocketAddr) -> Vec<Expected> {
    let draining = |name, harm, code, http_status, detail| Expected {
        name,
        harm,
        state: "draining",
        code,
        http_status,
        detail,
        failed: &[],
    };
    vec![
        Expected {
            failed: &["etcd"],
            ..draining(
                "huge-failure",
                Harm::HugeFailure,
                "L7STS",
                Some(500),
                "Layer7 wrong status: failed: etcd",
            )
        },
        draining("huge-head", Harm::HugeHead, "L7RSP", None, "Layer7 invalid response: not an HTTP/1 reply"),
        draining("trickle", Harm::Trickle, "L7TOUT", None, "Layer7 timeout"),
        draining("breaks-off", Harm::BreaksOff, "L7RSP", Some(200), "Layer7 invalid response: "),
        draining("redirects", Harm::Redirects(good), "L7STS", Some(302), "Layer7 wrong status: Found"),
        draining("http-0-9", Harm::Http09, "L7RSP", None, "Layer7 invalid response: not an HTTP/1 reply"),
        Expected {
            state: "silent",
            ..draining("never-finishes-tls", Harm::NeverFinishesTls, "L6TOUT", None, "Layer6 timeout")
        },
        draining("hangs-up", Harm::HangsUp, "L6RSP", None, "Layer6 invalid response: "),
    ]
}

impl Expected {
    /// Whether the status says about it what it should.
    fn compare(&self, status: &Status) -> anyhow::Result<()> {
        let mut backends = status.services.iter().flat_map(|service| &service.backends);
        let backend = backends.find(|backend| backend.name == self.name).context("no such backend")?;
        let check = backend.check.as_ref().context("no check")?;
        ensure!(backend.state == self.state, "{} is {}: {check:?}", self.name, backend.state);
        ensure!(check.code.as_deref() == Some(self.code), "{}: {check:?}", self.name);
        ensure!(check.http_status == self.http_status, "{}: {check:?}", self.name);
        ensure!(check.failed == self.failed, "{}: {check:?}", self.name);
        // Where what follows is the words of a library, they are there, and not many.
        let rest = check.detail.strip_prefix(self.detail);
        let rest = rest.with_context(|| format!("{}: {check:?}", self.name))?;
        let open = self.detail.ends_with(": ");
        ensure!(rest.is_empty() != open && rest.len() <= 200, "{}: {check:?}", self.name);
        Ok(())
    }
}

/// A line of `/proc/<pid>/status`, in kB.
fn memory(daemon: &mut Daemon, what: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.process().pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with(what)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn hostile_answers_are_named_and_harm_nobody() {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let mut host = cluster.lab.host("hostile").unwrap();
    cluster.lab.plug(&mut host, cluster.lb.link().unwrap().segment, HOSTILE).unwrap();
    let address = host.address(cluster.vip4).unwrap();
    let good = cluster.apiservers[0].host.address(cluster.vip4).unwrap();
    let expected = expected(SocketAddr::new(good, PORT));
    let servers: Vec<_> = expected
        .iter()
        .zip(7001..)
        .map(|(expected, port)| {
            let address = SocketAddr::new(address, port);
            Hostile::start(&host, &cluster.authority, address, expected.harm).unwrap()
        })
        .collect();

    let mut settings = cluster.settings().unwrap();
    for (expected, server) in expected.iter().zip(&servers) {
        settings.backends.push((expected.name.to_owned(), server.address));
    }
    settings.service = vec!["reset_after = \"1h\"".to_owned()];
    settings.check = [
        "interval = \"500ms\"",
        "fast_interval = \"100ms\"",
        "connect_timeout = \"1s\"",
        "timeout = \"2s\"",
        // For the good ones, on a busy machine.
        "fall = 3",
    ]
    .map(str::to_owned)
    .into();
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    for name in ["api-1", "api-2", "api-3"] {
        daemon.wait_state(name, "ready", MOMENT).unwrap();
    }
    let askers = cluster.vips().map(|vip| {
        let client = cluster.client_of(vip).unwrap();
        Asker::start(&cluster.client, &client, 1, Duration::from_millis(10))
    });
    for expected in &expected {
        eventually(MOMENT, expected.name, || expected.compare(&daemon.status()?)).unwrap();
    }
    let before = memory(&mut daemon, "VmRSS:");

    eventually(ROUNDS_LIMIT, "all rounds are over", || {
        let status = daemon.status()?;
        for name in ["api-1", "api-2", "api-3"] {
            assert_eq!(status.states(name), ["ready", "ready"], "{}", daemon.log());
        }
        for expected in &expected {
            expected.compare(&status)?;
        }
        let rounds: Vec<_> = servers.iter().map(Hostile::accepted).collect();
        ensure!(rounds.iter().all(|rounds| *rounds >= ROUNDS), "{rounds:?}");
        Ok(())
    })
    .unwrap();
    let (after, own) = (memory(&mut daemon, "VmRSS:"), memory(&mut daemon, "RssAnon:"));
    println!("{before} kB before, {after} kB after, {own} kB of it anonymous");
    assert!(after < before + GROWTH_MAX, "{after} kB, {before} kB before");
    assert!(own < MEMORY_MAX, "{own} kB");

    let log = daemon.log();
    let down = log.lines().find(|line| line.contains("/api-") && line.contains(" is DOWN"));
    assert_eq!(down, None);
    for asker in askers {
        let report = asker.stop();
        report.require_all(report.outcomes.len()).unwrap();
        let servers: Vec<_> = report.by_server().into_keys().collect();
        assert_eq!(servers, ["api-1", "api-2", "api-3"]);
    }
    cluster.require_no_own_resets().unwrap();
}
