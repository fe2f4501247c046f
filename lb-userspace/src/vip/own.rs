//! `vip.mode = "own"`: we put the VIP on this host, after asking whether anybody has it, and take away only what we put
//! there.

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::future::try_join_all;
use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, CacheInfo},
};
use tokio::{
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep, sleep_until, timeout_at},
};

mod returning;

use returning::{Asked, Lost};

use super::{
    VipError,
    frame::Statement,
    link::Link,
    record::{Placed, Record},
};
use crate::network::{CARRIER_WAIT, Interface, Mac, Network, NetworkError, display_mac, io_error};

/// RFC 5227 asks three times over up to 7 s, for networks where everybody configures themselves at once and links may
/// still be coming up. Hosts answer within a millisecond; an operator waits for us.
const PROBES: u32 = 3;
/// Tries to send that many, before the interface is given up.
const ATTEMPTS: u32 = 15;
const PROBE_INTERVAL: Duration = Duration::from_millis(150);
/// How long after the last probe an answer is waited for.
const PROBE_WAIT: Duration = Duration::from_millis(250);

/// When the address is announced, from the moment it is here: at once, and again for switches and hosts that were
/// not listening (a port that was just unblocked, a lost frame).
const ANNOUNCEMENTS: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(250),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
];
/// Repeated for ever: after a split brain has healed some caches hold the loser's MAC address for hours.
const REFRESH: Duration = Duration::from_secs(60);

/// A rival that keeps talking is logged this often.
const RIVAL_LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Another host that says it has a VIP of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rival {
    /// The VIP.
    pub vip: IpAddr,
    /// The other host.
    pub mac: Mac,
}

/// When each rival was last logged.
type Rivals = Arc<Mutex<BTreeMap<Rival, Instant>>>;

/// The VIPs that this process has put on this host. Dropped without [`Owner::release`] they stay: the data path goes
/// on without the daemon, and so must they; the record tells the next owner or `unload`.
#[derive(Debug)]
pub struct Owner {
    network: Network,
    record: Record,
    rivals: Rivals,
    /// Announce and watch; end with the owner.
    guards: JoinSet<()>,
    /// Where the VIPs are that are ours to announce.
    carriers: BTreeMap<IpAddr, Carrier>,
    /// Those whose interface is gone or down.
    lost: BTreeMap<IpAddr, Lost>,
    /// Ask whether another host has one of those.
    asking: JoinSet<Asked>,
}

/// The interface that carries a VIP.
#[derive(Debug)]
struct Carrier {
    index: u32,
    name: String,
    /// [`Network::downs`] when the VIP was last seen there.
    downs: u64,
    /// See [`guard`].
    guard: AbortHandle,
}

/// What is to be done about one VIP.
enum Plan {
    /// Nobody on this host has it: ask, add, announce.
    Add(Interface),
    /// We put it there before.
    Adopt(Interface),
    /// Somebody else put it there: not ours to announce or remove.
    Leave,
}

impl Owner {
    /// Puts the VIPs on this host: all of them, or none. Returns after the first announcement; the rest go out in the
    /// background, and rivals are watched for.
    ///
    /// A VIP that is already here is ours if the record in `state_dir` says so; else it is left alone, now and later.
    pub async fn acquire(
        network: &Network,
        vips: impl IntoIterator<Item = IpAddr>,
        state_dir: &Path,
    ) -> Result<Self, VipError> {
        let mut record = Record::load(state_dir)?;
        let mut additions = Vec::new();
        let mut links = Vec::new();
        for vip in vips {
            match plan(network, vip, Some(&record), CARRIER_WAIT).await? {
                Plan::Add(interface) => additions.push((open(&interface, vip)?, interface)),
                Plan::Adopt(interface) => links.push((open(&interface, vip)?, interface)),
                Plan::Leave => {
                    tracing::warn!(
                        "the VIP {vip} is already on this host, put there by somebody else: sheave will neither \
                         announce nor remove it"
                    );
                }
            }
        }
        try_join_all(additions.iter().map(|(link, interface)| probe(link, interface))).await?;
        let mut added = Vec::new();
        for (link, interface) in additions {
            let placed = Placed { vip: link.address, interface: interface.name.clone() };
            // Recorded first: an address that nobody remembers is worse than a record of one that never came.
            let result = match record.add(placed.clone()) {
                Ok(()) => add_address(network, &interface, link.address).await,
                Err(error) => Err(error),
            };
            added.push(placed);
            if let Err(error) = result {
                take_back(network, &mut record, &added).await;
                return Err(error);
            }
            links.push((link, interface));
        }
        // From here on they are known to be here, whenever the kernel's notifications come.
        if !added.is_empty() {
            network
                .reread_addresses()
                .await
                .map_err(|source| VipError::Network { vip: added[0].vip, source })?;
        }
        let mut owner = Self {
            network: network.clone(),
            record,
            rivals: Rivals::default(),
            guards: JoinSet::new(),
            carriers: BTreeMap::new(),
            lost: BTreeMap::new(),
            asking: JoinSet::new(),
        };
        for (link, interface) in links {
            owner.keep(link, interface);
        }
        Ok(owner)
    }

