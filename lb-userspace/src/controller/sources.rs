//! Names that move and lists that change while the daemon runs: what they make of the configuration is applied as a
//! reload is.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use super::{Controller, parting::Partings, reload::Answer};
use crate::{
    admin::{Caller, JournalKind},
    config::Config,
    discovery::{Present, Situation, Wanted},
    health::State,
    sources::Sources,
};

/// After so long, what could not be applied is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(60);

/// What was last made of the sources.
#[derive(Debug, Default)]
pub(super) struct Taken {
    /// What was said already.
    said: BTreeSet<String>,
    /// Services whose lists are held.
    held: BTreeSet<String>,
    pub(super) partings: Partings,
    /// A configuration that was tried and is not in use, and when: what was in its way may go by itself.
    tried: Option<(Config, Instant)>,
    /// A reload that an operator wants, and that waits for one of ours.
    pub(super) queued: Option<(Option<Caller>, Answer)>,
}

impl Controller {
    /// Hears of sources that change from now on. The configuration is one that [`Sources::apply`] made.
    pub fn follow_sources(&mut self, sources: Sources) {
        sources.remember(&self.config);
        let wanted = sources.apply(&self.situation());
        self.taken.said = wanted.sentences().into_iter().collect();
        self.sources = Some(sources);
    }

    /// Uses what names stand for now, and what the cluster lists. Where that cannot be, a flag says so.
    pub(super) async fn take_in_sources(&mut self) {
        // A reload that is under way looks at them again when it is over.
        let Some(sources) = self.sources.clone().filter(|_| self.pending.is_none()) else { return };
        if self.take_in(&sources).await {
            sources.remember(&self.config);
        }
    }

    /// The same, for what depends on who is usable: which changes without news from the cluster.
    pub(super) async fn review_sources(&mut self) {
        let sources = self.sources.clone().filter(|it| !it.discovery().is_empty() && self.pending.is_none());
        if let Some(sources) = sources {
            self.take_in(&sources).await;
        }
    }

    /// Returns whether everything is as it should be already.
    async fn take_in(&mut self, sources: &Sources) -> bool {
        let wanted = sources.apply(&self.situation());
        self.say_what_is_new(&wanted);
        self.look_after_the_leaving(&wanted);
        if wanted.config == self.config {
            self.taken.tried = None;
            return true;
        }
        if self.was_tried(&wanted.config).is_some_and(|since| since.elapsed() < TRY_AGAIN) {
            return false;
        }
        let by = self.who_wants(&wanted.config);
        let decided = self.decide(wanted.config.clone(), sources.clone(), Vec::new()).await;
        self.taken.tried = Some((wanted.config, Instant::now()));
        self.proceed(decided, by, None).await;
        if let Some(pending) = &mut self.pending {
            pending.is_ours = true;
        }
        false
    }

    /// Begins the reload that has waited, as soon as it may.
    pub(super) fn begin_queued_reload(&mut self) {
        if self.pending.is_none()
            && self.naming.is_none()
            && let Some((by, answer)) = self.taken.queued.take()
        {
            self.begin_reload(by, answer);
        }
    }

    fn was_tried(&self, wanted: &Config) -> Option<Instant> {
        self.taken.tried.as_ref().filter(|(config, _)| config == wanted).map(|(_, since)| *since)
    }

    /// How the backends of every service are.
    pub(super) fn situation(&self) -> Situation {
        let present = self.services.iter().map(|(number, service)| {
            let backends = self.backends.iter().filter(|backend| backend.target.service == number);
            let present = backends.map(|backend| {
                let choice = self.choices.get(&(number, backend.address.is_ipv6()));
                let usable = choice.is_some_and(|choice| choice.has(backend.id));
                Present {
                    address: backend.address,
                    discovered: backend.discovered,
                    ready: usable && backend.state == State::Ready,
                    usable,
                    leave: self.leave(service, backend),
                }
            });
            (service.name.clone(), present.collect())
        });
        let here = self.network.local_addresses();
        Situation { present: present.collect(), here: here.iter().map(|local| local.address).collect() }
    }

    fn who_wants(&self, wanted: &Config) -> String {
        let mut services = self.config.services.iter().zip(&wanted.services);
        let the_cluster =
            services.any(|(is, wanted)| is.backends != wanted.backends && is.discover.is_some());
        let who = if the_cluster { "the cluster's list of backends" } else { "the names of backends" };
        who.to_owned()
    }

    fn say_what_is_new(&mut self, wanted: &Wanted) {
        let sentences: BTreeSet<_> = wanted.sentences().into_iter().collect();
        for sentence in sentences.difference(&self.taken.said) {
            tracing::warn!("{sentence}");
        }
        let held: BTreeSet<_> = wanted.held.keys().cloned().collect();
        for service in held.difference(&self.taken.held) {
            let text = "the cluster's list is held: no usable backend would be left".to_owned();
            self.journal.note(JournalKind::Reload, None, format!("{service}: {text}"));
        }
        for service in self.taken.held.difference(&held) {
            let text = format!("{service}: the cluster's list is not held any more");
            tracing::info!("{text}");
            self.journal.note(JournalKind::Reload, None, text);
        }
        (self.taken.said, self.taken.held) = (sentences, held);
    }

    /// What the operator should know about the sources.
    pub(super) fn source_flags(&self) -> Vec<String> {
        let Some(sources) = &self.sources else { return Vec::new() };
        let wanted = sources.apply(&self.situation());
        let services = self.config.services.iter().zip(&wanted.config.services);
        let declined = self.pending.is_none() && self.was_tried(&wanted.config).is_some();
        let unused =
            services.filter(|(is, wanted)| declined && is.backends != wanted.backends).map(|(is, _)| {
                let whose = if is.discover.is_some() {
                    "the cluster's list has"
                } else {
                    "a backend's name stands for"
                };
                format!(
                    "{}: {whose} other addresses now, which are not used: `sheave reload` says why",
                    is.name
                )
            });
        sources.sentences().into_iter().chain(wanted.sentences()).chain(unused).collect()
    }
}

/// Waits for news; for ever, where there are no sources.
pub(super) async fn news(sources: &mut Option<Sources>) {
    match sources {
        Some(sources) => sources.changed().await,
        None => std::future::pending().await,
    }
}
