//! Functions that the verifier checks on their own, once, whatever the state of their callers; and
//! [`Subprograms`], by which the steps call them.
//!
//! The searches through forty ways would otherwise be followed again for every path that leads to them. For this they
//! have to be global functions: exported symbols that take numbers and pointers to structures and return a number
//! (`Documentation/bpf/verifier.rst` calls them global subprograms). A pointer that is null is answered as "nothing
//! found"; ours never are, but the verifier does not know our callers.

use aya_ebpf::bindings::xdp_md;
use lb_common::{
    arrival::Arrival,
    backend_event::backend_event,
    class::Class,
    client_answer::ClientAnswer,
    client_event::client_event,
    destination,
    disposition::Disposition,
    flow::{Choice, Claim, Claimer, Family, Found, Query, Slot, V4, V6, choose, claim_free, find_in, take},
    forward,
    hash::FlowHash,
    host_socket::connection,
    icmp,
    layout::{Config, SNAT_ADDRESSES, family},
    maps::Maps as _,
    meta::Meta,
    next_hop, parse, pipeline, refuse, reply, rewrite,
    segment::Segment,
    source_budget,
    subprograms::Subprograms,
};

use crate::{barrier::barrier_var, frame::XdpFrame, host_socket, maps::KernelMaps};

impl Subprograms for KernelMaps {
    type Frame = XdpFrame;

    #[inline(always)]
    fn find_listener(&self, family: u8, address: [u64; 2], port: u16) -> u16 {
        let [high, low] = address;
        barrier_var(map_listener(family.into(), high, low, port.into())) as u16
    }

    #[inline(always)]
    fn snat_index<A: Family>(&self, address: [u64; 2]) -> Option<u32> {
        let [high, low] = address;
        let index = barrier_var(map_snat_index(A::NUMBER.into(), high, low));
        (index < SNAT_ADDRESSES as u64).then_some(index as u32)
    }

    #[inline(always)]
    fn arrival(&self, interface: u32, vlan: u32, mac: u64) -> Arrival {
        Arrival::from_word(barrier_var(map_arrival(interface.into(), vlan.into(), mac)))
    }

    #[inline(always)]
    fn another<A: Family>(&self, service: u16, hash: FlowHash, refused: u8) -> u8 {
        let (service, family) = (service.into(), A::NUMBER.into());
        barrier_var(map_another(family, service, hash.0, refused.into())) as u8
    }

    #[inline(always)]
    fn learn(&self, hop: u64) -> u16 {
        barrier_var(map_learn(hop)) as u16
    }

    #[inline(always)]
    fn admit_source(&self, family: u8, source: u64) -> bool {
        barrier_var(map_admit_source(family.into(), source)) != 0
    }

    #[inline(always)]
    fn is_backend(&self, family: u8, address: [u64; 2], port: u16) -> bool {
        let [high, low] = address;
        barrier_var(map_is_backend(family.into(), high, low, port.into())) != 0
    }

    #[inline(always)]
    fn find_in<A: Family>(&self, query: &Query<A::Tuple>, candidates: u32, except: Slot) -> Found {
        let except = Found::new(except, Meta::FREE).word();
        let query = (&raw const *query).cast::<()>();
        Found::from_word(barrier_var(if A::NUMBER == family::IPV4 {
            flow4_find(query.cast(), candidates, except)
        } else {
            flow6_find(query.cast(), candidates, except)
        }))
    }

    #[inline(always)]
    fn claim_free<A: Family>(&self, query: &Query<A::Tuple>, claimer: &Claimer) -> Claim {
        let query = (&raw const *query).cast::<()>();
        Claim::from_word(barrier_var(if A::NUMBER == family::IPV4 {
            flow4_claim_free(query.cast(), claimer)
        } else {
            flow6_claim_free(query.cast(), claimer)
        }))
    }

    #[inline(always)]
    fn choose<A: Family>(&self, query: &Query<A::Tuple>, claimer: &Claimer) -> Choice {
        let query = (&raw const *query).cast::<()>();
        Choice::from_word(barrier_var(if A::NUMBER == family::IPV4 {
            flow4_choose(query.cast(), claimer)
        } else {
            flow6_choose(query.cast(), claimer)
        }))
    }

    #[inline(always)]
    fn take<A: Family>(&self, query: &Query<A::Tuple>, claimer: &Claimer, found: Found) -> Claim {
        let found = found.word();
        let query = (&raw const *query).cast::<()>();
        Claim::from_word(barrier_var(if A::NUMBER == family::IPV4 {
            flow4_take(query.cast(), claimer, found)
        } else {
            flow6_take(query.cast(), claimer, found)
        }))
    }

    #[inline(always)]
    fn client_event<A: Family>(
        &self,
        query: &Query<A::Tuple>,
        found: Found,
        segment: &Segment,
        service: u16,
    ) -> ClientAnswer {
        let [numbers, rest] = segment.words();
        let query = (&raw const *query).cast::<()>();
        ClientAnswer::from_word(barrier_var(if A::NUMBER == family::IPV4 {
            flow4_client_event(query.cast(), found.word(), numbers, rest, service.into())
        } else {
            flow6_client_event(query.cast(), found.word(), numbers, rest, service.into())
        }))
    }

