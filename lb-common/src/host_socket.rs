//! Whether a flow to this host lives, by the kernel's sockets.
//!
//! The host's own segments pass no program of ours, so a slot cannot know what has become of such a flow: anyone can forge the FIN
//! and the SYN that say that it is over. The kernel's table of sockets knows it. It is asked about a SYN for a flow to a
//! host that takes no new flows, and about nothing else. A socket that is bound to a device or a VRF, or is in another network namespace,
//! may not be found. The look-up costs 20 ns (IPv4) to 30 ns (IPv6), the packet's headers read again included.

use crate::{
    flow::Family,
    parse::{self, Ports},
    subprograms::Subprograms,
};

/// The two ends of a packet, as it came in: addresses and ports in network byte order.
#[derive(Clone, Copy)]
pub struct Connection {
    /// The client's address.
    pub source: [u64; 2],
    /// The listener's address.
    pub destination: [u64; 2],
    /// The ports of both.
    pub ports: Ports,
}

/// Reads which connection a packet of this family is of. None: its headers are not whole.
#[inline(always)]
pub fn connection<A: Family, S: Subprograms>(frame: &mut S::Frame) -> Option<Connection> {
    let link = parse::link::<S>(frame)?;
    let (packet, _) = parse::packet::<A, S>(frame, &link)?;
    let ports = parse::ports(frame, packet.transport)?;
    Some(Connection { source: packet.source, destination: packet.destination, ports })
}

/// Has a socket in this state (`BPF_TCP_…` of `linux/bpf.h`) a connection that lives? TIME-WAIT also stands for a FIN-WAIT-2 whose
/// process has closed: this host has nothing more to send then, and answers data with a RST.
#[inline(always)]
#[must_use]
pub const fn lives(state: u32) -> bool {
    const TIME_WAIT: u32 = 6;
    const CLOSED: u32 = 7;
    const LISTEN: u32 = 10;
    !matches!(state, TIME_WAIT | CLOSED | LISTEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_and_what_has_ended_are_no_connection() {
        // ESTABLISHED, SYN-SENT, SYN-RECEIVED, FIN-WAIT-1, FIN-WAIT-2, CLOSE-WAIT, LAST-ACK, CLOSING, and a handshake of Linux.
        for state in [1, 2, 3, 4, 5, 8, 9, 11, 12] {
            assert!(lives(state), "{state}");
        }
        for state in [6, 7, 10] {
            assert!(!lives(state), "{state}");
        }
    }
}
