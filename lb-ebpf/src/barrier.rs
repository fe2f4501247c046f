//! Values that the compiler must not see through.
//!
//! `barrier_var` is libbpf's word for it (`bpf_helpers.h`). LLVM otherwise leaves out what its own knowledge makes
//! needless (a mask, a comparison) and the verifier, which has not that knowledge, misses.

/// The same number, of which LLVM knows nothing. For results of subprograms: LLVM knows the callee and would leave out the
/// masks that keep the number in bounds.
#[inline(always)]
pub fn barrier_var(number: u64) -> u64 {
    let mut number = number;
    // SAFETY: moves a register onto itself.
    unsafe { core::arch::asm!("{0} = {0}", inout(reg) number, options(nomem, nostack)) };
    number
}

/// The same for an index, known only after the map's value was found to be there: otherwise LLVM adds it to the pointer
/// first, and the verifier allows no arithmetic on a pointer that may be null.
#[inline(always)]
pub fn barrier_index(index: u32) -> u32 {
    let mut index = index;
    // SAFETY: moves a register onto itself. (Without an instruction two source lines would share one, which the
    // kernel refuses.)
    unsafe { core::arch::asm!("{0} = {0}", inout(wreg) index, options(nomem, nostack)) };
    index
}
