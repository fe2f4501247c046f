//! A lab's own cgroup: what daemons put their connect hooks on, so that nobody outside of the lab is served by them.

use std::{
    ffi::{CString, OsStr},
    fs,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya_obj::generated::{bpf_attach_type, bpf_prog_type};
use lb_userspace::{config, hook::Place};

use super::{Host, Lab, namespace::owner_is_gone, wait::eventually};

/// For processes that were killed to be gone.
const EMPTY_LIMIT: Duration = Duration::from_secs(5);

/// The cgroup of the lab whose files are in `directory`, or below it; None: this machine has no cgroup v2.
pub fn cgroup_of(directory: &Path) -> Option<PathBuf> {
    let lab = directory.strip_prefix(super::DIRECTORY).ok()?.components().next()?;
    Some(root()?.join(lab))
}

fn root() -> Option<PathBuf> {
    Some(Place::find(&config::Cgroup::Auto).ok()??.path().to_owned())
}

/// A cgroup below the lab's: the kernel counts the processor time of what runs in it. Removed with the lab.
#[derive(Debug)]
pub struct Group {
    path: PathBuf,
}

impl Group {
    /// Makes an empty one.
    ///
    /// # Errors
    /// On a machine without cgroup v2, or when the name is taken.
    pub fn new(lab: &Lab, name: &str) -> Result<Self> {
        let path = cgroup_of(lab.directory()).context("no cgroup v2 hierarchy is mounted")?.join(name);
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self { path })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A command that runs in it, on `host`.
    pub fn command(&self, host: &Host, program: impl AsRef<OsStr>) -> Command {
        command_in(&self.path, &host.namespace().path(), program)
    }

    /// Takes a running process in, with all of its threads. Its sockets stay where they were made.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn adopt(&self, pid: u32) -> Result<()> {
        let file = self.path.join("cgroup.procs");
        fs::write(&file, pid.to_string()).with_context(|| format!("writing {pid} to {}", file.display()))
    }

    /// The processor time that what ran in it has taken so far, in user space and in the kernel.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn processor_time(&self) -> Result<Duration> {
        processor_time(&self.path)
    }
}

/// This process as one of the lab's: its connections meet what daemons of the lab have put on the lab's cgroup. Dropping it
/// takes the process back, which must happen before the lab goes: whoever is in the cgroup then is killed.
#[derive(Debug)]
pub struct Visit {
    home: PathBuf,
}

impl Visit {
    /// Moves this process, with all of its threads. What it starts from now on is in the cgroup as well.
    ///
    /// # Errors
    /// On a machine without cgroup v2.
    pub fn to(lab: &Lab) -> Result<Self> {
        let root = root().context("no cgroup v2 hierarchy is mounted")?;
        let groups = fs::read_to_string("/proc/self/cgroup")?;
        let home = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        let there = cgroup_of(lab.directory()).context("no cgroup v2 hierarchy is mounted")?;
        let visit = Self { home: root.join(home) };
        move_here(&there)?;
        Ok(visit)
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        let _ = move_here(&self.home);
    }
}

/// Moves this process to a cgroup.
fn move_here(cgroup: &Path) -> Result<()> {
    let file = cgroup.join("cgroup.procs");
    fs::write(&file, std::process::id().to_string()).with_context(|| format!("writing to {}", file.display()))
}

/// The processor time of everything on this machine.
///
/// # Errors
/// On a machine without cgroup v2.
pub fn processor_time_of_all() -> Result<Duration> {
    processor_time(&root().context("no cgroup v2 hierarchy is mounted")?)
}

/// From `cpu.stat`, which every cgroup has, also without the controller `cpu`
/// (`Documentation/admin-guide/cgroup-v2.rst`, "CPU Interface Files").
fn processor_time(cgroup: &Path) -> Result<Duration> {
    let file = cgroup.join("cpu.stat");
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    let time = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
    let time = time.with_context(|| format!("{} has no usage_usec", file.display()))?;
    Ok(Duration::from_micros(time.trim().parse()?))
}

/// A command that runs in a cgroup, and in the network namespace that `namespace` stands for.
pub(super) fn command_in(cgroup: &Path, namespace: &Path, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", r#"echo $$ > "$0/cgroup.procs" && exec "$@""#]).arg(cgroup);
    command.arg("nsenter").arg(format!("--net={}", namespace.display())).arg("--").arg(program);
    command
}

/// Ends what runs in a cgroup and removes it, with the cgroups below it. Errors are ignored, as for namespaces.
pub(super) fn remove(cgroup: &Path) {
    let _ = fs::write(cgroup.join("cgroup.kill"), "1");
    let below = fs::read_dir(cgroup).into_iter().flatten().flatten();
    below.filter(|it| it.file_type().is_ok_and(|kind| kind.is_dir())).for_each(|it| remove(&it.path()));
    let _ = eventually(EMPTY_LIMIT, "the cgroup is empty", || match fs::remove_dir(cgroup) {
        Err(error) if cgroup.exists() => Err(error.into()),
        _ => Ok(()),
    });
}

