//! A load balancer on plain memory, with three backends of each family and a service on two ports, and the packets
//! that go through it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use etherparse::{
    IpFragOffset, IpNumber, Ipv4Header, Ipv4Options, Ipv6FlowLabel, Ipv6Header, LinkExtHeader, NetSlice,
    SlicedPacket, TcpHeader, TransportSlice,
};

use crate::{
    Outcome,
    bytes::Bytes,
    flow::{self, Family, Found, Query, V4, V6},
    headers::{Mac, tcp_flag},
    layout::{Interface, NextHop, WAYS, family},
    memory::{Memory, port_word, words},
    meta::{Kind, Meta},
    outcome::{Action, Counter, Event},
    pipeline,
};

pub(super) const FIN: u8 = tcp_flag::FIN;
pub(super) const SYN: u8 = tcp_flag::SYN;
pub(super) const RST: u8 = tcp_flag::RST;
pub(super) const ACK: u8 = tcp_flag::ACK;

/// The number of the client's SYN.
pub(super) const CLIENT_START: u32 = 1000;
/// The number of the backend's SYN-ACK.
pub(super) const BACKEND_START: u32 = 1999;

/// Our own MAC address where listeners are.
pub(super) const OURS: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// On the interface where no listener is.
pub(super) const OURS_BEHIND: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub(super) const ROUTER: [u8; 6] = [2, 0, 0, 0, 1, 1];
pub(super) const OTHER_ROUTER: [u8; 6] = [2, 0, 0, 0, 1, 2];
pub(super) const BACKENDS_MAC: [u8; 6] = [2, 0, 0, 0, 2, 1];
/// The interface where clients and backends are.
pub(super) const FRONT: u32 = 7;
/// An interface of ours where no listener is.
pub(super) const BEHIND: u32 = 8;

/// Numbers of the interfaces: the kernel's interface and VLAN ids.
pub(super) const PLAIN: u16 = 0;
pub(super) const TAGGED: u16 = 1;
pub(super) const DOUBLE_TAGGED: u16 = 2;
pub(super) const PLAIN_BEHIND: u16 = 3;
const LISTENING: u32 = 1 << PLAIN | 1 << TAGGED | 1 << DOUBLE_TAGGED;

/// Protocol and id of the tags that packets of a port carry.
pub(super) fn tags_of(port: u16) -> &'static [(u16, u16)] {
    match port {
        TAGGED => &[(0x8100, 100)],
        DOUBLE_TAGGED => &[(0x88a8, 200), (0x8100, 300)],
        _ => &[],
    }
}

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Version {
    pub(super) number: u8,
}

pub(super) const VERSIONS: [Version; 2] =
    [Version { number: family::IPV4 }, Version { number: family::IPV6 }];

impl Version {
    pub(super) fn of(address: SocketAddr) -> Self {
        VERSIONS[usize::from(address.is_ipv6())]
    }

    fn pick(self, four: [u8; 4], last: u16) -> IpAddr {
        if self.number == family::IPV4 {
            Ipv4Addr::from(four).into()
        } else {
            Ipv6Addr::new(0xfd00, 0, u16::from(four[0]), 0, 0, 0, u16::from(four[2]), last).into()
        }
    }

    /// The VIP, which is the SNAT address, too.
    pub(super) fn vip(self) -> SocketAddr {
        SocketAddr::new(self.pick([192, 168, 2, 140], 140), 6443)
    }

    /// The VIP on another of the service's ports.
    pub(super) fn other_vip(self) -> SocketAddr {
        SocketAddr::new(self.vip().ip(), 9345)
    }

    /// Backend 1, 2 or 3.
    pub(super) fn backend(self, number: u8) -> SocketAddr {
        SocketAddr::new(self.pick([192, 168, 2, 150 + number], 150 + u16::from(number)), 6443)
    }

    pub(super) fn client(self, number: u16) -> SocketAddr {
        let [high, low] = number.to_be_bytes();
        SocketAddr::new(self.pick([10, 1, high, low], number), 40_000 + number % 1000)
    }

    /// Bytes of a network header without options.
    pub(super) fn header(self) -> usize {
        if self.number == family::IPV4 { 20 } else { 40 }
    }
}

/// The maps, and who is in them.
pub(super) struct Lab {
    pub(super) memory: Memory,
    pub(super) service: u16,
    /// Ids of the three backends of each family.
    ids: [[u8; 3]; 2],
}

impl Lab {
    pub(super) fn new() -> Self {
        Self::with_sets(1024)
    }

