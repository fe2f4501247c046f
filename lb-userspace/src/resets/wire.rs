//! Sockets that segments leave by.

use std::{collections::HashMap, io, net::SocketAddr};

use lb_common::hash::split_mix;
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
        let packet = frame::question(flow.source, flow.backend, sequence(flow, last_ack), last_ack);
        self.send(hop, flow.backend, &packet)
    }

    fn send(&mut self, hop: &Hop, to: SocketAddr, packet: &[u8]) -> io::Result<()> {
        let address = match self.addresses.get(&hop.interface) {
            Some(address) => address,
            None => {
                let address = crate::network::link_address(hop.interface, 0)?;
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

/// Some number, another one for each flow and for what its client has acknowledged.
fn sequence(flow: &Flow, last_ack: u32) -> u32 {
    let ports = u32::from(flow.source.port()) << 16 | u32::from(flow.client.port());
    (split_mix(u64::from(last_ack) << 32 | u64::from(ports)) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read as _,
        time::{Duration, Instant},
    };

    use nix::net::if_::if_nametoindex;

    use super::*;
    use crate::network::testing::{Peer, in_namespace, ip};

    const OURS: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const THEIRS: [u8; 6] = [2, 0, 0, 0, 0, 2];

    fn lan() -> Peer {
        let peer = Peer::behind("lan", "far");
        ip("link set lan address 02:00:00:00:00:01");
        ip("addr add 10.1.0.1/24 dev lan");
        ip("-6 addr add fd01::1/64 dev lan nodad");
        peer.ip("link set far address 02:00:00:00:00:02");
        peer.ip("addr add 10.1.0.2/24 dev far");
        peer.ip("-6 addr add fd01::2/64 dev far nodad");
        peer
    }

    /// Hears every frame on the peer's side.
    fn ears(peer: &Peer) -> Socket {
        peer.run(|| {
            let every = u16::try_from(libc::ETH_P_ALL).unwrap();
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0))).unwrap();
            socket
                .bind(&crate::network::link_address(if_nametoindex("far").unwrap(), every).unwrap())
                .unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            socket
        })
    }

    /// Waits for a frame that ends with these bytes.
    fn hear(mut ears: &Socket, end: &[u8]) -> Vec<u8> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut buffer = [0; 256];
        while Instant::now() < deadline {
            if let Ok(length) = ears.read(&mut buffer)
                && buffer[..length].ends_with(end)
            {
                return buffer[..length].to_vec();
            }
        }
        panic!("no such frame");
    }

    fn flows() -> [Flow; 2] {
        [("10.1.0.2:40001", "10.1.0.1:6443"), ("[fd01::2]:40001", "[fd01::1]:6443")]
            .map(|(client, listener)| Flow::example(client.parse().unwrap(), listener.parse().unwrap()))
    }

    fn hop() -> Hop {
        let interface = if_nametoindex("lan").unwrap();
        Hop { interface, link_header: [THEIRS, OURS].concat() }
    }

    #[test]
    fn a_segment_leaves_by_the_hop_that_its_flow_names() {
        in_namespace(async || {
            let peer = lan();
            let ears = ears(&peer);
            let mut wire = Wire::open().unwrap();
            for mut flow in flows() {
                let ethertype: [u8; 2] = if flow.client.is_ipv4() { [0x08, 0x00] } else { [0x86, 0xdd] };
                let link = [&hop().link_header[..], &ethertype].concat();
                (flow.to_client, flow.to_backend) = (Some(hop()), Some(hop()));
                wire.reset_client(&flow, 4711).unwrap();
                let packet = frame::reset(flow.listener, flow.client, 4711);
                assert_eq!(hear(&ears, &packet), [&link[..], &packet].concat());
                wire.ask_backend(&flow, 4712).unwrap();
                let packet = frame::question(flow.source, flow.backend, sequence(&flow, 4712), 4712);
                assert_eq!(hear(&ears, &packet), [&link[..], &packet].concat());
            }
        });
    }

    #[test]
    fn without_a_known_hop_the_routing_table_decides() {
        in_namespace(async || {
            let peer = lan();
            let ears = ears(&peer);
            let mut wire = Wire::open().unwrap();
            for flow in flows() {
                wire.reset_client(&flow, 4711).unwrap();
                let packet = frame::reset(flow.listener, flow.client, 4711);
                // The kernel gives an IPv4 packet an identification of its own.
                let seen = hear(&ears, &packet[packet.len() - 20..]);
                assert_eq!(seen[..6], THEIRS);
                wire.ask_backend(&flow, 4711).expect("nobody to ask is no error");
            }
        });
    }
}
