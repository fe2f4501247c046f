//! A process that stands still at moments of its start: as a busy hypervisor, or a paging host, makes it.

use std::{thread, time::Duration};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::{
        ptrace::{self, Options},
        signal::Signal,
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

/// `BPF_PROG_TEST_RUN`, a command of bpf(2).
const TEST_RUN: u64 = 10;

/// Follows the first thread of a child of this process until it has called bpf(2) `calls` times, and has it stand still
/// for `stall` after each of these calls that `wanted` holds for: given the number of the call, from 0, and whether it runs
/// a program once. Returns how often it stood still.
///
/// # Errors
/// When it ends, or may not be followed.
pub fn stall_calls(
    pid: u32,
    calls: usize,
    stall: Duration,
    wanted: impl Fn(usize, bool) -> bool,
) -> Result<usize> {
    let pid = Pid::from_raw(pid.cast_signed());
    ptrace::seize(pid, Options::PTRACE_O_TRACESYSGOOD).context("following the process")?;
    ptrace::interrupt(pid)?;
    let (mut called, mut stalled) = (0, 0);
    // The command of the call that it is in; the outer is None outside of calls.
    let mut call: Option<Option<u64>> = None;
    while called < calls {
        let mut passed_on = None;
        match waitpid(pid, Some(WaitPidFlag::__WALL))? {
            WaitStatus::PtraceSyscall(_) => {
                call = match call {
                    None => Some(bpf_command(pid)?),
                    Some(command) => {
                        if let Some(command) = command {
                            if wanted(called, command == TEST_RUN) {
                                thread::sleep(stall);
                                stalled += 1;
                            }
                            called += 1;
                        }
                        None
                    }
                };
            }
            WaitStatus::Stopped(_, signal) if signal != Signal::SIGTRAP => passed_on = Some(signal),
            WaitStatus::Stopped(..) | WaitStatus::PtraceEvent(..) => {}
            other => bail!("it ended after {called} calls of bpf: {other:?}"),
        }
        ptrace::syscall(pid, passed_on)?;
    }
    // Only a process that stands still can be let go.
    ptrace::interrupt(pid)?;
    waitpid(pid, Some(WaitPidFlag::__WALL))?;
    ptrace::detach(pid, None)?;
    Ok(stalled)
}

/// The command of bpf(2), if that is the call that the process is about to make.
#[cfg(target_arch = "x86_64")]
fn bpf_command(pid: Pid) -> Result<Option<u64>> {
    let registers = ptrace::getregs(pid)?;
    Ok((registers.orig_rax == libc::SYS_bpf.cast_unsigned()).then_some(registers.rdi))
}

/// The command of bpf(2), if that is the call that the process is about to make.
#[cfg(target_arch = "aarch64")]
fn bpf_command(pid: Pid) -> Result<Option<u64>> {
    let registers = ptrace::getregs(pid)?;
    Ok((registers.regs[8] == libc::SYS_bpf.cast_unsigned()).then_some(registers.regs[0]))
}
