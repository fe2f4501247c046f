//! `sheave events`

use std::{process::ExitCode, time::Duration};

use super::{SocketArgument, block_on, output};
use crate::admin::{Client, JournalEvent};

const LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
#[command(after_help = "\
The last 1000 events: changes of state with the check that brought them about, operator's orders and who gave them,
reloads, and who gets new flows when not every ready backend does. Kept across restarts. Times are UTC.

Examples:
  sheave events
  sheave events --last 20
  sheave events --json | jq '.[] | select(.backend == \"master-1\")'")]
pub(super) struct Arguments {
    /// Only the last N
    #[arg(long, value_name = "N")]
    last: Option<usize>,
    /// The same facts as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    socket: SocketArgument,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let events = block_on(Client::new(&arguments.socket.socket, LIMIT).events())??.events;
    let first = events.len().saturating_sub(arguments.last.unwrap_or(usize::MAX));
    if arguments.json {
        output::print_json(&events[first..].to_vec())?;
    } else {
        output::print(&events[first..].iter().map(line).collect::<String>())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn line(event: &JournalEvent) -> String {
    format!("{}  {:<9}  {}\n", time(event.time_ms), event.kind.as_str(), output::printable(&event.text))
}

/// `2026-11-21 06:13:05.123`, UTC.
fn time(milliseconds: u64) -> String {
    let (seconds, rest) = (milliseconds / 1000, milliseconds % 1000);
    let (year, month, day) = date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{rest:03}")
}

/// The Gregorian date of a day counted from 1970-01-01. Years begin in March here, so that the odd day comes last.
fn date(days: u64) -> (u64, u64, u64) {
    const ERA: u64 = 146_097; // Days in 400 years.
    let days = days + 719_468; // Since 0000-03-01.
    let of_era = days % ERA;
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (days / ERA * 400 + year + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_utc() {
        assert_eq!(time(0), "1970-01-01 00:00:00.000");
        assert_eq!(time(951_827_696_789), "2000-02-29 12:34:56.789");
        assert_eq!(time(1_709_251_199_999), "2024-02-29 23:59:59.999");
        assert_eq!(time(1_709_251_200_000), "2024-03-01 00:00:00.000");
        assert_eq!(time(4_107_542_400_000), "2100-03-01 00:00:00.000");
    }
}
