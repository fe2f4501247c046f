//! `sheave kill`

use std::{process::ExitCode, time::Duration};

use super::{SocketArgument, block_on, output};
use crate::admin::{Client, KillOrder};

/// A large table is walked through in batches: longer than the daemon takes at most.
const LIMIT: Duration = Duration::from_secs(22);

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Both ends are told with a RST: the client at once, also one that only listens (a watch), the backend as well. The slots
answer both until they are used again. Nothing keeps the client from connecting anew: `sheave drain` or `maint` a
backend first that it must not come back to.

Examples:
  sheave kill master-1                       what a drained master still has
  sheave kill --client 192.168.2.77          one node's connections
  sheave kill --client 192.168.2.77:40312    one connection, as `sheave flows` shows it
  sheave kill master-1 --client 10.0.0.0/8   both must fit

Exit codes: 0 done (also where there was none), 1 failed, 2 no such backend or service, or more than one.")]
pub(super) struct Arguments {
    /// Flows at this backend: its name, or its address and port
    #[arg(value_name = "BACKEND", required_unless_present = "client")]
    backend: Option<String>,
    /// Flows of this service
    #[arg(long, value_name = "NAME", conflicts_with = "all_services")]
    service: Option<String>,
    /// At this backend in every service that has it
    #[arg(long, requires = "backend")]
    all_services: bool,
    /// Flows from this client: an address, an address and port, or a prefix
    #[arg(long, value_name = "CLIENT")]
    client: Option<String>,
    /// How many it were, as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    socket: SocketArgument,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let Arguments { backend, service, all_services, client, json, socket } = arguments;
    let order = KillOrder { backend, service, all_services, client };
    let killed = block_on(Client::new(&socket.socket, LIMIT).kill(&order))??;
    if json {
        output::print_json(&killed)?;
    } else {
        let plural = if killed.flows == 1 { "flow was" } else { "flows were" };
        output::print(&format!("{} {plural} reset\n", killed.flows))?;
    }
    Ok(ExitCode::SUCCESS)
}
