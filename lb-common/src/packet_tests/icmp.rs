//! ICMP errors about flows, with as little quoted as RFC 792 allows: the network header and eight bytes.

use std::net::IpAddr;

use etherparse::{
    Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, IpNumber, Ipv4Header, Ipv6Header, icmpv4, icmpv6,
};

use super::lab::{
    ACK, BACKENDS_MAC, FRONT, Flow, Lab, OURS, ROUTER, Segment, VERSIONS, Version, ethernet,
    internet_checksum, ip,
};
use crate::Outcome;

const MTU: u16 = 1380;

/// What a router says about a segment that it could not send on.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Complaint {
    TooBig,
    Unreachable,
    Exceeded,
}

const COMPLAINTS: [Complaint; 3] = [Complaint::TooBig, Complaint::Unreachable, Complaint::Exceeded];

fn router(version: Version) -> IpAddr {
    version.client(999).ip()
}

/// The network packet of a segment, cut off after eight bytes of TCP.
fn start_of(segment: &Segment) -> Vec<u8> {
    segment.bytes()[segment.network()..segment.transport() + 8].to_vec()
}

/// The frame of an error that quotes `quoted`, sent to where that came from.
fn error(complaint: Complaint, about: &Segment, quoted: &[u8]) -> Vec<u8> {
    let (from, to) = (router(Version::of(about.from)), about.from.ip());
    let (next, header) = match (from, to) {
        (IpAddr::V4(_), IpAddr::V4(_)) => {
            let kind =
                match complaint {
                    Complaint::TooBig => Icmpv4Type::DestinationUnreachable(
                        icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: MTU },
                    ),
                    Complaint::Unreachable => {
                        Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::Host)
                    }
                    Complaint::Exceeded => {
                        Icmpv4Type::TimeExceeded(icmpv4::TimeExceededCode::TtlExceededInTransit)
                    }
                };
            (IpNumber::ICMP, Icmpv4Header::with_checksum(kind, quoted).to_bytes().to_vec())
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let kind = match complaint {
                Complaint::TooBig => Icmpv6Type::PacketTooBig { mtu: MTU.into() },
                Complaint::Unreachable => {
                    Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Address)
                }
                Complaint::Exceeded => Icmpv6Type::TimeExceeded(icmpv6::TimeExceededCode::HopLimitExceeded),
            };
            let header = Icmpv6Header::with_checksum(kind, from.octets(), to.octets(), quoted).unwrap();
            (IpNumber::IPV6_ICMP, header.to_bytes().to_vec())
        }
        _ => unreachable!(),
    };
    let mut bytes = ethernet(about.destination_mac, OURS, &about.tags, from.is_ipv4());
    bytes.extend(ip(from, to, 61, next.0, &[], header.len() + quoted.len()));
    bytes.extend(header);
    bytes.extend(quoted);
    bytes
}

/// The segment as it left us, when a router far away complains: what the router has seen.
fn as_sent(lab: &Lab, segment: &Segment, outcome: Outcome) -> Segment {
    let sent = lab.send(segment).sent(outcome);
    Segment { source_mac: ROUTER, destination_mac: ROUTER, ttl: 3, ..sent }
}

/// The translated error: to whom it went, and what it quotes.
fn assert_translated(lab: &Lab, frame: &[u8], our_side: IpAddr, original: &Segment, next_hop: [u8; 6]) {
    let ran = lab.run(FRONT, frame);
    assert_eq!(ran.outcome, Outcome::IcmpTranslated);
    assert_eq!((ran.interface, ran.bytes.len()), (FRONT, frame.len()));
    assert_eq!((&ran.bytes[..6], &ran.bytes[6..12]), (&next_hop[..], &OURS[..]));
    let (old, new) = (&frame[14..], &ran.bytes[14..]);
    // The outer packet: from us, to whom the quoted packet is from.
    let header = Version::of(original.from).header();
    let expected =
        ip(our_side, original.from.ip(), 60, old[if header == 20 { 9 } else { 6 }], &[], old.len() - header);
    assert_eq!(&new[..header], &expected);
    // Type, code, MTU; the checksum is verified by the lab.
    assert_eq!(
        (&new[header..header + 2], &new[header + 4..header + 8]),
        (&old[header..header + 2], &old[header + 4..header + 8])
    );
    // The quoted packet, as its sender knows it.
    let quoted = &new[header + 8..];
    let length = quoted.len();
    assert_eq!(&quoted[header..], &start_of(original)[header..], "ports and sequence number");
    if header == 20 {
        assert_eq!(internet_checksum(&quoted[..20]), 0, "the quoted header's checksum");
        let (quoted, _) = Ipv4Header::from_slice(quoted).unwrap();
        assert_eq!(IpAddr::from(quoted.source), original.from.ip());
        assert_eq!(IpAddr::from(quoted.destination), original.to.ip());
    } else {
        let (quoted, _) = Ipv6Header::from_slice(quoted).unwrap();
        assert_eq!(IpAddr::from(quoted.source), original.from.ip());
        assert_eq!(IpAddr::from(quoted.destination), original.to.ip());
    }
    assert_eq!(length, header + 8);
}

fn established(lab: &Lab, version: Version) -> Flow {
    lab.establish(version.client(1), version.vip())
}

