//! An upgrade from the layout before this one: its flows are copied into maps of this build, and none is lost.
//!
//! The new maps are filled while the program before goes on with the old ones (the first pass). Then this build's program is
//! put in its place, interface by interface, and holds what belongs to no flow of its table ([`layout::Config::hold`]): it
//! may be of a flow that has begun since the first pass. When the last program before has ended nothing changes the old maps
//! any more. What has changed in them since the first pass is copied then (the second pass), and nothing is held any longer.
//!
//! Maps that mean the same to both builds are not copied but shared.
//!
//! A daemon that is ended in the middle leaves both tables, and `hold` in the new one. The next one makes the second pass: it
//! does not know what the first pass wrote, but knows a slot that was copied and not used since by its word.

use std::path::Path;

use aya::maps::{Map, MapData, PerCpuArray, PerCpuValues};
use lb_common::{
    cell::Cell64,
    flow::{Family, Slot, V4, V6},
    layout::{self, Bucket, SETS_PER_ADDRESS, WAYS},
    meta::{Kind, Meta, NUMBERED, SYN_ACK},
    outcome::{COUNTERS, Counter},
    sequence::SendSequence,
};

use super::{CONTROL, DataplaneError, Mapped, Tables, previous_layout as previous};

/// The maps that mean the same in both layouts. The programs of both builds use them at the same time.
pub(super) const SHARED: [&str; 12] = [
    "ALLOW",
    "BACKEND_FLOWS",
    "BACKEND_SOCKETS",
    "BLACK_BOX",
    "BLOCKED",
    "CLOCK",
    "DIALLED",
    "FOLLOWED_SOCKETS",
    "HOOK",
    "OVERFLOW6",
    "SELECTION",
    "SOCKETS_MISSED",
];

/// The new maps, as far as flows are copied into them.
#[derive(Clone, Copy)]
pub(super) struct New<'a> {
    /// The flow tables.
    pub(super) tables: &'a Tables,
    /// The learned next hops.
    pub(super) next_hops: &'a Mapped<Cell64>,
}

/// The copying of the previous layout's maps.
pub(super) struct Conversion {
    control: Mapped<previous::Control>,
    sets4: Mapped<previous::Set4>,
    return_hops4: Mapped<previous::ReturnHops>,
    overflow4: Mapped<previous::OverflowMarks>,
    sets6: Mapped<previous::Set6>,
    return_hops6: Mapped<previous::ReturnHops>,
    blocked: Mapped<u64>,
    next_hops: Mapped<Cell64>,
    counters: PerCpuArray<MapData, u64>,
    /// What was added to the new counters already, by index and CPU.
    counted: Vec<Vec<u64>>,
    /// The words that the first pass wrote, of IPv4 and of IPv6, by slot. None: another process made it.
    written: Option<[Vec<Meta>; 2]>,
}

impl Conversion {
    /// Opens the maps that are pinned in a directory of the previous layout.
    pub(super) fn open(directory: &Path) -> Result<Self, DataplaneError> {
        Ok(Self {
            control: open(directory, CONTROL)?,
            sets4: open(directory, "FLOW4")?,
            return_hops4: open(directory, "RETURN_HOP4")?,
            overflow4: open(directory, "OVERFLOW4")?,
            sets6: open(directory, "FLOW6")?,
            return_hops6: open(directory, "RETURN_HOP6")?,
            blocked: open(directory, "BLOCKED")?,
            next_hops: open(directory, "NEXT_HOP")?,
            counters: counters(directory)?,
            counted: Vec::new(),
            written: None,
        })
    }

    /// The configuration; what this build adds to it is as in `defaults`.
    pub(super) fn config(&self, defaults: layout::Config) -> layout::Config {
        let Some(control) = self.control.get(0) else { return defaults };
        config(&control.config, defaults)
    }

