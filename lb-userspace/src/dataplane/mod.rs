//! The kernel side, as the controller sees it: the only module that knows aya and the maps.
//!
//! Nothing here decides anything. The controller says which listeners, backends and selections there are; this module
//! writes them so that a packet never sees a half-written state: values that belong together are written before the
//! one word that makes them count, and what was taken out is not reused before a grace period is over.

mod attach;
mod budgets;
mod change;
mod clock;
mod convert;
mod emptied;
mod error;
mod flight_recorder;
mod flows;
mod grace;
mod hook;
mod inject;
mod known;
mod learned;
mod link;
mod list;
mod mapped;
mod pins;
mod previous_layout;
mod probe;
mod recorded;
mod reset;
mod signals;
mod snat;
mod sockets;
mod tables;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
    os::fd::AsFd as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{LpmTrie, Map, MapData, PerCpuArray},
    programs::{TestRun as _, TestRunOptions, Xdp, links::FdLink},
};
use lb_common::{
    cell::Cell64,
    hash,
    layout::{
        self, AllowKey, BACKENDS, INTERFACES, LISTENERS, MEMBERS, Member, NextHop, PARTNERS, SELECTION_WORDS,
        SERVICES, SETS_PER_ADDRESS, SNAT_ADDRESSES, WAYS, backend_flag, family,
    },
    maglev::{self, TABLE_SIZE},
    outcome::{COUNTERS, Counter},
    rewrite::endpoint_sum,
};

pub use attach::{Attached, Mode, Target};
pub use budgets::{HeavySource, SourceShares, Usage};
use clock::Reading;
pub use clock::Ticks;
use convert::Conversion;
pub use error::DataplaneError;
pub use flight_recorder::{Account, Clock, Entry, FlightRecorder, Rings, What};
use flows::IdleUnits;
pub use flows::{IdlePolicy, Reaped};
use grace::Grace;
pub use grace::wait as wait_grace_period;
pub use hook::sets_error;
pub use inject::inject;
pub use known::{Known, KnownBackend, KnownListener, Previous, usable_ports};
use learned::Ageing;
pub use learned::{LEARNED_HOPS_MAX, Unremembered};
pub use list::{Cursor, FlowState, ListedFlow};
pub use mapped::Mapped;
use pins::Definition;
pub use pins::{Pins, PinsError, Removed};
pub use probe::{Probed, probe};
pub use recorded::{Recorded, RecordedError};
pub use reset::{Flow, FlowFilter, Hop, Walk};
pub use signals::Signal;
pub use snat::SnatError;
pub use sockets::{FollowedSocket, SocketTable};
pub use tables::Tables;

use crate::config;

/// The kernel programs, as the build script compiled them. Empty if it was told to leave them out.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sheave-ebpf"));

/// The same programs inside the benchmark's wrapper.
#[cfg(feature = "bench-object")]
pub static BENCH_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sheave-ebpf-bench"));

/// The map of what is looked at for every packet: see [`layout::Control`].
const CONTROL: &str = "CONTROL";

/// Reads what the program logs about packets, and hands it to the logger of this process.
pub type PacketLog = aya_log::EbpfLogger<&'static dyn log::Log>;

/// What must be known before the maps exist. Only the SNAT addresses change afterwards.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Source addresses towards the backends, of both families, at most [`SNAT_ADDRESSES`] of each.
    pub snat_addresses: Vec<IpAddr>,
    /// Places for SNAT addresses, of each family that has any: as many as there are at least.
    pub snat_room: usize,
    /// Source ports towards the backends.
    pub snat_ports: RangeInclusive<u16>,
    /// What flows are hashed with: shared by the load balancers of a VIP, else random.
    pub secret: [u64; 2],
    /// Log one packet in this many, rounded to a power of two. None: the program has no logging in it.
    pub log_one_in: Option<u32>,
    /// See [`sets_error`].
    pub sets_error: bool,
}

/// An interface or a VLAN on one, as the data path is told about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// The interface that packets are received on: below every VLAN.
    pub interface: u32,
    /// EtherType and VLAN id of each tag, outermost first, at most two.
    pub tags: Vec<(u16, u16)>,
    /// The interface's MAC address.
    pub mac: [u8; 6],
}

/// A listener, as the data path is told about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// What clients connect to.
    pub address: SocketAddr,
    /// The service's number, from 0.
    pub service: usize,
}

