//! Forged packets, and real connections that must not notice them: each test is an attack that once succeeded.
//!
//! Blind means with random sequence and acknowledgement numbers: the attacker knows addresses and ports, and sees nothing.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{
    collections::HashSet,
    io::{Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{
    attacks::{
        Arena, Attacker, Call, Ended, FloodKind, Forged, Noise, Pair, Shuttle, TooBig, exchange_all, flag,
        flood, flows, require_neighbours_answered, stall_calls,
    },
    cluster::{Cluster, Shape},
    daemon::{Daemon, Settings},
    lab::{capture::mac, eventually, process::said, run},
    pattern::{self, Checker},
    stub::PORT,
};
use nix::sys::socket::{setsockopt, sockopt::TcpRepair};

/// For what a busy machine does in a second.
const MOMENT: Duration = Duration::from_secs(10);
/// What is asserted not to happen is watched for so long.
const WATCHED: Duration = Duration::from_secs(2);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(50);
/// After a RST that nobody contradicts a slot was once free, and its flow with it: 10 s and a turn of the daemon.
const BEYOND_A_RESET: Duration = Duration::from_secs(13);
/// The smallest flow table: forged flows fill it soon.
const FEW_SLOTS: &str = "snat_ports = \"1024-5119\"";
/// Its ports.
const FEW_PORTS: std::ops::RangeInclusive<u16> = 1024..=5119;

fn few_slots(settings: &mut Settings) {
    settings.dataplane.push(FEW_SLOTS.to_owned());
}

/// Addresses in the segment that nobody has, with ports.
fn strangers(arena: &Arena, vip: IpAddr, count: u16) -> Vec<SocketAddr> {
    let segment = arena.cluster.lb.link().unwrap().segment;
    let stranger = |number: u16| {
        let host = 150 + (number % 100) as u8;
        let address: IpAddr = if vip.is_ipv4() { segment.v4(host).into() } else { segment.v6(host).into() };
        SocketAddr::new(address, 10_000 + number)
    };
    (0..count).map(stranger).collect()
}

/// Makes the attacker the neighbour of those addresses.
///
/// The load balancer's own kernel answers what has found no slot. Such answers would wait for a neighbour, and the hosts of a
/// lab, which have one kernel, share the memory for them: then the backends would send no answers of that kind either.
fn give_strangers_a_neighbour(arena: &Arena, vip: IpAddr) {
    let mac = arena.attacker.mac().map(|byte| format!("{byte:02x}")).join(":");
    let addresses: HashSet<IpAddr> = strangers(arena, vip, 100).iter().map(SocketAddr::ip).collect();
    for address in addresses {
        arena.cluster.lb.ip(&format!("neighbour replace {address} lladdr {mac} dev eth0")).unwrap();
    }
}

/// A segment in a client's name, to the listener behind `vip`.
fn in_name(from: SocketAddr, vip: IpAddr, flags: u8, noise: &mut Noise) -> Forged<'static> {
    let (sequence, acknowledgement) = (noise.number(), noise.number());
    Forged { from, to: SocketAddr::new(vip, PORT), flags, sequence, acknowledgement, payload: b"" }
}

/// Opens connections through both VIPs, on which a byte has passed each way.
fn open(arena: &Arena, count: usize) -> Vec<Pair> {
    let open = |vip| arena.open_and_exchange(vip, count).unwrap();
    arena.cluster.vips().into_iter().flat_map(open).collect()
}

/// A byte passes each way on each.
fn require_alive(pairs: &mut [Pair]) {
    let failed = exchange_all(pairs);
    assert!(
        failed.is_empty(),
        "{} of {} connections do not live: {:#}",
        failed.len(),
        pairs.len(),
        failed[0]
    );
}

/// What an attacker sends after a SYN, without having seen the answer.
struct Story {
    name: &'static str,
    /// Flags, how far the sequence number is from the SYN's, and what is carried, of each segment after the SYN.
    segments: &'static [(u8, u32, &'static [u8])],
}

const STORIES: &[Story] = &[
    // Linux answers the last with a bare ACK, which the backend's proof once was.
    Story {
        name: "an ACK, then data far ahead without ACK",
        segments: &[(flag::ACK, 1, b""), (flag::PSH, 1 << 30, b"forged")],
    },
    Story { name: "data with any ACK", segments: &[(flag::ACK | flag::PSH, 1, b"forged")] },
    Story { name: "a FIN with any ACK", segments: &[(flag::ACK | flag::FIN, 1, b"")] },
    Story {
        name: "data without ACK",
        segments: &[(flag::PSH, 1, b"forged"), (flag::PSH, 1 << 30, b"forged")],
    },
];

/// SYNs alone.
const NO_STORY: Story = Story { name: "nothing", segments: &[] };

/// A handshake of which the attacker sees nothing, step by step for all of them.
fn forge_handshakes(arena: &Arena, vip: IpAddr, from: &[SocketAddr], story: &Story, noise: &mut Noise) {
    let begun: Vec<u32> = from.iter().map(|_| noise.number()).collect();
    let answered = arena.packets("replied").unwrap() + from.len() as u64 / 2;
    for (from, sequence) in from.iter().zip(&begun) {
        let syn = Forged { sequence: *sequence, ..in_name(*from, vip, flag::SYN, noise) };
        arena.attacker.send(&syn).unwrap();
    }
    eventually(MOMENT, "the backends answer", || {
        let replied = arena.packets("replied")?;
        ensure!(replied >= answered, "{replied} replies of {answered}");
        Ok(())
    })
    .unwrap();
    for (flags, ahead, payload) in story.segments {
        for (from, sequence) in from.iter().zip(&begun) {
            let segment = in_name(*from, vip, *flags, noise);
            let sequence = sequence.wrapping_add(*ahead);
            arena.attacker.send(&Forged { sequence, payload, ..segment }).unwrap();
        }
    }
}

