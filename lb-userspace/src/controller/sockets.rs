//! Sockets of this host's processes, as the controller sees them: what they have heard is evidence beside what passes the
//! data path, and those of a dead backend are ended beside its flows.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot};

use super::{Controller, backends::Backend};
use crate::{
    admin::JournalKind,
    config::{OnDead, Service},
    dataplane::FlowFilter,
    health::State,
    privileges,
    sockets::{Order, Report, Undertaker},
};

/// Between looks at what sockets have heard while somebody is silent.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// The same while everybody is well, where checks may be left out for it: so often in an interval, and not more often than
/// this.
const GLANCES: u32 = 4;
const GLANCE_EVERY: Duration = Duration::from_millis(250);
/// Between looks for sockets of a dead backend that were missed: they were opened just then.
const AGAIN: Duration = Duration::from_secs(1);

/// What is kept about sockets.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    /// None: there is no hook, and no socket of it.
    undertaker: Option<Undertaker>,
    reports: Option<mpsc::UnboundedReceiver<Report>>,
    /// Whether it may enter the network namespaces of pods.
    reaches_pods: bool,
    /// When the sockets of a backend last received payload, by id.
    heard: BTreeMap<u8, Instant>,
    /// When they were last asked about; no answer yet: `waiting`.
    looked: Option<Instant>,
    waiting: bool,
    /// What went wrong last: said once.
    failure: Option<String>,
    /// When the sockets of the dead were last ended, by id.
    buried: BTreeMap<u8, Instant>,
}

impl Sockets {
    /// When the sockets of a backend last received payload.
    pub(super) fn heard(&self, backend: u8) -> Option<Instant> {
        self.heard.get(&backend).copied()
    }

    /// What the thread reports; once.
    pub(super) fn take_reports(&mut self) -> Option<mpsc::UnboundedReceiver<Report>> {
        self.reports.take()
    }

    /// Knows nothing any more of backends that are gone: their ids may become those of others.
    pub(super) fn forget_others(&mut self, backends: &[Backend]) {
        let stays = |id: &u8| backends.iter().any(|backend| backend.id == *id);
        self.heard.retain(|id, _| stays(id));
        self.buried.retain(|id, _| stays(id));
    }

    fn look(&mut self, backends: BTreeSet<u8>, now: Instant) {
        let Some(undertaker) = self.undertaker.as_ref().filter(|_| !self.waiting && !backends.is_empty())
        else {
            return;
        };
        undertaker.order(Order::Look(backends));
        (self.looked, self.waiting) = (Some(now), true);
    }

    fn looked_within(&self, time: Duration, now: Instant) -> bool {
        self.looked.is_some_and(|looked| now.saturating_duration_since(looked) < time)
    }
}

impl Controller {
    /// Begins to look after the sockets of the hook that was just put on its cgroup.
    pub(super) fn attend_sockets(&mut self, network: u64) -> std::io::Result<()> {
        let pods = self.serves_pods() && privileges::reach_pods();
        let Some(table) = self.dataplane.take_sockets() else { return Ok(()) };
        let (undertaker, reports) = Undertaker::start(table, network, pods)?;
        self.sockets.undertaker = Some(undertaker);
        self.sockets.reports = Some(reports);
        self.sockets.reaches_pods = pods;
        if let Some(flag) = self.pods_flag() {
            tracing::warn!("{flag}");
        }
        Ok(())
    }

    fn serves_pods(&self) -> bool {
        self.services.iter().any(|(_, service)| service.pods)
    }

    /// What is missing to end pods' sockets. Where a reload let pods in it was given up: capabilities cannot be had back.
    pub(super) fn pods_flag(&self) -> Option<String> {
        let lacks = self.sockets.undertaker.is_some() && self.serves_pods() && !self.sockets.reaches_pods;
        lacks.then(|| {
            "pods = true, but connections of pods to a dead backend are left to their own timeouts: sheave was not \
             started with CAP_SYS_ADMIN and CAP_SYS_PTRACE for it. Install sheave.service.d/pods.conf (a static pod: see \
             its manifest), and restart sheave"
                .to_owned()
        })
    }

    /// While somebody is silent: whether sockets have heard of them.
    pub(super) fn ask_sockets(&mut self, now: Instant) {
        if !self.sockets.looked_within(LOOK_EVERY, now) {
            self.sockets.look(self.those_to_look_at(), now);
        }
    }

    /// Whoever may die, and whoever may be vouched for.
    fn those_to_look_at(&self) -> BTreeSet<u8> {
        let counts = |backend: &&Backend| match backend.state {
            State::Silent | State::Dead => true,
            State::Ready => self.may_vouch_for(backend),
            State::Unknown | State::Draining => false,
        };
        self.backends.iter().filter(counts).map(|backend| backend.id).collect()
    }

