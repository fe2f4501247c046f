//! Backends that the cluster itself lists: the EndpointSlices of a Service, `default/kubernetes` above all.
//!
//! [`Discovery::watch`] follows them through the apiservers, whichever is usable, and keeps the last good list while
//! there is no better one. [`Discovery::merge`] puts it beside, or in the place of, what the configuration says, and
//! never takes away the last backend that is usable. A backend that leaves the list is one that left the
//! configuration: it drains. But not before it is known that it answers ([`Leave`]): the list drops an apiserver that is
//! frozen, too, before anybody has found it dead. (The list drops every apiserver that restarts; and apiservers that died
//! together may have left a list of the dead behind them: k3s#11349, k3s#10240.)

mod follow;
mod known;
mod merge;
mod slices;
mod visit;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use tokio::{sync::watch, task::JoinSet, time::timeout};

use crate::{
    config::{Config, Discover},
    kubeconfig::{self, Kubeconfig, Server},
    state,
};
use follow::{Candidates, Follower};
use known::Known;
pub use merge::{Leave, Present, Situation, Wanted};
pub(crate) use slices::{Slice, refusal};

/// The file in the state directory that keeps the last good lists.
const REMEMBERED: &str = "discovered.json";

/// The last good list of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    /// `namespace/service`: another has another list.
    service: String,
    /// Those that are still in use although they are not listed any more, included.
    addresses: BTreeSet<SocketAddr>,
    /// Those of lists before it, to be asked.
    #[serde(default)]
    former: BTreeSet<SocketAddr>,
}

/// By the service's name in the configuration.
type Remembered = BTreeMap<String, Kept>;

/// What is known of one service's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// `namespace/service`
    pub service: String,
    /// What it lists; None: there is no list yet.
    pub addresses: Option<BTreeSet<SocketAddr>>,
    /// The apiserver that tells of changes, while one does.
    pub through: Option<SocketAddr>,
    /// When the list was last heard of.
    pub heard: Option<SystemTime>,
    /// Why nobody tells, or what was told is not believed.
    pub problem: Option<String>,
}

/// The lists of a configuration's services. Clones share what is known; the last one to go stops asking.
#[derive(Clone, Debug)]
pub struct Discovery {
    known: watch::Receiver<BTreeMap<String, Known>>,
    candidates: Arc<watch::Sender<Candidates>>,
    _tasks: Arc<JoinSet<()>>,
}

fn origin(discover: &Discover) -> String {
    format!("{}/{}", discover.namespace, discover.service)
}

/// What is wrong with the kubeconfigs of a configuration's services, as far as the files say: the service's name and the
/// reason. An absent one is fine: it may come later.
pub fn wrong_servers(config: &Config) -> Vec<(String, String)> {
    let discovers = config.services.iter().filter_map(|it| Some((&it.name, it.discover.as_ref()?)));
    let wrong = |(name, discover): (&String, &Discover)| {
        let path = &discover.kubeconfig;
        let contents = kubeconfig::read_file(path).ok()?;
        let kubeconfig = Kubeconfig::parse(&contents, path.parent().unwrap_or(Path::new(""))).ok()?;
        let reason = Server::of(&kubeconfig).err()?;
        Some((name.clone(), format!("the server of kubeconfig {} {reason}", path.display())))
    };
    discovers.filter_map(wrong).collect()
}

/// The kubeconfigs that are not there yet, in sentences.
pub fn absent_kubeconfigs(config: &Config) -> Vec<String> {
    let discovers = config.services.iter().filter_map(|it| Some((&it.name, it.discover.as_ref()?)));
    let absent = discovers.filter(|(_, discover)| !discover.kubeconfig.exists());
    let sentence = |(name, discover): (&String, &Discover)| {
        format!(
            "service {name:?}: the kubeconfig {} does not exist; until it does, nothing is discovered",
            discover.kubeconfig.display()
        )
    };
    absent.map(sentence).collect()
}

impl Discovery {
    /// Begins to follow the lists that `config` wants, none if it wants none. What `before` knows of the same is kept
    /// until there is news. Needs a tokio runtime.
    pub fn watch(config: &Config, before: Option<&Self>) -> Self {
        let candidates = before.map(|it| it.candidates.borrow().clone()).unwrap_or_default();
        Self::begin(config, candidates, |service, origin| {
            let known = before?.known.borrow().get(service).cloned()?;
            (known.origin == origin).then_some((known.list?, known.former))
        })
    }

