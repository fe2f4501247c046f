//! All cases by name.

use anyhow::Result;
use lb_tests::cluster::Shape;

use crate::{
    basics, bonds,
    joints::{Base, Joint, Vlan},
    serving::{Mode, Trial},
};

/// One case.
pub(crate) type Case = Box<dyn Fn() -> Result<()>>;

/// One tag, as most networks have it.
const TAGGED: &[Vlan] = &[("802.1q", 10)];
/// A service tag and a customer's below it.
const TAGGED_TWICE: &[Vlan] = &[("802.1ad", 20), ("802.1q", 10)];

/// The case of this name.
pub(crate) fn find(name: &str) -> Option<Case> {
    Some(match name {
        "load" => Box::new(basics::load),
        "smoke" => Box::new(basics::smoke),
        "packets" => Box::new(|| basics::packets(&basics::DECISIONS)),
        "packets-more" => Box::new(|| basics::packets(&basics::HISTORIES)),
        "bond-generic" => Box::new(bonds::stays_generic),
        "bond-members" => Box::new(|| bonds::members_come_and_go("active-backup")),
        "bond-members-802.3ad" => Box::new(|| bonds::members_come_and_go("802.3ad")),
        "bond-balance-tlb" => Box::new(bonds::refused_natively),
        "vlan-on-bridge" => {
            let trial = Trial::new(Mode::Auto, Joint { base: Base::Bridge("front"), vlans: TAGGED });
            Box::new(move || trial.run_in_vain("is a bridge, and the VLANs above it cannot be served"))
        }
        _ => {
            let trial = trial(name)?;
            Box::new(move || trial.run())
        }
    })
}

fn trial(name: &str) -> Option<Trial> {
    let card = |wire: &'static str, mode| Trial::new(mode, Joint::card(wire));
    let virtio = |mode| card("front", mode);
    let tagged = |mode, vlans| Trial::new(mode, Joint { base: Base::Card("front"), vlans });
    let on = |base, vlans| Trial::new(Mode::Auto, Joint { base, vlans });
    let native_bond = |mode, vlans| Trial { comes_to: Mode::Native, ..on(Base::Bond(mode), vlans) };
    let two_arms = |mode| Trial { shape: Shape::TwoArm, ..virtio(mode) };
    let netem = |effect: &'static str| Trial { netem: Some(effect), ..virtio(Mode::Native) };
    Some(match name {
        "virtio-native-one-arm" => virtio(Mode::Native),
        "virtio-native-two-arms" => two_arms(Mode::Native),
        "virtio-generic-one-arm" => virtio(Mode::Generic),
        "virtio-generic-two-arms" => two_arms(Mode::Generic),
        "virtio-one-queue" => Trial { prepare: &["-L", "combined", "1"], ..virtio(Mode::Native) },
        "virtio-offloads-off" => Trial {
            prepare: &["-K", "rx", "off", "tx", "off", "gro", "off", "gso", "off", "tso", "off"],
            ..virtio(Mode::Native)
        },
        "virtio-fixed-offloads" => card("fixed", Mode::Auto),
        "e1000e" => card("intel", Mode::Auto),
        "e1000e-own" => Trial { own: true, ..card("intel", Mode::Auto) },
        "vlan-native" => tagged(Mode::Native, TAGGED),
        "vlan-generic" => tagged(Mode::Generic, TAGGED),
        "qinq-native" => tagged(Mode::Native, TAGGED_TWICE),
        "qinq-generic" => tagged(Mode::Generic, TAGGED_TWICE),
        "bond-active-backup" => native_bond("active-backup", &[]),
        "bond-balance-rr" => native_bond("balance-rr", &[]),
        "bond-802.3ad" => native_bond("802.3ad", &[]),
        "vlan-on-bond" => native_bond("active-backup", TAGGED),
        "bridge" => on(Base::Bridge("front"), &[]),
        "loss" => netem("loss 1%"),
        "reorder" => netem("delay 4ms reorder 25% 50%"),
        "duplicates" => netem("duplicate 5%"),
        _ => return None,
    })
}
