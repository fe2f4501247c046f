//! `sheave why`

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, SystemTime},
};

use jiff::{Timestamp, Zoned, tz::TimeZone};
use serde::Serialize;

use super::{FAILED, SocketArgument, UsageError, block_on, output};
use crate::{
    admin::Client as Admin,
    config::{self, Config},
    dataplane::{Recorded, Rings},
    why::{Client, Connection, Names, connections, parse_moment},
};

/// The daemon only knows names; the story can be told without.
const LIMIT: Duration = Duration::from_secs(1);
/// Before and after the moment that is asked about.
const AROUND: Duration = Duration::from_secs(60);
/// Connections that are told when no moment is given.
const LAST: usize = 10;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Told from the black box that the data path and the daemon write: new connections, second chances, refusals, ends and by
whom, resets and by which verdict. It is in the kernel and needs no daemon. The oldest records are overwritten; without
--at the last 10 connections are told.

Examples:
  sheave why 10.0.0.5
  sheave why 10.0.0.5:43210
  sheave why [fd00::5]:43210
  sheave why 10.0.0.5 --at 10:32            what was there within a minute of it
  sheave why 10.0.0.5 --at -5m              five minutes ago
  sheave why 10.0.0.5 --json | jq '.connections[].steps[].words'

Exit codes: 0 told, 1 failed or nothing is written about that client, 2 wrong usage.")]
pub(super) struct Arguments {
    /// The client's address, with its port if it is known
    #[arg(value_name = "CLIENT")]
    client: Client,
    /// Connections that were there at that time: 10:32, 10:32:05, 2026-11-21T10:32:05Z or -5m
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    at: Option<String>,
    /// The same facts as JSON
    #[arg(long)]
    json: bool,
    /// The configuration, for its pin_dir and, where no daemon runs, names [default: /etc/sheave/sheave.toml, if there
    /// is one]
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    socket: SocketArgument,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let now = Zoned::now();
    let at = arguments.at.as_deref().map(|text| parse_moment(text, &now)).transpose();
    let at = at.map_err(|error| UsageError(error.to_string()))?;
    let config = configuration(arguments.config.as_deref())?;
    let pin_dir = config.as_ref().map_or(Path::new(config::Dataplane::PIN_DIR), |it| &it.dataplane.pin_dir);
    let recorded = Recorded::open(pin_dir)?;
    let Some(clock) = recorded.flight_recorder.clock() else {
        anyhow::bail!("nothing is written yet: the daemon is still starting");
    };
    let rings = recorded.flight_recorder.read();
    let names = names(&recorded, config.as_ref(), &arguments.socket);
    let time = |jiffies| clock.time(jiffies);
    let told = connections(rings.by_flow(|client| arguments.client.is(client)), &names, time);
    let account = Account::new(&arguments.client, told, at, complete_since(&rings, time));
    if arguments.json {
        output::print_json(&account.facts())?;
    } else {
        output::print(&account.text(&now))?;
    }
    Ok(if account.connections.is_empty() { ExitCode::from(FAILED) } else { ExitCode::SUCCESS })
}

fn complete_since(rings: &Rings, time: impl Fn(u64) -> SystemTime) -> Option<SystemTime> {
    rings.complete_since().map(time)
}

/// The one that was named, or the usual one if it is there and right: names are all that is wanted of it.
fn configuration(named: Option<&Path>) -> anyhow::Result<Option<Config>> {
    if let Some(file) = named {
        return Ok(Some(Config::load(file)?.0));
    }
    Ok(Config::load(Path::new(super::CONFIG_FILE)).ok().map(|(config, _)| config))
}

/// Names from the configuration, and better ones from the daemon, which also knows those that were looked up.
fn names(recorded: &Recorded, config: Option<&Config>, socket: &SocketArgument) -> Names {
    let backends = config.into_iter().flat_map(|it| &it.services).flat_map(|it| &it.backends);
    let mut called: BTreeMap<SocketAddr, String> =
        backends.map(|backend| (backend.address, backend.name.clone())).collect();
    if let Ok(Ok(status)) = block_on(Admin::new(&socket.socket, LIMIT).status()) {
        let backends = status.services.into_iter().flat_map(|service| service.backends);
        called.extend(backends.map(|backend| (backend.address, backend.name)));
    }
    Names {
        backends: recorded.backends.iter().copied().collect(),
        listeners: recorded.listeners.iter().copied().collect(),
        snat: recorded.snat_addresses.clone(),
        called,
    }
}

/// All that is told.
struct Account<'a> {
    client: &'a Client,
    at: Option<Timestamp>,
    connections: Vec<Connection>,
    /// Older ones that are not told.
    earlier: usize,
    /// The moment nearest to the one asked about, when nothing was there then.
    nearest: Option<SystemTime>,
    complete_since: Option<SystemTime>,
}

