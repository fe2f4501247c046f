//! The maps as plain memory: what the tests of this crate run the steps over.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    arrival::Arrival,
    backend_event,
    bytes::Bytes,
    cell::{Cell8, Cell16, Cell32, Cell64},
    class::Class,
    client_answer::ClientAnswer,
    client_event, destination,
    disposition::Disposition,
    flight_recorder::Note,
    flow::{self, Choice, Claim, Claimer, Family, Found, Query, Slot, V4, V6},
    forward,
    hash::{FlowHash, Key},
    headers::Be16,
    host_socket, icmp,
    layout::{
        BUCKETS, Backend, Bucket, Config, INTERFACES, Interface, LISTENERS, Listener, MEMBERS, Member,
        NextHop, Numbers, Numbers4, PARTNERS, ReturnHops, SERVICES, SETS_PER_ADDRESS, SNAT_ADDRESSES,
        Service, Set4, Set6, SourceBudgets, backend_flag, family,
    },
    maglev::TABLE_SIZE,
    maps::{LoopBody, Maps},
    next_hop,
    outcome::{COUNTERS, Counter},
    parse, pipeline, refuse, reply,
    rewrite::{self, endpoint_sum},
    segment::Segment,
    source_budget::{self, SourceCount},
    subprograms::Subprograms,
    tables::FlowTables,
};

/// Jiffies in a unit of [`Memory::advance`], for a kernel of 1024 Hz.
const JIFFIES: u64 = 1 << 10;

/// An address as words, IPv4 in the lower half of the first.
pub(crate) fn words(address: IpAddr) -> [u64; 2] {
    match address {
        IpAddr::V4(address) => [u64::from(u32::from_ne_bytes(address.octets())), 0],
        IpAddr::V6(address) => {
            let word = |half: u128| u64::from_ne_bytes((half as u64).to_be_bytes());
            [word(address.to_bits() >> 64), word(address.to_bits())]
        }
    }
}

/// A port as a word.
pub(crate) fn port_word(port: u16) -> u16 {
    Be16::new(port).word()
}

fn family_of(address: IpAddr) -> u8 {
    if address.is_ipv4() { family::IPV4 } else { family::IPV6 }
}

/// The maps. The tables have as many sets as asked for; everything else grows as it is filled.
pub(crate) struct Memory {
    pub(crate) config: Config,
    pub(crate) listeners: Vec<Listener>,
    pub(crate) services: Vec<Service>,
    pub(crate) backends: Vec<Backend>,
    /// Ways that must not become slots: see [`Family::blocked`].
    pub(crate) blocked: Vec<u8>,
    pub(crate) allowed: BTreeSet<(u16, [u64; 2])>,
    pub(crate) learned_hops: Vec<Cell64>,
    /// Clients (address, port word) of connections that sockets of this host have.
    pub(crate) host_sockets: BTreeSet<([u64; 2], u16)>,
    first_listeners: BTreeMap<u16, u16>,
    snat_places: BTreeSet<(u8, usize)>,
    selection: Vec<Vec<u8>>,
    sets4: Vec<Set4>,
    sets6: Vec<Set6>,
    numbers4: Vec<Numbers4>,
    return_hops6: Vec<ReturnHops>,
    overflow6: Vec<Cell8>,
    /// None: sources have no budgets. A model of so many cells would be slow.
    source_budgets: Option<Box<SourceBudgets>>,
    // The standard library's, also under loom: nothing that is decided depends on these.
    jiffies: AtomicU64,
    counters: Vec<AtomicU64>,
    notes: Mutex<Vec<Note>>,
}

fn zeroed<T: Default>(count: u32) -> Vec<T> {
    (0..count).map(|_| T::default()).collect()
}

impl Memory {
    /// Empty maps: one SNAT address of each family, to be set, whose sets from `first_set` on are used.
    pub(crate) fn new(first_set: u32, sets: u32, hops: u32) -> Self {
        let config = Config {
            key: Key::new([0x0123_4567_89ab_cdef, 0x0f1e_2d3c_4b5a_6978]),
            first_set,
            sets,
            snat4_count: 1,
            snat6_count: 1,
            interface_count: 0,
            jiffies_shift: JIFFIES.trailing_zeros(),
            half_open_jiffies: (JIFFIES / 5) as u32,
            epoch: 1,
            partners: (1 << (sets | (PARTNERS + 1)).trailing_zeros()) - 1,
            last_backend: 0,
            mtu_floor: 552,
            hold: 0,
            member_count: 0,
            clients_only: 0,
            zero: 0,
            interfaces: [Interface::default(); INTERFACES],
            members: [Member::default(); MEMBERS],
            snat4: [0; SNAT_ADDRESSES],
            snat6: [[0; 2]; SNAT_ADDRESSES],
            bucket4: [Bucket::default(); BUCKETS],
            bucket6: [Bucket::default(); BUCKETS],
        };
        let all = first_set + sets;
        Self {
            config,
            listeners: vec![Listener::default()],
            services: vec![Service::default()],
            backends: vec![Backend::default()],
            blocked: zeroed(all),
            allowed: BTreeSet::new(),
            learned_hops: zeroed(hops),
            host_sockets: BTreeSet::new(),
            first_listeners: BTreeMap::new(),
            snat_places: BTreeSet::new(),
            selection: Vec::new(),
            sets4: zeroed(all),
            sets6: zeroed(all),
            numbers4: zeroed(all),
            return_hops6: zeroed(all),
            overflow6: zeroed(all),
            source_budgets: None,
            jiffies: AtomicU64::new(1000 * JIFFIES),
            counters: zeroed(SERVICES * COUNTERS as u32),
            notes: Mutex::default(),
        }
    }

