//! `sheave status`

use std::{
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{
    SocketArgument, block_on,
    output::{self, Screen},
    table,
};
use crate::admin::Client;

const LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
#[command(after_help = "\
States:
  ready     gets new flows
  draining  answers, but not as expected, or refuses: no new flows, old ones are kept
  silent    does not answer at all: no new flows, old ones are kept
  dead      silent for `reset_after` and without a word to anybody: old flows are reset, unless on_dead = \"keep\"
  drain     by `sheave drain`: no new flows unless there is nobody else, old ones are kept
  maint     by `sheave maint`: no new flows at all, old ones are kept
  unknown   not checked yet

Who has no ready backend left uses draining ones that still complete the connection, then those in drain.

The last check is shown as HAProxy does: L7OK/200 in 4ms.

Exit codes: 0 every service has a ready backend, 1 failed, 2 wrong usage, 3 a service has no ready backend.

Examples:
  sheave status
  sheave status --json | jq '.services[].backends[] | select(.state != \"ready\")'")]
pub(super) struct Arguments {
    /// The same facts as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    socket: SocketArgument,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let status = block_on(Client::new(&arguments.socket.socket, LIMIT).status())??;
    if arguments.json {
        output::print_json(&status)?;
    } else {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        output::print(&table::render(&status, now, Screen::stdout()))?;
    }
    Ok(if status.lacks_ready_backend() { ExitCode::from(super::NOT_READY) } else { ExitCode::SUCCESS })
}
