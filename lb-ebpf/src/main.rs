//! sheave kernel programs.
fn main() {}
