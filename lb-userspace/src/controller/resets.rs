//! Flows that must end because their backend is dead, and flows that are asked because it may have forgotten them.
//!
//! | what is seen of a backend | its flows |
//! |---|---|
//! | it is dead ([`Vigil`]) | reset, at most `reset_rate` a second; or kept, as `on_dead` or an operator's drain says |
//! | it refuses connections, or answers after any silence, of its or of ours: it may have rebooted | asked, at the same rate |
//! | everything else | left alone |

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use lb_common::{
    flight_recorder::{ResetReason, Silence},
    kill::KILLED_QUARANTINE,
    transition::RESET_QUARANTINE,
};

use super::{Controller, backends::Backend, endings::Kill, services::Services};
use crate::{
    config::OnDead,
    dataplane::{Account, DataplaneError, Flow, FlowFilter, Walk},
    health::{
        CheckCode, CheckReport, Event, Failure, OperatorState, Outcome, Sighting, State, Transition, Vigil,
    },
    resets::{Pace, Repeats, Wire},
};

/// The number of no service: that of a backend which was removed.
const NO_SERVICE: usize = usize::MAX;
/// Between batches of flows.
const SOON: Duration = Duration::from_millis(10);
/// Flows in a batch where no service says how many a second.
const UNWATCHED_BATCH: usize = 20;
/// Between looks at backends that may die.
const WATCHED: Duration = Duration::from_millis(50);
/// Between looks at the table for flows of a dead backend that were missed, as a packet may have changed them just then, and
/// for flows that are idle, in doubt or half-closed.
const AGAIN: Duration = Duration::from_secs(1);
/// When there is nothing to do. Shorter than the sight of any vigil, to which a longer pause means that this process was
/// stopped: everybody's time would begin anew.
const LATER: Duration = Duration::from_millis(100);

/// All that is kept about resetting and asking.
pub(super) struct Resets {
    wire: Wire,
    /// By number of the service.
    watches: BTreeMap<usize, Watch>,
    jobs: VecDeque<Job>,
    /// A batch of each in turn.
    kills: VecDeque<Kill>,
    repeats: Repeats<Flow>,
    /// Since when backends have been ready, by id.
    ready_since: BTreeMap<u8, Instant>,
    due: Instant,
    voice: Voice,
    /// When backends were heard could not be read: said once.
    deaf: bool,
    /// Whose time to drain is over and whose flows wait for a VIP that is elsewhere: the sockets of this host's processes were
    /// ended.
    half_ended: BTreeSet<u8>,
    /// Who was removed before the time that an operator had given their flows was over.
    pub(super) departed: Vec<Backend>,
    begun: Begun,
    /// When a backend that is silent was last without a link to it, by id.
    cut_off: BTreeMap<u8, Instant>,
}

/// Whether segments can be sent: what goes wrong with the first of thousands is said, and not again before all is well.
#[derive(Debug, Default)]
struct Voice {
    mute: bool,
    /// In this turn.
    sent: bool,
    failed: bool,
}

impl Voice {
    /// Takes note of an attempt. Returns what is to be said about it.
    fn heed(&mut self, sent: io::Result<()>) -> Option<io::Error> {
        let error = match sent {
            Ok(()) => {
                self.sent = true;
                return None;
            }
            Err(error) => error,
        };
        self.failed = true;
        (!std::mem::replace(&mut self.mute, true)).then_some(error)
    }

    /// A turn is over: when everything in it could be sent, the next failure is news again.
    fn end_of_turn(&mut self) {
        if self.sent && !self.failed {
            self.mute = false;
        }
        (self.sent, self.failed) = (false, false);
    }
}

/// When the last work of a kind on the flows of a backend, by id, began.
#[derive(Debug, Default)]
struct Begun(BTreeMap<(Work, u8), Instant>);

impl Begun {
    /// May it begin now? At most twice in [`AGAIN`], however often the table is looked through: each `sheave status` does that.
    fn admits(&mut self, work: Work, backend: u8, now: Instant) -> bool {
        // The turn of a second comes early or late, and must not wait for the next.
        self.0.retain(|_, at| now.saturating_duration_since(*at) < AGAIN / 2);
        let admitted = !self.0.contains_key(&(work, backend));
        if admitted {
            self.0.insert((work, backend), now);
        }
        admitted
    }
}