impl<'a> Account<'a> {
    fn new(
        client: &'a Client,
        mut connections: Vec<Connection>,
        at: Option<Timestamp>,
        complete_since: Option<SystemTime>,
    ) -> Self {
        let (mut earlier, mut nearest) = (0, None);
        if let Some(at) = at.map(SystemTime::from) {
            let moments = connections.iter().flat_map(|it| &it.steps).map(|step| step.at);
            nearest = moments.min_by_key(|moment| distance(*moment, at));
            connections.retain(|it| it.was_there(at - AROUND, at + AROUND));
        } else {
            earlier = connections.len().saturating_sub(LAST);
            connections.drain(..earlier);
        }
        Self { client, at, connections, earlier, nearest, complete_since }
    }

    fn text(&self, now: &Zoned) -> String {
        if self.connections.is_empty() {
            return self.nothing(now);
        }
        let mut text = String::new();
        if self.earlier > 0 {
            text +=
                &format!("{} earlier connections are not shown: see them with --at TIME\n\n", self.earlier);
        }
        let told: Vec<_> = self.connections.iter().map(|it| connection_text(it, now)).collect();
        text + &told.join("\n") + &format!("\nTimes are in {}.\n", zone(now))
    }

    fn nothing(&self, now: &Zoned) -> String {
        let mut text = format!("nothing is written about {}", self.client);
        if let Some(at) = self.at {
            text += &format!(" within a minute of {}", moment(at.into(), now));
        }
        text.push('\n');
        if let Some(nearest) = self.nearest {
            return text + &format!("   the nearest record is of {}\n", moment(nearest, now));
        }
        match self.complete_since {
            Some(since) => {
                text += &format!(
                    "   records from before {} may have been overwritten; a connection that is open is in `sheave flows \
                     --client {}`\n",
                    moment(since, now),
                    self.client.address
                );
            }
            None => {
                text += "   nothing was overwritten yet: no SYN of it was seen since the program was loaded\n"
            }
        }
        text + &format!(
            "   does it get here at all? `tcpdump -ni any host {}` says so\n",
            self.client.address
        )
    }

    fn facts(&self) -> Facts<'_> {
        let connections = self.connections.iter().map(connection_facts).collect();
        Facts { connections, earlier: self.earlier, complete_since: self.complete_since.map(rfc3339) }
    }
}

fn distance(one: SystemTime, other: SystemTime) -> Duration {
    one.duration_since(other).unwrap_or_else(|error| error.duration())
}

fn connection_text(connection: &Connection, now: &Zoned) -> String {
    let to = connection.listener.map(|listener| format!(" to {listener}")).unwrap_or_default();
    let seen = connection.source.map(|source| format!("  (backends see {source})")).unwrap_or_default();
    let mut text = format!("{}{to}{seen}\n", connection.client);
    let mut line = |time: &str, words: &str| text += &format!("  {time}  {}\n", output::printable(words));
    let times: Vec<_> = connection.steps.iter().map(|step| moment(step.at, now)).collect();
    let blank = " ".repeat(times.iter().map(String::len).max().unwrap_or_default());
    if !connection.begun {
        line(&blank, "… its beginning is not written any more, or was before sheave came");
    }
    for (time, step) in times.iter().zip(&connection.steps) {
        line(time, &step.words);
    }
    if let Some(outlook) = &connection.outlook {
        line(&blank, outlook);
    }
    text
}

/// The time of day, with the date unless it is today.
fn moment(at: SystemTime, now: &Zoned) -> String {
    let Ok(timestamp) = Timestamp::try_from(at) else { return "?".to_owned() };
    let at = timestamp.to_zoned(now.time_zone().clone());
    let format = if at.date() == now.date() { "%H:%M:%S%.3f" } else { "%Y-%m-%d %H:%M:%S%.3f" };
    at.strftime(format).to_string()
}

fn zone(now: &Zoned) -> String {
    if *now.time_zone() == TimeZone::UTC || now.offset().is_zero() {
        return "UTC".to_owned();
    }
    format!("this host's time zone, UTC{}; `sheave events` says UTC", now.strftime("%:z"))
}

fn rfc3339(at: SystemTime) -> String {
    Timestamp::try_from(at).map_or_else(|_| String::new(), |at| format!("{at:.3}"))
}

/// `--json`.
#[derive(Debug, Serialize)]
struct Facts<'a> {
    /// The oldest first.
    connections: Vec<ConnectionFacts<'a>>,
    /// How many older ones are not told.
    earlier: usize,
    /// Records from before may have been overwritten; null: none was yet.
    complete_since: Option<String>,
}

#[derive(Debug, Serialize)]
struct ConnectionFacts<'a> {
    client: SocketAddr,
    listener: Option<SocketAddr>,
    /// What backends saw as the client.
    source: Option<SocketAddr>,
    begun: bool,
    ended: bool,
    steps: Vec<StepFacts<'a>>,
    outlook: Option<&'a str>,
}

#[derive(Debug, Serialize)]
struct StepFacts<'a> {
    /// RFC 3339, UTC.
    at: String,
    what: &'static str,
    backend: Option<&'a str>,
    words: &'a str,
}

