//! A flow's life, as its packets show it.

use super::lab::{
    ACK, BACKEND_START, BACKENDS_MAC, FIN, FRONT, Flow, Lab, OTHER_ROUTER, OURS, ROUTER, RST, SYN, Segment,
    VERSIONS, Version,
};
use crate::{
    Outcome,
    flow::{Clock, Family as _, Found, Query, V4},
    layout::{NextHop, backend_flag},
    memory::{port_word, words},
    meta::{BACKEND_FIN, CLIENT_FIN, Kind, RESET, SYN_ACK, SYN_WAITS},
    outcome::Event,
    segment,
    subprograms::Subprograms as _,
    transition::{HALF_CLOSED_SILENCE, RESET_QUARANTINE},
};

#[test]
fn a_syn_goes_to_a_backend_in_our_name() {
    for version in VERSIONS {
        let lab = Lab::new();
        let syn = Segment {
            tcp_options: vec![2, 4, 5, 180],
            ..Segment::new(version.client(1), version.vip(), SYN)
        };
        let sent = lab.send(&syn).sent(Outcome::Forwarded);
        let slot = lab.slot(syn.from, syn.to).slot();
        assert_eq!(sent.from, (version.vip().ip(), slot.port()).into());
        assert!((1..=3).any(|number| version.backend(number) == sent.to));
        let expected = Segment {
            source_mac: OURS,
            destination_mac: BACKENDS_MAC,
            from: sent.from,
            to: sent.to,
            ttl: syn.ttl - 1,
            ..syn
        };
        assert_eq!(sent, expected, "nothing else has changed");
    }
}

#[test]
fn an_answer_goes_to_the_client_in_the_listeners_name() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.open(version.client(1), version.vip());
        let answer = flow.down(SYN | ACK);
        let sent = lab.send(&answer).sent(Outcome::Replied);
        let expected = Segment {
            source_mac: OURS,
            destination_mac: ROUTER,
            from: version.vip(),
            to: flow.client,
            ttl: answer.ttl - 1,
            ..answer
        };
        assert_eq!(sent, expected, "nothing else has changed");
    }
}

#[test]
fn a_flow_is_established_when_its_backend_has_proven_it() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        lab.assert_flows(&flow);
        assert_eq!((lab.events(Event::FlowClaimed), lab.events(Event::FlowEstablished)), (1, 1));
        assert_eq!(lab.occupied(), 1);
    }
}

#[test]
fn the_black_box_is_told_of_beginnings_and_not_of_segments() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        assert_eq!(lab.memory.take_notes().len(), 2, "claimed, established");
        for _ in 0..5 {
            lab.assert_flows(&flow);
        }
        assert_eq!(lab.memory.take_notes(), []);
    }
}

#[test]
fn a_segment_of_nobodys_flow_is_left_to_the_kernel() {
    for version in VERSIONS {
        let lab = Lab::new();
        for flags in [ACK, FIN | ACK, RST, SYN | ACK, SYN | RST, SYN | FIN, 0] {
            let ran = lab.send(&Segment::new(version.client(1), version.vip(), flags));
            assert_eq!(ran.outcome, Outcome::NoFlow, "flags {flags:#x}");
        }
        assert_eq!(lab.occupied(), 0);
    }
}

#[test]
fn one_client_port_may_talk_to_two_listeners() {
    for version in VERSIONS {
        let lab = Lab::new();
        let one = lab.establish(version.client(1), version.vip());
        let other = lab.establish(version.client(1), version.other_vip());
        assert_ne!(one.snat, other.snat);
        for flow in [one, other] {
            lab.assert_flows(&flow);
        }
        assert_eq!(lab.occupied(), 2);
    }
}

#[test]
fn a_flow_keeps_its_backend_whatever_the_table_says() {
    for version in VERSIONS {
        let mut lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        for numbers in [&[1][..], &[2], &[3], &[]] {
            lab.select(numbers);
            lab.assert_flows(&flow);
        }
    }
}

#[test]
fn a_retransmitted_syn_goes_where_the_first_one_went() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.open(version.client(1), version.vip());
        for _ in 0..3 {
            assert_eq!(lab.open(flow.client, flow.listener), flow);
        }
        assert_eq!(lab.occupied(), 1);
    }
}

#[test]
fn a_retransmitted_syn_leaves_a_backend_that_takes_no_new_flows() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.open(version.client(1), version.vip());
        lab.backend(flow.backend).flags.store(0);
        let moved = lab.open(flow.client, flow.listener);
        assert_ne!(moved.backend, flow.backend);
        assert_eq!(moved.snat, flow.snat, "in the same slot");
        assert_eq!((lab.events(Event::Rebalanced), lab.occupied()), (1, 1));
        assert_eq!(lab.send(&flow.down(SYN | ACK)).outcome, Outcome::ReplyUnknown, "too late");
        lab.send(&moved.down(SYN | ACK)).sent(Outcome::Replied);
    }
}

#[test]
fn a_syn_stays_with_a_backend_that_has_answered() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.open(version.client(1), version.vip());
        lab.send(&flow.down(SYN | ACK)).sent(Outcome::Replied);
        lab.backend(flow.backend).flags.store(0);
        assert_eq!(lab.open(flow.client, flow.listener), flow);
    }
}

