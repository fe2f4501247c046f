//! Which slot a new flow gets, and that it finds it again.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use lb_common::{
    flow::{Family, V4, V6},
    meta::{Kind, Meta, NUMBERED, RESET, SYN_ACK},
    outcome::{Event, Outcome},
};
use lb_tests::packets::{Change, Exchange, Flow, Frame, Ip, Shape, World};
use lb_userspace::dataplane::Tables;

/// One set of four slots, from this port on.
const ONE_SET: u16 = 2048;

fn one_set(ip: Ip) -> Shape {
    Shape { snat_ports: ONE_SET..=ONE_SET + 3, backends: 2, ..Shape::new(ip) }
}

/// What a slot of the set is before a new flow of backend 1 comes.
#[derive(Clone, Copy, Debug)]
enum Slot {
    Free,
    /// Kind, flags, backend, age.
    Is(Kind, u32, u8, u16),
}

use Kind::{ClosedByBackend, ClosedByClient, Established, HalfOpen};
use Slot::{Free, Is};

const LIVE: Slot = Is(Established, 0, 1, 0);

/// Why, the set, which of the four is taken, and what that is counted as.
type Choice = (&'static str, [Slot; 4], Option<usize>, Option<Event>);

// Ages are one off the limits where time may pass during the test.
const CHOICES: [Choice; 12] = [
    ("a free slot before a resting one", [Is(ClosedByBackend, 0, 1, 30), LIVE, Free, LIVE], Some(2), None),
    (
        "a minute's rest after the backend closed first",
        [Is(ClosedByBackend, 0, 1, 58), Is(ClosedByBackend, 0, 1, 60), LIVE, LIVE],
        Some(1),
        None,
    ),
    (
        "two seconds' rest after the client closed first",
        [Is(ClosedByClient, 0, 1, 0), Is(ClosedByClient, 0, 1, 2), LIVE, LIVE],
        Some(1),
        None,
    ),
    (
        "a resting slot of another backend before one's own",
        [Is(ClosedByBackend, 0, 1, 50), Is(ClosedByBackend, 0, 2, 3), LIVE, LIVE],
        Some(1),
        None,
    ),
    (
        "the one that has rested longest, if all must rest",
        [Is(ClosedByBackend, 0, 1, 3), Is(ClosedByBackend, 0, 1, 50), Is(ClosedByBackend, 0, 1, 20), LIVE],
        Some(1),
        Some(Event::ReusedEarly),
    ),
    (
        "a resting slot",
        [Is(Established, RESET, 1, 3000), Is(ClosedByBackend, 0, 1, 3), LIVE, LIVE],
        Some(1),
        Some(Event::ReusedEarly),
    ),
    (
        "a handshake, but no flow that a RST was seen of",
        [Is(Established, RESET, 1, 3000), Is(HalfOpen, SYN_ACK | NUMBERED, 1, 30), LIVE, LIVE],
        Some(1),
        Some(Event::HalfOpenReclaimed),
    ),
    (
        "the oldest of the handshakes",
        [
            Is(HalfOpen, SYN_ACK | NUMBERED, 1, 5),
            Is(HalfOpen, SYN_ACK | NUMBERED, 1, 9),
            Is(HalfOpen, SYN_ACK | NUMBERED, 1, 7),
            LIVE,
        ],
        Some(1),
        Some(Event::HalfOpenReclaimed),
    ),
    ("never a handshake that was just answered", [Is(HalfOpen, SYN_ACK, 1, 0), LIVE, LIVE, LIVE], None, None),
    ("never a flow that somebody is killing", [Is(Kind::Killed, 0, 1, 9000), LIVE, LIVE, LIVE], None, None),
    ("never a claim in progress", [Is(Kind::Claiming, 0, 1, 0), LIVE, LIVE, LIVE], None, None),
    ("never an established flow, however idle", [Is(Established, 0, 1, 20_000); 4], None, None),
];

#[test]
fn a_new_flow_takes_the_slot_that_is_missed_least() {
    for ip in Ip::BOTH {
        let mut world = World::build(&one_set(ip));
        world.select(0, &[1]);
        for (why, set, expected, event) in CHOICES {
            let exchange = choose(&mut world, set);
            match expected {
                Some(way) => {
                    assert_eq!(exchange.outcome, Outcome::Forwarded, "{why}");
                    assert_eq!(exchange.seen().source.port(), ONE_SET + way as u16, "{why}");
                    let events: Vec<_> = event.into_iter().chain([Event::FlowClaimed]).collect();
                    assert_eq!(sorted(exchange.events), sorted(events), "{why}");
                }
                None => assert_eq!(exchange.outcome, Outcome::TableFull, "{why}"),
            }
        }
    }
}

/// Gives the four slots of the set these words, and sends a SYN of yet another client.
fn choose(world: &mut World, set: [Slot; 4]) -> Exchange {
    for slot in world.slots() {
        world.change(&slot, Change::Word(Meta::FREE));
    }
    for number in 0..4 {
        world.open(world.ip.client(number), world.ip.listener());
    }
    for slot in world.slots() {
        let word = match set[usize::from(slot.port - ONE_SET)] {
            Free => Meta::FREE,
            Is(kind, flags, backend, age) => {
                Meta::new(kind, backend, slot.meta.seen().wrapping_sub(age)).with(flags)
            }
        };
        world.change(&slot, Change::Word(word));
    }
    world.run(&Frame::syn(world.ip.client(99), world.ip.listener()).bytes())
}

fn sorted(mut events: Vec<Event>) -> Vec<Event> {
    events.sort_unstable_by_key(|event| *event as u8);
    events
}

#[test]
fn a_handshake_has_two_hundred_milliseconds_before_its_slot_is_taken() {
    for ip in Ip::BOTH {
        let mut world = World::build(&one_set(ip));
        let begun = Instant::now();
        let flows: Vec<_> = (0..4).map(|number| world.open(ip.client(number), ip.listener())).collect();
        let syn = Frame::syn(ip.client(99), ip.listener()).bytes();
        let exchange = loop {
            let exchange = world.run(&syn);
            if exchange.outcome != Outcome::TableFull {
                break exchange;
            }
            assert!(begun.elapsed() < Duration::from_secs(10), "never reclaimed");
            std::thread::sleep(Duration::from_millis(5));
        };
        // Less the tick that had begun when the first was claimed.
        assert!(begun.elapsed() >= Duration::from_millis(190), "{:?}", begun.elapsed());
        assert_eq!(sorted(exchange.events.clone()), [Event::FlowClaimed, Event::HalfOpenReclaimed]);
        let taken = world.flow(ip.client(99), ip.listener(), &exchange);
        let loser = flows.iter().find(|flow| flow.snat == taken.snat).unwrap();
        assert_eq!(world.run(&loser.from_client().bytes()).outcome, Outcome::NoFlow);
        for flow in flows.iter().filter(|flow| *flow != loser) {
            assert_eq!(world.run(&flow.from_client().bytes()).outcome, Outcome::Forwarded);
        }
    }
}

#[test]
fn a_full_table_drops_new_flows_and_keeps_the_old() {
    for ip in Ip::BOTH {
        let mut world = World::build(&one_set(ip));
        let flows: Vec<_> = (0..4).map(|number| world.establish(ip.client(number))).collect();
        for number in 4..40 {
            let exchange = world.run(&Frame::syn(ip.client(number), ip.listener()).bytes());
            assert_eq!((exchange.outcome, exchange.events), (Outcome::TableFull, vec![]));
        }
        for flow in &flows {
            assert_eq!(world.run(&flow.from_client().bytes()).seen().source, flow.snat);
            assert_eq!(world.run(&flow.from_backend().bytes()).seen().destination, flow.client);
        }
    }
}

#[test]
fn a_clients_port_is_reused_in_its_own_slot() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let first = world.establish(ip.client(1));
        for _ in 0..20 {
            world.run(&Frame { flags: super::states::FIN_ACK, ..first.from_client() }.bytes());
            world.run(&Frame { flags: super::states::FIN_ACK, ..first.from_backend() }.bytes());
            world.run(&first.last_ack().bytes());
            assert_eq!(world.establish(first.client), first);
        }
        assert_eq!(world.slots().len(), 1);
    }
}

