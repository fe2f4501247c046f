//! An upgrade from the layout of the flow table before this one: no flow is lost.
//!
//! The build that had that layout is not here. So the maps of a daemon of this build are written down as that build would have
//! written them, and pinned as it would have: the structures below are that layout, byte by byte.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{
    fs,
    mem::offset_of,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use aya::maps::{Array, Map, MapData, PerCpuArray, PerCpuValues};
use lb_common::{
    flow::{Family as _, V4},
    layout::{
        BACKENDS, Backend, Classifier, Config, Control, LISTENERS, Listener, Numbers4, ReturnHops, SERVICES,
        Service, Set4, Set6, WAYS,
    },
    meta::{Kind, Meta, NUMBERED, RETRANSMITTED},
    outcome::{COUNTERS, Counter, Outcome},
};
use lb_tests::{
    cluster::{Cluster, Shape},
    daemon::{Daemon, Settings},
    hold::{Holder, Order},
    lab::{eventually, process::said},
    load::Crowd,
};
use lb_userspace::dataplane::Mapped;

/// More than a start needs.
const MOMENT: Duration = Duration::from_secs(30);
const FLOWS: usize = 40;
const DIRECTORY: &str = "layout_2627030b516996f3";
/// `BPF_F_MMAPABLE`.
const MAPPED: u32 = 1024;
/// SYN-ACK seen, and the client's ACK of it.
const PROVEN: u32 = 1 << 3 | 1 << 4;
/// Counters of one service, and the place of `forwarded` among them.
const PREVIOUS_COUNTERS: u32 = 30;
const PREVIOUS_FORWARDED: u32 = 4;
/// What the earlier build has counted there.
const COUNTED: u64 = 1 << 40;
/// Maps that are the same in both layouts.
const SAME: [&str; 13] = [
    "ALLOW",
    "BACKEND_FLOWS",
    "BACKEND_SOCKETS",
    "BLACK_BOX",
    "BLOCKED",
    "CLOCK",
    "DIALLED",
    "FOLLOWED_SOCKETS",
    "HOOK",
    "NEXT_HOP",
    "OVERFLOW6",
    "SELECTION",
    "SOCKETS_MISSED",
];

/// The value of the control map.
type ControlBytes = [u8; 2448 + 65 * 16 + 256 * 32 + 256 * 48 + 131_200];
/// And of this build's.
type NewControlBytes = [u8; size_of::<Control>()];

fn pinned(directory: &Path, name: &str) -> Map {
    let path = directory.join(format!("map_{name}"));
    Map::from_map_data(MapData::from_pin(&path).unwrap()).unwrap()
}

fn mapped<T>(directory: &Path, name: &'static str) -> Mapped<T> {
    Mapped::new(name, &pinned(directory, name)).unwrap()
}

/// A new map, pinned.
fn create<T: aya::Pod>(directory: &Path, name: &str, entries: u32) -> Array<MapData, T> {
    Array::<MapData, T>::create(entries, MAPPED).unwrap().pin(directory.join(format!("map_{name}"))).unwrap();
    pinned(directory, name).try_into().unwrap()
}

/// The bytes of one field, by its offset and the field.
macro_rules! field {
    ($bytes:expr, $type:ident, $field:ident) => {{
        const fn size<F>(_: fn(&$type) -> &F) -> usize {
            size_of::<F>()
        }
        let start = offset_of!($type, $field);
        &$bytes[start..start + size(|value: &$type| &value.$field)]
    }};
}

fn config(new: &[u8]) -> Vec<u8> {
    [
        field!(new, Config, key),
        field!(new, Config, first_set),
        field!(new, Config, sets),
        field!(new, Config, snat4_count),
        field!(new, Config, snat6_count),
        field!(new, Config, interface_count),
        field!(new, Config, jiffies_shift),
        field!(new, Config, half_open_jiffies),
        field!(new, Config, epoch),
        field!(new, Config, partners),
        field!(new, Config, last_backend),
        field!(new, Config, zero),
        field!(new, Config, interfaces),
        field!(new, Config, snat4),
        field!(new, Config, snat6),
        field!(new, Config, bucket4),
        field!(new, Config, bucket6),
    ]
    .concat()
}

