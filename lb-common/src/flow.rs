//! The flow table: a flat array of 4-way sets in which the slot number *is* the SNAT port.
//!
//! A tuple hashes to ten candidate sets of one SNAT address (and to as many of another, while flows move there). It is
//! put into the emptier of the first two, else into the next that has room; a mark on its first candidate says that a
//! look-up has to go beyond the second. At 80 % fill that refuses fewer than 0.1 % of new flows; first-fit over two
//! would refuse 19 %.
//!
//! # The claim protocol
//!
//! Two copies of a SYN may be worked on by two CPUs, and the daemon frees slots meanwhile. Every transition goes
//! through the slot's one word:
//!
//! 1. compare-and-exchange from what was examined to *claiming* (readers look away),
//! 2. write the tuple and, if needed, the overflow mark,
//! 3. exchange to *half-open*: that publishes, and is the full barrier,
//! 4. only then search all candidates again. Another live way with the tuple: give the own one back.
//!
//! Publishing before searching is what excludes duplicates: of two claimers, the one that searches last sees the
//! other. (Searching first, or publishing by a plain store, lets both miss each other.) Both may give back; then the
//! client's next SYN decides. `loom_model` checks it, with this very code.

use crate::{
    black_box::{Happening, Note, state},
    cell::{Cell8, Cell16, Cell32, Cell64},
    hash::{FlowHash, Key},
    headers::protocol,
    kill::KILLED_REST,
    layout::{
        Bucket, Classifier, Config, SETS_PER_ADDRESS, Set4, Set6, WAYS, Way4, Way6, family, snat_place,
    },
    maps::{Maps, Step},
    meta::{Kind, Meta, RESET, SYN_ACK},
    outcome::{Event, Outcome},
    transition::RESET_QUARANTINE,
};

/// Sets a tuple may be in.
pub const CANDIDATES: u32 = 10;
/// Candidates that are always looked at.
const FIRST_CANDIDATES: u32 = 2;
/// Units (about seconds) that a slot rests while its backend may be in TIME_WAIT for it.
pub const LONG_QUARANTINE: u16 = 60;
/// Units that a slot rests when the client closed first.
pub const SHORT_QUARANTINE: u16 = 2;
/// Units without a segment after which a handshake that was answered may be reclaimed for another flow.
const UNPROVEN_AGE: u16 = 2;

/// Where a flow is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The set, counted through all SNAT addresses.
    pub set: u32,
    /// The way, 0 to 3.
    pub way: u32,
}

impl Slot {
    /// No slot at all.
    pub const NONE: Self = Self { set: 0x07ff_ffff, way: 0 };

    /// The SNAT port, as a number.
    #[inline(always)]
    #[must_use]
    pub const fn port(self) -> u16 {
        ((self.set % SETS_PER_ADDRESS) * WAYS as u32 + self.way) as u16
    }

    /// Which SNAT address.
    #[inline(always)]
    #[must_use]
    pub const fn address(self) -> usize {
        (self.set / SETS_PER_ADDRESS) as usize
    }
}

/// A slot as it was found: where it is and what its word was. Or [`Found::NONE`].
///
/// A word and not an `Option`: functions that the verifier looks at on their own return one, and for None LLVM would
/// copy registers that were never set, which the verifier does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found(u64);

impl Found {
    /// No slot.
    pub const NONE: Self = Self(0);
    const SOME: u64 = 1 << 63;
    /// Two bits that [`Choice`] uses.
    const HASTE: u32 = 61;

    /// The slot with this word.
    #[inline(always)]
    #[must_use]
    pub const fn new(slot: Slot, meta: Meta) -> Self {
        Self(Self::SOME | (slot.set as u64) << 34 | (slot.way as u64) << 32 | meta.0 as u64)
    }

    /// Is there one?
    #[inline(always)]
    #[must_use]
    pub const fn is_some(self) -> bool {
        self.0 & Self::SOME != 0
    }

    /// Where, if there is one.
    #[inline(always)]
    #[must_use]
    pub const fn slot(self) -> Slot {
        Slot { set: (self.0 >> 34) as u32 & 0x07ff_ffff, way: (self.0 >> 32) as u32 & 3 }
    }

