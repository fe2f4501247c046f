//! Sockets of this host's processes that the connect hook has redirected: what they have heard, and ending them.
//!
//! A process that waits for an answer on a connection to a host that is gone waits for as long as its kernel sends again: up
//! to a quarter of an hour. `SOCK_DESTROY` (`sock_diag(7)`, Linux 4.5) ends a socket from outside; the process is told
//! `ECONNABORTED` at once, and connects anew. Which sockets are ours is known by their cookies, so nobody else's is touched,
//! whatever it is connected to.
//!
//! Each network namespace has its sockets for itself. To reach those of pods a thread must enter theirs, which the daemon's
//! own must not: so all of this happens on one thread that does nothing else, and that has the capabilities for it alone.

mod diagnostics;
mod namespaces;
mod pass;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
    sync::mpsc as blocking,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    dataplane::{DataplaneError, FlowFilter, FollowedSocket, SocketTable},
    privileges,
};

use diagnostics::{Diagnostics, Seen};
use pass::{Kernel, Pass};

/// What the thread is told.
#[derive(Debug)]
pub enum Order {
    /// To find out when the sockets of these backends (by id) last received payload.
    Look(BTreeSet<u8>),
    /// To end the sockets of a backend, by id, that is among the [`Dead`].
    EndDead(u8),
    /// To end sockets because an operator says so. Their number is the answer.
    End(FlowFilter, Option<oneshot::Sender<usize>>),
}

/// A backend that is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dead {
    /// Its address.
    pub address: SocketAddr,
    /// None of its sockets is ended, if one has received payload in this time.
    pub quiet: Duration,
}

/// What it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// When the sockets of backends last received payload, by id; those that have received none are left out.
    Heard(BTreeMap<u8, Instant>),
    /// So many sockets of a dead backend were ended.
    EndedDead {
        /// The backend's id.
        backend: u8,
        /// How many.
        sockets: usize,
        /// None was, because one of them has received payload then.
        heard: Option<Instant>,
    },
}

/// The thread that looks at sockets and ends them. It ends with this.
#[derive(Debug)]
pub struct SocketThread {
    orders: blocking::Sender<Order>,
    dead: watch::Sender<BTreeMap<u8, Dead>>,
}

impl SocketThread {
    /// Starts it. `network` is the cookie of this network namespace; `pods`: it is to reach the sockets of others as well.
    ///
    /// # Errors
    /// When there can be no thread, or no socket for questions.
    pub fn start(
        table: SocketTable,
        network: u64,
        pods: bool,
    ) -> io::Result<(Self, mpsc::UnboundedReceiver<Report>)> {
        let own = Diagnostics::open()?;
        let (orders, given) = blocking::channel();
        let (reports, heard) = mpsc::unbounded_channel();
        let (dead, known) = watch::channel(BTreeMap::new());
        let worker = Worker { table, network, own, pods, dead: known, said: BTreeSet::new() };
        std::thread::Builder::new().name("sockets".to_owned()).spawn(move || {
            if let Err(error) = privileges::keep_for_sockets(pods) {
                tracing::warn!("the thread for sockets keeps capabilities that it does not need: {error}");
            }
            worker.work(&given, &reports);
        })?;
        Ok((Self { orders, dead }, heard))
    }

    /// Gives an order.
    pub fn order(&self, order: Order) {
        // The thread ends with us.
        let _ = self.orders.send(order);
    }

    /// Says who is dead now, by id. An order may have waited behind others: whoever is not dead any more when its turn comes
    /// keeps its sockets, and so does whoever comes back to life in the middle of it.
    pub fn set_dead(&self, dead: BTreeMap<u8, Dead>) {
        self.dead.send_if_modified(|known| {
            let is_news = *known != dead;
            *known = dead;
            is_news
        });
    }
}

/// The table of sockets, as far as this thread needs it.
trait Table {
    fn all(&self) -> Result<Vec<FollowedSocket>, DataplaneError>;
    fn forget(&mut self, socket: &FollowedSocket) -> Result<(), DataplaneError>;
}

impl Table for SocketTable {
    fn all(&self) -> Result<Vec<FollowedSocket>, DataplaneError> {
        self.all()
    }

    fn forget(&mut self, socket: &FollowedSocket) -> Result<(), DataplaneError> {
        self.forget(socket)
    }
}

/// What the thread has.
struct Worker<T> {
    table: T,
    network: u64,
    own: Diagnostics,
    pods: bool,
    dead: watch::Receiver<BTreeMap<u8, Dead>>,
    /// What went wrong: each is said once.
    said: BTreeSet<String>,
}

/// The ways to the sockets of one pass.
struct Ways<'a> {
    own: &'a Diagnostics,
    /// By cookie of the network namespace; this host's own is not among them.
    others: BTreeMap<u64, Diagnostics>,
}

impl Ways<'_> {
    fn to(&self, socket: &FollowedSocket) -> &Diagnostics {
        self.others.get(&socket.network).unwrap_or(self.own)
    }
}

