//! How busy the machine was: what figures are worth on a machine that others use, too.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde::Serialize;

/// A client that begins so late was not kept waiting by the network but by the machine.
const LATE: Duration = Duration::from_millis(100);

/// What it was like during a scenario, in percent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Load {
    /// Of all processors' time was spent, by whomever.
    pub(super) busy_percent: f64,
    /// Of the time somebody who could have gone on waited for a processor. None: this kernel does not say
    /// (`CONFIG_PSI`).
    pub(super) waiting_percent: Option<f64>,
    /// Of the new connections were begun more than 100 ms after their time.
    pub(super) late_percent: f64,
}

impl Load {
    /// The worse of two, each by itself.
    pub(super) fn worse(self, other: Self) -> Self {
        let waiting = [self.waiting_percent, other.waiting_percent].into_iter().flatten();
        Self {
            busy_percent: self.busy_percent.max(other.busy_percent),
            waiting_percent: waiting.reduce(f64::max),
            late_percent: self.late_percent.max(other.late_percent),
        }
    }

    /// Whether figures say more about the machine than about who is measured.
    pub(super) fn is_too_busy(self) -> bool {
        self.late_percent > 1.0
    }
}

/// Counts connections that are begun. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Punctuality(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    begun: AtomicUsize,
    late: AtomicUsize,
}

impl Punctuality {
    /// One that was begun so long after its time.
    pub(super) fn count(&self, behind: Duration) {
        self.0.begun.fetch_add(1, Ordering::Relaxed);
        self.0.late.fetch_add(usize::from(behind > LATE), Ordering::Relaxed);
    }

    fn late_percent(&self) -> f64 {
        percent(self.0.late.load(Ordering::Relaxed) as f64, self.0.begun.load(Ordering::Relaxed) as f64)
    }
}

/// Watches the machine from now on.
#[derive(Debug)]
pub(super) struct Watch {
    processors: Processors,
    waited: Option<Duration>,
    began: Instant,
    /// To be told of every connection.
    pub(super) punctuality: Punctuality,
}

impl Watch {
    pub(super) fn begin() -> Result<Self> {
        let punctuality = Punctuality::default();
        Ok(Self { processors: Processors::now()?, waited: waited(), began: Instant::now(), punctuality })
    }

    /// What it was like since.
    pub(super) fn end(&self) -> Result<Load> {
        let now = Processors::now()?;
        let (all, idle) = (now.all - self.processors.all, now.idle - self.processors.idle);
        let lasted = self.began.elapsed().as_secs_f64();
        let waited = self.waited.zip(waited()).map(|(before, after)| after.saturating_sub(before));
        Ok(Load {
            busy_percent: percent((all - idle) as f64, all as f64),
            waiting_percent: waited.map(|waited| percent(waited.as_secs_f64(), lasted)),
            late_percent: self.punctuality.late_percent(),
        })
    }
}

fn percent(part: f64, of: f64) -> f64 {
    if of > 0.0 { (part / of * 100.0).clamp(0.0, 100.0) } else { 0.0 }
}

/// Time of all processors since boot, in ticks: proc_stat(5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Processors {
    all: u64,
    /// Waiting for a disk included.
    idle: u64,
}

impl Processors {
    fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat").context("/proc/stat")?;
        Self::parse(&text).context("/proc/stat: no line of all processors")
    }

    fn parse(text: &str) -> Option<Self> {
        let line = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
        // user, nice, system, idle, iowait, irq, softirq, steal; guests' are in user and nice already.
        let ticks: Vec<u64> =
            line.split_whitespace().take(8).map(str::parse).collect::<Result<_, _>>().ok()?;
        Some(Self { all: ticks.iter().sum(), idle: ticks.get(3)? + ticks.get(4)? })
    }
}

/// For how long somebody has waited for a processor since boot.
fn waited() -> Option<Duration> {
    parse_pressure(&fs::read_to_string("/proc/pressure/cpu").ok()?)
}

fn parse_pressure(text: &str) -> Option<Duration> {
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let total = some.split_whitespace().find_map(|word| word.strip_prefix("total="))?;
    Some(Duration::from_micros(total.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Load, Processors, Punctuality, Watch, parse_pressure, percent};

    #[test]
    fn the_kernels_words_are_read() {
        let stat = "cpu  10 20 30 400 50 6 7 8 99 99\ncpu0 1 2 3 4 5 6 7 8 9 10\nintr 5\n";
        assert_eq!(Processors::parse(stat), Some(Processors { all: 531, idle: 450 }));
        assert_eq!(Processors::parse("cpu0 1 2 3 4\n"), None);
        let pressure = "some avg10=6.61 avg60=34.89 avg300=50.53 total=1500000\nfull avg10=0.00 total=7\n";
        assert_eq!(parse_pressure(pressure), Some(Duration::from_millis(1500)));
        let load = Watch::begin().unwrap().end().unwrap();
        assert!((0.0..=100.0).contains(&load.busy_percent), "{load:?}");
    }

    #[test]
    fn one_in_a_hundred_may_be_late() {
        let punctuality = Punctuality::default();
        assert_eq!(punctuality.late_percent(), 0.0, "nobody was to come");
        (0..99).for_each(|_| punctuality.count(Duration::from_millis(100)));
        punctuality.count(Duration::from_millis(101));
        let load = Load { late_percent: punctuality.late_percent(), ..Load::default() };
        assert!(!load.is_too_busy());
        punctuality.count(Duration::from_secs(1));
        assert!(Load { late_percent: punctuality.late_percent(), ..load }.is_too_busy());
    }

    #[test]
    fn of_two_loads_the_worse_counts_each_by_itself() {
        let one = Load { busy_percent: 20.0, waiting_percent: None, late_percent: 3.0 };
        let other = Load { busy_percent: 90.0, waiting_percent: Some(40.0), late_percent: 0.0 };
        let worse = Load { busy_percent: 90.0, waiting_percent: Some(40.0), late_percent: 3.0 };
        assert_eq!(one.worse(other), worse);
        assert_eq!(other.worse(one), worse);
        assert_eq!((percent(1.0, 0.0), percent(5.0, 4.0)), (0.0, 100.0));
    }
}
