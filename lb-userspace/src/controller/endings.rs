//! Flows that an operator ends: at once, or when the time of a drained backend is over.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::{SystemTime, UNIX_EPOCH},
};

use ipnet::IpNet;
use lb_common::black_box::Verdict;

use super::{Controller, backends::Backend, commands::choose};
use crate::{
    admin::{BackendChoice, Caller, JournalKind, KillOrder, Killed, Refusal, RefusalKind},
    dataplane::FlowFilter,
    health::{State, TargetId},
};

impl Controller {
    /// `POST /v1/flows/kill`
    pub(super) fn kill_flows(&mut self, order: &KillOrder, by: Caller) -> Result<Killed, Refusal> {
        let filters = self.filters(order)?;
        let mut flows = 0;
        for filter in &filters {
            let killed = self.kill(filter);
            flows += killed.map_err(|error| Refusal::new(RefusalKind::Failed, error.to_string()))?;
        }
        let line = format!("{flows} flows{} were reset, by {by}", whose(order));
        tracing::info!("{line}");
        self.journal.note(JournalKind::Operator, None, line);
        self.reap();
        Ok(Killed { flows: flows as u64 })
    }

    /// The flows that are meant; several filters where several backends are.
    fn filters(&self, order: &KillOrder) -> Result<Vec<FlowFilter>, Refusal> {
        let usage = |error| Refusal::new(RefusalKind::Usage, error);
        let (client, client_port) =
            order.client.as_deref().map(client_of).transpose().map_err(usage)?.unzip();
        let all = FlowFilter { client, client_port: client_port.flatten(), ..FlowFilter::default() };
        match (&order.backend, &order.service) {
            (Some(backend), service) => {
                let (backend, service) = (backend.clone(), service.clone());
                let leaving = self.leaving(&backend);
                if !leaving.is_empty() && !self.backends.iter().any(|it| it.answers_to(&backend)) {
                    let of = |id| FlowFilter { backend: Some(id), ..all.clone() };
                    return Ok(leaving.into_iter().map(of).collect());
                }
                let choice = BackendChoice { backend, service, all_services: order.all_services };
                let chosen = choose(&self.backends, &self.services, &choice)?;
                let id = |index: usize| Some(self.backends[index].id);
                Ok(chosen.into_iter().map(|index| FlowFilter { backend: id(index), ..all.clone() }).collect())
            }
            (None, _) if client.is_none() => {
                Err(usage("name a backend or a client: nobody ends all flows by mistake".to_owned()))
            }
            (None, None) => Ok(vec![all]),
            (None, Some(name)) => {
                let mut services = self.services.iter();
                let Some((number, _)) = services.find(|(_, service)| service.name == *name) else {
                    return Err(usage(format!("there is no service {name:?}: see `sheave status`")));
                };
                Ok(vec![FlowFilter { service: Some(number), ..all }])
            }
        }
    }

    /// The ids of backends that were removed, by their address: their flows live on.
    fn leaving(&self, address: &str) -> Vec<u8> {
        let Ok(address) = address.parse::<SocketAddr>() else { return Vec::new() };
        let seats = self.roster.backends().iter();
        seats.filter(|(_, seat)| !seat.is_held() && seat.address == address).map(|(id, _)| *id).collect()
    }

    /// Flows live on when their backend is removed; but nobody would find out any more that it is dead, and nobody would
    /// remember that its time is over. Except of one that the cluster lists no more: it comes back, and the order is kept.
    pub(super) fn end_flows_of_the_removed(&mut self, stay: &BTreeSet<TargetId>) {
        let removed = self.backends.iter().filter(|backend| !stay.contains(&backend.target));
        let time_is_over = |backend: &Backend| !backend.discovered && self.reset_in(backend).is_some();
        let doomed = |backend: &&Backend| backend.state == State::Dead || time_is_over(backend);
        let doomed: Vec<_> = removed.filter(doomed).cloned().collect();
        for backend in doomed.iter().filter(|backend| !backend.local) {
            tracing::info!("{} was removed: the flows it still has are reset", backend.name);
            self.end_flows_of(backend, Verdict::Operator);
        }
    }

    /// In how many seconds the flows of a backend are reset because an operator has said so.
    pub(super) fn reset_in(&self, backend: &Backend) -> Option<u64> {
        let service = self.services.get(backend.target.service)?;
        let order = self.orders.about(&service.name, backend.address);
        order.reset_at.map(|at| at.saturating_sub(unix_seconds()))
    }

    /// Resets what is left where the time of an order is over. A backend that gets new flows all the same, because there
    /// is nobody else, keeps them until there is.
    pub(super) fn end_drains(&mut self) {
        let now = unix_seconds();
        for index in 0..self.backends.len() {
            let backend = self.backends[index].clone();
            let service = self.services[backend.target.service].name.clone();
            let mut order = self.orders.about(&service, backend.address);
            let choice = self.choices.get(&(backend.target.service, backend.address.is_ipv6()));
            // It was rounded down to whole seconds: nobody's time is cut short if that second is waited out.
            if order.reset_at.is_none_or(|at| at >= now) || choice.is_some_and(|it| it.has(backend.id)) {
                continue;
            }
            order.reset_at = None;
            if let Err(error) = self.orders.take(&[order]) {
                tracing::error!("{error}; its flows are not reset yet");
                continue;
            }
            let end = if backend.local {
                "it is this host, whose own kernel has its flows"
            } else {
                "the flows it still has are reset"
            };
            let line = format!("{service}/{}: the time to drain is over; {end}", backend.name);
            tracing::info!("{line}");
            self.journal.note(JournalKind::Operator, Some((&service, &backend.name)), line);
            self.end_flows_of(&backend, Verdict::Drained);
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
