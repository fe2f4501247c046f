//! When a load balancer said what, from the times in its log.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Time zones differ by whole quarters of an hour, and a log is read within one.
const QUARTER: Duration = Duration::from_secs(15 * 60);

/// The moment of the first of `lines` that has all `words`.
pub(super) fn when<'log>(lines: impl Iterator<Item = &'log str>, words: &[&str]) -> Option<Instant> {
    first(lines, words).and_then(moment)
}

/// The first of `lines` that has all `words` and begins with a time.
fn first<'log>(mut lines: impl Iterator<Item = &'log str>, words: &[&str]) -> Option<&'log str> {
    lines.find(|line| words.iter().all(|word| line.contains(word)) && within_quarter(line).is_some())
}

/// The moment that a line begins with: `2026-11-21T07:15:35.123456Z`, in whatever time zone.
fn moment(line: &str) -> Option<Instant> {
    let into_quarter = within_quarter(line)?;
    let (now, instant) = (SystemTime::now().duration_since(UNIX_EPOCH).ok()?, Instant::now());
    let now = Duration::from_nanos((now.as_nanos() % QUARTER.as_nanos()).try_into().ok()?);
    let ago = if now >= into_quarter { now - into_quarter } else { now + QUARTER - into_quarter };
    instant.checked_sub(ago)
}

/// How far into a quarter of an hour a line's time is.
fn within_quarter(line: &str) -> Option<Duration> {
    let time = line.split_whitespace().next()?.split_once('T')?.1;
    let mut parts = time.splitn(3, ':');
    let (_hour, minute, rest) = (parts.next()?, parts.next()?, parts.next()?);
    let seconds = rest.split(['Z', '+', '-']).next()?;
    let minute: u64 = minute.parse().ok()?;
    let seconds: f64 = seconds.parse().ok()?;
    Some(Duration::from_secs(minute % 15 * 60) + Duration::try_from_secs_f64(seconds).ok()?)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{QUARTER, first, when, within_quarter};

    #[test]
    fn both_load_balancers_times_are_read() {
        let expected = Some(Duration::from_micros(35_123_456));
        assert_eq!(within_quarter("2026-11-21T07:15:35.123456Z  INFO Server"), expected);
        assert_eq!(within_quarter("2026-11-21T09:15:35.123456+02:00 Server api/api-1 is DOWN"), expected);
        assert_eq!(within_quarter("[WARNING]  (123) : Server api/api-1 is DOWN"), None);
    }

    #[test]
    fn the_first_line_with_all_words_and_a_time_counts() {
        let log = "[ALERT] a is DOWN\n2026-11-21T07:15:35.5Z b is DOWN\n2026-11-21T07:15:36.5Z a is DOWN\n\
                   2026-11-21T07:15:37.5Z a is DOWN";
        assert_eq!(first(log.lines(), &["a", "is DOWN"]), first(log.lines(), &["a is"]));
        assert_eq!(first(log.lines(), &["a is"]), Some("2026-11-21T07:15:36.5Z a is DOWN"));
        assert_eq!(first(log.lines(), &["c is"]), None);
        assert!(when(log.lines(), &["c is"]).is_none());
    }

    #[test]
    fn a_moment_is_never_later_than_now_and_less_than_a_quarter_of_an_hour_ago() {
        let line = |second: u64| format!("2026-11-21T07:{:02}:{:02}.25Z a is UP", second / 60, second % 60);
        let [first, second] = [10, 11].map(|it| when(std::iter::once(line(it).as_str()), &["a is"]).unwrap());
        for moment in [first, second] {
            assert!(moment.elapsed() < QUARTER);
        }
        // Apart by a second, unless now is between the two.
        let apart = second.max(first) - second.min(first);
        let off = |expected: Duration| apart.abs_diff(expected) < Duration::from_millis(500);
        assert!(off(Duration::from_secs(1)) || off(QUARTER - Duration::from_secs(1)), "{apart:?}");
    }
}
