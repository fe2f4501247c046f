//! A packet in plain memory: what the tests of this crate run the steps over.

use crate::frame::{Frame, Plain, Route};

/// Bytes that there are, headroom included.
const CAPACITY: usize = 2048;

/// A packet in memory, with headroom, for host tests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bytes {
    buffer: [u8; CAPACITY],
    start: usize,
    end: usize,
    interface: u32,
}

impl Bytes {
    const HEADROOM: usize = 64;

    /// A copy of `packet`, come in by `interface`; None when it does not fit.
    pub(crate) fn new(packet: &[u8], interface: u32) -> Option<Self> {
        let mut buffer = [0; CAPACITY];
        let end = Self::HEADROOM + packet.len();
        buffer.get_mut(Self::HEADROOM..end)?.copy_from_slice(packet);
        Some(Self { buffer, start: Self::HEADROOM, end, interface })
    }

    /// The packet as it is now.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }
}

impl Frame for Bytes {
    fn at<T: Plain>(&mut self, offset: usize) -> Option<&mut T> {
        let bytes = self.buffer[self.start..self.end].get_mut(offset..)?.get_mut(..size_of::<T>())?;
        // SAFETY: the slice is as long as T, and Plain types take any bytes at any alignment.
        Some(unsafe { &mut *bytes.as_mut_ptr().cast::<T>() })
    }

    fn interface(&self) -> u32 {
        self.interface
    }

    fn route(&mut self, _: u8, _: [u64; 2]) -> Option<Route> {
        None
    }

    fn length(&self) -> usize {
        self.end - self.start
    }

    fn remaining(&self, end: usize) -> i64 {
        self.length() as i64 - end as i64
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
