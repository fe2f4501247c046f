//! The packet logic of sheave, one step a file, and every structure that crosses the kernel boundary.
//!
//! The same code is compiled for the kernel (`lb-ebpf` provides frame and maps) and for the host, where tests
//! provide bytes and plain memory. It does not allocate, makes no calls outside of this crate and never panics: the
//! verifier has to see the end of every path.
//!
//! A packet goes through [`pipeline()`]: *parse* ([`parse`], [`classify`]), *decide* ([`forward`], [`reply`], [`icmp`]),
//! *act* ([`rewrite`], [`refuse`]), and ends as exactly one [`Outcome`].
#![cfg_attr(not(any(test, loom)), no_std)]
// The kernel's atomic instructions are reached by inline assembly: core has no atomics for this target.
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

pub mod arrival;
pub mod backend_event;
pub mod bench;
#[cfg(test)]
#[cfg_attr(loom, expect(dead_code, reason = "the model needs only the flow tables"))]
mod bytes;
pub mod cell;
pub mod checksum;
pub mod class;
pub mod classify;
pub mod client_answer;
pub mod client_event;
pub mod connect;
pub mod context;
pub mod destination;
pub mod disposition;
pub mod flight_recorder;
pub mod flow;
#[cfg(test)]
#[cfg(not(loom))]
mod flow_tests;
pub mod forward;
pub mod frame;
pub mod hash;
pub mod headers;
pub mod host_socket;
pub mod icmp;
pub mod kill;
pub mod layout;
#[cfg(not(any(loom, target_arch = "bpf")))]
pub mod layout_hash;
mod list;
#[cfg(test)]
#[cfg(loom)]
mod loom_model;
pub mod maglev;
pub mod maps;
#[cfg(test)]
#[cfg_attr(loom, expect(dead_code, reason = "the model needs only the flow tables"))]
mod memory;
pub mod meta;
pub mod next_hop;
pub mod outcome;
#[cfg(test)]
#[cfg(not(loom))]
mod packet_tests;
pub mod parse;
pub mod pipeline;
pub mod refuse;
pub mod reply;
pub mod rewrite;
pub mod segment;
pub mod sequence;
pub mod source_budget;
pub mod subprograms;
pub mod tables;
pub mod transition;
pub mod witness;
mod word;

pub use outcome::Outcome;
pub use pipeline::pipeline;
