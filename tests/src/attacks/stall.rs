//! A process that stands still at moments of its start: as a busy hypervisor, or a paging host, makes it.

use std::{collections::HashMap, thread, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail};
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

/// A call of bpf(2) by a process that is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// How many came before.
    pub number: usize,
    /// If it runs a program once: how many of those came before. Clocks are read so.
    pub run: Option<usize>,
}

/// Follows a process from its start on until it has called bpf(2) `calls` times, and has it stand still for `stall` after
/// each of these calls that `wanted` holds for. Returns those.
///
/// # Errors
/// When it ends, or may not be followed.
pub fn stall_calls(
    pid: u32,
    calls: usize,
    stall: Duration,
    wanted: impl Fn(Call) -> bool + Send,
) -> Result<Vec<Call>> {
    // A thread of its own: it waits for what it follows and nothing else, and with its end all of that is let go.
    let follow = || follow(Pid::from_raw(pid.cast_signed()), calls, stall, wanted);
    thread::scope(|scope| scope.spawn(follow).join().map_err(|_| anyhow!("following panicked"))?)
}

fn follow(pid: Pid, calls: usize, stall: Duration, wanted: impl Fn(Call) -> bool) -> Result<Vec<Call>> {
    let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE;
    ptrace::seize(pid, options).context("following the process")?;
    ptrace::interrupt(pid)?;
    let (mut called, mut runs, mut stalled) = (0, 0, Vec::new());
    // Threads that are in a call, with its command if it is bpf(2).
    let mut within: HashMap<Pid, Option<u64>> = HashMap::new();
    let any_thread = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
    while called < calls {
        let status = waitpid(None, Some(any_thread)).context("it has ended")?;
        let Some(thread) = status.pid() else { continue };
        let mut passed_on = None;
        match status {
            WaitStatus::PtraceSyscall(_) => match within.remove(&thread) {
                None => {
                    within.insert(thread, bpf_command(thread)?);
                }
                Some(None) => {}
                Some(Some(command)) => {
                    let call = Call { number: called, run: (command == TEST_RUN).then_some(runs) };
                    if wanted(call) {
                        thread::sleep(stall);
                        stalled.push(call);
                    }
                    called += 1;
                    runs += usize::from(call.run.is_some());
                }
            },
            WaitStatus::Stopped(_, signal) if signal != Signal::SIGTRAP => passed_on = Some(signal),
            WaitStatus::Stopped(..) | WaitStatus::PtraceEvent(..) => {}
            other if thread == pid => bail!("it ended after {called} calls of bpf: {other:?}"),
            _ => continue,
        }
        // A thread may have been ended meanwhile.
        let _ = ptrace::syscall(thread, passed_on);
    }
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
