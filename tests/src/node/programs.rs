//! What the hook's programs take of a connection: of one that is none of theirs, above all.
//!
//! There are two. One runs in `connect(2)`; the other is called by the kernel at certain moments in the life of every TCP
//! socket of the cgroup. Whoever asks what a connection costs that is to no listener must add up both.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    programs::{ProgramInfo, loaded_programs},
    sys::{Stats, enable_stats},
};
use serde::Serialize;

use super::{contender::servers, figures::Spread};
use crate::{
    aligned::aligned,
    cluster::{Cluster, NODE_PORT, Shape},
    daemon::Daemon,
    dial::dial,
};

/// In a round.
const CONNECTIONS: usize = 2000;
/// What the connect hook may take of a connect to an address that is no listener.
const LIMIT_NS: f64 = 100.0;
const HOOK: &str = "connect4";
const SOCKET_EVENTS: &str = "follow_sockets";

/// What connections to one address take.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Taken {
    to: &'static str,
    /// In the connect hook, in nanoseconds a connection.
    hook_ns: Spread,
    /// In the program that follows sockets, in nanoseconds a connection, from its first to its last call.
    events_ns: Spread,
    /// How often the latter is called.
    events: Spread,
    /// Of `hook_ns`.
    limit_ns: Option<f64>,
    met: Option<bool>,
}

/// Measures a connection to a server's own address, and one to a listener.
pub(super) fn measure(rounds: usize) -> Result<Vec<Taken>> {
    let cluster = Cluster::start_without_vips(Shape::OneArm, 1)?;
    let mut settings = cluster.settings_of_a_node()?;
    let listener = SocketAddr::from((Ipv4Addr::LOCALHOST, NODE_PORT));
    settings.listen = vec![listener];
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings)?;
    daemon.wait_ready(1)?;
    let direct = *servers(&cluster)?.first().context("no server")?;
    let _statistics = enable_stats(Stats::RunTime).context("cannot have the kernel time programs")?;
    let mut all = Vec::new();
    for (to, address, limit_ns) in [("no listener", direct, Some(LIMIT_NS)), ("a listener", listener, None)] {
        // One that does not count.
        let seen: Result<Vec<_>> = (0..=rounds).map(|_| round(&cluster, address)).collect();
        let seen = seen?.split_off(1);
        let spread = |of: fn(&[f64; 3]) -> f64| Spread::of(seen.iter().map(of));
        let hook_ns = spread(|[hook, ..]| *hook);
        all.push(Taken {
            to,
            hook_ns,
            events_ns: spread(|[_, time, _]| *time),
            events: spread(|[.., calls]| *calls),
            limit_ns,
            met: limit_ns.map(|limit| hook_ns.median <= limit),
        });
    }
    Ok(all)
}

/// A connection's time in either program, in nanoseconds, and calls of the second.
fn round(cluster: &Cluster, address: SocketAddr) -> Result<[f64; 3]> {
    let before = [run(HOOK)?, run(SOCKET_EVENTS)?];
    let dialled = dial(&cluster.lb, true, &cluster.ca_file(), address, CONNECTIONS)?;
    ensure!(dialled.failures.is_empty(), "{dialled:?}");
    let after = [run(HOOK)?, run(SOCKET_EVENTS)?];
    let each = |program: usize| {
        let (time, calls) = (after[program].0 - before[program].0, after[program].1 - before[program].1);
        (time.as_nanos() as f64 / CONNECTIONS as f64, calls as f64 / CONNECTIONS as f64)
    };
    let ((hook, _), (events, calls)) = (each(0), each(1));
    Ok([hook, events, calls])
}

/// How long the newest program of this name has run until now, and how often.
fn run(name: &str) -> Result<(Duration, u64)> {
    let programs: Vec<_> = loaded_programs().collect::<Result<_, _>>()?;
    let ours = |program: &&ProgramInfo| program.name_as_str() == Some(name);
    let newest = programs.iter().filter(ours).max_by_key(|program| program.id());
    let newest = newest.with_context(|| format!("no program {name} is loaded"))?;
    Ok((newest.run_time(), newest.run_count()))
}

/// A table of them.
pub(super) fn table(taken: &[Taken]) -> String {
    let head =
        ["a connection to", "connect hook", "limit", "met", "socket events", "calls of these", "together"];
    let mut rows = vec![head.map(str::to_owned)];
    for Taken { to, hook_ns, events_ns, events, limit_ns, met } in taken {
        rows.push([
            (*to).to_owned(),
            format!("{} ns", hook_ns.shown(0)),
            limit_ns.map(|limit| format!("<= {limit:.0} ns")).unwrap_or_default(),
            met.map(|met| if met { "yes" } else { "NO" }.to_owned()).unwrap_or_default(),
            format!("{} ns", events_ns.shown(0)),
            format!("{:.1}", events.median),
            format!("{:.0} ns", hook_ns.median + events_ns.median),
        ]);
    }
    aligned(&rows, [false, true, true, false, true, true, true])
}
