//! Members of bonds. Where the program is on a bond in native mode, the kernel runs it on the members, and names the member
//! as the interface that a packet came in by: the data path must know which bond that is, before the first packet does.
//!
//! The kernel tells of a new member a moment after it has begun to receive, and this host's own stack would reset the flows
//! whose packets came in by it meanwhile. So the data path knows in advance which interface may become a member of which
//! bond. Nothing is wrong with an entry too many: on an interface that is no member of the bond the program does not run.

use std::collections::{BTreeMap, BTreeSet};

use lb_common::layout::MEMBERS;

use super::{Controller, ControllerError, say_off};
use crate::{
    admin::JournalKind,
    dataplane::{DataplaneError, Mode},
    network::{Interface, Kind, offloads},
};

/// The members of the bonds among `bases`, the interfaces that the program is to be on, with the index of the bond; then,
/// as far as there is room, those that left one of them (`before` has them), and where there is only one bond every network
/// card that could join it.
fn table(interfaces: &[Interface], bases: &BTreeSet<u32>, before: &BTreeMap<u32, u32>) -> BTreeMap<u32, u32> {
    let is_bond = |it: &&Interface| matches!(it.kind, Kind::Bond(_)) && bases.contains(&it.index);
    let bonds: BTreeSet<u32> = interfaces.iter().filter(is_bond).map(|it| it.index).collect();
    let of_bond = |it: &Interface| it.master.filter(|master| bonds.contains(master));
    let mut table: BTreeMap<u32, u32> =
        interfaces.iter().filter_map(|it| Some((it.index, of_bond(it)?))).collect();
    let only = if bonds.len() == 1 { bonds.first() } else { None };
    let could_join = |it: &&Interface| of_bond(it).is_none() && !bases.contains(&it.index);
    let left = |it: &Interface| before.get(&it.index).filter(|bond| bonds.contains(bond));
    let card = |it: &Interface| only.filter(|_| it.kind == Kind::Device && it.mac.is_some());
    let free = || interfaces.iter().filter(could_join);
    let former = free().filter_map(|it| Some((it.index, *left(it)?)));
    let cards = free().filter_map(|it| Some((it.index, *card(it)?)));
    for (index, bond) in former.chain(cards) {
        if table.len() < MEMBERS {
            table.entry(index).or_insert(bond);
        }
    }
    table
}

impl Controller {
    /// Tells the data path about the members of the bonds that it is on.
    ///
    /// # Errors
    /// When there are more than it has room for.
    pub(super) fn write_members(&mut self) -> Result<(), DataplaneError> {
        let before = self.dataplane.members();
        let wanted = table(&self.network.interfaces(), &self.ports.bases(), &before);
        if wanted != before {
            self.dataplane.set_members(&wanted.into_iter().collect::<Vec<_>>())?;
        }
        Ok(())
    }

    /// Takes in that members have joined or left, and readies those that are new. Call it after `ports` has been told.
    pub(super) fn follow_members(&mut self) {
        // Also of cards that are no members yet.
        let written = self.write_members();
        let now = self.bond_members();
        if now == self.bond_members {
            return;
        }
        if let Err(error) = written {
            tracing::error!(
                "{error}: what comes in by the others is not balanced, and refused by this host. Take some out of their \
                 bonds"
            );
        }
        let before = std::mem::replace(&mut self.bond_members, now.clone());
        for ((bond, index), (bond_name, name)) in now.iter().filter(|(key, _)| !before.contains_key(*key)) {
            let line = format!("interface {name} (index {index}) is a member of {bond_name} now");
            tracing::info!("{line}");
            self.journal.note(JournalKind::Daemon, None, line);
            let Some(mode) = self.mode_there(*bond) else { continue };
            if let Err(error) = self.ready_member(*bond, name, mode) {
                let line = format!("{name}, a new member of {bond_name}: {error}");
                tracing::error!("{line}");
                self.interface_flags.insert(line);
            }
        }
        for ((_, index), (bond_name, name)) in before.iter().filter(|(key, _)| !now.contains_key(*key)) {
            let line = format!("interface {name} (index {index}) is no member of {bond_name} any more");
            tracing::warn!("{line}");
            self.journal.note(JournalKind::Daemon, None, line);
        }
    }

    /// The names of bonds that the program is to be on, and of their members, by the indexes of both.
    pub(super) fn bond_members(&self) -> BTreeMap<(u32, u32), (String, String)> {
        let mut found = BTreeMap::new();
        for index in self.ports.bases() {
            let Ok(bond) = self.network.interface(index) else { continue };
            if matches!(bond.kind, Kind::Bond(_)) {
                let members = self.network.members(index).into_iter();
                found.extend(members.map(|it| ((index, it.index), (bond.name.clone(), it.name))));
            }
        }
        found
    }

