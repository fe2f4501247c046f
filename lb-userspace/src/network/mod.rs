//! What this host's network looks like: interfaces, addresses, neighbours and routes, followed over netlink.
//!
//! The kernel's tables are dumped once and then kept true by its notifications; when notifications were lost the
//! tables are dumped again. Whoever needs to know hears a coarse [`Change`] and asks again.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use futures_util::{StreamExt, TryStreamExt};
use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::AsyncSocket as _;
use rtnetlink::MulticastGroup;
use tokio::{
    sync::mpsc,
    task::AbortHandle,
    time::{Instant, sleep, sleep_until},
};

mod address;
mod arrangement;
mod bonding;
mod carrier;
mod ethtool;
mod guard;
mod interface;
mod link;
mod local_route;
mod local_server;
mod neighbour;
pub mod offloads;
mod route;
mod sockets;
#[cfg(test)]
pub(crate) mod testing;
mod veth;
pub mod virtio;

pub use address::LocalAddress;
pub use arrangement::{mode_for, native_obstacle};
pub use bonding::{Bonding, Obstacle};
pub use carrier::CARRIER_WAIT;
pub use guard::Silenced;
pub use interface::{AttachedXdp, Interface, Kind, Port, Tag, TagProtocol, XdpAttachMode};
pub(crate) use link::link_address;
pub use local_server::is_out_of_reach;
pub use neighbour::Neighbour;
pub use route::{NextHop, Route};
pub use sockets::{
    TcpSocket, TcpState, first_ephemeral_port, listening_sockets, tcp_sockets, used_tcp_ports,
};
pub(crate) use sockets::{open_diagnostics, request_bytes};

use local_route::LocalRoutes;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// An Ethernet address as people write it: `02:00:00:00:00:01`.
pub fn display_mac(mac: &Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Something about the network is different: ask again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// An interface came, went, or has another state, name, MAC address, MTU or XDP program.
    Links,
    /// A local address came or went, or a route that makes one local.
    Addresses,
    /// A neighbour has another MAC address, or none any more.
    Neighbours,
    /// A route or a routing rule came or went.
    Routes,
}

/// Why a question about the network has no answer.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The kernel refused.
    #[error("cannot {doing}: {source}")]
    Kernel {
        /// What was tried.
        doing: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// No route leads there.
    #[error("no route to {address} ({reason}): `ip route get {address}` should name an interface")]
    NoRoute {
        /// The address asked for.
        address: IpAddr,
        /// The kernel's answer.
        reason: String,
    },
    /// The address is this host's own, so that it has no next hop.
    #[error("{0} is an address of this host")]
    Local(IpAddr),
    /// No such interface.
    #[error("there is no interface {0}: `ip link` lists them")]
    NoInterface(String),
    /// A VLAN interface whose parent lives in another network namespace.
    #[error(
        "the parent of the VLAN interface {0} is not in this network namespace: run sheave where the parent is"
    )]
    ForeignParent(String),
    /// More than two VLAN tags.
    #[error("{0} is a VLAN in a VLAN in a VLAN: the data path reads at most two tags")]
    TooManyTags(String),
    /// The interface has no Ethernet address, so that no frame can be built for it.
    #[error("{0} is not an Ethernet interface: clients and backends must be reached over Ethernet")]
    NotEthernet(String),
}

/// The kernel's answer without its wrapping.
pub(crate) fn io_error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(error) => error.to_io(),
        other => io::Error::other(other),
    }
}

/// The followed tables.
#[derive(Clone, Debug, Default)]
struct Tables {
    links: BTreeMap<u32, Interface>,
    /// How often each interface was set down.
    downs: BTreeMap<u32, u64>,
    addresses: BTreeSet<LocalAddress>,
    local_routes: LocalRoutes,
    neighbours: HashMap<(u32, IpAddr), Neighbour>,
}

/// The network of the namespace in which it was opened. Cheap to clone; following ends with the last clone.
#[derive(Clone, Debug)]
pub struct Network {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    requests: rtnetlink::Handle,
    tables: Arc<RwLock<Tables>>,
    tasks: [AbortHandle; 2],
}

