//! Bytes whose place can be told from their value, for transfers that must arrive byte for byte.
//!
//! One block of noise is repeated. Its length is prime, so that a lost, doubled or displaced piece of any length
//! that occurs on a network shifts the pattern and is seen, while producing and comparing cost one `memcmp`.

use std::{
    io::{self, Read},
    sync::LazyLock,
};

use bytes::Bytes;

/// The largest prime below 2^20.
const PERIOD: usize = 1_048_573;
/// The noise twice, so that any piece of up to one period is one slice.
static NOISE: LazyLock<Bytes> = LazyLock::new(|| {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let period: Vec<u8> = std::iter::repeat_with(|| {
        // xorshift64: Marsaglia, "Xorshift RNGs", 2003.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_be_bytes()[0]
    })
    .take(PERIOD)
    .collect();
    [period.as_slice(), period.as_slice()].concat().into()
});

/// The bytes from `position` on, `length` of them (at most 64 KiB at once).
pub fn piece(position: u64, length: u64) -> Bytes {
    const LARGEST: u64 = 65_536;
    let start = (position % PERIOD as u64) as usize;
    NOISE.slice(start..start + length.min(LARGEST) as usize)
}

/// Compares a stream with the pattern as it arrives.
#[derive(Clone, Copy, Debug, Default)]
pub struct Checker {
    position: u64,
}

impl Checker {
    /// How many bytes have matched.
    pub fn position(self) -> u64 {
        self.position
    }

    /// Compares the next bytes.
    ///
    /// # Errors
    /// The position of the first piece that differs.
    pub fn check(&mut self, mut received: &[u8]) -> Result<(), u64> {
        while !received.is_empty() {
            let expected = piece(self.position, received.len() as u64);
            let (now, rest) = received.split_at(expected.len());
            if now != expected {
                return Err(self.position);
            }
            self.position += now.len() as u64;
            received = rest;
        }
        Ok(())
    }

    /// Compares all that comes until the end. Returns the position of the end.
    ///
    /// # Errors
    /// When it cannot be read; of kind `InvalidData` where a byte differs.
    pub fn check_all(&mut self, mut stream: impl Read) -> io::Result<u64> {
        let mut buffer = vec![0; 1 << 16];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return Ok(self.position),
                Ok(count) => self.check(&buffer[..count]).map_err(|position| {
                    io::Error::new(io::ErrorKind::InvalidData, format!("differs from byte {position} on"))
                })?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Checker, PERIOD, piece};

    #[test]
    fn the_pattern_goes_on_across_its_period() {
        let start = PERIOD as u64 - 3;
        assert_eq!(piece(start, 6)[3..], piece(0, 3)[..]);
    }

    #[test]
    fn a_lost_a_doubled_and_a_flipped_byte_are_seen() {
        let whole = piece(0, 4096).to_vec();
        assert_eq!(Checker::default().check(&whole), Ok(()));
        let mut lost = whole.clone();
        lost.remove(100);
        assert!(Checker::default().check(&lost).is_err());
        let mut doubled = whole.clone();
        doubled.splice(1448..1448, whole[..1448].to_vec());
        assert!(Checker::default().check(&doubled).is_err());
        let mut flipped = whole;
        flipped[4095] ^= 1;
        assert!(Checker::default().check(&flipped).is_err());
    }
}
