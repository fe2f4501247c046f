//! Bonds, bridges and VLANs above them: what the program sees there, and where it sees nothing.
//!
//! On a bond the kernel runs a native program on the members: it sees their frames as they came, with their VLAN tags, and
//! is told by the data path's configuration which bond a member belongs to. A generic program above a bond or bridge gets
//! frames whose VLAN tag the kernel has taken out when they came in by the member (`__netif_receive_skb_core`).

use std::collections::BTreeMap;

use super::{Interface, Kind, Network, Obstacle, Port, TagProtocol};
use crate::config::XdpMode;

/// How the program is to be attached to an interface, or why the arrangement cannot be served.
///
/// # Errors
/// The reason and what to do, in a sentence: the program would recognise no packet, and this host's kernel would refuse
/// every connection.
pub fn mode_for(base: &Interface, tagged: bool, mode: XdpMode) -> Result<XdpMode, String> {
    let Interface { name, kind, .. } = base;
    let what = match kind {
        Kind::Bond(_) => return mode_on_bond(base, tagged, mode),
        Kind::Bridge => "bridge",
        Kind::Other(kind) if kind == "team" => "team",
        _ => return Ok(mode),
    };
    if tagged {
        return Err(format!(
            "{name} is a {what}, and the VLANs above it cannot be served: the kernel takes the VLAN tags out before the \
             program sees the frames. Use listeners and backends without a VLAN on {name}, or VLANs on a network card or a \
             bond"
        ));
    }
    Ok(mode)
}

fn mode_on_bond(bond: &Interface, tagged: bool, mode: XdpMode) -> Result<XdpMode, String> {
    let name = &bond.name;
    match (mode, native_obstacle(bond)) {
        (XdpMode::Generic, _) if tagged => Err(format!(
            "{name} is a bond, and the VLANs above it cannot be served in generic mode: the kernel takes the VLAN tags out \
             before the program sees the frames. Set xdp_mode = \"auto\" or \"native\" and restart sheave, or use listeners \
             and backends without a VLAN on {name}"
        )),
        (XdpMode::Auto, Some(Obstacle { reason, fix })) if tagged => Err(format!(
            "{reason}; but the VLANs above it can be served in native mode only. {fix}, or listeners and backends without a \
             VLAN on {name}"
        )),
        (XdpMode::Native, Some(Obstacle { reason, fix })) => {
            let other_mode = if tagged { "" } else { ", or set xdp_mode = \"auto\" or \"generic\"" };
            Err(format!("{reason}. {fix}{other_mode}"))
        }
        (XdpMode::Auto, Some(_)) => Ok(XdpMode::Generic),
        // Generic mode, which the kernel might be left with, would be of no use.
        (XdpMode::Auto, None) if tagged => Ok(XdpMode::Native),
        (mode, _) => Ok(mode),
    }
}

/// What keeps an interface from taking a native program, where its driver has one.
pub fn native_obstacle(interface: &Interface) -> Option<Obstacle> {
    match interface.kind {
        Kind::Bond(bonding) => bonding.obstacle(&interface.name),
        _ => None,
    }
}

impl Network {
    /// What an interface is made of, where it is more than a card: `eth0.5: VLAN 5 on bond0, a bond of eth0 and eth1`.
    pub fn arrangement(&self, interface: u32) -> Option<String> {
        let port = self.port_of(interface).ok()?;
        self.read(|tables| describe(&tables.links, interface, &port))
    }
}

