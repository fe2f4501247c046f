//! The values in the maps. Everything here is shared with user space: `repr(C)`, explicit padding, tested sizes.

use crate::{
    cell::{Cell8, Cell16, Cell32, Cell64},
    hash::Key,
    sequence::SendSequence,
    word::packed_word,
};

/// Ways of one set of the flow table.
pub const WAYS: usize = 4;
/// Sets of one SNAT address: 65,536 ports, four to a set.
pub const SETS_PER_ADDRESS: u32 = 65_536 / WAYS as u32;
/// [`Config::partners`] for tables of usual size. 32 sets of IPv6 are one page of 4,096 bytes, and of IPv4 half of one.
pub const PARTNERS: u32 = 31;
/// SNAT addresses of one family, at most.
pub const SNAT_ADDRESSES: usize = 16;
/// Buckets that are dealt out to the SNAT addresses.
pub const BUCKETS: usize = 256;
/// Places by which an SNAT address is looked up: see [`snat_place`].
pub const SNAT_PLACES: usize = 64;
/// The entry of a place that several SNAT addresses share: all of them are compared.
pub const SNAT_SHARED: u8 = 0xff;
/// Listener ids, 0 included, which stands for no listener.
pub const LISTENERS: u32 = 256;
/// Listeners that may share a port number.
pub const LISTENERS_PER_PORT: usize = 32;
/// Service ids, 0 included, which stands for "no service known".
pub const SERVICES: u32 = 65;
/// Backend ids, 0 included, which stands for no backend: an id is eight bits of a slot's word.
pub const BACKENDS: u32 = 256;
/// Interfaces that packets come from and go to; a VLAN on one counts as another.
pub const INTERFACES: usize = 32;
/// Member interfaces of bonds.
pub const MEMBERS: usize = 32;
/// Sockets of the connect hook that are known by cookie, at most. Sockets beyond these are only counted.
pub const FOLLOWED: u32 = 65_536;
/// Learned next hops: a power of two, 256 KiB. Index 0 says "not known", and the rest of its bucket is not used either, see
/// [`crate::next_hop`].
pub const NEXT_HOPS: u32 = 32_768;
/// Words of one half of a selection table: one byte an entry.
pub const SELECTION_WORDS: u32 = crate::maglev::TABLE_SIZE.div_ceil(8);
/// Selection tables: two halves for each service and family.
pub const SELECTION_HALVES: u32 = SERVICES * 4;

/// Addresses are IPv4 (in the first four bytes of sixteen) or IPv6.
pub mod family {
    /// IPv4.
    pub const IPV4: u8 = 4;
    /// IPv6.
    pub const IPV6: u8 = 6;
}

/// What the backend of a flow has sent, and what the client has acknowledged of it: see [`SendSequence`], and
/// [`crate::transition`] for what the words hold before that is known.
#[repr(C)]
#[derive(Default)]
pub struct Numbers {
    /// SND.UNA, as a number. Written by the client's direction.
    pub unacknowledged: Cell32,
    /// SND.NXT, as a number. Written by the backend's direction.
    pub next: Cell32,
}

impl Numbers {
    /// Both, as they are now.
    #[inline(always)]
    pub fn load(&self) -> SendSequence {
        SendSequence { unacknowledged: self.unacknowledged.load(), next: self.next.load() }
    }

    /// Writes what has changed: a line of memory that two CPUs share is not written for nothing.
    #[inline(always)]
    pub fn store(&self, before: SendSequence, now: SendSequence) {
        if now.next != before.next {
            self.next.store(now.next);
        }
        if now.unacknowledged != before.unacknowledged {
            self.unacknowledged.store(now.unacknowledged);
        }
    }
}

/// Four IPv4 flows: one cache line. Slot `4 · set + way` is the SNAT port.
#[repr(C, align(64))]
#[derive(Default)]
pub struct Set4 {
    /// Client address word, client port word (bits 32-47), listener id (bits 48-63).
    pub tuples: [Cell64; WAYS],
    /// See [`crate::meta`].
    pub metas: [Cell32; WAYS],
    /// The ways back to the clients: indexes into the learned next hops.
    pub return_hops: [Cell16; WAYS],
    /// The set's overflow mark: see [`OverflowMarks`].
    pub overflow: Cell8,
    /// The ways whose ports must not become slots, by bit. Written by the daemon.
    pub blocked: Cell8,
    pub(crate) reserved: [Cell8; 6],
}

