//! A server that accepts, and leaves the rest to the test: the ends of its connections are the test's own sockets.

use std::{
    collections::HashMap,
    io,
    net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Result;
use socket2::{Domain, Socket, Type};

use crate::{lab::Host, stub::PORT};

/// As `net.core.somaxconn` gives a kube-apiserver.
const BACKLOG: i32 = 4096;
/// Between two looks at the queue.
const PAUSE: Duration = Duration::from_millis(5);

/// What was accepted and not yet taken, by the peer's address.
type Accepted = Arc<Mutex<HashMap<SocketAddr, TcpStream>>>;

/// A listening TCP server on a host. Dropping it closes everything that was not taken.
#[derive(Debug)]
pub struct PlainServer {
    accepted: Accepted,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl PlainServer {
    /// Listens on [`PORT`] on a host, for both families.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn start(host: &Host) -> Result<Self> {
        let listener = host.in_namespace(listen)??;
        let (accepted, stop) = (Accepted::default(), Arc::new(AtomicBool::new(false)));
        let thread = {
            let (accepted, stop) = (Arc::clone(&accepted), Arc::clone(&stop));
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    match listener.accept() {
                        Ok((stream, peer)) => keep(&accepted, stream, peer),
                        // Nobody is waiting, or one that is gone already.
                        Err(_) => thread::sleep(PAUSE),
                    }
                }
            })
        };
        Ok(Self { accepted, stop, thread: Some(thread) })
    }

    /// Takes the connection whose client this server sees at `peer`, once it was accepted.
    pub fn take(&self, peer: SocketAddr) -> Option<TcpStream> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner).remove(&peer)
    }
}

fn listen() -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    // The wildcard of IPv6 takes IPv4 as well.
    socket.set_only_v6(false)?;
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT)).into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Keeps a connection, and lets go of those whose clients are gone: checks come and go.
fn keep(accepted: &Accepted, stream: TcpStream, peer: SocketAddr) {
    if stream.set_nonblocking(true).is_err() {
        return;
    }
    let mut accepted = accepted.lock().unwrap_or_else(PoisonError::into_inner);
    accepted.retain(|_, stream| {
        stream.peek(&mut [0]).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    });
    accepted.insert(SocketAddr::new(peer.ip().to_canonical(), peer.port()), stream);
}

impl Drop for PlainServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
