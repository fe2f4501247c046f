//! Lists: enums that are the one source of numbers, names and sentences.

/// Defines an enum of which every variant has a doc sentence.
///
/// `numbered`: the variants have numbers that never change, and there is a conversion from a number. `named`: the variants
/// are numbered in order, and each has a name in snake case and its doc sentence as a description for operators.
/// `outcomes`: as `named`, and each has an [`Action`](crate::outcome::Action).
macro_rules! list {
    (numbered; $(#[doc = $doc:literal])+ $name:ident;
        $($(#[doc = $variant_doc:literal])+ $variant:ident = $number:literal;)+) => {
        $crate::list::list! { @enum $(#[doc = $doc])+ #[derive(Hash)] $name;
            $($(#[doc = $variant_doc])+ $variant = $number;)+ }

        impl $name {
            /// The one with this number.
            #[must_use]
            pub fn from_number(number: u8) -> Option<Self> {
                Self::ALL.iter().copied().find(|it| *it as u8 == number)
            }
        }
    };
    (named; $(#[doc = $doc:literal])+ $name:ident;
        $($(#[doc = $variant_doc:literal])+ $variant:ident, $text:literal;)+) => {
        $crate::list::list! { @enum $(#[doc = $doc])+ $name; $($(#[doc = $variant_doc])+ $variant;)+ }

        impl $name {
            /// The counter's name, in snake case.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }

            /// One sentence for an operator.
            #[must_use]
            pub const fn description(self) -> &'static str {
                match self {
                    $(Self::$variant => concat!($($variant_doc),+),)+
                }
            }
        }
    };
    (outcomes; $(#[doc = $doc:literal])+ $name:ident;
        $($(#[doc = $variant_doc:literal])+ $variant:ident = $action:ident, $text:literal;)+) => {
        $crate::list::list! { named; $(#[doc = $doc])+ $name; $($(#[doc = $variant_doc])+ $variant, $text;)+ }

        impl $name {
            /// What the kernel is told to do.
            #[inline(always)]
            #[must_use]
            pub const fn action(self) -> Action {
                match self {
                    $(Self::$variant => Action::$action,)+
                }
            }

            /// What the kernel is told to do with the outcome whose counter has this place.
            #[inline(always)]
            #[must_use]
            pub const fn action_of(index: u16) -> Action {
                $(if index == Self::$variant as u16 {
                    return Action::$action;
                })+
                Action::Drop
            }
        }
    };
    (@enum $(#[$attribute:meta])+ $name:ident;
        $($(#[doc = $variant_doc:literal])+ $variant:ident $(= $number:literal)?;)+) => {
        $(#[$attribute])+
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {
            $($(#[doc = $variant_doc])+ $variant $(= $number)?,)+
        }

        impl $name {
            /// All of them, in order.
            pub const ALL: &[Self] = &[$(Self::$variant),+];
        }
    };
}

pub(crate) use list;
