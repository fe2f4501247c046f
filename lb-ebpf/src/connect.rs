//! The connect hook: cgroup programs that send a process's connection to a listener on to a backend, and go on showing
//! the process the address that it asked for.
//!
//! They run in the system call, before a route or a port is chosen (`bpf-docs.readthedocs.io`, program type
//! `BPF_PROG_TYPE_CGROUP_SOCK_ADDR`; `tcp_v4_pre_connect` in the kernel's `net/ipv4/tcp_ipv4.c`). A connection
//! to an address that is no listener's costs one array look-up, and on a listener's port a comparison or two.

use core::ptr;

use aya_ebpf::{
    Global,
    bindings::{BPF_F_MMAPABLE, bpf_sock_addr},
    btf_maps::{Array, SkStorage},
    helpers::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_set_retval},
    macros::btf_map,
    programs::SockAddrContext,
};
use lb_common::{
    connect::{self, Verdict, joined, mapped, split},
    headers::protocol,
    layout::{Dialled, Hook, family},
    maps::Maps as _,
    outcome::Event,
};

use crate::{
    barrier::barrier_var,
    maps::{KernelMaps, count_connect},
};

/// Lets the system call go on.
const PROCEED: i32 = 1;
/// Ends it with the error that was set, `EPERM` if none was.
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;
/// `SOCK_STREAM`: sockets of other types have other protocols, or none.
const STREAM: u32 = 1;

#[btf_map]
pub(crate) static HOOK: Array<Hook, 1, { BPF_F_MMAPABLE as usize }> = Array::new();
/// What each redirected socket asked for. Goes when it is closed: it may be connected elsewhere then, which is not ours.
#[btf_map]
pub(crate) static DIALLED: SkStorage<Dialled> = SkStorage::new();

/// Not 0: the kernel lets a program choose the error (`bpf_set_retval`, for these programs since Linux 6.0). Else a
/// connection is refused by sending it to port 0, where no socket can listen.
#[unsafe(no_mangle)]
static SET_ERROR: Global<u32> = Global::new(1);

/// The socket's address as the process gave it, and as it goes on.
#[derive(Clone, Copy)]
struct Address(*mut bpf_sock_addr);

/// The fields of the context may only be read and written one by one, as words of four bytes: so all of it is volatile.
impl Address {
    #[inline(always)]
    fn new(context: &SockAddrContext) -> Self {
        Self(context.sock_addr)
    }

    #[inline(always)]
    fn is_tcp(self) -> bool {
        // SAFETY: the kernel's context, readable here.
        unsafe {
            (&raw const (*self.0).type_).read_volatile() == STREAM
                && (&raw const (*self.0).protocol).read_volatile() == u32::from(protocol::TCP)
        }
    }

    /// The port, as a word.
    #[inline(always)]
    fn port(self) -> u16 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).user_port).read_volatile() as u16 }
    }

    #[inline(always)]
    fn set_port(self, port: u16) {
        // SAFETY: writable in programs of these types.
        unsafe { (&raw mut (*self.0).user_port).write_volatile(port.into()) }
    }

    #[inline(always)]
    fn v4(self) -> u32 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).user_ip4).read_volatile() }
    }

    #[inline(always)]
    fn set_v4(self, address: u32) {
        // SAFETY: as above.
        unsafe { (&raw mut (*self.0).user_ip4).write_volatile(address) }
    }

    #[inline(always)]
    fn v6(self) -> [u32; 4] {
        // SAFETY: as above.
        unsafe {
            [
                (&raw const (*self.0).user_ip6[0]).read_volatile(),
                (&raw const (*self.0).user_ip6[1]).read_volatile(),
                (&raw const (*self.0).user_ip6[2]).read_volatile(),
                (&raw const (*self.0).user_ip6[3]).read_volatile(),
            ]
        }
    }

    #[inline(always)]
    fn set_v6(self, address: [u32; 4]) {
        // SAFETY: as above.
        unsafe {
            (&raw mut (*self.0).user_ip6[0]).write_volatile(address[0]);
            (&raw mut (*self.0).user_ip6[1]).write_volatile(address[1]);
            (&raw mut (*self.0).user_ip6[2]).write_volatile(address[2]);
            (&raw mut (*self.0).user_ip6[3]).write_volatile(address[3]);
        }
    }
}

/// `connect(2)` of an IPv4 socket.
#[inline(always)]
pub fn connect4(context: &SockAddrContext) -> i32 {
    let address = Address::new(context);
    let Some(maps) = KernelMaps::new() else {
        return PROCEED;
    };
    let first = maps.first_listener(u16::from_be(address.port()));
    if first == 0 {
        return PROCEED;
    }
    let dialled = address.v4();
    let verdict = decide(context, &maps, first, family::IPV4, [dialled.into(), 0]);
    if verdict == Verdict::NOT_OURS {
        return PROCEED;
    }
    if verdict.is_refused() {
        return refuse(address, |address| address.set_v4(u32::from_ne_bytes([127, 0, 0, 1])));
    }
    let Some(backend) = maps.backend(verdict.backend()) else {
        return PROCEED;
    };
    remember(context, verdict, [dialled.into(), 0], backend.address, backend.port);
    address.set_v4(backend.address[0] as u32);
    address.set_port(backend.port);
    PROCEED
}

