//! What the hook's programs take of a connection: of one that is none of theirs, above all.
//!
//! There are two. One runs in `connect(2)`; the other is called by the kernel at certain moments in the life of every TCP
//! socket of the cgroup. Whoever asks what a connection costs that is to no listener must add up both.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    programs::{
        links::{FdLink, PinnedLink},
        loaded_programs,
    },
    sys::{Stats, enable_stats},
};
use serde::Serialize;

use super::figures::Spread;
use crate::{
    aligned::aligned,
    cluster::{Cluster, NODE_PORT, Shape},
    daemon::Daemon,
    dial::dial,
    stub::PORT,
};

/// In a round.
const CONNECTIONS: usize = 2000;
/// What the connect hook may take of a connect to an address that is no listener.
const LIMIT_NS: f64 = 100.0;
const SOCKET_EVENTS: &str = "follow_sockets";

/// The program that runs in `connect(2)` of such an address.
fn hook(address: SocketAddr) -> &'static str {
    if address.is_ipv4() { "connect4" } else { "connect6" }
}

/// Whom connections are to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum To {
    /// A server's own address; no listener has the port either.
    NoListener,
    /// A server's own address, where nobody listens on that port, and a listener elsewhere has it: the hook must look at the
    /// address as well.
    ListenersPort,
    Listener,
}

impl To {
    const ALL: [Self; 3] = [Self::NoListener, Self::ListenersPort, Self::Listener];

    fn name(self) -> &'static str {
        match self {
            Self::NoListener => "no listener",
            Self::ListenersPort => "no listener, on a listener's port",
            Self::Listener => "a listener",
        }
    }

    /// In the family of the server's address.
    fn address(self, server: IpAddr) -> SocketAddr {
        match (self, server) {
            (Self::NoListener, _) => (server, PORT).into(),
            (Self::ListenersPort, _) => (server, NODE_PORT).into(),
            (Self::Listener, IpAddr::V4(_)) => (Ipv4Addr::LOCALHOST, NODE_PORT).into(),
            (Self::Listener, IpAddr::V6(_)) => (Ipv6Addr::LOCALHOST, NODE_PORT).into(),
        }
    }

    fn limit_ns(self) -> Option<f64> {
        (self != Self::Listener).then_some(LIMIT_NS)
    }
}

/// What connections to one address take.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Taken {
    to: &'static str,
    /// The program in `connect(2)`.
    hook: &'static str,
    /// In it, in nanoseconds a connection.
    hook_ns: Spread,
    /// In the program that follows sockets, in nanoseconds a connection, from its first to its last call.
    events_ns: Spread,
    /// How often the latter is called.
    events: Spread,
    /// Of `hook_ns`.
    limit_ns: Option<f64>,
    met: Option<bool>,
}

/// Measures connections to a server's own addresses, and to listeners, over both families.
pub(super) fn measure(rounds: usize) -> Result<Vec<Taken>> {
    let cluster = Cluster::start_without_vips(Shape::OneArm, 1)?;
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &cluster.settings_of_a_node()?)?;
    daemon.wait_ready(1)?;
    let server = &cluster.apiservers.first().context("no server")?.host;
    let _statistics = enable_stats(Stats::RunTime).context("cannot have the kernel time programs")?;
    let mut all = Vec::new();
    for family in cluster.vips() {
        let own = server.address(family)?;
        for to in To::ALL {
            all.push(measure_one(&cluster, &daemon, to, to.address(own), rounds)?);
        }
    }
    Ok(all)
}

fn measure_one(
    cluster: &Cluster,
    daemon: &Daemon,
    to: To,
    address: SocketAddr,
    rounds: usize,
) -> Result<Taken> {
    let programs = [program(daemon, hook(address))?, program(daemon, SOCKET_EVENTS)?];
    // One that does not count.
    let seen: Result<Vec<_>> = (0..=rounds).map(|_| round(cluster, programs, to, address)).collect();
    let seen = seen?.split_off(1);
    let spread = |of: fn(&[f64; 3]) -> f64| Spread::of(seen.iter().map(of));
    let (hook_ns, limit_ns) = (spread(|[hook, ..]| *hook), to.limit_ns());
    Ok(Taken {
        to: to.name(),
        hook: hook(address),
        hook_ns,
        events_ns: spread(|[_, time, _]| *time),
        events: spread(|[.., calls]| *calls),
        limit_ns,
        met: limit_ns.map(|limit| hook_ns.median <= limit),
    })
}

/// A connection's time in either of two programs, the connect hook's first, in nanoseconds, and calls of the second.
fn round(cluster: &Cluster, programs: [u32; 2], to: To, address: SocketAddr) -> Result<[f64; 3]> {
    let [hook, events] = programs;
    let before = [run(hook)?, run(events)?];
    let dialled = dial(&cluster.lb, true, &cluster.ca_file(), address, CONNECTIONS)?;
    // What a port where nobody listens answers is nothing to the hook.
    ensure!(to == To::ListenersPort || dialled.failures.is_empty(), "{dialled:?}");
    let after = [run(hook)?, run(events)?];
    let each = |program: usize| {
        let (time, calls) = (after[program].0 - before[program].0, after[program].1 - before[program].1);
        (time.as_nanos() as f64 / CONNECTIONS as f64, calls as f64 / CONNECTIONS as f64)
    };
    let ((time, hook_calls), (events_time, events)) = (each(0), each(1));
    // Less, and the connections went another way.
    ensure!(hook_calls >= 1.0, "the hook was called {hook_calls} times a connection to {address}");
    Ok([time, events_time, events])
}

/// One of the daemon's programs on the cgroup, by the kernel's id: other daemons on this machine have some of the same name.
fn program(daemon: &Daemon, name: &str) -> Result<u32> {
    let layout = fs::read_dir(daemon.pins())?.next().context("nothing is pinned")??.path();
    let pin = layout.join(format!("hook_{name}"));
    let link = PinnedLink::from_pin(&pin).with_context(|| pin.display().to_string())?;
    Ok(FdLink::from(link).info()?.program_id())
}

/// How long a program has run until now, and how often.
fn run(id: u32) -> Result<(Duration, u64)> {
    // Others' come and go meanwhile: those that are gone are errors.
    let program = loaded_programs().flatten().find(|program| program.id() == id);
    let program = program.with_context(|| format!("program {id} is not loaded"))?;
    Ok((program.run_time(), program.run_count()))
}

/// A table of them.
pub(super) fn table(taken: &[Taken]) -> String {
    let head =
        ["a connection to", "in", "takes", "limit", "met", "socket events", "calls of these", "together"];
    let mut rows = vec![head.map(str::to_owned)];
    for Taken { to, hook, hook_ns, events_ns, events, limit_ns, met } in taken {
        rows.push([
            (*to).to_owned(),
            (*hook).to_owned(),
            format!("{} ns", hook_ns.shown(0)),
            limit_ns.map(|limit| format!("<= {limit:.0} ns")).unwrap_or_default(),
            met.map(|met| if met { "yes" } else { "NO" }.to_owned()).unwrap_or_default(),
            format!("{} ns", events_ns.shown(0)),
            format!("{:.1}", events.median),
            format!("{:.0} ns", hook_ns.median + events_ns.median),
        ]);
    }
    aligned(&rows, [false, false, true, true, false, true, true, true])
}
