//! What the admin socket is told to do, and what it answers, as JSON.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// Why something was not done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RefusalKind {
    /// What was asked for does not make sense here: HTTP 400. The command exits with 2.
    Usage,
    /// The configuration file is wrong: HTTP 422. The command exits with 2.
    Configuration,
    /// It cannot be done now, or not without a restart: HTTP 409.
    Conflict,
    /// The daemon or the kernel failed: HTTP 500.
    #[default]
    #[serde(other)]
    Failed,
}

/// Something was not done. Unless the error says otherwise, nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What kind of trouble.
    pub kind: RefusalKind,
    /// What is wrong and what to do, in sentences.
    pub error: String,
}

impl Refusal {
    /// A refusal of this kind.
    pub fn new(kind: RefusalKind, error: impl Into<String>) -> Self {
        Self { kind, error: error.into() }
    }
}

/// Which backend a command is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendChoice {
    /// Its name, or its address and port.
    pub backend: String,
    /// Of which service; None: the only one that has such a backend.
    pub service: Option<String>,
    /// Of every service that has such a backend.
    pub all_services: bool,
}

/// What an operator can say about a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OrderedState {
    /// As the checks say.
    Ready,
    /// No new flows, unless there is nobody else.
    Drain,
    /// No new flows, whatever happens.
    Maint,
}

/// `POST /v1/backends/state`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateOrder {
    /// The backend's name, or its address and port.
    pub backend: String,
    /// Of which service; None: the only one that has such a backend.
    #[serde(default)]
    pub service: Option<String>,
    /// Of every service that has such a backend.
    #[serde(default)]
    pub all_services: bool,
    /// What it is to be.
    pub state: OrderedState,
    /// For drain and maint: after so many seconds the flows that it still has are reset. None: after the service's
    /// `drain_timeout`, or never.
    #[serde(default)]
    pub timeout_seconds: Option<u64>,
}

impl StateOrder {
    /// Which backend it is about.
    pub fn choice(&self) -> BackendChoice {
        let Self { backend, service, all_services, .. } = self.clone();
        BackendChoice { backend, service, all_services }
    }
}

/// `POST /v1/backends/weight`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightOrder {
    /// The backend's name, or its address and port.
    pub backend: String,
    /// Of which service; None: the only one that has such a backend.
    #[serde(default)]
    pub service: Option<String>,
    /// Of every service that has such a backend.
    #[serde(default)]
    pub all_services: bool,
    /// 0 to 256; None: as configured.
    pub weight: Option<u16>,
}

impl WeightOrder {
    /// Which backend it is about.
    pub fn choice(&self) -> BackendChoice {
        let Self { backend, service, all_services, .. } = self.clone();
        BackendChoice { backend, service, all_services }
    }
}

/// The answer to an order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ordered {
    /// What it was about, as it is now.
    pub backends: Vec<OrderedBackend>,
    /// What the operator should know: that nobody else is left, say.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// A backend after an order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrderedBackend {
    /// The service's name.
    pub service: String,
    /// The backend's name.
    pub name: String,
    /// Where its flows go.
    pub address: SocketAddr,
    /// As in the status.
    pub state: super::BackendState,
    /// As it counts now.
    pub weight: u16,
    /// Flows that it still has.
    pub active_flows: u64,
    /// In how many seconds those are reset; None: never.
    #[serde(default)]
    pub reset_in_seconds: Option<u64>,
}

/// `POST /v1/flows/kill`: which flows. At least a backend or a client must be given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KillOrder {
    /// The backend's name, or its address and port.
    #[serde(default)]
    pub backend: Option<String>,
    /// The service's name.
    #[serde(default)]
    pub service: Option<String>,
    /// Of every service that has such a backend.
    #[serde(default)]
    pub all_services: bool,
    /// The client: an address, an address and port, or a prefix.
    #[serde(default)]
    pub client: Option<String>,
}

/// The answer to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Killed {
    /// How many flows were reset.
    pub flows: u64,
}

/// `POST /v1/reload`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// What is different now, in words; empty: the file says what already is.
    pub changes: Vec<String>,
    /// What the file says that is allowed and seldom wise.
    pub warnings: Vec<String>,
}

/// `GET /v1/flows`: which flows. What is not given does not restrict.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowFilter {
    /// The client's address.
    pub client: Option<std::net::IpAddr>,
    /// The backend's name, or its address and port.
    pub backend: Option<String>,
    /// The service's name.
    pub service: Option<String>,
    /// No segment for at least so many seconds.
    pub min_age: u64,
}

/// A flow: one line of `GET /v1/flows`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// Where the client's packets come from.
    pub client: SocketAddr,
    /// What the client connected to.
    pub listener: Option<SocketAddr>,
    /// The service's name; None: the listener was removed, and its flows live on.
    pub service: Option<String>,
    /// The backend's name; None: it was removed, and its flows live on.
    pub backend: Option<String>,
    /// Where its packets go.
    pub backend_address: Option<SocketAddr>,
    /// Where they come from as the backend sees them: SNAT address and slot.
    pub source: SocketAddr,
    /// half-open, established, closing, closed or killed.
    pub state: String,
    /// Whether the backend has answered the SYN.
    #[serde(default)]
    pub answered: bool,
    /// Since either side's last segment, to about a second.
    pub idle_seconds: u64,
}

/// Some of the flows, and where to go on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowPage {
    /// At most a few hundred.
    pub flows: Vec<Flow>,
    /// What to ask for next; None: that was all.
    pub next: Option<u64>,
}

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JournalKind {
    /// A check changed a backend's state.
    Check,
    /// An operator's order.
    Operator,
    /// The choice of who gets new flows has another reason.
    Selection,
    /// A reload, or one that was refused.
    Reload,
    /// The daemon began or ended.
    Daemon,
}

impl JournalKind {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Check => "check",
            Self::Operator => "operator",
            Self::Selection => "selection",
            Self::Reload => "reload",
            Self::Daemon => "daemon",
        }
    }
}

/// An event: one entry of `GET /v1/events`, and one line of the file that keeps them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalEvent {
    /// Milliseconds since 1970-01-01 UTC.
    pub time_ms: u64,
    /// What it is about.
    pub kind: JournalKind,
    /// The service, where it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// The backend, where it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    /// What happened, and why.
    pub text: String,
}

/// `GET /v1/events`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    /// The oldest first.
    pub events: Vec<JournalEvent>,
}
