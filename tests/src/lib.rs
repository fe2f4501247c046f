//! sheave's laboratory: hosts in network namespaces, a stub apiserver, real clients and the real daemon.
//!
//! Everything here needs root. What a test builds disappears with the values that stand for it, also when the
//! test panics; what a killed run left behind is removed by the next one ([`lab::Lab::new`]).

mod aligned;
pub mod attacks;
mod background;
pub mod cluster;
pub mod daemon;
pub mod dial;
pub mod etcd;
pub mod failover;
pub mod hold;
pub mod idle;
pub mod lab;
pub mod load;
pub mod node;
pub mod packets;
pub mod pattern;
pub mod stub;
pub mod transfer;
pub mod watches;
