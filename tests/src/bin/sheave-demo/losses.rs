//! Requests that were lost, the servers that they were on, and whether a failing server excuses them.

use std::{collections::BTreeMap, net::SocketAddr, time::Instant};

use anyhow::{Context as _, Result, ensure};
use lb_tests::{
    cluster::Cluster,
    daemon::program,
    lab::process::said,
    load::{Asker, Outcome},
};
use serde_json::Value;

/// The time between a fault and sheave's verdict: until then, requests that meet the server are lost.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) server: String,
    pub(crate) began: Instant,
    pub(crate) noticed: Option<Instant>,
}

impl Fault {
    /// Whether a request was lost because it met the server: it was there, it was under way after the fault, and its
    /// connection was made before the verdict.
    fn excuses(&self, loss: &Loss) -> bool {
        let met = match &loss.place {
            Place::At(server) => *server == self.server,
            Place::Refused => true,
            Place::Nowhere => false,
        };
        let Outcome { started, ended, .. } = loss.outcome;
        met && ended >= self.began && self.noticed.is_none_or(|noticed| started <= noticed)
    }
}

/// Who knows which server a client's connection was on.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Register {
    /// The load balancer's black box: it has a record of every connection that got that far.
    FlightRecorder,
    /// The host's kernel, which connects its processes to the servers and remembers for a minute whom it was connected
    /// to: unless the connection was refused.
    Sockets,
}

/// Where a request was lost.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// On this server.
    At(String),
    /// On its way there: the server is not known, for nothing is left of a connection that was refused.
    Refused,
    /// No server had anything to do with it, as far as is known.
    Nowhere,
}

#[derive(Clone, Debug)]
struct Loss {
    outcome: Outcome,
    place: Place,
}

/// All that were lost.
#[derive(Debug)]
pub(crate) struct Losses {
    register: Register,
    losses: Vec<Loss>,
    /// Requests that were looked at.
    seen: usize,
}

impl Losses {
    pub(crate) fn new(register: Register) -> Self {
        Self { register, losses: Vec::new(), seen: 0 }
    }

    /// Takes in what was lost since the last time.
    pub(crate) fn take_in(&mut self, asker: &Asker, cluster: &Cluster) -> Result<()> {
        let (failures, seen) = asker.failures_after(self.seen);
        self.seen = seen;
        for outcome in failures {
            let place = match outcome.source {
                Some(source) => self.register.place(cluster, source)?,
                None => Place::Nowhere,
            };
            self.losses.push(Loss { outcome, place });
        }
        Ok(())
    }

    /// How many a fault excuses, and what became of each of the others, with the number of those of which the same can
    /// be said.
    pub(crate) fn divided(&self, faults: &[Fault]) -> (usize, BTreeMap<String, usize>) {
        let is_excused = |loss: &&Loss| faults.iter().any(|fault| fault.excuses(loss));
        let mut others = BTreeMap::new();
        for loss in self.losses.iter().filter(|loss| !is_excused(loss)) {
            let why = loss.outcome.result.as_ref().err().map_or("", String::as_str);
            *others.entry(format!("{:?}: {why}", loss.place)).or_default() += 1;
        }
        (self.losses.len() - others.values().sum::<usize>(), others)
    }

    /// Fails unless all of them were on a failing server, before sheave's verdict.
    pub(crate) fn require_excused(&self, faults: &[Fault]) -> Result<()> {
        let (_, others) = self.divided(faults);
        ensure!(others.is_empty(), "{} requests were lost: {others:#?}", others.values().sum::<usize>());
        Ok(())
    }
}

impl Register {
    fn place(self, cluster: &Cluster, client: SocketAddr) -> Result<Place> {
        match self {
            Self::FlightRecorder => written(cluster, client),
            Self::Sockets => remembered(cluster, client),
        }
    }
}

