//! Why the controller cannot begin.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use super::{HashKeyError, NumbersError};
use crate::{
    dataplane::DataplaneError,
    health::HealthError,
    hook::CgroupError,
    network::{NetworkError, offloads::OffloadError},
    vip::VipError,
};

/// Why there is no controller.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// A service's check cannot be run.
    #[error("service {service:?}: {source}")]
    Check {
        /// Its name.
        service: String,
        /// What is wrong.
        source: HealthError,
    },
    /// A service's backends cannot be discovered.
    #[error("service {service:?}: discover: {reason}")]
    Discover {
        /// Its name.
        service: String,
        /// What is wrong.
        reason: String,
    },
    /// There is no key to hash flows with.
    #[error(transparent)]
    HashKey(HashKeyError),
    /// A backend on this host gets its packets unchanged, so it must have the listener's port.
    #[error(
        "service {service:?}: backend {backend} is on this host and has not the port of listener {listener}\n   = help: \
         let the server listen on port {}, on every address or the VIP, or leave it out here",
        .listener.port()
    )]
    LocalBackend {
        /// The service's name.
        service: String,
        /// The backend.
        backend: SocketAddr,
        /// The listener.
        listener: SocketAddr,
    },
    /// A configured interface is of no use.
    #[error("dataplane.interfaces: {0}")]
    Interface(#[source] NetworkError),
    /// The same, of those that backends answer by.
    #[error("dataplane.backend_interfaces: {0}")]
    BackendInterface(#[source] NetworkError),
    /// Backends are to answer by an interface that is not served.
    #[error(
        "dataplane.backend_interfaces names {0}, which sheave is not attached to\n   = help: name those that lead to backends, and where \
         dataplane.interfaces is a list, name them there too"
    )]
    NotServed(String),
    /// A backend is behind an interface that the configuration leaves out.
    #[error(
        "backend {backend} is reached by {interface}, which dataplane.{key} does not name\n   = help: add it there, or write \
         {key} = \"auto\""
    )]
    NotNamed {
        /// The list of interfaces.
        key: &'static str,
        /// The backend.
        backend: IpAddr,
        /// The interface's name.
        interface: String,
    },
    /// The program would recognise no packet of an interface.
    #[error("{0}")]
    Arrangement(String),
    /// No interface is of use.
    #[error(
        "no Ethernet interface leads to a backend or a VIP: give this host an address in their subnets or a route \
         there, or name the interfaces in dataplane.interfaces"
    )]
    NoInterface,
    /// There are more services, listeners or backends than numbers: the configuration should have said so.
    #[error(transparent)]
    Numbers(#[from] NumbersError),
    /// The network could not be asked.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The kernel refused programs, maps or interfaces.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// There is no cgroup for the connect hook.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Offloads could not be switched off.
    #[error(transparent)]
    Offload(#[from] OffloadError),
    /// The VIP could not be put here or taken away.
    #[error(transparent)]
    Vip(#[from] VipError),
    /// A system call failed.
    #[error("cannot {doing}: {source}")]
    System {
        /// What was tried.
        doing: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl ControllerError {
    /// Whether the configuration must be changed, rather than the host.
    pub fn is_configuration(&self) -> bool {
        matches!(
            self,
            Self::Check { .. }
                | Self::Discover { .. }
                | Self::Cgroup(CgroupError::NotACgroup(_))
                | Self::HashKey(_)
                | Self::LocalBackend { .. }
                | Self::Interface(_)
                | Self::BackendInterface(_)
                | Self::NotServed(_)
                | Self::NotNamed { .. }
        )
    }
}
