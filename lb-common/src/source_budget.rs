//! A budget of flow slots for each source: no client takes the whole table.
//!
//! A source is an IPv4 address, or the /64 of an IPv6 address. Its slots are counted in a count-min sketch (Cormode and
//! Muthukrishnan 2005): two rows of cells, and in each row one cell, chosen by an independent part of the keyed hash of the
//! source. A source has used up its budget when both of its cells have reached the limit. Sources share a cell by chance,
//! so one that has used little is refused only where it meets, in both rows, others that have used up theirs: of 16,384
//! cells a row, and at most four sources with a quarter of the slots each, once in 16 million sources.
//!
//! The program counts what it claims. The daemon counts the whole table anew each second and overwrites the cells, so
//! errors do not add up. What is claimed while it counts may be left out until the next second, never longer. What it counts
//! is what another flow cannot have ([`SourceCount`]): a flood of forged SYNs in a source's name uses up the source's budget
//! only for as long as it lasts.
//!
//! Without a daemon nobody subtracts the flows that end. So a count that is older than some seconds refuses nothing.

use crate::{
    layout::{Config, SOURCE_BITS, SOURCE_ROWS, SourceBudgets, family},
    maps::Maps,
    word::packed_word,
};

/// Units (about seconds) after which a count of the table is out of date.
const STALE: u64 = 4;

packed_word! {
    /// What a source uses: slots of established flows, as the daemon counted them last (bits 0-31), and handshakes of the
    /// last seconds, claims since that count included (bits 32-63). Closed and killed flows are not counted, nor old
    /// handshakes: their slots are given to others when these need them ([`crate::flow`]).
    ///
    /// A SYN can be forged in any client's name, so a handshake counts as no slot: it would cost that client its budget.
    #[derive(Default)]
    pub struct SourceCount(u64) as u64;
}

impl SourceCount {
    /// A claim: a handshake.
    pub const CLAIM: Self = Self::new(0, 1);
    /// As a limit: there is none, and nothing is counted.
    pub const UNLIMITED: Self = Self(0);

    /// So many slots of established flows, and so many handshakes.
    #[must_use]
    pub const fn new(slots: u32, half_open: u32) -> Self {
        Self(slots as u64 | (half_open as u64) << 32)
    }

    /// Slots.
    #[inline(always)]
    #[must_use]
    pub const fn slots(self) -> u32 {
        self.0 as u32
    }

