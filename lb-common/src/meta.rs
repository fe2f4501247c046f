//! A slot's one atomic word: state, backend and when it was last seen.
//!
//! ```text
//!  31           16 15        8 7     6     5     4     3    2..0
//! +---------------+-----------+-----+-----+-----+-----+----+------+
//! |     seen      |  backend  |reset|b FIN|c FIN| num | (1)| kind |
//! +---------------+-----------+-----+-----+-----+-----+----+------+
//! (1) half-open: SYN-ACK seen; established: the backend has retransmitted; closed: a SYN has come since
//! ```
//!
//! `seen` counts in units of about one second and wraps after 18 hours, which is why an idle timeout is at most 8.

/// The state of a slot.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// No flow's: never used, or its quarantine is over.
    Free = 0,
    /// A CPU is writing its tuple. Readers ignore the slot.
    Claiming = 1,
    /// A SYN was forwarded. Reclaimed before anything established.
    HalfOpen = 2,
    /// Proven by the client: it has acknowledged the number of the backend's SYN-ACK.
    Established = 3,
    /// Both sides have closed, the backend second: no TIME_WAIT there, reusable after two seconds.
    ClosedByClient = 4,
    /// Both sides have closed, the backend first: it is in TIME_WAIT for this slot for a minute.
    ClosedByBackend = 5,
    /// Reset on purpose, see [`crate::kill`]: both sides are answered with a RST until the slot is reused.
    Killed = 6,
}

/// On a half-open slot: the backend's SYN-ACK was seen.
pub const SYN_ACK: u32 = 1 << 3;
/// On an established slot: the backend has retransmitted since the way back to the client was last learned.
pub const RETRANSMITTED: u32 = SYN_ACK;
/// On a slot that both sides have closed: a SYN has come for it since, which its backend is to judge.
pub const SYN_WAITS: u32 = SYN_ACK;
/// SND.UNA and SND.NXT are known: see [`crate::transition`].
pub const NUMBERED: u32 = 1 << 4;
/// The client's FIN was seen.
pub const CLIENT_FIN: u32 = 1 << 5;
/// The backend's FIN was seen.
pub const BACKEND_FIN: u32 = 1 << 6;
/// On a killed slot: the backend was sent a RST, or has sent one itself. It has forgotten the flow.
pub const BACKEND_TOLD: u32 = BACKEND_FIN;
/// A RST was seen, or a SYN after the client's FIN, and no segment of the backend since. On a half-open slot: the second chance is used up.
pub const RESET: u32 = 1 << 7;

const KIND: u32 = 0b111;
const FLAGS: u32 = 0xff & !KIND;

/// A copy of the word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Meta(pub u32);

impl Meta {
    /// A free slot, as the kernel's zeroed memory has it.
    pub const FREE: Self = Self(0);

    /// A word with no flags.
    #[inline(always)]
    #[must_use]
    pub const fn new(kind: Kind, backend: u8, seen: u16) -> Self {
        Self(kind as u32 | (backend as u32) << 8 | (seen as u32) << 16)
    }

    /// The slot's state, as bits: see [`Kind`].
    #[inline(always)]
    #[must_use]
    pub const fn kind(self) -> u32 {
        self.0 & KIND
    }

    /// Is it `kind`?
    #[inline(always)]
    #[must_use]
    pub const fn is(self, kind: Kind) -> bool {
        self.0 & KIND == kind as u32
    }

    /// Is it an established flow whose numbers are known, as nearly all are?
    #[inline(always)]
    #[must_use]
    pub const fn is_numbered_flow(self) -> bool {
        self.0 & (KIND | NUMBERED) == Kind::Established as u32 | NUMBERED
    }

    /// Does a flow own it, so that its segments are forwarded?
    #[inline(always)]
    #[must_use]
    pub const fn is_live(self) -> bool {
        self.kind() >= Kind::HalfOpen as u32
    }

