//! The object that the daemon loads.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::{bindings::xdp_action::XDP_PASS, macros::xdp, programs::XdpContext};

    /// The load balancer, on every interface that clients or backends are reached by.
    #[xdp(frags)]
    #[inline(always)]
    fn sheave(context: XdpContext) -> u32 {
        lb_ebpf::xdp::handle(&context)
    }

    /// Run by the daemon, attached to nothing: reads the clock that slots are dated by. It is not the daemon's, and
    /// cannot be computed from it.
    #[xdp]
    fn read_clock(_: XdpContext) -> u32 {
        lb_ebpf::maps::store_clock();
        XDP_PASS
    }

    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 4] = *b"GPL\0";

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        loop {}
    }
}

/// Nothing: the host builds this crate only to lint it.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