/// Over the backends of a service.
struct Watch {
    vigil: Vigil,
    reset_rate: u32,
    pace: Pace,
    /// When the others were last asked because somebody is silent.
    looked: Instant,
}

/// Something that is done to all flows of a backend, a few at a time. Those of a service share its rate, in the order of their
/// work.
#[derive(Debug)]
struct Job {
    work: Work,
    account: Account,
    backend: u8,
    service: usize,
    walk: Walk,
    count: usize,
    /// Not before.
    at: Instant,
}

/// In the order in which the rate is theirs: what anyone can cause by RSTs must not hold up what clients wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Work {
    /// Of a backend that is dead, for as long as it is.
    Reset,
    /// Of a backend that lives, because an operator says so.
    End,
    /// Those that neither end has used for their idle timeout.
    Idle,
    Ask,
    /// Those of which a RST was seen that proves nothing, or a SYN after the client's FIN.
    Doubt,
    /// Those that one end has closed and that rest.
    HalfClosed,
}

impl Resets {
    /// Opens the sockets.
    pub(super) fn open(services: &Services, now: Instant) -> io::Result<Self> {
        let mut resets = Self {
            wire: Wire::open()?,
            watches: BTreeMap::new(),
            jobs: VecDeque::new(),
            kills: VecDeque::new(),
            repeats: Repeats::default(),
            ready_since: BTreeMap::new(),
            due: now,
            voice: Voice::default(),
            deaf: false,
            half_ended: BTreeSet::new(),
            departed: Vec::new(),
            begun: Begun::default(),
            cut_off: BTreeMap::new(),
        };
        resets.watch_over(services, now);
        Ok(resets)
    }

    /// From now on watches over these services, as they are configured now; who is dead stays so, and what has begun goes
    /// on.
    pub(super) fn watch_over(&mut self, services: &Services, now: Instant) {
        self.watches.retain(|number, _| services.get(*number).is_some());
        for (number, service) in services.iter() {
            let watch = self.watches.entry(number).or_insert_with(|| Watch {
                vigil: Vigil::new(service.reset_after),
                reset_rate: service.reset_rate,
                pace: Pace::new(service.reset_rate, now),
                looked: now,
            });
            watch.vigil.set_reset_after(service.reset_after);
            if watch.reset_rate != service.reset_rate {
                watch.reset_rate = service.reset_rate;
                watch.pace = Pace::new(service.reset_rate, now);
            }
        }
    }

    /// Knows nothing any more of backends that are gone: their ids may become those of others.
    pub(super) fn forget_others(&mut self, backends: &[Backend]) {
        let stays = |id: &u8| backends.iter().any(|backend| backend.id == *id);
        self.ready_since.retain(|id, _| stays(id));
        self.cut_off.retain(|id, _| stays(id));
    }

    /// When [`Controller::reset_turn`] is to be called again.
    pub(super) fn due(&self) -> tokio::time::Instant {
        self.due.into()
    }

    /// At the next opportunity.
    pub(super) fn hurry(&mut self) {
        self.due = Instant::now();
    }

    fn begin(&mut self, work: Work, account: Account, backend: &Backend, now: Instant) {
        self.begin_on(work, account, (backend.target.service, backend.id), now);
    }

    fn begin_on(&mut self, work: Work, account: Account, (service, backend): (usize, u8), now: Instant) {
        let same = |job: &Job| (job.work, job.backend) == (work, backend);
        // What was passed by already is asked again.
        self.jobs.retain(|job| !same(job));
        self.jobs.push_back(Job {
            work,
            account,
            backend,
            service,
            walk: Walk::default(),
            count: 0,
            at: now,
        });
        self.due = now;
    }

    /// Goes on with this work on a backend's flows if it has begun, and begins it otherwise, if that is not too soon after the
    /// last time.
    fn begin_unless_begun(&mut self, work: Work, account: Account, of: (usize, u8), now: Instant) {
        let has_begun = self.jobs.iter().any(|job| (job.work, job.backend) == (work, of.1));
        if !has_begun && self.begun.admits(work, of.1, now) {
            self.begin_on(work, account, of, now);
        }
    }

    /// Begins, or goes on, to reset what an operator ends.
    pub(super) fn begin_kill(&mut self, kill: Kill) {
        self.kills.push_back(kill);
        self.hurry();
    }

