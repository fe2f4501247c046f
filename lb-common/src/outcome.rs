//! The possible ends of a packet's way: the one list behind the program's verdicts, the counters, the metric names and the
//! documentation.

use crate::list::list;

/// What the kernel is told to do with the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// On to the network stack, untouched.
    Pass,
    /// Out again, rewritten.
    Transmit,
    /// Nowhere.
    Drop,
}

list! {
    outcomes;
    /// What became of a packet. Every packet has exactly one, and every one but the first is a counter.
    Outcome;
    /// Neither for a listener nor a reply of a backend: left to the network stack, untouched. The only one that is not counted.
    NotOurs = Pass, "not_ours";
    /// For a listener, but of no flow of ours and not opening one: left to a local socket, or to the kernel's RST.
    NoFlow = Pass, "no_flow";
    /// From a backend to a slot that is not its own: left to the network stack.
    ReplyUnknown = Pass, "reply_unknown_slot";
    /// For a listener, by an interface or VLAN that is not served: left to the network stack.
    UnknownInterface = Pass, "unknown_interface";
    /// Of a flow whose backend is this host: left to the local socket.
    ForwardedLocal = Pass, "forwarded_local";
    /// From a client to its backend.
    Forwarded = Transmit, "forwarded";
    /// From a backend to its client.
    Replied = Transmit, "replied";
    /// An ICMP error about a flow, translated and sent to the side that must know.
    IcmpTranslated = Transmit, "icmp_translated";
    /// A SYN answered with a RST: the service has no usable backend.
    RefusedNoBackend = Transmit, "refused_no_backend";
    /// A SYN answered with a RST: the client is in none of the service's `allow` prefixes.
    RefusedNotAllowed = Transmit, "refused_not_allowed";
    /// A client's segment of a flow that was reset, answered with an exact RST.
    ResetClient = Transmit, "reset_client";
    /// A backend's segment of a flow that was reset, answered with an exact RST.
    ResetBackend = Transmit, "reset_backend";
    /// A backend's RST to a SYN, swallowed: the client's next SYN goes to another backend.
    SecondChance = Drop, "second_chance";
    /// A SYN for a flow that may have ended by a RST: its backend is asked first, and the client sends another.
    SynDoubted = Drop, "dropped_syn_doubted";
    /// An ICMP error that asks a backend for smaller packets, and quotes nothing that is in flight: anyone can forge it.
    IcmpUnproven = Drop, "dropped_icmp_unproven";
    /// In the name of a flow's backend, by an interface that no backend answers by.
    BackendInterface = Drop, "dropped_backend_interface";
    /// A SYN that found no slot in any of its candidate sets.
    TableFull = Drop, "dropped_table_full";
    /// A SYN whose source has as many slots as one source may have: the client sends another.
    SourceBudget = Drop, "dropped_source_budget";
    /// A SYN that met its own copy on another CPU: the client sends another.
    SynRace = Drop, "dropped_syn_race";
    /// Of no flow, or of one that is yet to be copied from the table of an earlier version: its sender sends it again.
    Held = Drop, "dropped_held";
    /// Of a flow whose way out is not known yet: no route, or no neighbour.
    NextHopUnknown = Drop, "dropped_next_hop_unknown";
    /// With a TTL or hop limit of 1 or 0.
    TtlExpired = Drop, "dropped_ttl_expired";
    /// The first fragment of a segment: flows are not put together here.
    Fragment = Drop, "dropped_fragment";
    /// With more IPv6 extension headers than are looked through.
    ExtensionHeaders = Drop, "dropped_extension_headers";
    /// With headers that contradict each other or the packet's length.
    Malformed = Drop, "dropped_malformed";
    /// With a wrong IPv4 header checksum.
    BadChecksum = Drop, "dropped_bad_checksum";
    /// The driver lent no room to add or remove a VLAN tag, or refused to shorten the packet.
    NoRoom = Drop, "dropped_no_room";
}

list! {
    named;
    /// What happened on the way, beside the packet's [`Outcome`].
    Event;
    /// A new flow was given a slot.
    FlowClaimed, "flows_claimed";
    /// A flow was proven established: its client acknowledged the number of the backend's SYN-ACK.
    FlowEstablished, "flows_established";
    /// A closed slot was reused before its quarantine was over: every candidate was taken.
    ReusedEarly, "slots_reused_early";
    /// A half-open or unproven slot was taken from its flow: every candidate was taken.
    HalfOpenReclaimed, "half_open_reclaimed";
    /// A retransmitted SYN was moved to another backend, as its own takes no new flows any more.
    Rebalanced, "syn_moved";
    /// A segment of a client was forwarded and taught nothing: it acknowledges what its backend has not sent.
    ClientNumbersOdd, "client_numbers_odd";
    /// A segment of a backend was forwarded and taught nothing: its sequence number does not continue the flow.
    BackendNumbersOdd, "backend_numbers_odd";
    /// A backend's SYN-ACK came from another neighbour than the SYN was sent to: by another router, or forged.
    BackendNeighbourOdd, "backend_neighbour_odd";
    /// A RST was forwarded and closed no flow, as its numbers prove nothing: the flow's backend is asked about it.
    ResetDoubted, "resets_doubted";
    /// A client's way back was not remembered: its places in the table of learned next hops are taken.
    NextHopOverflow, "next_hop_overflow";
    /// A connection that a process of this host opened was sent to a backend by the connect hook.
    ConnectRedirected, "connects_redirected";
    /// A connection that a process of this host opened was refused by the connect hook: the service has no usable backend.
    ConnectRefused, "connects_refused";
    /// A connection that the connect hook redirected is counted, but cannot be ended: no more sockets are known by name than there is room for.
    ConnectUnnamed, "connects_unnamed";
}

/// Counters of one service: outcomes, then events.
pub const COUNTERS: usize = Outcome::ALL.len() + Event::ALL.len();

/// A counter's place among one service's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// How many packets ended so.
    Outcome(Outcome),
    /// How often this happened.
    Event(Event),
}

impl Counter {
    /// All of them, in order.
    pub fn all() -> impl Iterator<Item = Self> {
        Outcome::ALL
            .iter()
            .map(|outcome| Self::Outcome(*outcome))
            .chain(Event::ALL.iter().map(|event| Self::Event(*event)))
    }

    /// Its place.
    #[inline(always)]
    #[must_use]
    pub const fn index(self) -> usize {
        match self {
            Self::Outcome(outcome) => outcome as usize,
            Self::Event(event) => Outcome::ALL.len() + event as usize,
        }
    }

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Outcome(outcome) => outcome.name(),
            Self::Event(event) => event.name(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_has_its_own_place_and_name() {
        let mut names: Vec<_> = Counter::all().map(Counter::name).collect();
        assert!(Counter::all().enumerate().all(|(place, counter)| counter.index() == place));
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), COUNTERS);
    }

    #[test]
    fn a_name_says_what_happens_to_the_packet() {
        for outcome in Outcome::ALL {
            let dropped = outcome.name().starts_with("dropped_") || *outcome == Outcome::SecondChance;
            assert_eq!(dropped, outcome.action() == Action::Drop, "{outcome:?}");
        }
    }
}