#[test]
fn nothing_that_is_blind_makes_an_established_flow() {
    let arena = Arena::start(3, |_| {}).unwrap();
    let mut noise = Noise::new(1);
    for vip in arena.cluster.vips() {
        for (number, story) in STORIES.iter().enumerate() {
            let from = strangers(&arena, vip, 400);
            let from = &from[number * 100..(number + 1) * 100];
            forge_handshakes(&arena, vip, from, story, &mut noise);
        }
    }
    let forged: HashSet<SocketAddr> =
        arena.cluster.vips().into_iter().flat_map(|vip| strangers(&arena, vip, 400)).collect();
    let begin = Instant::now();
    let mut listed = 0;
    while begin.elapsed() < WATCHED {
        let flows = arena.flows_of(&forged.iter().copied().collect::<Vec<_>>()).unwrap();
        listed = flows.len().max(listed);
        for (number, story) in STORIES.iter().enumerate() {
            let is_of = |flow: &&lb_tests::attacks::Flow| {
                usize::from(flow.client.port() - 10_000) / 100 == number && flow.state != "half-open"
            };
            let made = flows.iter().filter(is_of).count();
            assert_eq!(made, 0, "forged flows are more than half-open, by {}", story.name);
        }
        thread::sleep(PAUSE);
    }
    assert!(listed > 0, "the forged SYNs made no flow at all");
}

#[test]
fn a_flood_of_blind_handshakes_leaves_room_for_real_clients() {
    let arena = Arena::start(3, few_slots).unwrap();
    let mut victims = open(&arena, 5);
    let mut noise = Noise::new(2);
    for vip in arena.cluster.vips() {
        give_strangers_a_neighbour(&arena, vip);
        let from = strangers(&arena, vip, 8_000);
        for some in from.chunks(1_000) {
            forge_handshakes(&arena, vip, some, &STORIES[0], &mut noise);
        }
        let connected = arena.connected(vip, 20).unwrap();
        assert_eq!(connected, 20, "of 20 real clients through {vip}");
    }
    require_alive(&mut victims);
}

/// Nobody's connection is gone from the list of flows for so long.
fn watch_listed(arena: &Arena, pairs: &[Pair], time: Duration) {
    let clients: Vec<_> = pairs.iter().map(|pair| pair.from).collect();
    let begin = Instant::now();
    while begin.elapsed() < time {
        let listed = arena.flows_of(&clients).unwrap();
        assert_eq!(listed.len(), clients.len(), "flows listed after {:?}", begin.elapsed());
        thread::sleep(PAUSE * 4);
    }
}

/// RSTs in the name of every backend to every slot.
fn sweep(arena: &Arena, noise: &mut Noise) {
    for vip in arena.cluster.vips() {
        for apiserver in &arena.cluster.apiservers {
            let from = SocketAddr::new(apiserver.host.address(vip).unwrap(), PORT);
            for port in FEW_PORTS {
                let to = SocketAddr::new(vip, port);
                let segment = in_name(from, vip, flag::RST, noise);
                arena.attacker.send(&Forged { to, ..segment }).unwrap();
            }
        }
    }
}

/// A blind RST in the name of each client, and one in the name of its backend.
fn reset_blindly(arena: &Arena, pairs: &[Pair], noise: &mut Noise) {
    for pair in pairs {
        let of_client = in_name(pair.from, pair.to.ip(), flag::RST, noise);
        arena.attacker.send(&of_client).unwrap();
        let of_backend = Forged { from: pair.backend, to: pair.source, ..of_client };
        arena.attacker.send(&Forged { sequence: noise.number(), ..of_backend }).unwrap();
    }
}

#[test]
fn blind_resets_end_no_idle_connection_and_keep_no_client_from_being_told() {
    let mut arena = Arena::start(3, few_slots).unwrap();
    let mut noise = Noise::new(3);
    let mut pairs = open(&arena, 10);
    let swept = open(&arena, 10);
    reset_blindly(&arena, &pairs, &mut noise);
    pairs.extend(swept);
    sweep(&arena, &mut noise);
    watch_listed(&arena, &pairs, BEYOND_A_RESET);
    // And a SYN, where a RST was seen and nothing since.
    for pair in pairs.iter().step_by(2) {
        arena.attacker.send(&in_name(pair.from, pair.to.ip(), flag::SYN, &mut noise)).unwrap();
    }
    // And more new flows than there are slots, which take what seems to be over.
    for vip in arena.cluster.vips() {
        for some in strangers(&arena, vip, 6_000).chunks(1_000) {
            forge_handshakes(&arena, vip, some, &NO_STORY, &mut noise);
        }
    }
    require_alive(&mut pairs);
    reset_blindly(&arena, &pairs, &mut noise);
    arena.cut_off_and_require_told(0, &mut pairs).unwrap();
}

#[test]
fn a_blind_reset_and_a_syn_end_nothing_on_a_backend_that_drains() {
    let arena = Arena::start(3, |_| {}).unwrap();
    let mut noise = Noise::new(4);
    let mut pairs = open(&arena, 12);
    pairs.retain(|pair| pair.at == 0);
    assert!(pairs.len() > 2, "{} connections at api-1", pairs.len());
    let drained = arena.daemon.command("drain").unwrap().args(["api-1", "--all-services"]).output().unwrap();
    assert!(drained.status.success(), "{}", said(&drained));
    let targets: Vec<_> = pairs.iter().map(|pair| (pair.from, pair.to.ip())).collect();
    let (over, (busy, idle)) = (AtomicBool::new(false), pairs.split_at_mut(targets.len() / 2));
    thread::scope(|scope| {
        let talk = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                require_alive(busy);
            }
        });
        for _ in 0..20 {
            for (from, vip) in &targets {
                for flags in [flag::RST, flag::SYN] {
                    arena.attacker.send(&in_name(*from, *vip, flags, &mut noise)).unwrap();
                }
            }
            thread::sleep(PAUSE);
        }
        over.store(true, Ordering::Relaxed);
        talk.join().unwrap();
    });
    require_alive(idle);
    require_alive(&mut pairs);
}