fn describe(links: &BTreeMap<u32, Interface>, interface: u32, port: &Port) -> Option<String> {
    let (top, base) = (links.get(&interface)?, links.get(&port.index)?);
    let tag = |tag: &super::Tag| match tag.protocol {
        TagProtocol::Ieee8021Q => format!("VLAN {}", tag.id),
        TagProtocol::Ieee8021Ad => format!("802.1ad VLAN {}", tag.id),
    };
    // The innermost first: the interface is that.
    let mut parts: Vec<_> = port.tags.iter().rev().map(tag).collect();
    if !port.tags.is_empty() {
        parts.push(base.name.clone());
    }
    let members = links.values().filter(|it| it.master == Some(base.index)).map(|it| it.name.as_str());
    let members: Vec<_> = members.collect();
    let of = if members.is_empty() { "nothing yet".to_owned() } else { members.join(", ") };
    let is = match &base.kind {
        Kind::Bond(_) => Some(format!("a bond of {of}")),
        Kind::Bridge => Some(format!("a bridge of {of}")),
        Kind::Other(kind) if kind == "team" => Some(format!("a team of {of}")),
        _ => None,
    };
    if parts.is_empty() && is.is_none() {
        return None;
    }
    let vlans = parts.join(" on ");
    let whole =
        [(!vlans.is_empty()).then_some(vlans), is].into_iter().flatten().collect::<Vec<_>>().join(", ");
    Some(format!("{}: {whole}", top.name))
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::{BondMode, BondXmitHashPolicy};

    use super::super::{Bonding, Tag, interface::port_of};
    use super::*;

    fn bonding(mode: BondMode, policy: BondXmitHashPolicy) -> Bonding {
        Bonding { mode, policy }
    }

    fn interface(index: u32, name: &str, kind: Kind, master: Option<u32>) -> (u32, Interface) {
        (index, Interface::sample(index, name, kind, master))
    }

    fn vlan(parent: u32, id: u16, protocol: TagProtocol) -> Kind {
        Kind::Vlan { parent: Some(parent), tag: Tag { protocol, id } }
    }

    fn links() -> BTreeMap<u32, Interface> {
        BTreeMap::from([
            interface(1, "eth0", Kind::Device, Some(3)),
            interface(2, "eth1", Kind::Device, Some(3)),
            interface(
                3,
                "bond0",
                Kind::Bond(bonding(BondMode::ActiveBackup, BondXmitHashPolicy::Layer2)),
                None,
            ),
            interface(4, "bond0.5", vlan(3, 5, TagProtocol::Ieee8021Q), None),
            interface(5, "eth2", Kind::Device, Some(6)),
            interface(6, "br0", Kind::Bridge, None),
            interface(7, "br0.7", vlan(6, 7, TagProtocol::Ieee8021Ad), None),
            interface(8, "inner", vlan(7, 8, TagProtocol::Ieee8021Q), None),
            interface(9, "eth3", Kind::Device, None),
            interface(10, "eth3.9", vlan(9, 9, TagProtocol::Ieee8021Q), None),
            interface(11, "team0", Kind::Other("team".to_owned()), None),
        ])
    }

    #[test]
    fn every_stack_is_named_with_all_that_is_in_it() {
        let links = links();
        let described = |index| describe(&links, index, &port_of(&links, index).unwrap());
        assert_eq!(described(9), None);
        assert_eq!(described(3).unwrap(), "bond0: a bond of eth0, eth1");
        assert_eq!(described(4).unwrap(), "bond0.5: VLAN 5 on bond0, a bond of eth0, eth1");
        assert_eq!(described(6).unwrap(), "br0: a bridge of eth2");
        assert_eq!(described(8).unwrap(), "inner: VLAN 8 on 802.1ad VLAN 7 on br0, a bridge of eth2");
        assert_eq!(described(10).unwrap(), "eth3.9: VLAN 9 on eth3");
        assert_eq!(described(11).unwrap(), "team0: a team of nothing yet");
    }

    #[test]
    fn what_the_program_cannot_see_is_refused() {
        use XdpMode::{Auto, Generic, Native};
        let links = links();
        let mode = |index: u32, tagged, mode| mode_for(&links[&index], tagged, mode);
        for asked in [Auto, Native, Generic] {
            for card in [1, 9] {
                assert_eq!(mode(card, true, asked), Ok(asked), "VLANs on a card are served in either mode");
            }
            for stack in [6, 11] {
                let reason = mode(stack, true, asked).unwrap_err();
                assert!(reason.contains("VLANs above it cannot be served"), "{reason}");
                assert_eq!(mode(stack, false, asked), Ok(asked));
            }
        }
        let reason = mode(3, true, Generic).unwrap_err();
        assert!(reason.contains("bond0 is a bond") && reason.contains("in generic mode"), "{reason}");
    }

    #[test]
    fn a_bond_is_native_where_the_kernel_can_and_vlans_above_it_are_nothing_else() {
        use XdpMode::{Auto, Generic, Native};
        let bond = |bonding| interface(3, "bond0", Kind::Bond(bonding), None).1;
        let served = bond(bonding(BondMode::Ieee8023Ad, BondXmitHashPolicy::Layer34));
        for asked in [Auto, Native, Generic] {
            assert_eq!(mode_for(&served, false, asked), Ok(asked));
        }
        assert_eq!(mode_for(&served, true, Native), Ok(Native));
        assert_eq!(mode_for(&served, true, Auto), Ok(Native), "not generic, if the kernel should refuse");

        let modes = [BondMode::BalanceTlb, BondMode::BalanceAlb, BondMode::Broadcast];
        let refused = modes.map(|mode| bonding(mode, BondXmitHashPolicy::Layer2));
        let policy = bonding(BondMode::BalanceXor, BondXmitHashPolicy::VlanSrcMac);
        for bonding in refused.into_iter().chain([policy]) {
            let bond = bond(bonding);
            assert_eq!(mode_for(&bond, false, Auto), Ok(Generic));
            assert_eq!(mode_for(&bond, false, Generic), Ok(Generic));
            let reason = mode_for(&bond, false, Native).unwrap_err();
            let mode = format!("bond0 is a bond in mode {}", bonding.mode);
            assert!(reason.starts_with(&mode) && reason.contains("xdp_mode = \"auto\""), "{reason}");
            for asked in [Auto, Native] {
                let reason = mode_for(&bond, true, asked).unwrap_err();
                assert!(reason.starts_with(&mode) && !reason.contains("xdp_mode"), "{reason}");
            }
        }
    }
}
