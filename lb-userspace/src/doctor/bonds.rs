//! Bonds: whether the kernel takes a native program there, and their members, on which it would run.

use super::{
    Finding, Level,
    interfaces::{harmful_offloads, other_programs, subject, xdp_mode},
    note, ok,
};
use crate::{
    config::XdpMode,
    network::{Interface, mode_for, native_obstacle, virtio},
};

/// `tagged`: frames with a VLAN tag are ours. Where the bond cannot be served at all, nothing is found here.
pub(super) fn examine(bond: &Interface, members: &[Interface], tagged: bool, mode: XdpMode) -> Vec<Finding> {
    let Ok(mode) = mode_for(bond, tagged, mode) else { return Vec::new() };
    if mode == XdpMode::Generic {
        let why = native_obstacle(bond).map_or("as configured".to_owned(), |obstacle| obstacle.reason);
        return vec![note(subject(bond), format!("a bond: generic XDP ({why})"))];
    }
    let names: Vec<_> = members.iter().map(|it| it.name.as_str()).collect();
    let on = if names.is_empty() { "of which it has none yet".to_owned() } else { names.join(" and ") };
    let mut findings = vec![ok(subject(bond), format!("a bond: native XDP, on its members, {on}"))];
    for member in members {
        findings.push(in_bond(xdp_mode(member, mode, &virtio::obstacles(&member.name)), mode));
        findings.extend(other_programs(member).into_iter().map(|finding| in_bond(finding, mode)));
        findings.extend(harmful_offloads(member, mode, tagged));
    }
    findings
}

/// What keeps one member from taking the program is no failure where the bond may be in generic mode.
fn in_bond(finding: Finding, mode: XdpMode) -> Finding {
    if finding.level != Level::Failure || mode == XdpMode::Native {
        return finding;
    }
    let what = format!("{}; so the bond that it is a member of has generic XDP, slower", finding.what);
    Finding { level: Level::Note, what, ..finding }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::{BondMode, BondXmitHashPolicy};

    use super::*;
    use crate::network::{AttachedXdp, Bonding, Kind, XdpAttachMode};

    fn interface(name: &str, kind: Kind, driver: &str) -> Interface {
        Interface {
            index: 1,
            name: name.to_owned(),
            mac: None,
            mtu: 1500,
            up: true,
            carrier: true,
            kind,
            master: None,
            driver: Some(driver.to_owned()),
            xdp: Vec::new(),
        }
    }

    fn bond(mode: BondMode) -> Interface {
        let bonding = Bonding { mode, policy: BondXmitHashPolicy::Layer2 };
        interface("bond0", Kind::Bond(bonding), "bonding")
    }

    fn levels(findings: &[Finding]) -> Vec<Level> {
        findings.iter().map(|finding| finding.level).collect()
    }

    #[test]
    fn members_are_named_and_those_that_do_not_take_the_program_are_found() {
        let bond = bond(BondMode::ActiveBackup);
        let able = interface("bonded0", Kind::Device, "igb");
        let unable = interface("bonded1", Kind::Device, "r8169");
        let occupied = AttachedXdp { mode: XdpAttachMode::Native, program: u32::MAX };
        let occupied = Interface { xdp: vec![occupied], ..interface("bonded2", Kind::Device, "igb") };

        let found = examine(&bond, &[able.clone(), occupied.clone()], false, XdpMode::Auto);
        assert!(found[0].what.ends_with("bonded0 and bonded2"), "{found:?}");
        assert_eq!(levels(&found), [Level::Ok, Level::Ok, Level::Ok, Level::Note]);
        assert!(found[3].what.contains("another XDP program") && found[3].what.contains("generic"));
        let native = examine(&bond, &[able.clone(), occupied], false, XdpMode::Native);
        assert_eq!(levels(&native)[3], Level::Failure);
        // A VLAN above it leaves no other mode.
        for (tagged, mode) in [(true, XdpMode::Auto), (false, XdpMode::Native)] {
            let found = examine(&bond, &[able.clone(), unable.clone()], tagged, mode);
            assert_eq!(levels(&found), [Level::Ok, Level::Ok, Level::Failure]);
        }
    }

    #[test]
    fn a_bond_in_generic_mode_says_why_and_its_members_are_not_asked() {
        let member = [interface("bonded1", Kind::Device, "r8169")];
        let found = examine(&bond(BondMode::BalanceAlb), &member, false, XdpMode::Auto);
        assert_eq!(levels(&found), [Level::Note]);
        assert!(found[0].what.contains("mode balance-alb"), "{found:?}");
        let configured = examine(&bond(BondMode::ActiveBackup), &member, false, XdpMode::Generic);
        assert!(configured[0].what.contains("as configured"), "{configured:?}");
        assert!(examine(&bond(BondMode::BalanceAlb), &member, false, XdpMode::Native).is_empty());
    }
}
