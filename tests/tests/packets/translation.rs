//! What a packet becomes on its way, and which packets are none of ours.

use std::net::SocketAddr;

use etherparse::PacketBuilder;
use lb_common::{meta::Kind, outcome::Outcome};
use lb_tests::packets::{
    ACK, Change, Fragment, Frame, Icmp, Ip, LB_MAC, LISTENER_PORT, LOOPBACK, PSH, ROUTER_MAC, SYN, Shape,
    World, backend_mac, extension,
};

/// An interface that packets are sent to and that does not have to exist for that.
const ELSEWHERE: u32 = 7777;

#[test]
fn a_clients_packet_reaches_its_backend_and_the_answer_its_client() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        for length in [0, 1, 2, 63, 536, 1399, 1400] {
            let payload: Vec<u8> = (0..length).map(|byte| byte as u8 ^ 0x5a).collect();
            let request = Frame { payload, flags: PSH | ACK, ttl: 2, ..flow.from_client() };
            let exchange = world.run(&request.bytes());
            let seen = exchange.translated(&request);
            assert_eq!((exchange.outcome, exchange.service), (Outcome::Forwarded, Some(0)));
            assert_eq!((seen.source, seen.destination), (flow.snat, ip.backend(flow.backend)));
            assert_eq!(seen.macs, (LB_MAC, backend_mac(flow.backend)));

            let answer = Frame { ttl: 255, ..request.answered_by(&flow.from_backend()) };
            let exchange = world.run(&answer.bytes());
            let seen = exchange.translated(&answer);
            assert_eq!((exchange.outcome, exchange.service), (Outcome::Replied, Some(0)));
            assert_eq!((seen.source, seen.destination), (flow.listener, flow.client));
            assert_eq!(seen.macs, (LB_MAC, ROUTER_MAC));
            assert!(!exchange.redirected);
        }
    }
}

/// The same payload and flags the other way.
trait Answered {
    fn answered_by(&self, back: &Frame) -> Frame;
}

impl Answered for Frame {
    fn answered_by(&self, back: &Frame) -> Frame {
        Frame { payload: self.payload.clone(), flags: self.flags, ..back.clone() }
    }
}

/// A checksum has two ways to say zero, and difference arithmetic is where they are mistaken for each other.
#[test]
fn checksums_hold_for_every_value_that_a_payload_can_give_them() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        // One half-word steps through the sums around both zeros, in either direction's checksum.
        for value in (0..=u16::MAX).step_by(61).chain(0..64).chain(u16::MAX - 64..=u16::MAX) {
            let payload = value.to_be_bytes().to_vec();
            let (there, back) = (flow.from_client(), flow.from_backend());
            for frame in [Frame { payload: payload.clone(), ..there }, Frame { payload, ..back }] {
                world.run(&frame.bytes()).translated(&frame);
            }
        }
    }
}

#[test]
fn options_and_extension_headers_are_looked_through_and_kept() {
    let mut world = World::new(Ip::V4);
    let flow = world.establish(Ip::V4.client(1));
    for words in 1..=10 {
        let options: Vec<u8> = (0..words * 4).map(|byte| if byte < 2 { 1 } else { 0 }).collect();
        for frame in [flow.from_client(), flow.from_backend()] {
            let frame = Frame { options: options.clone(), payload: vec![7; 9], ..frame };
            world.run(&frame.bytes()).translated(&frame);
        }
        let mut broken = Frame { options, ..flow.from_client() }.bytes();
        broken[14 + 20] ^= 0x80;
        assert_eq!(world.run(&broken).outcome, Outcome::BadChecksum, "the checksum covers options");
    }

    let mut world = World::new(Ip::V6);
    let flow = world.establish(Ip::V6.client(1));
    let headers = [
        extension::HOP_BY_HOP,
        extension::ROUTING,
        extension::DESTINATION_OPTIONS,
        extension::DESTINATION_OPTIONS,
    ];
    for count in 1..=headers.len() {
        for frame in [flow.from_client(), flow.from_backend()] {
            let frame = Frame { extensions: headers[..count].to_vec(), payload: vec![7; 9], ..frame };
            world.run(&frame.bytes()).translated(&frame);
        }
    }
}

