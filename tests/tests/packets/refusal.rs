//! "Connection refused", said at once and in the form that a client believes (RFC 9293 §3.10.7.1).

use ipnet::IpNet;
use lb_common::outcome::Outcome;
use lb_tests::packets::{ACK, Frame, Inside, Ip, LB_MAC, LOOPBACK, ROUTER_MAC, RST, Shape, World, extension};

#[test]
fn a_syn_without_a_usable_backend_is_answered_with_the_rst_that_refuses_it() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        world.select(0, &[]);
        let syn = Frame::syn(ip.client(1), ip.listener());
        let variants = [
            syn.clone(),
            Frame { tcp_options: Vec::new(), ..syn.clone() },
            Frame { padding: 6, ..syn.clone() },
            Frame { sequence: u32::MAX, payload: b"fast open".to_vec(), ..syn.clone() },
            Frame { payload: vec![1; 1200], ..syn.clone() },
            // Longer than a page: what is cut off lies in several pieces.
            Frame { payload: vec![1; 9000], ..syn.clone() },
            if ip == Ip::V4 {
                Frame { options: vec![1; 40], ..syn.clone() }
            } else {
                Frame { extensions: vec![extension::HOP_BY_HOP; 4], ..syn.clone() }
            },
        ];
        for syn in variants {
            let exchange = world.run(&syn.bytes());
            assert_eq!((exchange.outcome, exchange.service), (Outcome::RefusedNoBackend, Some(0)));
            assert!(!exchange.redirected);
            assert_eq!(exchange.bytes.len(), 14 + ip.header() + 20, "nothing behind the header");
            let seen = exchange.seen();
            assert_eq!((seen.source, seen.destination), (syn.destination, syn.source));
            assert_eq!((seen.macs, seen.ttl), ((LB_MAC, ROUTER_MAC), 64));
            let acknowledgement = syn.sequence.wrapping_add(1 + syn.payload.len() as u32);
            let expected = Inside::Tcp {
                flags: RST | ACK,
                sequence: 0,
                acknowledgement,
                options: Vec::new(),
                payload: Vec::new(),
            };
            assert_eq!(seen.inside, expected);
        }
        assert_eq!(world.slots(), [], "a refused client has no slot");
    }
}

#[test]
fn a_refusal_leaves_with_the_tags_that_the_syn_had() {
    for ip in Ip::BOTH {
        for tags in [vec![(0x8100, 42)], vec![(0x88a8, 7), (0x8100, 42)]] {
            let ports = vec![Shape::port(LOOPBACK, &tags)];
            let mut world = World::build(&Shape { ports, ..Shape::new(ip) });
            world.select(0, &[]);
            let exchange =
                world.run(&Frame { tags: tags.clone(), ..Frame::syn(ip.client(1), ip.listener()) }.bytes());
            assert_eq!(exchange.outcome, Outcome::RefusedNoBackend);
            assert_eq!(exchange.seen().tags, tags);
        }
    }
}

#[test]
fn only_syns_are_refused() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        world.select(0, &[]);
        for flags in 0..32 {
            let frame = Frame { flags, ..Frame::new(ip.client(1), ip.listener()) };
            let outcome = world.run(&frame.bytes()).outcome;
            let opens = flags & 0b1_0111 == 0b10;
            let expected = if opens { Outcome::RefusedNoBackend } else { Outcome::NoFlow };
            assert_eq!(outcome, expected, "flags {flags:#07b}");
        }
    }
}

#[test]
fn only_clients_that_are_allowed_may_open_flows() {
    for (ip, prefixes, allowed, refused) in [
        (Ip::V4, ["10.0.64.0/24", "fd00:40::/32"], Ip::V4.client(1), Ip::V4.address(65, 1)),
        (Ip::V6, ["10.0.64.0/24", "fd00:40::/32"], Ip::V6.client(1), Ip::V6.address(65, 1)),
    ] {
        let mut world = World::new(ip);
        let early = world.establish(std::net::SocketAddr::new(refused, 1234));
        let prefixes = prefixes.map(|prefix| prefix.parse::<IpNet>().unwrap());
        world.dataplane.set_allowed(0, &prefixes).unwrap();
        world.open(allowed, ip.listener());
        let syn = Frame::syn(std::net::SocketAddr::new(refused, 4321), ip.listener());
        let exchange = world.run(&syn.bytes());
        assert_eq!(exchange.outcome, Outcome::RefusedNotAllowed);
        assert_eq!(exchange.seen().flags(), RST | ACK);
        assert_eq!(world.slots().len(), 2);
        assert_eq!(
            world.run(&early.from_client().bytes()).outcome,
            Outcome::Forwarded,
            "prefixes are for new flows"
        );
    }
}
