//! `sheave flows`: the flow table with names instead of numbers, a page at a time.

use std::net::SocketAddr;

use super::{Controller, backends::Backend, commands::numbered};
use crate::{
    admin::{Flow, FlowFilter, FlowPage, Refusal, RefusalKind},
    dataplane::{Cursor, FlowState, ListedFlow},
};

/// Sets that are looked at for one page: a megabyte of IPv4's table, well under a millisecond.
const SETS: usize = 16_384;
/// Flows on a page, and up to three more.
const FLOWS: usize = 500;

impl Controller {
    /// `GET /v1/flows`: one page of it, from where the last one ended.
    pub(super) fn flow_page(&mut self, filter: &FlowFilter, from: u64) -> Result<FlowPage, Refusal> {
        if from == 0 {
            self.check_filter(filter)?;
        }
        let mut found = Vec::new();
        let next = self
            .dataplane
            .list(Cursor::from_number(from), SETS, &mut |flow| {
                let wanted = flow.state != FlowState::Closed
                    && flow.idle.as_secs() >= filter.min_age
                    && filter.client.is_none_or(|client| client == flow.client.ip());
                if wanted {
                    found.push(flow);
                }
                found.len() < FLOWS
            })
            .map_err(|error| Refusal::new(RefusalKind::Failed, error.to_string()))?;
        let flows = found.iter().filter(|flow| self.is_wanted(filter, flow)).map(|flow| self.named(flow));
        Ok(FlowPage { flows: flows.collect(), next: next.map(Cursor::number) })
    }

    /// A name that nobody has would find nothing, which is not what the operator wants to know.
    fn check_filter(&self, filter: &FlowFilter) -> Result<(), Refusal> {
        let usage = |error| Err(Refusal::new(RefusalKind::Usage, error));
        if let Some(name) = &filter.service {
            numbered(&self.services, name)?;
        }
        let Some(name) = &filter.backend else { return Ok(()) };
        let leaving = |address: SocketAddr| name.parse() == Ok(address);
        if self.backends.iter().any(|backend| backend.answers_to(name))
            || self.roster.backends().values().any(|seat| leaving(seat.address))
        {
            return Ok(());
        }
        let mut names: Vec<_> = self.backends.iter().map(|backend| backend.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        usage(format!("there is no backend {name:?}; there is {}", names.join(", ")))
    }

    fn is_wanted(&self, filter: &FlowFilter, flow: &ListedFlow) -> bool {
        let service = filter.service.as_ref().is_none_or(|name| {
            self.service_of(flow.listener).is_some_and(|number| self.services[number].name == *name)
        });
        let backend = filter.backend.as_ref().is_none_or(|name| match self.backend_of(flow.backend) {
            Some(backend) => backend.answers_to(name),
            None => self.backend_address(flow.backend).is_some_and(|address| name.parse() == Ok(address)),
        });
        service && backend
    }

    /// A flow for people.
    pub(super) fn named(&self, flow: &ListedFlow) -> Flow {
        Flow {
            client: flow.client,
            listener: self.roster.listeners().get(&flow.listener).map(|seat| seat.address),
            service: self.service_of(flow.listener).map(|number| self.services[number].name.clone()),
            backend: self.backend_of(flow.backend).map(|backend| backend.name.clone()),
            backend_address: self.backend_address(flow.backend),
            source: flow.source,
            state: flow.state.as_str().to_owned(),
            answered: flow.answered,
            idle_seconds: flow.idle.as_secs(),
        }
    }

    fn service_of(&self, listener: u16) -> Option<usize> {
        let number = self.roster.listeners().get(&listener)?.service()?;
        self.services.get(number).map(|_| number)
    }

    fn backend_of(&self, id: u8) -> Option<&Backend> {
        self.backends.iter().find(|backend| backend.id == id)
    }

    fn backend_address(&self, id: u8) -> Option<SocketAddr> {
        self.roster.backends().get(&id).map(|seat| seat.address)
    }
}
