//! What the steps ask of the maps, so that they run over the kernel's and over plain memory in tests.

use crate::{
    black_box::Note,
    cell::{Cell8, Cell16, Cell64},
    flow::{self, Choice, Claim, Claimer, Family, Found, Query, Slot},
    forward,
    hash::FlowHash,
    layout::{Backend, Config, Listener, Service, Set4, Set6},
    next_hop,
    outcome::{Counter, Event},
    process, reply,
};

/// The maps, and the little else that the kernel lends. An index out of range gives None or 0.
pub trait Maps: Copy {
    /// The configuration.
    fn config(&self) -> Option<&Config>;
    /// The first listener on a port number (host byte order); 0: none.
    fn first_listener(&self, port: u16) -> u16;
    /// What is at an SNAT address's place: see [`crate::layout::Classifier`].
    fn snat_at<F: Family>(&self, address: [u64; 2]) -> u8;
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
    /// The ways of a set (of any address) whose ports must not become slots, by bit.
    fn blocked(&self, set: u32) -> u8;
    /// May this client (IPv4 mapped) use this restricted service?
    fn allows(&self, service: u16, client: [u64; 2]) -> bool;
    /// The kernel's tick counter.
    fn jiffies(&self) -> u64;
    /// Counts one, for the counter at `place`: see [`Counter::index`].
    fn count_place(&self, service: u16, place: u16);
    /// Counts a new flow of a backend.
    fn count_flow(&self, backend: u8);
    /// Writes into the black box what happened to a flow.
    fn note(&self, note: Note);

    /// IPv4 flow sets, of all SNAT addresses one after the other.
    fn set4(&self, index: u32) -> Option<&Set4>;
    /// IPv6 flow sets.
    fn set6(&self, index: u32) -> Option<&Set6>;
    /// Ways back to the clients of an IPv4 set.
    fn return_hop4(&self, set: u32, way: u32) -> Option<&Cell16>;
    /// Ways back to the clients of an IPv6 set.
    fn return_hop6(&self, set: u32, way: u32) -> Option<&Cell16>;
    /// An IPv4 set's overflow mark.
    fn overflow4(&self, set: u32) -> Option<&Cell8>;
    /// An IPv6 set's overflow mark.
    fn overflow6(&self, set: u32) -> Option<&Cell8>;

    /// The same number. A compiler that knows where it comes from makes branches of arithmetic with it.
    #[inline(always)]
    fn opaque(&self, number: u32) -> u32 {
        number
    }

    /// Calls the step with 0, 1, … until it is done, `count` times at most.
    fn repeat<S: Step>(&self, count: u32, step: &mut S) {
        for index in 0..count {
            if step.step(index) {
                break;
            }
        }
    }

    /// [`process::listener`], in a function of its own.
    fn find_listener(&self, family: u8, address: [u64; 2], port: u16) -> u16 {
        process::listener(self, family, address, port)
    }

    /// [`process::snat_index`], in a function of its own.
    fn snat_index<F: Family>(&self, address: [u64; 2]) -> Option<u32> {
        process::snat_index::<F, Self>(self, address)
    }

    /// [`process::arrival`], in a function of its own.
    fn arrival(&self, interface: u32, vlan: u32, mac: u64) -> Option<u16> {
        process::arrival(self, interface, vlan, mac)
    }

    /// [`forward::another`], in a function of its own.
    fn another<F: Family>(&self, service: u16, hash: FlowHash, refused: u8) -> u8 {
        forward::another::<F, Self>(self, service, hash, refused)
    }

    /// [`next_hop::learn`], in a function of its own.
    fn learn(&self, hop: u64) -> u16 {
        next_hop::learn(self, hop)
    }

    /// [`reply::is_backend`], in a function of its own.
    fn is_backend(&self, family: u8, address: [u64; 2], port: u16) -> bool {
        reply::is_backend(self, family, address, port)
    }

    /// [`flow::find_in`], in a function of its own.
    fn find_in<F: Family>(&self, query: &Query<F::Tuple>, candidates: u32, except: Slot) -> Found {
        flow::find_in::<F, Self>(self, query, candidates, except)
    }

    /// [`flow::claim_free`], in a function of its own.
    fn claim_free<F: Family>(&self, query: &Query<F::Tuple>, claimer: &Claimer) -> Claim {
        flow::claim_free::<F, Self>(self, query, claimer)
    }

    /// [`flow::choose`], in a function of its own.
    fn choose<F: Family>(&self, query: &Query<F::Tuple>, claimer: &Claimer) -> Choice {
        flow::choose::<F, Self>(self, query, claimer)
    }

    /// [`flow::take`], in a function of its own.
    fn take<F: Family>(&self, query: &Query<F::Tuple>, claimer: &Claimer, found: Found) -> Claim {
        flow::take::<F, Self>(self, query, claimer, found)
    }

    /// Counts what happened on the way.
    #[inline(always)]
    fn count_event(&self, service: u16, event: Event) {
        self.count_place(service, Counter::Event(event).index() as u16);
    }

    /// The backend that a flow hashes to; 0 where the table has no entry for it.
    #[inline(always)]
    fn select(&self, half: u32, hash: FlowHash) -> u8 {
        self.selected(half, hash.selection(crate::maglev::TABLE_SIZE))
    }
}

/// Something that is done several times.
pub trait Step {
    /// Does it for the time with this number. True: that was the last.
    fn step(&mut self, index: u32) -> bool;
}