/// The numbers of four IPv4 flows: half a cache line.
#[repr(C, align(32))]
#[derive(Default)]
pub struct Numbers4 {
    /// One for each way.
    pub ways: [Numbers; WAYS],
}

/// One IPv6 flow's place: 32 bytes.
#[repr(C)]
#[derive(Default)]
pub struct Way6 {
    /// The client's address, as two words.
    pub address: [Cell64; 2],
    /// Client port word, listener id (bits 16-31).
    pub port_listener: Cell32,
    /// See [`crate::meta`].
    pub meta: Cell32,
    /// What both ends have said.
    pub numbers: Numbers,
}

/// Four IPv6 flows: two cache lines.
#[repr(C, align(64))]
#[derive(Default)]
pub struct Set6 {
    /// Slot `4 · set + way` is the SNAT port.
    pub ways: [Way6; WAYS],
}

/// The way back to the client, for each slot of an IPv6 set: an index into the learned next hops.
#[repr(C, align(8))]
#[derive(Default)]
pub struct ReturnHops {
    /// One for each way.
    pub ways: [Cell16; WAYS],
}

/// Overflow marks of eight IPv6 sets. A set is marked with the epoch in which a flow whose first candidate it is went
/// beyond its first two candidates; 0 says that none did.
#[repr(C, align(8))]
#[derive(Default)]
pub struct OverflowMarks {
    /// One for each set.
    pub sets: [Cell8; 8],
}

/// Cells of a row of [`SourceBudgets`], a power of two.
pub const SOURCE_CELLS: usize = 1 << SOURCE_BITS;
/// Its logarithm.
pub const SOURCE_BITS: u32 = 14;
/// Rows of cells of [`SourceBudgets`].
pub const SOURCE_ROWS: usize = 2;

/// What sources of flows use, and may use: see [`crate::source_budget`].
#[repr(C)]
pub struct SourceBudgets {
    /// The tick counter when the daemon last counted the flow table.
    pub counted_at: Cell64,
    /// What each source may use of the flow table, a [`crate::source_budget::SourceCount`]: of IPv4's, of IPv6's. Written by
    /// the daemon.
    pub limits: [Cell64; 2],
    pub(crate) reserved: Cell64,
    /// What sources use, a [`crate::source_budget::SourceCount`] each. The program adds to them, the daemon overwrites them.
    pub cells: [[Cell64; SOURCE_CELLS]; SOURCE_ROWS],
}

/// The configuration that all packets share.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// What flows are hashed with.
    pub key: Key,
    /// The first set that is used, in each address's 16,384.
    pub first_set: u32,
    /// How many sets are used.
    pub sets: u32,
    /// How many of `snat4` there are.
    pub snat4_count: u32,
    /// How many of `snat6` there are.
    pub snat6_count: u32,
    /// How many of `interfaces` there are.
    pub interface_count: u32,
    /// Bits to shift jiffies by, so that they count in units of about one second.
    pub jiffies_shift: u32,
    /// Jiffies in 200 ms: a younger half-open slot is not reclaimed.
    pub half_open_jiffies: u32,
    /// The current epoch of overflow marks, 1 to 255.
    pub epoch: u32,
    /// One less than a power of two by which `first_set` and `sets` can be divided: the sets that are so near to a
    /// set that they are in the same page of memory, see [`PARTNERS`].
    pub partners: u32,
    /// Backend ids from 1 to this may be in use.
    pub last_backend: u32,
    /// The smallest MTU that an ICMP error may ask an IPv4 sender for.
    pub mtu_floor: u32,
    /// Not 0: the flows of an earlier table are still being copied into this one. What belongs to no flow may be of one that
    /// is not there yet.
    pub hold: u32,
    /// How many of `members` there are.
    pub member_count: u32,
    /// The interfaces (by bit) that no backend is reached by, nor answers by: what comes in by them in a backend's name is
    /// another's.
    pub clients_only: u32,
    /// Zero, which the verifier does not know: see [`Config::hide_from_verifier`].
    pub zero: u64,
    /// Where packets come from and go to.
    pub interfaces: [Interface; INTERFACES],
    /// Which interfaces are members of which bond: where a program is on a bond, the kernel runs it on the members.
    pub members: [Member; MEMBERS],
    /// IPv4 SNAT addresses, as words.
    pub snat4: [u32; SNAT_ADDRESSES],
    /// IPv6 SNAT addresses, as words.
    pub snat6: [[u64; 2]; SNAT_ADDRESSES],
    /// Which IPv4 SNAT address a bucket belongs to: see [`Bucket`].
    pub bucket4: [Bucket; BUCKETS],
    /// Which IPv6 SNAT address a bucket belongs to.
    pub bucket6: [Bucket; BUCKETS],
}

