//! A load balancer made of nothing but its program and maps, and one packet at a time.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
};

use aya::programs::{ProgramError, TestRun as _, TestRunOptions, Xdp};
use aya_obj::programs::XdpAttachType;
use lb_common::{
    flow::{Family, Slot, V4, V6},
    layout::{SETS_PER_ADDRESS, WAYS},
    meta::{Kind, Meta},
    outcome::{Action, COUNTERS, Counter, Event, Outcome},
    sequence::SendSequence,
};
use lb_userspace::dataplane::{FlowFilter, Listener, OBJECT, Port, Settings, Tables, Walk};

use super::{
    frame::{ACK, Frame, PSH, SYN},
    reused::Reused,
    seen::{Inside, Seen},
};

/// The number of the SYN of every client.
pub const CLIENT_START: u32 = 1000;
/// The number of the SYN-ACK of every backend.
pub const BACKEND_START: u32 = 1999;
/// The load balancer's MAC address.
pub const LB_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// The neighbour that clients' packets come from.
pub const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// The port of the first listener, and of backends.
pub const LISTENER_PORT: u16 = 6443;
/// The interface that test runs come in by: it exists everywhere.
pub const LOOPBACK: u32 = 1;

/// The MAC address that a backend is reached by.
pub fn backend_mac(id: u8) -> [u8; 6] {
    [2, 0, 0, 0, 1, id]
}

/// Both families, for tests that hold for both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ip {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Ip {
    /// Both of them.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// The virtual address; `number` counts further ones.
    pub fn vip(self, number: u8) -> IpAddr {
        self.address(0, 100 + number)
    }

    /// Where clients connect to.
    pub fn listener(self) -> SocketAddr {
        SocketAddr::new(self.vip(0), LISTENER_PORT)
    }

    /// A backend's address.
    pub fn backend(self, id: u8) -> SocketAddr {
        SocketAddr::new(self.address(1, id), LISTENER_PORT)
    }

    /// A client, each number another one.
    pub fn client(self, number: u32) -> SocketAddr {
        SocketAddr::new(self.address(64, (number >> 14) as u8 + 1), 40_000 + (number & 0x3fff) as u16)
    }

    /// A router somewhere on the way.
    pub fn router(self) -> IpAddr {
        self.address(200, 1)
    }

    /// An address in one of the networks.
    pub fn address(self, network: u8, host: u8) -> IpAddr {
        match self {
            Self::V4 => IpAddr::from([10, 0, network, host]),
            Self::V6 => IpAddr::from([0xfd00, u16::from(network), 0, 0, 0, 0x1234, 0xabcd, u16::from(host)]),
        }
    }

    /// Bytes of the IP header.
    pub fn header(self) -> usize {
        match self {
            Self::V4 => 20,
            Self::V6 => 40,
        }
    }
}

/// What a world is made of.
#[derive(Clone, Debug)]
pub struct Shape {
    /// The family of every address in it.
    pub ip: Ip,
    /// SNAT addresses.
    pub snat: Vec<IpAddr>,
    /// Ports of slots.
    pub snat_ports: RangeInclusive<u16>,
    /// Listeners and the service of each.
    pub listeners: Vec<(SocketAddr, usize)>,
    /// Interfaces and VLANs; backends are behind the last.
    pub ports: Vec<Port>,
    /// How many backends there are, all of them selected by every service.
    pub backends: u8,
}

impl Shape {
    /// One listener, three backends, the listener's address as SNAT address, one interface.
    pub fn new(ip: Ip) -> Self {
        Self {
            ip,
            snat: vec![ip.vip(0)],
            snat_ports: 1024..=65_535,
            listeners: vec![(ip.listener(), 0)],
            ports: vec![Self::port(LOOPBACK, &[])],
            backends: 3,
        }
    }

    /// What its program and maps are loaded with.
    pub fn settings(&self) -> Settings {
        Settings {
            snat_addresses: self.snat.clone(),
            snat_room: 1,
            snat_ports: self.snat_ports.clone(),
            secret: [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210],
            log_one_in: None,
            sets_error: true,
        }
    }

    /// An interface with the load balancer's MAC address.
    pub fn port(interface: u32, tags: &[(u16, u16)]) -> Port {
        Port { interface, tags: tags.to_vec(), mac: LB_MAC }
    }
}

