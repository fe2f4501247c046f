//! What a bond does with packets, as far as XDP is concerned.
//!
//! The kernel runs a native program of a bond on each of its members, and sends what the program sends (`XDP_TX`) by the
//! member that the bond would choose. It cannot do so in every mode: `bond_xdp_check` in `drivers/net/bonding/bond_main.c`.

use netlink_packet_route::link::{BondMode, BondXmitHashPolicy, InfoBond, InfoData, LinkInfo};

/// The settings of a bond that decide whether it takes a native program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bonding {
    /// How it shares packets among its members.
    pub mode: BondMode,
    /// What it chooses the member by, in the modes that hash.
    pub policy: BondXmitHashPolicy,
}

/// Why a bond takes no native program, and what to do about that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// As a sentence that begins with the bond's name.
    pub reason: String,
    /// As a sentence.
    pub fix: String,
}

impl Bonding {
    /// As the kernel describes a bond. What it leaves out is as in a new bond.
    pub(super) fn from_info(info: &[LinkInfo]) -> Self {
        let mut bonding = Self { mode: BondMode::BalanceRr, policy: BondXmitHashPolicy::Layer2 };
        let data = info.iter().filter_map(|value| match value {
            LinkInfo::Data(InfoData::Bond(data)) => Some(data),
            _ => None,
        });
        for attribute in data.flatten() {
            match attribute {
                InfoBond::Mode(mode) => bonding.mode = *mode,
                InfoBond::XmitHashPolicy(policy) => bonding.policy = *policy,
                _ => {}
            }
        }
        bonding
    }

    /// What keeps the bond called `name` from taking a native program, whatever its members are. A mode that is not known
    /// here is left to the kernel.
    pub(super) fn obstacle(self, name: &str) -> Option<Obstacle> {
        let hashes = matches!(self.mode, BondMode::BalanceXor | BondMode::Ieee8023Ad);
        match self.mode {
            BondMode::Broadcast | BondMode::BalanceTlb | BondMode::BalanceAlb => Some(Obstacle {
                reason: format!(
                    "{name} is a bond in mode {}, for which the kernel takes no native program",
                    self.mode
                ),
                fix: "Use the mode active-backup, balance-rr, balance-xor or 802.3ad".to_owned(),
            }),
            mode if hashes && self.policy == BondXmitHashPolicy::VlanSrcMac => Some(Obstacle {
                reason: format!(
                    "{name} is a bond in mode {mode} with xmit_hash_policy vlan+srcmac, for which the kernel takes no native \
                     program"
                ),
                fix: format!("Use another policy (`ip link set {name} type bond xmit_hash_policy layer3+4`)"),
            }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_modes_and_the_policy_that_the_kernel_refuses_are_named() {
        use BondMode::{
            ActiveBackup, BalanceAlb, BalanceRr, BalanceTlb, BalanceXor, Broadcast, Ieee8023Ad, Other,
        };
        use BondXmitHashPolicy::{Layer34, VlanSrcMac};
        let obstacle = |mode, policy| Bonding { mode, policy }.obstacle("bond0");
        for mode in [ActiveBackup, BalanceRr, BalanceXor, Ieee8023Ad, Other(9)] {
            assert_eq!(obstacle(mode, Layer34), None);
        }
        // In these modes the policy is not looked at.
        for mode in [ActiveBackup, BalanceRr] {
            assert_eq!(obstacle(mode, VlanSrcMac), None);
        }
        for (mode, name) in
            [(Broadcast, "broadcast"), (BalanceTlb, "balance-tlb"), (BalanceAlb, "balance-alb")]
        {
            let obstacle = obstacle(mode, Layer34).unwrap();
            assert!(obstacle.reason.contains(&format!("bond0 is a bond in mode {name},")), "{obstacle:?}");
            assert!(obstacle.fix.contains("802.3ad"), "{obstacle:?}");
        }
        for mode in [BalanceXor, Ieee8023Ad] {
            let obstacle = obstacle(mode, VlanSrcMac).unwrap();
            assert!(obstacle.reason.contains("vlan+srcmac"), "{obstacle:?}");
            assert!(obstacle.fix.contains("ip link set bond0 type bond"), "{obstacle:?}");
        }
    }
}
