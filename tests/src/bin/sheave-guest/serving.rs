//! Does the load balancer serve? Requests over both families, one after the other and many at once, and transfers in
//! both directions of which every byte is compared.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::{Daemon, Settings, directory_on, program},
    lab::{eventually, run},
    load::{self, Crowd},
    transfer,
};

use crate::joints::Joint;

/// Requests one after the other, each on a connection of its own, of each family.
const SEQUENTIAL: usize = 20;
/// Connections that are open at once, of each family.
const AT_ONCE: usize = 40;
/// Bytes of a transfer: some thousand packets.
const LENGTH: u64 = 2_000_000;
/// For bonds to choose their members, and cards to find their carriers.
const LINK_LIMIT: Duration = Duration::from_secs(30);

/// `dataplane.xdp_mode`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// As by default.
    Auto,
    /// In the driver, or not at all.
    Native,
    /// In the network stack.
    Generic,
}

impl Mode {
    fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }
}

/// An arrangement in which the load balancer is to serve.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trial {
    /// The mode that is asked for.
    pub(crate) mode: Mode,
    /// The mode that comes of it. [`Mode::Auto`]: either.
    pub(crate) comes_to: Mode,
    /// One arm or two.
    pub(crate) shape: Shape,
    /// How the first arm is joined. A second is a virtio card.
    pub(crate) joint: Joint,
    /// What `ethtool` is told about the first arm before the daemon starts: an option, and what follows the interface.
    pub(crate) prepare: &'static [&'static str],
    /// What happens to frames on their way to the load balancer.
    pub(crate) netem: Option<&'static str>,
    /// The daemon brings the virtual addresses itself.
    pub(crate) own: bool,
}

impl Trial {
    /// One arm, with nothing changed.
    pub(crate) const fn new(mode: Mode, joint: Joint) -> Self {
        Self { mode, comes_to: mode, shape: Shape::OneArm, joint, prepare: &[], netem: None, own: false }
    }

    /// Starts a load balancer and asks through it.
    ///
    /// # Errors
    /// When something is not served, or not as it should be.
    pub(crate) fn run(self) -> Result<()> {
        let cluster = self.cluster()?;
        self.prepare(&cluster)?;
        let daemon = self.start(&cluster, &self.settings(&cluster)?)?;
        if self.own {
            // A card that has started anew for its offloads makes checks fail, and their backends are back a check later.
            for vip in cluster.vips() {
                eventually(LINK_LIMIT, "the virtual address is served", || {
                    run(&mut cluster.curl(vip, "/name")).map(drop)
                })
                .with_context(|| said(&daemon))?;
            }
        }
        serve(&cluster).with_context(|| said(&daemon))?;
        let unloaded = daemon.unload()?;
        ensure!(unloaded.status.success(), "unload: {}", String::from_utf8_lossy(&unloaded.stderr));
        Ok(())
    }

    /// Nothing can be served: a start says why, and so does `doctor`.
    ///
    /// # Errors
    /// When one of them does not.
    pub(crate) fn run_in_vain(self, reason: &str) -> Result<()> {
        let cluster = self.cluster()?;
        self.prepare(&cluster)?;
        self.require_refused(&cluster, reason)?;
        require_doctor_says(&cluster, reason)
    }

    /// Starts a daemon, which must end and say why.
    ///
    /// # Errors
    /// When it goes on, or says something else.
    pub(crate) fn require_refused(self, cluster: &Cluster, reason: &str) -> Result<()> {
        let error = match self.start(cluster, &self.settings(cluster)?) {
            Ok(_) => anyhow::bail!("the daemon was started, in spite of: {reason}"),
            Err(error) => format!("{error:#}"),
        };
        ensure!(error.contains(reason), "the start says: {error}");
        Ok(())
    }

