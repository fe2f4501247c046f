//! What is not ours passes through a load balancer as if it were not there: every frame as it was sent.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{net::IpAddr, time::Duration};

use etherparse::{
    EtherType, Ethernet2Header, Icmpv4Type, IpFragOffset, IpNumber, Ipv4Header, PacketBuilder,
    PacketBuilderStep, icmpv4::DestUnreachableHeader,
};
use lb_tests::{
    cluster::{Cluster, Shape},
    lab::{
        Link,
        capture::{self, Capture},
    },
    load, pattern,
};

/// Longer than a frame takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(30);
/// How many damaged frames are sent.
const DAMAGED: usize = 400;
/// A locally administered MAC that no host has: the bridge floods it to everybody.
const NOBODY: [u8; 6] = [2, 0, 0, 0, 0, 0x99];

/// The two ends of the segment as frames see them.
struct Ends {
    client_mac: [u8; 6],
    lb_mac: [u8; 6],
    client: Link,
    lb: Link,
}

impl Ends {
    /// From the client's address to `target`.
    fn to(&self, target: IpAddr) -> PacketBuilderStep<etherparse::IpHeaders> {
        self.to_mac(self.lb_mac, target)
    }

    fn to_mac(&self, mac: [u8; 6], target: IpAddr) -> PacketBuilderStep<etherparse::IpHeaders> {
        let ethernet = PacketBuilder::ethernet2(self.client_mac, mac);
        match target {
            IpAddr::V4(target) => ethernet.ipv4(self.client.v4.octets(), target.octets(), 64),
            IpAddr::V6(target) => ethernet.ipv6(self.client.v6.octets(), target.octets(), 64),
        }
    }
}

/// A finished frame.
macro_rules! frame {
    ($builder:expr, $payload:expr) => {{
        let (builder, payload): (_, &[u8]) = ($builder, $payload);
        let mut frame = Vec::with_capacity(builder.size(payload.len()));
        builder.write(&mut frame, payload).unwrap();
        frame
    }};
}

/// Traffic to the load balancer's own addresses: none of it can be a listener's.
fn traffic_of_the_host(ends: &Ends) -> Vec<(&'static str, Vec<u8>)> {
    let (v4, v6): (IpAddr, IpAddr) = (ends.lb.v4.into(), ends.lb.v6.into());
    let mut frames = Vec::new();
    for own in [v4, v6] {
        frames.extend([
            ("SSH to the host", frame!(ends.to(own).tcp(50_000, 22, 1, 64_240).syn(), &[])),
            (
                "a listener's port, not its address",
                frame!(ends.to(own).tcp(50_000, 6443, 1, 64_240).syn(), &[]),
            ),
            (
                "data of no connection",
                frame!(ends.to(own).tcp(50_001, 40_000, 1, 64_240).ack(7), &[0x17; 900]),
            ),
            ("UDP", frame!(ends.to(own).udp(53, 40_001), &[1; 300])),
        ]);
    }
    let quoted = frame!(ends.to(v4).udp(40_000, 53), &[0; 8]);
    let unreachable = Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Port);
    let mut fragment =
        Ipv4Header::new(256, 64, IpNumber::TCP, ends.client.v4.octets(), ends.lb.v4.octets()).unwrap();
    fragment.fragment_offset = IpFragOffset::try_new(64).unwrap();
    fragment.header_checksum = fragment.calc_header_checksum();
    frames.extend([
        ("ping", frame!(ends.to(v4).icmpv4_echo_request(1, 1), &[9; 56])),
        ("ping over IPv6", frame!(ends.to(v6).icmpv6_echo_request(1, 1), &[9; 56])),
        ("an ICMP error about somebody else", frame!(ends.to(v4).icmpv4(unreachable), &quoted[14..])),
        (
            "a later fragment",
            [ethernet_header(ends, EtherType::IPV4), fragment.to_bytes().to_vec(), vec![7; 256]].concat(),
        ),
        ("a local experiment", [ethernet_header(ends, EtherType(0x88b5)), vec![0x5a; 100]].concat()),
        ("a single byte", [ethernet_header(ends, EtherType::IPV4), vec![0x45]].concat()),
    ]);
    frames
}

fn ethernet_header(ends: &Ends, ether_type: EtherType) -> Vec<u8> {
    let (source, destination) = (ends.client_mac, ends.lb_mac);
    Ethernet2Header { source, destination, ether_type }.to_bytes().to_vec()
}

/// Traffic that comes close to a listener or a flow, and is neither.
fn near_misses(ends: &Ends, vip: IpAddr) -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("a VIP, another port", frame!(ends.to(vip).tcp(50_000, 22, 1, 64_240).syn(), &[])),
        ("a VIP, UDP", frame!(ends.to(vip).udp(50_000, 6443), &[3; 64])),
        ("a slot's port, no backend", frame!(ends.to(vip).tcp(6443, 40_000, 1, 64_240).ack(1), &[4; 64])),
        (
            "a listener's packet for another MAC",
            frame!(ends.to_mac(NOBODY, vip).tcp(50_000, 6443, 1, 64_240).syn(), &[]),
        ),
    ]
}

/// Flips a few bytes behind the Ethernet header, or cuts the frame off.
fn damage(frame: &[u8], round: usize) -> Vec<u8> {
    const ETHERNET_HEADER: usize = 14;
    let noise = pattern::piece(round as u64 * 16, 16);
    let number = |at: usize| usize::from(u16::from_be_bytes([noise[at], noise[at + 1]]));
    let mut damaged = frame.to_vec();
    let behind = damaged.len() - ETHERNET_HEADER;
    for at in [0, 3, 6] {
        damaged[ETHERNET_HEADER + number(at) % behind.min(60)] = noise[at + 2];
    }
    if noise[9] < 64 {
        // The kernel drops a frame that is nothing but an Ethernet header before anybody sees it.
        damaged.truncate(ETHERNET_HEADER + 1 + number(10) % behind);
    }
    damaged
}

#[test]
fn foreign_frames_arrive_as_they_were_sent() {
    let cluster = Cluster::start(Shape::OneArm, 1).unwrap();
    let _daemon = cluster.balance().unwrap();
    let ends = Ends {
        client_mac: capture::mac(&cluster.client, "eth0").unwrap(),
        lb_mac: capture::mac(&cluster.lb, "eth0").unwrap(),
        client: cluster.client.link().unwrap().clone(),
        lb: cluster.lb.link().unwrap().clone(),
    };
    let sending = Capture::open(&cluster.client, "eth0").unwrap();
    let receiving = Capture::open(&cluster.lb, "eth0").unwrap();
    let require_untouched = |what: &str, frame: &[u8]| {
        sending.send(frame).unwrap();
        let seen = receiving.receive(LIMIT, |received| received == frame);
        assert!(seen.is_ok(), "{what} was lost or changed: {frame:02x?}");
    };
    let host_traffic = traffic_of_the_host(&ends);
    let near_misses = cluster.vips().map(|vip| near_misses(&ends, vip)).concat();
    for (what, frame) in host_traffic.iter().chain(&near_misses) {
        require_untouched(what, frame);
    }
    for round in 0..DAMAGED {
        let (what, frame) = &host_traffic[round % host_traffic.len()];
        require_untouched(&format!("{what}, damaged ({round})"), &damage(frame, round));
    }
    let client = cluster.client_of(cluster.vip4).unwrap();
    load::sequential(&cluster.client, &client, 10).unwrap().require_all(10).unwrap();
}