/// The data path: maps, programs, and the links that keep them attached.
pub struct Dataplane {
    ebpf: Ebpf,
    config: Mapped<layout::Config>,
    classifier: Mapped<layout::Classifier>,
    listeners: Mapped<layout::Listener>,
    services: Mapped<layout::Service>,
    backends: Mapped<layout::Backend>,
    selection: Mapped<u64>,
    tables: Tables,
    next_hops: Mapped<Cell64>,
    clock: Mapped<u64>,
    source_budgets: Mapped<layout::SourceBudgets>,
    source_shares: SourceShares,
    flight_recorder: FlightRecorder,
    unattended: Duration,
    allow: LpmTrie<MapData, AllowKey, u32>,
    counters: PerCpuArray<MapData, u64>,
    backend_flows: PerCpuArray<MapData, u64>,
    backend_sockets: PerCpuArray<MapData, u64>,
    sockets_missed: Mapped<u64>,
    /// The sockets that the connect hook has redirected. None: somebody else looks after them.
    sockets: Option<SocketTable>,
    ticks: Ticks,
    /// The clock when the maps were there.
    loaded: Reading,
    grace: Grace,
    /// Of the learned ways back to clients.
    ageing: Ageing,
    /// Idle timeouts of the flows of listeners that belong to no service any more, by listener id.
    kept_idle: BTreeMap<u16, IdlePolicy>,
    /// Idle timeouts as the last look through the flow table had them, by listener id.
    idle_units: Vec<IdleUnits>,
    attached: Vec<Attached>,
    /// What keeps the connect hook on its cgroup, by program, where pins do not do so too.
    hook_links: BTreeMap<&'static str, FdLink>,
    /// The cgroup (its inode) that the connect hook was put on, and the same links, to be asked whether they still are.
    hook_watch: (u64, BTreeMap<&'static str, link::RawLink>),
    /// Claims that the last look through the flow table found.
    claims: flows::Claims,
    /// The SNAT addresses that new flows should leave from, in the end.
    snat_wanted: Vec<IpAddr>,
    /// What keeps the program attached, by interface index, where pins do so too.
    links: BTreeMap<u32, FdLink>,
    /// The same links, by interface index, to be asked whether they still are on it.
    link_watch: BTreeMap<u32, link::RawLink>,
    /// None: everything goes with this value.
    pins: Option<Pins>,
    adopted: bool,
    /// Flows are copied from maps of the previous layout, or were until a moment ago.
    conversion: Option<Conversion>,
}

impl Dataplane {
    /// Loads the object and fills what does not depend on the network. Nothing is attached yet, and everything goes
    /// with the value.
    pub fn load(object: &[u8], settings: &Settings) -> Result<Self, DataplaneError> {
        Self::build(object, settings, None, Origin::default())
    }

    /// As [`Dataplane::load`], with maps that outlive this process: those that are pinned already, if flows in them
    /// are not lost with these settings, else new ones. Flows in maps of the previous layout are copied into new ones, see
    /// [`Dataplane::take_over`]. `key_is_given`: the hash key is not just any.
    ///
    /// # Errors
    /// [`PinsError::Different`] when what is pinned does not fit and may not be replaced.
    pub fn load_pinned(
        object: &[u8],
        settings: &Settings,
        key_is_given: bool,
        mut pins: Pins,
    ) -> Result<Self, DataplaneError> {
        if object.is_empty() {
            return Err(DataplaneError::Empty);
        }
        let mut origin = Origin::default();
        if pins.adopts() || pins.previous().is_some() {
            let previous = Previous::read(&pins);
            let conflict = previous.as_ref().and_then(|previous| previous.conflict(settings, key_is_given));
            let rooms = previous.map_or(settings.rooms(), |previous| previous.rooms());
            let conflict = conflict.or_else(|| other_rooms(rooms, settings).filter(|_| pins.replaces()));
            let fitting = match conflict {
                Some(what) => Err(pins.different(what)),
                None => Origin::find(&pins, rooms, &definitions(object, rooms)?),
            };
            match fitting {
                Ok(fitting) => origin = fitting,
                Err(error @ PinsError::Different { .. }) => pins.give_up(error)?,
                Err(error) => return Err(error.into()),
            }
            if let Some(note) = other_rooms(rooms, settings).filter(|_| origin.is_given()) {
                tracing::warn!(
                    "the flow table was made before: {note}; `sheave unload` first to change that"
                );
            }
        }
        Self::build(object, settings, Some(pins), origin)
    }

