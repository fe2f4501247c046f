//! The daemon's admin socket: HTTP over a Unix socket, for the commands and for whoever has curl.
//!
//! ```text
//! curl --unix-socket /run/sheave/admin.sock http://sheave/v1/status
//! ```
//!
//! The server side knows nothing of the daemon: it turns requests into [`Request`]s, which the controller answers.

mod client;
mod commands;
mod probe;
mod query;
mod server;
pub mod socket;
mod status;

#[cfg(test)]
mod tests;

pub use client::{Client, ClientError, FlowsError};
pub use commands::*;
pub use probe::{ProbeListener, ProbeTarget, ProbeTargets};
pub use server::{Caller, Request};
pub use socket::{AdminListener, BindError, bind};
pub use status::*;
