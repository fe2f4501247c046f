//! Taking a slot for a flow: see the claim protocol in [`crate::flow`].

use crate::{
    cell::Cell32,
    flight_recorder::{FlowEvent, Note, state},
    flow::{
        claimer::Claimer,
        eviction::EvictionPriority,
        family::Family,
        query::{CANDIDATES, FIRST_CANDIDATES, Query},
        slot::{Choice, Claim, Found, Slot},
    },
    layout::WAYS,
    maps::{LoopBody, Maps},
    meta::{Kind, Meta},
    subprograms::Subprograms,
};

/// Finds a slot for a tuple that has none, and takes it.
#[inline(always)]
pub fn claim<F: Family, M: Subprograms>(maps: &M, query: &Query<F::Tuple>, claimer: &Claimer) -> Claim {
    let claim = maps.claim_free::<F>(query, claimer);
    if claim != Claim::UNDECIDED {
        return claim;
    }
    let choice = maps.choose::<F>(query, claimer);
    if !choice.found().is_some() {
        return Claim::FULL;
    }
    let mut found = choice.found();
    if let Some(event) = choice.event() {
        found = evict::<F, M>(maps, found);
        if !found.is_some() {
            return Claim::RACED;
        }
        maps.count_event(claimer.service as u16, event);
    }
    maps.take::<F>(query, claimer, found)
}

/// Ends a flow whose slot was chosen for another, and notes that for later; a slot whose flow was over is left as it is.
/// Returns it as it is now. [`Found::NONE`]: the slot changed meanwhile.
#[inline(always)]
fn evict<F: Family, M: Maps>(maps: &M, found: Found) -> Found {
    let (slot, meta) = (found.slot(), found.meta());
    if !meta.is(Kind::HalfOpen) && !meta.is(Kind::Established) {
        return found;
    }
    let Some(ways) = F::set(maps, slot.set) else {
        return Found::NONE;
    };
    let tuple = F::load(ways, slot.way);
    if F::meta(ways, slot.way).compare_exchange(meta.0, Meta::FREE.0) != meta.0 {
        return Found::NONE;
    }
    let note = Note::new::<F>(FlowEvent::Reclaimed, F::parts(tuple));
    maps.note(note.of(meta.backend()).at(slot).detail(state(meta)));
    Found::new(slot, Meta::FREE)
}

/// The way with the lowest [`EvictionPriority`]. Priority, candidate and way make up one number, of which the least is
/// kept.
#[inline(always)]
pub fn choose<F: Family, M: Maps>(maps: &M, query: &Query<F::Tuple>, claimer: &Claimer) -> Choice {
    let (Some(config), Some(home), Some(second)) =
        (maps.config(), F::set(maps, query.home), F::set(maps, query.second))
    else {
        return Choice::NONE;
    };
    let swapped = emptier(maps, free_ways::<F>(home), free_ways::<F>(second));
    let mut weighing =
        Weighing::<F, M> { maps: *maps, query, claimer, swapped, best: config.hide_from_verifier(u64::MAX) };
    maps.repeat(CANDIDATES * WAYS as u32, &mut weighing);
    let best = weighing.best;
    if best >> 32 == u64::from(EvictionPriority::PROTECTED.0) {
        return Choice::NONE;
    }
    let slot = Slot { set: query.candidate((best as u32 >> 2) & 0xf), way: best as u32 & 3 };
    let Some(ways) = F::set(maps, slot.set) else {
        return Choice::NONE;
    };
    // Examined again, now for the word that is exchanged.
    let (priority, meta) = EvictionPriority::of::<F, M>(maps, ways, slot, claimer, config);
    // Another CPU took it meanwhile. There was room, so this is a race: taking the slot as a free one fails, as it should.
    let (priority, meta) = if priority == EvictionPriority::PROTECTED {
        (EvictionPriority::FREE, Meta::FREE)
    } else {
        (priority, meta)
    };
    Choice::new(Found::new(slot, meta), priority.loss())
}

/// A comparison of the candidates' ways, one at a time.
struct Weighing<'a, F: Family, M> {
    maps: M,
    query: &'a Query<F::Tuple>,
    claimer: &'a Claimer,
    swapped: u32,
    best: u64,
}