    /// Fills the new control map, which no program uses yet: everything that has a number keeps it.
    pub(super) fn fill_control(&self, new: &Mapped<layout::Control>) {
        let Some(old) = self.control.get(0) else { return };
        for (index, service) in old.services.iter().enumerate() {
            new.services().write(index, service_of(service));
        }
        for (index, listener) in old.listeners.iter().enumerate() {
            new.listeners().write(index, listener_of(listener));
        }
        for (index, backend) in old.backends.iter().enumerate() {
            new.backends().place(index, backend_of(backend));
        }
        if let Some(classifier) = new.classifier().get(0) {
            classifier.snat4.iter().zip(&old.classifier.snat4).for_each(|(to, from)| to.store(from.load()));
            classifier.snat6.iter().zip(&old.classifier.snat6).for_each(|(to, from)| to.store(from.load()));
            let listeners = classifier.listeners.iter().zip(&old.classifier.listeners);
            listeners.for_each(|(to, from)| to.store(from.load()));
        }
    }

    /// Copies every flow into tables that no program uses yet. Returns how many there were.
    pub(super) fn first_pass(&mut self, new: New<'_>) -> usize {
        let [sets4, sets6] = self.sets_in_use();
        self.copy_next_hops(new.next_hops);
        self.copy_blocked(new.tables);
        self.copy_marks(new.tables, sets4);
        let written4 = copy_all(new.tables, slots(sets4), |slot| self.slot4(slot));
        let written6 = copy_all(new.tables, slots(sets6), |slot| self.slot6(slot));
        let flows = written4.iter().chain(&written6).filter(|meta| meta.is_live()).count();
        self.written = Some([written4, written6]);
        flows
    }

    /// Copies what has changed since the first pass. No program uses the old tables any more, and this build's program the new
    /// ones. Returns how many slots that were.
    pub(super) fn second_pass(&mut self, new: New<'_>) -> usize {
        let [sets4, sets6] = self.sets_in_use();
        self.copy_next_hops(new.next_hops);
        self.copy_marks(new.tables, sets4);
        let (written4, written6) = match &self.written {
            Some([written4, written6]) => (Some(written4.as_slice()), Some(written6.as_slice())),
            None => (None, None),
        };
        let changed4 = copy_changed(new.tables, written4, slots(sets4), |slot| {
            let found = self.slot4(slot)?;
            Some(PreviousSlot { return_hop: self.hop(new.next_hops, found.return_hop), ..found })
        });
        let changed6 = copy_changed(new.tables, written6, slots(sets6), |slot| {
            let found = self.slot6(slot)?;
            Some(PreviousSlot { return_hop: self.hop(new.next_hops, found.return_hop), ..found })
        });
        changed4 + changed6
    }

    /// Adds what was counted since the last call, so that totals go on. Of a conversion that another process began only what
    /// was counted before that is known, and that process has added it.
    pub(super) fn add_counts(&mut self, new: &mut PerCpuArray<MapData, u64>) -> Result<(), DataplaneError> {
        const NAME: &str = "COUNTER";
        if self.written.is_none() {
            return Ok(());
        }
        let failed = |source| DataplaneError::Map { name: NAME, source };
        let places: Vec<_> =
            previous::COUNTERS.iter().map(|name| Counter::all().find(|it| it.name() == *name)).collect();
        let count = self.counters.len() as usize;
        self.counted.resize(count, Vec::new());
        for index in 0..count {
            let (service, place) = (index / places.len(), index % places.len());
            let Some(counter) = places[place] else { continue };
            let now = self.counters.get(&(index as u32), 0).map_err(failed)?.to_vec();
            if now == self.counted[index] || now.iter().all(|value| *value == 0) {
                continue;
            }
            let target = (service * COUNTERS + counter.index()) as u32;
            let before = self.counted[index].iter().copied().chain(std::iter::repeat(0));
            let there = new.get(&target, 0).map_err(failed)?.to_vec();
            let parts = there.iter().zip(now.iter().zip(before));
            let sums: Vec<_> =
                parts.map(|(there, (now, before))| there.wrapping_add(now.wrapping_sub(before))).collect();
            let values = PerCpuValues::try_from(sums)
                .map_err(|source| DataplaneError::System { call: "counting the CPUs", source })?;
            new.set(target, values, 0).map_err(failed)?;
            self.counted[index] = now;
        }
        Ok(())
    }

    /// The sets of the SNAT addresses that there are: nothing is in those of the places behind them.
    fn sets_in_use(&self) -> [usize; 2] {
        let addresses =
            self.control.get(0).map_or([0; 2], |it| [it.config.snat4_count, it.config.snat6_count]);
        addresses.map(|count| (count * SETS_PER_ADDRESS) as usize)
    }

