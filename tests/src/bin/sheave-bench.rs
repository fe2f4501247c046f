//! `sheave-bench`: what the data path costs, measured with the frame method.
//!
//! A wrapper program writes a fresh packet, then calls the very code that the daemon loads, a million times for each
//! figure; the wrapper without the call is the empty program. Both are run in turns, and the least of the rounds
//! counts: everything else that happens on a machine only adds.

use std::{
    net::{IpAddr, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use aya::programs::{TestRun as _, TestRunOptions, Xdp};
use clap::{Parser, Subcommand};
use etherparse::PacketBuilder;
use lb_common::{
    bench::{FLOWS, IN_FLIGHT, PACKET, Place, Plan, call, client, direction},
    flow::{Family, Slot, V4, V6},
    hash::split_mix,
    layout::{SETS_PER_ADDRESS, Set4, Set6, SourceBudgets, WAYS},
    meta::{Kind, Meta, NUMBERED},
    sequence::SendSequence,
    source_budget::SourceCount,
};
use lb_tests::{
    attacks::{Arena, FloodKind, Flooded, flood},
    cluster::{Cluster, Shape},
    failover, node,
};
use lb_userspace::dataplane::{BENCH_OBJECT, Dataplane, Listener, Mapped, Port, Settings, Tables};

/// Measures sheave.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Nanoseconds a packet costs in the XDP program.
    Datapath {
        /// Print one JSON array instead of a table.
        #[arg(long)]
        json: bool,
        /// Rounds; the least of them counts.
        #[arg(long, default_value_t = 11)]
        rounds: u32,
        /// Packets a round.
        #[arg(long, default_value_t = 1 << 20)]
        packets: u32,
        /// Only with so many flows.
        #[arg(long)]
        flows: Option<u32>,
        /// Only this family: ipv4 or ipv6.
        #[arg(long)]
        family: Option<String>,
    },
    /// From `sheave run` to the first connection through the VIP, with three ready backends, and the daemon's memory.
    Startup {
        /// How often.
        #[arg(long, default_value_t = 5)]
        rounds: u32,
    },
    /// How long failures last and whom they hit, with HAProxy beside it.
    Failover(failover::Options),
    /// What real connections notice of floods of forged packets, one kind at a time.
    Attack {
        /// Seconds for each kind and family.
        #[arg(long, default_value_t = 30)]
        seconds: u64,
        /// Packets a second.
        #[arg(long, default_value_t = 200_000)]
        rate: u32,
        /// Flows that are open meanwhile and say nothing.
        #[arg(long, default_value_t = 100)]
        flows: usize,
    },
    /// What the connect hook costs a node's clients, with no balancer, HAProxy and nginx beside it; and what a check
    /// costs an apiserver.
    Node(node::Options),
}

fn main() -> Result<()> {
    match Arguments::parse().what {
        What::Startup { rounds } => startup(rounds),
        What::Attack { seconds, rate, flows } => attack(Duration::from_secs(seconds), rate, flows),
        What::Failover(options) => failover::run(&options),
        What::Node(options) => node::run(&options),
        What::Datapath { json, rounds, packets, flows, family } => {
            ensure!(rounds >= 1 && packets >= 1, "--rounds and --packets must be at least 1");
            let wanted = |ipv6: bool, count: u32| {
                flows.is_none_or(|flows| flows == count)
                    && family.as_deref().is_none_or(|family| family == family_name(ipv6))
            };
            datapath(json, rounds, packets, wanted)
        }
    }
}

/// Flow counts that are measured.
const FLOW_COUNTS: [u32; 4] = [1, 4096, 65_536, FLOWS];
/// Slots of one SNAT address with the default range of ports.
const SLOTS: u32 = 64_512;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const NEIGHBOUR: [u8; 6] = [2, 0, 0, 0, 0, 2];
const LISTENER_PORT: u16 = 6443;
const BACKENDS: u8 = 3;

/// One line of the result.
#[derive(serde::Serialize)]
struct Figure {
    case: &'static str,
    family: &'static str,
    flows: u32,
    ns: u32,
    empty_ns: u32,
}

/// Floods a daemon in the laboratory, and prints what became of real connections.
fn attack(time: Duration, rate: u32, flows: usize) -> Result<()> {
    let arena = Arena::start(3, |_| {})?;
    // Each connection's port rests for a minute in TIME_WAIT, and a fast host opens a thousand in a second.
    arena.cluster.client.namespace().sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
    println!(
        "{:>5} {:>13} {:>10} {:>12} {:>14} {:>14} {:>10}",
        "", "flood of", "frames", "flows lost", "new failed", "left over", "half-open"
    );
    for (family, vip) in ["ipv4", "ipv6"].into_iter().zip(arena.cluster.vips()) {
        for kind in FloodKind::ALL {
            let mut victims = arena.open_and_exchange(vip, flows)?;
            let flooded = flood(&arena, kind, rate, time, &mut victims)?;
            let Flooded { sent, lost, refused, left, half_open, .. } = flooded;
            let of = |(all, failed): (usize, usize)| format!("{failed} of {all}");
            println!(
                "{family:>5} {:>13} {sent:>10} {:>12} {:>14} {left:>14} {half_open:>10}",
                format!("{kind:?}"),
                of(lost),
                of(refused)
            );
        }
    }
    Ok(())
}

/// Starts the daemon in the laboratory and has a client knock at the VIP until it is let in.
fn startup(rounds: u32) -> Result<()> {
    let cluster = Cluster::start(Shape::OneArm, 3)?;
    let vip = SocketAddr::new(cluster.vip4, LISTENER_PORT);
    println!("{:>5} {:>14} {:>12} {:>14}", "round", "forwarding ms", "resident kB", "of it maps kB");
    for round in 1..=rounds {
        let began = Instant::now();
        let mut daemon = cluster.balance()?;
        let elapsed = cluster.client.in_namespace(move || knock(vip, began))??;
        daemon.wait_ready(3)?;
        let (resident, maps) = memory(daemon.process().pid())?;
        println!("{round:>5} {:>14} {resident:>12} {maps:>14}", elapsed.as_millis());
        // The next round begins from nothing.
        ensure!(daemon.unload()?.status.success(), "the daemon left something");
    }
    Ok(())
}

/// Until the program is attached the host's own kernel refuses.
fn knock(vip: SocketAddr, began: Instant) -> Result<Duration> {
    const LIMIT: Duration = Duration::from_secs(10);
    while began.elapsed() < LIMIT {
        if TcpStream::connect_timeout(&vip, Duration::from_millis(200)).is_ok() {
            return Ok(began.elapsed());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    bail!("no connection within {LIMIT:?}")
}

/// Resident memory of a process, and how much of it is BPF maps, in kB.
fn memory(pid: u32) -> Result<(u64, u64)> {
    let (mut resident, mut maps, mut in_map) = (0, 0, false);
    for line in std::fs::read_to_string(format!("/proc/{pid}/smaps"))?.lines() {
        match line.strip_prefix("Rss:") {
            Some(size) => {
                let size: u64 = size.trim().trim_end_matches(" kB").parse()?;
                resident += size;
                maps += if in_map { size } else { 0 };
            }
            // The first line of a mapping begins with its addresses.
            None if line.split_once(' ').is_some_and(|(range, _)| range.contains('-')) => {
                in_map = line.contains("bpf-map");
            }
            None => {}
        }
    }
    Ok((resident, maps))
}

fn family_name(ipv6: bool) -> &'static str {
    if ipv6 { "ipv6" } else { "ipv4" }
}

fn datapath(json: bool, rounds: u32, packets: u32, wanted: impl Fn(bool, u32) -> bool) -> Result<()> {
    let mut figures = Vec::new();
    for ipv6 in [false, true] {
        for flows in FLOW_COUNTS.into_iter().filter(|flows| wanted(ipv6, *flows)) {
            let mut bench = Bench::new(ipv6, flows)?;
            for case in Case::ALL {
                let figure = bench.measure(case, rounds, packets)?;
                if !json {
                    print_row(&figure, figures.is_empty());
                }
                figures.push(figure);
            }
            // Fewer flows touch so few lines of their table that these stay in a cache.
            if !json && flows >= SLOTS {
                println!(
                    "{:<20} {:<5} {flows:>7} {:>6}",
                    "memory-read",
                    family_name(ipv6),
                    bench.memory_read()
                );
            }
        }
    }
    if json {
        println!("{}", serde_json::to_string(&figures)?);
    }
    Ok(())
}

fn print_row(figure: &Figure, first: bool) {
    if first {
        println!(
            "{:<20} {:<5} {:>7} {:>6} {:>6} {:>6} {:>6}",
            "case", "ip", "flows", "ns", "empty", "net", "ratio"
        );
    }
    let Figure { case, family, flows, ns, empty_ns } = figure;
    let ratio = f64::from(*ns) / f64::from(*empty_ns);
    println!(
        "{case:<20} {family:<5} {flows:>7} {ns:>6} {empty_ns:>6} {:>6} {ratio:>6.1}",
        ns.saturating_sub(*empty_ns)
    );
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Case {
    NotOurs,
    Forward,
    Reply,
    NewFlow,
}

impl Case {
    const ALL: [Self; 4] = [Self::NotOurs, Self::Forward, Self::Reply, Self::NewFlow];

    fn name(self) -> &'static str {
        match self {
            Self::NotOurs => "not-ours",
            Self::Forward => "established-forward",
            Self::Reply => "established-reply",
            Self::NewFlow => "new-flow",
        }
    }
}

struct Bench {
    dataplane: Dataplane,
    plan: Mapped<Plan>,
    ipv6: bool,
    flows: u32,
    /// See [`Plan::round`].
    round: u32,
}

impl Bench {
    /// A data path in which `flows` flows are established and half of all slots are taken.
    fn new(ipv6: bool, flows: u32) -> Result<Self> {
        let addresses = addresses(flows);
        let mut dataplane = Dataplane::load(BENCH_OBJECT, &settings(ipv6, addresses))?;
        dataplane.calibrate()?;
        let port = Port { interface: 1, tags: Vec::new(), mac: MAC };
        dataplane.set_ports(&[port])?;
        let listener = SocketAddr::new(vip(ipv6, 0), LISTENER_PORT);
        dataplane.set_listeners(&[Listener { address: listener, service: 0 }], 1)?;
        let names = ["a", "b", "c"];
        for id in 1..=BACKENDS {
            dataplane.add_backend(id, SocketAddr::new(backend(ipv6, id), LISTENER_PORT), false);
            dataplane.set_accepts(id, true);
            dataplane.set_next_hop(id, Some((NEIGHBOUR, 0)));
        }
        let members: Vec<_> = (1..=BACKENDS).zip(names).map(|(id, name)| (id, name, 1)).collect();
        dataplane.select(0, ipv6, &members)?;
        // Sources are counted, as they are by default, and have no limit that is reached.
        let budgets = dataplane.map::<SourceBudgets>("SOURCES")?;
        let limit = SourceCount::new(u32::MAX, u32::MAX);
        budgets.get(0).into_iter().flat_map(|it| &it.limits).for_each(|it| it.store(limit.word()));
        dataplane.program("bench")?.load()?;
        let plan = dataplane.map("PLAN")?;
        let mut bench = Self { dataplane, plan, ipv6, flows, round: 0 };
        bench.establish(addresses)?;
        Ok(bench)
    }

    /// Opens the flows that are measured, then others until half of all slots are taken.
    fn establish(&mut self, addresses: u32) -> Result<()> {
        let others = (addresses * SLOTS / 2).saturating_sub(self.flows);
        self.run(&self.plan(Case::NewFlow, call::PROGRAM, 0, self.flows), self.flows)?;
        self.run(&self.plan(Case::NewFlow, call::PROGRAM, FLOWS, FLOWS), others)?;
        let places = self.dataplane.map("PLACE")?;
        let claimed = if self.ipv6 {
            prove::<V6>(self.dataplane.tables(), &places, self.ipv6)
        } else {
            prove::<V4>(self.dataplane.tables(), &places, self.ipv6)
        };
        ensure!(claimed == self.flows + others, "{claimed} of {} flows have a slot", self.flows + others);
        Ok(())
    }

    fn plan(&self, case: Case, call: u32, first: u32, flows: u32) -> Plan {
        let direction = match case {
            Case::NotOurs => direction::FIXED,
            Case::Forward | Case::NewFlow => direction::FORWARD,
            Case::Reply => direction::REPLY,
        };
        Plan {
            call,
            direction,
            ipv6: self.ipv6.into(),
            flow_mask: flows.next_power_of_two() - 1,
            next: 0,
            first,
            snat: last_four(vip(self.ipv6, 0)),
            backend: last_four(backend(self.ipv6, 0)),
            round: self.round,
            reserved: 0,
            packet: packet(case, self.ipv6),
        }
    }

    /// The least of the rounds, with and without the program, in turns.
    fn measure(&mut self, case: Case, rounds: u32, packets: u32) -> Result<Figure> {
        let (call, nothing, first) = match case {
            Case::NewFlow => (call::PROGRAM_AND_FREE, call::FREE, 2 * FLOWS),
            _ => (call::PROGRAM, call::NOTHING, 0),
        };
        let plan = self.plan(case, call, first, self.flows);
        // Numbers go on from round to round, as those of real flows do.
        let turns = packets.div_ceil(self.flows);
        let (mut ns, mut empty_ns) = (u32::MAX, u32::MAX);
        for _ in 0..rounds {
            let plan = Plan { round: self.round, ..plan };
            self.round += turns;
            empty_ns = empty_ns.min(self.run(&Plan { call: nothing, ..plan }, packets)?);
            ns = ns.min(self.run(&plan, packets)?);
        }
        self.check(case, u64::from(rounds * packets))?;
        Ok(Figure { case: case.name(), family: family_name(self.ipv6), flows: self.flows, ns, empty_ns })
    }

    /// What this machine takes to read a line anywhere in as much memory as the flow table has, in nanoseconds: with
    /// many flows every packet needs at least one.
    fn memory_read(&self) -> u32 {
        const LINE: usize = 64 / size_of::<u64>();
        let set = if self.ipv6 { size_of::<Set6>() } else { size_of::<Set4>() };
        let lines = addresses(self.flows) as usize * SETS_PER_ADDRESS as usize * set / 64;
        // Lines in one random circle (Sattolo 1986), each with the number of the next.
        let mut order: Vec<usize> = (0..lines).collect();
        let mut random = 1;
        for last in (1..lines).rev() {
            random = split_mix(random);
            order.swap(last, random as usize % last);
        }
        let mut memory = vec![0u64; lines * LINE];
        for (line, next) in order.iter().enumerate() {
            memory[line * LINE] = *next as u64;
        }
        let circle = || {
            let began = Instant::now();
            let mut line = 0;
            for _ in 0..lines {
                line = memory[line * LINE] as usize;
            }
            std::hint::black_box(line);
            began.elapsed().as_nanos() as u32 / lines as u32
        };
        (0..5).map(|_| circle()).min().unwrap_or_default()
    }

    /// Runs a plan `packets` times; nanoseconds each.
    fn run(&mut self, plan: &Plan, packets: u32) -> Result<u32> {
        if packets == 0 {
            return Ok(0);
        }
        self.plan.write(0, *plan);
        let bytes: Vec<u8> = plan.packet.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let program: &mut Xdp = self.dataplane.program("bench")?;
        let result = program.test_run(TestRunOptions {
            data_in: Some(&bytes),
            repeat: packets,
            ..Default::default()
        })?;
        Ok(u32::try_from(result.duration.as_nanos())?)
    }

    /// Every packet must have met the fate that is measured.
    fn check(&self, case: Case, packets: u64) -> Result<()> {
        let name = match case {
            Case::NotOurs => return self.check_uncounted(),
            Case::Forward | Case::NewFlow => "forwarded",
            Case::Reply => "replied",
        };
        let counters = self.dataplane.counters(Some(0))?;
        let counted = counters.iter().find(|(counter, _)| counter.name() == name).map_or(0, |(_, n)| *n);
        ensure!(counted >= packets, "{counted} of {packets} packets were {name}: {counters:?}");
        Ok(())
    }

    /// What is not ours is counted nowhere, neither as ours nor as dropped.
    fn check_uncounted(&self) -> Result<()> {
        let counters = self.dataplane.counters(None)?;
        ensure!(
            counters.iter().all(|(_, count)| *count == 0),
            "packets that are not ours count: {counters:?}"
        );
        Ok(())
    }
}

/// SNAT addresses for so many flows: three quarters of the slots hold them.
fn addresses(flows: u32) -> u32 {
    flows.div_ceil(SLOTS / 2 + SLOTS / 4).max(1)
}

/// Makes every claimed slot an established flow's, and notes where each of the measured flows is.
fn prove<F: Family>(tables: &Tables, places: &Mapped<u64>, ipv6: bool) -> u32 {
    let mut claimed = 0;
    for (index, set) in tables.first::<F>(tables.sets::<F>()) {
        for way in 0..WAYS as u32 {
            let meta = Meta(F::meta(set, way).load());
            if !meta.is(Kind::HalfOpen) {
                continue;
            }
            claimed += 1;
            F::meta(set, way).store(meta.become_kind(Kind::Established).with(NUMBERED).0);
            if let Some(numbers) = tables.numbers::<F>(Slot { set: index, way }) {
                let now = SendSequence { unacknowledged: 0, next: IN_FLIGHT };
                numbers.store(numbers.load(), now);
            }
            let (address, port, _) = F::parts(F::load(set, way));
            let last = if ipv6 { (address[1] >> 32) as u32 } else { address[0] as u32 };
            let flow = (u32::from_be(last) - client(0).0) << 12 | u32::from(u16::from_be(port) - client(0).1);
            let snat_port = ((index % SETS_PER_ADDRESS) * WAYS as u32 + way) as u16;
            if flow < FLOWS {
                let place = Place::new(snat_port, (index / SETS_PER_ADDRESS) as u8, meta.backend());
                let pair = places.read(flow as usize / 2).unwrap_or_default();
                places.write(flow as usize / 2, place.enter(pair, flow));
            }
        }
    }
    claimed
}

fn settings(ipv6: bool, addresses: u32) -> Settings {
    Settings {
        snat_addresses: (0..addresses).map(|index| vip(ipv6, index)).collect(),
        snat_room: 1,
        snat_ports: 1024..=65_535,
        secret: [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210],
        log_one_in: None,
        sets_error: true,
    }
}

fn vip(ipv6: bool, index: u32) -> IpAddr {
    let last = 100 + index as u8;
    if ipv6 {
        IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0x0a00, u16::from(last)])
    } else {
        IpAddr::from([10, 0, 0, last])
    }
}