/// A loaded program, and maps that make it a load balancer.
pub struct World {
    /// To change what the load balancer is told.
    pub dataplane: Reused,
    /// The family of every address in it.
    pub ip: Ip,
    backends: u8,
    services: usize,
    snat: Vec<IpAddr>,
    counted: Vec<u64>,
}

impl World {
    /// A world of the usual shape.
    pub fn new(ip: Ip) -> Self {
        Self::build(&Shape::new(ip))
    }

    /// A world of this shape, around the program that the daemon loads.
    pub fn build(shape: &Shape) -> Self {
        Self::around(OBJECT, shape)
    }

    /// A world of this shape, around the program in `object`.
    ///
    /// # Panics
    /// When the kernel does not take the program.
    pub fn around(object: &'static [u8], shape: &Shape) -> Self {
        let mut dataplane = Reused::load(object, &shape.settings());
        dataplane.calibrate().unwrap();
        dataplane.set_ports(&shape.ports).unwrap();
        let listeners: Vec<_> = shape
            .listeners
            .iter()
            .map(|(address, service)| Listener { address: *address, service: *service })
            .collect();
        dataplane.set_listeners(&listeners, shape.ports.len()).unwrap();
        for id in 1..=shape.backends {
            dataplane.add_backend(id, shape.ip.backend(id), false);
            dataplane.set_accepts(id, true);
            dataplane.set_next_hop(id, Some((backend_mac(id), shape.ports.len() - 1)));
        }
        let services = shape.listeners.iter().map(|(_, service)| service + 1).max().unwrap_or(0);
        let mut world = Self {
            dataplane,
            ip: shape.ip,
            backends: shape.backends,
            services,
            snat: shape.snat.clone(),
            counted: Vec::new(),
        };
        for service in 0..services {
            world.select(service, &(1..=shape.backends).collect::<Vec<_>>());
        }
        world.counted = world.counters();
        world
    }

    /// Sends new flows of a service to these backends.
    pub fn select(&mut self, service: usize, ids: &[u8]) {
        let names: Vec<_> = ids.iter().map(|id| format!("backend-{id}")).collect();
        let members: Vec<_> = ids.iter().zip(&names).map(|(id, name)| (*id, name.as_str(), 1)).collect();
        self.dataplane.select(service, self.ip == Ip::V6, &members).unwrap();
        for id in 1..=self.backends {
            self.dataplane.set_accepts(id, ids.contains(&id));
        }
    }

    /// Runs the program on a frame that came in by the loopback interface.
    ///
    /// Whatever the frame is: it is counted as one outcome, the verdict is that outcome's, and what passes is not
    /// changed by a bit.
    pub fn run(&mut self, frame: &[u8]) -> Exchange {
        self.run_behind(&[], frame)
    }

    /// Whether the kernel runs a program on frames with so many bytes of metadata in front: before 6.6 it takes 32.
    pub fn takes_metadata(&mut self, bytes: usize) -> bool {
        // A program that passes everything and counts nothing.
        let program = self.dataplane.program("read_clock").unwrap();
        try_test_run(program, &vec![0; bytes], &[0; 64]).is_ok()
    }

    /// [`World::run`] with metadata in front of the frame, which takes room that the driver would lend.
    pub fn run_behind(&mut self, metadata: &[u8], frame: &[u8]) -> Exchange {
        let (verdict, bytes) = test_run(self.dataplane.program("sheave").unwrap(), metadata, frame);
        let exchange = self.exchange(verdict, bytes);
        let (expected, given) = (exchange.outcome.action(), verdict);
        let fits = match expected {
            Action::Drop => given == XDP_DROP,
            Action::Pass => given == XDP_PASS,
            Action::Transmit => given == XDP_TX || given == XDP_REDIRECT,
        };
        assert!(fits, "{:?} has verdict {given}", exchange.outcome);
        assert!(expected != Action::Pass || exchange.bytes == frame, "{:?} and changed", exchange.outcome);
        exchange
    }

    /// Another hold on the program, for packets at the same time.
    pub fn processor(&mut self) -> Processor {
        let info = self.dataplane.program("sheave").unwrap().info().unwrap();
        Processor(Xdp::from_program_info(info, "sheave".into(), XdpAttachType::Interface).unwrap())
    }

