//! A client, a load balancer, some plain servers, and an attacker in the same segment.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr, TcpStream},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use socket2::{Domain, Socket, Type};

use super::{Attacker, Pair, PlainServer};
use crate::{
    cluster::{Cluster, Shape},
    daemon::{Daemon, Settings},
    lab::{Host, eventually, run},
    load,
    stub::PORT,
};

/// For a real client to be connected: its first SYN and two more, after one second and after three.
pub const ROOM: Duration = Duration::from_millis(3_500);
/// For the clients of a backend that was cut off to be told: two checks of half a second, `reset_after`, and time for a
/// busy machine.
pub const TOLD: Duration = Duration::from_secs(12);
/// Until a connection that stands is accepted and listed.
const ACCEPTED: Duration = Duration::from_secs(10);
/// Of the attacker in the segment.
const ATTACKER: u8 = 66;

/// The hosts and what runs on them. Dropping it removes everything.
#[derive(Debug)]
pub struct Arena {
    /// The load balancer's daemon.
    pub daemon: Daemon,
    /// On the hosts of the cluster's apiservers.
    pub servers: Vec<PlainServer>,
    /// On a host of its own, whose switch port learns nothing.
    pub attacker: Attacker,
    /// Its host.
    pub attacking: Host,
    /// The same as an attacker with the client's MAC would send.
    pub beside_client: Attacker,
    /// The hosts: dropped last.
    pub cluster: Cluster,
}

/// A line of `sheave flows --json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Flow {
    /// The client.
    pub client: SocketAddr,
    /// The client as its backend sees it.
    pub source: SocketAddr,
    /// The backend.
    pub backend_address: SocketAddr,
    /// half-open, established, closing or killed.
    pub state: String,
}

/// What `sheave flows --json` lists: flows that are over are not in it.
///
/// # Errors
/// When the daemon does not answer.
pub fn flows(daemon: &Daemon) -> Result<Vec<Flow>> {
    let listed = run(daemon.command("flows")?.arg("--json"))?;
    let flows: Vec<Flow> =
        listed.lines().map(serde_json::from_str).collect::<Result<_, _>>().context("sheave flows")?;
    Ok(flows.into_iter().filter(|flow| flow.state != "closed").collect())
}

impl Arena {
    /// Starts so many servers in one segment, and a daemon with settings that `change` has the last word on.
    ///
    /// # Errors
    /// Without root, or when something does not come up.
    pub fn start(servers: u8, change: impl FnOnce(&mut Settings)) -> Result<Self> {
        Self::start_in(Shape::OneArm, servers, change)
    }

