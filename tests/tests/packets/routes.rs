//! By which interface and which neighbour a packet leaves.

use lb_common::{
    layout::{NEXT_HOPS, NextHop},
    outcome::{Event, Outcome},
};
use lb_tests::{
    lab::Lab,
    packets::{Change, Frame, Icmp, Ip, LB_MAC, LOOPBACK, ROUTER_MAC, Shape, World},
};
use nix::net::if_::if_nametoindex;

/// An interface that packets are sent to and that does not have to exist for that.
const ELSEWHERE: u32 = 7777;

#[test]
fn with_two_arms_a_packet_leaves_by_the_other_interface() {
    for ip in Ip::BOTH {
        let ports = vec![Shape::port(LOOPBACK, &[]), Shape::port(ELSEWHERE, &[])];
        let mut world = World::build(&Shape { ports, snat: vec![ip.address(1, 254)], ..Shape::new(ip) });
        let flow = world.open(ip.client(1), ip.listener());
        assert_eq!(flow.snat.ip(), ip.address(1, 254));
        assert!(world.run(&flow.from_client().bytes()).redirected);

        // Here packets come in by the loopback interface only, so the client moves to the other side instead.
        let answer = flow.from_backend();
        assert!(!world.run(&answer.bytes()).redirected);
        let (index, mac, _) = world.dataplane.learned_hops()[0];
        world.dataplane.correct_learned_hop(index, (mac, 1));
        let exchange = world.run(&answer.bytes());
        assert!(exchange.redirected);
        exchange.translated(&answer);
    }
}

#[test]
fn a_client_that_comes_by_another_router_is_answered_by_that_one() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        let other = [2, 0, 0, 0, 0, 0x77];
        // Looked at once a second.
        for slot in world.slots() {
            world.change(&slot, Change::Older(1));
        }
        world.run(&Frame { macs: (other, LB_MAC), ..flow.from_client() }.bytes());
        let seen = world.run(&flow.from_backend().bytes()).seen();
        assert_eq!(seen.macs, (LB_MAC, other));
        assert_eq!(world.dataplane.learned_hops().len(), 2);
    }
}

/// Leaves no room for the neighbour that a packet comes from.
pub(crate) fn fill_learned_hops(world: &mut World) {
    let hops = world.dataplane.map::<u64>("NEXT_HOP").unwrap();
    for index in 0..NEXT_HOPS {
        hops.write(index as usize, NextHop::new(u64::from(index) | 1 << 40, 0).0);
    }
}

#[test]
fn ways_back_that_no_flow_needs_are_forgotten_when_the_table_fills_up() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        let hops = world.dataplane.map::<u64>("NEXT_HOP").unwrap();
        let fill = |up_to: u32| {
            for index in (1..up_to as usize).filter(|index| hops.read(*index) == Some(0)) {
                hops.write(index, NextHop::new(index as u64 | 1 << 40, 0).0);
            }
        };
        fill(NEXT_HOPS / 2);
        assert_eq!(world.dataplane.forget_learned_hops(), 0, "there is room");
        fill(NEXT_HOPS);
        assert_eq!(world.dataplane.forget_learned_hops(), NEXT_HOPS as usize - 2);
        assert_eq!(world.run(&flow.from_backend().bytes()).outcome, Outcome::Replied);
        assert_eq!(world.dataplane.learned_hops().len(), 1);
    }
}

#[test]
fn a_client_whose_router_was_not_remembered_is_answered_by_the_route() {
    let lab = Lab::new().unwrap();
    for (ip, name, address) in [(Ip::V4, "v4", "10.0.64.254/24"), (Ip::V6, "v6", "fd00:40::fe/64")] {
        let host = lab.host(name).unwrap();
        let client = ip.client(1);
        host.ip("link add arm type veth peer name hand").unwrap();
        host.ip("link set hand up").unwrap();
        host.ip(&format!("link set arm address {} up", mac(LB_MAC))).unwrap();
        host.ip(&format!("address add {address} dev arm")).unwrap();
        host.ip(&format!("neighbour add {} lladdr {} dev arm nud permanent", client.ip(), mac(ROUTER_MAC)))
            .unwrap();
        host.in_namespace(|| {
            let arm = Shape::port(if_nametoindex("arm").unwrap(), &[]);
            let mut world =
                World::build(&Shape { ports: vec![Shape::port(LOOPBACK, &[]), arm], ..Shape::new(ip) });
            fill_learned_hops(&mut world);
            let syn = world.run(&Frame::syn(client, ip.listener()).bytes());
            assert!(syn.events.contains(&Event::NextHopOverflow));
            let flow = world.flow(client, ip.listener(), &syn);
            let answer = flow.from_backend();
            // The kernel looks up routes only for hosts that forward.
            assert_eq!(world.run(&answer.bytes()).outcome, Outcome::NextHopUnknown);
            host.forward().unwrap();
            let exchange = world.run(&answer.bytes());
            assert_eq!((exchange.outcome, exchange.redirected), (Outcome::Replied, true));
            assert_eq!(exchange.translated(&answer).macs, (LB_MAC, ROUTER_MAC));
            // So is what a router says about its requests, as they look on the backends' side.
            let request = Frame::new(flow.snat, ip.backend(flow.backend));
            let exchange = world.run(&Icmp::too_big(ip.router(), &request, 8).bytes());
            assert_eq!((exchange.outcome, exchange.redirected), (Outcome::IcmpTranslated, true));
        })
        .unwrap();
    }
}

fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}
