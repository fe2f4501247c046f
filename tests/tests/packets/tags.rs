//! VLAN tags: one (802.1Q) or two (802.1ad) on the way in, whatever the other side has on the way out.

use lb_common::outcome::Outcome;
use lb_tests::packets::{Frame, Ip, LOOPBACK, Shape, Tag, World};

#[test]
fn a_packet_leaves_with_the_tags_of_the_port_it_leaves_by() {
    let sides: [&[Tag]; 3] = [&[], &[(0x8100, 42)], &[(0x88a8, 7), (0x8100, 43)]];
    for ip in Ip::BOTH {
        for clients in sides {
            for backends in sides {
                if clients == backends {
                    one_port(ip, clients);
                } else {
                    two_ports(ip, clients, backends);
                }
            }
        }
    }
}

fn one_port(ip: Ip, tags: &[Tag]) {
    let mut world = World::build(&Shape { ports: vec![Shape::port(LOOPBACK, tags)], ..Shape::new(ip) });
    there_and_back(&mut world, tags, tags);
}

fn two_ports(ip: Ip, clients: &[Tag], backends: &[Tag]) {
    let ports = vec![Shape::port(LOOPBACK, clients), Shape::port(LOOPBACK, backends)];
    let mut world = World::build(&Shape { ports, ..Shape::new(ip) });
    there_and_back(&mut world, clients, backends);
}

fn there_and_back(world: &mut World, clients: &[Tag], backends: &[Tag]) {
    let (client, listener) = (world.ip.client(1), world.ip.listener());
    let syn = Frame { tags: clients.to_vec(), ..Frame::syn(client, listener) };
    let exchange = world.run(&syn.bytes());
    assert_eq!(exchange.translated(&syn).tags, backends, "{clients:?} to {backends:?}");
    let flow = world.flow(client, listener, &exchange);
    let answer = Frame { tags: backends.to_vec(), ..flow.syn_ack() };
    let exchange = world.run(&answer.bytes());
    assert_eq!(exchange.outcome, Outcome::Replied);
    assert_eq!(exchange.translated(&answer).tags, clients, "{backends:?} to {clients:?}");
    assert_eq!(world.slots().len(), 1);
}

#[test]
fn a_tag_that_carries_only_a_priority_is_no_vlan() {
    for ip in Ip::BOTH {
        let mut world = World::new(ip);
        let syn = Frame { tags: vec![(0x8100, 5 << 13)], ..Frame::syn(ip.client(1), ip.listener()) };
        let exchange = world.run(&syn.bytes());
        assert_eq!(exchange.outcome, Outcome::Forwarded);
        assert_eq!(exchange.translated(&syn).tags, []);
    }
}

#[test]
fn a_priority_in_the_tag_does_not_change_which_vlan_it_is() {
    for ip in Ip::BOTH {
        let ports = vec![Shape::port(LOOPBACK, &[(0x8100, 42)])];
        let mut world = World::build(&Shape { ports, ..Shape::new(ip) });
        let syn = Frame { tags: vec![(0x8100, 42 | 6 << 13)], ..Frame::syn(ip.client(1), ip.listener()) };
        assert_eq!(world.run(&syn.bytes()).outcome, Outcome::Forwarded);
        for tags in [vec![], vec![(0x8100, 43)], vec![(0x8100, 42), (0x8100, 42)]] {
            let syn = Frame { tags, ..Frame::syn(ip.client(2), ip.listener()) };
            assert_eq!(world.run(&syn.bytes()).outcome, Outcome::UnknownInterface, "{:?}", syn.tags);
        }
    }
}
