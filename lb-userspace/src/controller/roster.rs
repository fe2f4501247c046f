//! Which numbers services, listeners and backends have in the data path. Pure.
//!
//! Slots name listeners and backends by number, so a number's address never changes, and a number that was taken out
//! is nobody's until no slot and no running program can name it any more ([`Phase`]). What comes back meanwhile, at
//! the same address, gets its old number, and its flows with it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use lb_common::layout;

use crate::{
    config::Config,
    dataplane::{Known, KnownBackend, KnownListener},
};

/// The number of a service of which only this is known: there was one. Too large for a real one.
const SOMEBODY: usize = usize::MAX;

/// Who has which number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Roster {
    /// Names by number, from 0.
    services: BTreeMap<usize, String>,
    /// Numbers of services that were taken out, until a grace period is over.
    closed_services: BTreeSet<usize>,
    /// By id, from 1.
    listeners: BTreeMap<u16, Seat>,
    /// By id, from 1.
    backends: BTreeMap<u8, Seat>,
}

/// An address under its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seat {
    /// Never changes.
    pub(super) address: SocketAddr,
    /// It is this host (backends only).
    pub(super) local: bool,
    /// The service it belongs to, or how far it has come on its way out.
    pub(super) holder: Holder,
}

/// Whose a number is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holder {
    /// The service with this number.
    Service(usize),
    /// Nobody's any more.
    Leaving(Phase),
}

/// What has happened since a number was taken from its service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// It is out of every table; programs that were running may still use it.
    TakenOut,
    /// A grace period is over: no program makes a new flow with it.
    Unused,
    /// A listener whose flows are over: it is out of its port's list, where programs may still see it.
    Unlinked,
}

/// There are fewer numbers than are needed, counting those that must not be used again yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is no free number for another {0}: those of {0}s that were removed are kept until their last flow ends; \
     remove fewer at a time, or wait"
)]
pub struct NumbersError(pub(super) &'static str);

/// What is to be done in the data path, in an order in which no packet falls between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A service begins under a number that nobody has.
    OpenService(usize),
    /// A backend begins under a number that nobody has.
    AddBackend(u8),
    /// A listener begins under a number that nobody has, or is linked again.
    PlaceListener(u16, usize),
    /// A listener, with its flows, is another service's from now on.
    MoveListener(u16, usize),
    /// A listener takes no new flows any more.
    RetireListener(u16),
    /// A backend gets no new flows any more.
    RetireBackend(u8),
    /// A service has neither listeners nor backends any more.
    CloseService(usize),
}

impl Roster {
    /// The numbers for a configuration: what stays keeps its own, the rest gets free ones. `local` says which
    /// addresses are this host's.
    pub(super) fn next(&self, config: &Config, local: impl Fn(IpAddr) -> bool) -> Result<Self, NumbersError> {
        let mut next = Self { closed_services: self.closed_services.clone(), ..Self::default() };
        let taken =
            |number: &usize| self.services.contains_key(number) || self.closed_services.contains(number);
        let mut free = (0..layout::SERVICES as usize - 1).filter(|number| !taken(number));
        let mut numbers = Vec::with_capacity(config.services.len());
        for service in &config.services {
            let number =
                self.service(&service.name).or_else(|| free.next()).ok_or(NumbersError("service"))?;
            next.services.insert(number, service.name.clone());
            numbers.push(number);
        }
        next.closed_services
            .extend(self.services.keys().filter(|number| !next.services.contains_key(number)));
        let wanted = |pick: fn(&crate::config::Service) -> Vec<SocketAddr>| -> Vec<(usize, SocketAddr)> {
            let of = |(service, number): (&crate::config::Service, &usize)| {
                pick(service).into_iter().map(|address| (*number, address)).collect::<Vec<_>>()
            };
            config.services.iter().zip(&numbers).flat_map(of).collect()
        };
        let listeners = wanted(|service| service.listen.clone());
        let backends = wanted(|service| service.backends.iter().map(|it| it.address).collect());
        next.listeners =
            seat(&self.listeners, &listeners, 1..=layout::LISTENERS as u16 - 1, |_| false, "listener")?;
        next.backends = seat(&self.backends, &backends, 1..=u8::MAX, local, "backend")?;
        Ok(next)
    }

