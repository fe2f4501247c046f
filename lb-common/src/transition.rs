//! What a segment makes of its flow. Pure: the caller does the atomic part.
//!
//! A state changes only on a segment whose numbers fit ([`crate::sequence`]). RST, FIN and SYN alone change nothing that
//! the ends' next segments do not change back: anyone can forge them, and an end ignores one that is out of its window
//! (RFC 5961 §3 and §4). Every segment is forwarded, whatever is learned from it, except where a variant says otherwise.
//!
//! | state of the slot | SND.UNA holds | SND.NXT holds |
//! |---|---|---|
//! | half-open, SYN not answered | when it was claimed, in jiffies | what a SYN-ACK must acknowledge |
//! | half-open, SYN-ACK seen | when that was, in jiffies | what the client must acknowledge |
//! | half-open, [`NUMBERED`] | SND.UNA | SND.NXT |
//! | established | SND.UNA | SND.NXT, if [`NUMBERED`] |
//! | closed | SND.UNA | SND.NXT |

use crate::{
    headers::tcp_flag,
    meta::{BACKEND_FIN, CLIENT_FIN, Kind, Meta, NUMBERED, RESET, RETRANSMITTED, SYN_ACK, SYN_WAITS},
    segment::Segment,
    sequence::{REACH, SendSequence, answers_syn},
};

/// Units (about seconds) without a segment after which the backend of a flow that saw a RST is asked about it: soon, as its
/// client may begin anew from the same port.
pub const RESET_QUARANTINE: u16 = 2;

/// Units without a segment after which the backend of a flow with [`RESET`] was asked and has not answered. A SYN that is held makes
/// the flow one unit older than [`RESET_QUARANTINE`]: so the third SYN, 3 s after it, is held as well, as a rule, and the
/// fourth, after 7 s, is not (RFC 6298 §2.1, §5.5).
pub const DOUBT_LIMIT: u16 = 7;

/// Units without a segment after which a SYN begins anew in a slot that both sides have closed. Before, either side may still
/// repeat what the other has not acknowledged, and anyone can forge a SYN: so the backend judges the SYN, if it takes new
/// flows. Linux repeats a segment four times in the first 3 s (200 ms, doubled each time: RFC 6298 §5.5).
const REOPEN_AGE: u16 = 4;

/// What a segment of the client makes of its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientTransition {
    /// Nothing: it is forwarded, and proves nothing, not even that the client is there.
    None,
    /// Nothing: it acknowledges what the backend has not sent.
    OutOfSequence,
    /// Nothing but a sign of the client's life.
    Alive,
    /// It acknowledges what the backend has sent.
    Acknowledge,
    /// It acknowledges the backend's SYN-ACK: the word becomes this one, established. A FIN is noted, and closes nothing.
    Establish(Meta),
    /// A FIN whose numbers fit: set the flag, and close the flow as this kind if the backend's FIN was seen.
    Close(Kind),
    /// A RST whose acknowledgement fits: the word becomes this one, closed.
    Reset(Meta),
    /// A RST that proves nothing: the backend's next segment contradicts it, or the backend is asked.
    SuspectReset,
    /// A RST or FIN before the SYN was answered.
    GiveUp,
    /// A SYN that is retransmitted: to its backend, or to another if that one takes no new flows any more.
    RetransmitSyn,
    /// A SYN takes the slot for a new flow of the same tuple.
    Reopen,
    /// A SYN for a flow of which a RST was seen that proves nothing, or the client's FIN: drop it, set [`RESET`], and have the backend
    /// asked soon. The client sends another.
    Hold,
    /// A SYN for a flow that has ended a moment ago: set [`SYN_WAITS`] and forward it. A backend that has ended it, too, answers
    /// with a SYN-ACK (RFC 9293 §3.10.7.4, RFC 6191).
    AskBackend,
    /// The flow was reset on purpose: the segment is answered with a RST.
    AnswerWithReset,
}

/// What a segment of the backend makes of its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendTransition {
    /// Nothing.
    None,
    /// Nothing: its numbers do not continue the flow.
    OutOfSequence,
    /// Set flags.
    Set(u32),
    /// The word becomes this one, if nothing but its time has changed.
    Become(Meta),
    /// A FIN that continues the flow: set [`BACKEND_FIN`] and these flags, and close the flow as this kind if the client's
    /// FIN was seen.
    Close(u32, Kind),
    /// A RST whose number fits: the word becomes this one, closed.
    Reset(Meta),
    /// A RST that proves nothing.
    SuspectReset,
    /// A RST that answers the SYN: another backend may not refuse it.
    Refuse,
    /// The SYN-ACK to a SYN that came after the close: a new flow of the same tuple, half-open, and answered.
    Reopen,
    /// The flow was reset on purpose: the segment is answered with a RST.
    AnswerWithReset,
}

/// Does the segment of a client do nothing but acknowledge what its flow's backend has sent: [`ClientTransition::Acknowledge`]?
#[inline(always)]
#[must_use]
pub const fn is_acknowledgement(meta: Meta, sequence: SendSequence, segment: &Segment) -> bool {
    const FLAGS: u8 = tcp_flag::SYN | tcp_flag::FIN | tcp_flag::RST | tcp_flag::ACK;
    meta.is_numbered_flow()
        && segment.flags & FLAGS == tcp_flag::ACK
        && sequence.is_acknowledged_by(segment.acknowledgement)
}

/// Does the segment of a backend only go on where it had ended: [`BackendTransition::None`]?
#[inline(always)]
#[must_use]
pub const fn goes_on(meta: Meta, sequence: SendSequence, segment: &Segment) -> bool {
    const FLAGS: u8 = tcp_flag::SYN | tcp_flag::FIN | tcp_flag::RST;
    let ahead = segment.sequence.wrapping_sub(sequence.next);
    meta.is_numbered_flow() && !meta.has(RESET) && segment.flags & FLAGS == 0 && ahead <= REACH
}