    /// What its word was, if there is one.
    #[inline(always)]
    #[must_use]
    pub const fn meta(self) -> Meta {
        Meta(self.0 as u32)
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
}

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
    /// Its parts again: address, port, listener.
    fn parts(tuple: Self::Tuple) -> ([u64; 2], u16, u16);
    /// 0 for two that are the same, without a branch for each part: the verifier would follow every one of them.
    fn difference(one: Self::Tuple, other: Self::Tuple) -> u64;
    /// Its hash.
    fn hash(key: &Key, tuple: Self::Tuple) -> FlowHash;
    /// A set by index.
    fn set<M: Maps>(maps: &M, index: u32) -> Option<&Self::Set>;
    /// The word of a way; the way number is taken modulo four.
    fn meta(set: &Self::Set, way: u32) -> &Cell32;
    /// The client's last ACK number.
    fn last_ack(set: &Self::Set, way: u32) -> &Cell32;
    /// A way's tuple.
    fn load(set: &Self::Set, way: u32) -> Self::Tuple;
    /// Writes a way's tuple; the way must be claimed.
    fn store(set: &Self::Set, way: u32, tuple: Self::Tuple);
    /// A way's index into the learned next hops.
    fn return_hop<M: Maps>(maps: &M, slot: Slot) -> Option<&Cell16>;
    /// A set's overflow mark.
    fn overflow<M: Maps>(maps: &M, set: u32) -> Option<&Cell8>;
    /// An SNAT address, as words.
    fn snat(config: &Config, index: usize) -> [u64; 2];
    /// How many SNAT addresses there are.
    fn snat_count(config: &Config) -> u32;
    /// Where an SNAT address is looked up: see [`snat_place`].
    fn snat_place(address: [u64; 2]) -> usize;
    /// What is looked up there.
    fn snat_at(classifier: &Classifier, address: [u64; 2]) -> u8;
    /// Which SNAT addresses a bucket belongs to.
    fn bucket(config: &Config, bucket: usize) -> Bucket;
    /// The half of the selection table in use, plus one; 0: none.
    fn selection(service: &crate::layout::Service) -> u32;
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
    fn difference(one: u64, other: u64) -> u64 {
        one ^ other
    }

    #[inline(always)]
    fn hash(key: &Key, tuple: u64) -> FlowHash {
        key.hash1(tuple)
    }

    #[inline(always)]
    fn set<M: Maps>(maps: &M, index: u32) -> Option<&Set4> {
        maps.set4(index)
    }

    #[inline(always)]
    fn meta(set: &Set4, way: u32) -> &Cell32 {
        &way4(set, way).meta
    }

    #[inline(always)]
    fn last_ack(set: &Set4, way: u32) -> &Cell32 {
        &way4(set, way).last_ack
    }

    #[inline(always)]
    fn load(set: &Set4, way: u32) -> u64 {
        way4(set, way).tuple.load()
    }

    #[inline(always)]
    fn store(set: &Set4, way: u32, tuple: u64) {
        way4(set, way).tuple.store(tuple);
    }

    #[inline(always)]
    fn return_hop<M: Maps>(maps: &M, slot: Slot) -> Option<&Cell16> {
        maps.return_hop4(slot.set, slot.way)
    }

