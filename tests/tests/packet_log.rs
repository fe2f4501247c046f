//! `sheave run --log-packets`: what the program logs about packets, and that it is silent unless it is asked.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::time::Duration;

use anyhow::ensure;
use lb_common::outcome::Outcome;
use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::Daemon,
    lab::{eventually, process::Signal},
    load,
};

/// More than anything here takes on a busy machine.
const MOMENT: Duration = Duration::from_secs(60);
/// Connections of the client: of each a dozen packets or more pass.
const CONNECTIONS: usize = 20;

/// The lines about packets, each from where the program speaks.
fn events(daemon: &Daemon) -> Vec<String> {
    let log = daemon.log();
    let spoken = log.lines().filter_map(|line| Some(line[line.find("outcome ")?..].to_owned()));
    spoken.collect()
}

/// Serves clients with a daemon, from its start to its end, when everything it had to say is said. Its log goes on where
/// that of the one before has ended.
fn serve(cluster: &Cluster, arguments: &[&str], meanwhile: impl FnOnce(&Daemon)) -> Vec<String> {
    let settings = cluster.settings().unwrap();
    let directory = cluster.lab.directory();
    let mut daemon = Daemon::start_arguing(&cluster.lb, directory, &settings, arguments).unwrap();
    daemon.wait_ready(cluster.apiservers.len()).unwrap();
    let before = events(&daemon).len();
    let client = cluster.client_of(cluster.vip4).unwrap();
    load::sequential(&cluster.client, &client, CONNECTIONS).unwrap().require_all(CONNECTIONS).unwrap();
    meanwhile(&daemon);
    daemon.process().signal(Signal::SIGTERM).unwrap();
    daemon.process().wait(MOMENT).unwrap();
    events(&daemon).split_off(before)
}

#[test]
fn packets_are_logged_by_whoever_is_asked_to_and_by_nobody_else() {
    let cluster = Cluster::start(Shape::OneArm, 2).unwrap();
    assert_eq!(serve(&cluster, &[], |_| {}), Vec::<String>::new());

    let shown = cluster.lb.run("ip -oneline link show dev eth0").unwrap();
    let (interface, _) = shown.split_once(':').unwrap();
    let there =
        |outcome: Outcome| format!("outcome {} service 1 in {interface} out {interface}", outcome as u16);
    let wanted = [Outcome::Forwarded, Outcome::Replied].map(there);
    let logged = serve(&cluster, &["--log-packets", "1"], |daemon| {
        eventually(MOMENT, "packets of both directions are logged", || {
            let events = events(daemon);
            for wanted in &wanted {
                let count = events.iter().filter(|event| *event == wanted).count();
                // The handshake, the request, the end: of each connection.
                ensure!(count >= 3 * CONNECTIONS, "{count} of {}: {:?}", events.len(), events.first());
            }
            Ok(())
        })
        .unwrap();
    });
    assert!(!logged.is_empty());

    // The program is another one again.
    assert_eq!(serve(&cluster, &[], |_| {}), Vec::<String>::new());
}
