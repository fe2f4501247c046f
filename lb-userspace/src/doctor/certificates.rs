//! Whether the backends' certificates hold the names clients will use, and for how long.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, SystemTime},
};

use futures_util::future::join_all;

use super::{Finding, failure, ok, warning};
use crate::{
    config::{Backend, Check, CheckKind, Config, Service},
    health::{CertificateFacts, Outcome, check_once},
};

const PATIENCE: Duration = Duration::from_secs(2);
const DAYS_TO_WARN: i64 = 30;

pub(super) async fn examine(config: &Config) -> Vec<Finding> {
    let speaks_tls = |service: &&Service| matches!(service.check.kind, CheckKind::Https | CheckKind::Tls);
    let services = config.services.iter().filter(speaks_tls);
    let pairs = services.flat_map(|service| service.backends.iter().map(move |backend| (service, backend)));
    let findings = pairs.map(|(service, backend)| certificate_of(service, backend));
    join_all(findings).await.into_iter().flatten().collect()
}

async fn certificate_of(service: &Service, backend: &Backend) -> Vec<Finding> {
    let subject = format!("certificate of {}/{}", service.name, backend.name);
    // Nothing is sent beyond the handshake, and whatever is presented is looked at, not trusted.
    let handshake = Check {
        kind: CheckKind::Tls,
        server_name: service.check.server_name.clone(),
        connect_timeout: PATIENCE,
        insecure_skip_tls_verify: true,
        ..Check::default()
    };
    let report = check_once(backend.address, &handshake).await;
    match &report.server_certificate {
        Some(certificate) => look_at(certificate, service, &subject, SystemTime::now()),
        None if report.outcome == Outcome::Pass => vec![failure(subject, "is no X.509 certificate")],
        None => {
            let what = format!("cannot be read from {}: {}", backend.address, report.detail());
            vec![warning(subject, what).fix(format!("curl -vk https://{}/readyz", backend.address))]
        }
    }
}

fn look_at(
    certificate: &CertificateFacts,
    service: &Service,
    subject: &str,
    now: SystemTime,
) -> Vec<Finding> {
    let mut findings = vec![validity(certificate.days_to_expiry(now), subject)];
    let addresses = service.listen.iter().map(SocketAddr::ip);
    let missing: Vec<IpAddr> = addresses.filter(|ip| !certificate.addresses.contains(ip)).collect();
    if missing.is_empty() {
        findings.push(ok(subject, "holds every listener's address"));
    }
    for address in missing {
        let what = format!(
            "does not hold the listener's address {address}: clients that connect to it will refuse it"
        );
        let fix = format!(
            "kubeadm: add \"{address}\" to apiServer.certSANs (kubectl -n kube-system edit cm kubeadm-config), then on \
             each master: rm /etc/kubernetes/pki/apiserver.crt /etc/kubernetes/pki/apiserver.key && kubeadm init phase \
             certs apiserver --config FILE, and restart kube-apiserver"
        );
        findings.push(warning(subject, what).fix(fix));
    }
    findings
}

/// `days` are whole ones, rounded down: -1 from the moment it has expired on.
fn validity(days: i64, subject: &str) -> Finding {
    let fix = "kubeadm certs renew apiserver, and restart kube-apiserver";
    match days {
        ..-1 => failure(subject, format!("expired {} ago", whole_days(-days - 1))).fix(fix),
        -1 => failure(subject, "expired less than a day ago").fix(fix),
        0 => warning(subject, "expires in less than a day").fix(fix),
        1..DAYS_TO_WARN => warning(subject, format!("expires in {}", whole_days(days))).fix(fix),
        _ => ok(subject, format!("valid for {}", whole_days(days))),
    }
}

fn whole_days(days: i64) -> String {
    format!("{days} day{}", if days == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::{super::Level, *};

    /// What is said about a certificate that expires so many hours from now.
    fn said(hours: i64) -> (Level, String) {
        const NOW: i64 = 1_700_000_000;
        let certificate = CertificateFacts {
            subject: String::new(),
            names: Vec::new(),
            addresses: Vec::new(),
            not_after: NOW + hours * 3600,
        };
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(NOW.unsigned_abs());
        let finding = validity(certificate.days_to_expiry(now), "certificate");
        (finding.level, finding.what)
    }

    #[test]
    fn an_hour_after_its_time_a_certificate_has_expired() {
        for (hours, level, what) in [
            (-24 * 3 - 1, Level::Failure, "expired 3 days ago"),
            (-25, Level::Failure, "expired 1 day ago"),
            (-1, Level::Failure, "expired less than a day ago"),
            (1, Level::Warning, "expires in less than a day"),
            (25, Level::Warning, "expires in 1 day"),
            (24 * 29 + 1, Level::Warning, "expires in 29 days"),
            (24 * 30 + 1, Level::Ok, "valid for 30 days"),
        ] {
            assert_eq!(said(hours), (level, what.to_owned()), "{hours} hours");
        }
    }
}