    fn slot4(&self, slot: Slot) -> Option<PreviousSlot<V4>> {
        let way = &self.sets4.get(slot.set as usize)?.ways[slot.way as usize];
        Some(PreviousSlot {
            meta: Meta(way.meta.load()),
            tuple: way.tuple.load(),
            last_ack: way.last_ack.load(),
            return_hop: self.return_hops4.get(slot.set as usize)?.ways[slot.way as usize].load(),
        })
    }

    fn slot6(&self, slot: Slot) -> Option<PreviousSlot<V6>> {
        let way = &self.sets6.get(slot.set as usize)?.ways[slot.way as usize];
        let ([high, low], port_listener) = (&way.address, way.port_listener.load());
        Some(PreviousSlot {
            meta: Meta(way.meta.load()),
            tuple: V6::tuple([high.load(), low.load()], port_listener as u16, (port_listener >> 16) as u16),
            last_ack: way.last_ack.load(),
            return_hop: self.return_hops6.get(slot.set as usize)?.ways[slot.way as usize].load(),
        })
    }

    /// Enters the learned next hops where they were. A place that this build's program has given to another neighbour stays.
    fn copy_next_hops(&self, new: &Mapped<Cell64>) {
        for index in 0..self.next_hops.len().min(new.len()) {
            if let (Some(from), Some(to)) = (self.next_hops.get(index), new.get(index)) {
                to.compare_exchange(0, from.load());
            }
        }
    }

    /// The index of a next hop in the new table; 0 where it is not there.
    fn hop(&self, new: &Mapped<Cell64>, index: u16) -> u16 {
        let (old, new) = (self.next_hops.get(index.into()), new.get(index.into()));
        let is_there = old.zip(new).is_some_and(|(old, new)| old.load() == new.load());
        if is_there { index } else { 0 }
    }

    /// The overflow marks of so many IPv4 sets, which are in the sets now.
    fn copy_marks(&self, tables: &Tables, sets: usize) {
        for index in 0..sets {
            let (set, marks) = (V4::set(tables, index as u32), self.overflow4.get(index / 8));
            if let (Some(set), Some(marks)) = (set, marks) {
                set.overflow.store(marks.sets[index % 8].load());
            }
        }
    }

    /// The ports that must not become slots, which are in every IPv4 set now.
    fn copy_blocked(&self, tables: &Tables) {
        for index in 0..self.sets4.len() {
            let Some(set) = V4::set(tables, index as u32) else { break };
            let port = index % SETS_PER_ADDRESS as usize * WAYS;
            let word = self.blocked.read(port / 64).unwrap_or_default();
            set.blocked.store((word >> (port % 64)) as u8 & 0xf);
        }
    }
}

/// What `dataplane::known` reads of a flow table of the previous layout: its configuration, and places for SNAT addresses of
/// IPv4 and of IPv6.
pub(super) fn settings(directory: &Path, defaults: layout::Config) -> Option<(layout::Config, [usize; 2])> {
    let control: Mapped<previous::Control> = open(directory, CONTROL).ok()?;
    let room = |sets: usize| sets / SETS_PER_ADDRESS as usize;
    let sets4: Mapped<previous::Set4> = open(directory, "FLOW4").ok()?;
    let sets6: Mapped<previous::Set6> = open(directory, "FLOW6").ok()?;
    let config = config(&control.get(0)?.config, defaults);
    Some((config, [room(sets4.len()), room(sets6.len())]))
}

/// Whether a daemon was ended while it copied flows into this control map's tables.
pub(super) fn was_interrupted(control: &Path) -> bool {
    let map = MapData::from_pin(control).and_then(Map::from_map_data);
    let control = map.ok().and_then(|map| Mapped::<layout::Control>::new(CONTROL, &map).ok());
    control.and_then(|control| control.config().read(0)).is_some_and(|config| config.hold != 0)
}

fn open<T>(directory: &Path, name: &'static str) -> Result<Mapped<T>, DataplaneError> {
    Mapped::new(name, &pinned(directory, name)?)
}

fn counters(directory: &Path) -> Result<PerCpuArray<MapData, u64>, DataplaneError> {
    const NAME: &str = "COUNTER";
    pinned(directory, NAME)?.try_into().map_err(|source| DataplaneError::Map { name: NAME, source })
}

