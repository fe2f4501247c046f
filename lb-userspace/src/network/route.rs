//! Which way a packet leaves.

use std::net::IpAddr;

use futures_util::TryStreamExt;
use netlink_packet_route::{
    AddressFamily,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType, RouteVia},
};

use super::{Mac, Network, NetworkError, Port, io_error};

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
        let mut question = RouteMessage::default();
        (question.header.address_family, question.header.destination_prefix_length) = match address {
            IpAddr::V4(_) => (AddressFamily::Inet, 32),
            IpAddr::V6(_) => (AddressFamily::Inet6, 128),
        };
        question.attributes.push(RouteAttribute::Destination(address.into()));
        let no_route = |reason: String| NetworkError::NoRoute { address, reason };
        match self.requests().route().get(question).execute().try_next().await {
            Ok(Some(answer)) => Route::from_message(&answer)
                .ok_or_else(|| no_route(format!("{:?}", answer.header.kind).to_lowercase())),
            Ok(None) => Err(no_route("no answer".to_owned())),
            Err(error) => Err(no_route(io_error(error).to_string())),
        }
    }

    /// The next hop to `address`. A neighbour that is not known, or has not been heard of for a while, is asked for.
    ///
    /// An address of this host has no next hop: [`NetworkError::Local`].
    pub async fn next_hop(&self, address: IpAddr) -> Result<NextHop, NetworkError> {
        let route = self.route_to(address).await?;
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