#[test]
fn the_padding_of_a_short_frame_is_no_payload() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        let frame = Frame { padding: 6, ..flow.from_client() };
        let exchange = world.run(&frame.bytes());
        assert_eq!(exchange.translated(&frame).payload(), b"");
        assert_eq!(exchange.bytes.len(), frame.bytes().len());
    }
}

#[test]
fn a_frame_longer_than_a_page_is_forwarded_like_any_other() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        // The kernel lends the program the first 3,520 bytes; what is beyond lies in further pieces.
        for length in [3000, 3520, 3521, 8900, 16_000] {
            let payload: Vec<u8> = (0..length).map(|byte| (byte % 251) as u8).collect();
            for frame in [flow.from_client(), flow.from_backend()] {
                let frame = Frame { payload: payload.clone(), ..frame };
                let exchange = world.run(&frame.bytes());
                assert_ne!(exchange.outcome, Outcome::Malformed, "{ip:?} {length} bytes of payload");
                exchange.translated(&frame);
            }
        }
    }
}

#[test]
fn frames_for_another_mac_are_not_ours_and_those_by_another_interface_or_vlan_are_counted() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        for frame in [Frame::syn(ip.client(2), ip.listener()), flow.from_client(), flow.from_backend()] {
            for macs in [(ROUTER_MAC, [0xff; 6]), (ROUTER_MAC, [2, 0, 0, 0, 0, 0x55])] {
                let exchange = world.run(&Frame { macs, ..frame.clone() }.bytes());
                assert_eq!((exchange.outcome, exchange.service), (Outcome::NotOurs, None));
            }
            let to_listener = frame.destination == ip.listener();
            let exchange = world.run(&Frame { tags: vec![(0x8100, 5)], ..frame }.bytes());
            let counted = (Outcome::UnknownInterface, Some(0));
            let expected = if to_listener { counted } else { (Outcome::NotOurs, None) };
            assert_eq!((exchange.outcome, exchange.service), expected);
        }
        assert_eq!(world.slots().len(), 1);

        let mut world = World::build(&Shape { ports: vec![Shape::port(ELSEWHERE, &[])], ..Shape::new(ip) });
        let exchange = world.run(&Frame::syn(ip.client(2), ip.listener()).bytes());
        assert_eq!(exchange.outcome, Outcome::UnknownInterface);
    }
}

/// A program on a bond runs on its members.
#[test]
fn what_comes_in_by_a_member_of_a_bond_comes_in_by_the_bond() {
    for ip in Ip::BOTH {
        let mut world = World::build(&Shape { ports: vec![Shape::port(ELSEWHERE, &[])], ..Shape::new(ip) });
        world.dataplane.set_members(&[(LOOPBACK + 100, 77), (LOOPBACK, ELSEWHERE)]).unwrap();
        let flow = world.establish(ip.client(1));
        let exchange = world.run(&flow.from_backend().bytes());
        assert!(!exchange.redirected, "the bond sends it by a member that it chooses");
        // Others come and go, and it stays.
        for others in [&[][..], &[(LOOPBACK + 101, 77), (LOOPBACK + 102, 78)]] {
            let members: Vec<_> = others.iter().copied().chain([(LOOPBACK, ELSEWHERE)]).collect();
            world.dataplane.set_members(&members).unwrap();
            assert_eq!(world.dataplane.members(), members.into_iter().collect());
            assert_eq!(world.run(&flow.from_backend().bytes()).outcome, exchange.outcome);
        }
        world.dataplane.set_members(&[]).unwrap();
        assert_eq!(world.run(&flow.from_client().bytes()).outcome, Outcome::UnknownInterface);
    }
}

