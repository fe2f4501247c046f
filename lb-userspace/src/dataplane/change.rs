//! What a reload changes in the maps while packets are looked up in them.
//!
//! A number (of a listener, a backend, a service) keeps its meaning for as long as a program that is running or a slot
//! may name it. Who decides when that is over is the controller; here is only the order of the writes.

use std::{
    collections::BTreeSet,
    net::{Ipv6Addr, SocketAddr},
};

use aya::{
    maps::{PerCpuArray, PerCpuValues, lpm_trie::Key},
    util::nr_cpus,
};
use ipnet::IpNet;
use lb_common::{
    layout::{self, ALLOW_SERVICE_BITS, AllowKey, allow_key},
    outcome::COUNTERS,
    rewrite::endpoint_sum,
};

use super::{Dataplane, DataplaneError, IdlePolicy, Listener, family_of, service_id, words};

/// Prefixes that the allow list holds, of all services.
const ALLOW_PREFIXES: usize = 4096;

impl Dataplane {
    /// Opens a listener under a number that is nobody's, from 1, on the first `ports` ports. Its own port is never a
    /// slot from now on; that none is in use there is the caller's to find out.
    pub fn place_listener(&mut self, id: u16, listener: &Listener, ports: usize) {
        let address = words(listener.address.ip());
        let port = listener.address.port().to_be();
        let head = self.first_listener(listener.address.port());
        let loopback = listener.address.ip().is_loopback();
        // The entry, then the word that leads to it.
        self.listeners.write(
            usize::from(id),
            layout::Listener {
                address,
                port,
                family: family_of(listener.address.ip()),
                reserved: 0,
                service: service_id(listener.service),
                next: head,
                // No packet comes from elsewhere for a loopback address: such a listener is the connect hook's.
                interfaces: if loopback { 0 } else { (1u64 << ports).wrapping_sub(1) as u32 },
                sum: endpoint_sum(address, port),
            },
        );
        self.set_first_listener(listener.address.port(), id);
        self.block(listener.address.port());
        self.kept_idle.remove(&id);
    }

    /// Gives a listener to another service: its flows stay where they are, new ones are that service's.
    pub fn move_listener(&mut self, id: u16, service: usize) {
        self.set_service(id, service_id(service));
        self.kept_idle.remove(&id);
    }

    /// Takes a listener from its service: new connections are refused with a RST, as on a port where nobody listens.
    /// Its flows live on, with this idle timeout.
    pub fn retire_listener(&mut self, id: u16, idle: IdlePolicy) {
        self.kept_idle.insert(id, idle);
        // No service has this id, and its entry has no selection.
        self.set_service(id, 0);
    }

    fn set_service(&self, id: u16, service: u16) {
        if let Some(entry) = self.listeners.read(usize::from(id)) {
            // Only the service's word is another than before.
            self.listeners.write(usize::from(id), layout::Listener { service, ..entry });
        }
    }

    /// Closes a listener: its packets are not ours any more. Programs may look at its entry until a grace period is
    /// over; only then may its number be another's.
    pub fn remove_listener(&mut self, id: u16, address: SocketAddr) {
        let Some(entry) = self.listeners.read(usize::from(id)) else { return };
        let first = self.first_listener(address.port());
        if first == id {
            self.set_first_listener(address.port(), entry.next);
        } else {
            let mut before = first;
            while let Some(other) = self.listeners.read(usize::from(before)).filter(|_| before != 0) {
                if other.next == id {
                    self.listeners.write(usize::from(before), layout::Listener { next: entry.next, ..other });
                    break;
                }
                before = other.next;
            }
        }
        self.kept_idle.remove(&id);
    }

    /// The number of the first listener on a port; 0: none.
    fn first_listener(&self, port: u16) -> u16 {
        self.classifier.get(0).map_or(0, |classifier| classifier.listeners[usize::from(port)].load())
    }

    fn set_first_listener(&self, port: u16, id: u16) {
        if let Some(classifier) = self.classifier.get(0) {
            classifier.listeners[usize::from(port)].store(id);
        }
    }

