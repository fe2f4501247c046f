//! Packets that are cut short, contradict themselves, or are simply not what they seem.

use super::lab::{ACK, DOUBLE_TAGGED, FRONT, Lab, PLAIN, SYN, Segment, TAGGED, VERSIONS, internet_checksum};
use crate::{
    Outcome,
    outcome::{Action, Event},
};

/// The segment's frame with something else at an offset into its network header.
fn with_network(segment: &Segment, changes: &[(usize, u8)]) -> Vec<u8> {
    let mut bytes = segment.bytes();
    for (offset, value) in changes {
        bytes[segment.network() + offset] = *value;
    }
    repair(segment, bytes)
}

/// Makes the IPv4 checksum right again.
fn repair(segment: &Segment, mut bytes: Vec<u8>) -> Vec<u8> {
    if segment.from.is_ipv4() {
        let header = &mut bytes[segment.network()..];
        let length = usize::from(header[0] & 0x0f) * 4;
        header[10..12].fill(0);
        let checksum = internet_checksum(&header[..length.min(header.len())]);
        header[10..12].copy_from_slice(&checksum.to_be_bytes());
    }
    bytes
}

#[test]
fn options_and_extension_headers_are_looked_through() {
    for version in VERSIONS {
        let most = if version.header() == 20 { 10 } else { 4 };
        for count in 1..=most {
            let lab = Lab::new();
            let syn = Segment::new(version.client(1), version.vip(), SYN).with_options(count);
            let sent = lab.send(&syn).sent(Outcome::Forwarded);
            assert_eq!((sent.options, sent.next_header), (syn.options, syn.next_header), "as they were");
            let flow = lab.open(syn.from, syn.to);
            let answer = flow.down(SYN | ACK).with_options(count).with_payload(b"all of it");
            let reply = lab.send(&answer).sent(Outcome::Replied);
            assert_eq!((reply.options, reply.payload), (answer.options, answer.payload));
        }
    }
}

#[test]
fn more_extension_headers_to_us_are_dropped_and_to_others_left_alone() {
    let version = VERSIONS[1];
    let lab = Lab::new();
    let syn = Segment::new(version.client(1), version.vip(), SYN).with_options(5);
    assert_eq!(lab.send(&syn).outcome, Outcome::ExtensionHeaders);
    let other = Segment { to: version.client(2), ..syn };
    assert_eq!(lab.send(&other).outcome, Outcome::NotOurs);
}

#[test]
fn every_kind_of_extension_header_is_looked_through() {
    let version = VERSIONS[1];
    let lab = Lab::new();
    let plain = Segment::new(version.client(1), version.vip(), SYN);
    let hop_by_hop = [43, 0, 1, 4, 0, 0, 0, 0];
    let routing = [60, 0, 4, 0, 0, 0, 0, 0];
    // 16 bytes: its length field says how many eights there are beyond the first.
    let destination = [6, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let options = [&hop_by_hop[..], &routing, &destination].concat();
    lab.send(&Segment { options, next_header: 0, ..plain.clone() }).sent(Outcome::Forwarded);
    // An atomic fragment (RFC 6946) is whole.
    let options = vec![6, 0, 0, 0, 0, 0, 0, 9];
    assert_eq!(lab.send(&Segment { options, next_header: 44, ..plain }).outcome, Outcome::Forwarded);
}

#[test]
fn a_first_fragment_is_dropped_and_later_ones_are_not_known() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        for segment in [flow.up(ACK), flow.down(ACK), Segment::new(version.client(2), version.vip(), SYN)] {
            let (first, later) = if version.header() == 20 {
                (with_network(&segment, &[(6, 0x20)]), with_network(&segment, &[(6, 0x20), (7, 1)]))
            } else {
                let fragment = |low: u8| {
                    let options = vec![6, 0, 0, low, 0, 0, 0, 9];
                    Segment { options, next_header: 44, ..segment.clone() }.bytes()
                };
                (fragment(1), fragment(8))
            };
            assert_eq!(lab.run(FRONT, &first).outcome, Outcome::Fragment);
            assert_eq!(lab.run(FRONT, &later).outcome, Outcome::NotOurs);
        }
        assert_eq!(lab.occupied(), 1);
    }
}

#[test]
fn a_packet_at_the_end_of_its_life_is_dropped() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        for ttl in [0, 1] {
            for segment in [flow.up(ACK), flow.down(ACK), Segment::new(version.client(2), version.vip(), SYN)]
            {
                assert_eq!(lab.send(&Segment { ttl, ..segment }).outcome, Outcome::TtlExpired);
            }
            let nobodys = Segment::new(version.client(2), version.vip(), ACK);
            assert_eq!(
                lab.send(&Segment { ttl, ..nobodys }).outcome,
                Outcome::NoFlow,
                "the kernel's to answer"
            );
        }
        let last = lab.send(&Segment { ttl: 2, ..flow.up(ACK) }).sent(Outcome::Forwarded);
        assert_eq!(last.ttl, 1);
        assert_eq!(lab.occupied(), 1);
    }
}