fn pinned(directory: &Path, name: &'static str) -> Result<Map, DataplaneError> {
    let map = MapData::from_pin(previous::map_path(directory, name)).and_then(Map::from_map_data);
    map.map_err(|source| DataplaneError::Map { name, source })
}

/// The slots of so many sets.
fn slots(sets: usize) -> impl Iterator<Item = Slot> + use<> {
    (0..sets as u32).flat_map(|set| (0..WAYS as u32).map(move |way| Slot { set, way }))
}

/// A slot as the previous layout had it.
struct PreviousSlot<F: Family> {
    meta: Meta,
    tuple: F::Tuple,
    last_ack: u32,
    return_hop: u16,
}

/// Copies slots into a table that no program uses. Returns the words that were written, by slot.
fn copy_all<F: Family>(
    tables: &Tables,
    slots: impl Iterator<Item = Slot>,
    read: impl Fn(Slot) -> Option<PreviousSlot<F>>,
) -> Vec<Meta> {
    let copy = |slot| {
        let found = read(slot)?;
        let (meta, numbers) = converted(found.meta, found.last_ack);
        let set = F::set(tables, slot.set)?;
        if meta != Meta::FREE {
            write::<F>(tables, set, slot, &found, numbers);
            F::meta(set, slot.way).store(meta.0);
        }
        Some(meta)
    };
    slots.map(|slot| copy(slot).unwrap_or(Meta::FREE)).collect()
}

/// Copies the slots that are not as they were when they were copied first, `written` by slot. Returns how many.
fn copy_changed<F: Family>(
    tables: &Tables,
    written: Option<&[Meta]>,
    slots: impl Iterator<Item = Slot>,
    read: impl Fn(Slot) -> Option<PreviousSlot<F>>,
) -> usize {
    let copy = |(index, slot): (usize, Slot)| {
        let found = read(slot)?;
        let before = written.map(|words| words.get(index).copied().unwrap_or(Meta::FREE));
        replace::<F>(tables, slot, &found, before)
    };
    slots.enumerate().filter_map(copy).count()
}

/// Copies one slot if it must be, under a claim, as a program would. None: it stays as it is.
fn replace<F: Family>(
    tables: &Tables,
    slot: Slot,
    found: &PreviousSlot<F>,
    written: Option<Meta>,
) -> Option<()> {
    let (wanted, numbers) = converted(found.meta, found.last_ack);
    let set = F::set(tables, slot.set)?;
    let word = F::meta(set, slot.way);
    loop {
        let now = Meta(word.load());
        let same_flow = F::load(set, slot.way) == found.tuple;
        if !must_change(now, wanted, same_flow, written) {
            return None;
        }
        if wanted == Meta::FREE {
            if word.compare_exchange(now.0, Meta::FREE.0) == now.0 {
                return Some(());
            }
            continue;
        }
        // This build's program ignores the slot until the word is there.
        let claim = Meta::new(Kind::Claiming, wanted.backend(), wanted.seen());
        if word.compare_exchange(now.0, claim.0) == now.0 {
            write::<F>(tables, set, slot, found, numbers);
            word.store(wanted.0);
            return Some(());
        }
    }
}

/// Is the slot to become `wanted`, which it was in the old table in the end? `written`: see [`copy_changed`].
fn must_change(now: Meta, wanted: Meta, same_flow: bool, written: Option<Meta>) -> bool {
    // While this build's program holds, it gives no slot to another flow.
    let is_other = wanted != Meta::FREE && (!same_flow || now.is(Kind::Free));
    is_other || (!is_same_state(now, wanted) && is_untouched(now, written))
}

/// Is the word as the first pass left it, apart from its time?
fn is_untouched(now: Meta, written: Option<Meta>) -> bool {
    match written {
        Some(written) => is_same_state(now, written) && !now.is(Kind::Free),
        None => now.is(Kind::Claiming) || is_unproven_copy(now),
    }
}

/// Only a copy is like this: the first segment of its backend changes that.
fn is_unproven_copy(meta: Meta) -> bool {
    meta.is(Kind::Established) && !meta.has(NUMBERED)
        || meta.is(Kind::HalfOpen) && meta.has(NUMBERED) && !meta.has(SYN_ACK)
}

fn is_same_state(one: Meta, other: Meta) -> bool {
    one.at(0) == other.at(0)
}

