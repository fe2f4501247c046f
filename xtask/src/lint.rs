//! `cargo xtask lint`

use anyhow::Result;

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
        process::phase("checking the formatting");
        process::run(process::cargo("fmt").args(["--all", "--check"]))?;
        process::phase("linting the programs of the host");
        process::run(process::cargo("clippy").args([
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ]))?;
        process::phase("linting the programs of the kernel");
        process::run(&mut kernel_clippy(&toolchain)?)
    }
}

fn kernel_clippy(toolchain: &Toolchain) -> Result<std::process::Command> {
    let target =
        Target { architecture: std::env::consts::ARCH.into(), big_endian: cfg!(target_endian = "big") };
    let mut clippy = toolchain.cargo("clippy", &target, &process::target_directory()?.join("ebpf"));
    clippy.current_dir(process::workspace()).args(["--bins", "--", "-D", "warnings"]);
    Ok(clippy)
}
