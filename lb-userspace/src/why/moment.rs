//! `--at TIME`, as people write it at three in the morning.

use jiff::{SignedDuration, Timestamp, Zoned, civil};

/// No time that is understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no time\n   = help: write `10:32` or `10:32:05` (the last time it was so late), `2026-11-21T10:32:05` (the \
     time zone of this host), `2026-11-21T10:32:05Z`, or how long ago: `-5m`, `-1h30m`"
)]
pub struct MomentError(String);

/// The time that `text` stands for, if it is `now`.
///
/// # Errors
/// When it is none.
pub fn parse_moment(text: &str, now: &Zoned) -> Result<Timestamp, MomentError> {
    let text = text.trim();
    let error = || MomentError(text.to_owned());
    if let Ok(timestamp) = text.parse::<Timestamp>() {
        return Ok(timestamp);
    }
    let in_zone = |time: civil::DateTime| time.to_zoned(now.time_zone().clone()).map_err(|_| error());
    // Before the time of day, which would be found in it, too.
    if let Ok(time) = text.parse::<civil::DateTime>() {
        return Ok(in_zone(time)?.timestamp());
    }
    if let Ok(time) = text.parse::<civil::Time>() {
        let today = in_zone(now.date().to_datetime(time))?;
        let yesterday = || now.date().yesterday().map_err(|_| error());
        let last = if today <= *now { today } else { in_zone(yesterday()?.to_datetime(time))? };
        return Ok(last.timestamp());
    }
    // A duration may have colons, too; a time of day that is none is not taken for one.
    let ago = text.parse::<SignedDuration>().ok().filter(|_| !text.contains(':')).ok_or_else(error)?;
    now.timestamp().checked_sub(ago.abs()).map_err(|_| error())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<String, MomentError> {
        let now: Zoned = "2026-11-21T03:10:00+01:00[Europe/Berlin]".parse().unwrap();
        parse_moment(text, &now).map(|time| time.to_string())
    }

    #[test]
    fn a_time_is_understood_as_people_write_it() {
        for (text, expected) in [
            ("02:32", "2026-11-21T01:32:00Z"),
            ("02:32:05", "2026-11-21T01:32:05Z"),
            (" 02:32:05.250 ", "2026-11-21T01:32:05.25Z"),
            ("2026-11-20T10:32:05Z", "2026-11-20T10:32:05Z"),
            ("2026-11-20T10:32:05+02:00", "2026-11-20T08:32:05Z"),
            ("2026-07-20T10:32", "2026-07-20T08:32:00Z"),
            ("2026-11-20 10:32:05", "2026-11-20T09:32:05Z"),
            ("-5m", "2026-11-21T02:05:00Z"),
            ("5m", "2026-11-21T02:05:00Z"),
            ("-1h30m", "2026-11-21T00:40:00Z"),
            ("5 minutes ago", "2026-11-21T02:05:00Z"),
        ] {
            assert_eq!(parsed(text).as_deref(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn a_time_of_day_that_is_yet_to_come_was_yesterday() {
        assert_eq!(parsed("23:59").as_deref(), Ok("2026-11-20T22:59:00Z"));
    }

    #[test]
    fn what_is_no_time_is_told_with_what_is() {
        for text in ["", "noon", "25:00", "10:32:99", "2026-13-01T00:00", "-", "5"] {
            let error = parsed(text).unwrap_err().to_string();
            assert!(error.contains("is no time") && error.contains("-5m"), "{text}: {error}");
        }
    }
}
