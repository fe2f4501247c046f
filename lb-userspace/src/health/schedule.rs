//! When each backend is checked, and who hears of it.
//!
//! Where thousands of hosts check the same few backends, a check is left out while traffic says what it would say
//! ([`Rhythm::leaves_out`]).

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::FutureExt as _;
use tokio::{
    sync::{Notify, mpsc, watch},
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep_until},
};

use super::{
    credentials::Store,
    probe::Prober,
    report::{CheckReport, Failure, Outcome},
    state::{Change, Machine, State, Thresholds},
    transition::Transition,
};
use crate::config::{Check, CheckKind};

/// From one check to the next there are so many intervals at most while traffic proves that a backend lives.
pub const STRETCH: u32 = 3;

/// Whose result an [`Event`] is. Chosen by the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TargetId {
    /// Index of the service.
    pub service: usize,
    /// Index of the backend within it.
    pub backend: usize,
}

/// One backend to be checked.
#[derive(Clone, Debug)]
pub struct Target {
    /// Whose results these are. Unique among the targets of one [`Handle`].
    pub id: TargetId,
    /// The backend's address. The check may name another address or port.
    pub address: SocketAddr,
    /// The host name its address was found by, if by one: what its certificate is for.
    pub host: Option<String>,
    /// How it is checked.
    pub check: Check,
}

/// One finished check.
#[derive(Clone, Debug)]
pub struct Event {
    /// Whose.
    pub id: TargetId,
    /// What it found.
    pub report: CheckReport,
    /// The verdict that stands after it.
    pub state: State,
    /// Since when. For [`State::Unknown`]: since checks began.
    pub since: SystemTime,
    /// The change of state it brought about.
    pub transition: Option<Transition>,
    /// Successes in a row.
    pub successes: u32,
    /// Failures in a row.
    pub failures: u32,
    /// When the backend's silence began, if it has lasted without a break until now.
    pub silent_since: Option<std::time::Instant>,
}

impl Event {
    /// Whether the backend has answered, in whatever way.
    #[must_use]
    pub fn is_answer(&self) -> bool {
        self.silent_since.is_none() && self.report.outcome != Outcome::Local
    }
}

/// What is said to the checks of a target from outside.
#[derive(Debug, Default)]
struct Wake {
    check: Notify,
    accused: watch::Sender<bool>,
    /// When traffic last proved that the backend lives.
    heard: watch::Sender<Option<Instant>>,
    /// Until when this host's own links may be down.
    cut_off: watch::Sender<Option<Instant>>,
}

impl Wake {
    /// Whether the silence that a check found which began at `begin` may be this host's own link's.
    fn is_our_own(&self, outcome: Outcome, begin: Instant) -> bool {
        outcome == Outcome::Fail(Failure::Silent) && self.cut_off.borrow().is_some_and(|until| begin < until)
    }
}

/// Running checks. Dropping it stops them.
#[derive(Debug)]
pub struct Handle {
    running: HashMap<TargetId, Running>,
    tasks: JoinSet<()>,
    events: mpsc::Sender<Event>,
}

/// The checks of one target.
#[derive(Debug)]
struct Running {
    target: Target,
    wake: Arc<Wake>,
    task: AbortHandle,
}

impl Handle {
    /// Checks a backend now, or again as soon as the check that is running ends; a second time in a row not before
    /// `fast_interval` is over. `false`: no such target.
    pub fn check_now(&self, id: TargetId) -> bool {
        let Some(running) = self.running.get(&id) else { return false };
        running.wake.check.notify_one();
        true
    }

    /// Whether flows say that a backend is gone. A check that finds nobody there then counts twice: once for what it
    /// has seen itself, once for what they have. And its result does not wait for a connection from better times.
    pub fn accuse(&self, id: TargetId, accused: bool) {
        if let Some(running) = self.running.get(&id) {
            running.wake.accused.send_replace(accused);
        }
    }

    /// Says that this host's own links may be down until then: the silence that a check finds which begins before is not its
    /// backend's. It is left out, and the backend checked again after `fast_interval`.
    pub fn cut_off(&self, until: std::time::Instant) {
        for running in self.running.values() {
            running.wake.cut_off.send_replace(Some(until.into()));
        }
    }

    /// Says that traffic has proved then that a backend lives: a check of one that is ready may be left out for it. For
    /// targets about which this is never said, none is.
    pub fn vouch(&self, id: TargetId, heard: std::time::Instant) {
        if let Some(running) = self.running.get(&id) {
            running.wake.heard.send_replace(Some(heard.into()));
        }
    }

