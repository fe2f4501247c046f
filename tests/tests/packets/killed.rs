//! A flow that was reset on purpose: what both of its sides hear, and who may have its slot.

use std::{collections::BTreeSet, time::Duration};

use lb_common::{
    kill::KILLED_REST,
    meta::{BACKEND_TOLD, Kind},
    outcome::{Event, Outcome},
};
use lb_tests::packets::{
    ACK, BACKEND_START, Change, FIN, Flow, Frame, Inside, Ip, LB_MAC, PSH, ROUTER_MAC, RST, SYN, Shape,
    World, backend_mac,
};
use lb_userspace::dataplane::{FlowFilter, IdlePolicy, Walk};

/// An established flow that was reset.
fn killed(world: &mut World, client: u32) -> Flow {
    let flow = world.establish(world.ip.client(client));
    assert_eq!(world.kill(&flow), 1);
    assert!(world.taken(&flow).meta.is_untold());
    flow
}

fn segment(flags: u8, sequence: u32, acknowledgement: u32) -> Inside {
    Inside::Tcp { flags, sequence, acknowledgement, options: Vec::new(), payload: Vec::new() }
}

/// What a segment is answered with (RFC 9293 §3.10.7.1).
fn answer(asked: &Frame) -> Inside {
    if asked.flags & ACK != 0 {
        return segment(RST, asked.acknowledgement, 0);
    }
    let length =
        asked.payload.len() as u32 + u32::from(asked.flags & FIN != 0) + u32::from(asked.flags & SYN != 0);
    segment(RST | ACK, 0, asked.sequence.wrapping_add(length))
}

#[test]
fn both_sides_are_answered_with_the_rst_that_they_believe() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = killed(&mut world, 1);
        for flags in [ACK, PSH | ACK, FIN | ACK, SYN | ACK, 0, PSH, FIN] {
            for payload in [vec![], b"{\"kind\":\"Status\"}".to_vec(), vec![1; 1400]] {
                let said = Frame {
                    flags,
                    payload: payload.clone(),
                    sequence: 0xffff_fff0,
                    acknowledgement: 0x8000_0001,
                    ..flow.from_client()
                };
                let exchange = world.run(&said.bytes());
                assert_eq!((exchange.outcome, exchange.service), (Outcome::ResetClient, Some(0)));
                assert!(!exchange.redirected);
                assert_eq!(exchange.bytes.len(), 14 + ip.header() + 20, "nothing behind the header");
                let seen = exchange.seen();
                assert_eq!((seen.source, seen.destination), (flow.listener, flow.client));
                assert_eq!((seen.macs, seen.ttl), ((LB_MAC, ROUTER_MAC), 64));
                assert_eq!(seen.inside, answer(&said), "{flags:#07b}");

                let said = Frame { flags, payload, ..flow.from_backend() };
                let exchange = world.run(&said.bytes());
                assert_eq!((exchange.outcome, exchange.service), (Outcome::ResetBackend, Some(0)));
                let seen = exchange.seen();
                assert_eq!((seen.source, seen.destination), (flow.snat, world.ip.backend(flow.backend)));
                assert_eq!(seen.macs, (LB_MAC, backend_mac(flow.backend)));
                assert_eq!(seen.inside, answer(&said), "{flags:#07b}");
            }
        }
        assert!(world.taken(&flow).meta.is(Kind::Killed), "and stays what it is");
    }
}

#[test]
fn a_rst_is_never_answered_but_sent_on() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = killed(&mut world, 1);
        for flags in [RST, RST | ACK] {
            let said = Frame { flags, ..flow.from_client() };
            let exchange = world.run(&said.bytes());
            assert_eq!((exchange.outcome, exchange.seen().flags()), (Outcome::Forwarded, flags));
        }
        assert!(world.taken(&flow).meta.is_untold(), "a client's RST may be forged: it proves nothing");
        let forged = Frame { flags: RST, sequence: 0xdead_beef, ..flow.from_backend() };
        assert_eq!(world.run(&forged.bytes()).outcome, Outcome::Replied);
        assert!(world.taken(&flow).meta.is_untold(), "nor does one in the backend's name");
        for flags in [RST, RST | ACK] {
            let said = Frame { flags, ..flow.from_backend() };
            let exchange = world.run(&said.bytes());
            assert_eq!((exchange.outcome, exchange.seen().flags()), (Outcome::Replied, flags));
        }
        assert!(world.taken(&flow).meta.has(BACKEND_TOLD), "the backend has forgotten it");
    }
}

#[test]
fn what_a_client_acknowledges_last_is_what_a_repeated_rst_needs() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        let said = Frame { flags: PSH | ACK, payload: vec![1; 100], ..flow.from_backend() };
        world.run(&said.bytes());
        assert_eq!(world.kill(&flow), 1);
        let acknowledged = BACKEND_START + 101;
        for acknowledgement in [acknowledged, 4711] {
            let exchange = world.run(&Frame { acknowledgement, ..flow.from_client() }.bytes());
            assert_eq!(exchange.outcome, Outcome::ResetClient);
            assert_eq!(world.taken(&flow).sequence.unacknowledged, acknowledged, "and a forged one does not");
        }
    }
}

