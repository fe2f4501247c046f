//! `sheave why`: one connection's story in words, from what the data path and the daemon have written down
//! (`lb_common::flight_recorder`). Pure: the records come in as values, and so does the time.

mod moment;
mod names;
mod story;

pub use moment::{MomentError, parse_moment};
pub use names::Names;
pub use story::{Client, Connection, Step, connections};