    #[inline(always)]
    fn overflow<M: Maps>(maps: &M, set: u32) -> Option<&Cell8> {
        maps.overflow4(set)
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
    fn selection(service: &crate::layout::Service) -> u32 {
        service.selection4
    }
}

#[inline(always)]
fn way4(set: &Set4, way: u32) -> &Way4 {
    &set.ways[way as usize % WAYS]
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
    fn set<M: Maps>(maps: &M, index: u32) -> Option<&Set6> {
        maps.set6(index)
    }

    #[inline(always)]
    fn meta(set: &Set6, way: u32) -> &Cell32 {
        &way6(set, way).meta
    }

    #[inline(always)]
    fn last_ack(set: &Set6, way: u32) -> &Cell32 {
        &way6(set, way).last_ack
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
    fn return_hop<M: Maps>(maps: &M, slot: Slot) -> Option<&Cell16> {
        maps.return_hop6(slot.set, slot.way)
    }

    #[inline(always)]
    fn overflow<M: Maps>(maps: &M, set: u32) -> Option<&Cell8> {
        maps.overflow6(set)
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
    fn selection(service: &crate::layout::Service) -> u32 {
        service.selection6
    }
}

#[inline(always)]
fn way6(set: &Set6, way: u32) -> &Way6 {
    &set.ways[way as usize % WAYS]
}

/// The time, as slots keep it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// The lower half of the kernel's tick counter.
    pub jiffies: u32,
    /// Units of about a second.
    pub seen: u16,
    reserved: u16,
}

impl Clock {
    /// The time now.
    #[inline(always)]
    pub fn read<M: Maps>(maps: &M, config: &Config) -> Self {
        let jiffies = maps.jiffies();
        Self { jiffies: jiffies as u32, seen: (jiffies >> (config.jiffies_shift & 31)) as u16, reserved: 0 }
    }
}

/// A tuple and where to look for it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Query<T> {
    /// What is looked for.
    pub tuple: T,
    /// Its hash.
    pub hash: FlowHash,
    /// Its first candidate.
    home: u32,
    /// Its second, in the same page of memory as the first.
    second: u32,
    /// The first usable set of its SNAT address.
    first: u32,
    /// How many usable sets there are.
    sets: u32,
    // A word, so that there is no padding: the verifier wants every byte of an argument set.
    bucket: u64,
}

impl<T: Copy> Query<T> {
    /// Where to look for `tuple`.
    #[inline(always)]
    pub fn new<F: Family<Tuple = T>>(config: &Config, tuple: T) -> Self {
        let hash = F::hash(&config.key, tuple);
        Self::of(config, tuple, hash, F::bucket(config, hash.bucket()))
    }

    /// Where it would be if its flows left from SNAT address `address`, and no other.
    #[must_use]
    pub fn at<F: Family<Tuple = T>>(config: &Config, tuple: T, address: u8) -> Self {
        Self::of(config, tuple, F::hash(&config.key, tuple), Bucket::new(address, address))
    }

    #[inline(always)]
    fn of(config: &Config, tuple: T, hash: FlowHash, bucket: Bucket) -> Self {
        let first = bucket.now() * SETS_PER_ADDRESS + config.first_set;
        let home = first + hash.candidate(0, config.sets);
        let (second, sets) = (home ^ hash.partner(config.partners), config.sets);
        Self { tuple, hash, home, second, first, sets, bucket: bucket.word() }
    }

    /// Candidate set `number`: from [`CANDIDATES`] on those at the address of older flows.
    #[inline(always)]
    #[must_use]
    pub fn candidate(&self, number: u32) -> u32 {
        if number < CANDIDATES {
            return self.candidate_now(number);
        }
        let bucket = Bucket::from_word(self.bucket);
        // The same place in the sets of the other address, which are as many.
        let there = bucket.before().wrapping_sub(bucket.now()).wrapping_mul(SETS_PER_ADDRESS);
        self.candidate_now(number - CANDIDATES).wrapping_add(there)
    }

    #[inline(always)]
    fn candidate_now(&self, number: u32) -> u32 {
        if number == 1 { self.second } else { self.first + self.hash.candidate(number, self.sets) }
    }

    /// Could a flow be at another address than a new one?
    #[inline(always)]
    #[must_use]
    pub const fn has_moved(&self) -> bool {
        !Bucket::from_word(self.bucket).is_settled()
    }

    /// How many candidates a flow can be in.
    #[inline(always)]
    #[must_use]
    pub const fn reach(&self) -> u32 {
        if self.has_moved() { 2 * CANDIDATES } else { CANDIDATES }
    }
}

/// A slot as it was found, with its set at hand. Without one: it was not.
///
/// No `Option`, for the reason that [`Found`] is none.
pub struct Hit<'a, F: Family> {
    /// Where.
    pub slot: Slot,
    /// What its word was.
    pub meta: Meta,
    /// Its set.
    pub ways: Option<&'a F::Set>,
}

