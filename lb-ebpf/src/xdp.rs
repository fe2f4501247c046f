//! From a packet's disposition to the XDP action.

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX},
    helpers::bpf_redirect,
    programs::XdpContext,
};
use lb_common::{destination::bond_of, disposition::Disposition, maps::Maps as _, outcome::Action, pipeline};

use crate::{
    frame::XdpFrame,
    log,
    maps::{self, KernelMaps},
};

/// Takes a packet to its end: decides, counts, and says what the kernel is to do.
#[inline(always)]
pub fn handle(context: &XdpContext) -> u32 {
    let Some(maps) = KernelMaps::new() else {
        return XDP_PASS;
    };
    let disposition = pipeline::pipeline(&mut XdpFrame::new(context.ctx), &maps);
    // What is not ours costs as little as possible: not even a count.
    if disposition != Disposition::NOT_OURS {
        maps::count(disposition.service(), disposition.outcome_index());
        log::sample(context, disposition);
    }
    action(context, &maps, disposition)
}

#[inline(always)]
fn action(context: &XdpContext, maps: &KernelMaps, disposition: Disposition) -> u32 {
    match disposition.action() {
        Action::Pass => XDP_PASS,
        Action::Drop => XDP_DROP,
        Action::Transmit if leaves_as_it_came(context, maps, disposition.interface()) => XDP_TX,
        // SAFETY: a helper that takes two numbers.
        Action::Transmit => match unsafe { bpf_redirect(disposition.interface(), 0) } {
            result if result == i64::from(XDP_REDIRECT) => XDP_REDIRECT,
            _ => XDP_DROP,
        },
    }
}

/// Does a packet leave by the interface that it came in by? Of a bond, the kernel chooses the member.
#[inline(always)]
fn leaves_as_it_came(context: &XdpContext, maps: &KernelMaps, interface: u32) -> bool {
    let came_by = context.ingress_ifindex() as u32;
    came_by == interface || maps.config().is_some_and(|config| bond_of(config, came_by) == interface)
}
