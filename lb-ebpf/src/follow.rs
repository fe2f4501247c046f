//! Counts the sockets that the connect hook has redirected, from their SYN until they are closed.
//!
//! The kernel runs this program at certain events of every TCP socket of the cgroup (`struct bpf_sock_ops` in the kernel's
//! `include/uapi/linux/bpf.h`). Of other sockets it sees the connect and a few more events, and leaves them as they are. For
//! our sockets it asks for every change of state.
//!
//! It always answers 1, and never writes `reply`: what another program on the cgroup has answered stands.

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_RTO_CB, BPF_SOCK_OPS_RTO_CB_FLAG, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE, BPF_TCP_SYN_SENT, bpf_sock, bpf_sock_ops,
    },
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sk_storage_get, bpf_sock_ops_cb_flags_set},
    programs::SockOpsContext,
};
use lb_common::{
    connect::{joined, mapped, split},
    layout::{Backend, Dialled, Followed, family},
    maps::Maps as _,
    outcome::Event,
};

use crate::{
    connect::{DIALLED, HOOK},
    maps::{self, KernelMaps},
};

/// Leaves the answers of other programs as they are.
const NOTHING_TO_SAY: u32 = 1;
/// The events of a socket of ours: each change of its state, and each retransmission timeout.
const MOMENTS: u32 = BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTO_CB_FLAG;
/// `AF_INET`.
const AF_INET: u32 = 2;

/// A socket in the middle of an event.
#[derive(Clone, Copy)]
struct Socket(*mut bpf_sock_ops);

/// As for the connect hook, the fields may only be read one by one: so all of it is volatile.
impl Socket {
    #[inline(always)]
    fn event(self) -> u32 {
        // SAFETY: the kernel's context, readable here.
        unsafe { (&raw const (*self.0).op).read_volatile() }
    }

    /// The state that a change of state begins in.
    #[inline(always)]
    fn state_before(self) -> u32 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).__bindgen_anon_1.args[0]).read_volatile() }
    }

    /// The state that a change of state leads to.
    #[inline(always)]
    fn next_state(self) -> u32 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).__bindgen_anon_1.args[1]).read_volatile() }
    }

    /// Null, or the kernel's socket.
    #[inline(always)]
    fn kernel_socket(self) -> *mut bpf_sock {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).__bindgen_anon_2.sk).read_volatile() }
    }

    /// The connect hook's record of it; None: it is not ours.
    #[inline(always)]
    fn dialled(self) -> Option<&'static mut Dialled> {
        let socket = self.kernel_socket();
        if socket.is_null() {
            return None;
        }
        let map = (&raw const DIALLED).cast_mut().cast();
        // SAFETY: null, or the socket's own storage, which lives as long as the socket, which is locked.
        unsafe { bpf_sk_storage_get(map, socket.cast(), core::ptr::null_mut(), 0).cast::<Dialled>().as_mut() }
    }

    /// Forgets the connect hook's record. What [`Socket::dialled`] has returned is no longer valid.
    #[inline(always)]
    fn forget_dialled(self) {
        let socket = self.kernel_socket();
        if !socket.is_null() {
            // SAFETY: the kernel's socket, which is locked. There may be nothing to forget.
            let _ = unsafe { DIALLED.delete(socket) };
        }
    }

    #[inline(always)]
    fn is_ipv4(self) -> bool {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).family).read_volatile() == AF_INET }
    }

    #[inline(always)]
    fn local_ip4(self) -> u32 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).local_ip4).read_volatile() }
    }

    #[inline(always)]
    fn remote_ip4(self) -> u32 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).remote_ip4).read_volatile() }
    }

    #[inline(always)]
    fn local_ip6(self) -> [u64; 2] {
        // SAFETY: as above.
        unsafe {
            joined([
                (&raw const (*self.0).local_ip6[0]).read_volatile(),
                (&raw const (*self.0).local_ip6[1]).read_volatile(),
                (&raw const (*self.0).local_ip6[2]).read_volatile(),
                (&raw const (*self.0).local_ip6[3]).read_volatile(),
            ])
        }
    }

    #[inline(always)]
    fn remote_ip6(self) -> [u64; 2] {
        // SAFETY: as above.
        unsafe {
            joined([
                (&raw const (*self.0).remote_ip6[0]).read_volatile(),
                (&raw const (*self.0).remote_ip6[1]).read_volatile(),
                (&raw const (*self.0).remote_ip6[2]).read_volatile(),
                (&raw const (*self.0).remote_ip6[3]).read_volatile(),
            ])
        }
    }

    /// The port of its own, as a word. (The kernel shows this one as a number.)
    #[inline(always)]
    fn local_port(self) -> u16 {
        // SAFETY: as above.
        unsafe { ((&raw const (*self.0).local_port).read_volatile() as u16).to_be() }
    }

    /// The other end's port, as a word: in the upper half of what the kernel shows, in network byte order.
    #[inline(always)]
    fn remote_port(self) -> u16 {
        // SAFETY: as above.
        let shown = unsafe { (&raw const (*self.0).remote_port).read_volatile() };
        (u32::from_be(shown) as u16).to_be()
    }

    /// The interface it is bound to, or 0.
    #[inline(always)]
    fn interface(self) -> u32 {
        let socket = self.kernel_socket();
        if socket.is_null() {
            return 0;
        }
        // SAFETY: the kernel's socket, readable here.
        unsafe { (&raw const (*socket).bound_dev_if).read_volatile() }
    }

    #[inline(always)]
    fn cookie(self) -> u64 {
        // SAFETY: the helper takes the kernel's context.
        unsafe { bpf_get_socket_cookie(self.0.cast()) }
    }

    #[inline(always)]
    fn network(self) -> u64 {
        // SAFETY: as above.
        unsafe { bpf_get_netns_cookie(self.0.cast()) }
    }

    /// Asks the kernel for these events as well, beside those that other programs have asked for.
    #[inline(always)]
    fn listen_to(self, flags: u32) -> bool {
        // SAFETY: as above.
        unsafe {
            let others = (&raw const (*self.0).bpf_sock_ops_cb_flags).read_volatile();
            bpf_sock_ops_cb_flags_set(self.0, (others | flags) as i32) == 0
        }
    }

    /// Both ends, as they are on the wire.
    #[inline(always)]
    fn ends(self) -> Ends {
        let remote = self.remote_ip6();
        let [.., last] = split(remote);
        if self.is_ipv4() || remote == mapped(last) {
            return Ends {
                family: family::IPV4,
                local: [self.local_ip4().into(), 0],
                remote: [self.remote_ip4().into(), 0],
            };
        }
        Ends { family: family::IPV6, local: self.local_ip6(), remote }
    }
}