packed_word! {
    /// Where the flows of a bucket are: the index of the SNAT address that new ones leave from (bits 0-7), and of the one that
    /// older ones may still leave from (bits 8-15), as the difference between the two: 0 where there is no other. One word,
    /// so that both change at once.
    #[repr(transparent)]
    #[derive(Default)]
    pub struct Bucket(u16) as u64;
}

impl Bucket {
    /// New flows leave from one address, older ones may be at the other.
    #[must_use]
    pub const fn new(now: u8, before: u8) -> Self {
        Self(now as u16 | ((now ^ before) as u16) << 8)
    }

    /// The SNAT address of new flows, by index.
    #[inline(always)]
    #[must_use]
    pub const fn now(self) -> u32 {
        self.0 as u32 & 0xff
    }

    /// The SNAT address that older flows may be at, by index; the same where there is no other.
    #[inline(always)]
    #[must_use]
    pub const fn before(self) -> u32 {
        (self.0 ^ self.0 >> 8) as u32 & 0xff
    }

    /// Are all flows at the address of new flows?
    #[inline(always)]
    #[must_use]
    pub const fn is_settled(self) -> bool {
        self.0 <= 0xff
    }
}

/// The look-up that tells of most packets that they are not ours.
#[repr(C)]
pub struct Classifier {
    /// For each [`snat_place`] the IPv4 SNAT address that is there, plus one; 0: none; or [`SNAT_SHARED`].
    pub snat4: [Cell8; SNAT_PLACES],
    /// The same for IPv6.
    pub snat6: [Cell8; SNAT_PLACES],
    /// For each port number the id of the first listener on it; 0: none.
    pub listeners: [Cell16; 65_536],
}

/// The one entry of the control map: everything that the daemon sets and packets are processed by. One entry, so that a
/// program looks it up once. Large, so in this order: a load reaches 32,767 bytes.
#[repr(C)]
pub struct Control {
    /// The configuration that all packets share.
    pub config: Config,
    /// Services, by id.
    pub services: [Service; SERVICES as usize],
    /// Listeners, by id.
    pub listeners: [Listener; LISTENERS as usize],
    /// Backends, by id.
    pub backends: [Backend; BACKENDS as usize],
    /// Which packets may be ours.
    pub classifier: Classifier,
}

/// Where an SNAT address (its last four or eight bytes as a word) is looked up. Of neighbouring addresses no two share
/// a place: their last bytes differ.
#[inline(always)]
#[must_use]
pub const fn snat_place(word: u64, bytes: u32) -> usize {
    // First and last byte, one of which is the last of the address on any machine.
    (word ^ (word >> (8 * (bytes - 1)))) as usize % SNAT_PLACES
}

/// Enters SNAT address `index`, whose place is `place`.
pub fn enter_snat(places: &[Cell8; SNAT_PLACES], place: usize, index: usize) {
    let entry = &places[place % SNAT_PLACES];
    entry.store(if entry.load() == 0 { index as u8 + 1 } else { SNAT_SHARED });
}

impl Config {
    /// The same number, unknown to the verifier.
    ///
    /// Where several paths meet with different constants, the verifier follows what comes after once for each of them,
    /// and constants that end up in an index or a pointer multiply. Mixed with a zero that it cannot see through, they
    /// are all the same to it.
    #[inline(always)]
    #[must_use]
    pub const fn hide_from_verifier(&self, number: u64) -> u64 {
        number ^ self.zero
    }
}

/// An interface that is part of another: packets that come in by it are the other's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Member {
    /// The kernel's index of the member.
    pub index: u32,
    /// The kernel's index of the bond.
    pub bond: u32,
}

