//! The flow tables in this process's memory.

use std::collections::BTreeSet;

use aya::Ebpf;
use lb_common::{
    cell::{Cell8, Cell16},
    flow::{Family, Slot, V4},
    layout::{Numbers, Numbers4, OverflowMarks, ReturnHops, SETS_PER_ADDRESS, Set4, Set6, WAYS, family},
    tables::FlowTables,
};

use super::{DataplaneError, Mapped, mapped};

/// Sets whose blocked ways share a word of `BLOCKED`.
const SETS_IN_WORD: usize = 64 / WAYS;

/// The sets of both families, and what is kept beside them. The kernel programs change them at the same time.
pub struct Tables {
    sets4: Mapped<Set4>,
    numbers4: Mapped<Numbers4>,
    sets6: Mapped<Set6>,
    return_hops6: Mapped<ReturnHops>,
    overflow6: Mapped<OverflowMarks>,
    /// One bit a port, the same for every address.
    blocked6: Mapped<u64>,
}

impl Tables {
    pub(super) fn of(ebpf: &Ebpf) -> Result<Self, DataplaneError> {
        Ok(Self {
            sets4: mapped(ebpf, "FLOW4")?,
            numbers4: mapped(ebpf, "NUMBERS4")?,
            sets6: mapped(ebpf, "FLOW6")?,
            return_hops6: mapped(ebpf, "RETURN_HOP6")?,
            overflow6: mapped(ebpf, "OVERFLOW6")?,
            blocked6: mapped(ebpf, "BLOCKED")?,
        })
    }

    /// How many sets of a family there are, of all places for SNAT addresses.
    pub fn sets<F: Family>(&self) -> usize {
        if F::NUMBER == family::IPV4 { self.sets4.len() } else { self.sets6.len() }
    }

    /// The first `count` sets of a family, with their indexes.
    pub fn first<F: Family>(&self, count: usize) -> impl Iterator<Item = (u32, &F::Set)> {
        (0..count as u32).filter_map(|index| Some((index, F::set(self, index)?)))
    }

    /// Never uses a port as a slot from now on. A flow that has it keeps it.
    pub fn block(&self, port: u16) {
        let ways = 1 << (usize::from(port) % WAYS);
        self.set_blocked(u32::from(port) / WAYS as u32, |blocked| blocked | ways);
    }

    /// Never uses these ports as slots, and uses any other again. A flow that has one keeps it.
    pub fn block_only(&self, ports: &BTreeSet<u16>) {
        for set in 0..SETS_PER_ADDRESS {
            let first = (set * WAYS as u32) as u16;
            let ways = ports.range(first..=first + (WAYS - 1) as u16);
            let bits = ways.fold(0, |bits: u8, port| bits | 1 << (usize::from(*port) % WAYS));
            self.set_blocked(set, |_| bits);
        }
    }

    /// Sets the ways that are blocked in a set, of all addresses of both families, by what they were.
    fn set_blocked(&self, set: u32, change: impl Fn(u8) -> u8) {
        let next = change(self.blocked6(set));
        let (word, shift) = (set as usize / SETS_IN_WORD, set as usize % SETS_IN_WORD * WAYS);
        let bits = self.blocked6.read(word).unwrap_or_default();
        self.blocked6.write(word, bits & !(0xf << shift) | u64::from(next) << shift);
        let addresses = (set..self.sets::<V4>() as u32).step_by(SETS_PER_ADDRESS as usize);
        for set in addresses.filter_map(|index| self.set4(index)) {
            if set.blocked.load() != next {
                set.blocked.store(next);
            }
        }
    }

    /// The numbers of the flow in a slot.
    pub fn numbers<F: Family>(&self, slot: Slot) -> Option<&Numbers> {
        F::numbers(self, F::set(self, slot.set)?, slot)
    }
}

impl FlowTables for Tables {
    fn set4(&self, index: u32) -> Option<&Set4> {
        self.sets4.get(index as usize)
    }

    fn set6(&self, index: u32) -> Option<&Set6> {
        self.sets6.get(index as usize)
    }

    fn numbers4(&self, set: u32, way: u32) -> Option<&Numbers> {
        Some(&self.numbers4.get(set as usize)?.ways[way as usize % WAYS])
    }

    fn return_hop6(&self, set: u32, way: u32) -> Option<&Cell16> {
        Some(&self.return_hops6.get(set as usize)?.ways[way as usize % WAYS])
    }

    fn blocked6(&self, set: u32) -> u8 {
        let set = (set % SETS_PER_ADDRESS) as usize;
        let word = self.blocked6.read(set / SETS_IN_WORD).unwrap_or(u64::MAX);
        (word >> (set % SETS_IN_WORD * WAYS)) as u8 & 0xf
    }

    fn overflow6(&self, set: u32) -> Option<&Cell8> {
        let marks = self.overflow6.get(set as usize / 8)?;
        Some(&marks.sets[set as usize % marks.sets.len()])
    }
}
