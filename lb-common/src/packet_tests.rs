//! One packet in, one packet out: [`crate::pipeline()`] over plain memory. Packets are built and read by another
//! library, and everything that is sent has its checksums verified.

mod flows;
mod hostile;
mod icmp;
mod lab;
mod links;
mod properties;
