//! The flight recorder from the daemon's side (`lb_common::flight_recorder`): what it writes itself, and reading all of it.

use std::{
    collections::{BTreeMap, VecDeque},
    net::{Ipv6Addr, SocketAddr},
    time::{Duration, SystemTime},
};

use aya::Ebpf;
use lb_common::{
    flight_recorder::{
        Anchor, FlowEvent, Note, Record, Refusal, ResetReason, Silence, Written, append, in_order, records,
        state,
    },
    flow::{Family, Slot, V4, V6},
    headers::Be16,
    meta::Meta,
};

use super::{Dataplane, DataplaneError, Flow, Mapped, mapped, words};

pub(super) const MAP: &str = "BLACK_BOX";
const BITS: &str = "BLACK_BOX_BITS";

/// How long the rings are, as the program and the map must know before they are loaded.
pub(super) struct Size {
    rings: u32,
    bits: u32,
}

impl Size {
    /// One ring for each CPU that there may be, and the daemon's.
    pub(super) fn of_host() -> Result<Self, DataplaneError> {
        let error = |(call, source)| DataplaneError::System { call, source };
        let rings = aya::util::nr_cpus().map_err(error)? as u32 + 1;
        Ok(Self { rings, bits: records(rings).trailing_zeros() })
    }

    /// The map's name, and its entries.
    pub(super) fn map_size(&self) -> (&'static str, u32) {
        (MAP, self.rings << self.bits)
    }

    /// Tells the loader.
    pub(super) fn apply<'a>(&'a self, loader: &mut aya::EbpfLoader<'a>) {
        let (name, entries) = self.map_size();
        loader.map_max_entries(name, entries);
        loader.override_global(BITS, &self.bits, true);
    }
}

/// The rings, in this process's memory.
pub struct FlightRecorder {
    places: Mapped<Record>,
    rings: usize,
}

impl FlightRecorder {
    pub(super) fn of(ebpf: &Ebpf) -> Result<Self, DataplaneError> {
        Self::over(mapped(ebpf, MAP)?)
    }

    pub(super) fn over(places: Mapped<Record>) -> Result<Self, DataplaneError> {
        let rings = Size::of_host()?.rings as usize;
        let each = places.len() / rings;
        if !each.is_power_of_two() || !places.len().is_multiple_of(rings) {
            return Err(DataplaneError::ValueSize { name: MAP, expected: rings, found: places.len() as u32 });
        }
        Ok(Self { places, rings })
    }

    /// Places of a ring, the power of two.
    fn bits(&self) -> u32 {
        (self.places.len() / self.rings).trailing_zeros()
    }

    fn place(&self, ring: usize, place: u32) -> Option<&Record> {
        self.places.get((ring << self.bits()) + place as usize)
    }

    /// Writes into the daemon's ring, at a time in jiffies.
    pub(super) fn note(&self, note: &Note, jiffies: u64) {
        let own = self.rings - 1;
        append(|place| self.place(own, place), self.bits(), note, || jiffies);
    }

    /// Notes which time of day it is, for those who read the records.
    pub(super) fn anchor(&self, jiffies: u64, frequency: u32) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        if let Some(head) = self.place(self.rings - 1, 0) {
            head.set_anchor(&Anchor { jiffies, nanoseconds: now.as_nanos() as u64, frequency });
        }
    }

    /// How long it has been, at this time, since the daemon last noted the time. None: none has got so far yet.
    pub(super) fn unattended(&self, jiffies: u64) -> Option<Duration> {
        let Clock(anchor) = self.clock()?;
        let ticks = jiffies.saturating_sub(anchor.jiffies);
        Some(Duration::from_secs_f64(ticks as f64 / f64::from(anchor.frequency.max(1))))
    }

    /// What turns jiffies into the time of day. None: no daemon has got so far yet.
    pub fn clock(&self) -> Option<Clock> {
        let head = self.place(self.rings - 1, 0)?;
        // It takes the daemon no time to write it.
        (0..1000).find_map(|_| head.anchor()).map(Clock)
    }

    /// Everything that is written.
    pub fn read(&self) -> Rings {
        let entries = |ring| in_order(move |place| self.place(ring, place), self.bits());
        Rings {
            rings: (0..self.rings).map(|ring| entries(ring).filter_map(Entry::of).collect()).collect(),
            capacity: self.rings * ((1 << self.bits()) - 1),
        }
    }
}