fn connection_facts(connection: &Connection) -> ConnectionFacts<'_> {
    let Connection { client, listener, source, begun, ended, steps, outlook } = connection;
    let steps = steps.iter().map(|step| StepFacts {
        at: rfc3339(step.at),
        what: step.what,
        backend: step.backend.as_deref(),
        words: &step.words,
    });
    ConnectionFacts {
        client: *client,
        listener: *listener,
        source: *source,
        begun: *begun,
        ended: *ended,
        steps: steps.collect(),
        outlook: outlook.as_deref(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::why::Step;

    fn now() -> Zoned {
        "2026-11-21T03:10:00+01:00[Europe/Berlin]".parse().unwrap()
    }

    /// In milliseconds before now.
    fn at(milliseconds: u64) -> SystemTime {
        SystemTime::from(now().timestamp()) - Duration::from_millis(milliseconds)
    }

    fn connection(milliseconds: u64, port: u16) -> Connection {
        let step = |before, words: &str| Step {
            at: at(milliseconds - before),
            what: "claimed",
            backend: Some("master-2".to_owned()),
            words: words.to_owned(),
        };
        Connection {
            client: ([10, 0, 0, 5], port).into(),
            listener: Some(([10, 0, 0, 100], 6443).into()),
            source: Some(([10, 0, 0, 100], 23_456).into()),
            begun: true,
            ended: true,
            steps: vec![step(0, "new connection"), step(877, "the client closed the connection (FIN)")],
            outlook: None,
        }
    }

    fn client() -> Client {
        "10.0.0.5".parse().unwrap()
    }

    #[test]
    fn a_connection_is_told_line_by_line() {
        let client = client();
        let account = Account::new(&client, vec![connection(60_877, 43_210)], None, None);
        assert_eq!(
            account.text(&now()),
            "10.0.0.5:43210 to 10.0.0.100:6443  (backends see 10.0.0.100:23456)\n  03:08:59.123  new connection\n  \
             03:09:00.000  the client closed the connection (FIN)\n\nTimes are in this host's time zone, UTC+01:00; \
             `sheave events` says UTC.\n"
        );
        let open =
            Connection { begun: false, outlook: Some("it is open".into()), ..connection(90_000_000, 1) };
        let text = Account::new(&client, vec![open], None, None).text(&now());
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[1].starts_with("                           … its beginning"), "{text}");
        assert!(lines[2].starts_with("  2026-11-20 02:10:00.000  new connection"), "{text}");
        assert_eq!(lines[4], "                           it is open");
    }

    #[test]
    fn without_a_moment_the_last_are_told() {
        let client = client();
        let all: Vec<_> = (0..13).map(|number| connection(100_000 - number, number as u16)).collect();
        let account = Account::new(&client, all.clone(), None, None);
        assert_eq!((account.connections.len(), account.earlier), (10, 3));
        assert_eq!(account.connections[9], all[12]);
        assert!(account.text(&now()).starts_with("3 earlier connections are not shown"));
    }

    #[test]
    fn with_a_moment_those_that_were_there_are_told() {
        let client = client();
        let asked = |minutes| {
            let at = now().timestamp() - jiff::SignedDuration::from_mins(minutes);
            Account::new(&client, vec![connection(600_000, 1)], Some(at), Some(at.into()))
        };
        assert_eq!((asked(10).connections.len(), asked(9).connections.len()), (1, 1));
        let other = asked(5);
        assert!(other.connections.is_empty());
        let text = other.text(&now());
        assert!(
            text.starts_with("nothing is written about 10.0.0.5 within a minute of 03:05:00.000\n"),
            "{text}"
        );
        assert!(text.contains("the nearest record is of 03:00:00.877"), "{text}");
    }

    #[test]
    fn nothing_at_all_says_what_that_may_mean() {
        let client = client();
        let text = |since| Account::new(&client, vec![], None, since).text(&now());
        assert!(text(None).contains("no SYN of it was seen since the program was loaded"));
        let overwritten = text(Some(at(1000)));
        assert!(overwritten.contains("records from before 03:09:59.000 may have been overwritten"));
        assert!(overwritten.contains("sheave flows --client 10.0.0.5"));
    }

    #[test]
    fn the_facts_are_the_same() {
        let client = client();
        let account = Account::new(&client, vec![connection(60_877, 43_210)], None, Some(at(0)));
        let facts = serde_json::to_value(account.facts()).unwrap();
        assert_eq!(facts["complete_since"], "2026-11-21T02:10:00.000Z");
        let step = &facts["connections"][0]["steps"][0];
        assert_eq!(step["at"], "2026-11-21T02:08:59.123Z");
        assert_eq!((&step["backend"], &step["words"]), (&"master-2".into(), &"new connection".into()));
        assert_eq!(facts["connections"][0]["client"], "10.0.0.5:43210");
    }
}