fn listener(new: &[u8]) -> Vec<u8> {
    [
        field!(new, Listener, address),
        field!(new, Listener, port),
        field!(new, Listener, family),
        field!(new, Listener, reserved),
        field!(new, Listener, service),
        field!(new, Listener, next),
        field!(new, Listener, interfaces),
        field!(new, Listener, sum),
    ]
    .concat()
}

fn service(new: &[u8]) -> Vec<u8> {
    [
        field!(new, Service, selection4),
        field!(new, Service, selection6),
        field!(new, Service, restricted),
        field!(new, Service, pods),
    ]
    .concat()
}

fn backend(new: &[u8]) -> Vec<u8> {
    [
        field!(new, Backend, address),
        field!(new, Backend, port),
        field!(new, Backend, family),
        field!(new, Backend, reserved),
        field!(new, Backend, flags),
        field!(new, Backend, sum),
        field!(new, Backend, heard),
        field!(new, Backend, next_hop),
        field!(new, Backend, asked),
        field!(new, Backend, refused),
    ]
    .concat()
}

fn control(new: &[u8]) -> ControlBytes {
    let parts = |start: usize, count: u32, size: usize, part: fn(&[u8]) -> Vec<u8>| -> Vec<u8> {
        new[start..start + count as usize * size].chunks(size).flat_map(part).collect()
    };
    let classifier = offset_of!(Control, classifier);
    [
        config(&new[offset_of!(Control, config)..]),
        parts(offset_of!(Control, services), SERVICES, size_of::<Service>(), service),
        parts(offset_of!(Control, listeners), LISTENERS, size_of::<Listener>(), listener),
        parts(offset_of!(Control, backends), BACKENDS, size_of::<Backend>(), backend),
        new[classifier..classifier + size_of::<Classifier>()].to_vec(),
    ]
    .concat()
    .try_into()
    .unwrap()
}

/// A flow's word as the earlier build had it.
fn word(meta: Meta) -> u32 {
    let meta = meta.without(NUMBERED | RETRANSMITTED);
    if meta.is(Kind::Established) { meta.with(PROVEN).0 } else { meta.0 }
}

/// Writes the IPv4 table. Every flow's neighbour in its set, if that is free, becomes a handshake of a client that is not
/// there. Returns how many of these there are.
fn write_ipv4(new: &Path, old: &Path) -> usize {
    let (sets, numbers) = (mapped::<Set4>(new, "FLOW4"), mapped::<Numbers4>(new, "NUMBERS4"));
    let mut flows = create::<[u64; 8]>(old, "FLOW4", sets.len() as u32);
    let mut hops = create::<[u16; 4]>(old, "RETURN_HOP4", sets.len() as u32);
    create::<[u8; 8]>(old, "OVERFLOW4", (sets.len() as u32).div_ceil(8));
    let mut handshakes = 0;
    for index in 0..sets.len() {
        let (set, numbers) = (sets.get(index).unwrap(), numbers.get(index).unwrap());
        let mut words = [0; 8];
        for way in 0..WAYS {
            let meta = Meta(set.metas[way].load());
            let last_ack = numbers.ways[way].unacknowledged.load();
            words[2 * way] = set.tuples[way].load();
            words[2 * way + 1] = u64::from(word(meta)) | u64::from(last_ack) << 32;
        }
        let metas: Vec<_> = set.metas.iter().map(|meta| Meta(meta.load())).collect();
        if let Some(way) = (1..WAYS).find(|way| metas[*way].is(Kind::Free) && metas[*way - 1].is_live()) {
            let answered = metas[way - 1].become_kind(Kind::HalfOpen).without_flags().with(1 << 3);
            let (_, _, listener) = V4::parts(words[2 * way - 2]);
            words[2 * way] = V4::tuple([u64::from(stranger()), 0], 7u16.to_be(), listener);
            words[2 * way + 1] = u64::from(answered.0);
            handshakes += 1;
        }
        if words.iter().any(|word| *word != 0) {
            flows.set(index as u32, words, 0).unwrap();
            hops.set(index as u32, [0, 1, 2, 3].map(|way: usize| set.return_hops[way].load()), 0).unwrap();
        }
    }
    handshakes
}

