//! What one client may take of the probe listener, so that no client takes what another needs.
//!
//! A client is its address; of IPv6 the /64, because a host has all of it. Clients on this host (a kubelet) have places
//! of their own, which no number of others can take.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{sync::oneshot, time::Instant};

/// Connections at once of clients on this host, and as many again of all others.
pub(super) const PLACES: usize = 64;
/// Of these, of one client.
pub(super) const PLACES_OF_ONE: usize = 16;
/// Questions a second that need a backend to be asked, of one client in the long run, and how many at once.
const RATE: f64 = 50.0;
const BURST: f64 = 100.0;
/// Clients whose rate is remembered.
const CLIENTS: usize = 1024;

/// Who has a share: an address, or the first 64 bits of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Client {
    /// It is on this host.
    local: bool,
    address: IpAddr,
}

impl Client {
    /// The client at `peer`, which has connected to `ours`.
    pub(super) fn of(peer: SocketAddr, ours: SocketAddr) -> Self {
        let (peer, ours) = (peer.ip().to_canonical(), ours.ip().to_canonical());
        // A connection to an address of the own host comes from that address, unless the program says otherwise.
        let local = peer.is_loopback() || peer == ours;
        let address = match peer {
            IpAddr::V6(address) if !local => {
                let [a, b, c, d, ..] = address.segments();
                Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
            }
            other => other,
        };
        Self { local, address }
    }
}

/// The connections that are open.
#[derive(Debug, Default)]
pub(super) struct Places(Mutex<Open>);

#[derive(Debug, Default)]
struct Open {
    /// In the order in which they came.
    connections: BTreeMap<u64, Connection>,
    next: u64,
}

#[derive(Debug)]
struct Connection {
    client: Client,
    /// No whole request has come yet.
    idle: bool,
    /// Dropped: the connection is to end.
    _stays: oneshot::Sender<()>,
}

/// A connection's place, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    number: u64,
}

impl Places {
    /// A place for one more connection, and what comes to its end when the connection must end for another's sake. None:
    /// there is no place, and nothing that another could do without.
    ///
    /// Where places have run out, the oldest connection that has asked nothing makes room, of the client that has most.
    pub(super) fn enter(self: &Arc<Self>, client: Client) -> Option<(Place, oneshot::Receiver<()>)> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if open.of(client) >= PLACES_OF_ONE {
            let oldest = open.oldest_idle(client)?;
            open.connections.remove(&oldest);
        }
        let beside = |it: &&Connection| it.client.local == client.local;
        if open.connections.values().filter(beside).count() >= PLACES {
            let superfluous = open.superfluous(client)?;
            open.connections.remove(&superfluous);
        }
        let (stays, must_end) = oneshot::channel();
        let number = open.next;
        open.next += 1;
        open.connections.insert(number, Connection { client, idle: true, _stays: stays });
        Some((Place { places: Arc::clone(self), number }, must_end))
    }
}

impl Open {
    fn of(&self, client: Client) -> usize {
        self.connections.values().filter(|it| it.client == client).count()
    }

    fn oldest_idle(&self, client: Client) -> Option<u64> {
        let mut idle = self.connections.iter().filter(|(_, it)| it.client == client && it.idle);
        idle.next().map(|(number, _)| *number)
    }

    /// The connection that makes room for one of `client`.
    fn superfluous(&self, client: Client) -> Option<u64> {
        let mut counts = BTreeMap::<Client, usize>::new();
        for connection in self.connections.values().filter(|it| it.client.local == client.local) {
            *counts.entry(connection.client).or_default() += 1;
        }
        let idle = self.connections.iter().filter(|(_, it)| it.idle && it.client.local == client.local);
        let of_the_heaviest = idle.max_by_key(|(number, it)| (counts.get(&it.client), u64::MAX - **number));
        of_the_heaviest.map(|(number, _)| *number)
    }
}

impl Place {
    /// A whole request has come: the connection is not taken away any more.
    pub(super) fn asks(&self) {
        let mut open = self.places.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connection) = open.connections.get_mut(&self.number) {
            connection.idle = false;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.0.lock().unwrap_or_else(PoisonError::into_inner).connections.remove(&self.number);
    }
}

/// A token bucket for every client.
#[derive(Debug, Default)]
pub(super) struct Rates(Mutex<HashMap<Client, Bucket>>);

#[derive(Clone, Copy, Debug)]
struct Bucket {
    filled: Instant,
    tokens: f64,
}