/// That they are unchanged is checked for every packet that passes: see `World::run`.
#[test]
fn foreign_packets_pass() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        let (client, vip) = (ip.client(1), ip.listener());
        let port = |port| SocketAddr::new(vip.ip(), port);
        let tcp = [
            Frame::syn(client, port(22)),
            Frame::syn(client, SocketAddr::new(ip.vip(1), LISTENER_PORT)),
            Frame::new(vip, client),
            Frame::new(client, flow.snat),
            Frame::new(ip.backend(flow.backend % 3 + 1), SocketAddr::new(flow.snat.ip(), 1023)),
            Frame { fragment: Some(Fragment::Later), ..flow.from_client() },
            Frame { tags: vec![(0x88a8, 1), (0x8100, 2), (0x8100, 3)], ..flow.from_client() },
        ];
        let mut frames: Vec<_> = tcp.iter().map(Frame::bytes).collect();
        frames.push(udp(client, vip));
        frames.push(Icmp { kind: if ip == Ip::V4 { (8, 0) } else { (128, 0) }, ..icmp(client, vip) }.bytes());
        frames.push(arp());
        // Nothing but an Ethernet header, of kinds known and unknown.
        for kind in [0x0800u16, 0x86dd, 0x8100, 0x88a8, 0x88cc, 0x0806, 0x0004] {
            let mut frame = flow.from_client().bytes()[..14].to_vec();
            frame[12..].copy_from_slice(&kind.to_be_bytes());
            frames.push(frame);
        }
        // The wrong version in an IP header.
        let mut confused = flow.from_client().bytes();
        confused[14] ^= 0x20;
        frames.push(confused);
        for frame in frames {
            assert_eq!(world.run(&frame).outcome, Outcome::NotOurs, "{ip:?}: {frame:02x?}");
        }
        assert_eq!(world.slots().len(), 1);
    }
}

fn icmp(client: SocketAddr, vip: SocketAddr) -> Icmp {
    Icmp::too_big(client.ip(), &Frame::new(vip, client), 8)
}

fn udp(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2(ROUTER_MAC, LB_MAC);
    let builder = match (source, destination) {
        (SocketAddr::V4(source), SocketAddr::V4(destination)) => {
            ethernet.ipv4(source.ip().octets(), destination.ip().octets(), 64)
        }
        (SocketAddr::V6(source), SocketAddr::V6(destination)) => {
            ethernet.ipv6(source.ip().octets(), destination.ip().octets(), 64)
        }
        _ => unreachable!("one family"),
    };
    let mut bytes = Vec::new();
    builder.udp(source.port(), destination.port()).write(&mut bytes, b"not TCP").unwrap();
    bytes
}

fn arp() -> Vec<u8> {
    let mut frame = [&[0xff; 6][..], &ROUTER_MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &ROUTER_MAC].concat();
    frame.extend([10, 0, 64, 1, 0, 0, 0, 0, 0, 0, 10, 0, 0, 100]);
    frame
}

#[test]
fn one_client_port_may_talk_to_two_listeners_at_once() {
    for ip in Ip::BOTH {
        let second = SocketAddr::new(ip.vip(0), 9345);
        let third = SocketAddr::new(ip.vip(1), LISTENER_PORT);
        let listeners = vec![(ip.listener(), 0), (second, 0), (third, 1)];
        let mut world = World::build(&Shape { listeners, ..Shape::new(ip) });
        let flows = [ip.listener(), second, third].map(|listener| world.open(ip.client(1), listener));
        assert_eq!(world.slots().len(), 3, "a slot each");
        for flow in &flows {
            world.prove(flow);
            let seen = world.run(&flow.from_backend().bytes()).seen();
            assert_eq!((seen.source, seen.destination), (flow.listener, flow.client));
        }
        let service = world.run(&flows[2].from_client().bytes()).service;
        assert_eq!(service, Some(1));
    }
}