    /// Whose turn it is.
    pub(super) fn next_kill(&mut self) -> Option<Kill> {
        self.kills.pop_front()
    }

    /// Whether the flows of a backend are being reset although it lives.
    pub(super) fn is_ending(&self, backend: u8) -> bool {
        self.jobs.iter().any(|job| (job.work, job.backend) == (Work::End, backend))
    }

    /// Only the sockets of this host's processes are to be ended. `false`: they were.
    pub(super) fn half_ends(&mut self, backend: u8) -> bool {
        self.half_ended.insert(backend)
    }

    /// Forgets all others whose sockets were ended.
    pub(super) fn retain_half_ended(&mut self, stays: impl Fn(u8) -> bool) {
        self.half_ended.retain(|id| stays(*id));
    }

    /// What was sent, or why not, once.
    fn heed(&mut self, sent: io::Result<()>) {
        if let Some(error) = self.voice.heed(sent) {
            tracing::warn!(
                "cannot send the segments that end flows ({error}): their clients are told when they speak"
            );
        }
    }
}

impl Controller {
    /// Takes in a finished check: a backend that may have forgotten its flows is asked about them. `before` is the backend
    /// as it was before the check.
    pub(super) fn consider_asking(&mut self, event: &Event, before: &Backend) {
        let now = Instant::now();
        if event.state == State::Ready {
            self.resets.ready_since.entry(before.id).or_insert(now);
        } else {
            self.resets.ready_since.remove(&before.id);
        }
        if event.state == State::Silent && before.silent_since.is_none() {
            self.resets.hurry();
        }
        if !before.local && may_have_forgotten(event, before) {
            tracing::debug!("asking about the flows of {}", before.name);
            let reason = if refuses(&event.report) { ResetReason::Refuses } else { ResetReason::Returned };
            self.resets.begin(Work::Ask, Account::Asked(reason), before, now);
        }
    }

    /// Sees to the flows that the last look through the table found idle, to those of which a RST was seen that proves nothing,
    /// and to those that are half closed: also to flows of backends that were removed.
    pub(super) fn look_after_flows(&mut self) {
        let now = Instant::now();
        for id in 0..=u8::MAX {
            let count = |counts: &[u64]| counts.get(usize::from(id)).copied().unwrap_or_default();
            let (idle, doubted) = (count(&self.reaped.idle), count(&self.reaped.doubted));
            let half_closed = count(&self.reaped.half_closed);
            let backend = self.backends.iter().find(|backend| backend.id == id);
            if backend.is_some_and(|backend| backend.local) {
                continue;
            }
            let of = (backend.map_or(NO_SERVICE, |backend| backend.target.service), id);
            if idle > 0 {
                let account = Account::Killed(ResetReason::Idle);
                self.resets.begin_unless_begun(Work::Idle, account, of, now);
            }
            // The kernel of one that is unresponsive may answer still. One that is dead is asked about all its flows when it is back.
            if backend.is_some_and(|backend| backend.state == State::Dead) {
                continue;
            }
            if doubted > 0 {
                let account = Account::Asked(ResetReason::Doubt);
                self.resets.begin_unless_begun(Work::Doubt, account, of, now);
            }
            if half_closed > 0 {
                let account = Account::Asked(ResetReason::HalfClosed);
                self.resets.begin_unless_begun(Work::HalfClosed, account, of, now);
            }
        }
    }

    /// Looks who has died, and resets, asks and repeats what it is time for.
    pub(super) fn reset_turn(&mut self) {
        let now = Instant::now();
        let watching = self.look_for_the_dead(now);
        self.end_sockets_of_the_dead(now);
        if let Err(error) = self.work(now) {
            tracing::warn!("cannot look through the flow table: {error}");
        }
        for flow in self.resets.repeats.due(now) {
            if let Some(last_ack) = self.dataplane.last_ack_of_killed(&flow) {
                let sent = self.resets.wire.reset_client(&flow, last_ack);
                self.resets.heed(sent);
            }
        }
        self.go_on_killing(now);
        self.resets.voice.end_of_turn();
        self.release_killed(now);
        let soon = watching.then_some(now + WATCHED);
        let jobs = self.resets.jobs.iter().map(|job| job.at.max(now + SOON)).min();
        let kills = (!self.resets.kills.is_empty()).then_some(now + SOON);
        let next = [soon, jobs, kills, self.resets.repeats.next()].into_iter().flatten().min();
        self.resets.due = next.map_or(now + LATER, |next| next.min(now + LATER));
    }