    /// Has these ways of a set, by bit, never become slots. Sets that are not there are left out.
    pub(crate) fn block(&mut self, set: usize, ways: u8) {
        let sets = self.blocked.len();
        if let Some(blocked) = self.blocked.get_mut(set) {
            *blocked |= ways;
            self.sets4.iter().skip(set).step_by(sets).for_each(|set| set.blocked.store(*blocked));
        }
    }

    /// Takes another SNAT address of each family into use.
    pub(crate) fn add_snat_address(&mut self) {
        let all = self.sets4.len() + self.blocked.len();
        self.sets4.resize_with(all, Set4::default);
        self.sets6.resize_with(all, Set6::default);
        self.numbers4.resize_with(all, Numbers4::default);
        self.return_hops6.resize_with(all, ReturnHops::default);
        self.overflow6.resize_with(all, Cell8::default);
        self.config.snat4_count += 1;
        self.config.snat6_count += 1;
    }

    /// Where a set is: here an address has no more of them than are used.
    fn place(&self, set: u32) -> usize {
        (set / SETS_PER_ADDRESS) as usize * self.blocked.len() + (set % SETS_PER_ADDRESS) as usize
    }

    /// Gives every source this budget, of either family. What they have used by now is kept.
    pub(crate) fn limit_sources(&mut self, limit: SourceCount) {
        let budgets = self.source_budgets.get_or_insert_with(|| {
            let row = || std::array::from_fn(|_| Cell64::default());
            Box::new(SourceBudgets {
                counted_at: Cell64::default(),
                limits: Default::default(),
                reserved: Cell64::default(),
                cells: [row(), row()],
            })
        });
        budgets.limits.iter().for_each(|it| it.store(limit.word()));
        budgets.counted_at.store(self.jiffies.load(Ordering::Relaxed));
    }

    /// What sources use, as the daemon finds it; the others use nothing.
    pub(crate) fn recount_sources(&self, found: &[(u64, SourceCount)]) {
        let budgets = self.source_budgets.as_ref().expect("sources have budgets");
        budgets.counted_at.store(self.jiffies.load(Ordering::Relaxed));
        budgets.cells.iter().flatten().for_each(|cell| cell.store(0));
        for (source, count) in found {
            for (row, cell) in source_budget::cells_of(&self.config, *source).into_iter().enumerate() {
                budgets.cells[row][cell].add(count.word());
            }
        }
    }

    /// Takes an interface into use. Returns its number.
    pub(crate) fn add_interface(&mut self, interface: Interface) -> u16 {
        let index = self.config.interface_count;
        self.config.interfaces[index as usize] = interface;
        self.config.interface_count += 1;
        index as u16
    }

    /// Makes `address` the SNAT address of its family.
    pub(crate) fn set_snat(&mut self, address: IpAddr) {
        match address {
            IpAddr::V4(_) => {
                self.config.snat4[0] = words(address)[0] as u32;
                self.snat_places.insert((V4::NUMBER, V4::snat_place(words(address))));
            }
            IpAddr::V6(_) => {
                self.config.snat6[0] = words(address);
                self.snat_places.insert((V6::NUMBER, V6::snat_place(words(address))));
            }
        }
    }

    /// Adds a service without a usable backend. Returns its id.
    pub(crate) fn add_service(&mut self) -> u16 {
        self.services.push(Service::default());
        (self.services.len() - 1) as u16
    }

