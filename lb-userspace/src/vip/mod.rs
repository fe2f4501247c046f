//! The VIP on this host: followed where somebody else puts it there, owned where we do.

use std::{io, net::IpAddr, path::PathBuf};

use crate::network::{Mac, NetworkError, display_mac};

mod follow;
mod frame;
mod link;
mod own;
mod record;

pub use follow::{Follower, Presence};
pub use own::{Owner, Rival, holder};
pub use record::{Placed, leftovers, remove_leftovers, remove_others};

/// Why a VIP cannot be put on this host, or taken away.
#[derive(Debug, thiserror::Error)]
pub enum VipError {
    /// Another host has the address.
    #[error(
        "the VIP {vip} is in use: {mac} answers for it on {interface}. Stop the other owner (keepalived, kube-vip, \
         another sheave), or choose another address; with vip.mode = \"follow\" sheave leaves it to that owner",
        mac = display_mac(mac)
    )]
    InUse {
        /// The VIP.
        vip: IpAddr,
        /// Who answered.
        mac: Mac,
        /// Where.
        interface: String,
    },
    /// The VIP is in no subnet of this host.
    #[error(
        "the VIP {vip} is in no subnet of this host (packets to it would leave by the router {gateway}): give an \
         interface an address in the VIP's subnet, or choose a VIP in a subnet of this host"
    )]
    NoSubnet {
        /// The VIP.
        vip: IpAddr,
        /// The next hop of the route that was found instead.
        gateway: IpAddr,
    },
    /// The interface that should carry the VIP is down.
    #[error(
        "{interface}, which should carry the VIP {vip}, is down: `ip link set {interface} up`, or check the cable"
    )]
    InterfaceDown {
        /// The VIP.
        vip: IpAddr,
        /// The interface.
        interface: String,
    },
    /// The network could not be asked.
    #[error("cannot find the interface for the VIP {vip}: {source}")]
    Network {
        /// The VIP.
        vip: IpAddr,
        /// What went wrong.
        source: NetworkError,
    },
    /// Frames could not be sent or received.
    #[error("cannot ask for or announce the VIP {vip} on {interface}: {source}")]
    Link {
        /// The VIP.
        vip: IpAddr,
        /// Where.
        interface: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel refused to add or remove the address.
    #[error("cannot {doing} the VIP {vip} on {interface}: {source}")]
    Address {
        /// What was tried.
        doing: &'static str,
        /// The VIP.
        vip: IpAddr,
        /// Where.
        interface: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The record of what was put where could not be read or written.
    #[error("{path}: {source}: without it nobody could take the VIP away after a crash", path = path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}