    /// For `sheave why`. What is done to the flows does not depend on it.
    fn write_down(&mut self, flows: &[Flow], account: Account) {
        if let Err(error) = self.dataplane.write_down(flows, account) {
            tracing::warn!("cannot write down what is done to flows: {error}");
        }
    }

    /// A backend keeps the flows it still has.
    pub(super) fn spare_flows_of(&mut self, backend: u8) {
        self.resets.jobs.retain(|job| (job.work, job.backend) != (Work::End, backend));
    }

    /// Resets the flows that a backend has now, at the service's rate, and tells both of their ends.
    pub(super) fn end_flows_of(&mut self, backend: &Backend, reason: ResetReason) {
        self.resets.begin(Work::End, Account::Killed(reason), backend, Instant::now());
        self.end_sockets_of(backend.id);
    }

    /// The same for one that is dead, and will not be watched any longer.
    pub(super) fn end_flows_of_the_dead(&mut self, backend: &Backend, now: Instant) {
        self.resets.begin(Work::End, backend.obituary(now), backend, now);
        self.end_sockets_of(backend.id);
    }

    /// Whether there is anybody who may die soon.
    fn look_for_the_dead(&mut self, now: Instant) -> bool {
        if !self.backends.iter().any(|backend| matches!(backend.state, State::Silent | State::Dead)) {
            // Everybody is well: nothing is remembered of earlier times but what the vigils know.
            for service in self.services.numbers() {
                self.judge(service, &[], now);
            }
            return false;
        }
        self.look_at_sockets(now);
        self.look_at_links(now);
        let heard = match self.dataplane.heard() {
            Ok(heard) => heard,
            Err(error) => {
                // Payload is a veto: where it cannot be asked for there is no verdict.
                if !std::mem::replace(&mut self.resets.deaf, true) {
                    tracing::warn!(
                        "cannot read when backends were heard ({error}): until that works nobody is found dead"
                    );
                }
                return true;
            }
        };
        self.resets.deaf = false;
        for service in self.services.numbers() {
            for died in self.judge(service, &heard, now) {
                self.bury(died, now);
            }
            self.look_elsewhere(service, &self.sightings(service, &heard, now), now);
        }
        self.backends.iter().any(|backend| backend.state == State::Silent)
    }

    /// Finds out whose silence is our own: no packet reaches a backend behind an interface without a carrier.
    fn look_at_links(&mut self, now: Instant) {
        let is_silent = |backend: &Backend| matches!(backend.state, State::Silent | State::Dead);
        let (backends, interfaces) = (&self.backends, self.ports.interfaces());
        self.resets.cut_off.retain(|id, _| backends.iter().any(|it| it.id == *id && is_silent(it)));
        for backend in backends.iter().filter(|backend| is_silent(backend)) {
            let interface = backend.way.port().and_then(|port| interfaces.get(port));
            let link = interface.and_then(|interface| self.network.interface(*interface).ok());
            let Some(link) = link.filter(|link| !link.carrier) else { continue };
            if self.resets.cut_off.insert(backend.id, now).is_none() {
                tracing::warn!(
                    "{} is silent, and {} has no carrier: that is no proof that it is dead",
                    backend.name,
                    link.name
                );
            }
        }
    }

    /// What is known of the backends of a service; `heard`: how long ago each was heard in the data path, by id.
    fn sightings(&self, service: usize, heard: &[Option<Duration>], now: Instant) -> Vec<Sighting> {
        let of_service = self.backends.iter().filter(|backend| backend.target.service == service);
        let sighting = |backend: &Backend| {
            let passing = heard.get(usize::from(backend.id)).copied().flatten();
            let passing = passing.and_then(|ago| now.checked_sub(ago));
            let cut_off = self.resets.cut_off.get(&backend.id).copied();
            backend.sighting(passing.max(self.sockets.heard(backend.id)), cut_off)
        };
        of_service.map(sighting).collect()
    }

