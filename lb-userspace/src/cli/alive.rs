//! `sheave alive`

use std::{process::ExitCode, time::Duration};

use super::{SocketArgument, block_on};
use crate::admin::Client;

/// keepalived's own patience is usually two seconds.
const LIMIT: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Asks whether *this load balancer* works: program attached, maps fresh, daemon turning. The health of the
backends does not matter: another load balancer would see the same. Answers within one second.

In keepalived.conf:
  vrrp_script sheave {
      script \"/usr/bin/sheave alive\"
      interval 1
      timeout 2
      fall 6
      rise 2
  }

`fall 6`: it fails while the daemon restarts, and packets flow meanwhile. That must not move the VIP, which resets flows.

Exit codes: 0 it works, 1 it does not (the reasons are on stderr), 2 wrong usage.")]
pub(super) struct Arguments {
    #[command(flatten)]
    socket: SocketArgument,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let answer = block_on(Client::new(&arguments.socket.socket, LIMIT).alive())??;
    if answer.alive {
        return Ok(ExitCode::SUCCESS);
    }
    let reasons = if answer.reasons.is_empty() {
        "it gives no reason; see its log".to_owned()
    } else {
        answer.reasons.join("; ")
    };
    anyhow::bail!("this load balancer does not work: {reasons}")
}
