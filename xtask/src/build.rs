//! `cargo xtask build`, and building one binary for the other verbs.

use std::{
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{process, setup};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// With optimisations, as it is shipped
    #[arg(long)]
    release: bool,
}

impl Options {
    pub(crate) fn run(self) -> Result<()> {
        setup::ensure_toolchain()?;
        let profile = if self.release { Profile::Release } else { Profile::Dev };
        println!("{}", Binary { package: "lb-userspace", name: "sheave", profile }.build()?.display());
        Ok(())
    }
}

/// How a binary is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    Dev,
    Release,
}

/// A binary of this workspace.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Binary {
    pub(crate) package: &'static str,
    pub(crate) name: &'static str,
    pub(crate) profile: Profile,
}

impl Binary {
    /// The product as it is shipped.
    pub(crate) const SHEAVE: Self =
        Self { package: "lb-userspace", name: "sheave", profile: Profile::Release };

    /// Builds it, showing cargo's progress; its path.
    ///
    /// # Errors
    ///
    /// It does not build; cargo has said why.
    pub(crate) fn build(self) -> Result<PathBuf> {
        let mut cargo = process::cargo("build");
        if self.profile == Profile::Release {
            cargo.arg("--release");
        }
        self.build_with(&mut cargo)
    }

    /// Builds it with a prepared `cargo build`; its path.
    ///
    /// # Errors
    ///
    /// It does not build; cargo has said why.
    pub(crate) fn build_with(self, cargo: &mut Command) -> Result<PathBuf> {
        process::phase(format_args!("building {}", self.name));
        cargo.args([
            "--package",
            self.package,
            "--bin",
            self.name,
            "--message-format=json-render-diagnostics",
        ]);
        let mut child = cargo
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", process::line(cargo)))?;
        let messages = BufReader::new(child.stdout.take().context("cargo's output was not captured")?);
        let mut path = None;
        for message in messages.lines() {
            path = executable(&message.context("cannot read cargo's output")?, self.name).or(path);
        }
        ensure!(child.wait()?.success(), "{} does not build", self.name);
        path.with_context(|| format!("cargo built no program named {}", self.name))
    }
}

/// The program that a line of cargo's JSON output announces, if it is `name`.
fn executable(message: &str, name: &str) -> Option<PathBuf> {
    let message: Value = serde_json::from_str(message).ok()?;
    (message["target"]["name"] == name).then(|| message["executable"].as_str().map(PathBuf::from)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_taken_from_its_own_artifact() {
        let library =
            r#"{"reason":"compiler-artifact","target":{"name":"sheave","kind":["lib"]},"executable":null}"#;
        let program =
            r#"{"reason":"compiler-artifact","target":{"name":"sheave"},"executable":"/t/release/sheave"}"#;
        assert_eq!(executable(library, "sheave"), None);
        assert_eq!(executable(program, "other"), None);
        assert_eq!(executable(program, "sheave"), Some("/t/release/sheave".into()));
        assert_eq!(executable("no JSON", "sheave"), None);
    }
}