    fn build(
        object: &[u8],
        settings: &Settings,
        pins: Option<Pins>,
        origin: Origin,
    ) -> Result<Self, DataplaneError> {
        if object.is_empty() {
            return Err(DataplaneError::Empty);
        }
        let (count4, count6) = settings.addresses();
        if count4.max(count6) > SNAT_ADDRESSES {
            return Err(DataplaneError::TooMany {
                what: "SNAT addresses of one family",
                limit: SNAT_ADDRESSES,
            });
        }
        let mut ebpf = load_object(object, settings, &origin)?;
        if let Some(pins) = &pins {
            // Those that are shared with an earlier layout are pinned once more.
            let is_there = |name: &str| pins.adopts() && origin.maps.contains_key(name);
            let fresh = |name: &str| outlives(name) && !is_there(name);
            ebpf.maps()
                .filter(|(name, _)| fresh(name))
                .try_for_each(|(name, map)| pins.pin_map(name, map))?;
        }
        // The clock first: it is measured over the time that the verifier takes for the other.
        load_program(&mut ebpf, "read_clock")?;
        let mut dataplane = Self::over_maps(ebpf)?;
        dataplane.loaded = dataplane.read_clock()?;
        load_program(&mut dataplane.ebpf, "sheave")?;
        let is_new = pins.as_ref().is_none_or(|pins| !pins.adopts());
        dataplane.adopted = origin.is_given();
        (dataplane.pins, dataplane.conversion) = (pins, origin.conversion);
        if !dataplane.adopted {
            dataplane.configure(settings)?;
        } else if is_new {
            dataplane.convert_control()?;
        }
        Ok(dataplane)
    }

    fn over_maps(ebpf: Ebpf) -> Result<Self, DataplaneError> {
        let control: Mapped<layout::Control> = mapped(&ebpf, CONTROL)?;
        Ok(Self {
            config: control.config(),
            classifier: control.classifier(),
            listeners: control.listeners(),
            services: control.services(),
            backends: control.backends(),
            selection: mapped(&ebpf, "SELECTION")?,
            tables: Tables::of(&ebpf)?,
            next_hops: mapped(&ebpf, "NEXT_HOP")?,
            clock: mapped(&ebpf, "CLOCK")?,
            source_budgets: mapped(&ebpf, "SOURCES")?,
            source_shares: SourceShares::default(),
            flight_recorder: FlightRecorder::of(&ebpf)?,
            unattended: Duration::ZERO,
            allow: typed(&ebpf, "ALLOW")?,
            counters: typed(&ebpf, "COUNTER")?,
            backend_flows: typed(&ebpf, "BACKEND_FLOWS")?,
            backend_sockets: typed(&ebpf, "BACKEND_SOCKETS")?,
            sockets_missed: mapped(&ebpf, "SOCKETS_MISSED")?,
            sockets: Some(SocketTable::of(&ebpf)?),
            ticks: Ticks { frequency: 250 },
            loaded: Reading { jiffies: 0, before: Instant::now(), after: Instant::now() },
            grace: Grace::default(),
            ageing: Ageing::default(),
            kept_idle: BTreeMap::new(),
            idle_units: Vec::new(),
            attached: Vec::new(),
            hook_links: BTreeMap::new(),
            hook_watch: (0, BTreeMap::new()),
            claims: flows::Claims::new(),
            snat_wanted: Vec::new(),
            links: BTreeMap::new(),
            link_watch: BTreeMap::new(),
            pins: None,
            adopted: false,
            conversion: None,
            ebpf,
        })
    }

    fn configure(&mut self, settings: &Settings) -> Result<(), DataplaneError> {
        let mut config = layout::Config { key: hash::Key::new(settings.secret), ..self.new_config() };
        (config.first_set, config.sets, config.partners) = sets(&settings.snat_ports);
        self.ticks.apply(&mut config);
        self.config.write(0, config);
        self.set_snat_addresses(&settings.snat_addresses)
    }

    /// What a new table begins with, whatever the settings.
    fn new_config(&self) -> layout::Config {
        layout::Config { epoch: 1, mtu_floor: config::Dataplane::PATH_MTU_FLOOR.into(), ..self.settings() }
    }

    /// Has everything keep the number that it has in the maps of the previous layout.
    fn convert_control(&mut self) -> Result<(), DataplaneError> {
        let Some(conversion) = &self.conversion else { return Ok(()) };
        let control: Mapped<layout::Control> = mapped(&self.ebpf, CONTROL)?;
        conversion.fill_control(&control);
        self.config.write(0, conversion.config(self.new_config()));
        Ok(())
    }

    /// Finds out how fast the kernel's clock ticks: from the flow table where there was one, as its slots are dated by that;
    /// else by measuring. To be called once, before anything is attached.
    pub fn calibrate(&mut self) -> Result<(), DataplaneError> {
        let first = self.loaded;
        let mut config = self.settings();
        let known = Ticks::of_table(&config).filter(|_| self.adopted);
        self.ticks = match known {
            Some(ticks) => ticks,
            None => self.measure_ticks(&first)?,
        };
        self.unattended = self.flight_recorder.unattended(first.jiffies).unwrap_or_default();
        let now = self.jiffies()?;
        self.flight_recorder.anchor(now, self.ticks.frequency);
        self.ticks.apply(&mut config);
        self.config.write(0, config);
        Ok(())
    }

