//! What the admin socket is told.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use lb_common::{Outcome, outcome::Counter};

use super::{Controller, backends::Backend, family_name, flags, liveness, plan, selection::Choice};
use crate::{
    admin::{
        Alive, BackendStatus, CheckStatus, DaemonStatus, DiscoveryStatus, InterfaceStatus, ServiceStatus,
        Status, VipStatus,
    },
    config::{Balance, Forward, Service},
    health::{CertificateFacts, CheckCode, SelectionReason},
    network::display_mac,
};

/// Counts of active flows may be this old.
const FRESH: Duration = Duration::from_millis(200);
/// Replies to unknown slots in a minute that are more than stragglers.
const STRANGERS: u64 = 10;

impl Controller {
    /// `GET /v1/status`
    pub(super) fn status(&mut self) -> Status {
        if self.reaped_at.elapsed() > FRESH {
            self.reap();
        }
        Status {
            services: self
                .services
                .iter()
                .map(|(number, service)| self.service_status(number, service))
                .collect(),
            vip: plan::vips(&self.config)
                .into_iter()
                .map(|address| VipStatus {
                    address,
                    present: self.network.interface_carrying(address).is_some(),
                })
                .collect(),
            interfaces: self
                .dataplane
                .attached()
                .iter()
                .map(|it| InterfaceStatus {
                    name: it.name.clone(),
                    xdp_mode: it.mode.name().to_owned(),
                    members: self.known_members(it.interface),
                })
                .collect(),
            hook: self.hook_status(),
            packets: self.packets(),
            flow_tables: self.room.status(),
            flags: self.host_flags(),
            daemon: DaemonStatus {
                pid: std::process::id(),
                uptime_seconds: self.started.elapsed().as_secs(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
            },
        }
    }

    fn service_status(&self, number: usize, service: &Service) -> ServiceStatus {
        let backends: Vec<_> = self.backends.iter().filter(|it| it.target.service == number).collect();
        let choices: Vec<_> = [false, true]
            .into_iter()
            .filter_map(|ipv6| Some((ipv6, self.choices.get(&(number, ipv6))?)))
            .collect();
        let only: Vec<_> = choices.iter().map(|(_, choice)| *choice).collect();
        let now = SystemTime::now();
        ServiceStatus {
            name: service.name.clone(),
            listen: service.listen.clone(),
            balance: match service.balance {
                Balance::Maglev => "maglev".to_owned(),
            },
            forward: match service.forward {
                Forward::Nat => "nat".to_owned(),
            },
            backends: backends.iter().map(|backend| self.backend_status(backend, now)).collect(),
            selection: selection(&choices),
            flags: flags::of_service(service, &backends, &only, now),
            discovery: self.discovery_status(service),
        }
    }

    fn backend_status(&self, backend: &Backend, now: SystemTime) -> BackendStatus {
        let total = self.dataplane.total_flows(backend.id).unwrap_or_else(|error| {
            tracing::warn!("cannot read how many flows {} had: {error}", backend.name);
            0
        });
        BackendStatus {
            name: backend.name.clone(),
            address: backend.address,
            discovered: backend.discovered,
            state: backend.shown_state(),
            weight: backend.weight,
            active_flows: self.reaped.active.get(usize::from(backend.id)).copied().unwrap_or_default(),
            total_flows: total,
            check: check_status(backend, now),
        }
    }

    fn discovery_status(&self, service: &Service) -> Option<DiscoveryStatus> {
        let report = self.sources.as_ref()?.discovery().report(&service.name)?;
        let listed = |address: &SocketAddr| report.addresses.iter().flatten().any(|it| it == address);
        let in_use = self.config.services.iter().find(|it| it.name == service.name);
        let held = in_use.into_iter().flat_map(|it| &it.backends).filter(|it| it.discovered);
        let heard = report.heard.and_then(|heard| heard.duration_since(UNIX_EPOCH).ok());
        Some(DiscoveryStatus {
            held: held.map(|it| it.address).filter(|address| !listed(address)).collect(),
            service: report.service,
            addresses: report.addresses.map(|addresses| addresses.into_iter().collect()),
            through: report.through,
            heard: heard.map(|heard| heard.as_secs()),
            problem: report.problem,
        })
    }

    fn packets(&self) -> BTreeMap<String, u64> {
        let mut packets = BTreeMap::new();
        for service in std::iter::once(None).chain(self.services.numbers().into_iter().map(Some)) {
            match self.dataplane.counters(service) {
                Ok(counters) => {
                    // What is not ours is not counted.
                    let uncounted = Counter::Outcome(Outcome::NotOurs);
                    for (counter, count) in counters.into_iter().filter(|(counter, _)| *counter != uncounted)
                    {
                        *packets.entry(counter.name().to_owned()).or_default() += count;
                    }
                }
                Err(error) => tracing::warn!("cannot read the counters: {error}"),
            }
        }
        packets
    }

    fn host_flags(&self) -> Vec<String> {
        let mut flags = Vec::new();
        let strangers = rise(self.strangers.iter().copied());
        if strangers >= STRANGERS && !self.checks_use_slots {
            flags.push(format!(
                "{strangers} replies to unknown slots in the last minute: does another load balancer have the same VIP?"
            ));
        }
        let elsewhere = rise(self.elsewhere.iter().copied());
        if elsewhere > 0 {
            flags.push(format!(
                "{elsewhere} packets in backends' names were dropped in the last minute, because no backend answers by the \
                 interface that they came in by: if it was a backend, name the interface in dataplane.backend_interfaces"
            ));
        }
        for rival in self.owner.iter().flat_map(|owner| owner.rivals()) {
            flags.push(format!("{} says it has the VIP {} too", display_mac(&rival.mac), rival.vip));
        }
        flags.extend(self.gone_interfaces.iter().map(|name| liveness::gone(name)));
        flags.extend(self.taken_off.reasons());
        flags.extend(self.veth_flags.iter().cloned());
        flags.extend(self.interface_flags.iter().chain(&self.unreached_servers).cloned());
        flags.extend(self.room.flags());
        flags.extend(self.hook_flags());
        flags.extend(self.source_flags());
        flags
    }

    /// Counts replies to slots that are not the sender's, and what comes by the wrong interface, for the last minute.
    pub(super) fn count_strangers(&mut self) {
        /// The counts of a minute, every ten seconds.
        const KEPT: usize = 7;
        let services = std::iter::once(None).chain(self.services.numbers().into_iter().map(Some));
        let counters: Vec<_> =
            services.filter_map(|service| self.dataplane.counters(service).ok()).flatten().collect();
        for (outcome, counts) in
            [(Outcome::ReplyUnknown, &mut self.strangers), (Outcome::BackendInterface, &mut self.elsewhere)]
        {
            let of_it = counters.iter().filter(|(counter, _)| *counter == Counter::Outcome(outcome));
            counts.push_back(of_it.map(|(_, count)| count).sum());
            if counts.len() > KEPT {
                counts.pop_front();
            }
        }
    }

    /// `GET /v1/alive`
    pub(super) async fn alive(&self) -> Alive {
        let now = Instant::now();
        let mut attached = Vec::new();
        let mut reasons = Vec::new();
        for interface in self.dataplane.attached() {
            match self.network.xdp_programs(interface.interface).await {
                Ok(programs) => {
                    let ids = programs.map(|programs| programs.iter().map(|it| it.program).collect());
                    attached.push((interface.name.clone(), ids));
                }
                Err(error) => reasons.push(error.to_string()),
            }
        }
        reasons.extend(self.gone_interfaces.iter().map(|name| liveness::gone(name)));
        reasons.extend(self.taken_off.reasons());
        reasons.extend(liveness::detached(self.dataplane.program_id(), &attached));
        reasons.extend(self.hook_reasons());
        reasons.extend(liveness::stalled(self.last_turn, now));
        reasons.extend(liveness::overdue(&self.services, &self.backends, now));
        Alive { alive: reasons.is_empty(), reasons }
    }
}

/// How much a growing count grew.
fn rise(counts: impl DoubleEndedIterator<Item = u64> + Clone) -> u64 {
    let (first, last) = (counts.clone().next(), counts.clone().next_back());
    last.unwrap_or_default().saturating_sub(first.unwrap_or_default())
}

/// Which backends get new flows, in two words for each family that differs.
fn selection(choices: &[(bool, &Choice)]) -> String {
    let words = |choice: &Choice| match choice.reason {
        SelectionReason::Ready => "ready backends",
        SelectionReason::CredentialRejected => "backends that refuse our credential",
        SelectionReason::Draining => "draining backends",
        SelectionReason::CertificateRejected => "backends whose certificate does not verify",
        SelectionReason::OperatorDrained => "drained backends",
        SelectionReason::None => "none",
    };
    match choices {
        [(_, first), rest @ ..] if rest.iter().all(|(_, other)| other.reason == first.reason) => {
            words(first).to_owned()
        }
        several => {
            let each =
                several.iter().map(|(ipv6, choice)| format!("{}: {}", family_name(*ipv6), words(choice)));
            each.collect::<Vec<_>>().join("; ")
        }
    }
}

fn check_status(backend: &Backend, now: SystemTime) -> CheckStatus {
    let report = &backend.report;
    let days = |facts: &Option<Arc<CertificateFacts>>| facts.as_ref().map(|facts| facts.days_to_expiry(now));
    let last_change =
        backend.since.and_then(|since| since.duration_since(UNIX_EPOCH).ok()).map(|since| since.as_secs());
    if report.code == CheckCode::Ini {
        return CheckStatus { last_change, ..CheckStatus::default() };
    }
    CheckStatus {
        code: report.code.as_str().to_owned(),
        http_status: report.http_status,
        duration_ms: (report.code != CheckCode::NoCheck)
            .then(|| u64::try_from(report.duration.as_millis()).unwrap_or(u64::MAX)),
        detail: report.detail(),
        failed: report.failed.clone(),
        last_change,
        certificate_days: days(&report.server_certificate),
        credential_days: days(&report.client_certificate),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::{self, CheckReport};

    #[test]
    fn the_selection_is_said_once_when_it_is_the_same_for_both_families() {
        let ready = Choice { reason: SelectionReason::Ready, members: vec![(1, 1)] };
        let draining = Choice { reason: SelectionReason::Draining, members: vec![(2, 1)] };
        assert_eq!(selection(&[(false, &ready), (true, &ready)]), "ready backends");
        assert_eq!(selection(&[(true, &draining)]), "draining backends");
        assert_eq!(
            selection(&[(false, &ready), (true, &draining)]),
            "IPv4: ready backends; IPv6: draining backends"
        );
    }

    #[test]
    fn certificates_are_said_to_last_for_so_many_days_where_they_are_known() {
        const DAY: u64 = 86_400;
        let at = |days: u64| UNIX_EPOCH + Duration::from_secs(days * DAY);
        let certificate = |days: u64| {
            let facts = CertificateFacts {
                subject: String::new(),
                names: Vec::new(),
                addresses: Vec::new(),
                not_after: (days * DAY).cast_signed(),
            };
            Some(Arc::new(facts))
        };
        let mut backend = super::super::backends::tests::backends(&["10.0.0.1:6443"]).remove(0);
        let days = |backend: &Backend| {
            let check = check_status(backend, at(100));
            (check.certificate_days, check.credential_days)
        };
        assert_eq!(days(&backend), (None, None), "it was never checked");
        backend.report = CheckReport::new(health::Outcome::Pass, CheckCode::L7Ok);
        assert_eq!(days(&backend), (None, None), "a check without TLS");
        (backend.report.server_certificate, backend.report.client_certificate) =
            (certificate(465), certificate(97));
        assert_eq!(days(&backend), (Some(365), Some(-3)));
    }

    #[test]
    fn a_count_rises_from_its_oldest_to_its_newest() {
        assert_eq!(rise([3, 3, 17].into_iter()), 14);
        assert_eq!(rise([5].into_iter()), 0);
        assert_eq!(rise([].into_iter()), 0);
    }
}
