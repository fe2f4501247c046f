//! What one source may use of the flow table.

use std::net::SocketAddr;

use ipnet::IpNet;
use lb_common::{outcome::Outcome, source_budget::SourceCount};
use lb_tests::packets::{Exchange, Flow, Frame, Ip, Shape, World};
use lb_userspace::dataplane::SourceShares;

/// Of 128 slots: 64, of which 32 half-open.
const SHARES: SourceShares = SourceShares { slots: Some(50), half_open: Some(25) };
const SLOTS: u16 = 64;
const HALF_OPEN: u16 = 32;

fn small(ip: Ip) -> World {
    let mut world = World::build(&Shape { snat_ports: 1024..=1151, ..Shape::new(ip) });
    world.dataplane.set_source_shares(SHARES);
    world.dataplane.count_sources().unwrap();
    world
}

/// A client of a source, by port.
fn client(ip: Ip, source: u8, number: u16) -> SocketAddr {
    SocketAddr::new(ip.address(64 + source, 7), 40_000 + number)
}

fn knock(world: &mut World, client: SocketAddr) -> Exchange {
    let listener = world.ip.listener();
    world.run(&Frame::syn(client, listener).bytes())
}

fn open(world: &mut World, source: u8, numbers: std::ops::Range<u16>) -> Vec<Flow> {
    let ip = world.ip;
    numbers.map(|number| world.open(client(ip, source, number), ip.listener())).collect()
}

#[test]
fn a_source_that_opens_more_than_its_share_is_refused_and_others_are_not() {
    for ip in Ip::BOTH {
        let mut world = small(ip);
        let flows = open(&mut world, 0, 0..HALF_OPEN);
        let late = client(ip, 0, HALF_OPEN);
        let refused = knock(&mut world, late);
        assert_eq!((refused.outcome, refused.service), (Outcome::SourceBudget, Some(0)), "{ip:?}");
        assert_eq!(knock(&mut world, flows[0].client).outcome, Outcome::Forwarded, "it has a slot");
        open(&mut world, 1, 0..4);

        // Counted anew: handshakes of this moment are handshakes still.
        world.dataplane.count_sources().unwrap();
        assert_eq!(knock(&mut world, late).outcome, Outcome::SourceBudget);
        flows.iter().for_each(|flow| world.prove(flow));
        world.dataplane.count_sources().unwrap();
        let more = open(&mut world, 0, HALF_OPEN..SLOTS);
        more.iter().for_each(|flow| world.prove(flow));
        world.dataplane.count_sources().unwrap();
        let late = client(ip, 0, SLOTS);
        assert_eq!(knock(&mut world, late).outcome, Outcome::SourceBudget, "half of all slots");
        open(&mut world, 1, 4..8);
        let refused = world.dataplane.over_budget(std::iter::once(0)).unwrap();
        assert_eq!(refused, 3);
    }
}

#[test]
fn a_source_whose_flows_have_ended_may_open_others() {
    for ip in Ip::BOTH {
        let mut world = small(ip);
        let mut flows = Vec::new();
        for part in [0..HALF_OPEN, HALF_OPEN..SLOTS] {
            let opened = open(&mut world, 0, part);
            opened.iter().for_each(|flow| world.prove(flow));
            world.dataplane.count_sources().unwrap();
            flows.extend(opened);
        }
        let late = client(ip, 0, SLOTS);
        assert_eq!(knock(&mut world, late).outcome, Outcome::SourceBudget);
        for flow in &flows[..2] {
            let fin = |frame| Frame { flags: super::states::FIN_ACK, ..frame };
            world.run(&fin(flow.from_client()).bytes());
            world.run(&fin(flow.from_backend()).bytes());
            world.run(&flow.last_ack().bytes());
        }
        assert_eq!(knock(&mut world, late).outcome, Outcome::SourceBudget, "until it is counted");
        world.dataplane.count_sources().unwrap();
        assert_eq!(knock(&mut world, late).outcome, Outcome::Forwarded);
        // The same tuple again, in its own slot, is a flow like another.
        assert_eq!(knock(&mut world, flows[0].client).outcome, Outcome::Forwarded);
        assert_eq!(world.slots().len(), usize::from(SLOTS) + 1);
    }
}

#[test]
fn budgets_that_are_off_refuse_nothing() {
    for ip in Ip::BOTH {
        let mut world = small(ip);
        let off = SourceShares::default();
        for (shares, admitted) in
            [(SourceShares { half_open: None, ..SHARES }, SLOTS + 20), (off, SLOTS + 20)]
        {
            world.dataplane.set_source_shares(shares);
            for slot in world.slots() {
                world.change(&slot, lb_tests::packets::Change::Word(lb_common::meta::Meta::FREE));
            }
            world.dataplane.count_sources().unwrap();
            let outcomes: Vec<_> =
                (0..SLOTS + 20).map(|number| knock(&mut world, client(ip, 0, number)).outcome).collect();
            let forwarded = outcomes.iter().filter(|it| **it == Outcome::Forwarded).count();
            assert_eq!(forwarded, usize::from(admitted), "{ip:?} {shares:?}");
        }
    }
}

#[test]
fn the_source_that_uses_most_is_known() {
    for ip in Ip::BOTH {
        let mut world = small(ip);
        assert_eq!(world.dataplane.heaviest_source().unwrap(), None);
        open(&mut world, 1, 0..20);
        open(&mut world, 0, 0..HALF_OPEN);
        let [usage4, usage6] = world.dataplane.count_sources().unwrap();
        let usage = if ip == Ip::V4 { usage4 } else { usage6 };
        assert_eq!((usage.slots, usage.half_open, usage.used()), (128, 52, 52));
        let heaviest = world.dataplane.heaviest_source().unwrap().unwrap();
        let length = if ip == Ip::V4 { 32 } else { 64 };
        let prefix = IpNet::new(client(ip, 0, 0).ip(), length).unwrap().trunc();
        assert_eq!(heaviest.prefix, prefix);
        assert_eq!(heaviest.used, SourceCount::new(0, HALF_OPEN.into()));
        assert_eq!(heaviest.limit, SourceCount::new(SLOTS.into(), HALF_OPEN.into()));
    }
}
