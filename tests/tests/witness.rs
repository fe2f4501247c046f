//! What flows notice has a backend checked at once, whatever the interval says.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::time::Duration;

use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::{Daemon, Settings},
    load::{Asker, sequential},
};

/// With checks so far apart that only flows can hurry them.
const VERDICT: Duration = Duration::from_secs(20);

fn settings(cluster: &Cluster) -> Settings {
    let mut settings = cluster.settings().unwrap();
    settings.check = ["interval = \"10m\"", "fast_interval = \"9m\"", "connect_timeout = \"500ms\""]
        .map(str::to_owned)
        .to_vec();
    settings
}

fn start(cluster: &Cluster) -> Daemon {
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings(cluster)).unwrap();
    daemon.wait_ready(cluster.apiservers.len()).unwrap();
    daemon
}

/// Clients of both VIPs that keep asking.
fn load(cluster: &Cluster) -> [Asker; 2] {
    cluster.vips().map(|vip| {
        let client = cluster.client_of(vip).unwrap();
        Asker::start(&cluster.client, &client, 4, Duration::from_millis(20))
    })
}

#[test]
fn a_refused_connection_is_noticed_by_the_flow_that_meets_it() {
    let mut cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let mut daemon = start(&cluster);
    let client = cluster.client_of(cluster.vip4).unwrap();
    let load = load(&cluster);
    cluster.apiservers[0].stub.kill().unwrap();
    daemon.wait_state("api-1", "draining", VERDICT).unwrap();
    drop(load);
    // And the verdict holds: nobody meets it again.
    let report = sequential(&cluster.client, &client, 60).unwrap();
    report.require_all(60).unwrap();
    assert!(!report.by_server().contains_key("api-1"), "{:?}", report.by_server());
}

#[test]
fn a_wait_without_an_answer_is_noticed_on_a_frozen_server_and_on_one_that_is_cut_off() {
    for cut in [false, true] {
        let mut cluster = Cluster::start(Shape::OneArm, 3).unwrap();
        let mut daemon = start(&cluster);
        let client = cluster.client_of(cluster.vip4).unwrap();
        let load = load(&cluster);
        if cut {
            cluster.apiservers[0].host.cut_off().unwrap();
        } else {
            cluster.apiservers[0].stub.freeze().unwrap();
        }
        daemon.wait_state("api-1", "silent", VERDICT).unwrap();
        drop(load);
        let report = sequential(&cluster.client, &client, 60).unwrap();
        report.require_all(60).unwrap();
        assert!(!report.by_server().contains_key("api-1"), "{:?}", report.by_server());
    }
}