impl Drop for Inner {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

const GROUPS: [MulticastGroup; 8] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Neigh,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
];

/// Changes come in bursts (an interface going up brings addresses, routes and neighbours): collect them this long.
const DEBOUNCE: Duration = Duration::from_millis(20);

impl Network {
    /// Dumps the tables and starts following them, on the current tokio runtime and network namespace.
    ///
    /// The receiver may be slow: a change is kept until there is room for it, and never twice.
    pub async fn open() -> Result<(Self, mpsc::Receiver<Change>), NetworkError> {
        let failed = |doing| move |source| NetworkError::Kernel { doing, source };
        let (connection, requests, _) =
            rtnetlink::new_connection().map_err(failed("open a netlink socket"))?;
        let connection = tokio::spawn(connection).abort_handle();
        // Subscribed before the dump: what happens meanwhile waits in the socket and is applied on top.
        let events = Events::subscribe().map_err(failed("subscribe to the kernel's network changes"))?;
        let tables = Arc::new(RwLock::new(dump(&requests).await?));
        let (sender, changes) = mpsc::channel(8);
        let follower = tokio::spawn(follow(events, requests.clone(), tables.clone(), sender)).abort_handle();
        Ok((Self { inner: Arc::new(Inner { requests, tables, tasks: [connection, follower] }) }, changes))
    }

    /// Every interface, by index.
    pub fn interfaces(&self) -> Vec<Interface> {
        self.read(|tables| tables.links.values().cloned().collect())
    }

    /// The interface with this index.
    pub fn interface(&self, index: u32) -> Result<Interface, NetworkError> {
        self.read(|tables| tables.links.get(&index).cloned())
            .ok_or_else(|| NetworkError::NoInterface(format!("with index {index}")))
    }

    /// The interface with this name.
    pub fn interface_named(&self, name: &str) -> Result<Interface, NetworkError> {
        self.read(|tables| tables.links.values().find(|link| link.name == name).cloned())
            .ok_or_else(|| NetworkError::NoInterface(name.to_owned()))
    }

    /// The interfaces that a bond, bridge or team is made of.
    pub fn members(&self, master: u32) -> Vec<Interface> {
        let is_member = |it: &&Interface| it.master == Some(master);
        self.read(|tables| tables.links.values().filter(is_member).cloned().collect())
    }

