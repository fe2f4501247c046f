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
    match link.kind {
        IPV4 => match classify::<V4, _, _>(frame, &maps, &link) {
            Class::NOT_OURS => Done::NOT_OURS,
            class => finish4(context, done(subprograms::frame4_segments(context.ctx, class.word()))),
        },
        IPV6 => match classify::<V6, _, _>(frame, &maps, &link) {
            Class::NOT_OURS => Done::NOT_OURS,
            class => finish6(context, done(subprograms::frame6_segments(context.ctx, class.word()))),
        },
        _ => Done::NOT_OURS,
    }
}

/// What [`lb_common::process::segments`] has left to others.
#[inline(always)]
fn finish4(context: &XdpContext, segment: Done) -> Done {
    match segment {
        Done::ICMP => done(subprograms::frame4_icmp(context.ctx)),
        refused if refused.is_refused() => done(subprograms::frame4_refuse(context.ctx, refused.word())),
        segment => segment,
    }
}

/// The same for IPv6.
#[inline(always)]
fn finish6(context: &XdpContext, segment: Done) -> Done {
    match segment {
        Done::ICMP => done(subprograms::frame6_icmp(context.ctx)),
        refused if refused.is_refused() => done(subprograms::frame6_refuse(context.ctx, refused.word())),
        segment => segment,
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
