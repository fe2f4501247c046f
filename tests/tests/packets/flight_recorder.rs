//! What the program and the daemon write down about flows, for `sheave why`.

use std::{net::SocketAddr, time::Duration};

use lb_common::{
    flight_recorder::{Refusal, ResetReason, Silence},
    meta::{BACKEND_FIN, CLIENT_FIN, Kind, Meta, NUMBERED, SYN_ACK},
    outcome::Outcome,
};
use lb_tests::packets::{ACK, Change, FIN, Flow, Frame, Ip, PSH, RST, Shape, World};
use lb_userspace::dataplane::{Account, Entry, FlowFilter, IdlePolicy, Walk, What};

/// What is written about a client, and not what was before.
fn written(world: &World, client: SocketAddr) -> Vec<Entry> {
    world.dataplane.flight_recorder().read().of(|it| it == client)
}

fn whats(world: &World, client: SocketAddr) -> Vec<What> {
    written(world, client).into_iter().map(|entry| entry.what).collect()
}

fn says(world: &mut World, flow: &Flow, by_client: bool, flags: u8) {
    let frame = if by_client { flow.from_client() } else { flow.from_backend() };
    world.run(&Frame { flags, ..frame }.bytes());
}

/// A word's kind and flags, as a record keeps them.
fn state(kind: Kind, flags: u32) -> Meta {
    Meta::new(kind, 0, 0).with(flags)
}

#[test]
fn a_flow_is_written_down_where_it_begins_and_where_it_ends() {
    for ip in Ip::BOTH {
        for by_client in [true, false] {
            let mut world = World::new(ip);
            let flow = world.establish(ip.client(1));
            for _ in 0..3 {
                says(&mut world, &flow, true, PSH | ACK);
                says(&mut world, &flow, false, ACK);
            }
            says(&mut world, &flow, by_client, FIN | ACK);
            says(&mut world, &flow, by_client, FIN | ACK);
            says(&mut world, &flow, !by_client, FIN | ACK);
            let entries = written(&world, flow.client);
            let whats: Vec<_> = entries.iter().map(|entry| entry.what).collect();
            assert_eq!(whats, [What::Claimed, What::Established, What::Closed { by_client }]);
            for entry in entries {
                assert_eq!((entry.listener, entry.backend), (1, flow.backend));
                assert_eq!(entry.slot, Some((0, flow.snat.port())));
            }
        }
    }
}

#[test]
fn a_rst_is_written_down_with_who_sent_it_and_what_it_ended() {
    for ip in Ip::BOTH {
        for by_client in [true, false] {
            let mut world = World::new(ip);
            let flow = world.establish(ip.client(1));
            says(&mut world, &flow, by_client, RST | ACK);
            says(&mut world, &flow, by_client, RST | ACK);
            let before = state(Kind::Established, NUMBERED);
            assert_eq!(whats(&world, flow.client)[2..], [What::Reset { by_client, before }]);
        }
        let mut world = World::new(ip);
        let flow = world.open(ip.client(1), ip.listener());
        says(&mut world, &flow, true, RST);
        let gave_up = What::Reset { by_client: true, before: state(Kind::HalfOpen, 0) };
        assert_eq!(whats(&world, flow.client), [What::Claimed, gave_up]);
    }
}

#[test]
fn a_second_chance_says_who_refused_and_who_is_next() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let first = world.open(ip.client(1), ip.listener());
        says(&mut world, &first, false, RST | ACK);
        let second = world.open(first.client, first.listener);
        says(&mut world, &second, false, RST | ACK);
        let entries = written(&world, first.client);
        let expected = [
            (first.backend, What::Claimed),
            (first.backend, What::SecondChance { next: second.backend }),
            (second.backend, What::RefusedByBackend),
        ];
        assert_eq!(entries.iter().map(|it| (it.backend, it.what)).collect::<Vec<_>>(), expected);
    }
}

#[test]
fn a_syn_that_leaves_a_backend_says_where_to() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.open(ip.client(1), ip.listener());
        let others: Vec<_> = (1..=3).filter(|id| *id != flow.backend).collect();
        world.select(0, &others);
        let moved = world.open(flow.client, flow.listener);
        world.open(flow.client, flow.listener);
        assert_eq!(whats(&world, flow.client), [What::Claimed, What::Moved { next: moved.backend }]);
    }
}

