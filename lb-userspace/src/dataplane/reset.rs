//! Flows that must end, and flows that may have ended: resetting them in the table, and what must be known of one to
//! speak in the name of its ends. Nothing is sent here.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;
use lb_common::{
    flow::{Family, LONG_QUARANTINE, Slot, V4, V6},
    headers::{Be16, Mac},
    kill::{is_resettable, kill, knows_last_ack},
    layout::{self, INTERFACES, NextHop, WAYS, backend_flag, family},
    meta::{Kind, Meta},
};

use super::{Dataplane, DataplaneError, Mapped, address_of, flows::sets_in_use};

/// Sets that are looked at in one go: a megabyte of IPv4's table. The daemon has other work, too.
const SETS: usize = 16_384;

/// Which flows. Every condition that is given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowFilter {
    /// The backend's id.
    pub backend: Option<u8>,
    /// The service's number, from 0.
    pub service: Option<usize>,
    /// Where the client is.
    pub client: Option<IpNet>,
    /// The client's port.
    pub client_port: Option<u16>,
    /// What the client connected to is one of these addresses.
    pub vips: Option<Vec<IpAddr>>,
}

impl FlowFilter {
    /// All flows of a backend.
    pub fn of_backend(id: u8) -> Self {
        Self { backend: Some(id), ..Self::default() }
    }

    fn wants(&self, flow: &Flow) -> bool {
        (self.service.is_none() || self.service == flow.service)
            && self.client.is_none_or(|net| net.contains(&flow.client.ip()))
            && self.client_port.is_none_or(|port| port == flow.client.port())
            && self.vips.as_ref().is_none_or(|vips| vips.contains(&flow.listener.ip()))
    }
}

/// How far a walk through the flow tables has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Walk {
    /// Sets of the IPv4 table, then of the IPv6 table.
    next: usize,
    ended: bool,
}

impl Walk {
    /// Was everything looked at?
    pub fn is_at_end(&self) -> bool {
        self.ended
    }
}

/// A flow, as far as its ends and the way to them must be known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Its client.
    pub client: SocketAddr,
    /// What the client connected to.
    pub listener: SocketAddr,
    /// What its backend sees as its client.
    pub source: SocketAddr,
    /// Its backend.
    pub backend: SocketAddr,
    /// The service's number; None: its listener was taken from its service, and the flow lives on.
    pub service: Option<usize>,
    /// The acknowledgement number of the client's last segment; None: not known.
    pub last_ack: Option<u32>,
    /// Where segments to the client go first; None: where the routing table says.
    pub to_client: Option<Hop>,
    /// Where segments to the backend go first; None: not known, or it is this host.
    pub to_backend: Option<Hop>,
    slot: Slot,
    listener_id: u16,
    backend_id: u8,
}

impl Flow {
    pub(super) fn slot(&self) -> Slot {
        self.slot
    }

    pub(super) fn listener_id(&self) -> u16 {
        self.listener_id
    }

    pub(super) fn backend_id(&self) -> u8 {
        self.backend_id
    }
}

#[cfg(test)]
impl Flow {
    /// A flow whose backend is its listener, and whose ways are not known.
    pub(crate) fn example(client: SocketAddr, listener: SocketAddr) -> Self {
        Self {
            client,
            listener,
            source: client,
            backend: listener,
            service: Some(0),
            last_ack: None,
            to_client: None,
            to_backend: None,
            slot: Slot::NONE,
            listener_id: 1,
            backend_id: 1,
        }
    }
}

/// A neighbour on a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    /// The index of the interface that frames leave by.
    pub interface: u32,
    /// A frame's first bytes, up to the EtherType of what it carries: addresses and VLAN tags.
    pub link_header: Vec<u8>,
}

impl Dataplane {
    /// Resets flows, about `limit` of them (never more than a set's ways above), from `cursor` on, as far as is looked at in
    /// one go. They are returned as
    /// they were; their clients are yet to be told. Flows of a backend that is this host are its own kernel's.
    pub fn kill_flows(
        &mut self,
        filter: &FlowFilter,
        cursor: &mut Walk,
        limit: usize,
    ) -> Result<Vec<Flow>, DataplaneError> {
        let now = (self.jiffies()? >> self.ticks.shift()) as u16;
        Ok(self.walk(filter, cursor, limit, Wanted::Resettable, |word, meta| {
            kill(word, meta.backend(), now).is_some()
        }))
    }

    /// Flows whose backend may have forgotten them, or may not have heard that they were reset: about `limit` of them,
    /// from `cursor` on. Nothing is changed.
    pub fn flows_to_ask(&self, filter: &FlowFilter, cursor: &mut Walk, limit: usize) -> Vec<Flow> {
        self.walk(filter, cursor, limit, Wanted::Doubtful, |_, _| true)
    }

