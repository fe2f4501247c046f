//! One packet, as the steps after the look-up share it.

use crate::{
    arrival::Arrival,
    flow::family::Family,
    frame::Frame,
    layout::{Config, family},
    outcome::Outcome,
    parse::{self, Link, Packet, Ports},
    subprograms::Subprograms,
};

/// One packet: its headers, and where it came in.
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
    /// The number of the interface it came in by.
    pub interface: u16,
}

/// Finds the interface a packet came in by, and makes sure that the frame was meant for this host: a bridge or a switch
/// also floods frames for others, and a standby with the same configuration must not answer them. Err: what becomes of the
/// packet otherwise.
#[inline(always)]
pub fn enter<'a, S: Subprograms>(
    frame: &mut S::Frame,
    maps: &S,
    config: &'a Config,
    link: &Link,
    packet: Packet,
    ports: Ports,
) -> Result<Context<'a>, Outcome> {
    // Most hosts have one interface.
    let first = &config.interfaces[0];
    let index = frame.interface();
    let differs = u64::from((first.index ^ index) | (first.vlan ^ link.vlan));
    let interface = if differs | (first.mac ^ link.destination) == 0 {
        0
    } else {
        match maps.arrival(index, link.vlan, link.destination) {
            Arrival::UNKNOWN => return Err(Outcome::UnknownInterface),
            arrival => arrival.interface().ok_or(Outcome::NotOurs)?,
        }
    };
    Ok(Context { config, link: *link, packet, ports, interface })
}

/// Checks everything that must hold before a packet of a flow is changed.
#[inline(always)]
pub fn check<A: Family, S: Subprograms>(frame: &mut S::Frame, packet: &Packet) -> Result<(), Outcome> {
    if packet.fragment {
        return Err(Outcome::Fragment);
    }
    if packet.ttl <= 1 {
        return Err(Outcome::TtlExpired);
    }
    if A::NUMBER == family::IPV4 && !parse::ipv4_checksum_holds::<S>(frame, packet) {
        return Err(Outcome::BadChecksum);
    }
    Ok(())
}
