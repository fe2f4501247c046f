//! Flows that must end, and flows that may have ended: resetting them in the table, and what must be known of one to
//! speak in the name of its ends. Nothing is sent here.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;
use lb_common::{
    cell::Cell32,
    flow::{Family, LONG_QUARANTINE, Slot, V4, V6, is_owner},
    headers::{Be16, Mac},
    kill::{is_resettable, kill, reset_number},
    layout::{self, INTERFACES, NextHop, Numbers, WAYS, backend_flag},
    meta::{Kind, Meta},
    next_hop::UNNAMED,
};

use super::{
    Dataplane, DataplaneError, Tables, address_of,
    flows::{HALF_CLOSED_REST, IdleUnits, is_doubted, is_half_closed, sets_in_use},
};

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
    /// Of two walks, this is the second.
    again: bool,
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
    /// one go. They are returned as they were; their clients are yet to be told. Flows of a backend that is this host are its
    /// own kernel's.
    ///
    /// The table is walked through twice: for established flows, then for answered handshakes, of which a flood makes many.
    pub fn kill_flows(
        &mut self,
        filter: &FlowFilter,
        cursor: &mut Walk,
        limit: usize,
    ) -> Result<Vec<Flow>, DataplaneError> {
        let now = self.unit_now()?;
        let act = kill_at(now);
        let mut flows = Vec::new();
        if !cursor.again {
            flows = self.walk(filter, cursor, limit, Wanted::Established, act);
            if !cursor.ended {
                return Ok(flows);
            }
            *cursor = Walk { again: true, ..Walk::default() };
        }
        // Those, too, that were proven since the first walk passed them.
        flows.extend(self.walk(filter, cursor, limit - flows.len().min(limit), Wanted::Resettable, act));
        Ok(flows)
    }

    /// As [`Dataplane::kill_flows`], of flows that neither end has used for their idle timeout.
    pub fn kill_idle_flows(
        &mut self,
        filter: &FlowFilter,
        cursor: &mut Walk,
        limit: usize,
    ) -> Result<Vec<Flow>, DataplaneError> {
        let now = self.unit_now()?;
        Ok(self.walk(filter, cursor, limit, Wanted::Idle(now), kill_at(now)))
    }

    /// As [`Dataplane::flows_to_ask`], of flows of which a RST was seen that proves nothing, or a SYN, and no segment for more than
    /// `rest` units, which are about seconds.
    pub fn doubted_flows(
        &mut self,
        filter: &FlowFilter,
        cursor: &mut Walk,
        limit: usize,
        rest: u16,
    ) -> Result<Vec<Flow>, DataplaneError> {
        let now = self.unit_now()?;
        Ok(self.walk(filter, cursor, limit, Wanted::Doubted { now, rest }, |_, _, _| true))
    }

    /// As [`Dataplane::flows_to_ask`], of flows that one end has closed and whose backend is due to be asked: see
    /// [`is_half_closed`].
    pub fn half_closed_flows(
        &mut self,
        filter: &FlowFilter,
        cursor: &mut Walk,
        limit: usize,
    ) -> Result<Vec<Flow>, DataplaneError> {
        let now = self.unit_now()?;
        let rest = self.ticks.units(HALF_CLOSED_REST);
        Ok(self.walk(filter, cursor, limit, Wanted::HalfClosed { now, rest }, |_, _, _| true))
    }

    /// Flows whose backend may have forgotten them, or may not have heard that they were reset: about `limit` of them,
    /// from `cursor` on. Nothing is changed.
    pub fn flows_to_ask(&self, filter: &FlowFilter, cursor: &mut Walk, limit: usize) -> Vec<Flow> {
        self.walk(filter, cursor, limit, Wanted::Doubtful, |_, _, _| true)
    }

    /// The number that the client of a flow that was reset has acknowledged last; None: the slot is another flow's now.
    pub fn last_ack_of_killed(&self, flow: &Flow) -> Option<u32> {
        if flow.client.is_ipv4() {
            still_killed::<V4>(&self.tables, flow)
        } else {
            still_killed::<V6>(&self.tables, flow)
        }
    }

    /// Frees the slots that were killed a quarantine ago, of a backend that has been ready for as long. How many.
    pub fn release_killed(&mut self, backend: u8) -> Result<u64, DataplaneError> {
        let now = self.unit_now()?;
        let config = self.settings();
        let (sets4, sets6) = (sets_in_use::<V4>(&config), sets_in_use::<V6>(&config));
        Ok(release::<V4>(&self.tables, sets4, backend, now)
            + release::<V6>(&self.tables, sets6, backend, now))
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

    /// The time that slots are dated by.
    fn unit_now(&mut self) -> Result<u16, DataplaneError> {
        Ok((self.jiffies()? >> self.ticks.shift()) as u16)
    }

    fn walk(
        &self,
        filter: &FlowFilter,
        cursor: &mut Walk,
        limit: usize,
        wanted: Wanted,
        mut act: impl FnMut(&Cell32, &Numbers, Meta) -> bool,
    ) -> Vec<Flow> {
        let maps = Lookup { dataplane: self, config: self.settings() };
        let mut flows = Vec::new();
        let (sets4, sets6) = (sets_in_use::<V4>(&maps.config), sets_in_use::<V6>(&maps.config));
        // Sets come into use and go out of it: numbers that tell the families apart must not depend on how many there are.
        let first6 = self.tables.sets::<V4>();
        let mut looked_at = 0;
        while cursor.next < first6 + sets6 {
            if flows.len() >= limit || looked_at == SETS {
                return flows;
            }
            if cursor.next < sets4 {
                maps.visit::<V4>(cursor.next, filter, wanted, &mut act, &mut flows);
            } else if cursor.next < first6 {
                cursor.next = first6;
                continue;
            } else {
                maps.visit::<V6>(cursor.next - first6, filter, wanted, &mut act, &mut flows);
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
    /// The client has proven that it is connected.
    Established,
    /// Its client believes to be connected.
    Resettable,
    /// Established, or killed while its backend was not there to hear of it.
    Doubtful,
    /// Established, and not used for its idle timeout at this time.
    Idle(u16),
    /// Established, and not heard of since a RST that proves nothing, for more than `rest` units at the time `now`.
    Doubted { now: u16, rest: u16 },
    /// Established, closed by one end, and due to be asked about at the time `now`: first after `rest` units.
    HalfClosed { now: u16, rest: u16 },
}

impl Wanted {
    fn fits(self, meta: Meta, idle: &[IdleUnits], listener: u16) -> bool {
        match self {
            Self::Established => meta.is(Kind::Established),
            Self::Resettable => is_resettable(meta),
            Self::Doubtful => meta.is(Kind::Established) || meta.is_untold(),
            Self::Idle(now) => idle.get(usize::from(listener)).is_some_and(|idle| idle.is_over(meta, now)),
            Self::Doubted { now, rest } => is_doubted(meta, now, rest),
            Self::HalfClosed { now, rest } => is_half_closed(meta, now, rest),
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
        index: usize,
        filter: &FlowFilter,
        wanted: Wanted,
        act: &mut impl FnMut(&Cell32, &Numbers, Meta) -> bool,
        found: &mut Vec<Flow>,
    ) {
        let tables = &self.dataplane.tables;
        let Some(set) = F::set(tables, index as u32) else { return };
        for way in 0..WAYS as u32 {
            let word = F::meta(set, way);
            let meta = Meta(word.load());
            let tuple = F::load(set, way);
            let (_, _, listener) = F::parts(tuple);
            let is_wanted = wanted.fits(meta, &self.dataplane.idle_units, listener);
            if !is_wanted || filter.backend.is_some_and(|id| id != meta.backend()) {
                continue;
            }
            let slot = Slot { set: index as u32, way };
            let (Some(mut flow), Some(numbers)) =
                (self.flow::<F>(set, slot, meta, tuple), F::numbers(tables, set, slot))
            else {
                continue;
            };
            // What it was that was examined: a claimer may have come between.
            if !filter.wants(&flow) || !is_owner::<F>(set, way, meta, tuple) || !act(word, numbers, meta) {
                continue;
            }
            // Read again: of a flow that was reset only a segment that proves itself changes it now.
            flow.last_ack = reset_number(Meta(word.load()), numbers.load()).or(flow.last_ack);
            found.push(flow);
        }
    }

    /// None: of a backend that is this host, or nobody's any more.
    fn flow<F: Family>(&self, set: &F::Set, slot: Slot, meta: Meta, tuple: F::Tuple) -> Option<Flow> {
        let maps = self.dataplane;
        let (address, port, listener_id) = F::parts(tuple);
        let listener =
            maps.listeners.read(usize::from(listener_id)).filter(|entry| entry.family == F::NUMBER)?;
        let backend = maps.backends.get(usize::from(meta.backend()))?;
        if backend.flags.load() & backend_flag::LOCAL != 0 {
            return None;
        }
        let end =
            |address, port| SocketAddr::new(address_of(F::NUMBER, address), Be16::from_word(port).get());
        let learned = self.return_hop::<F>(set, slot);
        Some(Flow {
            client: end(address, port),
            listener: end(listener.address, listener.port),
            source: SocketAddr::new(
                address_of(F::NUMBER, F::snat(&self.config, slot.address())),
                slot.port(),
            ),
            backend: end(backend.address, backend.port),
            service: usize::from(listener.service).checked_sub(1),
            last_ack: reset_number(meta, F::numbers(&maps.tables, set, slot)?.load()),
            to_client: self.hop(learned),
            to_backend: self.hop(NextHop(backend.next_hop.load())),
            slot,
            listener_id,
            backend_id: meta.backend(),
        })
    }

    /// The way back that the client's packets have taught.
    fn return_hop<F: Family>(&self, set: &F::Set, slot: Slot) -> NextHop {
        let maps = self.dataplane;
        let index = F::return_hop(&maps.tables, set, slot).map_or(0, |index| index.load());
        if index == 0 {
            return NextHop::UNKNOWN;
        }
        NextHop(maps.next_hops.get(usize::from(index)).map_or(0, |hop| hop.load() & !UNNAMED))
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

/// What [`Dataplane::walk`] does to flows that end: kills them, at the time `now`. Whether it was this call that did.
fn kill_at(now: u16) -> impl Fn(&Cell32, &Numbers, Meta) -> bool + Copy {
    move |word, numbers, meta| kill(word, numbers, meta.backend(), now).is_some()
}

fn still_killed<F: Family>(tables: &Tables, flow: &Flow) -> Option<u32> {
    let (slot, set) = (flow.slot, F::set(tables, flow.slot.set)?);
    let before = Meta(F::meta(set, slot.way).load());
    let tuple = F::load(set, slot.way);
    let (address, port, listener) = F::parts(tuple);
    let client = SocketAddr::new(address_of(F::NUMBER, address), Be16::from_word(port).get());
    let last_ack = F::numbers(tables, set, slot)?.load().unacknowledged;
    let same = before.is(Kind::Killed)
        && is_owner::<F>(set, slot.way, before, tuple)
        && (client, listener) == (flow.client, flow.listener_id);
    same.then_some(last_ack)
}

fn release<F: Family>(tables: &Tables, sets: usize, backend: u8, now: u16) -> u64 {
    let mut released = 0;
    for (_, set) in tables.first::<F>(sets) {
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
