//! The flow tables in this process's memory.

use aya::Ebpf;
use lb_common::{
    cell::{Cell8, Cell16},
    flow::{Family, Slot},
    layout::{Numbers, Numbers4, OverflowMarks, ReturnHops, Set4, Set6, WAYS, family},
    tables::FlowTables,
};

use super::{DataplaneError, Mapped, mapped};

/// The sets of both families, and what is kept beside them. The kernel programs change them at the same time.
pub struct Tables {
    sets4: Mapped<Set4>,
    numbers4: Mapped<Numbers4>,
    sets6: Mapped<Set6>,
    return_hops6: Mapped<ReturnHops>,
    overflow6: Mapped<OverflowMarks>,
}

impl Tables {
    pub(super) fn of(ebpf: &mut Ebpf) -> Result<Self, DataplaneError> {
        Ok(Self {
            sets4: mapped(ebpf, "FLOW4")?,
            numbers4: mapped(ebpf, "NUMBERS4")?,
            sets6: mapped(ebpf, "FLOW6")?,
            return_hops6: mapped(ebpf, "RETURN_HOP6")?,
            overflow6: mapped(ebpf, "OVERFLOW6")?,
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

    fn overflow6(&self, set: u32) -> Option<&Cell8> {
        let marks = self.overflow6.get(set as usize / 8)?;
        Some(&marks.sets[set as usize % marks.sets.len()])
    }
}
