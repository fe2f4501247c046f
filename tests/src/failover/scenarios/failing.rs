//! An apiserver goes away while clients keep coming.

use std::time::Instant;

use anyhow::Result;

use super::{AFTERWARDS, Measure, Stage, VERDICT, count, go_on, time, until_last};
use crate::failover::{
    arrivals::{Arrival, tell_failures},
    balancer::DOWN,
};

/// SIGKILL: its kernel refuses new connections and resets those that are open.
pub(super) fn killed(stage: &mut Stage) -> Result<Vec<Measure>> {
    let (event, arrivals) = under_load(stage, |stage| stage.cluster.apiservers[0].stub.kill())?;
    let (before, after): (Vec<_>, Vec<_>) = arrivals.into_iter().partition(|it| it.started < event);
    let failed = |arrivals: &[Arrival]| arrivals.iter().filter(|it| it.result.is_err()).count();
    let failures = after.iter().filter(|it| it.result.is_err()).map(|it| it.started);
    Ok(vec![
        time("from the kill to the last new connection that fails", Some(until_last(event, failures)))
            .at_most(100),
        until_avoided(event, &after).at_most(100),
        count("new connections that fail", failed(&after)).at_most(0),
        count("new connections that lose a SYN", after.iter().filter(|it| it.syn_lost).count()),
        count("connections just begun that fail", failed(&before)),
    ])
}

/// SIGSTOP: its kernel goes on accepting, nobody answers.
pub(super) fn frozen(stage: &mut Stage) -> Result<Vec<Measure>> {
    avoided(stage, |stage| stage.cluster.apiservers[0].stub.freeze())
}

/// Its link is down.
pub(super) fn cut_off(stage: &mut Stage) -> Result<Vec<Measure>> {
    avoided(stage, |stage| stage.cluster.lab.unplug(&stage.cluster.apiservers[0].host))
}

/// How soon new connections avoid a server that does not answer, and what becomes of those that do not.
fn avoided(stage: &mut Stage, event: impl FnOnce(&mut Stage) -> Result<()>) -> Result<Vec<Measure>> {
    let (event, mut arrivals) = under_load(stage, event)?;
    arrivals.retain(|arrival| arrival.started >= event);
    Ok(vec![
        until_avoided(event, &arrivals).at_most(1500),
        count("new connections that fail", arrivals.iter().filter(|it| it.result.is_err()).count()),
        count("new connections that lose a SYN", arrivals.iter().filter(|it| it.syn_lost).count()),
    ])
}

/// How long new connections still go to a server that does not take them: they fail, or lose a SYN first. `after` are
/// those that were begun after the event.
fn until_avoided(event: Instant, after: &[Arrival]) -> Measure {
    let there = after.iter().filter(|it| it.syn_lost || it.result.is_err());
    time("until new connections avoid it", Some(until_last(event, there.map(|it| it.started))))
}

/// Does something to `api-1` under load and waits for the verdict.
fn under_load(
    stage: &mut Stage,
    act: impl FnOnce(&mut Stage) -> Result<()>,
) -> Result<(Instant, Vec<Arrival>)> {
    let arrivals = stage.arrivals()?;
    let mark = stage.balancer.mark();
    let event = Instant::now();
    act(stage)?;
    stage.balancer.wait_said(mark, &["api-1", DOWN], VERDICT)?;
    go_on(AFTERWARDS);
    let arrivals = arrivals.stop();
    tell_failures(&arrivals, event);
    Ok((event, arrivals))
}
