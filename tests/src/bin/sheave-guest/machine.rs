//! Being the first process: file systems, modules, children, and the end of the machine.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read},
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use lb_tests::lab::eventually;
use nix::{
    mount::{MsFlags, mount},
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

use crate::{PREFIX, cards};

/// What is mounted: type and place.
const MOUNTS: [(&str, &str); 7] = [
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/tmp"),
    ("tmpfs", "/run"),
    ("bpf", "/sys/fs/bpf"),
    ("cgroup2", "/sys/fs/cgroup"),
];
/// The program under test.
const SHEAVE: &str = "/usr/bin/sheave";
/// A case that takes longer is ended. The longest, the packet tests, take a third of it on emulated processors.
const CASE_LIMIT: Duration = Duration::from_secs(900);

/// Readies the machine, runs the cases that the kernel's command line names, and switches the machine off.
pub(crate) fn run() -> Result<()> {
    let ready = ready();
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    println!("{PREFIX}kernel {}", release.trim());
    // One argument has the names of all cases; the others say which card is where.
    let cases = std::env::args().skip(1).find(|argument| !argument.contains('=')).unwrap_or_default();
    for case in cases.split(',') {
        println!("{PREFIX}begin {case}");
        let began = Instant::now();
        let (word, detail) = match &ready {
            Ok(()) => judge(run_apart(case)),
            Err(error) => ("failed", format!("the machine is not ready: {error:#}")),
        };
        let seconds = began.elapsed().as_secs();
        println!("{PREFIX}case {case} {word} ({seconds} s) {detail}");
    }
    println!("{PREFIX}done");
    // SAFETY: a system call that ends everything. The emulator ends when its machine starts again.
    unsafe { libc::reboot(libc::RB_AUTOBOOT) };
    Ok(())
}

fn judge(ended: Result<(ExitStatus, String)>) -> (&'static str, String) {
    match ended {
        Ok((status, _)) if status.success() => ("ok", String::new()),
        Ok((_, last_words)) => ("failed", last_words),
        Err(error) => ("failed", format!("{error:#}")),
    }
}

fn ready() -> Result<()> {
    for (kind, place) in MOUNTS {
        fs::create_dir_all(place).with_context(|| format!("making {place}"))?;
        let mounted = mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&str>);
        mounted.with_context(|| format!("mounting {kind} on {place}"))?;
    }
    // SAFETY: nothing else runs in this process yet.
    unsafe { std::env::set_var("PATH", "/usr/bin") };
    lb_tests::lab::run(Command::new("ip").args(["link", "set", "lo", "up"]))?;
    if !insert_modules()? {
        return Ok(());
    }
    // Cards of emulated machines appear a moment after their drivers.
    eventually(Duration::from_secs(20), "all cards are there", || cards::Wire::all().map(drop))
}

/// Inserts what is in `/modules`, in the order in which the host has put it. False: there is nothing.
fn insert_modules() -> Result<bool> {
    let order = fs::read_to_string("/modules/order").context("reading /modules/order")?;
    for name in order.lines() {
        let path = Path::new("/modules").join(format!("{name}.ko"));
        let file = fs::File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        // SAFETY: an open file and an empty string that ends with a zero.
        let done = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
        if done != 0 {
            // A case that needs it says so.
            eprintln!("module {name}: {}", std::io::Error::last_os_error());
        }
    }
    Ok(!order.is_empty())
}

/// Runs a case in a process of its own, so that whatever it does to itself ends with it; its end, and the last line it
/// wrote.
fn run_apart(case: &str) -> Result<(ExitStatus, String)> {
    let mut child = Command::new("/proc/self/exe")
        .args(["case", case])
        .env("HOME", "/tmp")
        .env("TMPDIR", "/tmp")
        .env("SHEAVE", SHEAVE)
        .env(cards::VARIABLE, cards::told().join(" "))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .context("starting the case")?;
    let output = child.stdout.take().map(|stream| show(stream, false));
    let errors = child.stderr.take().map(|stream| show(stream, true));
    let ended = wait(&mut child, CASE_LIMIT);
    // What it has started and left behind holds the pipes open.
    let _ = killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL);
    let status = ended?;
    let last = [output, errors].into_iter().flatten().filter_map(|reader| reader.join().ok()).next_back();
    Ok((status, last.unwrap_or_default()))
}

fn wait(child: &mut Child, limit: Duration) -> Result<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            anyhow::bail!("it took longer than {limit:?}");
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Copies a stream to the console; the last line of it. `marked`: a line of the case's own may look like one for the
/// host.
fn show(stream: impl Read + Send + 'static, marked: bool) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut last = String::new();
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            println!("{}{line}", if marked { "! " } else { "" });
            if !line.trim().is_empty() {
                last = line;
            }
        }
        last
    })
}
