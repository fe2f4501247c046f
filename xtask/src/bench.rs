//! `cargo xtask bench`

use std::ffi::OsString;

use anyhow::Result;

use crate::{
    build::{Binary, Profile},
    process, setup,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// What to measure, and flags for it; `--help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    arguments: Vec<OsString>,
}

impl Options {
    pub(crate) fn run(self) -> Result<()> {
        setup::ensure_toolchain()?;
        setup::ensure_tools(&setup::TEST_TOOLS)?;
        let sheave = Binary::SHEAVE.build()?;
        let of_the_lab = |name| Binary { package: "lb-tests", name, profile: Profile::Release };
        of_the_lab("sheave-stub-apiserver").build()?;
        let bench = of_the_lab("sheave-bench").build()?;
        process::replace_with(process::as_root(bench)?.args(self.arguments).env("SHEAVE", sheave))
    }
}
