//! From outcome to XDP action.

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX},
    helpers::bpf_redirect,
    programs::XdpContext,
};
use lb_common::{
    flow::{V4, V6},
    headers::{IPV4, IPV6},
    maps::Maps as _,
    outcome::Action,
    parse,
    process::{Done, Glance, glance},
};

use crate::{
    frame::XdpFrame,
    log,
    maps::KernelMaps,
    subprograms::{self, laundered},
};

/// Takes a packet to its end: decides, counts, and says what the kernel is to do.
#[inline(always)]
pub fn handle(context: &XdpContext) -> u32 {
    let done = process(context);
    // What is not ours costs as little as possible: not even a count.
    if done != Done::NOT_OURS {
        KernelMaps.count_place(done.service(), done.outcome_index());
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
    let frame = &mut XdpFrame::new(context);
    let ipv4 = link.kind == IPV4;
    let glance = match link.kind {
        IPV4 => glance::<V4, _, _>(frame, &KernelMaps, &link),
        IPV6 => glance::<V6, _, _>(frame, &KernelMaps, &link),
        _ => Glance::NOT_OURS,
    };
    if glance == Glance::NOT_OURS {
        return Done::NOT_OURS;
    }
    let done = if ipv4 {
        subprograms::frame4_segments(context.ctx, glance.word())
    } else {
        subprograms::frame6_segments(context.ctx, glance.word())
    };
    let done = Done::from_word(laundered(done));
    let done = match done {
        Done::ICMP if ipv4 => subprograms::frame4_icmp(context.ctx),
        Done::ICMP => subprograms::frame6_icmp(context.ctx),
        done if done.is_refused() && ipv4 => subprograms::frame4_refuse(context.ctx, done.word()),
        done if done.is_refused() => subprograms::frame6_refuse(context.ctx, done.word()),
        done => return done,
    };
    Done::from_word(laundered(done))
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