    /// Starts a daemon, whose backends are ready then.
    ///
    /// # Errors
    /// When it does not start, or runs in another mode than it should.
    pub(crate) fn start(self, cluster: &Cluster, settings: &Settings) -> Result<Daemon> {
        let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), settings)?;
        daemon.wait_ready(cluster.apiservers.len())?;
        self.require_mode(&daemon)?;
        Ok(daemon)
    }

    /// What the daemon is told.
    ///
    /// # Errors
    /// When the cluster has no addresses.
    pub(crate) fn settings(self, cluster: &Cluster) -> Result<Settings> {
        let mut settings = if self.own { cluster.settings_with_own_vips()? } else { cluster.settings()? };
        settings.dataplane.push(format!("xdp_mode = {:?}", self.mode.word()));
        Ok(settings)
    }

    /// Everything around the load balancer.
    ///
    /// # Errors
    /// When something of it cannot be made.
    pub(crate) fn cluster(self) -> Result<Cluster> {
        let mut join = |lab: &_, host: &mut _, segment, number| {
            let arm = lb_tests::lab::Host::links(host).len();
            let joint = if arm == 0 { self.joint } else { Joint::card("back") };
            joint.join(lab, host, segment, number)
        };
        let cluster = Cluster::start_joined(self.shape, 2, &mut join, !self.own)?;
        wait_for_the_network(&cluster)?;
        Ok(cluster)
    }

    fn prepare(self, cluster: &Cluster) -> Result<()> {
        let link = cluster.lb.link()?;
        if let [option, rest @ ..] = self.prepare {
            run(cluster.lb.command("ethtool").arg(option).arg(&link.interface).args(rest))?;
            wait_for_the_network(cluster)?;
        }
        if let Some(effect) = self.netem {
            let mut tc = cluster.lab.switch_namespace().command("tc");
            tc.args(["qdisc", "add", "dev", &link.port, "root", "netem", "limit", "10000"]);
            run(tc.args(effect.split(' ')))?;
        }
        Ok(())
    }

    fn require_mode(self, daemon: &Daemon) -> Result<()> {
        let status = daemon.status_json()?;
        let interfaces = status["interfaces"].as_array().context("the status names no interface")?;
        let modes: Vec<_> = interfaces.iter().map(|it| it["xdp_mode"].as_str().unwrap_or_default()).collect();
        println!("the backends are ready; modes: {modes:?}");
        ensure!(!modes.is_empty(), "the program is on no interface");
        let is_right = |mode: &&str| self.comes_to == Mode::Auto || *mode == self.comes_to.word();
        ensure!(
            modes.iter().all(is_right),
            "{:?} was asked for, which is {:?} here, and the modes are {modes:?}",
            self.mode,
            self.comes_to
        );
        Ok(())
    }
}

/// Cards lose their carriers while they are changed, and a bond needs a while. The servers must answer the load balancer
/// itself before it can be blamed for anything.
pub(crate) fn wait_for_the_network(cluster: &Cluster) -> Result<()> {
    for apiserver in &cluster.apiservers {
        let link = apiserver.host.link()?;
        for address in [IpAddr::from(link.v4), link.v6.into()] {
            eventually(LINK_LIMIT, "the load balancer reaches its servers", || {
                let at = std::net::SocketAddr::new(address, lb_tests::stub::PORT);
                let connected = cluster
                    .lb
                    .in_namespace(|| std::net::TcpStream::connect_timeout(&at, Duration::from_secs(1)))?;
                connected.map(drop).with_context(|| format!("connecting to {at}"))
            })?;
        }
    }
    Ok(())
}

/// Runs `doctor` with the configuration that was written last.
pub(crate) fn require_doctor_says(cluster: &Cluster, what: &str) -> Result<()> {
    let config = directory_on(&cluster.lb, cluster.lab.directory()).join("sheave.toml");
    let doctor = cluster.lb.command(program()?).args(["doctor", "--config"]).arg(config).output()?;
    let doctor = String::from_utf8_lossy(&doctor.stdout).into_owned();
    ensure!(doctor.contains(what), "`doctor` does not say: {what}: {doctor}");
    Ok(())
}

/// Asks in every way, over both families.
pub(crate) fn serve(cluster: &Cluster) -> Result<()> {
    for vip in cluster.vips() {
        let name =
            run(&mut cluster.curl(vip, "/name")).with_context(|| format!("the first request to {vip}"))?;
        ensure!(name.starts_with("api-"), "an apiserver answers with its name, and not with {name:?}");
        let client = cluster.client_of(vip)?;
        println!("{vip}: {name} answers");
        load::sequential(&cluster.client, &client, SEQUENTIAL)?.require_all(SEQUENTIAL)?;
        println!("{vip}: {SEQUENTIAL} requests one after the other");
        let mut crowd = Crowd::open(&cluster.client, &client, AT_ONCE)?;
        let report = crowd.ask_names();
        report.require_all(AT_ONCE)?;
        let servers = report.by_server().len();
        ensure!(
            servers == cluster.apiservers.len(),
            "{servers} servers share the connections: {:?}",
            report.by_server()
        );
        drop(crowd);
        println!("{vip}: {AT_ONCE} connections at once");
        transfer::download(cluster, vip, LENGTH).with_context(|| format!("a download from {vip}"))?;
        transfer::upload_and_back(cluster, vip, LENGTH).with_context(|| format!("an upload to {vip}"))?;
        println!("{vip}: {LENGTH} bytes each way");
    }
    cluster.require_no_own_resets()
}

/// The end of what the daemon has logged.
fn said(daemon: &Daemon) -> String {
    let log = daemon.log();
    let lines: Vec<_> = log.lines().collect();
    println!("--- the daemon's log\n{log}");
    format!("not served; the daemon's last line: {}", lines.last().unwrap_or(&""))
}
