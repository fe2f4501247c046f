//! How the steps reach a packet's bytes.

use crate::{layout::Config, parse};

/// Types that any bytes are a valid value of, at any alignment.
///
/// # Safety
/// The type has alignment 1, no padding and no invalid bit patterns.
pub unsafe trait Plain: Copy {}

// SAFETY: bytes.
unsafe impl<const N: usize> Plain for [u8; N] {}
// SAFETY: bytes of bytes.
unsafe impl<const N: usize, const M: usize> Plain for [[u8; N]; M] {}

/// What the kernel's routing table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Interface index.
    pub interface: u32,
    /// Our MAC address there.
    pub source_mac: u64,
    /// The neighbour's MAC address.
    pub mac: u64,
}

/// A packet, from its Ethernet header on.
pub trait Frame {
    /// The `T` at `offset`, unless the packet ends before it does.
    fn at<T: Plain>(&mut self, offset: usize) -> Option<&mut T>;

    /// The index of the interface it came in by.
    fn interface(&self) -> u32;

    /// [`crate::reply::routed`], in a function of its own. Without a routing table: 0.
    fn routed(&mut self, family: u8, address: [u64; 2]) -> u64;

    /// [`parse::option_sum`], in a function of its own.
    fn option_sum(&mut self, offset: usize, end: usize) -> u64
    where
        Self: Sized,
    {
        parse::option_sum(self, offset, end)
    }

    /// [`crate::rewrite::retag`], in a function of its own.
    fn retag(&mut self, config: &Config, network: usize, kind: u16, port: u16) -> bool
    where
        Self: Sized,
    {
        crate::rewrite::retag(self, config, network, kind, port)
    }

    /// [`parse::tags`], in a function of its own.
    fn tags(&mut self) -> u64
    where
        Self: Sized,
    {
        parse::tags(self)
    }

    /// [`parse::upper_layer`], in a function of its own.
    fn upper_layer(&mut self, transport: usize, next: u8) -> u64
    where
        Self: Sized,
    {
        parse::upper_layer(self, transport, next)
    }

    /// Asks the kernel's routing table for the way to an address (words), as if forwarding this packet.
    fn route(&mut self, family: u8, destination: [u64; 2]) -> Option<Route>;

    /// Bytes that can be reached from the Ethernet header on: of a frame longer than a page only the first piece.
    fn length(&self) -> usize;

    /// Bytes of the frame, all its pieces together, after `end`; negative: it ends before.
    fn remaining(&self, end: usize) -> i64 {
        self.length() as i64 - end as i64
    }

    /// Grows (or with a negative number shrinks) the packet at the front. False: there is no room.
    fn grow_front(&mut self, bytes: i32) -> bool;

    /// Shrinks the frame to `length`, which is within its first piece, at the back. False: refused.
    fn truncate(&mut self, length: usize) -> bool;
}

#[cfg(not(target_arch = "bpf"))]
pub use host::Bytes;

#[cfg(not(target_arch = "bpf"))]
mod host {
    use super::{Frame, Plain, Route};

    /// A packet in memory, with headroom, for host tests.
    #[derive(Clone, Copy, Debug)]
    pub struct Bytes<const CAPACITY: usize> {
        buffer: [u8; CAPACITY],
        start: usize,
        end: usize,
        interface: u32,
    }

    impl<const CAPACITY: usize> Bytes<CAPACITY> {
        const HEADROOM: usize = 64;

        /// A copy of `packet`, come in by `interface`; None when it does not fit.
        #[must_use]
        pub fn new(packet: &[u8], interface: u32) -> Option<Self> {
            let mut buffer = [0; CAPACITY];
            let end = Self::HEADROOM + packet.len();
            buffer.get_mut(Self::HEADROOM..end)?.copy_from_slice(packet);
            Some(Self { buffer, start: Self::HEADROOM, end, interface })
        }

        /// The packet as it is now.
        #[must_use]
        pub fn bytes(&self) -> &[u8] {
            &self.buffer[self.start..self.end]
        }
    }

    impl<const CAPACITY: usize> Frame for Bytes<CAPACITY> {
        fn at<T: Plain>(&mut self, offset: usize) -> Option<&mut T> {
            let bytes = self.buffer[self.start..self.end].get_mut(offset..)?.get_mut(..size_of::<T>())?;
            // SAFETY: the slice is as long as T, and Plain types take any bytes at any alignment.
            Some(unsafe { &mut *bytes.as_mut_ptr().cast::<T>() })
        }

        fn interface(&self) -> u32 {
            self.interface
        }

        fn routed(&mut self, _: u8, _: [u64; 2]) -> u64 {
            0
        }

        fn route(&mut self, _: u8, _: [u64; 2]) -> Option<Route> {
            None
        }

        fn length(&self) -> usize {
            self.end - self.start
        }

        fn grow_front(&mut self, bytes: i32) -> bool {
            match usize::try_from(self.start as i64 - i64::from(bytes)) {
                Ok(start) if start <= self.end => {
                    self.start = start;
                    true
                }
                _ => false,
            }
        }

        fn truncate(&mut self, length: usize) -> bool {
            if length > self.length() {
                return false;
            }
            self.end = self.start + length;
            true
        }
    }
}
