//! The commands of `sheave`, one file each.

mod alive;
mod check_config;
mod completions;
mod doctor;
mod events;
mod flows;
mod init;
mod kill;
mod orders;
mod output;
mod rbac;
mod reload;
mod run;
mod status;
mod table;
mod unload;
mod why;

use std::{
    io::{self, IsTerminal as _},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::{
    admin::{ClientError, OrderedState},
    config::{Admin, ConfigError, parse_duration},
    controller::ControllerError,
    daemon::DaemonError,
};

/// Where the configuration is when nothing else is said.
pub const CONFIG_FILE: &str = "/etc/sheave/sheave.toml";

const FAILED: u8 = 1;
const USAGE: u8 = 2;
const NOT_READY: u8 = 3;

const EXIT_CODES: &str = "\
Exit codes:
  0  fine
  1  failed
  2  wrong usage or configuration
  3  status: a service has no ready backend";

const HELP: &str = "\
Examples:
  sheave init --kubeconfig /etc/kubernetes/admin.conf --vip 192.168.2.140
  sheave check-config                 is /etc/sheave/sheave.toml right?
  sheave doctor                       can this host do it, and what to change if not
  sheave run                          balance; packets flow on when it is stopped
  sheave unload                       take everything off this host again
  sheave status                       services, backends and their last checks
  watch -n1 sheave status             the same, all the time
  sheave drain master-1               before an upgrade of master-1
  sheave ready master-1               after it
  sheave why 10.0.0.5 --at 10:32      what became of that client's connections
  sheave reload                       after a change of /etc/sheave/sheave.toml
  sheave completions bash > /etc/bash_completion.d/sheave

In keepalived, instead of `pgrep haproxy`:
  vrrp_script sheave { script \"/usr/bin/sheave alive\" interval 1 timeout 2 fall 6 rise 2 }
";

/// Load balancer for kube-apiservers, in the kernel (XDP): no proxy, no TLS termination.
#[derive(Debug, Parser)]
#[command(
    name = "sheave",
    version,
    arg_required_else_help = true,
    subcommand_required = true,
    disable_help_subcommand = true,
    after_help = concat_help(HELP)
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

fn concat_help(examples: &str) -> String {
    format!("{examples}\n{EXIT_CODES}")
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write a first configuration from what a cluster says of itself
    Init(init::Arguments),
    /// Print the account that checks need where anonymous auth is off
    Rbac(rbac::Arguments),
    /// Balance as the configuration says; what is in the kernel goes on when it is stopped
    Run(run::Arguments),
    /// Say whether a configuration file is right, and load nothing
    CheckConfig(check_config::Arguments),
    /// Show services, backends and their last checks
    Status(status::Arguments),
    /// Look for what would keep this host from balancing, each with its fix
    Doctor(doctor::Arguments),
    /// Take a backend out of service for an upgrade: no new flows, old ones live on
    Drain(orders::LeavingArguments),
    /// Give a drained backend, or one in maintenance, back to its checks
    Ready(orders::StateArguments),
    /// As drain, and never used, not even when there is nobody else
    Maint(orders::LeavingArguments),
    /// Change a backend's share of new flows
    Weight(orders::WeightArguments),
    /// List flows: clients, backends, states
    Flows(flows::Arguments),
    /// Reset flows: of a backend, of a client
    Kill(kill::Arguments),
    /// Show the last changes of state and operator's orders, with their reasons
    Events(events::Arguments),
    /// Tell what became of a client's connections, and why
    Why(why::Arguments),
    /// Read the configuration file again and apply what is different; flows are untouched
    Reload(reload::Arguments),
    /// Say whether this load balancer works, whatever its backends do (for keepalived)
    Alive(alive::Arguments),
    /// Take sheave's programs, maps and addresses off this host
    Unload(unload::Arguments),
    /// Print the completions of a shell
    Completions(completions::Arguments),
}

/// `--socket`, shared by the commands that talk to the daemon.
#[derive(Debug, clap::Args)]
struct SocketArgument {
    /// The daemon's admin socket
    #[arg(long, value_name = "PATH", default_value = Admin::SOCKET)]
    socket: PathBuf,
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).ok_or_else(|| "write a duration such as `90s`, `10m` or `1h30m`".to_owned())
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match dispatch(arguments.command) {
        Ok(code) => code,
        Err(error) => {
            // Also where stderr is closed.
            let _ =
                io::Write::write_all(&mut io::stderr(), format!("error: {}\n", message(&error)).as_bytes());
            exit_code(&error)
        }
    }
}

fn dispatch(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Init(arguments) => init::run(arguments),
        Command::Rbac(arguments) => rbac::run(arguments),
        Command::Run(arguments) => run::run(arguments),
        Command::CheckConfig(arguments) => check_config::run(arguments),
        Command::Status(arguments) => status::run(arguments),
        Command::Doctor(arguments) => doctor::run(arguments),
        Command::Alive(arguments) => alive::run(arguments),
        Command::Drain(arguments) => orders::leave(arguments, OrderedState::Drain),
        Command::Ready(arguments) => orders::give_back(arguments),
        Command::Maint(arguments) => orders::leave(arguments, OrderedState::Maint),
        Command::Weight(arguments) => orders::set_weight(arguments),
        Command::Flows(arguments) => flows::run(arguments),
        Command::Kill(arguments) => kill::run(arguments),
        Command::Events(arguments) => events::run(arguments),
        Command::Why(arguments) => why::run(arguments),
        Command::Reload(arguments) => reload::run(&arguments),
        Command::Unload(arguments) => unload::run(arguments),
        Command::Completions(arguments) => completions::run(arguments),
    }
}