    fn exchange(&mut self, verdict: u32, bytes: Vec<u8>) -> Exchange {
        let counters = self.counters();
        let mut outcomes = Vec::new();
        let mut events = Vec::new();
        let places =
            (0..=self.services).flat_map(|service| Counter::all().map(move |counter| (service, counter)));
        for ((service, counter), (before, after)) in places.zip(self.counted.iter().zip(&counters)) {
            for _ in *before..*after {
                match counter {
                    Counter::Outcome(outcome) => outcomes.push((outcome, service.checked_sub(1))),
                    Counter::Event(event) => events.push(event),
                }
            }
        }
        self.counted = counters;
        let (outcome, service) = match outcomes[..] {
            // The one outcome that is not counted.
            [] => (Outcome::NotOurs, None),
            [counted] => counted,
            _ => panic!("one packet was counted as {outcomes:?}"),
        };
        assert!(outcome != Outcome::NotOurs || events.is_empty() && outcomes.is_empty());
        Exchange { redirected: verdict == XDP_REDIRECT, outcome, service, events, bytes }
    }

    /// Of no service, then of each.
    fn counters(&self) -> Vec<u64> {
        std::iter::once(None)
            .chain((0..self.services).map(Some))
            .flat_map(|service| self.dataplane.counters(service).unwrap())
            .map(|(_, count)| count)
            .collect()
    }

    /// Opens a flow with a SYN.
    ///
    /// # Panics
    /// When the SYN is not forwarded.
    pub fn open(&mut self, client: SocketAddr, listener: SocketAddr) -> Flow {
        let exchange = self.run(&Frame::syn(client, listener).bytes());
        assert_eq!(exchange.outcome, Outcome::Forwarded);
        self.flow(client, listener, &exchange)
    }

    /// The flow of a packet that was forwarded.
    pub fn flow(&self, client: SocketAddr, listener: SocketAddr, forwarded: &Exchange) -> Flow {
        let seen = forwarded.seen();
        assert!(self.snat.contains(&seen.source.ip()), "{} is no SNAT address", seen.source);
        let backend = (1..=self.backends)
            .find(|id| self.ip.backend(*id) == seen.destination)
            .unwrap_or_else(|| panic!("{} is no backend", seen.destination));
        Flow { client, listener, snat: seen.source, backend }
    }

    /// Proves a flow that was opened: SYN-ACK, ACK; a request, and that it was received.
    pub fn prove(&mut self, flow: &Flow) {
        let handshake = [
            (flow.syn_ack(), Outcome::Replied),
            (flow.from_client(), Outcome::Forwarded),
            (
                Frame { flags: PSH | ACK, payload: b"GET /".to_vec(), ..flow.from_client() },
                Outcome::Forwarded,
            ),
            (flow.from_backend(), Outcome::Replied),
        ];
        for (frame, expected) in handshake {
            assert_eq!(self.run(&frame.bytes()).outcome, expected, "{frame:?}");
        }
        assert!(self.taken(flow).meta.is(Kind::Established));
    }

    /// Opens a flow of a client at the first listener, and proves it.
    pub fn establish(&mut self, client: SocketAddr) -> Flow {
        let flow = self.open(client, self.ip.listener());
        self.prove(&flow);
        flow
    }

    /// Resets a flow, as the daemon does; how many it were.
    ///
    /// # Panics
    /// When the clock cannot be read.
    pub fn kill(&mut self, flow: &Flow) -> usize {
        let filter = FlowFilter {
            backend: Some(flow.backend),
            client: Some(flow.client.ip().into()),
            client_port: Some(flow.client.port()),
            ..FlowFilter::default()
        };
        let killed = self.dataplane.kill_flows(&filter, &mut Walk::default(), usize::MAX).unwrap();
        for it in &killed {
            assert_eq!((it.client, it.listener, it.source), (flow.client, flow.listener, flow.snat));
            assert_eq!(it.backend, self.ip.backend(flow.backend));
        }
        killed.len()
    }

    /// Every slot that is not free.
    pub fn slots(&self) -> Vec<Taken> {
        match self.ip {
            Ip::V4 => slots::<V4>(self.dataplane.tables()),
            Ip::V6 => slots::<V6>(self.dataplane.tables()),
        }
    }