#[test]
fn a_refusal_says_why() {
    for ip in Ip::BOTH {
        let mut world = World::build(&Shape { snat_ports: 2048..=2051, backends: 2, ..Shape::new(ip) });
        let mut clients = (1..).map(|number| ip.client(number));
        let mut refused = |world: &mut World, outcome: Outcome| {
            let client = clients.next().unwrap();
            assert_eq!(world.run(&Frame::syn(client, ip.listener()).bytes()).outcome, outcome);
            let entries = written(world, client);
            (entries.last().unwrap().what, entries.last().unwrap().slot)
        };
        world.dataplane.set_next_hop(1, None);
        world.dataplane.set_next_hop(2, None);
        let (what, slot) = refused(&mut world, Outcome::NextHopUnknown);
        assert_eq!(what, What::Refused(Refusal::NoNextHop));
        assert!(slot.is_some(), "the flow has begun");
        for _ in 0..3 {
            refused(&mut world, Outcome::NextHopUnknown);
        }
        let full = refused(&mut world, Outcome::TableFull);
        assert_eq!(full, (What::Refused(Refusal::TableFull), None));
        world.select(0, &[]);
        let nobody = refused(&mut world, Outcome::RefusedNoBackend);
        assert_eq!(nobody, (What::Refused(Refusal::NoBackend), None));
        world.dataplane.set_allowed(0, &["192.0.2.0/24".parse().unwrap()]).unwrap();
        let stranger = refused(&mut world, Outcome::RefusedNotAllowed);
        assert_eq!(stranger, (What::Refused(Refusal::NotAllowed), None));
    }
}

#[test]
fn only_syns_are_worth_a_record_when_there_is_no_way() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        (1..=3).for_each(|id| world.dataplane.set_next_hop(id, None));
        let before = whats(&world, flow.client);
        for _ in 0..5 {
            assert_eq!(world.run(&flow.from_client().bytes()).outcome, Outcome::NextHopUnknown);
        }
        assert_eq!(whats(&world, flow.client), before);
    }
}

#[test]
fn whoever_loses_its_slot_to_another_is_written_down_before_the_other_has_it() {
    for ip in Ip::BOTH {
        for (kind, flags) in
            [(Kind::HalfOpen, 0), (Kind::HalfOpen, SYN_ACK), (Kind::HalfOpen, SYN_ACK | NUMBERED)]
        {
            let mut world = World::build(&Shape { snat_ports: 2048..=2051, backends: 2, ..Shape::new(ip) });
            let flows: Vec<_> = (1..=4).map(|number| world.open(ip.client(number), ip.listener())).collect();
            for slot in world.slots() {
                let old = Meta::new(kind, slot.meta.backend(), slot.meta.seen()).with(flags);
                world.change(&slot, Change::Word(old));
                world.change(&slot, Change::Older(30));
                world.change(&slot, Change::ClaimedBefore(10_000));
            }
            let heir = world.open(ip.client(99), ip.listener());
            let loser = flows.iter().find(|flow| flow.snat == heir.snat).unwrap();
            let entries = written(&world, loser.client);
            let [_, lost] = &entries[..] else { panic!("{entries:?}") };
            assert_eq!(lost.what, What::Reclaimed { before: state(kind, flags) });
            assert_eq!((lost.backend, lost.slot), (loser.backend, Some((0, loser.snat.port()))));
            assert_eq!(whats(&world, heir.client), [What::Claimed]);
        }
        // A flow that was over has nothing to lose.
        let mut world = World::build(&Shape { snat_ports: 2048..=2051, backends: 2, ..Shape::new(ip) });
        let flows: Vec<_> = (1..=4).map(|number| world.open(ip.client(number), ip.listener())).collect();
        for slot in world.slots() {
            let closed = Meta::new(Kind::ClosedByBackend, slot.meta.backend(), slot.meta.seen());
            world.change(&slot, Change::Word(closed.with(CLIENT_FIN | BACKEND_FIN)));
        }
        world.open(ip.client(99), ip.listener());
        assert!(flows.iter().all(|flow| whats(&world, flow.client) == [What::Claimed]));
    }
}

