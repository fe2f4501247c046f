//! The connect hook on this host: which cgroup it is put on, whose connections it takes, and who listens in vain where
//! it takes them.
//!
//! The programs themselves are the dataplane's; what they look up is in the same maps as for packets.

mod cgroup;
mod network;
mod shadow;

pub use cgroup::{CgroupError, Place};
pub use network::own_network;
pub use shadow::{Shadow, shadows};