    fn measure_ticks(&mut self, first: &Reading) -> Result<Ticks, DataplaneError> {
        /// Ten ticks at 250 Hz, four at 100: mostly enough to tell the four frequencies apart.
        const ENOUGH: Duration = Duration::from_millis(40);
        /// Only a host that stands still again and again takes longer.
        const LONGEST: Duration = Duration::from_secs(10);
        /// After this long it is the first reading that fits no frequency: the host stood still meanwhile.
        const TOO_LONG: Duration = Duration::from_secs(1);
        let begun = first.after;
        let mut first = *first;
        let mut wait = ENOUGH.saturating_sub(begun.elapsed());
        loop {
            std::thread::sleep(wait);
            let second = self.read_clock()?;
            if let Some(ticks) = Ticks::between(&first, &second) {
                return Ok(ticks);
            }
            if begun.elapsed() > LONGEST {
                return Err(DataplaneError::Clock);
            }
            if second.took() < first.took() || first.after.elapsed() > TOO_LONG {
                first = second;
            }
            wait = ENOUGH;
        }
    }

    /// How long, before this one, no daemon has looked after the flow table ([`Dataplane::reap`]).
    pub fn unattended(&self) -> Duration {
        self.unattended
    }

    fn read_clock(&mut self) -> Result<Reading, DataplaneError> {
        let before = Instant::now();
        let jiffies = self.jiffies()?;
        Ok(Reading { jiffies, before, after: Instant::now() })
    }

    /// The tick counter as it is now.
    fn jiffies(&mut self) -> Result<u64, DataplaneError> {
        const NAME: &str = "read_clock";
        let error = |source| DataplaneError::Program { name: NAME, source: Box::new(source) };
        let program: &mut Xdp =
            self.ebpf.program_mut(NAME).ok_or(DataplaneError::Missing(NAME))?.try_into().map_err(error)?;
        // The shortest packet that the kernel takes.
        let packet = [0u8; 64];
        program.test_run(TestRunOptions { data_in: Some(&packet), ..Default::default() }).map_err(error)?;
        Ok(self.clock.read(0).unwrap_or_default())
    }

    fn settings(&self) -> layout::Config {
        self.config.read(0).expect("the configuration map has one entry")
    }

    /// Sets the smallest MTU that an ICMP error may ask an IPv4 sender for, in bytes: see [`lb_common::icmp`].
    pub fn set_path_mtu_floor(&mut self, bytes: u16) {
        let config = layout::Config { mtu_floor: bytes.into(), ..self.settings() };
        self.config.write(0, config);
    }

    /// Tells the program about interfaces and VLANs. Ports keep their numbers for as long as the daemon runs: new ones
    /// are to be appended.
    pub fn set_ports(&mut self, ports: &[Port]) -> Result<(), DataplaneError> {
        if ports.len() > INTERFACES {
            return Err(DataplaneError::TooMany { what: "interfaces and VLANs", limit: INTERFACES });
        }
        let mut config = self.settings();
        for (entry, port) in config.interfaces.iter_mut().zip(ports) {
            *entry = port.layout();
        }
        // A packet may meet the count before the entry: one of zeros is no packet's.
        config.interface_count = ports.len() as u32;
        self.config.write(0, config);
        Ok(())
    }

    /// Tells the program by which ports (by number) no backend answers: what comes in by them in a backend's name is dropped.
    /// Returns whether that is new.
    pub fn set_clients_only(&mut self, ports: impl IntoIterator<Item = usize>) -> bool {
        let ports = ports.into_iter().filter(|port| *port < INTERFACES);
        let clients_only = ports.fold(0, |bits, port| bits | 1 << port);
        let before = self.settings();
        if clients_only != before.clients_only {
            self.config.write(0, layout::Config { clients_only, ..before });
        }
        clients_only != before.clients_only
    }

    /// Tells the program which interfaces (by index) are members of which bonds: those before are forgotten. One that stays
    /// keeps its place, so that the program finds it all the while.
    pub fn set_members(&mut self, members: &[(u32, u32)]) -> Result<(), DataplaneError> {
        if members.len() > MEMBERS {
            return Err(DataplaneError::TooMany { what: "members of bonds", limit: MEMBERS });
        }
        let mut config = self.settings();
        let mut wanted: BTreeMap<u32, u32> = members.iter().copied().collect();
        for entry in &mut config.members {
            *entry = match wanted.remove(&entry.index) {
                Some(bond) => Member { bond, ..*entry },
                None => Member::default(),
            };
        }
        let free = config.members.iter_mut().filter(|entry| entry.index == 0);
        for (entry, (index, bond)) in free.zip(wanted) {
            *entry = Member { index, bond };
        }
        let last = config.members.iter().rposition(|entry| entry.index != 0);
        config.member_count = last.map_or(0, |last| last as u32 + 1);
        self.config.write(0, config);
        Ok(())
    }