    /// How the program is attached to an interface, as far as it is.
    pub(super) fn mode_there(&self, interface: u32) -> Option<Mode> {
        self.dataplane.attached().iter().find(|it| it.interface == interface).map(|it| it.mode)
    }

    /// Switches off on a member of `master` what would keep packets from a program that is on that one in this mode. What
    /// stays on and does harm is noted.
    pub(super) fn ready_member(
        &mut self,
        master: u32,
        member: &str,
        mode: Mode,
    ) -> Result<(), ControllerError> {
        let state_dir = &self.config.dataplane.state_dir;
        if mode == Mode::Generic {
            say_off(member, &offloads::turn_off_below(member, state_dir)?.off);
            return Ok(());
        }
        let switched = offloads::turn_off(member, false, state_dir)?;
        say_off(member, &switched.off);
        let harm = switched.consequences(member, self.ports.is_tagged(master))?;
        self.note_harm(harm.into_iter().collect());
        Ok(())
    }

    /// The members of a bond that the data path knows, by name; none for what is no bond in native mode.
    pub(super) fn known_members(&self, interface: u32) -> Vec<String> {
        if self.mode_there(interface) != Some(Mode::Native) {
            return Vec::new();
        }
        let known = self.dataplane.members();
        let members = self.network.members(interface).into_iter();
        members.filter(|it| known.get(&it.index) == Some(&interface)).map(|it| it.name).collect()
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::{BondMode, BondXmitHashPolicy};

    use super::*;
    use crate::network::Bonding;

    fn interface(index: u32, kind: Kind, master: Option<u32>) -> Interface {
        Interface::sample(index, &format!("it{index}"), kind, master)
    }

    fn card(index: u32, master: Option<u32>) -> Interface {
        interface(index, Kind::Device, master)
    }

    fn bond(index: u32) -> Interface {
        let bonding = Bonding { mode: BondMode::ActiveBackup, policy: BondXmitHashPolicy::Layer2 };
        interface(index, Kind::Bond(bonding), None)
    }

    fn found(interfaces: &[Interface], bases: &[u32], before: &[(u32, u32)]) -> Vec<(u32, u32)> {
        let bases = bases.iter().copied().collect();
        let before = before.iter().copied().collect();
        table(interfaces, &bases, &before).into_iter().collect()
    }

    #[test]
    fn a_member_is_known_and_so_is_every_card_that_could_become_one() {
        let all = [
            card(1, Some(9)),
            card(2, None),
            card(3, Some(8)),
            interface(4, Kind::Veth, None),
            interface(5, Kind::Loopback, None),
            card(6, None),
            interface(8, Kind::Bridge, None),
            bond(9),
        ];
        assert_eq!(found(&all, &[9, 6], &[]), [(1, 9), (2, 9), (3, 9)], "6 has the program itself");
        assert_eq!(found(&all, &[8, 6], &[]), [], "no bond is served");
        let joined = [card(1, Some(9)), interface(4, Kind::Veth, Some(9)), bond(9)];
        assert_eq!(found(&joined, &[9], &[]), [(1, 9), (4, 9)], "a member is a member, whatever it is");
    }

    #[test]
    fn of_two_bonds_one_that_left_is_known_as_the_member_it_was_until_it_joins_the_other() {
        let all = |master| [card(1, Some(8)), card(2, master), card(3, None), bond(8), bond(9)];
        let before = [(1, 8), (2, 9), (5, 9)];
        assert_eq!(found(&all(None), &[8, 9], &before), [(1, 8), (2, 9)], "5 is gone");
        assert_eq!(found(&all(Some(8)), &[8, 9], &before), [(1, 8), (2, 8)]);
        assert_eq!(found(&all(None), &[8, 3], &before), [(1, 8), (2, 8)], "9 is not served any more");
    }

    #[test]
    fn members_go_before_those_that_could_be() {
        let count = MEMBERS as u32;
        let mut all: Vec<_> = (100..120).map(|index| card(index, None)).collect();
        all.extend((200..200 + count - 2).map(|index| card(index, Some(9))));
        all.push(bond(9));
        let table = found(&all, &[9], &[(119, 9)]);
        assert_eq!(table.len(), MEMBERS);
        assert!(table.contains(&(119, 9)) && table.contains(&(100, 9)) && !table.contains(&(101, 9)));
        // The data path says that this is too many.
        all.extend((300..305).map(|index| card(index, Some(9))));
        assert_eq!(found(&all, &[9], &[]).len(), MEMBERS + 3);
    }
}