#[test]
fn a_syn_leaves_a_backend_that_takes_no_new_flows_when_its_answer_is_old() {
    for version in VERSIONS {
        let lab = Lab::new();
        // Perhaps the first SYN was forged, and the client's port is used only now.
        let flow = lab.open(version.client(1), version.vip());
        lab.send(&flow.down(SYN | ACK)).sent(Outcome::Replied);
        lab.memory.advance(7);
        lab.backend(flow.backend).flags.store(0);
        assert_eq!(lab.open(flow.client, flow.listener), flow, "its client may have acknowledged the answer");
        lab.memory.advance(1);
        let moved = lab.open(flow.client, flow.listener);
        assert_ne!(moved.backend, flow.backend);
        assert_eq!((moved.snat, lab.events(Event::Rebalanced)), (flow.snat, 1), "in the same slot");
        lab.send(&moved.down(SYN | ACK)).sent(Outcome::Replied);
        lab.send(&moved.up(ACK)).sent(Outcome::Forwarded);
        lab.assert_flows(&moved);
    }
}

/// RFC 9293 §3.10.7.1: what a closed port answers.
fn assert_refused(answer: &Segment, syn: &Segment, outcome: Outcome) {
    let expected = Segment {
        source_mac: syn.destination_mac,
        destination_mac: syn.source_mac,
        from: syn.to,
        to: syn.from,
        ttl: 64,
        options: Vec::new(),
        next_header: 6,
        flags: RST | ACK,
        sequence: 0,
        acknowledgement: syn.sequence.wrapping_add(1 + syn.payload.len() as u32),
        tcp_options: Vec::new(),
        payload: Vec::new(),
        padding: 0,
        ..syn.clone()
    };
    assert_eq!(*answer, expected, "{outcome:?}");
}

#[test]
fn without_a_usable_backend_a_syn_is_refused_at_once() {
    for version in VERSIONS {
        let mut lab = Lab::new();
        lab.select(&[]);
        let plain = Segment::new(version.client(1), version.vip(), SYN);
        for syn in [
            Segment { sequence: u32::MAX, ..plain.clone() },
            Segment { padding: 6, ..plain.clone() },
            Segment { tcp_options: vec![2, 4, 5, 180], ..plain.clone() }.with_payload(b"fast open"),
            plain.clone().with_options(2),
            plain.clone().on(super::lab::TAGGED),
            plain.clone().on(super::lab::DOUBLE_TAGGED).with_options(1).with_payload(b"all of it"),
        ] {
            let ran = lab.send(&syn);
            assert_refused(&ran.sent(Outcome::RefusedNoBackend), &syn, Outcome::RefusedNoBackend);
        }
        assert_eq!(lab.occupied(), 0);
    }
}

#[test]
fn a_client_that_is_not_allowed_is_refused() {
    for version in VERSIONS {
        let mut lab = Lab::new();
        let before = lab.establish(version.client(1), version.vip());
        lab.memory.services[usize::from(lab.service)].restricted = 1;
        let guest = version.client(2);
        let mapped = match guest.ip() {
            std::net::IpAddr::V4(address) => address.to_ipv6_mapped(),
            std::net::IpAddr::V6(address) => address,
        };
        lab.memory.allowed.insert((lab.service, crate::memory::words(mapped.into())));
        lab.establish(guest, version.vip());
        let syn = Segment::new(version.client(3), version.vip(), SYN);
        assert_refused(&lab.send(&syn).sent(Outcome::RefusedNotAllowed), &syn, Outcome::RefusedNotAllowed);
        lab.assert_flows(&before);
        assert_eq!(lab.occupied(), 2);
    }
}

#[test]
fn a_refused_syn_has_a_second_chance_and_no_third() {
    for version in VERSIONS {
        let lab = Lab::new();
        let first = lab.open(version.client(1), version.vip());
        assert_eq!(lab.send(&first.down(RST | ACK)).outcome, Outcome::SecondChance);
        let second = lab.open(first.client, first.listener);
        assert_ne!(second.backend, first.backend);
        assert_eq!(second.snat, first.snat, "in the same slot");
        let refusal = lab.send(&second.down(RST | ACK)).sent(Outcome::Replied);
        assert_eq!((refusal.to, refusal.flags), (first.client, RST | ACK));
        assert!(lab.meta(&second).is_closed());
    }
}

#[test]
fn a_second_chance_may_succeed() {
    for version in VERSIONS {
        let lab = Lab::new();
        let first = lab.open(version.client(1), version.vip());
        assert_eq!(lab.send(&first.down(RST | ACK)).outcome, Outcome::SecondChance);
        let flow = lab.establish(first.client, first.listener);
        lab.assert_flows(&flow);
        assert!(!lab.meta(&flow).has(RESET));
    }
}

#[test]
fn the_only_backends_refusal_is_the_answer() {
    for version in VERSIONS {
        let mut lab = Lab::new();
        lab.select(&[2]);
        let flow = lab.open(version.client(1), version.vip());
        lab.send(&flow.down(RST | ACK)).sent(Outcome::Replied);
        assert!(lab.meta(&flow).is_closed());
    }
}

