//! `sheave drain`, `ready`, `maint` and `weight`

use std::{process::ExitCode, time::Duration};

use super::{SocketArgument, block_on, output};
use crate::admin::{Client, Ordered, OrderedState, StateOrder, WeightOrder};

const LIMIT: Duration = Duration::from_secs(5);

/// Which backend, shared by the commands about one.
#[derive(Debug, clap::Args)]
struct BackendArguments {
    /// Its name, or its address and port, as `sheave status` shows them
    #[arg(value_name = "BACKEND")]
    backend: String,
    /// The service, where several have such a backend
    #[arg(long, value_name = "NAME", conflicts_with = "all_services")]
    service: Option<String>,
    /// In every service that has such a backend
    #[arg(long)]
    all_services: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct LeavingArguments {
    #[command(flatten)]
    common: StateArguments,
    /// Reset the flows that it still has after so long, such as `10m`. Without it: as the service's drain_timeout says
    #[arg(long, value_name = "DURATION", value_parser = super::duration)]
    timeout: Option<Duration>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
What an operator can say about a backend:
  drain   no new flows while any other backend is usable; those it has live on (or until --timeout)
  maint   no new flows, whatever happens to the others; those it has live on (or until --timeout)
  ready   as its checks say

It is kept across restarts of sheave and of the host, until `sheave ready`. Checks go on meanwhile.

Before an upgrade of master-1, and after it:
  sheave drain master-1
  sheave flows --backend master-1     who is still connected
  sheave ready master-1

Exit codes: 0 done, 1 failed, 2 no such backend, or more than one.")]
pub(super) struct StateArguments {
    #[command(flatten)]
    backend: BackendArguments,
    /// What is so now, as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    socket: SocketArgument,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sheave weight master-1 10           ten times the new flows of a backend with weight 1
  sheave weight master-1 0            no new flows while any other backend is usable, as `sheave drain`
  sheave weight master-1 configured   as the configuration file says

It is kept across restarts and reloads, until `configured`. Established flows stay where they are.

Exit codes: 0 done, 1 failed, 2 no such backend, more than one, or no weight.")]
pub(super) struct WeightArguments {
    #[command(flatten)]
    backend: BackendArguments,
    /// Share of new flows relative to the others, 0 to 256, or `configured`
    #[arg(value_name = "WEIGHT", value_parser = weight)]
    weight: WeightWord,
    /// What is so now, as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    socket: SocketArgument,
}

/// None: as configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct WeightWord(Option<u16>);

fn weight(text: &str) -> Result<WeightWord, String> {
    if text == "configured" {
        return Ok(WeightWord(None));
    }
    match text.parse() {
        Ok(weight @ 0..=256) => Ok(WeightWord(Some(weight))),
        _ => Err("write a number from 0 to 256, or `configured`".to_owned()),
    }
}

/// Tells the daemon that a backend is to be left alone by new flows.
pub(super) fn leave(arguments: LeavingArguments, state: OrderedState) -> anyhow::Result<ExitCode> {
    set_state(arguments.common, state, arguments.timeout.map(|timeout| timeout.as_secs()))
}

/// Gives a backend back to its checks.
pub(super) fn give_back(arguments: StateArguments) -> anyhow::Result<ExitCode> {
    set_state(arguments, OrderedState::Ready, None)
}

fn set_state(
    arguments: StateArguments,
    state: OrderedState,
    timeout_seconds: Option<u64>,
) -> anyhow::Result<ExitCode> {
    let BackendArguments { backend, service, all_services } = arguments.backend;
    let order = StateOrder { backend, service, all_services, state, timeout_seconds };
    let ordered = block_on(Client::new(&arguments.socket.socket, LIMIT).set_state(&order))??;
    show(&ordered, arguments.json)
}

/// Tells the daemon what a backend's weight is to be.
pub(super) fn set_weight(arguments: WeightArguments) -> anyhow::Result<ExitCode> {
    let BackendArguments { backend, service, all_services } = arguments.backend;
    let order = WeightOrder { backend, service, all_services, weight: arguments.weight.0 };
    let ordered = block_on(Client::new(&arguments.socket.socket, LIMIT).set_weight(&order))??;
    show(&ordered, arguments.json)
}

fn show(ordered: &Ordered, json: bool) -> anyhow::Result<ExitCode> {
    if json {
        output::print_json(ordered)?;
    } else {
        output::print(&text(ordered))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn text(ordered: &Ordered) -> String {
    let mut text = String::new();
    for backend in &ordered.backends {
        let flows = match backend.active_flows {
            1 => "1 flow".to_owned(),
            count => format!("{count} flows"),
        };
        let end = match backend.reset_in_seconds {
            Some(seconds) => format!(", which are reset in {seconds} s"),
            None => String::new(),
        };
        text.push_str(&format!(
            "{}/{} ({}) is {}, weight {}, and has {flows}{end}\n",
            output::printable(&backend.service),
            output::printable(&backend.name),
            backend.address,
            backend.state,
            backend.weight
        ));
    }
    for warning in &ordered.warnings {
        text.push_str(&format!("warning: {}\n", output::printable(warning)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::{BackendState, OrderedBackend};

    #[test]
    fn a_weight_is_a_number_or_the_configured_one() {
        assert_eq!(weight("0"), Ok(WeightWord(Some(0))));
        assert_eq!(weight("256"), Ok(WeightWord(Some(256))));
        assert_eq!(weight("configured"), Ok(WeightWord(None)));
        for wrong in ["257", "-1", "1.5", "heavy", ""] {
            assert!(weight(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_was_done_is_said_in_a_line_each() {
        let ordered = Ordered {
            backends: vec![OrderedBackend {
                service: "api".to_owned(),
                name: "master-1".to_owned(),
                address: ([10, 0, 0, 1], 6443).into(),
                state: BackendState::Drain,
                weight: 1,
                active_flows: 12,
                reset_in_seconds: Some(600),
            }],
            warnings: vec!["api: no other backend is usable".to_owned()],
        };
        assert_eq!(
            text(&ordered),
            "api/master-1 (10.0.0.1:6443) is drain, weight 1, and has 12 flows, which are reset in 600 s\n\
             warning: api: no other backend is usable\n"
        );
    }
}
