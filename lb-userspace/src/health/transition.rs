//! One line per change of state, worded as HAProxy does.

use std::fmt::Write as _;

use super::{report::CheckReport, state::State};

/// A change of state and the check that brought it about.
#[derive(Clone, Debug, PartialEq)]
pub struct Transition {
    /// Before.
    pub from: State,
    /// After.
    pub to: State,
    /// The check that made the verdict.
    pub report: CheckReport,
}

impl Transition {
    /// Whether it is bad news, to be logged as a warning.
    #[must_use]
    pub fn is_down(&self) -> bool {
        self.to != State::Ready
    }
}

/// What becomes of the established flows of a dead backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// They are reset.
    Reset,
    /// They are kept, because `on_dead` says so.
    Kept,
    /// They are kept: the operator has taken the backend out, and says when they end.
    OperatorsTurn,
    /// Its host is this one, whose kernel has those of others. Of this host's own processes: reset.
    OfThisHost,
    /// Their VIP is on another host, which has those of others. Of this host's own processes: reset.
    Elsewhere,
}

/// The log line of a transition, with the service's `ready_left` of `total` backends after it.
///
/// It begins as HAProxy's does, for the sake of those who grep for it, and ends with the word and meaning of the
/// state, because "DOWN" alone does not say what becomes of established flows.
#[must_use]
pub fn transition_line(
    service: &str,
    backend: &str,
    transition: &Transition,
    fate: Fate,
    ready_left: usize,
    total: usize,
) -> String {
    let Transition { from, to, report } = transition;
    let verb = match (from, to) {
        (_, State::Ready) => "is UP",
        (State::Draining | State::Silent | State::Dead, _) => "is still DOWN",
        _ => "is DOWN",
    };
    let mut line = format!("Server {service}/{backend} {verb}, reason: {}", report.code.description());
    // Writing to a String cannot fail.
    if let Some(status) = report.http_status {
        let _ = write!(line, ", code: {status}");
    }
    if !report.info.is_empty() {
        let _ = write!(line, ", info: \"{}\"", report.info);
    }
    let left = if *to == State::Ready { "online" } else { "left" };
    let plural = if ready_left == 1 { "" } else { "s" };
    let _ = write!(
        line,
        ", check duration: {}ms. {ready_left} active server{plural} {left} of {total}. {from} -> {to}: {}.",
        report.duration.as_millis(),
        meaning(*to, fate)
    );
    line
}

fn meaning(state: State, fate: Fate) -> &'static str {
    match state {
        State::Unknown => "not checked yet",
        State::Ready => "gets new flows",
        State::Draining | State::Silent => "no new flows, established ones are kept",
        State::Dead => match fate {
            Fate::Reset => "no new flows, established ones are reset",
            Fate::Kept => "no new flows, established ones are kept, as on_dead says",
            Fate::OperatorsTurn => {
                "no new flows, established ones are kept until the operator says otherwise (`sheave kill`)"
            }
            Fate::OfThisHost => {
                "no new flows, established ones of this host's processes are reset, those of others left to its kernel"
            }
            Fate::Elsewhere => {
                "no new flows, established ones of this host's processes are reset, those of others left to the host \
                 that has the VIP"
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::health::report::{CheckCode, Failure, Outcome};

    fn transition(from: State, to: State, report: CheckReport) -> Transition {
        Transition { from, to, report: CheckReport { duration: Duration::from_millis(4), ..report } }
    }

    #[test]
    fn going_down_reads_like_haproxy() {
        let mut report = CheckReport::new(Outcome::Fail(Failure::NotExpected), CheckCode::L7Sts);
        report.http_status = Some(500);
        assert_eq!(
            transition_line(
                "api",
                "master-2",
                &transition(State::Ready, State::Draining, report.clone()),
                Fate::Reset,
                2,
                3
            ),
            "Server api/master-2 is DOWN, reason: Layer7 wrong status, code: 500, check duration: 4ms. \
             2 active servers left of 3. ready -> draining: no new flows, established ones are kept."
        );
        report.info = "failed: etcd".to_owned();
        let draining = transition(State::Ready, State::Draining, report);
        let line = transition_line("api", "master-2", &draining, Fate::Reset, 1, 3);
        assert!(line.contains("code: 500, info: \"failed: etcd\", check duration"), "{line}");
        assert!(line.contains("1 active server left of 3"), "{line}");
    }

    #[test]
    fn coming_up_reads_like_haproxy() {
        let mut report = CheckReport::new(Outcome::Pass, CheckCode::L7Ok);
        report.http_status = Some(200);
        assert_eq!(
            transition_line(
                "api",
                "master-2",
                &transition(State::Draining, State::Ready, report),
                Fate::Reset,
                3,
                3
            ),
            "Server api/master-2 is UP, reason: Layer7 check passed, code: 200, check duration: 4ms. \
             3 active servers online of 3. draining -> ready: gets new flows."
        );
    }

    #[test]
    fn from_bad_to_worse_is_not_going_down_again() {
        let report = CheckReport::new(Outcome::Fail(Failure::Silent), CheckCode::L4Tout);
        let silent = transition(State::Draining, State::Silent, report);
        let line = transition_line("api", "master-2", &silent, Fate::Reset, 2, 3);
        assert!(
            line.starts_with("Server api/master-2 is still DOWN, reason: Layer4 timeout, check"),
            "{line}"
        );
        assert!(line.contains("draining -> silent: no new flows, established ones are kept"), "{line}");
    }

    #[test]
    fn death_says_what_becomes_of_the_flows() {
        let line = |fate| {
            let report = CheckReport::new(Outcome::Fail(Failure::Silent), CheckCode::L4Tout);
            let died = transition(State::Silent, State::Dead, report);
            transition_line("api", "master-2", &died, fate, 2, 3)
        };
        assert!(line(Fate::Reset).ends_with("silent -> dead: no new flows, established ones are reset."));
        assert!(!line(Fate::Kept).contains("reset"), "{}", line(Fate::Kept));
        for fate in [Fate::OfThisHost, Fate::Elsewhere] {
            let line = line(fate);
            assert!(line.contains("of this host's processes are reset, those of others left to"), "{line}");
        }
    }
}
