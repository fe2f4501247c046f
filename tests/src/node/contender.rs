//! Who is measured, and what runs for it.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    time::Duration,
};

use anyhow::Result;
use serde::Serialize;

use super::{
    proxies,
    worker::{Load, Order, Worker},
};
use crate::{
    cluster::Cluster,
    daemon::{Daemon, program},
    lab::{Process, cgroup::Group, eventually, process::sibling_program},
    stub::PORT,
};

/// Until it has led a client to every server.
const SERVES_LIMIT: Duration = Duration::from_secs(30);

/// A way from a node's clients to the apiservers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Contender {
    /// The clients dial the apiservers themselves, outside of the hook's cgroup.
    Direct,
    Sheave,
    HaProxy,
    Nginx,
}

impl Contender {
    pub(super) const ALL: [Self; 4] = [Self::Direct, Self::Sheave, Self::HaProxy, Self::Nginx];

    /// As it calls itself.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Sheave => "sheave",
            Self::HaProxy => "HAProxy",
            Self::Nginx => "nginx",
        }
    }

    /// Where clients reach it.
    fn listener(self) -> SocketAddr {
        let port = match self {
            Self::Direct => PORT,
            Self::Sheave => 16_443,
            Self::HaProxy => 16_444,
            Self::Nginx => 16_445,
        };
        (Ipv4Addr::LOCALHOST, port).into()
    }
}

/// A contender with its client, ready to be measured. Dropping it ends both.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) worker: Worker,
    /// Of the client.
    pub(super) client: Group,
    /// Of the balancer; empty for none.
    pub(super) balancer: Group,
    _balancer: Balancer,
}

/// Kept for its end.
#[derive(Debug)]
enum Balancer {
    None,
    Sheave(#[expect(dead_code, reason = "ends when it is dropped")] Daemon),
    Proxy(#[expect(dead_code, reason = "ends when it is dropped")] Process),
}

impl Running {
    /// Starts it on the load balancer's host, which is the node, and waits until it leads to every server.
    pub(super) fn start(contender: Contender, cluster: &Cluster, threads: usize) -> Result<Self> {
        let name = contender.name();
        let client = Group::new(&cluster.lab, &format!("{name}-client"))?;
        let balancer = Group::new(&cluster.lab, &format!("{name}-balancer"))?;
        let (listen, servers) = (contender.listener(), servers(cluster)?);
        let running = match contender {
            Contender::Direct => Balancer::None,
            Contender::Sheave => Balancer::Sheave(sheave(cluster, &balancer, &client, listen)?),
            Contender::HaProxy => Balancer::Proxy(proxies::haproxy(cluster, &balancer, listen, &servers)?),
            Contender::Nginx => Balancer::Proxy(proxies::nginx(cluster, &balancer, listen, &servers)?),
        };
        let targets = if contender == Contender::Direct { servers.clone() } else { vec![listen] };
        let command = client.command(&cluster.lb, sibling_program("sheave-load")?);
        let mut worker = Worker::start(command, &cluster.ca_file(), threads, &targets)?;
        eventually(SERVES_LIMIT, &format!("{name} serves"), || {
            worker.order(Order::Prepare(Load::Kept { servers: servers.len() }))
        })?;
        worker.order(Order::Rest)?;
        Ok(Self { worker, client, balancer, _balancer: running })
    }
}

/// The apiservers' IPv4 addresses.
pub(super) fn servers(cluster: &Cluster) -> Result<Vec<SocketAddr>> {
    let addresses = cluster.apiservers.iter().map(|apiserver| apiserver.host.address(cluster.vip4));
    addresses.map(|address| Ok(SocketAddr::new(address?, PORT))).collect()
}

/// The daemon in `group`, with its hook on the clients' cgroup.
fn sheave(cluster: &Cluster, group: &Group, clients: &Group, listen: SocketAddr) -> Result<Daemon> {
    let mut settings = cluster.settings()?;
    settings.listen = vec![listen];
    settings.dataplane.push(format!("cgroup = {:?}", clients.path()));
    let config = |directory: &Path| settings.to_toml(directory);
    let command = group.command(&cluster.lb, program()?);
    let mut daemon = Daemon::start_with(&cluster.lb, cluster.lab.directory(), config, command)?;
    daemon.wait_ready(cluster.apiservers.len())?;
    Ok(daemon)
}
