//! Words of map memory that several CPUs and the daemon change at the same time.
//!
//! In the kernel these are BPF's atomic instructions (kernel ≥ 5.12; `Documentation/bpf/standardization/
//! instruction-set.rst`, "Atomic operations"), elsewhere the standard library's atomics, under loom its model of
//! them. All read-modify-write operations are full barriers. Plain loads and stores are what the machine makes of a
//! load and a store: acquire and release on x86, unordered on arm64.

#[cfg(target_arch = "bpf")]
mod imp {
    use core::{arch::asm, cell::UnsafeCell};

    macro_rules! cell {
        ($name:ident, $word:ty) => {
            #[doc = concat!("A shared `", stringify!($word), "`.")]
            #[repr(transparent)]
            #[derive(Default)]
            pub struct $name(UnsafeCell<$word>);

            // SAFETY: every access is one load, store or atomic instruction of the word's own width.
            unsafe impl Sync for $name {}

            impl $name {
                /// The word as it is now.
                #[inline(always)]
                pub fn load(&self) -> $word {
                    // SAFETY: the pointer comes from a live reference.
                    unsafe { self.0.get().read_volatile() }
                }

                /// Sets the word, with no order towards other words.
                #[inline(always)]
                pub fn store(&self, value: $word) {
                    // SAFETY: the pointer comes from a live reference; a store of this width is not torn.
                    unsafe { self.0.get().write_volatile(value) }
                }
            }
        };
    }

    cell!(Cell8, u8);
    cell!(Cell16, u16);
    cell!(Cell32, u32);
    cell!(Cell64, u64);

    impl Cell32 {
        /// Puts `new` where `old` is; returns what was there.
        #[inline(always)]
        pub fn compare_exchange(&self, old: u32, new: u32) -> u32 {
            let previous: u32;
            // SAFETY: one atomic instruction on a live, aligned word.
            unsafe {
                asm!(
                    "w0 = cmpxchg32_32({pointer} + 0, w0, {new})",
                    pointer = in(reg) self.0.get(),
                    new = in(wreg) new,
                    inlateout("w0") old => previous,
                );
            }
            previous
        }

        /// Puts `new` there; returns what was there.
        #[inline(always)]
        pub fn swap(&self, new: u32) -> u32 {
            let mut word = new;
            // SAFETY: one atomic instruction on a live, aligned word.
            unsafe {
                asm!(
                    "{word} = xchg32_32({pointer} + 0, {word})",
                    pointer = in(reg) self.0.get(),
                    word = inout(wreg) word,
                );
            }
            word
        }

        /// Sets `bits`; returns what was there.
        #[inline(always)]
        pub fn fetch_or(&self, bits: u32) -> u32 {
            let mut word = bits;
            // SAFETY: one atomic instruction on a live, aligned word.
            unsafe {
                asm!(
                    "{word} = atomic_fetch_or((u32 *)({pointer} + 0), {word})",
                    pointer = in(reg) self.0.get(),
                    word = inout(wreg) word,
                );
            }
            word
        }

        /// Sets the upper half of the word and leaves the lower half to concurrent changes.
        #[inline(always)]
        pub fn store_high(&self, high: u16) {
            // SAFETY: within the word; BPF is little-endian here and a store of two aligned bytes is not torn.
            unsafe { self.0.get().cast::<u16>().add(HIGH).write_volatile(high) }
        }
    }

    /// Where the upper half of a word is, in halves.
    const HIGH: usize = if cfg!(target_endian = "little") { 1 } else { 0 };

    impl Cell64 {
        /// Adds, modulo 2^64, with no order towards other words.
        #[inline(always)]
        pub fn add(&self, number: u64) {
            // SAFETY: one atomic instruction on a live, aligned word.
            unsafe {
                asm!(
                    "lock *(u64 *)({pointer} + 0) += {number}",
                    pointer = in(reg) self.0.get(),
                    number = in(reg) number,
                );
            }
        }

        /// Puts `new` where `old` is; returns what was there.
        #[inline(always)]
        pub fn compare_exchange(&self, old: u64, new: u64) -> u64 {
            let previous: u64;
            // SAFETY: one atomic instruction on a live, aligned word.
            unsafe {
                asm!(
                    "r0 = cmpxchg_64({pointer} + 0, r0, {new})",
                    pointer = in(reg) self.0.get(),
                    new = in(reg) new,
                    inlateout("r0") old => previous,
                );
            }
            previous
        }
    }
}

#[cfg(not(target_arch = "bpf"))]
mod imp {
    #[cfg(not(loom))]
    use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
    #[cfg(loom)]
    use loom::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

    /// What comes before or after a full barrier. A sequentially consistent operation alone does not order the plain
    /// accesses around it (and loom takes it for acquire and release only); the kernel's atomic instructions do, on
    /// x86 by their lock prefix, on arm64 as the kernel's own fully ordered operations.
    fn barrier() {
        fence(Ordering::SeqCst);
    }

    macro_rules! cell {
        ($name:ident, $atomic:ty, $word:ty) => {
            #[doc = concat!("A shared `", stringify!($word), "`.")]
            #[repr(transparent)]
            #[derive(Debug, Default)]
            pub struct $name($atomic);

            impl $name {
                /// The word as it is now.
                pub fn load(&self) -> $word {
                    self.0.load(Ordering::Acquire)
                }

                /// Sets the word, with no order towards later loads.
                pub fn store(&self, value: $word) {
                    self.0.store(value, Ordering::Release);
                }

                /// Puts `new` where `old` is; returns what was there.
                pub fn compare_exchange(&self, old: $word, new: $word) -> $word {
                    barrier();
                    let result = self.0.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst);
                    barrier();
                    match result {
                        Ok(previous) | Err(previous) => previous,
                    }
                }

                /// Puts `new` there; returns what was there.
                pub fn swap(&self, new: $word) -> $word {
                    barrier();
                    let previous = self.0.swap(new, Ordering::SeqCst);
                    barrier();
                    previous
                }
            }
        };
    }

    cell!(Cell8, AtomicU8, u8);
    cell!(Cell16, AtomicU16, u16);
    cell!(Cell32, AtomicU32, u32);
    cell!(Cell64, AtomicU64, u64);

    impl Cell64 {
        /// Adds, modulo 2^64, with no order towards other words.
        pub fn add(&self, number: u64) {
            self.0.fetch_add(number, Ordering::Relaxed);
        }
    }

    impl Cell32 {
        /// Sets `bits`; returns what was there.
        pub fn fetch_or(&self, bits: u32) -> u32 {
            barrier();
            let previous = self.0.fetch_or(bits, Ordering::SeqCst);
            barrier();
            previous
        }

        /// Sets the upper half of the word and leaves the lower half to concurrent changes.
        pub fn store_high(&self, high: u16) {
            // No barrier: in the kernel it is a plain store of two bytes.
            let mut word = self.load();
            while let Err(now) = self.0.compare_exchange(
                word,
                word & 0xffff | u32::from(high) << 16,
                Ordering::Release,
                Ordering::Relaxed,
            ) {
                word = now;
            }
        }
    }
}

pub use imp::{Cell8, Cell16, Cell32, Cell64};
