//! `cargo xtask`: everything a developer or a newcomer runs. One file a verb.

mod apt;
mod bench;
mod build;
mod demo;
mod dist;
mod kernels;
mod lint;
mod process;
mod run;
mod setup;
mod tally;
mod test;
#[path = "../../lb-ebpf/toolchain.rs"]
mod toolchain;
#[cfg(test)]
mod what_runs;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Build, try, test and ship sheave. Every command first installs what it misses.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Find or install what the build needs: a Rust compiler for BPF, and bpf-linker
    Setup(setup::Options),
    /// Build the `sheave` binary, kernel programs included
    Build(build::Options),
    /// Build, and run `sheave run` on this host: `cargo xtask run -- --config FILE`
    Run(run::Options),
    /// Watch three apiservers fail behind a load balancer, in network namespaces of its own
    Demo(demo::Options),
    /// Run the unit, property, packet and end-to-end tests, and the model check of the flow table
    Test(test::Options),
    /// Check formatting and lints, kernel programs included
    Lint(lint::Options),
    /// Measure: `cargo xtask bench datapath [--json]`
    Bench(bench::Options),
    /// Make one static binary for other machines, in target/dist
    Dist(dist::Options),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().verb {
        Verb::Setup(options) => options.run(),
        Verb::Build(options) => options.run(),
        Verb::Run(options) => options.run(),
        Verb::Demo(options) => options.run(),
        Verb::Test(options) => options.run(),
        Verb::Lint(options) => options.run(),
        Verb::Bench(options) => options.run(),
        Verb::Dist(options) => options.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs};

    use clap::CommandFactory as _;

    use super::*;

    /// Every command and option, and none that is not there, in the table of docs/building.md. (What `bench` measures is
    /// another program's.)
    #[test]
    fn every_command_is_documented_with_its_options() {
        let page = fs::read_to_string(process::workspace().join("docs/building.md")).expect("the page");
        let rows: Vec<_> = page.lines().filter_map(|line| line.strip_prefix("| `")).collect();
        let documented: BTreeSet<_> = rows.iter().filter_map(|row| row.split([' ', '`']).next()).collect();
        let command = Arguments::command();
        let there: BTreeSet<_> = command.get_subcommands().map(clap::Command::get_name).collect();
        // The table's head begins with `cargo xtask …`.
        assert_eq!(documented, there.iter().copied().chain(["cargo"]).collect());
        for command in command.get_subcommands() {
            let row = rows.iter().find(|row| row.starts_with(command.get_name())).expect("a row");
            for option in command.get_arguments().filter_map(|argument| argument.get_long()) {
                assert!(row.contains(&format!("--{option}")), "{}: --{option}", command.get_name());
            }
        }
    }
}
