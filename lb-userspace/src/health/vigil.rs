//! When silence is death. Pure: the time comes in as an argument.
//!
//! A backend that is silent gets no new flows, which is cheap and may be quick. Resetting those it has is an outage that
//! we cause, so it needs proof: silence without a break for `reset_after`, not one byte of payload through the data path
//! meanwhile, and somebody else of its service who answered us in that time. For we may be the blind one: when nobody
//! answers, it is our own link that is gone, and everybody's clock begins anew when somebody is seen again; and when nobody
//! has looked for a while, this process was stopped. So a service's only backend never dies.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// What is known of a backend at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sighting {
    /// Its id.
    pub id: usize,
    /// Its state is *silent*, and since then there was no break: no answer, and no trouble of our own.
    pub silent_since: Option<Instant>,
    /// When its last check ended, if that was answered, in whatever way.
    pub answered: Option<Instant>,
    /// When it last sent payload to a client.
    pub heard: Option<Instant>,
}

/// Watches over the backends of one service.
#[derive(Clone, Debug)]
pub struct Vigil {
    reset_after: Duration,
    /// When each of the dead was found dead, by id.
    dead: BTreeMap<usize, Instant>,
    blind_until: Option<Instant>,
    looked: Option<Instant>,
}

impl Vigil {
    /// Over backends none of which is dead.
    #[must_use]
    pub fn new(reset_after: Duration) -> Self {
        Self { reset_after, dead: BTreeMap::new(), blind_until: None, looked: None }
    }

    /// From now on silence is death after this long. The dead stay dead.
    pub fn set_reset_after(&mut self, reset_after: Duration) {
        self.reset_after = reset_after;
    }

    /// Looks at all of them. Returns the ids of those who have died since the last time. To be called several times in
    /// [`Vigil::sight`] while somebody is silent.
    pub fn judge(&mut self, seen: &[Sighting], now: Instant) -> Vec<usize> {
        let away = self.looked.is_some_and(|looked| now.saturating_duration_since(looked) > self.sight());
        if away || seen.iter().all(|backend| backend.answered.is_none()) {
            self.blind_until = Some(now);
        }
        self.looked = Some(now);
        let times = seen.iter().filter_map(|it| Some((it.id, self.time_of_death(it, seen, now)?)));
        let dead: BTreeMap<_, _> = times.collect();
        let died = dead.keys().filter(|id| !self.dead.contains_key(id)).copied().collect();
        self.dead = dead;
        died
    }

    /// Whether it was dead when last looked at.
    #[must_use]
    pub fn is_dead(&self, id: usize) -> bool {
        self.dead.contains_key(&id)
    }

    /// Whoever has not looked for longer was stopped meanwhile.
    #[must_use]
    pub fn sight(&self) -> Duration {
        (self.reset_after / 4).clamp(Duration::from_millis(100), Duration::from_secs(1))
    }

    /// Whether it matters now what everybody's next check says. Somebody has fallen silent, and it is yet to be found out
    /// whether it is they or we, and whether they are back already; or payload has put off their death until now. When that
    /// has led to nothing for long enough, checks may come as ever.
    #[must_use]
    pub fn is_pressing(&self, seen: &[Sighting], now: Instant) -> bool {
        // Nobody dies while nobody answers, and nobody is to be asked more for it.
        let blind = self.blind_until.is_some_and(|until| Some(until) == self.looked);
        let elapsed = |since: Instant| now.saturating_duration_since(since);
        let presses = |it: &Sighting| {
            let Some(silent_since) = it.silent_since.filter(|_| !self.is_dead(it.id)) else { return false };
            let first = self.blind_until.map_or(silent_since, |until| until.max(silent_since));
            let last = it.heard.map_or(first, |heard| heard.max(first));
            elapsed(first) < self.reset_after
                || (self.reset_after / 2..self.reset_after * 2).contains(&elapsed(last))
        };
        !blind && seen.iter().any(presses)
    }

    /// How old the results of the others may become meanwhile, where backends are checked every `interval`: the answer that
    /// is the proof must be from the latter half of `reset_after`.
    #[must_use]
    pub fn pace(&self, interval: Duration) -> Duration {
        let sight = self.sight();
        interval.clamp(sight, sight.max(self.reset_after / 3))
    }

