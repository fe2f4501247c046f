//! The Internet checksum (RFC 1071), changed by difference (RFC 1624).
//!
//! A one's-complement sum does not depend on the width of the words it is taken over nor on their byte order,
//! as long as all of them are read the same way. So headers are read as native words of network bytes and sums
//! are kept in 64 bits and folded once, at the end. Nothing is ever byte-swapped.

/// The change of a checksum by a rewrite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delta(u64);

impl Delta {
    /// No change.
    pub const NONE: Self = Self(0);

    /// Adds a word, or a folded sum of words.
    #[inline(always)]
    #[must_use]
    pub const fn add(self, sum: u32) -> Self {
        Self(self.0 + sum as u64)
    }

    /// Removes a word, or a folded sum of words.
    #[inline(always)]
    #[must_use]
    pub const fn remove(self, sum: u32) -> Self {
        Self(self.0 + !sum as u64)
    }

    /// The checksum after the change: RFC 1624, equation 3.
    #[inline(always)]
    #[must_use]
    pub const fn apply(self, checksum: u16) -> u16 {
        !fold(self.0 + (!checksum) as u64)
    }
}

/// The sum of `words`, each read as native-endian network bytes, as 32 bits.
#[inline(always)]
#[must_use]
pub const fn sum64(low: u64, high: u64) -> u32 {
    fold32((low & 0xffff_ffff) + (low >> 32) + (high & 0xffff_ffff) + (high >> 32))
}

/// A sum brought down to 32 bits.
#[inline(always)]
#[must_use]
pub const fn fold32(sum: u64) -> u32 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    sum as u32
}

/// A sum of some ten thousand words at most, brought down to 16 bits.
#[inline(always)]
#[must_use]
pub const fn fold(sum: u64) -> u16 {
    // Below 2⁴⁷ at first, 2³¹ + 2¹⁶ and 2¹⁵ + 2¹⁶ after each step.
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 1071, the slow and obvious way.
    fn checksum(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_ne_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    proptest! {
        #[test]
        fn a_difference_gives_what_a_full_sum_gives(
            mut bytes in proptest::collection::vec(any::<u8>(), 8..200), at in 0usize..48, new: u32,
        ) {
            bytes.resize(bytes.len() & !3, 0);
            let at = at % (bytes.len() / 4) * 4;
            let before = checksum(&bytes);
            let old = u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
            bytes[at..at + 4].copy_from_slice(&new.to_ne_bytes());
            let changed = Delta::NONE.remove(old).add(new).apply(before);
            // Zero has two forms; a sum over words that are not all zero never gives the positive one.
            prop_assert!(changed == checksum(&bytes) || bytes.iter().all(|byte| *byte == 0));
        }

        #[test]
        fn folding_keeps_the_residue(low: u64, high: u64) {
            let words = [low as u32, (low >> 32) as u32, high as u32, (high >> 32) as u32];
            let total: u64 = words.iter().map(|word| u64::from(*word)).sum();
            prop_assert_eq!(u64::from(sum64(low, high)) % 0xffff, total % 0xffff);
            prop_assert_eq!(u64::from(fold(total)) % 0xffff, total % 0xffff);
        }

        #[test]
        fn folding_keeps_the_residue_of_any_sum_it_is_given(sum in 0..1u64 << 47) {
            prop_assert_eq!(u64::from(fold(sum)) % 0xffff, sum % 0xffff);
        }
    }

    #[test]
    fn the_example_of_rfc_1624() {
        // §4: a checksum of 0xdd2f, a field that goes from 0x5555 to 0x3285, and the answer 0x0000.
        assert_eq!(Delta::NONE.remove(0x5555).add(0x3285).apply(0xdd2f), 0x0000);
    }
}
