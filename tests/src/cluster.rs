//! The usual laboratory: a client, a load balancer and some apiservers.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    daemon::{self, Daemon, Settings},
    lab::{Host, Lab, Segment, authority::Authority},
    load::Client,
    stub::{PORT, Stub},
};

/// Numbers of hosts in their segments.
const LB: u8 = 2;
const CLIENT: u8 = 5;
const ROUTER: u8 = 1;
const FIRST_APISERVER: u8 = 11;
const VIP: u8 = 100;
/// Where a node listens on its loopback addresses.
pub const NODE_PORT: u16 = 16_443;
/// A request that has taken this long is lost.
const PATIENCE: Duration = Duration::from_secs(20);

/// How the hosts are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Everybody in one segment.
    OneArm,
    /// The client in one segment, the apiservers in another, the load balancer in both.
    TwoArm,
    /// The client behind a router, everybody else in one segment.
    Routed(Router),
}

/// What the router of [`Shape::Routed`] does besides routing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Router {
    /// Hides the client behind its own address.
    pub masquerades: bool,
    /// Passes no packet larger than this towards the client, as a tunnel on the way would. Neither end knows.
    pub mtu: Option<u16>,
}

/// The hosts. Dropping it ends everything that runs on them and removes them.
#[derive(Debug)]
pub struct Cluster {
    /// Where requests come from.
    pub client: Host,
    /// Where sheave runs. It carries the VIPs.
    pub lb: Host,
    /// Between the client and the rest, in [`Shape::Routed`].
    pub router: Option<Host>,
    /// `api-1`, `api-2`, ...: running stubs.
    pub apiservers: Vec<Apiserver>,
    /// The clients' IPv4 VIP.
    pub vip4: IpAddr,
    /// The clients' IPv6 VIP.
    pub vip6: IpAddr,
    shape: Shape,
    /// Signs everybody's certificates.
    pub authority: Authority,
    /// The ground they stand on: dropped last.
    pub lab: Lab,
}

/// An apiserver and its host.
#[derive(Debug)]
pub struct Apiserver {
    /// The stub.
    pub stub: Stub,
    /// Where it runs.
    pub host: Host,
}

impl Apiserver {
    /// Starts it again after [`Stub::kill`].
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(&mut self) -> Result<()> {
        self.stub.start(&self.host)
    }
}

impl Cluster {
    /// Builds the hosts, starts `apiservers` stubs, and puts both VIPs on the load balancer.
    ///
    /// # Errors
    /// Without root, or when something does not come up.
    pub fn start(shape: Shape, apiservers: u8) -> Result<Self> {
        Self::without_vips(shape, apiservers)?.with_vips()
    }

    /// The same with plain cables, and a load balancer that `join` plugs into each of its segments, under the number that
    /// it is given. `vips`: the load balancer gets them, as with [`Cluster::start`].
    ///
    /// # Errors
    /// Without root, or when something does not come up.
    pub fn start_joined(
        shape: Shape,
        apiservers: u8,
        join: &mut dyn FnMut(&Lab, &mut Host, Segment, u8) -> Result<()>,
        vips: bool,
    ) -> Result<Self> {
        let cluster = Self::build(shape, apiservers, Lab::plug_plain, join)?;
        if vips { cluster.with_vips() } else { cluster.running() }
    }

    fn with_vips(self) -> Result<Self> {
        for vip in self.vips() {
            self.lb.add_vip(vip)?;
        }
        self.running()
    }

    fn running(mut self) -> Result<Self> {
        self.count_resets()?;
        for apiserver in &mut self.apiservers {
            apiserver.start()?;
        }
        Ok(self)
    }

    /// Builds the hosts and puts both VIPs on the load balancer; no stub runs.
    ///
    /// # Errors
    /// Without root, or when `ip` or `nft` fails.
    pub fn without_servers(shape: Shape, apiservers: u8) -> Result<Self> {
        let cluster = Self::without_vips(shape, apiservers)?;
        for vip in cluster.vips() {
            cluster.lb.add_vip(vip)?;
        }
        cluster.count_resets()?;
        Ok(cluster)
    }

    /// Builds the hosts and starts the stubs; nobody has a VIP yet.
    ///
    /// # Errors
    /// Without root, or when something does not come up.
    pub fn start_without_vips(shape: Shape, apiservers: u8) -> Result<Self> {
        let mut cluster = Self::without_vips(shape, apiservers)?;
        for apiserver in &mut cluster.apiservers {
            apiserver.start()?;
        }
        Ok(cluster)
    }

    /// Builds the hosts only.
    ///
    /// # Errors
    /// Without root, or when `ip` fails.
    pub fn without_vips(shape: Shape, apiservers: u8) -> Result<Self> {
        Self::build(shape, apiservers, Lab::plug, &mut Lab::plug)
    }