/// `connect(2)` of an IPv6 socket, which may name an IPv4 address.
#[inline(always)]
pub fn connect6(context: &SockAddrContext) -> i32 {
    let address = Address::new(context);
    let Some(maps) = KernelMaps::new() else {
        return PROCEED;
    };
    let first = maps.first_listener(u16::from_be(address.port()));
    if first == 0 {
        return PROCEED;
    }
    let dialled = joined(address.v6());
    let [.., ipv4] = split(dialled);
    let is_mapped = dialled == mapped(ipv4);
    let verdict = if is_mapped {
        decide(context, &maps, first, family::IPV4, [ipv4.into(), 0])
    } else {
        decide(context, &maps, first, family::IPV6, dialled)
    };
    if verdict == Verdict::NOT_OURS {
        return PROCEED;
    }
    if verdict.is_refused() {
        return refuse(address, |address| address.set_v6([0, 0, 0, 1u32.to_be()]));
    }
    let Some(backend) = maps.backend(verdict.backend()) else {
        return PROCEED;
    };
    let chosen = if is_mapped { mapped(backend.address[0] as u32) } else { backend.address };
    remember(context, verdict, dialled, chosen, backend.port);
    address.set_v6(split(chosen));
    address.set_port(backend.port);
    PROCEED
}

/// `getpeername(2)` of an IPv4 socket.
#[inline(always)]
pub fn getpeername4(context: &SockAddrContext) -> i32 {
    let address = Address::new(context);
    if let Some(dialled) = dialled(context)
        && dialled.chosen[0] as u32 == address.v4()
        && dialled.chosen_port == address.port()
    {
        address.set_v4(dialled.address[0] as u32);
        address.set_port(dialled.port);
    }
    PROCEED
}

/// `getpeername(2)` of an IPv6 socket.
#[inline(always)]
pub fn getpeername6(context: &SockAddrContext) -> i32 {
    let address = Address::new(context);
    if let Some(dialled) = dialled(context)
        && dialled.chosen == joined(address.v6())
        && dialled.chosen_port == address.port()
    {
        address.set_v6(split(dialled.address));
        address.set_port(dialled.port);
    }
    PROCEED
}

/// The verdict on a connection to this address, which may be a listener's; `first` is the first listener on its port.
#[inline(always)]
fn decide(context: &SockAddrContext, maps: &KernelMaps, first: u16, family: u8, to: [u64; 2]) -> Verdict {
    let address = Address::new(context);
    let listener = connect::listener_at(maps, first, family, to, address.port());
    if listener == 0 || !address.is_tcp() {
        return Verdict::NOT_OURS;
    }
    let Some(hook) = HOOK.get(0) else {
        return Verdict::NOT_OURS;
    };
    // SAFETY: the helpers take the kernel's context, and nothing.
    let (own, random) =
        unsafe { (bpf_get_netns_cookie(context.sock_addr.cast()) == hook.network, bpf_get_prandom_u32()) };
    let verdict = barrier_var(map_connect(listener.into(), own.into(), random.into()));
    let verdict = Verdict::from_word(verdict as u32);
    if verdict.is_refused() {
        count_connect(verdict.service(), Event::ConnectRefused);
    } else if verdict != Verdict::NOT_OURS {
        count_connect(verdict.service(), Event::ConnectRedirected);
    }
    verdict
}

/// Refuses the connection as a port without a listener would. `to_loopback` exchanges the address for the loopback address.
#[inline(always)]
fn refuse(address: Address, to_loopback: impl Fn(Address)) -> i32 {
    if SET_ERROR.load() != 0 {
        // SAFETY: a helper that takes a number.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
        return REFUSE;
    }
    // No socket can listen on port 0.
    to_loopback(address);
    address.set_port(0);
    PROCEED
}

/// Records the address that the process asked for.
#[inline(always)]
fn remember(context: &SockAddrContext, verdict: Verdict, from: [u64; 2], to: [u64; 2], chosen_port: u16) {
    let mut dialled = Dialled {
        address: from,
        chosen: to,
        port: Address::new(context).port(),
        chosen_port,
        service: verdict.service(),
        backend: verdict.backend().into(),
        followed: 0,
        named: 0,
    };
    // SAFETY: the socket is the context's own; the kernel copies the value.
    let stored = unsafe { DIALLED.get_or_insert_ptr_mut(context, Some(&mut dialled)) };
    if !stored.is_null() {
        // A socket that was tried before has the old one still. Without memory there is none: then the process is
        // shown the backend.
        // SAFETY: the socket's own storage, and the system call has locked the socket.
        unsafe { ptr::write(stored, dialled) };
    }
}

#[inline(always)]
fn dialled(context: &SockAddrContext) -> Option<&Dialled> {
    // SAFETY: null, or the socket's own storage, which lives as long as the socket.
    unsafe { DIALLED.get_ptr_mut(context).as_ref() }
}

/// See [`connect::verdict`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn map_connect(listener: u64, own_network: u64, random: u64) -> u64 {
    KernelMaps::new()
        .map_or(Verdict::NOT_OURS, |maps| {
            connect::verdict(&maps, listener as u16, own_network != 0, random as u32)
        })
        .word()
        .into()
}
