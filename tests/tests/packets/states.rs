//! What segments make of a flow, and what nobody can make of it who is not part of it.

use std::time::Duration;

use lb_common::{
    meta::{Kind, Meta, RESET},
    outcome::{Event, Outcome},
    transition::RESET_QUARANTINE,
};
use lb_tests::packets::{ACK, Change, FIN, Flow, Frame, Ip, PSH, RST, SYN, Shape, World};

pub(crate) const FIN_ACK: u8 = FIN | ACK;

fn client_says(world: &mut World, flow: &Flow, flags: u8) -> Outcome {
    world.run(&Frame { flags, ..flow.from_client() }.bytes()).outcome
}

fn backend_says(world: &mut World, flow: &Flow, flags: u8) -> Outcome {
    world.run(&Frame { flags, ..flow.from_backend() }.bytes()).outcome
}

#[test]
fn only_the_backends_word_after_the_handshake_makes_a_flow_established() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.open(ip.client(1), ip.listener());
        let story = [
            (true, SYN | ACK, Kind::HalfOpen),
            (false, ACK, Kind::HalfOpen),
            (false, PSH | ACK, Kind::HalfOpen),
            (true, ACK, Kind::Established),
        ];
        for (backend, flags, kind) in story {
            let outcome = if backend {
                backend_says(&mut world, &flow, flags)
            } else {
                client_says(&mut world, &flow, flags)
            };
            assert!(outcome == Outcome::Forwarded || outcome == Outcome::Replied);
            assert!(world.taken(&flow).meta.is(kind), "after {flags:#07b}");
        }
    }
}

#[test]
fn a_forger_in_the_clients_place_proves_nothing() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.open(ip.client(1), ip.listener());
        for flags in (0..32).chain(0..32) {
            client_says(&mut world, &flow, flags);
            assert!(world.taken(&flow).meta.is(Kind::HalfOpen), "{flags:#07b}");
        }
        // Nor does a backend that answers a strange segment before it has answered the SYN.
        backend_says(&mut world, &flow, ACK);
        client_says(&mut world, &flow, ACK);
        backend_says(&mut world, &flow, ACK);
        assert!(world.taken(&flow).meta.is(Kind::HalfOpen));
    }
}

#[test]
fn a_blind_rst_fin_or_syn_frees_nothing() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        for flags in [RST, RST | ACK, FIN, FIN_ACK, SYN, SYN | FIN, SYN | RST] {
            // From anywhere, with numbers that are in no window.
            let blind = Frame { flags, sequence: 0xdead_beef, acknowledgement: 0, ..flow.from_client() };
            let exchange = world.run(&blind.bytes());
            assert_eq!((exchange.outcome, exchange.events), (Outcome::Forwarded, vec![]), "{flags:#07b}");
            let slot = world.taken(&flow);
            assert!(slot.meta.is(Kind::Established) && slot.meta.backend() == flow.backend);
        }
        // The backend ignores what was forged, goes on, and with that the flow is as it was.
        assert!(world.taken(&flow).meta.has(RESET));
        assert_eq!(backend_says(&mut world, &flow, PSH | ACK), Outcome::Replied);
        assert!(!world.taken(&flow).meta.has(RESET));
        // A forged FIN is noted; the backend's own then looks like the second, and what it says afterwards shows.
        assert_eq!(backend_says(&mut world, &flow, FIN_ACK), Outcome::Replied);
        assert!(world.taken(&flow).meta.is_closed());
        let more = Frame { flags: PSH | ACK, payload: vec![1; 100], ..flow.from_backend() };
        assert_eq!(world.run(&more.bytes()).outcome, Outcome::Replied);
        assert!(world.taken(&flow).meta.is(Kind::Established));
    }
}

#[test]
fn a_forged_rst_of_the_backend_does_not_let_a_new_syn_evict_the_flow() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        assert_eq!(backend_says(&mut world, &flow, RST | ACK), Outcome::Replied);
        let exchange = world.run(&Frame::syn(flow.client, flow.listener).bytes());
        assert_eq!((exchange.outcome, exchange.events), (Outcome::Forwarded, vec![]));
        // Ten seconds of silence later it counts.
        world.change(&world.taken(&flow), Change::Older(RESET_QUARANTINE));
        let exchange = world.run(&Frame::syn(flow.client, flow.listener).bytes());
        assert_eq!(exchange.events, [Event::FlowClaimed]);
        assert_eq!(world.flow(flow.client, flow.listener, &exchange).snat, flow.snat, "in the same slot");
        assert!(world.taken(&flow).meta.is(Kind::HalfOpen));
    }
}