#[test]
fn acks_from_another_mac_do_not_take_the_replies_away() {
    /// How often the server says something.
    const EVENTS: u8 = 40;
    let arena = Arena::start(2, |_| {}).unwrap();
    let mut noise = Noise::new(5);
    let mut pairs = open(&arena, 3);
    for event in 0..EVENTS {
        for pair in &mut pairs {
            // Several a second: a way back is followed at most once in one.
            arena.attacker.send(&in_name(pair.from, pair.to.ip(), flag::ACK, &mut noise)).unwrap();
            pair.server.write_all(&[event]).unwrap();
        }
        thread::sleep(PAUSE * 2);
    }
    for pair in &mut pairs {
        let mut events = [0; EVENTS as usize];
        pair.client.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        let read = pair.client.read_exact(&mut events);
        read.with_context(|| format!("the events for {}: {events:?}", pair.from)).unwrap();
        assert!(events.iter().copied().eq(0..EVENTS), "{events:?}");
    }
    require_alive(&mut pairs);
}

#[test]
fn blind_acks_with_the_clients_mac_keep_no_client_from_being_told() {
    let mut arena = Arena::start(3, |_| {}).unwrap();
    let mut noise = Noise::new(6);
    let mut pairs = open(&arena, 10);
    for _ in 0..3 {
        for pair in &pairs {
            let segment = in_name(pair.from, pair.to.ip(), flag::ACK, &mut noise);
            arena.beside_client.send(&segment).unwrap();
        }
    }
    arena.cut_off_and_require_told(0, &mut pairs).unwrap();
}

#[test]
fn data_forged_in_a_backends_name_does_not_veto_its_death() {
    let mut arena = Arena::start(3, |_| {}).unwrap();
    let mut noise = Noise::new(7);
    let mut pairs = open(&arena, 10);
    let targets: Vec<_> = pairs.iter().map(|pair| (pair.at, pair.backend, pair.source)).collect();
    let backend_mac = mac(&arena.cluster.apiservers[0].host, "eth0").unwrap();
    let attacker = Attacker::new(&arena.attacking, &arena.cluster.lb, "eth0").unwrap();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                for (_, from, to) in targets.iter().filter(|(at, ..)| *at == 0) {
                    for mac in [attacker.mac(), backend_mac] {
                        let segment = in_name(*from, to.ip(), flag::ACK | flag::PSH, &mut noise);
                        let forged = Forged { to: *to, payload: b"alive", ..segment };
                        attacker.send_frame(&attacker.frame(mac, &forged).unwrap()).unwrap();
                    }
                }
                thread::sleep(PAUSE * 10);
            }
        });
        let told = arena.cut_off_and_require_told(0, &mut pairs);
        over.store(true, Ordering::Relaxed);
        told
    })
    .unwrap();
}

#[test]
fn half_open_flows_do_not_keep_real_clients_from_being_told() {
    /// A tenth of a second of resets.
    const RATE: &str = "reset_rate = 50";
    let mut arena = Arena::start(3, |settings| settings.service.push(RATE.to_owned())).unwrap();
    let mut noise = Noise::new(8);
    let mut pairs = open(&arena, 9);
    for vip in arena.cluster.vips() {
        let from = strangers(&arena, vip, 6_000);
        for some in from.chunks(1_000) {
            forge_handshakes(&arena, vip, some, &NO_STORY, &mut noise);
        }
    }
    let backend = pairs.iter().find(|pair| pair.at == 0).unwrap().backend;
    let half_open = flows(&arena.daemon).unwrap();
    let half_open =
        half_open.iter().filter(|flow| flow.state == "half-open" && flow.backend_address == backend);
    let half_open = half_open.count();
    assert!(half_open > 1_000, "only {half_open} half-open flows at {backend}");
    arena.cut_off_and_require_told(0, &mut pairs).unwrap();
}

#[test]
fn unanswered_doubts_do_not_keep_real_clients_from_being_told() {
    /// Questions and resets a second.
    const RATE: &str = "reset_rate = 20";
    let mut arena = Arena::start(3, |settings| settings.service.push(RATE.to_owned())).unwrap();
    let mut noise = Noise::new(9);
    let mut pairs = open(&arena, 9);
    // Ten seconds' questions.
    let mut doubted = open(&arena, 600);
    doubted.retain(|pair| pair.at == 1);
    // It lives, its checks pass, and it hears nothing of these flows: each is asked about until it answers.
    let of_family = |v4: bool| {
        let ports = doubted.iter().filter(|pair| pair.source.is_ipv4() == v4).map(|pair| pair.source.port());
        ports.map(|port| port.to_string()).collect::<Vec<_>>().join(", ")
    };
    let deafen = |protocol: &str, v4: bool| {
        let ports = of_family(v4);
        let these = format!("meta nfproto {protocol} tcp sport {{ {ports} }}");
        let asks = "tcp flags & (fin | syn | rst | ack) == ack";
        format!(
            "add rule inet deaf in {these} {asks} counter name asked; add rule inet deaf in {these} drop; "
        )
    };
    let rules = [
        "add table inet deaf; add counter inet deaf asked; ".to_owned(),
        "add chain inet deaf in { type filter hook prerouting priority -400; }; ".to_owned(),
        deafen("ipv4", true),
        deafen("ipv6", false),
    ];
    arena.cluster.apiservers[1].host.nft(&rules.concat()).unwrap();
    for pair in &doubted {
        arena.attacker.send(&in_name(pair.from, pair.to.ip(), flag::RST, &mut noise)).unwrap();
    }
    let asked = |arena: &Arena| -> Result<usize> {
        let counter = arena.cluster.apiservers[1].host.nft("list counter inet deaf asked")?;
        let mut words = counter.split_whitespace().skip_while(|word| *word != "packets");
        Ok(words.nth(1).context("no count")?.parse()?)
    };
    eventually(MOMENT, "the backend is asked", || {
        let count = asked(&arena)?;
        ensure!(count > 10, "{count} times");
        Ok(())
    })
    .unwrap();
    arena.cut_off_and_require_told(0, &mut pairs).unwrap();
    let count = asked(&arena).unwrap();
    assert!(
        count < 4 * doubted.len(),
        "{count} questions about {} flows: nothing was waiting",
        doubted.len()
    );
}

