//! `cargo xtask demo`

use std::ffi::OsString;

use anyhow::Result;

use crate::{
    build::{Binary, Profile},
    process, setup,
};

/// What the demo runs beside itself and `sheave`.
pub(crate) const BESIDE: [&str; 1] = ["sheave-stub-apiserver"];

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Tell the story once, unattended, and end with 0 only if no request was lost
    #[arg(long)]
    once: bool,
    /// A node instead of a load balancer: clients that reach the apiservers by 127.0.0.1
    #[arg(long)]
    node: bool,
    /// Passed to the demo
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

impl Options {
    pub(crate) fn run(self) -> Result<()> {
        setup::ensure_toolchain()?;
        setup::ensure_tools(&setup::DEMO_TOOLS)?;
        let sheave = Binary::SHEAVE.build()?;
        // The tests use the same build.
        let of_the_lab = |name| Binary { package: "lb-tests", name, profile: Profile::Dev };
        for beside in BESIDE {
            of_the_lab(beside).build()?;
        }
        let demo = of_the_lab("sheave-demo").build()?;
        let mut command = process::as_root(demo)?;
        if self.once {
            command.arg("--once");
        }
        if self.node {
            command.arg("--node");
        }
        process::replace_with(command.args(self.arguments).env("SHEAVE", sheave))
    }
}
