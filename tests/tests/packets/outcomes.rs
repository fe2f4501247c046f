//! Everything that can become of a packet, made to happen. The matches know every outcome and event: whoever adds one
//! adds its packet here.

use std::net::SocketAddr;

use ipnet::IpNet;
use lb_common::outcome::{Event, Outcome};
use lb_tests::packets::{
    ACK, Change, Exchange, Fragment, Frame, Icmp, Ip, LOOPBACK, RST, Shape, World, extension,
};
use lb_userspace::dataplane::SourceShares;

/// What cannot be made to happen here, and why.
type Impossible = &'static str;

const RACE: Impossible = "takes a second CPU that is in the middle of the same SYN: table.rs lets two race";

#[test]
fn every_outcome_can_be_made_to_happen() {
    for ip in Ip::BOTH {
        let mut world = World::build(&Shape {
            listeners: vec![(ip.listener(), 0), (SocketAddr::new(ip.vip(0), 9345), 1)],
            ..Shape::new(ip)
        });
        for outcome in Outcome::ALL {
            match make(*outcome, &mut world) {
                Ok(exchange) => assert_eq!(exchange.outcome, *outcome, "{ip:?}"),
                Err(reason) => println!("{ip:?}: {} is not made here: it {reason}", outcome.name()),
            }
        }
    }
}

fn make(outcome: Outcome, world: &mut World) -> Result<Exchange, Impossible> {
    let ip = world.ip;
    let (client, listener) = (ip.client(outcome as u32), ip.listener());
    let syn = Frame::syn(client, listener);
    Ok(match outcome {
        Outcome::NotOurs => world.run(&Frame::syn(client, SocketAddr::new(ip.vip(0), 22)).bytes()),
        Outcome::NoFlow => world.run(&Frame::new(client, listener).bytes()),
        Outcome::ReplyUnknown => {
            world.run(&Frame::new(ip.backend(1), SocketAddr::new(ip.vip(0), 5000)).bytes())
        }
        Outcome::UnknownInterface => world.run(&Frame { tags: vec![(0x8100, 5)], ..syn }.bytes()),
        Outcome::ForwardedLocal => {
            world.dataplane.add_backend(9, ip.listener(), true);
            world.select(0, &[9]);
            let exchange = world.run(&syn.bytes());
            world.select(0, &[1, 2, 3]);
            exchange
        }
        Outcome::Forwarded => world.run(&syn.bytes()),
        Outcome::Replied => {
            let flow = world.open(client, listener);
            world.run(&flow.syn_ack().bytes())
        }
        Outcome::IcmpTranslated => {
            let flow = world.open(client, listener);
            let sent = Frame::new(flow.snat, ip.backend(flow.backend));
            world.run(&Icmp::too_big(ip.router(), &sent, 8).bytes())
        }
        Outcome::RefusedNoBackend => {
            world.select(0, &[]);
            let exchange = world.run(&syn.bytes());
            world.select(0, &[1, 2, 3]);
            exchange
        }
        Outcome::RefusedNotAllowed => {
            let elsewhere: IpNet = format!("{}/128", Ip::V6.router()).parse().unwrap();
            world.dataplane.set_allowed(1, &[elsewhere]).unwrap();
            world.run(&Frame::syn(client, SocketAddr::new(ip.vip(0), 9345)).bytes())
        }
        Outcome::ResetClient | Outcome::ResetBackend => {
            let flow = world.establish(client);
            assert_eq!(world.kill(&flow), 1);
            let from_client = outcome == Outcome::ResetClient;
            let frame = if from_client { flow.from_client() } else { flow.from_backend() };
            world.run(&frame.bytes())
        }
        Outcome::SecondChance => {
            let flow = world.open(client, listener);
            world.run(&Frame { flags: RST | ACK, ..flow.from_backend() }.bytes())
        }
        Outcome::SynDoubted => {
            let flow = world.establish(client);
            world.run(&Frame { flags: RST, ..flow.from_client() }.bytes());
            world.run(&syn.bytes())
        }
        Outcome::IcmpUnproven => {
            let flow = world.establish(client);
            let sent = Frame { source: listener, destination: client, ..flow.from_backend() };
            world.run(&Icmp::too_big(ip.router(), &sent, 8).bytes())
        }
        Outcome::BackendInterface => {
            let flow = world.open(client, listener);
            world.dataplane.set_clients_only([0]);
            let exchange = world.run(&flow.syn_ack().bytes());
            world.dataplane.set_clients_only([]);
            exchange
        }
        Outcome::TableFull => {
            let mut small = World::build(&Shape { snat_ports: 1024..=1027, ..Shape::new(ip) });
            for number in 0..4 {
                small.open(ip.client(number), listener);
            }
            small.run(&syn.bytes())
        }
        Outcome::SourceBudget => {
            let mut small = World::build(&Shape { snat_ports: 1024..=1027, ..Shape::new(ip) });
            small.dataplane.set_source_shares(SourceShares { slots: Some(25), half_open: None });
            small.establish(ip.client(0));
            small.dataplane.count_sources().unwrap();
            small.run(&syn.bytes())
        }
        Outcome::SynRace => return Err(RACE),
        Outcome::Held => {
            world.dataplane.hold(true);
            let exchange = world.run(&syn.bytes());
            world.dataplane.hold(false);
            exchange
        }
        Outcome::NextHopUnknown => {
            let flow = world.open(client, listener);
            world.dataplane.set_next_hop(flow.backend, None);
            let exchange = world.run(&syn.bytes());
            world.dataplane.set_next_hop(flow.backend, Some(([2; 6], 0)));
            exchange
        }
        Outcome::TtlExpired => world.run(&Frame { ttl: 1, ..syn }.bytes()),
        Outcome::Fragment => world.run(&Frame { fragment: Some(Fragment::First), ..syn }.bytes()),
        Outcome::ExtensionHeaders if ip == Ip::V4 => return Err("has no meaning for IPv4"),
        Outcome::ExtensionHeaders => {
            world.run(&Frame { extensions: vec![extension::DESTINATION_OPTIONS; 5], ..syn }.bytes())
        }
        Outcome::Malformed => {
            let flow = world.open(client, listener);
            let mut bytes = flow.from_client().bytes();
            bytes.pop();
            world.run(&bytes)
        }
        Outcome::BadChecksum if ip == Ip::V6 => return Err("has no meaning for IPv6"),
        Outcome::BadChecksum => {
            let mut bytes = syn.bytes();
            bytes[14 + 10] ^= 1;
            world.run(&bytes)
        }
        Outcome::NoRoom => {
            let tagged = vec![Shape::port(LOOPBACK, &[]), Shape::port(LOOPBACK, &[(0x8100, 42)])];
            let mut world = World::build(&Shape { ports: tagged, ..Shape::new(ip) });
            // The kernel lends 256 bytes in front of a packet, and keeps 40 for itself. Metadata takes the rest.
            const ROOM: usize = 216;
            if !world.takes_metadata(ROOM) {
                return Err("takes more metadata than this kernel allows");
            }
            world.run_behind(&[0; ROOM], &syn.bytes())
        }
    })
}

