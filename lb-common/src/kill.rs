//! Resetting a flow on purpose, from the daemon's side: its backend is dead, or an operator ordered it.
//!
//! The slot becomes *killed* by compare-and-exchange on its word, as every transition does, and from then on the program
//! answers both sides with exact RSTs ([`crate::transition`], [`crate::refuse`]). The daemon sends a silent client
//! one RST whose sequence number is the last that the client acknowledged. Only that RST is accepted by the client and by
//! every stateful router on the way to it. (A challenge outside of the window is dropped or misdelivered by conntrack.)

use crate::{
    cell::Cell32,
    layout::Numbers,
    meta::{Kind, Meta, NUMBERED, SYN_ACK},
    sequence::SendSequence,
};

/// Units (about seconds) in which a killed slot is not given to another flow: the daemon repeats the client's RST after
/// 100 ms and after a second, and the client may send a segment.
pub const KILLED_REST: u16 = 3;
/// Seconds for which a backend must have been ready again before its killed slots may be used towards it, if it has
/// neither sent nor received a RST for their flows.
pub const KILLED_QUARANTINE: u64 = 60;

/// Attempts, as packets may change the word meanwhile.
const ATTEMPTS: usize = 8;

/// Is it a flow whose client considers itself connected, and whose backend may still hold it?
///
/// A flow whose SYN was not answered yet is not reset: the client's next SYN goes to another backend by itself.
#[must_use]
pub const fn is_resettable(meta: Meta) -> bool {
    meta.is(Kind::Established) || (meta.is(Kind::HalfOpen) && meta.has(SYN_ACK))
}

/// The sequence number of a RST that the client of a flow must believe: the last that it has acknowledged, or is about to.
/// None: it is not known.
#[must_use]
pub const fn reset_number(meta: Meta, sequence: SendSequence) -> Option<u32> {
    if meta.is(Kind::Established) || meta.is(Kind::Killed) {
        Some(sequence.unacknowledged)
    } else if meta.is(Kind::HalfOpen) && meta.has(SYN_ACK) {
        Some(if meta.has(NUMBERED) { sequence.unacknowledged } else { sequence.next })
    } else {
        None
    }
}

/// Kills the flow whose word is examined in `word`, at the time `now`, if it is one of `backend` that can be reset.
/// Returns its last word before. From then on SND.UNA is its [`reset_number`].
pub fn kill(word: &Cell32, numbers: &Numbers, backend: u8, now: u16) -> Option<Meta> {
    let mut meta = Meta(word.load());
    for _ in 0..ATTEMPTS {
        if !is_resettable(meta) || meta.backend() != backend {
            return None;
        }
        let sequence = numbers.load();
        let killed = Meta::new(Kind::Killed, backend, now);
        let found = Meta(word.compare_exchange(meta.0, killed.0));
        if found == meta {
            if !meta.has(NUMBERED) {
                let number = reset_number(meta, sequence).unwrap_or(sequence.next);
                numbers.store(sequence, SendSequence::at(number));
            }
            return Some(meta);
        }
        meta = found;
    }
    None
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use crate::meta::{BACKEND_FIN, BACKEND_TOLD, CLIENT_FIN, RESET};

    fn cell(meta: Meta) -> Cell32 {
        let cell = Cell32::default();
        cell.store(meta.0);
        cell
    }

    const SEQUENCE: SendSequence = SendSequence { unacknowledged: 100, next: 300 };

    fn numbers() -> Numbers {
        let numbers = Numbers::default();
        numbers.store(SendSequence::default(), SEQUENCE);
        numbers
    }

    #[test]
    fn a_flow_that_its_client_believes_in_is_killed_whatever_was_heard_of_it() {
        for flags in [0, RESET, CLIENT_FIN, BACKEND_FIN] {
            let before = Meta::new(Kind::Established, 3, 100).with(flags | NUMBERED);
            let (word, numbers) = (cell(before), numbers());
            assert_eq!(kill(&word, &numbers, 3, 200), Some(before));
            let after = Meta(word.load());
            assert_eq!(after, Meta::new(Kind::Killed, 3, 200));
            assert!(after.is_untold() && !after.with(BACKEND_TOLD).is_untold());
            assert_eq!(numbers.load(), SEQUENCE);
            assert_eq!(kill(&word, &numbers, 3, 201), None, "once");
        }
    }

    #[test]
    fn a_client_that_has_not_acknowledged_the_syn_ack_is_reset_at_its_number() {
        let (answered, numbers) = (Meta::new(Kind::HalfOpen, 3, 100).with(SYN_ACK), numbers());
        assert_eq!(reset_number(answered, SEQUENCE), Some(300));
        assert_eq!(kill(&cell(answered), &numbers, 3, 200), Some(answered));
        assert_eq!(reset_number(Meta::new(Kind::Killed, 3, 200), numbers.load()), Some(300));
    }

    #[test]
    fn what_is_over_has_not_begun_or_is_anothers_is_left_alone() {
        for kind in [Kind::Free, Kind::Claiming, Kind::HalfOpen, Kind::ClosedByClient, Kind::ClosedByBackend]
        {
            assert_eq!(kill(&cell(Meta::new(kind, 3, 100)), &numbers(), 3, 200), None, "{kind:?}");
        }
        assert_eq!(kill(&cell(Meta::new(Kind::Established, 4, 100)), &numbers(), 3, 200), None);
    }
}