    /// Where every client is on this host: whether sockets hear of backends that are ready, so that fewer checks will do.
    pub(super) fn glance_at_sockets(&mut self) {
        let now = Instant::now();
        let here = self.services.iter().filter(|(_, service)| service.is_loopback_only());
        let Some(shortest) = here.map(|(_, service)| service.check.interval).min() else { return };
        if !self.sockets.looked_within((shortest / GLANCES).max(GLANCE_EVERY), now) {
            self.sockets.look(self.those_to_look_at(), now);
        }
    }

    fn may_vouch_for(&self, backend: &Backend) -> bool {
        self.services.get(backend.target.service).is_some_and(Service::is_loopback_only)
    }

    /// Ends the sockets of those who are dead, as long as they are, where their service says so.
    pub(super) fn bury_sockets(&mut self, now: Instant) {
        let is_dead = |id: &u8| self.backends.iter().any(|it| it.id == *id && it.state == State::Dead);
        self.sockets.buried.retain(|id, _| is_dead(id));
        let Some(undertaker) = &self.sockets.undertaker else { return };
        for backend in self.backends.iter().filter(|backend| backend.state == State::Dead) {
            let Some(service) = self.services.get(backend.target.service) else { continue };
            let recently = |at: &Instant| now.saturating_duration_since(*at) < AGAIN;
            if service.on_dead != OnDead::Reset || self.sockets.buried.get(&backend.id).is_some_and(recently)
            {
                continue;
            }
            undertaker.order(Order::Bury(backend.id, service.reset_after));
            self.sockets.buried.insert(backend.id, now);
        }
    }

    /// Ends the sockets of a backend that lives.
    pub(super) fn end_sockets_of(&self, backend: u8) {
        if let Some(undertaker) = &self.sockets.undertaker {
            undertaker.order(Order::End(FlowFilter::of_backend(backend), None));
        }
    }

    /// Ends the sockets that a filter wants. How many it were will be said; None: there is no hook.
    pub(super) fn end_sockets(&self, filter: &FlowFilter) -> Option<oneshot::Receiver<usize>> {
        let undertaker = self.sockets.undertaker.as_ref()?;
        let (answer, answered) = oneshot::channel();
        undertaker.order(Order::End(filter.clone(), Some(answer)));
        Some(answered)
    }

    /// Takes in what the thread says.
    pub(super) fn heed_sockets(&mut self, report: Report) {
        match report {
            Report::Heard(heard) => {
                (self.sockets.waiting, self.sockets.failure) = (false, None);
                for (id, at) in heard {
                    self.note_heard(id, at);
                }
            }
            Report::Buried { backend, sockets, heard } => {
                let name = self.name_of(backend);
                if let Some(at) = heard {
                    tracing::warn!(
                        "{name}: a process of this host has heard of it: its sockets are kept for now"
                    );
                    self.note_heard(backend, at);
                } else if sockets > 0 {
                    let line = format!("{name}: {sockets} sockets of this host's processes were ended");
                    tracing::info!("{line}");
                    self.journal.note(JournalKind::Check, None, line);
                }
            }
            Report::Failed(why) => {
                self.sockets.waiting = false;
                if self.sockets.failure.as_ref() != Some(&why) {
                    tracing::warn!("{why}");
                }
                self.sockets.failure = Some(why);
            }
        }
    }

    fn note_heard(&mut self, backend: u8, at: Instant) {
        let latest = self.sockets.heard.entry(backend).or_insert(at);
        *latest = at.max(*latest);
        let heard = *latest;
        let of_it = self.backends.iter().find(|it| it.id == backend);
        if let Some(backend) = of_it.filter(|backend| self.may_vouch_for(backend)) {
            self.checks.vouch(backend.target, heard);
        }
    }

    fn name_of(&self, id: u8) -> String {
        let backend = self.backends.iter().find(|backend| backend.id == id);
        let service = backend.and_then(|backend| self.services.get(backend.target.service));
        match (service, backend) {
            (Some(service), Some(backend)) => format!("{}/{}", service.name, backend.name),
            _ => "a backend that was removed".to_owned(),
        }
    }
}

/// What the thread reports; never, where there is none.
pub(super) async fn reported(reports: &mut Option<mpsc::UnboundedReceiver<Report>>) -> Report {
    if let Some(reports) = reports
        && let Some(report) = reports.recv().await
    {
        return report;
    }
    std::future::pending().await
}
