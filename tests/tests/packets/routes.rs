//! By which interface and which neighbour a packet leaves.

use std::net::SocketAddr;

use lb_common::{
    layout::{NEXT_HOPS, NextHop},
    meta::Meta,
    next_hop::UNNAMED,
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

/// A neighbour's MAC address, each number another one.
fn neighbour(number: u32) -> [u8; 6] {
    let [a, b, c, d] = number.to_be_bytes();
    [2, 0x10, a, b, c, d]
}

#[test]
fn ten_thousand_neighbours_on_one_segment_are_all_answered_by_their_own_mac_address() {
    const NEIGHBOURS: u32 = 10_000;
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flows: Vec<_> = (0..NEIGHBOURS)
            .map(|number| {
                let syn = Frame {
                    macs: (neighbour(number), LB_MAC),
                    ..Frame::syn(ip.client(number), ip.listener())
                };
                let exchange = world.run(&syn.bytes());
                assert_eq!(exchange.outcome, Outcome::Forwarded, "{ip:?} {number}");
                assert!(
                    !exchange.events.contains(&Event::NextHopOverflow),
                    "{ip:?} {number} of {NEIGHBOURS}"
                );
                world.flow(ip.client(number), ip.listener(), &exchange)
            })
            .collect();
        for (number, flow) in (0..).zip(&flows) {
            let seen = world.run(&flow.syn_ack().bytes()).seen();
            assert_eq!((seen.macs, seen.destination), ((LB_MAC, neighbour(number)), flow.client));
        }
        assert_eq!(world.dataplane.learned_hops().len(), NEIGHBOURS as usize);
    }
}

/// Ends a client's flow as the daemon does.
fn free(world: &World, client: SocketAddr) {
    let slot = world.slots().into_iter().find(|slot| slot.client == client).unwrap();
    world.change(&slot, Change::Word(Meta::FREE));
}

#[test]
fn ways_back_that_no_flow_names_are_forgotten_at_the_second_look() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        let (named, ..) = world.dataplane.learned_hops()[0];
        let stranger = Frame { macs: (neighbour(3), LB_MAC), ..Frame::syn(ip.client(3), ip.listener()) };
        world.run(&stranger.bytes());
        let unnamed =
            world.dataplane.learned_hops().into_iter().find(|(index, ..)| *index != named).unwrap().0;
        assert_eq!(world.dataplane.age_learned_hops().unwrap(), [] as [usize; 0], "named");
        free(&world, ip.client(3));

        assert_eq!(world.dataplane.age_learned_hops().unwrap(), [] as [usize; 0], "the first look");
        assert_eq!(world.dataplane.learned_hops().len(), 2);
        // Its own neighbour takes it again, and no flow names it once more.
        world.run(&stranger.bytes());
        assert_eq!(world.dataplane.age_learned_hops().unwrap(), [] as [usize; 0], "named between the looks");
        free(&world, ip.client(3));
        assert_eq!(world.dataplane.age_learned_hops().unwrap(), [] as [usize; 0], "the first look again");
        assert_eq!(world.dataplane.age_learned_hops().unwrap(), [unnamed]);

        let seen = world.run(&flow.from_backend().bytes()).seen();
        assert_eq!(seen.macs, (LB_MAC, ROUTER_MAC));
        assert_eq!(world.dataplane.learned_hops(), [(named, ROUTER_MAC, 0)]);
    }
}

#[test]
fn a_way_back_that_is_about_to_be_forgotten_still_leads_back() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let flow = world.establish(ip.client(1));
        let hops = world.dataplane.map::<u64>("NEXT_HOP").unwrap();
        let (index, ..) = world.dataplane.learned_hops()[0];
        let word = hops.read(index).unwrap();
        hops.write(index, word | UNNAMED);
        assert_eq!(world.run(&flow.from_backend().bytes()).seen().macs, (LB_MAC, ROUTER_MAC));
        assert_eq!(world.dataplane.learned_hops(), [(index, ROUTER_MAC, 0)]);
        // The client's next packet that is looked at takes the mark off and stays with the entry.
        world.change(&world.taken(&flow), Change::Older(1));
        world.run(&flow.from_client().bytes());
        assert_eq!(hops.read(index), Some(word));
        assert_eq!(world.dataplane.learned_hops(), [(index, ROUTER_MAC, 0)]);
    }
}

#[test]
fn a_way_back_that_the_daemon_found_is_used_while_the_slot_is_the_same_flows() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        fill_learned_hops(&mut world);
        let (one, other) = (ip.client(1), ip.client(2));
        let flow = world.open(one, ip.listener());
        assert!(world.run(&flow.syn_ack().bytes()).outcome == Outcome::NextHopUnknown);
        let unremembered = world.dataplane.unremembered_flows(10);
        let [found] = unremembered[..] else { panic!("{unremembered:?}") };
        assert_eq!((found.client, found.listener), (one.ip(), ip.vip(0)));
        assert!(!world.dataplane.remember_next_hop(&found, (ROUTER_MAC, 0)), "the table is full");

        // Room far from the neighbour's own buckets.
        let hops = world.dataplane.map::<u64>("NEXT_HOP").unwrap();
        hops.write(20_000, 0);
        assert!(world.dataplane.remember_next_hop(&found, (ROUTER_MAC, 0)));
        assert_eq!(world.run(&flow.syn_ack().bytes()).seen().macs, (LB_MAC, ROUTER_MAC));
        assert_eq!(world.dataplane.unremembered_flows(10), []);
        assert!(!world.dataplane.remember_next_hop(&found, (neighbour(1), 0)), "it has one");

        // The slot is another flow's when the answer comes.
        world.open(other, ip.listener());
        let unremembered = world.dataplane.unremembered_flows(10);
        let [late] = unremembered[..] else { panic!("{unremembered:?}") };
        free(&world, other);
        assert!(!world.dataplane.remember_next_hop(&late, (ROUTER_MAC, 0)), "no flow has the slot");
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