#[test]
fn the_same_client_port_again_is_another_claim() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        says(&mut world, &flow, true, FIN | ACK);
        says(&mut world, &flow, false, FIN | ACK);
        world.run(&flow.last_ack().bytes());
        world.open(flow.client, flow.listener);
        let before = [What::Claimed, What::Established, What::Closed { by_client: true }];
        assert_eq!(whats(&world, flow.client), before, "its backend may still have the flow before");
        world.run(&flow.syn_ack().bytes());
        let expected = [What::Claimed, What::Established, What::Closed { by_client: true }, What::Claimed];
        assert_eq!(whats(&world, flow.client), expected);
    }
}

#[test]
fn the_daemon_writes_down_what_it_does_to_flows_and_why() {
    for ip in Ip::BOTH {
        let mut world = World::build(&Shape { backends: 1, ..Shape::new(ip) });
        let flow = world.establish(ip.client(1));
        let filter = FlowFilter::of_backend(1);
        let asked = world.dataplane.flows_to_ask(&filter, &mut Walk::default(), usize::MAX);
        world.dataplane.write_down(&asked, Account::Asked(ResetReason::Returned)).unwrap();
        let killed = world.dataplane.kill_flows(&filter, &mut Walk::default(), usize::MAX).unwrap();
        world.dataplane.write_down(&killed, Account::Dead(Silence::Connect, 7)).unwrap();
        let entries = written(&world, flow.client);
        let dead = What::Killed { reason: ResetReason::Dead, silence: Some(Silence::Connect), seconds: 7 };
        let whats: Vec<_> = entries.iter().map(|entry| entry.what).collect();
        assert_eq!(whats, [What::Claimed, What::Established, What::Asked(ResetReason::Returned), dead]);
        assert!(entries.iter().all(|it| it.backend == 1 && it.slot == Some((0, flow.snat.port()))));
        assert!(entries.is_sorted_by_key(|it| it.jiffies));
        // What the program answers then is no news.
        says(&mut world, &flow, true, ACK);
        assert_eq!(written(&world, flow.client).len(), 4);
    }
}

#[test]
fn a_flow_that_is_forgotten_is_written_down_once_and_a_closed_one_is_not() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let begun = world.open(ip.client(1), ip.listener());
        let idle = world.establish(ip.client(2));
        let over = world.establish(ip.client(3));
        says(&mut world, &over, true, RST | ACK);
        for flow in [begun, idle, over] {
            world.change(&world.taken(&flow), Change::Older(3000));
        }
        for _ in 0..2 {
            world.dataplane.reap(&[IdlePolicy { timeout: Duration::from_secs(600), tell: false }]).unwrap();
        }
        let last = |client| *whats(&world, client).last().unwrap();
        assert_eq!(last(begun.client), What::Forgotten { before: state(Kind::HalfOpen, 0) });
        let established = state(Kind::Established, NUMBERED);
        assert_eq!(last(idle.client), What::Forgotten { before: established });
        assert_eq!((whats(&world, begun.client).len(), whats(&world, idle.client).len()), (2, 3));
        assert_eq!(last(over.client), What::Reset { by_client: true, before: established });
    }
}

#[test]
fn the_box_forgets_the_oldest_and_goes_on() {
    let mut world = World::build(&Shape { backends: 1, ..Shape::new(Ip::V4) });
    world.select(0, &[]);
    let syn = Frame::syn(Ip::V4.client(1), Ip::V4.listener()).bytes();
    let processor = world.processor();
    let places = lb_common::flight_recorder::RECORDS_MAX as usize;
    for _ in 0..places {
        processor.run(&syn);
    }
    let last = Ip::V4.client(2);
    for _ in 0..10 {
        processor.run(&Frame::syn(last, Ip::V4.listener()).bytes());
    }
    let rings = world.dataplane.flight_recorder().read();
    let count = rings.of(|_| true).len();
    assert!((places / 2..=rings.capacity()).contains(&count), "{count} records");
    assert_eq!(rings.of(|client| client == last).len(), 10);
}