    /// As [`Discovery::watch`], with what a daemon before this one has [remembered](Discovery::remember): the apiservers
    /// may all be away when this one starts.
    pub fn watch_remembered(config: &Config, state_dir: &Path) -> Self {
        let remembered: Remembered = state::load(&state_dir.join(REMEMBERED)).unwrap_or_else(|error| {
            tracing::warn!("cannot read what the cluster listed last, in {}: {error}", state_dir.display());
            Remembered::default()
        });
        Self::begin(config, Candidates::default(), |service, origin| {
            let kept = remembered.get(service).filter(|kept| kept.service == origin)?;
            Some((kept.addresses.clone(), kept.former.clone()))
        })
    }

    fn begin(
        config: &Config,
        candidates: Candidates,
        before: impl Fn(&str, &str) -> Option<(BTreeSet<SocketAddr>, BTreeSet<SocketAddr>)>,
    ) -> Self {
        let services =
            || config.services.iter().filter_map(|service| Some((service, service.discover.clone()?)));
        let first = services().map(|(service, discover)| {
            let origin = origin(&discover);
            let (list, former) = before(&service.name, &origin).unzip();
            let former = former.unwrap_or_default();
            (service.name.clone(), Known::remembered(origin, list).after(former))
        });
        let (sender, known) = watch::channel(first.collect());
        let sender = Arc::new(sender);
        let candidates = Arc::new(watch::Sender::new(candidates));
        let mut tasks = JoinSet::new();
        for (service, discover) in services() {
            let follower = Follower {
                service: service.name.clone(),
                discover,
                own: service.backends.iter().map(|backend| backend.address).collect(),
                known: Arc::clone(&sender),
                candidates: candidates.subscribe(),
                turn: 0,
            };
            tasks.spawn(follower.run());
        }
        if tasks.is_empty() {
            // So that `changed` waits for ever rather than ends.
            tasks.spawn(async move {
                let _sender = sender;
                std::future::pending::<()>().await;
            });
        }
        Self { known, candidates, _tasks: Arc::new(tasks) }
    }

    /// Whether nothing is to be discovered.
    pub fn is_empty(&self) -> bool {
        self.known.borrow().is_empty()
    }

    /// Waits until somebody was asked about every list, with or without success, at most for `limit`.
    pub async fn first_answers(&mut self, limit: Duration) {
        let complete = self.known.wait_for(|known| known.values().all(|it| it.asked));
        // Whoever has not answered by then is said to be asked for by the sentences.
        drop(timeout(limit, complete).await);
        self.known.mark_unchanged();
    }