    /// Who of a service has died just now. Whoever has come back to life is silent again.
    fn judge(&mut self, service: usize, heard: &[Option<Duration>], now: Instant) -> Vec<usize> {
        let of_service: Vec<_> = (0..self.backends.len())
            .filter(|index| self.backends[*index].target.service == service)
            .collect();
        let sightings = self.sightings(service, heard, now);
        let Some(watch) = self.resets.watches.get_mut(&service) else { return Vec::new() };
        let died = watch.vigil.judge(&sightings, now);
        let is_alive = |backend: &Backend| !watch.vigil.is_dead(backend.id.into());
        let back: Vec<_> = of_service
            .iter()
            .copied()
            .filter(|index| self.backends[*index].state == State::Dead && is_alive(&self.backends[*index]))
            .collect();
        for index in back {
            // It was heard, though its checks still see nobody.
            let backend = &mut self.backends[index];
            backend.state = State::Silent;
            backend.since = Some(std::time::SystemTime::now());
            let report = backend.report.clone();
            self.tell_transition(index, &Transition { from: State::Dead, to: State::Silent, report });
        }
        of_service.into_iter().filter(|index| died.contains(&self.backends[*index].id.into())).collect()
    }

    /// Says that a backend is dead, and sees to its flows.
    fn bury(&mut self, index: usize, now: Instant) {
        let backend = &mut self.backends[index];
        backend.state = State::Dead;
        backend.since = Some(std::time::SystemTime::now());
        let report = backend.report.clone();
        self.tell_transition(index, &Transition { from: State::Silent, to: State::Dead, report });
        // Also where they are kept: the configuration may be another, and the VIP here, while it is still dead.
        let backend = self.backends[index].clone();
        if !backend.local {
            self.resets.begin(Work::Reset, backend.obituary(now), &backend, now);
        }
    }

    /// Whether the flows of a backend end with it. An operator who has taken it out decides himself when they do. Of a
    /// service that was removed nobody says otherwise.
    pub(super) fn resets_when_dead(&self, backend: &Backend) -> bool {
        let service = self.services.get(backend.target.service);
        backend.operator == OperatorState::None && service.is_none_or(|it| it.on_dead == OnDead::Reset)
    }

    /// The VIPs that this host has now, of listeners that leave, too. A host that has handed a VIP on still has its flows in
    /// the table, and must not speak in their name.
    fn vips_here(&self) -> Vec<IpAddr> {
        let vips: BTreeSet<_> = self.roster.listeners().values().map(|seat| seat.address.ip()).collect();
        let is_here = |vip: &IpAddr| !vip.is_loopback() && self.network.interface_carrying(*vip).is_some();
        vips.into_iter().filter(is_here).collect()
    }

    /// Whether flows that pass the data path on their way to a backend are another host's: none of the VIPs that lead to it is
    /// here. Where no packets are forwarded there are no such flows, and the VIP is never here.
    pub(super) fn is_elsewhere(&self, backend: &Backend) -> bool {
        let leads_there = |vip: &IpAddr| !vip.is_loopback() && vip.is_ipv4() == backend.address.is_ipv4();
        let listen = self.services[backend.target.service].listen.iter().map(SocketAddr::ip);
        let mut vips = listen.filter(leads_there).peekable();
        self.config.forwards_packets()
            && vips.peek().is_some()
            && !vips.any(|vip| self.network.interface_carrying(vip).is_some())
    }

    /// While somebody who is silent may die, the others are asked whether it is us, and they whether they are back: from one
    /// check to the next is longer than `reset_after` where checks are seldom.
    fn look_elsewhere(&mut self, service: usize, sightings: &[Sighting], now: Instant) {
        let of_service = || self.backends.iter().filter(|backend| backend.target.service == service);
        let interval = self.services[service].check.interval;
        let Some(watch) = self.resets.watches.get_mut(&service) else { return };
        let pace = watch.vigil.pace(interval);
        let recently = |at: Instant, time| now.saturating_duration_since(at) < time;
        if recently(watch.looked, watch.vigil.sight()) || !watch.vigil.is_pressing(sightings, now) {
            return;
        }
        watch.looked = now;
        for backend in of_service().filter(|it| it.state != State::Dead && !recently(it.checked, pace)) {
            self.checks.check_now(backend.target);
        }
    }