    fn time_of_death(&self, it: &Sighting, seen: &[Sighting], now: Instant) -> Option<Instant> {
        let silent_since = it.silent_since?;
        if let Some(died) = self.dead.get(&it.id).copied() {
            // Whoever speaks is not dead.
            return it.heard.is_none_or(|heard| heard <= died).then_some(died);
        }
        let begin = [Some(silent_since), it.heard, self.blind_until].into_iter().flatten().max()?;
        if now.saturating_duration_since(begin) < self.reset_after {
            return None;
        }
        // In the latter half of that time: an answer from before our link went would prove nothing.
        let recent = |answered: Instant| {
            answered > begin && now.saturating_duration_since(answered) <= self.reset_after / 2
        };
        let others = seen.iter().filter(|other| other.id != it.id);
        others.filter_map(|other| other.answered).any(recent).then_some(now)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RESET_AFTER: Duration = Duration::from_secs(5);

    /// A service's backends on a clock of tenths of a second.
    struct Scene {
        start: Instant,
        now: u32,
        vigil: Vigil,
        seen: Vec<Sighting>,
    }

    impl Scene {
        fn new(backends: usize) -> Self {
            let start = Instant::now();
            let alive = |id| Sighting { id, answered: Some(start), ..Sighting::default() };
            Self { start, now: 0, vigil: Vigil::new(RESET_AFTER), seen: (0..backends).map(alive).collect() }
        }

        fn at(&self, tenth: u32) -> Instant {
            self.start + Duration::from_millis(100) * tenth
        }

        fn answers(&mut self, index: usize) {
            self.seen[index].answered = Some(self.at(self.now));
            self.seen[index].silent_since = None;
        }

        fn is_silent(&mut self, index: usize) {
            let now = self.at(self.now);
            self.seen[index].answered = None;
            self.seen[index].silent_since.get_or_insert(now);
        }

        /// Lets time pass, with `results` every second, and looks every tenth. Returns who died, and when.
        fn pass(&mut self, tenths: u32, results: impl Fn(&mut Self)) -> Vec<(u32, usize)> {
            let mut deaths = Vec::new();
            for _ in 0..tenths {
                if self.now.is_multiple_of(10) {
                    results(self);
                }
                let died = self.vigil.judge(&self.seen, self.at(self.now));
                deaths.extend(died.into_iter().map(|index| (self.now, index)));
                self.now += 1;
            }
            deaths
        }
    }

    #[test]
    fn one_of_three_dies_when_its_time_is_over_and_once() {
        let mut scene = Scene::new(3);
        let deaths = scene.pass(200, |scene| {
            scene.is_silent(1);
            scene.answers(0);
            scene.answers(2);
        });
        assert_eq!(deaths, [(50, 1)]);
        assert!(scene.vigil.is_dead(1) && !scene.vigil.is_dead(0));
        scene.answers(1);
        assert_eq!(scene.pass(1, |_| {}), []);
        assert!(!scene.vigil.is_dead(1), "an answer is life");
    }

    #[test]
    fn three_seconds_are_a_snapshot() {
        let mut scene = Scene::new(2);
        for _ in 0..5 {
            let deaths = scene.pass(30, |scene| {
                scene.is_silent(0);
                scene.answers(1);
            });
            assert_eq!(deaths, []);
            scene.pass(10, |scene| scene.answers(0));
        }
    }

    #[test]
    fn all_together_are_our_own_blindness_and_the_clock_begins_anew_after_it() {
        let mut scene = Scene::new(3);
        let all = |scene: &mut Scene| (0..3).for_each(|index| scene.is_silent(index));
        assert_eq!(scene.pass(300, all), []);
        // Two of them are back; the third has its full time from now on.
        let deaths = scene.pass(100, |scene| {
            scene.answers(0);
            scene.answers(1);
        });
        assert_eq!(deaths, [(349, 2)], "five seconds after the last moment of blindness");
    }

    #[test]
    fn a_lone_backend_never_dies() {
        let mut scene = Scene::new(1);
        assert_eq!(scene.pass(1000, |scene| scene.is_silent(0)), []);
    }

    #[test]
    fn payload_is_a_veto_and_life_after_death() {
        let mut scene = Scene::new(2);
        let half_dead = |scene: &mut Scene| {
            scene.is_silent(0);
            scene.answers(1);
        };
        scene.pass(40, half_dead);
        scene.seen[0].heard = Some(scene.at(40));
        assert_eq!(scene.pass(100, half_dead), [(90, 0)]);
        scene.seen[0].heard = Some(scene.at(scene.now));
        scene.pass(1, |_| {});
        assert!(!scene.vigil.is_dead(0));
    }

    #[test]
    fn trouble_of_our_own_begins_the_clock_anew() {
        let mut scene = Scene::new(2);
        let half_dead = |scene: &mut Scene| {
            scene.is_silent(0);
            scene.answers(1);
        };
        scene.pass(40, half_dead);
        scene.seen[0].silent_since = None;
        assert_eq!(scene.pass(100, half_dead), [(90, 0)]);
    }

    #[test]
    fn a_daemon_that_was_stopped_has_seen_nothing() {
        let mut scene = Scene::new(2);
        let half_dead = |scene: &mut Scene| {
            scene.is_silent(0);
            scene.answers(1);
        };
        scene.pass(20, half_dead);
        scene.now = 200;
        assert_eq!(scene.pass(100, half_dead), [(250, 0)]);
    }

    #[test]
    fn an_old_answer_of_the_others_proves_nothing() {
        let mut scene = Scene::new(2);
        let deaths = scene.pass(300, |scene| scene.is_silent(0));
        assert_eq!(deaths, [], "the other was last seen before the silence began");
    }

    #[test]
    fn a_reload_wakes_no_dead_and_buries_nobody() {
        let mut scene = Scene::new(3);
        let without_the_first = |scene: &mut Scene| {
            scene.answers(0);
            scene.is_silent(1);
            scene.answers(2);
        };
        assert_eq!(scene.pass(60, without_the_first), [(50, 1)]);
        scene.vigil.set_reset_after(RESET_AFTER * 2);
        let first = scene.seen.remove(0);
        assert_eq!(scene.vigil.judge(&scene.seen, scene.at(60)), [0_usize; 0]);
        assert!(scene.vigil.is_dead(1), "it was not the first of them that died");
        scene.seen.insert(0, first);
        assert_eq!(scene.pass(100, without_the_first), []);
        assert!(scene.vigil.is_dead(1));
    }

    proptest! {
        /// Whoever dies was silent and said nothing for the whole time, and somebody else was seen in it; and nobody dies
        /// while all are silent.
        #[test]
        fn nobody_dies_without_proof(
            backends in 1..4_usize,
            story in proptest::collection::vec((0..4_usize, 0..4_u8, 0..30_u32), 0..120),
        ) {
            let mut scene = Scene::new(backends);
            let mut spoke: Vec<u32> = vec![0; backends];
            let mut blind = 0;
            for (index, what, tenths) in story {
                let index = index % backends;
                match what {
                    0 => {
                        scene.answers(index);
                        spoke[index] = scene.now;
                    }
                    1 => {
                        let heard = scene.at(scene.now);
                        scene.seen[index].heard = Some(heard);
                        spoke[index] = scene.now;
                    }
                    2 => {
                        scene.seen[index].silent_since = None;
                        spoke[index] = scene.now;
                    }
                    _ => scene.is_silent(index),
                }
                for (died_at, dead) in scene.pass(tenths, |_| {}) {
                    prop_assert!(scene.seen[dead].silent_since.is_some());
                    prop_assert!(died_at - spoke[dead] >= 50);
                    prop_assert!(died_at - blind >= 50);
                    let witness = |other: usize| other != dead && scene.seen[other].answered
                        .is_some_and(|at| at + RESET_AFTER / 2 >= scene.at(died_at));
                    prop_assert!((0..backends).any(witness));
                }
                if tenths > 0 && scene.seen.iter().all(|it| it.answered.is_none()) {
                    blind = scene.now - 1;
                }
            }
        }
    }

    #[test]
    fn results_press_while_a_silence_may_become_death_and_not_for_ever() {
        let mut scene = Scene::new(2);
        let pressing = |scene: &Scene| scene.vigil.is_pressing(&scene.seen, scene.at(scene.now));
        scene.pass(1, |_| {});
        assert!(!pressing(&scene), "everybody is well");
        let pass = |scene: &mut Scene, tenths, answers, speaks| {
            let mut pressed = Vec::new();
            for _ in 0..tenths {
                scene.is_silent(1);
                if answers {
                    scene.answers(0);
                } else {
                    scene.is_silent(0);
                }
                if speaks {
                    scene.seen[1].heard = Some(scene.at(scene.now));
                }
                let at = scene.at(scene.now);
                scene.vigil.judge(&scene.seen, at);
                pressed.push(pressing(scene));
                scene.now += 1;
            }
            pressed
        };
        // It is silent, and payload says that it lives: after `reset_after` that is known.
        let pressed = pass(&mut scene, 600, true, true);
        assert!(pressed[..49].iter().all(|it| *it) && !pressed[51..].iter().any(|it| *it), "{pressed:?}");
        // It speaks no more: in the latter half of its time it matters again, until it is dead.
        let pressed = pass(&mut scene, 100, true, false);
        assert!(!pressed[..24].iter().any(|it| *it) && pressed[26..48].iter().all(|it| *it), "{pressed:?}");
        assert!(scene.vigil.is_dead(1) && !pressed[51..].iter().any(|it| *it), "{pressed:?}");
        // We are blind: nobody can die.
        let mut scene = Scene::new(2);
        let pressed = pass(&mut scene, 600, false, false);
        assert!(!pressed.iter().any(|it| *it), "{pressed:?}");
        // Somebody is seen again: its time begins.
        let pressed = pass(&mut scene, 45, true, false);
        assert!(pressed.iter().all(|it| *it), "{pressed:?}");
    }

    #[test]
    fn the_others_are_asked_as_seldom_as_the_proof_allows() {
        let pace = |reset_after, interval| {
            Vigil::new(Duration::from_millis(reset_after)).pace(Duration::from_millis(interval)).as_millis()
        };
        assert_eq!(pace(5_000, 1_000), 1_000);
        assert_eq!(pace(5_000, 10_000), 1_666);
        assert_eq!(pace(60_000, 10_000), 10_000);
        assert_eq!(pace(1_000, 1_000), 333);
        assert_eq!(pace(1_000, 100), 250);
    }
}
