//! The interfaces and VLANs that clients and backends are reached by, numbered as the data path numbers them.

use std::collections::BTreeSet;

use lb_common::layout::PORTS;

use super::ControllerError;
use crate::{
    config::Interfaces,
    dataplane,
    network::{Interface, Network, Port},
};

/// The ports in use. A port keeps its number; new ones are appended.
#[derive(Clone, Debug, Default)]
pub(super) struct Ports {
    /// The interface that has the addresses (perhaps a VLAN), and where its frames pass.
    entries: Vec<(u32, Port)>,
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
        Ok(ports)
    }

    /// The interfaces to attach to.
    pub(super) fn bases(&self) -> BTreeSet<u32> {
        self.entries.iter().map(|(_, port)| port.index).collect()
    }

    /// The number of an interface's port.
    pub(super) fn number(&self, interface: u32) -> Option<usize> {
        self.entries.iter().position(|(known, _)| *known == interface)
    }

    /// The number of a port that leads to a backend. A VLAN that is new is appended if what it is built on has the
    /// program.
    pub(super) fn number_or_append(&mut self, network: &Network, port: &Port) -> Result<usize, String> {
        let same = |known: &Port| (known.index, &known.tags) == (port.index, &port.tags);
        if let Some(number) = self.entries.iter().position(|(_, known)| same(known)) {
            return Ok(number);
        }
        if self.entries.len() == PORTS {
            return Err(format!("more than {PORTS} interfaces and VLANs"));
        }
        if !self.bases().contains(&port.index) {
            let name = network.interface(port.index).map_or_else(|_| "?".to_owned(), |found| found.name);
            return Err(format!(
                "it is reached by {name} now, which sheave is not attached to: restart sheave"
            ));
        }
        let passes_there =
            |interface: &Interface| network.port_of(interface.index).is_ok_and(|found| same(&found));
        let interface = network.interfaces().into_iter().find(passes_there);
        let index = interface.map(|it| it.index).ok_or("its interface has just gone")?;
        self.entries.push((index, port.clone()));
        Ok(self.entries.len() - 1)
    }

    /// Takes in new MAC addresses. An interface that is gone keeps its number.
    pub(super) fn refresh(&mut self, network: &Network) {
        for (interface, port) in &mut self.entries {
            if let Ok(now) = network.port_of(*interface) {
                *port = now;
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
                tags: port.tags.iter().map(|tag| (tag.protocol.ethertype(), tag.id)).collect(),
                mac: port.mac,
            })
            .collect()
    }
}