    /// The numbers in maps of a daemon before this one, as `config` names the services: a service is the one that has
    /// its listeners.
    pub(super) fn known(config: &Config, known: &Known) -> Self {
        let number = |listener: &KnownListener| listener.service.filter(|_| listener.open);
        let numbers: BTreeSet<_> = known.listeners.iter().filter_map(number).collect();
        // No service can have such a name.
        let mut services: BTreeMap<_, _> =
            numbers.iter().map(|number| (*number, format!("#{number}"))).collect();
        let mut taken = BTreeSet::new();
        for service in &config.services {
            let its = known.listeners.iter().filter(|listener| service.listen.contains(&listener.address));
            if let Some(number) = its.filter_map(number).find(|number| taken.insert(*number)) {
                services.insert(number, service.name.clone());
            }
        }
        let listener = |before: &KnownListener| {
            let holder = match before.service {
                _ if !before.open => Holder::Leaving(Phase::Unlinked),
                service => Holder::Service(service.unwrap_or(SOMEBODY)),
            };
            (before.id, Seat { address: before.address, local: false, holder })
        };
        let backend = |before: &KnownBackend| {
            let KnownBackend { id, address, local, .. } = *before;
            (id, Seat { address, local, holder: Holder::Service(SOMEBODY) })
        };
        Self {
            services,
            closed_services: BTreeSet::new(),
            listeners: known.listeners.iter().map(listener).collect(),
            backends: known.backends.iter().map(backend).collect(),
        }
    }

    /// The number of a service.
    pub(super) fn service(&self, name: &str) -> Option<usize> {
        self.services.iter().find(|(_, known)| *known == name).map(|(number, _)| *number)
    }

    /// The id of a service's backend.
    pub(super) fn backend(&self, service: usize, address: SocketAddr) -> Option<u8> {
        holder_of(&self.backends, service, address)
    }

    /// Every listener that the data path knows, those that leave included.
    pub(super) fn listeners(&self) -> &BTreeMap<u16, Seat> {
        &self.listeners
    }

    /// Every backend that the data path knows, those that leave included.
    pub(super) fn backends(&self) -> &BTreeMap<u8, Seat> {
        &self.backends
    }

    /// From these numbers to others.
    pub(super) fn steps_to(&self, next: &Self) -> Vec<Step> {
        let mut begin = Vec::new();
        let mut end = Vec::new();
        begin.extend(
            next.services.keys().filter(|it| !self.services.contains_key(it)).copied().map(Step::OpenService),
        );
        begin.extend(
            next.backends.keys().filter(|it| !self.backends.contains_key(it)).copied().map(Step::AddBackend),
        );
        for (id, seat) in &next.listeners {
            let before = self.listeners.get(id).map(|seat| seat.holder);
            match (before, seat.holder) {
                (None | Some(Holder::Leaving(Phase::Unlinked)), Holder::Service(service)) => {
                    begin.push(Step::PlaceListener(*id, service));
                }
                (Some(before), Holder::Service(service)) if before != seat.holder => {
                    begin.push(Step::MoveListener(*id, service));
                }
                (Some(Holder::Service(_)), Holder::Leaving(_)) => end.push(Step::RetireListener(*id)),
                _ => {}
            }
        }
        for (id, seat) in &next.backends {
            let had_service = self.backends.get(id).is_some_and(|seat| seat.is_held());
            if had_service && !seat.is_held() {
                end.push(Step::RetireBackend(*id));
            }
        }
        end.extend(
            self.services
                .keys()
                .filter(|it| !next.services.contains_key(it))
                .copied()
                .map(Step::CloseService),
        );
        begin.extend(end);
        begin
    }

    /// Whether something is on its way out.
    pub(super) fn is_leaving(&self) -> bool {
        let leaves = |seat: &Seat| !seat.is_held();
        !self.closed_services.is_empty()
            || self.listeners.values().any(leaves)
            || self.backends.values().any(leaves)
    }

    /// Whether something waits for a grace period.
    pub(super) fn awaits_grace(&self) -> bool {
        let awaits = |seat: &Seat| matches!(seat.holder, Holder::Leaving(Phase::TakenOut | Phase::Unlinked));
        !self.closed_services.is_empty()
            || self.listeners.values().any(awaits)
            || self.backends.values().any(awaits)
    }