    /// Which interfaces the program takes for members of which bonds, by their indexes.
    pub fn members(&self) -> BTreeMap<u32, u32> {
        let members = self.settings().members;
        members.iter().filter(|it| it.index != 0).map(|it| (it.index, it.bond)).collect()
    }

    /// Tells the program about the listeners, each open on all `ports`. To be called once.
    pub fn set_listeners(&mut self, listeners: &[Listener], ports: usize) -> Result<(), DataplaneError> {
        if listeners.len() >= LISTENERS as usize {
            return Err(DataplaneError::TooMany { what: "listeners", limit: LISTENERS as usize - 1 });
        }
        for (index, listener) in listeners.iter().enumerate() {
            self.place_listener(index as u16 + 1, listener, ports);
        }
        Ok(())
    }

    /// Never uses a port as a slot from now on. A flow that has it keeps it.
    pub fn block(&mut self, port: u16) {
        self.tables.block(port);
    }

    /// Never uses these ports as slots, and uses any other again. A flow that has one keeps it.
    pub fn set_blocked(&mut self, ports: &BTreeSet<u16>) {
        self.tables.block_only(ports);
    }

    /// Says whether flows are still being copied into the tables from those of an earlier version: then packets of no flow
    /// are dropped.
    pub fn hold(&mut self, hold: bool) {
        let mut config = self.settings();
        config.hold = hold.into();
        self.config.write(0, config);
    }

    /// The flow tables.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// Gives a backend the id `id`, which must be new: from 1, and never used for another address.
    pub fn add_backend(&mut self, id: u8, address: SocketAddr, local: bool) {
        let ip = words(address.ip());
        let port = address.port().to_be();
        let entry = layout::Backend {
            address: ip,
            port,
            family: family_of(address.ip()),
            flags: lb_common::cell::Cell32::default(),
            sum: endpoint_sum(ip, port),
            ..Default::default()
        };
        entry.flags.store(if local { backend_flag::LOCAL } else { 0 });
        self.backends.place(usize::from(id), entry);
        let mut config = self.settings();
        config.last_backend = config.last_backend.max(u32::from(id));
        self.config.write(0, config);
    }

    /// Says whether a retransmitted SYN may stay with a backend.
    pub fn set_accepts(&self, id: u8, accepts: bool) {
        if let Some(backend) = self.backends.get(usize::from(id)) {
            let flags = backend.flags.load() & !backend_flag::ACCEPTS;
            backend.flags.store(flags | if accepts { backend_flag::ACCEPTS } else { 0 });
        }
    }

    /// Says where a backend's packets go: the neighbour's MAC address and the number of the port it is behind.
    pub fn set_next_hop(&self, id: u8, hop: Option<([u8; 6], usize)>) {
        if let Some(backend) = self.backends.get(usize::from(id)) {
            backend.next_hop.store(next_hop(hop).0);
        }
    }

    /// Of every backend that has an id, the removed ones too whose flows live on: whether it is of IPv6, and the port that it is
    /// reached by, where that is known.
    pub fn backend_ports(&self) -> Vec<(bool, Option<usize>)> {
        let backends = (0..self.backends.len()).filter_map(|id| self.backends.get(id));
        let with_address = backends.filter(|backend| backend.family != 0);
        let port = |hop: NextHop| (hop != NextHop::UNKNOWN).then(|| usize::from(hop.interface()));
        with_address
            .map(|it| (it.family == layout::family::IPV6, port(NextHop(it.next_hop.load()))))
            .collect()
    }

    /// Makes a selection table of `members` (backend id, name, weight) the one that new flows of a service and family
    /// find their backend in; with no member of weight above 0, new flows are refused.
    ///
    /// The idle half is written, then one word is flipped. Before a half is written again, every program that may
    /// still read it has ended.
    pub fn select(
        &mut self,
        service: usize,
        ipv6: bool,
        members: &[(u8, &str, u16)],
    ) -> Result<(), DataplaneError> {
        let id = usize::from(service_id(service));
        let mut entry = self.services.read(id).unwrap_or_default();
        let current = if ipv6 { &mut entry.selection6 } else { &mut entry.selection4 };
        match selection_table(members) {
            None => *current = 0,
            Some(table) => {
                self.grace
                    .finish()
                    .map_err(|source| DataplaneError::System { call: "membarrier", source })?;
                let first = (id as u32 * 2 + u32::from(ipv6)) * 2;
                let half = if *current == first + 1 { first + 1 } else { first };
                self.write_half(half, &table);
                *current = half + 1;
            }
        }
        self.services.write(id, entry);
        self.grace.begin();
        Ok(())
    }