/// After a segment of the client at the time `now`: the change, and the numbers from now on.
#[inline(always)]
#[must_use]
pub const fn client(
    meta: Meta,
    sequence: SendSequence,
    segment: &Segment,
    now: u16,
) -> (ClientTransition, SendSequence) {
    if meta.is(Kind::Killed) {
        return killed_client(sequence, segment);
    }
    if segment.opens() {
        return (opening(meta, now), sequence);
    }
    if meta.is(Kind::HalfOpen) {
        return if meta.has(SYN_ACK) {
            handshake(meta, sequence, segment)
        } else {
            let ends = segment.flags & (tcp_flag::RST | tcp_flag::FIN) != 0 && !meta.has(CLIENT_FIN);
            (if ends { ClientTransition::GiveUp } else { ClientTransition::Alive }, sequence)
        };
    }
    synchronized_client(meta, sequence, segment)
}

/// A SYN of a tuple that has a slot.
#[inline(always)]
const fn opening(meta: Meta, now: u16) -> ClientTransition {
    if meta.is(Kind::HalfOpen) {
        return ClientTransition::RetransmitSyn;
    }
    if !meta.is_closed() && !meta.has(CLIENT_FIN | BACKEND_FIN) {
        // The backend knows whether the connection is still there (RFC 5961 §4). If it is not, its SYN-ACK would begin another, with
        // numbers that the slot does not know: anyone can forge SYN and SYN-ACK, so that they teach none.
        // After a FIN that fitted, the client's own SYN says that it has forgotten the flow: a half-closed one sends none.
        let is_asked_about = (meta.has(RESET) || meta.has(CLIENT_FIN)) && meta.age(now) < DOUBT_LIMIT;
        return if is_asked_about { ClientTransition::Hold } else { ClientTransition::None };
    }
    // Without their FIN it was a RST that has closed it, and neither end repeats anything.
    if !meta.has(CLIENT_FIN | BACKEND_FIN) || meta.age(now) >= REOPEN_AGE {
        return ClientTransition::Reopen;
    }
    ClientTransition::AskBackend
}

/// SYN-RECEIVED (RFC 9293 §3.10.7.4, fifth): only the acknowledgement of the SYN-ACK leads on.
#[inline(always)]
const fn handshake(
    meta: Meta,
    sequence: SendSequence,
    segment: &Segment,
) -> (ClientTransition, SendSequence) {
    // SND.UNA is a time until the backend has sent data.
    let known = if meta.has(NUMBERED) { sequence } else { SendSequence::at(sequence.next) };
    if !segment.has(tcp_flag::ACK) || !known.is_acknowledged_by(segment.acknowledgement) {
        return (ClientTransition::None, sequence);
    }
    let numbers = known.acknowledged(segment.acknowledgement);
    // A FIN that came before the SYN-ACK had no number to prove it.
    let unproven = SYN_ACK | RESET | CLIENT_FIN;
    let established = meta.become_kind(Kind::Established).without(unproven).with(NUMBERED);
    if segment.has(tcp_flag::RST) {
        return (ClientTransition::Reset(established.closed_by_reset()), numbers);
    }
    let fin = if segment.has(tcp_flag::FIN) { CLIENT_FIN } else { 0 };
    (ClientTransition::Establish(established.with(fin)), numbers)
}

/// ESTABLISHED and all that follows.
#[inline(always)]
const fn synchronized_client(
    meta: Meta,
    sequence: SendSequence,
    segment: &Segment,
) -> (ClientTransition, SendSequence) {
    let numbered = meta.has(NUMBERED) || !meta.is(Kind::Established);
    let fits =
        segment.has(tcp_flag::ACK) && (!numbered || sequence.is_acknowledged_by(segment.acknowledgement));
    if segment.has(tcp_flag::RST) {
        return if !meta.is(Kind::Established) {
            (ClientTransition::None, sequence)
        } else if fits && numbered {
            (ClientTransition::Reset(meta.closed_by_reset()), sequence)
        } else if meta.has(RESET) {
            (ClientTransition::None, sequence)
        } else {
            (ClientTransition::SuspectReset, sequence)
        };
    }
    if !fits {
        // Of a segment that was overtaken by later ones the number is merely old.
        let is_old = sequence.unacknowledged.wrapping_sub(segment.acknowledgement) <= REACH;
        let is_odd = segment.has(tcp_flag::ACK) && !is_old;
        return (if is_odd { ClientTransition::OutOfSequence } else { ClientTransition::None }, sequence);
    }
    let sequence = sequence.acknowledged(segment.acknowledgement);
    if segment.has(tcp_flag::FIN) && !meta.has(CLIENT_FIN) && !meta.is_closed() {
        return (ClientTransition::Close(Kind::ClosedByBackend), sequence);
    }
    (ClientTransition::Acknowledge, sequence)
}

/// A flow that was reset on purpose. A RST is never answered, but sent on: it is what the backend should hear, too.
#[inline(always)]
const fn killed_client(sequence: SendSequence, segment: &Segment) -> (ClientTransition, SendSequence) {
    if segment.opens() {
        return (ClientTransition::Reopen, sequence);
    }
    if segment.has(tcp_flag::RST) {
        return (ClientTransition::None, sequence);
    }
    // What a RST that the daemon repeats must carry.
    let fits = segment.has(tcp_flag::ACK) && sequence.is_acknowledged_by(segment.acknowledgement);
    let sequence = if fits { sequence.acknowledged(segment.acknowledgement) } else { sequence };
    (ClientTransition::AnswerWithReset, sequence)
}

/// After a segment of the backend at the time `jiffies`: the change, and the numbers from now on.
#[inline(always)]
#[must_use]
pub const fn backend(
    meta: Meta,
    sequence: SendSequence,
    segment: &Segment,
    jiffies: u32,
) -> (BackendTransition, SendSequence) {
    if meta.is(Kind::Killed) {
        return (killed_backend(meta, sequence, segment), sequence);
    }
    if meta.is(Kind::HalfOpen) {
        return if meta.has(SYN_ACK) {
            answered(meta, sequence, segment)
        } else {
            unanswered(meta, sequence, segment, jiffies)
        };
    }
    if meta.is_closed() {
        return after_close(meta, sequence, segment, jiffies);
    }
    if segment.has(tcp_flag::RST) {
        let transition = if meta.has(NUMBERED) && sequence.holds(segment.sequence) {
            BackendTransition::Reset(meta.closed_by_reset())
        } else if meta.has(RESET) {
            BackendTransition::None
        } else {
            BackendTransition::SuspectReset
        };
        return (transition, sequence);
    }
    synchronized_backend(meta, sequence, segment)
}

