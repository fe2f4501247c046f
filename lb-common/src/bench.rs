//! What the benchmark tells its wrapper program.
//!
//! `BPF_PROG_TEST_RUN` does not restore the packet between repetitions, so the wrapper writes a fresh one each time,
//! calls the very code that the daemon loads, and (for new flows) gives the slot back.

/// Bytes of the longest packet: Ethernet, IPv6, TCP, rounded up to words.
pub const PACKET: usize = 80;
/// Flows that one benchmark can have.
pub const FLOWS: u32 = 262_144;

/// What the wrapper does after writing the packet.
pub mod call {
    /// Nothing: the cost of the wrapper itself.
    pub const NOTHING: u32 = 0;
    /// Calls the program.
    pub const PROGRAM: u32 = 1;
    /// Calls the program, then frees the slot it chose.
    pub const PROGRAM_AND_FREE: u32 = 2;
}

/// Which packets the wrapper writes.
pub mod direction {
    /// The same one each time.
    pub const FIXED: u32 = 0;
    /// From clients, each of its own flow.
    pub const FORWARD: u32 = 1;
    /// From backends, each to its own slot.
    pub const REPLY: u32 = 2;
}

/// The one entry of the benchmark's map.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// See [`call`].
    pub call: u32,
    /// See [`direction`].
    pub direction: u32,
    /// Not 0: IPv6.
    pub ipv6: u32,
    /// One less than the number of flows, a power of two.
    pub flow_mask: u32,
    /// The next flow.
    pub next: u32,
    /// Where the flows begin.
    pub first: u32,
    /// The packet, but for what makes it one flow's, as words.
    pub packet: [u64; PACKET / 8],
}

/// A flow's place, for packets of backends: words of the SNAT address's and the backend's last four bytes, the SNAT
/// port's word.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Place {
    /// Last four bytes of the SNAT address.
    pub snat: u32,
    /// Last four bytes of the backend's address.
    pub backend: u32,
    /// SNAT port.
    pub port: u32,
    /// Zero.
    pub reserved: u32,
}

/// Client address (its last four bytes, as a number) and port of a flow.
#[inline(always)]
#[must_use]
pub const fn client(flow: u32) -> (u32, u16) {
    (0x0a40_0000 + (flow >> 12), 20_000 + (flow & 0xfff) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_what_the_kernel_has() {
        assert_eq!((size_of::<Plan>(), size_of::<Place>()), (24 + PACKET, 16));
    }
}
