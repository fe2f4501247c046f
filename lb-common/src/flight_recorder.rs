//! The flight recorder: the latest events of flows, to explain afterwards why a connection went as it did.
//!
//! A ring of records for each CPU, which only the program on that CPU writes, and one ring for the daemon: no
//! writer waits, and nothing is locked. Rare events are written (a flow begins, moves, ends, is refused), never the
//! segments of an established flow. The newest record overwrites the oldest.
//!
//! A reader may read while a record is written. The writer clears the record's last word, its time, first and writes it
//! last. A reader that finds the same time before and after the other words has the record as it was written: see
//! [`Record::read`].
//!
//! A version of sheave may read what another has written: numbers below are never given another meaning, and unknown
//! ones are skipped. (None of this is in [`crate::layout_hash`]: no flow depends on it.)

use crate::{
    cell::Cell64,
    flow::{family::Family, slot::Slot},
    layout::{SNAT_ADDRESSES, family},
    list::list,
    meta::Meta,
    outcome::Outcome,
};

/// Bytes that all rings together take at most, as long as each has [`RECORDS_MIN`] records.
pub const MEMORY: u32 = 16 << 20;
/// Records of a ring, at least.
pub const RECORDS_MIN: u32 = 1 << 12;
/// Records of a ring, at most: 2 MiB.
pub const RECORDS_MAX: u32 = 1 << 16;

/// Records of each ring, a power of two, where there are this many rings: one for each CPU and one for the daemon.
#[must_use]
pub const fn records(rings: u32) -> u32 {
    let mut records = RECORDS_MAX;
    while records > RECORDS_MIN && records as u64 * size_of::<Record>() as u64 * rings as u64 > MEMORY as u64
    {
        records /= 2;
    }
    records
}

list! {
    numbered;
    /// An event of a flow. At most 15 kinds, none of them 0.
    FlowEvent;
    /// A client's SYN was given a slot and sent to a backend.
    Claimed = 1;
    /// The backend has answered and the flow is established.
    Established = 2;
    /// The backend refused the SYN. The refusal was swallowed; the client's next SYN goes to backend `other`.
    SecondChance = 3;
    /// The backend refused the SYN, and the refusal was sent to the client.
    RefusedByBackend = 4;
    /// The backend takes no new flows any more: the client's next SYN went to backend `other`.
    Moved = 5;
    /// A SYN was not sent to any backend: see [`Refusal`].
    Refused = 6;
    /// The client sent the first FIN.
    ClosedByClient = 7;
    /// The backend sent the first FIN.
    ClosedByBackend = 8;
    /// The client reset the flow.
    ResetByClient = 9;
    /// The backend reset the flow.
    ResetByBackend = 10;
    /// The slot was given to another flow, because every candidate was taken; `detail` is [`state`] as it was.
    Reclaimed = 11;
    /// The daemon reset the flow: see [`ResetReason`]; `other` is the number of seconds that the backend had been silent.
    Killed = 12;
    /// The daemon asked the backend whether it still has the flow: see [`ResetReason`].
    Asked = 13;
    /// The daemon forgot the flow after a long silence; `detail` is [`state`] as it was.
    Forgotten = 14;
}

list! {
    numbered;
    /// Why a SYN went to no backend: `detail` of [`FlowEvent::Refused`].
    Refusal;
    /// The service has no usable backend: answered with a RST.
    NoBackend = 1;
    /// The client is in none of the service's prefixes: answered with a RST.
    NotAllowed = 2;
    /// All of its candidate slots are taken: dropped.
    TableFull = 3;
    /// Another CPU claimed a slot for its copy at the same time: dropped.
    Race = 4;
    /// The next hop towards its backend is not known: dropped.
    NoNextHop = 5;
    /// Its source has used up its budget of slots: dropped.
    SourceBudget = 6;
    /// The flow before may have ended by a RST, and its backend is asked first: dropped.
    Doubted = 7;
}

list! {
    numbered;
    /// Why the daemon reset a flow or asked about it: the lower half of `detail`.
    ResetReason;
    /// The backend is dead; the upper half of `detail` is how its last check failed: see [`Silence`].
    Dead = 1;
    /// An operator ordered it.
    Operator = 2;
    /// The backend refuses connections.
    Refuses = 3;
    /// The backend answers again after a silence.
    Returned = 4;
    /// The backend was drained, and its time was over.
    Drained = 5;
    /// Neither end has sent anything for the idle timeout.
    Idle = 6;
    /// A RST was seen whose numbers prove nothing.
    Doubt = 7;
    /// A FIN was seen, and for more than a minute nothing else.
    HalfClosed = 8;
}

