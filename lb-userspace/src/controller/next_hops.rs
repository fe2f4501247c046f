//! Where frames to backends and back to clients go first, as neighbours come, go and change. Pure.

use std::{collections::HashMap, net::IpAddr};

use crate::network::{Mac, display_mac};

/// Where a backend's packets go first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Not found out yet.
    Unknown,
    /// To this neighbour.
    Known(Hop),
    /// To where the neighbour was: it does not answer any more. That may be a lost ARP request, and a host that is
    /// really gone loses nothing by it.
    Kept(Hop),
    /// Nowhere, for this reason.
    Lost(String),
}

/// A neighbour on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hop {
    /// The backend itself, or a router.
    pub(super) neighbour: IpAddr,
    /// Number of the port it is behind.
    pub(super) port: usize,
    /// Its MAC address.
    pub(super) mac: Mac,
}

/// What was found out about the way to a backend.
#[derive(Clone, Debug)]
pub(super) enum Found {
    /// The neighbour answers.
    Hop(Hop),
    /// The neighbour has not answered, yet or any more.
    NoAnswer {
        /// The backend itself, or a router.
        neighbour: IpAddr,
        /// Number of the port it should be behind.
        port: usize,
    },
    /// There is no way.
    Lost(String),
}

impl Way {
    /// The way after something was found out.
    pub(super) fn after(&self, found: Found) -> Self {
        match found {
            Found::Hop(hop) => Self::Known(hop),
            Found::Lost(reason) => Self::Lost(reason),
            Found::NoAnswer { neighbour, port } => match self {
                Self::Known(hop) | Self::Kept(hop) if (hop.neighbour, hop.port) == (neighbour, port) => {
                    Self::Kept(*hop)
                }
                _ => Self::Unknown,
            },
        }
    }

    /// What is written into the data path: MAC address and port.
    pub(super) fn next_hop(&self) -> Option<(Mac, usize)> {
        match self {
            Self::Known(hop) | Self::Kept(hop) => Some((hop.mac, hop.port)),
            Self::Unknown | Self::Lost(_) => None,
        }
    }

    /// Number of the port that its packets leave by.
    pub(super) fn port(&self) -> Option<usize> {
        self.next_hop().map(|(_, port)| port)
    }

    /// A line for the log about a change from `before`, and whether it is bad news. A way found for the first time is
    /// no news.
    pub(super) fn news(&self, before: &Self) -> Option<(String, bool)> {
        let to = |hop: &Hop| format!("{} at {}", hop.neighbour, display_mac(&hop.mac));
        match (before, self) {
            (before, after) if before == after => None,
            (Self::Unknown, Self::Known(_)) => None,
            (_, Self::Known(hop)) => Some((format!("its next hop is {}", to(hop)), false)),
            (_, Self::Kept(hop)) => Some((
                format!("its next hop {} does not answer any more; packets still go there", to(hop)),
                true,
            )),
            (_, Self::Lost(reason)) => Some((format!("there is no way to it: {reason}"), true)),
            (_, Self::Unknown) => {
                Some(("its next hop has changed, and does not answer yet".to_owned(), true))
            }
        }
    }
}

/// The ways back to clients that the data path has learned, and whose they are.
#[derive(Debug, Default)]
pub(super) struct LearnedHops {
    /// The neighbours that an entry's MAC address belonged to when it was last seen, by index of the entry.
    owners: HashMap<usize, Vec<IpAddr>>,
}

/// An entry of the data path's table: index, MAC address and number of the port.
pub(super) type Entry = (usize, Mac, usize);

impl LearnedHops {
    /// Looks at the `entries` against the kernel's `neighbours` (interface, address, MAC address); `interfaces` has
    /// the interface of each port. Returns the entries that must be changed, as they must be.
    ///
    /// An entry is changed when nobody on its link has its MAC address any more and the neighbour who had it now has
    /// another. A neighbour that merely left the kernel's table may well be there.
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
        let mut corrections = Vec::new();
        for (index, mac, port) in entries {
            let Some(interface) = interfaces.get(*port) else { continue };
            if let Some(owners) = by_mac.get(&(*interface, *mac)) {
                self.owners.insert(*index, owners.clone());
                continue;
            }
            let owners = self.owners.get(index).into_iter().flatten();
            if let Some(now) = owners.filter_map(|owner| by_address.get(&(*interface, *owner))).next() {
                corrections.push((*index, *now, *port));
            }
        }
        corrections
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

    fn hop(mac: Mac) -> Hop {
        Hop { neighbour: neighbour(1), port: 0, mac }
    }

    #[test]
    fn a_neighbour_that_stops_answering_keeps_its_packets_until_the_route_changes() {
        let silent = |port| Found::NoAnswer { neighbour: neighbour(1), port };
        let way = Way::Unknown.after(silent(0));
        assert_eq!(way, Way::Unknown);
        let known = way.after(Found::Hop(hop(OLD)));
        assert_eq!(known.news(&way), None, "as it should be");
        let kept = known.after(silent(0));
        assert_eq!(kept.next_hop(), Some((OLD, 0)));
        assert!(kept.news(&known).unwrap().1);
        assert_eq!(kept.after(silent(0)).news(&kept), None, "said once");
        assert_eq!(kept.after(silent(1)).next_hop(), None, "another link, another neighbour");
        let back = kept.after(Found::Hop(hop(NEW)));
        assert_eq!(back.next_hop(), Some((NEW, 0)));
        let (line, bad) = back.news(&kept).unwrap();
        assert!(!bad && line.contains("02:00:00:00:00:02"), "{line}");
    }

    #[test]
    fn without_a_route_there_is_no_next_hop() {
        let known = Way::Known(hop(OLD));
        let lost = known.after(Found::Lost("no route".to_owned()));
        assert_eq!(lost.next_hop(), None);
        assert_eq!(lost.news(&known).unwrap(), ("there is no way to it: no route".to_owned(), true));
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
    fn an_entry_stays_while_somebody_has_its_mac_address_or_nobody_is_known_to_have_moved() {
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
}
