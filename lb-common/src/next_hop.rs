//! The ways back to clients, learned from the packets that come from them.
//!
//! A client's replies leave by the neighbour that its packets came from: no route look-up, and right also where
//! several routers share a segment. A slot keeps an index into one table; many clients behind one router share an
//! entry. The daemon watches the entries: it gives an entry whose MAC address left the next hop of the route, and
//! forgets those that no slot names.
//!
//! **Places.** A neighbour has two buckets of [`BUCKET`] entries, one cache line each, and is entered where fewer
//! entries are taken (Azar, Broder, Karlin, Upfal 1999, "Balanced allocations"). The buckets are picked by the secret
//! key that flows are hashed with, so that no sender can compute addresses that fill a chosen neighbour's places.
//!
//! **Forgetting.** An entry that no slot names is marked with [`UNNAMED`], and emptied a grace period later if no slot
//! names it then either. That is enough: a program that found the entry before the mark has stored the index in its
//! slot, or has ended without, when the grace period is over. One that finds the entry later takes the mark off by
//! compare-and-exchange before it uses the index, and then the daemon's own compare-and-exchange, from the marked word
//! to an empty one, fails. A program that read the index from a slot before the slot was changed has ended by then, too.
//! The mark alone changes nothing for the packets that leave by the entry.

use crate::{
    cell::Cell64,
    flow::{family::Family, slot::Slot},
    frame::Frame,
    hash::{Key, scale},
    layout::{Config, INTERFACES, NEXT_HOPS, NextHop},
    maps::Maps,
    outcome::Event,
    subprograms::Subprograms,
};

/// Entries of a bucket: one cache line.
pub const BUCKET: u32 = 8;
/// The bit of an entry that no slot named when the daemon looked last. See the module's notes on forgetting.
pub const UNNAMED: u64 = 1 << 63;

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
    match maps.config() {
        Some(config) => enter(&config.key, hop, |index| maps.learned_hop(index)),
        None => 0,
    }
}

/// The same, over any table of [`NEXT_HOPS`] entries.
///
/// Two CPUs that enter one neighbour at the same time may give it two entries: both are right.
#[inline(always)]
pub fn enter<'a>(key: &Key, hop: u64, entry: impl Fn(u16) -> Option<&'a Cell64>) -> u16 {
    // The all-zero address is nobody's, and an empty entry would be taken for it.
    if hop == NextHop::UNKNOWN.0 {
        return 0;
    }
    let buckets = candidates(key, hop);
    // Entries taken in the second bucket, less those in the first.
    let mut difference = 0;
    for number in 0..2 * BUCKET {
        let index = index_of(buckets, number);
        let Some(entry) = entry(index) else { return 0 };
        let found = entry.load();
        if found & !UNNAMED == hop && (found == hop || is_named(entry, hop)) {
            return index;
        }
        // 1 for every word from 1 to 2^63, by arithmetic: each branch here would double the verifier's paths.
        let taken = (((found & !UNNAMED) + (u64::MAX >> 1)) >> 63) as i32;
        difference += if number < BUCKET { -taken } else { taken };
    }
    let emptier = if difference >= 0 { buckets } else { [buckets[1], buckets[0]] };
    for number in 0..2 * BUCKET {
        let index = index_of(emptier, number);
        let Some(entry) = entry(index) else { return 0 };
        if entry.load() == NextHop::UNKNOWN.0 {
            let previous = entry.compare_exchange(NextHop::UNKNOWN.0, hop);
            if previous == NextHop::UNKNOWN.0 || previous == hop {
                return index;
            }
        }
    }
    0
}

/// The index of entry `number` of two buckets. They are gone through by one loop of sixteen, as LLVM unrolls two of eight,
/// and gives each look-up a place of its own on the stack.
#[inline(always)]
const fn index_of(buckets: [u32; 2], number: u32) -> u16 {
    let bucket = if number < BUCKET { buckets[0] } else { buckets[1] };
    (bucket + number % BUCKET) as u16
}

/// The first entries of a neighbour's two buckets. Those of the first bucket are nobody's: index 0 says "not known".
#[inline(always)]
fn candidates(key: &Key, hop: u64) -> [u32; 2] {
    let hash = key.hash1(hop).0;
    [hash as u32, (hash >> 32) as u32].map(|bits| (1 + scale(bits, NEXT_HOPS / BUCKET - 1)) * BUCKET)
}