    /// The same in a network of another shape; the attacker is in the segment of the VIPs.
    ///
    /// # Errors
    /// As [`Arena::start`].
    pub fn start_in(shape: Shape, servers: u8, change: impl FnOnce(&mut Settings)) -> Result<Self> {
        load::raise_descriptor_limit()?;
        let cluster = Cluster::without_servers(shape, servers)?;
        let mut attacking = cluster.lab.host("attacker")?;
        cluster.lab.plug(&mut attacking, cluster.lb.link()?.segment, ATTACKER)?;
        cluster.lab.learn_nothing_from(&attacking)?;
        let running =
            cluster.apiservers.iter().map(|it| PlainServer::start(&it.host)).collect::<Result<_>>()?;
        let attacker = Attacker::new(&attacking, &cluster.lb, "eth0")?;
        let beside_client = Attacker::new(&cluster.client, &cluster.lb, "eth0")?;
        let mut settings = settings(&cluster)?;
        change(&mut settings);
        let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings)?;
        daemon.wait_ready(servers.into())?;
        Ok(Self { daemon, servers: running, attacker, attacking, beside_client, cluster })
    }

    /// Opens so many connections through a VIP, on which nothing is said.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub fn open(&self, vip: IpAddr, count: usize) -> Result<Vec<Pair>> {
        self.open_on(&self.cluster.client, vip, count)
    }

    /// The same from another host.
    ///
    /// # Errors
    /// As [`Arena::open`].
    pub fn open_on(&self, host: &Host, vip: IpAddr, count: usize) -> Result<Vec<Pair>> {
        let to = SocketAddr::new(vip, PORT);
        let clients = host.in_namespace(|| {
            (0..count).map(|_| Ok(TcpStream::connect_timeout(&to, ACCEPTED)?)).collect::<Result<Vec<_>>>()
        })??;
        self.pair(to, clients)
    }

    /// Opens a connection through a VIP from this address of the client.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open_from(&self, from: SocketAddr, vip: IpAddr) -> Result<Pair> {
        let to = SocketAddr::new(vip, PORT);
        let client = self.cluster.client.in_namespace(|| -> Result<TcpStream> {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            socket.bind(&from.into())?;
            socket.connect_timeout(&to.into(), ACCEPTED)?;
            Ok(socket.into())
        })??;
        self.pair(to, vec![client])?.pop().context("one was opened")
    }

    /// Opens so many, and has a byte pass each way on each.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub fn open_and_exchange(&self, vip: IpAddr, count: usize) -> Result<Vec<Pair>> {
        let mut pairs = self.open(vip, count)?;
        pairs.iter_mut().try_for_each(Pair::exchange)?;
        Ok(pairs)
    }

    /// Finds the other ends.
    fn pair(&self, to: SocketAddr, clients: Vec<TcpStream>) -> Result<Vec<Pair>> {
        let listed: HashMap<_, _> =
            flows(&self.daemon)?.into_iter().map(|flow| (flow.client, flow)).collect();
        let hosts = self.cluster.apiservers.iter();
        let addresses = hosts.map(|it| it.host.address(to.ip())).collect::<Result<Vec<_>>>()?;
        let pair = |client: TcpStream| {
            let from = client.local_addr()?;
            let Flow { source, backend_address, .. } =
                *listed.get(&from).with_context(|| format!("{from} is connected and not listed"))?;
            let at = addresses.iter().position(|address| *address == backend_address.ip());
            let at = at.with_context(|| format!("no server has {backend_address}"))?;
            let server = eventually(ACCEPTED, "the server has the connection", || {
                self.servers[at].take(source).context("not yet")
            })?;
            for stream in [&client, &server] {
                stream.set_nonblocking(false)?;
                stream.set_nodelay(true)?;
            }
            Ok(Pair { client, server, at, from, to, source, backend: backend_address })
        };
        clients.into_iter().map(pair).collect()
    }

    /// How many of `count` real clients are connected through a VIP within [`ROOM`], all at the same time.
    ///
    /// # Errors
    /// When the client cannot be entered.
    pub fn connected(&self, vip: IpAddr, count: usize) -> Result<usize> {
        let to = SocketAddr::new(vip, PORT);
        self.cluster.client.in_namespace(|| {
            let sockets = (0..count).map(|_| begin(to)).collect::<Result<Vec<_>>>()?;
            let deadline = Instant::now() + ROOM;
            loop {
                let connected = sockets.iter().filter(|socket| socket.peer_addr().is_ok()).count();
                if connected == count || Instant::now() >= deadline {
                    return Ok(connected);
                }
                thread::sleep(Duration::from_millis(5));
            }
        })?
    }

    /// Flows whose client is one of these.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn flows_of(&self, clients: &[SocketAddr]) -> Result<Vec<Flow>> {
        Ok(flows(&self.daemon)?.into_iter().filter(|flow| clients.contains(&flow.client)).collect())
    }

    /// A counter of the data path.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn packets(&self, name: &str) -> Result<u64> {
        Ok(self.daemon.status()?.packets.get(name).copied().unwrap_or_default())
    }

    /// Cuts a server off, and waits until it is found dead and the client of each of `pairs` that is at it was told.
    ///
    /// # Errors
    /// When the server does not become dead, or a client is not told within [`TOLD`].
    pub fn cut_off_and_require_told(&mut self, server: usize, pairs: &mut [Pair]) -> Result<()> {
        let apiserver = &self.cluster.apiservers[server];
        let name = apiserver.stub.name().to_owned();
        apiserver.host.cut_off()?;
        let deadline = Instant::now() + TOLD;
        let mut untold = Vec::new();
        let mut count = 0;
        for pair in pairs.iter_mut().filter(|pair| pair.at == server) {
            count += 1;
            if let Err(error) = pair.client_told(deadline) {
                untold.push(format!("{error:#}"));
            }
        }
        let states = self.daemon.status()?.states(&name).join(", ");
        ensure!(count > 0, "no connection is at {name}");
        ensure!(
            untold.is_empty(),
            "{} of {count} clients of {name}, which is {states}, were not told within {TOLD:?}: {}",
            untold.len(),
            untold[0]
        );
        Ok(())
    }
}

/// A socket whose SYN is on its way.
fn begin(to: SocketAddr) -> Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error.into()),
        _ => Ok(socket),
    }
}

/// Quick checks of TCP alone, and the shortest `reset_after`.
fn settings(cluster: &Cluster) -> Result<Settings> {
    let check = [
        "type = \"tcp\"",
        "interval = \"300ms\"",
        "fast_interval = \"100ms\"",
        "connect_timeout = \"500ms\"",
        "fall = 2",
    ];
    Ok(Settings {
        ca_file: PathBuf::new(),
        service: vec!["reset_after = \"1s\"".to_owned()],
        check: check.map(str::to_owned).to_vec(),
        ..cluster.settings()?
    })
}
