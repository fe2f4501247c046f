//! What the numbers of a segment prove.
//!
//! A slot keeps two of the backend's send sequence variables (RFC 9293 §3.3.1), as the load balancer has seen them:
//!
//! ```text
//!            acknowledged by the client   in flight            not sent yet
//!  ------------------------------------|---------------------|--------------
//!                                 SND.UNA               SND.NXT
//! ```
//!
//! A sender that sees neither end's segments knows neither number. It has one chance in 2³² to name an idle flow's, and
//! one in 2³² for each byte that is in flight otherwise. So a segment of the client is believed if it acknowledges a number
//! in this window, and a segment of the backend if it lies in it or continues it. A segment that is not believed is
//! forwarded all the same: a load balancer must not break a flow because a number looks odd.
//!
//! The client's own sequence numbers, windows and options are never looked at: keepalives, window probes, selective
//! acknowledgements and window updates are as good as any other segment.

/// How far behind its last known end a backend's segment may begin and still continue the flow, and how far before it: the
/// most that can be lost or reordered between the backend and the load balancer. Linux keeps 4 MiB in flight unless told
/// otherwise (`tcp_wmem`, `Documentation/networking/ip-sysctl.rst`).
///
/// A blind sender in the backend's name hits it once in 512 packets, and gains nothing but a wider window for its next
/// guess.
pub const REACH: u32 = 1 << 22;

/// How much data a SYN may carry (TCP Fast Open, RFC 7413): what a SYN-ACK may acknowledge beyond the SYN itself.
pub const SYN_DATA: u32 = 1 << 14;

/// A backend's send sequence variables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SendSequence {
    /// SND.UNA: the last acknowledgement number of the client that was believed.
    pub unacknowledged: u32,
    /// SND.NXT: one after the last byte that the backend has sent; SYN and FIN count as one.
    pub next: u32,
}

impl SendSequence {
    /// As after a SYN-ACK, or after all that was sent is acknowledged.
    #[inline(always)]
    #[must_use]
    pub const fn at(number: u32) -> Self {
        Self { unacknowledged: number, next: number }
    }

    /// Bytes in flight.
    #[inline(always)]
    #[must_use]
    pub const fn in_flight(self) -> u32 {
        self.next.wrapping_sub(self.unacknowledged)
    }

    /// Is nothing in flight?
    #[inline(always)]
    #[must_use]
    pub const fn is_idle(self) -> bool {
        self.next == self.unacknowledged
    }

    /// Can only one who sees the backend's segments have acknowledged this: is it in SND.UNA..=SND.NXT?
    #[inline(always)]
    #[must_use]
    pub const fn is_acknowledged_by(self, acknowledgement: u32) -> bool {
        self.next.wrapping_sub(acknowledgement) <= self.in_flight()
    }

    /// Is this a number in SND.UNA..=SND.NXT: of a RST, or of data that the client has not acknowledged yet?
    #[inline(always)]
    #[must_use]
    pub const fn holds(self, sequence: u32) -> bool {
        sequence.wrapping_sub(self.unacknowledged) <= self.in_flight()
    }

    /// Is the byte with this number sent, and not acknowledged: is it in SND.UNA..SND.NXT?
    #[inline(always)]
    #[must_use]
    pub const fn has_in_flight(self, sequence: u32) -> bool {
        sequence.wrapping_sub(self.unacknowledged) < self.in_flight()
    }

    /// Does a segment that begins here continue the flow, be it after a loss or as a retransmission?
    #[inline(always)]
    #[must_use]
    pub const fn continues_at(self, sequence: u32) -> bool {
        sequence.wrapping_sub(self.next).wrapping_add(REACH) <= 2 * REACH
    }

    /// After a segment of the backend that ends before `end`. An earlier end changes nothing.
    #[inline(always)]
    #[must_use]
    pub const fn sent_until(self, end: u32) -> Self {
        let is_later = (end.wrapping_sub(self.next) as i32) > 0;
        Self { next: if is_later { end } else { self.next }, ..self }
    }

    /// After an acknowledgement that is believed.
    #[inline(always)]
    #[must_use]
    pub const fn acknowledged(self, acknowledgement: u32) -> Self {
        Self { unacknowledged: acknowledgement, ..self }
    }