    /// With a flow table of `sets` sets.
    pub(super) fn with_sets(sets: u32) -> Self {
        let mut memory = Memory::new(256, sets, crate::layout::NEXT_HOPS);
        for (index, interface, vlan, mac) in [
            (PLAIN, FRONT, 0, OURS),
            (TAGGED, FRONT, 100, OURS),
            (DOUBLE_TAGGED, FRONT, 200 << 16 | 300, OURS),
            (PLAIN_BEHIND, BEHIND, 0, OURS_BEHIND),
        ] {
            let mut tags = [0; 2];
            for (place, (protocol, id)) in tags.iter_mut().zip(tags_of(index)) {
                *place = (u32::from(*protocol) << 16 | u32::from(*id)).to_be();
            }
            let mac = Mac::new(mac).number();
            let tag_count = tags_of(index).len() as u32;
            assert_eq!(
                memory.add_interface(Interface { index: interface, vlan, mac, tags, tag_count, reserved: 0 }),
                index
            );
        }
        let service = memory.add_service();
        let ids = VERSIONS.map(|version| {
            memory.set_snat(version.vip().ip());
            memory.add_listener(version.vip(), service, LISTENING);
            memory.add_listener(version.other_vip(), service, LISTENING);
            let hop = NextHop::new(Mac::new(BACKENDS_MAC).number(), PLAIN);
            [1, 2, 3].map(|number| memory.add_backend(version.backend(number), hop))
        });
        let mut lab = Self { memory, service, ids };
        lab.select(&[1, 2, 3]);
        lab
    }

    /// The id of backend 1, 2 or 3.
    pub(super) fn id(&self, version: Version, number: u8) -> u8 {
        self.ids[usize::from(version.number == family::IPV6)][usize::from(number) - 1]
    }

    /// Lets new flows of both families go to these backends.
    pub(super) fn select(&mut self, numbers: &[u8]) {
        for version in VERSIONS {
            let ids: Vec<_> = numbers.iter().map(|number| self.id(version, *number)).collect();
            self.memory.select(self.service, version.number, &ids);
        }
    }

    /// The backend in the lab's records.
    pub(super) fn backend(&self, address: SocketAddr) -> &crate::layout::Backend {
        let found = self.memory.backends.iter().find(|backend| {
            backend.address == words(address.ip()) && backend.port == port_word(address.port())
        });
        found.expect("a backend of the lab")
    }

    /// What was counted.
    pub(super) fn events(&self, event: Event) -> u64 {
        self.memory.count(self.service, Counter::Event(event))
    }

    /// The number of a listener of the lab.
    pub(super) fn listener_id(&self, listener: SocketAddr) -> u16 {
        let (address, port) = (words(listener.ip()), port_word(listener.port()));
        let mut listeners = self.memory.listeners.iter();
        listeners
            .position(|entry| entry.address == address && entry.port == port)
            .expect("a listener of the lab") as u16
    }

    /// The slot of a flow.
    pub(super) fn slot(&self, client: SocketAddr, listener: SocketAddr) -> Found {
        let id = self.listener_id(listener);
        let (address, port) = (words(client.ip()), port_word(client.port()));
        let config = &self.memory.config;
        if client.is_ipv4() {
            flow::find::<V4, _>(
                &&self.memory,
                config,
                &Query::new::<V4>(config, V4::tuple(address, port, id)),
            )
            .found()
        } else {
            flow::find::<V6, _>(
                &&self.memory,
                config,
                &Query::new::<V6>(config, V6::tuple(address, port, id)),
            )
            .found()
        }
    }

    /// Slots that are not free, of both families.
    pub(super) fn occupied(&self) -> usize {
        fn count<F: Family>(memory: &Memory) -> usize {
            let sets = memory.config.first_set..memory.config.first_set + memory.config.sets;
            sets.flat_map(|set| (0..WAYS as u32).map(move |way| (set, way)))
                .filter(|(set, way)| {
                    !Meta(F::meta(F::set(&memory, *set).unwrap(), *way).load()).is(Kind::Free)
                })
                .count()
        }
        count::<V4>(&self.memory) + count::<V6>(&self.memory)
    }

    /// Takes a packet through. Whatever becomes of it, what is passed is untouched, and what is sent is in order.
    pub(super) fn run(&self, interface: u32, packet: &[u8]) -> Ran {
        let mut frame = Bytes::new(packet, interface).expect("a packet that fits");
        let done = pipeline(&mut frame, &&self.memory);
        let outcome = done.outcome().expect("an outcome from the list");
        match outcome.action() {
            Action::Pass => assert_eq!(frame.bytes(), packet, "{outcome:?}: passed, but not untouched"),
            Action::Transmit => assert_in_order(frame.bytes()),
            Action::Drop => {}
        }
        Ran { outcome, interface: done.interface(), bytes: frame.bytes().to_vec() }
    }