    /// From now on checks these targets: checks of new ones begin, of those that are gone end, and those that are the
    /// same go on undisturbed. Where only the check is another it begins anew, with the verdict that `state` says.
    pub fn update(&mut self, targets: Vec<Target>, state: impl Fn(TargetId) -> State) {
        let wanted: HashSet<_> = targets.iter().map(|target| target.id).collect();
        self.running.retain(|id, running| {
            let stays = wanted.contains(id);
            if !stays {
                running.task.abort();
            }
            stays
        });
        let same = |target: &Target| {
            let running = self.running.get(&target.id);
            running.is_some_and(|it| {
                let before = &it.target;
                (before.address, &before.host, &before.check) == (target.address, &target.host, &target.check)
            })
        };
        let begin = targets.into_iter().filter(|target| !same(target)).collect();
        self.begin(begin, state);
        while self.tasks.try_join_next().is_some() {}
    }

    fn begin(&mut self, targets: Vec<Target>, state: impl Fn(TargetId) -> State) {
        let mut store = Store::default();
        let count = u32::try_from(targets.len()).unwrap_or(u32::MAX);
        let begin = Instant::now();
        let phase = phase();
        for (target, index) in targets.into_iter().zip(0_u32..) {
            let wake = Arc::new(Wake::default());
            let prober = Prober::new(target.address, &target.check, store.credentials(&target.check))
                .found_by(target.host.as_deref());
            let rhythm = Rhythm::new(begin, target.check.clone(), index, count).shifted(phase);
            let check = keep_checking(
                target.id,
                prober,
                rhythm,
                state(target.id),
                Arc::clone(&wake),
                self.events.clone(),
            );
            let task = self.tasks.spawn(check);
            if let Some(before) = self.running.insert(target.id, Running { target, wake, task }) {
                before.task.abort();
            }
        }
    }
}

/// Checks every target until the handle is dropped, each in a task of its own, with verdicts of earlier checks, which
/// stand until enough new ones say otherwise. The first checks start at once; later ones are spread over the interval.
/// Every finished check is sent to `events`: whoever does not receive them delays the checks.
///
/// Must be called within a tokio runtime that has I/O and time enabled.
pub fn resume(
    targets: Vec<Target>,
    state: impl Fn(TargetId) -> State,
    events: mpsc::Sender<Event>,
) -> Handle {
    let mut handle = Handle { running: HashMap::new(), tasks: JoinSet::new(), events };
    handle.begin(targets, state);
    handle
}

/// Checks one backend once, as [`resume`] would the first time.
pub async fn check_once(address: SocketAddr, check: &Check) -> CheckReport {
    Prober::new(address, check, Store::default().credentials(check)).check().await
}

async fn keep_checking(
    id: TargetId,
    mut prober: Prober,
    rhythm: Rhythm,
    state: State,
    woken: Arc<Wake>,
    events: mpsc::Sender<Event>,
) {
    let at_least_one = |count| NonZeroU32::new(count).unwrap_or(NonZeroU32::MIN);
    let Check { rise, fall, kind, .. } = rhythm.check;
    let thresholds = Thresholds { rise: at_least_one(rise), fall: at_least_one(fall) };
    let mut machine = Machine::resume(thresholds, state);
    let mut since = SystemTime::now();
    let mut hurried = false;
    loop {
        let begin = Instant::now();
        let report = prober.check_doubting(accusation(&woken)).await;
        let end = Instant::now();
        if woken.is_our_own(report.outcome, begin) {
            sleep_until(rhythm.rested(end)).await;
            continue;
        }
        let outcome = report.outcome;
        let mut change = machine.observe(outcome, end.into_std());
        if report.outcome.finds_nobody() && *woken.accused.borrow() {
            let second = machine.observe(report.outcome, end.into_std());
            change = match (change, second) {
                (Some(Change { from, .. }), Some(Change { to, .. })) => Some(Change { from, to }),
                (first, second) => first.or(second),
            };
        }
        if change.is_some() {
            since = SystemTime::now();
        }
        let event = Event {
            id,
            transition: change.map(|Change { from, to }| Transition { from, to, report: report.clone() }),
            report,
            state: machine.state(),
            since,
            successes: machine.successes(),
            failures: machine.failures(),
            silent_since: machine.silent_since(),
        };
        if events.send(event).await.is_err() {
            return;
        }
        let passed = outcome == Outcome::Pass && machine.state() == State::Ready;
        let mut next = rhythm.next(end, machine.verdict_pending());
        // Whoever has just been asked in a hurry is not asked again at once, however many flows complain.
        let rested = if hurried { rhythm.rested(end) } else { end };
        loop {
            tokio::select! {
                // A backend without checks is asked only by `check_now`.
                // What was asked for meanwhile is answered by this one.
                () = sleep_until(next), if kind != CheckKind::None => {
                    hurried = woken.check.notified().now_or_never().is_some();
                }
                () = notified(&woken, rested) => hurried = true,
            }
            let heard = woken.heard.borrow().filter(|_| passed && !*woken.accused.borrow());
            if hurried || !rhythm.leaves_out(next, end, heard) {
                break;
            }
            next += rhythm.interval();
        }
    }
}

