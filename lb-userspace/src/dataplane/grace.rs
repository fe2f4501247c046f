//! Grace periods: when has every program that was running finished?
//!
//! A program that was preempted in the middle may still hold what the daemon took out of the maps a moment ago. XDP
//! runs inside an RCU read-side section, and `membarrier(MEMBARRIER_CMD_GLOBAL)` returns after a grace period: about
//! 8 ms, so it is waited for on a thread, ahead of the next change.

use std::{io, thread::JoinHandle};

/// A grace period that was begun.
#[derive(Debug, Default)]
pub(super) struct Grace(Option<JoinHandle<io::Result<()>>>);

impl Grace {
    /// Begins one, after a change. What was begun before is over when this one is.
    pub(super) fn begin(&mut self) {
        self.0 = Some(std::thread::spawn(wait));
    }

    /// Waits until it is over; at once if none was begun.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        match self.0.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(io::Error::other("the thread that waited for a grace period died")),
        }
    }
}

/// Waits for one grace period.
pub fn wait() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: takes three numbers and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    // Kernels booted with nohz_full refuse it. No program runs for longer than this without a reschedule there.
    if error.raw_os_error() == Some(libc::EINVAL) {
        std::thread::sleep(std::time::Duration::from_millis(200));
        return Ok(());
    }
    Err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grace_period_ends() {
        let mut grace = Grace::default();
        grace.finish().unwrap();
        grace.begin();
        grace.begin();
        grace.finish().unwrap();
    }
}
