//! What a segment makes of its flow's state. Pure: the caller does the atomic part.
//!
//! The states are those of RFC 9293 §3.3.2 as far as a third party can tell them apart: *half-open* is SYN-SENT and
//! SYN-RECEIVED, *closed by* one of the two ends is TIME-WAIT at that end, and *killed* is CLOSED at both.
//!
//! RST, FIN and SYN are not believed on their own: anyone can forge them, and a backend ignores one that is outside its
//! window (RFC 5961 §3). They are noted, and the flow goes on being forwarded. Only a segment that the backend sends
//! *after* the handshake proves anything. So a forged segment frees nothing.

use crate::{
    headers::tcp_flag,
    meta::{BACKEND_FIN, BACKEND_TOLD, CLIENT_ACK, CLIENT_FIN, Kind, Meta, RESET, SYN_ACK},
    parse::Segment,
};

/// Units (about seconds) without a segment after which a slot that saw a RST may be reused.
pub const RESET_QUARANTINE: u16 = 10;

/// What a segment does to the slot's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transition {
    /// The state stays.
    Unchanged,
    /// The state stays; these flags are set.
    SetFlags(u32),
    /// A FIN: this side's flag is set. If the other side's is set already, both have closed.
    Fin {
        /// This side's flag.
        flag: u32,
        /// The other side's.
        other: u32,
        /// The state when both are set.
        closed: Kind,
    },
    /// The word becomes this one, if it has not changed since it was examined.
    Enter(Meta),
    /// A SYN in TIME-WAIT or CLOSED: a new flow of the same tuple takes the slot.
    NewConnection,
    /// A SYN in SYN-SENT: sent to the flow's backend again; if that takes no new flows any more, to another.
    SynRetransmitted,
    /// A SYN a moment after a RST: sent to the flow's backend, which knows whether the RST was real; but a new flow if
    /// that backend takes no new ones any more. (A client that closes in a hurry ends with a RST, has no TIME-WAIT, and
    /// uses its port again within seconds.)
    SynAfterReset,
    /// The backend's RST in SYN-SENT: it refused the SYN. Another backend may not.
    ConnectionRefused,
    /// A segment in CLOSED: the flow was reset on purpose, and the segment is answered with a RST.
    AnswerWithReset,
}

/// After a segment of the client.
#[inline(always)]
#[must_use]
pub const fn client(meta: Meta, segment: &Segment, now: u16) -> Transition {
    // CLOSED (RFC 9293 §3.10.7.1).
    if meta.is(Kind::Killed) {
        return if segment.opens() {
            Transition::NewConnection
        } else {
            closed(segment, Transition::Unchanged)
        };
    }
    // SYN received.
    if segment.opens() {
        return if meta.is(Kind::HalfOpen) {
            // SYN-SENT, SYN-RECEIVED: the client has had no answer.
            Transition::SynRetransmitted
        } else if meta.is_closed() || (meta.has(RESET) && meta.age(now) >= RESET_QUARANTINE) {
            // TIME-WAIT (§3.10.7.4: a new SYN may reopen the connection).
            Transition::NewConnection
        } else if meta.has(RESET) {
            Transition::SynAfterReset
        } else {
            // ESTABLISHED: the backend answers with a challenge ACK (RFC 5961 §4).
            Transition::Unchanged
        };
    }
    // RST received.
    if segment.has(tcp_flag::RST) {
        // SYN-SENT: all that is heard of the end of a flow to a backend that is this host, whose own segments are not seen.
        let unanswered = meta.is(Kind::HalfOpen) && !meta.has(SYN_ACK);
        return if meta.is(Kind::Established) && !meta.has(RESET) {
            Transition::SetFlags(RESET)
        } else if unanswered && !meta.has(CLIENT_FIN) {
            Transition::SetFlags(CLIENT_FIN)
        } else {
            Transition::Unchanged
        };
    }
    // FIN received.
    if segment.has(tcp_flag::FIN) && !meta.has(CLIENT_FIN) && !meta.is_closed() {
        return Transition::Fin { flag: CLIENT_FIN, other: BACKEND_FIN, closed: Kind::ClosedByBackend };
    }
    // SYN-RECEIVED, ACK received: the client has had the SYN-ACK.
    if meta.is(Kind::HalfOpen) && meta.has(SYN_ACK) && !meta.has(CLIENT_ACK) && segment.has(tcp_flag::ACK) {
        return Transition::SetFlags(CLIENT_ACK);
    }
    Transition::Unchanged
}