/// An interface, or a VLAN on one. Its number is its place in [`Config::interfaces`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// The kernel's interface index.
    pub index: u32,
    /// VLAN ids: the outer in bits 16-27, the only or inner one in bits 0-11. Without a tag 0; a tag of VLAN 0
    /// carries only a priority and counts as none.
    pub vlan: u32,
    /// The interface's MAC address: see [`crate::headers::Mac::number`].
    pub mac: u64,
    /// Words to write as tags: protocol and control of the outer tag, then of the inner.
    pub tags: [u32; 2],
    /// How many of `tags` there are.
    pub tag_count: u32,
    /// Zero.
    pub reserved: u32,
}

/// What clients connect to.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Listener {
    /// Address, as words; IPv4 in the lower half of the first.
    pub address: [u64; 2],
    /// Port, as a word.
    pub port: u16,
    /// See [`family`]; 0 in an unused entry.
    pub family: u8,
    /// Zero.
    pub reserved: u8,
    /// Service id.
    pub service: u16,
    /// The next listener on the same port number; 0 ends the list.
    pub next: u16,
    /// The interfaces (by bit) whose packets are for it.
    pub interfaces: u32,
    /// The one's-complement sum of address and port.
    pub sum: u32,
}

/// The backends of some listeners, and the clients that may use them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Half of the selection table for IPv4, plus one; 0: no usable backend. One store switches.
    pub selection4: u32,
    /// The same for IPv6.
    pub selection6: u32,
    /// Not 0: only clients in its allow prefixes.
    pub restricted: u32,
    /// Not 0: the connect hook takes connections from every network namespace, see [`crate::connect`].
    pub pods: u32,
}

/// The one entry of the connect hook's configuration.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hook {
    /// The cookie of the network namespace whose processes are served (`SO_NETNS_COOKIE`, `socket(7)`).
    pub network: u64,
    /// Odd: the number of the period in which sockets are followed, see [`Dialled::followed`]. Even: no socket is followed or
    /// counted.
    pub epoch: u32,
    /// Zero.
    pub reserved: u32,
}

impl Hook {
    /// Whether sockets are followed now.
    #[must_use]
    pub const fn is_following(self) -> bool {
        self.epoch % 2 == 1
    }
}

/// The connect hook's record of a connection, until it is closed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dialled {
    /// The address that the process asked for, as words, with IPv4 in the lower half of the first; in IPv6 notation if
    /// the process used that.
    pub address: [u64; 2],
    /// The address that it was sent to instead, in the same form.
    pub chosen: [u64; 2],
    /// The port that the process asked for, as a word.
    pub port: u16,
    /// The port that it was sent to.
    pub chosen_port: u16,
    /// Service id.
    pub service: u16,
    /// Backend id.
    pub backend: u16,
    /// While the socket is counted as the backend's: the [`Hook::epoch`] in which that began. Else 0. Sockets that were left
    /// behind when the hook went to another cgroup are of another epoch than those that are counted now.
    pub followed: u32,
    /// Not 0: its cookie is in the table of [`Followed`] sockets. Removing it there and counting
    /// its end go together: exactly one of program and daemon does both.
    pub named: u32,
}

/// A socket that the connect hook has redirected, by its cookie, for as long as it is not closed: all that it takes to ask
/// the kernel for it (`sock_diag(7)`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Followed {
    /// The cookie of the network namespace it is in.
    pub network: u64,
    /// Its own address, as words; IPv4 in the lower half of the first.
    pub local: [u64; 2],
    /// The backend's address, in the same form.
    pub remote: [u64; 2],
    /// Its own port, as a word.
    pub local_port: u16,
    /// The backend's port, as a word.
    pub remote_port: u16,
    /// The interface it is bound to, or 0.
    pub interface: u32,
    /// Service id.
    pub service: u16,
    /// Backend id.
    pub backend: u8,
    /// See [`family`]: of what is on the wire.
    pub family: u8,
    /// Zero.
    pub reserved: u32,
}