#[test]
fn blind_segments_of_a_client_free_nothing() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        for flags in [RST, RST | ACK, FIN, FIN | ACK, SYN, SYN | FIN] {
            let blind = Segment { sequence: 0xdead_beef, acknowledgement: 0xdead_beef, ..flow.up(flags) };
            let sent = lab.send(&blind).sent(Outcome::Forwarded);
            assert_eq!(sent.to, flow.backend, "forwarded: the backend knows what it is worth");
            assert!(lab.meta(&flow).is(Kind::Established));
            lab.assert_flows(&flow);
        }
        assert!(!lab.meta(&flow).has(RESET), "the backend's next segment has cleared it");
        assert_eq!(lab.events(Event::FlowClaimed), 1);
    }
}

#[test]
fn blind_segments_in_a_backends_name_free_nothing() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        for flags in [RST, RST | ACK, FIN | ACK, SYN | ACK] {
            let blind = Segment { sequence: 0xdead_beef, acknowledgement: 0xdead_beef, ..flow.down(flags) };
            lab.send(&blind).sent(Outcome::Replied);
            assert!(lab.meta(&flow).is(Kind::Established));
            lab.assert_flows(&flow);
        }
        assert!(!lab.meta(&flow).has(RESET), "the backend's next segment has cleared it");
        assert_eq!(lab.events(Event::ResetDoubted), 2);
    }
}

/// Both sides close, the named one first.
fn close(lab: &Lab, flow: &Flow, backend_first: bool) {
    let (first, second) = if backend_first {
        (flow.down(FIN | ACK), flow.up(FIN | ACK))
    } else {
        (flow.up(FIN | ACK), flow.down(FIN | ACK))
    };
    lab.send(&first);
    assert!(lab.meta(flow).is(Kind::Established), "half-closed streams live on");
    lab.send(&second);
    // The last ACK: of the backend's FIN.
    lab.send(&Segment { acknowledgement: BACKEND_START + 2, ..flow.up(ACK) });
}

#[test]
fn a_closed_flow_is_still_forwarded() {
    for version in VERSIONS {
        for (backend_first, kind) in [(true, Kind::ClosedByBackend), (false, Kind::ClosedByClient)] {
            let lab = Lab::new();
            let flow = lab.establish(version.client(1), version.vip());
            close(&lab, &flow, backend_first);
            assert!(lab.meta(&flow).is(kind));
            lab.send(&flow.up(ACK)).sent(Outcome::Forwarded);
            lab.send(&flow.down(ACK)).sent(Outcome::Replied);
            assert!(lab.meta(&flow).is(kind), "the last ACKs change nothing");
        }
    }
}

#[test]
fn a_closed_slot_rests_from_the_last_segment_of_its_backend() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        lab.memory.advance(100);
        close(&lab, &flow, true);
        let age = || lab.meta(&flow).age(Clock::read(&&lab.memory, &lab.memory.config).seen);
        assert_eq!(age(), 0, "however long the flow was idle before");
        lab.memory.advance(50);
        lab.send(&flow.down(FIN | ACK)).sent(Outcome::Replied);
        assert_eq!((age(), lab.meta(&flow).is(Kind::ClosedByBackend)), (0, true), "it still closes");
    }
}

#[test]
fn a_closed_slot_is_reopened_by_its_own_tuple() {
    for version in VERSIONS {
        for backend_first in [true, false] {
            let lab = Lab::new();
            let flow = lab.establish(version.client(1), version.vip());
            close(&lab, &flow, backend_first);
            let again = lab.establish(flow.client, flow.listener);
            assert_eq!(again.snat, flow.snat);
            assert!(!lab.meta(&again).has(CLIENT_FIN));
            assert_eq!((lab.occupied(), lab.events(Event::FlowClaimed)), (1, 2));
        }
    }
}

#[test]
fn a_syn_forged_after_the_close_takes_neither_the_slot_nor_the_replies() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        // The client's FIN has overtaken its last data, which it sends again.
        close(&lab, &flow, true);
        for number in 0..3 {
            let forged = Segment { source_mac: OTHER_ROUTER, sequence: number, ..flow.up(SYN) };
            lab.send(&forged).sent(Outcome::Forwarded);
            let answer = lab.send(&flow.down(ACK)).sent(Outcome::Replied);
            assert_eq!(answer.destination_mac, ROUTER, "the backend has not ended the flow");
            lab.memory.advance(1);
            let again = lab.send(&flow.up(ACK).with_payload(b"the last data")).sent(Outcome::Forwarded);
            assert_eq!((again.from, again.to), (flow.snat, flow.backend));
            assert!(lab.meta(&flow).is_closed());
        }
        assert_eq!(lab.events(Event::FlowClaimed), 1);
    }
}

/// A SYN of a later connection of the flow's tuple.
fn later_syn(flow: &Flow, sequence: u32) -> Segment {
    Segment { sequence, ..flow.up(SYN) }
}

/// The backend's answer to the later SYN 9,000.
fn later_answer(flow: &Flow, flags: u8) -> Segment {
    let sequence = if flags == SYN | ACK { 70_000 } else { 0 };
    Segment { sequence, acknowledgement: 9_001, ..flow.down(flags) }
}

