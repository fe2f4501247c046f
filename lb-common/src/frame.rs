//! Access to a packet's bytes.

/// Types that any bytes are a valid value of, at any alignment.
///
/// # Safety
/// The type has alignment 1, no padding and no invalid bit patterns.
pub unsafe trait Plain: Copy {}

// SAFETY: bytes.
unsafe impl<const N: usize> Plain for [u8; N] {}
// SAFETY: bytes of bytes.
unsafe impl<const N: usize, const M: usize> Plain for [[u8; N]; M] {}

/// A route, by the kernel's routing table.
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

    /// Asks the kernel's routing table for the way to an address (words), as if forwarding this packet.
    fn route(&mut self, family: u8, destination: [u64; 2]) -> Option<Route>;

    /// Bytes that can be reached from the Ethernet header on: of a frame longer than a page only the first piece.
    fn length(&self) -> usize;

    /// Bytes of the frame, all its pieces together, after `end`; negative: it ends before.
    fn remaining(&self, end: usize) -> i64;

    /// Grows (or with a negative number shrinks) the packet at the front. False: there is no room.
    fn grow_front(&mut self, bytes: i32) -> bool;

    /// Shrinks the frame to `length`, which is within its first piece, at the back. False: refused.
    fn truncate(&mut self, length: usize) -> bool;
}
