//! The flow table from the daemon's side: counting, forgetting what is over, keeping look-ups short.
//!
//! The daemon only ever frees, and only by compare-and-exchange on the word it has examined: a slot that changed
//! meanwhile is somebody's, and left alone (`lb_common::flow`).

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    time::{Duration, Instant},
};

use lb_common::{
    cell::Cell8,
    flow::{Family, LONG_QUARANTINE, Query, Slot, V4, V6},
    layout::{Config, SETS_PER_ADDRESS, WAYS},
    meta::{BACKEND_FIN, BACKEND_TOLD, CLIENT_FIN, Kind, Meta, RESET},
};

use super::{
    Dataplane, DataplaneError, FlightRecorder, Tables, flight_recorder::forgotten, grace, snat::Moved,
};

/// How long a handshake may take, and a proven flow that nobody finished: RFC 5382 REQ-5, the transitory timeout.
const TRANSITORY: Duration = Duration::from_secs(240);

/// What becomes of a flow that neither end uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdlePolicy {
    /// After this long.
    pub timeout: Duration,
    /// Both ends are told, by [`Dataplane::kill_idle_flows`].
    pub tell: bool,
}

/// How much longer than its timeout a flow stays whose ends are to be told, but are not, as its VIP is on another host.
const UNTOLD: Duration = Duration::from_secs(120);

/// How long no segment of a half-closed flow was seen when its backend is asked about it. For 60 s Linux remembers a connection
/// that its process has closed and whose other end has not (`tcp_fin_timeout`, `Documentation/networking/ip-sysctl.rst`), and one
/// in TIME-WAIT; its timers are late by up to 5.1 s (the wheel of `kernel/time/timer.c` at 100 Hz). A question before that would
/// have TIME-WAIT begin anew.
pub(super) const HALF_CLOSED_REST: Duration = Duration::from_secs(70);

/// How long a claim is watched before it is given up. The CPU of a virtual machine that was halted goes on with an old claim
/// within moments.
const CLAIM_WATCHED: Duration = Duration::from_secs(5);

/// When the claims that the last round found were first found, by family, set, way and word.
pub(super) type Claims = HashMap<(u8, u32, u32, Meta), Instant>;

/// What a round of the reaper found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reaped {
    /// Flows of each backend that are not closed, those of the connect hook included, by id.
    pub active: Vec<u64>,
    /// Slots that became free or closed.
    pub freed: u64,
    /// Slots in use, closed ones in quarantine included.
    pub occupied: u64,
    /// Slots there are.
    pub slots: u64,
    /// Established flows of each backend that neither end has used for their timeout, and whose ends are to be told, by id.
    pub idle: Vec<u64>,
    /// Established flows of each backend of which a RST was seen that proves nothing, and no segment since, by id.
    pub doubted: Vec<u64>,
    /// Established flows of each backend that one end has closed and that rest, so that the backend is to be asked now, by id.
    pub half_closed: Vec<u64>,
    /// Whether any slot in use or any socket of the connect hook names a backend, by id.
    pub named_backends: Vec<bool>,
    /// Whether any slot in use names a listener, by id.
    pub named_listeners: Vec<bool>,
    /// SNAT addresses that had no new flows, and have none at all any more.
    pub left: Vec<IpAddr>,
}

/// What the reaper knows when it looks at a slot.
struct Round<'a> {
    now: u16,
    jiffies: u64,
    transitory: u16,
    half_closed_rest: u16,
    /// By listener id: the idle timeout, and when a flow is forgotten that was to be told before.
    idle: &'a [IdleUnits],
    /// By backend id.
    local: &'a [bool],
    /// When it began.
    at: Instant,
    claims: &'a Claims,
}

