//! The backends, as the controller sees them: what is configured, what the checks say, where their packets go.

use std::{
    net::SocketAddr,
    time::{Instant, SystemTime},
};

use super::{ControllerError, next_hops::Way, orders::Order, roster::Roster, services::Services};
use crate::{
    admin::BackendState,
    config::Config,
    health::{Candidate, CheckReport, Event, Failure, OperatorState, Outcome, State, Target, TargetId},
};

/// A backend of one service.
#[derive(Clone, Debug)]
pub(super) struct Backend {
    /// Its id in the data path: see [`super::roster`].
    pub(super) id: u8,
    /// Its service's number, and its id: whose checks these are.
    pub(super) target: TargetId,
    /// Unique within the service.
    pub(super) name: String,
    /// Where its flows go.
    pub(super) address: SocketAddr,
    /// The host name its address was found by, if by one.
    pub(super) host: Option<String>,
    /// The cluster lists it, and the file does not name it.
    pub(super) discovered: bool,
    /// Share of new flows.
    pub(super) weight: u16,
    /// The same, as configured: the operator may have ordered another.
    pub(super) configured_weight: u16,
    /// What the operator says.
    pub(super) operator: OperatorState,
    /// When the operator has its flows reset, in seconds since 1970; None: never, or it was done.
    pub(super) reset_at: Option<u64>,
    /// It is this host.
    pub(super) local: bool,
    /// What its checks say.
    pub(super) state: State,
    /// Since when; None before the first check.
    pub(super) since: Option<SystemTime>,
    /// Silent without a break since then, while it is silent or dead.
    pub(super) silent_since: Option<Instant>,
    /// Nobody looked for so long, before this daemon, that it may have rebooted; it has not answered since.
    pub(super) unattended: bool,
    /// The last check.
    pub(super) report: CheckReport,
    /// When that was; before the first, since when it is to be checked.
    pub(super) checked: Instant,
    /// Where its packets go first.
    pub(super) way: Way,
}

impl Backend {
    /// Takes in the result of a check.
    pub(super) fn observe(&mut self, event: &Event, now: Instant) {
        self.silent_since = event.silent_since.filter(|_| event.state == State::Silent);
        // What checks see of the dead is silence.
        if self.state != State::Dead || self.silent_since.is_none() {
            self.state = event.state;
            self.since = Some(event.since);
        }
        self.unattended &= !event.is_answer();
        self.report = event.report.clone();
        self.checked = now;
    }

    /// When its last check ended, if that was answered, in whatever way.
    pub(super) fn answered(&self) -> Option<Instant> {
        let answers = !matches!(self.report.outcome, Outcome::Local | Outcome::Fail(Failure::Silent));
        (answers && self.since.is_some()).then_some(self.checked)
    }

    /// Does what the operator has ordered.
    pub(super) fn obey(&mut self, order: &Order) {
        self.operator = order.state;
        self.reset_at = order.reset_at;
        self.weight = order.weight.unwrap_or(self.configured_weight);
    }

    /// Knows what is known of the same backend before a reload.
    pub(super) fn take_over(&mut self, known: &Self) {
        (self.state, self.since) = (known.state, known.since);
        (self.silent_since, self.unattended) = (known.silent_since, known.unattended);
        (self.report, self.checked) = (known.report.clone(), known.checked);
        self.way = known.way.clone();
    }

    /// Is this its name, or its address and port?
    pub(super) fn answers_to(&self, name: &str) -> bool {
        self.name == name || name.parse() == Ok(self.address)
    }

    /// Its state in the status: the operator's word goes before the checks'.
    pub(super) fn shown_state(&self) -> BackendState {
        match (self.operator, self.state) {
            (OperatorState::Maint, _) => BackendState::Maint,
            (OperatorState::Drain, _) => BackendState::Drain,
            (OperatorState::None, State::Unknown) => BackendState::Unknown,
            (OperatorState::None, State::Ready) => BackendState::Ready,
            (OperatorState::None, State::Draining) => BackendState::Draining,
            (OperatorState::None, State::Silent) => BackendState::Silent,
            (OperatorState::None, State::Dead) => BackendState::Dead,
        }
    }

