//! `sheave reload`

use std::{process::ExitCode, time::Duration};

use super::{SocketArgument, block_on, output};
use crate::admin::Client;

/// Longer than the daemon takes at most.
const LIMIT: Duration = Duration::from_secs(25);

#[derive(Debug, clap::Args)]
#[command(after_help = "\
The running daemon reads its configuration file again (the one that `sheave run` was started with), checks all of it,
and applies what is different. Flows are untouched: those of a backend or listener that is gone live on until they end.
A file that is wrong, or that asks for what needs a restart, changes nothing and is answered with the reason.
`kill -HUP` does the same, and the reason is in the log.

Needs a restart: [dataplane], vip.mode, [admin], and the first listener of a family.

Exit codes: 0 the file is in use, 1 not now or not without a restart, 2 the file is wrong.")]
pub(super) struct Arguments {
    /// What is different, as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    socket: SocketArgument,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let reloaded = block_on(Client::new(&arguments.socket.socket, LIMIT).reload())??;
    if arguments.json {
        output::print_json(&reloaded)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = String::new();
    for warning in &reloaded.warnings {
        text.push_str(&format!("warning: {}\n", output::printable(warning)));
    }
    for change in &reloaded.changes {
        text.push_str(&format!("{}\n", output::printable(change)));
    }
    if reloaded.changes.is_empty() {
        text.push_str("nothing to change: the file says what already is\n");
    }
    output::print(&text)?;
    Ok(ExitCode::SUCCESS)
}
