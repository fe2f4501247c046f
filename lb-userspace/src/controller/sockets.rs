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
    config::Service,
    dataplane::FlowFilter,
    health::State,
    privileges,
    sockets::{Dead, Order, Report, SocketThread},
};

/// Between looks at what the sockets of somebody have heard who is silent.
const SILENT_EVERY: Duration = Duration::from_millis(250);
/// The same of somebody who is dead: nothing is urgent any more.
const DEAD_EVERY: Duration = Duration::from_secs(2);
/// The same of somebody who is ready, where checks may be left out for it: so often in an interval, and not more often than
/// this.
const READY_LOOKS: u32 = 4;
const READY_EVERY: Duration = Duration::from_millis(250);
/// Between looks for sockets of a dead backend that were missed: they were opened just then.
const AGAIN: Duration = Duration::from_secs(1);

/// What is kept about sockets.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    /// None: there is no hook, and no socket of it.
    thread: Option<SocketThread>,
    reports: Option<mpsc::UnboundedReceiver<Report>>,
    /// Whether it may enter the network namespaces of pods.
    reaches_pods: bool,
    /// When the sockets of a backend last received payload, by id.
    heard: BTreeMap<u8, Instant>,
    /// When they were last asked about; no answer yet: `waiting`.
    looked: BTreeMap<u8, Instant>,
    waiting: bool,
    /// When the sockets of the dead were last to be ended, by id.
    ended: BTreeMap<u8, Instant>,
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
        self.looked.retain(|id, _| stays(id));
        self.ended.retain(|id, _| stays(id));
    }
}

impl Controller {
    /// Starts the thread for the sockets of the hook that was just put on its cgroup.
    pub(super) fn start_socket_thread(&mut self, network: u64) -> std::io::Result<()> {
        let pods = self.serves_pods() && privileges::reach_pods();
        let Some(table) = self.dataplane.take_sockets() else { return Ok(()) };
        let (thread, reports) = SocketThread::start(table, network, pods)?;
        self.sockets.thread = Some(thread);
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
        let lacks = self.sockets.thread.is_some() && self.serves_pods() && !self.sockets.reaches_pods;
        lacks.then(|| {
            "pods = true, but connections of pods to a dead backend are left to their own timeouts: sheave was not \
             started with CAP_SYS_ADMIN and CAP_SYS_PTRACE for it. Install sheave.service.d/pods.conf (a static pod: see \
             its manifest), and restart sheave"
                .to_owned()
        })
    }

    /// Finds out whether sockets have heard of those who may die; and, where every client is on this host, of those who are
    /// ready, so that fewer checks will do. As often as it matters.
    pub(super) fn look_at_sockets(&mut self, now: Instant) {
        let Some(thread) = self.sockets.thread.as_ref().filter(|_| !self.sockets.waiting) else { return };
        let is_due = |backend: &&Backend| {
            let looked = self.sockets.looked.get(&backend.id);
            self.look_every(backend).is_some_and(|pause| {
                looked.is_none_or(|looked| now.saturating_duration_since(*looked) >= pause)
            })
        };
        let due: BTreeSet<_> = self.backends.iter().filter(is_due).map(|backend| backend.id).collect();
        if due.is_empty() {
            return;
        }
        self.sockets.looked.extend(due.iter().map(|id| (*id, now)));
        thread.order(Order::Look(due));
        self.sockets.waiting = true;
    }

    /// Between looks at a backend's sockets. None: nothing depends on them.
    fn look_every(&self, backend: &Backend) -> Option<Duration> {
        match backend.state {
            State::Silent => Some(SILENT_EVERY),
            State::Dead => Some(DEAD_EVERY),
            State::Ready if self.may_vouch_for(backend) => {
                let interval = self.services.get(backend.target.service)?.check.interval;
                Some((interval / READY_LOOKS).max(READY_EVERY))
            }
            State::Ready | State::Unknown | State::Draining => None,
        }
    }

    fn may_vouch_for(&self, backend: &Backend) -> bool {
        self.services.get(backend.target.service).is_some_and(Service::is_loopback_only)
    }

    /// Ends the sockets of those who are dead, as long as they are, where their service says so.
    pub(super) fn end_sockets_of_the_dead(&mut self, now: Instant) {
        let Some(thread) = &self.sockets.thread else { return };
        let mut dead = BTreeMap::new();
        for backend in self.backends.iter().filter(|backend| backend.state == State::Dead) {
            let Some(service) = self.services.get(backend.target.service) else { continue };
            if self.resets_when_dead(backend) {
                dead.insert(backend.id, Dead { address: backend.address, quiet: service.reset_after });
            }
        }
        self.sockets.ended.retain(|id, _| dead.contains_key(id));
        let ids: Vec<_> = dead.keys().copied().collect();
        // Also when it is nobody any more.
        thread.set_dead(dead);
        for id in ids {
            let recently = |at: &Instant| now.saturating_duration_since(*at) < AGAIN;
            if !self.sockets.ended.get(&id).is_some_and(recently) {
                thread.order(Order::EndDead(id));
                self.sockets.ended.insert(id, now);
            }
        }
    }

    /// Ends the sockets of a backend that lives.
    pub(super) fn end_sockets_of(&self, backend: u8) {
        if let Some(thread) = &self.sockets.thread {
            thread.order(Order::End(FlowFilter::of_backend(backend), None));
        }
    }

    /// Ends the sockets that a filter wants. How many it were will be said; None: there is no hook.
    pub(super) fn end_sockets(&self, filter: &FlowFilter) -> Option<oneshot::Receiver<usize>> {
        let thread = self.sockets.thread.as_ref()?;
        let (answer, answered) = oneshot::channel();
        thread.order(Order::End(filter.clone(), Some(answer)));
        Some(answered)
    }

    /// Takes in what the thread says.
    pub(super) fn heed_sockets(&mut self, report: Report) {
        match report {
            Report::Heard(heard) => {
                self.sockets.waiting = false;
                for (id, at) in heard {
                    self.note_heard(id, at);
                }
            }
            Report::EndedDead { backend, sockets, heard } => {
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