    /// The number that the client of a flow that was reset has acknowledged last; None: the slot is another flow's now.
    pub fn last_ack_of_killed(&self, flow: &Flow) -> Option<u32> {
        if flow.client.is_ipv4() {
            still_killed::<V4>(&self.flows4, flow)
        } else {
            still_killed::<V6>(&self.flows6, flow)
        }
    }

    /// Frees the slots that were killed a quarantine ago, of a backend that has been ready for as long. How many.
    pub fn release_killed(&mut self, backend: u8) -> Result<u64, DataplaneError> {
        let now = (self.jiffies()? >> self.ticks.shift()) as u16;
        let config = self.settings();
        let (sets4, sets6) = (sets_in_use::<V4>(&config), sets_in_use::<V6>(&config));
        Ok(release::<V4>(&self.flows4, sets4, backend, now)
            + release::<V6>(&self.flows6, sets6, backend, now))
    }

    /// How long ago each backend, by id, last sent payload to a client. None: not since the maps exist.
    pub fn heard(&mut self) -> Result<Vec<Option<Duration>>, DataplaneError> {
        let now = self.jiffies()? as u32;
        let frequency = f64::from(self.ticks.frequency);
        let age = |heard: u32| Duration::from_secs_f64(f64::from(now.wrapping_sub(heard)) / frequency);
        Ok((0..self.backends.len())
            .map(|id| {
                let heard = self.backends.get(id)?.heard.load();
                // A packet after the clock was read is no future, and no age of months.
                (heard != 0)
                    .then(|| if heard.wrapping_sub(now) < 1 << 16 { Duration::ZERO } else { age(heard) })
            })
            .collect())
    }

    fn walk(
        &self,
        filter: &FlowFilter,
        cursor: &mut Walk,
        limit: usize,
        wanted: Wanted,
        mut act: impl FnMut(&lb_common::cell::Cell32, Meta) -> bool,
    ) -> Vec<Flow> {
        let maps = Lookup { dataplane: self, config: self.settings() };
        let mut flows = Vec::new();
        let (sets4, sets6) = (sets_in_use::<V4>(&maps.config), sets_in_use::<V6>(&maps.config));
        // Sets come into use and go out of it: numbers that tell the families apart must not depend on how many there are.
        let first6 = self.flows4.len();
        let mut looked_at = 0;
        while cursor.next < first6 + sets6 {
            if flows.len() >= limit || looked_at == SETS {
                return flows;
            }
            if cursor.next < sets4 {
                maps.visit::<V4>(&self.flows4, cursor.next, filter, wanted, &mut act, &mut flows);
            } else if cursor.next < first6 {
                cursor.next = first6;
                continue;
            } else {
                maps.visit::<V6>(&self.flows6, cursor.next - first6, filter, wanted, &mut act, &mut flows);
            }
            cursor.next += 1;
            looked_at += 1;
        }
        cursor.ended = true;
        flows
    }
}

/// The state that a flow must be in.
#[derive(Clone, Copy)]
enum Wanted {
    /// Its client believes to be connected.
    Resettable,
    /// Established, or killed while its backend was not there to hear of it.
    Doubtful,
}

impl Wanted {
    fn fits(self, meta: Meta) -> bool {
        match self {
            Self::Resettable => is_resettable(meta),
            Self::Doubtful => meta.is(Kind::Established) || meta.is_untold(),
        }
    }
}

/// What is looked up for each flow.
struct Lookup<'a> {
    dataplane: &'a Dataplane,
    config: layout::Config,
}

