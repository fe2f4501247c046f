//! `cargo xtask bench`

use std::{ffi::OsString, path::Path, process::Command};

use anyhow::Result;

use crate::{
    build::{Binary, Profile},
    process, setup,
};

/// What the benchmarks run beside themselves and `sheave`.
pub(crate) const BESIDE: [&str; 4] = ["sheave-dial", "sheave-hold", "sheave-load", "sheave-stub-apiserver"];

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
        if self.arguments[0] == "node" && !nginx_streams() {
            setup::ensure_tools(&setup::NODE_BENCH_TOOLS)?;
        }
        let sheave = Binary::SHEAVE.build()?;
        let of_the_lab = |name| Binary { package: "lb-tests", name, profile: Profile::Release };
        for beside in BESIDE {
            of_the_lab(beside).build()?;
        }
        let bench = of_the_lab("sheave-bench").build()?;
        process::replace_with(process::as_root(bench)?.args(self.arguments).env("SHEAVE", sheave))
    }
}

/// Whether nginx is here and forwards TCP, by a module of its own or built in.
fn nginx_streams() -> bool {
    // It prints what it was configured with where errors go. Administrators' programs are not on every user's search path.
    ["nginx", "/usr/sbin/nginx"].iter().any(|nginx| {
        Command::new(nginx).arg("-V").output().is_ok_and(|output| {
            let built_in = |said: &str| said.split_whitespace().any(|word| word == "--with-stream");
            built_in(&String::from_utf8_lossy(&output.stderr)) || Path::new(setup::NGINX_STREAM).exists()
        })
    })
}
