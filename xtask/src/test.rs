//! `cargo xtask test`

use std::{
    fs,
    io::{BufRead as _, BufReader},
    ops::Add,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use crate::{build::Binary, process, setup};

/// Limits the tests that run at once. The end-to-end tests start a daemon and several servers each.
const THREADS_VARIABLE: &str = "SHEAVE_TEST_THREADS";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only tests whose path holds this; `loom` is the model check of the flow table
    filter: Option<String>,
}

impl Options {
    pub(crate) fn run(self) -> Result<()> {
        setup::ensure_toolchain()?;
        setup::ensure_tools(&setup::TEST_TOOLS)?;
        mount_bpffs()?;
        let sheave = Binary::SHEAVE.build()?;

        process::phase("unit, property, packet and end-to-end tests");
        let tests = run(workspace_tests(&sheave)?, self.filter.as_deref())?;
        let model = if self.filter.as_deref().is_none_or(|filter| filter.contains("loom")) {
            process::phase("model check of the flow table");
            Some(run(model_check()?, Some("loom"))?)
        } else {
            None
        };
        let total = model.into_iter().fold(tests.tally, |total, model| total + model.tally);
        // Continuous integration reads this line: nothing may follow it on standard output.
        println!("\n{}", total.line());
        for outcome in [Some(tests), model].into_iter().flatten() {
            ensure!(outcome.success && outcome.tally.failed == 0, "not all tests built and passed");
        }
        ensure!(total.executed() > 0, "no test ran");
        // A check that checks nothing would go unnoticed among the others.
        ensure!(
            model.is_none_or(|model| model.tally.executed() > 0),
            "no test of lb-common has loom in its path"
        );
        Ok(())
    }
}

fn workspace_tests(sheave: &Path) -> Result<Command> {
    let mut cargo = process::cargo("test");
    cargo.args(["--workspace", "--no-fail-fast"]).env("SHEAVE", sheave);
    if !process::is_root() {
        let host = process::host_triple()?.to_uppercase().replace('-', "_");
        cargo.env(format!("CARGO_TARGET_{host}_RUNNER"), "sudo --preserve-env");
    }
    if let Some(threads) = std::env::var_os(THREADS_VARIABLE) {
        cargo.env("RUST_TEST_THREADS", threads);
    }
    Ok(cargo)
}

/// The flow table's protocol under every interleaving of its atomic operations. The flag changes every crate, hence a
/// target directory of its own.
fn model_check() -> Result<Command> {
    let mut cargo = process::cargo("test");
    cargo
        .args(["--package", "lb-common", "--release", "--no-fail-fast", "--lib", "--tests", "--target-dir"])
        .arg(process::target_directory()?.join("loom"))
        .env("RUSTFLAGS", "--cfg loom")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    Ok(cargo)
}

/// Runs a `cargo test`, shows what it prints and counts.
fn run(mut cargo: Command, filter: Option<&str>) -> Result<Outcome> {
    if let Some(filter) = filter {
        cargo.args(["--", filter]);
    }
    let mut child = cargo
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", process::line(&cargo)))?;
    let mut tally = Tally::default();
    for line in
        BufReader::new(child.stdout.take().context("the tests' output was not captured")?).split(b'\n')
    {
        let line = line.context("cannot read the tests' output")?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        tally = tally + Tally::parse(&line).unwrap_or_default();
    }
    Ok(Outcome { tally, success: child.wait()?.success() })
}

/// Programs and maps are pinned there. Containers often have none.
fn mount_bpffs() -> Result<()> {
    const POINT: &str = "/sys/fs/bpf";
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    if mounts.lines().any(|mount| mount.split(' ').nth(1) == Some(POINT)) {
        return Ok(());
    }
    process::phase(format_args!("mounting the BPF file system on {POINT}"));
    process::run(process::as_root("mount")?.args(["-t", "bpf", "bpf", POINT]))
}

/// How a run ended.
#[derive(Debug, Clone, Copy)]
struct Outcome {
    tally: Tally,
    /// False also when a test binary did not build or died.
    success: bool,
}

/// Numbers of tests.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Tally {
    /// Reads the line that ends a test binary's report:
    /// `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.01s`.
    fn parse(line: &str) -> Option<Self> {
        let (_verdict, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
        let count = |what: &str| {
            counts.split("; ").find_map(|part| part.strip_suffix(what)?.trim_end().parse::<u64>().ok())
        };
        Some(Self { passed: count("passed")?, failed: count("failed")?, skipped: count("ignored")? })
    }

    fn executed(self) -> u64 {
        self.passed + self.failed
    }

    fn line(self) -> String {
        let Self { passed, failed, skipped } = self;
        match skipped {
            0 => format!("{passed} passed, {failed} failed"),
            _ => format!("{passed} passed, {failed} failed, {skipped} skipped"),
        }
    }
}

impl Add for Tally {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            skipped: self.skipped + other.skipped,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reports_of_several_test_binaries_add_up_to_one_line() {
        let output = "\
running 3 tests
test a ... ok
test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 2 filtered out; finished in 0.01s

test result: FAILED. 10 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 4.20s
a test that prints test result: ok. 99 passed; 0 failed; 0 ignored
";
        let total = output.lines().filter_map(Tally::parse).fold(Tally::default(), Tally::add);
        assert_eq!(total.line(), "13 passed, 2 failed, 1 skipped");
    }

    #[test]
    fn nothing_skipped_is_not_mentioned() {
        assert_eq!(Tally { passed: 7, failed: 0, skipped: 0 }.line(), "7 passed, 0 failed");
    }
}