#[test]
fn every_event_can_be_made_to_happen() {
    for ip in Ip::BOTH {
        for event in Event::ALL {
            let Some(exchange) = cause(*event, ip) else { continue };
            assert!(exchange.events.contains(event), "{ip:?} {event:?}: {exchange:?}");
        }
    }
}

/// None: no packet causes it, but the connect hook.
fn cause(event: Event, ip: Ip) -> Option<Exchange> {
    let one_set = Shape { snat_ports: 1024..=1027, backends: 1, ..Shape::new(ip) };
    let (client, listener) = (ip.client(9), ip.listener());
    let syn = Frame::syn(client, listener).bytes();
    Some(match event {
        Event::ConnectRedirected | Event::ConnectRefused | Event::ConnectUnnamed => return None,
        Event::FlowClaimed => World::new(ip).run(&syn),
        Event::FlowEstablished => {
            let mut world = World::new(ip);
            let flow = world.open(client, listener);
            world.run(&flow.syn_ack().bytes());
            world.run(&flow.from_client().bytes())
        }
        Event::BackendNeighbourOdd => {
            let mut world = World::new(ip);
            let flow = world.open(client, listener);
            world.dataplane.set_next_hop(flow.backend, Some(([6; 6], 0)));
            world.run(&flow.syn_ack().bytes())
        }
        Event::ClientNumbersOdd | Event::BackendNumbersOdd | Event::ResetDoubted => {
            let mut world = World::new(ip);
            let flow = world.establish(client);
            let frame = match event {
                Event::ClientNumbersOdd => Frame { acknowledgement: 0x8bad_f00d, ..flow.from_client() },
                Event::BackendNumbersOdd => Frame { sequence: 0xdead_beef, ..flow.from_backend() },
                _ => Frame { flags: RST, ..flow.from_client() },
            };
            world.run(&frame.bytes())
        }
        Event::ReusedEarly => {
            let mut world = World::build(&one_set);
            let flow = world.establish(ip.client(0));
            for number in 1..4 {
                world.establish(ip.client(number));
            }
            world.run(&Frame { flags: super::states::FIN_ACK, ..flow.from_backend() }.bytes());
            world.run(&Frame { flags: super::states::FIN_ACK, ..flow.from_client() }.bytes());
            world.run(&syn)
        }
        Event::HalfOpenReclaimed => {
            let mut world = World::build(&one_set);
            for number in 0..4 {
                world.open(ip.client(number), listener);
            }
            let slot = world.slots()[0];
            world.change(&slot, Change::ClaimedBefore(world.dataplane.ticks().frequency));
            world.run(&syn)
        }
        Event::Rebalanced => {
            let mut world = World::new(ip);
            let flow = world.open(client, listener);
            let others: Vec<u8> = (1..=3).filter(|id| *id != flow.backend).collect();
            world.select(0, &others);
            world.run(&syn)
        }
        Event::NextHopOverflow => {
            let mut world = World::new(ip);
            super::routes::fill_learned_hops(&mut world);
            world.run(&syn)
        }
    })
}