    /// Announces a VIP that is here, now and from now on, and watches for rivals.
    fn keep(&mut self, link: Link, interface: Interface) {
        let Interface { index, name, .. } = interface;
        let vip = link.address;
        if let Err(error) = link.announce() {
            tracing::warn!("cannot announce the VIP {vip} on {name}: {error}");
        }
        let guard = self.guards.spawn(guard(link, name.clone(), self.rivals.clone()));
        self.lost.remove(&vip);
        self.carriers.insert(vip, Carrier { downs: self.network.downs(index), index, name, guard });
    }

    /// What we put on this host.
    pub fn placed(&self) -> Vec<Placed> {
        self.record.placed().iter().cloned().collect()
    }

    /// The other hosts that have said they have a VIP of ours, since we acquired it.
    pub fn rivals(&self) -> Vec<Rival> {
        self.rivals.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }

    /// Takes away what we put on this host.
    pub async fn release(mut self) -> Result<(), VipError> {
        for placed in self.placed() {
            remove_address(&self.network, &placed).await?;
            self.record.remove(&placed)?;
        }
        Ok(())
    }
}

/// Who answers for a VIP that is not on this host, if anybody.
pub async fn holder(network: &Network, vip: IpAddr) -> Result<Option<Mac>, VipError> {
    let Plan::Add(interface) = plan(network, vip, None, Duration::ZERO).await? else { return Ok(None) };
    let link = open(&interface, vip)?;
    match probe(&link, &interface).await {
        Ok(()) => Ok(None),
        Err(VipError::InUse { mac, .. }) => Ok(Some(mac)),
        Err(error) => Err(error),
    }
}

/// `patience`: how long an interface without a carrier may take to have one.
async fn plan(
    network: &Network,
    vip: IpAddr,
    record: Option<&Record>,
    patience: Duration,
) -> Result<Plan, VipError> {
    let failed = |source| VipError::Network { vip, source };
    if let Some(index) = network.interface_carrying(vip) {
        let interface = network.interface(index).map_err(failed)?;
        let placed = Placed { vip, interface: interface.name.clone() };
        let ours = record.is_some_and(|record| record.placed().contains(&placed));
        return Ok(if ours { Plan::Adopt(interface) } else { Plan::Leave });
    }
    let route = network.route_to(vip).await.map_err(failed)?;
    if let Some(gateway) = route.gateway {
        return Err(VipError::NoSubnet { vip, gateway });
    }
    let interface = network.await_carrier(route.interface, patience).await.map_err(failed)?;
    if !interface.up || !interface.carrier {
        return Err(VipError::InterfaceDown { vip, interface: interface.name });
    }
    Ok(Plan::Add(interface))
}

fn open(interface: &Interface, vip: IpAddr) -> Result<Link, VipError> {
    let not_ethernet =
        || VipError::Network { vip, source: NetworkError::NotEthernet(interface.name.clone()) };
    let mac = interface.mac.ok_or_else(not_ethernet)?;
    Link::open(interface.index, mac, vip).map_err(link_error(vip, interface))
}

fn link_error(vip: IpAddr, interface: &Interface) -> impl Fn(io::Error) -> VipError {
    move |source| VipError::Link { vip, interface: interface.name.clone(), source }
}

/// Asks whether anybody has the address. Whoever claims it, or asks for it at the same time, is in the way
/// (RFC 5227 §2.1.1, RFC 4862 §5.4).
async fn probe(link: &Link, interface: &Interface) -> Result<(), VipError> {
    let failed = link_error(link.address, interface);
    let mut sent = 0;
    for _ in 0..ATTEMPTS {
        match link.probe() {
            Ok(()) => sent += 1,
            // An interface that has just come up has no queue yet.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
            Err(error) => return Err(failed(error)),
        }
        let wait = if sent == PROBES { PROBE_WAIT } else { PROBE_INTERVAL };
        if let Ok(heard) = timeout_at(Instant::now() + wait, link.hear()).await {
            let mac = heard.map_err(&failed)?.mac;
            return Err(VipError::InUse { vip: link.address, mac, interface: interface.name.clone() });
        }
        if sent == PROBES {
            return Ok(());
        }
    }
    Err(failed(io::Error::from_raw_os_error(libc::ENOBUFS)))
}