    /// Leaves what was counted without [`World::run`] out of the next exchange; how often it was `outcome`.
    pub fn forget_counts(&mut self, outcome: Outcome) -> u64 {
        let now = self.counters();
        let before = std::mem::replace(&mut self.counted, now);
        let place = Counter::Outcome(outcome).index();
        let of = |counters: &[u64]| counters.iter().skip(place).step_by(COUNTERS).sum::<u64>();
        of(&self.counted) - of(&before)
    }

    /// The slot of a flow.
    pub fn taken(&self, flow: &Flow) -> Taken {
        let found: Vec<_> =
            self.slots().into_iter().filter(|slot| self.address_of(slot) == flow.snat).collect();
        assert_eq!(found.len(), 1, "slots of {flow:?}");
        found[0]
    }

    /// The SNAT address and port that a slot stands for.
    pub fn address_of(&self, slot: &Taken) -> SocketAddr {
        SocketAddr::new(self.snat[slot.address], slot.port)
    }

    /// Changes a slot behind the program's back.
    pub fn change(&self, slot: &Taken, change: Change) {
        let set = slot.address * SETS_PER_ADDRESS as usize + usize::from(slot.port) / WAYS;
        let way = u32::from(slot.port) % WAYS as u32;
        let units =
            |meta: Meta, units: u16| Meta(meta.0 & 0xffff | u32::from(meta.seen().wrapping_sub(units)) << 16);
        let tables = self.dataplane.tables();
        let slot = Slot { set: set as u32, way };
        let (word, numbers) = match self.ip {
            Ip::V4 => {
                (V4::meta(V4::set(tables, slot.set).unwrap(), way), tables.numbers::<V4>(slot).unwrap())
            }
            Ip::V6 => {
                (V6::meta(V6::set(tables, slot.set).unwrap(), way), tables.numbers::<V6>(slot).unwrap())
            }
        };
        let meta = Meta(word.load());
        match change {
            Change::Older(seconds) => word.store(units(meta, seconds).0),
            Change::ClaimedBefore(jiffies) => {
                numbers.unacknowledged.store(numbers.load().unacknowledged.wrapping_sub(jiffies));
            }
            Change::Word(meta) => word.store(meta.0),
        }
    }
}

/// What [`World::change`] does to a slot.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    /// Nothing was heard of it for so many units more.
    Older(u16),
    /// It was claimed so many jiffies earlier; only while it is half-open.
    ClaimedBefore(u32),
    /// It has this word.
    Word(Meta),
}

/// A slot in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Which of the SNAT addresses.
    pub address: usize,
    /// Its port.
    pub port: u16,
    /// Its word.
    pub meta: Meta,
    /// Its client.
    pub client: SocketAddr,
    /// Its listener's id: its place among the listeners, from 1.
    pub listener: u16,
    /// What both of its ends have said.
    pub sequence: SendSequence,
}

fn slots<F: Family>(tables: &Tables) -> Vec<Taken> {
    let mut slots = Vec::new();
    for (set_index, set) in tables.first::<F>(tables.sets::<F>()) {
        let index = set_index as usize;
        for way in 0..WAYS as u32 {
            let meta = Meta(F::meta(set, way).load());
            if meta.is(Kind::Free) {
                continue;
            }
            let (words, port, listener) = F::parts(F::load(set, way));
            let mut octets = [0; 16];
            for (half, word) in octets.chunks_mut(8).zip(words) {
                half.copy_from_slice(&word.to_ne_bytes());
            }
            let ip = match F::NUMBER {
                lb_common::layout::family::IPV4 => IpAddr::from((words[0] as u32).to_ne_bytes()),
                _ => IpAddr::from(octets),
            };
            slots.push(Taken {
                address: index / SETS_PER_ADDRESS as usize,
                port: (index % SETS_PER_ADDRESS as usize * WAYS + way as usize) as u16,
                meta,
                client: SocketAddr::new(ip, u16::from_be(port)),
                listener,
                sequence: tables.numbers::<F>(Slot { set: set_index, way }).unwrap().load(),
            });
        }
    }
    slots
}

/// Runs the program beside others. Its packets are not compared with the counters.
pub struct Processor(Xdp);

impl Processor {
    /// Runs the program on a frame; the frame it sends, None if it sends none.
    pub fn run(&self, frame: &[u8]) -> Option<Vec<u8>> {
        let (verdict, bytes) = test_run(&self.0, &[], frame);
        (verdict == XDP_TX || verdict == XDP_REDIRECT).then_some(bytes)
    }
}

