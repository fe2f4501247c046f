//! The ways back to clients that the data path has learned, from the daemon's side.

use std::{collections::HashSet, net::IpAddr};

use lb_common::{
    flow::{Family, Slot, V4, V6},
    headers,
    layout::{NEXT_HOPS, NextHop, SERVICES, WAYS, family},
    meta::{Kind, Meta},
    next_hop::{self, BUCKET, UNNAMED},
    outcome::{COUNTERS, Counter, Event},
};

use super::{Dataplane, DataplaneError, Tables, address_of, flows::sets_in_use, grace::Grace, next_hop, sum};

/// Places for neighbours that clients come from.
pub const LEARNED_HOPS_MAX: usize = (NEXT_HOPS - BUCKET) as usize;

/// What is remembered from one look at the learned ways back to the next.
#[derive(Debug, Default)]
pub(super) struct Ageing {
    /// The entries that no slot named at the last look, by index.
    unnamed: HashSet<usize>,
    /// Begun after these were marked.
    grace: Grace,
    /// Where the search for flows without a way back goes on: a number of sets, IPv4's before IPv6's.
    position: usize,
}

/// A flow whose client's neighbour found no place in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unremembered {
    /// Where its replies go.
    pub client: IpAddr,
    /// Where they come from: the listener's address.
    pub listener: IpAddr,
    family: u8,
    slot: Slot,
    /// The parts of its tuple: client address and port, listener id.
    parts: ([u64; 2], u16, u16),
}

impl Dataplane {
    /// The learned ways back to clients: index, MAC address and the number of the port.
    pub fn learned_hops(&self) -> Vec<(usize, [u8; 6], usize)> {
        (1..self.next_hops.len())
            .filter_map(|index| {
                let hop = NextHop(self.next_hops.get(index)?.load() & !UNNAMED);
                (hop != NextHop::UNKNOWN).then(|| {
                    let mac = headers::Mac::from_number(hop.mac()).bytes();
                    (index, mac, usize::from(hop.interface()))
                })
            })
            .collect()
    }

    /// Points a learned way back at another neighbour. That one's own packets do not find the entry there, and enter
    /// another; this one is forgotten with the last slot that names it.
    pub fn correct_learned_hop(&self, index: usize, hop: ([u8; 6], usize)) {
        if let Some(entry) = self.next_hops.get(index) {
            entry.store(next_hop(Some(hop)).0);
        }
    }

    /// Marks the ways that no slot names, and forgets those that none named at the last look either. Returns the indexes of
    /// those that were forgotten. For why no packet uses such an index any more see [`lb_common::next_hop`].
    ///
    /// # Errors
    /// When the kernel cannot say that every program that was running has finished: then nothing is forgotten.
    pub fn age_learned_hops(&mut self) -> Result<Vec<usize>, DataplaneError> {
        let config = self.settings();
        // Flows that are still being copied from an earlier table name ways as well.
        if config.hold != 0 {
            return Ok(Vec::new());
        }
        let finished = self.ageing.grace.finish();
        let before = std::mem::take(&mut self.ageing.unnamed);
        finished.map_err(|source| DataplaneError::System { call: "membarrier", source })?;
        let mut named = vec![false; self.next_hops.len()];
        name::<V4>(&self.tables, sets_in_use::<V4>(&config), &mut named);
        name::<V6>(&self.tables, sets_in_use::<V6>(&config), &mut named);
        let mut forgotten = Vec::new();
        for (index, named) in named.into_iter().enumerate() {
            let Some(entry) = self.next_hops.get(index) else { continue };
            let found = entry.load();
            if found == NextHop::UNKNOWN.0 {
                continue;
            }
            if named {
                if found & UNNAMED != 0 {
                    entry.compare_exchange(found, found & !UNNAMED);
                }
            } else if found & UNNAMED != 0 && before.contains(&index) {
                if entry.compare_exchange(found, NextHop::UNKNOWN.0) == found {
                    forgotten.push(index);
                }
            } else {
                // One that another daemon has marked waits as long: this one knows of no grace period since.
                entry.compare_exchange(found, found | UNNAMED);
                self.ageing.unnamed.insert(index);
            }
        }
        if !self.ageing.unnamed.is_empty() {
            self.ageing.grace.begin();
        }
        Ok(forgotten)
    }

    /// How often a client's neighbour found no place, in all.
    ///
    /// # Errors
    /// When the counters cannot be read.
    pub fn next_hop_overflows(&self) -> Result<u64, DataplaneError> {
        let counter = Counter::Event(Event::NextHopOverflow).index() as u32;
        (0..SERVICES).map(|service| sum(&self.counters, "COUNTER", service * COUNTERS as u32 + counter)).sum()
    }

