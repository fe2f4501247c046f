//! Backends that leave the cluster's list. Nobody checks them afterwards, and so nobody would find out that one of them is
//! dead and reset the flows it has: before it goes it is asked how it is. The list itself does not tell: it drops an apiserver
//! that restarts, and one that was frozen for 15 s.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::{Controller, backends::Backend};
use crate::{
    admin::JournalKind,
    config::{CheckKind, Service},
    discovery::{Leave, Wanted},
    health::State,
};

/// One that has neither answered nor been found silent by then is said to be silent: it may be our own host that cannot ask.
const ASKED_FOR: Duration = Duration::from_secs(10);

/// Those that are leaving, by service and address.
pub(super) type Partings = BTreeMap<(String, SocketAddr), Parting>;

/// A backend that is leaving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Parting {
    /// Whoever has answered later may go.
    since: Instant,
    /// Without new flows since then; None: it gets some.
    unchosen: Option<Instant>,
    /// The journal has it.
    said: bool,
}

/// What is known of a backend's life.
#[derive(Clone, Copy, Debug)]
struct Signs {
    state: State,
    /// When its last check ended, if that was answered, in whatever way.
    answered: Option<Instant>,
    /// How many flows it had, and when that was counted.
    flows: Option<(u64, Instant)>,
}

impl Parting {
    fn leave(&self, signs: &Signs, now: Instant) -> Leave {
        let answers = signs.answered.is_some_and(|answered| answered > self.since);
        let is_idle = |(flows, counted): (u64, Instant)| {
            flows == 0 && self.unchosen.is_some_and(|unchosen| counted > unchosen)
        };
        if signs.state == State::Dead || answers || signs.flows.is_some_and(is_idle) {
            Leave::Granted
        } else if signs.state == State::Silent || now.saturating_duration_since(self.since) > ASKED_FOR {
            Leave::Silent
        } else {
            Leave::Asked
        }
    }
}

impl Controller {
    /// Whether a backend may go when it is not listed any more.
    pub(super) fn leave(&self, service: &Service, backend: &Backend) -> Leave {
        // Nobody's death is looked for, or nothing would come of it.
        let is_unwatched = service.check.kind == CheckKind::None || !self.resets_when_dead(backend);
        if is_unwatched || backend.state == State::Dead {
            return Leave::Granted;
        }
        let Some(parting) = self.taken.partings.get(&(service.name.clone(), backend.address)) else {
            return Leave::Asked;
        };
        // Flows in doubt count: anyone can bring them into it.
        let id = usize::from(backend.id);
        let flows = self.reaped.active.get(id).zip(self.reaped.doubted.get(id));
        let flows = flows.map(|(active, doubted)| (active + doubted, self.reaped_at));
        let signs = Signs { state: backend.state, answered: backend.answered(), flows };
        parting.leave(&signs, Instant::now())
    }

    /// Has those checked that begin to leave, and forgets those that have gone or come back.
    pub(super) fn look_after_the_leaving(&mut self, wanted: &Wanted) {
        let now = Instant::now();
        let mut before = std::mem::take(&mut self.taken.partings);
        for (service, leaving) in &wanted.leaving {
            for (address, leave) in leaving {
                let numbers = self.services.iter().find(|(_, it)| it.name == *service);
                let Some((number, _)) = numbers else { continue };
                let of_it = |it: &&Backend| it.target.service == number && it.address == *address;
                let Some(backend) = self.backends.iter().find(of_it) else { continue };
                let key = (service.clone(), *address);
                let begin = Parting { since: now, unchosen: None, said: false };
                let mut parting = before.remove(&key).unwrap_or(begin);
                if *leave == Leave::Asked {
                    self.checks.check_now(backend.target);
                }
                let chosen = self.is_chosen(backend.id);
                parting.unchosen = parting.unchosen.filter(|_| !chosen).or((!chosen).then_some(now));
                if *leave == Leave::Silent && !std::mem::replace(&mut parting.said, true) {
                    let text =
                        format!("{address} left the cluster's list, does not answer, and is kept for now");
                    self.journal.note(JournalKind::Reload, None, format!("{service}: {text}"));
                }
                self.taken.partings.insert(key, parting);
            }
        }
        for ((service, address), _) in before.into_iter().filter(|(_, parting)| parting.said) {
            let text = format!("{service}: {address} is kept for the sake of its flows no longer");
            tracing::info!("{text}");
            self.journal.note(JournalKind::Reload, None, text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn who_answers_is_dead_or_has_no_flows_may_go_and_nobody_else() {
        let start = Instant::now();
        let at = |seconds: u32| start + SECOND * seconds;
        let parting = Parting { since: at(100), unchosen: Some(at(101)), said: false };
        let leave = |state, answered, flows| parting.leave(&Signs { state, answered, flows }, at(105));
        assert_eq!(leave(State::Ready, Some(at(99)), None), Leave::Asked, "that was before");
        assert_eq!(leave(State::Ready, Some(at(102)), None), Leave::Granted);
        assert_eq!(leave(State::Draining, Some(at(102)), Some((9, at(104)))), Leave::Granted);
        assert_eq!(leave(State::Silent, None, Some((9, at(104)))), Leave::Silent);
        assert_eq!(leave(State::Unknown, None, None), Leave::Asked);
        assert_eq!(leave(State::Dead, None, Some((9, at(104)))), Leave::Granted);
        assert_eq!(leave(State::Silent, None, Some((0, at(101)))), Leave::Silent, "counted too early");
        assert_eq!(leave(State::Silent, None, Some((0, at(102)))), Leave::Granted);
        let chosen = Parting { unchosen: None, ..parting };
        let signs = Signs { state: State::Ready, answered: None, flows: Some((0, at(104))) };
        assert_eq!(chosen.leave(&signs, at(105)), Leave::Asked, "the next flow may be its first");
        assert_eq!(chosen.leave(&signs, at(111)), Leave::Silent, "nobody could ask it for too long");
    }
}
