//! From outcome to XDP action.

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX},
    helpers::bpf_redirect,
    programs::XdpContext,
};
use lb_common::{
    flow::{V4, V6},
    headers::{IPV4, IPV6},
    outcome::Action,
    parse,
    process::{Class, Done, classify},
};

use crate::{
    frame::XdpFrame,
    log,
    maps::{self, KernelMaps},
    subprograms::{self, laundered},
};

/// Takes a packet to its end: decides, counts, and says what the kernel is to do.
#[inline(always)]
pub fn handle(context: &XdpContext) -> u32 {
    let done = process(context);
    // What is not ours costs as little as possible: not even a count.
    if done != Done::NOT_OURS {
        maps::count(done.service(), done.outcome_index());
        log::sample(context, done);
    }
    action(context, done)
}

/// [`lb_common::process()`], each step in a function that the verifier looks at on its own.
#[inline(always)]
fn process(context: &XdpContext) -> Done {
    let Some(link) = parse::link(&mut XdpFrame::new(context)) else {
        return Done::NOT_OURS;
    };
    let Some(maps) = KernelMaps::new() else {
        return Done::NOT_OURS;
    };
    let frame = &mut XdpFrame::new(context);
    // A way of its own for each family: to ask again which one it is costs every packet.
    match link.kind {
        IPV4 => match classify::<V4, _, _>(frame, &maps, &link) {
            Class::NOT_OURS => Done::NOT_OURS,
            class => finish(
                subprograms::frame4_segments(context.ctx, class.word()),
                || subprograms::frame4_icmp(context.ctx),
                |refused| subprograms::frame4_refuse(context.ctx, refused),
            ),
        },
        IPV6 => match classify::<V6, _, _>(frame, &maps, &link) {
            Class::NOT_OURS => Done::NOT_OURS,
            class => finish(
                subprograms::frame6_segments(context.ctx, class.word()),
                || subprograms::frame6_icmp(context.ctx),
                |refused| subprograms::frame6_refuse(context.ctx, refused),
            ),
        },
        _ => Done::NOT_OURS,
    }
}

/// What [`lb_common::process::segments`], whose result `segments` is, has left to others.
#[inline(always)]
fn finish(segments: u64, icmp: impl FnOnce() -> u64, refuse: impl FnOnce(u64) -> u64) -> Done {
    match done(segments) {
        Done::ICMP => done(icmp()),
        refused if refused.is_refused() => done(refuse(refused.word())),
        finished => finished,
    }
}

/// A subprogram's result.
#[inline(always)]
fn done(word: u64) -> Done {
    Done::from_word(laundered(word))
}

#[inline(always)]
fn action(context: &XdpContext, done: Done) -> u32 {
    match done.action() {
        Action::Pass => XDP_PASS,
        Action::Drop => XDP_DROP,
        Action::Transmit if done.interface() == context.ingress_ifindex() as u32 => XDP_TX,
        // SAFETY: a helper that takes two numbers.
        Action::Transmit => match unsafe { bpf_redirect(done.interface(), 0) } {
            result if result == i64::from(XDP_REDIRECT) => XDP_REDIRECT,
            _ => XDP_DROP,
        },
    }
}
