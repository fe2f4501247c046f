//! The load balancers that are measured, behind one face.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;

use super::{haproxy::HaProxy, said};
use crate::{
    cluster::Cluster,
    daemon::{Daemon, Settings},
    lab::{eventually, process::Signal},
};

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Contender {
    Sheave,
    HaProxy,
}

impl Contender {
    pub(super) const ALL: [Self; 2] = [Self::Sheave, Self::HaProxy];

    /// As it calls itself.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Sheave => "sheave",
            Self::HaProxy => "HAProxy",
        }
    }

    /// The words in its log when it resets or closes the established flows of a backend.
    pub(super) fn gives_up(self) -> &'static str {
        match self {
            Self::Sheave => "-> dead",
            Self::HaProxy => DOWN,
        }
    }
}

/// For an orderly end.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// The words in the log of either when a backend gets no new flows any more.
pub(super) const DOWN: &str = "is DOWN";

/// How it is started.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup {
    /// The apiservers it knows of.
    pub(super) backends: &'static [&'static str],
    /// Lines for sheave's `[[service]]`; HAProxy always has the same configuration.
    pub(super) service: &'static [&'static str],
}

/// Three apiservers, everything else as it comes.
pub(super) const USUAL: Setup = Setup { backends: &["api-1", "api-2", "api-3"], service: &[] };

/// A running load balancer. Dropping it kills it.
#[derive(Debug)]
pub(super) enum Balancer {
    Sheave(Daemon),
    HaProxy(HaProxy),
}

impl Balancer {
    /// Starts it.
    pub(super) fn start(contender: Contender, cluster: &Cluster, setup: Setup) -> Result<Self> {
        Ok(match contender {
            Contender::Sheave => {
                let settings = settings(cluster, setup)?;
                Self::Sheave(Daemon::start(&cluster.lb, cluster.lab.directory(), &settings)?)
            }
            Contender::HaProxy => {
                Self::HaProxy(HaProxy::start(cluster, |name| setup.backends.contains(&name))?)
            }
        })
    }

    /// Waits until so many backends are ready.
    pub(super) fn wait_ready(&mut self, backends: usize) -> Result<()> {
        match self {
            Self::Sheave(daemon) => daemon.wait_ready(backends),
            Self::HaProxy(haproxy) => haproxy.wait_ready(backends),
        }
    }

    /// Ends it as a crash would.
    pub(super) fn kill(&mut self) -> Result<()> {
        match self {
            Self::Sheave(daemon) => daemon.process().kill(),
            Self::HaProxy(haproxy) => haproxy.kill(),
        }
    }

    /// Has it balance between other apiservers, by its own way of doing so without a restart.
    pub(super) fn reload(&mut self, cluster: &Cluster, setup: Setup) -> Result<()> {
        match self {
            Self::Sheave(daemon) => {
                let said = daemon.reload(&settings(cluster, setup)?)?;
                ensure!(said.status.success(), "reload: {said:?}");
                Ok(())
            }
            Self::HaProxy(haproxy) => haproxy.reload(cluster, |name| setup.backends.contains(&name)),
        }
    }

    /// Stops it in order and starts another build of it.
    pub(super) fn replace(&mut self, cluster: &Cluster, setup: Setup, next: &Path) -> Result<()> {
        let Self::Sheave(daemon) = self else { bail!("HAProxy's new version comes by a reload") };
        daemon.process().signal(Signal::SIGTERM)?;
        let status = daemon.process().wait(STOP_LIMIT)?;
        ensure!(status.success(), "it did not stop in order: {status}\n{}", daemon.log());
        let (settings, command) = (settings(cluster, setup)?, cluster.lb.command(next));
        let config = |directory: &Path| settings.to_toml(directory);
        *daemon = Daemon::start_with(&cluster.lb, cluster.lab.directory(), config, command)?;
        Ok(())
    }

    /// Ends it and leaves nothing of it on the host.
    pub(super) fn leave(&mut self) -> Result<()> {
        match self {
            Self::Sheave(daemon) => {
                let output = daemon.unload()?;
                ensure!(output.status.success(), "unload: {}", String::from_utf8_lossy(&output.stderr));
                daemon.process().wait(STOP_LIMIT).map(drop)
            }
            Self::HaProxy(haproxy) => haproxy.kill(),
        }
    }

    /// How long its log is: what is said from now on comes after it.
    pub(super) fn mark(&self) -> usize {
        self.log().lines().count()
    }

    /// Waits until it has said all `words` in one line after `mark`, and returns when it did.
    pub(super) fn wait_said(&self, mark: usize, words: &[&str], limit: Duration) -> Result<Instant> {
        eventually(limit, &format!("it says {words:?}"), || {
            let log = self.log();
            let said = said::when(log.lines().skip(mark), words);
            said.with_context(|| format!("since then it said:\n{}", since(&log, mark)))
        })
    }

    /// What it has logged: the laboratory is new for each scenario.
    pub(super) fn log(&self) -> String {
        match self {
            Self::Sheave(daemon) => daemon.log(),
            Self::HaProxy(haproxy) => haproxy.log(),
        }
    }
}

fn since(log: &str, mark: usize) -> String {
    log.lines().skip(mark).collect::<Vec<_>>().join("\n")
}

/// IPv4 alone, as HAProxy has it.
fn settings(cluster: &Cluster, setup: Setup) -> Result<Settings> {
    let mut settings = cluster.settings()?;
    settings.listen.retain(|listener| listener.is_ipv4());
    settings.backends.retain(|(name, address)| address.is_ipv4() && setup.backends.contains(&name.as_str()));
    settings.dataplane.clear();
    if let Some(inside) = cluster.lb.links().get(1) {
        settings.dataplane.push(format!("snat_addresses = [\"{}\"]", inside.v4));
    }
    settings.service = setup.service.iter().map(|line| (*line).to_owned()).collect();
    ensure!(settings.backends.len() == setup.backends.len(), "the cluster has not all of {setup:?}");
    Ok(settings)
}