    /// Waits until a list changes.
    pub async fn changed(&mut self) {
        if self.known.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Says which backends are usable: those are asked first.
    pub fn tell(&self, situation: &Situation) {
        let candidates: Candidates = self
            .known
            .borrow()
            .keys()
            .map(|service| {
                let present = situation.present.get(service).map(Vec::as_slice).unwrap_or_default();
                (service.clone(), present.iter().map(|it| (it.address, it.usable)).collect())
            })
            .collect();
        self.candidates.send_if_modified(|before| {
            let differs = *before != candidates;
            *before = candidates;
            differs
        });
    }

    /// What should be: a configuration with the backends of the file, names included, becomes one with the cluster's.
    pub fn merge(&self, config: &Config, situation: &Situation) -> Wanted {
        merge::merge_all(config, &self.known.borrow(), situation)
    }

    /// Keeps the lists for the next daemon, with what of them is in use. That they cannot be kept is logged.
    pub fn remember(&self, in_use: &Config, state_dir: &Path) {
        let path = state_dir.join(REMEMBERED);
        let known = self.known.borrow();
        let remembered = known.iter().filter_map(|(name, known)| {
            let mut addresses = known.list.clone()?;
            let service = in_use.services.iter().find(|service| service.name == *name)?;
            addresses.extend(service.backends.iter().filter(|it| it.discovered).map(|it| it.address));
            let former = known.former.clone();
            Some((name.clone(), Kept { service: known.origin.clone(), addresses, former }))
        });
        let remembered: Remembered = remembered.collect();
        // Unchanged most of the time: a write that is not made cannot fail.
        if state::load::<Remembered>(&path).is_ok_and(|before| before == remembered) {
            return;
        }
        if let Err(error) = state::save(&path, Some(&remembered).filter(|it| !it.is_empty())) {
            tracing::warn!("{}: cannot keep what the cluster lists: {error}", path.display());
        }
    }

    /// What the operator should know: lists that nobody tells, or that are not believed.
    pub fn sentences(&self) -> Vec<String> {
        let known = self.known.borrow();
        known
            .iter()
            .flat_map(|(service, known)| {
                known.sentences().into_iter().map(move |sentence| format!("{service}: {sentence}"))
            })
            .collect()
    }

    /// What is known of a service's list; None: it is not to be discovered.
    pub fn report(&self, service: &str) -> Option<Report> {
        let known = self.known.borrow().get(service).cloned()?;
        Some(Report {
            problem: known.problem().map(str::to_owned),
            service: known.origin,
            addresses: known.list,
            through: known.through,
            heard: known.heard,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(discover: &str) -> Config {
        let text = format!(
            "[[service]]\nname = \"api\"\nlisten = [\"192.0.2.1:6443\"]\nbackends = [\"10.0.0.1:6443\"]\n{discover}"
        );
        Config::parse(&text, "test.toml").unwrap().0
    }

    const DISCOVER: &str = "discover = { kubeconfig = \"/nowhere/kubeconfig\" }";

    fn addresses(config: &Config) -> Vec<String> {
        config.services[0].backends.iter().map(|backend| backend.address.to_string()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn without_anything_to_discover_nothing_is_waited_for_and_nothing_changes() {
        let config = config("");
        let mut discovery = Discovery::watch(&config, None);
        discovery.first_answers(Duration::from_secs(2)).await;
        assert!(discovery.is_empty());
        assert!(timeout(Duration::from_secs(3600), discovery.changed()).await.is_err());
        assert_eq!(discovery.merge(&config, &Situation::default()).config, config);
        assert_eq!(discovery.sentences(), Vec::<String>::new());
    }

    #[tokio::test]
    async fn the_last_list_is_there_for_the_next_daemon_and_for_nobody_else() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join(REMEMBERED);
        let config = config(DISCOVER);
        let first = Discovery::watch_remembered(&config, directory.path());
        first.remember(&config, directory.path());
        assert!(!file.exists(), "there is no list");
        let kept = r#"{"api": {"service": "default/kubernetes", "addresses": ["10.0.0.2:6443"]}}"#;
        std::fs::write(&file, kept).unwrap();
        let mut next = Discovery::watch_remembered(&config, directory.path());
        let merged = next.merge(&config, &Situation::default()).config;
        assert_eq!(addresses(&merged), ["10.0.0.1:6443", "10.0.0.2:6443"]);
        next.first_answers(Duration::from_secs(20)).await;
        let sentences = next.sentences();
        assert!(sentences[0].contains("/nowhere/kubeconfig does not exist yet"), "{sentences:?}");
        assert!(sentences[0].contains("the last list is used: 10.0.0.2:6443"), "{sentences:?}");

        // What is held is known to the next one as well.
        let mut held = merged.clone();
        held.services[0].backends[1].address = "10.0.0.3:6443".parse().unwrap();
        next.remember(&held, directory.path());
        let after = Discovery::watch_remembered(&config, directory.path());
        let merged = after.merge(&config, &Situation::default()).config;
        assert_eq!(addresses(&merged), ["10.0.0.1:6443", "10.0.0.2:6443", "10.0.0.3:6443"]);

        let other = self::config("discover = { kubeconfig = \"/nowhere/kubeconfig\", service = \"other\" }");
        let other_list = Discovery::watch_remembered(&other, directory.path());
        assert_eq!(other_list.merge(&other, &Situation::default()).config, other);
        let reloaded = Discovery::watch(&config, Some(&after));
        assert_eq!(reloaded.merge(&config, &Situation::default()).config, merged);
    }

    #[tokio::test]
    async fn a_broken_file_is_no_list() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(REMEMBERED), "{").unwrap();
        let config = config(DISCOVER);
        let discovery = Discovery::watch_remembered(&config, directory.path());
        assert_eq!(discovery.merge(&config, &Situation::default()).config, config);
    }

    #[test]
    fn a_kubeconfig_that_is_not_there_is_said_and_a_server_that_cannot_be_asked_too() {
        let absent = absent_kubeconfigs(&config(DISCOVER));
        assert!(absent[0].contains("/nowhere/kubeconfig does not exist"), "{absent:?}");
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kubeconfig");
        let text = "current-context: c\ncontexts: [{name: c, context: {cluster: c}}]\n\
                    clusters: [{name: c, cluster: {server: 'http://a', insecure-skip-tls-verify: true}}]\n";
        std::fs::write(&path, text).unwrap();
        let wrong = wrong_servers(&config(&format!("discover = {{ kubeconfig = {path:?} }}")));
        assert_eq!(wrong[0].0, "api");
        assert!(wrong[0].1.ends_with("is not an https:// URL"), "{wrong:?}");
    }
}
