//! The flow table: a flat array of 4-way sets in which the slot number *is* the SNAT port.
//!
//! A tuple hashes to ten candidate sets of one SNAT address, and to ten of another while flows move there. A new flow
//! goes into the emptier of the first two candidates, else into the next candidate that has room. A mark on the first
//! candidate says that a look-up has to go beyond the second. At 80 % fill that refuses fewer than 0.1 % of new flows;
//! first-fit over two candidates would refuse 19 %.
//!
//! # The claim protocol
//!
//! Two CPUs may process two copies of a SYN, and the daemon frees slots meanwhile. Every transition goes through the
//! slot's one word:
//!
//! 1. compare-and-exchange from the examined word to *claiming* (readers ignore the slot),
//! 2. write the tuple and, if needed, the overflow mark,
//! 3. exchange to *half-open*: that publishes the slot, and is the full barrier,
//! 4. only then search all candidates again. If another live way has the tuple, free the own one.
//!
//! Publishing before searching excludes duplicates: of two claimers, the one that searches last sees the other.
//! (Searching first, or publishing by a plain store, lets both miss each other.) Both may free their slots; then the
//! client's next SYN decides. `loom_model` checks this very code.
//!
//! Files of this crate name the module that they use (`flow::slot`, `flow::family`, …): some of them are below
//! [`crate::maps`], some above. Other crates may use the names below.

pub mod claim;
pub mod claimer;
pub mod close;
pub mod eviction;
pub mod family;
pub mod look_up;
pub mod query;
pub mod slot;

pub use claim::{choose, claim, claim_free, take};
pub use claimer::{Claimer, Clock};
pub use eviction::{LONG_QUARANTINE, SHORT_QUARANTINE};
pub use family::{Family, V4, V6};
pub use look_up::{Hit, find, find_in, is_owner};
pub use query::{CANDIDATES, Query};
pub use slot::{Choice, Claim, Found, Slot};