impl Lookup<'_> {
    fn visit<F: Family>(
        &self,
        flows: &Mapped<F::Set>,
        index: usize,
        filter: &FlowFilter,
        wanted: Wanted,
        act: &mut impl FnMut(&lb_common::cell::Cell32, Meta) -> bool,
        found: &mut Vec<Flow>,
    ) {
        let Some(set) = flows.get(index) else { return };
        for way in 0..WAYS as u32 {
            let word = F::meta(set, way);
            let meta = Meta(word.load());
            if !wanted.fits(meta) || filter.backend.is_some_and(|id| id != meta.backend()) {
                continue;
            }
            let slot = Slot { set: index as u32, way };
            let Some(mut flow) = self.flow::<F>(set, slot, meta) else { continue };
            // What it was that was examined: a claimer may have come between.
            if !filter.wants(&flow) || !Meta(word.load()).same_owner(meta) || !act(word, meta) {
                continue;
            }
            // Read again: nobody but the client's next segment changes it now.
            flow.last_ack = flow.last_ack.map(|_| F::last_ack(set, way).load());
            found.push(flow);
        }
    }

    /// None: of a backend that is this host, or nobody's any more.
    fn flow<F: Family>(&self, set: &F::Set, slot: Slot, meta: Meta) -> Option<Flow> {
        let maps = self.dataplane;
        let (address, port, listener_id) = F::parts(F::load(set, slot.way));
        let listener =
            maps.listeners.read(usize::from(listener_id)).filter(|entry| entry.family == F::NUMBER)?;
        let backend = maps.backends.get(usize::from(meta.backend()))?;
        if backend.flags.load() & backend_flag::LOCAL != 0 {
            return None;
        }
        let end =
            |address, port| SocketAddr::new(address_of(F::NUMBER, address), Be16::from_word(port).get());
        let learned = self.return_hop::<F>(slot);
        Some(Flow {
            client: end(address, port),
            listener: end(listener.address, listener.port),
            source: SocketAddr::new(
                address_of(F::NUMBER, F::snat(&self.config, slot.address())),
                slot.port(),
            ),
            backend: end(backend.address, backend.port),
            service: usize::from(listener.service).checked_sub(1),
            last_ack: (meta.is(Kind::Killed) || knows_last_ack(meta))
                .then(|| F::last_ack(set, slot.way).load()),
            to_client: self.hop(learned),
            to_backend: self.hop(NextHop(backend.next_hop.load())),
            slot,
            listener_id,
            backend_id: meta.backend(),
        })
    }

    /// The way back that the client's packets have taught.
    fn return_hop<F: Family>(&self, slot: Slot) -> NextHop {
        let maps = self.dataplane;
        let hops = if F::NUMBER == family::IPV4 { &maps.return_hops4 } else { &maps.return_hops6 };
        let index = hops.get(slot.set as usize).map_or(0, |hops| hops.ways[slot.way as usize % WAYS].load());
        if index == 0 {
            return NextHop::UNKNOWN;
        }
        NextHop(maps.next_hops.get(usize::from(index)).map_or(0, |hop| hop.load()))
    }

    fn hop(&self, hop: NextHop) -> Option<Hop> {
        if hop == NextHop::UNKNOWN {
            return None;
        }
        let interface = &self.config.interfaces[usize::from(hop.interface()) % INTERFACES];
        let mut link_header = Vec::with_capacity(20);
        for mac in [hop.mac(), interface.mac] {
            link_header.extend(Mac::from_number(mac).bytes());
        }
        for tag in interface.tags.iter().take(interface.tag_count as usize) {
            link_header.extend(tag.to_ne_bytes());
        }
        Some(Hop { interface: interface.index, link_header })
    }
}

fn still_killed<F: Family>(flows: &Mapped<F::Set>, flow: &Flow) -> Option<u32> {
    let set = flows.get(flow.slot.set as usize)?;
    let word = || Meta(F::meta(set, flow.slot.way).load());
    let before = word();
    let (address, port, listener) = F::parts(F::load(set, flow.slot.way));
    let client = SocketAddr::new(address_of(F::NUMBER, address), Be16::from_word(port).get());
    let last_ack = F::last_ack(set, flow.slot.way).load();
    let same = before.is(Kind::Killed)
        && word().same_owner(before)
        && (client, listener) == (flow.client, flow.listener_id);
    same.then_some(last_ack)
}

fn release<F: Family>(flows: &Mapped<F::Set>, sets: usize, backend: u8, now: u16) -> u64 {
    let mut released = 0;
    for set in (0..sets).filter_map(|index| flows.get(index)) {
        for way in 0..WAYS as u32 {
            let word = F::meta(set, way);
            let meta = Meta(word.load());
            let killed = meta.is(Kind::Killed) && meta.backend() == backend;
            let over = killed && meta.age(now) >= LONG_QUARANTINE;
            released += u64::from(over && word.compare_exchange(meta.0, Meta::FREE.0) == meta.0);
        }
    }
    released
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_is_wanted_where_every_condition_holds() {
        let [here, elsewhere] =
            ["10.0.0.100:6443", "[fd00::100]:6443"].map(|it| it.parse::<SocketAddr>().unwrap());
        let flow = |listener: SocketAddr| Flow::example("10.0.0.7:40001".parse().unwrap(), listener);
        let all = FlowFilter::default();
        assert!(all.wants(&flow(here)) && all.wants(&flow(elsewhere)));
        let of_vip = FlowFilter { vips: Some(vec![here.ip(), "127.0.0.1".parse().unwrap()]), ..all.clone() };
        assert!(of_vip.wants(&flow(here)) && !of_vip.wants(&flow(elsewhere)), "whose VIP is on another host");
        let of_another = FlowFilter { service: Some(1), ..of_vip };
        assert!(!of_another.wants(&flow(here)));
        let of_port = FlowFilter { client_port: Some(40002), ..all };
        assert!(!of_port.wants(&flow(here)));
    }
}