/// An error and its causes, without those that it quotes itself.
fn message(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

/// The user's mistakes are told apart from the host's.
fn exit_code(error: &anyhow::Error) -> ExitCode {
    let mistake = error.is::<ConfigError>()
        || error.is::<UsageError>()
        || error.downcast_ref().is_some_and(ClientError::is_mistake)
        || error.downcast_ref().is_some_and(DaemonError::is_configuration)
        || error.downcast_ref().is_some_and(ControllerError::is_configuration);
    ExitCode::from(if mistake { USAGE } else { FAILED })
}

/// The command line is wrong in a way that clap cannot see.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct UsageError(String);

/// Logs to stderr: `filter`, else `RUST_LOG`, else `default`.
fn init_logging(filter: Option<&str>, default: &str) -> Result<(), UsageError> {
    let from_environment = std::env::var(EnvFilter::DEFAULT_ENV).ok().filter(|text| !text.is_empty());
    let text = filter.map(str::to_owned).or(from_environment).unwrap_or_else(|| default.to_owned());
    let filter = EnvFilter::try_new(&text).map_err(|error| {
        UsageError(format!(
            "{text:?} is no log filter: {error}\n   = help: write \"debug\", or \"info,lb_userspace::health=debug\""
        ))
    })?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(output::colours(io::stderr().is_terminal()));
    // A second subscriber exists in tests only.
    let _ = subscriber.try_init();
    Ok(())
}

/// Runs a command's future on this thread: a command waits for one thing at a time.
fn block_on<T>(future: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(future))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_cause_is_said_once() {
        let cause = std::io::Error::other("the disk is full");
        let error = anyhow::Error::new(cause).context("cannot write the record");
        assert_eq!(message(&error), "cannot write the record: the disk is full");
        let quoting = crate::controller::ControllerError::System {
            doing: "list the sockets of this host",
            source: std::io::Error::other("out of memory"),
        };
        assert_eq!(message(&quoting.into()), "cannot list the sockets of this host: out of memory");
    }

    #[test]
    fn help_shows_every_command_on_one_line_and_the_exit_codes() {
        let help = Arguments::command().render_help().to_string();
        let commands = Arguments::command();
        let names: Vec<_> = commands.get_subcommands().map(clap::Command::get_name).collect();
        assert!(names.len() > 15 && names.contains(&"kill"), "{names:?}");
        for name in names {
            let line = help.lines().find(|line| line.trim_start().starts_with(&format!("{name} ")));
            assert!(line.is_some(), "{name} is missing in\n{help}");
        }
        assert!(help.contains("Exit codes:"), "{help}");
    }

    #[test]
    fn a_wrong_configuration_is_the_users_mistake() {
        let config_error = crate::config::Config::parse("", "a").expect_err("no service");
        assert_eq!(exit_code(&config_error.into()), ExitCode::from(2));
        assert_eq!(exit_code(&anyhow::anyhow!("the kernel said no")), ExitCode::from(1));
    }

    #[test]
    fn a_wrong_log_filter_is_the_users_mistake() {
        let error = init_logging(Some("a=b=c"), "info").expect_err("not a filter");
        assert!(error.to_string().contains("\"a=b=c\" is no log filter"), "{error}");
    }
}
