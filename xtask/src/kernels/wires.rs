//! A guest's network cards, in pairs: what leaves one card of a pair arrives at the other, so that the guest talks to
//! itself through real drivers.
//!
//! Where this machine has `/dev/net/tun`, the wire between two cards is a pair of taps that redirect to each other, in
//! a network namespace that ends with the emulator. Frames keep what a virtual machine's frames have: unfinished
//! checksums, and sizes that a card is to cut. Elsewhere it is a hub of the emulator's own, where no card has offloads.

use std::{
    fmt::{self, Write as _},
    fs::File,
    process::Command,
};

/// One wire and its cards.
struct Wire {
    /// What the guest calls it.
    name: &'static str,
    /// The card under test.
    device: &'static str,
    queues: u8,
}

/// The queues of most cards, one a processor.
const QUEUES: u8 = 2;

const WIRES: [Wire; 4] = [
    Wire { name: "front", device: "virtio-net-pci,mq=on,vectors=6", queues: QUEUES },
    Wire { name: "back", device: "virtio-net-pci,mq=on,vectors=6", queues: QUEUES },
    Wire { name: "intel", device: "e1000e", queues: 1 },
    Wire { name: "fixed", device: "virtio-net-pci,mq=on,vectors=6,ctrl_guest_offloads=off", queues: QUEUES },
];

/// The card at the other end of each wire.
const PEER: &str = "virtio-net-pci";
/// The first card's place on the bus.
const FIRST_SLOT: usize = 0x10;

/// How wires are made on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Taps,
    Hub,
}

impl Kind {
    /// What this machine can do.
    pub(super) fn of_this_machine() -> Self {
        let tun = File::options().read(true).write(true).open("/dev/net/tun");
        if tun.is_ok() && redirects() { Self::Taps } else { Self::Hub }
    }

    /// The emulator's arguments for all cards.
    pub(super) fn arguments(self) -> Vec<String> {
        let mut arguments = Vec::new();
        for (index, wire) in WIRES.iter().enumerate() {
            let ends = [(wire.device, wire.queues, "a"), (PEER, 1, "b")];
            for (end, (device, queues, letter)) in ends.into_iter().enumerate() {
                let number = 2 * index + end;
                let id = format!("w{index}{letter}");
                let backend = match (self, queues) {
                    (Self::Hub, _) => format!("hubport,id={id},hubid={index}"),
                    (Self::Taps, 1) => format!("tap,id={id},ifname={id},script=no,downscript=no"),
                    (Self::Taps, _) => {
                        format!("tap,id={id},ifname={id},script=no,downscript=no,queues={queues}")
                    }
                };
                let slot = FIRST_SLOT + number;
                let device = format!("{device},netdev={id},addr={slot:#x},mac=52:54:00:00:00:{number:02x}");
                // A hub has one queue.
                let device = if self == Self::Hub { device.replace("mq=on,vectors=6,", "") } else { device };
                arguments.extend(["-netdev".to_owned(), backend, "-device".to_owned(), device]);
            }
        }
        arguments
    }

    /// A shell's commands that make what the cards are plugged into, in a network namespace of its own.
    pub(super) fn script(self) -> String {
        if self == Self::Hub {
            return String::new();
        }
        let mut script = "set -e\necho 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6\n".to_owned();
        for (index, wire) in WIRES.iter().enumerate() {
            for (letter, queues) in [("a", wire.queues), ("b", 1)] {
                let queues = if queues > 1 { "multi_queue" } else { "" };
                let _ = writeln!(script, "ip tuntap add dev w{index}{letter} mode tap vnet_hdr {queues}");
                let _ = writeln!(script, "ip link set dev w{index}{letter} up");
            }
            for (from, to) in [("a", "b"), ("b", "a")] {
                let _ =
                    writeln!(script, "{}", redirect(&format!("w{index}{from}"), &format!("w{index}{to}")));
            }
        }
        script
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Taps => "taps, with offloads",
            Self::Hub => {
                "the emulator's hubs, without offloads: there is no /dev/net/tun, or no `mirred` here"
            }
        })
    }
}

/// Everything that arrives at one interface leaves by another, as it is.
fn redirect(from: &str, to: &str) -> String {
    format!(
        "tc qdisc add dev {from} clsact && tc filter add dev {from} ingress protocol all u32 match u32 0 0 \
         action mirred egress redirect dev {to}"
    )
}

/// Whether this machine's kernel can do that.
fn redirects() -> bool {
    let script = format!(
        "ip tuntap add dev one mode tap && ip tuntap add dev two mode tap && {}",
        redirect("one", "two")
    );
    let tried = Command::new("unshare").args(["--net", "sh", "-c", &script]).output();
    tried.is_ok_and(|output| output.status.success())
}

/// What the guest is told: each wire's name, and the places of its two cards on the bus.
pub(super) fn for_the_guest() -> Vec<String> {
    let slot = |number: usize| format!("{:02x}.0", FIRST_SLOT + number);
    let wires = WIRES.iter().enumerate();
    wires.map(|(index, wire)| format!("{}={},{}", wire.name, slot(2 * index), slot(2 * index + 1))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_card_has_a_place_and_a_wire() {
        for kind in [Kind::Taps, Kind::Hub] {
            let arguments = kind.arguments().join(" ");
            assert_eq!(arguments.matches("-device").count(), 2 * WIRES.len(), "{arguments}");
            for told in for_the_guest() {
                let (_, places) = told.split_once('=').expect("a name");
                for place in places.split(',') {
                    let slot = place.strip_suffix(".0").expect("a function");
                    assert!(arguments.contains(&format!("addr=0x{slot}")), "{place} in {arguments}");
                }
            }
            assert_eq!(arguments.contains("mq=on"), kind == Kind::Taps);
        }
    }

    #[test]
    fn taps_are_redirected_both_ways() {
        let script = Kind::Taps.script();
        assert_eq!(script.matches("mirred egress redirect").count(), 2 * WIRES.len());
        assert_eq!(Kind::Hub.script(), "");
    }
}
