//! Running other programs, and telling the user what is going on.

use std::{
    env,
    ffi::OsStr,
    fmt::Display,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::toolchain::find_program;

/// Says that a phase begins. Standard output belongs to results.
pub(crate) fn phase(text: impl Display) {
    eprintln!("xtask: {text}");
}

/// Runs a command to its end.
///
/// # Errors
///
/// It cannot be started, or fails; the message holds the command line.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {}", line(command)))?;
    ensure!(status.success(), "{} failed ({status})", line(command));
    Ok(())
}

/// Runs a command to its end and takes what it prints, trimmed.
///
/// # Errors
///
/// It cannot be started, or fails; its own error message has been shown.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {}", line(command)))?;
    ensure!(output.status.success(), "{} failed ({})", line(command), output.status);
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Becomes another program; comes back only when that fails.
pub(crate) fn replace_with(command: &mut Command) -> Result<()> {
    let error = command.exec();
    Err(error).with_context(|| format!("cannot run {}", line(command)))
}

/// The command line as a person would type it.
pub(crate) fn line(command: &Command) -> String {
    let words = [command.get_program()].into_iter().chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// True if a program is here, also where administrators' programs are: those are not on every user's search path.
pub(crate) fn has_program(name: &str) -> bool {
    find_program(name).is_some()
        || ["/usr/sbin", "/sbin"].iter().any(|path| Path::new(path).join(name).is_file())
}

pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A command that runs `program` as root, asking for a password if it has to; variables are kept.
///
/// # Errors
///
/// The user is not root and there is no sudo.
pub(crate) fn as_root(program: impl AsRef<OsStr>) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    if !has_program("sudo") {
        bail!("this needs root, and there is no sudo here: run it as root: {}", program.as_ref().display());
    }
    let mut command = Command::new("sudo");
    command.arg("--preserve-env").arg(program);
    Ok(command)
}

/// The cargo that runs this program.
pub(crate) fn cargo(subcommand: &str) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.arg(subcommand).current_dir(workspace());
    command
}

/// The root of the workspace.
pub(crate) fn workspace() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).to_owned()
}

/// Where this workspace's builds go: this program is in it, two levels down.
///
/// # Errors
///
/// This program's own path is unknown or has no such parent.
pub(crate) fn target_directory() -> Result<PathBuf> {
    let program = env::current_exe().context("cannot find the path of this program")?;
    let target = program.ancestors().nth(2).context("this program is not in a target directory")?;
    Ok(target.to_owned())
}

/// The compiler's name for this machine.
///
/// # Errors
///
/// rustc cannot be asked.
pub(crate) fn host_triple() -> Result<String> {
    let version = output(Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into())).arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc -vV names no host")?.to_owned())
}
