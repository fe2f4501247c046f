//! One virtual machine: boots a kernel, lets it run cases, and reads from its console what became of them.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{image::INIT, report::Said, wires};
use crate::{process, setup::EMULATOR};

/// Two emulated processors: what happens on two at once is tried as well.
const PROCESSORS: &str = "2";
/// MiB. The first file system is in it.
const MEMORY: &str = "1536";
/// From the start of the emulator to the first case.
const BOOT_LIMIT: Duration = Duration::from_secs(150);
/// The guest ends a case that takes longer by itself: this is for one whose kernel does nothing any more.
const CASE_LIMIT: Duration = Duration::from_secs(1000);

/// What a guest is made of.
#[derive(Debug)]
pub(super) struct Guest<'a> {
    pub(super) image: &'a Path,
    /// The first file system.
    pub(super) files: &'a Path,
    pub(super) wires: wires::Kind,
    /// Where its console goes. It is added to.
    pub(super) log: PathBuf,
}

/// How a guest ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// It ran all cases and said so.
    Done,
    /// It ended or said nothing for too long; the case that it was in.
    Lost { case: Option<String>, why: &'static str },
}

impl Guest<'_> {
    /// Runs cases; `said` is called with each line that is for us.
    ///
    /// # Errors
    ///
    /// The emulator cannot be started, or the log cannot be written.
    pub(super) fn run(&self, cases: &[String], said: &mut dyn FnMut(Said)) -> Result<End> {
        let mut log = File::options().create(true).append(true).open(&self.log)?;
        let mut command = self.command(cases)?;
        writeln!(log, "--- {}", process::line(&command))?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.try_clone()?)
            .spawn()
            .with_context(|| format!("cannot run {}", EMULATOR))?;
        let end = Self::follow(&mut child, &mut log, said);
        let _ = child.kill();
        child.wait()?;
        end
    }

    fn follow(child: &mut Child, log: &mut File, said: &mut dyn FnMut(Said)) -> Result<End> {
        let console = child.stdout.take().context("the console was not captured")?;
        let lines = lines_of(console);
        let mut case = None;
        let began = Instant::now();
        let mut deadline = began + BOOT_LIMIT;
        loop {
            let line = match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    return Ok(End::Lost { case, why: "the guest says nothing" });
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(End::Lost { case, why: "the guest ended" }),
            };
            writeln!(log, "{:7.2} {line}", began.elapsed().as_secs_f64())?;
            let Some(meaning) = Said::parse(&line) else { continue };
            match &meaning {
                Said::Begin(name) => case = Some(name.clone()),
                Said::Case { .. } => case = None,
                Said::Done => return Ok(End::Done),
                Said::Kernel(_) | Said::Figure { .. } => {}
            }
            deadline = Instant::now() + CASE_LIMIT;
            said(meaning);
        }
    }

    fn command(&self, cases: &[String]) -> Result<Command> {
        // It ends with this process, however that ends.
        let mut command = process::as_root("setpriv")?;
        command.args(["--pdeathsig", "KILL"]);
        // The shell makes the wires and becomes the emulator, whose end is the namespace's.
        let script = format!("{}exec \"$@\"", self.wires.script());
        command.args(["unshare", "--net", "sh", "-c", &script, "sh", EMULATOR]);
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ]);
        command.args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max"]);
        command.args(["-smp", PROCESSORS, "-m", MEMORY, "-device", "virtio-rng-pci"]);
        command.arg("-kernel").arg(self.image).arg("-initrd").arg(self.files);
        // What follows `--` becomes the arguments of the first process, at most 32 (`MAX_INIT_ARGS`): all cases are one. A
        // kernel that panics ends the emulator.
        let told = wires::for_the_guest().join(" ");
        let cases = cases.join(",");
        command
            .arg("-append")
            .arg(format!("console=ttyS0 loglevel=5 panic=-1 rdinit={INIT} -- {told} {cases}"));
        command.args(self.wires.arguments());
        Ok(command)
    }
}

/// The console's lines, without what moves a cursor, from a thread of its own: reading has no deadline.
fn lines_of(console: impl std::io::Read + Send + 'static) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut console = BufReader::new(console);
        loop {
            let mut line = Vec::new();
            // A line that never ends is no line.
            match console.by_ref().take(1 << 16).read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}