impl Round<'_> {
    /// When the claim of a slot was first found.
    fn first_found<F: Family>(&self, slot: Slot, meta: Meta) -> Instant {
        self.claims.get(&claim::<F>(slot, meta)).copied().unwrap_or(self.at)
    }

    /// What a slot should be instead; None: it is fine. `watched`: for how long its claim was watched, if it is one.
    fn verdict(&self, meta: Meta, listener: u16, watched: Duration) -> Option<Meta> {
        let age = meta.age(self.now);
        // Between reading the clock and the slot, a packet may have come: younger than now is not very old.
        if age > u16::MAX - 4 {
            return None;
        }
        let untold = IdleUnits { timeout: self.transitory, forgotten: self.transitory };
        let IdleUnits { timeout: idle, forgotten } =
            self.idle.get(usize::from(listener)).copied().unwrap_or(untold);
        let local = self.local.get(usize::from(meta.backend())).copied().unwrap_or(false);
        if meta.is(Kind::Claiming) {
            // Its CPU was lost, or the program was replaced.
            (age > 1 && watched >= CLAIM_WATCHED).then_some(Meta::FREE)
        } else if meta.is(Kind::HalfOpen) {
            // Replies of a local backend are not seen: its flows never become more than this, and the client's FIN is
            // all that is heard of their end.
            let lives = local && !meta.has(CLIENT_FIN);
            (age > if lives { idle } else { self.transitory }).then_some(Meta::FREE)
        } else if meta.is(Kind::Established) {
            // The backend may hold on to it: as if it had closed first.
            (age > forgotten).then(|| meta.without_flags().become_kind(Kind::ClosedByBackend))
        } else if meta.is_closed() {
            (age > LONG_QUARANTINE).then_some(Meta::FREE)
        } else if meta.is(Kind::Killed) {
            // What its backend was not told of waits until that has been ready for a while (`release_killed`); if it
            // never comes back, no longer than the flow would have been remembered.
            let rest = if meta.has(BACKEND_TOLD) { LONG_QUARANTINE } else { idle };
            (age > rest).then_some(Meta::FREE)
        } else {
            None
        }
    }
}

impl Round<'_> {
    fn is_idle(&self, meta: Meta, listener: u16) -> bool {
        self.idle.get(usize::from(listener)).is_some_and(|idle| idle.is_over(meta, self.now))
    }
}

impl Dataplane {
    /// Counts the flows and frees those that are over. `idle` is the idle timeout of each service, in configuration
    /// order.
    pub fn reap(&mut self, idle: &[IdlePolicy]) -> Result<Reaped, DataplaneError> {
        let jiffies = self.jiffies()?;
        self.flight_recorder.anchor(jiffies, self.ticks.frequency);
        let now = (jiffies >> self.ticks.shift()) as u16;
        self.idle_units = (0..self.listeners.len())
            .map(|id| {
                let service = self.listeners.read(id).map_or(0, |listener| usize::from(listener.service));
                let policy = match service.checked_sub(1) {
                    Some(index) => idle.get(index),
                    None => self.kept_idle.get(&(id as u16)),
                };
                let policy = policy.copied().unwrap_or(IdlePolicy { timeout: TRANSITORY, tell: false });
                let timeout = self.ticks.units(policy.timeout);
                let forgotten = if policy.tell { timeout + self.ticks.units(UNTOLD) } else { timeout };
                IdleUnits { timeout, forgotten }
            })
            .collect();
        let local = self.local_backends();
        let claims = std::mem::take(&mut self.claims);
        let transitory = self.ticks.units(TRANSITORY);
        let round = Round {
            now,
            jiffies,
            transitory,
            half_closed_rest: self.ticks.units(HALF_CLOSED_REST),
            idle: &self.idle_units,
            local: &local,
            at: Instant::now(),
            claims: &claims,
        };
        let mut reaped = Reaped {
            active: vec![0; self.backends.len()],
            idle: vec![0; self.backends.len()],
            doubted: vec![0; self.backends.len()],
            half_closed: vec![0; self.backends.len()],
            named_backends: vec![false; self.backends.len()],
            named_listeners: vec![false; self.listeners.len()],
            ..Reaped::default()
        };
        let config = self.settings();
        let mut moved = [Moved::begin::<V4>(&config), Moved::begin::<V6>(&config)];
        let [moved4, moved6] = &mut moved;
        let sweep = Sweep { config: &config, flight_recorder: &self.flight_recorder, round: &round };
        sweep.all::<V4>(&self.tables, &mut reaped, &mut self.claims, moved4.as_mut());
        sweep.all::<V6>(&self.tables, &mut reaped, &mut self.claims, moved6.as_mut());
        reaped.left = self.settle_snat_addresses(moved)?;
        for (id, sockets) in self.open_sockets()?.into_iter().enumerate() {
            reaped.active[id] += sockets;
            reaped.named_backends[id] |= sockets > 0;
        }
        Ok(reaped)
    }

