//! What flows say about a backend has it checked at once. Pure: the time comes in as an argument.
//!
//! Flows are witnesses, not judges. A backend that refuses a SYN, or lets clients wait, is checked now and not when its
//! turn comes; and when that check finds it gone, too, what the flows saw counts as a failure beside it. As soon as a
//! check passes, what they saw until then is explained.

use std::time::{Duration, Instant};

use crate::dataplane::Signal;

/// How long an answer may take. An apiserver's first byte takes less; a longer one costs a check.
const PATIENCE: Duration = Duration::from_millis(300);
/// How long a refusal is evidence.
const FRESH: Duration = Duration::from_secs(1);

/// How long nobody who is refused is news after a check has passed: whoever checks what, the two see different things, and
/// one check a second says so often enough.
const EXPLAINED: Duration = Duration::from_secs(1);

/// What is remembered about one backend.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Witness {
    refused: u32,
    refused_at: Option<Instant>,
    /// The wait that a check has explained, or that a check was made for.
    explained: Option<u32>,
    checked_for: Option<u32>,
    /// When a check passed that was made for a refusal.
    acquitted: Option<Instant>,
    /// A refusal that is yet to be checked.
    unheard: bool,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Testimony {
    /// Flows say that something is wrong.
    pub(super) against: bool,
    /// Something new: a check is due.
    pub(super) news: bool,
}

impl Witness {
    /// Of a backend about which nothing is known but what its words are now: what they say of the past is no news.
    pub(super) fn new(signal: Signal) -> Self {
        Self { refused: signal.refused, ..Self::default() }
    }

    /// Takes in what was noticed.
    pub(super) fn hear(&mut self, signal: Signal, now: Instant) -> Testimony {
        let refusal = signal.refused != self.refused;
        if refusal {
            self.refused = signal.refused;
            self.refused_at = Some(now);
            self.unheard = true;
        }
        let acquitted = self.acquitted.is_some_and(|at| now.saturating_duration_since(at) < EXPLAINED);
        let refusal = self.unheard && !acquitted;
        if refusal {
            self.unheard = false;
        }
        let waited =
            signal.waiting.is_some_and(|waiting| waiting >= PATIENCE) && self.explained != Some(signal.asked);
        let wait = waited && self.checked_for != Some(signal.asked);
        if wait {
            self.checked_for = Some(signal.asked);
        }
        let recently = |at: Instant| now.saturating_duration_since(at) < FRESH;
        Testimony { against: waited || self.refused_at.is_some_and(recently), news: refusal || wait }
    }

    /// A check has passed.
    pub(super) fn passed(&mut self, now: Instant) {
        if self.refused_at.take().is_some() {
            self.acquitted = Some(now);
        }
        self.explained = self.checked_for;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUIET: Signal = Signal { waiting: None, asked: 0, refused: 0 };

    fn waiting(asked: u32, milliseconds: u64) -> Signal {
        Signal { waiting: Some(Duration::from_millis(milliseconds)), asked, refused: 0 }
    }

    fn says(against: bool, news: bool) -> Testimony {
        Testimony { against, news }
    }

    #[test]
    fn a_refused_syn_is_news_at_once_and_evidence_for_a_second() {
        let start = Instant::now();
        let after = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut witness = Witness::new(Signal { refused: 7, ..QUIET });
        assert_eq!(witness.hear(Signal { refused: 7, ..QUIET }, start), says(false, false), "of old");
        assert_eq!(witness.hear(Signal { refused: 8, ..QUIET }, after(0)), says(true, true));
        assert_eq!(witness.hear(Signal { refused: 8, ..QUIET }, after(20)), says(true, false));
        assert_eq!(witness.hear(Signal { refused: 9, ..QUIET }, after(40)), says(true, true), "another");
        assert_eq!(witness.hear(Signal { refused: 9, ..QUIET }, after(1039)), says(true, false));
        assert_eq!(witness.hear(Signal { refused: 9, ..QUIET }, after(1040)), says(false, false));
    }

    #[test]
    fn a_long_wait_is_news_once_and_evidence_until_it_ends() {
        let now = Instant::now();
        let mut witness = Witness::new(QUIET);
        assert_eq!(witness.hear(waiting(5, 299), now), says(false, false));
        assert_eq!(witness.hear(waiting(5, 300), now), says(true, true));
        assert_eq!(witness.hear(waiting(5, 900), now), says(true, false));
        assert_eq!(witness.hear(QUIET, now), says(false, false), "it was answered");
        assert_eq!(witness.hear(waiting(6, 300), now), says(true, true), "another");
    }

    #[test]
    fn what_a_check_has_explained_is_no_evidence_any_more() {
        let now = Instant::now();
        let mut witness = Witness::new(QUIET);
        witness.hear(waiting(5, 300), now);
        witness.hear(Signal { refused: 1, ..waiting(5, 300) }, now);
        witness.passed(now);
        assert_eq!(
            witness.hear(Signal { refused: 1, ..waiting(5, 60_000) }, now),
            says(false, false),
            "slow, not gone"
        );
        assert_eq!(witness.hear(Signal { refused: 1, ..waiting(6, 300) }, now), says(true, true));
    }

    #[test]
    fn refusals_that_checks_do_not_see_cost_one_check_a_second() {
        let start = Instant::now();
        let mut witness = Witness::new(QUIET);
        let mut checks = 0;
        for tick in 1..=400_u32 {
            let now = start + Duration::from_millis(25) * tick;
            let testimony = witness.hear(Signal { refused: tick, ..QUIET }, now);
            assert!(testimony.against, "evidence all the same");
            if testimony.news {
                checks += 1;
                witness.passed(now);
            }
        }
        assert_eq!(checks, 10, "in ten seconds");
        // The last of them is checked when its time has come.
        let quiet = Signal { refused: 400, ..QUIET };
        assert!(witness.hear(quiet, start + Duration::from_millis(11_100)).news);
        assert!(!witness.hear(quiet, start + Duration::from_millis(11_125)).news);
    }
}