    fn write_half(&self, half: u32, table: &[u8]) {
        let start = (half * SELECTION_WORDS) as usize;
        for (index, entries) in table.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..entries.len()].copy_from_slice(entries);
            self.selection.write(start + index, u64::from_le_bytes(word));
        }
    }

    /// Counters of a service, or with None those that no service is known for.
    pub fn counters(&self, service: Option<usize>) -> Result<Vec<(Counter, u64)>, DataplaneError> {
        let base = u32::from(service.map_or(0, service_id)) * COUNTERS as u32;
        Counter::all()
            .map(|counter| Ok((counter, sum(&self.counters, "COUNTER", base + counter.index() as u32)?)))
            .collect()
    }

    /// Flows that a backend was given since it has its id.
    pub fn total_flows(&self, id: u8) -> Result<u64, DataplaneError> {
        sum(&self.backend_flows, "BACKEND_FLOWS", id.into())
    }

    /// What the program logs about packets, once; None: it has no logging in it.
    pub fn take_packet_log(&mut self) -> Option<PacketLog> {
        // The only other error is a map of another type.
        aya_log::EbpfLogger::init(&mut self.ebpf).ok()
    }

    /// How fast the kernel's clock ticks.
    pub fn ticks(&self) -> Ticks {
        self.ticks
    }
}

impl Port {
    fn layout(&self) -> layout::Interface {
        let mut tags = [0; 2];
        let mut vlan = 0;
        for (place, (protocol, id)) in tags.iter_mut().zip(&self.tags) {
            let ([p0, p1], [i0, i1]) = (protocol.to_be_bytes(), id.to_be_bytes());
            *place = u32::from_ne_bytes([p0, p1, i0, i1]);
            vlan = vlan << 16 | u32::from(*id);
        }
        layout::Interface {
            index: self.interface,
            vlan,
            mac: lb_common::headers::Mac::new(self.mac).number(),
            tags,
            tag_count: self.tags.len().min(2) as u32,
            reserved: 0,
        }
    }
}

/// The maps of a daemon before this one that are gone on with.
#[derive(Default)]
struct Origin {
    /// Places for SNAT addresses, of IPv4 and of IPv6; None: as the settings say.
    rooms: Option<[usize; 2]>,
    /// The pins, by name.
    maps: BTreeMap<String, PathBuf>,
    /// Those of the previous layout that are copied.
    conversion: Option<Conversion>,
}

impl Origin {
    fn find(
        pins: &Pins,
        rooms: [usize; 2],
        definitions: &BTreeMap<String, Definition>,
    ) -> Result<Self, PinsError> {
        let maps =
            if pins.adopts() { pins.adopt(definitions)? } else { pins.share(&convert::SHARED, definitions)? };
        let conversion = pins.previous().map(Conversion::open).transpose();
        let conversion = conversion.map_err(|error| pins.different(error.to_string()))?;
        Ok(Self { rooms: Some(rooms), maps, conversion })
    }

    /// Are there any?
    fn is_given(&self) -> bool {
        !self.maps.is_empty() || self.conversion.is_some()
    }
}

/// What tests reach in for.
impl Dataplane {
    /// A map's values, for tests and benchmarks.
    pub fn map<T>(&mut self, name: &'static str) -> Result<Mapped<T>, DataplaneError> {
        mapped(&self.ebpf, name)
    }

    /// The loaded program.
    pub fn program(&mut self, name: &'static str) -> Result<&mut Xdp, DataplaneError> {
        self.ebpf
            .program_mut(name)
            .ok_or(DataplaneError::Missing(name))?
            .try_into()
            .map_err(|source| DataplaneError::Program { name, source: Box::new(source) })
    }
}

impl Settings {
    /// How many SNAT addresses of IPv4 and of IPv6.
    fn addresses(&self) -> (usize, usize) {
        let count4 = self.snat_addresses.iter().filter(|address| address.is_ipv4()).count();
        (count4, self.snat_addresses.len() - count4)
    }

    /// Places for SNAT addresses of IPv4 and of IPv6.
    fn rooms(&self) -> [usize; 2] {
        let (count4, count6) = self.addresses();
        [count4, count6].map(|count| if count > 0 { count.max(self.snat_room) } else { 0 })
    }
}

/// Where the places of a flow table are not those that it would be made with, in words.
fn other_rooms(rooms: [usize; 2], settings: &Settings) -> Option<String> {
    let wanted = settings.rooms();
    // A family that is not used now may be used again.
    let differs = rooms.iter().zip(wanted).any(|(room, wanted)| wanted != 0 && *room != wanted);
    let names = |[v4, v6]: [usize; 2]| format!("{v4} SNAT addresses of IPv4 and {v6} of IPv6");
    let differ = || format!("it has places for {}, and now it would be {}", names(rooms), names(wanted));
    differs.then(differ)
}

