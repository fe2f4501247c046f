//! Functions that the verifier looks at on their own, once, whatever the state of their callers.
//!
//! The searches through forty ways would otherwise be followed again for every path that leads to them. For this they
//! have to be global functions: exported symbols that take numbers and pointers to structures and return a number
//! (`Documentation/bpf/verifier.rst` calls them global subprograms). A pointer that is null is answered as "nothing
//! found"; ours never are, but the verifier does not know our callers.

use aya_ebpf::{bindings::xdp_md, programs::XdpContext};
use lb_common::{
    black_box::Note,
    flow::{Choice, Claim, Claimer, Family, Found, Query, V4, V6, choose, claim_free, find_in, take},
    forward,
    hash::FlowHash,
    icmp,
    layout::{PORTS, SNAT_ADDRESSES, family},
    maps::Maps as _,
    next_hop, parse,
    process::{self, Class, Done, segments},
    refuse, reply, rewrite,
};

use crate::{
    connect,
    frame::XdpFrame,
    maps::{self, KernelMaps},
};

/// A subprogram's result, as the verifier sees it: any number. LLVM knows the callee and would leave out the masks that
/// keep the number in bounds.
#[inline(always)]
pub(crate) fn laundered(result: u64) -> u64 {
    let mut result = result;
    // SAFETY: moves a register onto itself.
    unsafe { core::arch::asm!("{0} = {0}", inout(reg) result, options(nomem, nostack)) };
    result
}

/// See [`parse::tags`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn frame_tags(context: *mut xdp_md) -> u64 {
    parse::tags(&mut XdpFrame::new(&XdpContext::new(context)))
}

/// See [`parse::upper_layer`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn frame_upper_layer(context: *mut xdp_md, transport: u64, next: u64) -> u64 {
    let transport = transport as usize & 0x3fff;
    parse::upper_layer(&mut XdpFrame::new(&XdpContext::new(context)), transport, next as u8)
}

/// See [`parse::option_sum`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn frame_option_sum(context: *mut xdp_md, offset: u64, end: u64) -> u64 {
    let (offset, end) = (offset as usize & 0xff, end as usize & 0xff);
    parse::option_sum(&mut XdpFrame::new(&XdpContext::new(context)), offset, end)
}

/// See [`reply::routed`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn frame_routed(context: *mut xdp_md, family: u64, high: u64, low: u64) -> u64 {
    match KernelMaps::new().as_ref().and_then(KernelMaps::config) {
        Some(config) => {
            let context = XdpContext::new(context);
            reply::routed(&mut XdpFrame::new(&context), config, family as u8, [high, low])
        }
        None => 0,
    }
}

/// See [`rewrite::retag`]: 1 or 0.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn frame_retag(context: *mut xdp_md, network: u64, kind: u64, port: u64) -> u64 {
    match KernelMaps::new().as_ref().and_then(KernelMaps::config) {
        Some(config) => {
            let context = XdpContext::new(context);
            let frame = &mut XdpFrame::new(&context);
            rewrite::retag(frame, config, network as usize & 0xff, kind as u16, port as u16).into()
        }
        None => 0,
    }
}

/// See [`process::listener`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn map_listener(family: u64, high: u64, low: u64, port: u64) -> u64 {
    KernelMaps::new()
        .map_or(0, |maps| process::listener(&maps, family as u8, [high, low], port as u16))
        .into()
}

/// See [`process::snat_index`]; [`SNAT_ADDRESSES`] for none.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn map_snat_index(family_number: u64, high: u64, low: u64) -> u64 {
    let Some(maps) = KernelMaps::new() else {
        return SNAT_ADDRESSES as u64;
    };
    let index = if family_number == u64::from(family::IPV4) {
        process::snat_index::<V4, _>(&maps, [high, low])
    } else {
        process::snat_index::<V6, _>(&maps, [high, low])
    };
    index.map_or(SNAT_ADDRESSES as u64, u64::from)
}

/// See [`process::arrival`]; [`PORTS`] for none.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn map_arrival(interface: u64, vlan: u64, mac: u64) -> u64 {
    KernelMaps::new()
        .and_then(|maps| process::arrival(&maps, interface as u32, vlan as u32, mac))
        .map_or(PORTS as u64, u64::from)
}

/// See [`maps::allows`]: 1 or 0.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn map_allows(service: u64, high: u64, low: u64) -> u64 {
    maps::allows(service as u16, [high, low]).into()
}

/// See [`forward::another`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn map_another(family_number: u64, service: u64, hash: u64, refused: u64) -> u64 {
    let (service, hash, refused) = (service as u16, FlowHash(hash), refused as u8);
    let Some(maps) = KernelMaps::new() else {
        return 0;
    };
    if family_number == u64::from(family::IPV4) {
        forward::another::<V4, _>(&maps, service, hash, refused).into()
    } else {
        forward::another::<V6, _>(&maps, service, hash, refused).into()
    }
}

