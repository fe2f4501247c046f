//! What a scenario plays on.

use std::{fs, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};

use super::{
    arrivals::Arrivals,
    balancer::{Balancer, Contender, Setup},
    machine::Watch,
    silent::{Over, Silent},
    transfer::Transfer,
};
use crate::{
    cluster::{Apiserver, Cluster},
    daemon,
    load::Client,
    stub::{Health, PORT},
    watches::Watches,
};

/// A connection or an answer that takes longer is lost: a SYN may be lost twice.
const PATIENCE: Duration = Duration::from_secs(4);
/// New connections a second where an apiserver fails.
const RATE: u32 = 200;

/// The hosts, and a load balancer that is ready.
pub(super) struct Stage {
    /// Before the ground it stands on.
    pub(super) balancer: Balancer,
    pub(super) cluster: Cluster,
    pub(super) contender: Contender,
    pub(super) setup: Setup,
    /// Another build of sheave, if there is one.
    pub(super) next: Option<PathBuf>,
    /// Of the machine, from the beginning of the scenario.
    pub(super) watch: Watch,
}

impl Stage {
    /// Puts a load balancer in front of healthy apiservers.
    pub(super) fn set(cluster: Cluster, contender: Contender, setup: Setup) -> Result<Self> {
        let mut balancer = Balancer::start(contender, &cluster, setup)?;
        balancer.wait_ready(setup.backends.len())?;
        Ok(Self { balancer, cluster, contender, setup, next: None, watch: Watch::begin()? })
    }

    /// Takes the load balancer away and makes everybody well.
    pub(super) fn strike(self) -> Result<Cluster> {
        let Self { mut balancer, mut cluster, .. } = self;
        balancer.leave()?;
        for apiserver in &mut cluster.apiservers {
            cure(apiserver)?;
            cluster.lab.replug(&apiserver.host)?;
        }
        Ok(cluster)
    }

    /// The program to upgrade to: another file in any case, so that nothing may take it for the same.
    pub(super) fn next_build(&self) -> Result<PathBuf> {
        if let Some(next) = &self.next {
            return Ok(next.clone());
        }
        let copy = self.cluster.lab.directory().join("sheave-next");
        fs::copy(daemon::program()?, &copy).context("copying sheave")?;
        Ok(copy)
    }

    /// A client of the VIP.
    pub(super) fn client(&self) -> Result<Client> {
        Client::new(&self.cluster.ca_file(), SocketAddr::new(self.cluster.vip4, PORT), PATIENCE)
    }

    /// New connections at the usual rate.
    pub(super) fn arrivals(&self) -> Result<Arrivals> {
        self.arrivals_at(RATE)
    }

    /// New connections at a rate.
    pub(super) fn arrivals_at(&self, rate: u32) -> Result<Arrivals> {
        Arrivals::start(&self.cluster.client, &self.client()?, rate, &self.watch.punctuality)
    }

    /// Connections that are open and silent.
    pub(super) fn silent(&self, count: usize) -> Result<Silent> {
        Silent::open(&self.cluster.client, &self.client()?, count, Over::Nothing)
    }

    /// Watches over HTTP/2 that have no events.
    pub(super) fn silent_watches(&self, count: usize) -> Result<Silent> {
        Silent::open(&self.cluster.client, &self.client()?, count, Over::Watch)
    }

    /// Watches with events.
    pub(super) fn watches(&self, count: usize) -> Result<Watches> {
        Watches::start(&self.cluster.client, &self.client()?, count)
    }

    /// A slow download.
    pub(super) fn transfer(&self) -> Result<Transfer> {
        Transfer::start(&self.cluster.client, &self.client()?)
    }
}

fn cure(apiserver: &mut Apiserver) -> Result<()> {
    // It may not be cut off.
    let _ = apiserver.host.reconnect();
    if apiserver.stub.process().is_err() {
        return apiserver.start();
    }
    apiserver.stub.thaw()?;
    apiserver.stub.health(Health::Normal)
}
