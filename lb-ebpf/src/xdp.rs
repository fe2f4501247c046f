//! From outcome to XDP action.

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX},
    helpers::bpf_redirect,
    programs::XdpContext,
};
use lb_common::{
    headers::{IPV4, IPV6},
    maps::Maps as _,
    outcome::Action,
    parse,
    process::Done,
};

use crate::{
    frame::XdpFrame,
    maps::KernelMaps,
    subprograms::{self, laundered},
};

/// Takes a packet to its end: decides, counts, and says what the kernel is to do.
#[inline(always)]
pub fn handle(context: &XdpContext) -> u32 {
    let done = process(context);
    KernelMaps.count_place(done.service(), done.outcome_index());
    action(context, done)
}

/// [`lb_common::process()`], each step in a function that the verifier looks at on its own.
#[inline(always)]
fn process(context: &XdpContext) -> Done {
    let Some(link) = parse::link(&mut XdpFrame::new(context)) else {
        return Done::NOT_OURS;
    };
    let done = match link.kind {
        IPV4 => subprograms::frame4_segments(context.ctx),
        IPV6 => subprograms::frame6_segments(context.ctx),
        _ => return Done::NOT_OURS,
    };
    match Done::from_word(laundered(done)) {
        Done::ICMP if link.kind == IPV4 => Done::from_word(laundered(subprograms::frame4_icmp(context.ctx))),
        Done::ICMP => Done::from_word(laundered(subprograms::frame6_icmp(context.ctx))),
        done => done,
    }
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