/// The time of day of records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock(Anchor);

impl Clock {
    /// When it was, from a tick counter cut to 40 bits.
    pub fn time(&self, jiffies: u64) -> SystemTime {
        let Self(anchor) = self;
        // The difference of two of 40 bits, with its sign.
        let ticks = (jiffies.wrapping_sub(anchor.jiffies) << 24).cast_signed() >> 24;
        let away = Duration::from_secs_f64(ticks.unsigned_abs() as f64 / f64::from(anchor.frequency.max(1)));
        let anchored = SystemTime::UNIX_EPOCH + Duration::from_nanos(anchor.nanoseconds);
        let moved = if ticks < 0 { anchored.checked_sub(away) } else { anchored.checked_add(away) };
        moved.unwrap_or(anchored)
    }
}

/// What was written, by whom it was.
#[derive(Clone, Debug, Default)]
pub struct Rings {
    /// The oldest entry of each first.
    rings: Vec<Vec<Entry>>,
    capacity: usize,
}

impl Rings {
    /// How many entries there may be.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// From when on nothing is missing, in jiffies; None: nothing was ever overwritten, or nothing is written.
    pub fn complete_since(&self) -> Option<u64> {
        let each = self.capacity / self.rings.len().max(1);
        let full = self.rings.iter().filter(|ring| ring.len() >= each);
        full.filter_map(|ring| ring.first()).map(|entry| entry.jiffies).max()
    }

    /// The entries about these clients, by client and listener id, the oldest first.
    pub fn by_flow(&self, wanted: impl Fn(SocketAddr) -> bool) -> BTreeMap<(SocketAddr, u8), Vec<Entry>> {
        let mut flows: BTreeMap<_, Vec<VecDeque<Entry>>> = BTreeMap::new();
        for (number, ring) in self.rings.iter().enumerate() {
            for entry in ring.iter().filter(|entry| wanted(entry.client)) {
                let parts = flows.entry((entry.client, entry.listener)).or_default();
                parts.resize(self.rings.len(), VecDeque::new());
                parts[number].push_back(entry.clone());
            }
        }
        flows.into_iter().map(|(flow, parts)| (flow, merge(parts))).collect()
    }

    /// The entries about these clients, the oldest first.
    pub fn of(&self, wanted: impl Fn(SocketAddr) -> bool) -> Vec<Entry> {
        let mut entries: Vec<_> = self.by_flow(wanted).into_values().flatten().collect();
        entries.sort_by_key(|entry| entry.jiffies);
        entries
    }
}

/// Puts the entries about one flow into one order. In each ring they are in theirs; of those in different rings, written
/// in the same tick, the one is first that makes sense: a flow begins before anything happens to it.
fn merge(mut rings: Vec<VecDeque<Entry>>) -> Vec<Entry> {
    let mut merged: Vec<Entry> = Vec::new();
    loop {
        let open = merged.last().is_some_and(|entry| !entry.what.ends());
        let order = |entry: &Entry| (entry.jiffies, entry.what.begins() == open, entry.what.ends());
        let heads = rings.iter_mut().filter(|ring| !ring.is_empty());
        let Some(first) = heads.min_by_key(|ring| ring.front().map(order)) else { return merged };
        merged.extend(first.pop_front());
    }
}

/// A record in words that people use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// When: the kernel's tick counter, cut to 40 bits.
    pub jiffies: u64,
    /// The flow's client.
    pub client: SocketAddr,
    /// The id of the listener it came to.
    pub listener: u8,
    /// The id of its backend; 0: it had none.
    pub backend: u8,
    /// Its number among the SNAT addresses, and its port; None: it had no slot.
    pub slot: Option<(u8, u16)>,
    /// What happened.
    pub what: What,
}

