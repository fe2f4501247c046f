//! The two address families: how each of them keeps, compares and hashes a flow.

use crate::{
    cell::{Cell8, Cell16, Cell32, Cell64},
    flow::slot::Slot,
    hash::{FlowHash, Key},
    headers::protocol,
    layout::{Bucket, Classifier, Config, Numbers, Service, Set4, Set6, WAYS, Way6, family, snat_place},
    tables::FlowTables,
};

/// What distinguishes IPv4's flow table from IPv6's.
pub trait Family: Copy + 'static {
    /// See [`family`].
    const NUMBER: u8;
    /// ICMP's protocol number.
    const ICMP: u8;
    /// Client address and port and listener id, as compared.
    type Tuple: Copy + PartialEq;
    /// A set of ways.
    type Set: 'static;

    /// The tuple of a client (address words, port word) at a listener.
    fn tuple(address: [u64; 2], port: u16, listener: u16) -> Self::Tuple;
    /// The parts of a tuple: address, port, listener.
    fn parts(tuple: Self::Tuple) -> ([u64; 2], u16, u16);
    /// Whose budget of slots a client's flows are counted for: its address, or the /64 of it. See [`crate::source_budget`].
    fn source(address: [u64; 2]) -> u64;
    /// 0 for equal tuples, without a branch for each part: the verifier would follow every branch.
    fn difference(one: Self::Tuple, other: Self::Tuple) -> u64;
    /// The hash of a tuple.
    fn hash(key: &Key, tuple: Self::Tuple) -> FlowHash;
    /// A set by index.
    fn set<T: FlowTables>(tables: &T, index: u32) -> Option<&Self::Set>;
    /// The word of a way; the way number is taken modulo four.
    fn meta(set: &Self::Set, way: u32) -> &Cell32;
    /// A way's tuple.
    fn load(set: &Self::Set, way: u32) -> Self::Tuple;
    /// Writes a way's tuple; the way must be claimed.
    fn store(set: &Self::Set, way: u32, tuple: Self::Tuple);
    /// What both ends of the flow in a slot of this set have said.
    fn numbers<'a, T: FlowTables>(tables: &'a T, set: &'a Self::Set, slot: Slot) -> Option<&'a Numbers>;
    /// Asks the memory for the numbers of a set's flows, which are needed a little later.
    fn prefetch_numbers<T: FlowTables>(tables: &T, set: u32);
    /// The index into the learned next hops of a slot of this set.
    fn return_hop<'a, T: FlowTables>(tables: &'a T, set: &'a Self::Set, slot: Slot) -> Option<&'a Cell16>;
    /// This set's overflow mark; `index` is where it is.
    fn overflow<'a, T: FlowTables>(tables: &'a T, set: &'a Self::Set, index: u32) -> Option<&'a Cell8>;
    /// The ways of this set whose ports must not become slots, by bit; `index` is where it is.
    fn blocked<T: FlowTables>(tables: &T, set: &Self::Set, index: u32) -> u8;
    /// An SNAT address, as words.
    fn snat(config: &Config, index: usize) -> [u64; 2];
    /// How many SNAT addresses there are.
    fn snat_count(config: &Config) -> u32;
    /// Where an SNAT address is looked up: see [`snat_place`].
    fn snat_place(address: [u64; 2]) -> usize;
    /// The entry at that place.
    fn snat_at(classifier: &Classifier, address: [u64; 2]) -> u8;
    /// Which SNAT addresses a bucket belongs to.
    fn bucket(config: &Config, bucket: usize) -> Bucket;
    /// The half of the selection table in use, plus one; 0: none.
    fn selection(service: &Service) -> u32;
}

/// IPv4.
#[derive(Clone, Copy)]
pub struct V4;

impl Family for V4 {
    const NUMBER: u8 = family::IPV4;
    const ICMP: u8 = protocol::ICMP;
    type Tuple = u64;
    type Set = Set4;

    #[inline(always)]
    fn tuple(address: [u64; 2], port: u16, listener: u16) -> u64 {
        address[0] | u64::from(port) << 32 | u64::from(listener) << 48
    }

    #[inline(always)]
    fn parts(tuple: u64) -> ([u64; 2], u16, u16) {
        ([tuple & 0xffff_ffff, 0], (tuple >> 32) as u16, (tuple >> 48) as u16)
    }

    #[inline(always)]
    fn source(address: [u64; 2]) -> u64 {
        address[0]
    }

    #[inline(always)]
    fn difference(one: u64, other: u64) -> u64 {
        one ^ other
    }

    #[inline(always)]
    fn hash(key: &Key, tuple: u64) -> FlowHash {
        key.hash1(tuple)
    }

    #[inline(always)]
    fn set<T: FlowTables>(tables: &T, index: u32) -> Option<&Set4> {
        tables.set4(index)
    }

    #[inline(always)]
    fn meta(set: &Set4, way: u32) -> &Cell32 {
        &set.metas[way as usize % WAYS]
    }

    #[inline(always)]
    fn load(set: &Set4, way: u32) -> u64 {
        set.tuples[way as usize % WAYS].load()
    }

    #[inline(always)]
    fn store(set: &Set4, way: u32, tuple: u64) {
        set.tuples[way as usize % WAYS].store(tuple);
    }

    #[inline(always)]
    fn numbers<'a, T: FlowTables>(tables: &'a T, _: &'a Set4, slot: Slot) -> Option<&'a Numbers> {
        tables.numbers4(slot.set, slot.way)
    }

    #[inline(always)]
    fn prefetch_numbers<T: FlowTables>(tables: &T, set: u32) {
        if let Some(numbers) = tables.numbers4(set, 0) {
            numbers.next.load();
        }
    }

