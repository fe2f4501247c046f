//! The way of a packet: whose is it, what becomes of it, where does it go.

use crate::{
    flow::{self, Family, Query, Slot, V4, V6},
    forward,
    frame::Frame,
    headers::{IPV4, IPV6, Ipv4, Ipv6, protocol},
    icmp,
    layout::{
        Config, LISTENERS_PER_PORT, Listener, PORTS, SETS_PER_ADDRESS, SNAT_ADDRESSES, SNAT_SHARED, WAYS,
        family,
    },
    maps::Maps,
    outcome::{Action, Outcome},
    parse::{self, Carries, Link, Packet, Ports},
    refuse, reply,
};

/// What became of a packet: [`Outcome`], service (0 where none is known) and the index of the interface it leaves by.
///
/// One word, so that it stays in a register. (As a structure LLVM copies it by loads that the verifier finds
/// misaligned.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done(u64);

impl Done {
    /// Left alone.
    pub const NOT_OURS: Self = Self::with(Outcome::NotOurs, 0);
    /// Not yet: see [`segments`].
    pub const ICMP: Self = Self(0xffff);

    /// A packet that leaves by no interface of ours.
    #[inline(always)]
    #[must_use]
    pub const fn with(outcome: Outcome, service: u16) -> Self {
        Self::leaving(outcome, service, 0)
    }

    /// A packet that leaves by an interface.
    #[inline(always)]
    #[must_use]
    pub const fn leaving(outcome: Outcome, service: u16, interface: u32) -> Self {
        Self(outcome as u64 | (service as u64) << 16 | (interface as u64) << 32)
    }

    /// The same, leaving by an interface.
    #[inline(always)]
    #[must_use]
    pub const fn by(self, interface: u32) -> Self {
        Self(self.0 | (interface as u64) << 32)
    }

    /// Is it a segment that [`refuse::answer`] has still to answer with a RST?
    #[inline(always)]
    #[must_use]
    pub const fn is_refused(self) -> bool {
        let outcome = self.outcome_index();
        outcome >= Outcome::RefusedNoBackend as u16 && outcome <= Outcome::ResetBackend as u16
    }

    /// As one word.
    #[inline(always)]
    #[must_use]
    pub const fn word(self) -> u64 {
        self.0
    }

    /// From one word.
    #[inline(always)]
    #[must_use]
    pub const fn from_word(word: u64) -> Self {
        Self(word)
    }

    /// What became of it: the place of its counter, see [`Outcome::ALL`].
    #[inline(always)]
    #[must_use]
    pub const fn outcome_index(self) -> u16 {
        self.0 as u16
    }

    /// What became of it.
    #[must_use]
    pub fn outcome(self) -> Option<Outcome> {
        Outcome::ALL.get(usize::from(self.outcome_index())).copied()
    }

    /// The service it was for.
    #[inline(always)]
    #[must_use]
    pub const fn service(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// The interface it leaves by.
    #[inline(always)]
    #[must_use]
    pub const fn interface(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// What the kernel is told to do.
    #[inline(always)]
    #[must_use]
    pub const fn action(self) -> Action {
        Outcome::action_of(self.outcome_index())
    }
}

/// Those that [`refuse::answer`] answers stand together in the list.
const _: () = assert!(Outcome::ResetBackend as u16 - Outcome::RefusedNoBackend as u16 == 3);

/// What the steps share about one packet.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// The Ethernet header.
    pub link: Link,
    /// The network header.
    pub packet: Packet,
    /// The ports.
    pub ports: Ports,
    /// The port (interface and VLAN) it came in by.
    pub port: u16,
}

/// Takes a packet from its first byte to its outcome.
#[inline(always)]
pub fn process<F: Frame, M: Maps>(frame: &mut F, maps: &M) -> Done {
    let Some(link) = parse::link(frame) else {
        return Done::NOT_OURS;
    };
    match link.kind {
        IPV4 => finish::<V4, F, M>(frame, maps, &link),
        IPV6 => finish::<V6, F, M>(frame, maps, &link),
        _ => Done::NOT_OURS,
    }
}

#[inline(always)]
fn finish<A: Family, F: Frame, M: Maps>(frame: &mut F, maps: &M, link: &Link) -> Done {
    let class = classify::<A, F, M>(frame, maps, link);
    if class == Class::NOT_OURS {
        return Done::NOT_OURS;
    }
    match segments::<A, F, M>(frame, maps, class) {
        Done::ICMP => icmp::translate::<A, F, M>(frame, maps),
        done if done.is_refused() => refuse::answer::<A, F>(frame, done),
        done => done,
    }
}

/// For whom a segment may be, as far as its destination tells: in one word the first listener on its port (bits 0-15) or
/// what is at its address's [place](crate::layout::snat_place) (bits 16-23).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class(u64);

impl Class {
    /// Nobody: for most packets of a host that does other things as well, this is the end.
    pub const NOT_OURS: Self = Self(0);
    /// To be looked at again.
    pub const UNSURE: Self = Self(u64::MAX);

    /// A listener, if any.
    #[inline(always)]
    #[must_use]
    pub const fn listener(first: u16) -> Self {
        Self(first as u64)
    }

