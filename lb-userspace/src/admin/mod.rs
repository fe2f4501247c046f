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

use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::TokioTimer;

pub use client::{Client, ClientError, FlowsError};
pub use commands::*;
pub use probe::{ProbeListener, ProbeTarget, ProbeTargets};
pub use server::{Caller, Request};
pub use socket::{AdminListener, BindError, bind};
pub use status::*;

/// Clients served at once on the admin socket; more wait in the kernel's backlog.
const CONNECTIONS_MAX: usize = 32;
/// From the connection's begin to the end of the headers. Nobody types requests here.
const HEADERS_TIMEOUT: Duration = Duration::from_secs(2);
/// After `accept` failed, which it does while descriptors are short.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// One request a connection, whose headers are at most `headers_max` bytes and come soon.
fn http(headers_max: usize) -> http1::Builder {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEADERS_TIMEOUT)
        .max_buf_size(headers_max)
        .keep_alive(false);
    http
}
