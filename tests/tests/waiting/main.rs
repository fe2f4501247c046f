//! End-to-end tests that wait for most of their time: for servers that start, verdicts, and old addresses that run out.
//! They are one program, so that they wait beside each other.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

mod hostile_checks;
mod lifecycle;
mod shared_address;
mod snat_addresses;
mod witness;