    #[inline(always)]
    fn return_hop<'a, T: FlowTables>(_: &'a T, set: &'a Set4, slot: Slot) -> Option<&'a Cell16> {
        Some(&set.return_hops[slot.way as usize % WAYS])
    }

    #[inline(always)]
    fn overflow<'a, T: FlowTables>(_: &'a T, set: &'a Set4, _: u32) -> Option<&'a Cell8> {
        Some(&set.overflow)
    }

    #[inline(always)]
    fn blocked<T: FlowTables>(_: &T, set: &Set4, _: u32) -> u8 {
        set.blocked.load()
    }

    #[inline(always)]
    fn snat(config: &Config, index: usize) -> [u64; 2] {
        [u64::from(config.snat4[index % config.snat4.len()]), 0]
    }

    #[inline(always)]
    fn snat_count(config: &Config) -> u32 {
        config.snat4_count
    }

    #[inline(always)]
    fn snat_place(address: [u64; 2]) -> usize {
        snat_place(address[0], 4)
    }

    #[inline(always)]
    fn snat_at(classifier: &Classifier, address: [u64; 2]) -> u8 {
        classifier.snat4[Self::snat_place(address)].load()
    }

    #[inline(always)]
    fn bucket(config: &Config, bucket: usize) -> Bucket {
        config.bucket4[bucket % config.bucket4.len()]
    }

    #[inline(always)]
    fn selection(service: &Service) -> u32 {
        service.selection4
    }
}

/// IPv6.
#[derive(Clone, Copy)]
pub struct V6;

/// An IPv6 flow's tuple: the client's address, and its port and listener as in [`Way6::port_listener`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq)]
pub struct Tuple6 {
    address: [u64; 2],
    // Wider than it needs to be, so that there is no padding: the verifier wants every byte of an argument set.
    port_listener: u64,
}

impl PartialEq for Tuple6 {
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        V6::difference(*self, *other) == 0
    }
}

impl Family for V6 {
    const NUMBER: u8 = family::IPV6;
    const ICMP: u8 = protocol::ICMP6;
    type Tuple = Tuple6;
    type Set = Set6;

    #[inline(always)]
    fn tuple(address: [u64; 2], port: u16, listener: u16) -> Tuple6 {
        Tuple6 { address, port_listener: u64::from(port) | u64::from(listener) << 16 }
    }

    #[inline(always)]
    fn parts(tuple: Tuple6) -> ([u64; 2], u16, u16) {
        (tuple.address, tuple.port_listener as u16, (tuple.port_listener >> 16) as u16)
    }

    #[inline(always)]
    fn source(address: [u64; 2]) -> u64 {
        address[0]
    }

    #[inline(always)]
    fn difference(one: Tuple6, other: Tuple6) -> u64 {
        (one.address[0] ^ other.address[0])
            | (one.address[1] ^ other.address[1])
            | (one.port_listener ^ other.port_listener)
    }

    #[inline(always)]
    fn hash(key: &Key, tuple: Tuple6) -> FlowHash {
        key.hash3([tuple.address[0], tuple.address[1], tuple.port_listener])
    }

    #[inline(always)]
    fn set<T: FlowTables>(tables: &T, index: u32) -> Option<&Set6> {
        tables.set6(index)
    }

    #[inline(always)]
    fn meta(set: &Set6, way: u32) -> &Cell32 {
        &way6(set, way).meta
    }

    #[inline(always)]
    fn load(set: &Set6, way: u32) -> Tuple6 {
        let way = way6(set, way);
        let [high, low]: &[Cell64; 2] = &way.address;
        Tuple6 { address: [high.load(), low.load()], port_listener: way.port_listener.load().into() }
    }

    #[inline(always)]
    fn store(set: &Set6, way: u32, tuple: Tuple6) {
        let way = way6(set, way);
        way.address[0].store(tuple.address[0]);
        way.address[1].store(tuple.address[1]);
        way.port_listener.store(tuple.port_listener as u32);
    }

    #[inline(always)]
    fn numbers<'a, T: FlowTables>(_: &'a T, set: &'a Set6, slot: Slot) -> Option<&'a Numbers> {
        Some(&way6(set, slot.way).numbers)
    }

    #[inline(always)]
    fn prefetch_numbers<T: FlowTables>(_: &T, _: u32) {}

    #[inline(always)]
    fn return_hop<'a, T: FlowTables>(tables: &'a T, _: &'a Set6, slot: Slot) -> Option<&'a Cell16> {
        tables.return_hop6(slot.set, slot.way)
    }

    #[inline(always)]
    fn overflow<'a, T: FlowTables>(tables: &'a T, _: &'a Set6, index: u32) -> Option<&'a Cell8> {
        tables.overflow6(index)
    }

    #[inline(always)]
    fn blocked<T: FlowTables>(tables: &T, _: &Set6, index: u32) -> u8 {
        tables.blocked6(index)
    }

    #[inline(always)]
    fn snat(config: &Config, index: usize) -> [u64; 2] {
        config.snat6[index % config.snat6.len()]
    }

    #[inline(always)]
    fn snat_count(config: &Config) -> u32 {
        config.snat6_count
    }

    #[inline(always)]
    fn snat_place(address: [u64; 2]) -> usize {
        snat_place(address[1], 8)
    }

    #[inline(always)]
    fn snat_at(classifier: &Classifier, address: [u64; 2]) -> u8 {
        classifier.snat6[Self::snat_place(address)].load()
    }

    #[inline(always)]
    fn bucket(config: &Config, bucket: usize) -> Bucket {
        config.bucket6[bucket % config.bucket6.len()]
    }

    #[inline(always)]
    fn selection(service: &Service) -> u32 {
        service.selection6
    }
}

#[inline(always)]
fn way6(set: &Set6, way: u32) -> &Way6 {
    &set.ways[way as usize % WAYS]
}
