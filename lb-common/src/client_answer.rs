//! What becomes of a segment of a client that changes its flow.

use crate::{meta::Meta, word::packed_word};

packed_word! {
    /// What is to be done with the segment: one of the constants (bits 32-39), and the slot's word as it is now (bits 0-31).
    pub struct ClientAnswer(u64) as u64;
}

impl ClientAnswer {
    /// Forward it.
    pub const FORWARD: u64 = 0;
    /// Forward it, and send the flow's replies to where it came from.
    pub const FORWARD_AND_LEARN: u64 = 1;
    /// It is a SYN that begins a new flow in this slot.
    pub const REOPEN: u64 = 2;
    /// It is a SYN, and the backend judges whether a new flow begins in this slot: forward it.
    pub const ASK_BACKEND: u64 = 3;
    /// It is a SYN for a flow to this host, which takes no new ones: forward it if a socket has the connection
    /// ([`crate::host_socket`]), or drop it if the client has ended that a moment ago. Without a socket it begins a new flow in
    /// this slot.
    pub const ASK_HOST: u64 = 4;
    /// Answer it with a RST: the flow was reset on purpose.
    pub const RESET: u64 = 5;
    /// Answer it with a RST: no backend takes new flows.
    pub const REFUSE: u64 = 6;
    /// Drop it: it is a SYN, and the backend is to be asked first what has become of the flow before.
    pub const HOLD: u64 = 7;

    #[inline(always)]
    pub(crate) const fn new(what: u64, meta: Meta) -> Self {
        Self(what << 32 | meta.0 as u64)
    }

    /// One of the constants.
    #[inline(always)]
    #[must_use]
    pub const fn what(self) -> u64 {
        self.0 >> 32
    }

    /// The slot's word.
    #[inline(always)]
    #[must_use]
    pub const fn meta(self) -> Meta {
        Meta(self.0 as u32)
    }
}