impl<F: Family, M: Maps> LoopBody for Weighing<'_, F, M> {
    #[inline(always)]
    fn run(&mut self, index: u32) -> bool {
        let (place, way) = (index / WAYS as u32, index % WAYS as u32);
        let number = if place < FIRST_CANDIDATES { place ^ self.swapped } else { place };
        let set = self.query.candidate(number);
        let (Some(config), Some(ways)) = (self.maps.config(), F::set(&self.maps, set)) else {
            return true;
        };
        let slot = Slot { set, way };
        let (priority, _) = EvictionPriority::of::<F, M>(&self.maps, ways, slot, self.claimer, config);
        // A blocked way is as protected as a way can be.
        let blocked = u32::from(F::blocked(&self.maps, ways, set)) >> way & 1;
        let priority = priority.0 | blocked.wrapping_neg();
        let numbered = config.hide_from_verifier(u64::from(priority) << 32 | u64::from(number << 2 | way));
        if numbered < self.best {
            self.best = numbered;
        }
        way == WAYS as u32 - 1 && self.best >> 32 <= u64::from(EvictionPriority::OTHER_BACKEND.0)
    }
}

/// The free ways of a set, by bit.
#[inline(always)]
fn free_ways<F: Family>(ways: &F::Set) -> u32 {
    let mut free = 0;
    for way in 0..WAYS as u32 {
        // 1 for every kind but Free, which is 0, without a branch.
        free |= ((Meta(F::meta(ways, way).load()).kind() + 7) >> 3 ^ 1) << way;
    }
    free
}

/// Which of two sets has more free ways: 0, or 1 for the second.
#[inline(always)]
fn emptier<M: Maps>(maps: &M, first: u32, second: u32) -> u32 {
    /// Four bits for each mask: how many bits it has.
    const COUNT: u64 = 0x4332_3221_3221_2110;
    let count = |mask: u32| (COUNT >> (mask * 4)) as u32 & 0xf;
    maps.barrier_var(count(first)).wrapping_sub(count(second)) >> 31
}

/// The lowest bit of a mask of four that is not 0.
#[inline(always)]
const fn lowest(mask: u32) -> u32 {
    /// Two bits for each mask.
    const LOWEST: u32 = 0x1213_1210;
    LOWEST >> (mask * 2) & 3
}

/// Takes a free way of the emptier of the first two candidates, as nearly every flow does. [`Claim::UNDECIDED`]: it has
/// none, and all candidates are to be weighed.
///
/// Set and way are as good as random. So nothing here branches on them: a branch that cannot be predicted costs 7 ns, and
/// there were four.
#[inline(always)]
pub fn claim_free<F: Family, M: Subprograms>(maps: &M, query: &Query<F::Tuple>, claimer: &Claimer) -> Claim {
    let (Some(first_ways), Some(second_ways)) = (F::set(maps, query.home), F::set(maps, query.second)) else {
        return Claim::UNDECIDED;
    };
    let Some(mark) = F::overflow(maps, first_ways, query.home) else {
        return Claim::UNDECIDED;
    };
    let free = [free_ways::<F>(first_ways), free_ways::<F>(second_ways)];
    let swapped = emptier(maps, free[0], free[1]);
    let (set, free) = (pick(swapped, query.home, query.second), pick(swapped, free[0], free[1]));
    let Some(ways) = F::set(maps, set) else {
        return Claim::UNDECIDED;
    };
    let free = free & !u32::from(F::blocked(maps, ways, set));
    if free == 0 {
        return Claim::UNDECIDED;
    }
    let slot = Slot { set, way: lowest(free) };
    let meta = Meta(F::meta(ways, slot.way).load());
    // Another CPU took it meanwhile. Other ways may be free: not decided yet.
    if !meta.is(Kind::Free) || !publish::<F, M>(maps, ways, slot, meta, query.tuple, claimer, || {}) {
        return Claim::UNDECIDED;
    }
    let own = maps.barrier_var(1 << (swapped * WAYS as u32 + slot.way));
    let again = query.has_moved()
        || mark.load() != 0
        || is_elsewhere::<F>(first_ways, query.tuple, own)
        || is_elsewhere::<F>(second_ways, query.tuple, own >> WAYS);
    if again && maps.find_in::<F>(query, query.reach(), slot).is_some() {
        give_back(F::meta(ways, slot.way), half_open(claimer));
        return Claim::RACED;
    }
    Claim::won(slot)
}