/// Sixteen sets: full enough, flows have to go beyond their first two candidates.
fn sixteen_sets(ip: Ip) -> World {
    World::build(&Shape { snat_ports: 2048..=2048 + 63, ..Shape::new(ip) })
}

fn marks(world: &mut World) -> usize {
    fn count<F: Family>(tables: &Tables) -> usize {
        let mark = |(index, set)| F::overflow(tables, set, index);
        tables.first::<F>(tables.sets::<F>()).filter_map(mark).filter(|mark| mark.load() != 0).count()
    }
    let tables = world.dataplane.tables();
    if world.ip == Ip::V4 { count::<V4>(tables) } else { count::<V6>(tables) }
}

/// A SYN for each of many clients; those that found a slot.
fn fill(world: &mut World, clients: std::ops::Range<u32>) -> Vec<Flow> {
    let (ip, listener) = (world.ip, world.ip.listener());
    clients
        .filter_map(|number| {
            let exchange = world.run(&Frame::syn(ip.client(number), listener).bytes());
            match exchange.outcome {
                Outcome::TableFull => None,
                _ => Some(world.flow(ip.client(number), listener, &exchange)),
            }
        })
        .collect()
}

/// The same in a small table, where none is to lose its slot to another: a half-open flow may after 200 ms, and an emulated
/// processor takes that long.
fn fill_for_good(world: &mut World, clients: std::ops::Range<u32>) -> Vec<Flow> {
    let mut flows = Vec::new();
    for number in clients {
        flows.extend(fill(world, number..number + 1));
        for slot in world.slots() {
            world.change(&slot, Change::Word(slot.meta.become_kind(Kind::Established)));
        }
    }
    flows
}