impl Kernel for Ways<'_> {
    fn look(&self, socket: &FollowedSocket) -> Result<Seen, SocketsError> {
        self.to(socket).look(socket)
    }

    fn destroy(&self, socket: &FollowedSocket) -> Result<bool, SocketsError> {
        self.to(socket).destroy(socket)
    }
}

impl<T: Table> Worker<T> {
    fn work(mut self, orders: &blocking::Receiver<Order>, reports: &mpsc::UnboundedSender<Report>) {
        for order in orders {
            let report = match order {
                Order::Look(backends) => Report::Heard(self.look(&backends)),
                Order::EndDead(backend) => self.end_dead(backend),
                Order::End(filter, answer) => {
                    let count = self.end(&filter);
                    // Whoever has asked may have gone.
                    answer.map(|answer| answer.send(count));
                    continue;
                }
            };
            if reports.send(report).is_err() {
                return;
            }
        }
    }

    fn look(&mut self, backends: &BTreeSet<u8>) -> BTreeMap<u8, Instant> {
        self.pass(|socket| backends.contains(&socket.backend), |sockets, pass| pass.look(sockets))
    }

    fn end_dead(&mut self, backend: u8) -> Report {
        let known = self.dead.clone();
        let now = || known.borrow().get(&backend).copied();
        let Some(dead) = now() else { return Report::EndedDead { backend, sockets: 0, heard: None } };
        // Whoever is another backend's by now has another address.
        let is_its = |socket: &FollowedSocket| (socket.backend, socket.remote) == (backend, dead.address);
        let ended = self
            .pass(is_its, |sockets, pass| pass.end_unless_heard(sockets, dead.quiet, || now() == Some(dead)));
        match ended {
            Ok(sockets) => Report::EndedDead { backend, sockets, heard: None },
            Err(heard) => Report::EndedDead { backend, sockets: 0, heard: Some(heard) },
        }
    }

    fn end(&mut self, filter: &FlowFilter) -> usize {
        let wanted = |socket: &FollowedSocket| {
            filter.backend.is_none_or(|backend| backend == socket.backend)
                && filter.service.is_none_or(|service| service == socket.service)
                && filter.client.is_none_or(|net| net.contains(&socket.local.ip()))
                && filter.client_port.is_none_or(|port| port == socket.local.port())
        };
        self.pass(wanted, |sockets, pass| pass.end(sockets, || true))
    }

