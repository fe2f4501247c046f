//! A slot's number, and the one-word results of looking for one.

use crate::{
    headers::Be16,
    layout::{SETS_PER_ADDRESS, WAYS},
    meta::Meta,
    outcome::{Event, Outcome},
    word::packed_word,
};

/// Where a flow is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The set, counted through all SNAT addresses.
    pub set: u32,
    /// The way, 0 to 3.
    pub way: u32,
}

impl Slot {
    /// No slot at all.
    pub const NONE: Self = Self { set: 0x07ff_ffff, way: 0 };

    /// The SNAT port, as a number.
    #[inline(always)]
    #[must_use]
    pub const fn port(self) -> u16 {
        ((self.set % SETS_PER_ADDRESS) * WAYS as u32 + self.way) as u16
    }

    /// The SNAT port, as a word.
    #[inline(always)]
    #[must_use]
    pub const fn port_word(self) -> u16 {
        Be16::new(self.port()).word()
    }

    /// Which SNAT address.
    #[inline(always)]
    #[must_use]
    pub const fn address(self) -> usize {
        (self.set / SETS_PER_ADDRESS) as usize
    }
}

packed_word! {
    /// A slot as it was found: where it is and what its word was. Or [`Found::NONE`].
    ///
    /// A word and not an `Option`: functions that the verifier looks at on their own return one, and for None LLVM would
    /// copy registers that were never set, which the verifier does not allow.
    pub struct Found(u64) as u64;
}

impl Found {
    /// No slot.
    pub const NONE: Self = Self(0);
    pub(crate) const SOME: u64 = 1 << 63;
    /// Two bits that [`Choice`] uses.
    const LOSS: u32 = 61;

    /// The slot with this word.
    #[inline(always)]
    #[must_use]
    pub const fn new(slot: Slot, meta: Meta) -> Self {
        Self(Self::SOME | (slot.set as u64) << 34 | (slot.way as u64) << 32 | meta.0 as u64)
    }

    /// Is there one?
    #[inline(always)]
    #[must_use]
    pub const fn is_some(self) -> bool {
        self.0 & Self::SOME != 0
    }

    /// Where, if there is one.
    #[inline(always)]
    #[must_use]
    pub const fn slot(self) -> Slot {
        Slot { set: (self.0 >> 34) as u32 & 0x07ff_ffff, way: (self.0 >> 32) as u32 & 3 }
    }

    /// What its word was, if there is one.
    #[inline(always)]
    #[must_use]
    pub const fn meta(self) -> Meta {
        Meta(self.0 as u32)
    }
}

packed_word! {
    /// How a claim ended: [`Claim::FULL`], [`Claim::RACED`], or a slot. Not yet: [`Claim::UNDECIDED`].
    ///
    /// A word and not an enum: for the variants without a slot LLVM would copy a register that was never set, which the
    /// verifier does not allow.
    pub struct Claim(u64) as u64;
}

impl Claim {
    /// Every candidate is taken.
    pub const FULL: Self = Self(0);
    /// Another CPU has, or had, the same tuple in hand.
    pub const RACED: Self = Self(1);
    /// See [`claim_free`].
    pub const UNDECIDED: Self = Self(2);

    /// The flow has this slot.
    #[inline(always)]
    #[must_use]
    pub const fn won(slot: Slot) -> Self {
        Self(Found::new(slot, Meta::FREE).0)
    }

    /// What becomes of the packet when there is no slot.
    #[inline(always)]
    #[must_use]
    pub const fn failure(self) -> Option<Outcome> {
        if self.0 & Found::SOME != 0 {
            None
        } else if self.0 == Self::FULL.0 {
            Some(Outcome::TableFull)
        } else {
            Some(Outcome::SynRace)
        }
    }

    /// The slot, of a claim that has not failed.
    #[inline(always)]
    #[must_use]
    pub const fn slot(self) -> Slot {
        Found(self.0).slot()
    }
}

packed_word! {
    /// A slot that may be taken for a flow, and what its present flow loses by it.
    pub struct Choice(u64) as u64;
}

impl Choice {
    /// There is none.
    pub const NONE: Self = Self(0);

    #[inline(always)]
    pub(super) fn new(found: Found, loss: u64) -> Self {
        Self(found.0 | loss << Found::LOSS)
    }

    /// The slot as it was examined.
    #[inline(always)]
    #[must_use]
    pub const fn found(self) -> Found {
        Found(self.0 & !(3 << Found::LOSS))
    }

    /// The event to count when the slot is taken.
    #[inline(always)]
    #[must_use]
    pub const fn event(self) -> Option<Event> {
        match (self.0 >> Found::LOSS) & 3 {
            0 => None,
            1 => Some(Event::ReusedEarly),
            _ => Some(Event::HalfOpenReclaimed),
        }
    }
}
