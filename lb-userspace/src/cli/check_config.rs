//! `sheave check-config`

use std::{path::PathBuf, process::ExitCode};

use super::output;
use crate::{config::Config, controller, discovery};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sheave check-config
  sheave check-config /tmp/new.toml && install -m 600 /tmp/new.toml /etc/sheave/sheave.toml

Exit codes: 0 right (there may be warnings), 2 wrong.")]
pub(super) struct Arguments {
    /// The configuration file [default: /etc/sheave/sheave.toml]
    #[arg(value_name = "FILE", conflicts_with = "config")]
    file: Option<PathBuf>,
    /// The same, as the other commands have it
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let file = arguments.file.or(arguments.config).unwrap_or_else(|| super::CONFIG_FILE.into());
    let (config, warnings) = Config::load(&file)?;
    controller::check_files(&config)?;
    for warning in &warnings {
        output::print(&format!("warning: {warning}\n\n"))?;
    }
    for warning in discovery::absent_kubeconfigs(&config) {
        output::print(&format!("warning: {warning}\n\n"))?;
    }
    output::print(&format!("{} is right: {}\n", file.display(), summary(&config)))?;
    Ok(ExitCode::SUCCESS)
}

fn summary(config: &Config) -> String {
    let count = |number: usize, what: &str| match number {
        1 => format!("1 {what}"),
        _ => format!("{number} {what}s"),
    };
    let listeners = config.services.iter().map(|service| service.listen.len()).sum();
    let backends =
        config.services.iter().map(|service| service.backends.len() + service.named_backends.len()).sum();
    let discovers = config.services.iter().any(|service| service.discover.is_some());
    format!(
        "{}, {}, {}{}",
        count(config.services.len(), "service"),
        count(listeners, "listener"),
        count(backends, "backend"),
        if discovers { " and those that the cluster lists" } else { "" }
    )
}
