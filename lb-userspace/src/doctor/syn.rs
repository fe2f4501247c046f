//! One SYN to a server, from an address of choice, and what comes back.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
    time::Duration,
};

use socket2::SockRef;
use tokio::{net::TcpSocket, time::timeout};

/// Long enough for the kernel's second SYN, which follows after a second: one that is lost is no verdict.
const PATIENCE: Duration = Duration::from_millis(1500);
/// Slots begin at 1024, so that the answer to one of these is never taken for a flow's. Below 512 are the servers of this
/// host (bindresvport(3) leaves those alone too).
const RESERVED: RangeInclusive<u16> = 512..=1023;

/// Where a SYN comes from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Origin<'a> {
    /// The address and port that the kernel chooses, as for any connection of this host.
    Usual,
    /// This address, or else the one that the kernel chooses, and a port that is never a slot, nor one of these: a
    /// listener's, whose packets are clients'.
    Reserved(Option<IpAddr>, &'a BTreeSet<u16>),
}

/// What comes back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// A SYN-ACK.
    Accepted,
    /// A RST.
    Refused,
    /// Nothing, or a router's or firewall's ICMP error: which.
    Nothing(String),
}

/// Sends it and waits. A server that accepts is told by a RST instead of the handshake's last ACK: unless this thread is held
/// up for longer than the kernel delays an ACK, neither its process nor its log hears of it. In any case no port of this host waits in TIME_WAIT.
///
/// # Errors
/// When there is no such socket: it is not this host's address, or ports below 1024 are not for us.
pub(super) async fn send(origin: Origin<'_>, server: SocketAddr) -> io::Result<Answer> {
    let socket = if server.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // The ACK waits for data that it could go with (tcp(7), TCP_QUICKACK), and the RST is sooner.
    SockRef::from(&socket).set_tcp_quickack(false)?;
    socket.set_zero_linger()?;
    if let Origin::Reserved(address, listeners) = origin {
        let any = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        if server.is_ipv6() {
            SockRef::from(&socket).set_only_v6(true)?;
        }
        bind(&socket, address.unwrap_or(any), listeners)?;
    }
    Ok(match timeout(PATIENCE, socket.connect(server)).await {
        Ok(Ok(_accepted)) => Answer::Accepted,
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => Answer::Refused,
        Ok(Err(error)) => Answer::Nothing(error.to_string()),
        Err(_) => Answer::Nothing("no answer".to_owned()),
    })
}

fn bind(socket: &TcpSocket, address: IpAddr, listeners: &BTreeSet<u16>) -> io::Result<()> {
    for port in RESERVED.rev().filter(|port| !listeners.contains(port)) {
        match socket.bind(SocketAddr::new(address, port)) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            done => return done,
        }
    }
    let (first, last) = (RESERVED.start(), RESERVED.end());
    Err(io::Error::new(io::ErrorKind::AddrInUse, format!("all of its ports {first}-{last} are in use")))
}