/// Verdict and frame.
fn test_run(program: &Xdp, metadata: &[u8], frame: &[u8]) -> (u32, Vec<u8>) {
    let length = metadata.len() + frame.len();
    try_test_run(program, metadata, frame)
        .unwrap_or_else(|error| panic!("a test run with {length} bytes: {}", chain(&error)))
}

/// The same; an error when the kernel does not run a program on such a frame.
fn try_test_run(program: &Xdp, metadata: &[u8], frame: &[u8]) -> Result<(u32, Vec<u8>), ProgramError> {
    let data = [metadata, frame].concat();
    // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
    let context: Vec<u8> = [metadata.len() as u32, data.len() as u32, 0, LOOPBACK, 0, 0]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    let mut bytes = vec![0; data.len() + 64];
    let result = program.test_run(TestRunOptions {
        data_in: Some(&data),
        data_out: Some(&mut bytes),
        ctx_in: Some(&context),
        ..TestRunOptions::default()
    })?;
    bytes.truncate(result.data_size_out as usize);
    bytes.drain(..metadata.len());
    Ok((result.return_value, bytes))
}

const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;
const XDP_REDIRECT: u32 = 4;

/// What became of one packet.
#[derive(Clone, Debug)]
pub struct Exchange {
    /// Out by another interface than the one it came in by.
    pub redirected: bool,
    /// What it was counted as.
    pub outcome: Outcome,
    /// For which service.
    pub service: Option<usize>,
    /// What happened on the way.
    pub events: Vec<Event>,
    /// The frame as the program left it.
    pub bytes: Vec<u8>,
}

impl Exchange {
    /// The frame that came out, every length and checksum of which is right.
    ///
    /// # Panics
    /// When none came out, or one that is wrong.
    pub fn seen(&self) -> Seen {
        assert_eq!(self.outcome.action(), Action::Transmit, "{:?}", self.outcome);
        match Seen::parse(&self.bytes) {
            Ok(seen) => seen,
            Err(error) => panic!("{:?} sent {error:#}: {:02x?}", self.outcome, self.bytes),
        }
    }

    /// The frame that came out, which must be `sent` but for what a translation changes: addresses, ports, MACs,
    /// tags and one hop less.
    ///
    /// # Panics
    /// When anything else has changed.
    pub fn translated(&self, sent: &Frame) -> Seen {
        let (before, after) = (Seen::parse(&sent.bytes()).unwrap(), self.seen());
        assert_eq!(after.ttl + 1, before.ttl);
        assert_eq!(after.options, before.options);
        assert_eq!(after.inside, before.inside, "only ports may change");
        assert!(matches!(after.inside, Inside::Tcp { .. }));
        after
    }
}

/// A flow, as both sides see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The client.
    pub client: SocketAddr,
    /// Where it connects to.
    pub listener: SocketAddr,
    /// Who the backend thinks the client is.
    pub snat: SocketAddr,
    /// The backend's id.
    pub backend: u8,
}

impl Flow {
    /// A bare ACK of the client, which has sent and acknowledged nothing but SYN and SYN-ACK.
    pub fn from_client(&self) -> Frame {
        let (sequence, acknowledgement) = (CLIENT_START + 1, BACKEND_START + 1);
        Frame { sequence, acknowledgement, ..Frame::new(self.client, self.listener) }
    }

    /// The client's acknowledgement of a FIN that the backend sent after nothing else.
    pub fn last_ack(&self) -> Frame {
        Frame { acknowledgement: BACKEND_START + 2, ..self.from_client() }
    }

    /// A bare ACK of the backend, likewise.
    pub fn from_backend(&self) -> Frame {
        let ip = if self.client.is_ipv4() { Ip::V4 } else { Ip::V6 };
        Frame {
            macs: (backend_mac(self.backend), LB_MAC),
            sequence: BACKEND_START + 1,
            acknowledgement: CLIENT_START + 1,
            ..Frame::new(ip.backend(self.backend), self.snat)
        }
    }

    /// The backend's SYN-ACK.
    pub fn syn_ack(&self) -> Frame {
        Frame { flags: SYN | ACK, sequence: BACKEND_START, ..self.from_backend() }
    }
}

/// An error with its causes.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
