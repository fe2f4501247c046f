//! `sheave unload`

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use super::{SocketArgument, block_on, output};
use crate::{admin::Client, config::Config, daemon};

/// Longer than the daemon takes at most.
const LIMIT: Duration = Duration::from_secs(25);

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Removes what sheave put on this host, and nothing else: VIPs of `mode = \"own\"`, its programs and maps with their
pins, its changes to offloads. Connections through this load balancer end; whoever listens behind it (HAProxy) serves
again. A running daemon does it and stops; without one this command does, also after a `kill -9`.

Exit codes: 0 nothing of sheave is left, 1 failed, 2 wrong usage.")]
pub(super) struct Arguments {
    #[command(flatten)]
    socket: SocketArgument,
    /// Where no daemon runs: the configuration of the one that did, for its state_dir and pin_dir [default:
    /// /etc/sheave/sheave.toml, if there is one]
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let removed = match block_on(Client::new(&arguments.socket.socket, LIMIT).unload())? {
        Ok(unloaded) => unloaded.removed,
        Err(error) if error.is_no_daemon() => leftovers(arguments.config.as_deref())?,
        Err(error) => return Err(error.into()),
    };
    let lines: String = removed.iter().map(|what| format!("removed {}\n", output::printable(what))).collect();
    output::print(if lines.is_empty() { "nothing of sheave was here\n" } else { &lines })?;
    Ok(ExitCode::SUCCESS)
}

fn leftovers(named: Option<&Path>) -> anyhow::Result<Vec<String>> {
    let usual = Path::new(super::CONFIG_FILE);
    let file = named.or_else(|| usual.exists().then_some(usual));
    let config = file.map(Config::load).transpose()?.map(|(config, _)| config);
    Ok(block_on(daemon::unload_leftovers(config.as_ref()))??)
}