impl<F: Family> Hit<'_, F> {
    const NONE: Self = Self { slot: Slot::NONE, meta: Meta::FREE, ways: None };

    /// The same in one word.
    #[inline(always)]
    #[must_use]
    pub const fn found(&self) -> Found {
        if self.ways.is_some() { Found::new(self.slot, self.meta) } else { Found::NONE }
    }
}

/// The live slot of a tuple.
#[inline(always)]
pub fn find<'a, F: Family, M: Maps>(maps: &'a M, config: &Config, query: &Query<F::Tuple>) -> Hit<'a, F> {
    let mut hit = find_first::<F, M>(maps, query);
    if hit.ways.is_none() && may_be_beyond::<F, M>(maps, query) {
        let found = maps.find_in::<F>(query, query.reach(), Slot::NONE);
        if found.is_some() {
            let slot = found.slot();
            hit = Hit { slot, meta: found.meta(), ways: F::set(maps, slot.set) };
        }
    }
    hit.slot.way = config.blur(hit.slot.way.into()) as u32;
    hit
}

/// Could the flow be in another than its first two candidates?
#[inline(always)]
fn may_be_beyond<F: Family, M: Maps>(maps: &M, query: &Query<F::Tuple>) -> bool {
    query.has_moved() || F::overflow(maps, query.home).is_some_and(|mark| mark.load() != 0)
}

/// The live slot of a tuple in the candidates that are always looked at.
#[inline(always)]
fn find_first<'a, F: Family, M: Maps>(maps: &'a M, query: &Query<F::Tuple>) -> Hit<'a, F> {
    let (Some(home), Some(second)) = (F::set(maps, query.home), F::set(maps, query.second)) else {
        return Hit::NONE;
    };
    // Asked for before the first set is looked at: both lines may be far away, and so they come together.
    F::meta(second, 0).load();
    for (set, ways) in [(query.home, home), (query.second, second)] {
        if let Some((way, meta)) = find_way::<F>(ways, query.tuple, WAYS as u32) {
            return Hit { slot: Slot { set, way }, meta, ways: Some(ways) };
        }
    }
    Hit::NONE
}

/// The live way of a set that has the tuple, other than `except`, and its word.
#[inline(always)]
fn find_way<F: Family>(ways: &F::Set, tuple: F::Tuple, except: u32) -> Option<(u32, Meta)> {
    for way in 0..WAYS as u32 {
        if F::load(ways, way) != tuple || way == except {
            continue;
        }
        let meta = Meta(F::meta(ways, way).load());
        // A claimer writes the tuple only while the word says so; the second look catches one that came between.
        if meta.is_live() && F::load(ways, way) == tuple {
            return Some((way, meta));
        }
    }
    None
}

/// The live slot of a tuple in its first `candidates`, other than `except`.
#[inline(always)]
pub fn find_in<F: Family, M: Maps>(
    maps: &M,
    query: &Query<F::Tuple>,
    candidates: u32,
    except: Slot,
) -> Found {
    let mut search = Search::<F, M> { maps: *maps, query, except, found: Found::NONE };
    maps.repeat(candidates, &mut search);
    search.found
}

/// A search through the candidates.
struct Search<'a, F: Family, M> {
    maps: M,
    query: &'a Query<F::Tuple>,
    except: Slot,
    found: Found,
}

impl<F: Family, M: Maps> Step for Search<'_, F, M> {
    #[inline(always)]
    fn step(&mut self, number: u32) -> bool {
        let set = self.query.candidate(number);
        let Some(ways) = F::set(&self.maps, set) else {
            return true;
        };
        let except = if set == self.except.set { self.except.way } else { WAYS as u32 };
        if let Some((way, meta)) = find_way::<F>(ways, self.query.tuple, except) {
            self.found = Found::new(Slot { set, way }, meta);
            return true;
        }
        false
    }
}

/// How a claim ended: [`Claim::FULL`], [`Claim::RACED`], or a slot. Not yet: [`Claim::UNDECIDED`].
///
/// A word and not an enum: for the variants without a slot LLVM would copy a register that was never set, which the
/// verifier does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim(u64);