/// After a segment of the backend.
#[inline(always)]
#[must_use]
pub const fn backend(meta: Meta, segment: &Segment) -> Transition {
    // CLOSED (RFC 9293 §3.10.7.1).
    if meta.is(Kind::Killed) {
        return closed(segment, Transition::Enter(meta.with(BACKEND_TOLD)));
    }
    // RST received.
    if segment.has(tcp_flag::RST) {
        return if meta.is(Kind::HalfOpen) && !meta.has(SYN_ACK) {
            // SYN-SENT (§3.10.7.3).
            Transition::ConnectionRefused
        } else if !meta.is_closed() && !meta.has(RESET) {
            Transition::SetFlags(RESET)
        } else {
            Transition::Unchanged
        };
    }
    // SYN-ACK received.
    if segment.has(tcp_flag::SYN) {
        return if meta.is(Kind::HalfOpen) && !meta.has(SYN_ACK) {
            Transition::SetFlags(SYN_ACK)
        } else {
            Transition::Unchanged
        };
    }
    // SYN-RECEIVED, any segment after the client's ACK: the backend is in ESTABLISHED. A FIN proves it as well: that of a
    // backend that answers and closes.
    if meta.is(Kind::HalfOpen) && meta.has(SYN_ACK | CLIENT_ACK) {
        return Transition::Enter(meta.become_kind(Kind::Established).without(RESET));
    }
    // FIN received.
    if segment.has(tcp_flag::FIN) {
        return if !meta.has(BACKEND_FIN) && !meta.is_closed() {
            Transition::Fin { flag: BACKEND_FIN, other: CLIENT_FIN, closed: Kind::ClosedByClient }
        } else {
            Transition::Unchanged
        };
    }
    // ESTABLISHED, a segment after a RST: the RST was not believed by its receiver.
    if meta.is(Kind::Established) && meta.has(RESET) {
        return Transition::Enter(meta.without(RESET));
    }
    // TIME-WAIT, and the backend sends data: one of the two FINs was forged. Where a RST that was not contradicted for a
    // while closed the flow, any segment of the backend reopens it: a bare ACK answers a keepalive.
    if meta.is_closed() && (segment.payload > 0 || meta.is_closed_by_reset()) {
        return Transition::Enter(meta.become_kind(Kind::Established).without(BACKEND_FIN | RESET));
    }
    Transition::Unchanged
}

