//! The memory of the flow tables.

use crate::{
    cell::{Cell8, Cell16},
    layout::{Numbers, Set4, Set6},
};

/// Sets, and what is kept beside them. An index out of range gives None.
pub trait FlowTables {
    /// An IPv4 set; the sets of all SNAT addresses are counted one after the other.
    fn set4(&self, index: u32) -> Option<&Set4>;
    /// An IPv6 set.
    fn set6(&self, index: u32) -> Option<&Set6>;
    /// The numbers of the flow in a slot of an IPv4 set.
    fn numbers4(&self, set: u32, way: u32) -> Option<&Numbers>;
    /// The way back to the client of a slot of an IPv6 set.
    fn return_hop6(&self, set: u32, way: u32) -> Option<&Cell16>;
    /// The ways of an IPv6 set whose ports must not become slots, by bit.
    fn blocked6(&self, set: u32) -> u8;
    /// An IPv6 set's overflow mark.
    fn overflow6(&self, set: u32) -> Option<&Cell8>;
}
