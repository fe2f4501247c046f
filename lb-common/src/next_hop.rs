//! The ways back to clients, learned from the packets that come from them.
//!
//! A client's replies leave by the neighbour that its packets came from: no route look-up, and right also where
//! several routers share a segment. A slot keeps an index into one small table; many clients behind one router
//! share an entry. The daemon watches the entries, and gives an entry whose MAC address left the next hop of the route.

use crate::{
    flow::{family::Family, slot::Slot},
    frame::Frame,
    hash::{scale, split_mix},
    layout::{Config, INTERFACES, NEXT_HOPS, NextHop},
    maps::Maps,
    outcome::Event,
    subprograms::Subprograms,
};

/// Entries that are probed for one neighbour.
const PROBES: u32 = 8;

/// Makes the slot's replies go to `hop`, the neighbour that its client's packet came from.
#[inline(always)]
pub fn remember<A: Family, S: Subprograms>(maps: &S, service: u16, ways: &A::Set, slot: Slot, hop: NextHop) {
    let Some(index) = A::return_hop(maps, ways, slot) else {
        return;
    };
    let known = index.load();
    if known != 0 && maps.learned_hop(known).is_some_and(|entry| entry.load() == hop.0) {
        return;
    }
    let learned = maps.learn(hop.0);
    if learned == 0 {
        maps.count_event(service, Event::NextHopOverflow);
    }
    if learned != known {
        index.store(learned);
    }
}

/// The table's index for a neighbour, entered if it is new; 0 when there is no room.
#[inline(always)]
pub fn learn<M: Maps>(maps: &M, hop: u64) -> u16 {
    let start = scale((split_mix(hop) >> 32) as u32, NEXT_HOPS);
    for probe in 0..PROBES {
        let index = ((start + probe) % NEXT_HOPS) as u16;
        let Some(entry) = maps.learned_hop(index) else {
            return 0;
        };
        if index == 0 {
            continue;
        }
        if entry.load() == hop {
            return index;
        }
        if entry.load() == 0 {
            let previous = entry.compare_exchange(0, hop);
            if previous == 0 || previous == hop {
                return index;
            }
        }
    }
    0
}

/// The way back that was learned from the client's packets, if any.
#[inline(always)]
pub fn learned<S: Subprograms>(maps: &S, return_hop: u16) -> NextHop {
    if return_hop == 0 {
        return NextHop::UNKNOWN;
    }
    NextHop(maps.learned_hop(return_hop).map_or(0, |hop| hop.load()))
}

/// The way back by the routing table, see [`NextHop`]: for clients whose neighbour could not be remembered.
#[inline(always)]
pub fn routed<F: Frame>(frame: &mut F, config: &Config, family: u8, address: [u64; 2]) -> u64 {
    let Some(route) = frame.route(family, address) else {
        return 0;
    };
    for index in 0..INTERFACES {
        if index as u32 >= config.interface_count {
            break;
        }
        let interface = &config.interfaces[index];
        if interface.index == route.interface && interface.mac == route.source_mac {
            return NextHop::new(route.mac, index as u16).0;
        }
    }
    0
}