#[test]
fn a_refused_syn_gets_a_second_chance_and_no_third() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let syn = Frame::syn(ip.client(1), ip.listener());
        let first = world.open(syn.source, syn.destination);
        assert_eq!(backend_says(&mut world, &first, RST | ACK), Outcome::SecondChance);

        let retransmitted = world.run(&syn.bytes());
        let second = world.flow(syn.source, syn.destination, &retransmitted);
        assert_eq!(retransmitted.events, []);
        assert_eq!(second.snat, first.snat, "in the same slot");
        assert_ne!(second.backend, first.backend);
        assert_ne!(backend_says(&mut world, &first, RST | ACK), Outcome::Replied, "no longer its flow");

        let refusal = Frame { flags: RST | ACK, ..second.from_backend() };
        let exchange = world.run(&refusal.bytes());
        assert_eq!(exchange.outcome, Outcome::Replied);
        assert_eq!(exchange.translated(&refusal).destination, syn.source);

        // A client that tries again later is at the beginning.
        let again = world.run(&syn.bytes());
        assert_eq!(again.events, [Event::FlowClaimed]);
        let again = world.flow(syn.source, syn.destination, &again);
        world.prove(&again);
        assert_eq!(world.slots().len(), 1);
    }
}

#[test]
fn a_lone_backends_refusal_is_the_answer() {
    for ip in Ip::BOTH {
        let mut world = World::build(&Shape { backends: 1, ..Shape::new(ip) });
        let flow = world.open(ip.client(1), ip.listener());
        let exchange = world.run(&Frame { flags: RST | ACK, ..flow.from_backend() }.bytes());
        assert_eq!((exchange.outcome, exchange.seen().flags()), (Outcome::Replied, RST | ACK));
    }
}

#[test]
fn one_fin_keeps_a_half_closed_flow_and_both_close_it() {
    for ip in Ip::BOTH {
        for client_first in [true, false] {
            let mut world = World::new(ip);
            let flow = world.establish(ip.client(1));
            let say = |world: &mut World, client: bool, flags| {
                if client { client_says(world, &flow, flags) } else { backend_says(world, &flow, flags) }
            };
            say(&mut world, client_first, FIN_ACK);
            for _ in 0..3 {
                say(&mut world, !client_first, PSH | ACK);
                say(&mut world, client_first, ACK);
                assert!(world.taken(&flow).meta.is(Kind::Established), "half-closed");
            }
            say(&mut world, !client_first, FIN_ACK);
            let closed = if client_first { Kind::ClosedByClient } else { Kind::ClosedByBackend };
            assert!(world.taken(&flow).meta.is(closed));
            // The last ACK, and a FIN that was lost and is sent again.
            assert_eq!(client_says(&mut world, &flow, ACK), Outcome::Forwarded);
            assert_eq!(backend_says(&mut world, &flow, FIN_ACK), Outcome::Replied);
            assert_eq!(client_says(&mut world, &flow, ACK), Outcome::Forwarded);
            assert!(world.taken(&flow).meta.is(closed));
        }
    }
}

/// A backend in TIME_WAIT answers a strange SYN with a bare ACK; the client's RST clears it away; the client's next SYN
/// is accepted. It costs a second, if the load balancer plays along.
#[test]
fn a_new_flow_gets_past_its_backends_time_wait() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        backend_says(&mut world, &flow, FIN_ACK);
        client_says(&mut world, &flow, FIN_ACK);
        assert!(world.taken(&flow).meta.is(Kind::ClosedByBackend));

        let syn = Frame::syn(flow.client, flow.listener);
        let reopened = world.run(&syn.bytes());
        assert_eq!(reopened.events, [Event::FlowClaimed]);
        assert_eq!(world.flow(flow.client, flow.listener, &reopened), flow, "same slot, same backend");

        assert_eq!(backend_says(&mut world, &flow, ACK), Outcome::Replied, "the bare ACK reaches the client");
        assert_eq!(client_says(&mut world, &flow, RST), Outcome::Forwarded, "its RST reaches the backend");
        assert!(world.taken(&flow).meta.is(Kind::HalfOpen), "and frees nothing");
        let again = world.run(&syn.bytes());
        assert_eq!(again.events, []);
        assert_eq!(world.flow(flow.client, flow.listener, &again), flow);
        world.prove(&flow);
        // Of what the client ended nothing is left: this flow's backend may close its half.
        backend_says(&mut world, &flow, FIN_ACK);
        assert!(world.taken(&flow).meta.is(Kind::Established), "the client may go on for hours");
    }
}