/// Forges SYN, SYN-ACK and ACK of two flows, one of each family, in the segment of the clients of two arms. Returns how many flows
/// that proved established.
fn established_by_forged_handshakes(arena: &Arena) -> u64 {
    const SYN: u32 = 7_000;
    const SYN_ACK: u32 = 90_000;
    const TRIES: usize = 3;
    let established = || arena.packets("flows_established").unwrap();
    let before = established();
    for vip in arena.cluster.vips() {
        give_strangers_a_neighbour(arena, vip);
        let (from, to) = (strangers(arena, vip, 1)[0], SocketAddr::new(vip, PORT));
        let forged = |from, to, flags, sequence, acknowledgement| {
            let segment = Forged { from, to, flags, sequence, acknowledgement, payload: b"" };
            arena.attacker.send(&segment).unwrap();
        };
        forged(from, to, flag::SYN, SYN, 0);
        let flow = eventually(MOMENT, "a forged SYN's flow is listed", || {
            arena.flows_of(&[from])?.pop().context("not yet")
        })
        .unwrap();
        // The backend answers as well, and again after a second: the last number before the ACK is the one that counts.
        for _ in 0..TRIES {
            let handled_before = handled(arena);
            forged(flow.backend_address, flow.source, flag::SYN | flag::ACK, SYN_ACK, SYN + 1);
            forged(from, to, flag::ACK, SYN + 1, SYN_ACK + 1);
            eventually(MOMENT, "both are handled", || {
                ensure!(handled(arena) >= handled_before + 2);
                Ok(())
            })
            .unwrap();
        }
    }
    established() - before
}

/// Packets that were forwarded, sent back or dropped.
fn handled(arena: &Arena) -> u64 {
    let packets = arena.daemon.status().unwrap().packets;
    ["forwarded", "replied", "dropped_backend_interface"].iter().filter_map(|name| packets.get(*name)).sum()
}

#[test]
fn a_handshake_that_is_forged_whole_beside_the_clients_of_two_arms_proves_nothing() {
    let arena = Arena::start_in(Shape::TwoArm, 2, |_| {}).unwrap();
    let mut pairs = open(&arena, 3);
    assert_eq!(established_by_forged_handshakes(&arena), 0);
    assert_eq!(arena.packets("dropped_backend_interface").unwrap(), 6);
    require_alive(&mut pairs);
    arena.daemon.wait_flag("name the interface in dataplane.backend_interfaces", MOMENT * 3).unwrap();
}

#[test]
fn where_backends_may_answer_by_every_interface_a_forged_handshake_is_believed() {
    let both = "backend_interfaces = [\"eth0\", \"eth1\"]";
    let arena =
        Arena::start_in(Shape::TwoArm, 1, |settings| settings.dataplane.push(both.to_owned())).unwrap();
    assert_eq!(established_by_forged_handshakes(&arena), 2);
    assert_eq!(arena.packets("dropped_backend_interface").unwrap(), 0);
    assert!(arena.packets("backend_neighbour_odd").unwrap() > 0);
}

#[test]
fn a_backend_that_is_reached_by_no_interface_of_the_list_is_refused() {
    for (list, words) in [
        ("[\"eth0\"]", "is reached by eth1, which dataplane.backend_interfaces does not name"),
        ("[\"eth1\", \"lo\"]", "names lo, which sheave is not attached to"),
        ("[\"eth9\"]", "dataplane.backend_interfaces: there is no interface eth9"),
    ] {
        let cluster = Cluster::without_servers(Shape::TwoArm, 1).unwrap();
        let mut settings = cluster.settings().unwrap();
        settings.dataplane.push(format!("backend_interfaces = {list}"));
        let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings).unwrap();
        assert!(!daemon.process().wait(MOMENT).unwrap().success());
        let log = daemon.process().log();
        assert!(log.contains(words), "{list}: {log}");
    }
}

/// What a server's kernel believes of the path to this address.
fn path_mtu(arena: &Arena, server: usize, to: IpAddr) -> Option<u32> {
    let shown = arena.cluster.apiservers[server].host.run(&format!("ip route get {to}")).unwrap();
    let after = shown.split_whitespace().skip_while(|word| *word != "mtu").skip(1);
    after.filter(|word| *word != "lock").find_map(|mtu| mtu.parse().ok())
}

/// The sequence number of the next byte that the server of an open connection will send.
fn next_number(arena: &Arena, pair: &mut Pair) -> u32 {
    let watcher = Attacker::new(&arena.cluster.client, &arena.cluster.lb, "eth0").unwrap();
    pair.exchange().unwrap();
    watcher.next_number(pair.to, pair.from, MOMENT).unwrap()
}

