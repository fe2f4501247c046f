//! What the admin socket answers, as JSON: read by `sheave status --json`, and by scripts.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
};

use serde::{Deserialize, Serialize};

/// `GET /v1/status`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// In the order of the configuration file.
    pub services: Vec<ServiceStatus>,
    /// Every listener's address.
    #[serde(default)]
    pub vip: Vec<VipStatus>,
    /// Where the program is attached.
    #[serde(default)]
    pub interfaces: Vec<InterfaceStatus>,
    /// Where the connect hook is; null: nowhere.
    #[serde(default)]
    pub hook: Option<HookStatus>,
    /// Packets since the maps were made, by the name of the outcome.
    #[serde(default)]
    pub packets: BTreeMap<String, u64>,
    /// The flow table of each family that is listened on, at most some seconds ago.
    #[serde(default)]
    pub flow_tables: Vec<FlowTableStatus>,
    /// What the operator should know about this load balancer, in sentences.
    #[serde(default)]
    pub flags: Vec<String>,
    /// The daemon itself.
    #[serde(default)]
    pub daemon: DaemonStatus,
}

impl Status {
    /// Whether some service has no backend that is ready.
    pub fn lacks_ready_backend(&self) -> bool {
        self.services.iter().any(|service| !service.has_ready_backend())
    }
}

/// How the slots of a family's flow table are used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowTableStatus {
    /// `"ipv4"` or `"ipv6"`.
    pub family: String,
    /// Slots there are.
    pub slots: u64,
    /// Those that are not free: the sum of the following.
    pub used: u64,
    /// Established flows.
    pub established: u64,
    /// Handshakes, and all flows to a backend that is this host.
    pub half_open: u64,
    /// Flows that are closed or were reset, and rest.
    pub closed: u64,
}

/// A service and its backends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// `name`
    pub name: String,
    /// The addresses it answers on.
    pub listen: Vec<SocketAddr>,
    /// `balance`, as in the configuration.
    pub balance: String,
    /// `forward`, as in the configuration.
    pub forward: String,
    /// In the order of the configuration file.
    pub backends: Vec<BackendStatus>,
    /// Which backends get new flows, and why those: `"ready backends"`.
    #[serde(default)]
    pub selection: String,
    /// What the operator should know about this service, in sentences.
    #[serde(default)]
    pub flags: Vec<String>,
    /// What the cluster lists; null: the file says it all.
    #[serde(default)]
    pub discovery: Option<DiscoveryStatus>,
}

/// A list of backends in the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiscoveryStatus {
    /// `namespace/service`
    pub service: String,
    /// The last good list; null: there never was one.
    pub addresses: Option<Vec<SocketAddr>>,
    /// Backends that are used although they are not listed any more.
    pub held: Vec<SocketAddr>,
    /// The apiserver that tells of changes now; null: nobody does.
    pub through: Option<SocketAddr>,
    /// When the list was last heard of, in seconds since 1970-01-01 UTC.
    pub heard: Option<u64>,
    /// Why nobody tells, or why what is told is not believed.
    pub problem: Option<String>,
}

impl ServiceStatus {
    fn has_ready_backend(&self) -> bool {
        self.backends.iter().any(|backend| backend.state == BackendState::Ready)
    }
}

/// A backend, its flows and its last check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendStatus {
    /// `name`; the address where the configuration gives none.
    pub name: String,
    /// Where its flows go.
    pub address: SocketAddr,
    /// The cluster lists it, and the file does not name it.
    #[serde(default)]
    pub discovered: bool,
    /// What the checks and the operator say.
    pub state: BackendState,
    /// `weight`
    pub weight: u16,
    /// Flows in the flow table now.
    pub active_flows: u64,
    /// Flows since the flow table was made.
    pub total_flows: u64,
    /// The last check that finished.
    pub check: CheckStatus,
}

/// The state of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendState {
    /// Not yet checked.
    Unknown,
    /// Gets new flows.
    Ready,
    /// Answers, and not as expected: no new flows, old ones are kept.
    Draining,
    /// Does not answer below HTTP: no new flows, old ones are kept.
    Silent,
    /// Silent for so long that old flows are reset.
    Dead,
    /// The operator took it out.
    Maint,
    /// The operator lets it run dry.
    Drain,
}

impl fmt::Display for BackendState {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.pad(match self {
            Self::Unknown => "unknown",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Silent => "silent",
            Self::Dead => "dead",
            Self::Maint => "maint",
            Self::Drain => "drain",
        })
    }
}

/// The last check of a backend.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckStatus {
    /// HAProxy's code: `L7OK`, `L4TOUT`; empty before the first check has finished.
    pub code: String,
    /// The status of the HTTP response, where there was one.
    pub http_status: Option<u16>,
    /// How long it took, in milliseconds.
    pub duration_ms: Option<u64>,
    /// In words: `Layer7 wrong status`.
    pub detail: String,
    /// The sub-checks that the backend named as failed: `["etcd"]`.
    #[serde(default)]
    pub failed: Vec<String>,
    /// When the backend's state last changed, in seconds since 1970-01-01 UTC.
    pub last_change: Option<u64>,
    /// Whole days until the certificate that the backend showed expires; negative when it has. Null: it showed none, or a
    /// check does not look at it.
    #[serde(default)]
    pub certificate_days: Option<i64>,
    /// The same for our own client certificate, where one was presented.
    #[serde(default)]
    pub credential_days: Option<i64>,
}

impl fmt::Display for CheckStatus {
    /// As HAProxy's page shows it: `L7OK/200 in 4ms`.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.code.is_empty() {
            return out.write_str("-");
        }
        out.write_str(&self.code)?;
        if let Some(status) = self.http_status {
            write!(out, "/{status}")?;
        }
        self.duration_ms.iter().try_for_each(|duration| write!(out, " in {duration}ms"))
    }
}

/// A listener's address and whether this host has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VipStatus {
    /// Without the port.
    pub address: IpAddr,
    /// Whether it is on one of this host's interfaces now.
    pub present: bool,
}

/// An interface that the program is attached to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceStatus {
    /// As `ip link` shows it.
    pub name: String,
    /// `native` or `generic`.
    pub xdp_mode: String,
    /// Of a bond in native mode: the names of its members that the data path knows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub members: Vec<String>,
}

/// The connect hook.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookStatus {
    /// The directory of the cgroup whose processes' connections it takes.
    pub cgroup: String,
    /// Whether all of it is still there: it goes with the cgroup, and somebody may detach it.
    pub attached: bool,
}

/// The daemon that answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// Its process id.
    pub pid: u32,
    /// Since it started.
    pub uptime_seconds: u64,
    /// As `sheave --version` shows it.
    pub version: String,
}

/// `GET /v1/alive`: whether *this load balancer* works, whatever its backends do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alive {
    /// The program is attached, the maps are fresh and the daemon is turning.
    pub alive: bool,
    /// Why not; empty when alive.
    pub reasons: Vec<String>,
}

/// `POST /v1/unload`: what was taken away.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unloaded {
    /// Programs, maps and addresses, in words.
    pub removed: Vec<String>,
}

/// What is answered instead when something failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What failed, and what to do.
    pub error: String,
    /// What kind of trouble.
    #[serde(default)]
    pub kind: super::RefusalKind,
}