/// The server of a client's last connection, as `sheave why` tells it.
fn written(cluster: &Cluster, client: SocketAddr) -> Result<Place> {
    let directory = cluster.daemon_directory();
    let mut command = cluster.lb.command(program()?);
    command.args(["why", &client.to_string(), "--json", "--config"]).arg(directory.join("sheave.toml"));
    command.arg("--socket").arg(directory.join("admin.sock"));
    let output = command.output()?;
    let story: Value = serde_json::from_slice(&output.stdout).with_context(|| said(&output))?;
    let connection = story["connections"].as_array().and_then(|all| all.last());
    let steps = connection.and_then(|connection| connection["steps"].as_array());
    let server = steps.and_then(|steps| steps.iter().rev().find_map(|step| step["backend"].as_str()));
    Ok(server.map_or(Place::Nowhere, |server| Place::At(server.to_owned())))
}

/// The server at the other end of a connection of the load balancer's host.
fn remembered(cluster: &Cluster, client: SocketAddr) -> Result<Place> {
    let sockets = cluster.lb.run(&format!("ss -Htan sport = :{}", client.port()))?;
    let peers =
        || sockets.lines().filter_map(|line| line.split_whitespace().nth(4)?.parse::<SocketAddr>().ok());
    let is_at = |address| peers().any(|peer| peer.ip() == address);
    for apiserver in &cluster.apiservers {
        if is_at(apiserver.host.address(client.ip())?) {
            return Ok(Place::At(apiserver.host.name().to_owned()));
        }
    }
    Ok(Place::Refused)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use lb_tests::load::Outcome;

    use super::{Fault, Loss, Losses, Place, Register};

    /// In seconds since a fault of `api-1`, which is noticed after two.
    fn judge(place: &Place, started: u64, ended: u64) -> bool {
        let origin = Instant::now();
        let at = |seconds| origin + Duration::from_secs(seconds);
        let faults = [
            Fault { server: "api-2".to_owned(), began: at(1), noticed: Some(at(2)) },
            Fault { server: "api-1".to_owned(), began: at(10), noticed: Some(at(12)) },
        ];
        let (started, ended) = (at(started), at(ended));
        let outcome = Outcome { started, ended, source: None, result: Err("late".to_owned()) };
        let losses = vec![Loss { outcome, place: place.clone() }];
        let losses = Losses { register: Register::FlightRecorder, losses, seen: 1 };
        let judged = losses.require_excused(&faults).is_ok();
        assert_eq!(losses.divided(&faults).0, usize::from(judged));
        judged
    }

    #[test]
    fn a_request_on_the_failing_server_may_be_lost_until_the_verdict() {
        let failing = Place::At("api-1".to_owned());
        assert!(judge(&failing, 9, 10), "it was under way when the server failed");
        assert!(judge(&failing, 12, 13), "it was sent there just before the verdict");
        assert!(!judge(&failing, 13, 14), "it was sent there after the verdict");
        assert!(!judge(&failing, 8, 9), "nothing had failed yet");
    }

    #[test]
    fn a_request_on_a_server_that_is_well_may_never_be_lost() {
        assert!(!judge(&Place::At("api-3".to_owned()), 10, 11));
        assert!(!judge(&Place::At("api-2".to_owned()), 10, 11), "it has failed, but at another time");
        assert!(!judge(&Place::Nowhere, 10, 11), "it got nowhere");
    }

    #[test]
    fn a_request_that_was_refused_may_have_met_the_failing_server() {
        assert!(judge(&Place::Refused, 10, 11));
        assert!(!judge(&Place::Refused, 13, 14));
    }

    #[test]
    fn before_the_verdict_everything_on_the_failing_server_is_excused() {
        let began = Instant::now();
        let fault = Fault { server: "api-1".to_owned(), began, noticed: None };
        let outcome = Outcome { started: began, ended: began, source: None, result: Err("late".to_owned()) };
        let loss = |server: &str| Loss { outcome: outcome.clone(), place: Place::At(server.to_owned()) };
        assert!(fault.excuses(&loss("api-1")));
        assert!(!fault.excuses(&loss("api-2")));
    }
}
