//! The layout of the flow tables before this one, as sheave 0.1 pinned it at first. Frozen: only the maps of builds that have
//! it are read by this, so nothing here may change. Addresses, ports and identifiers are as in [`lb_common::layout`].

use std::path::{Path, PathBuf};

use lb_common::{
    cell::{Cell8, Cell16, Cell32, Cell64},
    hash::Key,
};

/// The name of the directory that a build with this layout pins its maps in.
pub(super) const DIRECTORY: &str = "layout_2627030b516996f3";

/// The pin of a map in such a directory.
pub(super) fn map_path(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("map_{name}"))
}

/// On a half-open slot: the backend's SYN-ACK was seen.
pub(super) const SYN_ACK: u32 = 1 << 3;
/// The client has acknowledged it.
pub(super) const CLIENT_ACK: u32 = 1 << 4;

/// The counters of one service, in order.
pub(super) const COUNTERS: [&str; 30] = [
    "not_ours",
    "no_flow",
    "reply_unknown_slot",
    "forwarded_local",
    "forwarded",
    "replied",
    "icmp_translated",
    "refused_no_backend",
    "refused_not_allowed",
    "reset_client",
    "reset_backend",
    "second_chance",
    "dropped_table_full",
    "dropped_syn_race",
    "dropped_next_hop_unknown",
    "dropped_ttl_expired",
    "dropped_fragment",
    "dropped_extension_headers",
    "dropped_malformed",
    "dropped_bad_checksum",
    "dropped_no_room",
    "flows_claimed",
    "flows_established",
    "slots_reused_early",
    "half_open_reclaimed",
    "syn_moved",
    "next_hop_overflow",
    "connects_redirected",
    "connects_refused",
    "connects_unnamed",
];

/// One IPv4 flow's place.
#[repr(C)]
#[derive(Default)]
pub(super) struct Way4 {
    /// Client address word, client port word (bits 32-47), listener id (bits 48-63).
    pub(super) tuple: Cell64,
    /// State, backend and time of the last segment.
    pub(super) meta: Cell32,
    /// The ACK number of the client's last segment, as a number; while no SYN-ACK was seen, the jiffies of the claim.
    pub(super) last_ack: Cell32,
}

/// Four IPv4 flows.
#[repr(C, align(64))]
#[derive(Default)]
pub(super) struct Set4 {
    pub(super) ways: [Way4; 4],
}

/// One IPv6 flow's place.
#[repr(C)]
#[derive(Default)]
pub(super) struct Way6 {
    /// The client's address, as two words.
    pub(super) address: [Cell64; 2],
    /// Client port word, listener id (bits 16-31).
    pub(super) port_listener: Cell32,
    /// State, backend and time of the last segment.
    pub(super) meta: Cell32,
    /// As [`Way4::last_ack`].
    pub(super) last_ack: Cell32,
    pub(super) reserved: Cell32,
}

/// Four IPv6 flows.
#[repr(C, align(64))]
#[derive(Default)]
pub(super) struct Set6 {
    pub(super) ways: [Way6; 4],
}

/// The way back to the client, for each slot of a set: an index into the learned next hops.
#[repr(C, align(8))]
#[derive(Default)]
pub(super) struct ReturnHops {
    pub(super) ways: [Cell16; 4],
}

/// Overflow marks of eight sets.
#[repr(C, align(8))]
#[derive(Default)]
pub(super) struct OverflowMarks {
    pub(super) sets: [Cell8; 8],
}

/// The configuration that all packets share.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Config {
    pub(super) key: Key,
    pub(super) first_set: u32,
    pub(super) sets: u32,
    pub(super) snat4_count: u32,
    pub(super) snat6_count: u32,
    pub(super) port_count: u32,
    pub(super) jiffies_shift: u32,
    pub(super) half_open_jiffies: u32,
    pub(super) epoch: u32,
    pub(super) partners: u32,
    pub(super) last_backend: u32,
    pub(super) zero: u64,
    pub(super) ports: [Port; 32],
    pub(super) snat4: [u32; 16],
    pub(super) snat6: [[u64; 2]; 16],
    pub(super) bucket4: [u16; 256],
    pub(super) bucket6: [u16; 256],
}

/// An interface, or a VLAN on one.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Port {
    pub(super) interface: u32,
    pub(super) vlan: u32,
    pub(super) mac: u64,
    pub(super) tags: [u32; 2],
    pub(super) tag_count: u32,
    pub(super) reserved: u32,
}

/// What clients connect to.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Listener {
    pub(super) address: [u64; 2],
    pub(super) port: u16,
    pub(super) family: u8,
    pub(super) reserved: u8,
    pub(super) service: u16,
    pub(super) next: u16,
    pub(super) ports: u32,
    pub(super) sum: u32,
}

/// The backends of some listeners, and the clients that may use them.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Service {
    pub(super) selection4: u32,
    pub(super) selection6: u32,
    pub(super) restricted: u32,
    pub(super) pods: u32,
}

/// A backend.
#[repr(C)]
pub(super) struct Backend {
    pub(super) address: [u64; 2],
    pub(super) port: u16,
    pub(super) family: u8,
    pub(super) reserved: u8,
    pub(super) flags: Cell32,
    pub(super) sum: u32,
    pub(super) heard: Cell32,
    pub(super) next_hop: Cell64,
    pub(super) asked: Cell32,
    pub(super) refused: Cell32,
}

/// The look-up that tells of most packets that they are not ours.
#[repr(C)]
pub(super) struct Classifier {
    pub(super) snat4: [Cell8; 64],
    pub(super) snat6: [Cell8; 64],
    pub(super) listeners: [Cell16; 65_536],
}

/// The one entry of the control map.
#[repr(C)]
pub(super) struct Control {
    pub(super) config: Config,
    pub(super) services: [Service; 65],
    pub(super) listeners: [Listener; 256],
    pub(super) backends: [Backend; 256],
    pub(super) classifier: Classifier,
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    /// The figures of the build that had this layout.
    #[test]
    fn sizes_are_those_of_the_build_that_wrote_the_maps() {
        assert_eq!((size_of::<Way4>(), size_of::<Set4>(), align_of::<Set4>()), (16, 64, 64));
        assert_eq!((size_of::<Way6>(), size_of::<Set6>(), align_of::<Set6>()), (32, 128, 64));
        assert_eq!((size_of::<ReturnHops>(), size_of::<OverflowMarks>()), (8, 8));
        assert_eq!((size_of::<Port>(), size_of::<Listener>(), size_of::<Service>()), (32, 32, 16));
        assert_eq!((size_of::<Backend>(), size_of::<Classifier>()), (48, 131_200));
        assert_eq!((size_of::<Key>(), size_of::<Config>()), (32, 2448));
        assert_eq!(size_of::<Control>(), 2448 + 65 * 16 + 256 * 32 + 256 * 48 + 131_200);
        assert_eq!((offset_of!(Config, zero), offset_of!(Config, bucket4)), (72, 1424));
    }
}