/// See [`next_hop::learn`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn map_learn(hop: u64) -> u64 {
    KernelMaps::new().map_or(0, |maps| next_hop::learn(&maps, hop)).into()
}

/// See [`reply::is_backend`]: 1 or 0.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn map_is_backend(family: u64, high: u64, low: u64, port: u64) -> u64 {
    KernelMaps::new()
        .is_some_and(|maps| reply::is_backend(&maps, family as u8, [high, low], port as u16))
        .into()
}

/// See [`lb_common::connect::verdict`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn map_connect(listener: u64, own_network: u64, random: u64) -> u64 {
    connect::verdict(listener as u16, own_network != 0, random as u32).word().into()
}

/// See [`maps::note`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn map_note(high: u64, low: u64, what: u64, other: u64) -> u64 {
    maps::note(&Note { address: [high, low], what, other: other as u8 });
    0
}

macro_rules! subprograms {
    ($family:ty, $find:ident, $free:ident, $choose:ident, $take:ident, $segments:ident, $icmp:ident, $refuse:ident) => {
        /// See [`segments`].
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub(crate) extern "C" fn $segments(context: *mut xdp_md, class: u64) -> u64 {
            let context = XdpContext::new(context);
            let Some(maps) = KernelMaps::new() else {
                return Done::NOT_OURS.word();
            };
            let class = Class::from_word(class);
            segments::<$family, _, _>(&mut XdpFrame::new(&context), &maps, class).word()
        }

        /// See [`icmp::translate`].
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub(crate) extern "C" fn $icmp(context: *mut xdp_md) -> u64 {
            let context = XdpContext::new(context);
            let Some(maps) = KernelMaps::new() else {
                return Done::NOT_OURS.word();
            };
            icmp::translate::<$family, _, _>(&mut XdpFrame::new(&context), &maps).word()
        }

        /// See [`refuse::answer`].
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub(crate) extern "C" fn $refuse(context: *mut xdp_md, refused: u64) -> u64 {
            let context = XdpContext::new(context);
            refuse::answer::<$family, _>(&mut XdpFrame::new(&context), Done::from_word(refused)).word()
        }

        /// See [`find_in`]; `except` and the result are packed.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub(crate) extern "C" fn $find(
            query: *const Query<<$family as Family>::Tuple>,
            candidates: u32,
            except: u64,
        ) -> u64 {
            // SAFETY: null, or the caller's structure.
            let (Some(query), Some(maps)) = (unsafe { query.as_ref() }, KernelMaps::new()) else {
                return 0;
            };
            let except = Found::from_word(except).slot();
            find_in::<$family, _>(&maps, query, candidates, except).word()
        }

        /// See [`claim_free`]; the result is packed.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub(crate) extern "C" fn $free(
            query: *const Query<<$family as Family>::Tuple>,
            claimer: *const Claimer,
        ) -> u64 {
            // SAFETY: null, or the caller's structures.
            let (Some(query), Some(claimer)) = (unsafe { (query.as_ref(), claimer.as_ref()) }) else {
                return Claim::UNDECIDED.word();
            };
            let Some(maps) = KernelMaps::new() else {
                return Claim::UNDECIDED.word();
            };
            claim_free::<$family, _>(&maps, query, claimer).word()
        }

        /// See [`choose`]; the result is packed.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub(crate) extern "C" fn $choose(
            query: *const Query<<$family as Family>::Tuple>,
            claimer: *const Claimer,
        ) -> u64 {
            // SAFETY: null, or the caller's structures.
            let (Some(query), Some(claimer)) = (unsafe { (query.as_ref(), claimer.as_ref()) }) else {
                return Choice::NONE.word();
            };
            let Some(maps) = KernelMaps::new() else {
                return Choice::NONE.word();
            };
            choose::<$family, _>(&maps, query, claimer).word()
        }

        /// See [`take`]; `found` and the result are packed.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub(crate) extern "C" fn $take(
            query: *const Query<<$family as Family>::Tuple>,
            claimer: *const Claimer,
            found: u64,
        ) -> u64 {
            // SAFETY: null, or the caller's structures.
            let (Some(query), Some(claimer)) = (unsafe { (query.as_ref(), claimer.as_ref()) }) else {
                return Claim::FULL.word();
            };
            let Some(maps) = KernelMaps::new() else {
                return Claim::FULL.word();
            };
            take::<$family, _>(&maps, query, claimer, Found::from_word(found)).word()
        }
    };
}

subprograms!(
    V4,
    flow4_find,
    flow4_claim_free,
    flow4_choose,
    flow4_take,
    frame4_segments,
    frame4_icmp,
    frame4_refuse
);
subprograms!(
    V6,
    flow6_find,
    flow6_claim_free,
    flow6_choose,
    flow6_take,
    frame6_segments,
    frame6_icmp,
    frame6_refuse
);
