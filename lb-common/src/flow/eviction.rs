//! Which slots may be taken from the flow that has them.

use crate::{
    flow::{
        claimer::{Claimer, Clock},
        family::Family,
        slot::Slot,
    },
    kill::KILLED_REST,
    layout::Config,
    maps::Maps,
    meta::{Kind, Meta, NUMBERED},
};

/// Units (about seconds) that a slot rests while its backend may be in TIME_WAIT for it.
pub const LONG_QUARANTINE: u16 = 60;
/// Units that a slot rests when the client closed first.
pub const SHORT_QUARANTINE: u16 = 2;
/// Units without a segment after which a handshake in which the backend has sent data may be reclaimed for another flow.
const UNPROVEN_AGE: u16 = 2;

/// How readily a slot is given to another flow: the lowest number is taken first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct EvictionPriority(pub(super) u32);

impl EvictionPriority {
    /// No flow has it.
    pub(super) const FREE: Self = Self(0);
    /// Its flow is over, and another backend is in TIME_WAIT for it.
    pub(super) const OTHER_BACKEND: Self = Self(1);
    /// From here on a slot is taken only if no candidate has a better one; the older the sooner.
    const EARLY: u32 = 1 << 16;
    const HALF_OPEN: u32 = 2 << 16;
    /// Never taken.
    pub(super) const PROTECTED: Self = Self(u32::MAX);

    /// The priority of a way, and its word as it was examined.
    #[inline(always)]
    pub(super) fn of<F: Family, M: Maps>(
        maps: &M,
        ways: &F::Set,
        slot: Slot,
        claimer: &Claimer,
        config: &Config,
    ) -> (Self, Meta) {
        let clock = claimer.clock;
        let meta = Meta(F::meta(ways, slot.way).load());
        let age = u32::from(meta.age(clock.seen));
        let older = 0xffff - age;
        let priority = if meta.is(Kind::Free) {
            Self::FREE
        } else if meta.is(Kind::Killed) {
            Self::of_killed(meta, age, claimer.backend)
        } else if meta.is_closed() {
            let rest = if meta.is(Kind::ClosedByBackend) { LONG_QUARANTINE } else { SHORT_QUARANTINE };
            if age >= u32::from(rest) {
                Self::FREE
            } else if u32::from(meta.backend()) != claimer.backend {
                Self::OTHER_BACKEND
            } else {
                Self(Self::EARLY | older)
            }
        } else if meta.is(Kind::HalfOpen) && is_reclaimable::<F, M>(maps, ways, slot, meta, clock, config) {
            Self(Self::HALF_OPEN | older)
        } else {
            Self::PROTECTED
        };
        (priority, meta)
    }

    /// A killed slot stays with its client while the RST is repeated to it. Then any other backend may have it. Its own
    /// backend may still hold the flow, and would answer the new flow's SYN with a bare ACK.
    #[inline(always)]
    fn of_killed(meta: Meta, age: u32, backend: u32) -> Self {
        if age < u32::from(KILLED_REST) || (meta.is_untold() && u32::from(meta.backend()) == backend) {
            Self::PROTECTED
        } else {
            Self::OTHER_BACKEND
        }
    }

    /// What the flow loses by it: see [`crate::flow::slot::Choice::event`].
    #[inline(always)]
    pub(super) fn loss(self) -> u64 {
        match self.0 >> 16 {
            0 => 0,
            1 => 1,
            _ => 2,
        }
    }
}

/// May a handshake be cut short? The backend has 200 ms to answer, and the client as long to acknowledge the answer. Where
/// the backend has sent data before that, the time is not known so well.
#[inline(always)]
fn is_reclaimable<F: Family, M: Maps>(
    maps: &M,
    ways: &F::Set,
    slot: Slot,
    meta: Meta,
    clock: Clock,
    config: &Config,
) -> bool {
    if meta.has(NUMBERED) {
        return meta.age(clock.seen) >= UNPROVEN_AGE;
    }
    let since = F::numbers(maps, ways, slot).map_or(0, |numbers| numbers.unacknowledged.load());
    clock.jiffies.wrapping_sub(since) >= config.half_open_jiffies
}