    /// The XDP programs on an interface, asked for anew: the kernel does not tell when one comes or goes with a link of
    /// its own. None: there is no such interface.
    pub async fn xdp_programs(&self, interface: u32) -> Result<Option<Vec<AttachedXdp>>, NetworkError> {
        match self.interface_now(interface).await {
            Ok(found) => Ok(Some(found.xdp)),
            Err(NetworkError::NoInterface(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Where the frames of an interface really pass: the interface itself, or what its VLANs are built on.
    pub fn port_of(&self, interface: u32) -> Result<Port, NetworkError> {
        self.read(|tables| interface::port_of(&tables.links, interface))
    }

    /// Every address of this host.
    pub fn local_addresses(&self) -> Vec<LocalAddress> {
        self.read(|tables| tables.addresses.iter().cloned().collect())
    }

    /// The index of the interface that has this address or, where none has it, of the route of the local table that makes
    /// it this host's. None: it is not on this host.
    pub fn interface_carrying(&self, address: IpAddr) -> Option<u32> {
        self.read(|tables| {
            let carrying = tables.addresses.iter().find(|local| local.address == address);
            carrying.map(|local| local.interface).or_else(|| tables.local_routes.interface_of(address))
        })
    }

    /// How often an interface was set down since it is followed, however short that was.
    pub fn downs(&self, index: u32) -> u64 {
        self.read(|tables| tables.downs.get(&index).copied().unwrap_or_default())
    }

    /// Reads the kernel's addresses and local routes now. To be called where an answer must not depend on a notification that may still be
    /// on its way: after adding an address, and before telling that one is gone.
    ///
    /// # Errors
    /// When the kernel does not answer; what is known stays as it is.
    pub async fn reread_addresses(&self) -> Result<(), NetworkError> {
        // Notifications from before the dump are applied once more afterwards, in their order: they end in the same state.
        let addresses = dump_addresses(&self.inner.requests).await?;
        let local_routes = local_route::dump().await?;
        let mut tables = self.inner.tables.write().unwrap_or_else(PoisonError::into_inner);
        (tables.addresses, tables.local_routes) = (addresses, local_routes);
        Ok(())
    }

    /// What the kernel knows about a neighbour.
    pub fn neighbour(&self, interface: u32, address: IpAddr) -> Option<Neighbour> {
        self.read(|tables| tables.neighbours.get(&(interface, address)).copied())
    }

    /// From now on notifications do not arrive: the tables stay as they are.
    #[cfg(test)]
    pub(crate) fn stop_following(&self) {
        self.inner.tasks[1].abort();
    }

    pub(crate) fn requests(&self) -> &rtnetlink::Handle {
        &self.inner.requests
    }

    fn read<T>(&self, look: impl FnOnce(&Tables) -> T) -> T {
        look(&self.inner.tables.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The whole tables, as they are now.
async fn dump(requests: &rtnetlink::Handle) -> Result<Tables, NetworkError> {
    let failed = |doing| move |error| NetworkError::Kernel { doing, source: io_error(error) };
    let mut tables = Tables::default();
    let mut links = requests.link().get().execute();
    while let Some(message) = links.try_next().await.map_err(failed("list the interfaces"))? {
        tables.apply(RouteNetlinkMessage::NewLink(message));
    }
    tables.addresses = dump_addresses(requests).await?;
    tables.local_routes = local_route::dump().await?;
    let mut neighbours = requests.neighbours().get().execute();
    while let Some(message) = neighbours.try_next().await.map_err(failed("list the neighbours"))? {
        tables.apply(RouteNetlinkMessage::NewNeighbour(message));
    }
    Ok(tables)
}

async fn dump_addresses(requests: &rtnetlink::Handle) -> Result<BTreeSet<LocalAddress>, NetworkError> {
    let failed = |error| NetworkError::Kernel { doing: "list the addresses", source: io_error(error) };
    let mut found = BTreeSet::new();
    let mut addresses = requests.address().get().execute();
    while let Some(message) = addresses.try_next().await.map_err(failed)? {
        found.extend(LocalAddress::from_message(&message));
    }
    Ok(found)
}

type Message = netlink_packet_core::NetlinkMessage<RouteNetlinkMessage>;

/// The kernel's notifications. Its connection ends with it.
struct Events {
    messages: futures_util::stream::BoxStream<'static, Message>,
    connection: AbortHandle,
}

impl Events {
    fn subscribe() -> io::Result<Self> {
        let (mut connection, _, messages) = rtnetlink::new_multicast_connection(&GROUPS)?;
        // A switch that flushes its table sends thousands of neighbour changes at once. Losing some is repaired by a
        // dump, so a kernel that grants less is no error.
        let _ = connection.socket_mut().socket_mut().set_rx_buf_sz(1_u32 << 20);
        let connection = tokio::spawn(connection).abort_handle();
        Ok(Self { messages: messages.map(|(message, _)| message).boxed(), connection })
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// Applies notifications to the tables and tells about them, for ever.
async fn follow(
    mut events: Events,
    requests: rtnetlink::Handle,
    tables: Arc<RwLock<Tables>>,
    changes: mpsc::Sender<Change>,
) {
    let mut pending = BTreeSet::new();
    let mut due = Instant::now();
    loop {
        let told = async {
            sleep_until(due).await;
            changes.reserve().await
        };
        let message = tokio::select! {
            message = events.messages.next() => message,
            permit = told, if !pending.is_empty() => {
                match (permit, pending.pop_first()) {
                    (Ok(permit), Some(change)) => permit.send(change),
                    // Nobody listens: the tables are still followed, only the news are dropped.
                    _ => pending.clear(),
                }
                continue;
            }
        };
        if pending.is_empty() {
            due = Instant::now() + DEBOUNCE;
        }
        match message.map(|message| message.payload) {
            Some(NetlinkPayload::InnerMessage(message)) => {
                pending.extend(tables.write().unwrap_or_else(PoisonError::into_inner).apply(message));
            }
            Some(NetlinkPayload::Overrun(_)) => {
                tracing::debug!("network changes were lost, reading the tables again");
                reload(&requests, &tables).await;
                pending.extend(EVERYTHING);
            }
            Some(_) => {}
            None => {
                events = resubscribe().await;
                reload(&requests, &tables).await;
                pending.extend(EVERYTHING);
            }
        }
    }
}

const EVERYTHING: [Change; 4] = [Change::Links, Change::Addresses, Change::Neighbours, Change::Routes];

/// How long to wait before asking a kernel again that has just failed to answer.
const RETRY: Duration = Duration::from_secs(1);

async fn reload(requests: &rtnetlink::Handle, tables: &RwLock<Tables>) {
    loop {
        match dump(requests).await {
            Ok(fresh) => {
                let mut tables = tables.write().unwrap_or_else(PoisonError::into_inner);
                let downs = std::mem::take(&mut tables.downs);
                *tables = Tables { downs, ..fresh };
                return;
            }
            Err(error) => tracing::warn!("{error}, trying again"),
        }
        sleep(RETRY).await;
    }
}

async fn resubscribe() -> Events {
    loop {
        sleep(RETRY).await;
        match Events::subscribe() {
            Ok(events) => return events,
            Err(error) => {
                tracing::warn!("cannot subscribe to the kernel's network changes: {error}, trying again");
            }
        }
    }
}

impl Tables {
    /// Takes in one message of the kernel; says what is different for others, if anything.
    fn apply(&mut self, message: RouteNetlinkMessage) -> Option<Change> {
        match message {
            // A bridge reports its ports with its own family: leaving a bridge is not ceasing to exist.
            RouteNetlinkMessage::NewLink(message)
                if message.header.interface_family == AddressFamily::Unspec =>
            {
                let link = Interface::from_message(&message)?;
                if !link.up {
                    self.local_routes.interface_down(link.index);
                }
                let before = self.links.insert(link.index, link.clone());
                if before.as_ref().is_some_and(|before| before.up) && !link.up {
                    *self.downs.entry(link.index).or_default() += 1;
                }
                (before.as_ref() != Some(&link)).then_some(Change::Links)
            }
            RouteNetlinkMessage::DelLink(message)
                if message.header.interface_family == AddressFamily::Unspec =>
            {
                self.local_routes.interface_gone(message.header.index);
                self.downs.remove(&message.header.index);
                self.links.remove(&message.header.index).map(|_| Change::Links)
            }
            RouteNetlinkMessage::NewAddress(message) => {
                let address = LocalAddress::from_message(&message)?;
                self.addresses.insert(address).then_some(Change::Addresses)
            }
            RouteNetlinkMessage::DelAddress(message) => {
                let address = LocalAddress::from_message(&message)?;
                self.addresses.remove(&address).then_some(Change::Addresses)
            }
            RouteNetlinkMessage::NewNeighbour(message) => {
                let (key, neighbour) = Neighbour::from_message(&message)?;
                let before = self.neighbours.insert(key, neighbour);
                // Reachable, stale, probed again: of no interest as long as the MAC address holds.
                (before.and_then(|before| before.mac()) != neighbour.mac()).then_some(Change::Neighbours)
            }
            RouteNetlinkMessage::DelNeighbour(message) => {
                let (key, _) = Neighbour::from_message(&message)?;
                self.neighbours.remove(&key)?.mac().map(|_| Change::Neighbours)
            }
            RouteNetlinkMessage::NewRoute(message) if self.local_routes.add(&message) => {
                Some(Change::Addresses)
            }
            RouteNetlinkMessage::DelRoute(message) if self.local_routes.remove(&message) => {
                Some(Change::Addresses)
            }
            RouteNetlinkMessage::NewRoute(_)
            | RouteNetlinkMessage::DelRoute(_)
            | RouteNetlinkMessage::NewRule(_)
            | RouteNetlinkMessage::DelRule(_) => Some(Change::Routes),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
