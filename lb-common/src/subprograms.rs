//! The steps that the kernel's verifier checks on their own.
//!
//! Each is a global function in `lb-ebpf`, so that it is verified once and not again for every path that leads to it, and
//! has a stack of its own. The tests' memory calls the plain functions. Only the two implementations know both sides:
//! this trait is below all steps.

use crate::{
    arrival::Arrival,
    class::Class,
    client_answer::ClientAnswer,
    disposition::Disposition,
    flow::{
        claimer::Claimer,
        family::Family,
        query::Query,
        slot::{Choice, Claim, Found, Slot},
    },
    frame::Frame,
    hash::FlowHash,
    layout::Config,
    maps::Maps,
    segment::Segment,
};

/// Steps in functions of their own, over [`Maps`] and one kind of frame.
pub trait Subprograms: Maps {
    /// How the packet is reached.
    type Frame: Frame;

    /// See [`crate::destination::listener`].
    fn find_listener(&self, family: u8, address: [u64; 2], port: u16) -> u16;
    /// See [`crate::destination::snat_index`].
    fn snat_index<A: Family>(&self, address: [u64; 2]) -> Option<u32>;
    /// See [`crate::destination::arrival`].
    fn arrival(&self, interface: u32, vlan: u32, mac: u64) -> Arrival;
    /// See [`crate::forward::another`].
    fn another<A: Family>(&self, service: u16, hash: FlowHash, refused: u8) -> u8;
    /// See [`crate::next_hop::learn`].
    fn learn(&self, hop: u64) -> u16;
    /// See [`crate::source_budget::admit`].
    fn admit_source(&self, family: u8, source: u64) -> bool;
    /// See [`crate::reply::is_backend`].
    fn is_backend(&self, family: u8, address: [u64; 2], port: u16) -> bool;

    /// See [`crate::flow::find_in`].
    fn find_in<A: Family>(&self, query: &Query<A::Tuple>, candidates: u32, except: Slot) -> Found;
    /// See [`crate::flow::claim_free`].
    fn claim_free<A: Family>(&self, query: &Query<A::Tuple>, claimer: &Claimer) -> Claim;
    /// See [`crate::flow::choose`].
    fn choose<A: Family>(&self, query: &Query<A::Tuple>, claimer: &Claimer) -> Choice;
    /// See [`crate::flow::take`].
    fn take<A: Family>(&self, query: &Query<A::Tuple>, claimer: &Claimer, found: Found) -> Claim;

    /// See [`crate::client_event::client_event`].
    fn client_event<A: Family>(
        &self,
        query: &Query<A::Tuple>,
        found: Found,
        segment: &Segment,
        service: u16,
    ) -> ClientAnswer;
    /// See [`crate::backend_event::backend_event`].
    fn backend_event<A: Family>(&self, found: Found, segment: &Segment, service: u16) -> u64;

    /// See [`crate::parse::tags`].
    fn tags(frame: &mut Self::Frame) -> u64;
    /// See [`crate::parse::upper_layer`].
    fn upper_layer(frame: &mut Self::Frame, transport: usize, next: u8) -> u64;
    /// See [`crate::parse::option_sum`].
    fn option_sum(frame: &mut Self::Frame, offset: usize, end: usize) -> u64;
    /// See [`crate::rewrite::retag`].
    fn retag(frame: &mut Self::Frame, config: &Config, network: usize, kind: u16, interface: u16) -> bool;
    /// See [`crate::next_hop::routed`].
    fn routed(&self, frame: &mut Self::Frame, family: u8, address: [u64; 2]) -> u64;

    /// Does a socket of this host have the frame's connection? See [`crate::host_socket`].
    fn has_socket<A: Family>(&self, frame: &mut Self::Frame) -> bool;

    /// See [`crate::pipeline::segments`].
    fn segments<A: Family>(&self, frame: &mut Self::Frame, class: Class) -> Disposition;
    /// See [`crate::icmp::translate`].
    fn translate_icmp<A: Family>(&self, frame: &mut Self::Frame) -> Disposition;
    /// See [`crate::refuse::answer`].
    fn refuse<A: Family>(frame: &mut Self::Frame, refused: Disposition) -> Disposition;
}
