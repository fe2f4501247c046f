//! `cargo xtask lint`

use std::{env::consts::ARCH, process::Command};

use anyhow::{Result, ensure};

use crate::{
    process, setup,
    toolchain::{Target, Toolchain},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {}

impl Options {
    pub(crate) fn run(self) -> Result<()> {
        let Self {} = self;
        let toolchain = setup::ensure_clippy()?;
        let steps = [
            ("the formatting", formatting()),
            ("the programs of the host", host_clippy()),
            ("the programs of the kernel", kernel_clippy(&toolchain)?),
        ];
        // All of them, so that one run shows everything there is to mend.
        let mut failures = Vec::new();
        for (what, mut command) in steps {
            process::phase(format_args!("checking {what}"));
            if process::run(&mut command).is_err() {
                failures.push(what);
            }
        }
        ensure!(failures.is_empty(), "to mend: {}", failures.join(", "));
        Ok(())
    }
}

fn formatting() -> Command {
    let mut cargo = process::cargo("fmt");
    cargo.args(["--all", "--check"]);
    cargo
}

fn host_clippy() -> Command {
    let mut cargo = process::cargo("clippy");
    cargo.args(["--workspace", "--all-targets", "--", "-D", "warnings"]);
    cargo
}

fn kernel_clippy(toolchain: &Toolchain) -> Result<Command> {
    let target = Target { architecture: ARCH.into(), big_endian: cfg!(target_endian = "big") };
    let mut clippy = toolchain.cargo("clippy", &target, &process::target_directory()?.join("ebpf"));
    clippy.current_dir(process::workspace()).args(["--bins", "--", "-D", "warnings"]);
    Ok(clippy)
}