    /// Takes a segment through.
    pub(super) fn send(&self, segment: &Segment) -> Ran {
        self.run(segment.interface, &segment.bytes())
    }

    /// A flow whose SYN was forwarded.
    pub(super) fn open(&self, client: SocketAddr, listener: SocketAddr) -> Flow {
        let sent = self.send(&Segment::new(client, listener, SYN)).sent(Outcome::Forwarded);
        Flow { client, listener, snat: sent.from, backend: sent.to }
    }

    /// A flow that its client has proven.
    pub(super) fn establish(&self, client: SocketAddr, listener: SocketAddr) -> Flow {
        let flow = self.open(client, listener);
        self.send(&flow.down(SYN | ACK)).sent(Outcome::Replied);
        self.send(&flow.up(ACK)).sent(Outcome::Forwarded);
        self.send(&flow.down(ACK)).sent(Outcome::Replied);
        assert!(self.meta(&flow).is(Kind::Established));
        flow
    }

    /// The word of a flow's slot.
    pub(super) fn meta(&self, flow: &Flow) -> Meta {
        let found = self.slot(flow.client, flow.listener);
        assert!(found.is_some(), "{flow:?} has no slot");
        found.meta()
    }

    /// The established flow gets through, both ways.
    pub(super) fn assert_flows(&self, flow: &Flow) {
        let up = self.send(&flow.up(ACK).with_payload(b"request")).sent(Outcome::Forwarded);
        assert_eq!((up.from, up.to, &up.payload[..]), (flow.snat, flow.backend, &b"request"[..]));
        let down = self.send(&flow.down(ACK).with_payload(b"answer")).sent(Outcome::Replied);
        assert_eq!((down.from, down.to, &down.payload[..]), (flow.listener, flow.client, &b"answer"[..]));
    }
}

/// The ends of a flow, as everybody sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flow {
    pub(super) client: SocketAddr,
    pub(super) listener: SocketAddr,
    pub(super) snat: SocketAddr,
    pub(super) backend: SocketAddr,
}

impl Flow {
    /// A segment of the client, which has acknowledged the SYN-ACK and nothing else.
    pub(super) fn up(&self, flags: u8) -> Segment {
        let sequence = if flags & SYN == 0 { CLIENT_START + 1 } else { CLIENT_START };
        Segment { sequence, ..Segment::new(self.client, self.listener, flags) }
    }

    /// A segment of the backend, which has sent its SYN-ACK and nothing else.
    pub(super) fn down(&self, flags: u8) -> Segment {
        let sequence = if flags & SYN == 0 { BACKEND_START + 1 } else { BACKEND_START };
        Segment {
            source_mac: BACKENDS_MAC,
            sequence,
            acknowledgement: CLIENT_START + 1,
            ..Segment::new(self.backend, self.snat, flags)
        }
    }
}

/// What became of a packet.
#[derive(Debug)]
pub(super) struct Ran {
    pub(super) outcome: Outcome,
    /// Where it leaves.
    pub(super) interface: u32,
    pub(super) bytes: Vec<u8>,
}

impl Ran {
    /// The segment that was sent, with this outcome.
    pub(super) fn sent(&self, outcome: Outcome) -> Segment {
        assert_eq!(self.outcome, outcome);
        assert_eq!(outcome.action(), Action::Transmit);
        Segment { interface: self.interface, ..Segment::read(&self.bytes).expect("a TCP segment") }
    }
}

/// A TCP segment in a frame: to be sent, or as it was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) interface: u32,
    pub(super) source_mac: [u8; 6],
    pub(super) destination_mac: [u8; 6],
    /// Protocol and id.
    pub(super) tags: Vec<(u16, u16)>,
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    pub(super) ttl: u8,
    /// IPv4 options, or IPv6 extension headers.
    pub(super) options: Vec<u8>,
    /// What the first of the IPv6 extension headers is; TCP where there are none.
    pub(super) next_header: u8,
    pub(super) flags: u8,
    pub(super) sequence: u32,
    pub(super) acknowledgement: u32,
    pub(super) tcp_options: Vec<u8>,
    pub(super) payload: Vec<u8>,
    /// Ethernet padding after the packet.
    pub(super) padding: usize,
}

