//! `cargo xtask dist`

use std::{
    env::consts::ARCH,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use crate::{build::Binary, process, setup};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {}

impl Options {
    pub(crate) fn run(self) -> Result<()> {
        let Self {} = self;
        setup::ensure_toolchain()?;
        let binary = Binary::SHEAVE.build_with(&mut static_build()?)?;
        ensure_static(&binary)?;

        let directory = process::target_directory()?.join("dist");
        fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
        let name = format!("sheave-{}-{ARCH}", env!("CARGO_PKG_VERSION"));
        let file = directory.join(&name);
        fs::copy(&binary, &file).with_context(|| format!("cannot write {}", file.display()))?;
        // Run from there, so that the line names the file as a download does.
        let digest = process::output(Command::new("sha256sum").arg(&name).current_dir(&directory))?;
        let digest_file = directory.join(format!("{name}.sha256"));
        fs::write(&digest_file, format!("{digest}\n"))
            .with_context(|| format!("cannot write {}", digest_file.display()))?;
        println!("{}\n{digest}", file.display());
        Ok(())
    }
}

/// Against musl where its standard library and a C compiler for it are installed, else the host's own C library.
/// The target is named in either case: without it the flag would reach procedural macros, which cannot be static.
fn static_build() -> Result<Command> {
    let musl = format!("{ARCH}-unknown-linux-musl");
    let target = if has_standard_library(&musl) && process::has_program("musl-gcc") {
        musl
    } else {
        process::host_triple()?
    };
    let flags = format!("CARGO_TARGET_{}_RUSTFLAGS", target.to_uppercase().replace('-', "_"));
    let mut cargo = process::cargo("build");
    cargo.args(["--release", "--target", &target]).env(flags, "-C target-feature=+crt-static");
    Ok(cargo)
}

fn has_standard_library(target: &str) -> bool {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let directory =
        process::output(Command::new(rustc).args(["--print", "target-libdir", "--target", target]));
    directory.is_ok_and(|directory| Path::new(&directory).is_dir())
}

/// A static program asks for no interpreter, so `ldd` has nothing to list, and it starts.
fn ensure_static(binary: &PathBuf) -> Result<()> {
    let libraries =
        Command::new("ldd").arg(binary).stderr(Stdio::null()).output().context("cannot run ldd")?;
    let libraries = String::from_utf8_lossy(&libraries.stdout);
    ensure!(!libraries.contains("=>"), "{} is not static, it needs\n{libraries}", binary.display());
    process::output(Command::new(binary).arg("--version")).map(drop)
}
