//! What the operator should know about a service, in sentences. Pure.

use std::time::SystemTime;

use super::{backends::Backend, selection::Choice};
use crate::{
    config::{Check, CheckKind, Service},
    health::{CertificateFacts, CheckCode},
};

/// Days before the end of a certificate at which to speak of it.
const EXPIRES_SOON: i64 = 30;

/// The sentences about a service.
pub(super) fn of_service(
    service: &Service,
    backends: &[&Backend],
    choices: &[&Choice],
    now: SystemTime,
) -> Vec<String> {
    let mut flags: Vec<String> = Vec::new();
    let mut add = |flag: String| {
        if !flags.contains(&flag) {
            flags.push(flag);
        }
    };
    for choice in choices {
        choice.reason.explanation().into_iter().for_each(|text| add(text.to_owned()));
    }
    if let Some(text) = trust(&service.check, backends) {
        add(text);
    }
    if let Some(path) = service.check.ca_file.as_ref().or(service.check.kubeconfig.as_ref())
        && backends.iter().any(|backend| backend.report.certificate_rejected)
    {
        let names = names(backends, |backend| backend.report.certificate_rejected);
        add(format!(
            "the certificate of {names} does not verify with {}: no new flows while another backend is ready. Where the \
             cluster's CA is being rotated, put the new one beside the old one",
            path.display()
        ));
    }
    if backends.iter().any(|backend| backend.report.credential_rejected) {
        let names = names(backends, |backend| backend.report.credential_rejected);
        add(format!(
            "{names} answered our credential with 401, and are ready only because they answer without one: renew it"
        ));
    }
    let unauthenticated = |backend: &Backend| {
        backend.report.code == CheckCode::L7Ok && matches!(backend.report.http_status, Some(401 | 403))
    };
    if backends.iter().any(|backend| unauthenticated(backend)) {
        let names = names(backends, unauthenticated);
        add(format!(
            "unauthenticated: {names} count as ready with 401 or 403, as \"expect\" says, which proves only that TLS \
             and HTTP work: give the check a credential (`sheave rbac`) and expect 200"
        ));
    }
    for backend in backends.iter().filter(|backend| backend.weight != backend.configured_weight) {
        let Backend { name, weight, configured_weight, .. } = backend;
        add(format!("{name} has weight {weight} by an operator's order, {configured_weight} as configured"));
    }
    for backend in backends {
        let report = &backend.report;
        if let Some(text) = report.server_certificate.as_deref().and_then(|facts| expiry(facts, now)) {
            add(format!("the certificate of {} {text}", backend.name));
        }
        if let Some(text) = report.client_certificate.as_deref().and_then(|facts| expiry(facts, now)) {
            add(format!("our client certificate {text}"));
        }
    }
    flags
}

fn names(backends: &[&Backend], wanted: impl Fn(&Backend) -> bool) -> String {
    let names: Vec<_> =
        backends.iter().filter(|backend| wanted(backend)).map(|backend| backend.name.as_str()).collect();
    names.join(", ")
}

/// Whether anybody could stand in for a backend.
fn trust(check: &Check, backends: &[&Backend]) -> Option<String> {
    if !matches!(check.kind, CheckKind::Https | CheckKind::Tls) {
        return None;
    }
    if check.insecure_skip_tls_verify {
        return Some("certificates of backends are not verified: insecure_skip_tls_verify is set".to_owned());
    }
    let Some(path) = check.ca_file.as_ref().or(check.kubeconfig.as_ref()) else {
        return Some("certificates of backends are not verified: set check.ca_file".to_owned());
    };
    let unverified =
        |backend: &&&Backend| backend.report.server_certificate.is_some() && !backend.report.verified;
    let answered_untrusted =
        backends.iter().filter(unverified).any(|backend| !backend.report.certificate_rejected);
    answered_untrusted.then(|| {
        let reason = match check.kubeconfig {
            Some(_) => "or the CA it names is not there yet, or it says insecure-skip-tls-verify",
            None => "is not there yet",
        };
        format!("certificates of backends are not verified: {} {reason}", path.display())
    })
}

fn expiry(facts: &CertificateFacts, now: SystemTime) -> Option<String> {
    match facts.days_to_expiry(now) {
        days if days < 0 => Some("has expired".to_owned()),
        0 => Some("expires today".to_owned()),
        days if days < EXPIRES_SOON => Some(format!("expires in {days} days")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::Arc,
        time::{Duration, UNIX_EPOCH},
    };

    use super::{
        super::backends::tests::{backends, config},
        *,
    };
    use crate::health::SelectionReason;

    const NOW: SystemTime = UNIX_EPOCH;

    fn certificate(days: i64) -> Option<Arc<CertificateFacts>> {
        let facts = CertificateFacts {
            subject: String::new(),
            names: Vec::new(),
            addresses: Vec::new(),
            not_after: days * 86_400,
        };
        Some(Arc::new(facts))
    }

    fn flags(mut change: impl FnMut(&mut Service, &mut Backend)) -> Vec<String> {
        let mut service = config(&["10.0.0.1:6443"]).services.remove(0);
        service.check.ca_file = Some("/ca.crt".into());
        let mut backend = backends(&["10.0.0.1:6443"]).remove(0);
        (backend.report.server_certificate, backend.report.verified) = (certificate(100), true);
        change(&mut service, &mut backend);
        let choice = Choice { reason: SelectionReason::Ready, members: vec![(1, 1)] };
        of_service(&service, &[&backend], &[&choice], NOW + Duration::from_secs(1))
    }

    #[test]
    fn nothing_is_said_when_all_is_well() {
        assert_eq!(flags(|_, _| {}), Vec::<String>::new());
    }

    #[test]
    fn each_weakness_is_named() {
        let said =
            |flags: Vec<String>, what: &str| assert!(flags.iter().any(|it| it.contains(what)), "{flags:?}");
        said(flags(|service, _| service.check.ca_file = None), "set check.ca_file");
        said(flags(|service, _| service.check.insecure_skip_tls_verify = true), "insecure_skip_tls_verify");
        said(flags(|_, backend| backend.report.verified = false), "/ca.crt is not there yet");
        said(flags(|_, backend| backend.report.credential_rejected = true), "renew it");
        said(flags(|_, backend| backend.report.server_certificate = certificate(20)), "expires in 19 days");
        said(
            flags(|_, backend| backend.report.client_certificate = certificate(0)),
            "client certificate has expired",
        );
        said(
            flags(|_, backend| {
                (backend.report.code, backend.report.http_status) = (CheckCode::L7Ok, Some(401));
            }),
            "unauthenticated: 10.0.0.1:6443 count as ready",
        );
        said(
            flags(|_, backend| {
                (backend.report.verified, backend.report.certificate_rejected) = (false, true);
            }),
            "does not verify with /ca.crt",
        );
    }
}
