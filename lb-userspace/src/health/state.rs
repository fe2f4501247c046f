//! From results to a state. Pure: the time comes in as an argument.
//!
//! | the last results | state |
//! |---|---|
//! | one success from *unknown*; `rise` successes after a failure verdict | ready |
//! | `fall` failures, at least one of the last `fall` an answer of some kind | draining |
//! | `fall` failures, all of the last `fall` silence | silent |
//!
//! Silence is the grave verdict ([`Vigil`](super::Vigil) resets connections on it when it lasts), so every doubt goes the other way:
//! mixed failures are *draining*, any answer from a silent backend makes it *draining* at once, and a result
//! that is our own host's trouble changes nothing but restarts the clock of [`Machine::silent_since`].

use std::{fmt, num::NonZeroU32, time::Instant};

use super::report::{Failure, Outcome};

/// What a backend's checks say about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// No verdict yet.
    Unknown,
    /// New flows may go there.
    Ready,
    /// It lives, and must get no new flows; those it has are kept.
    Draining,
    /// It does not answer below HTTP; no new flows, those it has are kept.
    Silent,
    /// Silent for so long, and not a word of it in the data path, that those it has are reset. Not the checks' verdict
    /// alone: see [`Vigil`](super::Vigil).
    Dead,
}

impl State {
    /// The word for it in status, logs and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Silent => "silent",
            Self::Dead => "dead",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// How many results in a row make a verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thresholds {
    /// Successes that make a failed backend ready again.
    pub rise: NonZeroU32,
    /// Failures that make a backend not ready.
    pub fall: NonZeroU32,
}

/// A change of state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Before.
    pub from: State,
    /// After.
    pub to: State,
}

/// One backend's state and what is pending.
#[derive(Clone, Debug)]
pub struct Machine {
    thresholds: Thresholds,
    state: State,
    successes: u32,
    failures: u32,
    /// Silent results in a row, of the failures in a row.
    silences: u32,
    silent_since: Option<Instant>,
}

impl Machine {
    /// A backend nobody has asked yet.
    #[must_use]
    pub fn new(thresholds: Thresholds) -> Self {
        Self::resume(thresholds, State::Unknown)
    }

    /// A backend with a verdict of earlier checks, which stands until enough new ones say otherwise.
    #[must_use]
    pub fn resume(thresholds: Thresholds, state: State) -> Self {
        // As many failures as made the verdict: one answer ends silence.
        let fall = thresholds.fall.get();
        let failures = if matches!(state, State::Unknown | State::Ready) { 0 } else { fall };
        let silences = if state == State::Silent { fall } else { 0 };
        Self { thresholds, state, successes: 0, failures, silences, silent_since: None }
    }

    /// The verdict that stands.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// Successes in a row, up to now.
    #[must_use]
    pub fn successes(&self) -> u32 {
        self.successes
    }

    /// Failures in a row, up to now.
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// When the silence began that has had no break: no answer of any kind, no trouble of our own.
    #[must_use]
    pub fn silent_since(&self) -> Option<Instant> {
        self.silent_since
    }

    /// Whether the next results may change the verdict, so that they should come soon.
    #[must_use]
    pub fn verdict_pending(&self) -> bool {
        match self.state {
            State::Unknown => true,
            State::Ready => self.failures > 0,
            State::Draining => self.successes > 0 || self.silences > 0,
            State::Silent | State::Dead => self.successes > 0,
        }
    }

    /// Takes one result into account.
    pub fn observe(&mut self, outcome: Outcome, now: Instant) -> Option<Change> {
        let next = match outcome {
            Outcome::Local => {
                self.silent_since = None;
                return None;
            }
            Outcome::Pass => self.passed(),
            Outcome::Fail(failure) => self.failed(failure, now),
        };
        let change = Change { from: self.state, to: next };
        self.state = next;
        (change.from != change.to).then_some(change)
    }

    fn passed(&mut self) -> State {
        self.successes = self.successes.saturating_add(1);
        self.failures = 0;
        self.silences = 0;
        self.silent_since = None;
        match self.state {
            State::Unknown | State::Ready => State::Ready,
            _ if self.successes >= self.thresholds.rise.get() => State::Ready,
            State::Draining | State::Silent | State::Dead => State::Draining,
        }
    }