#[test]
fn an_error_about_a_request_goes_to_its_client() {
    for version in VERSIONS {
        for complaint in COMPLAINTS {
            let lab = Lab::new();
            let flow = established(&lab, version);
            let request = flow.up(ACK).with_payload(&[7; 1400]);
            let seen = as_sent(&lab, &request, Outcome::Forwarded);
            let frame = error(complaint, &seen, &start_of(&seen));
            assert_translated(&lab, &frame, flow.listener.ip(), &request, ROUTER);
        }
    }
}

#[test]
fn an_error_about_an_answer_goes_to_its_backend() {
    for version in VERSIONS {
        for complaint in COMPLAINTS {
            let lab = Lab::new();
            let flow = established(&lab, version);
            let answer = flow.down(ACK).with_payload(&[7; 1400]);
            let seen = as_sent(&lab, &answer, Outcome::Replied);
            let frame = error(complaint, &seen, &start_of(&seen));
            assert_translated(&lab, &frame, flow.snat.ip(), &answer, BACKENDS_MAC);
        }
    }
}

#[test]
fn an_error_that_is_not_about_a_flow_is_left_alone() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = established(&lab, version);
        let request = as_sent(&lab, &flow.up(ACK), Outcome::Forwarded);
        let answer = as_sent(&lab, &flow.down(ACK), Outcome::Replied);
        let others = [
            Segment { from: (version.client(2).ip(), request.from.port()).into(), ..request.clone() },
            Segment { from: (request.from.ip(), request.from.port() ^ 1).into(), ..request.clone() },
            Segment { to: (request.to.ip(), 1).into(), ..request.clone() },
            Segment { to: version.client(3), ..request.clone() },
            Segment { to: version.client(2), ..answer.clone() },
            Segment { from: (answer.from.ip(), 80).into(), ..answer.clone() },
        ];
        for other in others {
            let ran = lab.run(FRONT, &error(Complaint::TooBig, &other, &start_of(&other)));
            assert_eq!(ran.outcome, Outcome::NotOurs, "{other:?}");
        }
    }
}

#[test]
fn an_error_quoting_another_sender_than_its_receiver_is_left_alone() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = established(&lab, version);
        let request = as_sent(&lab, &flow.up(ACK), Outcome::Forwarded);
        let elsewhere = Segment { from: version.client(2), ..request.clone() };
        let ran = lab.run(FRONT, &error(Complaint::TooBig, &elsewhere, &start_of(&request)));
        assert_eq!(ran.outcome, Outcome::NotOurs);
    }
}

#[test]
fn other_icmp_is_left_alone() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = established(&lab, version);
        let request = as_sent(&lab, &flow.up(ACK), Outcome::Forwarded);
        let mut frame = error(Complaint::TooBig, &request, &start_of(&request));
        // Echo request, router solicitation, redirect, neighbour solicitation…
        for kind in [0, 5, 8, 9, 10, 13, 128, 129, 133, 135, 136, 137] {
            frame[14 + version.header()] = kind;
            assert_eq!(lab.run(FRONT, &frame).outcome, Outcome::NotOurs, "type {kind}");
        }
    }
}

#[test]
fn an_error_that_is_cut_short_is_never_sent() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = established(&lab, version);
        let request = as_sent(&lab, &flow.up(ACK), Outcome::Forwarded);
        let answer = as_sent(&lab, &flow.down(ACK), Outcome::Replied);
        for segment in [request, answer] {
            let frame = error(Complaint::TooBig, &segment, &start_of(&segment));
            for length in 0..frame.len() {
                let outcome = lab.run(FRONT, &frame[..length]).outcome;
                assert_ne!(outcome, Outcome::IcmpTranslated, "{length} of {} bytes", frame.len());
            }
            // More may be quoted than is there.
            let mut longer = frame.clone();
            longer.extend([0; 32]);
            let longer = error(Complaint::TooBig, &segment, &longer[14 + version.header() + 8..]);
            for length in frame.len()..longer.len() {
                let outcome = lab.run(FRONT, &longer[..length]).outcome;
                assert_ne!(outcome, Outcome::IcmpTranslated, "{length} of {} bytes", longer.len());
            }
        }
    }
}

#[test]
fn an_error_has_a_life_of_its_own() {
    for version in VERSIONS {
        let lab = Lab::new();
        let flow = established(&lab, version);
        let request = as_sent(&lab, &flow.up(ACK), Outcome::Forwarded);
        let quoted = start_of(&request);
        let frame = error(Complaint::TooBig, &request, &quoted);
        let header = version.header();
        let old = ip(
            router(version),
            request.from.ip(),
            1,
            frame[14 + if header == 20 { 9 } else { 6 }],
            &[],
            8 + quoted.len(),
        );
        let mut expired = frame.clone();
        expired[14..14 + header].copy_from_slice(&old[..header]);
        assert_eq!(lab.run(FRONT, &expired).outcome, Outcome::TtlExpired);
        if header == 20 {
            let mut damaged = frame;
            damaged[14 + 10] ^= 1;
            assert_eq!(lab.run(FRONT, &damaged).outcome, Outcome::BadChecksum);
        }
    }
}