    /// Half-open slots.
    #[inline(always)]
    #[must_use]
    pub const fn half_open(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// What two cells agree on: the lower number of each kind.
    #[inline(always)]
    #[must_use]
    pub fn least(self, other: Self) -> Self {
        Self::new(self.slots().min(other.slots()), self.half_open().min(other.half_open()))
    }

    /// Is as much used as `limit` allows, of one kind or the other?
    #[inline(always)]
    #[must_use]
    pub const fn reaches(self, limit: Self) -> bool {
        self.slots() >= limit.slots() || self.half_open() >= limit.half_open()
    }
}

/// The cells of a source, one in each row. `source` is [`crate::flow::Family::source`] of its addresses.
#[inline(always)]
#[must_use]
pub const fn cells_of(config: &Config, source: u64) -> [usize; SOURCE_ROWS] {
    // Plus an unknown zero, lest LLVM cuts the hash's halves first and mixes them then: the verifier of Linux 6.1 knows no
    // bounds of what was mixed last.
    let hash = config.key.hash1(source).0.wrapping_add(config.zero);
    [(hash as u32 >> (32 - SOURCE_BITS)) as usize, (hash >> (64 - SOURCE_BITS)) as usize]
}

/// Where the limit of a family is: see [`SourceBudgets::limits`].
#[inline(always)]
#[must_use]
pub const fn limit_place(family_number: u8) -> usize {
    (family_number == family::IPV6) as usize
}

/// Counts a claim of a source. False: its budget is used up, and it is not counted.
///
/// Counted before the claim, which may fail: that is one too many until the next second.
#[inline(always)]
pub fn admit<M: Maps>(maps: &M, family_number: u8, source: u64) -> bool {
    let (Some(config), Some(budgets)) = (maps.config(), maps.source_budgets()) else {
        return true;
    };
    let limit = SourceCount(budgets.limits[limit_place(family_number)].load());
    if limit == SourceCount::UNLIMITED {
        return true;
    }
    let [first, second] = cells_of(config, source);
    let (first, second) = (&budgets.cells[0][first], &budgets.cells[1][second]);
    let used = SourceCount(first.load()).least(SourceCount(second.load()));
    if used.reaches(limit) && is_recent(maps, config, budgets) {
        return false;
    }
    if limit.half_open() != u32::MAX {
        first.add(SourceCount::CLAIM.0);
        second.add(SourceCount::CLAIM.0);
    }
    true
}

/// Has the daemon counted the table in the last seconds?
#[inline(always)]
fn is_recent<M: Maps>(maps: &M, config: &Config, budgets: &SourceBudgets) -> bool {
    maps.jiffies().wrapping_sub(budgets.counted_at.load()) >> (config.jiffies_shift & 31) < STALE
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use crate::{
        flow::{Family, V4, V6},
        hash::split_mix,
        layout::SOURCE_CELLS,
        memory::Memory,
    };

    const LIMIT: SourceCount = SourceCount::new(8, 6);

    fn memory() -> Memory {
        let mut memory = Memory::new(0, 32, 1);
        memory.limit_sources(LIMIT);
        memory
    }

    fn admits(memory: &Memory, source: u64) -> bool {
        admit(&memory, family::IPV4, source)
    }

    /// Of so many claims in a second, those that are admitted.
    fn admitted(memory: &Memory, source: u64, claims: u32) -> u32 {
        (0..claims).map(|_| u32::from(admits(memory, source))).sum()
    }

    #[test]
    fn a_source_at_its_limit_is_refused_and_another_is_not() {
        let memory = memory();
        assert_eq!(admitted(&memory, 1, 100), LIMIT.half_open());
        assert!(admits(&memory, 2));
        // As after a count: the handshakes are over, the flows are there.
        memory.recount_sources(&[(1, SourceCount::new(7, 0)), (2, SourceCount::new(1, 0))]);
        assert_eq!(admitted(&memory, 1, 100), LIMIT.half_open(), "one slot is left, until it is counted");
        memory.recount_sources(&[(1, SourceCount::new(8, 0))]);
        assert_eq!((admitted(&memory, 1, 100), admitted(&memory, 2, 3)), (0, 3));
        memory.recount_sources(&[]);
        assert!(admits(&memory, 1), "its flows have ended");
    }

    #[test]
    fn what_nobody_counts_any_more_refuses_nothing() {
        let memory = memory();
        admitted(&memory, 1, 100);
        memory.advance(STALE - 1);
        assert!(!admits(&memory, 1));
        memory.advance(1);
        assert_eq!(admitted(&memory, 1, 100), 100);
        memory.recount_sources(&[]);
        assert_eq!(admitted(&memory, 1, 100), LIMIT.half_open());
    }

    #[test]
    fn without_a_limit_nothing_is_counted() {
        let mut memory = memory();
        memory.limit_sources(SourceCount::UNLIMITED);
        assert_eq!(admitted(&memory, 1, 1000), 1000);
        memory.limit_sources(LIMIT);
        assert_eq!(admitted(&memory, 1, 1000), LIMIT.half_open());
        // Of one kind only.
        let mut memory = self::memory();
        memory.limit_sources(SourceCount::new(10, u32::MAX));
        assert_eq!(admitted(&memory, 1, 1000), 1000, "handshakes are no slots: anyone can forge them");
        memory.recount_sources(&[(1, SourceCount::new(10, 0))]);
        assert_eq!(admitted(&memory, 1, 1000), 0);
    }

    #[test]
    fn sources_share_a_budget_only_by_meeting_in_both_rows() {
        const SOURCES: u64 = 30_000;
        // More than chance puts into one cell.
        let limit = SourceCount::new(100, 100);
        let mut memory = memory();
        memory.limit_sources(limit);
        let full = 1;
        let (mut in_one_row, mut in_both) = (0, 0);
        memory.recount_sources(&[(full, limit)]);
        let own = cells_of(&memory.config, full);
        for source in (2..SOURCES).map(split_mix) {
            let cells = cells_of(&memory.config, source);
            let same = (0..SOURCE_ROWS).filter(|row| cells[*row] == own[*row]).count();
            in_one_row += usize::from(same == 1);
            in_both += usize::from(same == 2);
            assert_eq!(admits(&memory, source), same < SOURCE_ROWS, "{source}");
        }
        // Expected: 3.7 and 0.0001.
        assert!((1..20).contains(&in_one_row) && in_both == 0, "{in_one_row} {in_both}");
    }

    #[test]
    fn the_cells_of_neighbouring_sources_are_spread() {
        let memory = memory();
        for row in 0..SOURCE_ROWS {
            let mut counts = vec![0_u32; SOURCE_CELLS];
            // The hosts of a /16, in network byte order.
            for host in 0..1 << 16 {
                let word = V4::source([u64::from(u32::from_be(0x0a0b_0000 | host)), 0]);
                counts[cells_of(&memory.config, word)[row]] += 1;
            }
            // Four on average.
            assert!(*counts.iter().max().unwrap() < 20, "row {row}");
        }
    }

    #[test]
    fn a_source_is_an_ipv4_address_or_an_ipv6_prefix() {
        let words = |address: &str| crate::memory::words(address.parse().unwrap());
        let of4 = |address| V4::source(words(address));
        assert_ne!(of4("10.0.0.1"), of4("10.0.0.2"));
        let of6 = |address| V6::source(words(address));
        assert_eq!(of6("2001:db8:1:2::1"), of6("2001:db8:1:2:ffff::9"));
        assert_ne!(of6("2001:db8:1:2::1"), of6("2001:db8:1:3::1"));
    }
}