    fn work(&mut self, now: Instant) -> Result<(), DataplaneError> {
        self.resets.jobs.make_contiguous().sort_by_key(|job| job.work);
        for _ in 0..self.resets.jobs.len() {
            let Some(mut job) = self.resets.jobs.pop_front() else { break };
            let done = if job.at <= now { self.batch(&mut job, now) } else { Ok(()) };
            if let Some(job) = self.after(job, now) {
                self.resets.jobs.push_back(job);
            }
            done?;
        }
        Ok(())
    }

    /// Does as much of a job as may be done now.
    fn batch(&mut self, job: &mut Job, now: Instant) -> Result<(), DataplaneError> {
        // Both may change while a backend is dead.
        let vips = self.vips_here();
        let waits = match job.work {
            Work::Reset => {
                let dead = self.backends.iter().find(|backend| backend.id == job.backend);
                vips.is_empty() || !dead.is_some_and(|backend| self.resets_when_dead(backend))
            }
            // There is nobody else meanwhile.
            Work::End => self.is_chosen(job.backend),
            Work::Idle | Work::Doubt | Work::HalfClosed => vips.is_empty(),
            Work::Ask => false,
        };
        if waits {
            job.at = now + AGAIN;
            return Ok(());
        }
        // A service that was removed has no rate any more.
        let watch = self.resets.watches.get_mut(&job.service);
        let limit = watch.map_or(UNWATCHED_BATCH, |watch| watch.pace.allowed(now));
        if limit == 0 {
            return Ok(());
        }
        let filter = FlowFilter { vips: Some(vips), ..FlowFilter::of_backend(job.backend) };
        let flows = match job.work {
            Work::Reset | Work::End => self.dataplane.kill_flows(&filter, &mut job.walk, limit)?,
            Work::Ask => self.dataplane.flows_to_ask(&filter, &mut job.walk, limit),
            Work::Idle => self.dataplane.kill_idle_flows(&filter, &mut job.walk, limit)?,
            Work::Doubt => {
                // Until the answer a client that uses its port again waits. At a backend that takes no new flows the RST is most likely
                // the end.
                let rest = if self.is_chosen(job.backend) { RESET_QUARANTINE } else { 0 };
                self.dataplane.doubted_flows(&filter, &mut job.walk, limit, rest)?
            }
            Work::HalfClosed => self.dataplane.half_closed_flows(&filter, &mut job.walk, limit)?,
        };
        let asks = matches!(job.work, Work::Ask | Work::Doubt | Work::HalfClosed);
        let flows = if asks { self.ask(flows) } else { flows };
        if let Some(watch) = self.resets.watches.get_mut(&job.service) {
            watch.pace.done(flows.len());
        }
        self.write_down(&flows, job.account);
        job.count += flows.len();
        if asks {
            return Ok(());
        }
        for flow in flows {
            if job.work == Work::Reset {
                self.tell(flow, now);
            } else {
                self.tell_both(flow, now);
            }
        }
        Ok(())
    }

    /// Asks the backends of flows about them. Returns those that could be asked about.
    fn ask(&mut self, mut flows: Vec<Flow>) -> Vec<Flow> {
        flows.retain(|flow| flow.last_ack.is_some() && flow.to_backend.is_some());
        for flow in &flows {
            let sent = self.resets.wire.ask_backend(flow, flow.last_ack.unwrap_or_default());
            self.resets.heed(sent);
        }
        flows
    }

    /// What is left to do. A dead backend's flows are looked for as long as it is dead.
    fn after(&mut self, job: Job, now: Instant) -> Option<Job> {
        let name = || {
            let backend = self.backends.iter().find(|backend| backend.id == job.backend);
            let service = self.services.get(job.service);
            match (service, backend) {
                (Some(service), Some(backend)) => format!("{}/{}", service.name, backend.name),
                _ => "a backend that was removed".to_owned(),
            }
        };
        let is_dead = || self.backends.iter().any(|it| it.id == job.backend && it.state == State::Dead);
        if job.work == Work::Reset && !is_dead() {
            return None;
        }
        if !job.walk.is_at_end() {
            return Some(job);
        }
        match job.work {
            Work::Ask | Work::Doubt | Work::HalfClosed => {
                tracing::debug!("asked about {} flows of {}", job.count, name());
                None
            }
            Work::Idle => {
                tracing::debug!("{} idle flows of {} were reset", job.count, name());
                None
            }
            Work::End => {
                tracing::info!("{} flows of {} were reset", job.count, name());
                self.flows_have_ended(job.backend);
                None
            }
            Work::Reset => {
                if job.count > 0 {
                    tracing::info!("{} flows of {} were reset", job.count, name());
                }
                Some(Job { walk: Walk::default(), count: 0, at: now + AGAIN, ..job })
            }
        }
    }

