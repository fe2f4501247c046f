//! Keeps this host's kernel from resetting flows while the program is off an interface.
//!
//! Packets of flows then reach a kernel that has no socket for them, and it answers with RSTs in the VIP's or SNAT
//! address's name. A routing rule takes the way out from just these answers: `from ADDRESS ipproto tcp sport FIRST-LAST
//! blackhole` (the kernel routes a RST by its addresses and ports, `ip_send_unicast_reply` and `tcp_v6_send_response`). The
//! packets themselves are lost, as on a bad link, and sent again. It needs no tool, no netfilter and no program, and nothing
//! of anybody else's is changed; what a socket of this host sends from these ports in the meantime is sent again as well.

use std::{net::IpAddr, ops::RangeInclusive};

use futures_util::TryStreamExt;
use netlink_packet_route::{
    AddressFamily, IpProtocol,
    route::RouteProtocol,
    rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange},
};
use rtnetlink::IpVersion;

use super::{Network, NetworkError, io_error};

/// After the rule about the local table, before everybody else's.
const PRIORITY: u32 = 1;
/// By which rules of ours are known, also those of a daemon that was killed (`rtm_protocol`; below 128 nobody else has it).
const OURS: u8 = 83;

/// Ports of an address that the kernel must not answer from.
pub type Silenced = (IpAddr, RangeInclusive<u16>);

impl Network {
    /// Lets the kernel answer nothing from these ports, until [`Network::lower_guard`].
    ///
    /// # Errors
    /// When the kernel takes no such rule (it was built without policy routing); then there is none.
    pub async fn raise_guard(&self, silenced: &[Silenced]) -> Result<(), NetworkError> {
        for silenced in silenced {
            let mut request = self.requests().rule().add();
            *request.message_mut() = rule(silenced);
            if let Err(error) = request.execute().await {
                let source = io_error(error);
                if source.raw_os_error() == Some(libc::EEXIST) {
                    continue;
                }
                self.lower_guard().await?;
                return Err(NetworkError::Kernel { doing: "add a routing rule", source });
            }
        }
        Ok(())
    }

    /// Removes all rules of a guard, also those that a daemon has left which was killed.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn lower_guard(&self) -> Result<(), NetworkError> {
        let failed = |doing| move |error| NetworkError::Kernel { doing, source: io_error(error) };
        for version in [IpVersion::V4, IpVersion::V6] {
            // A family that is switched off has none.
            let Ok(rules) = self.requests().rule().get(version).execute().try_collect::<Vec<_>>().await
            else {
                continue;
            };
            for rule in rules.into_iter().filter(is_ours) {
                self.requests().rule().del(rule).execute().await.map_err(failed("remove a routing rule"))?;
            }
        }
        Ok(())
    }
}

fn rule((address, ports): &Silenced) -> RuleMessage {
    let mut message = RuleMessage::default();
    (message.header.family, message.header.src_len) = match address {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    message.header.action = RuleAction::Blackhole;
    message.attributes = vec![
        RuleAttribute::Priority(PRIORITY),
        RuleAttribute::Protocol(RouteProtocol::Other(OURS)),
        RuleAttribute::Source(*address),
        RuleAttribute::IpProtocol(IpProtocol::Tcp),
    ];
    // The kernel takes no range that ends with the last port (`fib_rule_port_range_valid`), and no port is no range but the
    // whole address: this one port goes on to be answered from.
    let end = (*ports.end()).min(u16::MAX - 1);
    let range = RulePortRange { start: (*ports.start()).min(end), end };
    message.attributes.push(RuleAttribute::SourcePortRange(range));
    message
}

fn is_ours(rule: &RuleMessage) -> bool {
    let has = |wanted: &RuleAttribute| rule.attributes.contains(wanted);
    rule.header.action == RuleAction::Blackhole
        && has(&RuleAttribute::Priority(PRIORITY))
        && has(&RuleAttribute::Protocol(RouteProtocol::Other(OURS)))
}

#[cfg(test)]
mod tests {
    use std::{
        io::ErrorKind,
        net::{SocketAddr, TcpStream},
        time::Duration,
    };

    use super::*;
    use crate::network::testing::{Peer, in_namespace, ip};

    #[test]
    fn the_kernel_answers_nothing_from_silenced_ports_and_goes_on_elsewhere() {
        in_namespace(async || {
            let peer = Peer::behind("lan", "far");
            ip("addr add 10.1.0.1/24 dev lan");
            ip("-6 addr add fd01::1/64 dev lan nodad");
            peer.ip("addr add 10.1.0.2/24 dev far");
            peer.ip("-6 addr add fd01::2/64 dev far nodad");
            let (network, _changes) = Network::open().await.unwrap();
            let refused = |address: &str, port: u16, patience: u64| {
                let to = SocketAddr::new(address.parse().unwrap(), port);
                peer.run(|| TcpStream::connect_timeout(&to, Duration::from_millis(patience)))
                    .is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
            };
            let before = (ip("rule"), ip("-6 rule"));
            for address in ["10.1.0.1", "fd01::1"] {
                assert!(refused(address, 6443, 10_000));
                let silenced =
                    [(address.parse().unwrap(), 6443..=6443), (address.parse().unwrap(), 20_000..=29_999)];
                network.raise_guard(&silenced).await.unwrap();
                assert!(!refused(address, 6443, 300), "{}", ip("rule"));
                assert!(!refused(address, 29_999, 300));
                assert!(refused(address, 30_000, 10_000), "other ports answer");
                network.raise_guard(&[(address.parse().unwrap(), 40_000..=u16::MAX)]).await.unwrap();
                assert!(!refused(address, u16::MAX - 1, 300));
                assert!(refused(address, 22, 10_000), "nor is it the whole address");
            }
            // As after a kill: another one finds them.
            let (next, _changes) = Network::open().await.unwrap();
            next.lower_guard().await.unwrap();
            assert!(refused("10.1.0.1", 6443, 10_000) && refused("fd01::1", 6443, 10_000));
            assert_eq!((ip("rule"), ip("-6 rule")), before);
        });
    }

    #[test]
    fn rules_of_others_are_left_alone() {
        in_namespace(async || {
            ip("rule add pref 1 from 10.1.0.1 blackhole");
            ip("rule add pref 2 from 10.1.0.1 blackhole protocol 83");
            let (network, _changes) = Network::open().await.unwrap();
            let before = ip("rule");
            network.raise_guard(&[("10.1.0.1".parse().unwrap(), 80..=80)]).await.unwrap();
            assert_ne!(ip("rule"), before);
            network.lower_guard().await.unwrap();
            assert_eq!(ip("rule"), before);
        });
    }
}
