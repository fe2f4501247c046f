//! The distribution's etcd, for a lab: members that know each other, with certificates of the lab's authority, and
//! clients that must show one.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{
    cluster::Cluster,
    lab::{
        Host, Process,
        authority::{Authority, Identity},
        eventually,
        process::Signal,
        run,
    },
};

/// Where clients are served: TLS, and their certificate is asked for.
pub const CLIENT_PORT: u16 = 2379;
/// Where members talk to each other. Never balanced.
const PEER_PORT: u16 = 2380;
/// Where health and metrics are, in the clear.
const METRICS_PORT: u16 = 2381;
/// The number of the first member's host in its segment.
const FIRST_MEMBER: u8 = 21;
/// For an election, on a busy machine.
const QUORUM_LIMIT: Duration = Duration::from_secs(60);
/// For a process to end, on a busy machine.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// Three members beside a load balancer. Dropping it ends them.
#[derive(Debug)]
pub struct Etcd {
    /// `etcd-1` to `etcd-3`.
    pub members: Vec<Member>,
    /// Who clients are.
    pub client: Identity,
    ca: PathBuf,
}

/// A member and its host.
#[derive(Debug)]
pub struct Member {
    /// Where it runs.
    pub host: Host,
    address: IpAddr,
    command: Vec<String>,
    process: Option<Process>,
}

impl Etcd {
    /// Starts three members in the load balancer's first segment and waits until they have a leader. Their
    /// certificates are also for the VIPs.
    ///
    /// # Errors
    /// Without etcd, or when they do not find each other.
    pub fn start(cluster: &Cluster) -> Result<Self> {
        let segment = cluster.lb.link()?.segment;
        let hosts = (0..3)
            .map(|index| {
                let mut host = cluster.lab.host(&format!("etcd-{}", index + 1))?;
                cluster.lab.plug(&mut host, segment, FIRST_MEMBER + index)?;
                Ok(host)
            })
            .collect::<Result<Vec<_>>>()?;
        let mut peers = Vec::new();
        for host in &hosts {
            peers.push(format!("{}={}", host.name(), url("https", host.address(cluster.vip4)?, PEER_PORT)));
        }
        let peers = peers.join(",");
        let mut members = Vec::new();
        for host in hosts {
            let mut member = Member::new(host, cluster, &peers)?;
            member.start()?;
            members.push(member);
        }
        let client = cluster.authority.client("etcd-client", &[])?;
        let etcd = Self { members, client, ca: cluster.authority.file() };
        eventually(QUORUM_LIMIT, "etcd has a leader", || etcd.leader(&cluster.client))?;
        Ok(etcd)
    }

    /// `etcdctl` on a host, towards one address, with the clients' certificate.
    pub fn etcdctl(&self, on: &Host, to: SocketAddr) -> Command {
        let mut command = on.command("etcdctl");
        command.env("ETCDCTL_API", "3").arg(format!("--endpoints=https://{to}"));
        command.arg("--cacert").arg(&self.ca);
        command.arg("--cert").arg(&self.client.certificate).arg("--key").arg(&self.client.key);
        command
    }

    /// The index of the member that leads.
    ///
    /// # Errors
    /// When none that runs knows of one.
    pub fn leader(&self, on: &Host) -> Result<usize> {
        for (index, member) in self.members.iter().enumerate().filter(|(_, member)| member.process.is_some())
        {
            let mut command = self.etcdctl(on, member.client_address());
            let Ok(answer) = run(command.args(["endpoint", "status", "--write-out=json"])) else { continue };
            let answer: Value = serde_json::from_str(&answer)?;
            let status = &answer[0]["Status"];
            let leads = status["leader"] == status["header"]["member_id"];
            if leads && status["leader"].as_u64().is_some_and(|leader| leader != 0) {
                return Ok(index);
            }
        }
        bail!("nobody leads")
    }

    /// The indexes of the members that do not lead.
    ///
    /// # Errors
    /// When nobody leads.
    pub fn followers(&self, on: &Host) -> Result<Vec<usize>> {
        let leader = self.leader(on)?;
        Ok((0..self.members.len()).filter(|index| *index != leader).collect())
    }
}

