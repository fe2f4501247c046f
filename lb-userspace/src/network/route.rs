//! Which way a packet leaves.

use std::{collections::BTreeMap, net::IpAddr};

use futures_util::TryStreamExt;
use netlink_packet_route::{
    AddressFamily,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType, RouteVia},
};

use super::{Interface, Kind, Mac, Network, NetworkError, Port, io_error};

/// The kernel's route to an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Index of the interface it leaves by.
    pub interface: u32,
    /// The router on the way. None: the address is on the link.
    pub gateway: Option<IpAddr>,
    /// The source address the kernel would choose.
    pub preferred_source: Option<IpAddr>,
    /// The address is this host's own.
    pub local: bool,
}

/// Where a frame to an address goes first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// Where the frame leaves.
    pub port: Port,
    /// The router's address, or the address itself when it is on the link.
    pub neighbour: IpAddr,
    /// The neighbour's MAC address. None: not known yet; the kernel has been asked to find out.
    pub mac: Option<Mac>,
}

impl Route {
    fn from_message(message: &RouteMessage) -> Option<Self> {
        let mut interface = None;
        let mut gateway = None;
        let mut preferred_source = None;
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Oif(index) => interface = Some(*index),
                RouteAttribute::Gateway(address) => gateway = ip_address(address),
                RouteAttribute::Via(RouteVia::Inet(address)) => gateway = Some(IpAddr::V4(*address)),
                RouteAttribute::Via(RouteVia::Inet6(address)) => gateway = Some(IpAddr::V6(*address)),
                RouteAttribute::PrefSource(address) => preferred_source = ip_address(address),
                _ => {}
            }
        }
        let local = message.header.kind == RouteType::Local;
        Some(Self { interface: interface?, gateway, preferred_source, local })
    }
}

pub(super) fn ip_address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

impl Network {
    /// The route a packet of this host to `address` would take now.
    pub async fn route_to(&self, address: IpAddr) -> Result<Route, NetworkError> {
        self.ask_route(address, Vec::new()).await.map_err(|reason| NetworkError::NoRoute { address, reason })
    }

    /// The route a packet from `source` to `address` would take now: as `ip rule` and the VRF of the source's interface have
    /// it. A source that is elsewhere at the moment, such as a VIP on a standby, leaves no packets here: then it is the
    /// route of this host's own packets.
    ///
    /// # Errors
    /// When there is no such route.
    pub async fn route_from(&self, source: Option<IpAddr>, address: IpAddr) -> Result<Route, NetworkError> {
        let here = source.filter(|source| source.is_ipv4() == address.is_ipv4());
        let Some((source, carrying)) = here.and_then(|it| Some((it, self.interface_carrying(it)?))) else {
            return self.route_to(address).await;
        };
        let mut conditions = vec![RouteAttribute::Source(source.into())];
        conditions.extend(self.read(|tables| vrf_of(&tables.links, carrying)).map(RouteAttribute::Oif));
        let no_route = |reason| NetworkError::NoRoute { address, reason: format!("from {source}: {reason}") };
        self.ask_route(address, conditions).await.map_err(no_route)
    }

    async fn ask_route(&self, address: IpAddr, conditions: Vec<RouteAttribute>) -> Result<Route, String> {
        let mut question = RouteMessage::default();
        let (family, length) = match address {
            IpAddr::V4(_) => (AddressFamily::Inet, 32),
            IpAddr::V6(_) => (AddressFamily::Inet6, 128),
        };
        (question.header.address_family, question.header.destination_prefix_length) = (family, length);
        if conditions.iter().any(|condition| matches!(condition, RouteAttribute::Source(_))) {
            question.header.source_prefix_length = length;
        }
        question.attributes = conditions;
        question.attributes.push(RouteAttribute::Destination(address.into()));
        match self.requests().route().get(question).execute().try_next().await {
            Ok(Some(answer)) => {
                Route::from_message(&answer).ok_or_else(|| format!("{:?}", answer.header.kind).to_lowercase())
            }
            Ok(None) => Err("no answer".to_owned()),
            Err(error) => Err(io_error(error).to_string()),
        }
    }

    /// The next hop to `address` of packets from `source`; None: of this host's own. A neighbour that is not known, or has
    /// not been heard of for a while, is asked for.
    ///
    /// An address of this host has no next hop: [`NetworkError::Local`].
    pub async fn next_hop(&self, source: Option<IpAddr>, address: IpAddr) -> Result<NextHop, NetworkError> {
        let route = self.route_from(source, address).await?;
        if route.local {
            return Err(NetworkError::Local(address));
        }
        let port = self.port_of(route.interface)?;
        let neighbour = route.gateway.unwrap_or(address);
        self.ask_for(route.interface, neighbour).await?;
        let mac = self.neighbour(route.interface, neighbour).and_then(|known| known.mac());
        Ok(NextHop { port, neighbour, mac })
    }
}

/// The VRF that an interface, or what it is built on, belongs to: its packets are routed by that one's table.
fn vrf_of(links: &BTreeMap<u32, Interface>, interface: u32) -> Option<u32> {
    let is_vrf = |it: &&Interface| matches!(&it.kind, Kind::Other(kind) if kind == "vrf");
    let link = links.get(&interface)?;
    if is_vrf(&link) {
        return Some(link.index);
    }
    links.get(&link.master?).filter(is_vrf).map(|vrf| vrf.index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vrf_of_an_interface_is_its_master_or_itself() {
        let link = |index: u32, kind: Kind, master: Option<u32>| {
            (index, Interface::sample(index, &format!("it{index}"), kind, master))
        };
        let links = BTreeMap::from([
            link(1, Kind::Device, Some(4)),
            link(2, Kind::Device, Some(5)),
            link(3, Kind::Device, None),
            link(4, Kind::Other("vrf".to_owned()), None),
            link(5, Kind::Bridge, None),
        ]);
        let vrfs = (1..=5).map(|index| vrf_of(&links, index));
        assert_eq!(vrfs.collect::<Vec<_>>(), [Some(4), None, None, Some(4), None]);
    }
}
