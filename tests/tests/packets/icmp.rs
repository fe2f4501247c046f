//! ICMP errors about flows go to the side that sent the packet in question, as it knows that packet.

use std::net::SocketAddr;

use lb_common::outcome::Outcome;
use lb_tests::packets::{Flow, Frame, Icmp, Inside, Ip, LB_MAC, ROUTER_MAC, Seen, World, backend_mac};

/// The error types that quote a packet.
fn errors(ip: Ip) -> Vec<(u8, u8)> {
    match ip {
        Ip::V4 => vec![(3, 4), (3, 1), (11, 0), (12, 0)],
        Ip::V6 => vec![(1, 0), (2, 0), (3, 0), (4, 1)],
    }
}

/// What the two sides of a flow have on the wire: from the listener to the client, from the SNAT address to the
/// backend.
fn on_the_wire(world: &mut World, flow: &Flow) -> [Frame; 2] {
    let payload = b"0123456789".to_vec();
    let answer = Frame { payload: payload.clone(), ..flow.from_backend() };
    assert_eq!(world.run(&answer.bytes()).outcome, Outcome::Replied);
    [
        Frame { source: flow.listener, destination: flow.client, ..answer },
        Frame { payload, ..Frame::new(flow.snat, world.ip.backend(flow.backend)) },
    ]
}

#[test]
fn an_error_about_a_clients_flow_reaches_its_backend_and_the_other_way_round() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        let backend = ip.backend(flow.backend);
        let [to_client, to_backend] = on_the_wire(&mut world, &flow);
        for kind in errors(ip) {
            // As much of TCP as must be quoted, a whole header, and payload with it.
            for bytes in [8, 20, 30] {
                for (sent, expected) in [
                    (&to_client, Sides { of: (backend, flow.snat), mac: backend_mac(flow.backend) }),
                    (&to_backend, Sides { of: (flow.client, flow.listener), mac: ROUTER_MAC }),
                ] {
                    let error = Icmp { kind, ..Icmp::too_big(ip.router(), sent, bytes) };
                    let exchange = world.run(&error.bytes());
                    assert_eq!((exchange.outcome, exchange.service), (Outcome::IcmpTranslated, Some(0)));
                    expected.check(&error, &exchange.seen());
                }
            }
        }
    }
}

/// Source and destination of the packet as its sender knows it, and the sender's MAC.
struct Sides {
    of: (SocketAddr, SocketAddr),
    mac: [u8; 6],
}

impl Sides {
    fn check(&self, error: &Icmp, seen: &Seen) {
        let (sender, receiver) = self.of;
        assert_eq!((seen.source.ip(), seen.destination.ip()), (receiver.ip(), sender.ip()));
        assert_eq!((seen.macs, seen.ttl), ((LB_MAC, self.mac), error.outer.ttl - 1));
        let Inside::Icmp { rest, .. } = Seen::parse(&error.bytes()).unwrap().inside else {
            unreachable!("it is one");
        };
        let expected =
            Inside::Icmp { kind: error.kind, word: error.word, source: sender, destination: receiver, rest };
        assert_eq!(seen.inside, expected);
    }
}

#[test]
fn errors_about_no_flow_and_other_messages_pass() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        let [to_client, to_backend] = on_the_wire(&mut world, &flow);
        let router = ip.router();
        let error = |sent: &Frame| Icmp::too_big(router, sent, 8);
        let elsewhere = |frame: &Frame, port: u16| {
            let destination = SocketAddr::new(frame.destination.ip(), port);
            Frame { destination, ..frame.clone() }
        };
        let mut not_tcp = error(&to_client);
        not_tcp.quoted[if ip == Ip::V4 { 9 } else { 6 }] = 17;
        let mut not_to_its_sender = error(&to_client);
        not_to_its_sender.outer.destination = SocketAddr::new(ip.vip(5), 0);
        let mut for_another_mac = error(&to_client);
        for_another_mac.outer.macs.1 = [2, 0, 0, 0, 0, 0x55];
        let mut of_seven_bytes = error(&to_backend);
        of_seven_bytes.quoted.pop();
        let echo = Icmp { kind: if ip == Ip::V4 { (8, 0) } else { (128, 0) }, ..error(&to_client) };
        let redirect = Icmp { kind: if ip == Ip::V4 { (5, 1) } else { (137, 0) }, ..error(&to_client) };
        let strange = [
            error(&elsewhere(&to_client, 1)),
            error(&elsewhere(&to_backend, 1)),
            not_tcp,
            not_to_its_sender,
            for_another_mac,
            of_seven_bytes,
            echo,
            redirect,
        ];
        for (index, message) in strange.iter().enumerate() {
            let exchange = world.run(&message.bytes());
            assert_eq!(exchange.outcome, Outcome::NotOurs, "{ip:?}, message {index}");
        }
    }
}