    /// Adds a listener for the packets of `interfaces` (by bit), and keeps its port from being a slot. Returns its id.
    pub(crate) fn add_listener(&mut self, at: SocketAddr, service: u16, interfaces: u32) -> u16 {
        let id = self.listeners.len() as u16;
        assert!(u32::from(id) < LISTENERS);
        let (address, port) = (words(at.ip()), port_word(at.port()));
        self.listeners.push(Listener {
            address,
            port,
            family: family_of(at.ip()),
            reserved: 0,
            service,
            next: self.first_listeners.insert(at.port(), id).unwrap_or(0),
            interfaces,
            sum: endpoint_sum(address, port),
        });
        self.block(usize::from(at.port() / 4), 1 << (at.port() % 4));
        id
    }

    /// Adds a backend that takes new flows. Returns its id.
    pub(crate) fn add_backend(&mut self, at: SocketAddr, hop: NextHop) -> u8 {
        let id = self.backends.len() as u8;
        let (address, port) = (words(at.ip()), port_word(at.port()));
        let backend = Backend {
            address,
            port,
            family: family_of(at.ip()),
            reserved: 0,
            flags: Cell32::default(),
            sum: endpoint_sum(address, port),
            heard: Cell32::default(),
            next_hop: Cell64::default(),
            asked: Cell32::default(),
            refused: Cell32::default(),
        };
        backend.flags.store(backend_flag::ACCEPTS);
        backend.next_hop.store(hop.0);
        self.backends.push(backend);
        self.config.last_backend = id.into();
        id
    }

    /// Lets new flows of a service go to these backends of one family, evenly; to none where there are none.
    pub(crate) fn select(&mut self, service: u16, family: u8, backends: &[u8]) {
        let half = if backends.is_empty() {
            0
        } else {
            self.selection.push(backends.iter().copied().cycle().take(TABLE_SIZE as usize).collect());
            self.selection.len() as u32
        };
        let service = &mut self.services[usize::from(service)];
        if family == family::IPV4 {
            service.selection4 = half;
        } else {
            service.selection6 = half;
        }
    }

    /// Lets units of about a second go by.
    pub(crate) fn advance(&self, units: u64) {
        self.jiffies.fetch_add(units * JIFFIES, Ordering::Relaxed);
    }

    /// The time in units, as slots have it.
    pub(crate) fn now(&self) -> u16 {
        (self.jiffies.load(Ordering::Relaxed) / JIFFIES) as u16
    }

    /// Lets less than a unit go by: 1024 jiffies are one.
    pub(crate) fn advance_jiffies(&self, jiffies: u64) {
        self.jiffies.fetch_add(jiffies, Ordering::Relaxed);
    }

    /// Takes the records out of the flight recorder.
    pub(crate) fn take_notes(&self) -> Vec<Note> {
        std::mem::take(&mut self.notes.lock().unwrap())
    }

    /// What was counted for a service.
    pub(crate) fn count(&self, service: u16, counter: Counter) -> u64 {
        self.counters[usize::from(service) * COUNTERS + counter.index()].load(Ordering::Relaxed)
    }
}

impl Maps for &Memory {
    fn config(&self) -> Option<&Config> {
        Some(&self.config)
    }

    fn first_listener(&self, port: u16) -> u16 {
        self.first_listeners.get(&port).copied().unwrap_or(0)
    }

    fn snat_at<F: Family>(&self, address: [u64; 2]) -> u8 {
        // The only one of its family.
        self.snat_places.contains(&(F::NUMBER, F::snat_place(address))).into()
    }

    fn listener(&self, id: u16) -> Option<&Listener> {
        self.listeners.get(usize::from(id))
    }

    fn service(&self, id: u16) -> Option<&Service> {
        self.services.get(usize::from(id))
    }

    fn backend(&self, id: u8) -> Option<&Backend> {
        self.backends.get(usize::from(id))
    }

    fn selected(&self, half: u32, entry: u32) -> u8 {
        self.selection.get(half as usize).and_then(|table| table.get(entry as usize)).copied().unwrap_or(0)
    }

    fn learned_hop(&self, index: u16) -> Option<&Cell64> {
        self.learned_hops.get(usize::from(index))
    }

    fn allows(&self, service: u16, client: [u64; 2]) -> bool {
        self.allowed.contains(&(service, client))
    }

    fn source_budgets(&self) -> Option<&SourceBudgets> {
        self.source_budgets.as_deref()
    }

    fn jiffies(&self) -> u64 {
        self.jiffies.load(Ordering::Relaxed)
    }

    fn count_place(&self, service: u16, place: u16) {
        let index = usize::from(service) * COUNTERS + usize::from(place);
        if let Some(counter) = self.counters.get(index) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn count_flow(&self, _: u8) {}

    fn note(&self, note: Note) {
        self.notes.lock().unwrap().push(note);
    }

    fn barrier_var(&self, number: u32) -> u32 {
        number
    }

    fn repeat<B: LoopBody>(&self, count: u32, body: &mut B) {
        for index in 0..count {
            if body.run(index) {
                break;
            }
        }
    }
}

impl FlowTables for &Memory {
    fn set4(&self, index: u32) -> Option<&Set4> {
        self.sets4.get(self.place(index))
    }