    /// A grace period is over that began after the last change.
    pub(super) fn grace_is_over(&mut self) {
        self.closed_services.clear();
        self.listeners.retain(|_, seat| seat.holder != Holder::Leaving(Phase::Unlinked));
        for seat in self.listeners.values_mut().chain(self.backends.values_mut()) {
            if seat.holder == Holder::Leaving(Phase::TakenOut) {
                seat.holder = Holder::Leaving(Phase::Unused);
            }
        }
    }

    /// The whole flow table was looked through after a grace period: `named` says which numbers it names. Backends
    /// that it does not are free now; listeners are to be unlinked, which are returned.
    pub(super) fn scanned(
        &mut self,
        backend_is_named: impl Fn(u8) -> bool,
        listener_is_named: impl Fn(u16) -> bool,
    ) -> Vec<(u16, SocketAddr)> {
        let unused = |seat: &Seat| seat.holder == Holder::Leaving(Phase::Unused);
        self.backends.retain(|id, seat| !unused(seat) || backend_is_named(*id));
        let mut unlinked = Vec::new();
        for (id, seat) in self.listeners.iter_mut().filter(|(_, seat)| unused(seat)) {
            if !listener_is_named(*id) {
                seat.holder = Holder::Leaving(Phase::Unlinked);
                unlinked.push((*id, seat.address));
            }
        }
        unlinked
    }
}

impl Seat {
    /// The service it belongs to.
    pub(super) fn service(&self) -> Option<usize> {
        match self.holder {
            Holder::Service(number) => Some(number),
            Holder::Leaving(_) => None,
        }
    }

    /// Does it belong to a service?
    pub(super) fn is_held(&self) -> bool {
        self.service().is_some()
    }
}

fn holder_of<I: Copy>(seats: &BTreeMap<I, Seat>, service: usize, address: SocketAddr) -> Option<I> {
    let wanted = |seat: &Seat| (seat.holder, seat.address) == (Holder::Service(service), address);
    seats.iter().find(|(_, seat)| wanted(seat)).map(|(id, _)| *id)
}

