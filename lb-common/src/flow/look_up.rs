//! Finding the slot of a flow.

use crate::{
    flow::{
        family::Family,
        query::Query,
        slot::{Found, Slot},
    },
    layout::{Config, WAYS},
    maps::{LoopBody, Maps},
    meta::Meta,
    subprograms::Subprograms,
};

/// A slot as it was found, with its set at hand. Without one: it was not.
///
/// No `Option`, for the reason that [`Found`] is none.
pub struct Hit<'a, F: Family> {
    /// Where.
    pub slot: Slot,
    /// What its word was.
    pub meta: Meta,
    /// Its set.
    pub ways: Option<&'a F::Set>,
}

impl<F: Family> Hit<'_, F> {
    const NONE: Self = Self { slot: Slot::NONE, meta: Meta::FREE, ways: None };

    /// The same in one word.
    #[inline(always)]
    #[must_use]
    pub const fn found(&self) -> Found {
        if self.ways.is_some() { Found::new(self.slot, self.meta) } else { Found::NONE }
    }
}

/// The live slot of a tuple.
#[inline(always)]
pub fn find<'a, F: Family, M: Subprograms>(
    maps: &'a M,
    config: &Config,
    query: &Query<F::Tuple>,
) -> Hit<'a, F> {
    let mut hit = find_first::<F, M>(maps, query);
    if hit.ways.is_none() && may_be_beyond::<F, M>(maps, query) {
        let found = maps.find_in::<F>(query, query.reach(), Slot::NONE);
        if found.is_some() {
            let slot = found.slot();
            hit = Hit { slot, meta: found.meta(), ways: F::set(maps, slot.set) };
        }
    }
    hit.slot.way = config.hide_from_verifier(hit.slot.way.into()) as u32;
    hit
}

/// May the flow be beyond its first two candidates?
#[inline(always)]
fn may_be_beyond<F: Family, M: Maps>(maps: &M, query: &Query<F::Tuple>) -> bool {
    let mark = F::set(maps, query.home).and_then(|home| F::overflow(maps, home, query.home));
    query.has_moved() || mark.is_some_and(|mark| mark.load() != 0)
}

/// The live slot of a tuple in the candidates that are always looked at.
#[inline(always)]
fn find_first<'a, F: Family, M: Maps>(maps: &'a M, query: &Query<F::Tuple>) -> Hit<'a, F> {
    let (Some(home), Some(second)) = (F::set(maps, query.home), F::set(maps, query.second)) else {
        return Hit::NONE;
    };
    // Loaded before the first set is searched: both lines may be cache misses, which then overlap.
    F::meta(second, 0).load();
    F::prefetch_numbers(maps, query.home);
    F::prefetch_numbers(maps, query.second);
    for (set, ways) in [(query.home, home), (query.second, second)] {
        if let Some((way, meta)) = find_way::<F>(ways, query.tuple, WAYS as u32) {
            return Hit { slot: Slot { set, way }, meta, ways: Some(ways) };
        }
    }
    Hit::NONE
}

/// The live way of a set that has the tuple, other than `except`, and its word.
#[inline(always)]
fn find_way<F: Family>(ways: &F::Set, tuple: F::Tuple, except: u32) -> Option<(u32, Meta)> {
    for way in 0..WAYS as u32 {
        if F::load(ways, way) != tuple || way == except {
            continue;
        }
        let meta = Meta(F::meta(ways, way).load());
        // A claimer writes the tuple only while the word says *claiming*. The second comparison catches a claim in between.
        if meta.is_live() && F::load(ways, way) == tuple {
            return Some((way, meta));
        }
    }
    None
}

/// Does the flow with this tuple own the way, whose word was `meta` before the tuple was read?
///
/// A claimer may have come between, and the state may have changed: it is the same flow if its backend is the same and
/// the tuple reads the same again after that.
#[inline(always)]
pub fn is_owner<F: Family>(ways: &F::Set, way: u32, meta: Meta, tuple: F::Tuple) -> bool {
    meta.is_kept(Meta(F::meta(ways, way).load())) && F::difference(F::load(ways, way), tuple) == 0
}

/// The live slot of a tuple in its first `candidates`, other than `except`.
#[inline(always)]
pub fn find_in<F: Family, M: Maps>(
    maps: &M,
    query: &Query<F::Tuple>,
    candidates: u32,
    except: Slot,
) -> Found {
    let mut search = Search::<F, M> { maps: *maps, query, except, found: Found::NONE };
    maps.repeat(candidates, &mut search);
    search.found
}

/// A search through the candidates.
struct Search<'a, F: Family, M> {
    maps: M,
    query: &'a Query<F::Tuple>,
    except: Slot,
    found: Found,
}

impl<F: Family, M: Maps> LoopBody for Search<'_, F, M> {
    #[inline(always)]
    fn run(&mut self, number: u32) -> bool {
        let set = self.query.candidate(number);
        let Some(ways) = F::set(&self.maps, set) else {
            return true;
        };
        let except = if set == self.except.set { self.except.way } else { WAYS as u32 };
        if let Some((way, meta)) = find_way::<F>(ways, self.query.tuple, except) {
            self.found = Found::new(Slot { set, way }, meta);
            return true;
        }
        false
    }
}
