//! The connect hook's decision: where a connection that a process on this host opens goes.
//!
//! It looks at the tables that packets are looked up in, listeners, services and selections, once for each connection.
//! The address is exchanged before the connection exists, so no packet of it costs anything afterwards.
//!
//! **The backend is drawn by lot** from the service's selection table, which holds the backends in proportion to their
//! weights. Packets are hashed because the packets of a flow, and every load balancer, must agree on its backend; here
//! one decision holds for the whole connection, and there is nothing to hash: its own port is chosen later. A hash of
//! the socket's cookie would spread as evenly, but send a socket that is tried again to the same backend again.

use crate::{
    destination::same, hash::scale, layout::family, maglev::TABLE_SIZE, subprograms::Subprograms,
    word::packed_word,
};

packed_word! {
    /// The decision about a connection: one word, so that it stays in a register.
    pub struct Verdict(u32) as u32;
}

impl Verdict {
    /// For no listener that serves this process: left alone.
    pub const NOT_OURS: Self = Self(0);
    const REFUSED: u32 = 1 << 8;

    /// Sent to a backend of a service.
    #[inline(always)]
    #[must_use]
    pub const fn redirected(service: u16, backend: u8) -> Self {
        Self(backend as u32 | (service as u32) << 16)
    }

    /// Refused at once: the service has no usable backend.
    #[inline(always)]
    #[must_use]
    pub const fn refused(service: u16) -> Self {
        Self(Self::REFUSED | (service as u32) << 16)
    }

    /// Is it refused?
    #[inline(always)]
    #[must_use]
    pub const fn is_refused(self) -> bool {
        self.0 & Self::REFUSED != 0
    }

    /// The backend it is sent to.
    #[inline(always)]
    #[must_use]
    pub const fn backend(self) -> u8 {
        self.0 as u8
    }

    /// The service it is for.
    #[inline(always)]
    #[must_use]
    pub const fn service(self) -> u16 {
        (self.0 >> 16) as u16
    }
}

/// The id of the listener at this address (words) and port (word), where `first` is the first on that port; 0: there is none.
/// The first two on the port are compared here: every connection of this host to that port pays for it.
#[inline(always)]
pub fn listener_at<S: Subprograms>(maps: &S, first: u16, family: u8, address: [u64; 2], port: u16) -> u16 {
    let mut id = first;
    for _ in 0..2 {
        let Some(listener) = maps.listener(id) else {
            return 0;
        };
        if listener.family == family && same(listener.address, address) {
            return id;
        }
        id = listener.next;
        if id == 0 {
            return 0;
        }
    }
    maps.find_listener(family, address, port)
}

/// The decision about a connection to the listener `id`. `own_network`: the process is in the network namespace that is
/// served; `random`: 32 even bits.
#[inline(always)]
pub fn verdict<S: Subprograms>(maps: &S, id: u16, own_network: bool, random: u32) -> Verdict {
    let Some(listener) = maps.listener(id) else {
        return Verdict::NOT_OURS;
    };
    let Some(service) = maps.service(listener.service) else {
        return Verdict::NOT_OURS;
    };
    // The listener was taken from its service and waits for its last flow to end: a local socket may serve the connection.
    if listener.service == 0 {
        return Verdict::NOT_OURS;
    }
    // Every network namespace has a loopback interface of its own.
    if !own_network && (service.pods == 0 || is_loopback(listener.family, listener.address)) {
        return Verdict::NOT_OURS;
    }
    let half = if listener.family == family::IPV4 { service.selection4 } else { service.selection6 };
    if half == 0 {
        return Verdict::refused(listener.service);
    }
    let backend = maps.selected(half - 1, scale(random, TABLE_SIZE));
    if backend == 0 {
        return Verdict::refused(listener.service);
    }
    Verdict::redirected(listener.service, backend)
}

/// Is the address (words) one of the host's own that never leaves it: 127.0.0.0/8 or ::1?
#[inline(always)]
#[must_use]
pub const fn is_loopback(family: u8, address: [u64; 2]) -> bool {
    if family == family::IPV4 {
        (address[0] as u32).to_ne_bytes()[0] == 127
    } else {
        address[0] == 0 && address[1] == 1u64.to_be()
    }
}

/// An IPv6 address as the maps have it, from the four words that the kernel lends.
#[inline(always)]
#[must_use]
pub const fn joined(words: [u32; 4]) -> [u64; 2] {
    let [a, b, c, d] = words;
    if cfg!(target_endian = "little") {
        [a as u64 | (b as u64) << 32, c as u64 | (d as u64) << 32]
    } else {
        [(a as u64) << 32 | b as u64, (c as u64) << 32 | d as u64]
    }
}

/// The reverse of [`joined`].
#[inline(always)]
#[must_use]
pub const fn split(address: [u64; 2]) -> [u32; 4] {
    let [high, low] = address;
    if cfg!(target_endian = "little") {
        [high as u32, (high >> 32) as u32, low as u32, (low >> 32) as u32]
    } else {
        [(high >> 32) as u32, high as u32, (low >> 32) as u32, low as u32]
    }
}

