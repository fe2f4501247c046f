//! The interfaces and VLANs that clients and backends are reached by, numbered as the data path numbers them.

use std::collections::{BTreeMap, BTreeSet};

use lb_common::layout::INTERFACES;

use super::ControllerError;
use crate::{
    config::{Interfaces, XdpMode},
    dataplane,
    network::{Interface, Network, Port, Tag, TagProtocol, mode_for},
};

/// The ports in use. A port keeps its number; new ones are appended.
#[derive(Clone, Debug, Default)]
pub(super) struct Ports {
    /// The interface that has the addresses (perhaps a VLAN), and where its frames pass.
    entries: Vec<(u32, Port)>,
    /// The names of these interfaces, for when they have gone and come back.
    names: BTreeMap<u32, String>,
    /// Numbers that others had before us and nobody has now: slots may know ways by them.
    former: BTreeSet<usize>,
}

impl Ports {
    /// Those of the `wanted` interfaces, as far as the configuration allows them, and all that it names.
    pub(super) fn open(
        network: &Network,
        configured: &Interfaces,
        wanted: impl IntoIterator<Item = u32>,
    ) -> Result<Self, ControllerError> {
        let mut ports = Self::default();
        let mut allowed = None;
        if let Interfaces::Named(names) = configured {
            for name in names {
                let interface = network.interface_named(name).map_err(ControllerError::Interface)?;
                let port = network.port_of(interface.index).map_err(ControllerError::Interface)?;
                ports.entries.push((interface.index, port));
            }
            allowed = Some(ports.bases());
        }
        for interface in wanted {
            // A VIP on the loopback interface, a backend behind a tunnel: said where it matters.
            let Ok(port) = network.port_of(interface) else { continue };
            if ports.number(interface).is_none()
                && allowed.as_ref().is_none_or(|allowed| allowed.contains(&port.index))
            {
                ports.entries.push((interface, port));
            }
        }
        if ports.entries.is_empty() {
            return Err(ControllerError::NoInterface);
        }
        ports.learn_names(network);
        Ok(ports)
    }

    /// The interfaces to attach to.
    pub(super) fn bases(&self) -> BTreeSet<u32> {
        self.current().map(|(_, _, port)| port.index).collect()
    }

    /// Whether frames with a VLAN tag are ours on an interface that is attached to.
    pub(super) fn is_tagged(&self, base: u32) -> bool {
        self.current().any(|(_, _, port)| port.index == base && !port.tags.is_empty())
    }

    /// The number of an interface's port.
    pub(super) fn number(&self, interface: u32) -> Option<usize> {
        self.current().find(|(_, known, _)| *known == interface).map(|(number, ..)| number)
    }

    /// All numbers.
    pub(super) fn numbers(&self) -> std::ops::Range<usize> {
        0..self.entries.len()
    }

    /// Number, interface and port of those that are somebody's.
    fn current(&self) -> impl Iterator<Item = (usize, u32, &Port)> {
        let all =
            self.entries.iter().enumerate().map(|(number, (interface, port))| (number, *interface, port));
        all.filter(|(number, ..)| !self.former.contains(number))
    }

    /// Gives ports the numbers that they had before us, in the order of `known`, and the others those that follow.
    pub(super) fn keep_numbers(&mut self, known: &[dataplane::Port]) {
        let mut others = std::mem::take(&mut self.entries);
        for (number, before) in known.iter().enumerate() {
            let same =
                |(_, port): &(u32, Port)| port.index == before.interface && layout_tags(port) == before.tags;
            match others.iter().position(same) {
                Some(index) => self.entries.push(others.remove(index)),
                None => {
                    let (index, tags, mac) = (before.interface, tags_of(&before.tags), before.mac);
                    let port = Port { index, tags, mac, mtu: 0 };
                    self.entries.push((before.interface, port));
                    self.former.insert(number);
                }
            }
        }
        self.entries.append(&mut others);
    }

