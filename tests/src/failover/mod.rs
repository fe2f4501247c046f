//! `sheave-bench failover`: how long failures last, and whom they hit; with HAProxy beside it, in the same lab.
//!
//! Each scenario is played by each contender in turn, on the same hosts. Times are taken where they matter: by the
//! clients, whose sockets say when they were refused, reset or answered, and from the load balancer's own log where
//! a verdict is the beginning.

mod arrivals;
mod balancer;
mod failure;
mod haproxy;
mod machine;
mod said;
mod scenarios;
mod silent;
mod stage;
mod table;
mod transfer;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

use self::{
    balancer::Contender,
    scenarios::{SCENARIOS, Scenario},
    stage::Stage,
    table::Figure,
};
use crate::{cluster::Cluster, daemon, load};

/// Ports for clients: with the usual ones those in TIME_WAIT would be missing.
const CLIENT_PORTS: &str = "1024 65535";

/// What to measure.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Print one JSON array instead of tables.
    #[arg(long)]
    json: bool,
    /// Only scenarios with this in their name.
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// How often; the worst of the rounds counts.
    #[arg(long, default_value_t = 1)]
    rounds: u32,
    /// Keep what the load balancers log: a file for each scenario and contender in this directory.
    #[arg(long, value_name = "DIRECTORY")]
    logs: Option<PathBuf>,
    /// Another build of sheave, to upgrade to [default: a copy of the one that is measured].
    #[arg(long, value_name = "PROGRAM")]
    next: Option<PathBuf>,
}

/// Plays the scenarios and prints what was measured.
///
/// # Errors
/// When a scenario could not be played; a limit that is missed is no error.
pub fn run(options: &Options) -> Result<()> {
    // Before anything is built.
    daemon::program()?;
    let wanted =
        |scenario: &&Scenario| options.only.as_deref().is_none_or(|only| scenario.name.contains(only));
    let chosen: Vec<_> = SCENARIOS.iter().filter(wanted).collect();
    let names = || SCENARIOS.iter().map(|scenario| scenario.name).collect::<Vec<_>>().join(", ");
    ensure!(!chosen.is_empty() && options.rounds >= 1, "nothing to do; there are: {}", names());
    // The stubs inherit it.
    load::raise_descriptor_limit()?;
    let (mut figures, mut failures) = (Vec::new(), 0);
    for _ in 0..options.rounds {
        for scenario in &chosen {
            if let Err(error) = play(scenario, options, &mut figures) {
                failures += 1;
                eprintln!("      {} could not be played: {error:#}", scenario.name);
            }
        }
    }
    let figures = table::worst(figures);
    if options.json {
        println!("{}", serde_json::to_string(&figures)?);
    } else {
        let tables = Contender::ALL.map(|contender| table::table(contender, &figures));
        println!("{}\n{}", tables.join("\n"), table::machine_table(&figures));
    }
    if failures > 0 {
        bail!("{failures} scenarios could not be played");
    }
    Ok(())
}

fn play(scenario: &Scenario, options: &Options, figures: &mut Vec<Figure>) -> Result<()> {
    let mut cluster = Cluster::start(scenario.shape, scenario.setup.backends.len() as u8)?;
    cluster.client.namespace().sysctl("net/ipv4/ip_local_port_range", CLIENT_PORTS)?;
    for &contender in scenario.contenders {
        eprintln!("sheave-bench: {}, {}", scenario.name, contender.name());
        let mut stage = Stage::set(cluster, contender, scenario.setup)?;
        stage.next.clone_from(&options.next);
        let played = (scenario.play)(&mut stage).context(contender.name());
        if let Some(directory) = &options.logs {
            keep_log(&stage, &directory.join(format!("{}, {}.log", scenario.name, contender.name())))?;
        }
        let (measures, load) = (played?, stage.watch.end()?);
        figures.extend(measures.into_iter().map(|measure| measure.of(contender, scenario.name, load)));
        cluster = stage.strike()?;
    }
    Ok(())
}

fn keep_log(stage: &Stage, file: &Path) -> Result<()> {
    std::fs::write(file, stage.balancer.log()).with_context(|| format!("writing {}", file.display()))
}