/// A flow that was reset on purpose: the backend's own RST says that it has forgotten the flow.
#[inline(always)]
const fn killed_backend(meta: Meta, sequence: SendSequence, segment: &Segment) -> BackendTransition {
    if !segment.has(tcp_flag::RST) {
        BackendTransition::AnswerWithReset
    } else if sequence.holds(segment.sequence) {
        BackendTransition::Become(meta.with(crate::meta::BACKEND_TOLD))
    } else {
        BackendTransition::None
    }
}

/// A SYN was forwarded, and not answered yet.
#[inline(always)]
const fn unanswered(
    meta: Meta,
    sequence: SendSequence,
    segment: &Segment,
    jiffies: u32,
) -> (BackendTransition, SendSequence) {
    if meta.has(NUMBERED) {
        return converted(meta, sequence, segment);
    }
    let answers = segment.has(tcp_flag::ACK) && answers_syn(sequence.next, segment.acknowledgement);
    if answers && segment.has(tcp_flag::RST) {
        return (BackendTransition::Refuse, sequence);
    }
    if answers && segment.has(tcp_flag::SYN) {
        let next = segment.sequence.wrapping_add(1);
        return (BackendTransition::Set(SYN_ACK), SendSequence { unacknowledged: jiffies, next });
    }
    (BackendTransition::None, sequence)
}

/// A handshake that another build's table had in hand: its numbers are those of the backend's next segment.
#[inline(always)]
const fn converted(
    meta: Meta,
    sequence: SendSequence,
    segment: &Segment,
) -> (BackendTransition, SendSequence) {
    if segment.has(tcp_flag::RST) {
        return (BackendTransition::None, sequence);
    }
    let fin = if segment.has(tcp_flag::FIN) { BACKEND_FIN } else { 0 };
    let (first, end) = span(segment);
    (BackendTransition::Become(meta.with(SYN_ACK | fin)), SendSequence { unacknowledged: first, next: end })
}

/// Its first number that is not its SYN's, and the one after its last.
#[inline(always)]
const fn span(segment: &Segment) -> (u32, u32) {
    let first = segment.sequence.wrapping_add(segment.has(tcp_flag::SYN) as u32);
    (first, first.wrapping_add(segment.payload as u32).wrapping_add(segment.has(tcp_flag::FIN) as u32))
}

/// The backend's SYN-ACK was seen, and no acknowledgement of it.
#[inline(always)]
const fn answered(
    meta: Meta,
    sequence: SendSequence,
    segment: &Segment,
) -> (BackendTransition, SendSequence) {
    let (first, end) = span(segment);
    // SND.UNA is a time until the backend has sent data.
    let known = if meta.has(NUMBERED) { sequence } else { SendSequence::at(sequence.next) };
    if segment.has(tcp_flag::RST) {
        // A sender that can forge one segment can forge two: the number may be that of the one before.
        return (BackendTransition::None, sequence);
    }
    if segment.has(tcp_flag::SYN) {
        return answered_anew(meta, sequence, first);
    }
    let fin = if segment.has(tcp_flag::FIN) { BACKEND_FIN } else { 0 };
    if !known.continues_at(first) {
        // The SYN-ACK, or what came after it, was not the backend's own: whatever the backend says next is as good. Its FIN is
        // only as good as its numbers, and goes with them.
        let next = meta.without(BACKEND_FIN).with(NUMBERED | fin);
        return (BackendTransition::Become(next), SendSequence { unacknowledged: first, next: end });
    }
    if end == first {
        return (BackendTransition::None, sequence);
    }
    (BackendTransition::Set(NUMBERED | fin), known.sent_until(end))
}

/// One more SYN-ACK; `first`: the number after its SYN. Of several the last one holds: the backend may have lost the first, and
/// answered the SYN anew.
#[inline(always)]
const fn answered_anew(meta: Meta, sequence: SendSequence, first: u32) -> (BackendTransition, SendSequence) {
    if !meta.has(NUMBERED) {
        return (BackendTransition::None, SendSequence { next: first, ..sequence });
    }
    // Sent again after what it began: nothing new.
    if sequence.holds(first) {
        return (BackendTransition::None, sequence);
    }
    let transition = if meta.has(BACKEND_FIN) {
        BackendTransition::Become(meta.without(BACKEND_FIN))
    } else {
        BackendTransition::None
    };
    (transition, SendSequence::at(first))
}

/// ESTABLISHED, and one side's FIN at the most.
#[inline(always)]
const fn synchronized_backend(
    meta: Meta,
    sequence: SendSequence,
    segment: &Segment,
) -> (BackendTransition, SendSequence) {
    let (first, end) = span(segment);
    if segment.has(tcp_flag::SYN) {
        return (BackendTransition::None, sequence);
    }
    let numbered = meta.has(NUMBERED);
    if numbered && !sequence.continues_at(first) {
        // Also after a RST: what anyone may have forged must not cost the number that a reset needs. A connection that
        // begins anew before its backend was asked is forwarded, and its numbers stay unknown.
        return (BackendTransition::OutOfSequence, sequence);
    }
    let known = if numbered { sequence.sent_until(end) } else { sequence.learned_from(first, end) };
    let learned = if numbered { 0 } else { NUMBERED };
    if segment.has(tcp_flag::FIN) && !meta.has(BACKEND_FIN) {
        return (BackendTransition::Close(learned, Kind::ClosedByClient), known);
    }
    if meta.has(RESET) {
        return (BackendTransition::Become(meta.without(RESET).with(learned)), known);
    }
    let again = numbered && segment.payload > 0 && known.next == sequence.next && !meta.has(RETRANSMITTED);
    let flags = learned | if again { RETRANSMITTED } else { 0 };
    (if flags == 0 { BackendTransition::None } else { BackendTransition::Set(flags) }, known)
}

