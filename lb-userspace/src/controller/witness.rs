//! What flows say about a backend has it checked at once. Pure: the time comes in as an argument.
//!
//! Flows are witnesses, not judges. A backend that refuses a SYN, or lets clients wait, is checked now and not when its
//! turn comes; and when that check finds it gone, too, what the flows saw counts as a failure beside it. As soon as a
//! check passes, what they saw until then is explained.
//!
//! The data path knows of one wait at a time, the longest, and it ends with the backend's next payload. What a client says
//! last may be nothing that is ever answered: such a wait is forgotten an interval after it was explained.
//!
//! Where a check has found nothing new, somebody else who is refused is news only after a pause. Thousands of hosts that
//! check a few backends do it seldom, and an overloaded one loses segments of all of them: so the pause grows with the
//! interval, until what flows say brings about no more than about one check in each.

use std::time::{Duration, Instant};

use crate::{
    dataplane::Signal,
    health::{Event, Failure, Outcome, State},
};

/// How long an answer may take. An apiserver's first byte takes less; a longer one costs a check.
const PATIENCE: Duration = Duration::from_millis(300);
/// How long a refusal is evidence.
const FRESH: Duration = Duration::from_secs(1);

/// How long nobody who is refused is news, at least, after a check has passed: whoever checks what, the two see different
/// things, and one check a second says so often enough.
const EXPLAINED: Duration = Duration::from_secs(1);
/// The first pause is this part of the interval. Each that follows is twice as long, up to a whole one.
const FIRST_PAUSE: u32 = 4;

/// What is remembered about one backend.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Witness {
    refused: u32,
    refused_at: Option<Instant>,
    /// The wait that a check has explained, or that a check was made for.
    explained: Option<u32>,
    checked_for: Option<u32>,
    explained_at: Option<Instant>,
    /// The last check that found nothing new although somebody was refused.
    acquittal: Option<Acquittal>,
    /// When somebody was last refused, whatever has become of it.
    last_refusal: Option<Instant>,
    /// A refusal that is yet to be checked.
    unheard: bool,
}

/// A check has passed, or has found what was known; until the pause is over it explains who is refused.
#[derive(Clone, Copy, Debug)]
struct Acquittal {
    at: Instant,
    pause: Duration,
}

impl Acquittal {
    fn holds(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) < self.pause
    }
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Testimony {
    /// Flows say that something is wrong.
    pub(super) against: bool,
    /// Something new: a check is due.
    pub(super) news: bool,
    /// A wait that was explained has gone on for long enough: it is to be forgotten, or nobody who begins to wait now would
    /// be seen.
    pub(super) stale: bool,
}

impl Witness {
    /// Of a backend about which nothing is known but what its words are now: what they say of the past is no news.
    pub(super) fn new(signal: Signal) -> Self {
        Self { refused: signal.refused, ..Self::default() }
    }

    /// Takes in what was noticed of a backend that is checked every `interval`.
    pub(super) fn hear(&mut self, signal: Signal, interval: Duration, now: Instant) -> Testimony {
        if signal.refused != self.refused {
            self.refused = signal.refused;
            self.note_refusal(interval, now);
        }
        let acquitted = self.acquittal.filter(|it| it.holds(now));
        let refusal = self.unheard && acquitted.is_none();
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
        // In a pause that is longer than that the checks that come by themselves are to cost no more than ever.
        let counts = acquitted.is_none_or(|it| it.pause <= EXPLAINED);
        let refused = counts && self.refused_at.is_some_and(recently);
        let stale = signal.waiting.is_some()
            && self.explained == Some(signal.asked)
            && self
                .explained_at
                .is_some_and(|at| now.saturating_duration_since(at) >= longest_pause(interval));
        Testimony { against: waited || refused, news: refusal || wait, stale }
    }

    /// Whoever is refused after a time in which nobody was begins from the start.
    fn note_refusal(&mut self, interval: Duration, now: Instant) {
        let quiet = |last: Instant| now.saturating_duration_since(last) >= longest_pause(interval);
        if self.last_refusal.is_none_or(quiet) {
            self.acquittal = None;
        }
        (self.refused_at, self.last_refusal, self.unheard) = (Some(now), Some(now), true);
    }

    /// Takes in a finished check.
    pub(super) fn heed(&mut self, event: &Event, interval: Duration, now: Instant) {
        match event.report.outcome {
            Outcome::Local => {}
            Outcome::Pass => self.passed(interval, now),
            Outcome::Fail(failure) if event.transition.is_none() && stands(event.state, failure) => {
                self.explain_refusals(interval, now);
            }
            // What flows see is true, and is heard again at once.
            Outcome::Fail(_) => self.acquittal = None,
        }
    }

