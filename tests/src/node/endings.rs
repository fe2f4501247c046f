//! How soon the sockets of a dead backend are ended: from the daemon's verdict to the last process that was told.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use serde_json::Value;

use super::figures::Spread;
use crate::{
    aligned::aligned,
    cluster::{Cluster, NODE_PORT, Shape},
    daemon::Daemon,
    hold::{Holder, Order, Said},
    lab::{Host, eventually},
    stub::PORT,
};

/// At the server that dies. The other one has as many.
const SOCKETS: usize = 1000;
/// From the verdict to the last of them.
const LIMIT_MS: f64 = 300.0;
/// A verdict, and the end of everything after it.
const PATIENCE: Duration = Duration::from_secs(60);
const SERVER: &str = "api-1";

/// Whose sockets they are.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum Where {
    /// A process of the host, which dials a loopback address.
    Host,
    /// A process in a network namespace of its own, which dials the VIP. The daemon has to find and enter the namespace.
    Pod,
}

impl Where {
    const ALL: [Self; 2] = [Self::Host, Self::Pod];

    fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Pod => "pod",
        }
    }

    /// What such a process dials.
    fn listener(self, cluster: &Cluster) -> SocketAddr {
        match self {
            Self::Host => (Ipv4Addr::LOCALHOST, NODE_PORT).into(),
            Self::Pod => (cluster.vip4, PORT).into(),
        }
    }

    /// Where it runs. The client's network namespace stands for a pod's: it has a way to the servers, and nobody has the VIP.
    fn ground(self, cluster: &Cluster) -> &Host {
        match self {
            Self::Host => &cluster.lb,
            Self::Pod => &cluster.client,
        }
    }
}

/// What was seen.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Endings {
    #[serde(rename = "where")]
    whose: Where,
    /// How many sockets were ended in a round.
    sockets: Spread,
    /// From the verdict until the first was ended, in milliseconds.
    first_ms: Spread,
    /// Until the last was.
    last_ms: Spread,
    limit_ms: f64,
    met: bool,
}

/// Has a server die so many times, and come back, under a process of the host; and then under one of a pod.
pub(super) fn measure(rounds: usize) -> Result<Vec<Endings>> {
    Where::ALL.into_iter().map(|whose| measure_one(whose, rounds)).collect()
}

fn measure_one(whose: Where, rounds: usize) -> Result<Endings> {
    let cluster = Cluster::start_without_vips(Shape::OneArm, 2)?;
    let mut settings = cluster.settings_of_a_node()?;
    let listener = whose.listener(&cluster);
    settings.listen = vec![listener];
    settings.service.push("reset_after = \"1500ms\"".to_owned());
    if matches!(whose, Where::Pod) {
        settings.dataplane.push("interfaces = []".to_owned());
        settings.service.push("pods = true".to_owned());
    }
    let mut daemon = Daemon::start(&cluster.lb, cluster.lab.directory(), &settings)?;
    let mut seen = Vec::new();
    for round in 1..=rounds {
        daemon.wait_ready(2)?;
        let mut holder = Holder::start(whose.ground(&cluster), true, &cluster.ca_file(), listener)?;
        holder.order(Order::OpenPlain(2 * SOCKETS))?;
        // The daemon counts them every few seconds.
        let open = eventually(PATIENCE, "all connections are counted", || {
            let (all, open) = (open_at(&daemon, |_| true)?, open_at(&daemon, |name| name == SERVER)?);
            ensure!(all == 2 * SOCKETS as u64, "{all}");
            Ok(open)
        })?;
        cluster.apiservers[0].host.cut_off()?;
        let ended = eventually(PATIENCE, "all sockets of the dead server are ended", || {
            let said = holder.timed();
            let ended: Vec<_> = said.iter().filter(|(_, it)| matches!(it, Said::Ended { .. })).collect();
            ensure!(ended.len() as u64 >= open, "{} of {open}", ended.len());
            Ok(ended.iter().map(|(at, _)| since_1970(*at)).collect::<Vec<_>>())
        })?;
        let verdict = died(&daemon, round)?;
        let after = |at: Option<&f64>| at.map(|at| at - verdict).context("no socket was there");
        seen.push((ended.len() as f64, after(ended.first())?, after(ended.last())?));
        cluster.apiservers[0].host.reconnect()?;
    }
    let last_ms = Spread::of(seen.iter().map(|(.., last)| *last));
    Ok(Endings {
        whose,
        sockets: Spread::of(seen.iter().map(|(sockets, ..)| *sockets)),
        first_ms: Spread::of(seen.iter().map(|(_, first, _)| *first)),
        met: last_ms.median <= LIMIT_MS,
        last_ms,
        limit_ms: LIMIT_MS,
    })
}

fn open_at(daemon: &Daemon, wanted: impl Fn(&str) -> bool) -> Result<u64> {
    let status = daemon.status()?;
    let backends = status.services.iter().flat_map(|service| &service.backends);
    Ok(backends.filter(|backend| wanted(&backend.name)).map(|backend| backend.active_flows).sum())
}

/// When the daemon has found the server dead for this time, in milliseconds since 1970.
fn died(daemon: &Daemon, time: usize) -> Result<f64> {
    let output = daemon.command("events")?.arg("--json").output()?;
    let events: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    let is_death =
        |event: &&Value| event["text"].as_str().is_some_and(|text| text.contains("silent -> dead"));
    let deaths: Vec<_> = events.iter().filter(is_death).collect();
    ensure!(deaths.len() == time, "{} deaths, and not {time}", deaths.len());
    deaths.last().and_then(|event| event["time_ms"].as_f64()).context("an event without a time")
}

fn since_1970(at: Instant) -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.saturating_sub(at.elapsed()).as_secs_f64() * 1e3
}

/// A table of them.
pub(super) fn table(endings: &[Endings]) -> String {
    let head = [
        "a process of the",
        "a dead server's sockets",
        "the first is told after",
        "the last after",
        "limit",
        "met",
    ];
    let mut rows = vec![head.map(str::to_owned)];
    for Endings { whose, sockets, first_ms, last_ms, limit_ms, met } in endings {
        rows.push([
            whose.name().to_owned(),
            sockets.shown(0),
            format!("{} ms", first_ms.shown(0)),
            format!("{} ms", last_ms.shown(0)),
            format!("<= {limit_ms:.0} ms"),
            if *met { "yes" } else { "NO" }.to_owned(),
        ]);
    }
    aligned(&rows, [false, true, true, true, true, false])
}