    #[inline(always)]
    fn backend_event<A: Family>(&self, found: Found, segment: &Segment, service: u16) -> u64 {
        let [numbers, rest] = segment.words();
        barrier_var(if A::NUMBER == family::IPV4 {
            flow4_backend_event(found.word(), numbers, rest, service.into())
        } else {
            flow6_backend_event(found.word(), numbers, rest, service.into())
        })
    }

    #[inline(always)]
    fn tags(frame: &mut XdpFrame) -> u64 {
        barrier_var(frame_tags(frame.context()))
    }

    #[inline(always)]
    fn upper_layer(frame: &mut XdpFrame, transport: usize, next: u8) -> u64 {
        barrier_var(frame_upper_layer(frame.context(), transport as u64, next.into()))
    }

    #[inline(always)]
    fn option_sum(frame: &mut XdpFrame, offset: usize, end: usize) -> u64 {
        barrier_var(frame_option_sum(frame.context(), offset as u64, end as u64))
    }

    #[inline(always)]
    fn retag(frame: &mut XdpFrame, _: &Config, network: usize, kind: u16, interface: u16) -> bool {
        let (network, kind, interface) = (network as u64, kind.into(), interface.into());
        let done = barrier_var(frame_retag(frame.context(), network, kind, interface));
        frame.reload_bounds();
        done != 0
    }

    #[inline(always)]
    fn routed(&self, frame: &mut XdpFrame, family: u8, address: [u64; 2]) -> u64 {
        let [high, low] = address;
        barrier_var(frame_routed(frame.context(), family.into(), high, low))
    }

    #[inline(always)]
    fn has_socket<A: Family>(&self, frame: &mut XdpFrame) -> bool {
        let context = frame.context();
        barrier_var(if A::NUMBER == family::IPV4 {
            frame4_has_socket(context)
        } else {
            frame6_has_socket(context)
        }) != 0
    }

    #[inline(always)]
    fn segments<A: Family>(&self, frame: &mut XdpFrame, class: Class) -> Disposition {
        let (context, class) = (frame.context(), class.word());
        Disposition::from_word(barrier_var(if A::NUMBER == family::IPV4 {
            frame4_segments(context, class)
        } else {
            frame6_segments(context, class)
        }))
    }

    #[inline(always)]
    fn translate_icmp<A: Family>(&self, frame: &mut XdpFrame) -> Disposition {
        let context = frame.context();
        Disposition::from_word(barrier_var(if A::NUMBER == family::IPV4 {
            frame4_icmp(context)
        } else {
            frame6_icmp(context)
        }))
    }

    #[inline(always)]
    fn refuse<A: Family>(frame: &mut XdpFrame, refused: Disposition) -> Disposition {
        let (context, refused) = (frame.context(), refused.word());
        Disposition::from_word(barrier_var(if A::NUMBER == family::IPV4 {
            frame4_refuse(context, refused)
        } else {
            frame6_refuse(context, refused)
        }))
    }
}

/// See [`parse::tags`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn frame_tags(context: *mut xdp_md) -> u64 {
    parse::tags(&mut XdpFrame::new(context))
}

/// See [`parse::upper_layer`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn frame_upper_layer(context: *mut xdp_md, transport: u64, next: u64) -> u64 {
    let transport = transport as usize & 0x3fff;
    parse::upper_layer(&mut XdpFrame::new(context), transport, next as u8)
}

/// See [`parse::option_sum`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn frame_option_sum(context: *mut xdp_md, offset: u64, end: u64) -> u64 {
    let (offset, end) = (offset as usize & 0xff, end as usize & 0xff);
    parse::option_sum(&mut XdpFrame::new(context), offset, end)
}

/// See [`next_hop::routed`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn frame_routed(context: *mut xdp_md, family: u64, high: u64, low: u64) -> u64 {
    match KernelMaps::new().as_ref().and_then(KernelMaps::config) {
        Some(config) => next_hop::routed(&mut XdpFrame::new(context), config, family as u8, [high, low]),
        None => 0,
    }
}

/// See [`rewrite::retag`]: 1 or 0.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn frame_retag(context: *mut xdp_md, network: u64, kind: u64, interface: u64) -> u64 {
    match KernelMaps::new().as_ref().and_then(KernelMaps::config) {
        Some(config) => {
            let frame = &mut XdpFrame::new(context);
            rewrite::retag(frame, config, network as usize & 0xff, kind as u16, interface as u16).into()
        }
        None => 0,
    }
}

/// See [`destination::listener`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn map_listener(family: u64, high: u64, low: u64, port: u64) -> u64 {
    KernelMaps::new()
        .map_or(0, |maps| destination::listener(&maps, family as u8, [high, low], port as u16))
        .into()
}