    /// Clears overflow marks that no flow needs any more, so that look-ups need not go beyond the second candidate.
    /// Waits for a grace period: about 8 ms.
    ///
    /// Marks carry the epoch they were set in. A new epoch begins; once every program works in it, a flow that is not
    /// yet to be seen in the table marks with the new one. So a mark of an older epoch whose flows are not in the
    /// table has none, and whoever needs it meanwhile overwrites it, which the compare-and-exchange notices.
    pub fn clear_marks(&mut self) -> Result<(), DataplaneError> {
        if !any_marks::<V4>(&self.tables) && !any_marks::<V6>(&self.tables) {
            return Ok(());
        }
        let mut config = self.settings();
        config.epoch = config.epoch % 255 + 1;
        self.config.write(0, config);
        grace::wait().map_err(|source| DataplaneError::System { call: "membarrier", source })?;
        clear::<V4>(&self.tables, &config);
        clear::<V6>(&self.tables, &config);
        Ok(())
    }
}

/// A claim's key in [`Claims`].
fn claim<F: Family>(slot: Slot, meta: Meta) -> (u8, u32, u32, Meta) {
    (F::NUMBER, slot.set, slot.way, meta)
}

/// A look at every slot.
struct Sweep<'a> {
    config: &'a Config,
    flight_recorder: &'a FlightRecorder,
    round: &'a Round<'a>,
}

impl Sweep<'_> {
    fn all<F: Family>(
        &self,
        tables: &Tables,
        reaped: &mut Reaped,
        claims: &mut Claims,
        mut moved: Option<&mut Moved>,
    ) {
        for (index, set) in tables.first::<F>(sets_in_use::<F>(self.config)) {
            for way in 0..WAYS as u32 {
                reaped.slots += 1;
                let found = Meta(F::meta(set, way).load());
                if found.is(Kind::Free) {
                    continue;
                }
                let (slot, tuple) = (Slot { set: index, way }, F::load(set, way));
                let meta = self.judge::<F>(set, slot, found, tuple);
                reaped.freed += u64::from(meta != found);
                // One that was only closed is in use still.
                if meta.is(Kind::Free) {
                    continue;
                }
                if meta.is(Kind::Claiming) {
                    claims.insert(claim::<F>(slot, meta), self.round.first_found::<F>(slot, meta));
                }
                if let Some(moved) = &mut moved {
                    moved.see::<F>(self.config, slot, tuple);
                }
                let (_, _, listener) = F::parts(tuple);
                reaped.count(meta, listener);
                let backend = usize::from(meta.backend());
                reaped.idle[backend] += u64::from(self.round.is_idle(meta, listener));
                reaped.doubted[backend] += u64::from(meta.is(Kind::Established) && meta.has(RESET));
                reaped.half_closed[backend] +=
                    u64::from(is_half_closed(meta, self.round.now, self.round.half_closed_rest));
            }
        }
    }

    /// Frees or closes a slot that is over. Returns what it is now.
    fn judge<F: Family>(&self, set: &F::Set, slot: Slot, meta: Meta, tuple: F::Tuple) -> Meta {
        let (_, _, listener) = F::parts(tuple);
        let watched = if meta.is(Kind::Claiming) {
            self.round.at.saturating_duration_since(self.round.first_found::<F>(slot, meta))
        } else {
            Duration::ZERO
        };
        let Some(next) = self.round.verdict(meta, listener, watched) else { return meta };
        if F::meta(set, slot.way).compare_exchange(meta.0, next.0) != meta.0 {
            return meta;
        }
        if is_news(meta) {
            self.flight_recorder.note(&forgotten::<F>(tuple, slot, meta), self.round.jiffies);
        }
        next
    }
}

