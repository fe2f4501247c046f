//! A named network namespace that goes away with its value, and the sweep for those of killed runs.

use std::{
    ffi::OsStr,
    fs::{self, File},
    panic,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use anyhow::{Context as _, Result};
use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::process::run;

const NAMESPACES: &str = "/run/netns";

/// A network namespace under `/run/netns`. Dropping it kills what runs inside and removes it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Creates a namespace with loopback up and without duplicate address detection (which would make every
    /// IPv6 address wait a second or two).
    ///
    /// # Errors
    /// When the name is taken or `ip` fails.
    pub fn create(name: &str) -> Result<Self> {
        run(Command::new("ip").args(["netns", "add", name]))?;
        let namespace = Self { name: name.to_owned() };
        for key in ["all", "default"] {
            namespace.sysctl(&format!("net/ipv6/conf/{key}/accept_dad"), "0")?;
            namespace.sysctl(&format!("net/ipv6/conf/{key}/accept_ra"), "0")?;
        }
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// Its name, prefix included.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for it.
    pub fn path(&self) -> PathBuf {
        Path::new(NAMESPACES).join(&self.name)
    }

    /// A command that runs inside.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        command_in(&self.path(), program)
    }

    /// Runs `ip <arguments>` inside.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub fn ip(&self, arguments: &str) -> Result<()> {
        run(Command::new("ip").args(["-n", &self.name]).args(arguments.split_whitespace()))?;
        Ok(())
    }

    /// Runs a closure on a thread of its own inside the namespace. A panic in it goes on in the caller.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> Result<T> {
        enter(&self.path(), inside)
    }

    /// Writes `/proc/sys/<key>` as seen from inside.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(key);
        self.enter(|| fs::write(&path, value).with_context(|| format!("writing {}", path.display())))?
    }
}

/// A command that runs inside the namespace that `path` stands for. `nsenter` and not `ip netns exec`: the latter
/// mounts a new `/sys`, which hides the BPF file system and the cgroups.
pub fn command_in(path: &Path, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", path.display())).arg("--").arg(program);
    command
}

/// Runs a closure on a thread of its own inside the namespace that `path` stands for. A panic in it goes on in the
/// caller.
///
/// # Errors
/// When the namespace cannot be entered.
pub fn enter<T: Send>(path: &Path, inside: impl FnOnce() -> T + Send) -> Result<T> {
    let entering = || -> Result<T> {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        setns(&file, CloneFlags::CLONE_NEWNET).with_context(|| format!("entering {}", path.display()))?;
        Ok(inside())
    };
    thread::scope(|scope| scope.spawn(entering).join().unwrap_or_else(|panic| panic::resume_unwind(panic)))
}

impl Drop for Namespace {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

/// Kills what runs in a namespace and removes it. Errors are ignored: there is nobody to tell, and the next
/// run's sweep tries again.
fn remove(name: &str) {
    kill_processes_in(name);
    let _ = Command::new("ip").args(["netns", "del", name]).output();
}

fn kill_processes_in(name: &str) {
    let Ok(output) = Command::new("ip").args(["netns", "pids", name]).output() else { return };
    let ourselves = Pid::this();
    for pid in String::from_utf8_lossy(&output.stdout).split_whitespace().filter_map(|pid| pid.parse().ok()) {
        let pid = Pid::from_raw(pid);
        if pid != ourselves {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

/// Removes the namespaces of labs whose process is gone.
///
/// # Errors
/// When `/run/netns` exists and cannot be read.
pub fn sweep_stale() -> Result<()> {
    if !Path::new(NAMESPACES).exists() {
        return Ok(());
    }
    for entry in fs::read_dir(NAMESPACES).context("reading /run/netns")? {
        if let Some(name) = entry?.file_name().to_str()
            && owner_is_gone(name)
        {
            remove(name);
        }
    }
    Ok(())
}

/// Whether `name` is a lab's (`sh<pid>-...`) and no process with that id is running.
pub(super) fn owner_is_gone(name: &str) -> bool {
    let pid =
        name.strip_prefix("sh").and_then(|rest| rest.split('-').next()).and_then(|pid| pid.parse().ok());
    pid.is_some_and(|pid: u32| !Path::new("/proc").join(pid.to_string()).exists())
}

#[cfg(test)]
mod tests {
    use super::owner_is_gone;

    #[test]
    fn only_namespaces_of_dead_labs_are_stale() {
        let ourselves = std::process::id();
        // Larger than the kernel's largest pid_max, 2^22.
        assert!(owner_is_gone("sh4194305-0-net"));
        assert!(!owner_is_gone(&format!("sh{ourselves}-0-net")));
        assert!(!owner_is_gone("shop"));
        assert!(!owner_is_gone("cni-4194305"));
    }
}
