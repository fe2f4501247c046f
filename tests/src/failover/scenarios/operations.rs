//! What operators do to a load balancer, while clients keep coming.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::{AFTERWARDS, Measure, Stage, count, count_of, go_on};
use crate::failover::{
    arrivals::{Arrivals, tell_failures},
    balancer::{Balancer, Setup, USUAL},
    failure::Failure,
    silent::Silent,
    transfer::Transfer,
};

/// New connections a second.
const RATE: u32 = 500;
/// Slow downloads: of three servers each probably has some.
const TRANSFERS: usize = 4;
/// Idle connections.
const CONNECTIONS: usize = 60;
/// How long nobody looks after the packets.
const ABSENCE: Duration = Duration::from_secs(1);

/// `kill -9`, and started again a second later.
pub(super) fn restart(stage: &mut Stage) -> Result<Vec<Measure>> {
    let traffic = Traffic::start(stage)?;
    stage.balancer.kill()?;
    go_on(ABSENCE);
    stage.balancer = Balancer::start(stage.contender, &stage.cluster, stage.setup)?;
    traffic.finish(stage)
}

/// Another set of backends, there and back; everybody's connections are to live on.
pub(super) fn reload(stage: &mut Stage) -> Result<Vec<Measure>> {
    let traffic = Traffic::start(stage)?;
    for backends in [&["api-2", "api-3"][..], USUAL.backends] {
        stage.setup = Setup { backends, ..USUAL };
        stage.balancer.reload(&stage.cluster, stage.setup)?;
        stage.balancer.wait_ready(backends.len())?;
    }
    traffic.finish(stage)
}

/// Stopped in order, and another build started.
pub(super) fn upgrade(stage: &mut Stage) -> Result<Vec<Measure>> {
    let next = stage.next_build()?;
    let traffic = Traffic::start(stage)?;
    stage.balancer.replace(&stage.cluster, stage.setup, &next)?;
    traffic.finish(stage)
}

/// All that goes on meanwhile.
struct Traffic {
    silent: Silent,
    transfers: Vec<Transfer>,
    arrivals: Arrivals,
    /// When it was complete, and the event began.
    event: Instant,
}

impl Traffic {
    fn start(stage: &Stage) -> Result<Self> {
        Ok(Self {
            silent: stage.silent(CONNECTIONS)?,
            transfers: (0..TRANSFERS).map(|_| stage.transfer()).collect::<Result<_>>()?,
            arrivals: stage.arrivals_at(RATE)?,
            event: Instant::now(),
        })
    }

    /// Goes on until everybody is ready, and a little longer.
    fn finish(self, stage: &mut Stage) -> Result<Vec<Measure>> {
        stage.balancer.wait_ready(stage.setup.backends.len())?;
        go_on(AFTERWARDS);
        let arrivals = self.arrivals.stop();
        tell_failures(&arrivals, self.event);
        let failed = || arrivals.iter().filter_map(|it| it.result.as_ref().err().copied());
        let ended = self.silent.ends();
        let ends = ended.iter().map(|end| end.how);
        let resets = count_of(Failure::Reset, failed()) + count_of(Failure::Reset, ends);
        let unanswered = self.silent.unanswered()?;
        let transfers: Vec<_> = self.transfers.into_iter().map(Transfer::finish).collect();
        for error in transfers.iter().filter_map(|result| result.as_ref().err()) {
            eprintln!("      a transfer: {error:#}");
        }
        Ok(vec![
            count("new connections", arrivals.len()),
            count("new connections that fail", failed().count()).at_most(0),
            count("connections that are reset", resets).at_most(0),
            count("idle connections that do not live on", unanswered).at_most(0),
            count(
                "transfers that do not arrive byte for byte",
                transfers.iter().filter(|it| it.is_err()).count(),
            )
            .at_most(0),
        ])
    }
}