impl Reaped {
    /// Takes note of a slot in use.
    fn count(&mut self, meta: Meta, listener: u16) {
        self.occupied += 1;
        self.named_backends[usize::from(meta.backend())] = true;
        if let Some(named) = self.named_listeners.get_mut(usize::from(listener)) {
            *named = true;
        }
        let ending =
            meta.has(RESET) || meta.is(Kind::Killed) || (meta.is(Kind::HalfOpen) && meta.has(CLIENT_FIN));
        if meta.is_live() && !meta.is_closed() && !ending {
            self.active[usize::from(meta.backend())] += 1;
        }
    }
}

/// Idle timeouts of a listener's flows, in units of about a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct IdleUnits {
    /// When both ends are told, if they are.
    pub(super) timeout: u16,
    /// When the flow is forgotten, told or not.
    pub(super) forgotten: u16,
}

impl IdleUnits {
    /// Are the ends of a flow to be told that it is over?
    pub(super) fn is_over(self, meta: Meta, now: u16) -> bool {
        let age = meta.age(now);
        // A packet may have come since the clock was read.
        meta.is(Kind::Established)
            && self.timeout != self.forgotten
            && (self.timeout + 1..u16::MAX - 4).contains(&age)
    }
}

/// Is the flow's backend to be asked whether a RST, or a SYN of its client, was real? Not before `rest` units without a segment are over: the RST must
/// be there first, and the next segment may contradict it.
pub(super) fn is_doubted(meta: Meta, now: u16, rest: u16) -> bool {
    meta.is(Kind::Established) && meta.has(RESET) && (rest + 1..u16::MAX - 4).contains(&meta.age(now))
}

/// Is the flow's backend to be asked whether it still has it, as one end's FIN was seen and since then nothing? The other end's
/// may have gone past the load balancer, or may not have fitted numbers that were forged in the handshake. It is asked in
/// three units in a row, as a question may be lost: first after `rest` units, then each time the silence has doubled.
pub(super) fn is_half_closed(meta: Meta, now: u16, rest: u16) -> bool {
    let has_fin = meta.has(CLIENT_FIN) || meta.has(BACKEND_FIN);
    let age = meta.age(now);
    let is_due = || ((age - 1) / rest).is_power_of_two() && (age - 1) % rest < 3;
    meta.is(Kind::Established)
        && has_fin
        && !meta.has(RESET)
        && (rest + 1..u16::MAX - 4).contains(&age)
        && is_due()
}

/// The sets of the SNAT addresses that there are: nothing is in those of the places behind them.
pub(super) fn sets_in_use<F: Family>(config: &Config) -> usize {
    (F::snat_count(config) * SETS_PER_ADDRESS) as usize
}

/// Nothing has told of the flow's end before.
fn is_news(meta: Meta) -> bool {
    meta.is(Kind::HalfOpen) && !meta.has(CLIENT_FIN) || meta.is(Kind::Established) && !meta.has(RESET)
}

fn marks<F: Family>(tables: &Tables) -> impl Iterator<Item = (u32, &Cell8)> {
    let marked = |(index, set)| Some((index, F::overflow(tables, set, index)?));
    tables.first::<F>(tables.sets::<F>()).filter_map(marked)
}

fn any_marks<F: Family>(tables: &Tables) -> bool {
    marks::<F>(tables).any(|(_, mark)| mark.load() != 0)
}

fn clear<F: Family>(tables: &Tables, config: &Config) {
    let mut needed = HashSet::new();
    for (index, set) in tables.first::<F>(sets_in_use::<F>(config)) {
        for way in 0..WAYS as u32 {
            if Meta(F::meta(set, way).load()).is_live() {
                // At the address where it is, which new flows of its bucket may not leave from.
                let slot = Slot { set: index, way };
                let query = Query::at::<F>(config, F::load(set, way), slot.address() as u8);
                if query.candidate(0) != index && query.candidate(1) != index {
                    needed.insert(query.candidate(0));
                }
            }
        }
    }
    for (index, mark) in marks::<F>(tables) {
        clear_one(mark, config.epoch as u8, needed.contains(&index));
    }
}

