//! A socket for the frames of one address on one link.

use std::{
    io,
    net::{IpAddr, Ipv6Addr},
};

use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use tokio::io::unix::AsyncFd;

use super::frame::{self, ETHERTYPE_ARP, ETHERTYPE_IPV6, Heard};
use crate::network::{Mac, link_address};

/// Says and hears who has `address` on one interface.
pub(super) struct Link {
    socket: AsyncFd<Socket>,
    /// Keeps the interface, and switches on the way, listening to what is sent to the address's solicited-node group.
    _membership: Option<Socket>,
    pub(super) address: IpAddr,
    pub(super) mac: Mac,
}

impl Link {
    /// Needs `CAP_NET_RAW`. `mac` is the interface's own address.
    pub(super) fn open(interface: u32, mac: Mac, address: IpAddr) -> io::Result<Self> {
        let (ethertype, membership) = match address {
            IpAddr::V4(_) => (ETHERTYPE_ARP, None),
            IpAddr::V6(address) => (ETHERTYPE_IPV6, Some(join(interface, address)?)),
        };
        // Protocol 0 hears nothing, until bind() says where and what: no frame of another interface slips in.
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
        socket.set_nonblocking(true)?;
        if address.is_ipv6() {
            socket.attach_filter(&neighbour_discovery_only())?;
        }
        socket.bind(&link_address(interface, ethertype)?)?;
        // SAFETY: the socket owns its open descriptor, always the same one, and lives in the `AsyncFd` until that is
        // dropped.
        let socket = unsafe { AsyncFd::register(socket)? };
        Ok(Self { socket, _membership: membership, address, mac })
    }

    pub(super) fn probe(&self) -> io::Result<()> {
        self.send(&frame::probe(self.address, self.mac))
    }

    pub(super) fn announce(&self) -> io::Result<()> {
        self.send(&frame::announcement(self.address, self.mac))
    }

    /// A full queue is an error like any other: the frame is sent again later anyway.
    fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.socket.get_ref().send(frame).map(drop)
    }

    /// The next statement of another host about this address. Cancel-safe.
    pub(super) async fn hear(&self) -> io::Result<Heard> {
        let mut buffer = [0; 128]; // Longer than any frame we read; the rest of a longer one is cut off.
        loop {
            let mut ready = self.socket.readable().await?;
            let received = ready.try_io(|socket| io::Read::read(&mut socket.get_ref(), &mut buffer));
            let Ok(length) = received else { continue };
            let Some(heard) = frame::parse(&buffer[..length?.min(buffer.len())]) else { continue };
            if heard.address == self.address && heard.mac != self.mac {
                return Ok(heard);
            }
        }
    }
}

fn join(interface: u32, address: Ipv6Addr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, None)?;
    socket.join_multicast_v6(&frame::solicited_node(address), interface)?;
    Ok(socket)
}

/// Lets through ICMPv6 neighbour solicitations and advertisements: a load balancer's link carries a lot else, and waking
/// up for each packet would cost more than forwarding it.
fn neighbour_discovery_only() -> [SockFilter; 7] {
    const LOAD_BYTE: u16 = 0x30; // BPF_LD | BPF_B | BPF_ABS
    const JUMP_IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const JUMP_IF_AT_LEAST: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    const NEXT_HEADER: u32 = 14 + 6;
    const ICMP_TYPE: u32 = 14 + 40;
    [
        SockFilter::new(LOAD_BYTE, 0, 0, NEXT_HEADER),
        SockFilter::new(JUMP_IF_EQUAL, 0, 4, 58),
        SockFilter::new(LOAD_BYTE, 0, 0, ICMP_TYPE),
        SockFilter::new(JUMP_IF_AT_LEAST, 0, 2, 135),
        SockFilter::new(JUMP_IF_AT_LEAST, 1, 0, 137),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
        SockFilter::new(RETURN, 0, 0, 0),
    ]
}
