//! A tuple and the sets that may hold it.

use crate::{
    flow::family::Family,
    hash::FlowHash,
    layout::{Bucket, Config, SETS_PER_ADDRESS},
};

/// Sets a tuple may be in.
pub const CANDIDATES: u32 = 10;
/// Candidates that every look-up examines.
pub const FIRST_CANDIDATES: u32 = 2;

/// A tuple and where to look for it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Query<T> {
    /// What is looked for.
    pub tuple: T,
    /// Its hash.
    pub hash: FlowHash,
    /// Its first candidate.
    pub(super) home: u32,
    /// Its second, in the same page of memory as the first.
    pub(super) second: u32,
    /// The first usable set of its SNAT address.
    first: u32,
    /// How many usable sets there are.
    sets: u32,
    // A word, so that there is no padding: the verifier wants every byte of an argument set.
    bucket: u64,
}

impl<T: Copy> Query<T> {
    /// Where to look for `tuple`.
    #[inline(always)]
    pub fn new<F: Family<Tuple = T>>(config: &Config, tuple: T) -> Self {
        let hash = F::hash(&config.key, tuple);
        Self::of(config, tuple, hash, F::bucket(config, hash.bucket()))
    }

    /// Where to look if its flows left from SNAT address `address` only.
    #[must_use]
    pub fn at<F: Family<Tuple = T>>(config: &Config, tuple: T, address: u8) -> Self {
        Self::of(config, tuple, F::hash(&config.key, tuple), Bucket::new(address, address))
    }

    #[inline(always)]
    fn of(config: &Config, tuple: T, hash: FlowHash, bucket: Bucket) -> Self {
        let first = bucket.now() * SETS_PER_ADDRESS + config.first_set;
        let home = first + hash.candidate(0, config.sets);
        let (second, sets) = (home ^ hash.partner(config.partners), config.sets);
        Self { tuple, hash, home, second, first, sets, bucket: bucket.word() }
    }

    /// Candidate set `number`: from [`CANDIDATES`] on those at the address of older flows.
    #[inline(always)]
    #[must_use]
    pub fn candidate(&self, number: u32) -> u32 {
        if number < CANDIDATES {
            return self.candidate_now(number);
        }
        let bucket = Bucket::from_word(self.bucket);
        // The same place in the sets of the other address, which are as many.
        let there = bucket.before().wrapping_sub(bucket.now()).wrapping_mul(SETS_PER_ADDRESS);
        self.candidate_now(number - CANDIDATES).wrapping_add(there)
    }

    #[inline(always)]
    fn candidate_now(&self, number: u32) -> u32 {
        if number == 1 { self.second } else { self.first + self.hash.candidate(number, self.sets) }
    }

    /// May an older flow be at another SNAT address than a new one?
    #[inline(always)]
    #[must_use]
    pub const fn has_moved(&self) -> bool {
        !Bucket::from_word(self.bucket).is_settled()
    }

    /// The number of candidates that may hold the flow.
    #[inline(always)]
    #[must_use]
    pub const fn reach(&self) -> u32 {
        if self.has_moved() { 2 * CANDIDATES } else { CANDIDATES }
    }
}