#[test]
fn an_error_that_cannot_be_sent_on_is_dropped_under_its_own_name() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        let [to_client, to_backend] = on_the_wire(&mut world, &flow);
        let mut late = Icmp::too_big(ip.router(), &to_backend, 8);
        late.outer.ttl = 1;
        assert_eq!(world.run(&late.bytes()).outcome, Outcome::TtlExpired);
        world.dataplane.set_next_hop(flow.backend, None);
        let error = Icmp::too_big(ip.router(), &to_client, 8);
        assert_eq!(world.run(&error.bytes()).outcome, Outcome::NextHopUnknown);
        if ip == Ip::V4 {
            let mut wrong = Icmp::too_big(ip.router(), &to_backend, 8).bytes();
            wrong[14 + 10] ^= 1;
            assert_eq!(world.run(&wrong).outcome, Outcome::BadChecksum);
        }
    }
}

#[test]
fn an_error_in_a_vlan_is_translated_too() {
    use lb_tests::packets::{LOOPBACK, Shape};
    for ip in Ip::BOTH {
        let tags = vec![(0x8100, 42)];
        let ports = vec![Shape::port(LOOPBACK, &[]), Shape::port(LOOPBACK, &tags)];
        let mut world = World::build(&Shape { ports, ..Shape::new(ip) });
        let flow = world.establish(ip.client(1));
        let [to_client, to_backend] = on_the_wire(&mut world, &flow);
        let exchange = world.run(&Icmp::too_big(ip.router(), &to_client, 8).bytes());
        assert_eq!(exchange.seen().tags, tags, "into the backends' VLAN");
        let mut error = Icmp::too_big(ip.router(), &to_backend, 8);
        error.outer.tags = tags;
        assert_eq!(world.run(&error.bytes()).seen().tags, [], "out of it");
    }
}

/// What the error asks its receiver for: the last four bytes of its header.
fn asked(world: &mut World, error: &Icmp) -> u32 {
    let exchange = world.run(&error.bytes());
    assert_eq!(exchange.outcome, Outcome::IcmpTranslated);
    let Inside::Icmp { word, .. } = exchange.seen().inside else { panic!("no ICMP") };
    u32::from_be_bytes(word)
}

#[test]
fn a_backend_is_asked_for_smaller_packets_only_by_who_saw_one() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        let nothing_sent = Frame { source: flow.listener, destination: flow.client, ..flow.from_backend() };
        let error = Icmp::too_big(ip.router(), &nothing_sent, 8);
        assert_eq!(world.run(&error.bytes()).outcome, Outcome::IcmpUnproven);
        let [to_client, to_backend] = on_the_wire(&mut world, &flow);
        for sequence in [to_client.sequence - 1, to_client.sequence + 10, 0xdead_beef] {
            let error = Icmp::too_big(ip.router(), &Frame { sequence, ..to_client.clone() }, 8);
            assert_eq!(world.run(&error.bytes()).outcome, Outcome::IcmpUnproven, "{sequence}");
        }
        for sequence in [to_client.sequence, to_client.sequence + 9] {
            let error = Icmp::too_big(ip.router(), &Frame { sequence, ..to_client.clone() }, 8);
            assert_eq!(asked(&mut world, &error), 1280);
        }
        // What the client itself sent is its own kernel's to compare.
        assert_eq!(asked(&mut world, &Icmp::too_big(ip.router(), &to_backend, 8)), 1280);
    }
}

#[test]
fn nobody_is_asked_for_packets_that_are_too_small() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        let floor = if ip == Ip::V4 { 552 } else { 1280 };
        for sent in on_the_wire(&mut world, &flow) {
            for mtu in [0, 68, floor - 1, floor, floor + 1, 1400] {
                let error = Icmp { word: u32::to_be_bytes(mtu), ..Icmp::too_big(ip.router(), &sent, 8) };
                assert_eq!(asked(&mut world, &error), mtu.max(floor));
            }
        }
    }
}

#[test]
fn the_floor_of_an_ipv4_path_is_as_it_was_set_last() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        let sent = on_the_wire(&mut world, &flow);
        for set in [1500, 68, 1000, 552] {
            world.dataplane.set_path_mtu_floor(set);
            let floor = if ip == Ip::V4 { set.into() } else { 1280 };
            for sent in &sent {
                for mtu in [0, 68, floor - 1, floor, 1500] {
                    let error = Icmp { word: u32::to_be_bytes(mtu), ..Icmp::too_big(ip.router(), sent, 8) };
                    assert_eq!(asked(&mut world, &error), mtu.max(floor), "{ip:?}, {set}");
                }
            }
        }
    }
}
