//! What the steps read and write beside the packet: the kernel's maps, or plain memory in tests.

use crate::{
    cell::Cell64,
    flight_recorder::Note,
    flow::family::Family,
    hash::FlowHash,
    layout::{Backend, Config, Listener, Service, SourceBudgets},
    maglev::TABLE_SIZE,
    outcome::{Counter, Event},
    tables::FlowTables,
};

/// The maps, and what the kernel lends beside them. An index out of range gives None or 0.
pub trait Maps: FlowTables + Copy {
    /// The configuration.
    fn config(&self) -> Option<&Config>;
    /// The first listener on a port number (host byte order); 0: none.
    fn first_listener(&self, port: u16) -> u16;
    /// What is at an SNAT address's place: see [`crate::layout::Classifier`].
    fn snat_at<A: Family>(&self, address: [u64; 2]) -> u8;
    /// A listener by id.
    fn listener(&self, id: u16) -> Option<&Listener>;
    /// A service by id.
    fn service(&self, id: u16) -> Option<&Service>;
    /// A backend by id.
    fn backend(&self, id: u8) -> Option<&Backend>;
    /// Entry `entry` of half `half` of the selection tables: a backend id, or 0.
    fn selected(&self, half: u32, entry: u32) -> u8;
    /// A learned next hop, see [`crate::layout::NextHop`].
    fn learned_hop(&self, index: u16) -> Option<&Cell64>;
    /// May this client (IPv4 mapped) use this restricted service?
    fn allows(&self, service: u16, client: [u64; 2]) -> bool;
    /// What sources of flows use, and may use.
    fn source_budgets(&self) -> Option<&SourceBudgets>;
    /// The kernel's tick counter.
    fn jiffies(&self) -> u64;
    /// Counts one, for the counter at `place`: see [`Counter::index`].
    fn count_place(&self, service: u16, place: u16);
    /// Counts a new flow of a backend.
    fn count_flow(&self, backend: u8);
    /// Writes a flow's event into the flight recorder.
    fn note(&self, note: Note);
    /// The same number, of which the compiler no longer knows where it comes from: otherwise it makes branches of
    /// arithmetic with it.
    fn barrier_var(&self, number: u32) -> u32;
    /// Runs `body` with 0, 1, … until it says that it is done, `count` times at most.
    fn repeat<B: LoopBody>(&self, count: u32, body: &mut B);

    /// Counts an event.
    #[inline(always)]
    fn count_event(&self, service: u16, event: Event) {
        self.count_place(service, Counter::Event(event).index() as u16);
    }

    /// The backend that a flow hashes to; 0 where the table has no entry for it.
    #[inline(always)]
    fn select(&self, half: u32, hash: FlowHash) -> u8 {
        self.selected(half, hash.selection(TABLE_SIZE))
    }
}

/// The body of a loop that the kernel runs by a helper: the verifier checks it once.
pub trait LoopBody {
    /// Runs the iteration with this number. True: it was the last.
    fn run(&mut self, index: u32) -> bool;
}
