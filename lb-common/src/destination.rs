//! What a packet names: the listener or slot that it is for, and the interface that it came in by.

use crate::{
    arrival::Arrival,
    flow::{family::Family, slot::Slot},
    layout::{
        Config, INTERFACES, LISTENERS_PER_PORT, Listener, MEMBERS, SETS_PER_ADDRESS, SNAT_ADDRESSES,
        SNAT_SHARED, WAYS,
    },
    subprograms::Subprograms,
};

/// Are the addresses the same? Without a branch for each half.
#[inline(always)]
pub const fn same(one: [u64; 2], other: [u64; 2]) -> bool {
    (one[0] ^ other[0]) | (one[1] ^ other[1]) == 0
}

/// The id of the listener at an address (words) and port (word); 0: there is none.
#[inline(always)]
pub fn listener<S: Subprograms>(maps: &S, family: u8, address: [u64; 2], port: u16) -> u16 {
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

/// [`listener`], where the first one on the port is `first`: nearly always it is the one.
#[inline(always)]
pub fn listener_from<A: Family, S: Subprograms>(
    maps: &S,
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

/// The slot whose SNAT address (words) and port (word) these are, free or not.
#[inline(always)]
pub fn slot<A: Family, S: Subprograms>(
    maps: &S,
    config: &Config,
    address: [u64; 2],
    port: u16,
) -> Option<Slot> {
    slot_of::<A, S>(maps, config, maps.snat_at::<A>(address), address, port)
}

/// The same, where the entry at the address's place is known.
#[inline(always)]
pub fn slot_of<A: Family, S: Subprograms>(
    maps: &S,
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
    let index = snat::<A, S>(maps, config, place, address)?;
    Some(Slot { set: index * SETS_PER_ADDRESS + set, way: port % WAYS as u32 })
}

/// Which SNAT address this is, at whose place `place` was found.
#[inline(always)]
fn snat<A: Family, S: Subprograms>(maps: &S, config: &Config, place: u8, address: [u64; 2]) -> Option<u32> {
    match place {
        0 => None,
        SNAT_SHARED => maps.snat_index::<A>(address),
        number => {
            let index = u32::from(number - 1) % SNAT_ADDRESSES as u32;
            same(A::snat(config, index as usize), address).then_some(index)
        }
    }
}

/// Which SNAT address this is.
#[inline(always)]
pub fn snat_index<A: Family, S: Subprograms>(maps: &S, address: [u64; 2]) -> Option<u32> {
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

/// The kernel's index of the bond that an interface is a member of, or of the interface itself.
#[inline(always)]
pub fn bond_of(config: &Config, interface: u32) -> u32 {
    // Most hosts have no bond: they do not look.
    if config.member_count == 0 {
        return interface;
    }
    // Up to the constant, not up to the count: of a count that LLVM counts down to zero, the verifier of Linux 6.1 does not
    // see that it ends. Behind the last member the index is zero, as no interface's is.
    for index in 0..MEMBERS {
        let member = config.members[index];
        if member.index == interface {
            return member.bond;
        }
    }
    interface
}

/// By which interface a packet came in that the kernel says came in by `interface`, in `vlan`, for `mac`.
#[inline(always)]
pub fn arrival<S: Subprograms>(maps: &S, interface: u32, vlan: u32, mac: u64) -> Arrival {
    let Some(config) = maps.config() else {
        return Arrival::UNKNOWN;
    };
    let interface = bond_of(config, interface);
    for index in 0..INTERFACES {
        if index as u32 >= config.interface_count {
            break;
        }
        let known = &config.interfaces[index];
        if known.index == interface && known.vlan == vlan {
            return if known.mac == mac { Arrival::by(index as u16) } else { Arrival::OTHER_MAC };
        }
    }
    Arrival::UNKNOWN
}