/// The later connection, from the client's acknowledgement of the SYN-ACK on.
fn speak_later(lab: &Lab, flow: &Flow) {
    let up = Segment { sequence: 9_001, acknowledgement: 70_001, ..flow.up(ACK) };
    lab.send(&up).sent(Outcome::Forwarded);
    lab.send(&up.with_payload(b"request")).sent(Outcome::Forwarded);
    let down = Segment { sequence: 70_001, acknowledgement: 9_008, ..flow.down(ACK) };
    lab.send(&down.with_payload(b"answer")).sent(Outcome::Replied);
    lab.send(&Segment { sequence: 9_008, acknowledgement: 70_007, ..flow.up(ACK) }).sent(Outcome::Forwarded);
    assert!(lab.meta(flow).is(Kind::Established));
}

#[test]
fn the_syn_ack_to_a_syn_after_the_close_begins_a_flow() {
    for version in VERSIONS {
        for backend_first in [true, false] {
            let lab = Lab::new();
            let flow = lab.establish(version.client(1), version.vip());
            close(&lab, &flow, backend_first);
            lab.send(&later_answer(&flow, SYN | ACK)).sent(Outcome::Replied);
            assert!(lab.meta(&flow).is_closed(), "no SYN has come");
            lab.send(&later_syn(&flow, 9_000)).sent(Outcome::Forwarded);
            assert!(lab.meta(&flow).is_closed());
            lab.send(&later_answer(&flow, SYN | ACK)).sent(Outcome::Replied);
            assert!(lab.meta(&flow).is(Kind::HalfOpen) && lab.meta(&flow).has(SYN_ACK));
            speak_later(&lab, &flow);
            assert_eq!((lab.occupied(), lab.events(Event::FlowClaimed)), (1, 2));
            assert_eq!(lab.events(Event::FlowEstablished), 2);
        }
    }
}

#[test]
fn a_syn_forged_between_a_syn_and_its_answer_takes_no_connection_from_the_table() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        close(&lab, &flow, true);
        lab.send(&later_syn(&flow, 9_000)).sent(Outcome::Forwarded);
        lab.send(&later_syn(&flow, 123_456_789)).sent(Outcome::Forwarded);
        lab.send(&later_answer(&flow, SYN | ACK)).sent(Outcome::Replied);
        speak_later(&lab, &flow);
    }
}

#[test]
fn a_backend_that_refuses_a_syn_after_the_close_is_not_asked_again() {
    for version in VERSIONS {
        let mut lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        close(&lab, &flow, false);
        lab.send(&later_syn(&flow, 9_000)).sent(Outcome::Forwarded);
        lab.send(&later_answer(&flow, RST | ACK)).sent(Outcome::Replied);
        let others = [1, 2, 3].into_iter().filter(|number| version.backend(*number) != flow.backend);
        lab.select(&others.collect::<Vec<_>>());
        let again = lab.open(flow.client, flow.listener);
        assert!(again.backend != flow.backend && lab.meta(&again).is(Kind::HalfOpen));
    }
}

#[test]
fn a_client_whose_way_has_changed_hears_of_its_later_connection_after_two_seconds() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        close(&lab, &flow, true);
        for (second, router) in [(0, ROUTER), (1, ROUTER), (3, OTHER_ROUTER)] {
            lab.send(&Segment { source_mac: OTHER_ROUTER, ..later_syn(&flow, 9_000) })
                .sent(Outcome::Forwarded);
            let answer = lab.send(&later_answer(&flow, SYN | ACK)).sent(Outcome::Replied);
            assert_eq!(answer.destination_mac, router, "after {second} s");
            lab.memory.advance(if second == 0 { 1 } else { 2 });
        }
    }
}

#[test]
fn a_slot_that_a_reset_has_closed_rests_from_the_reset() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        lab.memory.advance(100);
        lab.send(&flow.down(RST)).sent(Outcome::Replied);
        let clock = Clock::read(&&lab.memory, &lab.memory.config);
        assert!(lab.meta(&flow).is_closed_by_reset());
        assert_eq!(lab.meta(&flow).age(clock.seen), 0, "however long the flow was idle before");
    }
}

#[test]
fn a_syn_after_the_close_goes_to_another_backend_if_its_own_takes_no_new_flows() {
    for version in VERSIONS {
        for acknowledged in [true, false] {
            let mut lab = Lab::new();
            let flow = lab.establish(version.client(1), version.vip());
            lab.send(&flow.up(FIN | ACK));
            lab.send(&flow.down(FIN | ACK));
            // A client whose process is gone answers the FIN by a RST.
            let last = Segment { acknowledgement: BACKEND_START + 2, ..flow.up(ACK) };
            let reset = Segment { sequence: 1002, ..flow.up(RST) };
            lab.send(if acknowledged { &last } else { &reset }).sent(Outcome::Forwarded);
            assert!(lab.meta(&flow).is_closed());
            lab.backend(flow.backend).flags.store(0);
            let others = [1, 2, 3].into_iter().filter(|number| version.backend(*number) != flow.backend);
            lab.select(&others.collect::<Vec<_>>());
            let again = lab.open(flow.client, flow.listener);
            assert_ne!(again.backend, flow.backend);
        }
    }
}