list! {
    numbered;
    /// How the last check of a dead backend failed. At most 15.
    Silence;
    /// TCP did not complete.
    Connect = 1;
    /// TLS did not complete.
    Handshake = 2;
    /// Its host is unreachable.
    Unreachable = 3;
    /// In another way.
    Other = 4;
}

impl Refusal {
    /// The number of the refusal that an outcome of a SYN is; 0: it is none.
    #[inline(always)]
    #[must_use]
    pub const fn of(outcome: Outcome) -> u8 {
        match outcome {
            Outcome::RefusedNoBackend => Self::NoBackend as u8,
            Outcome::RefusedNotAllowed => Self::NotAllowed as u8,
            Outcome::TableFull => Self::TableFull as u8,
            Outcome::SynRace => Self::Race as u8,
            Outcome::SourceBudget => Self::SourceBudget as u8,
            Outcome::SynDoubted => Self::Doubted as u8,
            _ => 0,
        }
    }
}

/// The flow's state: kind and flags of its slot's word, see [`Meta`].
#[inline(always)]
#[must_use]
pub const fn state(meta: Meta) -> u8 {
    meta.0 as u8
}

/// An address as IPv6, IPv4 mapped (RFC 4291 §2.5.5.2).
#[inline(always)]
#[must_use]
pub fn mapped<F: Family>(address: [u64; 2]) -> [u64; 2] {
    if F::NUMBER == family::IPV6 {
        return address;
    }
    let [a, b, c, d] = (address[0] as u32).to_ne_bytes();
    [0, u64::from_ne_bytes([0, 0, 0xff, 0xff, a, b, c, d])]
}

/// A record about a flow, before it has a time.
///
/// ```text
///       63         48 47         32 31      24 23    16 15     8 7    4 3       0
///      +-------------+-------------+----------+--------+--------+------+---------+
/// what |    slot     | client port | listener | detail | backend| SNAT |event|
///      +-------------+-------------+----------+--------+--------+------+---------+
/// when |            jiffies (40)              | other  |          lap           |
///      +--------------------------------------+--------+------------------------+
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Note {
    /// The client's address, IPv4 mapped.
    pub address: [u64; 2],
    /// See above. The client's port is a word, the slot a number.
    pub what: u64,
    /// Its meaning depends on the event.
    pub other: u8,
}

impl Note {
    /// About the flow of a client (address words, port word) at a listener (id).
    #[inline(always)]
    #[must_use]
    pub fn new<F: Family>(event: FlowEvent, (address, port, listener): ([u64; 2], u16, u16)) -> Self {
        let what = event as u64 | (listener as u64 & 0xff) << 24 | (port as u64) << 32;
        Self { address: mapped::<F>(address), what, other: 0 }
    }

    /// The same, with the flow's backend.
    #[inline(always)]
    #[must_use]
    pub const fn of(self, backend: u8) -> Self {
        Self { what: self.what | (backend as u64) << 8, ..self }
    }

    /// The same, with the flow's slot.
    #[inline(always)]
    #[must_use]
    pub const fn at(self, slot: Slot) -> Self {
        let address = (slot.address() % SNAT_ADDRESSES) as u64;
        Self { what: self.what | (slot.port() as u64) << 48 | address << 4, ..self }
    }

    /// The same, with a detail; its meaning depends on the event.
    #[inline(always)]
    #[must_use]
    pub const fn detail(self, detail: u8) -> Self {
        Self { what: self.what | (detail as u64) << 16, ..self }
    }

    /// The same, with a second detail.
    #[inline(always)]
    #[must_use]
    pub const fn other(self, other: u8) -> Self {
        Self { other, ..self }
    }
}

const _: () = assert!(SNAT_ADDRESSES == 16);

/// A place in a ring. The first place of each ring is its head: it holds no record but, in `what`, the number of the next,
/// and in the daemon's ring an [`Anchor`].
#[repr(C)]
#[derive(Default)]
pub struct Record {
    /// See [`Note::address`].
    pub address: [Cell64; 2],
    /// See [`Note`].
    pub what: Cell64,
    /// See [`Note`]; 0 while the record is written.
    pub when: Cell64,
}

