//! Servers that are ill, one or all of them.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::{AFTERWARDS, Measure, Stage, VERDICT, count, go_on, time};
use crate::{
    failover::{
        arrivals::Arrival,
        balancer::{Balancer, DOWN},
        failure::Failure,
    },
    load,
    stub::Health,
};

/// Idle connections, of which each server has some.
const CONNECTIONS: usize = 60;
/// Running watches, of which each server has some.
const WATCHES: usize = 24;
/// Connections that nobody can serve, one after another.
const KNOCKS: usize = 50;
/// How soon "at once" is, in milliseconds.
const AT_ONCE: u32 = 100;
/// From the line in the log, which comes first, to its effect: as long as it takes to write a table.
const EFFECT: Duration = Duration::from_millis(5);

/// All servers answer 500 after 2 to 4 s, and serve everything else.
pub(super) fn etcd_hangs(stage: &mut Stage) -> Result<Vec<Measure>> {
    let silent = stage.silent(CONNECTIONS)?;
    let arrivals = stage.arrivals()?;
    let mark = stage.balancer.mark();
    for apiserver in &stage.cluster.apiservers {
        apiserver.stub.health(Health::EtcdHang)?;
    }
    wait_all_down(stage, mark)?;
    go_on(AFTERWARDS);
    let ended = silent.ends().len();
    let arrivals = arrivals.stop();
    Ok(vec![
        count("flows that are reset or closed", ended).at_most(0),
        count("new connections that fail", arrivals.iter().filter(|it| it.result.is_err()).count())
            .at_most(0),
    ])
}

/// One server is told to stop: its `/readyz` says 500, and it serves on.
pub(super) fn readyz(stage: &mut Stage) -> Result<Vec<Measure>> {
    let silent = stage.silent(CONNECTIONS)?;
    let watches = stage.watches(WATCHES)?;
    let arrivals = stage.arrivals()?;
    let mark = stage.balancer.mark();
    let event = Instant::now();
    stage.cluster.apiservers[0].stub.health(Health::Status(500))?;
    let verdict = stage.balancer.wait_said(mark, &["api-1", DOWN], VERDICT)?;
    go_on(AFTERWARDS);
    let (broken, _) = watches.broken_at("api-1");
    let ended = silent.ends().len();
    let arrivals = arrivals.stop();
    let there = |it: &&Arrival| it.result.as_deref() == Ok("api-1") && it.started > verdict;
    let (late, at_once): (Vec<_>, Vec<_>) =
        arrivals.iter().filter(there).partition(|it| it.started > verdict + EFFECT);
    Ok(vec![
        count("new connections to it after the verdict", late.len()).at_most(0),
        count("… within 5 ms of it", at_once.len()),
        time("from 500 to the verdict", Some(verdict.saturating_duration_since(event))),
        count("idle flows that are reset or closed", ended).at_most(0),
        count("running watches that break", broken).at_most(0),
        count("new connections that fail", arrivals.iter().filter(|it| it.result.is_err()).count())
            .at_most(0),
    ])
}

/// All servers are cut off.
pub(super) fn all_dead(stage: &mut Stage) -> Result<Vec<Measure>> {
    let mark = stage.balancer.mark();
    for apiserver in &stage.cluster.apiservers {
        stage.cluster.lab.unplug(&apiserver.host)?;
    }
    wait_all_down(stage, mark)?;
    knock(stage)
}

/// No server has ever run.
pub(super) fn never_ready(stage: &mut Stage) -> Result<Vec<Measure>> {
    for apiserver in &mut stage.cluster.apiservers {
        apiserver.stub.kill()?;
    }
    stage.balancer.leave()?;
    let mark = stage.balancer.mark();
    stage.balancer = Balancer::start(stage.contender, &stage.cluster, stage.setup)?;
    wait_all_down(stage, mark)?;
    knock(stage)
}

fn wait_all_down(stage: &Stage, mark: usize) -> Result<()> {
    for name in stage.setup.backends {
        stage.balancer.wait_said(mark, &[name, DOWN], VERDICT)?;
    }
    Ok(())
}

/// Connections that cannot be served, one after another: how soon their clients know.
fn knock(stage: &Stage) -> Result<Vec<Measure>> {
    let client = stage.client()?;
    let fates = stage.cluster.client.in_namespace(|| {
        load::runtime().map(|runtime| {
            runtime.block_on(async {
                let mut fates = Vec::new();
                for _ in 0..KNOCKS {
                    let began = Instant::now();
                    let fate = client.dial().await.map(drop).map_err(|error| Failure::of(error.as_ref()));
                    fates.push((began.elapsed(), fate));
                }
                fates
            })
        })
    })??;
    let slowest: Option<Duration> = fates.iter().map(|(took, _)| *took).max();
    let refused = fates.iter().filter(|(_, fate)| *fate == Err(Failure::Refused)).count();
    Ok(vec![
        time("until a new connection is known to fail, at most", slowest).at_most(AT_ONCE),
        count("new connections that are not refused by RST", KNOCKS - refused).at_most(0),
    ])
}
