//! `cargo xtask run`

use std::ffi::OsString;

use anyhow::Result;

use crate::{build::Binary, process, setup};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Passed to `sheave run`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

impl Options {
    pub(crate) fn run(self) -> Result<()> {
        setup::ensure_toolchain()?;
        let sheave = Binary::SHEAVE.build()?;
        process::replace_with(process::as_root(sheave)?.arg("run").args(self.arguments))
    }
}
