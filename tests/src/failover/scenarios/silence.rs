//! Backends that say nothing, for a while or for good, and connections over which nothing is said.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::{AFTERWARDS, Measure, Stage, VERDICT, count, count_of, go_on, time, until_last};
use crate::{
    failover::{failure::Failure, silent::Silent},
    load,
    stub::Health,
};

/// Idle connections: of three servers each has some.
const CONNECTIONS: usize = 60;
/// Where many are measured, if a process may have so many descriptors.
const MANY: usize = 10_000;
/// Descriptors that a client or a stub needs for everything else.
const OTHER_DESCRIPTORS: u64 = 200;
/// How long the end of flows is waited for after the verdict.
const END_LIMIT: Duration = Duration::from_secs(30);
/// A virtual machine's snapshot.
const SNAPSHOT: Duration = Duration::from_secs(3);
/// How long the load balancer's link is down.
const OUTAGE: Duration = Duration::from_secs(10);

/// Cut off for good: how soon those who only listen are told.
pub(super) fn watch(stage: &mut Stage) -> Result<Vec<Measure>> {
    let silent = stage.silent_watches(CONNECTIONS)?;
    let (cut, dead) = cut_off_for_good(stage)?;
    let ends = silent.wait_ended("api-1", END_LIMIT);
    let told = ends.len() == silent.at("api-1");
    let since = |event| told.then(|| until_last(event, ends.iter().map(|end| end.at)));
    let others = silent.ends().len() - ends.len();
    Ok(vec![
        time("from the verdict to the end of the last idle watch", since(dead)).at_most(300),
        time("from the cut to the end of the last idle watch", since(cut)),
        count("idle watches on it", silent.at("api-1")),
        count("… ended by a RST", count_of(Failure::Reset, ends.iter().map(|end| end.how))),
        count("idle watches on others that end", others).at_most(0),
    ])
}

/// Unplugs `api-1`: when that was, and when its flows were given up.
fn cut_off_for_good(stage: &Stage) -> Result<(Instant, Instant)> {
    let mark = stage.balancer.mark();
    let cut = Instant::now();
    stage.cluster.lab.unplug(&stage.cluster.apiservers[0].host)?;
    let words = ["api-1", stage.contender.gives_up()];
    Ok((cut, stage.balancer.wait_said(mark, &words, VERDICT)?))
}

pub(super) fn many_at_the_default_rate(stage: &mut Stage) -> Result<Vec<Measure>> {
    many(stage, 5000)
}

pub(super) fn many_without_a_limit(stage: &mut Stage) -> Result<Vec<Measure>> {
    many(stage, 300)
}

/// All flows are at `api-1`, for the other one was ill when they were opened.
fn many(stage: &mut Stage, limit: u32) -> Result<Vec<Measure>> {
    let mark = stage.balancer.mark();
    stage.cluster.apiservers[1].stub.health(Health::Status(500))?;
    stage.balancer.wait_said(mark, &["api-2", "is DOWN"], VERDICT)?;
    let possible = load::raise_descriptor_limit()?.saturating_sub(OTHER_DESCRIPTORS);
    let flows = usize::try_from(possible)?.min(MANY);
    let silent = stage.silent(flows)?;
    ensure!(silent.at("api-1") == flows, "some went to the other");
    stage.cluster.apiservers[1].stub.health(Health::Normal)?;
    stage.balancer.wait_ready(2)?;
    let (_, dead) = cut_off_for_good(stage)?;
    let ends = silent.wait_ended("api-1", END_LIMIT);
    let told = ends.len() == flows;
    let last = told.then(|| until_last(dead, ends.iter().map(|end| end.at)));
    Ok(vec![
        time("from the verdict to the last RST", last).at_most(limit),
        count("flows", flows),
        count("flows that are not reset", flows - count_of(Failure::Reset, ends.iter().map(|end| end.how)))
            .at_most(0),
    ])
}

/// A server's host says nothing for a time, and goes on as if nothing had been.
pub(super) fn snapshot(stage: &mut Stage) -> Result<Vec<Measure>> {
    let silent = stage.silent(CONNECTIONS)?;
    let host = &stage.cluster.apiservers[0].host;
    host.cut_off()?;
    go_on(SNAPSHOT);
    host.reconnect()?;
    all_is_well(stage, &silent)
}

/// The load balancer's link to the servers is down.
pub(super) fn uplink(stage: &mut Stage) -> Result<Vec<Measure>> {
    let silent = stage.silent(CONNECTIONS)?;
    stage.cluster.lab.unplug_link(&stage.cluster.lb, 1)?;
    go_on(OUTAGE);
    stage.cluster.lab.replug_link(&stage.cluster.lb, 1)?;
    all_is_well(stage, &silent)
}

/// Waits until everybody is ready, and a little longer: what has become of the connections.
fn all_is_well(stage: &mut Stage, silent: &Silent) -> Result<Vec<Measure>> {
    stage.balancer.wait_ready(stage.setup.backends.len())?;
    go_on(AFTERWARDS);
    let ended = silent.ends().len();
    Ok(vec![
        count("flows that are reset or closed", ended).at_most(0),
        count("flows that are not answered afterwards", silent.unanswered()?).at_most(0),
    ])
}