/// Comes to its end when the target is to be checked now, but not before `rested`.
async fn notified(woken: &Wake, rested: Instant) {
    sleep_until(rested).await;
    woken.check.notified().await;
}

/// Hosts that were started together are not to check together: a random part of an interval, the same for all targets,
/// which stay spread.
fn phase() -> f64 {
    use std::hash::BuildHasher as _;
    // Its keys are random.
    let number = std::hash::RandomState::new().hash_one(0u8) >> 32;
    number as f64 / f64::from(u32::MAX)
}

/// Comes to its end when the target is accused, or is already.
async fn accusation(woken: &Wake) {
    // The sender is ours: it cannot be gone.
    let _ = woken.accused.subscribe().wait_for(|accused| *accused).await;
}

/// Checks of standing verdicts fall on a grid of the interval that is shifted for each backend, so that they stay
/// spread however long the checks and the hurried ones in between take.
struct Rhythm {
    begin: Instant,
    check: Check,
}

impl Rhythm {
    /// The `index`th of `count` targets that begin together.
    fn new(begin: Instant, check: Check, index: u32, count: u32) -> Self {
        let step = check.interval / count.max(1);
        // Half a step, so that the first target's second check does not follow its first at once.
        Self { begin: begin + step * index + step / 2, check }
    }

    /// Before this nobody is checked in a hurry a second time, after a check that ended at `end`.
    fn rested(&self, end: Instant) -> Instant {
        end + self.check.fast_interval.min(self.check.interval)
    }

    /// The same, later by this part of an interval.
    fn shifted(self, part: f64) -> Self {
        Self { begin: self.begin + self.check.interval.mul_f64(part.clamp(0.0, 1.0)), ..self }
    }

    fn interval(&self) -> Duration {
        self.check.interval.max(Duration::from_millis(1))
    }

    /// Whether the check that is due at `due` is left out. The last one ended at `checked`; since then, and within this
    /// interval, traffic must have proved that the backend lives (`heard`), and it must not be the third to be due. As soon
    /// as there is no such proof, checks come as ever.
    fn leaves_out(&self, due: Instant, checked: Instant, heard: Option<Instant>) -> bool {
        let proven = heard.is_some_and(|heard| heard > checked && heard + self.interval() >= due);
        proven && due + self.interval() <= checked + self.interval() * STRETCH
    }

