//! A packet as the kernel lends it. All access to packet memory in the programs goes through here.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as FibParameters, xdp_md},
    helpers::{bpf_fib_lookup, bpf_xdp_adjust_head, bpf_xdp_adjust_tail, bpf_xdp_get_buff_len},
};
use lb_common::{
    frame::{Frame, Plain, Route},
    layout::family,
};

use crate::barrier::barrier_var;

/// The linear part of an XDP packet: in a packet of several fragments, the first; headers are always there.
pub struct XdpFrame {
    context: *mut xdp_md,
    start: usize,
    end: usize,
}

impl XdpFrame {
    /// The packet of a program's context.
    #[inline(always)]
    pub fn new(context: *mut xdp_md) -> Self {
        let (start, end) = bounds(context);
        Self { context, start, end }
    }

    /// The kernel's context of this packet.
    #[inline(always)]
    #[must_use]
    pub const fn context(&self) -> *mut xdp_md {
        self.context
    }

    /// Reads the packet's bounds again, after another function has moved them.
    #[inline(always)]
    pub fn reload_bounds(&mut self) {
        (self.start, self.end) = bounds(self.context);
    }

    /// Bytes of all pieces of the frame.
    #[inline(always)]
    fn whole_length(&self) -> usize {
        // SAFETY: our own context.
        unsafe { bpf_xdp_get_buff_len(self.context.cast()) as usize }
    }
}

/// First byte, and the one after the last.
#[inline(always)]
fn bounds(context: *mut xdp_md) -> (usize, usize) {
    // SAFETY: the context is the one the kernel called us with. Volatile: otherwise LLVM passes data_end on to
    // functions as the u32 it is in the context, and the verifier takes it for a number.
    unsafe {
        let start = (&raw const (*context).data).read_volatile();
        let end = (&raw const (*context).data_end).read_volatile();
        (start as usize, end as usize)
    }
}

impl Frame for XdpFrame {
    #[inline(always)]
    fn at<T: Plain>(&mut self, offset: usize) -> Option<&mut T> {
        let place = self.start + offset;
        if place + size_of::<T>() > self.end {
            return None;
        }
        // SAFETY: within the packet, as just compared; Plain types take any bytes at any alignment, and the
        // mutable borrow of the frame excludes a second reference.
        Some(unsafe { &mut *(place as *mut T) })
    }

    #[inline(always)]
    fn interface(&self) -> u32 {
        // SAFETY: our own context.
        unsafe { (*self.context).ingress_ifindex }
    }

    #[inline(always)]
    fn route(&mut self, number: u8, destination: [u64; 2]) -> Option<Route> {
        let mut parameters = MaybeUninit::<FibParameters>::uninit();
        const { assert!(size_of::<FibParameters>() == size_of::<[u64; 8]>()) };
        for word in 0..8 {
            // SAFETY: within the structure. Volatile, or LLVM calls memset, a loop over bytes.
            unsafe { parameters.as_mut_ptr().cast::<u64>().add(word).write_volatile(0) };
        }
        // SAFETY: a plain structure of integers, all of them set.
        let parameters = unsafe { parameters.assume_init_mut() };
        parameters.ifindex = self.interface();
        if number == family::IPV4 {
            parameters.family = 2; // AF_INET
            parameters.__bindgen_anon_4.ipv4_dst = destination[0] as u32;
        } else {
            parameters.family = 10; // AF_INET6
            parameters.__bindgen_anon_4.ipv6_dst = halves(destination);
        }
        // SAFETY: our own context, and a parameter block with its true size.
        let result = unsafe {
            bpf_fib_lookup(self.context.cast(), &raw mut *parameters, size_of::<FibParameters>() as i32, 0)
        };
        if result != i64::from(BPF_FIB_LKUP_RET_SUCCESS) {
            return None;
        }
        Some(Route {
            interface: parameters.ifindex,
            source_mac: mac_number(&parameters.smac),
            mac: mac_number(&parameters.dmac),
        })
    }

    /// Opaque to LLVM, which would otherwise turn `(end - start) - number` into `end - (start + number)`. Verifiers
    /// up to Linux 6.18 know no bounds of a number that has been through a byte swap, and refuse to add it to a packet
    /// pointer. Packet pointers meet no other number than the offsets of [`Frame::at`], which are masked.
    #[inline(always)]
    fn length(&self) -> usize {
        barrier_var((self.end - self.start) as u64) as usize
    }

    #[inline(always)]
    fn remaining(&self, end: usize) -> i64 {
        let remaining = self.length() as i64 - end as i64;
        if remaining < 0 { self.whole_length() as i64 - end as i64 } else { remaining }
    }

    #[inline(always)]
    fn grow_front(&mut self, bytes: i32) -> bool {
        // SAFETY: our own context; the bounds are read again.
        let result = unsafe { bpf_xdp_adjust_head(self.context.cast(), -bytes) };
        self.reload_bounds();
        result == 0
    }

    #[inline(always)]
    fn truncate(&mut self, length: usize) -> bool {
        let bytes = self.whole_length() as i32 - length as i32;
        // SAFETY: our own context; the bounds are read again.
        let result = unsafe { bpf_xdp_adjust_tail(self.context.cast(), -bytes) };
        self.reload_bounds();
        result == 0
    }
}

/// A MAC address on the stack as a number. In halves, because the verifier wants stack loads aligned and an array of
/// bytes does not tell LLVM how it is.
#[inline(always)]
fn mac_number(mac: &[u8; 6]) -> u64 {
    let halves = mac.as_ptr().cast::<u16>();
    let mut number = 0;
    for index in 0..3 {
        // SAFETY: within the six bytes, which are at an even place in the kernel's structure.
        let half = unsafe { halves.add(index).read_volatile() };
        number |= u64::from(u16::from_le(half)) << (16 * index);
    }
    number
}

/// An IPv6 address as the kernel's structure has it.
#[inline(always)]
fn halves(address: [u64; 2]) -> [u32; 4] {
    [address[0] as u32, (address[0] >> 32) as u32, address[1] as u32, (address[1] >> 32) as u32]
}