    /// A flow's backend, if anything is at the place.
    #[inline(always)]
    #[must_use]
    pub const fn snat(place: u8) -> Self {
        Self((place as u64) << 16)
    }

    /// As one word.
    #[inline(always)]
    #[must_use]
    pub const fn word(self) -> u64 {
        self.0
    }

    /// From one word.
    #[inline(always)]
    #[must_use]
    pub const fn from_word(word: u64) -> Self {
        Self(word)
    }

    #[inline(always)]
    const fn first_listener(self) -> u16 {
        self.0 as u16
    }

    #[inline(always)]
    const fn place(self) -> u8 {
        (self.0 >> 16) as u8
    }
}

/// Could this be ours: is its port a listener's, or its address one of ours?
#[inline(always)]
pub fn classify<A: Family, F: Frame, M: Maps>(frame: &mut F, maps: &M, link: &Link) -> Class {
    let (transport, protocol, destination) = if A::NUMBER == family::IPV4 {
        let Some(header) = frame.at::<Ipv4>(link.network) else {
            return Class::NOT_OURS;
        };
        let length = usize::from(header.version_length & 0x0f) * 4;
        let [_, protocol] = header.ttl_protocol.get().to_be_bytes();
        (link.network + length, protocol, [u64::from(header.destination.word()), 0])
    } else {
        let Some(header) = frame.at::<Ipv6>(link.network) else {
            return Class::NOT_OURS;
        };
        let destination = [header.destination[0].word(), header.destination[1].word()];
        (link.network + size_of::<Ipv6>(), header.next_header, destination)
    };
    if protocol != protocol::TCP {
        // An error about a flow, or TCP behind extension headers.
        let hidden = A::NUMBER == family::IPV6 && parse::is_extension(protocol);
        return if protocol == A::ICMP || hidden { Class::UNSURE } else { Class::NOT_OURS };
    }
    let Some(ports) = parse::ports(frame, transport) else {
        return Class::NOT_OURS;
    };
    class_of::<A, M>(maps, destination, ports)
}

#[inline(always)]
fn class_of<A: Family, M: Maps>(maps: &M, destination: [u64; 2], ports: Ports) -> Class {
    match maps.first_listener(u16::from_be(ports.destination)) {
        0 => Class::snat(maps.snat_at::<A>(destination)),
        id => Class::listener(id),
    }
}

/// Which SNAT address this is, at whose place `place` was found.
#[inline(always)]
fn snat<A: Family, M: Maps>(maps: &M, config: &Config, place: u8, address: [u64; 2]) -> Option<u32> {
    match place {
        0 => None,
        SNAT_SHARED => maps.snat_index::<A>(address),
        number => {
            let index = u32::from(number - 1) % SNAT_ADDRESSES as u32;
            same(A::snat(config, index as usize), address).then_some(index)
        }
    }
}

/// Takes a TCP packet of one family to its outcome. [`Done::ICMP`]: it is none, but [`icmp::translate`]'s. Refused: the
/// answer is [`refuse::answer`]'s to write.
///
/// They are apart because together they need more stack than the kernel gives.
#[inline(always)]
pub fn segments<A: Family, F: Frame, M: Maps>(frame: &mut F, maps: &M, class: Class) -> Done {
    let Some(link) = parse::link(frame) else {
        return Done::NOT_OURS;
    };
    let Some((packet, carries)) = parse::packet::<A, F>(frame, &link) else {
        return Done::NOT_OURS;
    };
    match carries {
        Carries::Tcp => {}
        Carries::Icmp => return Done::ICMP,
        Carries::TooMuch => return too_much::<A, F, M>(frame, maps, &link, &packet),
        Carries::Other => return Done::NOT_OURS,
    }
    let Some(ports) = parse::ports(frame, packet.transport) else {
        return Done::NOT_OURS;
    };
    let Some(config) = maps.config() else {
        return Done::NOT_OURS;
    };
    let class =
        if class == Class::UNSURE { class_of::<A, M>(maps, packet.destination, ports) } else { class };
    let first = class.first_listener();
    if first != 0 {
        // A listener's port is never a slot, at any address: whoever is not for a listener here is not ours.
        let Some((id, listener)) = listener_from::<A, M>(maps, first, packet.destination, ports.destination)
        else {
            return Done::NOT_OURS;
        };
        // Before all that can be done without it: the flow's sets may be far away.
        let query = Query::new::<A>(config, A::tuple(packet.source, ports.source, id));
        let hit = flow::find::<A, M>(maps, config, &query);
        return match enter(frame, maps, config, &link, packet, ports) {
            Some(context) => forward::forward::<A, F, M>(frame, maps, &context, listener, &query, hit),
            None => Done::NOT_OURS,
        };
    }
    if let Some(slot) = slot_of::<A, M>(maps, config, class.place(), packet.destination, ports.destination) {
        return match enter(frame, maps, config, &link, packet, ports) {
            Some(context) => reply::reply::<A, F, M>(frame, maps, &context, slot),
            None => Done::NOT_OURS,
        };
    }
    Done::NOT_OURS
}

/// [`listener`], where the first one on the port is `first`: nearly always it is the one.
#[inline(always)]
fn listener_from<A: Family, M: Maps>(
    maps: &M,
    first: u16,
    address: [u64; 2],
    port: u16,
) -> Option<(u16, &Listener)> {
    let listener = maps.listener(first)?;
    if listener.family == A::NUMBER && same(listener.address, address) {
        return Some((first, listener));
    }
    let id = maps.find_listener(A::NUMBER, address, port);
    if id == 0 {
        return None;
    }
    Some((id, maps.listener(id)?))
}

/// Are the addresses the same? Without a branch for each half.
#[inline(always)]
pub const fn same(one: [u64; 2], other: [u64; 2]) -> bool {
    (one[0] ^ other[0]) | (one[1] ^ other[1]) == 0
}

/// The id of the listener at an address (words) and port (word); 0: there is none.
#[inline(always)]
pub fn listener<M: Maps>(maps: &M, family: u8, address: [u64; 2], port: u16) -> u16 {
    let mut id = maps.first_listener(u16::from_be(port));
    for _ in 0..LISTENERS_PER_PORT {
        if id == 0 {
            break;
        }
        let Some(listener) = maps.listener(id) else {
            return 0;
        };
        if listener.family == family && same(listener.address, address) {
            return id;
        }
        id = listener.next;
    }
    0
}

/// The slot whose SNAT address (words) and port (word) these are, be it anybody's or not.
#[inline(always)]
pub fn slot<A: Family, M: Maps>(maps: &M, config: &Config, address: [u64; 2], port: u16) -> Option<Slot> {
    slot_of::<A, M>(maps, config, maps.snat_at::<A>(address), address, port)
}

/// The same, where it is known what is at the address's place.
#[inline(always)]
fn slot_of<A: Family, M: Maps>(
    maps: &M,
    config: &Config,
    place: u8,
    address: [u64; 2],
    port: u16,
) -> Option<Slot> {
    let port = u32::from(u16::from_be(port));
    let set = port / WAYS as u32;
    if set.wrapping_sub(config.first_set) >= config.sets {
        return None;
    }
    let index = snat::<A, M>(maps, config, place, address)?;
    Some(Slot { set: index * SETS_PER_ADDRESS + set, way: port % WAYS as u32 })
}

/// Which SNAT address this is.
#[inline(always)]
pub fn snat_index<A: Family, M: Maps>(maps: &M, address: [u64; 2]) -> Option<u32> {
    let config = maps.config()?;
    for index in 0..SNAT_ADDRESSES {
        if index as u32 >= A::snat_count(config) {
            break;
        }
        if same(A::snat(config, index), address) {
            return Some(index as u32);
        }
    }
    None
}

/// Finds the port a packet came in by, and makes sure that the frame was meant for this host: a bridge or a switch
/// also floods frames for others, and a standby with the same configuration must not answer them.
#[inline(always)]
fn enter<'a, F: Frame, M: Maps>(
    frame: &mut F,
    maps: &M,
    config: &'a Config,
    link: &Link,
    packet: Packet,
    ports: Ports,
) -> Option<Context<'a>> {
    // Most have one port.
    let first = &config.ports[0];
    let interface = frame.interface();
    let differs = u64::from((first.interface ^ interface) | (first.vlan ^ link.vlan));
    let port = if differs | (first.mac ^ link.destination) == 0 {
        0
    } else {
        maps.arrival(interface, link.vlan, link.destination)?
    };
    Some(Context { config, link: *link, packet, ports, port })
}

