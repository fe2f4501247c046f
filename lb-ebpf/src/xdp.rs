//! From outcome to XDP action.

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX},
    helpers::bpf_redirect,
    programs::XdpContext,
};
use lb_common::{
    maps::Maps as _,
    outcome::Action,
    process::{Done, process},
};

use crate::{frame::XdpFrame, maps::KernelMaps};

/// Takes a packet to its end: decides, counts, and says what the kernel is to do.
#[inline(always)]
pub fn handle(context: &XdpContext) -> u32 {
    let done = process(&mut XdpFrame::new(context), &KernelMaps);
    KernelMaps.count_place(done.service(), done.outcome_index());
    action(context, done)
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
