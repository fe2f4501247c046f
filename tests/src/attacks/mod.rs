//! Attacks on flows: forged packets from a host of their own, and real connections whose lives and bytes they must not
//! touch.

mod arena;
mod attacker;
mod flood;
mod pair;
mod plain;
mod stall;

pub use arena::{Arena, Flow, ROOM, TOLD, flows};
pub use attacker::{Attacker, Forged, Noise, TooBig, flag};
pub use flood::{Flooded, Kind, TooFew, flood};
pub use pair::{Ended, Pair};
pub use plain::PlainServer;
pub use stall::{Call, stall_calls};
