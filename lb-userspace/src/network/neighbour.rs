//! The hosts on the same link, and how their MAC addresses are kept known.

use std::net::IpAddr;

use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};

use super::{Mac, Network, NetworkError, io_error};

/// What the kernel knows about a host on the same link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    mac: Option<Mac>,
    state: NeighbourState,
}

impl Neighbour {
    /// The MAC address, unless the kernel gave it up.
    pub fn mac(&self) -> Option<Mac> {
        use NeighbourState::{Delay, Noarp, Permanent, Probe, Reachable, Stale};
        self.mac.filter(|_| matches!(self.state, Reachable | Stale | Delay | Probe | Noarp | Permanent))
    }

    /// Whether the kernel should be asked to resolve it (again): it knows nothing, gave up, or has not heard from it
    /// for a while. A permanent entry must not be asked for: that would make it an ordinary one.
    fn wants_asking(&self) -> bool {
        use NeighbourState::{Failed, None, Other, Stale};
        matches!(self.state, None | Failed | Stale | Other(_))
    }

    pub(super) fn from_message(message: &NeighbourMessage) -> Option<((u32, IpAddr), Self)> {
        let mut address = None;
        let mut mac = None;
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(value)) => {
                    address = Some(IpAddr::V4(*value));
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(value)) => {
                    address = Some(IpAddr::V6(*value));
                }
                NeighbourAttribute::LinkLayerAddress(value) => mac = Mac::try_from(value.as_slice()).ok(),
                _ => {}
            }
        }
        // Entries of a bridge's forwarding table have no address, proxy entries are not about a neighbour.
        if message.header.flags.contains(NeighbourFlags::Proxy) {
            return None;
        }
        Some(((message.header.ifindex, address?), Self { mac, state: message.header.state }))
    }
}

impl Network {
    /// Asks the kernel to find out a neighbour's MAC address if it is not sure of it. The answer arrives as a change.
    pub(super) async fn ask_for(&self, interface: u32, address: IpAddr) -> Result<(), NetworkError> {
        if self.neighbour(interface, address).is_some_and(|known| !known.wants_asking()) {
            return Ok(());
        }
        self.requests()
            .neighbours()
            .add(interface, address)
            .state(NeighbourState::None)
            .flags(NeighbourFlags::Use)
            .replace()
            .execute()
            .await
            .map_err(|error| NetworkError::Kernel {
                doing: "ask for a neighbour's MAC address",
                source: io_error(error),
            })
    }

    /// Every neighbour whose MAC address is known: interface, address, MAC address.
    pub fn neighbours(&self) -> Vec<(u32, IpAddr, Mac)> {
        self.read(|tables| {
            let known = tables.neighbours.iter();
            known
                .filter_map(|((interface, address), neighbour)| {
                    Some((*interface, *address, neighbour.mac()?))
                })
                .collect()
        })
    }

    /// Keeps the next hops to these addresses known: call it every few seconds. Packets forwarded by the data path do
    /// not tell the kernel that a neighbour is in use, so it would forget them.
    pub async fn keep_fresh(&self, addresses: impl IntoIterator<Item = IpAddr>) {
        for address in addresses {
            if let Err(error) = self.next_hop(None, address).await {
                tracing::debug!("next hop to {address}: {error}");
            }
        }
    }
}
