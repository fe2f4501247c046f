//! What segments make of a flow, and what nobody can make of it who is not part of it.

use std::{
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use anyhow::ensure;
use lb_common::{
    meta::{Kind, Meta, RESET},
    outcome::{Event, Outcome},
    sequence::SendSequence,
    transition::RESET_QUARANTINE,
};
use lb_tests::{
    lab::{Lab, eventually},
    packets::{
        ACK, BACKEND_START, CLIENT_START, Change, FIN, Flow, Frame, Ip, PSH, RST, SYN, Shape, Taken, World,
    },
};
use lb_userspace::dataplane::{FlowFilter, IdlePolicy, Walk};
use socket2::{Domain, Socket, Type};

pub(crate) const FIN_ACK: u8 = FIN | ACK;

fn client_says(world: &mut World, flow: &Flow, flags: u8) -> Outcome {
    world.run(&Frame { flags, ..flow.from_client() }.bytes()).outcome
}

fn backend_says(world: &mut World, flow: &Flow, flags: u8) -> Outcome {
    let frame = if flags & SYN == 0 { flow.from_backend() } else { flow.syn_ack() };
    world.run(&Frame { flags, ..frame }.bytes()).outcome
}

/// For a claim to be given up, and a slow machine.
const GIVEN_UP: Duration = Duration::from_secs(30);

/// A segment with numbers that no end of a flow is near.
fn blind(flags: u8, frame: Frame) -> Frame {
    Frame { flags, sequence: 0xdead_beef, acknowledgement: 0x8bad_f00d, ..frame }
}

/// Flows end in silence after this time.
fn idle(timeout: Duration) -> IdlePolicy {
    IdlePolicy { timeout, tell: false }
}

#[test]
fn only_the_number_of_the_syn_ack_makes_a_flow_established() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.open(ip.client(1), ip.listener());
        assert_eq!(backend_says(&mut world, &flow, SYN | ACK), Outcome::Replied);
        for acknowledgement in [0, 1, BACKEND_START, BACKEND_START + 2, CLIENT_START + 1] {
            let frame = Frame { acknowledgement, ..flow.from_client() };
            assert_eq!(world.run(&frame.bytes()).outcome, Outcome::Forwarded, "whatever it proves");
            assert!(world.taken(&flow).meta.is(Kind::HalfOpen), "{acknowledgement}");
        }
        let exchange = world.run(&flow.from_client().bytes());
        assert_eq!(
            (exchange.outcome, &exchange.events[..]),
            (Outcome::Forwarded, &[Event::FlowEstablished][..])
        );
        assert!(world.taken(&flow).meta.is(Kind::Established));
    }
}

#[test]
fn a_forger_in_the_clients_place_proves_nothing() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.open(ip.client(1), ip.listener());
        for _ in 0..2 {
            for flags in 0..32 {
                world.run(&blind(flags, flow.from_client()).bytes());
                assert!(world.taken(&flow).meta.is(Kind::HalfOpen), "{flags:#07b}");
                // Linux answers some of them with a bare ACK.
                backend_says(&mut world, &flow, ACK);
                assert!(world.taken(&flow).meta.is(Kind::HalfOpen), "{flags:#07b}");
            }
            // The last SYN is the one that counts; then the backend answers it.
            world.run(&Frame::syn(flow.client, flow.listener).bytes());
            backend_says(&mut world, &flow, SYN | ACK);
        }
        world.run(&flow.from_client().bytes());
        assert!(world.taken(&flow).meta.is(Kind::Established), "the client itself does");
    }
}

#[test]
fn blind_segments_free_nothing_and_teach_nothing() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        // Whenever it was last seen.
        let taken = |world: &World| {
            let slot = world.taken(&flow);
            Taken { meta: slot.meta.at(0), ..slot }
        };
        let before = taken(&world);
        for flags in (0..64).filter(|flags| flags & RST == 0) {
            world.run(&blind(flags, flow.from_client()).bytes());
            assert_eq!(taken(&world), before, "{flags:#07b} of the client");
            world.run(&blind(flags, flow.from_backend()).bytes());
            assert_eq!(taken(&world), before, "{flags:#07b} of the backend");
        }
        for frame in [flow.from_client(), flow.from_backend()] {
            let exchange = world.run(&blind(RST, frame).bytes());
            assert_eq!(exchange.events, [Event::ResetDoubted]);
            assert!(world.taken(&flow).meta.is(Kind::Established) && world.taken(&flow).meta.has(RESET));
            assert_eq!(backend_says(&mut world, &flow, ACK), Outcome::Replied);
            assert_eq!(taken(&world), before, "the backend contradicts it");
        }
    }
}