/// What happened to a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Its SYN went to the backend.
    Claimed,
    /// The backend has answered.
    Established,
    /// The backend refused, and another one is next.
    SecondChance {
        /// Its id.
        next: u8,
    },
    /// The backend refused, and the client was told.
    RefusedByBackend,
    /// A further SYN went to another backend, as this one takes no new flows any more.
    Moved {
        /// Its id.
        next: u8,
    },
    /// The SYN went nowhere.
    Refused(Refusal),
    /// Somebody closed, as the first.
    Closed {
        /// The client did; else the backend.
        by_client: bool,
    },
    /// Somebody sent a RST.
    Reset {
        /// The client did; else the backend.
        by_client: bool,
        /// What the flow was then.
        before: Meta,
    },
    /// The slot was given to another flow.
    Reclaimed {
        /// What the flow was then.
        before: Meta,
    },
    /// The daemon reset the flow.
    Killed {
        /// Why.
        reason: ResetReason,
        /// How the checks of a dead backend failed.
        silence: Option<Silence>,
        /// For how long they had, at most 255.
        seconds: u8,
    },
    /// The daemon asked the backend whether it has the flow still.
    Asked(ResetReason),
    /// The daemon forgot the flow, as nothing was heard of it.
    Forgotten {
        /// What the flow was then.
        before: Meta,
    },
}

impl Entry {
    /// None: written by a version that knows more than this one.
    fn of(written: Written) -> Option<Self> {
        let word = written.note.what;
        let [detail, listener, backend] = [word >> 16, word >> 24, word >> 8].map(|part| part as u8);
        let event = FlowEvent::from_number(word as u8 & 0xf)?;
        let slot = (word >> 48) as u16;
        let bytes: Vec<u8> = written.note.address.iter().flat_map(|half| half.to_ne_bytes()).collect();
        let address = Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical();
        Some(Self {
            jiffies: written.jiffies,
            client: SocketAddr::new(address, Be16::from_word((word >> 32) as u16).get()),
            listener,
            backend,
            slot: (slot != 0).then_some((word as u8 >> 4, slot)),
            what: What::of(event, detail, written.note.other)?,
        })
    }
}

impl What {
    /// A connection begins with it.
    pub fn begins(self) -> bool {
        // Without a way to its backend it has begun already.
        matches!(self, Self::Claimed)
            || matches!(self, Self::Refused(refusal) if refusal != Refusal::NoNextHop)
    }

    /// Nothing more is to come, as far as the record tells.
    pub fn ends(self) -> bool {
        match self {
            Self::Refused(refusal) => refusal != Refusal::NoNextHop,
            Self::RefusedByBackend
            | Self::Closed { .. }
            | Self::Reset { .. }
            | Self::Reclaimed { .. }
            | Self::Killed { .. }
            | Self::Forgotten { .. } => true,
            Self::Claimed
            | Self::Established
            | Self::SecondChance { .. }
            | Self::Moved { .. }
            | Self::Asked(_) => false,
        }
    }

    fn of(event: FlowEvent, detail: u8, other: u8) -> Option<Self> {
        let before = Meta(detail.into());
        Some(match event {
            FlowEvent::Claimed => Self::Claimed,
            FlowEvent::Established => Self::Established,
            FlowEvent::SecondChance => Self::SecondChance { next: other },
            FlowEvent::RefusedByBackend => Self::RefusedByBackend,
            FlowEvent::Moved => Self::Moved { next: other },
            FlowEvent::Refused => Self::Refused(Refusal::from_number(detail)?),
            FlowEvent::ClosedByClient => Self::Closed { by_client: true },
            FlowEvent::ClosedByBackend => Self::Closed { by_client: false },
            FlowEvent::ResetByClient => Self::Reset { by_client: true, before },
            FlowEvent::ResetByBackend => Self::Reset { by_client: false, before },
            FlowEvent::Reclaimed => Self::Reclaimed { before },
            FlowEvent::Killed => Self::Killed {
                reason: ResetReason::from_number(detail & 0xf)?,
                silence: Silence::from_number(detail >> 4),
                seconds: other,
            },
            FlowEvent::Asked => Self::Asked(ResetReason::from_number(detail & 0xf)?),
            FlowEvent::Forgotten => Self::Forgotten { before },
        })
    }
}

/// Why the daemon does something to flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Account {
    /// They are reset, because their backend is dead: how its last check failed, and for how many seconds.
    Dead(Silence, u8),
    /// They are reset, for another reason.
    Killed(ResetReason),
    /// Their backend is asked.
    Asked(ResetReason),
}