impl Segment {
    pub(super) fn new(from: SocketAddr, to: SocketAddr, flags: u8) -> Self {
        Self {
            interface: FRONT,
            source_mac: ROUTER,
            destination_mac: OURS,
            tags: Vec::new(),
            from,
            to,
            ttl: 64,
            options: Vec::new(),
            next_header: IpNumber::TCP.0,
            flags,
            sequence: CLIENT_START,
            acknowledgement: BACKEND_START + 1,
            tcp_options: Vec::new(),
            payload: Vec::new(),
            padding: 0,
        }
    }

    pub(super) fn with_payload(mut self, payload: &[u8]) -> Self {
        self.payload = payload.to_vec();
        self
    }

    /// As packets of this port are.
    pub(super) fn on(mut self, port: u16) -> Self {
        self.tags = tags_of(port).to_vec();
        self
    }

    /// With IPv4 options, or as many IPv6 destination options headers.
    pub(super) fn with_options(mut self, count: usize) -> Self {
        if self.from.is_ipv4() {
            // No-operation, three times, and the end of the list (RFC 791).
            self.options = [1, 1, 1, 0].repeat(count);
        } else if count > 0 {
            // PadN with four bytes (RFC 8200 §4.2); the last one says what follows.
            self.options = [60, 0, 1, 4, 0, 0, 0, 0].repeat(count);
            self.options[(count - 1) * 8] = IpNumber::TCP.0;
            self.next_header = 60;
        }
        self
    }

    /// Where the network header begins.
    pub(super) fn network(&self) -> usize {
        14 + 4 * self.tags.len()
    }

    /// Where the TCP header begins.
    pub(super) fn transport(&self) -> usize {
        self.network() + Version::of(self.from).header() + self.options.len()
    }

    fn tcp(&self) -> Vec<u8> {
        let set = |flag: u8| self.flags & flag != 0;
        let mut tcp = TcpHeader::new(self.from.port(), self.to.port(), self.sequence, 0xffff);
        (tcp.fin, tcp.syn, tcp.rst, tcp.ack) = (set(FIN), set(SYN), set(RST), set(ACK));
        tcp.acknowledgment_number = self.acknowledgement;
        tcp.set_options_raw(&self.tcp_options).unwrap();
        tcp.checksum = match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                tcp.calc_checksum_ipv4_raw(from.octets(), to.octets(), &self.payload).unwrap()
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                tcp.calc_checksum_ipv6_raw(from.octets(), to.octets(), &self.payload).unwrap()
            }
            _ => unreachable!("both ends have one family"),
        };
        [&tcp.to_bytes()[..], &self.payload].concat()
    }

    /// As it is on the wire.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = ethernet(self.source_mac, self.destination_mac, &self.tags, self.from.is_ipv4());
        let tcp = self.tcp();
        let length = self.options.len() + tcp.len();
        bytes.extend(ip(self.from.ip(), self.to.ip(), self.ttl, self.next_header, &self.options, length));
        bytes.extend(tcp);
        bytes.resize(bytes.len() + self.padding, 0);
        bytes
    }

    /// Reads a frame; None when it carries no whole TCP segment.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let packet = SlicedPacket::from_ethernet(bytes).ok()?;
        let ethernet = packet.link?.to_header()?.ethernet2()?;
        let mut tags: Vec<(u16, u16)> = Vec::new();
        let mut protocol = ethernet.ether_type.0;
        let mut kind = protocol;
        for extension in &packet.link_exts {
            let LinkExtHeader::Vlan(tag) = extension.to_header() else {
                return None;
            };
            tags.push((kind, tag.vlan_id.value()));
            kind = tag.ether_type.0;
            protocol = kind;
        }
        assert_eq!(protocol, if packet.net.as_ref()?.is_ipv4() { 0x0800 } else { 0x86dd });
        let TransportSlice::Tcp(tcp) = packet.transport? else {
            return None;
        };
        let (from, to, ttl, options, next_header): (IpAddr, IpAddr, _, _, _) = match packet.net? {
            NetSlice::Ipv4(ip) => {
                let header = ip.header();
                let options = header.options().to_vec();
                (
                    header.source_addr().into(),
                    header.destination_addr().into(),
                    header.ttl(),
                    options,
                    IpNumber::TCP.0,
                )
            }
            NetSlice::Ipv6(ip) => {
                let header = ip.header();
                let start = 14 + 4 * tags.len() + 40;
                let options = bytes[start..][..ip.extensions().slice().len()].to_vec();
                (
                    header.source_addr().into(),
                    header.destination_addr().into(),
                    header.hop_limit(),
                    options,
                    header.next_header().0,
                )
            }
            NetSlice::Arp(_) => return None,
        };
        let flag = |set: bool, flag: u8| if set { flag } else { 0 };
        let segment = Self {
            interface: 0,
            source_mac: ethernet.source,
            destination_mac: ethernet.destination,
            tags,
            from: SocketAddr::new(from, tcp.source_port()),
            to: SocketAddr::new(to, tcp.destination_port()),
            ttl,
            options,
            next_header,
            flags: flag(tcp.fin(), FIN) | flag(tcp.syn(), SYN) | flag(tcp.rst(), RST) | flag(tcp.ack(), ACK),
            sequence: tcp.sequence_number(),
            acknowledgement: tcp.acknowledgment_number(),
            tcp_options: tcp.options().to_vec(),
            payload: tcp.payload().to_vec(),
            padding: 0,
        };
        let padding = bytes.len() - segment.transport() - tcp.slice().len();
        Some(Self { padding, ..segment })
    }
}

