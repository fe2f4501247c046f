//! Where backends come from beside the configuration file: names that are looked up, and what the cluster lists.
//!
//! Both become a configuration as if somebody had written the addresses into the file, so that whatever they change is
//! applied as a reload is, and by nothing else.

use std::{path::Path, sync::Arc, time::Duration};

use crate::{
    config::Config,
    discovery::{Discovery, Situation, Wanted},
    names::Names,
};

/// The sources of one configuration. Clones share what is known.
#[derive(Clone, Debug)]
pub struct Sources {
    /// As it was read.
    file: Arc<Config>,
    names: Names,
    discovery: Discovery,
}

impl Sources {
    /// Begins to ask for what `file` wants. What `before` knows of the same is kept until there is an answer.
    pub fn watch(file: &Config, before: Option<&Self>) -> Self {
        Self {
            names: Names::watch(file, before.map(|it| &it.names)),
            discovery: Discovery::watch(file, before.map(|it| &it.discovery)),
            file: Arc::new(file.clone()),
        }
    }

    /// The same, with what a daemon before this one has remembered.
    pub fn watch_remembered(file: &Config, state_dir: &Path) -> Self {
        Self {
            names: Names::watch_remembered(file, state_dir),
            discovery: Discovery::watch_remembered(file, state_dir),
            file: Arc::new(file.clone()),
        }
    }

    /// Waits until every name was looked up once, with or without success, at most for `limit`. The cluster is not waited
    /// for: it may be this daemon that leads there.
    pub async fn first_answers(&mut self, limit: Duration) {
        self.names.first_answers(limit).await;
    }

    /// Waits until the addresses of a name or a list change.
    pub async fn changed(&mut self) {
        tokio::select! {
            () = self.names.changed() => {}
            () = self.discovery.changed() => {}
        }
    }

    /// What should be, as things are.
    pub fn apply(&self, situation: &Situation) -> Wanted {
        self.discovery.tell(situation);
        let (config, problems) = self.names.apply(&self.file);
        let wanted = self.discovery.merge(&config, situation);
        Wanted { problems: problems.into_iter().chain(wanted.problems).collect(), ..wanted }
    }

    /// The configuration with the names in place, and nothing of the cluster's.
    pub fn without_the_cluster(&self) -> Config {
        self.names.apply(&self.file).0
    }

    /// Keeps what is known now for the next daemon.
    pub fn remember(&self, in_use: &Config) {
        let state_dir = &in_use.dataplane.state_dir;
        self.names.remember(state_dir);
        self.discovery.remember(in_use, state_dir);
    }

    /// What the operator should know.
    pub fn sentences(&self) -> Vec<String> {
        self.names.sentences().into_iter().chain(self.discovery.sentences()).collect()
    }

    /// What the cluster lists.
    pub fn discovery(&self) -> &Discovery {
        &self.discovery
    }
}