/// After a segment of a flow that was reset on purpose. A RST is never answered (RFC 9293 §3.10.7.1), but sent on: the
/// other side should hear it. The backend's own RST says that it has forgotten the flow: that is `on_reset`.
#[inline(always)]
const fn closed(segment: &Segment, on_reset: Transition) -> Transition {
    if segment.has(tcp_flag::RST) { on_reset } else { Transition::AnswerWithReset }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SYN: u8 = tcp_flag::SYN;
    const ACK: u8 = tcp_flag::ACK;
    const FIN: u8 = tcp_flag::FIN;
    const RST: u8 = tcp_flag::RST;

    fn segment(flags: u8, payload: usize) -> Segment {
        Segment { valid: true, flags, sequence: 1, acknowledgement: 1, payload }
    }

    /// The word after a transition, as one CPU alone would leave it.
    fn apply(meta: Meta, transition: Transition) -> Meta {
        match transition {
            Transition::Unchanged
            | Transition::SynRetransmitted
            | Transition::SynAfterReset
            | Transition::AnswerWithReset => meta,
            Transition::SetFlags(flags) => meta.with(flags),
            Transition::Fin { flag, other, closed } if meta.has(other) => meta.with(flag).become_kind(closed),
            Transition::Fin { flag, .. } => meta.with(flag),
            Transition::Enter(next) => next,
            Transition::NewConnection => Meta::new(Kind::HalfOpen, meta.backend(), meta.seen()),
            Transition::ConnectionRefused => meta.become_kind(Kind::ClosedByClient),
        }
    }

    fn after(mut meta: Meta, story: &[(char, u8, usize)]) -> Meta {
        for (side, flags, payload) in story {
            let segment = segment(*flags, *payload);
            let transition = if *side == 'c' { client(meta, &segment, 0) } else { backend(meta, &segment) };
            meta = apply(meta, transition);
        }
        meta
    }

    const HALF_OPEN: Meta = Meta::new(Kind::HalfOpen, 7, 0);
    const HANDSHAKE: &[(char, u8, usize)] =
        &[('b', SYN | ACK, 0), ('c', ACK, 0), ('c', ACK, 200), ('b', ACK, 0)];

    #[test]
    fn a_handshake_alone_proves_nothing_the_backends_next_segment_does() {
        for length in 0..HANDSHAKE.len() {
            assert!(after(HALF_OPEN, &HANDSHAKE[..length]).is(Kind::HalfOpen));
        }
        assert!(after(HALF_OPEN, HANDSHAKE).is(Kind::Established));
    }

    #[test]
    fn who_closes_first_decides_the_quarantine() {
        let flow = after(HALF_OPEN, HANDSHAKE);
        let by_client =
            after(flow, &[('c', FIN | ACK, 0), ('b', ACK, 0), ('b', FIN | ACK, 0), ('c', ACK, 0)]);
        assert!(by_client.is(Kind::ClosedByClient));
        let by_backend =
            after(flow, &[('b', FIN | ACK, 0), ('c', ACK, 0), ('c', FIN | ACK, 0), ('b', ACK, 0)]);
        assert!(by_backend.is(Kind::ClosedByBackend));
    }

    #[test]
    fn one_fin_keeps_a_half_closed_stream() {
        let flow =
            after(after(HALF_OPEN, HANDSHAKE), &[('c', FIN | ACK, 0), ('b', ACK, 1000), ('c', ACK, 0)]);
        assert!(flow.is(Kind::Established));
    }

    #[test]
    fn blind_segments_free_nothing_and_the_backend_clears_them() {
        let flow = after(HALF_OPEN, HANDSHAKE);
        let blind = after(flow, &[('c', RST, 0), ('c', FIN, 0), ('c', SYN, 0)]);
        assert!(blind.is(Kind::Established), "{blind:?}");
        assert!(!after(blind, &[('b', ACK, 100)]).has(RESET));
        let both = after(flow, &[('c', FIN | ACK, 0), ('b', FIN | ACK, 0)]);
        assert!(both.is_closed() && both.is_live(), "still forwarded");
        assert!(after(both, &[('b', ACK, 100)]).is(Kind::Established));
        assert!(after(both, &[('b', ACK, 0)]).is_closed(), "of the last FIN");
    }

    #[test]
    fn a_flow_that_was_taken_for_reset_goes_on_when_its_backend_does() {
        let flow = after(HALF_OPEN, HANDSHAKE);
        for reset in [&[('c', RST, 0)][..], &[('b', RST, 0)], &[('c', FIN | ACK, 0), ('c', RST, 0)]] {
            let over = after(flow, reset).closed_by_reset();
            assert!(over.is_closed() && over.is_live());
            assert!(after(over, &[('c', ACK, 10), ('b', RST, 0)]).is_closed(), "no proof");
            let back = after(over, &[('b', ACK, 0)]);
            assert!(back.is(Kind::Established) && !back.has(RESET), "{reset:?}");
        }
        let ended = after(flow, &[('c', FIN | ACK, 0), ('b', FIN | ACK, 0), ('c', RST, 0)]);
        assert!(after(ended, &[('b', ACK, 0)]).is_closed(), "it was over before");
        let hurried = after(flow, &[('b', FIN | ACK, 0), ('c', RST, 0)]);
        let ended = after(hurried, &[('c', FIN | ACK, 0)]);
        assert!(after(ended, &[('b', ACK, 0)]).is_closed(), "both have ended it");
    }

    #[test]
    fn a_client_may_give_up_in_the_handshake_and_keep_its_slot() {
        assert_eq!(client(HALF_OPEN, &segment(RST, 0), 0), Transition::SetFlags(CLIENT_FIN));
        assert_eq!(client(HALF_OPEN.with(SYN_ACK), &segment(RST, 0), 0), Transition::Unchanged);
        assert_eq!(client(HALF_OPEN, &segment(SYN, 0), 0), Transition::SynRetransmitted);
    }

    #[test]
    fn a_closed_slot_is_reopened_by_its_own_tuple() {
        for kind in [Kind::ClosedByClient, Kind::ClosedByBackend] {
            assert_eq!(client(Meta::new(kind, 7, 0), &segment(SYN, 0), 1), Transition::NewConnection);
        }
        let reset = Meta::new(Kind::Established, 7, 0).with(RESET);
        assert_eq!(client(reset, &segment(SYN, 0), RESET_QUARANTINE - 1), Transition::SynAfterReset);
        assert_eq!(client(reset, &segment(SYN, 0), RESET_QUARANTINE), Transition::NewConnection);
    }

    const KILLED: Meta = Meta::new(Kind::Killed, 7, 0);

    #[test]
    fn both_sides_of_a_killed_flow_are_answered_and_a_rst_never_is() {
        for flags in [0, ACK, FIN | ACK, SYN | ACK, FIN, 0x18] {
            assert_eq!(client(KILLED, &segment(flags, 3), 0), Transition::AnswerWithReset, "{flags:#x}");
            assert_eq!(backend(KILLED, &segment(flags, 3)), Transition::AnswerWithReset, "{flags:#x}");
        }
        for flags in [RST, RST | ACK, RST | SYN] {
            assert_eq!(client(KILLED, &segment(flags, 0), 0), Transition::Unchanged);
            assert_eq!(backend(KILLED, &segment(flags, 0)), Transition::Enter(KILLED.with(BACKEND_TOLD)));
        }
        assert_eq!(
            client(KILLED, &segment(SYN, 0), 0),
            Transition::NewConnection,
            "the same tuple begins anew"
        );
    }

    proptest! {
        /// What was killed stays killed, whoever says what, until its own tuple begins anew.
        #[test]
        fn nothing_but_a_syn_brings_a_killed_flow_back(
            story in proptest::collection::vec((any::<bool>(), 0u8..32, 0usize..2), 0..24),
        ) {
            let quiet: Vec<_> = story.iter()
                .filter(|(client, flags, _)| !*client || *flags & (SYN | ACK | RST | FIN) != SYN)
                .map(|(client, flags, payload)| (if *client { 'c' } else { 'b' }, *flags, *payload)).collect();
            prop_assert!(after(KILLED, &quiet).is(Kind::Killed));
        }

        /// Whatever a forger says in the client's name, or says before the backend has answered the handshake,
        /// no slot becomes established; and nothing at all frees one that is.
        #[test]
        fn only_the_backend_proves_and_nobody_frees(
            story in proptest::collection::vec((any::<bool>(), 0u8..32, 0usize..2), 0..24),
        ) {
            let clients: Vec<_> = story.iter().map(|(_, flags, payload)| ('c', *flags, *payload)).collect();
            prop_assert!(!after(HALF_OPEN, &clients).is(Kind::Established));
            let mixed: Vec<_> = story.iter()
                .map(|(client, flags, payload)| (if *client { 'c' } else { 'b' }, *flags, *payload)).collect();
            let flow = after(after(HALF_OPEN, HANDSHAKE), &mixed);
            prop_assert!(flow.is_live());
            prop_assert_eq!(flow.backend(), 7);
        }
    }
}