#[test]
fn a_forged_rst_does_not_let_a_new_syn_evict_the_flow() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        world.run(&blind(RST | ACK, flow.from_backend()).bytes());
        let syn = Frame { sequence: 0x7000_0000, ..Frame::syn(flow.client, flow.listener) };
        // The backend is asked first, and judges the SYN if it has not answered.
        for (older, outcome) in
            [(0, Outcome::SynDoubted), (RESET_QUARANTINE, Outcome::SynDoubted), (3600, Outcome::Forwarded)]
        {
            world.change(&world.taken(&flow), Change::Older(older));
            let exchange = world.run(&syn.bytes());
            assert_eq!((exchange.outcome, exchange.events), (outcome, vec![]));
            assert!(world.taken(&flow).meta.is(Kind::Established), "after {older} s");
        }
        // Also where its backend takes no new flows: every restart of a server is that.
        world.select(0, &[]);
        assert_eq!(world.run(&syn.bytes()).outcome, Outcome::Forwarded);
        assert!(world.taken(&flow).meta.is(Kind::Established));
    }
}

#[test]
fn a_rst_that_proves_itself_closes_the_flow() {
    for ip in Ip::BOTH {
        for by_client in [true, false] {
            let mut world = World::new(ip);
            let flow = world.establish(ip.client(1));
            if by_client {
                client_says(&mut world, &flow, RST | ACK);
            } else {
                backend_says(&mut world, &flow, RST);
            }
            assert!(world.taken(&flow).meta.is_closed());
            let exchange = world.run(&Frame::syn(flow.client, flow.listener).bytes());
            assert_eq!(exchange.events, [Event::FlowClaimed]);
            assert_eq!(world.flow(flow.client, flow.listener, &exchange).snat, flow.snat, "in the same slot");
        }
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
        world.run(&Frame { flags: FIN_ACK, ..flow.last_ack() }.bytes());
        assert!(world.taken(&flow).meta.is(Kind::ClosedByBackend));

        let syn = Frame::syn(flow.client, flow.listener);
        let asked = world.run(&syn.bytes());
        assert_eq!(world.flow(flow.client, flow.listener, &asked), flow, "same slot, same backend");

        assert_eq!(backend_says(&mut world, &flow, ACK), Outcome::Replied, "the bare ACK reaches the client");
        assert_eq!(client_says(&mut world, &flow, RST), Outcome::Forwarded, "its RST reaches the backend");
        assert!(world.taken(&flow).meta.is(Kind::ClosedByBackend), "and frees nothing");
        let again = world.run(&syn.bytes());
        assert_eq!((asked.events, again.events.clone()), (vec![], vec![]), "nothing has begun yet");
        assert_eq!(world.flow(flow.client, flow.listener, &again), flow);
        assert_eq!(world.run(&flow.syn_ack().bytes()).events, [Event::FlowClaimed]);
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
        let policy = idle(Duration::from_secs(2000));
        assert_eq!(world.dataplane.reap(&[policy]).unwrap().freed, 0);
        // The client's FIN or RST is all that is heard of its end: what is left is given four minutes.
        for (number, flags) in [(1, FIN_ACK), (2, RST)] {
            let client = ip.client(number);
            world.select(0, &[9]);
            world.run(&Frame::syn(client, ip.listener()).bytes());
            let frame = Frame { flags, ..Frame::new(client, ip.listener()) };
            assert_eq!(world.run(&frame.bytes()).outcome, Outcome::ForwardedLocal);
            assert_eq!(world.dataplane.reap(&[policy]).unwrap().freed, 0);
            world.change(&world.slots()[0], Change::Older(1000));
            assert_eq!(world.dataplane.reap(&[policy]).unwrap().freed, 1);
            assert_eq!(world.slots(), []);
        }
    }
}

