//! Where frames to backends go first, as neighbours come, go and change. Pure.

use std::net::IpAddr;

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

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Mac = [2, 0, 0, 0, 0, 1];
    const NEW: Mac = [2, 0, 0, 0, 0, 2];

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
}