/// Both sides have closed. A backend whose FIN came second, and that acknowledges the client's after it, had sent its own
/// before it heard of the client's (RFC 9293 §3.6, figure 13): it is in TIME-WAIT, too.
#[inline(always)]
const fn after_close(
    meta: Meta,
    sequence: SendSequence,
    segment: &Segment,
    jiffies: u32,
) -> (BackendTransition, SendSequence) {
    if segment.has(tcp_flag::RST) {
        // The number of a RST that answers a SYN without ACK is 0 (RFC 9293 §3.10.7.1). The backend has ended the flow.
        let refuses = meta.has(SYN_WAITS) && segment.has(tcp_flag::ACK) && segment.sequence == 0;
        let ended = meta.without(SYN_WAITS | CLIENT_FIN | BACKEND_FIN);
        return (if refuses { BackendTransition::Become(ended) } else { BackendTransition::None }, sequence);
    }
    if meta.has(SYN_WAITS) && segment.has(tcp_flag::SYN | tcp_flag::ACK) {
        // Whichever SYN it acknowledges: the client must acknowledge it exactly.
        let next = segment.sequence.wrapping_add(1);
        return (BackendTransition::Reopen, SendSequence { unacknowledged: jiffies, next });
    }
    let acknowledges = segment.payload == 0
        && segment.flags & (tcp_flag::SYN | tcp_flag::FIN) == 0
        && segment.sequence == sequence.next;
    let transition = if meta.is(Kind::ClosedByClient) && meta.has(BACKEND_FIN) && acknowledges {
        BackendTransition::Become(meta.become_kind(Kind::ClosedByBackend))
    } else {
        BackendTransition::None
    };
    (transition, sequence)
}

/// Units without a segment after which an acknowledgement alone does not keep a half-closed flow: less than the daemon waits until
/// it asks about the flow.
pub const HALF_CLOSED_SILENCE: u16 = 32;

/// Is a segment that goes on ([`goes_on`]) no more than what a backend answers that is asked about a half-closed flow: an
/// acknowledgement at SND.NXT, `age` units after the last segment? The flow is as idle as before. `sequence` is as it was before the
/// segment.
#[inline(always)]
#[must_use]
pub const fn only_answers(meta: Meta, age: u16, sequence: SendSequence, segment: &Segment) -> bool {
    (meta.has(CLIENT_FIN) || meta.has(BACKEND_FIN))
        && age > HALF_CLOSED_SILENCE
        && segment.payload == 0
        && segment.sequence == sequence.next
}

/// Does the backend's payload prove that its process lives? Only where it goes on from what was sent before. `sequence` is
/// as it was before the segment.
#[inline(always)]
#[must_use]
pub const fn is_sign_of_life(meta: Meta, sequence: SendSequence, segment: &Segment) -> bool {
    segment.payload > 0
        && meta.is(Kind::Established)
        && meta.has(NUMBERED)
        && sequence.holds(segment.sequence)
}

