//! The kernel's clock, as slots keep it.
//!
//! Slots are dated in jiffies shifted right, so that a unit is about a second. Jiffies are not CLOCK_MONOTONIC, and
//! their frequency is a build option of the kernel: both are found out by asking the kernel itself.
//!
//! The shift belongs to the flow table: slots that were dated by one shift mean something else by another. So it is
//! measured once, when the table is made, and read from the table by every later daemon.

use std::time::{Duration, Instant};

use lb_common::layout::Config;

/// How long a half-open slot is protected from being taken for another flow.
const HALF_OPEN_PROTECTED: Duration = Duration::from_millis(200);

/// The tick counter, read at some moment between two others.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// The counter.
    pub jiffies: u64,
    /// Just before it was asked for.
    pub before: Instant,
    /// When the answer was there.
    pub after: Instant,
}

impl Reading {
    /// How long it took: the time of the counter is known no better.
    pub fn took(&self) -> Duration {
        self.after.saturating_duration_since(self.before)
    }
}

/// Jiffies and what they are worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticks {
    /// Jiffies a second, one of the kernel's four choices.
    pub frequency: u32,
}

impl Ticks {
    /// The choices of `kernel/Kconfig.hz`.
    pub(super) const FREQUENCIES: [u32; 4] = [100, 250, 300, 1000];

    /// The only frequency by which both readings are right. None: several are; ask again later.
    ///
    /// Either counter may be read anywhere between its two moments, however far apart a stalled process finds them, and
    /// shows whole ticks only.
    pub fn between(first: &Reading, second: &Reading) -> Option<Self> {
        let ticks = second.jiffies.wrapping_sub(first.jiffies) as f64;
        let least = second.before.saturating_duration_since(first.after).as_secs_f64();
        let most = second.after.saturating_duration_since(first.before).as_secs_f64();
        let fits = |frequency: &u32| {
            let frequency = f64::from(*frequency);
            frequency * least < ticks + 1.0 && frequency * most > ticks - 1.0
        };
        let mut fitting = Self::FREQUENCIES.into_iter().filter(fits);
        let frequency = fitting.next()?;
        fitting.next().is_none().then_some(Self { frequency })
    }

    /// What the slots of a table are dated by. None: it is new.
    pub fn of_table(config: &Config) -> Option<Self> {
        let dates = |frequency: &u32| {
            let ticks = Self { frequency: *frequency };
            (ticks.shift(), ticks.half_open()) == (config.jiffies_shift, config.half_open_jiffies)
        };
        Self::FREQUENCIES.into_iter().find(dates).map(|frequency| Self { frequency })
    }

    /// Has the slots of a table be dated so.
    pub fn apply(self, config: &mut Config) {
        (config.jiffies_shift, config.half_open_jiffies) = (self.shift(), self.half_open());
    }

    fn half_open(self) -> u32 {
        self.jiffies(HALF_OPEN_PROTECTED)
    }

    /// Bits to shift jiffies by.
    pub fn shift(self) -> u32 {
        // The power of two nearest to a second.
        (f64::from(self.frequency)).log2().round() as u32
    }

    /// How long a unit is.
    pub fn unit(self) -> Duration {
        Duration::from_secs_f64(f64::from(1u32 << self.shift()) / f64::from(self.frequency))
    }

    /// A time in units, at least one.
    pub fn units(self, time: Duration) -> u16 {
        (time.as_secs_f64() / self.unit().as_secs_f64()).ceil().clamp(1.0, 65_535.0) as u16
    }

    /// A time in jiffies, at least one.
    pub fn jiffies(self, time: Duration) -> u32 {
        (time.as_secs_f64() * f64::from(self.frequency)).ceil().max(1.0) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two readings, the second of which took `slow` and came `apart` after the first.
    fn readings(ticks: u64, apart: Duration, slow: Duration) -> (Reading, Reading) {
        let start = Instant::now();
        let first = Reading { jiffies: 1000, before: start, after: start };
        let before = start + apart;
        (first, Reading { jiffies: 1000 + ticks, before, after: before + slow })
    }

    #[test]
    fn a_frequency_is_found_when_only_one_fits() {
        let milliseconds = Duration::from_millis;
        for (ticks, apart, frequency) in [
            (4, 40, Some(100)),
            (10, 40, Some(250)),
            (4, 15, None),
            (75, 300, Some(250)),
            (90, 300, Some(300)),
            (40, 40, Some(1000)),
        ] {
            let (first, second) = readings(ticks, milliseconds(apart), Duration::ZERO);
            assert_eq!(
                Ticks::between(&first, &second).map(|it| it.frequency),
                frequency,
                "{ticks} in {apart}"
            );
        }
    }

    #[test]
    fn a_process_that_is_stopped_in_the_middle_takes_no_frequency_for_another() {
        // 250 ticks a second; the second reading is asked for after 40 ms, and answered at once or after 0.4 s.
        for ticks in [10, 60, 110] {
            let (first, second) = readings(ticks, Duration::from_millis(40), Duration::from_millis(400));
            let found = Ticks::between(&first, &second);
            assert!(found.is_none_or(|it| it.frequency == 250), "{ticks}: {found:?}");
        }
    }

    #[test]
    fn a_table_says_what_it_is_dated_by() {
        for frequency in Ticks::FREQUENCIES {
            // SAFETY: integers and arrays of them.
            let mut config: Config = unsafe { std::mem::zeroed() };
            assert_eq!(Ticks::of_table(&config), None);
            Ticks { frequency }.apply(&mut config);
            assert_eq!(Ticks::of_table(&config), Some(Ticks { frequency }));
        }
    }

    #[test]
    fn a_unit_is_about_a_second_and_eight_hours_fit() {
        for frequency in Ticks::FREQUENCIES {
            let ticks = Ticks { frequency };
            assert!((0.8..1.3).contains(&ticks.unit().as_secs_f64()), "{ticks:?}");
            assert!(ticks.units(Duration::from_secs(8 * 3600)) < u16::MAX / 2 + 4000, "{ticks:?}");
        }
    }
}