    /// What is known after a segment of a flow whose numbers were not known: of one that another build's table had, or one
    /// whose end is in doubt. The client's last acknowledgement stays where it may be right.
    #[inline(always)]
    #[must_use]
    pub const fn learned_from(self, sequence: u32, end: u32) -> Self {
        let plausible = end.wrapping_sub(self.unacknowledged) <= REACH;
        Self { unacknowledged: if plausible { self.unacknowledged } else { sequence }, next: end }
    }
}

/// Can only one who has seen the client's SYN, whose own number ends before `expected`, have acknowledged this?
#[inline(always)]
#[must_use]
pub const fn answers_syn(expected: u32, acknowledgement: u32) -> bool {
    acknowledgement.wrapping_sub(expected) <= SYN_DATA
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever the initial number, and also where the numbers wrap.
        #[test]
        fn a_client_that_acknowledges_what_was_sent_is_believed(start: u32, sent in 0u32..1 << 30, share in 0f64..=1.0) {
            let sequence = SendSequence::at(start).sent_until(start.wrapping_add(sent));
            let acknowledgement = start.wrapping_add((f64::from(sent) * share) as u32);
            prop_assert!(sequence.is_acknowledged_by(acknowledgement));
            prop_assert!(sequence.holds(acknowledgement));
            let later = sequence.acknowledged(acknowledgement);
            prop_assert!(later.is_acknowledged_by(acknowledgement), "a duplicate");
            prop_assert_eq!(later.is_acknowledged_by(start), sent == 0 || acknowledgement == start, "an older one");
            prop_assert!(!later.is_acknowledged_by(later.next.wrapping_add(1)), "of what was not sent");
        }

        #[test]
        fn segments_in_any_order_lead_to_the_same_end(
            start: u32,
            mut segments in proptest::collection::vec((0u32..REACH / 2, 0u32..65_536), 1..20),
            swap in any::<prop::sample::Index>(),
        ) {
            let end = segments.iter().map(|(offset, length)| offset + length).max().unwrap_or(0);
            let index = swap.index(segments.len());
            segments.swap(0, index);
            let mut sequence = SendSequence::at(start);
            for (offset, length) in segments {
                let first = start.wrapping_add(offset);
                prop_assert!(sequence.continues_at(first));
                sequence = sequence.sent_until(first.wrapping_add(length));
            }
            prop_assert_eq!(sequence, SendSequence { unacknowledged: start, next: start.wrapping_add(end) });
        }

        #[test]
        fn a_blind_guess_about_an_idle_flow_is_right_for_one_number_only(number: u32, guess: u32) {
            let idle = SendSequence::at(number);
            prop_assert_eq!(idle.is_acknowledged_by(guess), guess == number);
            prop_assert_eq!(idle.holds(guess), guess == number);
            prop_assert!(!idle.has_in_flight(guess), "nothing is");
        }
    }

    #[test]
    fn the_backends_next_segment_may_be_as_far_away_as_its_flight_is_long() {
        let sequence = SendSequence::at(10);
        assert!(sequence.continues_at(10 + REACH) && sequence.continues_at(10u32.wrapping_sub(REACH)));
        assert!(!sequence.continues_at(11 + REACH) && !sequence.continues_at(9u32.wrapping_sub(REACH)));
    }

    #[test]
    fn what_was_known_of_the_client_survives_where_it_fits() {
        let before = SendSequence { unacknowledged: 1000, next: 0 };
        assert_eq!(before.learned_from(1500, 1600), SendSequence { unacknowledged: 1000, next: 1600 });
        assert_eq!(before.learned_from(900, 950), SendSequence { unacknowledged: 900, next: 950 });
        let far = 1000 + 2 * REACH;
        assert_eq!(before.learned_from(far, far), SendSequence::at(far));
    }

    #[test]
    fn a_syn_is_answered_with_its_number_and_its_data_at_most() {
        assert!(answers_syn(500, 500) && answers_syn(500, 500 + SYN_DATA));
        assert!(!answers_syn(500, 499) && !answers_syn(500, 501 + SYN_DATA));
        assert!(answers_syn(0, 0) && answers_syn(u32::MAX, 3));
    }
}