    /// Have both sides closed?
    #[inline(always)]
    #[must_use]
    pub const fn is_closed(self) -> bool {
        self.kind() == Kind::ClosedByClient as u32 || self.kind() == Kind::ClosedByBackend as u32
    }

    /// The same slot after a RST that nothing has contradicted for long enough.
    #[must_use]
    pub const fn closed_by_reset(self) -> Self {
        self.without_flags().with(RESET).become_kind(Kind::ClosedByClient)
    }

    /// Was it closed by a RST alone? A slot that both sides have closed has their FIN flags, too.
    #[inline(always)]
    #[must_use]
    pub const fn is_closed_by_reset(self) -> bool {
        self.0 & (KIND | RESET | BACKEND_FIN) == RESET | Kind::ClosedByClient as u32
    }

    /// Was it reset on purpose, and may its backend still hold the flow?
    #[inline(always)]
    #[must_use]
    pub const fn is_untold(self) -> bool {
        self.0 & (KIND | BACKEND_TOLD) == Kind::Killed as u32
    }

    /// Are all of `flags` set?
    #[inline(always)]
    #[must_use]
    pub const fn has(self, flags: u32) -> bool {
        self.0 & flags == flags
    }

    /// The backend's id.
    #[inline(always)]
    #[must_use]
    pub const fn backend(self) -> u8 {
        (self.0 >> 8) as u8
    }

    /// When the last segment was seen.
    #[inline(always)]
    #[must_use]
    pub const fn seen(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// Units since the last segment.
    #[inline(always)]
    #[must_use]
    pub const fn age(self, now: u16) -> u16 {
        now.wrapping_sub(self.seen())
    }

    /// The same slot as another kind, its flags kept.
    #[inline(always)]
    #[must_use]
    pub const fn become_kind(self, kind: Kind) -> Self {
        Self(self.0 & !KIND | kind as u32)
    }

    /// The same slot without its flags.
    #[inline(always)]
    #[must_use]
    pub const fn without_flags(self) -> Self {
        Self(self.0 & !FLAGS)
    }

    /// The same slot with more flags.
    #[inline(always)]
    #[must_use]
    pub const fn with(self, flags: u32) -> Self {
        Self(self.0 | flags)
    }

    /// The same slot with fewer flags.
    #[inline(always)]
    #[must_use]
    pub const fn without(self, flags: u32) -> Self {
        Self(self.0 & !flags)
    }

    /// The same slot on another backend.
    #[inline(always)]
    #[must_use]
    pub const fn on(self, backend: u8) -> Self {
        Self(self.0 & !0xff00 | (backend as u32) << 8)
    }

    /// The same slot, seen at another time.
    #[inline(always)]
    #[must_use]
    pub const fn at(self, seen: u16) -> Self {
        Self(self.0 & 0xffff | (seen as u32) << 16)
    }

    /// Does a flow of the same backend own the slot still? Its state may be another by now.
    #[inline(always)]
    #[must_use]
    pub const fn is_kept(self, now: Self) -> bool {
        now.is_live() && now.backend() == self.backend()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_the_word_do_not_touch() {
        let meta = Meta::new(Kind::Established, 0xab, 0x1234).with(SYN_ACK | RESET);
        assert!(meta.is(Kind::Established) && meta.has(SYN_ACK | RESET) && !meta.has(CLIENT_FIN));
        assert_eq!((meta.backend(), meta.seen()), (0xab, 0x1234));
        let meta = meta.on(0xcd).become_kind(Kind::ClosedByBackend).without(RESET);
        assert_eq!(meta, Meta::new(Kind::ClosedByBackend, 0xcd, 0x1234).with(SYN_ACK));
        assert_eq!(meta.without_flags().0 & 0xf8, 0);
    }

    #[test]
    fn zeroed_memory_is_free() {
        assert!(Meta::FREE.is(Kind::Free) && !Meta::FREE.is_live());
    }

    #[test]
    fn age_survives_the_wrap() {
        assert_eq!(Meta::new(Kind::HalfOpen, 1, 0xfff0).age(0x10), 0x20);
    }
}
