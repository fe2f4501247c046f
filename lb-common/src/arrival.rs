//! Where a packet came in.

use crate::{layout::INTERFACES, word::packed_word};

packed_word! {
    /// By which interface a packet came in: its number, or one of the constants.
    pub struct Arrival(u16) as u64;
}

impl Arrival {
    /// By none that is served.
    pub const UNKNOWN: Self = Self(u16::MAX);
    /// By one that is served, but for another MAC address.
    pub const OTHER_MAC: Self = Self(u16::MAX - 1);

    /// By interface `number`.
    #[inline(always)]
    pub(crate) const fn by(number: u16) -> Self {
        Self(number)
    }

    /// The interface's number, if the packet was meant for this host.
    #[inline(always)]
    #[must_use]
    pub const fn interface(self) -> Option<u16> {
        if self.0 < INTERFACES as u16 { Some(self.0) } else { None }
    }
}
