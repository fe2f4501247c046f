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

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    io,
    sync::mpsc as blocking,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot};

use crate::{
    dataplane::{DataplaneError, FlowFilter, FollowedSocket, SocketTable},
    privileges,
};

use diagnostics::{Diagnostics, Seen};

/// Payload that is so young is proof enough: nobody else's is looked for.
const ENOUGH: Duration = Duration::from_millis(500);

/// What the thread is told.
#[derive(Debug)]
pub enum Order {
    /// To find out when the sockets of these backends (by id) last received payload.
    Look(BTreeSet<u8>),
    /// To end the sockets of a backend that is dead; none of them, if one has received payload in this time.
    Bury(u8, Duration),
    /// To end sockets because an operator says so. Their number is the answer.
    End(FlowFilter, Option<oneshot::Sender<usize>>),
}

/// What it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// When the sockets of backends last received payload, by id; those that have received none are left out.
    Heard(BTreeMap<u8, Instant>),
    /// So many sockets of a dead backend were ended.
    Buried {
        /// The backend's id.
        backend: u8,
        /// How many.
        sockets: usize,
        /// None was, because one of them has received payload then.
        heard: Option<Instant>,
    },
    /// Something could not be done: for the log.
    Failed(String),
}

/// The thread that looks after sockets. Dropping it ends it.
#[derive(Debug)]
pub struct Undertaker {
    orders: blocking::Sender<Order>,
}

impl Undertaker {
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
        let yard = Yard { table, network, own, pods, told: Cell::new(false) };
        std::thread::Builder::new().name("sockets".to_owned()).spawn(move || {
            if let Err(error) = privileges::keep_for_sockets(pods) {
                tracing::warn!("the thread for sockets keeps capabilities that it does not need: {error}");
            }
            yard.work(&given, &reports);
        })?;
        Ok((Self { orders }, heard))
    }

    /// Gives an order.
    pub fn order(&self, order: Order) {
        // The thread ends with us.
        let _ = self.orders.send(order);
    }
}

/// What the thread has.
struct Yard {
    table: SocketTable,
    network: u64,
    own: Diagnostics,
    pods: bool,
    /// That others cannot be entered: said once.
    told: Cell<bool>,
}

/// Sockets, and the way to each.
struct Found {
    sockets: Vec<FollowedSocket>,
    /// By cookie of the network namespace; this host's own is not among them.
    others: BTreeMap<u64, Diagnostics>,
}

impl Yard {
    fn work(&self, orders: &blocking::Receiver<Order>, reports: &mpsc::UnboundedSender<Report>) {
        for order in orders {
            let report = match order {
                Order::Look(backends) => self.look(&backends).map(Report::Heard),
                Order::Bury(backend, quiet) => self.bury(backend, quiet),
                Order::End(filter, answer) => match self.end(&filter) {
                    Ok(count) => {
                        // Whoever has asked may have gone.
                        answer.map(|answer| answer.send(count));
                        continue;
                    }
                    Err(error) => Err(error),
                },
            };
            if reports.send(report.unwrap_or_else(|error| Report::Failed(error.to_string()))).is_err() {
                return;
            }
        }
    }

    /// The sockets for which `wanted` holds, as far as they can be reached.
    fn find(&self, wanted: impl Fn(&FollowedSocket) -> bool) -> Result<Found, SocketsError> {
        let mut sockets: Vec<_> = self.table.all()?.into_iter().filter(wanted).collect();
        let elsewhere = |socket: &FollowedSocket| socket.network != self.network;
        let networks: BTreeSet<_> = sockets.iter().filter(|it| elsewhere(it)).map(|it| it.network).collect();
        let others = if networks.is_empty() || !self.pods {
            BTreeMap::new()
        } else {
            // This host's own do not wait for whatever is wrong there.
            namespaces::open_each(&networks, Diagnostics::open).unwrap_or_else(|error| {
                if !self.told.replace(true) {
                    tracing::warn!("{error}");
                }
                BTreeMap::new()
            })
        };
        sockets.retain(|socket| !elsewhere(socket) || others.contains_key(&socket.network));
        Ok(Found { sockets, others })
    }

    fn way<'a>(&'a self, found: &'a Found, socket: &FollowedSocket) -> &'a Diagnostics {
        found.others.get(&socket.network).unwrap_or(&self.own)
    }

    fn look(&self, backends: &BTreeSet<u8>) -> Result<BTreeMap<u8, Instant>, SocketsError> {
        let found = self.find(|socket| backends.contains(&socket.backend))?;
        let mut heard = BTreeMap::new();
        for socket in &found.sockets {
            let is_recent = |at: &Instant| at.elapsed() < ENOUGH;
            if heard.get(&socket.backend).is_some_and(is_recent) {
                continue;
            }
            if let Seen::Open(Some(ago)) = self.way(&found, socket).look(socket)?
                && let Some(at) = Instant::now().checked_sub(ago)
            {
                let latest = heard.entry(socket.backend).or_insert(at);
                *latest = at.max(*latest);
            }
        }
        Ok(heard)
    }

    fn bury(&self, backend: u8, quiet: Duration) -> Result<Report, SocketsError> {
        let found = self.find(|socket| socket.backend == backend)?;
        // All are looked at before one is touched.
        for socket in &found.sockets {
            if let Seen::Open(Some(ago)) = self.way(&found, socket).look(socket)?
                && ago < quiet
            {
                return Ok(Report::Buried { backend, sockets: 0, heard: Instant::now().checked_sub(ago) });
            }
        }
        Ok(Report::Buried { backend, sockets: self.destroy(&found)?, heard: None })
    }

    fn end(&self, filter: &FlowFilter) -> Result<usize, SocketsError> {
        let found = self.find(|socket| {
            filter.backend.is_none_or(|backend| backend == socket.backend)
                && filter.service.is_none_or(|service| service == socket.service)
                && filter.client.is_none_or(|net| net.contains(&socket.local.ip()))
                && filter.client_port.is_none_or(|port| port == socket.local.port())
        })?;
        self.destroy(&found)
    }

    fn destroy(&self, found: &Found) -> Result<usize, SocketsError> {
        let mut count = 0;
        for socket in &found.sockets {
            count += usize::from(self.way(found, socket).destroy(socket)?);
        }
        Ok(count)
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
