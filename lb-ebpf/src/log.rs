//! A sampled log of packets, for a look at a data path that misbehaves. Off unless it is asked for, and then the verifier
//! takes it out of the program: [`LOG_MASK`] is a constant by the time it sees it.

use aya_ebpf::{Global, bindings::xdp_md, helpers::bpf_get_prandom_u32, programs::XdpContext};
use aya_log_ebpf::info;
use lb_common::disposition::Disposition;

use crate::barrier::barrier_var;

/// One packet in this many and one, a power of two; `u32::MAX`: none.
#[unsafe(no_mangle)]
static LOG_MASK: Global<u32> = Global::new(u32::MAX);

/// Logs what became of a packet, now and then.
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