fn clear_one(mark: &Cell8, epoch: u8, needed: bool) {
    let found = mark.load();
    if found != 0 && found != epoch && !needed {
        mark.compare_exchange(found, 0);
    }
}

#[cfg(test)]
mod tests {
    use lb_common::transition::{HALF_CLOSED_SILENCE, RESET_QUARANTINE};

    use super::{super::Ticks, *};

    const NOW: u16 = 1000;

    fn verdict(kind: Kind, flags: u32, backend: u8, age: u16) -> Option<Kind> {
        let meta = Meta::new(kind, backend, NOW.wrapping_sub(age)).with(flags);
        verdict_after(CLAIM_WATCHED, meta)
    }

    /// A round that begins now.
    fn round<'a>(idle: &'a [IdleUnits], local: &'a [bool], claims: &'a Claims) -> Round<'a> {
        let at = Instant::now();
        Round { now: NOW, jiffies: 0, transitory: 240, half_closed_rest: 60, idle, local, at, claims }
    }

    /// What becomes of it, when its claim was watched for so long.
    fn verdict_after(watched: Duration, meta: Meta) -> Option<Kind> {
        let units = |timeout| IdleUnits { timeout, forgotten: timeout };
        let (idle, local) = (&[units(0), units(10_000)], &[false, false, true]);
        let claims = Claims::new();
        let round = round(idle, local, &claims);
        round.verdict(meta, 1, watched).map(|next| {
            [Kind::Free, Kind::ClosedByClient, Kind::ClosedByBackend]
                .into_iter()
                .find(|kind| next.is(*kind))
                .unwrap()
        })
    }

    #[test]
    fn a_slot_is_forgotten_in_its_time_and_not_before() {
        assert_eq!(verdict(Kind::Claiming, 0, 1, 1), None);
        assert_eq!(verdict(Kind::Claiming, 0, 1, 2), Some(Kind::Free));
        assert_eq!(verdict(Kind::HalfOpen, 0, 1, 240), None);
        assert_eq!(verdict(Kind::HalfOpen, 0, 1, 241), Some(Kind::Free));
        assert_eq!(
            verdict(Kind::HalfOpen, 0, 2, 9_999),
            None,
            "a local backend's flow lives on the idle timeout"
        );
        assert_eq!(verdict(Kind::HalfOpen, 0, 2, 10_001), Some(Kind::Free));
        assert_eq!(
            verdict(Kind::HalfOpen, CLIENT_FIN, 2, 241),
            Some(Kind::Free),
            "unless the client has closed it"
        );
        assert_eq!(verdict(Kind::Established, 0, 1, 10_000), None);
        assert_eq!(verdict(Kind::Established, 0, 1, 10_001), Some(Kind::ClosedByBackend));
        assert_eq!(
            verdict(Kind::Established, RESET, 1, 10_000),
            None,
            "a RST that nobody proves ends nothing"
        );
        assert_eq!(verdict(Kind::ClosedByBackend, 0, 1, 60), None);
        assert_eq!(verdict(Kind::ClosedByBackend, 0, 1, 61), Some(Kind::Free));
        assert_eq!(verdict(Kind::Killed, BACKEND_TOLD, 1, 60), None);
        assert_eq!(verdict(Kind::Killed, BACKEND_TOLD, 1, 61), Some(Kind::Free));
        assert_eq!(verdict(Kind::Killed, 0, 1, 10_000), None, "its backend may come back and remember");
        assert_eq!(verdict(Kind::Killed, 0, 1, 10_001), Some(Kind::Free));
    }

    #[test]
    fn an_idle_flow_is_told_before_it_is_forgotten() {
        let idle = IdleUnits { timeout: 100, forgotten: 220 };
        let flow = |age: u16| Meta::new(Kind::Established, 1, NOW.wrapping_sub(age));
        assert!(
            !idle.is_over(flow(100), NOW) && idle.is_over(flow(101), NOW) && idle.is_over(flow(220), NOW)
        );
        assert!(!idle.is_over(flow(0u16.wrapping_sub(2)), NOW), "a packet came since the clock was read");
        let silent = IdleUnits { timeout: 100, forgotten: 100 };
        assert!(!silent.is_over(flow(101), NOW));
    }

    #[test]
    fn a_flow_is_doubted_when_nothing_has_contradicted_a_reset() {
        let flow = |age: u16| Meta::new(Kind::Established, 1, NOW - age);
        for rest in [0, RESET_QUARANTINE] {
            assert!(is_doubted(flow(rest + 1).with(RESET), NOW, rest));
            assert!(!is_doubted(flow(rest).with(RESET), NOW, rest));
            assert!(!is_doubted(flow(rest + 1), NOW, rest));
        }
    }

    #[test]
    fn a_half_closed_flow_is_asked_about_when_it_rests() {
        let flow = |age: u16, flags: u32| Meta::new(Kind::Established, 1, NOW - age).with(flags);
        for fin in [CLIENT_FIN, BACKEND_FIN] {
            assert!(!is_half_closed(flow(60, fin), NOW, 60));
            assert!(is_half_closed(flow(61, fin), NOW, 60));
            assert!(!is_half_closed(flow(61, fin | RESET), NOW, 60), "it is in doubt already");
            assert!(!is_half_closed(flow(61, fin).become_kind(Kind::ClosedByClient), NOW, 60));
        }
        assert!(!is_half_closed(flow(61, 0), NOW, 60), "open at both ends");
    }

    #[test]
    fn an_answer_does_not_keep_a_flow_that_is_asked_about_at_any_frequency() {
        for frequency in Ticks::FREQUENCIES {
            assert!(Ticks { frequency }.units(HALF_CLOSED_REST) > HALF_CLOSED_SILENCE, "at {frequency} Hz");
        }
    }

    #[test]
    fn a_half_closed_flow_is_asked_about_again_whenever_its_silence_has_doubled() {
        let is_asked =
            |age: &u16| is_half_closed(Meta::new(Kind::Established, 1, 0).with(BACKEND_FIN), *age, 60);
        let asked: Vec<u16> = (0..1000).filter(is_asked).collect();
        assert_eq!(asked, [61, 62, 63, 121, 122, 123, 241, 242, 243, 481, 482, 483, 961, 962, 963]);
        assert!(!is_asked(&(u16::MAX - 3)), "a packet has come since the clock was read");
    }

    #[test]
    fn a_claim_is_given_up_by_time_and_not_by_looks() {
        let claimed = Meta::new(Kind::Claiming, 1, NOW - 100);
        let almost = CLAIM_WATCHED - Duration::from_millis(1);
        assert_eq!(verdict_after(almost, claimed), None, "of a machine that was halted, maybe");
        assert_eq!(verdict_after(CLAIM_WATCHED, claimed), Some(Kind::Free));
    }

    #[test]
    fn a_claim_is_known_by_its_slot() {
        let (slot, found) = (Slot { set: 1, way: 2 }, Meta::new(Kind::Claiming, 1, NOW - 100));
        let before = Instant::now();
        let claims = Claims::from([(claim::<V4>(slot, found), before)]);
        let at = before + CLAIM_WATCHED;
        let round = Round { at, ..round(&[], &[], &claims) };
        assert_eq!(round.first_found::<V4>(slot, found), before);
        assert_eq!(round.first_found::<V4>(Slot { way: 3, ..slot }, found), at, "of another slot");
        assert_eq!(round.first_found::<V6>(slot, found), at, "of the other family");
    }

    #[test]
    fn a_slot_seen_after_the_clock_was_read_is_not_old() {
        assert_eq!(verdict(Kind::Claiming, 0, 1, 0u16.wrapping_sub(2)), None);
        assert_eq!(verdict(Kind::Established, 0, 1, 0u16.wrapping_sub(1)), None);
    }

    #[test]
    fn only_marks_of_past_epochs_are_cleared() {
        for (value, needed, expected) in [(0, false, 0), (1, false, 0), (1, true, 1), (2, false, 2)] {
            let mark = Cell8::default();
            mark.store(value);
            clear_one(&mark, 2, needed);
            assert_eq!(mark.load(), expected);
        }
    }
}
