//! The backends, as the controller sees them: what is configured, what the checks say, where their packets go.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Instant, SystemTime},
};

use super::{ControllerError, next_hops::Way};
use crate::{
    config::Config,
    health::{Candidate, CheckReport, Event, OperatorState, State, Target, TargetId},
};

/// A backend of one service.
#[derive(Clone, Debug)]
pub(super) struct Backend {
    /// Its id in the data path: from 1, in configuration order, never another's.
    pub(super) id: u8,
    /// Which service's, and which of that service's.
    pub(super) target: TargetId,
    /// Unique within the service.
    pub(super) name: String,
    /// Where its flows go.
    pub(super) address: SocketAddr,
    /// The host name its address was found by, if by one.
    pub(super) host: Option<String>,
    /// Share of new flows.
    pub(super) weight: u16,
    /// It is this host.
    pub(super) local: bool,
    /// What its checks say.
    pub(super) state: State,
    /// Since when; None before the first check.
    pub(super) since: Option<SystemTime>,
    /// Silent without a break since then, while it is silent or dead.
    pub(super) silent_since: Option<Instant>,
    /// The last check.
    pub(super) report: CheckReport,
    /// When that was.
    pub(super) checked: Option<Instant>,
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
        self.report = event.report.clone();
        self.checked = Some(now);
    }

    /// What the choice of backends for new flows looks at.
    pub(super) fn candidate(&self) -> Candidate {
        Candidate {
            state: self.state,
            connected: self.report.connected,
            http_status: self.report.http_status,
            certificate_rejected: self.report.certificate_rejected,
            operator: OperatorState::None,
            weight: self.weight,
        }
    }
}

/// Every backend of every service; ids in configuration order.
pub(super) fn enumerate(
    config: &Config,
    is_local: impl Fn(IpAddr) -> bool,
) -> Result<Vec<Backend>, ControllerError> {
    let mut backends = Vec::new();
    for (number, service) in config.services.iter().enumerate() {
        for (index, backend) in service.backends.iter().enumerate() {
            let local = is_local(backend.address.ip());
            let other = service.listen.iter().find(|listener| {
                listener.is_ipv4() == backend.address.is_ipv4() && listener.port() != backend.address.port()
            });
            if let (true, Some(listener)) = (local, other) {
                return Err(ControllerError::LocalBackend {
                    service: service.name.clone(),
                    backend: backend.address,
                    listener: *listener,
                });
            }
            backends.push(Backend {
                // The configuration allows no more than there are ids.
                id: u8::try_from(backends.len() + 1).unwrap_or(u8::MAX),
                target: TargetId { service: number, backend: index },
                name: backend.name.clone(),
                address: backend.address,
                host: backend.host.clone(),
                weight: backend.weight,
                local,
                state: State::Unknown,
                since: None,
                silent_since: None,
                report: CheckReport::initializing(),
                checked: None,
                way: Way::Unknown,
            });
        }
    }
    Ok(backends)
}

/// What is to be checked.
pub(super) fn targets(config: &Config, backends: &[Backend]) -> Vec<Target> {
    backends
        .iter()
        .map(|backend| {
            let service = &config.services[backend.target.service];
            Target {
                id: backend.target,
                service: service.name.clone(),
                backend: backend.name.clone(),
                address: backend.address,
                host: backend.host.clone(),
                check: service.check.clone(),
            }
        })
        .collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Backends at these addresses of one service with a listener on port 6443.
    pub(in crate::controller) fn backends(addresses: &[&str]) -> Vec<Backend> {
        enumerate(&config(addresses), |_| false).unwrap()
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
        let backends = enumerate(&config(&["10.0.0.1:6443", "10.0.0.2:6444"]), local).unwrap();
        assert_eq!(backends.iter().map(|backend| backend.local).collect::<Vec<_>>(), [true, false]);
        let error = enumerate(&config(&["10.0.0.1:6444"]), local).unwrap_err();
        assert!(error.to_string().contains("10.0.0.100:6443"), "{error}");
        assert!(error.is_configuration());
    }
}
