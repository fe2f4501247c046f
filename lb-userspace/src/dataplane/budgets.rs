//! How full the flow tables are, and how much of them each source uses: see `lb_common::source_budget`.

use std::collections::HashMap;

use ipnet::IpNet;
use lb_common::{
    cell::Cell64,
    flow::{Family, Slot, V4, V6},
    layout::{Config, SOURCE_CELLS, SOURCE_ROWS, SourceBudgets, WAYS, backend_flag},
    meta::{Kind, Meta},
    outcome::{COUNTERS, Counter, Outcome},
    source_budget::{SourceCount, cells_of, limit_place},
};

use super::{Dataplane, DataplaneError, Tables, address_of, flows::sets_in_use, sum};

/// Units (about seconds) since its last segment in which a handshake is counted as its source's. One that is real is over by
/// then, and the slot of any other is given to whoever needs it.
const HANDSHAKE: u16 = 2;

/// The most that one source may use of the slots of a family, in per cent. None: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceShares {
    /// Slots of flows.
    pub slots: Option<u8>,
    /// Half-open ones.
    pub half_open: Option<u8>,
}

impl SourceShares {
    /// Of a table of so many slots.
    fn of(self, slots: u64) -> SourceCount {
        if self == Self::default() {
            return SourceCount::UNLIMITED;
        }
        let share = |percent: Option<u8>| {
            percent.map_or(u32::MAX, |percent| (slots * u64::from(percent) / 100).max(1) as u32)
        };
        SourceCount::new(share(self.slots), share(self.half_open))
    }
}

/// How the slots of a family are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Slots there are.
    pub slots: u64,
    /// Those of established flows.
    pub established: u64,
    /// Those of handshakes.
    pub half_open: u64,
    /// Those of flows that are closed or were reset: they rest before others get them.
    pub closed: u64,
}

impl Usage {
    /// Slots that are not free.
    pub fn used(&self) -> u64 {
        self.established + self.half_open + self.closed
    }

    /// The same in per cent of all slots.
    pub fn percent(&self) -> u64 {
        (self.used() * 100).checked_div(self.slots).unwrap_or_default()
    }

    fn see(&mut self, meta: Meta) {
        if meta.is(Kind::Established) {
            self.established += 1;
        } else if meta.is(Kind::HalfOpen) || meta.is(Kind::Claiming) {
            self.half_open += 1;
        } else {
            self.closed += 1;
        }
    }
}

/// A source, and what it uses of what it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeavySource {
    /// An IPv4 address, or the /64 of IPv6 addresses.
    pub prefix: IpNet,
    /// What it uses.
    pub used: SourceCount,
    /// What any source may use.
    pub limit: SourceCount,
}

/// What is counted in a second.
struct Count<'a> {
    config: &'a Config,
    now: u16,
    /// By backend id.
    local: &'a [bool],
}

impl Dataplane {
    /// Says how much a source may use, from the next [`Dataplane::count_sources`] on.
    pub fn set_source_shares(&mut self, shares: SourceShares) {
        self.source_shares = shares;
    }

    /// Counts the slots of each source anew, for the program; returns how the slots of IPv4 and of IPv6 are used. To be called
    /// every second: a count that is older than a few seconds refuses nobody.
    pub fn count_sources(&mut self) -> Result<[Usage; 2], DataplaneError> {
        let jiffies = self.jiffies()?;
        let config = self.settings();
        let local = self.local_backends();
        let count = Count { config: &config, now: (jiffies >> self.ticks.shift()) as u16, local: &local };
        let mut cells = [vec![0; SOURCE_CELLS], vec![0; SOURCE_CELLS]];
        let usage =
            [count.family::<V4>(&self.tables, &mut cells), count.family::<V6>(&self.tables, &mut cells)];
        let limits = usage.map(|usage| self.source_shares.of(usage.slots));
        if let Some(budgets) = self.source_budgets.get(0) {
            write(budgets, &cells, limits, jiffies);
        }
        Ok(usage)
    }

    /// The source that uses most of what it may, of those that use half of it at least.
    pub fn heaviest_source(&mut self) -> Result<Option<HeavySource>, DataplaneError> {
        let now = (self.jiffies()? >> self.ticks.shift()) as u16;
        let config = self.settings();
        let local = self.local_backends();
        let count = Count { config: &config, now, local: &local };
        let Some(budgets) = self.source_budgets.get(0) else { return Ok(None) };
        let of_families =
            [count.heaviest::<V4>(&self.tables, budgets), count.heaviest::<V6>(&self.tables, budgets)];
        Ok(of_families.into_iter().flatten().max_by_key(|it| weight(it.used, it.limit)))
    }

    /// SYNs dropped as their source has used up its budget, since the maps were made.
    pub fn over_budget(&self, services: impl Iterator<Item = usize>) -> Result<u64, DataplaneError> {
        let place = Counter::Outcome(Outcome::SourceBudget).index() as u32;
        services
            .map(|service| {
                let base = u32::from(super::service_id(service)) * COUNTERS as u32;
                sum(&self.counters, "COUNTER", base + place)
            })
            .sum()
    }

    /// Which backends are this host, by id.
    pub(super) fn local_backends(&self) -> Vec<bool> {
        let flags = |id| self.backends.get(id).map_or(0, |backend| backend.flags.load());
        (0..self.backends.len()).map(|id| flags(id) & backend_flag::LOCAL != 0).collect()
    }
}