    /// Flows without a learned way back, at most so many. The next call goes on behind these, so that flows for which
    /// nothing can be done do not hide the others.
    pub fn unremembered_flows(&mut self, limit: usize) -> Vec<Unremembered> {
        let config = self.settings();
        let (sets4, sets6) = (sets_in_use::<V4>(&config), sets_in_use::<V6>(&config));
        let start = self.ageing.position;
        let mut found = Vec::new();
        for step in 0..sets4 + sets6 {
            if found.len() >= limit {
                break;
            }
            let position = (start + step) % (sets4 + sets6);
            match position.checked_sub(sets4) {
                None => self.unremembered::<V4>(position as u32, &mut found),
                Some(position) => self.unremembered::<V6>(position as u32, &mut found),
            }
            self.ageing.position = position + 1;
        }
        found
    }

    fn unremembered<F: Family>(&self, index: u32, found: &mut Vec<Unremembered>) {
        let Some(set) = F::set(&self.tables, index) else { return };
        for way in 0..WAYS as u32 {
            let slot = Slot { set: index, way };
            let unknown = F::return_hop(&self.tables, set, slot).is_some_and(|hop| hop.load() == 0);
            if !unknown || !is_answered(Meta(F::meta(set, way).load())) {
                continue;
            }
            let parts = F::parts(F::load(set, way));
            let (client, _, listener_id) = parts;
            let listener = self.listeners.read(usize::from(listener_id));
            found.extend(listener.filter(|it| it.family == F::NUMBER).map(|listener| Unremembered {
                client: address_of(F::NUMBER, client),
                listener: address_of(F::NUMBER, listener.address),
                family: F::NUMBER,
                slot,
                parts,
            }));
        }
    }

    /// Sends the replies of such a flow to this neighbour, unless its client's packets have taught one meanwhile or the slot is
    /// another flow's. Whether that was done: not when the whole table is full.
    pub fn remember_next_hop(&self, flow: &Unremembered, hop: ([u8; 6], usize)) -> bool {
        let index = self.enter_anywhere(next_hop(Some(hop)).0);
        index != 0
            && if flow.family == family::IPV4 {
                self.point::<V4>(flow, index)
            } else {
                self.point::<V6>(flow, index)
            }
    }

    /// Enters a neighbour in its own buckets or, where these are full, in any other: a slot finds it by its index.
    fn enter_anywhere(&self, hop: u64) -> u16 {
        let own = next_hop::enter(&self.settings().key, hop, |index| self.next_hops.get(usize::from(index)));
        if own != 0 || hop == NextHop::UNKNOWN.0 {
            return own;
        }
        let places =
            || (BUCKET as u16..NEXT_HOPS as u16).filter_map(|it| Some((it, self.next_hops.get(it.into())?)));
        let known = places().find(|(_, entry)| {
            // Of the two words of this neighbour either will do; the second becomes the first.
            entry.load() & !UNNAMED == hop && entry.compare_exchange(hop | UNNAMED, hop) & !UNNAMED == hop
        });
        let entered = || places().find(|(_, entry)| entry.compare_exchange(NextHop::UNKNOWN.0, hop) == 0);
        known.or_else(entered).map_or(0, |(index, _)| index)
    }

    /// The slot may be given to another flow between any two of these steps. One that has it when the index is stored is found
    /// by the second comparison; one that has it later finds an index that is not its client's, and replaces it.
    fn point<F: Family>(&self, flow: &Unremembered, index: u16) -> bool {
        let Some(set) = F::set(&self.tables, flow.slot.set) else { return false };
        let Some(hop) = F::return_hop(&self.tables, set, flow.slot) else { return false };
        let way = flow.slot.way;
        let is_same =
            || is_answered(Meta(F::meta(set, way).load())) && F::parts(F::load(set, way)) == flow.parts;
        if !is_same() || hop.compare_exchange(0, index) != 0 {
            return false;
        }
        if !is_same() {
            hop.compare_exchange(index, 0);
            return false;
        }
        true
    }
}

/// Are there replies to the flow's client?
fn is_answered(meta: Meta) -> bool {
    meta.is_live() && !meta.is_closed()
}

/// Notes the ways that slots in use name. A slot that is free still has its last index, but a flow that takes the slot
/// compares the entry with its own neighbour before it relies on that.
fn name<F: Family>(tables: &Tables, sets: usize, named: &mut [bool]) {
    for (index, set) in tables.first::<F>(sets) {
        for way in 0..WAYS as u32 {
            let hop = F::return_hop(tables, set, Slot { set: index, way });
            if let Some(hop) = hop.filter(|_| !Meta(F::meta(set, way).load()).is(Kind::Free))
                && let Some(named) = named.get_mut(usize::from(hop.load()))
            {
                *named = true;
            }
        }
    }
}