/// A client's flow to this host, which has taken no new flows since.
fn open_to_a_host_that_drains(world: &mut World, client: SocketAddr, listener: SocketAddr) -> Frame {
    world.dataplane.add_backend(9, listener, true);
    world.select(0, &[9]);
    let syn = Frame::syn(client, listener);
    assert_eq!(world.run(&syn.bytes()).outcome, Outcome::ForwardedLocal);
    world.select(0, &[1]);
    syn
}

#[test]
fn a_client_that_uses_its_port_again_leaves_this_host_if_it_takes_no_new_flows() {
    for ip in Ip::BOTH {
        for end in [FIN_ACK, RST, ACK] {
            let mut world = World::new(ip);
            let syn = open_to_a_host_that_drains(&mut world, ip.client(1), ip.listener());
            let frame = Frame { flags: end, ..Frame::new(ip.client(1), ip.listener()) };
            assert_eq!(world.run(&frame.bytes()).outcome, Outcome::ForwardedLocal);
            // No socket of this host has a connection with that client.
            assert_eq!(world.run(&syn.bytes()).outcome, Outcome::Forwarded);
            assert_eq!((world.slots().len(), world.slots()[0].meta.backend()), (1, 1));
        }
    }
}

/// A real connection between two addresses of this network namespace: the server's end, and the client's.
fn connection(client: SocketAddr, listener: SocketAddr) -> (TcpStream, TcpStream) {
    let server = TcpListener::bind(listener).unwrap();
    let socket = Socket::new(Domain::for_address(client), Type::STREAM, None).unwrap();
    socket.bind(&client.into()).unwrap();
    socket.connect(&listener.into()).unwrap();
    (server.accept().unwrap().0, socket.into())
}

#[test]
fn a_flow_to_this_host_lives_as_long_as_its_socket() {
    let lab = Lab::new().unwrap();
    for (ip, name) in [(Ip::V4, "v4"), (Ip::V6, "v6")] {
        let host = lab.host(name).unwrap();
        let (client, listener) = (ip.client(1), ip.listener());
        host.ip("link set lo up").unwrap();
        for address in [client.ip(), listener.ip()] {
            let rest = if address.is_ipv6() { "128 nodad" } else { "32" };
            host.ip(&format!("address add {address}/{rest} dev lo")).unwrap();
        }
        host.in_namespace(|| {
            let mut world = World::new(ip);
            let (server, kept) = connection(client, listener);
            let syn = open_to_a_host_that_drains(&mut world, client, listener);
            for flags in [FIN_ACK, SYN, RST, SYN, ACK, SYN] {
                let forged = Frame { flags, ..syn.clone() };
                assert_eq!(world.run(&forged.bytes()).outcome, Outcome::ForwardedLocal, "{flags:#x}");
                world.change(&world.slots()[0], Change::Older(100));
            }
            // A RST and a SYN in one batch of a NIC's: the socket has not seen the RST yet.
            for (flags, outcome) in [(RST, Outcome::ForwardedLocal), (SYN, Outcome::SynDoubted)] {
                assert_eq!(world.run(&Frame { flags, ..syn.clone() }.bytes()).outcome, outcome);
            }
            world.change(&world.slots()[0], Change::Older(100));
            // The server has ended its side, and its socket still lives.
            server.shutdown(Shutdown::Write).unwrap();
            assert_eq!(world.run(&syn.bytes()).outcome, Outcome::ForwardedLocal, "half-closed");
            drop(kept);
            eventually(GIVEN_UP, "the server's socket is in TIME-WAIT", || {
                let outcome = world.run(&syn.bytes()).outcome;
                ensure!(outcome == Outcome::Forwarded, "{outcome:?}");
                Ok(())
            })
            .unwrap();
            assert_eq!(world.slots()[0].meta.backend(), 1);
        })
        .unwrap();
    }
}