/// An IPv4 address (its word) in IPv6 notation, `::ffff:192.0.2.1`, as words.
#[inline(always)]
#[must_use]
pub const fn mapped(address: u32) -> [u64; 2] {
    joined([0, 0, 0xffffu32.to_be(), address])
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::net::{IpAddr, SocketAddr};

    use super::*;
    use crate::{
        layout::NextHop,
        maps::Maps as _,
        memory::{Memory, port_word, words},
    };

    fn at(address: &str) -> SocketAddr {
        address.parse().unwrap()
    }

    /// A service on loopback and a VIP, with two backends of which each family has one.
    fn world() -> Memory {
        let mut memory = Memory::new(256, 64, 1);
        let service = memory.add_service();
        for listener in ["127.0.0.1:16443", "10.0.0.100:6443", "[::1]:16443", "[fd00::100]:6443"] {
            memory.add_listener(at(listener), service, 0);
        }
        let four = memory.add_backend(at("10.0.0.1:6443"), NextHop::UNKNOWN);
        let six = memory.add_backend(at("[fd00::1]:6443"), NextHop::UNKNOWN);
        memory.select(service, family::IPV4, &[four]);
        memory.select(service, family::IPV6, &[six]);
        memory
    }

    fn connect(memory: &Memory, to: &str, own_network: bool) -> Verdict {
        let to = at(to);
        let family = if to.is_ipv4() { family::IPV4 } else { family::IPV6 };
        let first = memory.first_listener(to.port());
        let id = listener_at(&memory, first, family, words(to.ip()), port_word(to.port()));
        if id == 0 { Verdict::NOT_OURS } else { verdict(&memory, id, own_network, 0) }
    }

    #[test]
    fn a_connection_to_a_listener_goes_to_a_backend_of_its_family() {
        let memory = world();
        for (to, backend) in
            [("127.0.0.1:16443", 1), ("10.0.0.100:6443", 1), ("[::1]:16443", 2), ("[fd00::100]:6443", 2)]
        {
            assert_eq!(connect(&memory, to, true), Verdict::redirected(1, backend), "{to}");
        }
        for to in ["127.0.0.1:6443", "127.0.0.2:16443", "10.0.0.100:16443", "[::2]:16443"] {
            assert_eq!(connect(&memory, to, true), Verdict::NOT_OURS, "{to}");
        }
    }

    #[test]
    fn a_listener_is_found_among_many_on_its_port() {
        let mut memory = world();
        let more: Vec<_> = (1..=4).map(|last| at(&format!("10.0.1.{last}:6443"))).collect();
        for (number, listener) in more.iter().enumerate() {
            memory.add_listener(*listener, 1, 0);
            for known in &more[..=number] {
                assert_eq!(connect(&memory, &known.to_string(), true), Verdict::redirected(1, 1), "{known}");
            }
            assert_eq!(connect(&memory, "10.0.0.100:6443", true), Verdict::redirected(1, 1));
            assert_eq!(connect(&memory, "10.0.1.9:6443", true), Verdict::NOT_OURS);
        }
    }

    #[test]
    fn pods_are_served_when_the_service_says_so_and_never_on_loopback() {
        let mut memory = world();
        for to in ["127.0.0.1:16443", "10.0.0.100:6443", "[::1]:16443", "[fd00::100]:6443"] {
            assert_eq!(connect(&memory, to, false), Verdict::NOT_OURS, "{to}");
        }
        memory.services[1].pods = 1;
        assert_eq!(connect(&memory, "10.0.0.100:6443", false), Verdict::redirected(1, 1));
        assert_eq!(connect(&memory, "[fd00::100]:6443", false), Verdict::redirected(1, 2));
        for to in ["127.0.0.1:16443", "[::1]:16443"] {
            assert_eq!(connect(&memory, to, false), Verdict::NOT_OURS, "{to}");
        }
    }

    #[test]
    fn without_a_usable_backend_it_is_refused_and_only_for_those_who_are_served() {
        let mut memory = world();
        memory.select(1, family::IPV4, &[]);
        let verdict = connect(&memory, "127.0.0.1:16443", true);
        assert!(verdict.is_refused());
        assert_eq!((verdict.service(), verdict.backend()), (1, 0));
        assert_eq!(connect(&memory, "10.0.0.100:6443", false), Verdict::NOT_OURS);
        assert_eq!(connect(&memory, "[::1]:16443", true), Verdict::redirected(1, 2), "the other family");
        memory.listeners[1].service = 0;
        assert_eq!(connect(&memory, "127.0.0.1:16443", true), Verdict::NOT_OURS, "a listener that leaves");
    }

    #[test]
    fn backends_are_drawn_by_their_shares() {
        let mut memory = world();
        let other = memory.add_backend(at("10.0.0.2:6443"), NextHop::UNKNOWN);
        memory.select(1, family::IPV4, &[1, 1, other]);
        let draws = 30_000u32;
        let got = (0..draws)
            .filter(|draw| {
                let random = draw.wrapping_mul(0x9e37_79b9);
                verdict(&&memory, 1, true, random).backend() == other
            })
            .count();
        assert!((9_500..10_500).contains(&got), "{got} of {draws}, a third expected");
    }

    #[test]
    fn loopback_is_told_from_other_addresses() {
        for (address, loopback) in [
            ("127.0.0.1", true),
            ("127.255.0.9", true),
            ("128.0.0.1", false),
            ("10.0.0.127", false),
            ("::1", true),
            ("::127", false),
            ("fd00::1", false),
        ] {
            let address: IpAddr = address.parse().unwrap();
            let family = if address.is_ipv4() { family::IPV4 } else { family::IPV6 };
            assert_eq!(is_loopback(family, words(address)), loopback, "{address}");
        }
    }

    #[test]
    fn four_words_are_two() {
        let address: std::net::Ipv6Addr = "2001:db8::102:304:506".parse().unwrap();
        let bytes = address.octets();
        let four: [u32; 4] =
            std::array::from_fn(|word| u32::from_ne_bytes(bytes[4 * word..][..4].try_into().unwrap()));
        assert_eq!(joined(four), words(address.into()));
        assert_eq!(split(joined(four)), four);
        let address: std::net::Ipv6Addr = "::ffff:192.0.2.1".parse().unwrap();
        assert_eq!(mapped(u32::from_ne_bytes([192, 0, 2, 1])), words(address.into()));
    }
}
