//! Which network namespace this process is in, as the kernel programs are told it.

use std::{io, os::fd::AsRawFd as _};

use socket2::{Domain, Socket, Type};

/// The cookie of this process's network namespace: a number that no other one has until the next boot
/// (`SO_NETNS_COOKIE`, Linux 5.14).
pub fn own_network() -> io::Result<u64> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `cookie`, and the length to `length`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_has_one_cookie() {
        assert_eq!(own_network().unwrap(), own_network().unwrap());
    }
}
