//! Types that are one word.
//!
//! Functions that the verifier checks on their own take and return numbers. (Of an enum or an `Option` LLVM would also
//! copy registers that were never set, which the verifier does not allow.)

/// Defines a type that is one number inside, with its conversions to and from the word that functions pass.
macro_rules! packed_word {
    ($(#[$attribute:meta])* pub struct $name:ident($inner:ty) as $word:ty;) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name($inner);

        impl $name {
            /// As one word.
            #[inline(always)]
            #[must_use]
            pub const fn word(self) -> $word {
                self.0 as $word
            }

            /// From one word.
            #[inline(always)]
            #[must_use]
            pub const fn from_word(word: $word) -> Self {
                Self(word as $inner)
            }
        }
    };
}

pub(crate) use packed_word;
