//! What happens, and what is measured of it.

mod failing;
mod illness;
mod operations;
mod silence;

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;

use super::{
    balancer::{Contender, Setup, USUAL},
    failure::Failure,
    stage::Stage,
    table::{Measure, count, time},
};
use crate::cluster::{Router, Shape};

/// The longest verdict: three replies that come after 4 s, or never.
const VERDICT: Duration = Duration::from_secs(30);
/// How long a scenario goes on after what was waited for: two lost SYNs.
const AFTERWARDS: Duration = Duration::from_secs(3);

/// One story.
pub(super) struct Scenario {
    pub(super) name: &'static str,
    pub(super) shape: Shape,
    pub(super) setup: Setup,
    pub(super) contenders: &'static [Contender],
    pub(super) play: fn(&mut Stage) -> Result<Vec<Measure>>,
}

const BOTH: &[Contender] = &Contender::ALL;
const SHEAVE: &[Contender] = &[Contender::Sheave];
const MASQUERADE: Shape = Shape::Routed(Router { masquerades: true, mtu: None });

const fn scenario(name: &'static str, play: fn(&mut Stage) -> Result<Vec<Measure>>) -> Scenario {
    Scenario { name, shape: Shape::OneArm, setup: USUAL, contenders: BOTH, play }
}

/// All of them.
pub(super) static SCENARIOS: [Scenario; 16] = [
    scenario("killed", failing::killed),
    scenario("frozen", failing::frozen),
    scenario("cut off", failing::cut_off),
    scenario("silent watch", silence::watch),
    Scenario { shape: MASQUERADE, ..scenario("silent watch, masqueraded", silence::watch) },
    Scenario {
        setup: Setup { backends: &["api-1", "api-2"], service: &[] },
        contenders: SHEAVE,
        ..scenario("10,000 flows, default rate", silence::many_at_the_default_rate)
    },
    Scenario {
        setup: Setup { backends: &["api-1", "api-2"], service: &["reset_rate = 0"] },
        contenders: SHEAVE,
        ..scenario("10,000 flows, no limit", silence::many_without_a_limit)
    },
    scenario("3 s of silence", silence::snapshot),
    scenario("etcd hangs", illness::etcd_hangs),
    Scenario { shape: Shape::TwoArm, ..scenario("uplink down for 10 s", silence::uplink) },
    scenario("readyz 500", illness::readyz),
    scenario("kill -9 and restart", operations::restart),
    scenario("reload", operations::reload),
    Scenario { contenders: SHEAVE, ..scenario("upgrade", operations::upgrade) },
    scenario("all dead", illness::all_dead),
    scenario("never ready", illness::never_ready),
];

/// Lets what is staged go on for a time.
fn go_on(time: Duration) {
    thread::sleep(time);
}

/// From `event` to the last of `moments` after it; zero without any.
fn until_last(event: Instant, moments: impl Iterator<Item = Instant>) -> Duration {
    moments.map(|moment| moment.saturating_duration_since(event)).max().unwrap_or_default()
}

/// How many of `failures` are of this kind.
fn count_of(kind: Failure, failures: impl Iterator<Item = Failure>) -> usize {
    failures.filter(|failure| *failure == kind).count()
}
