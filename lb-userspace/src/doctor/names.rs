//! Whether backends by name can be looked up, and the cluster asked for others.

use std::time::Duration;

use super::{Finding, ok, warning};
use crate::{
    config::Config,
    discovery::{Discovery, Situation},
    names::Names,
};

/// A start waits as long.
const PATIENCE: Duration = Duration::from_secs(2);

/// The configuration with the addresses in place, for all that is looked at afterwards, and what is wrong with names.
pub(super) async fn examine(config: &Config) -> (Config, Vec<Finding>) {
    let mut names = Names::watch(config, None);
    names.first_answers(PATIENCE).await;
    let (resolved, problems) = names.apply(config);
    let problems = names.sentences().into_iter().chain(problems);
    let fix = "getent ahosts NAME shows what this host knows; add a line to /etc/hosts, or write the address";
    (resolved, problems.map(|problem| warning("backends by name", problem).fix(fix)).collect())
}

/// The configuration with what the cluster lists in place, and whether it does list anything.
pub(super) async fn discover(config: &Config) -> (Config, Vec<Finding>) {
    const SUBJECT: &str = "discovered backends";
    let mut discovery = Discovery::watch(config, None);
    discovery.first_answers(PATIENCE).await;
    let wanted = discovery.merge(config, &Situation::default());
    let problems = discovery.sentences().into_iter().chain(wanted.sentences());
    let fix = "kubectl --kubeconfig FILE get endpointslices -l kubernetes.io/service-name=kubernetes";
    let mut findings: Vec<_> = problems.map(|problem| warning(SUBJECT, problem).fix(fix)).collect();
    for service in &config.services {
        match discovery.report(&service.name) {
            Some(report) if report.problem.is_none() => {
                let about = format!("{}: {}", service.name, report.service);
                findings.push(match report.addresses {
                    Some(list) => ok(SUBJECT, format!("{about} lists {} addresses", list.len())),
                    None => warning(SUBJECT, format!("{about}: nobody has answered within 2 s")).fix(fix),
                });
            }
            _ => {}
        }
    }
    (wanted.config, findings)
}