/// 192.0.2.1, as a word.
fn stranger() -> u32 {
    u32::from_ne_bytes([192, 0, 2, 1])
}

fn write_ipv6(new: &Path, old: &Path) {
    let sets = mapped::<Set6>(new, "FLOW6");
    let new_hops = mapped::<ReturnHops>(new, "RETURN_HOP6");
    let mut flows = create::<[u64; 16]>(old, "FLOW6", sets.len() as u32);
    let mut hops = create::<[u16; 4]>(old, "RETURN_HOP6", sets.len() as u32);
    for index in 0..sets.len() {
        let set = sets.get(index).unwrap();
        let mut words = [0; 16];
        for (way, words) in set.ways.iter().zip(words.chunks_mut(4)) {
            let [high, low] = &way.address;
            words[0] = high.load();
            words[1] = low.load();
            words[2] = u64::from(way.port_listener.load()) | u64::from(word(Meta(way.meta.load()))) << 32;
            words[3] = way.numbers.unacknowledged.load().into();
        }
        if words.iter().any(|word| *word != 0) {
            flows.set(index as u32, words, 0).unwrap();
            let ways = &new_hops.get(index).unwrap().ways;
            hops.set(index as u32, [0, 1, 2, 3].map(|way: usize| ways[way].load()), 0).unwrap();
        }
    }
}

/// The pins of the earlier build, beside those of this one, which lose their links. Returns this build's directory, and how
/// many handshakes there are.
fn write_previous(pins: &Path) -> (PathBuf, usize) {
    let mut entries: Vec<_> = fs::read_dir(pins).unwrap().map(|entry| entry.unwrap().path()).collect();
    let new = entries.pop().unwrap();
    assert!(entries.is_empty(), "{entries:?}");
    let old = pins.join(DIRECTORY);
    fs::create_dir(&old).unwrap();
    for name in SAME {
        let name = format!("map_{name}");
        MapData::from_pin(new.join(&name)).unwrap().pin(old.join(&name)).unwrap();
    }
    let handshakes = write_ipv4(&new, &old);
    write_ipv6(&new, &old);
    write_control(&new, &old);
    let counters = PerCpuArray::<MapData, u64>::create(SERVICES * PREVIOUS_COUNTERS, 0).unwrap();
    counters.pin(old.join("map_COUNTER")).unwrap();
    let mut counters: PerCpuArray<MapData, u64> = pinned(&old, "COUNTER").try_into().unwrap();
    let mut values = counters.get(&0, 0).unwrap().to_vec();
    values[0] = COUNTED;
    let values = PerCpuValues::try_from(values).unwrap();
    counters.set(PREVIOUS_COUNTERS + PREVIOUS_FORWARDED, values, 0).unwrap();
    for entry in fs::read_dir(&new).unwrap().map(|entry| entry.unwrap()) {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("map_") {
            fs::rename(entry.path(), old.join(name)).unwrap();
        }
    }
    (new, handshakes)
}

/// The control map's values are too large for the stack of a test.
fn write_control(new: &Path, old: &Path) {
    let write = || {
        let new: Array<MapData, NewControlBytes> = pinned(new, "CONTROL").try_into().unwrap();
        create::<ControlBytes>(old, "CONTROL", 1).set(0, control(&new.get(&0, 0).unwrap()), 0).unwrap();
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(64 << 20).spawn_scoped(scope, write).unwrap();
        thread.join().unwrap();
    });
}

fn counted(directory: &Path) -> u64 {
    let counters: PerCpuArray<MapData, u64> = pinned(directory, "COUNTER").try_into().unwrap();
    let index = COUNTERS + Counter::Outcome(Outcome::Forwarded).index();
    counters.get(&(index as u32), 0).unwrap().iter().sum()
}

/// `sheave flows --json`: client, source and state of each flow.
fn flows(daemon: &Daemon) -> Vec<[String; 3]> {
    let output = daemon.command("flows").unwrap().arg("--json").output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let lines = String::from_utf8(output.stdout).unwrap();
    let text = |flow: &serde_json::Value, name: &str| flow[name].as_str().unwrap().to_owned();
    let flow = |line: &str| {
        let flow = serde_json::from_str(line).unwrap();
        ["client", "source", "state"].map(|name| text(&flow, name))
    };
    let mut flows: Vec<_> = lines.lines().map(flow).collect();
    flows.sort();
    flows
}

