//! What a packet's destination says about it, as one word.

use crate::word::packed_word;

packed_word! {
    /// What the destination of a segment tells: the first listener on its port (bits 0-15), or
    /// what is at its address's [place](crate::layout::snat_place) (bits 16-23).
    pub struct Class(u64) as u64;
}

impl Class {
    /// Neither: most packets of a host that does other things as well end here.
    pub const NOT_OURS: Self = Self(0);
    /// Not a plain TCP header: to be classified again.
    pub const UNSURE: Self = Self(u64::MAX);

    /// A listener, if any.
    #[inline(always)]
    #[must_use]
    pub const fn listener(first: u16) -> Self {
        Self(first as u64)
    }

    /// A flow's backend, if anything is at the place.
    #[inline(always)]
    #[must_use]
    pub const fn snat(place: u8) -> Self {
        Self((place as u64) << 16)
    }

    /// The first listener on its port; 0: none.
    #[inline(always)]
    #[must_use]
    pub const fn first_listener(self) -> u16 {
        self.0 as u16
    }

    /// What is at its address's [place](crate::layout::snat_place).
    #[inline(always)]
    #[must_use]
    pub const fn place(self) -> u8 {
        (self.0 >> 16) as u8
    }
}
