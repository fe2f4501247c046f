//! A TCP segment, as far as flows depend on it.

use crate::headers::tcp_flag;

/// The TCP header beyond its ports.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// The header fits into the packet.
    pub valid: bool,
    /// See [`tcp_flag`].
    pub flags: u8,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledgement: u32,
    /// Bytes of payload.
    pub payload: usize,
}

impl Segment {
    /// As two words: sequence number (bits 0-31) and acknowledgement number (bits 32-63); flags (bits 0-7) and bytes of
    /// payload (bits 8-39).
    #[inline(always)]
    #[must_use]
    pub const fn words(&self) -> [u64; 2] {
        let numbers = self.sequence as u64 | (self.acknowledgement as u64) << 32;
        [numbers, self.flags as u64 | (self.payload as u64 & 0xffff_ffff) << 8]
    }

    /// From two words, of a segment that is valid.
    #[inline(always)]
    #[must_use]
    pub const fn from_words([numbers, rest]: [u64; 2]) -> Self {
        Self {
            valid: true,
            flags: rest as u8,
            sequence: numbers as u32,
            acknowledgement: (numbers >> 32) as u32,
            payload: (rest >> 8) as usize & 0xffff_ffff,
        }
    }

    /// No TCP header, or none that makes sense.
    pub const NONE: Self = Self { valid: false, flags: 0, sequence: 0, acknowledgement: 0, payload: 0 };

    /// Are all of `flags` set?
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }

    /// Does it ask for a connection: SYN, and none of ACK, RST, FIN?
    #[inline(always)]
    #[must_use]
    pub const fn opens(&self) -> bool {
        self.flags & (tcp_flag::SYN | tcp_flag::ACK | tcp_flag::RST | tcp_flag::FIN) == tcp_flag::SYN
    }
}