impl Claim {
    /// Every candidate is taken.
    pub const FULL: Self = Self(0);
    /// Another CPU has, or had, the same tuple in hand.
    pub const RACED: Self = Self(1);
    /// See [`claim_free`].
    pub const UNDECIDED: Self = Self(2);

    /// The flow has this slot.
    #[inline(always)]
    #[must_use]
    pub const fn won(slot: Slot) -> Self {
        Self(Found::new(slot, Meta::FREE).0)
    }

    /// What becomes of the packet when there is no slot.
    #[inline(always)]
    #[must_use]
    pub const fn failure(self) -> Option<Outcome> {
        if self.0 & Found::SOME != 0 {
            None
        } else if self.0 == Self::FULL.0 {
            Some(Outcome::TableFull)
        } else {
            Some(Outcome::SynRace)
        }
    }

    /// The slot, of a claim that has not failed.
    #[inline(always)]
    #[must_use]
    pub const fn slot(self) -> Slot {
        Found(self.0).slot()
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
}

/// How willingly a way is taken; the lower the better.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Cost(u32);

impl Cost {
    const NONE: Self = Self(0);
    /// Resting, but another backend is in TIME_WAIT for it.
    const OTHER_BACKEND: Self = Self(1);
    /// From here on a way is taken only if nothing better is in any candidate; the older the better.
    const EARLY: u32 = 1 << 16;
    const RESET: u32 = 2 << 16;
    const HALF_OPEN: u32 = 3 << 16;
    const NEVER: Self = Self(u32::MAX);

    #[inline(always)]
    fn of<F: Family>(ways: &F::Set, way: u32, claimer: &Claimer, config: &Config) -> (Self, Meta) {
        let clock = claimer.clock;
        let meta = Meta(F::meta(ways, way).load());
        let age = u32::from(meta.age(clock.seen));
        let older = 0xffff - age;
        let cost = if meta.is(Kind::Free) {
            Self::NONE
        } else if meta.is(Kind::Killed) {
            Self::of_killed(meta, age, claimer.backend)
        } else if meta.is_closed() {
            let rest = if meta.is(Kind::ClosedByBackend) { LONG_QUARANTINE } else { SHORT_QUARANTINE };
            if age >= u32::from(rest) {
                Self::NONE
            } else if u32::from(meta.backend()) != claimer.backend {
                Self::OTHER_BACKEND
            } else {
                Self(Self::EARLY | older)
            }
        } else if meta.has(RESET) && !meta.is(Kind::HalfOpen) && age >= u32::from(RESET_QUARANTINE) {
            Self(Self::RESET | older)
        } else if meta.is(Kind::HalfOpen) && Self::reclaimable::<F>(ways, way, meta, clock, config) {
            Self(Self::HALF_OPEN | older)
        } else {
            Self::NEVER
        };
        (cost, meta)
    }

    /// A killed slot is left to its client while the RST is repeated to it. Then it is any other backend's; its own may
    /// still hold on to the flow, and would answer a strange SYN with a bare ACK.
    #[inline(always)]
    fn of_killed(meta: Meta, age: u32, backend: u32) -> Self {
        if age < u32::from(KILLED_REST) || (meta.is_untold() && u32::from(meta.backend()) == backend) {
            Self::NEVER
        } else {
            Self::OTHER_BACKEND
        }
    }

    /// A handshake may be cut short only when it had its time: 200 ms for the backend to answer at all, then two
    /// seconds for somebody to say something.
    #[inline(always)]
    fn reclaimable<F: Family>(ways: &F::Set, way: u32, meta: Meta, clock: Clock, config: &Config) -> bool {
        if meta.has(SYN_ACK) {
            meta.age(clock.seen) >= UNPROVEN_AGE
        } else {
            clock.jiffies.wrapping_sub(F::last_ack(ways, way).load()) >= config.half_open_jiffies
        }
    }