/// One of two numbers, without a branch; `second` is 0 or 1.
#[inline(always)]
const fn pick(second: u32, one: u32, other: u32) -> u32 {
    one ^ ((one ^ other) & second.wrapping_neg())
}

/// Does a way that is not in `own` (by bit) hold the tuple, live or not?
#[inline(always)]
fn is_elsewhere<F: Family>(ways: &F::Set, tuple: F::Tuple, own: u32) -> bool {
    for way in 0..WAYS as u32 {
        if F::difference(F::load(ways, way), tuple) | u64::from(own >> way & 1) == 0 {
            return true;
        }
    }
    false
}

/// Takes a slot that was examined: one that may be reclaimed, or a closed one of the same tuple.
#[inline(always)]
pub fn take<F: Family, M: Subprograms>(
    maps: &M,
    query: &Query<F::Tuple>,
    claimer: &Claimer,
    found: Found,
) -> Claim {
    let slot = found.slot();
    let Some(ways) = F::set(maps, slot.set) else {
        return Claim::FULL;
    };
    let mark = F::set(maps, query.home).and_then(|home| F::overflow(maps, home, query.home));
    // Marked also when it is marked already: the daemon clears marks of past epochs only.
    let overflow = || {
        if slot.set != query.home
            && slot.set != query.second
            && let (Some(config), Some(mark)) = (maps.config(), mark)
            && mark.load() != config.epoch as u8
        {
            mark.store(config.epoch as u8);
        }
    };
    if !publish::<F, M>(maps, ways, slot, found.meta(), query.tuple, claimer, overflow) {
        return Claim::RACED;
    }
    // A rival may be beyond the second candidate only if it marked the first, and it marked before it published.
    let beyond = query.has_moved() || mark.is_none_or(|mark| mark.load() != 0);
    let candidates = if beyond { query.reach() } else { FIRST_CANDIDATES };
    if maps.find_in::<F>(query, candidates, slot).is_some() {
        give_back(F::meta(ways, slot.way), half_open(claimer));
        return Claim::RACED;
    }
    Claim::won(slot)
}

/// The first three steps of the protocol. False: the word changed meanwhile.
#[inline(always)]
fn publish<F: Family, M: Maps>(
    maps: &M,
    ways: &F::Set,
    slot: Slot,
    from: Meta,
    tuple: F::Tuple,
    claimer: &Claimer,
    mark: impl FnOnce(),
) -> bool {
    let word = F::meta(ways, slot.way);
    let Some(numbers) = F::numbers(maps, ways, slot) else {
        return false;
    };
    let claiming = half_open(claimer).become_kind(Kind::Claiming);
    if word.compare_exchange(from.0, claiming.0) != from.0 {
        return false;
    }
    mark();
    F::store(ways, slot.way, tuple);
    numbers.unacknowledged.store(claimer.clock.jiffies);
    numbers.next.store(claimer.expected);
    // Not a compare-and-exchange: a late packet of the slot's last flow may have set a flag in the word meanwhile.
    word.swap(half_open(claimer).0);
    true
}

/// The word of a flow that begins.
#[inline(always)]
const fn half_open(claimer: &Claimer) -> Meta {
    Meta::new(Kind::HalfOpen, claimer.backend as u8, claimer.clock.seen)
}

/// Frees a slot that was published a moment ago. The flow's other packets may have set flags in its word meanwhile. No
/// other flow has it: a half-open slot is not taken so young.
#[inline(always)]
fn give_back(word: &Cell32, mut meta: Meta) {
    for _ in 0..4 {
        let now = Meta(word.compare_exchange(meta.0, Meta::FREE.0));
        if now == meta || !now.is(Kind::HalfOpen) {
            break;
        }
        meta = now;
    }
}
