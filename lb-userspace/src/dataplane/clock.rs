//! The kernel's clock, as slots keep it.
//!
//! Slots are dated in jiffies shifted right, so that a unit is about a second. Jiffies are not CLOCK_MONOTONIC, and
//! their frequency is a build option of the kernel: both are found out by asking the kernel itself.

use std::time::Duration;

/// Jiffies and what they are worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticks {
    /// Jiffies a second, one of the kernel's four choices.
    pub frequency: u32,
}

impl Ticks {
    /// The choices of `kernel/Kconfig.hz`.
    const FREQUENCIES: [u32; 4] = [100, 250, 300, 1000];

    /// The frequency that is nearest to `jiffies` having passed in `elapsed`.
    pub fn measured(jiffies: u64, elapsed: Duration) -> Self {
        let measured = jiffies as f64 / elapsed.as_secs_f64();
        let distance = |frequency: &u32| (measured / f64::from(*frequency)).ln().abs();
        let frequency = Self::FREQUENCIES
            .into_iter()
            .min_by(|a, b| distance(a).total_cmp(&distance(b)))
            .unwrap_or(Self::FREQUENCIES[1]);
        Self { frequency }
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

    #[test]
    fn the_nearest_frequency_is_found_from_a_coarse_measurement() {
        for (jiffies, milliseconds, frequency) in [
            (4, 40, 100),
            (10, 40, 250),
            (11, 41, 250),
            (12, 40, 300),
            (40, 40, 1000),
            (39, 40, 1000),
            (5, 41, 100),
        ] {
            assert_eq!(Ticks::measured(jiffies, Duration::from_millis(milliseconds)).frequency, frequency);
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
