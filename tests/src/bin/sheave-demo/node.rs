//! A node: its clients reach three apiservers by 127.0.0.1, and one of these freezes while a watch is on it.

use std::{
    net::SocketAddr,
    sync::atomic::AtomicBool,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::{Daemon, Settings},
    lab::{cgroup::Visit, cgroup_of},
    load::{Asker, Client},
    stub::Stub,
    watches::{Seen, Watches},
};
use serde_json::Value;

use crate::{
    LANES, PATIENCE, PAUSE,
    demo::Demo,
    losses::{Losses, Register},
};

const LISTENER: &str = "127.0.0.1:16443";
/// From the verdict to the end of the dead server's sockets, at most.
const AT_ONCE: Duration = Duration::from_millis(300);
/// What the kernel tells a process whose socket was ended from outside.
const ABORTED: &str = "Software caused connection abort";

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
        let client = client(&cluster)?;
        let watch = Some(Watches::start(&cluster.lb, &client, 1)?);
        let asker = Asker::start(&cluster.lb, &client, LANES, PAUSE);
        println!(
            "On it, a client keeps asking https://{LISTENER}, where nobody listens: {LANES} new connections at a \
             time. Another watches."
        );
        let by_hand = by_hand(&cluster)?;
        let losses = Losses::new(Register::Sockets);
        let faults = Vec::new();
        Ok(Self { daemon, asker, watch, _visit: visit, cluster, interrupted, faults, losses, by_hand })
    }

    /// What the hook is there for, once.
    pub(crate) fn tell_of_a_node(&mut self) -> Result<()> {
        self.scene("All is well")?;
        let frozen = self.server_of_the_watch()?;
        let title =
            format!("{frozen} freezes, with the watch on it: its kernel accepts connections, nobody answers");
        self.fault(&frozen, &title, Stub::freeze)?;
        self.verdict(&frozen)?;
        let waiting = self.the_watch()?;
        ensure!(waiting.end.is_none(), "a frozen server says nothing: {waiting:?}");
        println!("   the watch waits: {} events, and nobody tells it that no more will come", waiting.events);
        self.wait_for(&frozen, "dead")?;
        self.require_told(&frozen, &waiting)?;
        self.watch = Some(Watches::start(&self.cluster.lb, &client(&self.cluster)?, 1)?);
        let elsewhere = self.server_of_the_watch()?;
        println!("   its client watches anew, and is answered by {elsewhere}");
        // Requests that were under way have ended by then.
        self.go_on_for(PATIENCE)?;
        self.scene("The watch and all requests are with the other two")?;
        ensure!(elsewhere != frozen, "the new watch met {frozen}, which is dead");
        self.require_nothing_at(&frozen)?;

        println!("\n>> {frozen} thaws");
        let before = self.the_watch()?;
        self.cluster.apiserver(&frozen)?.stub.thaw()?;
        self.wait_for(&frozen, "ready")?;
        self.scene("All three again, and the watch stays where it is")?;
        let watch = self.the_watch()?;
        ensure!(watch.events > before.events && watch.end.is_none(), "the watch did not go on: {watch:?}");
        self.judge()
    }

    fn the_watch(&self) -> Result<Seen> {
        self.watches().pop().context("no watch was started")
    }

    fn server_of_the_watch(&self) -> Result<String> {
        self.the_watch()?.server.context("the watch has no server")
    }

    /// Fails unless the watch, which had seen as much as `waiting` says, was told at once that its server is dead.
    fn require_told(&mut self, server: &str, waiting: &Seen) -> Result<()> {
        let verdict = self.time_of_death(server)?;
        let deadline = verdict + AT_ONCE;
        while self.the_watch()?.end.is_none() && SystemTime::now() < deadline {
            self.breathe()?;
        }
        let watch = self.the_watch()?;
        let end = watch.end.as_ref().context("the watch still waits, for a server that is dead")?;
        let after = end.at.duration_since(verdict).context("the watch was ended before the verdict")?;
        println!("   the watch is told, {} ms after that verdict: {}", after.as_millis(), end.why);
        ensure!(after <= AT_ONCE, "{AT_ONCE:?} after the verdict at most is what was promised");
        ensure!(end.why.contains(ABORTED), "its socket was not ended from outside");
        ensure!(watch.events == waiting.events, "a frozen server has sent events: {watch:?}");
        Ok(())
    }

    /// When sheave found this server dead, as its journal says.
    fn time_of_death(&self, server: &str) -> Result<SystemTime> {
        let output = self.daemon.command("events")?.arg("--json").output()?;
        let events: Vec<Value> = serde_json::from_slice(&output.stdout).context("reading the events")?;
        let is_death = |event: &&Value| {
            let text = event["text"].as_str().unwrap_or_default();
            event["backend"] == server && text.contains("-> dead")
        };
        let death =
            events.iter().rfind(is_death).with_context(|| format!("no death of {server}: {events:?}"))?;
        let time = death["time_ms"].as_u64().context("an event without a time")?;
        Ok(UNIX_EPOCH + Duration::from_millis(time))
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

/// What asks, and what watches, at the listener.
fn client(cluster: &Cluster) -> Result<Client> {
    Client::new(&cluster.ca_file(), LISTENER.parse()?, PATIENCE)?.expecting("localhost")
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
