//! Backends by name: what their host names stand for, now and from now on.
//!
//! [`Names::watch`] looks every name up, again when the answer's time to live is over, and keeps the last good answer
//! while there is no better one: DNS may well be down because the cluster is. [`Names::apply`] puts the addresses into
//! a configuration; a name that changes its address is then a backend that went and one that came.

mod expand;
mod known;
mod lookup;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{config::Config, state};
use known::{Families, Known};

/// A look-up altogether, both families and every search domain.
const LOOKUP_LIMIT: Duration = Duration::from_secs(10);
/// The first pause after a failure; it doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// The file in the state directory that keeps the last good answers.
const REMEMBERED: &str = "names.json";

/// The last good answers, by name.
type Remembered = BTreeMap<String, BTreeSet<IpAddr>>;

/// The names of a configuration. Clones share what is known; the last one to go stops the look-ups.
#[derive(Clone, Debug)]
pub struct Names {
    known: watch::Receiver<BTreeMap<String, Known>>,
    _tasks: Arc<JoinSet<()>>,
}

impl Names {
    /// Begins to look up the names of `config`, none if there are none. What `before` knows of the same names is kept
    /// until there is an answer. Needs a tokio runtime.
    pub fn watch(config: &Config, before: Option<&Self>) -> Self {
        Self::begin(config, |host| before.and_then(|it| it.known.borrow().get(host).cloned()))
    }

    /// As [`Names::watch`], with what a daemon before this one has [remembered](Names::remember): DNS may be down when
    /// this one starts.
    pub fn watch_remembered(config: &Config, state_dir: &Path) -> Self {
        let remembered: Remembered = state::load(&state_dir.join(REMEMBERED)).unwrap_or_else(|error| {
            tracing::warn!("cannot read what names stood for last, in {}: {error}", state_dir.display());
            Remembered::default()
        });
        Self::begin(config, |host| remembered.get(host).map(Known::remembered))
    }

    /// Keeps what is known now for the next daemon. That it cannot be kept is logged.
    pub fn remember(&self, state_dir: &Path) {
        let known = self.known.borrow();
        let answers = known.iter().map(|(host, known)| (host.clone(), known.addresses()));
        let remembered: Remembered = answers.filter(|(_, addresses)| !addresses.is_empty()).collect();
        let path = state_dir.join(REMEMBERED);
        // Unchanged on most starts: a write that is not made cannot fail.
        if state::load::<Remembered>(&path).is_ok_and(|before| before == remembered) {
            return;
        }
        if let Err(error) = state::save(&path, Some(&remembered).filter(|it| !it.is_empty())) {
            tracing::warn!("{}: cannot keep what names stand for: {error}", path.display());
        }
    }

    fn begin(config: &Config, known: impl Fn(&String) -> Option<Known>) -> Self {
        let hosts = hosts(config);
        let first = hosts.keys().map(|host| (host.clone(), known(host).unwrap_or_default())).collect();
        let (sender, receiver) = watch::channel(first);
        let sender = Arc::new(sender);
        let mut tasks = JoinSet::new();
        for (host, families) in hosts {
            tasks.spawn(follow(host, families, Arc::clone(&sender)));
        }
        if tasks.is_empty() {
            // So that `changed` waits for ever rather than ends.
            tasks.spawn(async move {
                let _sender = sender;
                std::future::pending::<()>().await;
            });
        }
        Self { known: receiver, _tasks: Arc::new(tasks) }
    }

    /// Waits until every name was looked up once, with or without success, at most for `limit`.
    pub async fn first_answers(&mut self, limit: Duration) {
        let complete = self.known.wait_for(|known| known.values().all(|it| it.asked));
        if timeout(limit, complete).await.is_err() {
            self.sentences().iter().for_each(|sentence| tracing::warn!("{sentence}"));
        }
        self.known.mark_unchanged();
    }

    /// Waits until the addresses of a name change.
    pub async fn changed(&mut self) {
        if self.known.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// The configuration with its named backends in place, and which of their addresses cannot be used, in sentences.
    /// Literal backends stay; those that an earlier `apply` put in are made anew.
    pub fn apply(&self, config: &Config) -> (Config, Vec<String>) {
        let known = self.known.borrow();
        expand::expand(config, |host| known.get(&normal(host)).map(Known::addresses).unwrap_or_default())
    }

    /// What the operator should know about look-ups: those that fail, or have not ended yet.
    pub fn sentences(&self) -> Vec<String> {
        self.known.borrow().iter().filter_map(|(host, it)| it.sentence(host)).collect()
    }
}

/// Names differ in case only for people.
fn normal(host: &str) -> String {
    host.to_ascii_lowercase()
}

/// Every host to be looked up, and the families that a listener of its services has.
fn hosts(config: &Config) -> BTreeMap<String, Families> {
    let mut hosts: BTreeMap<String, Families> = BTreeMap::new();
    for service in &config.services {
        let listens = |ipv6: bool| service.listen.iter().any(|listener| listener.is_ipv6() == ipv6);
        for backend in &service.named_backends {
            let families = hosts.entry(normal(&backend.host)).or_default();
            families.ipv4 |= listens(false);
            families.ipv6 |= listens(true);
        }
    }
    hosts
}

/// Looks a name up again and again.
async fn follow(host: String, families: Families, sender: Arc<watch::Sender<BTreeMap<String, Known>>>) {
    let mut retry = RETRY_MIN;
    loop {
        let answers = match timeout(LOOKUP_LIMIT, lookup::look_up(&host, families)).await {
            Ok(answers) => answers,
            Err(_) => families.each(|_| Err("no answer in time".to_owned())),
        };
        let mut pause = None;
        sender.send_if_modified(|known| {
            let before = known.entry(host.clone()).or_default();
            let after = before.after(answers);
            let changed = after.addresses() != before.addresses() || !before.asked;
            after.log(before, &host);
            pause = after.fresh_for;
            *before = after;
            changed
        });
        match pause {
            Some(fresh) => {
                retry = RETRY_MIN;
                sleep(fresh).await;
            }
            None => {
                sleep(retry).await;
                retry = (retry * 2).min(RETRY_MAX);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(backends: &str) -> Config {
        let text =
            format!("[[service]]\nname = \"api\"\nlisten = [\"192.0.2.1:6443\"]\nbackends = [{backends}]");
        Config::parse(&text, "test.toml").unwrap().0
    }

    #[test]
    fn only_the_families_of_listeners_are_asked_for() {
        let hosts = hosts(&config("\"Master-1:6443\", \"10.0.0.1:6443\""));
        assert_eq!(
            hosts.into_iter().collect::<Vec<_>>(),
            [("master-1".to_owned(), Families { ipv4: true, ipv6: false })]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn without_names_nothing_is_waited_for_and_nothing_changes() {
        let config = config("\"10.0.0.1:6443\"");
        let mut names = Names::watch(&config, None);
        names.first_answers(Duration::from_secs(2)).await;
        assert!(timeout(Duration::from_secs(3600), names.changed()).await.is_err());
        assert_eq!(names.apply(&config), (config, Vec::new()));
    }
}