    /// Restricts a service to clients in `prefixes`; none: everyone. A client that is allowed before and after is
    /// allowed in between.
    pub fn set_allowed(&mut self, service: usize, prefixes: &[IpNet]) -> Result<(), DataplaneError> {
        let id = service_id(service);
        let wanted: BTreeSet<_> = prefixes.iter().map(|prefix| raw_key(id, prefix)).collect();
        let (all, there) = self.allowed(id)?;
        let (come, go): (Vec<_>, Vec<_>) =
            (wanted.difference(&there).copied().collect(), there.difference(&wanted).copied().collect());
        if prefixes.is_empty() {
            self.set_restricted(id, false);
        }
        // The new ones first, where both have room.
        if all + come.len() > ALLOW_PREFIXES {
            self.forbid(&go)?;
            self.admit(&come)?;
        } else {
            self.admit(&come)?;
            self.forbid(&go)?;
        }
        self.set_restricted(id, !prefixes.is_empty());
        Ok(())
    }

    fn set_restricted(&self, id: u16, restricted: bool) {
        let mut entry = self.services.read(usize::from(id)).unwrap_or_default();
        entry.restricted = u32::from(restricted);
        self.services.write(usize::from(id), entry);
    }

    /// How many prefixes there are, and those of a service.
    fn allowed(&self, id: u16) -> Result<(usize, BTreeSet<(u32, AllowKey)>), DataplaneError> {
        let [service, ..] = allow_key(id, words(Ipv6Addr::UNSPECIFIED.into()));
        let mut count = 0;
        let mut found = BTreeSet::new();
        for key in self.allow.keys() {
            let key = key.map_err(allow_error)?;
            count += 1;
            if key.data()[0] == service {
                found.insert((key.prefix_len(), key.data()));
            }
        }
        Ok((count, found))
    }

    fn admit(&mut self, keys: &[(u32, AllowKey)]) -> Result<(), DataplaneError> {
        let mut insert = |(bits, key): &(u32, AllowKey)| self.allow.insert(&Key::new(*bits, *key), 1, 0);
        keys.iter().try_for_each(|key| insert(key).map_err(allow_error))
    }

    fn forbid(&mut self, keys: &[(u32, AllowKey)]) -> Result<(), DataplaneError> {
        let mut remove = |(bits, key): &(u32, AllowKey)| self.allow.remove(&Key::new(*bits, *key));
        keys.iter().try_for_each(|key| remove(key).map_err(allow_error))
    }

    /// Takes everything from a service that has no listener any more: its number may be another's after a grace
    /// period.
    pub fn close_service(&mut self, service: usize) -> Result<(), DataplaneError> {
        let id = service_id(service);
        let mut entry = self.services.read(usize::from(id)).unwrap_or_default();
        (entry.selection4, entry.selection6) = (0, 0);
        self.services.write(usize::from(id), entry);
        self.grace.begin();
        self.set_allowed(service, &[])
    }

    /// Begins to count a service's packets anew: the number was another's.
    pub fn clear_service_counters(&mut self, service: usize) -> Result<(), DataplaneError> {
        let first = u32::from(service_id(service)) * COUNTERS as u32;
        (first..first + COUNTERS as u32).try_for_each(|index| clear(&mut self.counters, "COUNTER", index))
    }

    /// Begins to count a backend's flows anew: the number was another's.
    pub fn clear_total_flows(&mut self, id: u8) -> Result<(), DataplaneError> {
        clear(&mut self.backend_flows, "BACKEND_FLOWS", id.into())
    }
}

fn raw_key(service: u16, prefix: &IpNet) -> (u32, AllowKey) {
    let (address, bits) = match prefix {
        IpNet::V4(net) => (net.network().to_ipv6_mapped(), u32::from(net.prefix_len()) + 96),
        IpNet::V6(net) => (net.network(), u32::from(net.prefix_len())),
    };
    (bits + ALLOW_SERVICE_BITS, allow_key(service, words(address.into())))
}

fn allow_error(source: aya::maps::MapError) -> DataplaneError {
    DataplaneError::Map { name: "ALLOW", source }
}

pub(super) fn clear(
    map: &mut PerCpuArray<aya::maps::MapData, u64>,
    name: &'static str,
    index: u32,
) -> Result<(), DataplaneError> {
    let system = |source| DataplaneError::System { call: "sysfs: possible CPUs", source };
    let cpus = nr_cpus().map_err(|(_, source)| system(source))?;
    let zeros = PerCpuValues::try_from(vec![0; cpus]).map_err(system)?;
    map.set(index, zeros, 0).map_err(|source| DataplaneError::Map { name, source })
}