#[test]
fn a_retransmitted_syn_leaves_a_backend_that_takes_no_new_flows_any_more() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let syn = Frame::syn(ip.client(1), ip.listener());
        let before = world.open(syn.source, syn.destination);
        let others: Vec<u8> = (1..=3).filter(|id| *id != before.backend).collect();
        world.select(0, &others);
        let exchange = world.run(&syn.bytes());
        let after = world.flow(syn.source, syn.destination, &exchange);
        assert_eq!(after.snat, before.snat);
        assert!(others.contains(&after.backend));
        world.prove(&after);

        // But once the backend has answered, the flow is its own.
        let mut world = World::new(ip);
        let before = world.open(syn.source, syn.destination);
        backend_says(&mut world, &before, SYN | ACK);
        world.select(0, &[]);
        let exchange = world.run(&syn.bytes());
        assert_eq!(world.flow(syn.source, syn.destination, &exchange), before);
    }
}

#[test]
fn a_flow_of_a_backend_on_this_host_passes_and_is_remembered() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        world.dataplane.add_backend(9, ip.listener(), true);
        world.select(0, &[9]);
        let client = ip.client(1);
        assert_eq!(world.run(&Frame::syn(client, ip.listener()).bytes()).outcome, Outcome::ForwardedLocal);
        world.select(0, &[1]);
        for flags in [ACK, PSH | ACK] {
            let frame = Frame { flags, ..Frame::new(client, ip.listener()) };
            assert_eq!(world.run(&frame.bytes()).outcome, Outcome::ForwardedLocal);
        }
        let slot = world.slots()[0];
        assert_eq!(slot.meta.backend(), 9);
        // Its replies are not seen here, so it never looks established; it lives on the idle timeout all the same.
        world.change(&slot, Change::Older(1000));
        let idle = Duration::from_secs(2000);
        assert_eq!(world.dataplane.reap(&[idle]).unwrap().freed, 0);
        // The client's FIN or RST is all that is heard of its end: what is left is given four minutes.
        for (number, flags) in [(1, FIN_ACK), (2, RST)] {
            let client = ip.client(number);
            world.select(0, &[9]);
            world.run(&Frame::syn(client, ip.listener()).bytes());
            let frame = Frame { flags, ..Frame::new(client, ip.listener()) };
            assert_eq!(world.run(&frame.bytes()).outcome, Outcome::ForwardedLocal);
            assert_eq!(world.dataplane.reap(&[idle]).unwrap().freed, 0);
            world.change(&world.slots()[0], Change::Older(1000));
            assert_eq!(world.dataplane.reap(&[idle]).unwrap().freed, 1);
            assert_eq!(world.slots(), []);
        }
    }
}

#[test]
fn a_client_that_uses_its_port_again_does_not_come_to_this_host_which_takes_no_new_flows() {
    for ip in Ip::BOTH {
        for end in [FIN_ACK, RST] {
            let mut world = World::new(ip);
            world.dataplane.add_backend(9, ip.listener(), true);
            world.select(0, &[9]);
            let syn = Frame::syn(ip.client(1), ip.listener());
            assert_eq!(world.run(&syn.bytes()).outcome, Outcome::ForwardedLocal);
            world.select(0, &[1]);
            // The same flow's: its socket knows whether it stands.
            assert_eq!(world.run(&syn.bytes()).outcome, Outcome::ForwardedLocal);
            let frame = Frame { flags: end, ..Frame::new(ip.client(1), ip.listener()) };
            assert_eq!(world.run(&frame.bytes()).outcome, Outcome::ForwardedLocal);
            assert_eq!(world.run(&syn.bytes()).outcome, Outcome::Forwarded);
            assert_eq!((world.slots().len(), world.slots()[0].meta.backend()), (1, 1));
        }
    }
}

