//! What the maps that were adopted say: who is who in them, so that nobody gets the number of another.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use aya::maps::{Map, MapData};
use lb_common::{
    flow::{Family, V4, V6},
    hash,
    layout::{self, BACKENDS, LISTENERS, SELECTION_WORDS, SETS_PER_ADDRESS, Set4, Set6, WAYS, backend_flag},
    meta::{Kind, Meta},
};

use super::{
    CONTROL, Dataplane, Mapped, Port, Settings, Tables, address_of, convert, empty_config,
    flows::sets_in_use,
    pins::{self, Pins},
    sets,
    snat::{self, Places, SnatError},
};

/// Everything that has a number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// By id.
    pub listeners: Vec<KnownListener>,
    /// By id.
    pub backends: Vec<KnownBackend>,
    /// By number.
    pub ports: Vec<Port>,
}

/// A listener that has an id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownListener {
    /// Slots name it by this.
    pub id: u16,
    /// What clients connect to.
    pub address: SocketAddr,
    /// The number of its service, from 0; None: it was taken from its service.
    pub service: Option<usize>,
    /// Whether packets to it are looked at.
    pub open: bool,
}

/// A backend that has an id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownBackend {
    /// Slots and selection tables name it by this.
    pub id: u8,
    /// Where its flows go.
    pub address: SocketAddr,
    /// It is this host.
    pub local: bool,
    /// It had new flows last.
    pub accepts: bool,
}

impl Dataplane {
    /// Whether the maps are those of a daemon before this one.
    pub fn adopted(&self) -> bool {
        self.adopted
    }

    /// Who has a number in the maps. Numbers that no table and no slot names are free from here on: nobody may have
    /// written to the maps since the last grace period.
    pub fn known(&mut self) -> Known {
        if !self.adopted {
            return Known::default();
        }
        let named = self.named();
        let open = self.open_listeners();
        let mut known = Known { ports: self.ports(), ..Known::default() };
        for id in 1..LISTENERS as u16 {
            let Some(entry) = self.listeners.read(usize::from(id)).filter(|it| it.family != 0) else {
                continue;
            };
            if !open.contains(&id) && !named.listeners[usize::from(id)] {
                self.listeners.write(usize::from(id), layout::Listener::default());
                continue;
            }
            known.listeners.push(KnownListener {
                id,
                address: endpoint(entry.family, entry.address, entry.port),
                service: usize::from(entry.service).checked_sub(1),
                open: open.contains(&id),
            });
        }
        for (id, selected) in self.selected().into_iter().enumerate() {
            let Some(entry) = self.backends.get(id).filter(|it| it.family != 0) else { continue };
            if !selected && !named.backends[id] {
                self.backends.place(id, layout::Backend::default());
                continue;
            }
            let flags = entry.flags.load();
            known.backends.push(KnownBackend {
                id: id as u8,
                address: endpoint(entry.family, entry.address, entry.port),
                local: flags & backend_flag::LOCAL != 0,
                accepts: flags & backend_flag::ACCEPTS != 0,
            });
        }
        known
    }

    fn named(&self) -> Named {
        let mut named = Named {
            backends: vec![false; BACKENDS as usize],
            listeners: vec![false; usize::from(u16::MAX) + 1],
        };
        let config = self.settings();
        named.look_through::<V4>(&self.tables, sets_in_use::<V4>(&config));
        named.look_through::<V6>(&self.tables, sets_in_use::<V6>(&config));
        match self.open_sockets() {
            Ok(sockets) => {
                named.backends.iter_mut().zip(sockets).for_each(|(named, count)| *named |= count > 0)
            }
            // Whoever cannot be asked may have some.
            Err(_) => named.backends.fill(true),
        }
        named
    }

    /// The listeners that lists of ports lead to.
    fn open_listeners(&self) -> BTreeSet<u16> {
        let mut open = BTreeSet::new();
        for first in self.classifier.get(0).into_iter().flat_map(|classifier| &classifier.listeners) {
            let mut next = first.load();
            // An id that is there already ends it, also in a list that bites its tail.
            while next != 0 && open.insert(next) {
                next = self.listeners.read(usize::from(next)).map_or(0, |entry| entry.next);
            }
        }
        open
    }

