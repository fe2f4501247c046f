//! VLAN tags, interfaces and MAC addresses: where packets come from and go to.

use super::lab::{
    ACK, BACKENDS_MAC, BEHIND, DOUBLE_TAGGED, Flow, Lab, OURS, OURS_BEHIND, PLAIN, PLAIN_BEHIND, ROUTER, SYN,
    Segment, TAGGED, VERSIONS, tags_of,
};
use crate::{Outcome, headers::Mac, layout::NextHop};

#[test]
fn tags_are_exchanged_pushed_and_popped() {
    for version in VERSIONS {
        for client_side in [PLAIN, TAGGED, DOUBLE_TAGGED] {
            for backend_side in [PLAIN, TAGGED, DOUBLE_TAGGED, PLAIN_BEHIND] {
                let lab = Lab::new();
                let hop = NextHop::new(Mac::new(BACKENDS_MAC).number(), backend_side);
                for backend in &lab.memory.backends {
                    backend.next_hop.store(hop.0);
                }
                let syn = Segment::new(version.client(1), version.vip(), SYN)
                    .on(client_side)
                    .with_payload(b"carried along");
                let sent = lab.send(&syn).sent(Outcome::Forwarded);
                let (interface, ours) = (sent.interface, sent.source_mac);
                assert_eq!(sent.tags, tags_of(backend_side), "from {client_side} to {backend_side}");
                assert_eq!(sent.payload, syn.payload);
                assert_eq!(ours, if backend_side == PLAIN_BEHIND { OURS_BEHIND } else { OURS });
                assert_eq!(interface == BEHIND, backend_side == PLAIN_BEHIND);

                let flow = Flow { client: syn.from, listener: syn.to, snat: sent.from, backend: sent.to };
                let answer = Segment { interface, destination_mac: ours, ..flow.down(SYN | ACK) }
                    .on(backend_side)
                    .with_payload(b"and back");
                let reply = lab.send(&answer).sent(Outcome::Replied);
                assert_eq!(reply.tags, tags_of(client_side), "from {backend_side} to {client_side}");
                assert_eq!((reply.destination_mac, reply.source_mac), (ROUTER, OURS));
                assert_eq!(reply.payload, answer.payload);
            }
        }
    }
}

#[test]
fn a_tag_that_carries_only_a_priority_is_no_vlan() {
    for version in VERSIONS {
        let lab = Lab::new();
        let mut syn = Segment::new(version.client(1), version.vip(), SYN);
        syn.tags = vec![(0x8100, 0)];
        let mut bytes = syn.bytes();
        bytes[14] = 0xe0;
        assert_eq!(lab.run(syn.interface, &bytes).sent(Outcome::Forwarded).tags, []);
    }
}

#[test]
fn a_frame_for_another_mac_is_left_alone() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        for destination_mac in [BACKENDS_MAC, ROUTER, OURS_BEHIND, [0xff; 6]] {
            for segment in [flow.up(ACK), flow.down(ACK), Segment::new(version.client(2), version.vip(), SYN)]
            {
                let ran = lab.send(&Segment { destination_mac, ..segment });
                assert_eq!(ran.outcome, Outcome::NotOurs);
            }
        }
        assert_eq!(lab.occupied(), 1);
    }
}

#[test]
fn another_vlan_is_another_network() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        let strange: [&[(u16, u16)]; 5] = [
            &[(0x8100, 101)],
            &[(0x8100, 300)],
            &[(0x88a8, 200)],
            &[(0x88a8, 300), (0x8100, 200)],
            &[(0x88a8, 200), (0x8100, 300), (0x8100, 1)],
        ];
        for tags in strange {
            for segment in [flow.up(ACK), flow.down(ACK), Segment::new(version.client(2), version.vip(), SYN)]
            {
                let expected = if segment.to == version.vip() && tags.len() < 3 {
                    Outcome::UnknownInterface
                } else {
                    Outcome::NotOurs
                };
                let ran = lab.send(&Segment { tags: tags.to_vec(), ..segment });
                assert_eq!(ran.outcome, expected, "{tags:?}");
            }
        }
        assert_eq!(lab.occupied(), 1);
    }
}

#[test]
fn an_interface_without_the_listener_is_left_alone() {
    for version in VERSIONS {
        let lab = Lab::new();
        let syn = Segment::new(version.client(1), version.vip(), SYN);
        for (interface, destination_mac, expected) in [
            (BEHIND, OURS_BEHIND, Outcome::NotOurs),
            (BEHIND, OURS, Outcome::NotOurs),
            (99, OURS, Outcome::UnknownInterface),
        ] {
            let ran = lab.send(&Segment { interface, destination_mac, ..syn.clone() });
            assert_eq!(ran.outcome, expected, "interface {interface}");
        }
        assert_eq!(lab.occupied(), 0);
    }
}

#[test]
fn what_comes_in_beside_clients_is_no_backends() {
    for version in VERSIONS {
        let mut lab = Lab::new();
        let hop = NextHop::new(Mac::new(BACKENDS_MAC).number(), PLAIN_BEHIND);
        for backend in &lab.memory.backends {
            backend.next_hop.store(hop.0);
        }
        lab.memory.config.clients_only = 1 << PLAIN | 1 << TAGGED | 1 << DOUBLE_TAGGED;
        let syn = Segment::new(version.client(1), version.vip(), SYN);
        let sent = lab.send(&syn).sent(Outcome::Forwarded);
        let flow = Flow { client: syn.from, listener: syn.to, snat: sent.from, backend: sent.to };
        let forged = flow.down(SYN | ACK);
        for side in [PLAIN, TAGGED, DOUBLE_TAGGED] {
            let ran = lab.send(&forged.clone().on(side));
            assert_eq!(ran.outcome, Outcome::BackendInterface, "by {side}");
            assert_eq!(ran.bytes, forged.clone().on(side).bytes(), "it is not changed");
        }
        let real = Segment { interface: BEHIND, destination_mac: OURS_BEHIND, ..forged };
        assert_eq!(lab.send(&real).outcome, Outcome::Replied);
        assert_eq!(lab.send(&flow.up(ACK)).outcome, Outcome::Forwarded);
        assert_eq!(
            lab.send(&flow.down(ACK)).outcome,
            Outcome::BackendInterface,
            "nor when it is established"
        );
    }
}

#[test]
fn another_port_or_address_is_left_alone() {
    for version in VERSIONS {
        let lab = Lab::new();
        let vip = version.vip();
        for (to, outcome) in [
            ((vip.ip(), 22), Outcome::NotOurs),
            ((vip.ip(), 443), Outcome::NotOurs),
            ((version.backend(1).ip(), vip.port()), Outcome::NotOurs),
            ((version.client(9).ip(), 2000), Outcome::NotOurs),
        ] {
            let ran = lab.send(&Segment::new(version.client(1), to.into(), SYN));
            assert_eq!(ran.outcome, outcome, "to {to:?}");
        }
    }
}
