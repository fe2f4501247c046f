//! What a segment makes of its flow's state. Pure: the caller does the atomic part.
//!
//! RST, FIN and SYN are not believed on their own: anyone can forge them, and a backend ignores one that is out of
//! its window (RFC 5961 §3). They are noted, the flow goes on being forwarded, and only a segment that the backend
//! sends *after* the handshake proves anything. So a forged segment frees nothing.

use crate::{
    headers::tcp_flag,
    meta::{BACKEND_FIN, BACKEND_TOLD, CLIENT_ACK, CLIENT_FIN, Kind, Meta, RESET, SYN_ACK},
    parse::Segment,
};

/// Units (about seconds) without a segment after which a slot that saw a RST may be reused.
pub const RESET_QUARANTINE: u16 = 10;

/// What to do with the slot's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Keep,
    /// Set flags.
    Set(u32),
    /// Set this side's FIN flag; if the other side's is set already, the flow becomes that kind of closed.
    Finish {
        /// This side's flag.
        flag: u32,
        /// The other side's.
        other: u32,
        /// What the flow becomes when both are set.
        closed: Kind,
    },
    /// Exchange the word for this one, if it has not changed.
    Become(Meta),
    /// A SYN takes the slot for a new flow of the same tuple.
    Reopen,
    /// A SYN goes on to its backend; if that takes no new flows any more, to another.
    Retry,
    /// A SYN on a slot that saw a RST a moment ago: on to its backend, which knows whether the RST was real; but a new
    /// flow if that backend takes no new ones any more. (A client that closes in a hurry ends with a RST, has no
    /// TIME_WAIT, and uses its port again within seconds.)
    Return,
    /// A backend refused a SYN: another one may not.
    Refused,
    /// The flow was reset on purpose: the segment is answered with a RST.
    Answer,
}

/// After a segment of the client.
#[inline(always)]
#[must_use]
pub const fn client(meta: Meta, segment: &Segment, now: u16) -> Step {
    if meta.is(Kind::Killed) {
        return if segment.opens() { Step::Reopen } else { killed(segment, Step::Keep) };
    }
    if segment.opens() {
        return if meta.is(Kind::HalfOpen) {
            Step::Retry
        } else if meta.is_closed() || (meta.has(RESET) && meta.age(now) >= RESET_QUARANTINE) {
            Step::Reopen
        } else if meta.has(RESET) {
            Step::Return
        } else {
            Step::Keep
        };
    }
    if segment.has(tcp_flag::RST) {
        // All that is heard of the end of a flow to a backend that is this host, whose own segments are not seen.
        let unanswered = meta.is(Kind::HalfOpen) && !meta.has(SYN_ACK);
        return if meta.is(Kind::Established) && !meta.has(RESET) {
            Step::Set(RESET)
        } else if unanswered && !meta.has(CLIENT_FIN) {
            Step::Set(CLIENT_FIN)
        } else {
            Step::Keep
        };
    }
    if segment.has(tcp_flag::FIN) && !meta.has(CLIENT_FIN) && !meta.is_closed() {
        return Step::Finish { flag: CLIENT_FIN, other: BACKEND_FIN, closed: Kind::ClosedByBackend };
    }
    if meta.is(Kind::HalfOpen) && meta.has(SYN_ACK) && !meta.has(CLIENT_ACK) && segment.has(tcp_flag::ACK) {
        return Step::Set(CLIENT_ACK);
    }
    Step::Keep
}

