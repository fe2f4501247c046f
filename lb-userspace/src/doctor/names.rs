//! Whether backends by name can be looked up.

use std::time::Duration;

use super::{Finding, warning};
use crate::{config::Config, names::Names};

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