/// A configuration of zeros.
fn empty_config() -> layout::Config {
    // SAFETY: integers and arrays of them.
    unsafe { std::mem::zeroed() }
}

/// How large the maps are that grow with the number of places for SNAT addresses, of IPv4 and of IPv6.
fn map_sizes([room4, room6]: [usize; 2]) -> [(&'static str, u32); 5] {
    // A map of a family without addresses is never looked at, and cannot be empty.
    let sets = |room: usize, share: u32| (SETS_PER_ADDRESS * room as u32 / share).max(1);
    [
        ("FLOW4", sets(room4, 1)),
        ("NUMBERS4", sets(room4, 1)),
        ("FLOW6", sets(room6, 1)),
        ("RETURN_HOP6", sets(room6, 1)),
        ("OVERFLOW6", sets(room6, 8)),
    ]
}

/// Whether a map is pinned: not constants of the program, and not its log.
fn outlives(map: &str) -> bool {
    !map.starts_with('.') && map != "AYA_LOGS"
}

/// The maps that this build pins, as it makes them.
fn definitions(object: &[u8], rooms: [usize; 2]) -> Result<BTreeMap<String, Definition>, DataplaneError> {
    let object = aya_obj::Object::parse(object)
        .map_err(|error| DataplaneError::Load(Box::new(aya::EbpfError::ParseError(error))))?;
    let mut sizes = BTreeMap::from(map_sizes(rooms));
    sizes.extend([flight_recorder::Size::of_host()?.map_size()]);
    let definition = |(name, map): (&String, &aya_obj::Map)| {
        let definition = Definition {
            kind: map.map_type(),
            key_size: map.key_size(),
            value_size: map.value_size(),
            entries: sizes.get(name.as_str()).copied().unwrap_or(map.max_entries()),
            flags: map.map_flags(),
        };
        (name.clone(), definition)
    };
    Ok(object.maps.iter().filter(|(name, _)| outlives(name)).map(definition).collect())
}

fn load_object(object: &[u8], settings: &Settings, origin: &Origin) -> Result<Ebpf, DataplaneError> {
    let log_one_in = settings.log_one_in;
    let mut loader = EbpfLoader::new();
    // Those that are adopted stay as they are.
    for (name, entries) in map_sizes(origin.rooms.unwrap_or_else(|| settings.rooms())) {
        loader.map_max_entries(name, entries);
    }
    // Their definitions have been compared: aya takes whatever is there.
    for (name, path) in &origin.maps {
        loader.map_pin_path(name, path.as_path());
    }
    // Constants of the program: with these two the verifier takes the log out of it.
    let level = if log_one_in.is_some() { aya_log::Level::Info as u8 } else { 0 };
    let mask = log_one_in.map_or(u32::MAX, |one_in| (one_in.next_power_of_two() - 1).min(u32::MAX - 1));
    loader.override_global("LOG_MASK", &mask, true);
    loader.override_global("AYA_LOG_LEVEL", &level, false);
    // The benchmark's object has no connect hook.
    let sets_error = u32::from(settings.sets_error);
    loader.override_global("SET_ERROR", &sets_error, false);
    let flight_recorder = flight_recorder::Size::of_host()?;
    flight_recorder.apply(&mut loader);
    loader.load(object).map_err(|error| DataplaneError::Load(Box::new(error)))
}

fn load_program(ebpf: &mut Ebpf, name: &'static str) -> Result<(), DataplaneError> {
    let error = |source| DataplaneError::Program { name, source: Box::new(source) };
    let program: &mut Xdp =
        ebpf.program_mut(name).ok_or(DataplaneError::Missing(name))?.try_into().map_err(error)?;
    program.load().map_err(|source| DataplaneError::not_loaded(name, source))
}

fn mapped<T>(ebpf: &Ebpf, name: &'static str) -> Result<Mapped<T>, DataplaneError> {
    Mapped::new(name, ebpf.map(name).ok_or(DataplaneError::Missing(name))?)
}

fn typed<T: TryFrom<Map, Error = aya::maps::MapError>>(
    ebpf: &Ebpf,
    name: &'static str,
) -> Result<T, DataplaneError> {
    let Some(Map::HashMap(data) | Map::LpmTrie(data) | Map::PerCpuArray(data)) = ebpf.map(name) else {
        return Err(DataplaneError::Missing(name));
    };
    // Another hold on the map: the object keeps its own, to be asked for the map again.
    let system = |source| DataplaneError::System { call: "fcntl", source };
    let fd = data.fd().as_fd().try_clone_to_owned().map_err(system)?;
    let map = MapData::from_fd(fd).and_then(Map::from_map_data);
    map.and_then(T::try_from).map_err(|source| DataplaneError::Map { name, source })
}

fn sum(map: &PerCpuArray<MapData, u64>, name: &'static str, index: u32) -> Result<u64, DataplaneError> {
    let values = map.get(&index, 0).map_err(|source| DataplaneError::Map { name, source })?;
    Ok(values.iter().fold(0, |sum, value| sum.wrapping_add(*value)))
}

/// Backend ids by entry, or None when nobody has weight.
fn selection_table(members: &[(u8, &str, u16)]) -> Option<Vec<u8>> {
    // Every load balancer must build the same table.
    let mut sorted = members.to_vec();
    sorted.sort_unstable_by_key(|(_, name, _)| *name);
    let mut turns: Vec<_> = sorted
        .iter()
        .map(|(_, name, weight)| maglev::Member::new(name, u32::from(*weight), TABLE_SIZE))
        .collect();
    let mut table = vec![0u16; TABLE_SIZE as usize];
    maglev::fill(&mut turns, &mut table)
        .then(|| table.into_iter().map(|index| sorted[usize::from(index)].0).collect())
}

/// The first set, how many there are, and the partners of each: whole groups of partners only, of the usual size unless
/// the range has no room for one.
fn sets(ports: &RangeInclusive<u16>) -> (u32, u32, u32) {
    let mut group = PARTNERS + 1;
    loop {
        let ports_of_group = group * WAYS as u32;
        let first = u32::from(*ports.start()).div_ceil(ports_of_group);
        let end = (u32::from(*ports.end()) + 1) / ports_of_group;
        if end > first || group == 1 {
            return (first * group, end.saturating_sub(first) * group, group - 1);
        }
        group /= 2;
    }
}

/// An address as the maps have it: network bytes as native words, IPv4 in the lower half of the first.
pub fn words(address: IpAddr) -> [u64; 2] {
    match address {
        IpAddr::V4(address) => [u32::from_ne_bytes(address.octets()).into(), 0],
        IpAddr::V6(address) => {
            let number = u128::from_ne_bytes(address.octets());
            if cfg!(target_endian = "little") {
                [number as u64, (number >> 64) as u64]
            } else {
                [(number >> 64) as u64, number as u64]
            }
        }
    }
}

/// The address that [`words`] made words of.
pub(crate) fn address_of(family: u8, words: [u64; 2]) -> IpAddr {
    if family == family::IPV4 {
        return Ipv4Addr::from((words[0] as u32).to_ne_bytes()).into();
    }
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&words[0].to_ne_bytes());
    bytes[8..].copy_from_slice(&words[1].to_ne_bytes());
    Ipv6Addr::from(bytes).into()
}

