//! What a valid configuration says, with every default filled in.
//!
//! These types hold only values that passed validation: whoever has a [`Config`] need not check it again.

use std::{net::SocketAddr, ops::RangeInclusive, path::PathBuf, time::Duration};

use ipnet::IpNet;

/// The whole configuration file.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `[dataplane]`
    pub dataplane: Dataplane,
    /// `[vip]`
    pub vip: Vip,
    /// `[admin]`
    pub admin: Admin,
    /// `[[service]]`, at least one, in file order.
    pub services: Vec<Service>,
}

/// `[dataplane]`: where packets come in and which addresses they leave from.
#[derive(Clone, Debug, PartialEq)]
pub struct Dataplane {
    /// The interfaces the XDP program is attached to.
    pub interfaces: Interfaces,
    /// The interfaces that backends answer by, at least one. None: those that lead to backends, and those that have a SNAT address
    /// or its subnet.
    pub backend_interfaces: Option<Vec<String>>,
    /// How the XDP program is attached.
    pub xdp_mode: XdpMode,
    /// Source addresses towards the backends. Empty: the VIPs themselves.
    pub snat_addresses: Vec<std::net::IpAddr>,
    /// How many addresses of a family that is used the flow table has places for, at least; more are made if more are named
    /// when it is made.
    pub snat_addresses_max: usize,
    /// Source ports towards the backends. Absent: all of 1024-65535 for addresses of our own, those below the host's
    /// ephemeral ports for an address that this host uses as well.
    pub snat_ports: Option<RangeInclusive<u16>>,
    /// 128 bits in hexadecimal, the same file on every load balancer of a VIP. Absent: random.
    pub hash_key_file: Option<PathBuf>,
    /// The most that one source may use of the slots of a family, in per cent. None: no limit.
    pub source_share: Option<u8>,
    /// The same, of half-open slots.
    pub half_open_share: Option<u8>,
    /// The smallest MTU that an ICMP error may ask an IPv4 sender for, in bytes. One that asks for less is made to ask for
    /// this.
    pub path_mtu_floor: u16,
    /// What must survive a restart.
    pub state_dir: PathBuf,
    /// Where maps, program and links are pinned, on a BPF file system: one directory for each load balancer.
    pub pin_dir: PathBuf,
    /// Whose connections the connect hook takes.
    pub cgroup: Cgroup,
}

/// `dataplane.interfaces`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Interfaces {
    /// From the routes to the backends and the interfaces that carry the VIPs.
    Auto,
    /// By name, at least one.
    Named(Vec<String>),
    /// None: no packet is forwarded, only connections of this host are served, by the connect hook.
    None,
}

/// `dataplane.cgroup`: the processes whose connections the connect hook takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cgroup {
    /// All of this host's: the root of the cgroup v2 hierarchy, wherever it is mounted.
    Auto,
    /// Those in a cgroup of that hierarchy, by its directory.
    Directory(PathBuf),
    /// Nobody's: there is no hook.
    None,
}

/// `dataplane.xdp_mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpMode {
    /// Native where the driver can; generic only where that is known to be safe.
    Auto,
    /// In the driver, or not at all.
    Native,
    /// In the network stack: slower, works with every driver.
    Generic,
}

/// `[vip]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vip {
    /// `mode`
    pub mode: VipMode,
}

/// `vip.mode`: who puts the VIP on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VipMode {
    /// Somebody else (keepalived, kube-vip, the operator): we never add or remove it.
    Follow,
    /// We do, and we take away what we put there.
    Own,
}

/// `[admin]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Admin {
    /// Where `sheave status` and the other commands reach the daemon.
    pub socket: PathBuf,
    /// Where `GET /probe/...` is answered over TCP, for kubelets and monitors. Absent: nowhere.
    pub listen: Option<SocketAddr>,
    /// The group whose members may use it beside root.
    pub group: Option<String>,
}

