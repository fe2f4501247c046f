//! Grace periods: when has every program that was running finished?
//!
//! A program that was preempted in the middle may still hold what the daemon took out of the maps a moment ago. XDP
//! runs inside an RCU read-side section, and `membarrier(MEMBARRIER_CMD_GLOBAL)` returns after a grace period: about
//! 8 ms, so it is waited for on a thread, ahead of the next change.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    thread::JoinHandle,
};

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
    // Kernels booted with nohz_full refuse it. No delay would do instead: a virtual CPU may be stopped for long.
    if error.raw_os_error() == Some(libc::EINVAL) { by_changing_a_map() } else { Err(error) }
}

/// The start of the kernel's `union bpf_attr` (`linux/bpf.h`) for making a map.
#[repr(C)]
struct Create {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
}

/// And for changing one.
#[repr(C)]
struct Update {
    map_fd: u32,
    reserved: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Waits by exchanging a map within a map: the system call returns after a grace period (`maybe_wait_bpf_programs` in
/// `kernel/bpf/syscall.c`).
fn by_changing_a_map() -> io::Result<()> {
    const BPF_MAP_CREATE: libc::c_int = 0;
    const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
    const ARRAY: u32 = 2;
    const ARRAY_OF_MAPS: u32 = 12;
    let create = |map_type, inner_map_fd| {
        let attributes =
            Create { map_type, key_size: 4, value_size: 4, max_entries: 1, map_flags: 0, inner_map_fd };
        let number = bpf(BPF_MAP_CREATE, &attributes)?;
        // SAFETY: a file descriptor that the kernel has just opened for us.
        Ok::<_, io::Error>(unsafe { OwnedFd::from_raw_fd(number as libc::c_int) })
    };
    let inner = create(ARRAY, 0)?;
    let outer = create(ARRAY_OF_MAPS, inner.as_raw_fd() as u32)?;
    let (key, value) = (0u32, inner.as_raw_fd());
    let attributes = Update {
        map_fd: outer.as_raw_fd() as u32,
        reserved: 0,
        key: (&raw const key) as u64,
        value: (&raw const value) as u64,
        flags: 0,
    };
    bpf(BPF_MAP_UPDATE_ELEM, &attributes).map(drop)
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads that many bytes, and what they point to lives in the caller.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attributes, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
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

    #[test]
    fn changing_a_map_waits_as_well() {
        match by_changing_a_map() {
            // Without root's rights there is nothing to see.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
            result => result.unwrap(),
        }
    }

    #[test]
    fn attributes_are_what_the_kernel_has() {
        assert_eq!((size_of::<Create>(), size_of::<Update>()), (24, 32));
    }
}