#[test]
fn the_same_client_begins_anew_and_not_at_a_backend_that_may_hold_on_to_the_old_flow() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = killed(&mut world, 1);
        let syn = Frame::syn(flow.client, flow.listener);
        let exchange = world.run(&syn.bytes());
        assert_eq!((exchange.outcome, &exchange.events[..]), (Outcome::Forwarded, &[Event::FlowClaimed][..]));
        let again = world.flow(flow.client, flow.listener, &exchange);
        assert_eq!(again.snat, flow.snat, "in the same slot");
        assert_ne!(again.backend, flow.backend);
        world.prove(&again);
        assert_eq!(world.slots().len(), 1);

        // A backend that was told may have it again.
        let flow = again;
        assert_eq!(world.kill(&flow), 1);
        world.run(&flow.from_backend().bytes());
        assert!(world.taken(&flow).meta.has(BACKEND_TOLD));
        world.select(0, &[flow.backend]);
        let exchange = world.run(&syn.bytes());
        assert_eq!(world.flow(flow.client, flow.listener, &exchange), flow);
        world.prove(&flow);

        // And so may one that is the only one: a second lost is better than no service.
        assert_eq!(world.kill(&flow), 1);
        let exchange = world.run(&syn.bytes());
        assert_eq!(world.flow(flow.client, flow.listener, &exchange), flow);

        // Without any, it is refused.
        world.prove(&flow);
        assert_eq!(world.kill(&flow), 1);
        world.select(0, &[]);
        let exchange = world.run(&syn.bytes());
        assert_eq!((exchange.outcome, exchange.seen().flags()), (Outcome::RefusedNoBackend, RST | ACK));
    }
}

/// A table so small that every slot is somebody's.
fn full(ip: Ip, backends: u8) -> (World, Vec<Flow>) {
    let shape = Shape { snat_ports: 1024..=1151, backends, ..Shape::new(ip) };
    let mut world = World::build(&shape);
    let mut flows = Vec::new();
    // A client need not have every slot among its candidates.
    for number in 0..1000 {
        let exchange = world.run(&Frame::syn(ip.client(number), ip.listener()).bytes());
        if exchange.outcome == Outcome::TableFull {
            continue;
        }
        let flow = world.flow(ip.client(number), ip.listener(), &exchange);
        world.prove(&flow);
        flows.push(flow);
    }
    assert_eq!(flows.len(), 128, "one for each port");
    (world, flows)
}

#[test]
fn another_flow_may_have_the_slot_when_its_client_has_had_its_time_but_not_toward_the_same_backend() {
    for ip in Ip::BOTH {
        let (mut world, flows) = full(ip, 1);
        let flow = flows[17];
        assert_eq!(world.kill(&flow), 1);
        let mut numbers = 5000..;
        let mut has_room = |world: &mut World| {
            numbers.by_ref().take(100).any(|number| {
                world.run(&Frame::syn(ip.client(number), ip.listener()).bytes()).outcome == Outcome::Forwarded
            })
        };
        assert!(!has_room(&mut world), "the client is still being told");
        world.change(&world.taken(&flow), Change::Older(KILLED_REST + 1));
        assert!(!has_room(&mut world), "the backend may hold on to the flow");
        world.run(&flow.from_backend().bytes());
        assert!(has_room(&mut world), "now it does not");

        // Toward another backend nothing stands in the way.
        let (mut world, flows) = full(ip, 2);
        let flow = flows[17];
        assert_eq!(world.kill(&flow), 1);
        world.change(&world.taken(&flow), Change::Older(KILLED_REST + 1));
        world.select(0, &[3 - flow.backend]);
        assert!(has_room(&mut world));
    }
}

#[test]
fn what_cannot_be_answered_is_dropped_under_its_own_name() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = killed(&mut world, 1);
        for said in [flow.from_client(), flow.from_backend()] {
            assert_eq!(world.run(&Frame { ttl: 1, ..said }.bytes()).outcome, Outcome::TtlExpired);
        }
    }
}

#[test]
fn a_backends_payload_is_a_sign_of_life_and_its_acknowledgement_is_not() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.open(ip.client(1), ip.listener());
        let heard = |world: &mut World| world.dataplane.heard().unwrap()[usize::from(flow.backend)];
        world.prove(&flow);
        world.run(&flow.from_client().bytes());
        let event = Frame { flags: PSH | ACK, payload: b"event".to_vec(), ..flow.from_backend() };
        world.run(&Frame { sequence: BACKEND_START + 2, ..event.clone() }.bytes());
        world.run(&Frame { sequence: 0xdead_beef, ..event.clone() }.bytes());
        assert_eq!(heard(&mut world), None, "nor is what anyone can forge");
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        let heard = |world: &mut World| world.dataplane.heard().unwrap()[usize::from(flow.backend)];
        world.run(&Frame { flags: PSH | ACK, payload: b"event".to_vec(), ..flow.from_backend() }.bytes());
        assert!(heard(&mut world).is_some_and(|age| age.as_secs() < 60));
        let silent = world.dataplane.heard().unwrap();
        assert!((1..=3).all(|id| id == flow.backend || silent[usize::from(id)].is_none()));
    }
}

