//! The kernel's table of sockets.

use aya_ebpf::{
    bindings::{bpf_sock_tuple, xdp_md},
    helpers::{bpf_sk_release, bpf_skc_lookup_tcp},
};
use lb_common::{
    flow::Family,
    host_socket::{Connection, lives},
    layout::family,
};

/// The network namespace of the interface that the packet came in by (`BPF_F_CURRENT_NETNS`).
const THIS_NETWORK: u64 = u64::MAX;

/// The kernel's `struct bpf_sock_tuple`, for IPv4.
#[repr(C)]
struct Ends4 {
    source: u32,
    destination: u32,
    ports: [u16; 2],
}

/// The same for IPv6. The kernel's ends after the ports.
#[repr(C)]
struct Ends6 {
    source: [u64; 2],
    destination: [u64; 2],
    ports: [u16; 2],
    unused: u32,
}

const LENGTH6: usize = core::mem::offset_of!(Ends6, unused);

/// Does a socket of this host have this connection?
#[inline(always)]
pub fn has_socket<A: Family>(context: *mut xdp_md, connection: &Connection) -> bool {
    let Connection { source, destination, ports } = *connection;
    let ports = [ports.source, ports.destination];
    if A::NUMBER == family::IPV4 {
        let mut ends = Ends4 { source: source[0] as u32, destination: destination[0] as u32, ports };
        look_up(context, (&raw mut ends).cast(), size_of::<Ends4>())
    } else {
        let mut ends = Ends6 { source, destination, ports, unused: 0 };
        look_up(context, (&raw mut ends).cast(), LENGTH6)
    }
}

#[inline(always)]
fn look_up(context: *mut xdp_md, ends: *mut bpf_sock_tuple, length: usize) -> bool {
    // SAFETY: our own context, and a tuple with its true size. A socket that was found is given back, and not used afterwards.
    unsafe {
        let socket = bpf_skc_lookup_tcp(context.cast(), ends, length as u32, THIS_NETWORK, 0);
        if socket.is_null() {
            return false;
        }
        let state = (&raw const (*socket).state).read_volatile();
        bpf_sk_release(socket.cast());
        lives(state)
    }
}