impl Followed {
    /// From its bytes in the map, eight to a word.
    #[must_use]
    pub const fn from_words(words: [u64; 7]) -> Self {
        let [network, local0, local1, remote0, remote1, ports, ids] = words;
        let [p0, p1, p2, p3, p4, p5, p6, p7] = ports.to_ne_bytes();
        let [s0, s1, backend, family, ..] = ids.to_ne_bytes();
        Self {
            network,
            local: [local0, local1],
            remote: [remote0, remote1],
            local_port: u16::from_ne_bytes([p0, p1]),
            remote_port: u16::from_ne_bytes([p2, p3]),
            interface: u32::from_ne_bytes([p4, p5, p6, p7]),
            service: u16::from_ne_bytes([s0, s1]),
            backend,
            family,
            reserved: 0,
        }
    }
}

/// A backend. All fields but the cells stay as they are while a slot names the id.
#[repr(C)]
#[derive(Default)]
pub struct Backend {
    /// Address, as words; IPv4 in the lower half of the first.
    pub address: [u64; 2],
    /// Port, as a word.
    pub port: u16,
    /// See [`family`]; 0 in an unused entry.
    pub family: u8,
    /// Zero.
    pub reserved: u8,
    /// See [`backend_flag`].
    pub flags: Cell32,
    /// The one's-complement sum of address and port.
    pub sum: u32,
    /// The jiffies, cut to 32 bits, of the last payload that it sent to a client; 0: none yet. A sign of life: the
    /// kernel of a process that hangs still acknowledges, but sends no payload.
    pub heard: Cell32,
    /// Where its packets go: see [`NextHop`]; 0: not known. Changed in one store.
    pub next_hop: Cell64,
    /// The time since which clients wait for it, in jiffies like `heard`: see [`crate::witness`].
    pub asked: Cell32,
    /// The time at which it last refused a SYN, or a connection of this host to it failed or retransmitted, in jiffies like
    /// `heard`; 0: never.
    pub refused: Cell32,
}

/// Flags of a [`Backend`].
pub mod backend_flag {
    /// New flows may go there: a retransmitted SYN stays.
    pub const ACCEPTS: u32 = 1;
    /// It is this host: its packets pass to the local socket.
    pub const LOCAL: u32 = 1 << 1;
}

/// A neighbour: its MAC address (bits 0-47) and the number of the interface that it is reached through (bits 48-63).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextHop(pub u64);

impl NextHop {
    /// Not known.
    pub const UNKNOWN: Self = Self(0);

    /// The neighbour with MAC address `mac` (see [`crate::headers::Mac::number`]) behind interface number `interface`.
    #[inline(always)]
    #[must_use]
    pub const fn new(mac: u64, interface: u16) -> Self {
        Self(mac | (interface as u64) << 48)
    }

    /// Its MAC address.
    #[inline(always)]
    #[must_use]
    pub const fn mac(self) -> u64 {
        self.0 & 0xffff_ffff_ffff
    }

    /// The number of the interface that it is reached through.
    #[inline(always)]
    #[must_use]
    pub const fn interface(self) -> u16 {
        (self.0 >> 48) as u16
    }
}

/// A key of the allow list, an LPM trie: service id, then the address, IPv4 as `::ffff:0:0/96`. All of it network
/// bytes, in words so that it is built without a byte-wise copy.
pub type AllowKey = [u32; 5];

/// The key for a client's whole address, as words.
#[inline(always)]
#[must_use]
pub const fn allow_key(service: u16, address: [u64; 2]) -> AllowKey {
    let [high, low] = address;
    if cfg!(target_endian = "little") {
        [(service as u32).to_be(), high as u32, (high >> 32) as u32, low as u32, (low >> 32) as u32]
    } else {
        [service as u32, (high >> 32) as u32, high as u32, (low >> 32) as u32, low as u32]
    }
}

/// Bits of an [`AllowKey`] before the address.
pub const ALLOW_SERVICE_BITS: u32 = 32;

#[cfg(test)]
mod tests {
    use core::mem::offset_of;

    use super::*;