    /// The backends that selection tables in force name, by id.
    fn selected(&self) -> Vec<bool> {
        let mut selected = vec![false; BACKENDS as usize];
        for service in (0..self.services.len()).filter_map(|index| self.services.read(index)) {
            for half in
                [service.selection4, service.selection6].into_iter().filter_map(|it| it.checked_sub(1))
            {
                let start = (half * SELECTION_WORDS) as usize;
                for word in
                    (start..start + SELECTION_WORDS as usize).filter_map(|index| self.selection.read(index))
                {
                    word.to_le_bytes().iter().for_each(|id| selected[usize::from(*id)] = true);
                }
            }
        }
        selected
    }

    /// Source ports towards the backends.
    pub fn snat_ports(&self) -> RangeInclusive<u16> {
        let config = self.settings();
        ports_of(config.first_set, config.sets)
    }

    fn ports(&self) -> Vec<Port> {
        let config = self.settings();
        config.interfaces.iter().take(config.interface_count as usize).map(Port::of_layout).collect()
    }
}

/// Which ids slots name, closed ones included: packets of theirs are still forwarded.
struct Named {
    backends: Vec<bool>,
    listeners: Vec<bool>,
}

impl Named {
    fn look_through<F: Family>(&mut self, tables: &Tables, sets: usize) {
        for (_, set) in tables.first::<F>(sets) {
            for way in 0..WAYS as u32 {
                let meta = Meta(F::meta(set, way).load());
                if !meta.is(Kind::Free) {
                    let (_, _, listener) = F::parts(F::load(set, way));
                    self.backends[usize::from(meta.backend())] = true;
                    self.listeners[usize::from(listener)] = true;
                }
            }
        }
    }
}

impl Port {
    fn of_layout(port: &layout::Interface) -> Self {
        let tag = |word: &u32| {
            let [p0, p1, i0, i1] = word.to_ne_bytes();
            (u16::from_be_bytes([p0, p1]), u16::from_be_bytes([i0, i1]))
        };
        Self {
            interface: port.index,
            tags: port.tags.iter().take(port.tag_count as usize).map(tag).collect(),
            mac: lb_common::headers::Mac::from_number(port.mac).bytes(),
        }
    }
}

/// What the flows in pinned maps depend on.
#[derive(Clone, Debug)]
pub struct Previous {
    config: layout::Config,
    /// Places for SNAT addresses, of IPv4 and of IPv6.
    rooms: [usize; 2],
}

impl Previous {
    /// Reads it; None where there are no such maps, or where they are neither this build's nor of the layout before.
    pub fn read(pins: &Pins) -> Option<Self> {
        match pins.previous().filter(|_| !pins.adopts()) {
            Some(directory) => Self::to_convert(directory),
            None => Self::pinned_at(|name| pins.map(name)),
        }
    }

    /// The same, below a `dataplane.pin_dir` that may be a daemon's: without its lock.
    pub fn recorded(root: &Path) -> Option<Self> {
        let directory = pins::layout_directory(root);
        if directory.exists() {
            return Self::pinned_at(|name| Some(pins::map_path(&directory, name)));
        }
        Self::to_convert(&pins::previous_directory(root))
    }

    fn to_convert(directory: &Path) -> Option<Self> {
        let (config, rooms) = convert::settings(directory, empty_config())?;
        (config.sets != 0).then_some(Self { config, rooms })
    }

    fn pinned_at(pin: impl Fn(&str) -> Option<PathBuf>) -> Option<Self> {
        let map = MapData::from_pin(pin(CONTROL)?).and_then(Map::from_map_data).ok()?;
        let config = Mapped::<layout::Control>::new(CONTROL, &map).ok()?.config().read(0)?;
        let rooms = [room::<Set4>("FLOW4", pin("FLOW4")?)?, room::<Set6>("FLOW6", pin("FLOW6")?)?];
        // Nothing was ever configured.
        (config.sets != 0).then_some(Self { config, rooms })
    }

