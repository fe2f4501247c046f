//! A sampled log of packets, to examine a data path that misbehaves. It is off by default, and then the verifier removes it
//! from the program: [`LOG_MASK`] is a constant when the verifier sees it.

use aya_ebpf::{Global, bindings::xdp_md, helpers::bpf_get_prandom_u32, programs::XdpContext};
use aya_log_ebpf::info;
use lb_common::disposition::Disposition;

use crate::barrier::barrier_var;

/// One less than the power of two of which one packet is logged; `u32::MAX`: none.
#[unsafe(no_mangle)]
static LOG_MASK: Global<u32> = Global::new(u32::MAX);

/// Logs the disposition of a sample of packets.
#[inline(always)]
pub fn sample(context: &XdpContext, done: Disposition) {
    if LOG_MASK.load() != u32::MAX {
        barrier_var(log_packet(context.ctx, done.word()));
    }
}

/// A function of its own: its stack is not the established path's.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn log_packet(context: *mut xdp_md, done: u64) -> u64 {
    // SAFETY: a helper that takes nothing.
    if unsafe { bpf_get_prandom_u32() } & LOG_MASK.load() == 0 {
        let (context, done) = (XdpContext::new(context), Disposition::from_word(done));
        let from = context.ingress_ifindex() as u32;
        info!(
            &context,
            "outcome {} service {} in {} out {}",
            done.outcome_index(),
            done.service(),
            from,
            done.interface()
        );
    }
    0
}