/// An Ethernet header with tags.
pub(super) fn ethernet(source: [u8; 6], destination: [u8; 6], tags: &[(u16, u16)], ipv4: bool) -> Vec<u8> {
    let mut bytes = [destination, source].concat();
    for (protocol, id) in tags {
        bytes.extend(protocol.to_be_bytes());
        bytes.extend(id.to_be_bytes());
    }
    bytes.extend(if ipv4 { [0x08, 0x00] } else { [0x86, 0xdd] });
    bytes
}

/// A network header with its options or extension headers, for `length` bytes with these included.
pub(super) fn ip(from: IpAddr, to: IpAddr, ttl: u8, next: u8, options: &[u8], length: usize) -> Vec<u8> {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut header = Ipv4Header {
                total_len: (20 + length) as u16,
                identification: 0x1234,
                dont_fragment: true,
                fragment_offset: IpFragOffset::ZERO,
                time_to_live: ttl,
                protocol: IpNumber(next),
                source: from.octets(),
                destination: to.octets(),
                options: Ipv4Options::try_from(options).unwrap(),
                ..Ipv4Header::default()
            };
            header.header_checksum = header.calc_header_checksum();
            header.to_bytes().to_vec()
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let header = Ipv6Header {
                traffic_class: 0,
                flow_label: Ipv6FlowLabel::try_new(0x12345).unwrap(),
                payload_length: length as u16,
                next_header: IpNumber(next),
                hop_limit: ttl,
                source: from.octets(),
                destination: to.octets(),
            };
            [&header.to_bytes()[..], options].concat()
        }
        _ => unreachable!("both ends have one family"),
    }
}

/// Whatever is sent: a whole packet, with right checksums, from our own MAC address and with life left.
fn assert_in_order(bytes: &[u8]) {
    let packet = SlicedPacket::from_ethernet(bytes).expect("a whole packet");
    let source = packet.link.unwrap().to_header().unwrap().ethernet2().unwrap().source;
    assert!([OURS, OURS_BEHIND].contains(&source), "from {source:?}");
    match packet.net.expect("an IP packet") {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum(), "IPv4 header");
            assert_ne!(header.ttl(), 0);
            let (source, destination) = (header.source(), header.destination());
            match packet.transport.expect("TCP or ICMP") {
                TransportSlice::Tcp(tcp) => {
                    assert_eq!(
                        Ok(tcp.checksum()),
                        tcp.calc_checksum_ipv4(source, destination),
                        "TCP over IPv4"
                    );
                }
                TransportSlice::Icmpv4(icmp) => assert_eq!(internet_checksum(icmp.slice()), 0, "ICMP"),
                other => panic!("{other:?} was sent"),
            }
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header();
            assert_ne!(header.hop_limit(), 0);
            let (source, destination) = (header.source(), header.destination());
            match packet.transport.expect("TCP or ICMPv6") {
                TransportSlice::Tcp(tcp) => {
                    assert_eq!(
                        Ok(tcp.checksum()),
                        tcp.calc_checksum_ipv6(source, destination),
                        "TCP over IPv6"
                    );
                }
                TransportSlice::Icmpv6(icmp) => {
                    assert!(icmp.is_checksum_valid(source, destination), "ICMPv6");
                }
                other => panic!("{other:?} was sent"),
            }
        }
        NetSlice::Arp(_) => panic!("ARP was sent"),
    }
}

/// RFC 1071; over data with its checksum in it, 0.
pub(super) fn internet_checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
