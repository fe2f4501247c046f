//! One packet in, one packet out: the real program under `BPF_PROG_TEST_RUN`, without a network.
//!
//! [`Frame`] builds what comes in, [`World`] loads the program and runs it on one packet at a time, [`Seen`] takes
//! apart what comes out and does not forgive a wrong length or checksum.

mod frame;
mod reused;
mod seen;
mod world;

pub use frame::{ACK, FIN, Fragment, Frame, Icmp, PSH, RST, SYN, Tag, extension};
pub use reused::Reused;
pub use seen::{Inside, Seen};
pub use world::{
    BACKEND_START, CLIENT_START, Change, Exchange, Flow, Ip, LB_MAC, LISTENER_PORT, LOOPBACK, Processor,
    ROUTER_MAC, Shape, Taken, World, backend_mac,
};