    #[test]
    fn layouts_are_what_the_kernel_has() {
        assert_eq!((size_of::<Numbers4>(), align_of::<Numbers4>()), (32, 32));
        assert_eq!((size_of::<Set4>(), align_of::<Set4>()), (64, 64));
        assert_eq!((offset_of!(Set4, metas), offset_of!(Set4, return_hops)), (32, 48));
        assert_eq!((offset_of!(Numbers, unacknowledged), offset_of!(Numbers, next)), (0, 4));
        assert_eq!((size_of::<Way6>(), size_of::<Set6>(), align_of::<Set6>()), (32, 128, 64));
        assert_eq!(
            (offset_of!(Way6, port_listener), offset_of!(Way6, meta), offset_of!(Way6, numbers)),
            (16, 20, 24)
        );
        assert_eq!((size_of::<ReturnHops>(), size_of::<OverflowMarks>()), (8, 8));
        assert_eq!(size_of::<SourceBudgets>(), 4 * 8 + 2 * 16_384 * 8);
        assert_eq!(size_of::<Interface>(), 4 + 4 + 8 + 8 + 4 + 4);
        assert_eq!(size_of::<Listener>(), 16 + 2 + 1 + 1 + 2 + 2 + 4 + 4);
        assert_eq!(size_of::<Service>(), 16);
        assert_eq!((size_of::<Hook>(), size_of::<Dialled>(), align_of::<Dialled>()), (16, 48, 8));
        assert_eq!((size_of::<Followed>(), align_of::<Followed>()), (56, 8));
        assert_eq!(size_of::<Backend>(), 16 + 4 + 4 + 4 + 4 + 8 + 4 + 4);
        assert_eq!((offset_of!(Backend, heard), offset_of!(Backend, next_hop)), (28, 32));
        assert_eq!(
            size_of::<Config>(),
            size_of::<Key>()
                + 14 * 4
                + 8
                + INTERFACES * size_of::<Interface>()
                + MEMBERS * size_of::<Member>()
                + SNAT_ADDRESSES * (4 + 16)
                + 2 * BUCKETS * size_of::<Bucket>()
        );
        assert_eq!(size_of::<Classifier>(), 2 * SNAT_PLACES + 2 * 65_536);
        assert_eq!(
            size_of::<Control>(),
            size_of::<Config>()
                + SERVICES as usize * size_of::<Service>()
                + LISTENERS as usize * size_of::<Listener>()
                + BACKENDS as usize * size_of::<Backend>()
                + size_of::<Classifier>()
        );
        assert!(offset_of!(Control, classifier) + offset_of!(Classifier, listeners) < 32_768);
        assert_eq!(offset_of!(Config, interfaces), 96);
    }

    #[test]
    fn a_followed_socket_is_read_as_it_was_written() {
        let written = Followed {
            network: 0x0102_0304_0506_0708,
            local: [0x11, 0x12],
            remote: [0x21, 0x22],
            local_port: 0x3132,
            remote_port: 0x3334,
            interface: 0x4142_4344,
            service: 0x5152,
            backend: 0x61,
            family: family::IPV6,
            reserved: 0,
        };
        // SAFETY: seven words without padding, any of which may have any value.
        let words = unsafe { core::mem::transmute::<Followed, [u64; 7]>(written) };
        assert_eq!(Followed::from_words(words), written);
    }

    #[test]
    fn a_flow_slot_fits_its_budget() {
        let per_way = |bytes: usize| bytes as f64 / WAYS as f64;
        let ipv4 = per_way(size_of::<Set4>() + size_of::<Numbers4>());
        let beside = size_of::<ReturnHops>() as f64 + size_of::<OverflowMarks>() as f64 / 8.0;
        let ipv6 = per_way(size_of::<Set6>()) + beside / WAYS as f64;
        println!("map memory a flow slot: IPv4 {ipv4} bytes, IPv6 {ipv6} bytes");
        assert!(ipv4 <= 24.0 && ipv6 <= 48.0);
    }

    #[test]
    fn a_bucket_knows_both_addresses_of_its_flows() {
        for (now, before) in [(0, 0), (3, 3), (15, 15)] {
            let bucket = Bucket::new(now, before);
            assert_eq!(
                (bucket.now(), bucket.before(), bucket.is_settled()),
                (now.into(), before.into(), true)
            );
        }
        for (now, before) in [(0, 1), (1, 0), (15, 2)] {
            let bucket = Bucket::new(now, before);
            assert_eq!(
                (bucket.now(), bucket.before(), bucket.is_settled()),
                (now.into(), before.into(), false)
            );
        }
    }

    #[test]
    fn a_next_hop_is_one_word() {
        let hop = NextHop::new(0x0605_0403_0201, 31);
        assert_eq!((hop.mac(), hop.interface()), (0x0605_0403_0201, 31));
    }
}