/// `[[service]]`: some listeners and the backends behind them.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// Unique among services.
    pub name: String,
    /// The addresses and ports it answers on, at least one. On loopback only for clients on this host.
    pub listen: Vec<SocketAddr>,
    /// How a new flow finds its backend.
    pub balance: Balance,
    /// How packets reach the backend.
    pub forward: Forward,
    /// An established flow without a segment for this long is forgotten: 1 minute to 8 hours.
    pub idle_timeout: Duration,
    /// Source prefixes that may open flows. Empty: everyone.
    pub allow: Vec<IpNet>,
    /// What becomes of the flows of a backend that is dead.
    pub on_dead: OnDead,
    /// What becomes of flows that neither end has used for `idle_timeout`.
    pub on_idle: OnIdle,
    /// Silent for so long without a break, a backend is dead: 1 s to an hour.
    pub reset_after: Duration,
    /// Flows that are reset or asked in a second, at most. 0: no limit.
    pub reset_rate: u32,
    /// How long the flows of a backend may go on that an operator drains or puts into maintenance: 1 s to a day.
    /// None: until they end.
    pub drain_timeout: Option<Duration>,
    /// The connect hook takes connections of every process, whatever its network namespace, to listeners that are
    /// not on loopback.
    pub pods: bool,
    /// How its backends are checked.
    pub check: Check,
    /// Names and addresses unique within the service. At least one, unless there are some by name, or to be discovered.
    pub backends: Vec<Backend>,
    /// Backends whose addresses must be looked up (`crate::names`), after which they are among `backends`.
    pub named_backends: Vec<NamedBackend>,
    /// Backends that the cluster lists (`crate::discovery`), after which they are among `backends`.
    pub discover: Option<Discover>,
}

/// `service.discover`: the EndpointSlices of a Service in the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Discover {
    /// Whom to ask where no backend answers, and how to prove who we are. It may not be there yet.
    pub kubeconfig: PathBuf,
    /// Of the Service.
    pub namespace: String,
    /// Its name.
    pub service: String,
    /// What is listed stands in the place of what the file says, once one of them is ready.
    pub replace: bool,
}

/// `service.balance`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balance {
    /// Consistent hashing of the flow.
    Maglev,
}

/// `service.forward`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forward {
    /// Both addresses are rewritten, replies come back through the load balancer.
    Nat,
}

/// `service.on_idle`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnIdle {
    /// Both ends are told.
    Reset,
    /// The slot is closed, and an end that speaks again is answered by a RST.
    Silent,
}

/// `service.on_dead`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDead {
    /// They are reset: their clients connect anew, to a backend that lives.
    Reset,
    /// They are kept.
    Keep,
}

/// `[[service.backend]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Unique within the service; the address where none is given.
    pub name: String,
    /// Where its flows go.
    pub address: SocketAddr,
    /// Share of new flows relative to the others, 0 (none) to 256.
    pub weight: u16,
    /// The host name that its address was found by, if by one.
    pub host: Option<String>,
    /// The file does not name it: the cluster lists it.
    pub discovered: bool,
}

/// A backend by host name: `master-1:6443`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedBackend {
    /// Unique within the service; host and port where none is given.
    pub name: String,
    /// To be looked up, and what its certificate is for.
    pub host: String,
    /// At every address of the host.
    pub port: u16,
    /// As [`Backend::weight`], at every address.
    pub weight: u16,
}

/// `[service.check]`: how a backend is asked whether it is ready.
#[derive(Clone, Debug, PartialEq)]
pub struct Check {
    /// `type`
    pub kind: CheckKind,
    /// What is asked for (`https` and `http`).
    pub path: String,
    /// The statuses that mean ready (`https` and `http`).
    pub expect: Vec<RangeInclusive<u16>>,
    /// Between checks of a backend whose verdict stands.
    pub interval: Duration,
    /// Between checks while a verdict is pending.
    pub fast_interval: Duration,
    /// For TCP and TLS to complete.
    pub connect_timeout: Duration,
    /// For the reply, after the connection stands.
    pub timeout: Duration,
    /// Successes that make a failed backend ready again.
    pub rise: u32,
    /// Failures in a row that make a ready backend not ready.
    pub fall: u32,
    /// Checked instead of the backend's port.
    pub port: Option<u16>,
    /// Checked instead of the backend's address.
    pub address: Option<std::net::IpAddr>,
    /// TLS name (SNI and verification). Absent: the address that is checked.
    pub server_name: Option<String>,
    /// PEM certificates that the backend's certificate must chain to. Absent, or the file absent: not verified.
    pub ca_file: Option<PathBuf>,
    /// PEM certificate chain and private key presented to the backend.
    pub client_cert: Option<ClientCertificate>,
    /// A bearer token.
    pub token_file: Option<PathBuf>,
    /// CA, TLS name and credential in one, from its current context; then none of the others but `server_name`.
    pub kubeconfig: Option<PathBuf>,
    /// Accept any certificate.
    pub insecure_skip_tls_verify: bool,
}

/// `client_cert_file` and `client_key_file`: only ever both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificate {
    /// PEM certificate chain.
    pub cert_file: PathBuf,
    /// PEM private key.
    pub key_file: PathBuf,
}

/// `check.type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckKind {
    /// TLS, then an HTTP request.
    Https,
    /// An HTTP request in the clear.
    Http,
    /// A TLS handshake.
    Tls,
    /// A TCP handshake.
    Tcp,
    /// Always ready.
    None,
}
