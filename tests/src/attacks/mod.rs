//! Attacks on flows: forged packets from a host of their own, and real connections whose lives and bytes they must not
//! touch.

mod arena;
mod attacker;
mod flood;
mod neighbours;
mod pair;
mod plain;
mod shuttle;
mod stall;

pub use arena::{Arena, Flow, ROOM, TOLD, flows};
pub use attacker::{Attacker, Forged, Noise, TooBig, flag};
pub use flood::{FloodKind, Flooded, flood};
pub use neighbours::require_neighbours_answered;
pub use pair::{Ended, Pair, exchange_all};
pub use plain::PlainServer;
pub use shuttle::{Harm, Shuttle};
pub use stall::{Call, stall_calls};