    fn build(
        shape: Shape,
        apiservers: u8,
        plug: fn(&Lab, &mut Host, Segment, u8) -> Result<()>,
        join: &mut dyn FnMut(&Lab, &mut Host, Segment, u8) -> Result<()>,
    ) -> Result<Self> {
        let lab = Lab::new()?;
        let front = lab.segment(1)?;
        let behind = if shape == Shape::OneArm { front } else { lab.segment(2)? };
        let (mut client, mut lb) = (lab.host("client")?, lab.host("lb")?);
        join(&lab, &mut lb, front, LB)?;
        let router = match shape {
            Shape::OneArm => {
                plug(&lab, &mut client, front, CLIENT)?;
                None
            }
            Shape::TwoArm => {
                plug(&lab, &mut client, front, CLIENT)?;
                join(&lab, &mut lb, behind, LB)?;
                None
            }
            Shape::Routed(router) => {
                plug(&lab, &mut client, behind, CLIENT)?;
                Some(add_router(&lab, router, front, behind)?)
            }
        };
        let backends = if shape == Shape::TwoArm { behind } else { front };
        if router.is_some() {
            default_route(&client, behind)?;
            default_route(&lb, front)?;
        }
        let (vip4, vip6) = (front.v4(VIP).into(), front.v6(VIP).into());
        let authority = Authority::new(lab.directory())?;
        let apiservers = (0..apiservers)
            .map(|index| {
                let mut host = lab.host(&format!("api-{}", index + 1))?;
                plug(&lab, &mut host, backends, FIRST_APISERVER + index)?;
                if router.is_some() {
                    default_route(&host, front)?;
                }
                let link = host.link()?;
                let stub = Stub::new(&host, &authority, &[vip4, vip6, link.v4.into(), link.v6.into()])?;
                Ok(Apiserver { stub, host })
            })
            .collect::<Result<_>>()?;
        Ok(Self { client, lb, router, apiservers, vip4, vip6, shape, authority, lab })
    }

    /// Both VIPs.
    pub fn vips(&self) -> [IpAddr; 2] {
        [self.vip4, self.vip6]
    }