    /// The number of a port that leads to a backend. A VLAN that is new is appended if what it is built on has the
    /// program, in a `mode` in which it sees the tag.
    pub(super) fn number_or_append(
        &mut self,
        network: &Network,
        port: &Port,
        mode: XdpMode,
    ) -> Result<usize, String> {
        let same = |known: &Port| (known.index, &known.tags) == (port.index, &port.tags);
        if let Some((number, ..)) = self.current().find(|(_, _, known)| same(known)) {
            return Ok(number);
        }
        if self.entries.len() == INTERFACES {
            return Err(format!("more than {INTERFACES} interfaces and VLANs"));
        }
        if !self.bases().contains(&port.index) {
            let name = network.interface(port.index).map_or_else(|_| "?".to_owned(), |found| found.name);
            return Err(format!(
                "it is reached by {name} now, which sheave is not attached to: restart sheave"
            ));
        }
        if let Ok(base) = network.interface(port.index) {
            mode_for(&base, !port.tags.is_empty(), mode)?;
        }
        let passes_there =
            |interface: &Interface| network.port_of(interface.index).is_ok_and(|found| same(&found));
        let interface = network.interfaces().into_iter().find(passes_there);
        let index = interface.map(|it| it.index).ok_or("its interface has just gone")?;
        self.entries.push((index, port.clone()));
        self.learn_names(network);
        Ok(self.entries.len() - 1)
    }

    /// Takes in new MAC addresses, and interfaces that have come back under another index. An interface that is gone keeps
    /// its number.
    pub(super) fn refresh(&mut self, network: &Network) {
        for (number, (interface, port)) in self.entries.iter_mut().enumerate() {
            if self.former.contains(&number) {
                continue;
            }
            // A name stands for another interface only where the one that had it is gone.
            if network.interface(*interface).is_err()
                && let Some(name) = self.names.get(interface)
                && let Ok(back) = network.interface_named(name)
            {
                *interface = back.index;
            }
            if let Ok(now) = network.port_of(*interface) {
                *port = now;
            }
        }
        self.learn_names(network);
    }

    fn learn_names(&mut self, network: &Network) {
        for (interface, _) in &self.entries {
            if let Ok(found) = network.interface(*interface) {
                self.names.insert(*interface, found.name);
            }
        }
    }

    /// The interface of each port, by number.
    pub(super) fn interfaces(&self) -> Vec<u32> {
        self.entries.iter().map(|(interface, _)| *interface).collect()
    }

    /// As the data path is told.
    pub(super) fn layout(&self) -> Vec<dataplane::Port> {
        self.entries
            .iter()
            .map(|(_, port)| dataplane::Port {
                interface: port.index,
                tags: layout_tags(port),
                mac: port.mac,
            })
            .collect()
    }
}

fn layout_tags(port: &Port) -> Vec<(u16, u16)> {
    port.tags.iter().map(|tag| (tag.protocol.ethertype(), tag.id)).collect()
}

fn tags_of(tags: &[(u16, u16)]) -> Vec<Tag> {
    let protocol = |ethertype: u16| {
        let provider = TagProtocol::Ieee8021Ad;
        if ethertype == provider.ethertype() { provider } else { TagProtocol::Ieee8021Q }
    };
    tags.iter().map(|(ethertype, id)| Tag { protocol: protocol(*ethertype), id: *id }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(index: u32, tags: &[u16]) -> Port {
        let tag = |id: &u16| Tag { protocol: TagProtocol::Ieee8021Q, id: *id };
        Port { index, tags: tags.iter().map(tag).collect(), mac: [2, 0, 0, 0, 0, index as u8], mtu: 1500 }
    }

    fn ports(entries: &[(u32, Port)]) -> Ports {
        Ports { entries: entries.to_vec(), ..Ports::default() }
    }

    #[test]
    fn ports_keep_the_numbers_that_learned_ways_know_them_by() {
        let before = ports(&[(2, port(2, &[])), (9, port(3, &[7])), (4, port(4, &[]))]).layout();
        let mut now = ports(&[(4, port(4, &[])), (5, port(5, &[])), (2, port(2, &[]))]);
        now.keep_numbers(&before);
        assert_eq!(now.layout()[..3], before);
        assert_eq!(now.number(2), Some(0));
        assert_eq!(now.number(4), Some(2));
        assert_eq!(now.number(5), Some(3), "a new one follows");
        assert_eq!(
            now.bases(),
            BTreeSet::from([2, 4, 5]),
            "nobody attaches to one that is not used any more"
        );
    }
}
