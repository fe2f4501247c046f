//! `sheave-bench node`: what the way from a node's clients to the apiservers costs, by the connect hook, by the proxies
//! that are usual on localhost, and without anything.
//!
//! The host of the lab that is a load balancer elsewhere is the node here. Each contender has a client in a cgroup of its own,
//! and the same three apiservers; they are measured in turns, a moment each, and what is compared was measured in the
//! same round. The load keeps all processors busy, so that whoever takes more of their time gets less done.

mod checks;
mod contender;
mod endings;
mod figures;
mod programs;
mod proxies;
mod rounds;
mod worker;

use std::{thread::available_parallelism, time::Duration};

use anyhow::{Result, ensure};

pub use worker::serve_orders;

use self::{
    checks::Cost,
    contender::{Contender, Running},
    endings::Endings,
    figures::{CONNECTIONS, Figure, REQUESTS, Spread},
    programs::Taken,
    rounds::{Ground, Round},
    worker::Load,
};
use crate::{
    cluster::{Cluster, Shape},
    daemon,
    lab::cgroup::Group,
    load,
};

const APISERVERS: u8 = 3;
/// At a time, in each thread: few, so that nobody waits in a queue for long.
const LANES: usize = 2;
/// A node's clients are many, and do not meet the same four numbers again within a minute; ours would.
const CLIENT_PORTS: &str = "20000 65535";

/// What a check costs is no matter of who balances.
const CHECKS: &str = "checks";
const CHECK_ROUNDS: usize = 5;
const CHECK_TIME: Duration = Duration::from_secs(2);
/// What the hook's programs take is counted in nanoseconds, without other contenders.
const PROGRAMS: &str = "programs";
/// A server dies, with many sockets.
const ENDINGS: &str = "endings";
/// At most.
const ENDING_ROUNDS: usize = 5;

/// What to measure.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Print one JSON object instead of tables.
    #[arg(long)]
    json: bool,
    /// How often each contender is measured under each load.
    #[arg(long, default_value_t = 21)]
    rounds: usize,
    /// How long each time, in milliseconds.
    #[arg(long, default_value_t = 800)]
    window: u64,
    /// Only this: requests, connections, checks, programs or endings.
    #[arg(long, value_name = "WHAT")]
    only: Option<String>,
}

/// Measures and prints.
///
/// # Errors
/// When something could not be measured; a limit that is missed is no error.
pub fn run(options: &Options) -> Result<()> {
    // Before anything is built.
    daemon::program()?;
    let Options { json, rounds, window, only } = options;
    let wanted = |what| only.as_deref().is_none_or(|only| only == what);
    let loads = [
        ("requests", Load::Kept { servers: APISERVERS.into() }, REQUESTS.as_slice()),
        ("connections", Load::New { lanes: LANES }, CONNECTIONS.as_slice()),
    ];
    let known = loads.iter().map(|(name, ..)| *name).chain([CHECKS, PROGRAMS, ENDINGS]).any(wanted);
    ensure!(
        known && *rounds >= 1 && *window >= 1,
        "nothing to do; there are: requests, connections, {CHECKS}, {PROGRAMS}, {ENDINGS}"
    );
    // The stubs inherit it.
    load::raise_descriptor_limit()?;
    let mut cluster = Cluster::start_without_vips(Shape::OneArm, APISERVERS)?;
    let time = Duration::from_millis(*window);
    let (mut measured, mut played) = (Vec::new(), Vec::new());
    if loads.iter().any(|(name, ..)| wanted(name)) {
        let mut ground = prepare(&mut cluster)?;
        for (name, load, of) in loads.into_iter().filter(|(name, ..)| wanted(name)) {
            eprintln!("sheave-bench: {name}, {rounds} rounds");
            let now = ground.play(load, *rounds, time)?;
            measured.extend(figures::figures(of, &now));
            played.extend(now);
        }
    }
    let mut costs = Vec::new();
    if wanted(CHECKS) {
        eprintln!("sheave-bench: {CHECKS}");
        costs = checks::measure(&mut cluster, CHECK_ROUNDS, CHECK_TIME)?;
    }
    // Both have a cluster of their own.
    drop(cluster);
    let (mut programs, mut endings) = (Vec::new(), Vec::new());
    if wanted(PROGRAMS) {
        eprintln!("sheave-bench: {PROGRAMS}, {rounds} rounds");
        programs = programs::measure(*rounds)?;
    }
    if wanted(ENDINGS) {
        let rounds = ENDING_ROUNDS.min(*rounds);
        eprintln!("sheave-bench: {ENDINGS}, {rounds} rounds");
        endings = endings::measure(rounds)?;
    }
    show(*json, &Results { measured, costs, programs, endings, played });
    Ok(())
}

/// All that was measured.
struct Results {
    measured: Vec<Figure>,
    costs: Vec<Cost>,
    programs: Vec<Taken>,
    endings: Vec<Endings>,
    played: Vec<Round>,
}

/// Starts the contenders on the node, and puts the apiservers where their processor time is counted.
fn prepare(cluster: &mut Cluster) -> Result<Ground> {
    let node = cluster.lb.namespace();
    node.sysctl("net/ipv4/ip_local_port_range", CLIENT_PORTS)?;
    node.sysctl("net/ipv4/tcp_tw_reuse", "1")?;
    let servers = Group::new(&cluster.lab, "apiservers")?;
    for apiserver in &mut cluster.apiservers {
        servers.adopt(apiserver.stub.process()?.pid())?;
    }
    let threads = available_parallelism()?.get();
    let start = |contender| Running::start(contender, cluster, threads);
    let running = Contender::ALL.into_iter().map(start).collect::<Result<_>>()?;
    Ok(Ground { running, servers })
}

fn show(json: bool, results: &Results) {
    let Results { measured, costs, programs, endings, played } = results;
    let others = Spread::of(played.iter().flatten().map(|window| window.others));
    if json {
        let all = serde_json::json!({
            "figures": measured, "checks": costs, "programs": programs, "endings": endings,
            "others_processors": others,
        });
        println!("{all}");
        return;
    }
    if !measured.is_empty() {
        println!("{}", figures::table(measured));
        println!("Meanwhile others kept {} processors busy.", others.shown(2));
    }
    if !costs.is_empty() {
        println!("{}", checks::table(costs));
    }
    if !programs.is_empty() {
        println!("{}", programs::table(programs));
    }
    if !endings.is_empty() {
        println!("{}", endings::table(endings));
    }
}

/// The value below which so large a part of the sorted `values` lies, between two neighbours by proportion; zero without any.
fn quantile(values: &[f64], part: f64) -> f64 {
    let Some(last) = values.len().checked_sub(1) else { return 0.0 };
    let place = last as f64 * part;
    let (below, above) = (values[place.floor() as usize], values[place.ceil() as usize]);
    below + (above - below) * place.fract()
}