    fn passed(&mut self, interval: Duration, now: Instant) {
        self.explain_refusals(interval, now);
        if self.explained != self.checked_for {
            (self.explained, self.explained_at) = (self.checked_for, Some(now));
        }
    }

    fn explain_refusals(&mut self, interval: Duration, now: Instant) {
        if self.refused_at.take().is_some() {
            let first = (interval / FIRST_PAUSE).max(EXPLAINED);
            let pause =
                self.acquittal.map_or(first, |before| (before.pause * 2).min(longest_pause(interval)));
            self.acquittal = Some(Acquittal { at: now, pause });
        }
    }
}

/// Whether a failure says only what the verdict says already.
fn stands(state: State, failure: Failure) -> bool {
    match state {
        State::Unknown | State::Ready => false,
        // It may be about to become silent.
        State::Draining => failure != Failure::Silent,
        State::Silent | State::Dead => true,
    }
}

fn longest_pause(interval: Duration) -> Duration {
    interval.max(EXPLAINED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::{CheckCode, CheckReport, TargetId};

    const INTERVAL: Duration = Duration::from_secs(1);
    const QUIET: Signal = Signal { waiting: None, asked: 0, refused: 0 };

    fn waiting(asked: u32, milliseconds: u64) -> Signal {
        Signal { waiting: Some(Duration::from_millis(milliseconds)), asked, refused: 0 }
    }

    fn says(against: bool, news: bool) -> Testimony {
        Testimony { against, news, stale: false }
    }

    #[test]
    fn a_refused_syn_is_news_at_once_and_evidence_for_a_second() {
        let start = Instant::now();
        let after = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut witness = Witness::new(Signal { refused: 7, ..QUIET });
        assert_eq!(
            witness.hear(Signal { refused: 7, ..QUIET }, INTERVAL, start),
            says(false, false),
            "of old"
        );
        assert_eq!(witness.hear(Signal { refused: 8, ..QUIET }, INTERVAL, after(0)), says(true, true));
        assert_eq!(witness.hear(Signal { refused: 8, ..QUIET }, INTERVAL, after(20)), says(true, false));
        assert_eq!(
            witness.hear(Signal { refused: 9, ..QUIET }, INTERVAL, after(40)),
            says(true, true),
            "another"
        );
        assert_eq!(witness.hear(Signal { refused: 9, ..QUIET }, INTERVAL, after(1039)), says(true, false));
        assert_eq!(witness.hear(Signal { refused: 9, ..QUIET }, INTERVAL, after(1040)), says(false, false));
    }

    #[test]
    fn a_long_wait_is_news_once_and_evidence_until_it_ends() {
        let now = Instant::now();
        let mut witness = Witness::new(QUIET);
        assert_eq!(witness.hear(waiting(5, 299), INTERVAL, now), says(false, false));
        assert_eq!(witness.hear(waiting(5, 300), INTERVAL, now), says(true, true));
        assert_eq!(witness.hear(waiting(5, 900), INTERVAL, now), says(true, false));
        assert_eq!(witness.hear(QUIET, INTERVAL, now), says(false, false), "it was answered");
        assert_eq!(witness.hear(waiting(6, 300), INTERVAL, now), says(true, true), "another");
    }

    #[test]
    fn what_a_check_has_explained_is_no_evidence_any_more() {
        let now = Instant::now();
        let mut witness = Witness::new(QUIET);
        witness.hear(waiting(5, 300), INTERVAL, now);
        witness.hear(Signal { refused: 1, ..waiting(5, 300) }, INTERVAL, now);
        witness.passed(INTERVAL, now);
        assert_eq!(
            witness.hear(Signal { refused: 1, ..waiting(5, 60_000) }, INTERVAL, now),
            says(false, false),
            "slow, not gone"
        );
        assert_eq!(witness.hear(Signal { refused: 1, ..waiting(6, 300) }, INTERVAL, now), says(true, true));
    }

    #[test]
    fn a_wait_that_nothing_ends_hides_others_for_one_interval() {
        let (start, interval) = (Instant::now(), Duration::from_secs(10));
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut witness = Witness::new(QUIET);
        assert!(witness.hear(waiting(5, 300), interval, start).news);
        for seconds in 0..10 {
            // Other checks pass, too.
            witness.passed(interval, after(seconds));
            assert!(!witness.hear(waiting(5, 300 + 1000 * seconds), interval, after(seconds)).stale);
        }
        let testimony = witness.hear(waiting(5, 10_300), interval, after(10));
        assert!(testimony.stale && !testimony.news && !testimony.against);
        assert_eq!(witness.hear(QUIET, interval, after(11)), says(false, false), "it was forgotten");
        assert_eq!(witness.hear(waiting(6, 300), interval, after(12)), says(true, true));
    }

    #[test]
    fn refusals_that_checks_do_not_see_cost_one_check_a_second() {
        let start = Instant::now();
        let mut witness = Witness::new(QUIET);
        let mut checks = 0;
        for tick in 1..=400_u32 {
            let now = start + Duration::from_millis(25) * tick;
            let testimony = witness.hear(Signal { refused: tick, ..QUIET }, INTERVAL, now);
            assert!(testimony.against, "evidence all the same");
            if testimony.news {
                checks += 1;
                witness.passed(INTERVAL, now);
            }
        }
        assert_eq!(checks, 10, "in ten seconds");
        // The last of them is checked when its time has come.
        let quiet = Signal { refused: 400, ..QUIET };
        assert!(witness.hear(quiet, INTERVAL, start + Duration::from_millis(11_100)).news);
        assert!(!witness.hear(quiet, INTERVAL, start + Duration::from_millis(11_125)).news);
    }

    /// The times of the checks that are made, in seconds, while somebody is refused every 25 ms for so many of them; `heed`
    /// says what a check has found.
    fn checks(
        interval: u64,
        seconds: u32,
        mut heed: impl FnMut(&mut Witness, Duration, Instant),
    ) -> Vec<f64> {
        let (start, interval) = (Instant::now(), Duration::from_secs(interval));
        let mut witness = Witness::new(QUIET);
        let mut times = Vec::new();
        for tick in 1..=40 * seconds {
            let now = start + Duration::from_millis(25) * tick;
            if witness.hear(Signal { refused: tick, ..QUIET }, interval, now).news {
                times.push(f64::from(tick - 1) / 40.0);
                heed(&mut witness, interval, now);
            }
        }
        times
    }

    fn found(outcome: Outcome, state: State) -> Event {
        Event {
            id: TargetId { service: 0, backend: 0 },
            report: CheckReport::new(outcome, CheckCode::L7Ok),
            state,
            since: std::time::SystemTime::now(),
            transition: None,
            successes: 0,
            failures: 0,
            silent_since: None,
        }
    }

    #[test]
    fn where_checks_are_seldom_refusals_that_they_do_not_see_bring_about_no_more_than_one_in_an_interval() {
        let well = found(Outcome::Pass, State::Ready);
        let times = checks(10, 60, |witness, interval, now| witness.heed(&well, interval, now));
        assert_eq!(times, [0.0, 2.5, 7.5, 17.5, 27.5, 37.5, 47.5, 57.5], "the first at once");
        // Nor where it is ill, and known to be.
        let failure = Outcome::Fail(Failure::NotExpected);
        let ill = found(failure, State::Draining);
        let times = checks(10, 60, |witness, interval, now| witness.heed(&ill, interval, now));
        assert_eq!(times, [0.0, 2.5, 7.5, 17.5, 27.5, 37.5, 47.5, 57.5]);
        // As long as checks find something new there is no pause at all, but what the schedule of checks makes.
        for news in [found(failure, State::Ready), found(Outcome::Fail(Failure::Silent), State::Draining)] {
            let times = checks(10, 1, |witness, interval, now| witness.heed(&news, interval, now));
            assert_eq!(times.len(), 40);
        }
    }

    #[test]
    fn a_long_pause_costs_no_check_its_connection_and_ends_when_a_check_fails() {
        let (start, interval) = (Instant::now(), Duration::from_secs(10));
        let after = |milliseconds| start + Duration::from_millis(milliseconds);
        let refused = |count| Signal { refused: count, ..QUIET };
        let mut witness = Witness::new(QUIET);
        assert_eq!(witness.hear(refused(1), interval, start), says(true, true));
        witness.heed(&found(Outcome::Pass, State::Ready), interval, after(10));
        assert_eq!(witness.hear(refused(2), interval, after(20)), says(false, false));
        witness.heed(&found(Outcome::Fail(Failure::Refused), State::Ready), interval, after(30));
        assert_eq!(witness.hear(refused(2), interval, after(40)), says(true, true), "it was true");
    }

    #[test]
    fn whoever_is_refused_after_a_quiet_interval_is_heard_at_once() {
        let interval = Duration::from_secs(10);
        let well = found(Outcome::Pass, State::Ready);
        let mut witness = Witness::new(QUIET);
        let mut now = Instant::now();
        for count in 1..20 {
            assert_eq!(
                witness.hear(Signal { refused: count, ..QUIET }, interval, now),
                says(true, true),
                "{count}"
            );
            witness.heed(&well, interval, now);
            now += interval;
        }
    }
}
