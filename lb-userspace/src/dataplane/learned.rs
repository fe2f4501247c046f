//! The ways back to clients that the data path has learned, from the daemon's side.

use std::collections::HashSet;

use lb_common::{
    flow::{Family, Slot, V4, V6},
    headers,
    layout::{NextHop, WAYS},
    meta::{Kind, Meta},
};

use super::{Dataplane, Tables, next_hop};

impl Dataplane {
    /// The learned ways back to clients: index, MAC address and the number of the port.
    pub fn learned_hops(&self) -> Vec<(usize, [u8; 6], usize)> {
        (1..self.next_hops.len())
            .filter_map(|index| {
                let hop = NextHop(self.next_hops.get(index)?.load());
                (hop != NextHop::UNKNOWN).then(|| {
                    let mac = headers::Mac::from_number(hop.mac()).bytes();
                    (index, mac, usize::from(hop.interface()))
                })
            })
            .collect()
    }

    /// Points a learned way back at another neighbour.
    pub fn correct_learned_hop(&self, index: usize, hop: ([u8; 6], usize)) {
        if let Some(entry) = self.next_hops.get(index) {
            entry.store(next_hop(Some(hop)).0);
        }
    }

    /// Forgets the ways that no slot names any more, once three quarters of the table are taken. How many those were.
    ///
    /// A packet may come between and name such a way. Its client's replies go by the route then, until its next packet
    /// is looked at, which is within a second.
    pub fn forget_learned_hops(&self) -> usize {
        let entries = self.learned_hops();
        if entries.len() * 4 <= self.next_hops.len() * 3 {
            return 0;
        }
        let mut named = HashSet::new();
        collect::<V4>(&self.tables, &mut named);
        collect::<V6>(&self.tables, &mut named);
        let forgotten = entries.iter().filter(|(index, mac, port)| {
            let expected = next_hop(Some((*mac, *port))).0;
            !named.contains(index)
                && self
                    .next_hops
                    .get(*index)
                    .is_some_and(|entry| entry.compare_exchange(expected, NextHop::UNKNOWN.0) == expected)
        });
        forgotten.count()
    }
}

fn collect<F: Family>(tables: &Tables, named: &mut HashSet<usize>) {
    for (index, set) in tables.first::<F>(tables.sets::<F>()) {
        for way in 0..WAYS as u32 {
            let hop = F::return_hop(tables, set, Slot { set: index, way });
            if let Some(hop) = hop.filter(|_| !Meta(F::meta(set, way).load()).is(Kind::Free)) {
                named.insert(usize::from(hop.load()));
            }
        }
    }
}