/// After a segment of the backend.
#[inline(always)]
#[must_use]
pub const fn backend(meta: Meta, segment: &Segment) -> Step {
    if meta.is(Kind::Killed) {
        return killed(segment, Step::Become(meta.with(BACKEND_TOLD)));
    }
    if segment.has(tcp_flag::RST) {
        return if meta.is(Kind::HalfOpen) && !meta.has(SYN_ACK) {
            Step::Refused
        } else if !meta.is_closed() && !meta.has(RESET) {
            Step::Set(RESET)
        } else {
            Step::Keep
        };
    }
    if segment.has(tcp_flag::SYN) {
        return if meta.is(Kind::HalfOpen) && !meta.has(SYN_ACK) { Step::Set(SYN_ACK) } else { Step::Keep };
    }
    // The proof, whatever else the segment says: the FIN of a backend that answers and closes is one, too.
    if meta.is(Kind::HalfOpen) && meta.has(SYN_ACK | CLIENT_ACK) {
        return Step::Become(meta.become_kind(Kind::Established).without(RESET));
    }
    if segment.has(tcp_flag::FIN) {
        return if !meta.has(BACKEND_FIN) && !meta.is_closed() {
            Step::Finish { flag: BACKEND_FIN, other: CLIENT_FIN, closed: Kind::ClosedByClient }
        } else {
            Step::Keep
        };
    }
    if meta.is(Kind::Established) && meta.has(RESET) {
        return Step::Become(meta.without(RESET));
    }
    // Both FINs seen, and yet the backend has more to say: one of them was not its own. Where it was a RST that nobody
    // contradicted for a while, whatever the backend says does: a bare ACK answers a keepalive.
    if meta.is_closed() && (segment.payload > 0 || meta.is_closed_by_reset()) {
        return Step::Become(meta.become_kind(Kind::Established).without(BACKEND_FIN | RESET));
    }
    Step::Keep
}

/// After a segment of a flow that was reset on purpose. A RST is never answered, but sent on: it is what the other side
/// should hear, too. The backend's own says that it has forgotten the flow, which is `told`.
#[inline(always)]
const fn killed(segment: &Segment, told: Step) -> Step {
    if segment.has(tcp_flag::RST) { told } else { Step::Answer }
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

    /// The word after a step, as one CPU alone would leave it.
    fn apply(meta: Meta, step: Step) -> Meta {
        match step {
            Step::Keep | Step::Retry | Step::Return | Step::Answer => meta,
            Step::Set(flags) => meta.with(flags),
            Step::Finish { flag, other, closed } if meta.has(other) => meta.with(flag).become_kind(closed),
            Step::Finish { flag, .. } => meta.with(flag),
            Step::Become(next) => next,
            Step::Reopen => Meta::new(Kind::HalfOpen, meta.backend(), meta.seen()),
            Step::Refused => meta.become_kind(Kind::ClosedByClient),
        }
    }

    fn after(mut meta: Meta, story: &[(char, u8, usize)]) -> Meta {
        for (side, flags, payload) in story {
            let segment = segment(*flags, *payload);
            let step = if *side == 'c' { client(meta, &segment, 0) } else { backend(meta, &segment) };
            meta = apply(meta, step);
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
        assert_eq!(client(HALF_OPEN, &segment(RST, 0), 0), Step::Set(CLIENT_FIN));
        assert_eq!(client(HALF_OPEN.with(SYN_ACK), &segment(RST, 0), 0), Step::Keep);
        assert_eq!(client(HALF_OPEN, &segment(SYN, 0), 0), Step::Retry);
    }

    #[test]
    fn a_closed_slot_is_reopened_by_its_own_tuple() {
        for kind in [Kind::ClosedByClient, Kind::ClosedByBackend] {
            assert_eq!(client(Meta::new(kind, 7, 0), &segment(SYN, 0), 1), Step::Reopen);
        }
        let reset = Meta::new(Kind::Established, 7, 0).with(RESET);
        assert_eq!(client(reset, &segment(SYN, 0), RESET_QUARANTINE - 1), Step::Return);
        assert_eq!(client(reset, &segment(SYN, 0), RESET_QUARANTINE), Step::Reopen);
    }

    const KILLED: Meta = Meta::new(Kind::Killed, 7, 0);

    #[test]
    fn both_sides_of_a_killed_flow_are_answered_and_a_rst_never_is() {
        for flags in [0, ACK, FIN | ACK, SYN | ACK, FIN, 0x18] {
            assert_eq!(client(KILLED, &segment(flags, 3), 0), Step::Answer, "{flags:#x}");
            assert_eq!(backend(KILLED, &segment(flags, 3)), Step::Answer, "{flags:#x}");
        }
        for flags in [RST, RST | ACK, RST | SYN] {
            assert_eq!(client(KILLED, &segment(flags, 0), 0), Step::Keep);
            assert_eq!(backend(KILLED, &segment(flags, 0)), Step::Become(KILLED.with(BACKEND_TOLD)));
        }
        assert_eq!(client(KILLED, &segment(SYN, 0), 0), Step::Reopen, "the same tuple begins anew");
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