/// Takes the mark off an entry of `hop`: is it still that neighbour's?
#[inline(always)]
fn is_named(entry: &Cell64, hop: u64) -> bool {
    let previous = entry.compare_exchange(hop | UNNAMED, hop);
    previous & !UNNAMED == hop
}

/// The way back that was learned from the client's packets, if any.
#[inline(always)]
pub fn learned<S: Subprograms>(maps: &S, return_hop: u16) -> NextHop {
    if return_hop == 0 {
        return NextHop::UNKNOWN;
    }
    NextHop(maps.learned_hop(return_hop).map_or(0, |hop| hop.load() & !UNNAMED))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::split_mix;

    /// An empty table, and a key of its own for each `seed`.
    struct Table {
        key: Key,
        entries: Vec<Cell64>,
    }

    impl Table {
        fn new(seed: u64) -> Self {
            let key = Key::new([split_mix(seed), split_mix(!seed)]);
            Self { key, entries: (0..NEXT_HOPS).map(|_| Cell64::default()).collect() }
        }

        fn enter(&self, hop: u64) -> u16 {
            enter(&self.key, hop, |index| self.entries.get(usize::from(index)))
        }

        /// How many of so many neighbours find no place.
        fn failures(&self, neighbours: u64) -> usize {
            (0..neighbours).filter(|number| self.enter(neighbour(*number)) == 0).count()
        }
    }

    /// Neighbouring addresses of one maker's cards.
    fn neighbour(number: u64) -> u64 {
        NextHop::new(0x0200_0000_0000 + number, 3).0
    }

    #[test]
    fn thousands_of_neighbours_on_one_segment_all_find_a_place() {
        for (neighbours, trials, allowed) in [(10_000, 100, 0), (16_384, 50, 0), (24_576, 20, 50)] {
            let failures: usize =
                (0..trials).map(|trial| Table::new(trial * 0x1_0001 + neighbours).failures(neighbours)).sum();
            println!("{failures} of {trials} x {neighbours} neighbours found no place");
            assert!(failures <= allowed * trials as usize, "{failures} of {trials} x {neighbours}");
        }
    }

    #[test]
    fn a_neighbour_has_one_entry_and_no_other_has_it() {
        let table = Table::new(1);
        let indexes: Vec<u16> = (0..10_000).map(|number| table.enter(neighbour(number))).collect();
        for (number, index) in indexes.iter().enumerate() {
            assert_eq!(table.entries[usize::from(*index)].load(), neighbour(number as u64));
            assert_eq!(table.enter(neighbour(number as u64)), *index);
        }
        assert_eq!(table.entries.iter().filter(|entry| entry.load() != 0).count(), 10_000);
        assert_eq!(table.entries[0].load(), 0, "index 0 says that no neighbour is known");
    }

    #[test]
    fn another_key_has_other_places() {
        let places = |seed| {
            let table = Table::new(seed);
            (0..1_000).map(move |number| table.enter(neighbour(number))).collect::<Vec<_>>()
        };
        let same = places(1).into_iter().zip(places(2)).filter(|(one, other)| one == other).count();
        assert!(same < 20, "{same} of 1000 at the same place with another key");
    }

    #[test]
    fn an_entry_that_no_slot_named_is_used_again_by_its_own_neighbour_alone() {
        let table = Table::new(7);
        let index = table.enter(neighbour(1));
        let entry = &table.entries[usize::from(index)];
        entry.store(neighbour(1) | UNNAMED);
        for other in 2..10_000 {
            assert_ne!(table.enter(neighbour(other)), index, "it is not free yet");
        }
        assert_eq!(table.enter(neighbour(1)), index);
        assert_eq!(entry.load(), neighbour(1), "named again");
    }

    #[test]
    fn the_all_zero_address_is_no_neighbour() {
        assert_eq!(Table::new(1).enter(0), 0);
    }

    #[test]
    fn full_buckets_are_full() {
        let table = Table::new(3);
        for first in candidates(&table.key, neighbour(1)) {
            for place in 0..BUCKET {
                table.entries[(first + place) as usize].store(neighbour(1_000_000 + u64::from(place)));
            }
        }
        assert_eq!(table.enter(neighbour(1)), 0);
        let [_, second] = candidates(&table.key, neighbour(1));
        table.entries[second as usize + 5].store(0);
        assert_eq!(u32::from(table.enter(neighbour(1))), second + 5, "the only free entry");
    }
}