fn family_of(address: IpAddr) -> u8 {
    if address.is_ipv4() { family::IPV4 } else { family::IPV6 }
}

/// A service's id: 0 stands for none.
fn service_id(service: usize) -> u16 {
    debug_assert!(service + 1 < SERVICES as usize, "the configuration allows fewer");
    service as u16 + 1
}

fn next_hop(hop: Option<([u8; 6], usize)>) -> NextHop {
    hop.map_or(NextHop::UNKNOWN, |(mac, port)| {
        NextHop::new(lb_common::headers::Mac::new(mac).number(), port as u16)
    })
}

const _: () = assert!(BACKENDS as usize == u8::MAX as usize + 1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_survives_being_words() {
        for text in ["10.1.2.3", "255.254.253.252", "2001:db8:1:2:3:4:5:6"] {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(address_of(family_of(address), words(address)), address);
        }
    }

    #[test]
    fn a_selection_is_the_same_in_whatever_order_the_backends_come() {
        let members = [(1, "a", 1), (2, "b", 1), (3, "c", 2)];
        let reversed: Vec<_> = members.iter().rev().copied().collect();
        assert_eq!(selection_table(&members), selection_table(&reversed));
        assert_eq!(selection_table(&[(1, "a", 0)]), None);
        assert_eq!(selection_table(&[]), None);
    }

    #[test]
    fn an_address_is_its_network_bytes() {
        let address: IpAddr = "2001:db8::102".parse().unwrap();
        let bytes: Vec<u8> = words(address).iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(bytes[..4], [0x20, 0x01, 0x0d, 0xb8]);
        assert_eq!(bytes[14..], [1, 2]);
        assert_eq!(words("1.2.3.4".parse().unwrap())[0] as u32, u32::from_ne_bytes([1, 2, 3, 4]));
    }
}
