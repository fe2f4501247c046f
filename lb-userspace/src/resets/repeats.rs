//! What is said again after 100 ms and after a second. Pure: the time comes in as an argument.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Since it was said first.
const AFTER: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(1)];

/// Things that are said again. Each waits in the order in which it was said, so that the first is always the next.
#[derive(Clone, Debug)]
pub struct Repeats<T> {
    waiting: [VecDeque<(Instant, T)>; 2],
}

impl<T> Default for Repeats<T> {
    fn default() -> Self {
        Self { waiting: [VecDeque::new(), VecDeque::new()] }
    }
}

impl<T> Repeats<T> {
    /// Was said now, for the first time.
    pub fn said(&mut self, what: T, now: Instant) {
        self.waiting[0].push_back((now, what));
    }

    /// What is to be said again now, once for each time that has come.
    pub fn due(&mut self, now: Instant) -> Vec<T>
    where
        T: Clone,
    {
        let mut due = Vec::new();
        let [soon, late] = &mut self.waiting;
        while let Some((said, what)) = pop_due(soon, now, AFTER[0]) {
            due.push(what.clone());
            late.push_back((said, what));
        }
        while let Some((_, what)) = pop_due(late, now, AFTER[1]) {
            due.push(what);
        }
        due
    }

    /// When the next is due.
    #[must_use]
    pub fn next(&self) -> Option<Instant> {
        let first = |(waiting, after): (&VecDeque<(Instant, T)>, Duration)| {
            waiting.front().map(|(said, _)| *said + after)
        };
        self.waiting.iter().zip(AFTER).filter_map(first).min()
    }
}

fn pop_due<T>(waiting: &mut VecDeque<(Instant, T)>, now: Instant, after: Duration) -> Option<(Instant, T)> {
    let (said, _) = waiting.front()?;
    if *said + after > now { None } else { waiting.pop_front() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_said_again_twice_in_its_time() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut repeats = Repeats::default();
        assert_eq!(repeats.next(), None);
        repeats.said("a", at(0));
        repeats.said("b", at(50));
        assert_eq!(repeats.next(), Some(at(100)));
        assert!(repeats.due(at(99)).is_empty());
        assert_eq!(repeats.due(at(120)), ["a"]);
        assert_eq!(repeats.due(at(160)), ["b"]);
        assert_eq!(repeats.next(), Some(at(1000)));
        assert_eq!(repeats.due(at(1010)), ["a"]);
        assert_eq!(repeats.due(at(2000)), ["b"]);
        assert_eq!((repeats.next(), repeats.due(at(9000)).len()), (None, 0));
    }

    #[test]
    fn whoever_comes_late_says_it_once_for_each_time() {
        let start = Instant::now();
        let mut repeats = Repeats::default();
        repeats.said("a", start);
        assert_eq!(repeats.due(start + Duration::from_secs(5)), ["a", "a"]);
        assert_eq!(repeats.next(), None);
    }
}
