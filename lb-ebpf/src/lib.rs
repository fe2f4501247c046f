//! sheave's kernel side: the maps, the frame, the global functions, and the XDP action for a disposition.
//!
//! Empty on the host: this crate only makes sense for the BPF target, and `lb-userspace` builds it.
#![cfg_attr(target_arch = "bpf", no_std, feature(asm_experimental_arch))]

#[cfg(target_arch = "bpf")]
pub mod barrier;
#[cfg(target_arch = "bpf")]
pub mod connect;
#[cfg(target_arch = "bpf")]
pub mod follow;
#[cfg(target_arch = "bpf")]
pub mod frame;
#[cfg(target_arch = "bpf")]
pub mod host_socket;
#[cfg(target_arch = "bpf")]
pub mod log;
#[cfg(target_arch = "bpf")]
pub mod maps;
#[cfg(target_arch = "bpf")]
mod subprograms;
#[cfg(target_arch = "bpf")]
pub mod xdp;