#[test]
fn nobody_narrows_the_path_of_others() {
    let arena = Arena::start(2, |_| {}).unwrap();
    let mut noise = Noise::new(9);
    for vip in arena.cluster.vips() {
        let mut pairs = arena.open_and_exchange(vip, 8).unwrap();
        let client_mac = arena.beside_client.mac();
        let translated = arena.packets("icmp_translated").unwrap();
        for pair in &mut pairs {
            // Nothing is on its way: the number of the next byte, which the client knows, is that of no packet.
            let next = next_number(&arena, pair);
            let guessed = std::iter::repeat_with(|| noise.number()).take(10);
            for sequence in guessed.chain([next]) {
                for mtu in [552, 600, 68, 1_280] {
                    let error =
                        TooBig { reporter: pair.from.ip(), from: pair.to, to: pair.from, sequence, mtu };
                    let frame = arena.beside_client.too_big(client_mac, &error).unwrap();
                    arena.beside_client.send_frame(&frame).unwrap();
                }
            }
        }
        require_alive(&mut pairs);
        for pair in &pairs {
            let mtu = path_mtu(&arena, pair.at, pair.source.ip());
            let translated = arena.packets("icmp_translated").unwrap() - translated;
            assert_eq!(mtu, None, "to {} at api-{}, {translated} translated", pair.source, pair.at + 1);
        }
    }
}

/// Has the client of a connection lose what the server sends, and say that it was too big for paths of these MTUs; afterwards
/// it arrives. Returns the server's path MTU.
fn narrow(arena: &Arena, pair: &mut Pair, mtus: &[u16]) -> Option<u32> {
    let lost = next_number(arena, pair);
    // The client stops to acknowledge, and says that what it does not acknowledge was too big.
    arena.cluster.client.cut_off().unwrap();
    pair.server.write_all(&[b'<'; 100]).unwrap();
    let client_mac = arena.beside_client.mac();
    for &mtu in mtus {
        let error = TooBig { reporter: pair.from.ip(), from: pair.to, to: pair.from, sequence: lost, mtu };
        let frame = arena.beside_client.too_big(client_mac, &error).unwrap();
        arena.beside_client.send_frame(&frame).unwrap();
    }
    arena.cluster.client.reconnect().unwrap();
    let mut rest = [0; 100];
    pair.client.set_read_timeout(Some(MOMENT)).unwrap();
    pair.client.read_exact(&mut rest).unwrap();
    path_mtu(arena, pair.at, pair.source.ip())
}

#[test]
fn the_floor_of_a_path_is_the_configured_one() {
    let floor = |bytes: u16| format!("path_mtu_floor = {bytes}");
    let arena = Arena::start(1, |settings| settings.dataplane.push(floor(1_000))).unwrap();
    // Whatever its own kernel takes for the least.
    arena.cluster.apiservers[0].host.namespace().sysctl("net/ipv4/route/min_pmtu", "68").unwrap();
    let mut pair = arena.open_and_exchange(arena.cluster.vip4, 1).unwrap().pop().unwrap();
    assert_eq!(narrow(&arena, &mut pair, &[600]), Some(1_000));
    for (before, after) in [(1_000, 700), (700, 300)] {
        let file = arena.cluster.daemon_directory().join("sheave.toml");
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, text.replace(&floor(before), &floor(after))).unwrap();
        let reloaded = run(&mut arena.daemon.command("reload").unwrap()).unwrap();
        assert!(reloaded.contains(&format!("path_mtu_floor is {after}, before {before}")), "{reloaded}");
        assert_eq!(narrow(&arena, &mut pair, &[100]), Some(after.into()), "after a reload");
    }
    pair.exchange().unwrap();
}

#[test]
fn a_path_is_never_narrower_than_the_floor() {
    let arena = Arena::start(1, |_| {}).unwrap();
    for (vip, floor) in arena.cluster.vips().into_iter().zip([552, 1_280]) {
        let mut pair = arena.open_and_exchange(vip, 1).unwrap().pop().unwrap();
        let mtu = narrow(&arena, &mut pair, &[1_400, 600, 68]);
        // Believed, as it is about what is on its way.
        assert!(mtu.is_some_and(|mtu| mtu >= floor), "{mtu:?} through {vip}");
        pair.exchange().unwrap();
    }
}

/// In which order the two ends of a connection go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    ClientFirst,
    ServerFirst,
    /// The client has said nothing, and the server's FIN is the first that it says.
    ServerFirstInSilence,
    ClientFirstInSilence,
    /// Each has sent its FIN before it receives the other's.
    Together,
    TogetherInSilence,
    /// The server goes on for a while after the client's FIN.
    HalfClosed,
}

const ORDERS: [Order; 7] = [
    Order::ClientFirst,
    Order::ServerFirst,
    Order::ServerFirstInSilence,
    Order::ClientFirstInSilence,
    Order::Together,
    Order::TogetherInSilence,
    Order::HalfClosed,
];

fn close(arena: &Arena, order: Order, pair: &mut Pair) -> Result<()> {
    match order {
        Order::ClientFirst | Order::ClientFirstInSilence | Order::HalfClosed => {
            pair.close_client()?;
            ensure!(pair.server_told(Instant::now() + MOMENT)? == Ended::Closed);
            if order == Order::HalfClosed {
                pair.server.write_all(b"<<")?;
                pair.client.read_exact(&mut [0; 2])?;
            }
            pair.close_server()?;
            ensure!(pair.client_told(Instant::now() + MOMENT)? == Ended::Closed);
        }
        Order::ServerFirst | Order::ServerFirstInSilence => {
            pair.close_server()?;
            ensure!(pair.client_told(Instant::now() + MOMENT)? == Ended::Closed);
            pair.close_client()?;
            ensure!(pair.server_told(Instant::now() + MOMENT)? == Ended::Closed);
        }
        Order::Together | Order::TogetherInSilence => {
            arena.cluster.client.cut_off()?;
            pair.close_client()?;
            pair.close_server()?;
            arena.cluster.client.reconnect()?;
            ensure!(pair.client_told(Instant::now() + MOMENT)? == Ended::Closed);
            ensure!(pair.server_told(Instant::now() + MOMENT)? == Ended::Closed);
        }
    }
    Ok(())
}

/// How long a half-closed flow rests before its backend is asked: longer than TIME-WAIT. The same with a look through the table and
/// an answer.
const ASKED_AFTER: Duration = Duration::from_secs(66);
const RESTED: Duration = Duration::from_secs(90);