#[test]
fn resets_forged_in_a_backends_name_are_no_sign_that_its_flow_goes_on() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        let seen = lab.meta(&flow).seen();
        lab.memory.advance(100);
        lab.send(&Segment { sequence: 7, ..flow.down(RST) }).sent(Outcome::Replied);
        assert_eq!(lab.meta(&flow).seen(), seen, "a doubt is asked about all the same");
        // Ends that both speak keep their flow, whatever its numbers.
        lab.send(&Segment { sequence: 0x7000_0000, ..flow.down(ACK) }).sent(Outcome::Replied);
        assert_ne!(lab.meta(&flow).seen(), seen);
    }
}

#[test]
fn what_is_asked_of_a_new_flow_is_asked_of_one_in_its_own_old_slot() {
    for version in VERSIONS {
        let mut lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        close(&lab, &flow, false);
        lab.memory.services[usize::from(lab.service)].restricted = 1;
        let syn = flow.up(SYN);
        assert_refused(&lab.send(&syn).sent(Outcome::RefusedNotAllowed), &syn, Outcome::RefusedNotAllowed);
        assert!(lab.meta(&flow).is(Kind::ClosedByClient), "nothing has begun");
    }
}

#[test]
fn a_slot_is_reopened_after_a_reset_that_proves_itself() {
    for version in VERSIONS {
        for by_client in [true, false] {
            let lab = Lab::new();
            let flow = lab.establish(version.client(1), version.vip());
            let reset = if by_client { flow.up(RST | ACK) } else { flow.down(RST) };
            lab.send(&reset);
            assert!(lab.meta(&flow).is_closed());
            let again = lab.open(flow.client, flow.listener);
            assert_eq!(again.snat, flow.snat);
            assert!(lab.meta(&again).is(Kind::HalfOpen));
        }
    }
}

#[test]
fn a_syn_after_a_doubtful_reset_is_its_backends_to_answer() {
    for version in VERSIONS {
        let mut lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        lab.send(&flow.up(RST)).sent(Outcome::Forwarded);
        assert!(lab.meta(&flow).is(Kind::Established) && lab.meta(&flow).has(RESET));
        // Also of a backend that takes no new flows, and however long the flow is silent.
        lab.backend(flow.backend).flags.store(0);
        lab.select(&[]);
        lab.memory.advance(u64::from(RESET_QUARANTINE) * 2);
        // The backend is asked first: its SYN-ACK to this SYN would begin a flow whose numbers the slot does not know.
        assert_eq!(lab.send(&flow.up(SYN)).outcome, Outcome::SynDoubted);
        // It has not answered.
        lab.memory.advance(3);
        let again = lab.open(flow.client, flow.listener);
        assert_eq!((again.snat, again.backend), (flow.snat, flow.backend));
        assert!(lab.meta(&again).is(Kind::Established));
        // A backend that has the flow says so, and the client ends it by the number it says.
        lab.send(&flow.down(ACK)).sent(Outcome::Replied);
        assert!(!lab.meta(&flow).has(RESET));
        lab.send(&flow.up(SYN)).sent(Outcome::Forwarded);
    }
}

#[test]
fn a_flow_whose_client_waits_is_asked_about_at_the_next_look() {
    for version in VERSIONS {
        // The client has forgotten its flow, or has ended it and uses its port again while its backend still sends.
        for end in [RST, FIN | ACK] {
            let lab = Lab::new();
            let flow = lab.establish(version.client(1), version.vip());
            lab.send(&flow.up(end)).sent(Outcome::Forwarded);
            assert_eq!(lab.send(&flow.up(SYN)).outcome, Outcome::SynDoubted);
            let now = lab.memory.now();
            assert_eq!((lab.meta(&flow).has(RESET), lab.meta(&flow).age(now)), (true, RESET_QUARANTINE + 1));
            // The next SYNs, 1 s and 3 s later, do not put the question off; the one after 7 s is not held.
            for (second, outcome) in
                [(1, Outcome::SynDoubted), (2, Outcome::SynDoubted), (4, Outcome::Forwarded)]
            {
                lab.memory.advance(second);
                let now = lab.memory.now();
                assert_eq!(lab.send(&flow.up(SYN)).outcome, outcome);
                assert!(lab.meta(&flow).age(now) > RESET_QUARANTINE);
            }
        }
        // So it is with one that has rested for a while since its client's FIN.
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        lab.send(&flow.up(FIN | ACK)).sent(Outcome::Forwarded);
        lab.memory.advance(5);
        assert_eq!(lab.send(&flow.up(SYN)).outcome, Outcome::SynDoubted);
        assert_eq!(lab.meta(&flow).age(lab.memory.now()), RESET_QUARANTINE + 1);
        // A segment of the backend contradicts a RST.
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        lab.send(&flow.up(RST)).sent(Outcome::Forwarded);
        assert_eq!(lab.send(&flow.up(SYN)).outcome, Outcome::SynDoubted);
        lab.send(&flow.down(ACK)).sent(Outcome::Replied);
        assert_eq!((lab.meta(&flow).has(RESET), lab.meta(&flow).age(lab.memory.now())), (false, 0));
    }
}

