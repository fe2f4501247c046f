//! Telling the ends of a flow that it is over, or asking whether it is.
//!
//! A client whose flow was reset in the table hears of it when it speaks: the program answers. One that is silent (a watch
//! that waits for events) is told by a RST in the listener's name, sent here; again after 100 ms and after a second, for a
//! frame may be lost. A backend that may have forgotten its flows is asked by a bare ACK in the client's name: a kernel
//! that has answers with a RST that is exact for the client, one that has not with an acknowledgement that changes nothing.
//! Of the dataplane it knows what a flow is; nothing of maps, checks or configuration.

mod frame;
mod pace;
mod repeats;
mod wire;

pub(crate) use frame::syn;
pub use pace::Pace;
pub use repeats::Repeats;
pub use wire::Wire;