/// Open connections over both families, while the daemon is stopped, `change` is done to its pins, and it is started again.
/// They go on as they were.
fn every_flow_goes_on(change: impl FnOnce(&Path) -> usize) -> (Cluster, Daemon) {
    let cluster = Cluster::start(Shape::OneArm, 3).unwrap();
    let mut daemon = cluster.balance().unwrap();
    let mut crowds = cluster.vips().map(|vip| {
        let mut crowd = Crowd::open(&cluster.client, &cluster.client_of(vip).unwrap(), FLOWS).unwrap();
        let servers = crowd.ask_names();
        servers.require_all(FLOWS).unwrap();
        (crowd, servers)
    });
    eventually(MOMENT, "all flows are listed", || {
        anyhow::ensure!(flows(&daemon).len() >= 2 * FLOWS);
        Ok(())
    })
    .unwrap();
    let before = flows(&daemon);
    let resets = cluster.client_resets().unwrap();
    let pins = daemon.pins();
    daemon.process().kill().unwrap();
    let handshakes = change(&pins);

    let settings = cluster.settings().unwrap();
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    daemon.wait_ready(3).unwrap();
    let (listed, half_open): (Vec<_>, Vec<_>) =
        flows(&daemon).into_iter().partition(|[client, ..]| !client.starts_with("192.0.2.1:"));
    assert_eq!(listed, before, "each in its slot");
    assert_eq!(half_open.len(), handshakes);
    assert!(half_open.iter().all(|[_, _, state]| state == "half-open"), "{half_open:?}");
    // Twice: the second answers are to flows whose numbers are known.
    for _ in 0..2 {
        for (crowd, servers) in &mut crowds {
            let again = crowd.ask_names();
            again.require_all(FLOWS).unwrap();
            assert_eq!(again.by_server(), servers.by_server(), "a connection stays where it is");
        }
    }
    require_numbered(&only_layout(&daemon));
    assert_eq!(cluster.client_resets().unwrap(), resets, "nobody is reset");
    cluster.require_no_own_resets().unwrap();
    (cluster, daemon)
}

/// The only directory below the pins.
fn only_layout(daemon: &Daemon) -> PathBuf {
    let mut entries: Vec<_> =
        fs::read_dir(daemon.pins()).unwrap().map(|entry| entry.unwrap().path()).collect();
    let directory = entries.pop().unwrap();
    assert!(entries.is_empty(), "{entries:?}");
    directory
}

fn require_numbered(directory: &Path) {
    let sets = mapped::<Set4>(directory, "FLOW4");
    let metas = (0..sets.len()).flat_map(|index| &sets.get(index).unwrap().metas);
    let established: Vec<_> =
        metas.map(|meta| Meta(meta.load())).filter(|meta| meta.is(Kind::Established)).collect();
    assert!(
        established.len() >= FLOWS && established.iter().all(|meta| meta.has(NUMBERED)),
        "{established:?}"
    );
    let sets = mapped::<Set6>(directory, "FLOW6");
    let ways = (0..sets.len()).flat_map(|index| &sets.get(index).unwrap().ways);
    let mut established = ways.map(|way| Meta(way.meta.load())).filter(|meta| meta.is(Kind::Established));
    assert!(established.all(|meta| meta.has(NUMBERED)));
}

#[test]
fn flows_of_the_layout_before_go_on() {
    let (_cluster, daemon) = every_flow_goes_on(|pins| {
        let (new, handshakes) = write_previous(pins);
        fs::remove_dir_all(new).unwrap();
        assert!(handshakes > 0);
        handshakes
    });
    let directory = only_layout(&daemon);
    assert_ne!(directory.file_name().unwrap(), DIRECTORY);
    assert!(counted(&directory) > COUNTED, "totals go on");
    let config = mapped::<Control>(&directory, "CONTROL").config().read(0).unwrap();
    assert_eq!(config.hold, 0);
    assert!(daemon.log().contains("all flows of the earlier version"), "{}", daemon.log());
}

