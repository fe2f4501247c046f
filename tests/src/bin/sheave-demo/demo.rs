//! What every story does: harm, waiting for the verdict, and the account of the requests.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{
    cluster::Cluster,
    daemon::Daemon,
    lab::cgroup::Visit,
    load::Asker,
    stub::Stub,
    watches::{Seen, Watches},
};

use crate::losses::{Fault, Losses};

/// Some times the longest verdict: a reply that never comes (5 s), then a fresh connection that stays silent (1 s).
const VERDICT_LIMIT: Duration = Duration::from_secs(60);
/// How long requests go on after each turn of the story.
const SCENE: Duration = Duration::from_millis(1500);

/// The running demonstration. Who runs goes before the ground they stand on.
pub(crate) struct Demo<'flag> {
    pub(crate) daemon: Daemon,
    pub(crate) asker: Asker,
    /// A watch, where the story is about one.
    pub(crate) watch: Option<Watches>,
    /// Where clients are threads of this process and must be in the lab's cgroup.
    pub(crate) _visit: Option<Visit>,
    pub(crate) cluster: Cluster,
    pub(crate) interrupted: &'flag AtomicBool,
    pub(crate) faults: Vec<Fault>,
    pub(crate) losses: Losses,
    /// What asks for a server's name in another terminal.
    pub(crate) by_hand: String,
}

impl Demo<'_> {
    /// Lets requests go on for a while, then shows where things stand.
    pub(crate) fn scene(&mut self, title: &str) -> Result<()> {
        self.go_on_for(SCENE)?;
        println!("\n== {title}");
        print!("{}", self.daemon.status_table()?);
        println!("{}", self.tally());
        Ok(())
    }

    pub(crate) fn go_on_for(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.breathe()?;
        }
        Ok(())
    }

    /// Waits a moment, and stops the demonstration when the user asked for it.
    pub(crate) fn breathe(&mut self) -> Result<()> {
        thread::sleep(Duration::from_millis(20));
        ensure!(!self.interrupted.load(Ordering::Relaxed), "interrupted");
        let ended = self.daemon.process().exited()?;
        ensure!(ended.is_none(), "sheave ended:\n{}", self.daemon.log());
        // While it is known whose they were.
        self.losses.take_in(&self.asker, &self.cluster)
    }

    /// Does harm to a server.
    pub(crate) fn fault(
        &mut self,
        server: &str,
        title: &str,
        harm: impl FnOnce(&mut Stub) -> Result<()>,
    ) -> Result<()> {
        println!("\n>> {title}");
        self.faults.push(Fault { server: server.to_owned(), began: Instant::now(), noticed: None });
        harm(&mut self.cluster.apiserver(server)?.stub)
    }

    /// Waits until sheave has noticed the latest fault.
    pub(crate) fn verdict(&mut self, server: &str) -> Result<()> {
        let state = self.wait_until(server, |state| !matches!(state, "ready" | "unknown"))?;
        let noticed = Instant::now();
        let fault = self.faults.last_mut().context("no fault")?;
        fault.noticed = Some(noticed);
        println!("   sheave: {server} is {state}, after {:.1?}", noticed - fault.began);
        Ok(())
    }

    pub(crate) fn wait_for(&mut self, server: &str, wanted: &str) -> Result<()> {
        let started = Instant::now();
        self.wait_until(server, |state| state == wanted)?;
        println!("   sheave: {server} is {wanted}, after {:.1?}", started.elapsed());
        Ok(())
    }

    /// Waits until all states of a server satisfy `wanted`, and returns one of them.
    pub(crate) fn wait_until(&mut self, server: &str, wanted: impl Fn(&str) -> bool) -> Result<String> {
        let deadline = Instant::now() + VERDICT_LIMIT;
        loop {
            let status = self.daemon.status()?;
            let states = status.states(server);
            if !states.is_empty() && states.iter().all(|state| wanted(state)) {
                return Ok(states[0].to_owned());
            }
            ensure!(Instant::now() < deadline, "{server} is still {states:?} after {VERDICT_LIMIT:?}");
            self.breathe()?;
        }
    }

    pub(crate) fn new_connections(&mut self, server: &str) -> Result<u64> {
        Ok(self.cluster.apiserver(server)?.stub.connections()?.values().sum())
    }

    /// What the client has seen, in one line.
    pub(crate) fn tally(&self) -> String {
        let report = self.asker.report();
        let servers = report.by_server().into_iter().map(|(server, count)| format!("{server} {count}"));
        let (excused, lost) = self.losses.divided(&self.faults);
        format!(
            "requests: {} answered ({}), {} lost on a failing server before the verdict, {} lost otherwise{}",
            report.answered(),
            servers.collect::<Vec<_>>().join(", "),
            excused,
            lost.values().sum::<usize>(),
            self.watches().iter().map(watch_in_words).collect::<String>()
        )
    }

    /// Fails unless requests went on without a loss that is sheave's.
    pub(crate) fn judge(&mut self) -> Result<()> {
        self.losses.take_in(&self.asker, &self.cluster)?;
        self.losses.require_excused(&self.faults)?;
        let report = self.asker.report();
        ensure!(report.by_server().len() == 3, "not every server was used: {:?}", report.by_server());
        println!("\nNo request was lost after a verdict, none on a server that was well.");
        Ok(())
    }

    /// What is known of the watches.
    pub(crate) fn watches(&self) -> Vec<Seen> {
        self.watch.as_ref().map(Watches::seen).unwrap_or_default()
    }
}

fn watch_in_words(Seen { server, events, end }: &Seen) -> String {
    let state = if end.is_some() { "broken" } else { "open" };
    format!("\nthe watch: on {}, {events} events, {state}", server.as_deref().unwrap_or("no server"))
}