/// May the client's segment move the way back to where it came from? `sequence` is as it was before the segment.
///
/// With nothing in flight the acknowledgement is one number of 2³². With something in flight the backend must have sent
/// some of it again, as it does when its segments go astray.
#[inline(always)]
#[must_use]
pub const fn moves_way_back(meta: Meta, sequence: SendSequence, acknowledgement: u32) -> bool {
    if !meta.is(Kind::Established) || !meta.has(NUMBERED) {
        return false;
    }
    (sequence.is_idle() || meta.has(RETRANSMITTED)) && sequence.is_acknowledged_by(acknowledgement)
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::meta::BACKEND_TOLD;

    const SYN: u8 = tcp_flag::SYN;
    const ACK: u8 = tcp_flag::ACK;
    const FIN: u8 = tcp_flag::FIN;
    const RST: u8 = tcp_flag::RST;

    /// The client's initial sequence number and the backend's: its numbers wrap soon.
    const CLIENT: u32 = 1000;
    const BACKEND: u32 = u32::MAX - 50;

    /// A number of the backend's, `offset` bytes after its SYN.
    const fn sent(offset: u32) -> u32 {
        BACKEND.wrapping_add(1).wrapping_add(offset)
    }

    const fn segment(flags: u8, sequence: u32, acknowledgement: u32, payload: usize) -> Segment {
        Segment { valid: true, flags, sequence, acknowledgement, payload }
    }

    /// A slot, as one CPU alone would leave it.
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Slot {
        meta: Meta,
        sequence: SendSequence,
    }

    impl Slot {
        /// As a SYN leaves it.
        const CLAIMED: Self = Self {
            meta: Meta::new(Kind::HalfOpen, 7, 0),
            sequence: SendSequence { unacknowledged: 77, next: CLIENT + 1 },
        };

        fn client(mut self, flags: u8, acknowledged: u32) -> Self {
            let (transition, sequence) =
                client(self.meta, self.sequence, &segment(flags, CLIENT + 1, acknowledged, 0), 0);
            self.sequence = sequence;
            self.meta = match transition {
                ClientTransition::Establish(meta) | ClientTransition::Reset(meta) => meta,
                ClientTransition::Close(kind) => self.finish(CLIENT_FIN, BACKEND_FIN, kind),
                ClientTransition::SuspectReset => self.meta.with(RESET),
                ClientTransition::GiveUp => self.meta.with(CLIENT_FIN),
                ClientTransition::AskBackend => self.meta.with(SYN_WAITS),
                _ => self.meta,
            };
            self
        }

        fn backend(self, flags: u8, sequence: u32, payload: usize) -> Self {
            self.backend_answers(flags, sequence, CLIENT + 1, payload)
        }

        fn backend_answers(mut self, flags: u8, number: u32, acknowledged: u32, payload: usize) -> Self {
            let segment = segment(flags, number, acknowledged, payload);
            let (transition, sequence) = backend(self.meta, self.sequence, &segment, 99);
            self.sequence = sequence;
            self.meta = match transition {
                BackendTransition::Set(flags) => self.meta.with(flags),
                BackendTransition::Become(meta) | BackendTransition::Reset(meta) => meta,
                BackendTransition::Close(flags, kind) => self.finish(BACKEND_FIN | flags, CLIENT_FIN, kind),
                BackendTransition::SuspectReset => self.meta.with(RESET),
                BackendTransition::Refuse => self.meta.become_kind(Kind::ClosedByClient),
                BackendTransition::Reopen => Meta::new(Kind::HalfOpen, 7, 0).with(SYN_ACK),
                _ => self.meta,
            };
            self
        }

        fn finish(self, flags: u32, other: u32, kind: Kind) -> Meta {
            let meta = self.meta.with(flags);
            if meta.has(other) { meta.become_kind(kind) } else { meta }
        }

        fn answered() -> Self {
            Self::CLAIMED.backend(SYN | ACK, BACKEND, 0)
        }

        /// After the handshake, a request and 100 bytes of an answer, which are acknowledged.
        fn established() -> Self {
            let slot = Self::answered().client(ACK, sent(0)).client(ACK, sent(0));
            let slot = slot.backend(ACK, sent(0), 100).client(ACK, sent(100));
            assert!(slot.meta.is(Kind::Established) && slot.meta.has(NUMBERED), "{slot:?}");
            assert_eq!(slot.sequence, SendSequence::at(sent(100)));
            slot
        }
    }

    #[test]
    fn only_the_acknowledgement_of_the_syn_ack_proves_a_flow() {
        let answered = Slot::answered();
        assert!(answered.meta.is(Kind::HalfOpen) && answered.meta.has(SYN_ACK));
        assert_eq!(answered.sequence.unacknowledged, 99, "protected from now on");
        for guess in [0, sent(1), BACKEND, CLIENT, 77, 99] {
            assert_eq!(answered.client(ACK, guess), answered, "{guess}");
        }
        assert!(answered.client(ACK, sent(0)).meta.is(Kind::Established));
    }

    #[test]
    fn the_three_forged_packets_of_the_first_edition_make_no_flow() {
        // SYN, an ACK with any number, a PSH without ACK: a Linux backend answers the last with a bare ACK.
        let forged = Slot::answered().client(ACK, 12_345).client(0, 0).backend(ACK, sent(0), 0);
        assert!(forged.meta.is(Kind::HalfOpen), "{forged:?}");
    }

    #[test]
    fn a_syn_ack_answers_this_syn_or_counts_for_nothing() {
        for acknowledged in [CLIENT, CLIENT + 2 + crate::sequence::SYN_DATA, 0] {
            let slot = Slot::CLAIMED.backend_answers(SYN | ACK, 5, acknowledged, 0);
            assert_eq!(slot, Slot::CLAIMED);
            let slot = Slot::CLAIMED.backend_answers(RST | ACK, 0, acknowledged, 0);
            assert_eq!(slot, Slot::CLAIMED, "a refusal neither");
        }
        let refused = Slot::CLAIMED.backend_answers(RST | ACK, 0, CLIENT + 1, 0);
        assert!(refused.meta.is_closed());
    }

    #[test]
    fn a_second_syn_ack_with_another_number_holds() {
        let again = Slot::answered().backend(SYN | ACK, 5000, 0);
        assert!(again.client(ACK, sent(0)).meta.is(Kind::HalfOpen));
        assert!(again.client(ACK, 5001).meta.is(Kind::Established));
    }

    #[test]
    fn a_forged_syn_ack_is_corrected_by_the_backends_next_segment() {
        let forged = Slot::answered().backend(SYN | ACK, 1 << 28, 0).client(ACK, sent(0));
        assert!(forged.meta.is(Kind::HalfOpen));
        let corrected = forged.backend(ACK, sent(0), 100).client(ACK, sent(100));
        assert!(corrected.meta.is(Kind::Established), "{corrected:?}");
    }

    #[test]
    fn a_backend_may_speak_before_the_handshake_is_over() {
        // TCP Fast Open: the answer to what the SYN carried.
        let early =
            Slot::CLAIMED.backend_answers(SYN | ACK, BACKEND, CLIENT + 501, 0).backend(ACK, sent(0), 10);
        assert!(early.client(ACK, sent(11)).meta.is(Kind::HalfOpen));
        for acknowledged in [sent(0), sent(10)] {
            assert!(early.client(ACK, acknowledged).meta.is(Kind::Established));
        }
    }

    #[test]
    fn who_closes_first_decides_the_quarantine() {
        let flow = Slot::established();
        let by_client = flow.client(FIN | ACK, sent(100)).backend(ACK, sent(100), 0);
        let by_client = by_client.backend(FIN | ACK, sent(100), 0).client(ACK, sent(101));
        assert!(by_client.meta.is(Kind::ClosedByClient));
        let by_backend = flow.backend(FIN | ACK, sent(100), 0).client(ACK, sent(101));
        let by_backend = by_backend.client(FIN | ACK, sent(101)).backend(ACK, sent(101), 0);
        assert!(by_backend.meta.is(Kind::ClosedByBackend));
    }

    #[test]
    fn after_a_simultaneous_close_the_backend_is_in_time_wait_too() {
        let flow = Slot::established();
        let crossed = flow.client(FIN | ACK, sent(100)).backend(FIN | ACK, sent(100), 0);
        assert!(crossed.meta.is(Kind::ClosedByClient));
        assert!(crossed.backend(ACK, sent(100), 0).meta.is(Kind::ClosedByClient), "from before its FIN");
        assert!(crossed.backend(ACK, sent(101), 0).meta.is(Kind::ClosedByBackend));
    }

    #[test]
    fn a_backend_whose_first_segment_is_its_fin_leaves_nothing_behind() {
        let flow = Slot::answered().client(ACK, sent(0)).backend(FIN | ACK, sent(0), 0);
        assert!(flow.client(ACK, sent(1)).client(FIN | ACK, sent(1)).meta.is_closed());
        // The client's ACK was lost, and came with its FIN.
        let late = Slot::answered().backend(FIN | ACK, sent(0), 0).client(FIN | ACK, sent(1));
        assert!(late.meta.is(Kind::Established) && late.meta.has(CLIENT_FIN | BACKEND_FIN), "{late:?}");
    }

    #[test]
    fn a_segment_that_is_forged_in_the_handshake_leaves_a_fin_that_is_asked_about_or_nothing() {
        for forged in [FIN | ACK, ACK, SYN | ACK] {
            let met = Slot::answered().backend(forged, 1 << 28, 0).client(ACK, sent(0));
            assert!(met.meta.is(Kind::HalfOpen));
            // A client that closes at once: its FIN does not fit, its backend's is seen.
            let closing = met.client(FIN | ACK, sent(0));
            assert_eq!(closing, met, "not even noted: anyone can forge it");
            let together = closing.backend(FIN | ACK, sent(0), 0).client(ACK, sent(1));
            let apart = closing.backend(ACK, sent(0), 0).backend(FIN | ACK, sent(0), 0).client(ACK, sent(1));
            for rests in [together, apart] {
                assert!(rests.meta.is(Kind::Established) && rests.meta.has(BACKEND_FIN), "{rests:?}");
            }
            // One that goes on.
            let open = met.backend(ACK, sent(0), 100).client(ACK, sent(100));
            assert!(open.meta.is(Kind::Established), "{open:?}");
            assert!(!open.meta.has(CLIENT_FIN) && !open.meta.has(BACKEND_FIN), "{open:?}");
        }
    }

    #[test]
    fn a_live_flow_is_not_closed_by_what_was_forged_before_it_was_established() {
        let blind = 1 << 28;
        let waiting = Slot { meta: Meta::new(Kind::HalfOpen, 7, 0), ..Slot::answered() };
        let given_up = Slot { meta: waiting.meta.with(CLIENT_FIN), ..waiting };
        for begun in [waiting, given_up] {
            let answered = Slot { meta: begun.meta.with(SYN_ACK), ..begun };
            // The backend's SYN-ACK comes again, and takes back what does not continue it.
            let forged = answered.backend(FIN | ACK, blind, 0).client(FIN | ACK, blind + 99);
            let open = forged.backend(SYN | ACK, sent(0).wrapping_sub(1), 0).client(ACK, sent(0));
            let used = open.backend(ACK, sent(0), 100).client(ACK, sent(100));
            for slot in [open, used] {
                assert!(slot.meta.is(Kind::Established), "{slot:?}");
                assert!(!slot.meta.has(CLIENT_FIN) && !slot.meta.has(BACKEND_FIN), "{slot:?}");
            }
        }
    }

    #[test]
    fn a_syn_ack_that_is_sent_again_takes_nothing_back() {
        // Data and FIN came before the client's ACK (RFC 7413).
        let early = Slot::answered().backend(FIN | ACK, sent(0), 100);
        assert_eq!(early.backend(SYN | ACK, sent(0).wrapping_sub(1), 0), early);
        let rests = early.client(FIN | ACK, sent(101));
        assert!(rests.meta.is(Kind::Established) && rests.meta.has(CLIENT_FIN | BACKEND_FIN), "{rests:?}");
    }

    #[test]
    fn one_fin_keeps_a_half_closed_stream() {
        let flow = Slot::established().client(FIN | ACK, sent(100)).backend(ACK, sent(100), 1000);
        assert!(flow.client(ACK, sent(1100)).meta.is(Kind::Established));
    }

    #[test]
    fn a_fin_after_lost_data_counts() {
        let flow = Slot::established().client(FIN | ACK, sent(100)).backend(FIN | ACK, sent(1500), 0);
        assert!(flow.meta.is_closed());
    }

    #[test]
    fn an_exact_reset_closes_and_another_is_doubted() {
        let flow = Slot::established();
        assert!(flow.client(RST | ACK, sent(100)).meta.is_closed());
        assert!(flow.backend(RST, sent(100), 0).meta.is_closed(), "of a kernel that forgot the flow");
        for blind in [flow.client(RST, 0), flow.client(RST | ACK, 5), flow.backend(RST, 5, 0)] {
            assert_eq!(blind.meta, flow.meta.with(RESET));
            assert_eq!(blind.sequence, flow.sequence);
            assert_eq!(blind.backend(ACK, sent(100), 0), flow, "the backend's answer contradicts it");
        }
    }

    #[test]
    fn a_new_syn_of_a_flow_that_was_not_closed_is_the_backends_to_judge() {
        let flow = Slot::established();
        assert_eq!(client(flow.meta, flow.sequence, &segment(SYN, 0, 0, 0), 0).0, ClientTransition::None);
        assert_eq!(flow.backend(SYN | ACK, 5, 0), flow, "and its SYN-ACK alone says nothing");
        let doubted = flow.client(RST, 0);
        assert_eq!(
            doubted.backend(SYN | ACK, 1 << 28, 0).backend(ACK, 1 << 28, 10),
            doubted,
            "nor after a RST"
        );
    }

    #[test]
    fn a_backends_reset_proves_nothing_before_its_client_has_acknowledged_anything() {
        let answered = Slot::answered();
        assert_eq!(answered.backend(RST, sent(0), 0), answered);
        // Two forged segments, the second with the number of the first.
        let forged = answered.backend(ACK, 1 << 28, 0);
        assert_eq!(forged.backend(RST, 1 << 28, 0), forged);
        let open = forged.backend(ACK, sent(0), 100).client(ACK, sent(100));
        assert!(open.backend(RST, sent(100), 0).meta.is_closed(), "after that it is a number that fits");
    }

    #[test]
    fn an_answer_to_a_question_does_not_keep_a_half_closed_flow() {
        let only = |flags, age, number, payload| {
            let meta = Meta::new(Kind::Established, 7, 0).with(NUMBERED | flags);
            only_answers(meta, age, SendSequence::at(sent(100)), &segment(ACK, number, 0, payload))
        };
        for fin in [CLIENT_FIN, BACKEND_FIN] {
            assert!(only(fin, 33, sent(100), 0));
            assert!(!only(fin, 32, sent(100), 0), "the client has just spoken");
            assert!(!only(fin, 33, sent(100), 1), "data");
            assert!(!only(fin, 33, sent(99), 0), "a keepalive (RFC 9293 §3.8.4)");
        }
        assert!(!only(0, 33, sent(100), 0), "open at both ends");
    }

    #[test]
    fn a_client_may_give_up_in_the_handshake_and_keep_its_slot() {
        let meta = Slot::CLAIMED.meta;
        let of = |flags| client(meta, Slot::CLAIMED.sequence, &segment(flags, 0, 0, 0), 0).0;
        assert_eq!((of(RST), of(FIN | ACK)), (ClientTransition::GiveUp, ClientTransition::GiveUp));
        assert_eq!((of(SYN), of(ACK)), (ClientTransition::RetransmitSyn, ClientTransition::Alive));
        let answered = Slot::answered();
        assert_eq!(answered.client(RST, 0), answered);
        assert!(answered.client(RST | ACK, sent(0)).meta.is_closed());
    }

    #[test]
    fn a_slot_that_rests_is_reopened_by_its_own_tuple() {
        let by_reset = Meta::new(Kind::Established, 7, 0).closed_by_reset();
        let of = |meta, now| client(meta, SendSequence::default(), &segment(SYN, 0, 0, 0), now).0;
        assert_eq!(of(by_reset, 0), ClientTransition::Reopen);
        assert_eq!(of(Meta::new(Kind::ClosedByClient, 7, 0), 0), ClientTransition::Reopen, "refused");
        assert_eq!(of(Meta::new(Kind::Killed, 7, 0), 0), ClientTransition::Reopen);
        for kind in [Kind::ClosedByClient, Kind::ClosedByBackend] {
            let by_both = Meta::new(kind, 7, 0).with(CLIENT_FIN | BACKEND_FIN);
            assert_eq!(of(by_both, REOPEN_AGE - 1), ClientTransition::AskBackend);
            assert_eq!(of(by_both, REOPEN_AGE), ClientTransition::Reopen);
        }
    }

    /// Both sides have sent a FIN, and the client has acknowledged all.
    fn closed() -> Slot {
        let slot = Slot::established().client(FIN | ACK, sent(100)).backend(FIN | ACK, sent(100), 0);
        slot.client(ACK, sent(101))
    }

    #[test]
    fn a_forged_syn_takes_no_slot_in_which_something_may_be_sent_again() {
        let all_acknowledged = closed();
        let one_fin_is_not =
            Slot::established().client(FIN | ACK, sent(100)).backend(FIN | ACK, sent(100), 0);
        for slot in [all_acknowledged, one_fin_is_not] {
            for now in [0, 3] {
                let asked = client(slot.meta, slot.sequence, &segment(SYN, 4999, 0, 0), now);
                assert_eq!(asked, (ClientTransition::AskBackend, slot.sequence));
            }
            let asked = Slot { meta: slot.meta.with(SYN_WAITS), ..slot };
            // A backend that has not ended the flow answers with what it has sent and got (RFC 5961 §4).
            assert!(asked.backend(ACK, sent(101), 0).meta.is_closed());
            assert_eq!(asked.backend(FIN | ACK, sent(100), 0), asked, "sent again");
            assert_eq!(asked.client(ACK, sent(101)).meta, asked.meta, "the client's data, sent again");
        }
    }

    #[test]
    fn a_backend_that_has_ended_its_flow_lets_its_client_begin_anew() {
        let closed = closed();
        let forged = closed.backend_answers(SYN | ACK, 70_000, 5000, 0);
        assert!(forged.meta.is_closed(), "no SYN has come");
        let asked = Slot { meta: closed.meta.with(SYN_WAITS), ..closed };
        let answered = asked.backend_answers(SYN | ACK, 70_000, 5000, 0);
        assert_eq!(answered.meta, Meta::new(Kind::HalfOpen, 7, 0).with(SYN_ACK));
        assert_eq!(
            answered.sequence,
            SendSequence { unacknowledged: 99, next: 70_001 },
            "protected from now on"
        );
        assert!(answered.client(ACK, 70_000).meta.is(Kind::HalfOpen));
        assert!(answered.client(ACK, 70_001).meta.is(Kind::Established));
    }

    #[test]
    fn a_backend_that_refuses_a_syn_after_the_close_has_ended_its_flow() {
        let closed = closed();
        let asked = Slot { meta: closed.meta.with(SYN_WAITS), ..closed };
        let again = |slot: Slot| client(slot.meta, slot.sequence, &segment(SYN, 8999, 0, 0), 0).0;
        for (slot, flags, number, next) in [
            (asked, RST | ACK, 0, ClientTransition::Reopen),
            (asked, RST, 0, ClientTransition::AskBackend),
            (asked, RST | ACK, sent(101), ClientTransition::AskBackend),
            (closed, RST | ACK, 0, ClientTransition::AskBackend),
        ] {
            let after = slot.backend_answers(flags, number, 5000, 0);
            assert_eq!((after.meta.kind(), again(after)), (slot.meta.kind(), next), "{flags:#x} {number}");
        }
    }

    #[test]
    fn both_sides_of_a_killed_flow_are_answered_and_a_rst_never_is() {
        let flow = Slot { meta: Meta::new(Kind::Killed, 7, 0), ..Slot::established() };
        for flags in [0, ACK, FIN | ACK, SYN | ACK, FIN, 0x18] {
            let segment = segment(flags, 1, 2, 3);
            assert_eq!(client(flow.meta, flow.sequence, &segment, 0).0, ClientTransition::AnswerWithReset);
            assert_eq!(backend(flow.meta, flow.sequence, &segment, 0).0, BackendTransition::AnswerWithReset);
        }
        assert_eq!(flow.client(RST | ACK, sent(100)), flow);
        assert_eq!(flow.backend(RST, 5, 0), flow, "a forged one");
        assert!(flow.backend(RST, sent(100), 0).meta.has(BACKEND_TOLD));
        assert_eq!(flow.client(ACK, 5), flow, "nobody changes what is repeated to the client");
    }

    #[test]
    fn a_flow_of_another_build_learns_its_numbers_from_its_backend() {
        let kept = SendSequence { unacknowledged: sent(100), next: 0 };
        let flow = Slot { meta: Meta::new(Kind::Established, 7, 0), sequence: kept };
        let spoken = flow.client(ACK, sent(140));
        assert_eq!(spoken.sequence.unacknowledged, sent(140), "as the other build did");
        let known = spoken.backend(ACK, sent(140), 60);
        assert!(known.meta.has(NUMBERED));
        assert_eq!(known.sequence, SendSequence { unacknowledged: sent(140), next: sent(200) });
        assert!(flow.client(FIN | ACK, sent(100)).backend(FIN | ACK, sent(100), 0).meta.is_closed());
        let half_open = Slot { meta: Meta::new(Kind::HalfOpen, 7, 0).with(NUMBERED), sequence: kept };
        let proven = half_open.client(ACK, 3).backend(ACK, sent(0), 60).client(ACK, sent(60));
        assert!(proven.meta.is(Kind::Established), "{proven:?}");
    }

    #[test]
    fn payload_is_a_sign_of_life_only_where_it_goes_on() {
        let flow = Slot::established();
        let is_sign =
            |number, payload| is_sign_of_life(flow.meta, flow.sequence, &segment(ACK, number, 0, payload));
        assert!(is_sign(sent(100), 1));
        assert!(!is_sign(sent(100), 0), "a kernel acknowledges also where the process hangs");
        assert!(!is_sign(sent(101), 1) && !is_sign(sent(99), 1) && !is_sign(5, 1));
        let answered = Slot::answered();
        assert!(!is_sign_of_life(answered.meta, answered.sequence, &segment(ACK, sent(0), 0, 1)));
    }

    #[test]
    fn the_way_back_moves_on_numbers_that_fit_alone() {
        let flow = Slot::established();
        assert!(moves_way_back(flow.meta, flow.sequence, sent(100)));
        assert!(!moves_way_back(flow.meta, flow.sequence, sent(99)));
        let busy = flow.backend(ACK, sent(100), 500);
        assert!(!moves_way_back(busy.meta, busy.sequence, sent(100)), "one in 500 is too easily guessed");
        let again = busy.backend(ACK, sent(100), 500);
        assert!(moves_way_back(again.meta, again.sequence, sent(100)), "its segments go astray");
        assert!(!moves_way_back(again.meta, again.sequence, sent(99)));
    }

    /// A segment of a sender that sees neither end: its numbers are not near those of the flow.
    fn blind() -> impl Strategy<Value = (bool, u8, u32, usize)> {
        let number = (REACH * 4..u32::MAX - REACH * 4).prop_map(|offset| sent(0).wrapping_add(offset));
        (any::<bool>(), 0u8..64, number, 0usize..1500)
    }

    fn forge(slot: Slot, (client, flags, number, payload): (bool, u8, u32, usize)) -> Slot {
        if client { slot.client(flags, number) } else { slot.backend_answers(flags, number, number, payload) }
    }

    /// Flags as segments have them.
    fn any_segment() -> impl Strategy<Value = Segment> {
        // Near the flow's numbers, so that each case is hit often.
        let near = (-300i32..300).prop_map(|offset| sent(100).wrapping_add(offset.cast_unsigned()));
        (0u8..64, near.clone(), near, 0usize..200)
            .prop_map(|(flags, number, acknowledged, payload)| segment(flags, number, acknowledged, payload))
    }

    proptest! {
        /// The short ways are the same as the long ones.
        #[test]
        fn a_segment_that_changes_no_state_is_known_at_once(segment in any_segment(), flags in 0u32..32, behind in 0u32..200) {
            let meta = Meta::new(Kind::Established, 7, 0).with(flags << 3);
            let sequence = SendSequence { unacknowledged: sent(100 - behind.min(100)), next: sent(100) };
            if is_acknowledgement(meta, sequence, &segment) {
                let expected = (ClientTransition::Acknowledge, sequence.acknowledged(segment.acknowledgement));
                prop_assert_eq!(client(meta, sequence, &segment, 0), expected);
            }
            if goes_on(meta, sequence, &segment) {
                let end = segment.sequence.wrapping_add(segment.payload as u32);
                let (transition, now) = backend(meta, sequence, &segment, 0);
                prop_assert_eq!((transition, now), (BackendTransition::None, sequence.sent_until(end)));
            }
        }

        /// Whatever is forged, a flow that is proven stays so, and what a reset of it must carry is what it was.
        #[test]
        fn a_blind_sender_changes_nothing_of_a_flow_that_a_segment_of_its_backend_does_not_restore(
            story in proptest::collection::vec(blind(), 0..40),
        ) {
            let flow = Slot::established();
            let forged = story.iter().fold(flow, |slot, segment| forge(slot, *segment));
            prop_assert_eq!(forged.meta.without(RESET), flow.meta);
            prop_assert_eq!(forged.sequence, flow.sequence);
            // The backend's answer to a question.
            prop_assert_eq!(forged.backend(ACK, sent(100), 0), flow);
        }

        /// Without the number of the SYN-ACK nobody makes a flow, and the real client does afterwards.
        #[test]
        fn a_blind_client_proves_nothing(story in proptest::collection::vec(blind(), 0..40)) {
            let clients = story.iter().filter(|(client, ..)| *client);
            let forged = clients.fold(Slot::answered(), |slot, segment| forge(slot, *segment));
            prop_assert!(forged.meta.is(Kind::HalfOpen));
            prop_assert!(forged.client(ACK, sent(0)).meta.is(Kind::Established));
        }

        /// Nothing but a SYN brings a killed flow back.
        #[test]
        fn a_killed_flow_stays_killed(story in proptest::collection::vec(blind(), 0..24)) {
            let killed = Slot { meta: Meta::new(Kind::Killed, 7, 0), ..Slot::established() };
            let after = story.iter().fold(killed, |slot, segment| forge(slot, *segment));
            prop_assert_eq!(after, killed);
        }
    }
}