#[test]
fn the_clients_last_acknowledgement_is_kept_for_the_day_the_flow_must_die() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        let next = BACKEND_START + 1;
        let answer = Frame { flags: PSH | ACK, payload: vec![7; 100], ..flow.from_backend() };
        world.run(&answer.bytes());
        // Overtaken by later ones, or of what was never sent.
        for (acknowledgement, kept) in [
            (next + 60, next + 60),
            (next + 20, next + 60),
            (next + 101, next + 60),
            (next + 100, next + 100),
        ] {
            world.run(&Frame { acknowledgement, ..flow.from_client() }.bytes());
            assert_eq!(world.taken(&flow).sequence.unacknowledged, kept);
        }
        // Not what the backend acknowledges.
        world.run(&Frame { acknowledgement: 99, ..flow.from_backend() }.bytes());
        assert_eq!(world.taken(&flow).sequence, SendSequence::at(next + 100));
    }
}

#[test]
fn a_doubtful_rst_does_not_outlast_the_next_keepalive_nor_end_the_flow() {
    let policy = idle(Duration::from_secs(600));
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        client_says(&mut world, &flow, RST);
        world.change(&world.taken(&flow), Change::Older(30));
        let reaped = world.dataplane.reap(&[policy]).unwrap();
        assert_eq!((reaped.freed, reaped.doubted[usize::from(flow.backend)]), (0, 1), "its backend is asked");
        let filter = FlowFilter::of_backend(flow.backend);
        let mut walk = Walk::default();
        let asked = world.dataplane.doubted_flows(&filter, &mut walk, usize::MAX, RESET_QUARANTINE).unwrap();
        assert_eq!(
            (asked.len(), asked[0].client, asked[0].last_ack),
            (1, flow.client, Some(BACKEND_START + 1))
        );
        assert_eq!(backend_says(&mut world, &flow, ACK), Outcome::Replied, "its answer");
        assert_eq!(world.dataplane.reap(&[policy]).unwrap().doubted[usize::from(flow.backend)], 0);
        assert!(!world.taken(&flow).meta.has(RESET));
        // A backend that has forgotten the flow answers with the number that it was asked with.
        client_says(&mut world, &flow, RST);
        assert_eq!(backend_says(&mut world, &flow, RST), Outcome::Replied);
        assert!(world.taken(&flow).meta.is_closed());
    }
}

#[test]
fn a_half_closed_flow_is_asked_about_when_it_rests_and_ends_if_its_backend_has_forgotten_it() {
    let policy = idle(Duration::from_secs(600));
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        assert_eq!(backend_says(&mut world, &flow, FIN | ACK), Outcome::Replied);
        world.run(&flow.last_ack().bytes());
        let rest = world.dataplane.ticks().units(Duration::from_secs(70));
        let asked = |world: &mut World| {
            let reaped = world.dataplane.reap(&[policy]).unwrap();
            assert_eq!(reaped.active[usize::from(flow.backend)], 1, "it is as good as an open one");
            let filter = FlowFilter::of_backend(flow.backend);
            let asked = world.dataplane.half_closed_flows(&filter, &mut Walk::default(), usize::MAX).unwrap();
            assert_eq!(asked.len() as u64, reaped.half_closed[usize::from(flow.backend)]);
            asked.first().map(|asked| (asked.client, asked.last_ack))
        };
        assert_eq!(asked(&mut world), None);
        world.change(&world.taken(&flow), Change::Older(rest + 1));
        assert_eq!(asked(&mut world), Some((flow.client, Some(BACKEND_START + 2))));
        // One that knows the flow says so. It is as idle as before, and asked again after the same time.
        let before = world.taken(&flow);
        let answer = Frame { sequence: BACKEND_START + 2, ..flow.from_backend() };
        assert_eq!(world.run(&answer.bytes()).outcome, Outcome::Replied);
        assert_eq!(world.taken(&flow), before);
        world.change(&world.taken(&flow), Change::Older(rest));
        assert!(asked(&mut world).is_some());
        // The end that is open speaks.
        world.run(&flow.last_ack().bytes());
        assert_eq!(asked(&mut world), None);
        world.change(&world.taken(&flow), Change::Older(rest + 1));
        assert!(asked(&mut world).is_some());
        assert_eq!(world.run(&Frame { flags: RST, ..answer }.bytes()).outcome, Outcome::Replied);
        assert!(world.taken(&flow).meta.is_closed());
    }
}

