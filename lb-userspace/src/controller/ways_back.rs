//! The ways back to clients that the data path has learned: kept true as neighbours move, forgotten when no flow needs
//! them, found for flows that the table had no place for.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
};

use futures_util::future::join_all;

use super::Controller;
use crate::{
    dataplane::{LEARNED_HOPS_MAX, Unremembered},
    network::{Mac, NextHop, display_mac},
};

/// Flows that a way back is found for in a second: a hundred questions to the kernel take it a few milliseconds.
const FOUND_A_SECOND: usize = 128;
/// Shares of the table, in per cent, that the operator is told of.
const WARNED_AT: [usize; 2] = [70, 90];
/// How far below such a share the table must fall before it is news again, in per cent.
const SLACK: usize = 5;

/// The ways back to clients that the data path has learned, and whose they are.
#[derive(Debug, Default)]
pub(super) struct LearnedHops {
    /// By index of the entry.
    owners: HashMap<usize, Owned>,
    /// The share that was warned of last; 0: none.
    warned: usize,
    /// How often a neighbour had found no place when last looked at.
    overflows: u64,
    /// There were flows without a way back, and there may be more.
    unremembered: bool,
}

/// An entry whose MAC address was seen in the kernel's table.
#[derive(Debug)]
struct Owned {
    mac: Mac,
    port: usize,
    /// The neighbours that it belonged to.
    neighbours: Vec<IpAddr>,
}

/// An entry of the data path's table: index, MAC address and number of the port.
pub(super) type Entry = (usize, Mac, usize);

impl LearnedHops {
    /// Looks at the `entries` against the kernel's `neighbours` (interface, address, MAC address); `interfaces` has
    /// the interface of each port. Returns the entries that must be changed, as they must be.
    ///
    /// An entry is changed when no neighbour on its link has its MAC address any more and the neighbour that had it now has
    /// another. A neighbour that merely left the kernel's table may well be there. What is known of an index goes with
    /// its entry: the next one there is another neighbour's.
    pub(super) fn review(
        &mut self,
        entries: &[Entry],
        interfaces: &[u32],
        neighbours: &[(u32, IpAddr, Mac)],
    ) -> Vec<Entry> {
        let mut by_mac: HashMap<(u32, Mac), Vec<IpAddr>> = HashMap::new();
        let mut by_address = HashMap::new();
        for (interface, address, mac) in neighbours {
            by_mac.entry((*interface, *mac)).or_default().push(*address);
            by_address.insert((*interface, *address), *mac);
        }
        let current: HashSet<Entry> = entries.iter().copied().collect();
        self.owners.retain(|index, owned| current.contains(&(*index, owned.mac, owned.port)));
        let mut corrections = Vec::new();
        for (index, mac, port) in entries {
            let Some(interface) = interfaces.get(*port) else { continue };
            if let Some(neighbours) = by_mac.get(&(*interface, *mac)) {
                let owned = Owned { mac: *mac, port: *port, neighbours: neighbours.clone() };
                self.owners.insert(*index, owned);
                continue;
            }
            let Some(owned) = self.owners.get_mut(index) else { continue };
            let mut moved = owned.neighbours.iter().filter_map(|owner| by_address.get(&(*interface, *owner)));
            if let Some(now) = moved.next() {
                owned.mac = *now;
                corrections.push((*index, *now, *port));
            }
        }
        corrections
    }

    /// These indexes are no neighbour's any more.
    fn forget(&mut self, indexes: &[usize]) {
        for index in indexes {
            self.owners.remove(index);
        }
    }

    /// The share of the table, in per cent, to be warned of now that `taken` of [`LEARNED_HOPS_MAX`] places are taken. Once
    /// for each time that it is reached.
    fn news(&mut self, taken: usize) -> Option<usize> {
        let reaches = |share: &usize| taken * 100 >= share * LEARNED_HOPS_MAX;
        let reached = WARNED_AT.into_iter().filter(reaches).max().unwrap_or(0);
        if reached > self.warned {
            self.warned = reached;
            return Some(reached);
        }
        // A table that fills and empties around a share is told of once.
        let stays = |share: &usize| *share <= self.warned && reaches(&(share - SLACK));
        self.warned = WARNED_AT.into_iter().filter(stays).max().unwrap_or(0);
        None
    }
}