#[test]
fn a_wrong_header_checksum_is_dropped() {
    let version = VERSIONS[0];
    let lab = Lab::new();
    let flow = lab.establish(version.client(1), version.vip());
    for options in [0, 1, 10] {
        for segment in [flow.up(ACK), flow.down(ACK), Segment::new(version.client(2), version.vip(), SYN)] {
            let segment = segment.with_options(options);
            let header = 20 + options * 4;
            // Every bit that does not make it another's packet.
            for offset in [1, 4, 5, 10, 11].into_iter().chain(20..header) {
                let mut bytes = segment.bytes();
                bytes[segment.network() + offset] ^= 0x10;
                assert_eq!(lab.run(FRONT, &bytes).outcome, Outcome::BadChecksum, "byte {offset} of {header}");
            }
        }
    }
    assert_eq!(lab.occupied(), 1);
}

/// A SYN that makes no sense begins no flow, so it is the kernel's to drop.
fn assert_malformed(lab: &Lab, segment: &Segment, bytes: &[u8], what: &str) {
    let expected = if segment.flags == SYN { Outcome::NoFlow } else { Outcome::Malformed };
    assert_eq!(lab.run(FRONT, bytes).outcome, expected, "{what}");
}

#[test]
fn lengths_that_contradict_each_other_are_dropped() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        for segment in [flow.up(ACK), flow.down(ACK), Segment::new(version.client(2), version.vip(), SYN)] {
            let segment = segment.with_payload(b"0123456789");
            // The TCP header: shorter than it can be, or longer than the packet.
            for words in [0, 4, 8, 15] {
                let mut bytes = segment.bytes();
                bytes[segment.transport() + 12] = words << 4;
                assert_malformed(&lab, &segment, &bytes, &format!("{words} words of TCP header"));
            }
            // The packet: longer than the frame, or shorter than its headers.
            let length = segment.bytes().len() - segment.network();
            for claimed in [length + 1, 0xffff, version.header() + 19] {
                let (field, value) = if version.header() == 20 { (2, claimed) } else { (4, claimed - 40) };
                let [high, low] = (value as u16).to_be_bytes();
                let bytes = with_network(&segment, &[(field, high), (field + 1, low)]);
                assert_malformed(&lab, &segment, &bytes, &format!("{claimed} of {length} bytes"));
            }
        }
        assert_eq!(lab.occupied(), 1);
    }
}

#[test]
fn ethernet_padding_is_no_payload() {
    for version in VERSIONS {
        let mut lab = Lab::new();
        let flow = lab.establish(version.client(1), version.vip());
        let sent = lab.send(&Segment { padding: 6, ..flow.up(ACK) }).sent(Outcome::Forwarded);
        assert_eq!((sent.padding, sent.payload.len()), (6, 0));
        lab.select(&[]);
        let syn = Segment { padding: 6, ..Segment::new(version.client(2), version.vip(), SYN) };
        let refusal = lab.send(&syn).sent(Outcome::RefusedNoBackend);
        assert_eq!(refusal.acknowledgement, syn.sequence + 1, "only the SYN is acknowledged");
    }
}

/// Wherever a packet is cut off, it is passed on untouched or dropped, and changes nothing.
#[test]
fn a_packet_that_is_cut_short_anywhere_is_never_sent() {
    for version in VERSIONS {
        for port in [PLAIN, TAGGED, DOUBLE_TAGGED] {
            for options in [0, 2] {
                let mut lab = Lab::new();
                let flow = lab.establish(version.client(1), version.vip());
                let syn = Segment::new(version.client(2), version.vip(), SYN);
                for segment in [flow.up(ACK), flow.down(ACK), syn.clone()] {
                    let segment = Segment { tcp_options: vec![1; 12], ..segment }
                        .with_payload(b"payload")
                        .with_options(options)
                        .on(port);
                    let bytes = segment.bytes();
                    for length in 0..bytes.len() {
                        let outcome = lab.run(FRONT, &bytes[..length]).outcome;
                        assert_ne!(outcome.action(), Action::Transmit, "{length} of {} bytes", bytes.len());
                    }
                }
                assert_eq!((lab.occupied(), lab.events(Event::FlowClaimed)), (1, 1), "no slot is lost");
                lab.select(&[]);
                let bytes = syn.with_options(options).on(port).bytes();
                for length in 0..bytes.len() {
                    assert_ne!(lab.run(FRONT, &bytes[..length]).outcome.action(), Action::Transmit);
                }
                lab.assert_flows(&flow);
            }
        }
    }
}

#[test]
fn what_is_no_tcp_is_left_alone() {
    for version in VERSIONS {
        let lab = Lab::new();
        let segment = Segment::new(version.client(1), version.vip(), SYN);
        let field = if version.header() == 20 { 9 } else { 6 };
        for protocol in [2, 17, 47, 50, 51, 89, 112, 132, 255] {
            let bytes = with_network(&segment, &[(field, protocol)]);
            assert_eq!(lab.run(FRONT, &bytes).outcome, Outcome::NotOurs, "protocol {protocol}");
        }
        // Another IP version than the frame says, and an IPv4 header of less than five words.
        let other = if version.header() == 20 { [0x05, 0x55, 0x65, 0x44] } else { [0x05, 0x45, 0x55, 0x70] };
        for first in other {
            let mut bytes = segment.bytes();
            bytes[segment.network()] = first;
            assert_eq!(lab.run(FRONT, &bytes).outcome, Outcome::NotOurs, "first byte {first:#x}");
        }
        for kind in [[0x08, 0x06], [0x88, 0xcc], [0x00, 0x26], [0x88, 0x64]] {
            let mut bytes = segment.bytes();
            bytes[12..14].copy_from_slice(&kind);
            assert_eq!(lab.run(FRONT, &bytes).outcome, Outcome::NotOurs);
        }
        assert_eq!(lab.occupied(), 0);
    }
}