/// Seats those who are wanted, and keeps the seats of those who are not for a while.
fn seat<I: Copy + Ord>(
    before: &BTreeMap<I, Seat>,
    wanted: &[(usize, SocketAddr)],
    ids: impl Iterator<Item = I>,
    local: impl Fn(IpAddr) -> bool,
    what: &'static str,
) -> Result<BTreeMap<I, Seat>, NumbersError> {
    let mut after = BTreeMap::new();
    let mut newcomers = Vec::new();
    for (service, address) in wanted {
        match holder_of(before, *service, *address) {
            Some(id) => drop(after.insert(id, before[&id].clone())),
            None => newcomers.push((*service, *address)),
        }
    }
    let mut free = ids.filter(|id| !before.contains_key(id));
    for (service, address) in newcomers {
        let local = local(address.ip());
        let returns = |(id, seat): &(&I, &Seat)| {
            !after.contains_key(*id) && (seat.address, seat.local) == (address, local)
        };
        let id = match before.iter().find(returns) {
            Some((id, _)) => *id,
            None => free.next().ok_or(NumbersError(what))?,
        };
        after.insert(id, Seat { address, local, holder: Holder::Service(service) });
    }
    for (id, seat) in before {
        let leaves = if seat.is_held() { Holder::Leaving(Phase::TakenOut) } else { seat.holder };
        after.entry(*id).or_insert_with(|| Seat { holder: leaves, ..seat.clone() });
    }
    Ok(after)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Services with their listeners and backends, each by a small number.
    type Sketch = Vec<(u8, Vec<u8>, Vec<u8>)>;

    /// A configuration with service `s<n>`, listeners at port 6000 + n, backends at 10.0.0.n.
    fn config(sketch: &Sketch) -> Config {
        let mut text = String::new();
        for (service, listeners, backends) in sketch {
            let listen: Vec<_> =
                listeners.iter().map(|it| format!("10.0.1.100:{}", 6000 + u16::from(*it))).collect();
            let backends: Vec<_> = backends.iter().map(|it| format!("10.0.0.{it}:6443")).collect();
            text += &format!(
                "[[service]]\nname = \"s{service}\"\nlisten = {listen:?}\nbackends = {backends:?}\n"
            );
        }
        Config::parse(&text, "test.toml").unwrap().0
    }

    fn next(roster: &Roster, sketch: &Sketch) -> Roster {
        roster.next(&config(sketch), |_| false).unwrap()
    }

    fn ids(roster: &Roster) -> Vec<(u8, SocketAddr, Holder)> {
        roster.backends.iter().map(|(id, seat)| (*id, seat.address, seat.holder)).collect()
    }

    fn address(last: u8) -> SocketAddr {
        ([10, 0, 0, last], 6443).into()
    }

    fn known_listener(id: u16, last: u8, service: usize) -> KnownListener {
        let address = ([10, 0, 1, 100], 6000 + u16::from(last)).into();
        KnownListener { id, address, service: Some(service), open: true }
    }

    fn known_backend(id: u8, last: u8) -> KnownBackend {
        KnownBackend { id, address: address(last), local: false, accepts: true }
    }

    #[test]
    fn after_a_restart_everybody_keeps_their_numbers_whatever_the_order_is_now() {
        let known = Known {
            listeners: vec![known_listener(1, 1, 0), known_listener(2, 2, 1)],
            backends: vec![known_backend(1, 1), known_backend(3, 3)],
            ..Known::default()
        };
        let sketch = vec![(9, vec![9], vec![4]), (2, vec![2], vec![3]), (1, vec![1], vec![1])];
        let before = Roster::known(&config(&sketch), &known);
        let after = next(&before, &sketch);
        assert_eq!(["s9", "s2", "s1"].map(|name| after.service(name)), [Some(2), Some(1), Some(0)]);
        assert_eq!(
            before.steps_to(&after),
            [Step::OpenService(2), Step::AddBackend(2), Step::PlaceListener(3, 2)],
            "nothing else is touched"
        );
        assert_eq!(
            ids(&after),
            [
                (1, address(1), Holder::Service(0)),
                (2, address(4), Holder::Service(2)),
                (3, address(3), Holder::Service(1))
            ]
        );
    }

    #[test]
    fn after_a_restart_what_is_not_configured_any_more_leaves() {
        let retired = KnownListener { service: None, ..known_listener(3, 3, 0) };
        let unlinked = KnownListener { open: false, ..known_listener(4, 4, 0) };
        let known = Known {
            listeners: vec![known_listener(1, 1, 0), known_listener(2, 2, 1), retired, unlinked],
            backends: vec![known_backend(1, 1), known_backend(2, 2)],
            ..Known::default()
        };
        let sketch = vec![(2, vec![2], vec![2])];
        let before = Roster::known(&config(&sketch), &known);
        let after = next(&before, &sketch);
        assert_eq!(
            before.steps_to(&after),
            [Step::RetireListener(1), Step::RetireListener(3), Step::RetireBackend(1), Step::CloseService(0)]
        );
        let back = vec![(1, vec![1, 4], vec![1]), (2, vec![2, 3], vec![2])];
        assert_eq!(
            before.steps_to(&next(&Roster::known(&config(&back), &known), &back)),
            [Step::MoveListener(3, 1), Step::PlaceListener(4, 0)],
            "all have come back"
        );
    }

    #[test]
    fn a_backend_that_has_become_this_host_is_another() {
        let known = Known { backends: vec![known_backend(1, 1)], ..Known::default() };
        let sketch = vec![(1, vec![1], vec![1])];
        let before = Roster::known(&config(&sketch), &known);
        let after = before.next(&config(&sketch), |_| true).unwrap();
        assert_eq!(after.backend(0, address(1)), Some(2), "it is reached in another way");
    }

    #[test]
    fn at_first_ids_follow_the_configuration() {
        let roster = next(&Roster::default(), &vec![(0, vec![1, 2], vec![1, 2]), (1, vec![3], vec![1])]);
        assert_eq!(
            ids(&roster),
            [
                (1, address(1), Holder::Service(0)),
                (2, address(2), Holder::Service(0)),
                (3, address(1), Holder::Service(1))
            ]
        );
        assert_eq!(roster.listeners.keys().copied().collect::<Vec<_>>(), [1, 2, 3]);
    }

    #[test]
    fn an_id_is_nobodys_until_no_slot_names_it_and_then_it_is_used_again() {
        let mut roster = next(&Roster::default(), &vec![(0, vec![1], vec![1, 2])]);
        let shrunk = next(&roster, &vec![(0, vec![1], vec![2])]);
        assert_eq!(roster.steps_to(&shrunk), [Step::RetireBackend(1)]);
        roster = shrunk;
        roster = next(&roster, &vec![(0, vec![1], vec![2, 3])]);
        assert_eq!(roster.backend(0, address(3)), Some(3), "a new one takes a new id");

        roster.scanned(|_| false, |_| false);
        assert!(roster.backends.contains_key(&1), "no grace period is over");
        roster.grace_is_over();
        roster.scanned(|id| id == 1, |_| true);
        assert!(roster.backends.contains_key(&1) && roster.is_leaving(), "a slot names it");
        roster.scanned(|_| false, |_| true);
        assert!(!roster.backends.contains_key(&1) && !roster.is_leaving());
        assert_eq!(next(&roster, &vec![(0, vec![1], vec![2, 3, 4])]).backend(0, address(4)), Some(1));
    }

    #[test]
    fn who_comes_back_to_the_same_address_has_its_id_again() {
        let roster = next(&Roster::default(), &vec![(0, vec![1], vec![1, 2])]);
        let without = next(&roster, &vec![(0, vec![1], vec![2])]);
        let again = next(&without, &vec![(0, vec![1], vec![1, 2])]);
        assert_eq!(again.backend(0, address(1)), Some(1));
        assert_eq!(without.steps_to(&again), [], "the id is known; checks decide about new flows");
    }

    #[test]
    fn a_renamed_service_keeps_its_listeners_and_backends() {
        let roster = next(&Roster::default(), &vec![(0, vec![1], vec![1])]);
        let renamed = next(&roster, &vec![(7, vec![1], vec![1])]);
        assert_eq!(renamed.service("s7"), Some(1));
        assert_eq!(
            roster.steps_to(&renamed),
            [Step::OpenService(1), Step::MoveListener(1, 1), Step::CloseService(0)]
        );
        assert_eq!(renamed.backend(1, address(1)), Some(1));
    }

    #[test]
    fn a_listener_is_unlinked_after_its_last_flow_and_a_grace_period_later_gone() {
        let roster = next(&Roster::default(), &vec![(0, vec![1, 2], vec![1])]);
        let mut without = next(&roster, &vec![(0, vec![1], vec![1])]);
        assert_eq!(roster.steps_to(&without), [Step::RetireListener(2)]);
        without.grace_is_over();
        assert_eq!(without.scanned(|_| false, |id| id == 2), []);
        let listener = SocketAddr::from(([10, 0, 1, 100], 6002));
        assert_eq!(without.scanned(|_| false, |_| false), [(2, listener)]);
        assert!(without.awaits_grace());
        let again = next(&without, &vec![(0, vec![1, 2], vec![1])]);
        assert_eq!(without.steps_to(&again), [Step::PlaceListener(2, 0)], "linked again, under its number");
        without.grace_is_over();
        assert!(!without.listeners.contains_key(&2) && !without.is_leaving());
    }

    #[test]
    fn when_all_numbers_are_taken_nothing_is_guessed() {
        let every: Vec<u8> = (1..=255).collect();
        let mut roster = next(&Roster::default(), &vec![(0, vec![1], every[..254].to_vec())]);
        roster = next(&roster, &vec![(0, vec![1], vec![1, 255])]);
        let error =
            roster.next(&config(&vec![(0, vec![1], vec![1, 255]), (1, vec![2], vec![7, 8])]), |_| false);
        assert!(error.is_ok(), "7 and 8 come back to their numbers");
        let error =
            roster.next(&config(&vec![(0, vec![1], vec![1, 255]), (1, vec![2], vec![1, 255])]), |_| false);
        assert_eq!(error, Err(NumbersError("backend")));
    }

    /// What the maps say about listeners and backends: address, and the service of new flows.
    #[derive(Clone, Debug, Default, PartialEq, Eq)]
    struct Maps {
        services: BTreeSet<usize>,
        listeners: BTreeMap<u16, (SocketAddr, Option<usize>)>,
        backends: BTreeMap<u8, SocketAddr>,
        in_tables: BTreeSet<u8>,
    }

    impl Maps {
        fn of(roster: &Roster) -> Self {
            let linked = |seat: &&Seat| seat.holder != Holder::Leaving(Phase::Unlinked);
            Self {
                services: roster.services.keys().copied().collect(),
                listeners: roster
                    .listeners
                    .iter()
                    .filter(|(_, seat)| linked(seat))
                    .map(|(id, seat)| (*id, (seat.address, seat.service())))
                    .collect(),
                backends: roster.backends.iter().map(|(id, seat)| (*id, seat.address)).collect(),
                in_tables: roster
                    .backends
                    .iter()
                    .filter(|(_, seat)| seat.is_held())
                    .map(|(id, _)| *id)
                    .collect(),
            }
        }

        /// As the controller does it, and with what the data path asks for.
        fn apply(&mut self, step: Step, next: &Roster) {
            match step {
                Step::OpenService(number) => assert!(self.services.insert(number)),
                Step::AddBackend(id) => {
                    assert!(self.backends.insert(id, next.backends[&id].address).is_none(), "{id} was used");
                }
                Step::PlaceListener(id, service) => {
                    assert!(self.services.contains(&service));
                    let entry = (next.listeners[&id].address, Some(service));
                    assert!(self.listeners.insert(id, entry).is_none(), "{id} was linked");
                }
                Step::MoveListener(id, service) => {
                    assert!(self.services.contains(&service));
                    self.listeners.get_mut(&id).expect("linked").1 = Some(service);
                }
                Step::RetireListener(id) => self.listeners.get_mut(&id).expect("linked").1 = None,
                Step::RetireBackend(id) => assert!(self.in_tables.remove(&id)),
                Step::CloseService(number) => {
                    assert!(self.services.remove(&number));
                    assert!(self.listeners.values().all(|(_, service)| *service != Some(number)));
                }
            }
        }

        /// Selections follow from the checks, for whoever belongs to a service and is known.
        fn select(&mut self, next: &Roster) {
            let held = |id: &u8| next.backends.get(id).is_some_and(Seat::is_held);
            self.in_tables.extend(self.backends.keys().copied().filter(held));
        }
    }

    fn sketch() -> impl Strategy<Value = Sketch> {
        let service = (
            0_u8..4,
            proptest::collection::btree_set(1_u8..9, 1..3),
            proptest::collection::btree_set(1_u8..9, 1..5),
        );
        proptest::collection::vec(service, 1..4)
            .prop_map(|services| {
                let mut names = BTreeSet::new();
                let mut taken = BTreeSet::new();
                let mut sketch = Sketch::new();
                for (name, listeners, backends) in services {
                    let listeners: Vec<_> = listeners.into_iter().filter(|it| taken.insert(*it)).collect();
                    if !listeners.is_empty() && names.insert(name) {
                        sketch.push((name, listeners, backends.into_iter().collect()));
                    }
                }
                sketch
            })
            .prop_filter("some service is left", |sketch| !sketch.is_empty())
    }

    /// What may happen between two reloads: a grace period, and a look through a table that names these ids.
    fn between() -> impl Strategy<Value = (bool, Option<u64>)> {
        (any::<bool>(), proptest::option::of(any::<u64>()))
    }

    proptest! {
        #[test]
        fn applying_the_difference_to_the_old_gives_the_new(
            history in proptest::collection::vec((sketch(), between()), 1..12)
        ) {
            let mut roster = Roster::default();
            let mut maps = Maps::default();
            for (sketch, (grace, named)) in history {
                let after = next(&roster, &sketch);
                for step in roster.steps_to(&after) {
                    maps.apply(step, &after);
                    maps.select(&after);
                }
                // Who comes back to their number needs no step.
                maps.select(&after);
                prop_assert_eq!(&maps, &Maps::of(&after));
                // Whoever has a number keeps its address.
                for (id, seat) in &roster.backends {
                    prop_assert_eq!(seat.address, after.backends[id].address);
                }
                for (id, seat) in &roster.listeners {
                    prop_assert_eq!(seat.address, after.listeners[id].address);
                }
                for (service, listeners, backends) in &sketch {
                    let number = after.service(&format!("s{service}")).unwrap();
                    for it in backends {
                        prop_assert!(after.backend(number, address(*it)).is_some());
                    }
                    let own = |seat: &&Seat| seat.holder == Holder::Service(number);
                    prop_assert_eq!(after.listeners.values().filter(own).count(), listeners.len());
                }
                prop_assert_eq!(after.steps_to(&next(&after, &sketch)), [], "the same again changes nothing");
                roster = after;
                if grace {
                    roster.grace_is_over();
                }
                if let Some(named) = named {
                    let named = |id: u64| named >> (id % 64) & 1 == 1;
                    roster.scanned(|id| named(id.into()), |id| named(id.into()));
                }
                maps = Maps::of(&roster);
            }
        }
    }
}