impl Controller {
    /// Gives entries whose neighbour has another MAC address now the new one.
    pub(super) fn correct_learned_hops(&mut self) {
        let entries = self.dataplane.learned_hops();
        let neighbours = self.network.neighbours();
        for (index, mac, port) in self.learned.review(&entries, &self.ports.interfaces(), &neighbours) {
            tracing::info!(
                "a neighbour that replies to clients leave by has the MAC address {} now",
                display_mac(&mac)
            );
            self.dataplane.correct_learned_hop(index, (mac, port));
        }
    }

    /// Forgets the entries that no flow needs, and says when the table fills up.
    pub(super) fn age_learned_hops(&mut self) {
        match self.dataplane.age_learned_hops() {
            Ok(forgotten) => self.learned.forget(&forgotten),
            Err(error) => tracing::warn!("cannot forget ways back to clients: {error}"),
        }
        let taken = self.dataplane.learned_hops().len();
        if let Some(share) = self.learned.news(taken) {
            tracing::warn!(
                "clients come from {taken} neighbours, {share} % of the {LEARNED_HOPS_MAX} that can be remembered; replies to                  further ones go by the routing table. Put a router between the load balancer and the clients"
            );
        }
    }

    /// Finds the way back to clients whose neighbours the table had no place for, some of them each second. Without one
    /// their replies ask the kernel's routing table, which answers only on hosts that forward.
    pub(super) async fn find_ways_back(&mut self) {
        match self.dataplane.next_hop_overflows() {
            Ok(count) => {
                self.learned.unremembered |= count != self.learned.overflows;
                self.learned.overflows = count;
            }
            Err(error) => tracing::warn!("cannot see whether clients' neighbours are remembered: {error}"),
        }
        if !self.learned.unremembered || !self.config.forwards_packets() {
            return;
        }
        let flows = self.dataplane.unremembered_flows(FOUND_A_SECOND);
        self.learned.unremembered = !flows.is_empty();
        let mut ends: BTreeMap<(IpAddr, IpAddr), Vec<Unremembered>> = BTreeMap::new();
        for flow in flows {
            ends.entry((flow.listener, flow.client)).or_default().push(flow);
        }
        let network = self.network.clone();
        let asked = ends.keys().map(|(listener, client)| network.next_hop(Some(*listener), *client));
        let answers = join_all(asked).await;
        for (((_, client), flows), answer) in ends.into_iter().zip(answers) {
            match answer.map_err(|error| error.to_string()).and_then(|next| self.way_by(&next)) {
                // The kernel has asked for it: one of the next seconds.
                Ok(None) => {}
                Ok(Some(hop)) => {
                    for flow in &flows {
                        self.dataplane.remember_next_hop(flow, hop);
                    }
                }
                Err(reason) => tracing::debug!("the way back to client {client}: {reason}"),
            }
        }
    }