/// Removes the cgroups of labs whose process is gone.
pub(super) fn sweep_stale() {
    let entries = root().and_then(|root| fs::read_dir(root).ok()).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().to_str().is_some_and(owner_is_gone)) {
        remove(&entry.path());
    }
}

/// How many programs of a type are on a cgroup itself (`BPF_PROG_QUERY`, `bpf(2)`).
///
/// # Errors
/// When there is no such cgroup.
pub fn attached(cgroup: &Path, attach_type: bpf_attach_type) -> Result<u32> {
    #[repr(C)]
    #[derive(Default)]
    struct Query {
        target: u32,
        attach_type: u32,
        flags: u32,
        attach_flags: u32,
        ids: u64,
        count: u32,
        padding: u32,
        more: [u64; 4],
    }
    const BPF_PROG_QUERY: libc::c_int = 16;
    let directory = fs::File::open(cgroup).with_context(|| cgroup.display().to_string())?;
    let mut query = Query {
        target: directory.as_raw_fd().cast_unsigned(),
        attach_type: attach_type as u32,
        ..Default::default()
    };
    // SAFETY: the structure is the one of the command; without room for ids the kernel only counts.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut query, size_of::<Query>()) };
    ensure!(result == 0, "bpf(BPF_PROG_QUERY): {}", std::io::Error::last_os_error());
    Ok(query.count)
}

/// Puts a program on a cgroup that lets everything through and nobody else's program beside it, as an agent that knows
/// nothing of others does: `BPF_PROG_ATTACH` without flags (`bpf(2)`). It goes with the cgroup.
///
/// # Errors
/// When there is no such cgroup, or somebody's program is there already.
pub fn occupy(cgroup: &Path, attach_type: bpf_attach_type) -> Result<()> {
    #[repr(C)]
    #[derive(Default)]
    struct Load {
        program_type: u32,
        instructions: u32,
        code: u64,
        license: u64,
        log: [u32; 2],
        log_buffer: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        attach_type: u32,
    }
    #[repr(C)]
    struct Attach {
        target: u32,
        program: u32,
        attach_type: u32,
        flags: u32,
    }
    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_PROG_ATTACH: libc::c_int = 8;
    /// `r0 = 1; exit` (RFC 9669).
    const LET_THROUGH: [u64; 2] = [0x1_0000_00b7, 0x95];
    let license = c"Apache-2.0";
    let load = Load {
        program_type: bpf_prog_type::BPF_PROG_TYPE_CGROUP_SOCK_ADDR as u32,
        instructions: LET_THROUGH.len() as u32,
        code: LET_THROUGH.as_ptr() as u64,
        license: license.as_ptr() as u64,
        attach_type: attach_type as u32,
        ..Default::default()
    };
    // SAFETY: the structure is the one of the command, and what it points at lives until the call is over.
    let program = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<Load>()) };
    ensure!(program >= 0, "bpf(BPF_PROG_LOAD): {}", std::io::Error::last_os_error());
    // SAFETY: the call has made it, and nobody else has it.
    let program = unsafe { OwnedFd::from_raw_fd(program as i32) };
    let directory = fs::File::open(cgroup).with_context(|| cgroup.display().to_string())?;
    let attach = Attach {
        target: directory.as_raw_fd().cast_unsigned(),
        program: program.as_raw_fd().cast_unsigned(),
        attach_type: attach_type as u32,
        flags: 0,
    };
    // SAFETY: the structure is the one of the command.
    let attached =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attach, size_of::<Attach>()) };
    ensure!(attached == 0, "bpf(BPF_PROG_ATTACH): {}", std::io::Error::last_os_error());
    Ok(())
}

/// Detaches a pinned link from whatever it is on, as `bpftool link detach` does (`BPF_LINK_DETACH`, `bpf(2)`).
///
/// # Errors
/// When there is no such pin.
pub fn detach(pin: &Path) -> Result<()> {
    #[repr(C)]
    struct ObjGet {
        path: u64,
        descriptor: u32,
        flags: u32,
    }
    const BPF_OBJ_GET: libc::c_int = 7;
    const BPF_LINK_DETACH: libc::c_int = 34;
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let get = ObjGet { path: path.as_ptr().addr() as u64, descriptor: 0, flags: 0 };
    // SAFETY: the structure is the one of the command, and the path lives until the call returns.
    let link = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const get, size_of::<ObjGet>()) };
    ensure!(link >= 0, "{}: {}", pin.display(), std::io::Error::last_os_error());
    // SAFETY: a descriptor that the kernel has just made for us.
    let link = unsafe { OwnedFd::from_raw_fd(link as libc::c_int) };
    let detach = link.as_raw_fd().cast_unsigned();
    // SAFETY: the command takes one number.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_LINK_DETACH, &raw const detach, size_of::<u32>()) };
    ensure!(result == 0, "bpf(BPF_LINK_DETACH): {}", std::io::Error::last_os_error());
    Ok(())
}