/// See [`destination::snat_index`]; [`SNAT_ADDRESSES`] for none.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn map_snat_index(family_number: u64, high: u64, low: u64) -> u64 {
    let Some(maps) = KernelMaps::new() else {
        return SNAT_ADDRESSES as u64;
    };
    let index = if family_number == u64::from(family::IPV4) {
        destination::snat_index::<V4, _>(&maps, [high, low])
    } else {
        destination::snat_index::<V6, _>(&maps, [high, low])
    };
    index.map_or(SNAT_ADDRESSES as u64, u64::from)
}

/// See [`destination::arrival`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn map_arrival(interface: u64, vlan: u64, mac: u64) -> u64 {
    match KernelMaps::new() {
        Some(maps) => destination::arrival(&maps, interface as u32, vlan as u32, mac).word(),
        None => Arrival::UNKNOWN.word(),
    }
}

/// See [`forward::another`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn map_another(family_number: u64, service: u64, hash: u64, refused: u64) -> u64 {
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
extern "C" fn map_learn(hop: u64) -> u64 {
    KernelMaps::new().map_or(0, |maps| next_hop::learn(&maps, hop)).into()
}

/// See [`source_budget::admit`]: 1 or 0.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn map_admit_source(family: u64, source: u64) -> u64 {
    KernelMaps::new().is_none_or(|maps| source_budget::admit(&maps, family as u8, source)).into()
}

/// See [`reply::is_backend`]: 1 or 0.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn map_is_backend(family: u64, high: u64, low: u64, port: u64) -> u64 {
    KernelMaps::new()
        .is_some_and(|maps| reply::is_backend(&maps, family as u8, [high, low], port as u16))
        .into()
}

macro_rules! subprograms {
    (
        $family:ty, $find:ident, $free:ident, $choose:ident, $take:ident, $client_event:ident, $backend_event:ident,
        $segments:ident, $icmp:ident, $refuse:ident, $has_socket:ident
    ) => {
        /// See [`pipeline::segments`].
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $segments(context: *mut xdp_md, class: u64) -> u64 {
            let Some(maps) = KernelMaps::new() else {
                return Disposition::NOT_OURS.word();
            };
            let class = Class::from_word(class);
            pipeline::segments::<$family, _>(&mut XdpFrame::new(context), &maps, class).word()
        }

        /// See [`icmp::translate`].
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $icmp(context: *mut xdp_md) -> u64 {
            let Some(maps) = KernelMaps::new() else {
                return Disposition::NOT_OURS.word();
            };
            icmp::translate::<$family, _>(&mut XdpFrame::new(context), &maps).word()
        }

        /// See [`refuse::answer`].
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $refuse(context: *mut xdp_md, refused: u64) -> u64 {
            refuse::answer::<$family, KernelMaps>(
                &mut XdpFrame::new(context),
                Disposition::from_word(refused),
            )
            .word()
        }

        /// See [`host_socket::has_socket`]: 1 or 0.
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $has_socket(context: *mut xdp_md) -> u64 {
            let frame = &mut XdpFrame::new(context);
            connection::<$family, KernelMaps>(frame)
                .is_some_and(|it| host_socket::has_socket::<$family>(context, &it))
                .into()
        }

        /// See [`client_event`]; `found`, the segment and the result are packed.
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $client_event(
            query: *const Query<<$family as Family>::Tuple>,
            found: u64,
            numbers: u64,
            rest: u64,
            service: u64,
        ) -> u64 {
            // SAFETY: null, or the caller's structure.
            let (Some(query), Some(maps)) = (unsafe { query.as_ref() }, KernelMaps::new()) else {
                return 0;
            };
            let segment = Segment::from_words([numbers, rest]);
            client_event::<$family, _>(&maps, query, Found::from_word(found), &segment, service as u16).word()
        }

        /// See [`backend_event`]; `found` and the segment are packed.
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $backend_event(found: u64, numbers: u64, rest: u64, service: u64) -> u64 {
            let Some(maps) = KernelMaps::new() else {
                return 0;
            };
            let segment = Segment::from_words([numbers, rest]);
            backend_event::<$family, _>(&maps, Found::from_word(found), &segment, service as u16)
        }

        /// See [`find_in`]; `except` and the result are packed.
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $find(
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
        extern "C" fn $free(query: *const Query<<$family as Family>::Tuple>, claimer: *const Claimer) -> u64 {
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
        extern "C" fn $choose(
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
        extern "C" fn $take(
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
    flow4_client_event,
    flow4_backend_event,
    frame4_segments,
    frame4_icmp,
    frame4_refuse,
    frame4_has_socket
);
subprograms!(
    V6,
    flow6_find,
    flow6_claim_free,
    flow6_choose,
    flow6_take,
    flow6_client_event,
    flow6_backend_event,
    frame6_segments,
    frame6_icmp,
    frame6_refuse,
    frame6_has_socket
);