    fn failed(&mut self, failure: Failure, now: Instant) -> State {
        self.successes = 0;
        self.failures = self.failures.saturating_add(1);
        if failure == Failure::Silent {
            self.silences = self.silences.saturating_add(1);
            self.silent_since.get_or_insert(now);
        } else {
            self.silences = 0;
            self.silent_since = None;
        }
        // While silent there are always `fall` failures behind us: the first answer makes it draining.
        let fall = self.thresholds.fall.get();
        if self.silences >= fall {
            State::Silent
        } else if self.failures >= fall {
            State::Draining
        } else {
            self.state
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const WRONG: Outcome = Outcome::Fail(Failure::NotExpected);
    const SILENT: Outcome = Outcome::Fail(Failure::Silent);

    fn thresholds(rise: u32, fall: u32) -> Thresholds {
        Thresholds { rise: NonZeroU32::new(rise).unwrap(), fall: NonZeroU32::new(fall).unwrap() }
    }

    fn states(thresholds: Thresholds, outcomes: &[Outcome]) -> Vec<State> {
        let start = Instant::now();
        let mut machine = Machine::new(thresholds);
        outcomes
            .iter()
            .zip(1..)
            .map(|(outcome, second)| {
                machine.observe(*outcome, start + Duration::from_secs(second));
                machine.state()
            })
            .collect()
    }

    #[test]
    fn an_apiserver_is_restarted() {
        use State::{Draining, Ready};
        assert_eq!(
            states(thresholds(2, 2), &[Outcome::Pass, WRONG, WRONG, WRONG, Outcome::Pass, Outcome::Pass]),
            [Ready, Ready, Draining, Draining, Draining, Ready]
        );
    }

    #[test]
    fn an_apiserver_is_frozen_and_thaws() {
        use State::{Draining, Ready, Silent};
        assert_eq!(
            states(thresholds(2, 2), &[Outcome::Pass, SILENT, SILENT, SILENT, Outcome::Pass, Outcome::Pass]),
            [Ready, Ready, Silent, Silent, Draining, Ready]
        );
    }

    #[test]
    fn mixed_failures_are_not_silence() {
        use State::{Draining, Ready, Silent};
        assert_eq!(
            states(thresholds(2, 2), &[Outcome::Pass, SILENT, WRONG, SILENT, SILENT, WRONG]),
            [Ready, Ready, Draining, Draining, Silent, Draining]
        );
    }

    #[test]
    fn an_unknown_backend_needs_fall_failures_too() {
        use State::{Draining, Ready, Unknown};
        assert_eq!(states(thresholds(2, 2), &[WRONG, WRONG]), [Unknown, Draining]);
        assert_eq!(states(thresholds(2, 3), &[WRONG, WRONG, Outcome::Pass]), [Unknown, Unknown, Ready]);
    }

    #[test]
    fn silence_is_timed_from_its_first_result_and_our_own_trouble_restarts_the_clock() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut machine = Machine::new(thresholds(2, 2));
        machine.observe(SILENT, at(1));
        machine.observe(SILENT, at(2));
        assert_eq!((machine.state(), machine.silent_since()), (State::Silent, Some(at(1))));
        machine.observe(Outcome::Local, at(3));
        assert_eq!((machine.state(), machine.silent_since()), (State::Silent, None));
        machine.observe(SILENT, at(4));
        assert_eq!(machine.silent_since(), Some(at(4)));
        machine.observe(WRONG, at(5));
        assert_eq!((machine.state(), machine.silent_since()), (State::Draining, None));
    }

    #[test]
    fn checks_hurry_only_while_a_verdict_is_pending() {
        let now = Instant::now();
        let mut machine = Machine::new(thresholds(2, 2));
        let mut pending = |outcome| {
            machine.observe(outcome, now);
            machine.verdict_pending()
        };
        assert!(!pending(Outcome::Pass));
        assert!(pending(WRONG), "ready, may fall");
        assert!(!pending(WRONG), "draining stands");
        assert!(pending(SILENT), "draining, may be silent");
        assert!(!pending(SILENT), "silent stands");
        assert!(pending(Outcome::Pass), "may rise");
        assert!(!pending(Outcome::Pass), "ready stands");
    }

    fn any_outcome() -> impl Strategy<Value = Outcome> {
        prop_oneof![
            3 => Just(Outcome::Pass),
            1 => Just(Outcome::Local),
            1 => Just(Outcome::Fail(Failure::NotExpected)),
            1 => Just(Outcome::Fail(Failure::NoAnswer)),
            1 => Just(Outcome::Fail(Failure::Refused)),
            3 => Just(Outcome::Fail(Failure::Silent)),
        ]
    }

    proptest! {
        #[test]
        fn the_state_follows_from_the_results(
            rise in 1_u32..4,
            fall in 1_u32..4,
            outcomes in proptest::collection::vec(any_outcome(), 0..60),
        ) {
            let start = Instant::now();
            let mut machine = Machine::new(thresholds(rise, fall));
            // The verdicts' evidence, kept apart from the machine: the results that are no trouble of ours.
            let mut seen: Vec<Outcome> = Vec::new();
            for (second, outcome) in outcomes.into_iter().enumerate() {
                let now = start + Duration::from_secs(second as u64);
                let before = machine.state();
                let change = machine.observe(outcome, now);
                let after = machine.state();
                prop_assert_eq!(change, (before != after).then_some(Change { from: before, to: after }));

                if outcome == Outcome::Local {
                    prop_assert_eq!(before, after);
                    prop_assert_eq!(machine.silent_since(), None);
                    continue;
                }
                seen.push(outcome);
                let last = |count: u32| seen.iter().rev().take(count as usize);
                let row = |wanted: fn(&Outcome) -> bool| {
                    u32::try_from(seen.iter().rev().take_while(|outcome| wanted(outcome)).count()).unwrap()
                };
                let passes = row(|outcome| *outcome == Outcome::Pass);
                let failures = row(|outcome| *outcome != Outcome::Pass);
                let silences = row(|outcome| *outcome == SILENT);
                prop_assert_eq!((machine.successes(), machine.failures()), (passes, failures));

                // Failures.
                prop_assert!(failures < fall || matches!(after, State::Draining | State::Silent));
                prop_assert!(failures == 0 || after != State::Ready || before == State::Ready);
                prop_assert_eq!(silences >= fall, after == State::Silent && failures >= fall
                    && last(fall).all(|outcome| *outcome == SILENT));
                prop_assert!(after != State::Silent || silences > 0, "an answer ends silence");
                // Successes.
                if outcome == Outcome::Pass {
                    match before {
                        State::Unknown | State::Ready => prop_assert_eq!(after, State::Ready),
                        State::Draining | State::Silent | State::Dead => {
                            prop_assert_eq!(after == State::Ready, passes >= rise);
                        }
                    }
                }
                // Nothing is forgotten.
                prop_assert!(after != State::Unknown || before == State::Unknown);
                prop_assert!(machine.silent_since().is_none_or(|since| since <= now));
                prop_assert_eq!(machine.silent_since().is_some(), silences > 0);
            }
        }
    }
}