#[test]
fn the_daemon_resets_a_backends_flows_a_few_at_a_time_and_no_others() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flows: Vec<_> = (0..60).map(|number| world.establish(ip.client(number))).collect();
        let (doomed, spared): (Vec<&Flow>, Vec<&Flow>) = flows.iter().partition(|flow| flow.backend == 2);
        // One that was not answered yet: its client's next SYN goes elsewhere by itself.
        let begun = (100..).map(|number| world.open(ip.client(number), ip.listener()));
        let begun = begun.take(20).find(|flow| flow.backend == 2).expect("one of twenty goes there");

        let (filter, mut cursor) = (FlowFilter::of_backend(2), Walk::default());
        let mut killed = Vec::new();
        while !cursor.is_at_end() {
            let batch = world.dataplane.kill_flows(&filter, &mut cursor, 3).unwrap();
            assert!(batch.len() < 3 + 4, "a set's ways may come on top");
            killed.extend(batch);
        }
        let clients = |flows: &[&Flow]| flows.iter().map(|flow| flow.client).collect::<BTreeSet<_>>();
        assert_eq!(killed.iter().map(|flow| flow.client).collect::<BTreeSet<_>>(), clients(&doomed));
        assert_eq!(killed.len(), doomed.len());
        assert!(killed.iter().all(|flow| flow.to_client.is_some() && flow.to_backend.is_some()));
        assert!(spared.iter().all(|flow| world.taken(flow).meta.is(Kind::Established)));
        assert!(world.taken(&begun).meta.is(Kind::HalfOpen));
        let reaped =
            world.dataplane.reap(&[IdlePolicy { timeout: Duration::from_secs(60), tell: false }]).unwrap();
        assert_eq!(reaped.active[2], 1, "what is killed is no active flow");

        // Its backend comes back, and is asked about what it may not have heard of.
        let asked = |world: &World| world.dataplane.flows_to_ask(&filter, &mut Walk::default(), usize::MAX);
        assert_eq!(asked(&world).len(), doomed.len());
        assert_eq!(world.run(&doomed[0].from_backend().bytes()).outcome, Outcome::ResetBackend);
        assert!(asked(&world).iter().all(|flow| flow.client != doomed[0].client && flow.last_ack.is_some()));

        // A RST is repeated with what the client acknowledged last, as long as the slot is still that flow's.
        let flow = killed.iter().find(|flow| flow.client == doomed[1].client).unwrap();
        assert_eq!(world.dataplane.last_ack_of_killed(flow), Some(BACKEND_START + 1));
        world.run(&Frame::syn(flow.client, flow.listener).bytes());
        assert_eq!(world.dataplane.last_ack_of_killed(flow), None);

        // Once it has been ready for a minute, it has forgotten the rest.
        assert_eq!(world.dataplane.release_killed(2).unwrap(), 0);
        for flow in &doomed[2..] {
            world.change(&world.taken(flow), Change::Older(61));
        }
        assert_eq!(world.dataplane.release_killed(2).unwrap(), doomed.len() as u64 - 2);
    }
}

#[test]
fn handshakes_of_a_flood_do_not_delay_established_flows() {
    /// Flows that `reset_rate` lets be reset at once.
    const LIMIT: usize = 20;
    for ip in Ip::BOTH {
        let mut world = World::build(&Shape { backends: 1, ..Shape::new(ip) });
        let forged: Vec<_> = (100..3100).map(|number| world.open(ip.client(number), ip.listener())).collect();
        let real: BTreeSet<_> = (0..18).map(|number| world.establish(ip.client(number)).client).collect();
        for flow in &forged {
            world.run(&flow.syn_ack().bytes());
        }
        let (filter, mut walk) = (FlowFilter::of_backend(1), Walk::default());
        let first = world.dataplane.kill_flows(&filter, &mut walk, LIMIT).unwrap();
        let first: BTreeSet<_> = first.iter().map(|flow| flow.client).collect();
        assert!(first.is_superset(&real), "{ip:?}: {} of {}", first.intersection(&real).count(), real.len());
        assert!((LIMIT..LIMIT + 4).contains(&first.len()) && !walk.is_at_end(), "{}", first.len());
        // Then the others.
        let mut killed = first.len();
        for _ in 0..1000 {
            killed += world.dataplane.kill_flows(&filter, &mut walk, LIMIT).unwrap().len();
            if walk.is_at_end() {
                break;
            }
        }
        assert_eq!((killed, walk.is_at_end()), (forged.len() + real.len(), true));
    }
}