    /// An apiserver by its name.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn apiserver(&mut self, name: &str) -> Result<&mut Apiserver> {
        let mut apiservers = self.apiservers.iter_mut();
        apiservers.find(|apiserver| apiserver.host.name() == name).with_context(|| format!("no {name}"))
    }

    /// A configuration with every apiserver behind both VIPs, and the VIPs already on the host.
    ///
    /// # Errors
    /// When a host is not plugged in.
    pub fn settings(&self) -> Result<Settings> {
        let mut backends = Vec::new();
        for Apiserver { host, .. } in &self.apiservers {
            for vip in self.vips() {
                backends.push((host.name().to_owned(), SocketAddr::new(host.address(vip)?, PORT)));
            }
        }
        let mut dataplane = Vec::new();
        if self.shape == Shape::TwoArm {
            // The backends route the VIP elsewhere: the source they see must be on their own segment.
            let inside = self.lb.links().last().context("the load balancer has no second arm")?;
            let addresses = [inside.v4.to_string(), inside.v6.to_string()];
            dataplane.push(format!("snat_addresses = {addresses:?}"));
        }
        Ok(Settings {
            vip_mode: "follow",
            listen: self.vips().map(|vip| SocketAddr::new(vip, PORT)).to_vec(),
            backends,
            ca_file: self.ca_file(),
            dataplane,
            service: Vec::new(),
            check: Vec::new(),
        })
    }

    /// The usual settings, with VIPs that the daemon puts on the load balancer itself.
    ///
    /// # Errors
    /// As [`Cluster::settings`].
    pub fn settings_with_own_vips(&self) -> Result<Settings> {
        Ok(Settings { vip_mode: "own", ..self.settings()? })
    }

    /// A node's settings: its processes reach the apiservers by its loopback addresses, at [`NODE_PORT`]. Checks come
    /// every second, and not every ten as they would.
    ///
    /// # Errors
    /// As [`Cluster::settings`].
    pub fn settings_of_a_node(&self) -> Result<Settings> {
        let mut settings = self.settings()?;
        settings.listen =
            vec![(Ipv4Addr::LOCALHOST, NODE_PORT).into(), (Ipv6Addr::LOCALHOST, NODE_PORT).into()];
        settings.check.push("interval = \"1s\"".to_owned());
        Ok(settings)
    }

    /// Starts the daemon on the load balancer and waits until all apiservers are ready.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn balance(&self) -> Result<Daemon> {
        let mut daemon = Daemon::start(&self.lb, self.lab.directory(), &self.settings()?)?;
        daemon.wait_ready(self.apiservers.len())?;
        Ok(daemon)
    }

    /// Where the daemon on the load balancer keeps its files, `sheave.toml` and `admin.sock` among them.
    pub fn daemon_directory(&self) -> PathBuf {
        daemon::directory_on(&self.lb, self.lab.directory())
    }

    /// Cuts all apiservers off and waits until the daemon finds them silent. Then new connections are refused, and not
    /// left hanging.
    ///
    /// # Errors
    /// When it is not so.
    pub fn cut_all_off_and_require_refused(&self, daemon: &mut Daemon, limit: Duration) -> Result<()> {
        for apiserver in &self.apiservers {
            apiserver.host.cut_off()?;
        }
        for apiserver in &self.apiservers {
            daemon.wait_state(apiserver.stub.name(), "silent", limit)?;
        }
        for vip in self.vips() {
            let curl = self.curl(vip, "/name").output()?;
            ensure!(curl.status.code() == Some(7), "refused, not timed out: {curl:?}");
        }
        Ok(())
    }

    /// Connections of the client that ended by a RST.
    ///
    /// # Errors
    /// When its kernel does not say.
    pub fn client_resets(&self) -> Result<u64> {
        self.client.counter("Tcp", "EstabResets")
    }

    /// The certificate of the cluster's authority.
    pub fn ca_file(&self) -> PathBuf {
        self.authority.file()
    }

    /// A counting client for the listener at `address`.
    ///
    /// # Errors
    /// When the CA certificate cannot be read.
    pub fn client_of(&self, address: IpAddr) -> Result<Client> {
        Client::new(&self.ca_file(), SocketAddr::new(address, PORT), PATIENCE)
    }

    /// A curl command on the client for a path behind `address`.
    pub fn curl(&self, address: IpAddr, path: &str) -> Command {
        let mut command = self.client.command("curl");
        command.args(["--silent", "--show-error", "--globoff", "--max-time"]);
        command.arg(PATIENCE.as_secs().to_string()).arg("--cacert").arg(self.ca_file());
        command.arg(format!("https://{}{path}", SocketAddr::new(address, PORT)));
        command
    }

    /// Counts what must never happen: RSTs that the load balancer's own stack sends in a VIP's name, or from a port that is
    /// a flow's. XDP's do not come by here.
    fn count_resets(&self) -> Result<()> {
        self.lb.nft(
            "add table inet lab; add counter inet lab resets; \
             add chain inet lab out { type filter hook output priority 0; }",
        )?;
        let count = |matches: String| {
            let rule = format!("add rule inet lab out {matches} tcp flags & rst == rst counter name resets");
            self.lb.nft(&rule).map(drop)
        };
        count(format!("ip saddr {}", self.vip4))?;
        count(format!("ip6 saddr {}", self.vip6))?;
        // Where the VIPs are not the SNAT addresses. The host's own connections, its checks, have ephemeral ports.
        let inside = self.lb.links().get(1).filter(|_| self.shape == Shape::TwoArm);
        inside.map_or(Ok(()), |inside| {
            count(format!("ip saddr {} tcp sport 1024-32767", inside.v4))?;
            count(format!("ip6 saddr {} tcp sport 1024-32767", inside.v6))
        })
    }

    /// How many RSTs the load balancer's own stack has sent into flows.
    ///
    /// # Errors
    /// When nft does not answer.
    pub fn own_resets(&self) -> Result<u64> {
        let json: serde_json::Value =
            serde_json::from_str(&self.lb.run("nft -j list counter inet lab resets")?)?;
        let counters = json["nftables"].as_array().context("no list")?;
        let counter = counters.iter().find_map(|entry| entry["counter"]["packets"].as_u64());
        counter.context("nft shows no counter")
    }

    /// Fails if the load balancer's own stack has sent a RST into a flow.
    ///
    /// # Errors
    /// When it has.
    pub fn require_no_own_resets(&self) -> Result<()> {
        let resets = self.own_resets()?;
        ensure!(resets == 0, "the load balancer's own stack sent {resets} RSTs into flows");
        Ok(())
    }
}

fn add_router(lab: &Lab, router: Router, front: Segment, behind: Segment) -> Result<Host> {
    let mut host = lab.host("router")?;
    lab.plug(&mut host, behind, ROUTER)?;
    lab.plug(&mut host, front, ROUTER)?;
    host.forward()?;
    if let Some(mtu) = router.mtu {
        // A locked route MTU is what a router goes by when it forwards; its interface still takes 1,500 bytes
        // from the client.
        let behind = (behind.v4(0), behind.v6(0));
        host.ip(&format!("route replace {}/24 dev eth0 mtu lock {mtu}", behind.0))?;
        host.ip(&format!("-6 route replace {}/64 dev eth0 metric 256 mtu lock {mtu}", behind.1))?;
    }
    if router.masquerades {
        host.nft(
            "add table inet lab; \
             add chain inet lab out { type nat hook postrouting priority 100; }; \
             add rule inet lab out oifname eth1 masquerade",
        )?;
    }
    Ok(host)
}

fn default_route(host: &Host, segment: Segment) -> Result<()> {
    host.ip(&format!("route add default via {}", segment.v4(ROUTER)))?;
    host.ip(&format!("-6 route add default via {}", segment.v6(ROUTER)))
}