#[test]
fn both_ends_of_an_idle_flow_are_told() {
    let policy = IdlePolicy { timeout: Duration::from_secs(60), tell: true };
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        let busy = world.establish(ip.client(2));
        world.change(&world.taken(&flow), Change::Older(70));
        let reaped = world.dataplane.reap(&[policy]).unwrap();
        assert_eq!((reaped.freed, reaped.idle.iter().sum::<u64>()), (0, 1));
        let filter = FlowFilter::default();
        let told = world.dataplane.kill_idle_flows(&filter, &mut Walk::default(), usize::MAX).unwrap();
        assert_eq!((told.len(), told[0].client, told[0].last_ack), (1, flow.client, Some(BACKEND_START + 1)));
        assert_eq!(client_says(&mut world, &flow, ACK), Outcome::ResetClient);
        assert_eq!(backend_says(&mut world, &flow, ACK), Outcome::ResetBackend);
        assert!(world.taken(&busy).meta.is(Kind::Established));
        // Where that cannot be done, as its VIP is elsewhere, it is forgotten all the same, later.
        world.change(&world.taken(&busy), Change::Older(200));
        assert_eq!(world.dataplane.reap(&[policy]).unwrap().freed, 1);
    }
}

#[test]
fn an_idle_flow_is_forgotten_in_its_time_and_any_segment_keeps_it() {
    let policy = idle(Duration::from_secs(60));
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        world.change(&world.taken(&flow), Change::Older(50));
        let reaped = world.dataplane.reap(&[policy]).unwrap();
        assert_eq!((reaped.freed, reaped.occupied), (0, 1));
        assert_eq!(reaped.active[usize::from(flow.backend)], 1);
        // Each side's segment makes it young again.
        for frame in [flow.from_client(), flow.from_backend()] {
            world.change(&world.taken(&flow), Change::Older(50));
            world.run(&frame.bytes());
            assert_eq!(world.dataplane.reap(&[policy]).unwrap().freed, 0);
        }
        world.change(&world.taken(&flow), Change::Older(70));
        assert_eq!(world.dataplane.reap(&[policy]).unwrap().freed, 1);
        assert!(world.taken(&flow).meta.is(Kind::ClosedByBackend), "the backend may hold on to it");
        world.change(&world.taken(&flow), Change::Older(70));
        assert_eq!(world.dataplane.reap(&[policy]).unwrap().freed, 1);
        assert_eq!(world.slots(), []);
        assert_eq!(client_says(&mut world, &flow, ACK), Outcome::NoFlow);
        assert_eq!(backend_says(&mut world, &flow, ACK), Outcome::ReplyUnknown);
    }
}

#[test]
fn a_handshake_that_nobody_finishes_is_forgotten() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.open(ip.client(1), ip.listener());
        let policy = [idle(Duration::from_secs(10_000))];
        world.change(&world.taken(&flow), Change::Older(200));
        assert_eq!(world.dataplane.reap(&policy).unwrap().freed, 0);
        world.change(&world.taken(&flow), Change::Older(60));
        assert_eq!(world.dataplane.reap(&policy).unwrap().freed, 1);
    }
}

#[test]
fn a_claim_that_was_lost_is_forgotten_after_a_time_and_not_after_looks() {
    let policy = [idle(Duration::from_secs(10_000))];
    let mut worlds = Ip::BOTH.map(|ip| {
        let mut world = World::new(ip);
        // A CPU that was taken away in the middle of a claim.
        let flow = world.open(ip.client(1), ip.listener());
        let slot = world.taken(&flow);
        world.change(&slot, Change::Word(Meta::new(Kind::Claiming, 1, slot.meta.seen())));
        assert_eq!(client_says(&mut world, &flow, ACK), Outcome::NoFlow, "readers look away");
        world.change(&slot, Change::Older(10));
        world
    });
    for _ in 0..3 {
        for world in &mut worlds {
            assert_eq!(
                world.dataplane.reap(&policy).unwrap().freed,
                0,
                "of a machine that was halted, maybe"
            );
        }
    }
    for world in &mut worlds {
        eventually(GIVEN_UP, "the claim is given up", || {
            ensure!(world.dataplane.reap(&policy)?.freed == 1);
            Ok(())
        })
        .unwrap();
        assert_eq!(world.slots(), []);
    }
}
