//! Addresses that are this host's by a route of the kernel's local table, and on no interface:
//! `ip route add to local 192.0.2.1 dev lo`, as routers, anycast and BGP set-ups do it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures_util::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily,
    route::{RouteAttribute, RouteMessage, RouteProtocol, RouteType},
};

use super::{NetworkError, io_error, route::ip_address};

/// RT_TABLE_LOCAL (`linux/rtnetlink.h`).
const LOCAL_TABLE: u8 = 255;

/// The prefixes that are this host's by a route, each with the index of the route's interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct LocalRoutes(BTreeMap<IpNet, u32>);

impl LocalRoutes {
    /// Takes in a route that came; false: it is none of these.
    pub(super) fn add(&mut self, message: &RouteMessage) -> bool {
        let Some((prefix, interface)) = local_route(message) else { return false };
        self.0.insert(prefix, interface);
        true
    }

    /// Takes in that a route went; false: it was none of these.
    pub(super) fn remove(&mut self, message: &RouteMessage) -> bool {
        let Some((prefix, interface)) = local_route(message) else { return false };
        let known = self.0.get(&prefix) == Some(&interface);
        if known {
            self.0.remove(&prefix);
        }
        known
    }

    /// An interface went: the kernel drops its routes and tells nobody.
    pub(super) fn interface_gone(&mut self, index: u32) {
        self.0.retain(|_, interface| *interface != index);
    }

    /// An interface was switched off: the kernel drops its IPv6 routes and tells nobody.
    pub(super) fn interface_down(&mut self, index: u32) {
        self.0.retain(|prefix, interface| *interface != index || matches!(prefix, IpNet::V4(_)));
    }

    /// The interface of the most specific route that makes an address this host's.
    pub(super) fn interface_of(&self, address: IpAddr) -> Option<u32> {
        let holding = self.0.iter().filter(|(prefix, _)| prefix.contains(&address));
        holding.max_by_key(|(prefix, _)| prefix.prefix_len()).map(|(_, interface)| *interface)
    }
}

/// Prefix and interface of a route of the local table. None also for those that the kernel adds itself: they come and go
/// with addresses, which are followed on their own.
fn local_route(message: &RouteMessage) -> Option<(IpNet, u32)> {
    let header = &message.header;
    if header.table != LOCAL_TABLE
        || header.kind != RouteType::Local
        || header.protocol == RouteProtocol::Kernel
    {
        return None;
    }
    let mut address = match header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let mut interface = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(destination) => address = ip_address(destination)?,
            RouteAttribute::Oif(index) => interface = Some(*index),
            _ => {}
        }
    }
    Some((IpNet::new(address, header.destination_prefix_length).ok()?, interface?))
}

/// The routes as they are now. Asked for on a connection of their own, whose strict check has the kernel pick out the
/// table: without it a router's whole table of a million routes would come.
pub(super) async fn dump() -> Result<LocalRoutes, NetworkError> {
    const DOING: &str = "list the routes of the local table";
    let (connection, requests, _) = rtnetlink::new_connection_with_strict_check()
        .map_err(|source| NetworkError::Kernel { doing: DOING, source })?;
    let connection = tokio::spawn(connection);
    let mut found = LocalRoutes::default();
    let mut result = Ok(());
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut question = RouteMessage::default();
        question.header.address_family = family;
        question.header.table = LOCAL_TABLE;
        question.header.kind = RouteType::Local;
        let mut routes = requests.route().get(question).execute();
        loop {
            match routes.try_next().await {
                Ok(Some(message)) => drop(found.add(&message)),
                Ok(None) => break,
                Err(error) => {
                    let source = io_error(error);
                    // No address has ever been here, or the family is switched off.
                    let empty = [libc::ENOENT, libc::EOPNOTSUPP, libc::EAFNOSUPPORT];
                    if !source.raw_os_error().is_some_and(|number| empty.contains(&number)) {
                        result = Err(NetworkError::Kernel { doing: DOING, source });
                    }
                    break;
                }
            }
        }
    }
    connection.abort();
    result.map(|()| found)
}

#[cfg(test)]
mod tests {
    use super::super::{
        Network,
        testing::{eventually, in_namespace, ip},
    };

    #[test]
    fn an_address_of_the_local_table_is_on_this_host() {
        in_namespace(async || {
            let (v4, v6) = ("192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap());
            ip("route add to local 192.0.2.1 dev lo");
            ip("link add lan type veth peer name far");
            ip("link set lan up");
            let (network, _changes) = Network::open().await.unwrap();
            let lo = network.interface_named("lo").unwrap().index;
            let lan = network.interface_named("lan").unwrap().index;
            assert_eq!(network.interface_carrying(v4), Some(lo), "it was there before us");
            assert_eq!(network.interface_carrying(v6), None);
            ip("-6 route add local 2001:db8::/64 dev lo");
            eventually("a prefix is here", async || network.interface_carrying(v6) == Some(lo)).await;
            ip("route del to local 192.0.2.1 dev lo");
            eventually("it is gone", async || network.interface_carrying(v4).is_none()).await;
            ip("route add to local 192.0.2.1 dev lan");
            ip("-6 route add local 2001:db8::1 dev lan");
            eventually("both are here", async || {
                [v4, v6].iter().all(|vip| network.interface_carrying(*vip) == Some(lan))
            })
            .await;
            // Routes in other tables are about other hosts' packets, or about nothing.
            ip("route add local 192.0.2.9 dev lo table 100");
            ip("link del lan");
            eventually("its routes are gone", async || {
                network.interface_carrying(v4).is_none() && network.interface_carrying(v6) == Some(lo)
            })
            .await;
            assert_eq!(network.interface_carrying("192.0.2.9".parse().unwrap()), None);
            network.stop_following();
            ip("route add to local 192.0.2.1 dev lo");
            network.reread_addresses().await.unwrap();
            assert_eq!(network.interface_carrying(v4), Some(lo));
        });
    }

    #[test]
    fn the_kernels_own_routes_are_left_to_addresses() {
        in_namespace(async || {
            ip("addr add 10.1.0.1/24 dev lo");
            let (network, _changes) = Network::open().await.unwrap();
            assert!(network.interface_carrying("10.1.0.1".parse().unwrap()).is_some());
            assert_eq!(network.interface_carrying("127.0.0.5".parse().unwrap()), None);
            ip("addr del 10.1.0.1/24 dev lo");
            eventually("it is gone", async || {
                network.interface_carrying("10.1.0.1".parse().unwrap()).is_none()
            })
            .await;
        });
    }
}