/// A socket's addresses, as words.
struct Ends {
    family: u8,
    local: [u64; 2],
    remote: [u64; 2],
}

/// An event in the life of a socket of this cgroup.
#[inline(always)]
pub fn socket_event(context: &SockOpsContext) -> u32 {
    let socket = Socket(context.ops);
    match socket.event() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => begin(socket),
        BPF_SOCK_OPS_STATE_CB => change(socket),
        BPF_SOCK_OPS_RTO_CB => unanswered(socket),
        _ => {}
    }
    NOTHING_TO_SAY
}

/// Its SYN is about to be sent: its address and ports are chosen.
#[inline(always)]
fn begin(socket: Socket) {
    let Some(dialled) = socket.dialled() else {
        return;
    };
    let (Some(hook), Some(maps)) = (HOOK.get(0), KernelMaps::new()) else {
        return;
    };
    let Some(backend) = maps.backend(dialled.backend as u8) else {
        return;
    };
    let ends = socket.ends();
    if !goes_to(&ends, socket.remote_port(), backend) {
        return socket.forget_dialled();
    }
    let epoch = hook.epoch;
    if epoch.is_multiple_of(2) || !socket.listen_to(MOMENTS) {
        return;
    }
    dialled.followed = epoch;
    let id = dialled.backend as u8;
    maps::count_opened(id);
    let followed = Followed {
        network: socket.network(),
        local: ends.local,
        remote: ends.remote,
        local_port: socket.local_port(),
        remote_port: backend.port,
        interface: socket.interface(),
        service: dialled.service,
        backend: id,
        family: ends.family,
        reserved: 0,
    };
    if maps::name_socket(socket.cookie(), &followed) {
        dialled.named = 1;
    } else {
        maps::count_connect(dialled.service, Event::ConnectUnnamed);
    }
}

/// Its state changes.
#[inline(always)]
fn change(socket: Socket) {
    if socket.next_state() != BPF_TCP_CLOSE {
        return;
    }
    let (Some(dialled), Some(hook)) = (socket.dialled(), HOOK.get(0)) else {
        return;
    };
    let (backend, followed, named) = (dialled.backend as u8, dialled.followed, dialled.named);
    // A socket that was refused, or closed, can be connected again. Where that goes to a listener it is ours again; else it
    // must not be ours, even if it goes to the backend that it was sent to before.
    socket.forget_dialled();
    if followed == 0 || followed != hook.epoch {
        return;
    }
    // The daemon has counted the end of those that it has taken out.
    if named == 0 || maps::forget_socket(socket.cookie()) {
        maps::count_closed(backend);
    }
    // It was refused, has waited too long, or the process has given it up.
    if socket.state_before() == BPF_TCP_SYN_SENT {
        suspect(backend);
    }
}

/// A SYN, or data, was not acknowledged in time, and is sent again. (In the kernel: `tcp_write_timeout`.)
#[inline(always)]
fn unanswered(socket: Socket) {
    let (Some(dialled), Some(hook)) = (socket.dialled(), HOOK.get(0)) else {
        return;
    };
    if dialled.followed != 0 && dialled.followed == hook.epoch {
        suspect(dialled.backend as u8);
    }
}

/// Notes that a connection to a backend has failed, as the XDP program does when a SYN is refused. The daemon then checks
/// the backend at once; nothing is decided here.
#[inline(always)]
fn suspect(backend: u8) {
    if let Some(backend) = KernelMaps::new().as_ref().and_then(|maps| maps.backend(backend)) {
        // 0 would say: never.
        backend.refused.store((maps::jiffies() as u32).max(1));
    }
}

/// Does the socket connect to the backend that the hook chose? A process may have been delayed for so long between the two
/// that the backend's id belongs to another address. And the connection
/// that was redirected may have failed before its SYN, for want of a route or a port, so that no event told of its end: then
/// this one goes elsewhere. (If it goes to that same backend by its own address, it is taken for ours. To find that out each
/// connect to an address that is no listener's would pay for a look at its socket.)
#[inline(always)]
fn goes_to(ends: &Ends, port: u16, backend: &Backend) -> bool {
    ends.family == backend.family && ends.remote == backend.address && port == backend.port
}
