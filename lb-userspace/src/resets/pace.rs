//! How many flows may be reset now, so that a dead backend's clients do not all connect anew in the same instant. Pure.

use std::time::{Duration, Instant};

/// The most that is done at a time where there is no limit: the daemon has other work, too.
const BATCH: usize = 2048;
/// What was not used is kept for no longer than this.
const KEPT: Duration = Duration::from_millis(100);

/// At most so many flows a second.
#[derive(Clone, Debug)]
pub struct Pace {
    per_second: u32,
    /// Flows that may be done, below zero after more than that were.
    allowance: f64,
    at: Instant,
}

impl Pace {
    /// 0: no limit.
    #[must_use]
    pub fn new(per_second: u32, now: Instant) -> Self {
        Self { per_second, allowance: 0.0, at: now }
    }

    /// How many may be done now.
    pub fn allowed(&mut self, now: Instant) -> usize {
        if self.per_second == 0 {
            return BATCH;
        }
        let rate = f64::from(self.per_second);
        let most = (rate * KEPT.as_secs_f64()).max(1.0);
        let earned = now.saturating_duration_since(self.at).as_secs_f64() * rate;
        self.allowance = (self.allowance + earned).min(most);
        self.at = now;
        // What is left of a whole is never negative here.
        (self.allowance.max(0.0) as usize).min(BATCH)
    }

    /// So many were done.
    pub fn done(&mut self, count: usize) {
        self.allowance -= count as f64;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn without_a_limit_there_is_no_waiting() {
        let now = Instant::now();
        let mut pace = Pace::new(0, now);
        for _ in 0..3 {
            assert_eq!(pace.allowed(now), BATCH);
            pace.done(BATCH);
        }
    }

    #[test]
    fn ten_thousand_take_five_seconds_at_two_thousand_a_second() {
        let start = Instant::now();
        let (mut pace, mut done, mut now) = (Pace::new(2000, start), 0, start);
        while done < 10_000 {
            now += Duration::from_millis(10);
            let count = pace.allowed(now);
            pace.done(count);
            done += count;
        }
        let took = (now - start).as_secs_f64();
        assert!((4.9..=5.05).contains(&took), "{took}");
    }

    proptest! {
        #[test]
        fn it_is_never_faster_than_its_limit(
            per_second in 1..5000_u32,
            steps in proptest::collection::vec((0..400_u64, 0..4_usize), 1..60),
        ) {
            let start = Instant::now();
            let (mut pace, mut done, mut now) = (Pace::new(per_second, start), 0, start);
            for (milliseconds, more) in steps {
                now += Duration::from_millis(milliseconds);
                let count = pace.allowed(now);
                // The ways of a set come together.
                let count = if count > 0 { count + more } else { 0 };
                pace.done(count);
                done += count;
                let limit = (now - start).as_secs_f64() * f64::from(per_second);
                prop_assert!(done as f64 <= limit + 4.0, "{done} in {:?}", now - start);
            }
        }
    }
}