impl Record {
    /// The record. None: nothing is written here yet, or it is being written.
    pub fn read(&self) -> Option<Written> {
        let when = self.when.load();
        let [high, low] = &self.address;
        let note =
            Note { address: [high.load(), low.load()], what: self.what.load(), other: (when >> OTHER) as u8 };
        // The writer clears the time before it changes any other word. The same time: no word was changed.
        (when != 0 && self.when.load() == when).then_some(Written {
            note,
            jiffies: when >> JIFFIES,
            lap: when as u16,
        })
    }

    /// The anchor in the head of the daemon's ring. None: not written yet, or being written.
    pub fn anchor(&self) -> Option<Anchor> {
        let when = self.when.load();
        let [jiffies, nanoseconds] = &self.address;
        let anchor = Anchor {
            jiffies: jiffies.load(),
            nanoseconds: nanoseconds.load(),
            frequency: when as u32 & FREQUENCY_MAX,
        };
        (when != 0 && self.when.load() == when).then_some(anchor)
    }

    /// Writes the anchor into the head of the daemon's ring.
    pub fn set_anchor(&self, anchor: &Anchor) {
        let [jiffies, nanoseconds] = &self.address;
        self.when.store(0);
        jiffies.store(anchor.jiffies);
        nanoseconds.store(anchor.nanoseconds);
        // A new value every time, or a reader might mix two anchors.
        self.when.store(anchor.jiffies << FREQUENCY_BITS | u64::from(anchor.frequency & FREQUENCY_MAX));
    }

    #[inline(always)]
    pub(crate) fn write(&self, note: &Note, when: u64) {
        let [high, low] = &self.address;
        self.when.store(0);
        high.store(note.address[0]);
        low.store(note.address[1]);
        self.what.store(note.what);
        self.when.store(when);
    }
}

/// One moment on both clocks: ties records to the time of day, also while no daemon runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Anchor {
    /// The kernel's tick counter.
    pub jiffies: u64,
    /// Nanoseconds since 1970-01-01 UTC.
    pub nanoseconds: u64,
    /// Ticks a second, at most 4095.
    pub frequency: u32,
}

const FREQUENCY_BITS: u32 = 12;
const FREQUENCY_MAX: u32 = (1 << FREQUENCY_BITS) - 1;
const OTHER: u32 = 16;
const JIFFIES: u32 = 24;

/// A record that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// What was written.
    pub note: Note,
    /// When: the kernel's tick counter, cut to 40 bits, which last for 34 years.
    pub jiffies: u64,
    /// How often the ring had wrapped by then, cut to 16 bits.
    pub lap: u16,
}

/// Appends to a ring of 2^`bits` places, of which `place` returns each, at the time that `jiffies` returns. Only one writer
/// may append to a ring at a time.
///
/// The clock is read as late as possible: in the kernel each value that lives longer takes stack.
#[inline(always)]
pub fn append<'a>(
    place: impl Fn(u32) -> Option<&'a Record>,
    bits: u32,
    note: &Note,
    jiffies: impl FnOnce() -> u64,
) {
    let mask = (1 << bits) - 1;
    let Some(head) = place(0) else { return };
    let next = head.what.load();
    // The first place is the head's.
    let number = next + u64::from(next as u32 & mask == 0);
    head.what.store(number + 1);
    if let Some(record) = place(number as u32 & mask) {
        let lap = number >> bits & 0xffff;
        record.write(note, jiffies() << JIFFIES | u64::from(note.other) << OTHER | lap);
    }
}