    /// Source addresses of new flows towards the backends, IPv4 first.
    pub fn snat_addresses(&self) -> Vec<IpAddr> {
        let [v4, v6] = self.rooms;
        [Places::of::<V4>(&self.config, v4).in_use(), Places::of::<V6>(&self.config, v6).in_use()].concat()
    }

    /// Source ports towards the backends.
    pub fn snat_ports(&self) -> RangeInclusive<u16> {
        ports_of(self.config.first_set, self.config.sets)
    }

    /// Whether new flows could leave from these addresses.
    ///
    /// # Errors
    /// Why not, where that passes; what never does is found when the flow table is taken over.
    pub fn check_snat_addresses(&self, wanted: &[IpAddr]) -> Result<(), SnatError> {
        match snat::next_places(&self.config, self.rooms, wanted) {
            Err(error @ (SnatError::NoPlace { .. } | SnatError::Unsettled(_))) => Err(error),
            Err(SnatError::NoFamily(_)) | Ok(_) => Ok(()),
        }
    }

    /// How many SNAT addresses of IPv4 and of IPv6 the flow table has places for.
    pub fn rooms(&self) -> [usize; 2] {
        self.rooms
    }

    /// Why flows would be lost with these settings, in words.
    pub(super) fn conflict(&self, settings: &Settings, key_is_given: bool) -> Option<String> {
        let config = self.config;
        if key_is_given && hash::Key::new(settings.secret) != config.key {
            return Some(
                "it was made with another hash key than the one in dataplane.hash_key_file".to_owned(),
            );
        }
        if let Err(error) = snat::next_places(&config, self.rooms, &settings.snat_addresses) {
            return Some(error.to_string());
        }
        let (first, count, partners) = sets(&settings.snat_ports);
        ((first, count, partners) != (config.first_set, config.sets, config.partners)).then(|| {
            let (before, now) = (self.snat_ports(), ports_of(first, count));
            format!(
                "its flows leave from ports {}-{} (dataplane.snat_ports), and now they would from {}-{}",
                before.start(),
                before.end(),
                now.start(),
                now.end()
            )
        })
    }
}

/// Places for SNAT addresses in a pinned flow table; None: there is none.
fn room<T>(name: &'static str, pin: PathBuf) -> Option<usize> {
    let map = MapData::from_pin(pin).and_then(Map::from_map_data).ok()?;
    Some(Mapped::<T>::new(name, &map).ok()?.len() / SETS_PER_ADDRESS as usize)
}

fn ports_of(first: u32, count: u32) -> RangeInclusive<u16> {
    let ways = WAYS as u32;
    (first * ways) as u16..=((first + count) * ways).saturating_sub(1) as u16
}

/// Of these ports those that are slots: whole groups of sets.
pub fn usable_ports(ports: &RangeInclusive<u16>) -> RangeInclusive<u16> {
    let (first, count, _) = sets(ports);
    ports_of(first, count)
}

pub(super) fn endpoint(family: u8, words: [u64; 2], port: u16) -> SocketAddr {
    SocketAddr::new(address_of(family, words), u16::from_be(port))
}

#[cfg(test)]
mod tests {
    use lb_common::layout::family;

    use super::{super::words, *};

    #[test]
    fn an_endpoint_is_what_it_was() {
        for text in ["10.0.0.7:6443", "[fd00::1:2]:6443"] {
            let there: SocketAddr = text.parse().unwrap();
            let family = if there.is_ipv4() { family::IPV4 } else { family::IPV6 };
            assert_eq!(endpoint(family, words(there.ip()), there.port().to_be()), there);
        }
    }

    #[test]
    fn a_port_is_what_it_was() {
        for tags in [vec![], vec![(0x8100, 7)], vec![(0x88a8, 100), (0x8100, 7)]] {
            let port = Port { interface: 3, tags, mac: [2, 0, 0, 0, 0, 9] };
            assert_eq!(Port::of_layout(&port.layout()), port);
        }
    }
}
