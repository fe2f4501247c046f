//! A packet as the kernel lends it. All access to packet memory in the programs goes through here.

use aya_ebpf::{
    EbpfContext as _,
    helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_tail},
    programs::XdpContext,
};
use lb_common::frame::{Frame, Plain};

/// The linear part of an XDP packet: in a packet of several fragments, the first; headers are always there.
pub struct XdpFrame<'a> {
    context: &'a XdpContext,
    start: usize,
    end: usize,
}

impl<'a> XdpFrame<'a> {
    /// The packet of a program's context.
    #[inline(always)]
    pub fn new(context: &'a XdpContext) -> Self {
        let (start, end) = bounds(context);
        Self { context, start, end }
    }
}

/// First byte, and the one after the last.
#[inline(always)]
fn bounds(context: &XdpContext) -> (usize, usize) {
    // SAFETY: the context is the one the kernel called us with. Volatile: otherwise LLVM passes data_end on to
    // functions as the u32 it is in the context, and the verifier takes it for a number.
    unsafe {
        let start = (&raw const (*context.ctx).data).read_volatile();
        let end = (&raw const (*context.ctx).data_end).read_volatile();
        (start as usize, end as usize)
    }
}

impl Frame for XdpFrame<'_> {
    type Again<'b>
        = XdpFrame<'b>
    where
        Self: 'b;

    #[inline(always)]
    fn again(&mut self) -> XdpFrame<'_> {
        XdpFrame::new(self.context)
    }

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
        self.context.ingress_ifindex() as u32
    }

    #[inline(always)]
    fn length(&self) -> usize {
        self.end - self.start
    }

    #[inline(always)]
    fn grow_front(&mut self, bytes: i32) -> bool {
        // SAFETY: our own context; the bounds are read again.
        let result = unsafe { bpf_xdp_adjust_head(self.context.as_ptr().cast(), -bytes) };
        (self.start, self.end) = bounds(self.context);
        result == 0
    }

    #[inline(always)]
    fn truncate(&mut self, length: usize) -> bool {
        let bytes = self.length() as i32 - length as i32;
        // SAFETY: our own context; the bounds are read again.
        let result = unsafe { bpf_xdp_adjust_tail(self.context.as_ptr().cast(), -bytes) };
        (self.start, self.end) = bounds(self.context);
        result == 0
    }
}