#[test]
fn a_half_closed_flow_ends_when_its_backend_has_forgotten_it_and_no_sooner() {
    let arena = Arena::start(2, |_| {}).unwrap();
    for apiserver in &arena.cluster.apiservers {
        // The kernel forgets a connection whose process has closed it after this many seconds; 60 is the default.
        apiserver.host.namespace().sysctl("net/ipv4/tcp_fin_timeout", "1").unwrap();
    }
    let (mut forgotten, mut open) = (Vec::new(), Vec::new());
    let mut closed = Instant::now();
    for vip in arena.cluster.vips() {
        let [gone, mut by_server, mut by_client] =
            <[Pair; 3]>::try_from(arena.open_and_exchange(vip, 3).unwrap()).unwrap();
        let Pair { mut client, server, from, .. } = gone;
        closed = Instant::now();
        drop(server);
        assert_eq!(client.read(&mut [0]).unwrap(), 0, "the FIN arrives");
        forgotten.push((client, from));
        by_server.close_server().unwrap();
        assert_eq!(by_server.client_told(Instant::now() + MOMENT).unwrap(), Ended::Closed);
        by_client.close_client().unwrap();
        assert_eq!(by_client.server_told(Instant::now() + MOMENT).unwrap(), Ended::Closed);
        open.push((by_server, by_client));
    }
    let clients: Vec<_> = forgotten.iter().map(|(_, from)| *from).collect();
    assert_eq!(arena.flows_of(&clients).unwrap().len(), clients.len());
    eventually(RESTED, "the backends have said that they know these flows no more", || {
        let left = arena.flows_of(&clients)?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .unwrap();
    assert!(closed.elapsed() >= ASKED_AFTER, "asked after {:?}", closed.elapsed());
    let asked = open.iter().flat_map(|(by_server, by_client)| [by_server.from, by_client.from]);
    for client in clients.into_iter().chain(asked) {
        let config = arena.cluster.daemon_directory().join("sheave.toml");
        let mut why = arena.daemon.command("why").unwrap();
        why.arg(client.to_string()).arg("--config").arg(config);
        eventually(MOMENT, "the backend is asked", || {
            let story = run(&mut why)?;
            ensure!(story.contains("one end had closed it"), "{story}");
            Ok(())
        })
        .unwrap();
    }
    // The other backends have said that they know theirs: the end that is open still sends.
    for (mut by_server, mut by_client) in open {
        by_server.client.write_all(b">").unwrap();
        by_server.server.read_exact(&mut [0]).unwrap();
        by_client.server.write_all(b"<").unwrap();
        by_client.client.read_exact(&mut [0]).unwrap();
    }
}

/// A client's host loses power, and its next connection comes from the same port.
#[test]
fn a_client_that_begins_anew_from_its_port_is_told_of_its_backends_death() {
    /// The backend's numbers go on by 4 MiB in 0.3 s, and then do not fit the flow before by chance (RFC 6528 §3).
    const OTHER_NUMBERS: Duration = Duration::from_secs(1);
    let mut arena = Arena::start(3, |_| {}).unwrap();
    let mut lost = Vec::new();
    for vip in arena.cluster.vips() {
        let Pair { client, server, from, .. } = arena.open_and_exchange(vip, 1).unwrap().pop().unwrap();
        // Closed in this mode it says nothing.
        setsockopt(&client, TcpRepair, &1).unwrap();
        drop(client);
        lost.push((vip, from, server));
    }
    thread::sleep(OTHER_NUMBERS);
    let mut pairs: Vec<_> = lost.iter().map(|(vip, from, _)| arena.open_from(*from, *vip).unwrap()).collect();
    require_alive(&mut pairs);
    let clients: Vec<_> = pairs.iter().map(|pair| pair.from).collect();
    let states: Vec<_> = arena.flows_of(&clients).unwrap().into_iter().map(|flow| flow.state).collect();
    assert_eq!(states, ["established", "established"]);
    while let Some(pair) = pairs.pop() {
        let (at, mut told) = (pair.at, vec![pair]);
        told.extend(pairs.extract_if(.., |other| other.at == at));
        arena.cut_off_and_require_told(at, &mut told).unwrap();
    }
}

#[test]
fn a_slot_is_free_after_an_orderly_close_in_any_order() {
    let arena = Arena::start(3, |_| {}).unwrap();
    let mut closed = Vec::new();
    for vip in arena.cluster.vips() {
        for order in ORDERS {
            let silent = [Order::ServerFirstInSilence, Order::ClientFirstInSilence, Order::TogetherInSilence];
            for mut pair in arena.open(vip, 3).unwrap() {
                if !silent.contains(&order) {
                    pair.exchange().unwrap();
                }
                close(&arena, order, &mut pair).with_context(|| format!("{order:?} {}", pair.from)).unwrap();
                closed.push((order, pair.from, pair.at));
            }
        }
    }
    eventually(MOMENT, "no flow is listed that both ends have closed", || {
        let clients: Vec<_> = closed.iter().map(|(_, from, _)| *from).collect();
        let listed = arena.flows_of(&clients)?;
        let orders: Vec<_> = closed
            .iter()
            .filter_map(|(order, from, _)| {
                let flow = listed.iter().find(|flow| flow.client == *from)?;
                Some((*order, from.is_ipv4(), flow.state.clone()))
            })
            .collect();
        ensure!(orders.is_empty(), "{orders:?}");
        Ok(())
    })
    .unwrap();

    // A later connection from the same port is another one, and a backend in maint gets none.
    // Where the client closed first its own port rests.
    closed.retain(|(order, ..)| matches!(order, Order::ServerFirst | Order::ServerFirstInSilence));
    let in_maint = closed[0].2;
    let name = format!("api-{}", in_maint + 1);
    let ordered = arena.daemon.command("maint").unwrap().args([&name, "--all-services"]).output().unwrap();
    assert!(ordered.status.success(), "{}", said(&ordered));
    for (order, from, _) in closed.into_iter().filter(|(.., at)| *at == in_maint) {
        let vip = arena.cluster.vips()[usize::from(from.is_ipv6())];
        let mut pair = arena.open_from(from, vip).unwrap();
        assert_ne!(pair.at, in_maint, "{order:?}: {from} is at a backend in maint");
        pair.exchange().unwrap();
    }
}

#[test]
fn a_start_that_stands_still_ends_no_flow() {
    /// Two frequencies of the kernel's clock are as far apart in the 40 ms of a measurement.
    const STALL: Duration = Duration::from_millis(400);
    /// Of bpf(2), from its start on: until it has attached.
    const CALLS: usize = 160;
    let mut arena = Arena::start(2, |_| {}).unwrap();
    let mut pairs = open(&arena, 10);
    let mut stalled = Vec::new();
    for round in 0..5 {
        arena.daemon.process().kill().unwrap();
        arena.daemon = again(&arena);
        let pid = arena.daemon.process().pid();
        // At one of the times when it reads the clock (all together would make up for each other), and at some other
        // moments, which are others in each round.
        let wanted = |call: Call| call.run == Some(round % 2) || call.number % 100 == 17 * round + 11;
        stalled.extend(stall_calls(pid, CALLS, STALL, wanted).unwrap());
        arena.daemon.wait_ready(2).unwrap();
        watch_listed(&arena, &pairs, WATCHED);
    }
    println!("it stood still after {stalled:?}");
    assert!(stalled.len() >= 5, "it stood still after {stalled:?}");
    require_alive(&mut pairs);
    arena.cluster.require_no_own_resets().unwrap();
}

/// The daemon once more, with the configuration that is there.
fn again(arena: &Arena) -> Daemon {
    let file = arena.cluster.daemon_directory().join("sheave.toml");
    let text = std::fs::read_to_string(file).unwrap();
    let program = arena.cluster.lb.command(lb_tests::daemon::program().unwrap());
    Daemon::start_with(&arena.cluster.lb, arena.cluster.lab.directory(), |_| text, program).unwrap()
}

/// Ten thousand clients in one segment, each with a MAC of its own: every one is answered, though the host does not route.
#[test]
fn ten_thousand_neighbours_are_answered() {
    const CLIENTS: u16 = 10_000;
    const LIMIT: Duration = Duration::from_secs(30);
    let arena = Arena::start(2, |_| {}).unwrap();
    arena.cluster.lb.namespace().sysctl("net/ipv4/ip_forward", "0").unwrap();
    arena.cluster.lb.namespace().sysctl("net/ipv6/conf/all/forwarding", "0").unwrap();
    let mut noise = Noise::new(10);
    for vip in arena.cluster.vips() {
        let neighbour = |number: u16| {
            let [high, low] = number.to_be_bytes();
            [6, 0x77, u8::from(vip.is_ipv6()), 0, high, low]
        };
        let from = strangers(&arena, vip, CLIENTS);
        let syn = |number: u16| in_name(from[usize::from(number)], vip, flag::SYN, &mut noise);
        let syns: Vec<_> = (0..CLIENTS).map(neighbour).zip((0..CLIENTS).map(syn)).collect();
        if let Err(error) = require_neighbours_answered(&arena.attacker, &syns, LIMIT) {
            let mut packets = arena.daemon.status().unwrap().packets;
            packets.retain(|_, count| *count > 0);
            panic!("through {vip}: {error:#}; {packets:?}");
        }
        // And one more, who is real.
        let mut pairs = arena.open_and_exchange(vip, 1).unwrap();
        require_alive(&mut pairs);
    }
}

#[test]
fn floods_of_one_kind_at_a_time_go_unnoticed() {
    /// Frames a second: what two slow cores take in without losing real clients' frames before the data path sees them, so that
    /// what fails is the data path. `sheave-bench attack` sends more.
    const RATE: u32 = 100_000;
    const TIME: Duration = Duration::from_secs(1);
    /// A SYN costs more than another frame: a server's kernel answers it.
    const SYN_RATE: u32 = 50_000;
    /// Until SYNs have taken every slot, and two seconds more.
    const SYN_TIME: Duration = Duration::from_millis(3_500);
    // A machine that is busy with this answers checks late.
    let patient = |settings: &mut Settings| settings.service = vec!["reset_after = \"30s\"".to_owned()];
    let arena = Arena::start(3, patient).unwrap();
    let mut failed = Vec::new();
    for (number, kind) in FloodKind::ALL.into_iter().enumerate() {
        let vip = arena.cluster.vips()[number % 2];
        let mut victims = arena.open_and_exchange(vip, 20).unwrap();
        let (rate, time) = if kind == FloodKind::Syn { (SYN_RATE, SYN_TIME) } else { (RATE, TIME) };
        let flooded = flood(&arena, kind, rate, time, &mut victims).unwrap();
        println!("{flooded}");
        failed.extend(flooded.require_unnoticed().err().map(|error| error.to_string()));
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

/// Bytes in each direction of a transfer: some thousand segments.
const LENGTH: u64 = 2_000_000;

/// Sends the pattern.
fn speak(mut stream: &TcpStream) -> Result<()> {
    stream.set_write_timeout(Some(MOMENT))?;
    let mut position = 0;
    while position < LENGTH {
        let piece = pattern::piece(position, LENGTH - position);
        stream.write_all(&piece)?;
        position += piece.len() as u64;
    }
    Ok(stream.shutdown(Shutdown::Write)?)
}

/// Reads the pattern to its end.
fn listen(stream: &TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(MOMENT))?;
    let position = Checker::default().check_all(stream)?;
    ensure!(position == LENGTH, "{position} bytes of {LENGTH} arrived");
    Ok(())
}

#[test]
fn a_bad_path_changes_no_byte_and_every_close_frees_its_slot() {
    transfer_on_a_bad_path(&[]);
}

#[test]
fn blind_packets_change_no_byte_on_a_bad_path() {
    transfer_on_a_bad_path(&[flag::ACK, flag::SYN, flag::ACK | flag::PSH, flag::RST, flag::ACK | flag::FIN]);
}

/// A client whose frames are lost, doubled and late; each connection carries megabytes both ways and is closed. Meanwhile
/// segments with these flags are forged in its name.
fn transfer_on_a_bad_path(attacks: &[u8]) {
    let arena = Arena::start(3, |_| {}).unwrap();
    let lab = &arena.cluster.lab;
    let (front, beyond) = (arena.cluster.lb.link().unwrap().segment, lab.segment(3).unwrap());
    let (mut far, mut between) = (lab.host("far").unwrap(), lab.host("between").unwrap());
    lab.plug(&mut far, beyond, 7).unwrap();
    lab.plug(&mut between, beyond, 8).unwrap();
    lab.plug(&mut between, front, 8).unwrap();
    // It is in the same subnet, by way of the shuttle.
    far.ip("address flush dev eth0 scope global").unwrap();
    far.ip(&format!("address add {}/24 dev eth0", front.v4(7))).unwrap();
    far.ip(&format!("address add {}/64 dev eth0 nodad", front.v6(7))).unwrap();
    let shuttle = Shuttle::start(&between).unwrap();
    let mut pairs: Vec<Pair> =
        arena.cluster.vips().into_iter().flat_map(|vip| arena.open_on(&far, vip, 3).unwrap()).collect();
    require_alive(&mut pairs);
    let over = AtomicBool::new(false);
    let failed: Vec<_> = thread::scope(|scope| {
        let attack = scope.spawn(|| {
            let mut noise = Noise::new(11);
            while !over.load(Ordering::Relaxed) {
                for flags in attacks {
                    for pair in &pairs {
                        let segment = in_name(pair.from, pair.to.ip(), *flags, &mut noise);
                        arena.beside_client.send(&segment).unwrap();
                    }
                }
                thread::sleep(PAUSE / 10);
            }
        });
        let ends = pairs.iter().flat_map(|pair| [&pair.client, &pair.server]);
        let transfers: Vec<_> =
            ends.flat_map(|end| [scope.spawn(|| speak(end)), scope.spawn(|| listen(end))]).collect();
        let ended: Vec<_> = transfers.into_iter().map(|transfer| transfer.join().unwrap()).collect();
        over.store(true, Ordering::Relaxed);
        attack.join().unwrap();
        ended.into_iter().filter_map(Result::err).collect()
    });
    let harm = shuttle.harm();
    println!("{harm:?}");
    assert!(failed.is_empty(), "{} of {}: {:#}", failed.len(), pairs.len() * 4, failed[0]);
    for harm in [&harm.lost, &harm.doubled, &harm.late] {
        assert!(harm.load(Ordering::Relaxed) > 50, "the path is not bad: {harm:?}");
    }
    let clients: Vec<_> = pairs.iter().map(|pair| pair.from).collect();
    eventually(MOMENT, "no flow is listed that both ends have closed", || {
        let mut listed = arena.flows_of(&clients)?;
        // A SYN that is forged after the backend has ended its flow may begin another, which gets no further.
        listed.retain(|flow| !(attacks.contains(&flag::SYN) && flow.state == "half-open"));
        ensure!(listed.is_empty(), "{listed:?}");
        Ok(())
    })
    .unwrap();
}

/// The shortest `idle_timeout` that there is, and what the daemon needs to see that it is over.
const IDLE: Duration = Duration::from_secs(60 + 15);

fn idle_arena(on_idle: Option<&str>) -> Result<Arena> {
    Arena::start(2, |settings| {
        settings.service.push("idle_timeout = \"1m\"".to_owned());
        settings.service.extend(on_idle.map(|what| format!("on_idle = {what:?}")));
    })
}

/// Waits until flows that are idle for too long are over.
fn wait_unlisted(arena: &Arena, pairs: &[Pair]) -> Result<()> {
    let clients: Vec<_> = pairs.iter().map(|pair| pair.from).collect();
    eventually(IDLE, "the idle flows are forgotten", || {
        let listed = arena.flows_of(&clients)?;
        ensure!(listed.is_empty(), "{} of {}", listed.len(), clients.len());
        Ok(())
    })
}

/// By default.
fn both_ends_are_told() -> Result<()> {
    let arena = idle_arena(None)?;
    let mut pairs = open(&arena, 5);
    // The slots rest for a while: both ends are told so much earlier.
    let deadline = Instant::now() + IDLE + MOMENT;
    for pair in &mut pairs {
        pair.client_told(deadline)?;
        pair.server_told(deadline)?;
    }
    Ok(())
}

/// With `on_idle = "silent"`.
fn neither_end_is_told() -> Result<()> {
    let arena = idle_arena(Some("silent"))?;
    let mut pairs = open(&arena, 5);
    wait_unlisted(&arena, &pairs)?;
    let until = Instant::now() + WATCHED;
    for pair in &mut pairs {
        ensure!(pair.client_told(until).is_err(), "the client {} was told", pair.from);
        ensure!(pair.server_told(until).is_err(), "the server of {} was told", pair.source);
    }
    Ok(())
}

/// Both at the same time: each takes more than a minute.
#[test]
fn an_idle_timeout_is_told_to_both_ends_or_to_neither() {
    let (told, silent) = thread::scope(|scope| {
        let told = scope.spawn(both_ends_are_told);
        let silent = neither_end_is_told();
        (told.join().unwrap(), silent)
    });
    let said = |result: Result<()>| result.err().map(|error| format!("{error:#}"));
    assert_eq!((said(told), said(silent)), (None, None), "by default, and with on_idle = \"silent\"");
}
