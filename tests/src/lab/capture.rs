//! Frames as they are on an interface: sent and captured raw, to be compared byte for byte.

use std::{
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    errno::Errno,
    net::if_::if_nametoindex,
    sys::socket::{LinkAddr, recvfrom, setsockopt, sockopt},
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::Host;

/// `ETH_P_ALL`, in network byte order as the kernel wants it.
const EVERY_PROTOCOL: u16 = (libc::ETH_P_ALL as u16).to_be();
/// Larger than any frame in the lab.
const LARGEST_FRAME: usize = 65_536;

/// A raw socket on one interface of a host: it sees what the host's own stack sees, after XDP.
#[derive(Debug)]
pub struct Capture {
    socket: Socket,
}

impl Capture {
    /// Opens a raw socket on a host's interface. Frames queue in it from now on.
    ///
    /// # Errors
    /// When there is no such interface.
    pub fn open(host: &Host, interface: &str) -> Result<Self> {
        host.in_namespace(|| {
            let index = if_nametoindex(interface).with_context(|| format!("no interface {interface}"))?;
            let protocol = Protocol::from(i32::from(EVERY_PROTOCOL));
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol))?;
            socket.bind(&link_address(index)?)?;
            Ok(Self { socket })
        })?
    }

    /// Has room for frames that were not received yet, in bytes as the kernel counts them, whatever `net.core.rmem_max`
    /// says.
    ///
    /// # Errors
    /// Without root.
    pub fn make_room(&self, bytes: usize) -> Result<()> {
        setsockopt(&self.socket, sockopt::RcvBufForce, &bytes).context("a larger buffer of a packet socket")
    }

    /// How many frames found no room in the socket's buffer since this was asked last.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn lost(&self) -> Result<u32> {
        let mut statistics = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
        // SAFETY: PACKET_STATISTICS writes a `tpacket_stats`, which the pointer is of, and no more than the length says.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut statistics).cast(),
                &raw mut length,
            )
        };
        Errno::result(result).context("the statistics of a packet socket")?;
        Ok(statistics.tp_drops)
    }

    /// Puts a frame on the wire as it is.
    ///
    /// # Errors
    /// When the interface is down or the frame too large.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        self.socket.send(frame).context("sending a frame")?;
        Ok(())
    }

    /// The next frame *received* by the interface for which `wanted` holds; others are skipped.
    ///
    /// # Errors
    /// When none came within `limit`.
    pub fn receive(&self, limit: Duration, mut wanted: impl FnMut(&[u8]) -> bool) -> Result<Vec<u8>> {
        let deadline = Instant::now() + limit;
        let mut frame = vec![0; LARGEST_FRAME];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "no such frame within {limit:?}");
            self.socket.set_read_timeout(Some(left))?;
            match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut frame) {
                Ok((length, sender)) if !is_outgoing(sender) && wanted(&frame[..length]) => {
                    frame.truncate(length);
                    return Ok(frame);
                }
                Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(error) => return Err(error).context("receiving a frame"),
            }
        }
    }
}

/// A raw socket is also shown what its own host sends.
fn is_outgoing(sender: Option<LinkAddr>) -> bool {
    sender.is_some_and(|sender| sender.pkttype() == libc::PACKET_OUTGOING)
}

fn link_address(interface_index: u32) -> Result<SockAddr> {
    // SAFETY: `sockaddr_ll` is the address type of AF_PACKET; the storage is larger than it and zeroed, which
    // is valid for its integer fields, and the length set is its size.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, length| {
            let link = storage.cast::<libc::sockaddr_ll>();
            (*link).sll_family = libc::AF_PACKET as u16;
            (*link).sll_protocol = EVERY_PROTOCOL;
            (*link).sll_ifindex = interface_index.cast_signed();
            *length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            Ok(())
        })
    }?;
    Ok(address)
}

/// The MAC address of a host's interface.
///
/// # Errors
/// When there is no such interface.
pub fn mac(host: &Host, interface: &str) -> Result<[u8; 6]> {
    let shown = host.run(&format!("ip -o link show dev {interface}"))?;
    let text = shown.split("link/ether ").nth(1).and_then(|rest| rest.split(' ').next());
    let bytes: Vec<u8> = text
        .context("ip shows no MAC")?
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect::<Result<_, _>>()?;
    bytes.try_into().ok().context("a MAC has six bytes")
}
