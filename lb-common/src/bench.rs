//! The benchmark's instructions to its wrapper program.
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
    /// Nothing, but what freeing a slot costs the wrapper.
    pub const FREE: u32 = 3;
}

/// What backends have sent, and clients not yet acknowledged, when a benchmark begins: more than any acknowledges.
pub const IN_FLIGHT: u32 = 1 << 30;
/// How much further than its last a backend's packet begins: its payload, and a little that was lost.
pub const STRIDE: u32 = 32;

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
    /// The last four bytes of the first SNAT address, as a number; the others follow it.
    pub snat: u32,
    /// The last four bytes of an address, as a number; that of backend `id` is the `id`th after it.
    pub backend: u32,
    /// How often every flow has had a packet, over all runs: each acknowledges or sends something new.
    pub round: u32,
    /// Zero.
    pub reserved: u32,
    /// The packet without the fields that differ between flows, as words.
    pub packet: [u64; PACKET / 8],
}

/// A flow's place, for packets of backends. As small as can be, so that reading it leaves the caches to what is
/// measured.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Place(u32);

impl Place {
    /// SNAT port and address, by number, and backend.
    #[must_use]
    pub const fn new(port: u16, snat: u8, backend: u8) -> Self {
        Self(port as u32 | (snat as u32) << 16 | (backend as u32) << 24)
    }

    /// Flow `flow`'s, of the two in a value of the map.
    #[inline(always)]
    #[must_use]
    pub const fn of(pair: u64, flow: u32) -> Self {
        Self((pair >> (flow % 2 * 32)) as u32)
    }

    /// The value of the map with flow `flow`'s entered.
    #[must_use]
    pub const fn enter(self, pair: u64, flow: u32) -> u64 {
        let shift = flow % 2 * 32;
        pair & !(0xffff_ffff << shift) | (self.0 as u64) << shift
    }

    /// The SNAT port, as a number.
    #[inline(always)]
    #[must_use]
    pub const fn port(self) -> u16 {
        self.0 as u16
    }

    /// Which SNAT address.
    #[inline(always)]
    #[must_use]
    pub const fn snat(self) -> u32 {
        self.0 >> 16 & 0xff
    }

    /// The backend's id.
    #[inline(always)]
    #[must_use]
    pub const fn backend(self) -> u32 {
        self.0 >> 24
    }
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
        assert_eq!(size_of::<Plan>(), 40 + PACKET);
    }
}
