//! Functions that the verifier looks at on their own, once, whatever the state of their callers.
//!
//! The searches through forty ways would otherwise be followed again for every path that leads to them. For this they
//! have to be global functions: exported symbols that take numbers and pointers to structures and return a number
//! (kernel ≥ 5.13; `Documentation/bpf/verifier.rst` calls them global subprograms). A pointer that is null is
//! answered as "nothing found"; ours never are, but the verifier does not know our callers.

use aya_ebpf::{bindings::xdp_md, programs::XdpContext};
use lb_common::{
    flow::{Choice, Claim, Claimer, Family, Found, Query, Slot, V4, V6, choose, find_in, take},
    icmp, parse,
    process::segments,
};

use crate::{frame::XdpFrame, maps::KernelMaps};

/// A subprogram's result, as the verifier sees it: any number. LLVM knows the callee and would leave out the masks that
/// keep the number in bounds.
#[inline(always)]
pub fn laundered(result: u64) -> u64 {
    let mut result = result;
    // SAFETY: moves a register onto itself.
    unsafe { core::arch::asm!("{0} = {0}", inout(reg) result, options(nomem, nostack)) };
    result
}

/// See [`parse::tags`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn frame_tags(context: *mut xdp_md) -> u64 {
    parse::tags(&mut XdpFrame::new(&XdpContext::new(context)))
}

/// See [`parse::upper_layer`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn frame_upper_layer(context: *mut xdp_md, transport: u64, next: u64) -> u64 {
    let transport = transport as usize & 0x3fff;
    parse::upper_layer(&mut XdpFrame::new(&XdpContext::new(context)), transport, next as u8)
}

macro_rules! subprograms {
    ($family:ty, $find:ident, $choose:ident, $take:ident, $segments:ident, $icmp:ident) => {
        /// See [`segments`].
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $segments(context: *mut xdp_md) -> u64 {
            let context = XdpContext::new(context);
            segments::<$family, _, _>(&mut XdpFrame::new(&context), &KernelMaps).word()
        }

        /// See [`icmp::translate`].
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $icmp(context: *mut xdp_md) -> u64 {
            let context = XdpContext::new(context);
            icmp::translate::<$family, _, _>(&mut XdpFrame::new(&context), &KernelMaps).word()
        }

        /// See [`find_in`]; `except` and the result are packed.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $find(
            query: *const Query<<$family as Family>::Tuple>,
            candidates: u32,
            except: u64,
        ) -> u64 {
            // SAFETY: null, or the caller's structure.
            let Some(query) = (unsafe { query.as_ref() }) else {
                return 0;
            };
            let except = Found::unpack(except).map_or(Slot::NONE, |found| found.slot);
            Found::pack(find_in::<$family, _>(&KernelMaps, query, candidates, except))
        }

        /// See [`choose`]; the result is packed.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $choose(
            query: *const Query<<$family as Family>::Tuple>,
            claimer: *const Claimer,
        ) -> u64 {
            // SAFETY: null, or the caller's structures.
            let (Some(query), Some(claimer)) = (unsafe { (query.as_ref(), claimer.as_ref()) }) else {
                return Choice::pack(None);
            };
            Choice::pack(choose::<$family, _>(&KernelMaps, query, claimer))
        }

        /// See [`take`]; `found` and the result are packed.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $take(
            query: *const Query<<$family as Family>::Tuple>,
            claimer: *const Claimer,
            found: u64,
        ) -> u64 {
            // SAFETY: null, or the caller's structures.
            let (Some(query), Some(claimer)) = (unsafe { (query.as_ref(), claimer.as_ref()) }) else {
                return Claim::FULL.word();
            };
            match Found::unpack(found) {
                Some(found) => take::<$family, _>(&KernelMaps, query, claimer, found).word(),
                None => Claim::FULL.word(),
            }
        }
    };
}

subprograms!(V4, flow4_find, flow4_choose, flow4_take, frame4_segments, frame4_icmp);
subprograms!(V6, flow6_find, flow6_choose, flow6_take, frame6_segments, frame6_icmp);