#[test]
fn the_clients_last_acknowledgement_is_kept_for_the_day_the_flow_must_die() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        for acknowledgement in [7, 0xffff_fff0, 3] {
            world.run(&Frame { acknowledgement, ..flow.from_client() }.bytes());
            assert_eq!(world.taken(&flow).last_ack, acknowledgement);
        }
        // Not what the backend acknowledges, and not the field of a segment without ACK.
        world.run(&Frame { acknowledgement: 99, ..flow.from_backend() }.bytes());
        world.run(&Frame { acknowledgement: 98, flags: RST, ..flow.from_client() }.bytes());
        assert_eq!(world.taken(&flow).last_ack, 3);
    }
}

#[test]
fn a_forged_rst_does_not_outlast_the_next_keepalive() {
    let idle = Duration::from_secs(600);
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        client_says(&mut world, &flow, RST);
        world.change(&world.taken(&flow), Change::Older(30));
        assert_eq!(world.dataplane.reap(&[idle]).unwrap().freed, 1);
        assert!(world.taken(&flow).meta.is_closed(), "whoever needs a slot may have it");
        assert_eq!(client_says(&mut world, &flow, ACK), Outcome::Forwarded, "a keepalive");
        assert_eq!(backend_says(&mut world, &flow, ACK), Outcome::Replied, "and its answer");
        world.change(&world.taken(&flow), Change::Older(500));
        assert_eq!(world.dataplane.reap(&[idle]).unwrap().freed, 0);
        world.prove(&flow);
    }
}

#[test]
fn an_idle_flow_is_forgotten_in_its_time_and_any_segment_keeps_it() {
    let idle = Duration::from_secs(60);
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        world.change(&world.taken(&flow), Change::Older(50));
        let reaped = world.dataplane.reap(&[idle]).unwrap();
        assert_eq!((reaped.freed, reaped.occupied), (0, 1));
        assert_eq!(reaped.active[usize::from(flow.backend)], 1);
        // Each side's segment makes it young again.
        for frame in [flow.from_client(), flow.from_backend()] {
            world.change(&world.taken(&flow), Change::Older(50));
            world.run(&frame.bytes());
            assert_eq!(world.dataplane.reap(&[idle]).unwrap().freed, 0);
        }
        world.change(&world.taken(&flow), Change::Older(70));
        assert_eq!(world.dataplane.reap(&[idle]).unwrap().freed, 1);
        assert!(world.taken(&flow).meta.is(Kind::ClosedByBackend), "the backend may hold on to it");
        world.change(&world.taken(&flow), Change::Older(70));
        assert_eq!(world.dataplane.reap(&[idle]).unwrap().freed, 1);
        assert_eq!(world.slots(), []);
        assert_eq!(client_says(&mut world, &flow, ACK), Outcome::NoFlow);
        assert_eq!(backend_says(&mut world, &flow, ACK), Outcome::ReplyUnknown);
    }
}

#[test]
fn a_handshake_that_nobody_finishes_and_a_lost_claim_are_forgotten() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.open(ip.client(1), ip.listener());
        let idle = [Duration::from_secs(10_000)];
        world.change(&world.taken(&flow), Change::Older(200));
        assert_eq!(world.dataplane.reap(&idle).unwrap().freed, 0);
        world.change(&world.taken(&flow), Change::Older(60));
        assert_eq!(world.dataplane.reap(&idle).unwrap().freed, 1);

        // A CPU that was taken away in the middle of a claim.
        let flow = world.open(ip.client(1), ip.listener());
        let slot = world.taken(&flow);
        world.change(&slot, Change::Word(Meta::new(Kind::Claiming, 1, slot.meta.seen())));
        assert_eq!(client_says(&mut world, &flow, ACK), Outcome::NoFlow, "readers look away");
        world.change(&slot, Change::Older(10));
        assert_eq!(world.dataplane.reap(&idle).unwrap().freed, 0, "of a machine that was halted, maybe");
        assert_eq!(world.dataplane.reap(&idle).unwrap().freed, 1);
        assert_eq!(world.slots(), []);
    }
}
