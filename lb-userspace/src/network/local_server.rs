//! Servers on this host that packets for a listener are passed to as they are. Pure.

use std::net::SocketAddr;

use super::TcpSocket;

/// Whether a backend on this host is served at its own address, and nobody at the listener's: the packets that are passed to it
/// are for the listener's address, and the kernel refuses them. Where no server is at the backend's address either, it is yet
/// to come.
pub fn is_out_of_reach(servers: &[TcpSocket], backend: SocketAddr, listener: SocketAddr) -> bool {
    let takes = |socket: &&TcpSocket, address: SocketAddr| {
        let ip = socket.local.ip();
        // A socket on every IPv6 address takes IPv4 connections as well, unless it was told otherwise, which is not shown.
        let every = ip.is_unspecified() && (ip.is_ipv6() || address.is_ipv4());
        socket.local.port() == address.port() && (ip == address.ip() || every)
    };
    listener.port() == backend.port()
        && servers.iter().any(|socket| takes(&socket, backend))
        && !servers.iter().any(|socket| takes(&socket, listener))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::TcpState;

    #[test]
    fn a_server_must_have_the_listeners_address_or_every_address() {
        let out_of_reach = |servers: &[&str]| {
            let server = |text: &&str| TcpSocket {
                local: text.parse().unwrap(),
                remote: "0.0.0.0:0".parse().unwrap(),
                state: TcpState::Listen,
                inode: 1,
            };
            let servers: Vec<_> = servers.iter().map(server).collect();
            let at = |text: &str| text.parse().unwrap();
            is_out_of_reach(&servers, at("10.0.0.1:6443"), at("10.0.0.100:6443"))
        };
        assert!(out_of_reach(&["10.0.0.1:6443"]));
        assert!(out_of_reach(&["10.0.0.1:6443", "127.0.0.1:6443", "10.0.0.100:443", "0.0.0.0:22"]));
        assert!(!out_of_reach(&["10.0.0.1:6443", "10.0.0.100:6443"]));
        assert!(!out_of_reach(&["0.0.0.0:6443"]) && !out_of_reach(&["[::]:6443"]));
        assert!(!out_of_reach(&["127.0.0.1:6443"]) && !out_of_reach(&[]), "it is yet to come");
    }
}