impl Rates {
    /// Whether one more question of this client may pass.
    pub(super) fn take(&self, client: Client) -> bool {
        let now = Instant::now();
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= CLIENTS && !buckets.contains_key(&client) {
            make_room(&mut buckets, now);
        }
        let bucket = buckets.entry(client).or_insert(Bucket { filled: now, tokens: BURST });
        let seconds = now.saturating_duration_since(bucket.filled).as_secs_f64();
        bucket.tokens = (bucket.tokens + seconds * RATE).min(BURST);
        bucket.filled = now;
        let passes = bucket.tokens >= 1.0;
        if passes {
            bucket.tokens -= 1.0;
        }
        passes
    }
}

/// Forgets the clients whose buckets are full again, else the one that has been silent for longest.
fn make_room(buckets: &mut HashMap<Client, Bucket>, now: Instant) {
    let full_again = Duration::from_secs_f64(BURST / RATE);
    buckets.retain(|_, bucket| now.saturating_duration_since(bucket.filled) < full_again);
    if buckets.len() >= CLIENTS
        && let Some(silent) = buckets.iter().min_by_key(|(_, it)| it.filled).map(|(client, _)| *client)
    {
        buckets.remove(&silent);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(peer: &str) -> Client {
        Client::of(SocketAddr::new(peer.parse().unwrap(), 1024), "10.0.0.1:1936".parse().unwrap())
    }

    #[test]
    fn a_client_is_an_address_or_an_ipv6_network() {
        assert_ne!(client("10.0.0.8"), client("10.0.0.9"));
        assert_eq!(client("::ffff:10.0.0.8"), client("10.0.0.8"));
        assert_eq!(client("2001:db8::1"), client("2001:db8::2"));
        assert_ne!(client("2001:db8:0:1::1"), client("2001:db8::1"));
        assert_ne!(client("127.0.0.1"), client("127.0.0.2"));
        assert!(client("10.0.0.1").local && client("::1").local && !client("10.0.0.2").local);
    }

    #[test]
    fn the_client_that_has_most_makes_room() {
        let places = Arc::new(Places::default());
        let mut held = Vec::new();
        for number in 0..PLACES {
            // Four of one client, one of every other.
            let address = format!("10.0.1.{}", number.saturating_sub(3));
            held.push(places.enter(client(&address)).unwrap());
        }
        held[0].0.asks();
        let mut heavy: Vec<_> = held.drain(..4).collect();
        let _new = places.enter(client("10.0.2.1")).unwrap();
        assert!(heavy[1].1.try_recv().is_err_and(|it| it == oneshot::error::TryRecvError::Closed));
        for kept in [0, 2, 3] {
            assert_eq!(heavy[kept].1.try_recv(), Err(oneshot::error::TryRecvError::Empty), "{kept}");
        }
    }

    #[test]
    fn clients_that_ask_keep_their_places_and_others_cannot_take_those_of_this_host() {
        let places = Arc::new(Places::default());
        let asking = |address: String| {
            let (place, must_end) = places.enter(client(&address)).unwrap();
            place.asks();
            (place, must_end)
        };
        let mut held: Vec<_> = (0..PLACES).map(|number| asking(format!("10.0.1.{number}"))).collect();
        assert!(places.enter(client("10.0.2.1")).is_none(), "all of them wait for an answer");
        assert!(places.enter(client("127.0.0.1")).is_some());
        assert!(places.enter(client("10.0.0.1")).is_some(), "a kubelet asks its own host's address");
        held.pop();
        assert!(places.enter(client("10.0.2.1")).is_some());
    }

    #[test]
    fn one_client_has_its_share_and_no_more() {
        let places = Arc::new(Places::default());
        let mut held: Vec<_> =
            (0..PLACES_OF_ONE).map(|_| places.enter(client("10.0.1.1")).unwrap()).collect();
        let (extra, _) = places.enter(client("10.0.1.1")).unwrap();
        assert!(held[0].1.try_recv().is_err_and(|it| it == oneshot::error::TryRecvError::Closed));
        held[1..].iter().for_each(|(place, _)| place.asks());
        extra.asks();
        assert!(places.enter(client("10.0.1.1")).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_slowed_down_and_no_other_client_with_it() {
        let rates = Rates::default();
        let (flood, other) = (client("10.0.1.1"), client("10.0.1.2"));
        assert_eq!((0..1000).filter(|_| rates.take(flood)).count(), 100);
        assert!(rates.take(other));
        tokio::time::advance(Duration::from_millis(100)).await;
        assert_eq!((0..100).filter(|_| rates.take(flood)).count(), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn clients_without_number_cost_no_memory() {
        let rates = Rates::default();
        for number in 0..10_000_u32 {
            assert!(rates.take(client(&std::net::Ipv4Addr::from(0x0a01_0000 + number).to_string())));
        }
        assert_eq!(rates.0.lock().unwrap().len(), CLIENTS);
    }
}