fn backend(ipv6: bool, id: u8) -> IpAddr {
    if ipv6 {
        IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0x0a00, 0x0100 + u16::from(id)])
    } else {
        IpAddr::from([10, 0, 1, id])
    }
}

fn last_four(address: IpAddr) -> u32 {
    match address {
        IpAddr::V4(address) => u32::from_be_bytes(address.octets()),
        IpAddr::V6(address) => {
            let [.., a, b, c, d] = address.octets();
            u32::from_be_bytes([a, b, c, d])
        }
    }
}

/// The packet of a case, as the wrapper is given it.
fn packet(case: Case, ipv6: bool) -> [u64; PACKET / 8] {
    let outsider =
        if ipv6 { IpAddr::from([0xfd09, 0, 0, 0, 0, 0, 0, 9]) } else { IpAddr::from([10, 9, 9, 9]) };
    let (source, destination) = match case {
        Case::NotOurs => (outsider, outsider),
        // In the way of clients, whose last four bytes the wrapper writes.
        Case::Forward | Case::NewFlow if ipv6 => {
            (IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0x0a40, 0]), vip(ipv6, 0))
        }
        Case::Forward | Case::NewFlow => (IpAddr::from([10, 64, 0, 0]), vip(ipv6, 0)),
        Case::Reply => (backend(ipv6, 1), vip(ipv6, 0)),
    };
    let builder = PacketBuilder::ethernet2(NEIGHBOUR, MAC);
    let builder = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            builder.ipv4(source.octets(), destination.octets(), 64)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            builder.ipv6(source.octets(), destination.octets(), 64)
        }
        _ => unreachable!("one family"),
    };
    let builder = match case {
        Case::NotOurs => builder.tcp(40_000, 22, 1, 1000).ack(1),
        Case::Forward => builder.tcp(20_000, LISTENER_PORT, 1, 1000).ack(1),
        Case::NewFlow => builder.tcp(20_000, LISTENER_PORT, 1, 1000).syn(),
        Case::Reply => builder.tcp(LISTENER_PORT, 20_000, 1, 1000).ack(1),
    };
    let headers = if ipv6 { 74 } else { 54 };
    let payload = vec![0; PACKET - headers];
    let mut bytes = Vec::with_capacity(PACKET);
    builder.write(&mut bytes, &payload).expect("a vector takes any bytes");
    let mut words = [0; PACKET / 8];
    for (word, eight) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u64::from_ne_bytes(*eight);
    }
    words
}
