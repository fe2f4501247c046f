//! The end of a packet's way, as one word.

use crate::{
    outcome::{Action, Outcome},
    word::packed_word,
};

packed_word! {
    /// What became of a packet: [`Outcome`], service (0 where none is known) and the index of the interface it leaves by.
    ///
    /// One word, so that it stays in a register. (As a structure LLVM copies it by loads that the verifier finds
    /// misaligned.)
    pub struct Disposition(u64) as u64;
}

impl Disposition {
    /// Left alone.
    pub const NOT_OURS: Self = Self::with(Outcome::NotOurs, 0);
    /// Not yet: see [`segments`].
    pub const ICMP: Self = Self(0xffff);

    /// A packet that leaves by no interface of ours.
    #[inline(always)]
    #[must_use]
    pub const fn with(outcome: Outcome, service: u16) -> Self {
        Self::leaving(outcome, service, 0)
    }

    /// A packet that leaves by an interface.
    #[inline(always)]
    #[must_use]
    pub const fn leaving(outcome: Outcome, service: u16, interface: u32) -> Self {
        Self(outcome as u64 | (service as u64) << 16 | (interface as u64) << 32)
    }

    /// The same, leaving by an interface.
    #[inline(always)]
    #[must_use]
    pub const fn by(self, interface: u32) -> Self {
        Self(self.0 | (interface as u64) << 32)
    }

    /// Is it a segment that [`refuse::answer`] has still to answer with a RST?
    #[inline(always)]
    #[must_use]
    pub const fn is_refused(self) -> bool {
        let outcome = self.outcome_index();
        outcome >= Outcome::RefusedNoBackend as u16 && outcome <= Outcome::ResetBackend as u16
    }

    /// The number of its outcome, which is the place of its counter: see [`Outcome::ALL`].
    #[inline(always)]
    #[must_use]
    pub const fn outcome_index(self) -> u16 {
        self.0 as u16
    }

    /// Its outcome.
    #[must_use]
    pub fn outcome(self) -> Option<Outcome> {
        Outcome::ALL.get(usize::from(self.outcome_index())).copied()
    }

    /// The service it was for.
    #[inline(always)]
    #[must_use]
    pub const fn service(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// The interface it leaves by.
    #[inline(always)]
    #[must_use]
    pub const fn interface(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// What the kernel is told to do.
    #[inline(always)]
    #[must_use]
    pub const fn action(self) -> Action {
        Outcome::action_of(self.outcome_index())
    }
}

/// Those that [`refuse::answer`] answers stand together in the list.
const _: () = assert!(Outcome::ResetBackend as u16 - Outcome::RefusedNoBackend as u16 == 3);