fn assert_found(world: &mut World, flows: &[Flow]) {
    for flow in flows {
        let exchange = world.run(&flow.from_client().bytes());
        assert_eq!(exchange.outcome, Outcome::Forwarded, "{flow:?}");
        assert_eq!(exchange.seen().source, flow.snat);
        let exchange = world.run(&flow.from_backend().bytes());
        assert_eq!(exchange.seen().destination, flow.client);
    }
}

#[test]
fn a_flow_beyond_its_first_candidates_is_found_before_and_after_marks_are_cleared() {
    for ip in Ip::BOTH {
        let mut world = sixteen_sets(ip);
        let flows = fill_for_good(&mut world, 0..60);
        let set = marks(&mut world);
        assert!(set > 0, "60 flows in 64 slots, and none had to go further");
        assert_found(&mut world, &flows);
        // No copy of any of them, wherever the look-up begins.
        for flow in &flows {
            let exchange = world.run(&Frame::syn(flow.client, flow.listener).bytes());
            assert_eq!((exchange.outcome, exchange.events), (Outcome::Forwarded, vec![]));
        }
        world.dataplane.clear_marks().unwrap();
        assert!(marks(&mut world) > 0, "what is needed stays");
        assert_found(&mut world, &flows);

        for slot in world.slots() {
            world.change(&slot, Change::Word(Meta::FREE));
        }
        world.dataplane.clear_marks().unwrap();
        assert_eq!(marks(&mut world), 0);
        let flows = fill_for_good(&mut world, 100..160);
        assert_found(&mut world, &flows);
    }
}

#[test]
fn a_thousand_flows_have_a_thousand_slots() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flows = fill(&mut world, 0..1000);
        assert_eq!(flows.len(), 1000);
        let mut slots: Vec<_> = world.slots().iter().map(|slot| slot.port).collect();
        slots.dedup();
        assert_eq!(slots.len(), 1000);
        assert!(slots.iter().all(|port| *port >= 1024));
        assert_found(&mut world, &flows[..100]);
    }
}

/// Two CPUs work on the same SYN: at most one slot, and at least one of the copies may be dropped.
#[test]
fn two_copies_of_a_syn_at_the_same_time_never_get_two_slots() {
    const SYNS: u32 = 3000;
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let syns: Vec<_> =
            (0..SYNS).map(|number| Frame::syn(ip.client(number), ip.listener()).bytes()).collect();
        let processors = [world.processor(), world.processor()];
        let ready = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for processor in &processors {
                scope.spawn(|| {
                    for (number, syn) in (1..).zip(&syns) {
                        ready.fetch_add(1, Ordering::SeqCst);
                        while ready.load(Ordering::SeqCst) < 2 * number {
                            std::hint::spin_loop();
                        }
                        processor.run(syn);
                    }
                });
            }
        });
        let races = world.forget_counts(Outcome::SynRace);
        println!("{ip:?}: {races} of {SYNS} met their copy");
        let mut clients: Vec<_> = world.slots().iter().map(|slot| slot.client).collect();
        let slots = clients.len();
        clients.sort_unstable();
        clients.dedup();
        assert_eq!(clients.len(), slots, "a client with two slots");
        assert!(slots as u64 + races >= u64::from(SYNS));
        assert!(
            world.slots().iter().all(|slot| slot.meta.is(Kind::HalfOpen)),
            "nothing half-claimed is left"
        );
    }
}
