//! A backend's state is another, and everybody is told: the log, the journal, the service manager.

use super::{Controller, backends::Backend};
use crate::{
    admin::JournalKind,
    config::OnDead,
    health::{Fate, State, Transition, transition_line},
    systemd,
};

impl Controller {
    /// Tells of a transition that the backend at this place has made just now.
    pub(super) fn tell_transition(&mut self, index: usize, transition: &Transition) {
        let backend = &self.backends[index];
        let number = backend.target.service;
        let of_service = || self.backends.iter().filter(|it| it.target.service == number);
        let ready = of_service().filter(|it| it.state == State::Ready).count();
        let (service, name) = (self.services[number].name.clone(), backend.name.clone());
        let fate = self.fate_of_flows(backend);
        let line = transition_line(&service, &name, transition, fate, ready, of_service().count());
        if transition.is_down() {
            tracing::warn!("{line}");
        } else {
            tracing::info!("{line}");
        }
        self.journal.note(JournalKind::Check, Some((&service, &name)), line);
        systemd::status(&self.short_summary());
    }

    /// What becomes of a backend's flows if it is dead, as things are now.
    fn fate_of_flows(&self, backend: &Backend) -> Fate {
        match self.services[backend.target.service].on_dead {
            OnDead::Keep => Fate::Kept,
            OnDead::Reset if !self.resets_when_dead(backend) => Fate::OperatorsTurn,
            OnDead::Reset if backend.local => Fate::OfThisHost,
            OnDead::Reset if self.is_elsewhere(backend) => Fate::Elsewhere,
            OnDead::Reset => Fate::Reset,
        }
    }
}