/// The port with this interface and VLAN, if `mac` is its own.
#[inline(always)]
pub fn arrival<M: Maps>(maps: &M, interface: u32, vlan: u32, mac: u64) -> Option<u16> {
    let config = maps.config()?;
    for index in 0..PORTS {
        if index as u32 >= config.port_count {
            break;
        }
        let port = &config.ports[index];
        if port.interface == interface && port.vlan == vlan {
            return (port.mac == mac).then_some(index as u16);
        }
    }
    None
}

/// Everything that must hold before a packet of a flow is touched.
#[inline(always)]
pub fn check<A: Family, F: Frame>(frame: &mut F, packet: &Packet) -> Result<(), Outcome> {
    if packet.fragment {
        return Err(Outcome::Fragment);
    }
    if packet.ttl <= 1 {
        return Err(Outcome::TtlExpired);
    }
    if A::NUMBER == family::IPV4 && !parse::ipv4_checksum_holds(frame, packet) {
        return Err(Outcome::BadChecksum);
    }
    Ok(())
}

/// A packet whose ports lie behind too many extension headers: ours if it is for an address of ours.
#[inline(always)]
fn too_much<A: Family, F: Frame, M: Maps>(frame: &mut F, maps: &M, link: &Link, packet: &Packet) -> Done {
    match maps.snat_index::<A>(packet.destination) {
        Some(_) if maps.arrival(frame.interface(), link.vlan, link.destination).is_some() => {
            Done::with(Outcome::ExtensionHeaders, 0)
        }
        _ => Done::NOT_OURS,
    }
}
