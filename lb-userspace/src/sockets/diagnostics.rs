//! Questions about single TCP sockets, and their end, by socket diagnostics (`sock_diag(7)`).

use std::{cell::Cell, io, time::Duration};

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP, SOCK_DESTROY},
    inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags, nlas::Nla},
};
use netlink_sys::Socket;

use super::SocketsError;
use crate::{
    dataplane::FollowedSocket,
    network::{open_diagnostics, request_bytes},
};

/// `TCP_TIME_WAIT` (`include/net/tcp_states.h`).
const TIME_WAIT: u8 = 6;

/// What is seen of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// It is closed.
    Gone,
    /// It is not. How long ago it last received payload; None: it never has.
    Open(Option<Duration>),
}

/// A way to the sockets of the network namespace that it was opened in; any thread may use it.
pub(super) struct Diagnostics {
    socket: Socket,
    /// Of the last question.
    number: Cell<u32>,
}

impl Diagnostics {
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self { socket: open_diagnostics()?, number: Cell::new(0) })
    }

    /// Looks at a socket.
    pub(super) fn look(&self, socket: &FollowedSocket) -> Result<Seen, SocketsError> {
        match self.ask(request(socket, self.header(NLM_F_REQUEST))) {
            // What is left of it for a minute is no process's any more.
            Ok(Some(response)) if response.header.state == TIME_WAIT => Ok(Seen::Gone),
            Ok(Some(response)) => Ok(Seen::Open(last_payload(&response))),
            Ok(None) => Ok(Seen::Gone),
            Err(error) if is_gone(&error) => Ok(Seen::Gone),
            Err(error) => Err(SocketsError::Ask(error)),
        }
    }

    /// Ends a socket. `false`: it was closed already.
    pub(super) fn destroy(&self, socket: &FollowedSocket) -> Result<bool, SocketsError> {
        /// The place of the type in a message's header (`struct nlmsghdr`, `netlink(7)`).
        const TYPE: std::ops::Range<usize> = 4..6;
        let mut bytes = request(socket, self.header(NLM_F_REQUEST | NLM_F_ACK));
        // The library only writes questions, whose form is the same.
        bytes[TYPE].copy_from_slice(&SOCK_DESTROY.to_ne_bytes());
        match self.ask(bytes) {
            Ok(_) => Ok(true),
            Err(error) if is_gone(&error) => Ok(false),
            Err(error) => Err(SocketsError::Destroy(error)),
        }
    }

    fn header(&self, flags: u16) -> NetlinkHeader {
        self.number.set(self.number.get().wrapping_add(1));
        let mut header = NetlinkHeader::default();
        (header.flags, header.sequence_number) = (flags, self.number.get());
        header
    }

    /// Sends the request that has the last number, and takes the one message that answers it. None: it was acknowledged.
    fn ask(&self, request: Vec<u8>) -> io::Result<Option<InetResponse>> {
        self.socket.send(&request, 0)?;
        let mut buffer = Vec::with_capacity(1 << 13);
        let message = loop {
            buffer.clear();
            let length = self.socket.recv(&mut buffer, 0)?;
            let bytes = buffer.get(..length).unwrap_or_default();
            let message = NetlinkMessage::<SockDiagMessage>::deserialize(bytes).map_err(io::Error::other)?;
            // The answer to a question that failed half-way is about another socket.
            if message.header.sequence_number == self.number.get() {
                break message;
            }
        };
        match message.payload {
            NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => Ok(Some(*response)),
            NetlinkPayload::Error(error) if error.code.is_none() => Ok(None),
            NetlinkPayload::Error(error) => Err(error.to_io()),
            other => Err(io::Error::other(format!("an answer of another kind: {other:?}"))),
        }
    }
}

/// There is no such socket, or another in its place.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE))
}

fn request(socket: &FollowedSocket, header: NetlinkHeader) -> Vec<u8> {
    let request = InetRequest {
        family: if socket.local.is_ipv6() { AF_INET6 } else { AF_INET },
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::INFO,
        states: StateFlags::from_bits_retain(u32::MAX),
        socket_id: SocketId {
            source_port: socket.local.port(),
            destination_port: socket.remote.port(),
            source_address: socket.local.ip(),
            destination_address: socket.remote.ip(),
            interface_id: socket.interface,
            cookie: cookie(socket.cookie),
        },
    };
    request_bytes(header, request)
}

/// Two words, the lower first (`sock_diag_save_cookie` in the kernel).
fn cookie(number: u64) -> [u8; 8] {
    let words = [number as u32, (number >> 32) as u32].map(u32::to_ne_bytes);
    let [[a, b, c, d], [e, f, g, h]] = words;
    [a, b, c, d, e, f, g, h]
}

/// How long ago a socket received payload. The kernel dates the last of it, but also the handshake, which is none: so it
/// counts only when there was a segment with data.
fn last_payload(response: &InetResponse) -> Option<Duration> {
    /// Places in `struct tcp_info` (the kernel's `include/uapi/linux/tcp.h`): milliseconds since the last data, and segments
    /// with data.
    const LAST_DATA_RECEIVED: usize = 52;
    const DATA_SEGMENTS: usize = 152;
    let info = response.nlas.iter().find_map(|nla| match nla {
        Nla::TcpInfo(bytes) => Some(bytes),
        _ => None,
    })?;
    let number = |place: usize| Some(u32::from_ne_bytes(info.get(place..place + 4)?.try_into().ok()?));
    (number(DATA_SEGMENTS)? > 0).then_some(Duration::from_millis(number(LAST_DATA_RECEIVED)?.into()))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::{super::tests::connection, *};

    #[test]
    fn a_socket_is_seen_with_its_payload_and_when_it_is_gone() {
        let diagnostics = Diagnostics::open().unwrap();
        for to in ["127.0.0.1:0", "[::1]:0"] {
            let (client, mut server, socket) = connection(to);
            assert_eq!(diagnostics.look(&socket).unwrap(), Seen::Open(None), "a handshake is no payload");
            server.write_all(b"x").unwrap();
            (&client).read_exact(&mut [0]).unwrap();
            assert!(matches!(diagnostics.look(&socket).unwrap(), Seen::Open(Some(_))));
            // Another in its place is not it.
            let other = FollowedSocket { cookie: socket.cookie + 1, ..socket };
            assert_eq!(diagnostics.look(&other).unwrap(), Seen::Gone);
            assert!(!diagnostics.destroy(&other).unwrap());
            drop((client, server));
            assert_eq!(diagnostics.look(&socket).unwrap(), Seen::Gone);
        }
    }

    #[test]
    fn a_process_hears_at_once_of_the_end_of_its_socket() {
        let diagnostics = Diagnostics::open().unwrap();
        let (mut client, _server, socket) = connection("127.0.0.1:0");
        assert!(diagnostics.destroy(&socket).unwrap());
        let error = client.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
        assert!(!diagnostics.destroy(&socket).unwrap());
    }
}
