//! The flow table, listed for people: read from memory, a piece at a time, so that a large table keeps nobody waiting.

use std::{net::SocketAddr, time::Duration};

use lb_common::{
    flow::{Family, Slot, V4, V6, is_owner},
    layout::{Config, SETS_PER_ADDRESS, WAYS},
    meta::{BACKEND_FIN, CLIENT_FIN, Kind, Meta, RESET, SYN_ACK},
};

use super::{Dataplane, DataplaneError, Tables, address_of, flows::sets_in_use};

/// What a slot in use is, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowState {
    /// The handshake is under way, or not proven yet.
    HalfOpen,
    /// Proven by the backend.
    Established,
    /// One side has closed, or a RST was seen.
    Closing,
    /// Both sides have closed: the slot rests.
    Closed,
    /// Reset on purpose: answered until the slot is used again.
    Killed,
}

impl FlowState {
    /// The word for it in lists.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::HalfOpen => "half-open",
            Self::Established => "established",
            Self::Closing => "closing",
            Self::Closed => "closed",
            Self::Killed => "killed",
        }
    }

    fn of(meta: Meta) -> Option<Self> {
        if !meta.is_live() {
            return None;
        }
        Some(if meta.is_closed() {
            Self::Closed
        } else if meta.is(Kind::Killed) {
            Self::Killed
        } else if meta.has(CLIENT_FIN)
            || meta.has(BACKEND_FIN)
            || (meta.has(RESET) && meta.is(Kind::Established))
        {
            Self::Closing
        } else if meta.is(Kind::Established) {
            Self::Established
        } else {
            Self::HalfOpen
        })
    }
}

/// A slot in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListedFlow {
    /// Where the client's packets come from.
    pub client: SocketAddr,
    /// The listener's id.
    pub listener: u16,
    /// The backend's id.
    pub backend: u8,
    /// Where its packets come from as the backend sees them: SNAT address and slot.
    pub source: SocketAddr,
    /// What it is.
    pub state: FlowState,
    /// Whether its backend has answered the SYN.
    pub answered: bool,
    /// Since the client or the backend last sent a segment; to about a second.
    pub idle: Duration,
}

/// How far a list has come. The default begins it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    ipv6: bool,
    set: usize,
}

impl Cursor {
    /// As a number, for whoever hands it through.
    pub fn number(self) -> u64 {
        self.set as u64 | u64::from(self.ipv6) << 63
    }

    /// From [`Cursor::number`].
    pub fn from_number(number: u64) -> Self {
        Self { ipv6: number >> 63 == 1, set: (number & !(1 << 63)) as usize }
    }
}

impl Dataplane {
    /// Hands the slots in use of the next `sets` sets to `each`, which says whether it takes more. Returns where to go
    /// on; None: that was all.
    ///
    /// Flows come and go meanwhile: a list is true of each flow at the moment it was read.
    pub fn list(
        &mut self,
        from: Cursor,
        sets: usize,
        each: &mut dyn FnMut(ListedFlow) -> bool,
    ) -> Result<Option<Cursor>, DataplaneError> {
        let now = (self.jiffies()? >> self.ticks.shift()) as u16;
        let config = self.settings();
        let unit = self.ticks.unit();
        let length = if from.ipv6 { sets_in_use::<V6>(&config) } else { sets_in_use::<V4>(&config) };
        let first = from.set;
        let last = first.saturating_add(sets).min(length);
        for set in first..last {
            let more = if from.ipv6 {
                list_set::<V6>(&self.tables, &config, set, now, unit, each)
            } else {
                list_set::<V4>(&self.tables, &config, set, now, unit, each)
            };
            if !more {
                return Ok(Some(Cursor { set: set + 1, ..from }));
            }
        }
        Ok(match (last < length, from.ipv6) {
            (true, _) => Some(Cursor { set: last, ..from }),
            (false, false) => Some(Cursor { ipv6: true, set: 0 }),
            (false, true) => None,
        })
    }

    /// The flows whose slot is this port, at whichever SNAT address: those that a listener on it would cut off.
    pub fn flows_on(&mut self, port: u16) -> Result<Vec<ListedFlow>, DataplaneError> {
        let now = (self.jiffies()? >> self.ticks.shift()) as u16;
        let config = self.settings();
        let unit = self.ticks.unit();
        let mut found = Vec::new();
        let mut take = |flow: ListedFlow| {
            if flow.source.port() == port {
                found.push(flow);
            }
            true
        };
        let set_of = |address: u32| (address * SETS_PER_ADDRESS) as usize + usize::from(port) / WAYS;
        for address in 0..config.snat4_count {
            list_set::<V4>(&self.tables, &config, set_of(address), now, unit, &mut take);
        }
        for address in 0..config.snat6_count {
            list_set::<V6>(&self.tables, &config, set_of(address), now, unit, &mut take);
        }
        Ok(found)
    }
}

/// Returns whether `each` takes more. A set is handed over as a whole.
fn list_set<F: Family>(
    tables: &Tables,
    config: &Config,
    index: usize,
    now: u16,
    unit: Duration,
    each: &mut dyn FnMut(ListedFlow) -> bool,
) -> bool {
    let Some(set) = F::set(tables, index as u32) else { return true };
    let mut more = true;
    for way in 0..WAYS as u32 {
        let word = F::meta(set, way);
        let meta = Meta(word.load());
        let Some(state) = FlowState::of(meta) else { continue };
        let tuple = F::load(set, way);
        let after = Meta(word.load());
        // Another flow's by now: its tuple may be half written.
        if !is_owner::<F>(set, way, meta, tuple) {
            continue;
        }
        let (address, port, listener) = F::parts(tuple);
        let slot = Slot { set: index as u32, way };
        let age = after.age(now);
        // A packet may have come since the clock was read.
        let age = if age > u16::MAX - 4 { 0 } else { age };
        more &= each(ListedFlow {
            client: SocketAddr::new(address_of(F::NUMBER, address), u16::from_be(port)),
            listener,
            backend: after.backend(),
            source: SocketAddr::new(address_of(F::NUMBER, F::snat(config, slot.address())), slot.port()),
            state,
            answered: !meta.is(Kind::HalfOpen) || meta.has(SYN_ACK),
            idle: unit * u32::from(age),
        });
    }
    more
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_what_its_word_says() {
        let state = |kind, flags| FlowState::of(Meta::new(kind, 1, 0).with(flags));
        assert_eq!(state(Kind::Free, 0), None);
        assert_eq!(state(Kind::Claiming, 0), None, "its tuple is being written");
        assert_eq!(state(Kind::HalfOpen, 0), Some(FlowState::HalfOpen));
        assert_eq!(state(Kind::HalfOpen, RESET), Some(FlowState::HalfOpen), "the second chance");
        assert_eq!(state(Kind::Established, 0), Some(FlowState::Established));
        for flag in [CLIENT_FIN, BACKEND_FIN, RESET] {
            assert_eq!(state(Kind::Established, flag), Some(FlowState::Closing));
        }
        assert_eq!(state(Kind::ClosedByBackend, 0), Some(FlowState::Closed));
        assert_eq!(state(Kind::Killed, 0), Some(FlowState::Killed));
    }
}