/// The records of a ring, the oldest first.
pub fn in_order<'a>(place: impl Fn(u32) -> Option<&'a Record>, bits: u32) -> impl Iterator<Item = Written> {
    let mask = (1 << bits) - 1;
    let next = place(0).map_or(0, |head| head.what.load());
    let first = next.saturating_sub(u64::from(mask) + 1);
    (first..next).filter_map(move |number| {
        let lap = (number >> bits) as u16;
        let at = number as u32 & mask;
        // A record that was overwritten meanwhile has a newer lap: skipped.
        place(at).filter(|_| at != 0)?.read().filter(|written| written.lap == lap)
    })
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use core::mem::offset_of;

    use super::*;
    use crate::flow::{V4, V6};

    const BITS: u32 = 3;

    fn ring() -> Vec<Record> {
        (0..1 << BITS).map(|_| Record::default()).collect()
    }

    fn note(number: u64) -> Note {
        Note { address: [number; 2], what: number, other: number as u8 }
    }

    fn numbers(ring: &[Record]) -> Vec<u64> {
        in_order(|at| ring.get(at as usize), BITS).map(|written| written.note.what).collect()
    }

    #[test]
    fn the_layout_is_what_the_kernel_has() {
        assert_eq!((size_of::<Record>(), align_of::<Record>()), (32, 8));
        assert_eq!((offset_of!(Record, what), offset_of!(Record, when)), (16, 24));
        assert!(FlowEvent::ALL.iter().all(|it| (1..16).contains(&(*it as u8))));
        assert!(Silence::ALL.iter().all(|it| (1..16).contains(&(*it as u8))));
    }

    #[test]
    fn rings_are_long_and_take_little_memory() {
        for rings in [1, 2, 3, 5, 9, 17, 33, 65, 129, 513] {
            let records = records(rings);
            assert!(records.is_power_of_two());
            let bytes = rings * records * size_of::<Record>() as u32;
            assert!(bytes <= MEMORY || records == RECORDS_MIN, "{rings}: {bytes}");
        }
        assert_eq!(records(3), RECORDS_MAX);
        assert_eq!(records(65), 4096);
    }

    #[test]
    fn the_parts_of_a_note_do_not_touch() {
        let tuple = ([0x0302_010a, 0], 0xfedc, 0xab);
        let slot = Slot { set: 15 * crate::layout::SETS_PER_ADDRESS + 0x1234, way: 3 };
        let note = Note::new::<V4>(FlowEvent::Forgotten, tuple).of(0xcd).at(slot).detail(0xef).other(0x12);
        assert_eq!(note.what, 0x48d3_fedc_abef_cdfe);
        let bytes: Vec<u8> = note.address.iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(bytes, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 1, 2, 3]);
        assert_eq!(Note::new::<V6>(FlowEvent::Claimed, ([1, 2], 3, 4)).address, [1, 2]);
    }

    #[test]
    fn the_newest_overwrite_the_oldest() {
        let ring = ring();
        assert_eq!(numbers(&ring), [] as [u64; 0]);
        for count in 1..=40 {
            append(|at| ring.get(at as usize), BITS, &note(count), || 1000 + count);
            let expected: Vec<_> = (count.saturating_sub(6).max(1)..=count).collect();
            assert_eq!(numbers(&ring), expected);
        }
        let last = in_order(|at| ring.get(at as usize), BITS).last().unwrap();
        assert_eq!((last.note, last.jiffies), (note(40), 1040));
    }

    #[test]
    fn a_record_that_is_being_written_is_none() {
        let ring = ring();
        append(|at| ring.get(at as usize), BITS, &note(1), || 1000);
        append(|at| ring.get(at as usize), BITS, &note(2), || 1000);
        ring[2].when.store(0);
        assert_eq!(numbers(&ring), [1]);
        // The writer was stopped for good, and the ring goes on.
        append(|at| ring.get(at as usize), BITS, &note(3), || 1001);
        assert_eq!(numbers(&ring), [1, 3]);
    }

    #[test]
    fn an_anchor_is_read_whole_or_not_at_all() {
        let head = Record::default();
        assert_eq!(head.anchor(), None);
        let anchor = Anchor { jiffies: (1 << 40) + 5, nanoseconds: u64::MAX / 3, frequency: 1000 };
        head.set_anchor(&anchor);
        assert_eq!(head.anchor(), Some(anchor));
        head.when.store(0);
        assert_eq!(head.anchor(), None);
    }

    #[test]
    fn a_record_that_was_overtaken_is_left_out() {
        let ring = ring();
        (1..=7).for_each(|number| append(|at| ring.get(at as usize), BITS, &note(number), || 1000));
        // As if the head had been read before the writer came round.
        let head = ring[0].what.load();
        (8..=10).for_each(|number| append(|at| ring.get(at as usize), BITS, &note(number), || 1000));
        ring[0].what.store(head);
        assert_eq!(numbers(&ring), [4, 5, 6, 7]);
    }
}
