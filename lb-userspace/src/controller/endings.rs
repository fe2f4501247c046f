//! Flows that an operator ends: at once, or when the time of a drained backend is over.

use std::{
    collections::{BTreeSet, VecDeque},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use ipnet::IpNet;
use lb_common::flight_recorder::ResetReason;
use tokio::sync::oneshot;

use super::{
    Controller,
    backends::Backend,
    commands::{choose, numbered},
};
use crate::{
    admin::{BackendChoice, Caller, JournalKind, KillOrder, Killed, Refusal, RefusalKind},
    config::Config,
    dataplane::{FlowFilter, Walk},
    health::{State, TargetId},
};

/// Flows at a time: the daemon has other work, too.
const BATCH: usize = 2048;

/// How long whoever asked waits for sockets to be ended.
const PATIENCE: Duration = Duration::from_secs(2);

/// Who is told how many flows were reset.
type Answer = oneshot::Sender<Result<Killed, Refusal>>;

/// Flows that are being reset, a batch each turn, because an operator says so.
#[derive(Debug)]
pub(super) struct Kill {
    /// All that are left to do, the first of them as far as `walk`.
    filters: VecDeque<FlowFilter>,
    walk: Walk,
    count: usize,
    /// How many sockets of this host's processes were ended, as far as that is not known yet.
    sockets: Vec<oneshot::Receiver<usize>>,
    /// Nobody waits for that any longer.
    until: Instant,
    /// Which flows, in words.
    whose: String,
    by: Caller,
    answer: Answer,
}

impl Controller {
    /// `POST /v1/flows/kill`: whoever asked is answered when it is done.
    pub(super) fn begin_kill(&mut self, order: &KillOrder, by: Caller, answer: Answer) {
        match self.filters(order) {
            Ok(filters) => {
                let sockets = filters.iter().filter_map(|filter| self.end_sockets(filter)).collect();
                self.resets.begin_kill(Kill {
                    filters: filters.into(),
                    walk: Walk::default(),
                    count: 0,
                    sockets,
                    until: Instant::now() + PATIENCE,
                    whose: whose(order),
                    by,
                    answer,
                });
            }
            // Whoever asked may have gone meanwhile.
            Err(refusal) => drop(answer.send(Err(refusal))),
        }
    }

    /// Resets the next batch of flows that an operator ends, whatever their service says about dead backends, and tells both
    /// of their ends.
    pub(super) fn go_on_killing(&mut self, now: Instant) {
        let Some(mut kill) = self.resets.next_kill() else { return };
        let Some(filter) = kill.filters.front() else { return self.end_kill(kill, now) };
        let flows = match self.dataplane.kill_flows(filter, &mut kill.walk, BATCH) {
            Ok(flows) => flows,
            Err(error) => {
                let refusal = Refusal::new(RefusalKind::Failed, error.to_string());
                return drop(kill.answer.send(Err(refusal)));
            }
        };
        kill.count += flows.len();
        self.tell_killed(flows, now);
        if kill.walk.is_at_end() {
            kill.filters.pop_front();
            kill.walk = Walk::default();
        }
        if kill.filters.is_empty() {
            self.end_kill(kill, now);
        } else {
            self.resets.begin_kill(kill);
        }
    }

    fn end_kill(&mut self, mut kill: Kill, now: Instant) {
        let mut count = 0;
        kill.sockets.retain_mut(|sockets| match sockets.try_recv() {
            Ok(ended) => {
                count += ended;
                false
            }
            // What went wrong is in the log.
            Err(error) => error == oneshot::error::TryRecvError::Empty,
        });
        kill.count += count;
        if !kill.sockets.is_empty() && now < kill.until {
            return self.resets.begin_kill(kill);
        }
        let Kill { count, whose, by, answer, .. } = kill;
        let line = format!("{count} flows{whose} were reset, by {by}");
        tracing::info!("{line}");
        self.journal.note(JournalKind::Operator, None, line);
        self.reap();
        // Whoever asked may have gone meanwhile.
        drop(answer.send(Ok(Killed { flows: count as u64 })));
    }

    /// The flows that are meant; several filters where several backends are.
    fn filters(&self, order: &KillOrder) -> Result<Vec<FlowFilter>, Refusal> {
        let usage = |error| Refusal::new(RefusalKind::Usage, error);
        let (client, client_port) =
            order.client.as_deref().map(client_of).transpose().map_err(usage)?.unzip();
        let service = order.service.as_deref().map(|name| numbered(&self.services, name)).transpose()?;
        let client_port = client_port.flatten();
        let all = FlowFilter { service, client, client_port, ..FlowFilter::default() };
        let Some(backend) = &order.backend else {
            if client.is_none() {
                return Err(usage("name a backend or a client: nobody ends all flows by mistake".to_owned()));
            }
            return Ok(vec![all]);
        };
        let in_service = |it: &&Backend| service.is_none_or(|number| it.target.service == number);
        let stays = self.backends.iter().filter(in_service).any(|it| it.answers_to(backend));
        let leaving = self.leaving(backend);
        let ids: Vec<_> = if leaving.is_empty() || stays {
            let choice = BackendChoice {
                backend: backend.clone(),
                service: order.service.clone(),
                all_services: order.all_services,
            };
            let chosen = choose(&self.backends, &self.services, &choice)?;
            chosen.into_iter().map(|index| self.backends[index].id).collect()
        } else {
            leaving
        };
        Ok(ids.into_iter().map(|id| FlowFilter { backend: Some(id), ..all.clone() }).collect())
    }

    /// The ids of backends that were removed, by their address: their flows live on.
    fn leaving(&self, address: &str) -> Vec<u8> {
        let Ok(address) = address.parse::<SocketAddr>() else { return Vec::new() };
        let seats = self.roster.backends().iter();
        seats.filter(|(_, seat)| !seat.is_held() && seat.address == address).map(|(id, _)| *id).collect()
    }

    /// Flows live on when their backend is removed. Except those of a dead one: nobody would find out any more that they are
    /// to end. And if an operator has given them a time it is still theirs, and no longer.
    pub(super) fn part_with_the_removed(&mut self, stay: &BTreeSet<TargetId>) {
        let removed = self.backends.iter().filter(|backend| !stay.contains(&backend.target));
        let removed: Vec<_> = removed.cloned().collect();
        for backend in removed {
            if backend.state == State::Dead && self.resets_when_dead(&backend) {
                tracing::info!("{} is dead and was removed: the flows it still has are reset", backend.name);
                self.end_flows_of_the_dead(&backend, Instant::now());
            } else if backend.reset_at.is_some() {
                self.resets.departed.push(backend);
            }
        }
    }

    /// Resets what is left at those who were removed while they were drained, when their time is over.
    fn end_drains_of_the_departed(&mut self) {
        let roster = &self.roster;
        let is_leaving = |backend: &Backend| {
            let seat = roster.backends().get(&backend.id);
            seat.is_some_and(|seat| !seat.is_held() && seat.address == backend.address)
        };
        // The others have no flows any more, or are back.
        self.resets.departed.retain(is_leaving);
        let over: Vec<_> = self.resets.departed.extract_if(.., |backend| is_over(backend.reset_at)).collect();
        for backend in over {
            let name = &backend.name;
            tracing::info!(
                "{name}, which was removed: the time to drain is over; the flows it still has are reset"
            );
            self.end_flows_of(&backend, ResetReason::Drained);
        }
    }

    /// In how many seconds the flows of a backend are reset because an operator has said so.
    pub(super) fn reset_in(&self, backend: &Backend) -> Option<u64> {
        backend.reset_at.map(|at| at.saturating_sub(unix_seconds()))
    }

    /// Begins to reset what is left where the time of an order is over. A backend that gets new flows all the same, because
    /// there is nobody else, keeps them until there is. Flows whose VIP is on another host are not ours to end, until it
    /// comes here; sockets of this host's own processes are, wherever it is.
    pub(super) fn end_drains(&mut self) {
        self.end_drains_of_the_departed();
        let backends = &self.backends;
        let over = |id: u8| backends.iter().any(|backend| backend.id == id && is_over(backend.reset_at));
        self.resets.retain_half_ended(over);
        for index in 0..self.backends.len() {
            let backend = &self.backends[index];
            let waits = self.is_chosen(backend.id) || self.resets.is_ending(backend.id);
            if !is_over(backend.reset_at) || waits {
                continue;
            }
            let backend = backend.clone();
            if !self.is_elsewhere(&backend) {
                let end = if backend.local {
                    "the flows of this host's processes are reset, those of others left to its kernel"
                } else {
                    "the flows it still has are reset"
                };
                self.tell_end_of_drain(&backend, end);
                self.end_flows_of(&backend, ResetReason::Drained);
            } else if self.resets.half_ends(backend.id) {
                let end = "the flows of this host's processes are reset, those of others left to the host that has the VIP";
                self.tell_end_of_drain(&backend, end);
                self.end_sockets_of(backend.id);
            }
        }
    }

    fn tell_end_of_drain(&mut self, backend: &Backend, end: &str) {
        let service = &self.services[backend.target.service].name;
        let line = format!("{service}/{}: the time to drain is over; {end}", backend.name);
        tracing::info!("{line}");
        self.journal.note(JournalKind::Operator, Some((service, &backend.name)), line);
    }

    /// All flows that a backend had were reset: where an order was the reason it is carried out. Not before: a daemon that
    /// ends in the middle of it must find it again.
    pub(super) fn flows_have_ended(&mut self, id: u8) {
        let found = self.backends.iter_mut().find(|it| it.id == id && is_over(it.reset_at));
        let Some(backend) = found else { return };
        backend.reset_at = None;
        let service = &self.services[backend.target.service].name;
        let mut order = self.orders.about(service, backend.address);
        order.reset_at = None;
        if let Err(error) = self.orders.take(&[order]) {
            tracing::error!("{error}; a restart resets the flows of {service}/{} again", backend.name);
        }
    }

    /// Whether a backend gets new flows.
    pub(super) fn is_chosen(&self, id: u8) -> bool {
        self.choices.values().any(|choice| choice.has(id))
    }

    /// Orders about backends by name are about the addresses that the names stand for in `config`.
    pub(super) fn carry_orders_over(&mut self, config: &Config) {
        if let Err(error) = self.orders.carry_over(config) {
            tracing::error!("{error}");
        }
    }
}

/// Which flows an order is about, in words.
fn whose(order: &KillOrder) -> String {
    [
        order.backend.as_ref().map(|backend| format!(" at {backend}")),
        order.service.as_ref().map(|service| format!(" of {service}")),
        order.client.as_ref().map(|client| format!(" from {client}")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// An address, an address and port, or a prefix.
fn client_of(text: &str) -> Result<(IpNet, Option<u16>), String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok((address.into(), None));
    }
    if let Ok(client) = text.parse::<SocketAddr>() {
        return Ok((client.ip().into(), Some(client.port())));
    }
    text.parse()
        .map(|prefix: IpNet| (prefix.trunc(), None))
        .map_err(|_| format!("{text:?} is no client: write an address, an address and port, or a prefix"))
}

/// Whether the time of an order has come. It was rounded down to whole seconds: nobody's time is cut short if that second
/// is waited out.
pub(super) fn is_over(reset_at: Option<u64>) -> bool {
    reset_at.is_some_and(|at| at < unix_seconds())
}

/// Orders count time as the world does: they outlive the daemon and the host's uptime.
pub(super) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_an_address_with_or_without_a_port_or_a_prefix() {
        let of = |text: &str| client_of(text).map(|(net, port)| (net.to_string(), port));
        assert_eq!(of("10.0.0.5"), Ok(("10.0.0.5/32".to_owned(), None)));
        assert_eq!(of("10.0.0.5:40312"), Ok(("10.0.0.5/32".to_owned(), Some(40312))));
        assert_eq!(of("10.0.0.5/24"), Ok(("10.0.0.0/24".to_owned(), None)));
        assert_eq!(of("fd00::5"), Ok(("fd00::5/128".to_owned(), None)));
        assert_eq!(of("[fd00::5]:40312"), Ok(("fd00::5/128".to_owned(), Some(40312))));
        for wrong in ["", "node-7", "10.0.0.5:99999", "10.0.0.0/33"] {
            assert!(of(wrong).is_err_and(|error| error.contains("is no client")), "{wrong}");
        }
    }
}