fn write<F: Family>(
    tables: &Tables,
    set: &F::Set,
    slot: Slot,
    found: &PreviousSlot<F>,
    numbers: SendSequence,
) {
    F::store(set, slot.way, found.tuple);
    if let Some(there) = F::numbers(tables, set, slot) {
        there.unacknowledged.store(numbers.unacknowledged);
        there.next.store(numbers.next);
    }
    if let Some(hop) = F::return_hop(tables, set, slot) {
        hop.store(found.return_hop);
    }
}

/// A slot's word and numbers in this layout, see [`lb_common::transition`]. What the backend has sent is not known of any: it
/// is learned from the backend's next segment.
fn converted(old: Meta, last_ack: u32) -> (Meta, SendSequence) {
    let meta = old.without(previous::SYN_ACK | previous::CLIENT_ACK);
    let acknowledged = SendSequence::at(last_ack);
    if !old.is_live() {
        // Free, or a claim whose SYN is held now and sent again by its client.
        (Meta::FREE, SendSequence::default())
    } else if old.is(Kind::HalfOpen) {
        // The number of its SYN is not known, so that its SYN-ACK is believed, whatever it acknowledges.
        let numbers = if old.has(previous::SYN_ACK) {
            acknowledged
        } else {
            SendSequence { unacknowledged: last_ack, next: 0 }
        };
        (meta.with(NUMBERED), numbers)
    } else {
        (meta, acknowledged)
    }
}

fn config(old: &previous::Config, defaults: layout::Config) -> layout::Config {
    let mut config = layout::Config {
        key: old.key,
        first_set: old.first_set,
        sets: old.sets,
        snat4_count: old.snat4_count,
        snat6_count: old.snat6_count,
        interface_count: old.port_count,
        jiffies_shift: old.jiffies_shift,
        half_open_jiffies: old.half_open_jiffies,
        epoch: old.epoch,
        partners: old.partners,
        last_backend: old.last_backend,
        zero: old.zero,
        snat4: old.snat4,
        snat6: old.snat6,
        bucket4: old.bucket4.map(|word| Bucket::from_word(word.into())),
        bucket6: old.bucket6.map(|word| Bucket::from_word(word.into())),
        ..defaults
    };
    for (to, from) in config.interfaces.iter_mut().zip(&old.ports) {
        *to = layout::Interface {
            index: from.interface,
            vlan: from.vlan,
            mac: from.mac,
            tags: from.tags,
            tag_count: from.tag_count,
            reserved: from.reserved,
        };
    }
    config
}

fn service_of(old: &previous::Service) -> layout::Service {
    layout::Service {
        selection4: old.selection4,
        selection6: old.selection6,
        restricted: old.restricted,
        pods: old.pods,
    }
}

fn listener_of(old: &previous::Listener) -> layout::Listener {
    layout::Listener {
        address: old.address,
        port: old.port,
        family: old.family,
        reserved: old.reserved,
        service: old.service,
        next: old.next,
        interfaces: old.ports,
        sum: old.sum,
    }
}

fn backend_of(old: &previous::Backend) -> layout::Backend {
    let backend = layout::Backend {
        address: old.address,
        port: old.port,
        family: old.family,
        sum: old.sum,
        ..layout::Backend::default()
    };
    backend.flags.store(old.flags.load());
    backend.heard.store(old.heard.load());
    backend.next_hop.store(old.next_hop.load());
    backend.asked.store(old.asked.load());
    backend.refused.store(old.refused.load());
    backend
}

#[cfg(test)]
mod tests {
    use lb_common::meta::{BACKEND_FIN, BACKEND_TOLD, CLIENT_FIN, RESET};

    use super::*;

    const BACKEND: u8 = 7;
    const SEEN: u16 = 0x1234;

    fn old(kind: Kind, flags: u32) -> Meta {
        Meta::new(kind, BACKEND, SEEN).with(flags)
    }

    #[test]
    fn an_established_flow_keeps_everything_but_what_it_did_not_know() {
        let flags = [0, CLIENT_FIN, BACKEND_FIN, RESET, CLIENT_FIN | RESET];
        for flags in flags {
            let proven = previous::SYN_ACK | previous::CLIENT_ACK;
            let (meta, numbers) = converted(old(Kind::Established, proven | flags), 4711);
            assert_eq!(
                meta,
                old(Kind::Established, flags),
                "{flags:#x}: not numbered, and nothing retransmitted"
            );
            assert_eq!(numbers, SendSequence::at(4711));
        }
    }