    /// What the choice of backends for new flows looks at.
    pub(super) fn candidate(&self) -> Candidate {
        Candidate {
            state: self.state,
            connected: self.report.connected,
            http_status: self.report.http_status,
            certificate_rejected: self.report.certificate_rejected,
            operator: self.operator,
            weight: self.weight,
        }
    }
}

/// Every backend of every service in configuration order, under the ids that they have.
pub(super) fn enumerate(config: &Config, roster: &Roster) -> Result<Vec<Backend>, ControllerError> {
    let forwards = config.forwards_packets();
    let mut backends = Vec::new();
    for service in &config.services {
        let Some(number) = roster.service(&service.name) else { continue };
        for backend in &service.backends {
            let Some(id) = roster.backend(number, backend.address) else { continue };
            let local = roster.backends()[&id].local;
            // The connect hook can change a port.
            let listeners = service.listen.iter().filter(|it| forwards && !it.ip().is_loopback());
            let other = listeners.copied().find(|listener| {
                listener.is_ipv4() == backend.address.is_ipv4() && listener.port() != backend.address.port()
            });
            if let (true, Some(listener)) = (local, other) {
                return Err(ControllerError::LocalBackend {
                    service: service.name.clone(),
                    backend: backend.address,
                    listener,
                });
            }
            backends.push(Backend {
                id,
                target: TargetId { service: number, backend: id.into() },
                name: backend.name.clone(),
                address: backend.address,
                host: backend.host.clone(),
                discovered: backend.discovered,
                weight: backend.weight,
                configured_weight: backend.weight,
                operator: OperatorState::None,
                reset_at: None,
                local,
                state: State::Unknown,
                since: None,
                silent_since: None,
                unattended: false,
                report: CheckReport::initializing(),
                checked: Instant::now(),
                way: Way::Unknown,
            });
        }
    }
    Ok(backends)
}

/// What is to be checked.
pub(super) fn targets(services: &Services, backends: &[Backend]) -> Vec<Target> {
    backends
        .iter()
        .map(|backend| Target {
            id: backend.target,
            address: backend.address,
            host: backend.host.clone(),
            check: services[backend.target.service].check.clone(),
        })
        .collect()
}

#[cfg(test)]
pub(super) mod tests {
    use std::net::IpAddr;

    use super::*;

    /// Backends at these addresses of one service with a listener on port 6443.
    pub(in crate::controller) fn backends(addresses: &[&str]) -> Vec<Backend> {
        let config = config(addresses);
        enumerate(&config, &Roster::default().next(&config, |_| false).unwrap()).unwrap()
    }

    pub(in crate::controller) fn config(addresses: &[&str]) -> Config {
        let text =
            format!("[[service]]\nname = \"api\"\nlisten = [\"10.0.0.100:6443\"]\nbackends = {addresses:?}");
        Config::parse(&text, "test.toml").unwrap().0
    }

    #[test]
    fn ids_begin_with_one() {
        let backends = backends(&["10.0.0.1:6443", "10.0.0.2:6443"]);
        assert_eq!(backends.iter().map(|backend| backend.id).collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn a_backend_on_this_host_must_have_the_listeners_port() {
        let local = |address: IpAddr| address == IpAddr::from([10, 0, 0, 1]);
        let enumerate = |addresses: &[&str]| {
            let config = config(addresses);
            enumerate(&config, &Roster::default().next(&config, local).unwrap())
        };
        let backends = enumerate(&["10.0.0.1:6443", "10.0.0.2:6444"]).unwrap();
        assert_eq!(backends.iter().map(|backend| backend.local).collect::<Vec<_>>(), [true, false]);
        let error = enumerate(&["10.0.0.1:6444"]).unwrap_err();
        assert!(error.to_string().contains("10.0.0.100:6443"), "{error}");
        assert!(error.is_configuration());
    }
}
