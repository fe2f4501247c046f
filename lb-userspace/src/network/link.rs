//! Addresses of packet sockets (`packet(7)`), which socket2 has none for.

use std::io;

use socket2::{SockAddr, SockAddrStorage};

/// Where frames of a packet socket come from or go to. `ethertype` 0: for sending only, the frame itself says.
pub(crate) fn link_address(interface: u32, ethertype: u16) -> io::Result<SockAddr> {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: ethertype.to_be(),
        sll_ifindex: i32::try_from(interface).map_err(io::Error::other)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let init = |storage: *mut SockAddrStorage, length: *mut libc::socklen_t| {
        // SAFETY: socket2 hands out valid pointers, its storage is a `sockaddr_storage`, larger than and aligned for
        // every socket address, and the length is that of what is written.
        unsafe {
            storage.cast::<libc::sockaddr_ll>().write(address);
            length.write(size_of::<libc::sockaddr_ll>() as libc::socklen_t);
        }
        Ok(())
    };
    // SAFETY: `init` leaves a whole `sockaddr_ll` of the family AF_PACKET and its length.
    let ((), address) = unsafe { SockAddr::try_init(init)? };
    Ok(address)
}