    /// Writes down that an operator has reset these flows, and tells both of their ends.
    pub(super) fn tell_killed(&mut self, flows: Vec<Flow>, now: Instant) {
        self.write_down(&flows, Account::Killed(ResetReason::Operator));
        for flow in flows {
            self.tell_both(flow, now);
        }
    }

    /// Of a flow that was reset while its backend lives.
    fn tell_both(&mut self, flow: Flow, now: Instant) {
        // The backend answers what it is asked; the program answers that with a RST.
        let asked = self.resets.wire.ask_backend(&flow, flow.last_ack.unwrap_or_default());
        self.resets.heed(asked);
        self.tell(flow, now);
    }

    /// Tells the client of a flow that was reset that it is over, now and twice again.
    fn tell(&mut self, flow: Flow, now: Instant) {
        // A client in the middle of its handshake is told when it speaks, and that is soon.
        let Some(last_ack) = flow.last_ack else { return };
        let sent = self.resets.wire.reset_client(&flow, last_ack);
        self.resets.heed(sent);
        self.resets.repeats.said(flow, now);
    }

    /// Frees the killed slots of backends that have been ready for so long that they have forgotten the flows.
    fn release_killed(&mut self, now: Instant) {
        let quarantine = Duration::from_secs(KILLED_QUARANTINE);
        let over = |since: &Instant| now.saturating_duration_since(*since) >= quarantine;
        let backends: Vec<_> =
            self.resets.ready_since.iter().filter(|(_, since)| over(since)).map(|(id, _)| *id).collect();
        for id in backends {
            // It begins anew with the next check: what is killed from now on has its own quarantine.
            self.resets.ready_since.remove(&id);
            if let Err(error) = self.dataplane.release_killed(id) {
                tracing::warn!("cannot free slots that were reset: {error}");
            }
        }
    }
}

fn refuses(report: &CheckReport) -> bool {
    report.outcome == Outcome::Fail(Failure::Refused)
}

/// Whether a backend may have rebooted, or lost its flows in another way: it refuses connections, which it did not before,
/// or answers after silence, or for the first time after nobody has looked for a while.
fn may_have_forgotten(event: &Event, before: &Backend) -> bool {
    let was_silent = before.report.outcome == Outcome::Fail(Failure::Silent)
        || matches!(before.state, State::Silent | State::Dead)
        || before.unattended;
    let begins_to_refuse = refuses(&event.report)
        && event.state == State::Draining
        && !(refuses(&before.report) && before.state == State::Draining);
    (event.is_answer() && was_silent) || begins_to_refuse
}

impl Backend {
    /// Why its flows are reset, once it is dead.
    fn obituary(&self, now: Instant) -> Account {
        let silence = match self.report.code {
            CheckCode::L4Tout => Silence::Connect,
            CheckCode::L6Tout => Silence::Handshake,
            CheckCode::L4Con => Silence::Unreachable,
            _ => Silence::Other,
        };
        let since = self.silent_since.map_or(0, |since| now.saturating_duration_since(since).as_secs());
        Account::Dead(silence, since.min(u8::MAX.into()) as u8)
    }

