//! `sheave alive`: whether this load balancer works, whatever its backends do. Pure.

use std::time::{Duration, Instant};

use super::{backends::Backend, services::Services};
use crate::{
    config::{Check, CheckKind},
    health::STRETCH,
};

/// How long the controller may be away from its work.
const TURNED_WITHIN: Duration = Duration::from_secs(2);
/// What checks may be late by on a busy host.
const LATE: Duration = Duration::from_secs(5);

/// What is wrong with the program, by interface: `attached` says for each interface (its name) which program the kernel
/// has there; None: the interface is gone.
pub(super) fn detached(ours: Option<u32>, attached: &[(String, Option<Vec<u32>>)]) -> Vec<String> {
    attached
        .iter()
        .filter_map(|(name, programs)| match (programs, ours) {
            (None, _) => Some(gone(name)),
            (Some(programs), Some(ours)) if programs.contains(&ours) => None,
            (Some(_), _) => Some(format!("the program is not on {name} any more: restart sheave")),
        })
        .collect()
}

/// About an interface that does not exist any more.
pub(super) fn gone(name: &str) -> String {
    format!("interface {name} is gone: sheave attaches to it again when it is back")
}

/// Whether the controller turns.
pub(super) fn stalled(last_turn: Instant, now: Instant) -> Option<String> {
    let away = now.saturating_duration_since(last_turn);
    (away > TURNED_WITHIN).then(|| format!("the controller was stuck for {} s", away.as_secs()))
}

/// Whether checks are being made.
pub(super) fn overdue(services: &Services, backends: &[Backend], now: Instant) -> Option<String> {
    let late = backends.iter().find(|backend| {
        let service = &services[backend.target.service];
        let check = &service.check;
        let since = now.saturating_duration_since(backend.checked);
        check.kind != CheckKind::None && since > longest(check, service.is_loopback_only()) + LATE
    })?;
    let service = &services[late.target.service].name;
    Some(format!("no check of {service}/{} has finished for too long: see the log", late.name))
}

/// From one result to the next at most: an asking on a used connection, and another on a fresh one, each with a question
/// about what failed. `stretched`: checks may have been left out.
fn longest(check: &Check, stretched: bool) -> Duration {
    let intervals = if stretched { STRETCH } else { 1 };
    check.interval * intervals + 2 * (2 * check.connect_timeout + check.timeout)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            backends::tests::{backends, config},
            roster::Roster,
        },
        *,
    };

    #[test]
    fn the_program_must_be_on_every_interface() {
        let on = |programs: &[u32]| Some(programs.to_vec());
        let attached =
            [("eth0".to_owned(), on(&[7])), ("eth1".to_owned(), on(&[8])), ("eth2".to_owned(), None)];
        let reasons = detached(Some(7), &attached);
        assert!(reasons[0].contains("not on eth1") && reasons[1].contains("eth2 is gone"), "{reasons:?}");
        assert_eq!(reasons.len(), 2);
        assert_eq!(detached(None, &attached).len(), 3);
    }

    #[test]
    fn a_controller_that_was_stuck_is_not_alive() {
        let now = Instant::now();
        assert_eq!(stalled(now, now + Duration::from_millis(1900)), None);
        assert!(stalled(now, now + Duration::from_secs(3)).is_some());
    }

    #[test]
    fn checks_that_do_not_come_are_noticed_before_and_after_the_first() {
        let config = config(&["10.0.0.1:6443"]);
        let roster = Roster::default().next(&config, |_| false).unwrap();
        let services = Services::of(&config, &roster);
        let mut backends = backends(&["10.0.0.1:6443"]);
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(overdue(&services, &backends, after(10)), None);
        assert!(overdue(&services, &backends, after(30)).is_some());
        backends[0].checked = after(25);
        assert_eq!(overdue(&services, &backends, after(30)), None);
        assert!(overdue(&services, &backends, after(60)).unwrap().contains("api/10.0.0.1:6443"));
    }
}
