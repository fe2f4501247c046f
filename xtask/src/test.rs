//! `cargo xtask test`

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    build::Binary,
    kernels::{self, Extent},
    process, setup,
    tally::Tally,
};

/// Limits the tests that run at once. The end-to-end tests start a daemon and several servers each.
const THREADS_VARIABLE: &str = "SHEAVE_TEST_THREADS";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only tests whose path holds this; `loom` is the model check of the flow table
    filter: Option<String>,
    /// Not the tests of this machine, but the program in Debian's stock kernels, in virtual machines; with VERSIONs (6.1
    /// 6.12) in these alone. FILTER then chooses cases
    #[arg(long, num_args = 0.., value_name = "VERSION")]
    kernels: Option<Vec<String>>,
}

impl Options {
    pub(crate) fn run(self) -> Result<()> {
        setup::ensure_toolchain()?;
        setup::ensure_tools(&setup::TEST_TOOLS)?;
        let sheave = Binary::SHEAVE.build()?;
        let filter = self.filter.as_deref();
        if let Some(versions) = self.kernels {
            let tally = kernels::run(&Extent::Whole(versions), filter, &sheave)?;
            println!("\n{}", tally.line());
            ensure!(tally.failed == 0, "not every kernel does what is expected of it");
            return Ok(());
        }
        mount_bpffs()?;

        process::phase("unit, property, packet and end-to-end tests");
        let tests = run(workspace_tests(&sheave)?, filter)?;
        let wants = |part: &str| filter.is_none_or(|filter| filter.contains(part));
        let model = if wants("loom") {
            process::phase("model check of the flow table");
            Some(run(model_check()?, Some("loom"))?)
        } else {
            None
        };
        let kernels = if wants("kernels") {
            process::phase("loading and serving in stock kernels");
            kernels::run(&Extent::Smoke, None, &sheave)?
        } else {
            Tally::default()
        };
        let total = model.into_iter().fold(tests.tally, |total, model| total + model.tally) + kernels;
        // Continuous integration reads this line: nothing may follow it on standard output.
        println!("\n{}", total.line());
        for outcome in [Some(tests), model].into_iter().flatten() {
            ensure!(outcome.success && outcome.tally.failed == 0, "not all tests built and passed");
        }
        ensure!(kernels.failed == 0, "a stock kernel does not load the program, or does not serve with it");
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