    /// What the vigil over its service looks at; `heard` is when it last sent payload to a client, `cut_off` when it was last
    /// seen that nothing could reach it.
    fn sighting(&self, heard: Option<Instant>, cut_off: Option<Instant>) -> Sighting {
        Sighting {
            id: self.id.into(),
            silent_since: self.silent_since.map(|since| cut_off.map_or(since, |at| at.max(since))),
            // Whoever is this very host answers through no link, and proves nothing about ours.
            answered: self.answered().filter(|_| !self.local),
            heard,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::backends::tests::backends, *};

    const RESET_AFTER: Duration = Duration::from_secs(5);

    /// Lets a minute pass in which all remote backends are silent and local ones answer. Who dies.
    fn deaths(backends: &mut [Backend]) -> Vec<usize> {
        let begin = Instant::now();
        let mut vigil = Vigil::new(RESET_AFTER);
        let mut deaths = Vec::new();
        for tenths in 0..600 {
            let now = begin + Duration::from_millis(100) * tenths;
            for backend in backends.iter_mut().filter(|backend| backend.since.is_some()) {
                backend.checked = now;
            }
            let seen: Vec<_> = backends.iter().map(|backend| backend.sighting(None, None)).collect();
            deaths.extend(vigil.judge(&seen, now));
        }
        deaths
    }

    #[test]
    fn our_own_apiserver_is_no_proof_that_it_is_not_us() {
        let mut backends = backends(&["10.0.0.1:6443", "10.0.0.2:6443", "10.0.0.3:6443"]);
        for backend in &mut backends {
            backend.state = State::Silent;
            backend.since = Some(std::time::SystemTime::now());
            backend.silent_since = Some(Instant::now());
            backend.report = CheckReport::new(Outcome::Fail(Failure::Silent), CheckCode::L4Tout);
        }
        (backends[0].state, backends[0].silent_since) = (State::Ready, None);
        backends[0].report = CheckReport::new(Outcome::Pass, CheckCode::L7Ok);
        assert_eq!(deaths(&mut backends), [2, 3], "somebody else answers: it is they");
        backends[0].local = true;
        assert_eq!(deaths(&mut backends), [0_usize; 0], "only our own kernel answers: it may be our link");
    }

    #[test]
    fn silence_begins_when_there_is_a_link() {
        let mut backends = backends(&["10.0.0.1:6443"]);
        let [fell, linked] = [100, 105].map(|seconds| Instant::now() + Duration::from_secs(seconds));
        backends[0].silent_since = Some(fell);
        assert_eq!(backends[0].sighting(None, None).silent_since, Some(fell));
        assert_eq!(backends[0].sighting(None, Some(linked)).silent_since, Some(linked));
        assert_eq!(backends[0].sighting(None, Some(fell)).silent_since, Some(fell));
        backends[0].silent_since = None;
        assert_eq!(backends[0].sighting(None, Some(linked)).silent_since, None);
    }

    #[test]
    fn having_nothing_to_do_is_not_being_stopped() {
        // `reset_after` is a second at least.
        assert!(LATER < Vigil::new(Duration::from_secs(1)).sight());
        assert!(WATCHED < LATER);
    }

    #[test]
    fn a_watched_status_keeps_no_work_from_beginning() {
        let (begin, mut begun) = (Instant::now(), Begun::default());
        let looks = (0..100_u32).map(|look| begin + Duration::from_millis(100) * look);
        let times = looks.filter(|now| begun.admits(Work::Doubt, 1, *now)).count();
        assert_eq!(times, 20, "in ten seconds");
        let end = begin + Duration::from_secs(10);
        assert!(begun.admits(Work::Idle, 1, end), "of another kind");
        assert!(begun.admits(Work::Doubt, 2, end), "of another backend");
        // Turns that come early and late.
        let turns = [20_000, 20_990, 21_600, 23_000, 23_900].map(|at| begin + Duration::from_millis(at));
        assert!(turns.iter().all(|now| begun.admits(Work::Doubt, 1, *now)));
    }

    #[test]
    fn questions_that_anyone_can_cause_wait_for_all_other_work_of_their_service() {
        let mut works = [Work::HalfClosed, Work::Doubt, Work::Idle, Work::Ask, Work::End, Work::Reset];
        works.sort();
        assert_eq!(works, [Work::Reset, Work::End, Work::Idle, Work::Ask, Work::Doubt, Work::HalfClosed]);
    }

    #[test]
    fn what_cannot_be_sent_is_said_once_until_all_is_well_again() {
        let mut voice = Voice::default();
        let fails = || Err(io::ErrorKind::NetworkDown.into());
        let mut turn = |results: Vec<io::Result<()>>| {
            let said = results.into_iter().filter_map(|result| voice.heed(result)).count();
            voice.end_of_turn();
            said
        };
        assert_eq!(turn(vec![fails(), Ok(()), fails(), Ok(())]), 1);
        assert_eq!(turn(vec![Ok(()), fails(), Ok(())]), 0, "some still fail");
        assert_eq!(turn(vec![]), 0);
        assert_eq!(turn(vec![fails()]), 0);
        assert_eq!(turn(vec![Ok(()), Ok(())]), 0);
        assert_eq!(turn(vec![Ok(()), fails()]), 1);
    }
}