    #[inline(always)]
    fn haste(self) -> u64 {
        match self.0 >> 16 {
            0 => 0,
            1 | 2 => 1,
            _ => 2,
        }
    }
}

/// Who claims.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Claimer {
    /// The time.
    pub clock: Clock,
    /// For whom it is counted.
    pub service: u32,
    /// The flow's backend.
    pub backend: u32,
}

/// Finds a slot for a tuple that has none, and takes it.
#[inline(always)]
pub fn claim<F: Family, M: Maps>(maps: &M, query: &Query<F::Tuple>, claimer: &Claimer) -> Claim {
    let claim = maps.claim_free::<F>(query, claimer);
    if claim != Claim::UNDECIDED {
        return claim;
    }
    let choice = maps.choose::<F>(query, claimer);
    if !choice.found().is_some() {
        return Claim::FULL;
    }
    let mut found = choice.found();
    if let Some(event) = choice.event() {
        found = evict::<F, M>(maps, found);
        if !found.is_some() {
            return Claim::RACED;
        }
        maps.count_event(claimer.service as u16, event);
    }
    maps.take::<F>(query, claimer, found)
}

/// Ends a flow whose slot was chosen for another, and notes that for later; a slot whose flow was over is left as it is.
/// Returns it as it is now. None: somebody else has it in hand.
#[inline(always)]
fn evict<F: Family, M: Maps>(maps: &M, found: Found) -> Found {
    let (slot, meta) = (found.slot(), found.meta());
    if !meta.is(Kind::HalfOpen) && !meta.is(Kind::Established) {
        return found;
    }
    let Some(ways) = F::set(maps, slot.set) else {
        return Found::NONE;
    };
    let tuple = F::load(ways, slot.way);
    if F::meta(ways, slot.way).compare_exchange(meta.0, Meta::FREE.0) != meta.0 {
        return Found::NONE;
    }
    let note = Note::new::<F>(Happening::Reclaimed, F::parts(tuple));
    maps.note(note.of(meta.backend()).at(slot).detail(state(meta)));
    Found::new(slot, Meta::FREE)
}

/// A slot that a flow may have, and who minds.
#[derive(Clone, Copy, Debug)]
pub struct Choice(u64);

impl Choice {
    /// There is none.
    pub const NONE: Self = Self(0);

    #[inline(always)]
    fn new(found: Found, cost: Cost) -> Self {
        Self(found.0 | cost.haste() << Found::HASTE)
    }

    /// The slot as it was examined.
    #[inline(always)]
    #[must_use]
    pub const fn found(self) -> Found {
        Found(self.0 & !(3 << Found::HASTE))
    }

    /// What there is to count when the slot is taken.
    #[inline(always)]
    #[must_use]
    pub const fn event(self) -> Option<Event> {
        match (self.0 >> Found::HASTE) & 3 {
            0 => None,
            1 => Some(Event::ReusedEarly),
            _ => Some(Event::HalfOpenReclaimed),
        }
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
}

/// The way that is taken most willingly. Cost, candidate and way make up one number, of which the least is kept.
#[inline(always)]
pub fn choose<F: Family, M: Maps>(maps: &M, query: &Query<F::Tuple>, claimer: &Claimer) -> Choice {
    let (Some(config), Some(home), Some(second)) =
        (maps.config(), F::set(maps, query.home), F::set(maps, query.second))
    else {
        return Choice::NONE;
    };
    let swapped = emptier(maps, free_ways::<F>(home), free_ways::<F>(second));
    let mut weighing = Weighing::<F, M> { maps: *maps, query, claimer, swapped, best: config.blur(u64::MAX) };
    maps.repeat(CANDIDATES * WAYS as u32, &mut weighing);
    let best = weighing.best;
    if best >> 32 == u64::from(Cost::NEVER.0) {
        return Choice::NONE;
    }
    let slot = Slot { set: query.candidate((best as u32 >> 2) & 0xf), way: best as u32 & 3 };
    let Some(ways) = F::set(maps, slot.set) else {
        return Choice::NONE;
    };
    // Examined again, now for the word that is exchanged.
    let (cost, meta) = Cost::of::<F>(ways, slot.way, claimer, config);
    // Somebody else's by now: there was room, so that is a race, which is lost by taking for free what is not.
    let (cost, meta) = if cost == Cost::NEVER { (Cost::NONE, Meta::FREE) } else { (cost, meta) };
    Choice::new(Found::new(slot, meta), cost)
}

/// A comparison of the candidates' ways, one at a time.
struct Weighing<'a, F: Family, M> {
    maps: M,
    query: &'a Query<F::Tuple>,
    claimer: &'a Claimer,
    swapped: u32,
    best: u64,
}