    fn set6(&self, index: u32) -> Option<&Set6> {
        self.sets6.get(self.place(index))
    }

    fn numbers4(&self, set: u32, way: u32) -> Option<&Numbers> {
        self.numbers4.get(self.place(set))?.ways.get(way as usize)
    }

    fn return_hop6(&self, set: u32, way: u32) -> Option<&Cell16> {
        self.return_hops6.get(self.place(set))?.ways.get(way as usize)
    }

    fn blocked6(&self, set: u32) -> u8 {
        self.blocked.get((set % SETS_PER_ADDRESS) as usize).copied().unwrap_or(0x0f)
    }

    fn overflow6(&self, set: u32) -> Option<&Cell8> {
        self.overflow6.get(self.place(set))
    }
}

/// Every step is the plain function.
impl Subprograms for &Memory {
    type Frame = Bytes;

    fn find_listener(&self, family: u8, address: [u64; 2], port: u16) -> u16 {
        destination::listener(self, family, address, port)
    }

    fn snat_index<A: Family>(&self, address: [u64; 2]) -> Option<u32> {
        destination::snat_index::<A, Self>(self, address)
    }

    fn arrival(&self, interface: u32, vlan: u32, mac: u64) -> Arrival {
        destination::arrival(self, interface, vlan, mac)
    }

    fn another<A: Family>(&self, service: u16, hash: FlowHash, refused: u8) -> u8 {
        forward::another::<A, Self>(self, service, hash, refused)
    }

    fn learn(&self, hop: u64) -> u16 {
        next_hop::learn(self, hop)
    }

    fn admit_source(&self, family: u8, source: u64) -> bool {
        source_budget::admit(self, family, source)
    }

    fn is_backend(&self, family: u8, address: [u64; 2], port: u16) -> bool {
        reply::is_backend(self, family, address, port)
    }

    fn find_in<A: Family>(&self, query: &Query<A::Tuple>, candidates: u32, except: Slot) -> Found {
        flow::find_in::<A, Self>(self, query, candidates, except)
    }

    fn claim_free<A: Family>(&self, query: &Query<A::Tuple>, claimer: &Claimer) -> Claim {
        flow::claim_free::<A, Self>(self, query, claimer)
    }

    fn choose<A: Family>(&self, query: &Query<A::Tuple>, claimer: &Claimer) -> Choice {
        flow::choose::<A, Self>(self, query, claimer)
    }

    fn take<A: Family>(&self, query: &Query<A::Tuple>, claimer: &Claimer, found: Found) -> Claim {
        flow::take::<A, Self>(self, query, claimer, found)
    }

    fn client_event<A: Family>(
        &self,
        query: &Query<A::Tuple>,
        found: Found,
        segment: &Segment,
        service: u16,
    ) -> ClientAnswer {
        client_event::client_event::<A, Self>(self, query, found, segment, service)
    }

    fn backend_event<A: Family>(&self, found: Found, segment: &Segment, service: u16) -> u64 {
        backend_event::backend_event::<A, Self>(self, found, segment, service)
    }

    fn tags(frame: &mut Bytes) -> u64 {
        parse::tags(frame)
    }

    fn upper_layer(frame: &mut Bytes, transport: usize, next: u8) -> u64 {
        parse::upper_layer(frame, transport, next)
    }

    fn option_sum(frame: &mut Bytes, offset: usize, end: usize) -> u64 {
        parse::option_sum(frame, offset, end)
    }

    fn retag(frame: &mut Bytes, config: &Config, network: usize, kind: u16, interface: u16) -> bool {
        rewrite::retag(frame, config, network, kind, interface)
    }

    fn has_socket<A: Family>(&self, frame: &mut Bytes) -> bool {
        let connection = host_socket::connection::<A, Self>(frame);
        connection.is_some_and(|it| self.host_sockets.contains(&(it.source, it.ports.source)))
    }

    fn routed(&self, frame: &mut Bytes, family: u8, address: [u64; 2]) -> u64 {
        next_hop::routed(frame, &self.config, family, address)
    }

    fn segments<A: Family>(&self, frame: &mut Bytes, class: Class) -> Disposition {
        pipeline::segments::<A, Self>(frame, self, class)
    }

    fn translate_icmp<A: Family>(&self, frame: &mut Bytes) -> Disposition {
        icmp::translate::<A, Self>(frame, self)
    }

    fn refuse<A: Family>(frame: &mut Bytes, refused: Disposition) -> Disposition {
        refuse::answer::<A, Self>(frame, refused)
    }
}