    /// Does something with the sockets for which `wanted` holds, as far as they can be reached.
    ///
    /// Those of pods whose network namespace cannot be entered are left alone, and are no witnesses either: a host's own
    /// kubelet is not to hang because a pod has a socket to the same backend that nobody here may look at. What there is to
    /// lose is little: the backend has answered no fresh connection for all of the time, somebody else does answer, and
    /// whoever is ended wrongly connects anew to that one.
    fn pass<R>(
        &mut self,
        wanted: impl Fn(&FollowedSocket) -> bool,
        work: impl FnOnce(&[FollowedSocket], &mut Pass<'_>) -> R,
    ) -> R {
        let mut failures = Vec::new();
        let mut sockets = self.table.all().unwrap_or_else(|error| {
            failures.push(error.into());
            Vec::new()
        });
        sockets.retain(wanted);
        let elsewhere = |socket: &FollowedSocket| socket.network != self.network;
        let networks: BTreeSet<_> = sockets.iter().filter(|it| elsewhere(it)).map(|it| it.network).collect();
        let mut others = BTreeMap::new();
        if self.pods && !networks.is_empty() {
            // This host's own do not wait for whatever is wrong there.
            match namespaces::open_each(&networks, Diagnostics::open) {
                Ok(opened) => others = opened,
                Err(error) => failures.push(error),
            }
        }
        sockets.retain(|socket| !elsewhere(socket) || others.contains_key(&socket.network));
        let ways = Ways { own: &self.own, others };
        let mut pass = Pass::new(&ways);
        let result = work(&sockets, &mut pass);
        let Pass { gone, failure, .. } = pass;
        failures.extend(failure);
        for socket in gone {
            failures.extend(self.table.forget(&socket).err().map(SocketsError::from));
        }
        failures.iter().for_each(|error| self.warn(error));
        result
    }

    fn warn(&mut self, error: &SocketsError) {
        if self.said.insert(error.to_string()) {
            tracing::warn!("{error}");
        }
    }
}

/// Why sockets could not be looked at, or ended.
#[derive(Debug, thiserror::Error)]
enum SocketsError {
    #[error(transparent)]
    Table(#[from] DataplaneError),
    #[error("cannot ask the kernel about sockets of this host's processes: {0}")]
    Ask(#[source] io::Error),
    #[error(
        "cannot end sockets of this host's processes: {0}\n   = help: the kernel needs CONFIG_INET_DIAG_DESTROY, the \
         daemon CAP_NET_ADMIN"
    )]
    Destroy(#[source] io::Error),
    #[error(
        "cannot enter the network namespaces of pods: their connections to a dead backend are left to their own timeouts: \
         {0}\n   = help: sheave.service.d/pods.conf lets the daemon do it; a static pod's manifest says what it needs"
    )]
    Enter(#[source] io::Error),
    #[error(
        "cannot find the network namespaces of pods: their connections to a dead backend are left to their own timeouts\n   \
         = help: in a container sheave needs hostPID, to see the host's processes; nothing is wrong if the pods have just ended"
    )]
    Hidden,
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{TcpListener, TcpStream},
    };

    use socket2::SockRef;

    use super::*;

    /// The client's and the server's end of a connection.
    pub(super) fn connection(to: &str) -> (TcpStream, TcpStream, FollowedSocket) {
        let listener = TcpListener::bind(to).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let socket = FollowedSocket {
            cookie: SockRef::from(&client).cookie().unwrap(),
            network: 0,
            local: client.local_addr().unwrap(),
            remote: client.peer_addr().unwrap(),
            interface: 0,
            service: 0,
            backend: 1,
        };
        (client, listener.accept().unwrap().0, socket)
    }

    impl Table for Vec<FollowedSocket> {
        fn all(&self) -> Result<Vec<FollowedSocket>, DataplaneError> {
            Ok(self.clone())
        }

        fn forget(&mut self, socket: &FollowedSocket) -> Result<(), DataplaneError> {
            self.retain(|it| it != socket);
            Ok(())
        }
    }

    const QUIET: Duration = Duration::from_secs(3600);

    /// With sockets of backend 1, which is dead if it has the address of one of them.
    fn worker(sockets: Vec<FollowedSocket>, dead: Option<SocketAddr>) -> Worker<Vec<FollowedSocket>> {
        let dead = dead.map(|address| (1, Dead { address, quiet: QUIET }));
        let (_, dead) = watch::channel(dead.into_iter().collect());
        let own = Diagnostics::open().unwrap();
        Worker { table: sockets, network: 0, own, pods: false, dead, said: BTreeSet::new() }
    }

    fn ended(sockets: usize) -> Report {
        Report::EndedDead { backend: 1, sockets, heard: None }
    }

    #[test]
    fn payload_is_a_veto_also_at_the_last_moment() {
        let (mut client, mut server, socket) = connection("127.0.0.1:0");
        server.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
        // Nobody has looked before: the order alone finds out.
        let mut worker = worker(vec![socket], Some(socket.remote));
        let report = worker.end_dead(1);
        assert!(matches!(report, Report::EndedDead { sockets: 0, heard: Some(_), .. }), "{report:?}");
        server.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
    }

    #[test]
    fn whoever_is_not_dead_any_more_or_another_keeps_its_sockets() {
        let (_client, _server, socket) = connection("127.0.0.1:0");
        assert_eq!(worker(vec![socket], None).end_dead(1), ended(0));
        let other = SocketAddr::new([192, 0, 2, 1].into(), socket.remote.port());
        assert_eq!(worker(vec![socket], Some(other)).end_dead(1), ended(0));
        assert_eq!(worker(vec![socket], Some(socket.remote)).end_dead(1), ended(1));
    }

    #[test]
    fn sockets_that_nobody_may_reach_are_neither_witnesses_nor_ended() {
        let (mut client, mut server, reachable) = connection("127.0.0.1:0");
        let (mut pods_client, mut pods_server, socket) = connection("127.0.0.1:0");
        let unreachable = FollowedSocket { network: 7, remote: reachable.remote, ..socket };
        pods_server.write_all(b"x").unwrap();
        pods_client.read_exact(&mut [0]).unwrap();
        let mut worker = worker(vec![reachable, unreachable], Some(reachable.remote));
        assert_eq!(worker.look(&BTreeSet::from([1])), BTreeMap::new());
        assert_eq!(worker.end_dead(1), ended(1));
        client.read(&mut [0]).unwrap_err();
        drop(server.read(&mut [0]));
        pods_server.write_all(b"x").unwrap();
        pods_client.read_exact(&mut [0]).unwrap();
        assert_eq!(
            worker.table,
            [reachable, unreachable],
            "those that were ended are the program's to take out"
        );
    }

    #[test]
    fn a_socket_that_is_gone_is_taken_out_of_the_table() {
        let (client, server, gone) = connection("127.0.0.1:0");
        let (_client, _server, open) = connection("127.0.0.1:0");
        drop((client, server));
        let mut worker = worker(vec![gone, open], None);
        assert_eq!(worker.look(&BTreeSet::from([1])), BTreeMap::new());
        assert_eq!(worker.table, [open]);
    }

    #[test]
    fn each_thing_that_goes_wrong_is_said_once() {
        let mut worker = worker(vec![], None);
        for number in [libc::EPERM, libc::ENOENT, libc::EPERM] {
            worker.warn(&SocketsError::Enter(io::Error::from_raw_os_error(number)));
        }
        assert_eq!(worker.said.len(), 2);
    }
}