/// A daemon was killed in the middle: half of the flows are only in the old table, and what belongs to none is held.
#[test]
fn an_upgrade_that_was_interrupted_is_finished() {
    let (_cluster, daemon) = every_flow_goes_on(|pins| {
        let (new, handshakes) = write_previous(pins);
        let sets = mapped::<Set4>(&new, "FLOW4");
        let mut copied = 0;
        for meta in (0..sets.len()).flat_map(|index| &sets.get(index).unwrap().metas) {
            let found = Meta(meta.load());
            if found.is(Kind::Established) {
                copied += 1;
                // As the first pass leaves it, or not there yet.
                meta.store(if copied % 2 == 0 { Meta::FREE.0 } else { found.without(NUMBERED).0 });
            }
        }
        let config = mapped::<Control>(&new, "CONTROL").config();
        let held = Config { hold: 1, ..config.read(0).unwrap() };
        config.write(0, held);
        handshakes
    });
    let directory = only_layout(&daemon);
    let config = mapped::<Control>(&directory, "CONTROL").config().read(0).unwrap();
    assert_eq!(config.hold, 0);
}

/// Connections of this host's processes that the connect hook has redirected.
#[test]
fn redirected_sockets_are_followed_and_keep_the_name_of_their_peer() {
    const SOCKETS: usize = 10;
    const LATER: usize = 5;
    let cluster = Cluster::start_without_vips(Shape::OneArm, 2).unwrap();
    let listeners: [SocketAddr; 2] = ["127.0.0.1:16443", "[::1]:16443"].map(|it| it.parse().unwrap());
    let settings = Settings { listen: listeners.to_vec(), ..cluster.settings().unwrap() };
    let start = || {
        let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
        daemon.wait_ready(2).unwrap();
        daemon
    };
    let wait_counts = |daemon: &Daemon, active: usize, total: usize| {
        eventually(MOMENT, &format!("{active} of {total} connections are open"), || {
            let services = daemon.status()?.services;
            let backends = services.iter().flat_map(|service| &service.backends);
            let found = backends.fold((0, 0), |(active, total), backend| {
                (active + backend.active_flows, total + backend.total_flows)
            });
            anyhow::ensure!(found == (active as u64, total as u64), "{found:?}");
            Ok(())
        })
        .unwrap();
    };
    let mut daemon = start();
    let mut holders = listeners.map(|to| Holder::start(&cluster.lb, true, &cluster.ca_file(), to).unwrap());
    for holder in &mut holders {
        holder.order(Order::OpenPlain(SOCKETS)).unwrap();
    }
    wait_counts(&daemon, 2 * SOCKETS, 2 * SOCKETS);
    let pins = daemon.pins();
    daemon.process().kill().unwrap();
    let (new, _) = write_previous(&pins);
    fs::remove_dir_all(new).unwrap();
    // No daemon is there to see these end.
    holders[0].order(Order::Close(1)).unwrap();

    let daemon = start();
    assert_ne!(only_layout(&daemon).file_name().unwrap(), DIRECTORY);
    wait_counts(&daemon, 2 * SOCKETS - 1, 2 * SOCKETS);
    for (holder, (listener, open)) in
        holders.iter_mut().zip(listeners.into_iter().zip([SOCKETS - 1, SOCKETS]))
    {
        holder.order(Order::NamePeers).unwrap();
        assert_eq!(holder.peers(), vec![listener; open]);
        holder.order(Order::OpenPlain(LATER)).unwrap();
        assert_eq!(holder.ended(), []);
    }
    let total = 2 * (SOCKETS + LATER);
    wait_counts(&daemon, total - 1, total);
    holders[1].order(Order::Close(SOCKETS)).unwrap();
    wait_counts(&daemon, total - 1 - SOCKETS, total);
    drop(holders);
    wait_counts(&daemon, 0, total);
}

/// Two tables, and nothing says that the one is being copied into the other.
#[test]
fn two_complete_tables_are_refused() {
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let mut daemon = cluster.balance().unwrap();
    let pins = daemon.pins();
    daemon.process().kill().unwrap();
    write_previous(&pins);
    let settings = cluster.settings().unwrap();
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
    assert_eq!(daemon.process().wait(MOMENT).unwrap().code(), Some(1), "{}", daemon.log());
    assert!(daemon.log().contains(DIRECTORY), "{}", daemon.log());
}