impl Dataplane {
    /// Writes down what is done to flows, and why.
    pub fn write_down(&mut self, flows: &[Flow], account: Account) -> Result<(), DataplaneError> {
        if flows.is_empty() {
            return Ok(());
        }
        let jiffies = self.jiffies()?;
        for flow in flows {
            let tuple = (words(flow.client.ip()), Be16::new(flow.client.port()).word(), flow.listener_id());
            let note =
                if flow.client.is_ipv4() { account.note::<V4>(tuple) } else { account.note::<V6>(tuple) };
            self.flight_recorder.note(&note.of(flow.backend_id()).at(flow.slot()), jiffies);
        }
        Ok(())
    }

    /// The flight recorder.
    pub fn flight_recorder(&self) -> &FlightRecorder {
        &self.flight_recorder
    }
}

/// A note that the daemon has forgotten a flow, whose slot's word was `before`.
pub(super) fn forgotten<F: Family>(tuple: F::Tuple, slot: Slot, before: Meta) -> Note {
    Note::new::<F>(FlowEvent::Forgotten, F::parts(tuple)).of(before.backend()).at(slot).detail(state(before))
}

impl Account {
    fn note<F: Family>(self, tuple: ([u64; 2], u16, u16)) -> Note {
        match self {
            Self::Dead(silence, seconds) => {
                let detail = ResetReason::Dead as u8 | (silence as u8) << 4;
                Note::new::<F>(FlowEvent::Killed, tuple).detail(detail).other(seconds)
            }
            Self::Killed(reason) => Note::new::<F>(FlowEvent::Killed, tuple).detail(reason as u8),
            Self::Asked(reason) => Note::new::<F>(FlowEvent::Asked, tuple).detail(reason as u8),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(jiffies: u64, what: What) -> Entry {
        let client = "10.0.0.5:43210".parse().unwrap();
        Entry { jiffies, client, listener: 1, backend: 1, slot: None, what }
    }

    fn merged(rings: &[&[(u64, What)]]) -> Vec<What> {
        let ring = |entries: &&[(u64, What)]| entries.iter().map(|(at, what)| entry(*at, *what)).collect();
        let rings = Rings { rings: rings.iter().map(ring).collect(), capacity: 100 };
        rings.of(|_| true).into_iter().map(|entry| entry.what).collect()
    }

    const CLOSED: What = What::Closed { by_client: true };

    #[test]
    fn what_cpus_wrote_in_the_same_tick_is_put_into_an_order_that_makes_sense() {
        let expected = [What::Claimed, What::Established, CLOSED, What::Claimed, CLOSED];
        let client_side = [(5, What::Claimed), (5, CLOSED), (5, What::Claimed), (5, CLOSED)];
        let backend_side = [(5, What::Established)];
        assert_eq!(merged(&[&client_side, &backend_side]), expected);
        assert_eq!(merged(&[&backend_side, &client_side]), expected);
        let (early, late) = ([(4, CLOSED)], [(5, What::Claimed), (6, What::Established)]);
        assert_eq!(merged(&[&late, &early]), [CLOSED, What::Claimed, What::Established]);
    }

    #[test]
    fn a_record_is_tied_to_the_time_of_day() {
        let anchor =
            Anchor { jiffies: (3 << 40) + 1000, nanoseconds: 1_800_000_000_000_000_000, frequency: 250 };
        let clock = Clock(anchor);
        let at = |milliseconds: i64| {
            SystemTime::UNIX_EPOCH + Duration::from_millis((1_800_000_000_000 + milliseconds) as u64)
        };
        assert_eq!(clock.time(1000), at(0));
        assert_eq!(clock.time(750), at(-1000));
        assert_eq!(clock.time(1001), at(4), "the daemon is dead, and packets go on");
        assert_eq!(clock.time((1 << 40) - 1500), at(-10_000), "the counter was cut");
    }

    #[test]
    fn a_full_ring_says_since_when_nothing_is_missing() {
        let ring = |from: u64, count: u64| (from..from + count).map(|at| entry(at, CLOSED)).collect();
        let rings = Rings { rings: vec![ring(10, 7), ring(50, 7), ring(1, 3)], capacity: 21 };
        assert_eq!(rings.complete_since(), Some(50));
        assert_eq!(Rings { rings: vec![ring(1, 3)], capacity: 7 }.complete_since(), None);
    }
}