    #[test]
    fn a_handshake_learns_its_numbers_from_the_backends_next_segment() {
        let answered = previous::SYN_ACK;
        for flags in [answered, answered | previous::CLIENT_ACK, answered | RESET] {
            let (meta, _) = converted(old(Kind::HalfOpen, flags), 4711);
            assert_eq!(meta, old(Kind::HalfOpen, flags & RESET | NUMBERED), "{flags:#x}");
        }
        for flags in [0, RESET, CLIENT_FIN] {
            let (meta, numbers) = converted(old(Kind::HalfOpen, flags), 4711);
            assert_eq!(meta, old(Kind::HalfOpen, flags | NUMBERED), "{flags:#x}");
            assert_eq!(numbers, SendSequence { unacknowledged: 4711, next: 0 });
        }
    }

    #[test]
    fn what_has_ended_stays_ended() {
        for kind in [Kind::ClosedByClient, Kind::ClosedByBackend] {
            let flags = previous::SYN_ACK | previous::CLIENT_ACK | CLIENT_FIN | BACKEND_FIN;
            let (meta, numbers) = converted(old(kind, flags), 9);
            assert_eq!((meta, numbers), (old(kind, CLIENT_FIN | BACKEND_FIN), SendSequence::at(9)));
        }
        assert!(converted(old(Kind::ClosedByClient, RESET), 9).0.is_closed_by_reset());
        assert!(converted(old(Kind::Killed, previous::SYN_ACK), 9).0.is_untold());
        assert_eq!(converted(old(Kind::Killed, BACKEND_TOLD), 9).0, old(Kind::Killed, BACKEND_TOLD));
        assert_eq!(converted(old(Kind::Claiming, 0), 9).0, Meta::FREE);
        assert_eq!(converted(Meta::FREE, 9).0, Meta::FREE);
    }

    #[test]
    fn the_second_pass_changes_what_the_old_program_changed_and_nothing_else() {
        let (half_open, _) = converted(old(Kind::HalfOpen, 0), 0);
        let established = old(Kind::Established, 0);
        let proven = established.with(NUMBERED);
        let closed = old(Kind::ClosedByClient, CLIENT_FIN | BACKEND_FIN);
        // The slot now, what it is to be, what the first pass wrote, and whether it changes.
        let cases = [
            (established, established.at(SEEN + 1), established, false),
            (half_open, established, half_open, true),
            (half_open.at(SEEN + 1), established, half_open, true),
            (established, closed, established, true),
            (proven, closed, established, false),
            (closed, established, established, false),
            (closed, half_open, closed, true),
            (Meta::FREE, established, Meta::FREE, true),
            (established, Meta::FREE, established, true),
            (proven, Meta::FREE, established, false),
            (Meta::FREE, Meta::FREE, Meta::FREE, false),
        ];
        for (now, wanted, written, changes) in cases {
            assert_eq!(
                must_change(now, wanted, true, Some(written)),
                changes,
                "{now:?} {wanted:?} {written:?}"
            );
        }
        assert!(must_change(proven, half_open, false, Some(established)), "another flow was given the slot");
    }

    #[test]
    fn a_second_pass_of_another_process_knows_a_slot_that_was_not_used_since() {
        let (half_open, _) = converted(old(Kind::HalfOpen, 0), 0);
        let established = old(Kind::Established, 0);
        let closed = old(Kind::ClosedByBackend, CLIENT_FIN | BACKEND_FIN);
        let proven = established.with(NUMBERED);
        for (now, wanted, changes) in [
            (half_open, established, true),
            (established, closed, true),
            (Meta::new(Kind::Claiming, BACKEND, SEEN), established, true),
            (Meta::FREE, established, true),
            (proven, established, false),
            (half_open.with(SYN_ACK), established, false),
            (closed, established, false),
            (Meta::FREE, Meta::FREE, false),
        ] {
            assert_eq!(must_change(now, wanted, true, None), changes, "{now:?} {wanted:?}");
        }
    }

    #[test]
    fn every_counter_of_the_previous_layout_goes_on() {
        for name in previous::COUNTERS {
            assert!(Counter::all().any(|counter| counter.name() == name), "{name}");
        }
    }
}