    /// When to check next, after a check that ended at `end`.
    fn next(&self, end: Instant, verdict_pending: bool) -> Instant {
        let Check { fast_interval, .. } = self.check;
        let interval = self.interval();
        if verdict_pending {
            return end + fast_interval.min(interval);
        }
        let soonest = end + fast_interval.min(interval / 2);
        let passed = soonest.saturating_duration_since(self.begin);
        let steps = u32::try_from(passed.as_nanos().div_ceil(interval.as_nanos())).unwrap_or(u32::MAX);
        self.begin.checked_add(interval.saturating_mul(steps)).unwrap_or(soonest)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const INTERVAL: Duration = Duration::from_secs(1);
    const FAST: Duration = Duration::from_millis(200);

    fn rhythm(begin: Instant, index: u32, count: u32) -> Rhythm {
        let check = Check {
            kind: CheckKind::Tcp,
            path: String::new(),
            expect: Vec::new(),
            interval: INTERVAL,
            fast_interval: FAST,
            connect_timeout: INTERVAL,
            timeout: INTERVAL,
            rise: 2,
            fall: 2,
            port: None,
            address: None,
            server_name: None,
            ca_file: None,
            client_cert: None,
            token_file: None,
            kubeconfig: None,
            insecure_skip_tls_verify: false,
        };
        Rhythm::new(begin, check, index, count)
    }

    #[test]
    fn checks_are_spread_over_the_interval() {
        let begin = Instant::now();
        let offset = |index| rhythm(begin, index, 4).next(begin, false) - begin;
        let mut offsets: Vec<_> = (0..4).map(offset).collect();
        offsets.sort_unstable();
        assert!(offsets.windows(2).all(|pair| pair[1] - pair[0] == INTERVAL / 4), "{offsets:?}");
    }

    #[test]
    fn a_standing_verdict_is_checked_once_an_interval_however_long_checks_take() {
        let begin = Instant::now();
        let rhythm = rhythm(begin, 1, 3);
        let mut start = rhythm.next(begin, false);
        for milliseconds in [0, 4, 100, 799] {
            let next = rhythm.next(start + Duration::from_millis(milliseconds), false);
            assert_eq!(next - start, INTERVAL, "{milliseconds}");
            start = next;
        }
        let next = rhythm.next(start + Duration::from_millis(900), false);
        assert_eq!(next - start, 2 * INTERVAL, "never one after the other without a pause");
    }

    #[test]
    fn a_check_is_left_out_for_fresh_proof_and_twice_in_a_row() {
        let begin = Instant::now();
        let rhythm = rhythm(begin, 0, 1);
        let checked = begin + INTERVAL / 10;
        let due = |number: u32| begin + INTERVAL * number;
        let fresh = |number: u32| Some(due(number) - INTERVAL / 2);
        assert!(rhythm.leaves_out(due(1), checked, fresh(1)));
        assert!(rhythm.leaves_out(due(2), checked, fresh(2)));
        assert!(!rhythm.leaves_out(due(3), checked, fresh(3)), "every third is made");
        assert!(!rhythm.leaves_out(due(1), checked, None));
        assert!(!rhythm.leaves_out(due(1), checked, Some(checked)), "the check itself has seen that");
        assert!(
            !rhythm.leaves_out(due(2), checked, Some(due(1) - INTERVAL / 10)),
            "nothing in this interval"
        );
    }

    proptest! {
        /// Whatever traffic says: no more than three intervals from one check to the next, and no more than one after the
        /// last proof, or two after it where it came right after a check was left out.
        #[test]
        fn no_check_is_left_out_for_too_long(
            part in 0.0..1.0_f64,
            duration in 0..900_u64,
            heard in proptest::collection::vec(0..4_000_u64, 0..40),
        ) {
            let begin = Instant::now();
            let rhythm = rhythm(begin, 0, 1).shifted(part);
            let first = rhythm.next(begin, false);
            prop_assert!(first <= begin + INTERVAL * 2);
            let checked = first + Duration::from_millis(duration);
            let latest = |due: Instant| {
                let times = heard.iter().map(|at| first + Duration::from_millis(*at));
                times.filter(|at| *at <= due).max()
            };
            let mut due = rhythm.next(checked, false);
            let normal = due;
            let mut left_out = 0;
            while rhythm.leaves_out(due, checked, latest(due)) {
                let proof = latest(due);
                prop_assert!(proof.is_some_and(|at| at > checked && due - at <= INTERVAL));
                due += INTERVAL;
                left_out += 1;
            }
            prop_assert!(left_out < STRETCH);
            prop_assert!(left_out == 0 || due - checked <= INTERVAL * STRETCH);
            if latest(normal).is_none_or(|at| at <= checked) {
                prop_assert_eq!(due, normal);
            }
        }
    }

    #[test]
    fn hosts_that_start_together_check_at_different_times() {
        let phases: Vec<_> = (0..64).map(|_| phase()).collect();
        assert!(phases.iter().all(|phase| (0.0..=1.0).contains(phase)));
        let early = phases.iter().filter(|phase| **phase < 0.5).count();
        assert!((8..56).contains(&early), "{phases:?}");
    }

    #[test]
    fn a_pending_verdict_is_checked_soon_and_then_the_spread_is_as_before() {
        let begin = Instant::now();
        let rhythm = rhythm(begin, 2, 3);
        let hurried = rhythm.next(begin, true);
        assert_eq!(hurried - begin, FAST);
        let offset = rhythm.next(begin, false) - begin;
        let after = rhythm.next(hurried, false) - begin;
        assert_eq!(after.as_nanos() % INTERVAL.as_nanos(), offset.as_nanos() % INTERVAL.as_nanos());
        assert!(after - FAST <= INTERVAL + FAST);
    }
}