impl Member {
    fn new(host: Host, cluster: &Cluster, peers: &str) -> Result<Self> {
        let address = host.address(cluster.vip4)?;
        let directory = cluster.lab.directory();
        let command = Self::arguments(&host, address, &cluster.authority, &cluster.vips(), peers)?;
        let data = directory.join(format!("{}-data", host.name()));
        fs::create_dir_all(&data)?;
        let command = [command, vec![format!("--data-dir={}", data.display())]].concat();
        Ok(Self { host, address, command, process: None })
    }

    fn arguments(
        host: &Host,
        address: IpAddr,
        authority: &Authority,
        vips: &[IpAddr],
        peers: &str,
    ) -> Result<Vec<String>> {
        let identity = authority.peer(host.name(), &[&[address], vips].concat())?;
        let (ca, certificate, key) =
            (authority.file().display().to_string(), identity.certificate.display(), identity.key.display());
        let (client, peer) = (url("https", address, CLIENT_PORT), url("https", address, PEER_PORT));
        Ok(vec![
            format!("--name={}", host.name()),
            format!("--initial-cluster={peers}"),
            format!("--listen-client-urls={client}"),
            format!("--advertise-client-urls={client}"),
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
            format!("--listen-metrics-urls={}", url("http", address, METRICS_PORT)),
            "--client-cert-auth".to_owned(),
            format!("--trusted-ca-file={ca}"),
            format!("--cert-file={certificate}"),
            format!("--key-file={key}"),
            "--peer-client-cert-auth".to_owned(),
            format!("--peer-trusted-ca-file={ca}"),
            format!("--peer-cert-file={certificate}"),
            format!("--peer-key-file={key}"),
        ])
    }

    /// Where it serves clients.
    pub fn client_address(&self) -> SocketAddr {
        SocketAddr::new(self.address, CLIENT_PORT)
    }

    /// Starts it, for the first time or again with the data it has.
    ///
    /// # Errors
    /// Without etcd.
    pub fn start(&mut self) -> Result<()> {
        let mut command = self.host.command("etcd");
        command.args(&self.command);
        // Versions before 3.5 want to be told; elsewhere nobody asks.
        command.env("ETCD_UNSUPPORTED_ARCH", "arm64");
        self.process = Some(self.host.start("etcd", command)?);
        Ok(())
    }

    /// SIGTERM, and waits for its end.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(&mut self) -> Result<()> {
        self.process()?.signal(Signal::SIGTERM)?;
        self.process()?.wait(STOP_LIMIT)?;
        self.process = None;
        Ok(())
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// When it is not running.
    pub fn kill(&mut self) -> Result<()> {
        self.process()?.kill()?;
        self.process = None;
        Ok(())
    }

    /// SIGSTOP: its kernel goes on accepting and acknowledging.
    ///
    /// # Errors
    /// When it is not running.
    pub fn freeze(&mut self) -> Result<()> {
        self.process()?.signal(Signal::SIGSTOP)
    }

    /// SIGCONT.
    ///
    /// # Errors
    /// When it is not running.
    pub fn thaw(&mut self) -> Result<()> {
        self.process()?.signal(Signal::SIGCONT)
    }

    /// How many connections clients behind `source` have with it.
    ///
    /// # Errors
    /// When `ss` fails.
    pub fn connections_from(&self, source: IpAddr) -> Result<usize> {
        let filter = format!("ss -Htn state established sport = :{CLIENT_PORT} dst {source}");
        Ok(self.host.run(&filter)?.lines().count())
    }

    fn process(&mut self) -> Result<&mut Process> {
        self.process.as_mut().with_context(|| format!("{} is not running", self.host.name()))
    }
}

/// A command that must fail, and what it says then.
///
/// # Errors
/// When it succeeds.
pub fn failure(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    ensure!(!output.status.success(), "{command:?} succeeded: {}", String::from_utf8_lossy(&output.stdout));
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

fn url(scheme: &str, address: IpAddr, port: u16) -> String {
    format!("{scheme}://{}", SocketAddr::new(address, port))
}
