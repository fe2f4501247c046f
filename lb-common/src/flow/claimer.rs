//! The flow that a slot is claimed for, and the time.

use crate::{layout::Config, maps::Maps};

/// The time, as slots keep it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// The lower half of the kernel's tick counter.
    pub jiffies: u32,
    /// Units of about a second.
    pub seen: u16,
    reserved: u16,
}

impl Clock {
    /// The time now.
    #[inline(always)]
    pub fn read<M: Maps>(maps: &M, config: &Config) -> Self {
        let jiffies = maps.jiffies();
        Self { jiffies: jiffies as u32, seen: (jiffies >> (config.jiffies_shift & 31)) as u16, reserved: 0 }
    }
}

/// The new flow's service and backend, and the time of its claim.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Claimer {
    /// The time.
    pub clock: Clock,
    /// The service that the claim is counted for.
    pub service: u32,
    /// The flow's backend.
    pub backend: u32,
    /// What a SYN-ACK of the backend must acknowledge: the SYN's number and one.
    pub expected: u32,
    /// Zero. The verifier wants every byte of an argument set.
    pub reserved: u32,
}
