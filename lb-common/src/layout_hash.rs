//! One number for everything that must mean the same to the build that wrote the maps and to the build that takes them
//! over.
//!
//! Maps outlive the daemon and the program. A build that lays them out otherwise, numbers a slot's states otherwise or
//! hashes flows otherwise would find garbage in them, quietly. So all of it goes into a hash, and the hash into the
//! name of the directory that maps are pinned in.
//!
//! Nothing here is kept true by hand: a field or a state that is missing below does not compile, sizes and offsets are
//! the compiler's, and functions are represented by their results. Counters and the flight
//! recorder are left out, as no decision depends on them.

use core::mem::offset_of;

use crate::{
    flow::family::{Family as _, V4, V6},
    hash::Key,
    layout::{
        ALLOW_SERVICE_BITS, BACKENDS, BUCKETS, Backend, Bucket, Classifier, Config, Control, Dialled,
        FOLLOWED, Followed, Hook, INTERFACES, Interface, LISTENERS, LISTENERS_PER_PORT, Listener, MEMBERS,
        Member, NEXT_HOPS, NextHop, Numbers, Numbers4, OverflowMarks, PARTNERS, ReturnHops, SELECTION_HALVES,
        SELECTION_WORDS, SERVICES, SETS_PER_ADDRESS, SNAT_ADDRESSES, SNAT_PLACES, SNAT_SHARED, Service, Set4,
        Set6, SourceBudgets, WAYS, Way6, allow_key, backend_flag, family, snat_place,
    },
    maglev::TABLE_SIZE,
    meta::{BACKEND_FIN, BACKEND_TOLD, CLIENT_FIN, Kind, Meta, NUMBERED, RESET, RETRANSMITTED, SYN_ACK},
    next_hop::{BUCKET, UNNAMED},
};

/// An arbitrary key.
const KEY: Key = Key::new([0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210]);

/// The hash of this build.
#[must_use]
pub fn layout_hash() -> u64 {
    [structures, limits, states, words, hashes].iter().fold(Digest::new(), |digest, part| part(digest)).0
}

/// FNV-1a over texts and numbers (Fowler, Noll, Vo): it needs no strength against attacks, and never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Digest(u64);

impl Digest {
    const fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn bytes(self, bytes: &[u8]) -> Self {
        let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        Self(bytes.iter().fold(self.0, step))
    }

    /// A name and a number. The length first, so that no two sequences run together to the same.
    fn fact(self, name: &str, number: u64) -> Self {
        self.bytes(&(name.len() as u64).to_le_bytes()).bytes(name.as_bytes()).bytes(&number.to_le_bytes())
    }

    fn facts(self, facts: &[(&str, u64)]) -> Self {
        facts.iter().fold(self, |digest, (name, number)| digest.fact(name, *number))
    }
}

