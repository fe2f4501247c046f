//! Servers on this host that nobody on it reaches any more, because the hook takes the connections to their addresses.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use crate::network::TcpSocket;

/// A listener of ours at whose address a process of this host listens as well.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shadow {
    /// Ours.
    pub listener: SocketAddr,
    /// What the process listens on: that address, or every address.
    pub server: SocketAddr,
}

impl Shadow {
    /// For the operator.
    pub fn sentence(&self) -> String {
        format!(
            "a process on this host listens on {}, and new connections from this host to {} do not reach it: they go to \
             the backends; stop it, or take the listener out",
            self.server, self.listener
        )
    }
}

/// The listeners of ours among which `sockets` of servers are shadowed. A backend on this host (`local_backends`) listens
/// on every address as a rule: that is as it should be where its port is the listener's.
pub fn shadows(
    listeners: &[SocketAddr],
    local_backends: &[SocketAddr],
    sockets: &[TcpSocket],
) -> BTreeSet<Shadow> {
    let serves = |socket: &TcpSocket, address: &SocketAddr| {
        let ip = socket.local.ip();
        socket.local.port() == address.port()
            && (ip == address.ip() || ip.is_unspecified() && may_be(ip, address.ip()))
    };
    let mut found = BTreeSet::new();
    for listener in listeners {
        for socket in sockets.iter().filter(|socket| serves(socket, listener)) {
            if !local_backends.iter().any(|backend| serves(socket, backend)) {
                found.insert(Shadow { listener: *listener, server: socket.local });
            }
        }
    }
    found
}

/// A socket on every IPv6 address takes IPv4 connections as well, unless it was told otherwise, which is not shown.
fn may_be(every: IpAddr, address: IpAddr) -> bool {
    every.is_ipv6() || address.is_ipv4()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::TcpState;

    fn listening(local: &str) -> TcpSocket {
        let remote = "0.0.0.0:0".parse().unwrap();
        TcpSocket { local: local.parse().unwrap(), remote, state: TcpState::Listen, inode: 0 }
    }

    fn addresses(all: &[&str]) -> Vec<SocketAddr> {
        all.iter().map(|address| address.parse().unwrap()).collect()
    }

    #[test]
    fn a_server_at_a_listeners_address_is_shadowed() {
        let listeners = addresses(&["127.0.0.1:16443", "[::1]:16443"]);
        let sockets = ["127.0.0.1:16443", "127.0.0.2:16443", "0.0.0.0:16443", "[::]:16443", "127.0.0.1:6443"];
        let sockets: Vec<_> = sockets.iter().map(|local| listening(local)).collect();
        let found: Vec<_> = shadows(&listeners, &[], &sockets)
            .into_iter()
            .map(|it| format!("{} by {}", it.listener, it.server))
            .collect();
        assert_eq!(
            found,
            [
                "127.0.0.1:16443 by 0.0.0.0:16443",
                "127.0.0.1:16443 by 127.0.0.1:16443",
                "127.0.0.1:16443 by [::]:16443",
                "[::1]:16443 by [::]:16443",
            ]
        );
    }

    #[test]
    fn a_backend_on_this_host_is_not_shadowed() {
        let listeners = addresses(&["127.0.0.1:6443", "10.0.0.100:6443"]);
        let local = addresses(&["10.0.0.1:6443"]);
        assert_eq!(shadows(&listeners, &local, &[listening("[::]:6443")]), BTreeSet::new());
        assert_eq!(
            shadows(&listeners, &local, &[listening("10.0.0.100:6443")]).len(),
            1,
            "nobody reaches that one"
        );
    }
}
