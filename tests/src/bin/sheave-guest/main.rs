//! The first process of a virtual machine of `cargo xtask test --kernels`: readies the machine, runs the cases that it is
//! told one after the other, says on the console what became of them, and switches the machine off.
//!
//! What it says begins with `sheave-guest: `: see `xtask/src/kernels/report.rs`.

mod basics;
mod bonds;
mod cards;
mod cases;
mod joints;
mod machine;
mod serving;

use std::process::ExitCode;

use anyhow::{Context as _, Result};

/// Said before every line that is for the host.
const PREFIX: &str = "sheave-guest: ";

fn main() -> ExitCode {
    // As the first process, or one case in a process of its own.
    let mut arguments = std::env::args().skip(1);
    let result = match arguments.next().as_deref() {
        Some("case") => arguments.next().context("no case is named").and_then(|case| run_case(&case)),
        _ => machine::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line: it is the case's detail.
            eprintln!("{}", format!("{error:#}").replace('\n', " | "));
            ExitCode::FAILURE
        }
    }
}

fn run_case(name: &str) -> Result<()> {
    cases::find(name).with_context(|| format!("no case is named {name}"))?()
}
