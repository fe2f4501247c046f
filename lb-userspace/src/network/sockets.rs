//! The TCP sockets of this host, by socket diagnostics (`sock_diag(7)`).

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr},
};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP},
    inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags},
};
use netlink_sys::{Socket, SocketAddr as NetlinkAddress, protocols::NETLINK_SOCK_DIAG};

/// The first of the ports that the kernel gives to this host's own connections (`ip_local_port_range`).
pub fn first_ephemeral_port() -> u16 {
    /// The kernel's default, see its `Documentation/networking/ip-sysctl.rst`.
    const USUAL: u16 = 32_768;
    std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")
        .ok()
        .and_then(|range| range.split_whitespace().next()?.parse().ok())
        .unwrap_or(USUAL)
}

/// A TCP socket of this network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpSocket {
    /// Its own end. IPv4 in IPv6 is shown as IPv4; the wildcard address of either family stands for every address.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// Its state.
    pub state: TcpState,
    /// The inode of the socket, as in `/proc/PID/fd`; 0 when no process holds it any more.
    pub inode: u32,
}

/// The states of a TCP socket that make a difference here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpState {
    /// A connection that stands.
    Established,
    /// A connection that was asked for.
    SynSent,
    /// A server's socket.
    Listen,
    /// Opening from the other side, closing, or bound and idle.
    Other,
}

impl TcpState {
    /// From the kernel's number (`include/net/tcp_states.h`).
    fn from_number(number: u8) -> Self {
        match number {
            1 => Self::Established,
            2 => Self::SynSent,
            10 => Self::Listen,
            _ => Self::Other,
        }
    }
}

/// The local ports that sockets of this host hold on any of these addresses, listeners on the wildcard address
/// included. A flow must not be given one of them.
pub async fn used_tcp_ports(addresses: &[IpAddr]) -> io::Result<BTreeSet<u16>> {
    let addresses: BTreeSet<_> = addresses.iter().map(IpAddr::to_canonical).collect();
    in_background(move || {
        let mut ports = BTreeSet::new();
        for_each_tcp_socket(|socket| {
            let local = socket.local.ip();
            if local.is_unspecified() || addresses.contains(&local) {
                ports.insert(socket.local.port());
            }
        })?;
        Ok(ports)
    })
    .await
}

/// Every TCP socket for which `wanted` holds.
pub async fn tcp_sockets(wanted: impl Fn(&TcpSocket) -> bool + Send + 'static) -> io::Result<Vec<TcpSocket>> {
    in_background(move || {
        let mut sockets = Vec::new();
        for_each_tcp_socket(|socket| sockets.extend(wanted(&socket).then_some(socket)))?;
        Ok(sockets)
    })
    .await
}

/// Every server's socket.
pub async fn listening_sockets() -> io::Result<Vec<TcpSocket>> {
    in_background(|| {
        let mut sockets = Vec::new();
        for family in [AF_INET, AF_INET6] {
            dump(family, StateFlags::LISTEN, &mut |socket| sockets.push(socket))?;
        }
        Ok(sockets)
    })
    .await
}

/// A host can have a hundred thousand sockets: the dump must not hold up the daemon's only thread.
async fn in_background<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

fn for_each_tcp_socket(mut visit: impl FnMut(TcpSocket)) -> io::Result<()> {
    for family in [AF_INET, AF_INET6] {
        // Also the states that have no name here: sockets that are bound and idle (Linux 6.8).
        dump(family, StateFlags::from_bits_retain(u32::MAX), &mut visit)?;
    }
    Ok(())
}

/// A way to the sockets of the network namespace that it is opened in; any thread may use it.
pub(crate) fn open_diagnostics() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&NetlinkAddress::new(0, 0))?;
    Ok(socket)
}

fn dump(family: u8, states: StateFlags, visit: &mut impl FnMut(TcpSocket)) -> io::Result<()> {
    let socket = open_diagnostics()?;
    socket.send(&request(family, states), 0)?;
    let mut buffer = Vec::with_capacity(1 << 16); // The kernel's dumps come in pieces of at most 32 KiB.
    loop {
        buffer.clear();
        let length = socket.recv(&mut buffer, 0)?;
        let mut rest = buffer.get(..length).unwrap_or_default();
        while !rest.is_empty() {
            let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest).map_err(io::Error::other)?;
            match &message.payload {
                NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => {
                    visit(from_response(&response.header));
                }
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => {}
            }
            let next = (message.header.length as usize).next_multiple_of(4);
            rest = rest.get(next.max(4)..).unwrap_or_default();
        }
    }
}

fn request(family: u8, states: StateFlags) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let request = InetRequest {
        family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states,
        socket_id: if family == AF_INET6 { SocketId::new_v6() } else { SocketId::new_v4() },
    };
    request_bytes(header, request)
}

/// A question as the kernel takes it.
pub(crate) fn request_bytes(header: NetlinkHeader, request: InetRequest) -> Vec<u8> {
    let request = SockDiagMessage::InetRequest(request);
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn from_response(header: &InetResponseHeader) -> TcpSocket {
    let id = &header.socket_id;
    TcpSocket {
        local: SocketAddr::new(id.source_address.to_canonical(), id.source_port),
        remote: SocketAddr::new(id.destination_address.to_canonical(), id.destination_port),
        state: TcpState::from_number(header.state),
        inode: header.inode,
    }
}
