//! The object that the daemon loads.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::{
        bindings::xdp_action::XDP_PASS,
        macros::{cgroup_sock_addr, sock_ops, xdp},
        programs::{SockAddrContext, SockOpsContext, XdpContext},
    };
    use lb_ebpf::{connect, follow};

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

    /// The connect hook, on a cgroup: connections of processes on this host.
    #[cgroup_sock_addr(connect4)]
    fn connect4(context: SockAddrContext) -> i32 {
        connect::connect4(&context)
    }

    /// The same for IPv6 sockets.
    #[cgroup_sock_addr(connect6)]
    fn connect6(context: SockAddrContext) -> i32 {
        connect::connect6(&context)
    }

    /// Shows a process that was redirected the address that it asked for.
    #[cgroup_sock_addr(getpeername4)]
    fn getpeername4(context: SockAddrContext) -> i32 {
        connect::getpeername4(&context)
    }

    /// The same for IPv6 sockets.
    #[cgroup_sock_addr(getpeername6)]
    fn getpeername6(context: SockAddrContext) -> i32 {
        connect::getpeername6(&context)
    }

    /// Follows the sockets that were redirected until they are closed.
    #[sock_ops]
    fn follow_sockets(context: SockOpsContext) -> u32 {
        follow::socket_event(&context)
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