    /// A next hop as the data path has it; None: its MAC address is not known yet.
    fn way_by(&mut self, next: &NextHop) -> Result<Option<(Mac, usize)>, String> {
        let known = self.ports.interfaces().len();
        let port = self.number_or_append(&next.port)?;
        if self.ports.interfaces().len() > known {
            self.write_ports();
        }
        Ok(next.mac.map(|mac| (mac, port)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Mac = [2, 0, 0, 0, 0, 1];
    const NEW: Mac = [2, 0, 0, 0, 0, 2];
    const OTHER: Mac = [2, 0, 0, 0, 0, 3];

    fn neighbour(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    #[test]
    fn replies_follow_a_router_that_has_a_new_mac_address() {
        let mut learned = LearnedHops::default();
        let entry = [(7, OLD, 0)];
        let before = [(2, neighbour(1), OLD), (2, neighbour(5), OTHER)];
        assert_eq!(learned.review(&entry, &[2], &before), []);
        let after = [(2, neighbour(1), NEW), (2, neighbour(5), OTHER)];
        assert_eq!(learned.review(&entry, &[2], &after), [(7, NEW, 0)]);
        assert_eq!(learned.review(&[(7, NEW, 0)], &[2], &after), []);
    }

    #[test]
    fn replies_follow_a_router_that_moves_twice() {
        const THIRD: Mac = [2, 0, 0, 0, 0, 4];
        let mut learned = LearnedHops::default();
        let at = |mac| [(2, neighbour(1), mac)];
        assert_eq!(learned.review(&[(7, OLD, 0)], &[2], &at(OLD)), []);
        assert_eq!(learned.review(&[(7, OLD, 0)], &[2], &at(NEW)), [(7, NEW, 0)]);
        assert_eq!(learned.review(&[(7, NEW, 0)], &[2], &at(THIRD)), [(7, THIRD, 0)]);
    }

    #[test]
    fn an_entry_stays_while_some_neighbour_has_its_mac_address_or_none_is_known_to_have_moved() {
        let mut learned = LearnedHops::default();
        let entry = [(7, OLD, 0)];
        let both = [(2, neighbour(1), OLD), (2, neighbour(2), OLD)];
        assert_eq!(learned.review(&entry, &[2], &both), []);
        let one_moved = [(2, neighbour(1), NEW), (2, neighbour(2), OLD)];
        assert_eq!(learned.review(&entry, &[2], &one_moved), [], "the other address is still there");
        assert_eq!(learned.review(&entry, &[2], &[]), [], "forgotten by the kernel, not gone");
        let elsewhere = [(3, neighbour(2), NEW)];
        assert_eq!(learned.review(&entry, &[2], &elsewhere), [], "the same address on another link");
        assert_eq!(
            LearnedHops::default().review(&entry, &[2], &one_moved[..1]),
            [],
            "never seen: a stranger"
        );
    }

    #[test]
    fn an_index_that_is_used_again_is_not_its_former_owners() {
        let owner = [(2, neighbour(1), OLD)];
        let moved = [(2, neighbour(1), NEW)];
        // A stranger that the kernel does not know has the index at the next look.
        let mut learned = LearnedHops::default();
        assert_eq!(learned.review(&[(7, OLD, 0)], &[2], &owner), []);
        assert_eq!(learned.review(&[(7, OTHER, 0)], &[2], &moved), []);
        // The same MAC address, learned anew behind another port.
        let mut learned = LearnedHops::default();
        assert_eq!(learned.review(&[(7, OLD, 0)], &[2, 3], &owner), []);
        let there = [(3, neighbour(1), NEW)];
        assert_eq!(learned.review(&[(7, OLD, 1)], &[2, 3], &there), []);
        // The index was empty between.
        let mut learned = LearnedHops::default();
        assert_eq!(learned.review(&[(7, OLD, 0)], &[2], &owner), []);
        learned.forget(&[7]);
        assert_eq!(learned.review(&[(7, OLD, 0)], &[2], &moved), []);
        assert!(learned.owners.is_empty());
    }

    #[test]
    fn a_table_that_fills_up_is_told_of_once_at_each_share() {
        let mut learned = LearnedHops::default();
        let mut news = |per_cent: usize| learned.news((per_cent * LEARNED_HOPS_MAX).div_ceil(100));
        let told = [69, 70, 71, 69, 70, 89, 90, 95, 86, 90, 84, 90, 64, 91, 0, 70];
        let told = told.map(|share| (share, news(share)));
        let heard: Vec<_> = told.into_iter().filter_map(|(at, share)| Some((at, share?))).collect();
        assert_eq!(heard, [(70, 70), (90, 90), (90, 90), (91, 90), (70, 70)]);
    }
}
