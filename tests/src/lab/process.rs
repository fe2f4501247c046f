//! Processes that end with the value that stands for them, and commands that must succeed.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::{sys::signal::kill, unistd::Pid};

pub use nix::sys::signal::Signal;

use super::wait::eventually;

/// How much of a process' log a failing test shows.
const LINES_SHOWN: usize = 60;

/// A running process with its output in a log file. Dropping it kills it; while panicking the end of its log is
/// printed, as that is usually where the reason is.
#[derive(Debug)]
pub struct Process {
    label: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with its output going to `<directory>/<label>.log` (appended, for a process that is
    /// started again).
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(label: &str, mut command: Command, directory: &Path) -> Result<Self> {
        let path = directory.join(format!("{label}.log"));
        let open = || File::options().create(true).append(true).open(&path);
        let log = open().with_context(|| format!("opening {}", path.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stderr(log.try_clone()?)
            .stdout(log)
            .spawn()
            .with_context(|| format!("starting {command:?}"))?;
        Ok(Self { label: label.to_owned(), child, log: path })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.raw_pid(), signal).with_context(|| format!("sending {signal} to {}", self.label))
    }

    fn raw_pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Waits for it to end by itself.
    ///
    /// # Errors
    /// When it still runs after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let Self { label, child, .. } = self;
        eventually(limit, &format!("{label} ends"), || child.try_wait()?.context("still running"))
    }

    /// Its exit status, if it has ended.
    ///
    /// # Errors
    /// When the kernel cannot tell.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Ends it at once, as a crash would.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// What it has written so far.
    pub fn log(&self) -> String {
        fs::read(&self.log).map(|log| String::from_utf8_lossy(&log).into_owned()).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            eprintln!("--- end of the log of {}:", self.label);
            for line in &lines[lines.len().saturating_sub(LINES_SHOWN)..] {
                eprintln!("{line}");
            }
        }
    }
}

/// Runs a command to its end and returns its standard output.
///
/// # Errors
/// When it fails, with what it wrote to standard error.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr).trim_end());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What a command has said, on both ways out.
pub fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat()
}

/// Finds a program that was built together with the running one: beside it, or one directory up (test programs
/// live in `target/<profile>/deps`).
///
/// # Errors
/// When it is not there.
pub fn sibling_program(name: &str) -> Result<PathBuf> {
    let ourselves = std::env::current_exe()?;
    ourselves
        .ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not beside {}: cargo build -p lb-tests", ourselves.display()))
}
