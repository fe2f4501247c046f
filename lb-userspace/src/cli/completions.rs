//! `sheave completions`

use std::process::ExitCode;

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::output;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sheave completions bash > /etc/bash_completion.d/sheave
  sheave completions zsh > /usr/share/zsh/site-functions/_sheave
  sheave completions fish > ~/.config/fish/completions/sheave.fish")]
pub(super) struct Arguments {
    /// Which shell
    shell: Shell,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut super::Arguments::command(), "sheave", &mut script);
    output::print(&String::from_utf8(script)?)?;
    Ok(ExitCode::SUCCESS)
}