#[test]
fn a_syn_after_both_fins_begins_anew_when_its_backend_says_so() {
    for version in VERSIONS {
        let lab = Lab::new();
        // TCP Fast Open: the backend has answered and closed before the client's first ACK, which is its FIN.
        let flow = lab.open(version.client(1), version.vip());
        lab.send(&flow.down(SYN | ACK)).sent(Outcome::Replied);
        lab.send(&flow.down(FIN | ACK)).sent(Outcome::Replied);
        lab.send(&flow.up(FIN | ACK)).sent(Outcome::Forwarded);
        assert!(lab.meta(&flow).is(Kind::Established) && lab.meta(&flow).has(CLIENT_FIN | BACKEND_FIN));
        lab.send(&flow.up(SYN)).sent(Outcome::Forwarded);
        assert!(lab.meta(&flow).is_closed() && lab.meta(&flow).has(SYN_WAITS));
        lab.send(&flow.down(SYN | ACK)).sent(Outcome::Replied);
        assert!(lab.meta(&flow).is(Kind::HalfOpen) && lab.meta(&flow).has(SYN_ACK));
        lab.send(&flow.up(ACK)).sent(Outcome::Forwarded);
        lab.assert_flows(&flow);
    }
}

/// Works on a SYN of the flow as a CPU does that has looked at its slot when that was `found`.
fn late_syn(lab: &Lab, flow: &Flow, found: Found) {
    let (address, port) = (words(flow.client.ip()), port_word(flow.client.port()));
    let tuple = V4::tuple(address, port, lab.listener_id(flow.listener));
    let query = Query::new::<V4>(&lab.memory.config, tuple);
    let syn = segment::Segment { valid: true, flags: SYN, sequence: 77, acknowledgement: 0, payload: 0 };
    (&lab.memory).client_event::<V4>(&query, found, &syn, lab.service);
}

#[test]
fn a_syn_that_comes_too_late_to_move_a_handshake_changes_no_number() {
    for is_established in [true, false] {
        let lab = Lab::new();
        let version = VERSIONS[0];
        let flow = lab.open(version.client(1), version.vip());
        lab.send(&flow.down(SYN | ACK)).sent(Outcome::Replied);
        lab.memory.advance(8);
        lab.backend(flow.backend).flags.store(0);
        let found = lab.slot(flow.client, flow.listener);
        // Meanwhile on another CPU: the client's acknowledgement, or the SYN-ACK once more.
        let first = if is_established { flow.up(ACK) } else { flow.down(SYN | ACK) };
        lab.send(&first);
        late_syn(&lab, &flow, found);
        lab.send(&flow.up(ACK)).sent(Outcome::Forwarded);
        assert!(lab.meta(&flow).is(Kind::Established));
        lab.assert_flows(&flow);
        assert_eq!((lab.events(Event::BackendNumbersOdd), lab.events(Event::ClientNumbersOdd)), (0, 0));
    }
}

#[test]
fn a_slot_with_both_fins_waits_for_its_backend_also_if_it_is_refreshed_meanwhile() {
    let lab = Lab::new();
    let version = VERSIONS[0];
    let flow = lab.open(version.client(1), version.vip());
    lab.send(&flow.down(SYN | ACK)).sent(Outcome::Replied);
    lab.send(&flow.down(FIN | ACK)).sent(Outcome::Replied);
    lab.send(&flow.up(FIN | ACK)).sent(Outcome::Forwarded);
    lab.memory.advance(1);
    let found = lab.slot(flow.client, flow.listener);
    lab.send(&flow.up(FIN | ACK)).sent(Outcome::Forwarded);
    assert_ne!(lab.slot(flow.client, flow.listener).meta(), found.meta());
    late_syn(&lab, &flow, found);
    assert!(lab.meta(&flow).is_closed() && lab.meta(&flow).has(SYN_WAITS), "{:?}", lab.meta(&flow));
}

#[test]
fn a_client_whose_half_closed_flow_rests_uses_its_port_again() {
    for version in VERSIONS {
        for by_client in [true, false] {
            let lab = Lab::new();
            let flow = lab.establish(version.client(1), version.vip());
            lab.send(&if by_client { flow.up(FIN | ACK) } else { flow.down(FIN | ACK) });
            lab.memory.advance(u64::from(HALF_CLOSED_SILENCE) + 1);
            lab.send(&flow.up(SYN)).sent(Outcome::Forwarded);
            // The backend still has the flow (RFC 5961 §4). Its number after its own FIN.
            let mut challenge = flow.down(ACK);
            challenge.sequence = challenge.sequence.wrapping_add(u32::from(!by_client));
            let before = lab.meta(&flow);
            lab.send(&challenge).sent(Outcome::Replied);
            assert_eq!(
                lab.meta(&flow),
                before,
                "so it answers a question as well: the flow is as idle as before"
            );
            lab.send(&flow.up(RST)).sent(Outcome::Forwarded);
            assert_eq!(lab.send(&flow.up(SYN)).outcome, Outcome::SynDoubted);
            lab.memory.advance(u64::from(RESET_QUARANTINE) + 1);
            assert_eq!(lab.send(&flow.up(SYN)).outcome, Outcome::SynDoubted, "about to be asked");
            lab.send(&Segment { sequence: challenge.sequence, ..flow.down(RST) }).sent(Outcome::Replied);
            let again = lab.establish(flow.client, flow.listener);
            lab.assert_flows(&again);
        }
    }
}