/// The size of the field that `_field` leads to.
const fn size_of_field<T, F>(_field: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

/// Adds a structure: its size, and name, offset and size of every field.
macro_rules! structure {
    ($digest:expr, $type:ident { $($field:ident),* $(,)? }) => {{
        // A field that is not listed does not compile.
        const _: fn(&$type) = |value| { let $type { $($field: _),* } = value; };
        $digest.fact(stringify!($type), size_of::<$type>() as u64)
            $(
                .fact(stringify!($field), offset_of!($type, $field) as u64)
                .fact("size", size_of_field::<$type, _>(|value| &value.$field) as u64)
            )*
    }};
}

fn structures(digest: Digest) -> Digest {
    let digest = structure!(digest, Numbers { unacknowledged, next });
    let digest = structure!(digest, Numbers4 { ways });
    let digest = structure!(digest, Set4 { tuples, metas, return_hops, overflow, blocked, reserved });
    let digest = structure!(digest, Way6 { address, port_listener, meta, numbers });
    let digest = structure!(digest, Set6 { ways });
    let digest = structure!(digest, ReturnHops { ways });
    let digest = structure!(digest, OverflowMarks { sets });
    let digest = structure!(digest, SourceBudgets { counted_at, limits, reserved, cells });
    let digest = structure!(
        digest,
        Config {
            key,
            first_set,
            sets,
            snat4_count,
            snat6_count,
            interface_count,
            jiffies_shift,
            half_open_jiffies,
            epoch,
            partners,
            last_backend,
            mtu_floor,
            hold,
            member_count,
            clients_only,
            zero,
            interfaces,
            members,
            snat4,
            snat6,
            bucket4,
            bucket6,
        }
    );
    let digest = structure!(digest, Member { index, bond });
    let digest = structure!(digest, Classifier { snat4, snat6, listeners });
    let digest = structure!(digest, Control { config, services, listeners, backends, classifier });
    let digest = structure!(digest, Interface { index, vlan, mac, tags, tag_count, reserved });
    let digest =
        structure!(digest, Listener { address, port, family, reserved, service, next, interfaces, sum });
    let digest = structure!(digest, Service { selection4, selection6, restricted, pods });
    let digest = structure!(digest, Hook { network, epoch, reserved });
    let digest =
        structure!(digest, Dialled { address, chosen, port, chosen_port, service, backend, followed, named });
    let digest = structure!(
        digest,
        Followed {
            network,
            local,
            remote,
            local_port,
            remote_port,
            interface,
            service,
            backend,
            family,
            reserved,
        }
    );
    structure!(
        digest,
        Backend { address, port, family, reserved, flags, sum, heard, next_hop, asked, refused }
    )
}

fn limits(digest: Digest) -> Digest {
    digest.facts(&[
        ("ways", WAYS as u64),
        ("sets", SETS_PER_ADDRESS.into()),
        ("snat addresses", SNAT_ADDRESSES as u64),
        ("partners", PARTNERS.into()),
        ("snat places", SNAT_PLACES as u64),
        ("snat shared", SNAT_SHARED.into()),
        ("buckets", BUCKETS as u64),
        ("listeners", LISTENERS.into()),
        ("listeners a port", LISTENERS_PER_PORT as u64),
        ("services", SERVICES.into()),
        ("backends", BACKENDS.into()),
        ("ports", INTERFACES as u64),
        ("members", MEMBERS as u64),
        ("followed sockets", FOLLOWED.into()),
        ("next hops", NEXT_HOPS.into()),
        ("next hops of a bucket", BUCKET.into()),
        ("unnamed next hop", UNNAMED),
        ("selection words", SELECTION_WORDS.into()),
        ("selection halves", SELECTION_HALVES.into()),
        ("selection entries", TABLE_SIZE.into()),
    ])
}

fn states(digest: Digest) -> Digest {
    // A state that is missing does not compile, here or there.
    let name = |kind: Kind| match kind {
        Kind::Free => "free",
        Kind::Claiming => "claiming",
        Kind::HalfOpen => "half-open",
        Kind::Established => "established",
        Kind::ClosedByClient => "closed by client",
        Kind::ClosedByBackend => "closed by backend",
        Kind::Killed => "killed",
    };
    let kinds = [
        Kind::Free,
        Kind::Claiming,
        Kind::HalfOpen,
        Kind::Established,
        Kind::ClosedByClient,
        Kind::ClosedByBackend,
        Kind::Killed,
    ];
    let digest = kinds.iter().fold(digest, |digest, kind| digest.fact(name(*kind), *kind as u64));
    digest.facts(&[
        ("SYN-ACK", SYN_ACK.into()),
        ("retransmitted", RETRANSMITTED.into()),
        ("numbered", NUMBERED.into()),
        ("client FIN", CLIENT_FIN.into()),
        ("backend FIN", BACKEND_FIN.into()),
        ("backend told", BACKEND_TOLD.into()),
        ("reset", RESET.into()),
        ("accepts", backend_flag::ACCEPTS.into()),
        ("local", backend_flag::LOCAL.into()),
        ("IPv4", family::IPV4.into()),
        ("IPv6", family::IPV6.into()),
    ])
}

/// How parts are put into words.
fn words(digest: Digest) -> Digest {
    let address = [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210];
    let allow = allow_key(0x12, address).map(u64::from);
    let digest = digest.facts(&[
        ("meta", Meta::new(Kind::HalfOpen, 0xab, 0xcdef).with(SYN_ACK).0.into()),
        ("next hop", NextHop::new(0x0605_0403_0201, 31).0),
        ("IPv4 tuple", V4::tuple([0x0a0b_0c0d, 0], 0x1234, 0x56)),
        // Its words are private: this is what becomes of them.
        ("IPv6 tuple", V6::hash(&KEY, V6::tuple(address, 0x1234, 0x56)).0),
        ("IPv4 snat place", snat_place(address[0], 4) as u64),
        ("IPv6 snat place", snat_place(address[0], 8) as u64),
        ("bucket now", Bucket::new(3, 5).now().into()),
        ("bucket before", Bucket::new(3, 5).before().into()),
        ("settled bucket", Bucket::new(3, 3).is_settled().into()),
        ("allow bits", ALLOW_SERVICE_BITS.into()),
    ]);
    allow.iter().fold(digest, |digest, word| digest.fact("allow key", *word))
}

/// Where a flow goes.
fn hashes(digest: Digest) -> Digest {
    [KEY.hash1(1), KEY.hash3([1, 2, 3])].iter().fold(digest, |digest, hash| {
        (0..10)
            .fold(digest, |digest, number| {
                digest.fact("candidate", hash.candidate(number, SETS_PER_ADDRESS - 256).into())
            })
            .facts(&[
                ("hash", hash.0),
                ("partner", hash.partner(PARTNERS).into()),
                ("selection", hash.selection(TABLE_SIZE).into()),
                ("bucket", hash.bucket() as u64),
            ])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_the_same_every_time() {
        assert_eq!(layout_hash(), layout_hash());
    }

    #[test]
    fn each_part_counts() {
        let start = Digest::new();
        for part in [structures, limits, states, words, hashes] {
            assert_ne!(part(start), start);
        }
    }

    /// Everything that a change of a structure can be makes another hash.
    #[test]
    fn another_layout_has_another_hash() {
        fn digest(of: impl Fn(Digest) -> Digest) -> Digest {
            of(Digest::new())
        }
        let before = digest(|digest| {
            #[repr(C)]
            struct Slot {
                first: u32,
                second: u32,
            }
            structure!(digest, Slot { first, second })
        });
        let moved = digest(|digest| {
            #[repr(C)]
            struct Slot {
                second: u32,
                first: u32,
            }
            structure!(digest, Slot { first, second })
        });
        let renamed = digest(|digest| {
            #[repr(C)]
            struct Slot {
                first: u32,
                other: u32,
            }
            structure!(digest, Slot { first, other })
        });
        let resized = digest(|digest| {
            #[repr(C)]
            struct Slot {
                first: u32,
                second: u16,
                padding: u16,
            }
            structure!(digest, Slot { first, second, padding })
        });
        let hashes = [before, moved, renamed, resized];
        for (index, one) in hashes.iter().enumerate() {
            assert!(hashes[..index].iter().all(|other| other != one), "{index}: {hashes:?}");
        }
    }

    #[test]
    fn another_state_value_has_another_hash() {
        let with = |value| Digest::new().facts(&[("established", value), ("killed", 6)]);
        assert_ne!(with(3), with(4));
        assert_ne!(Digest::new().fact("ab", 1).fact("c", 1), Digest::new().fact("a", 1).fact("bc", 1));
    }
}
