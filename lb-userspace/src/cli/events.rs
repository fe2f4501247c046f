//! `sheave events`

use std::{process::ExitCode, time::Duration};

use jiff::Timestamp;

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
    let moment = i64::try_from(milliseconds).ok().and_then(|it| Timestamp::from_millisecond(it).ok());
    // A clock that says more than the year 9999 is broken: what it said is shown as it is.
    moment.map_or_else(|| milliseconds.to_string(), |it| it.strftime("%F %T.%3f").to_string())
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
        assert_eq!(time(u64::MAX), "18446744073709551615");
    }
}
