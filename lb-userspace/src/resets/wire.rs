//! Sockets that segments leave by.

use std::{collections::HashMap, io, net::SocketAddr};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::frame;
use crate::dataplane::{Flow, Hop};

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;

/// Sends segments of flows. Needs `CAP_NET_RAW` to be opened, and nothing afterwards.
///
/// They leave by the neighbour that the flow's own segments go to, past the host's routes and filters, as all of its
/// others do; only where that is not known the routing table decides.
#[derive(Debug)]
pub struct Wire {
    link: Socket,
    routed4: Socket,
    routed6: Socket,
    /// By interface.
    addresses: HashMap<u32, SockAddr>,
}

impl Wire {
    /// Opens the sockets. They hear nothing.
    pub fn open() -> io::Result<Self> {
        let open = |domain, protocol| {
            let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(protocol)))?;
            socket.set_nonblocking(true)?;
            Ok::<_, io::Error>(socket)
        };
        Ok(Self {
            link: open(Domain::PACKET, 0)?,
            // This protocol only sends, whole packets with their headers (raw(7)).
            routed4: open(Domain::IPV4, libc::IPPROTO_RAW)?,
            routed6: open(Domain::IPV6, libc::IPPROTO_RAW)?,
            addresses: HashMap::new(),
        })
    }

    /// Tells a flow's client that it is over: `last_ack` is the number that the client expects next.
    pub fn reset_client(&mut self, flow: &Flow, last_ack: u32) -> io::Result<()> {
        let packet = frame::reset(flow.listener, flow.client, last_ack);
        match &flow.to_client {
            Some(hop) => self.send(hop, flow.client, &packet),
            None => self.route(flow.client, &packet),
        }
    }

    /// Asks a flow's backend whether it knows the flow: its answer goes to the client, if that is not told otherwise.
    /// Nobody is asked where the way is not known.
    pub fn ask_backend(&mut self, flow: &Flow, last_ack: u32) -> io::Result<()> {
        let Some(hop) = &flow.to_backend else { return Ok(()) };
        // Some number, another one for each flow and time.
        let seed =
            u64::from(last_ack) << 32 | u64::from(flow.source.port()) << 16 | u64::from(flow.client.port());
        let sequence = (lb_common::hash::split_mix(seed) >> 32) as u32;
        let packet = frame::question(flow.source, flow.backend, sequence, last_ack);
        self.send(hop, flow.backend, &packet)
    }

    fn send(&mut self, hop: &Hop, to: SocketAddr, packet: &[u8]) -> io::Result<()> {
        let address = match self.addresses.get(&hop.interface) {
            Some(address) => address,
            None => {
                let address = crate::vip::link_address(hop.interface, 0)?;
                self.addresses.entry(hop.interface).or_insert(address)
            }
        };
        let ethertype = if to.is_ipv4() { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 };
        let frame = [&hop.link_header, &ethertype.to_be_bytes()[..], packet].concat();
        self.link.send_to(&frame, address).map(drop)
    }

    fn route(&self, to: SocketAddr, packet: &[u8]) -> io::Result<()> {
        let socket = if to.is_ipv4() { &self.routed4 } else { &self.routed6 };
        // A raw socket takes no port.
        socket.send_to(packet, &SockAddr::from(SocketAddr::new(to.ip(), 0))).map(drop)
    }
}