impl<F: Family, M: Maps> Step for Weighing<'_, F, M> {
    #[inline(always)]
    fn step(&mut self, index: u32) -> bool {
        let (place, way) = (index / WAYS as u32, index % WAYS as u32);
        let number = if place < FIRST_CANDIDATES { place ^ self.swapped } else { place };
        let set = self.query.candidate(number);
        let (Some(config), Some(ways)) = (self.maps.config(), F::set(&self.maps, set)) else {
            return true;
        };
        let (cost, _) = Cost::of::<F>(ways, way, self.claimer, config);
        // A blocked way costs what one that is never taken costs.
        let blocked = u32::from(self.maps.blocked(set)) >> way & 1;
        let cost = cost.0 | blocked.wrapping_neg();
        let numbered = config.blur(u64::from(cost) << 32 | u64::from(number << 2 | way));
        if numbered < self.best {
            self.best = numbered;
        }
        way == WAYS as u32 - 1 && self.best >> 32 <= u64::from(Cost::OTHER_BACKEND.0)
    }
}

/// The free ways of a set, by bit.
#[inline(always)]
fn free_ways<F: Family>(ways: &F::Set) -> u32 {
    let mut free = 0;
    for way in 0..WAYS as u32 {
        // 1 for every kind but Free, which is 0, without a branch.
        free |= ((Meta(F::meta(ways, way).load()).kind() + 7) >> 3 ^ 1) << way;
    }
    free
}

/// Which of two sets has more free ways: 0, or 1 for the second.
#[inline(always)]
fn emptier<M: Maps>(maps: &M, first: u32, second: u32) -> u32 {
    /// Four bits for each mask: how many bits it has.
    const COUNT: u64 = 0x4332_3221_3221_2110;
    let count = |mask: u32| (COUNT >> (mask * 4)) as u32 & 0xf;
    maps.opaque(count(first)).wrapping_sub(count(second)) >> 31
}

/// The lowest bit of a mask of four that is not 0.
#[inline(always)]
const fn lowest(mask: u32) -> u32 {
    /// Two bits for each mask.
    const LOWEST: u32 = 0x1213_1210;
    LOWEST >> (mask * 2) & 3
}

/// Takes a free way of the emptier of the first two candidates, as nearly every flow does. [`Claim::UNDECIDED`]: it has
/// none, and all candidates are to be weighed.
///
/// Which set and way it will be is as good as random. So nothing here branches on it: a branch that cannot be predicted
/// costs 7 ns, and there were four.
#[inline(always)]
pub fn claim_free<F: Family, M: Maps>(maps: &M, query: &Query<F::Tuple>, claimer: &Claimer) -> Claim {
    let (Some(first_ways), Some(second_ways), Some(mark)) =
        (F::set(maps, query.home), F::set(maps, query.second), F::overflow(maps, query.home))
    else {
        return Claim::UNDECIDED;
    };
    let free = [free_ways::<F>(first_ways), free_ways::<F>(second_ways)];
    let swapped = emptier(maps, free[0], free[1]);
    let (set, free) = (pick(swapped, query.home, query.second), pick(swapped, free[0], free[1]));
    let free = free & !u32::from(maps.blocked(set));
    let Some(ways) = F::set(maps, set) else {
        return Claim::UNDECIDED;
    };
    if free == 0 {
        return Claim::UNDECIDED;
    }
    let slot = Slot { set, way: lowest(free) };
    let meta = Meta(F::meta(ways, slot.way).load());
    // Somebody else's by now, as there are others: nothing is lost yet.
    if !meta.is(Kind::Free) || !publish::<F>(ways, slot.way, meta, query.tuple, claimer, || {}) {
        return Claim::UNDECIDED;
    }
    let own = maps.opaque(1 << (swapped * WAYS as u32 + slot.way));
    let again = query.has_moved()
        || mark.load() != 0
        || is_elsewhere::<F>(first_ways, query.tuple, own)
        || is_elsewhere::<F>(second_ways, query.tuple, own >> WAYS);
    if again && maps.find_in::<F>(query, query.reach(), slot).is_some() {
        give_back(F::meta(ways, slot.way), half_open(claimer));
        return Claim::RACED;
    }
    Claim::won(slot)
}

