//! A node: its clients reach three apiservers by 127.0.0.1, and one of these freezes while a watch is on it.

use std::{net::SocketAddr, sync::atomic::AtomicBool, time::Instant};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::{Daemon, Settings},
    lab::{cgroup::Visit, cgroup_of},
    load::{Asker, Client},
    watches::Watches,
};

use crate::{LANES, PATIENCE, PAUSE, demo::Demo};

const LISTENER: &str = "127.0.0.1:16443";

impl<'flag> Demo<'flag> {
    pub(crate) fn on_a_node(interrupted: &'flag AtomicBool) -> Result<Self> {
        println!("Building a laboratory: a node, three apiservers behind TLS ...");
        let cluster = Cluster::start_without_vips(Shape::OneArm, 3)?;
        let listener: SocketAddr = LISTENER.parse()?;
        // Checked every second: ten are the default here, and long for somebody who watches.
        let settings = Settings { listen: vec![listener], ..cluster.settings_of_a_node()? };
        let started = Instant::now();
        let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings)?;
        daemon.wait_ready(3)?;
        println!("sheave runs on the node and found three ready apiservers in {:.1?}.", started.elapsed());
        let visit = Some(Visit::to(&cluster.lab)?);
        let client = Client::new(&cluster.ca_file(), listener, PATIENCE)?.expecting("localhost")?;
        let watch = Some(Watches::start(&cluster.lb, &client, 1)?);
        let asker = Asker::start(&cluster.lb, &client, LANES, PAUSE);
        println!(
            "On it, a client keeps asking https://{LISTENER}, where nobody listens: {LANES} new connections at a \
             time. Another watches."
        );
        let by_hand = by_hand(&cluster)?;
        Ok(Self { daemon, asker, watch, _visit: visit, cluster, interrupted, faults: Vec::new(), by_hand })
    }

    /// What the hook is there for, once.
    pub(crate) fn tell_of_a_node(&mut self) -> Result<()> {
        self.scene("All is well")?;
        let frozen = self.server_of_the_watch()?;
        let title =
            format!("{frozen} freezes, with the watch on it: its kernel accepts connections, nobody answers");
        self.fault(&title, |cluster| cluster.apiserver(&frozen)?.stub.freeze())?;
        self.verdict(&frozen)?;
        self.wait_for(&frozen, "dead")?;
        // Requests that were under way have ended by then.
        self.go_on_for(PATIENCE)?;
        let before = self.watches();
        self.scene(&format!("New requests go to the other two; the watch waits for {frozen}"))?;
        ensure!(
            self.watches() == before && !before[0].broken,
            "a frozen server says nothing: {:?}",
            self.watches()
        );
        self.require_nothing_at(&frozen)?;

        println!("\n>> {frozen} thaws");
        self.cluster.apiserver(&frozen)?.stub.thaw()?;
        self.wait_for(&frozen, "ready")?;
        self.scene("All three again, and the watch goes on where it was")?;
        let [watch] = &self.watches()[..] else { anyhow::bail!("one watch was started") };
        ensure!(watch.events > before[0].events && !watch.broken, "the watch did not go on: {watch:?}");
        self.judge()
    }

    fn server_of_the_watch(&self) -> Result<String> {
        let watches = self.watches();
        watches.first().and_then(|watch| watch.server.clone()).context("the watch has no server")
    }

    /// Fails if a request that began after the verdict was answered by this server.
    fn require_nothing_at(&self, server: &str) -> Result<()> {
        let noticed = self.faults.last().and_then(|fault| fault.noticed).context("no verdict")?;
        let report = self.asker.report();
        let mut after = report.outcomes.iter().filter(|outcome| outcome.started > noticed);
        ensure!(after.all(|outcome| outcome.result.as_deref() != Ok(server)), "{server} got new requests");
        Ok(())
    }
}

/// Whoever types it is not in the lab's cgroup.
fn by_hand(cluster: &Cluster) -> Result<String> {
    let cgroup = cgroup_of(cluster.lab.directory()).context("no cgroup v2 hierarchy is mounted")?;
    Ok(format!(
        "sh -c 'echo $$ > {}/cgroup.procs; exec nsenter --net={} curl -4 --cacert {} https://localhost:16443/name'",
        cgroup.display(),
        cluster.lb.namespace().path().display(),
        cluster.ca_file().display(),
    ))
}