async fn take_back(network: &Network, record: &mut Record, added: &[Placed]) {
    for placed in added {
        let removed = match remove_address(network, placed).await {
            Ok(()) => record.remove(placed),
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            tracing::warn!("{error}");
        }
    }
}

/// The address as a host's own, and no more: a host route, no subnet, never chosen as a source. (A socket of this host
/// with the VIP as its address would have a port in the middle of the flow table.)
fn address_message(index: u32, vip: IpAddr) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.attributes = vec![AddressAttribute::Local(vip), AddressAttribute::Address(vip)];
    match vip {
        IpAddr::V4(_) => {
            message.header.family = AddressFamily::Inet;
            // Its own subnet: it comes after the interface's addresses and is never the first choice.
            message.header.prefix_len = 32;
        }
        IpAddr::V6(_) => {
            message.header.family = AddressFamily::Inet6;
            message.header.prefix_len = 128;
            message.header.flags = AddressHeaderFlags::Nodad; // We have asked ourselves.
            let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute;
            let mut lifetime = CacheInfo::default();
            // Deprecated from the start: valid for ever, never preferred (RFC 6724 rule 3).
            (lifetime.ifa_preferred, lifetime.ifa_valid) = (0, u32::MAX);
            message
                .attributes
                .extend([AddressAttribute::Flags(flags), AddressAttribute::CacheInfo(lifetime)]);
        }
    }
    message
}

async fn add_address(network: &Network, interface: &Interface, vip: IpAddr) -> Result<(), VipError> {
    let failed = |error| VipError::Address {
        doing: "add",
        vip,
        interface: interface.name.clone(),
        source: io_error(error),
    };
    let mut request = network.requests().address().add(interface.index, vip, 32);
    *request.message_mut() = address_message(interface.index, vip);
    request.execute().await.map_err(failed)
}

/// An address, or an interface, that is gone already is fine.
pub(super) async fn remove_address(network: &Network, placed: &Placed) -> Result<(), VipError> {
    let Ok(interface) = network.interface_named(&placed.interface) else { return Ok(()) };
    let message = address_message(interface.index, placed.vip);
    let Err(error) = network.requests().address().del(message).execute().await else { return Ok(()) };
    let source = io_error(error);
    if matches!(source.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::ENODEV)) {
        return Ok(());
    }
    Err(VipError::Address { doing: "remove", vip: placed.vip, interface: placed.interface.clone(), source })
}

/// Announces the address, and listens for others that say they have it, for as long as we do.
async fn guard(link: Link, interface: String, rivals: Rivals) {
    let start = Instant::now();
    let mut due = ANNOUNCEMENTS[1..].iter().map(|after| start + *after);
    let mut next = due.next().unwrap_or(start + REFRESH);
    loop {
        tokio::select! {
            heard = link.hear() => match heard {
                Ok(heard) if heard.statement == Statement::Claim => {
                    notice(&rivals, Rival { vip: link.address, mac: heard.mac }, &interface);
                }
                Ok(_) => {}
                Err(error) => {
                    // The interface went down; it is announced again when it is back.
                    tracing::debug!("listening for rivals on {interface}: {error}");
                    sleep(Duration::from_secs(1)).await;
                }
            },
            () = sleep_until(next) => {
                if let Err(error) = link.announce() {
                    tracing::debug!("cannot announce {} on {interface}: {error}", link.address);
                }
                next = due.next().unwrap_or(Instant::now() + REFRESH);
            }
        }
    }
}

fn notice(rivals: &Rivals, rival: Rival, interface: &str) {
    let now = Instant::now();
    let mut rivals = rivals.lock().unwrap_or_else(PoisonError::into_inner);
    let due = rivals.get(&rival).is_none_or(|logged| now - *logged >= RIVAL_LOG_INTERVAL);
    if due {
        rivals.insert(rival, now);
        tracing::warn!(
            "{} on {interface} says it has the VIP {}, which is ours: two owners, clients will reach either. Stop one",
            display_mac(&rival.mac),
            rival.vip
        );
    }
}

#[cfg(test)]
mod tests;