#[test]
fn a_flow_may_begin_again_where_the_backend_has_believed_a_reset() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        lab.send(&flow.up(RST)).sent(Outcome::Forwarded);
        // What a backend that has forgotten the flow answers to a question.
        lab.send(&flow.down(RST)).sent(Outcome::Replied);
        assert!(lab.meta(&flow).is_closed());
        let again = lab.establish(flow.client, flow.listener);
        lab.assert_flows(&again);
        assert_eq!(lab.events(Event::BackendNumbersOdd), 0);
    }
}

#[test]
fn a_slot_answers_to_its_own_backend_only() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        let other = (1..=3).map(|number| version.backend(number)).find(|other| *other != flow.backend);
        let other_port = std::net::SocketAddr::new(flow.backend.ip(), flow.backend.port() + 1);
        for (from, outcome) in [
            (other.unwrap(), Outcome::ReplyUnknown),
            (other_port, Outcome::NotOurs),
            (version.client(2), Outcome::NotOurs),
        ] {
            for flags in [ACK, RST, SYN | ACK, SYN] {
                let ran = lab.send(&Segment { from, ..flow.down(flags) });
                assert_eq!(ran.outcome, outcome, "from {from}, flags {flags:#x}");
            }
        }
        assert!(!lab.meta(&flow).has(RESET));
        // And a slot that is nobody's to nobody.
        let free =
            std::net::SocketAddr::new(flow.snat.ip(), if flow.snat.port() == 2000 { 2001 } else { 2000 });
        assert_eq!(lab.send(&Segment { to: free, ..flow.down(ACK) }).outcome, Outcome::ReplyUnknown);
    }
}

/// The first backend is this host, and all new flows are for it.
fn serve_here(version: Version) -> Lab {
    let mut lab = Lab::new();
    lab.backend(version.backend(1)).flags.store(backend_flag::ACCEPTS | backend_flag::LOCAL);
    lab.select(&[1]);
    lab
}

#[test]
fn a_backend_that_is_this_host_gets_the_packet_untouched() {
    for version in VERSIONS {
        let mut lab = serve_here(version);
        let syn = Segment::new(version.client(1), version.vip(), SYN);
        assert_eq!(lab.send(&syn).outcome, Outcome::ForwardedLocal);
        assert_eq!(lab.occupied(), 1, "the flow is remembered");
        // It stays with this host when new flows go elsewhere.
        lab.select(&[2]);
        for flags in [ACK, SYN, FIN | ACK] {
            let segment = Segment { flags, ..syn.clone() };
            assert_eq!(lab.send(&segment).outcome, Outcome::ForwardedLocal);
        }
        lab.open(version.client(2), version.vip());
    }
}

/// A client's flow to the first backend, which is this host and has taken no new flows since.
fn flow_to_a_host_that_drains(version: Version) -> (Lab, Segment) {
    let mut lab = serve_here(version);
    let syn = Segment::new(version.client(1), version.vip(), SYN);
    for flags in [SYN, ACK] {
        assert_eq!(lab.send(&Segment { flags, ..syn.clone() }).outcome, Outcome::ForwardedLocal);
    }
    lab.backend(version.backend(1)).flags.store(backend_flag::LOCAL);
    lab.select(&[2]);
    (lab, syn)
}

#[test]
fn nothing_that_is_forged_takes_a_flow_from_this_host() {
    for version in VERSIONS {
        let (mut lab, syn) = flow_to_a_host_that_drains(version);
        lab.memory.host_sockets.insert((words(syn.from.ip()), port_word(syn.from.port())));
        for flags in [SYN, FIN | ACK, SYN, RST, SYN] {
            lab.memory.advance(100);
            let outcome = lab.send(&Segment { flags, ..syn.clone() }).outcome;
            assert_eq!(outcome, Outcome::ForwardedLocal, "flags {flags:#x}");
        }
        // A socket that the NIC's last batch has not reached yet may be about to close.
        lab.send(&Segment { flags: RST, ..syn.clone() });
        assert_eq!(lab.send(&syn).outcome, Outcome::SynDoubted);
    }
}

#[test]
fn a_port_used_again_does_not_go_to_a_host_that_drains() {
    for version in VERSIONS {
        // The client has ended the flow before, or the host has, whose segments are not seen.
        for end in [FIN | ACK, RST, ACK] {
            let (lab, syn) = flow_to_a_host_that_drains(version);
            lab.send(&Segment { flags: end, ..syn.clone() });
            lab.send(&syn).sent(Outcome::Forwarded);
            assert_eq!(lab.occupied(), 1);
        }
        // With no other backend it is refused.
        let (mut lab, syn) = flow_to_a_host_that_drains(version);
        lab.select(&[]);
        assert_eq!(lab.send(&syn).outcome, Outcome::RefusedNoBackend);
    }
}