#[test]
fn sixteen_listeners_share_a_port_number() {
    for ip in Ip::BOTH {
        let listeners: Vec<_> = (0..16)
            .map(|number| (SocketAddr::new(ip.vip(number), LISTENER_PORT), usize::from(number % 2)))
            .collect();
        let mut world = World::build(&Shape { listeners: listeners.clone(), ..Shape::new(ip) });
        for (listener, service) in listeners {
            let flow = world.open(ip.client(1), listener);
            assert_eq!(world.run(&flow.from_client().bytes()).service, Some(service));
            assert_eq!(world.run(&flow.from_backend().bytes()).seen().source, listener);
        }
        assert_eq!(world.slots().len(), 16);
        let stranger = Frame::syn(ip.client(1), SocketAddr::new(ip.vip(16), LISTENER_PORT));
        assert_eq!(world.run(&stranger.bytes()).outcome, Outcome::NotOurs);
    }
}

#[test]
fn every_snat_address_is_used_and_replies_to_each_are_known() {
    for ip in Ip::BOTH {
        // The first and the last are looked up in the same place.
        let snat: Vec<_> = [10, 11, 12, 74].map(|host| ip.address(2, host)).to_vec();
        let mut world = World::build(&Shape { snat: snat.clone(), ..Shape::new(ip) });
        let mut used = vec![0; snat.len()];
        for number in 0..64 {
            let flow = world.establish(ip.client(number));
            used[snat.iter().position(|address| *address == flow.snat.ip()).unwrap()] += 1;
        }
        assert!(used.iter().all(|count| *count > 0), "{used:?}");
        for slot in world.slots() {
            let elsewhere = SocketAddr::new(snat[(slot.address + 1) % snat.len()], slot.port);
            let flow = Frame::new(ip.backend(slot.meta.backend()), elsewhere);
            let exchange = world.run(&flow.bytes());
            assert_ne!(
                exchange.outcome,
                Outcome::Replied,
                "the same port on another address is another slot"
            );
        }
    }
}

#[test]
fn slots_stay_in_their_range_and_off_blocked_ports() {
    for ip in Ip::BOTH {
        // Sets come in groups, here of four: the only whole one is that of 40,016 to 40,031.
        let mut world = World::build(&Shape {
            snat_ports: 40_002..=40_039,
            listeners: vec![(SocketAddr::new(ip.vip(0), 40_018), 0)],
            ..Shape::new(ip)
        });
        for port in [40_016, 40_019, 40_021] {
            world.dataplane.block(port);
        }
        let listener = SocketAddr::new(ip.vip(0), 40_018);
        let mut outcomes = Vec::new();
        for number in 0..400 {
            let outcome = world.run(&Frame::syn(ip.client(number), listener).bytes()).outcome;
            if outcome == Outcome::Forwarded {
                // On a slow machine handshakes would be old enough to be reclaimed meanwhile.
                for slot in world.slots() {
                    world.change(&slot, Change::Word(slot.meta.become_kind(Kind::Established)));
                }
            }
            outcomes.push(outcome);
        }
        let mut ports: Vec<_> = world.slots().iter().map(|slot| slot.port).collect();
        ports.sort_unstable();
        let expected: Vec<u16> =
            (40_016..=40_031).filter(|port| ![40_016, 40_018, 40_019, 40_021].contains(port)).collect();
        assert_eq!(ports, expected, "every slot that may be used, and no other");
        assert_eq!(outcomes.iter().filter(|outcome| **outcome == Outcome::Forwarded).count(), expected.len());
        assert!(outcomes.contains(&Outcome::TableFull));
    }
}

#[test]
fn only_the_slots_own_backend_is_answered_for() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        let other = ip.backend(flow.backend % 3 + 1);
        let right = ip.backend(flow.backend);
        for (source, expected) in [
            (right, Outcome::Replied),
            (other, Outcome::ReplyUnknown),
            (SocketAddr::new(right.ip(), 22), Outcome::NotOurs),
            (ip.client(5), Outcome::NotOurs),
        ] {
            let frame = Frame { flags: SYN | ACK, ..Frame::new(source, flow.snat) };
            assert_eq!(world.run(&frame.bytes()).outcome, expected, "{source}");
        }
    }
}