/// One of two numbers, without a branch; `second` is 0 or 1.
#[inline(always)]
const fn pick(second: u32, one: u32, other: u32) -> u32 {
    one ^ ((one ^ other) & second.wrapping_neg())
}

/// Does, or did, a way that is not in `own`, by bit, have the tuple?
#[inline(always)]
fn is_elsewhere<F: Family>(ways: &F::Set, tuple: F::Tuple, own: u32) -> bool {
    for way in 0..WAYS as u32 {
        if F::difference(F::load(ways, way), tuple) | u64::from(own >> way & 1) == 0 {
            return true;
        }
    }
    false
}

/// Takes a slot that was examined: one that may be reclaimed, or a closed one of the same tuple.
#[inline(always)]
pub fn take<F: Family, M: Maps>(maps: &M, query: &Query<F::Tuple>, claimer: &Claimer, found: Found) -> Claim {
    let slot = found.slot();
    let Some(ways) = F::set(maps, slot.set) else {
        return Claim::FULL;
    };
    let mark = F::overflow(maps, query.home);
    // Marked also when it is marked already: the daemon clears marks of past epochs only.
    let overflow = || {
        if slot.set != query.home
            && slot.set != query.second
            && let (Some(config), Some(mark)) = (maps.config(), mark)
            && mark.load() != config.epoch as u8
        {
            mark.store(config.epoch as u8);
        }
    };
    if !publish::<F>(ways, slot.way, found.meta(), query.tuple, claimer, overflow) {
        return Claim::RACED;
    }
    // A rival may be beyond the second candidate only if it marked the first, and it marked before it published.
    let beyond = query.has_moved() || mark.is_none_or(|mark| mark.load() != 0);
    let candidates = if beyond { query.reach() } else { FIRST_CANDIDATES };
    if maps.find_in::<F>(query, candidates, slot).is_some() {
        give_back(F::meta(ways, slot.way), half_open(claimer));
        return Claim::RACED;
    }
    Claim::won(slot)
}

/// The first three steps of the protocol. False: somebody else has changed the word.
#[inline(always)]
fn publish<F: Family>(
    ways: &F::Set,
    way: u32,
    from: Meta,
    tuple: F::Tuple,
    claimer: &Claimer,
    mark: impl FnOnce(),
) -> bool {
    let word = F::meta(ways, way);
    let claiming = half_open(claimer).become_kind(Kind::Claiming);
    if word.compare_exchange(from.0, claiming.0) != from.0 {
        return false;
    }
    mark();
    F::store(ways, way, tuple);
    F::last_ack(ways, way).store(claimer.clock.jiffies);
    // Not a compare-and-exchange: a late packet of the slot's last flow may have set a flag in the word meanwhile.
    word.swap(half_open(claimer).0);
    true
}

/// The word of a flow that begins.
#[inline(always)]
const fn half_open(claimer: &Claimer) -> Meta {
    Meta::new(Kind::HalfOpen, claimer.backend as u8, claimer.clock.seen)
}

/// Frees a slot that was published a moment ago. The flow's other packets find it and may have noted something in its
/// word; it is nobody else's, as nobody takes a half-open slot so young.
#[inline(always)]
fn give_back(word: &Cell32, mut meta: Meta) {
    for _ in 0..4 {
        let now = Meta(word.compare_exchange(meta.0, Meta::FREE.0));
        if now == meta || !now.is(Kind::HalfOpen) {
            break;
        }
        meta = now;
    }
}