#[test]
fn without_a_way_to_the_backend_a_packet_is_dropped() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        let hop = &lab.backend(flow.backend).next_hop;
        let known = hop.load();
        hop.store(NextHop::UNKNOWN.0);
        assert_eq!(lab.send(&flow.up(ACK)).outcome, Outcome::NextHopUnknown);
        hop.store(known);
        lab.assert_flows(&flow);
    }
}

#[test]
fn without_a_way_to_the_client_a_packet_is_dropped() {
    for version in VERSIONS {
        let mut lab = Lab::new();
        lab.memory.learned_hops.clear();
        let flow = lab.open(version.client(1), version.vip());
        assert_eq!(lab.events(Event::NextHopOverflow), 1);
        assert_eq!(lab.send(&flow.down(SYN | ACK)).outcome, Outcome::NextHopUnknown);
    }
}

#[test]
fn replies_follow_the_client_to_another_router() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        for router in [OTHER_ROUTER, ROUTER] {
            // Looked at once a second.
            lab.memory.advance(1);
            lab.send(&Segment { source_mac: router, ..flow.up(ACK) }).sent(Outcome::Forwarded);
            let reply = lab.send(&flow.down(ACK)).sent(Outcome::Replied);
            assert_eq!((reply.destination_mac, reply.interface), (router, FRONT));
        }
        let known = lab.memory.learned_hops.iter().filter(|hop| hop.load() != 0).count();
        assert_eq!(known, 2, "each router is remembered once");
    }
}

#[test]
fn a_backends_new_neighbour_is_used_at_once() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        let mac = crate::headers::Mac::new(OTHER_ROUTER).number();
        lab.backend(flow.backend).next_hop.store(NextHop::new(mac, super::lab::PLAIN_BEHIND).0);
        let sent = lab.send(&flow.up(ACK)).sent(Outcome::Forwarded);
        assert_eq!(
            (sent.destination_mac, sent.source_mac, sent.interface),
            (OTHER_ROUTER, super::lab::OURS_BEHIND, super::lab::BEHIND)
        );
    }
}

/// Opens flows until the table of one set is full.
fn fill(lab: &Lab, version: Version) -> Vec<Flow> {
    (1..=4).map(|number| lab.open(version.client(number), version.vip())).collect()
}

#[test]
fn a_full_table_drops_a_syn_and_the_client_tries_again() {
    for version in VERSIONS {
        let lab = Lab::with_sets(1);
        let flows = fill(&lab, version);
        let late = Segment::new(version.client(5), version.vip(), SYN);
        assert_eq!(lab.send(&late).outcome, Outcome::TableFull);
        lab.memory.advance_jiffies(203);
        assert_eq!(lab.send(&late).outcome, Outcome::TableFull, "handshakes have 200 ms");
        lab.memory.advance_jiffies(1);
        lab.send(&late).sent(Outcome::Forwarded);
        assert_eq!(lab.events(Event::HalfOpenReclaimed), 1);
        let left = flows.iter().filter(|flow| lab.slot(flow.client, flow.listener).is_some()).count();
        assert_eq!(left, 3);
    }
}

#[test]
fn an_answered_handshake_has_200_ms() {
    for version in VERSIONS {
        let lab = Lab::with_sets(1);
        for flow in fill(&lab, version) {
            lab.send(&flow.down(SYN | ACK)).sent(Outcome::Replied);
            assert!(lab.meta(&flow).has(SYN_ACK));
        }
        let late = Segment::new(version.client(5), version.vip(), SYN);
        lab.memory.advance_jiffies(203);
        assert_eq!(lab.send(&late).outcome, Outcome::TableFull);
        lab.memory.advance_jiffies(1);
        lab.send(&late).sent(Outcome::Forwarded);
    }
}

#[test]
fn an_established_flow_is_never_reclaimed() {
    for version in VERSIONS {
        let lab = Lab::with_sets(1);
        let flows: Vec<_> =
            (1..=4).map(|number| lab.establish(version.client(number), version.vip())).collect();
        for flow in &flows {
            lab.send(&flow.up(FIN | ACK)).sent(Outcome::Forwarded);
        }
        let late = Segment::new(version.client(5), version.vip(), SYN);
        for _ in 0..9 {
            lab.memory.advance(3600);
            assert_eq!(lab.send(&late).outcome, Outcome::TableFull);
        }
        for flow in flows {
            lab.assert_flows(&flow);
        }
    }
}

#[test]
fn a_flow_that_a_reset_was_seen_of_is_never_reclaimed() {
    for version in VERSIONS {
        let lab = Lab::with_sets(1);
        let flows: Vec<_> =
            (1..=4).map(|number| lab.establish(version.client(number), version.vip())).collect();
        lab.send(&flows[1].up(RST)).sent(Outcome::Forwarded);
        lab.send(&Segment { sequence: 5, ..flows[2].down(RST) }).sent(Outcome::Replied);
        lab.memory.advance(u64::from(RESET_QUARANTINE) * 10);
        let late = Segment::new(version.client(5), version.vip(), SYN);
        assert_eq!(lab.send(&late).outcome, Outcome::TableFull);
        for flow in &flows {
            lab.assert_flows(flow);
            assert!(!lab.meta(flow).has(RESET));
        }
    }
}