impl Count<'_> {
    /// Calls `see` for every slot of a family that is not free.
    fn each<F: Family>(&self, tables: &Tables, mut see: impl FnMut(Meta, F::Tuple)) {
        for (index, set) in tables.first::<F>(sets_in_use::<F>(self.config)) {
            for way in 0..WAYS as u32 {
                let slot = Slot { set: index, way };
                let meta = Meta(F::meta(set, slot.way).load());
                if !meta.is(Kind::Free) {
                    see(meta, F::load(set, slot.way));
                }
            }
        }
    }

    fn family<F: Family>(&self, tables: &Tables, cells: &mut [Vec<u64>; SOURCE_ROWS]) -> Usage {
        let slots = u64::from(self.config.sets) * WAYS as u64 * u64::from(F::snat_count(self.config));
        let mut usage = Usage { slots, ..Usage::default() };
        self.each::<F>(tables, |meta, tuple| {
            usage.see(meta);
            let used = of_source(self.now, self.local, meta).word();
            let (client, _, _) = F::parts(tuple);
            for (row, cell) in cells_of(self.config, F::source(client)).into_iter().enumerate() {
                cells[row][cell] += used;
            }
        });
        usage
    }

    fn heaviest<F: Family>(&self, tables: &Tables, budgets: &SourceBudgets) -> Option<HeavySource> {
        let limit = SourceCount::from_word(budgets.limits[limit_place(F::NUMBER)].load());
        if limit == SourceCount::UNLIMITED {
            return None;
        }
        let half = SourceCount::new((limit.slots() / 2).max(1), (limit.half_open() / 2).max(1));
        let mut found = HashMap::<u64, u64>::new();
        self.each::<F>(tables, |meta, tuple| {
            let (client, _, _) = F::parts(tuple);
            let source = F::source(client);
            let [first, second] = cells_of(self.config, source);
            let cell = |cell: &Cell64| SourceCount::from_word(cell.load());
            if cell(&budgets.cells[0][first]).least(cell(&budgets.cells[1][second])).reaches(half) {
                *found.entry(source).or_default() += of_source(self.now, self.local, meta).word();
            }
        });
        let used = found.into_iter().map(|(source, used)| (source, SourceCount::from_word(used)));
        let (source, used) = used.max_by_key(|(_, used)| weight(*used, limit))?;
        let length = if F::NUMBER == V4::NUMBER { 32 } else { 64 };
        let prefix = IpNet::new(address_of(F::NUMBER, [source, 0]), length).ok()?;
        Some(HeavySource { prefix, used, limit })
    }
}

/// What a slot counts for its source; `local`: which backends are this host.
fn of_source(now: u16, local: &[bool], meta: Meta) -> SourceCount {
    let age = meta.age(now);
    // A packet may have come since the clock was read.
    let is_young = age <= HANDSHAKE || age > u16::MAX - 4;
    if meta.is(Kind::Established) {
        SourceCount::new(1, 0)
    } else if is_young && (meta.is(Kind::HalfOpen) || meta.is(Kind::Claiming)) {
        // The replies of a backend that is this host are not seen: its flows stay half-open as long as they live.
        let is_local = local.get(usize::from(meta.backend())).copied().unwrap_or_default();
        if is_local { SourceCount::new(1, 0) } else { SourceCount::CLAIM }
    } else {
        SourceCount::default()
    }
}

/// How much of its budget a source has used, of the kind that it has used most of.
fn weight(used: SourceCount, limit: SourceCount) -> u64 {
    let share = |used: u32, limit: u32| u64::from(used) * 1_000_000 / u64::from(limit.max(1));
    share(used.slots(), limit.slots()).max(share(used.half_open(), limit.half_open()))
}

/// Overwrites what the program has added to since the last count. What it adds meanwhile is lost, until the next count finds
/// its slot.
fn write(budgets: &SourceBudgets, cells: &[Vec<u64>; SOURCE_ROWS], limits: [SourceCount; 2], jiffies: u64) {
    for (cell, counted) in budgets.cells.iter().flatten().zip(cells.iter().flatten()) {
        // A line of memory that another CPU has is not written for nothing.
        if cell.load() != *counted {
            cell.store(*counted);
        }
    }
    for (entry, limit) in budgets.limits.iter().zip(limits) {
        entry.store(limit.word());
    }
    budgets.counted_at.store(jiffies);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_number_of_slots() {
        let shares = |slots, half_open| SourceShares { slots, half_open };
        assert_eq!(shares(Some(50), Some(25)).of(64_512), SourceCount::new(32_256, 16_128));
        assert_eq!(shares(Some(1), None).of(64), SourceCount::new(1, u32::MAX), "never none at all");
        assert_eq!(shares(None, None).of(64_512), SourceCount::UNLIMITED);
    }

    #[test]
    fn only_what_others_cannot_have_is_counted_for_a_source() {
        let of = |kind, backend, age: u16| {
            let meta = Meta::new(kind, backend, 1000_u16.wrapping_sub(age));
            of_source(1000, &[false, false, true], meta)
        };
        assert_eq!(of(Kind::Established, 1, 10_000), SourceCount::new(1, 0));
        assert_eq!(of(Kind::HalfOpen, 1, HANDSHAKE), SourceCount::CLAIM);
        assert_eq!(of(Kind::HalfOpen, 1, 0_u16.wrapping_sub(1)), SourceCount::CLAIM);
        assert_eq!(of(Kind::HalfOpen, 1, HANDSHAKE + 1), SourceCount::default());
        assert_eq!(of(Kind::HalfOpen, 2, 0), SourceCount::new(1, 0), "on this host");
        for kind in [Kind::ClosedByClient, Kind::ClosedByBackend, Kind::Killed] {
            assert_eq!(of(kind, 1, 0), SourceCount::default());
        }
    }
}
