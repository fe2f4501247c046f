//! The steps a packet takes through sheave.
#![cfg_attr(not(any(test, loom)), no_std)]
