//! `sheave reload`: from one configuration to another while packets flow.
//!
//! Everything that can be wrong is found out before anything is changed: the file, what needs a restart, what the host
//! says about the new addresses, and whether a new listener's port is a flow's. Then new backends are added and checked
//! (for a second at most, so that they can take over at once); then listeners, selections and services change, each in
//! one store; and what is gone drains: it gets no new flows, and its number is nobody's until its last flow has ended
//! ([`super::roster`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use tokio::{
    sync::oneshot,
    task::{JoinError, JoinHandle},
    time::Instant,
};

use super::{
    Controller, backends, check_files, difference,
    plan::{self, Source, Survey, Ways},
    ports::Ports,
    room::source_shares,
    roster::{Roster, Seat, Step},
    services::Services,
    steps::idle_policy,
};
use crate::{
    admin::{Caller, JournalKind, Refusal, RefusalKind, Reloaded},
    config::{Config, Interfaces, VipMode},
    dataplane::{DataplaneError, wait_grace_period},
    discovery::absent_kubeconfigs,
    health::{Event, State, TargetId},
    network::{first_ephemeral_port, mode_for, used_tcp_ports},
    sources::Sources,
};

/// How long the first checks of new backends are waited for, before the old ones are let go.
const FIRST_CHECKS: Duration = Duration::from_secs(1);
/// How long new names are waited for. One that takes longer is told by the log when it is known.
const FIRST_NAMES: Duration = Duration::from_millis(500);

/// Who is told how it went; None: it was a signal.
pub(super) type Answer = Option<oneshot::Sender<Result<Reloaded, Refusal>>>;

/// A reload that waits for the first checks of new backends.
#[derive(Debug)]
pub(super) struct Pending {
    config: Config,
    sources: Sources,
    roster: Roster,
    steps: Vec<Step>,
    snat: Vec<IpAddr>,
    checks_use_slots: bool,
    awaited: BTreeSet<TargetId>,
    /// No longer than this.
    pub(super) deadline: Instant,
    by: String,
    /// Names or the cluster's list want it, nobody is waiting for it.
    pub(super) is_ours: bool,
    answer: Answer,
    reloaded: Reloaded,
}

impl Pending {
    /// Takes note of a finished check. Returns whether there is nothing left to wait for.
    pub(super) fn observe(&mut self, event: &Event) -> bool {
        self.awaited.remove(&event.id) && self.awaited.is_empty()
    }
}

/// A reload that waits for what new names stand for.
#[derive(Debug)]
pub(super) struct Naming {
    warnings: Vec<String>,
    /// Comes to its end when every name was looked up, or has had its time.
    sources: JoinHandle<Sources>,
    by: String,
    answer: Answer,
}

impl Naming {
    /// Comes to its end once. May be dropped and called again before.
    pub(super) async fn looked_up(&mut self) -> Result<Sources, JoinError> {
        (&mut self.sources).await
    }
}

/// What a reload has found out, before anything is changed.
pub(super) struct Decided {
    config: Config,
    sources: Sources,
    reloaded: Reloaded,
    roster: Roster,
    steps: Vec<Step>,
    backends: Vec<backends::Backend>,
    ports: Ports,
    /// What new flows are to leave from.
    snat: Vec<IpAddr>,
    checks_use_slots: bool,
}

fn conflict(error: impl Into<String>) -> Refusal {
    Refusal::new(RefusalKind::Conflict, error)
}

/// The numbers of services that have a backend under another name than before.
fn services_with_renamed_backends(before: &Config, services: &Services) -> BTreeSet<usize> {
    let names = |service: &crate::config::Service| -> BTreeSet<_> {
        service.backends.iter().map(|backend| (backend.address, backend.name.clone())).collect()
    };
    let is_renamed = |(number, service): (usize, &crate::config::Service)| {
        let old = before.services.iter().find(|it| it.name == service.name)?;
        let (old, new) = (names(old), names(service));
        let another = |(address, name): &(std::net::SocketAddr, String)| {
            old.iter().any(|(known, before)| known == address && before != name)
        };
        new.iter().any(another).then_some(number)
    };
    services.iter().filter_map(is_renamed).collect()
}

impl Controller {
    /// Reads the file again and begins to apply it. Whoever asked is answered here if it is refused, else at the end. A
    /// signal, which has no answer, is never lost: the file is read again when the reload that is under way is over.
    pub(super) fn begin_reload(&mut self, by: Option<Caller>, answer: Answer) {
        // One that nobody asked for is over in a second: the operator does not hear of it.
        if self.pending.as_ref().is_some_and(|pending| pending.is_ours) && self.taken.queued.is_none() {
            self.taken.queued = Some((by, answer));
            return;
        }
        let by = by.map_or_else(|| "a SIGHUP".to_owned(), |caller| caller.to_string());
        if self.pending.is_some() || self.naming.is_some() {
            if answer.is_none() {
                self.reload_again = true;
                return;
            }
            return self.refuse(&by, answer, conflict("another reload is under way: try again in a second"));
        }
        match self.read_file() {
            Err(refusal) => self.refuse(&by, answer, refusal),
            Ok((config, warnings)) => {
                // Those that are known already are kept.
                let mut sources = Sources::watch(&config, self.sources.as_ref());
                let sources = tokio::spawn(async move {
                    sources.first_answers(FIRST_NAMES).await;
                    sources
                });
                self.naming = Some(Naming { warnings, sources, by, answer });
            }
        }
    }

    /// Reads the file again after all, if a signal has said so while a reload was under way.
    pub(super) fn reload_again(&mut self) {
        if self.reload_again && self.pending.is_none() && self.naming.is_none() {
            self.reload_again = false;
            self.begin_reload(None, None);
        }
    }

    /// Goes on with a reload, now that its names are known as far as they are.
    pub(super) async fn go_on_reloading(&mut self, sources: Result<Sources, JoinError>) {
        let Some(Naming { mut warnings, by, answer, .. }) = self.naming.take() else { return };
        let decided = match sources {
            Ok(sources) => {
                let wanted = sources.apply(&self.situation());
                warnings.extend(wanted.sentences());
                self.decide(wanted.config, sources, warnings).await
            }
            Err(error) => Err(Refusal::new(RefusalKind::Failed, format!("looking up names: {error}"))),
        };
        self.proceed(decided, by, answer).await;
    }

    pub(super) async fn proceed(&mut self, decided: Result<Decided, Refusal>, by: String, answer: Answer) {
        match decided {
            Err(refusal) => self.refuse(&by, answer, refusal),
            Ok(decided) => match self.prepare(decided, by.clone()).await {
                Ok(pending) => {
                    let waits = !pending.awaited.is_empty();
                    self.pending = Some(Pending { answer, ..pending });
                    if !waits {
                        self.finish_reload();
                    }
                }
                Err(error) => {
                    let error = format!("the kernel refused to take a new service or backend: {error}");
                    self.refuse(&by, answer, Refusal::new(RefusalKind::Failed, error));
                }
            },
        }
    }

    fn refuse(&mut self, by: &str, answer: Answer, refusal: Refusal) {
        tracing::error!("the configuration was not reloaded, nothing has changed: {}", refusal.error);
        let first = refusal.error.lines().next().unwrap_or_default();
        self.journal.note(JournalKind::Reload, None, format!("reload by {by} refused: {first}"));
        if let Some(answer) = answer {
            // Whoever asked may have gone meanwhile.
            let _ = answer.send(Err(refusal));
        }
    }

    fn read_file(&self) -> Result<(Config, Vec<String>), Refusal> {
        let wrong = |error: String| Refusal::new(RefusalKind::Configuration, error);
        let (config, warnings) = Config::load(&self.config_file).map_err(|error| wrong(error.to_string()))?;
        check_files(&config).map_err(|error| wrong(error.to_string()))?;
        let warnings = warnings.iter().map(crate::config::Diagnostic::one_line);
        let warnings = warnings.chain(absent_kubeconfigs(&config)).collect();
        Ok((config, warnings))
    }

    /// Finds out what is to be done, and whether it can be.
    pub(super) async fn decide(
        &mut self,
        config: Config,
        sources: Sources,
        warnings: Vec<String>,
    ) -> Result<Decided, Refusal> {
        let wrong = |error: String| Refusal::new(RefusalKind::Configuration, error);
        let keys = difference::needs_restart(&self.config, &config);
        let of_the_table: Vec<_> =
            keys.iter().filter(|key| difference::FLOW_TABLE.contains(key)).copied().collect();
        if !of_the_table.is_empty() {
            return Err(conflict(format!(
                "{} cannot change without a new flow table, in which open connections end: `sheave unload`, then \
                 start it again, or `sheave run --replace-layout`; nothing of the file was applied",
                of_the_table.join(", ")
            )));
        }
        if !keys.is_empty() {
            return Err(conflict(format!(
                "{} cannot change while sheave runs and needs a restart (`systemctl restart sheave`): \
                 nothing of the file was applied",
                keys.join(", ")
            )));
        }
        if config.needs_hook() && !self.dataplane.is_hooked() {
            return Err(conflict(
                "a listener on loopback, or pods = true, needs the connect hook, which this host did not take: see the \
                 log of the start, and restart (`systemctl restart sheave`) when that is put right",
            ));
        }
        let survey = Survey::make(&config, &self.network)
            .await
            .map_err(|error| Refusal::new(RefusalKind::Failed, error.to_string()))?;
        let source = self.check_sources(&config, &survey)?;
        let ports = if config.forwards_packets() {
            self.check_interfaces(&survey, &source.addresses).await?
        } else {
            self.ports.clone()
        };
        let local = |address: IpAddr| survey.here.contains(&address);
        let roster = self.roster.next(&config, local).map_err(|full| conflict(full.to_string()))?;
        let backends = backends::enumerate(&config, &roster).map_err(|error| wrong(error.to_string()))?;
        let steps = self.roster.steps_to(&roster);
        self.check_listener_ports(&roster, &steps)?;
        self.keep_slots_from_sockets_on(&source.addresses).await?;
        self.look_at_veths().await;
        let warnings = warnings.into_iter().chain(self.veth_flags.iter().cloned()).collect();
        let mut reloaded = Reloaded { changes: difference::changes(&self.config, &config), warnings };
        reloaded.changes.extend(difference::of_snat_addresses(&self.snat, &source.addresses));
        let checks_use_slots = source.is_used_by_checks(&survey.reach);
        let snat = source.addresses;
        Ok(Decided { config, sources, reloaded, roster, steps, backends, ports, snat, checks_use_slots })
    }

    /// Of addresses that flows may leave from soon: what sockets of this host hold there must not become a slot.
    async fn keep_slots_from_sockets_on(&mut self, addresses: &[IpAddr]) -> Result<(), Refusal> {
        let new: Vec<_> = addresses.iter().filter(|address| !self.snat.contains(address)).copied().collect();
        if !new.is_empty() {
            let failed = |error| format!("cannot list the sockets of this host: {error}");
            let used =
                used_tcp_ports(&new).await.map_err(|it| Refusal::new(RefusalKind::Failed, failed(it)))?;
            self.used_ports.extend(used);
            self.block();
        }
        Ok(())
    }

    /// What flows are to leave from: addresses that the flow table has room for, and its slots.
    fn check_sources(&self, config: &Config, survey: &Survey) -> Result<Source, Refusal> {
        let restart = "that needs a restart (`systemctl restart sheave`)";
        let mut source =
            Source::choose(config, &survey.homes, &survey.reach, &survey.addresses, first_ephemeral_port());
        let ports = self.dataplane.snat_ports();
        // As a start would, which finds the flow table with these.
        source.keep(&self.snat, ports.clone(), config, &survey.addresses);
        let vips = plan::vips(config);
        let family = |vip: &&IpAddr| self.snat.iter().any(|address| address.is_ipv4() == vip.is_ipv4());
        if let Some(vip) = vips.iter().find(|vip| !family(vip)) {
            return Err(conflict(format!(
                "listener address {vip} is the first of its family, for which there is no flow table: `sheave run \
                 --replace-layout` makes another, in which open connections end"
            )));
        }
        self.dataplane
            .check_snat_addresses(&source.addresses)
            .map_err(|error| conflict(error.to_string()))?;
        // As the flow table is divided: in whole groups of sets.
        if !source.fits(&ports) {
            return Err(conflict(format!(
                "flows would leave from {}, with ports {}-{}, and the flow table was made for ports {}-{}: name these as \
                 dataplane.snat_ports, or make another table (`sheave run --replace-layout`), in which open connections \
                 end",
                difference::list(&source.addresses),
                source.ports.start(),
                source.ports.end(),
                ports.start(),
                ports.end()
            )));
        }
        let before = plan::vips(&self.config);
        let same = vips.iter().all(|vip| before.contains(vip)) && vips.len() == before.len();
        if self.config.vip.mode == VipMode::Own && !same {
            return Err(conflict(format!("with vip.mode = \"own\", other VIPs than before: {restart}")));
        }
        Ok(source)
    }

    /// Whatever leads to a new backend or VIP must have the program.
    async fn check_interfaces(&self, survey: &Survey, snat: &[IpAddr]) -> Result<Ports, Refusal> {
        let mut ports = self.ports.clone();
        let ways = Ways::of(&self.network, snat, &survey.reach, &survey.addresses).await;
        for (backend, interface) in &ways.out {
            // A port that cannot be had is refused below.
            if let Ok(port) = self.network.port_of(*interface)
                && let Ok(number) =
                    ports.number_or_append(&self.network, &port, self.mode_to_keep(port.index))
                && let Err(reason) = self.answers_by(&ports, number)
            {
                return Err(conflict(format!("{backend}: {reason}")));
            }
        }
        let backends = ways.out.into_iter();
        let vips = survey.homes.iter().filter_map(|(vip, home)| Some((*vip, (*home)?)));
        let named = matches!(self.config.dataplane.interfaces, Interfaces::Named(_));
        let homes: BTreeSet<_> = survey.homes.values().flatten().copied().collect();
        for (address, interface) in backends.chain(vips) {
            let Ok(port) = self.network.port_of(interface) else { continue };
            // As at the start: where the operator has named interfaces, a VIP may be at home on another.
            if named && homes.contains(&interface) && !ports.bases().contains(&port.index) {
                continue;
            }
            if let Err(reason) = ports.number_or_append(&self.network, &port, self.mode_to_keep(port.index)) {
                return Err(conflict(format!("{address}: {reason}")));
            }
        }
        for (address, interface) in ways.back {
            let Ok(port) = self.network.port_of(interface) else { continue };
            if let Err(reason) = ports.number_or_append(&self.network, &port, self.mode_to_keep(port.index))
                && !named
            {
                return Err(conflict(format!("replies to {address}: {reason}")));
            }
        }
        for index in ports.bases() {
            // What was so at the start can be another bond by now, or have another mode.
            let Ok(base) = self.network.interface(index) else { continue };
            mode_for(&base, ports.is_tagged(index), self.mode_to_keep(index)).map_err(conflict)?;
        }
        Ok(ports)
    }

    /// A packet to a listener's port is a client's, also if it is a backend's reply to the slot of that number: so no
    /// flow may have it. From now on no new one gets it.
    fn check_listener_ports(&mut self, next: &Roster, steps: &[Step]) -> Result<(), Refusal> {
        let placed = steps.iter().filter_map(|step| match step {
            Step::PlaceListener(id, _) => Some(next.listeners()[id].address),
            _ => None,
        });
        let listeners: Vec<_> = placed.collect();
        self.wanted_ports = listeners.iter().map(|listener| listener.port()).collect();
        if listeners.is_empty() {
            return Ok(());
        }
        let failed = |error: String| Refusal::new(RefusalKind::Failed, error);
        self.wanted_ports.iter().for_each(|port| self.dataplane.block(*port));
        wait_grace_period().map_err(|error| failed(format!("membarrier: {error}")))?;
        for listener in listeners {
            let flows =
                self.dataplane.flows_on(listener.port()).map_err(|error| failed(error.to_string()))?;
            let Some(flow) = flows.first().map(|flow| self.named(flow)) else { continue };
            let backend = flow.backend.or(flow.backend_address.map(|it| it.to_string())).unwrap_or_default();
            return Err(conflict(format!(
                "listener {listener}: port {} is in use as the source port of a flow from {} to {backend} ({}), whose \
                 replies the listener would take. New flows do not get it any more: reload again when that one has \
                 ended (at most a minute after it was closed)",
                listener.port(),
                flow.client,
                flow.state
            )));
        }
        Ok(())
    }

    /// Adds what is new, so that it can be checked. Of the old nothing is taken away; services that stay have their new
    /// settings from now on.
    async fn prepare(&mut self, decided: Decided, by: String) -> Result<Pending, DataplaneError> {
        let Decided { config, sources, reloaded, roster, steps, backends, ports, snat, checks_use_slots } =
            decided;
        let mut services = Services::of(&config, &roster);
        services.keep(&self.services);
        let before = std::mem::replace(&mut self.services, services);
        let seats = roster.backends();
        if let Err(error) = self.make_ready(&steps, |id| seats.get(&id).map(|it| (it.address, it.local))) {
            self.services = before;
            return Err(error);
        }
        self.ports = ports;
        self.write_ports();
        self.resets.watch_over(&self.services, std::time::Instant::now());
        self.carry_orders_over(&config);
        let awaited = self.merge_backends(backends);
        self.update_checks();
        self.resolve().await;
        Ok(Pending {
            config,
            sources,
            roster,
            steps,
            snat,
            checks_use_slots,
            awaited,
            deadline: Instant::now() + FIRST_CHECKS,
            by,
            is_ours: false,
            answer: None,
            reloaded,
        })
    }

    /// Takes in the new backends, before those that stay for now; what is known of an id is known of it still. Returns
    /// those that were never checked.
    fn merge_backends(&mut self, new: Vec<backends::Backend>) -> BTreeSet<TargetId> {
        let before = std::mem::take(&mut self.backends);
        let mut awaited = BTreeSet::new();
        for mut backend in new {
            let same = |it: &&backends::Backend| it.target == backend.target;
            let known = before.iter().find(same).or_else(|| before.iter().find(|it| it.id == backend.id));
            match known {
                Some(known) => backend.take_over(known),
                // It was removed, and has come back before its flows were all ended for that.
                None => self.spare_flows_of(backend.id),
            }
            let service = &self.services[backend.target.service].name;
            backend.obey(&self.orders.about(service, backend.address));
            if backend.state == State::Unknown {
                awaited.insert(backend.target);
            }
            self.backends.push(backend);
        }
        for old in before {
            if !self.backends.iter().any(|backend| backend.target == old.target) {
                self.backends.push(old);
            }
        }
        awaited
    }

    fn update_checks(&mut self) {
        let targets = backends::targets(&self.services, &self.backends);
        // What checks see of the dead is silence.
        let seen = |state| if state == State::Dead { State::Silent } else { state };
        let states: BTreeMap<_, _> = self.backends.iter().map(|it| (it.target, seen(it.state))).collect();
        self.checks.update(targets, |id| states.get(&id).copied().unwrap_or(State::Unknown));
    }

    /// Lets the new configuration take over from the old.
    pub(super) fn finish_reload(&mut self) {
        let Some(pending) = self.pending.take() else { return };
        let Pending { config, sources, roster, steps, snat, checks_use_slots, by, answer, reloaded, .. } =
            pending;
        // Before a new listener may need them. Until it is known where the new ones are at home, backends answer by any port.
        if snat != self.snat {
            self.dataplane.set_clients_only([]);
        }
        let moved = self.dataplane.set_snat_addresses(&snat).map_err(|error| error.to_string());
        if moved.is_ok() {
            (self.snat, self.checks_use_slots) = (snat, checks_use_slots);
        }
        self.write_clients_only();
        let (before, before_config) = (self.services.clone(), self.config.clone());
        let old_listeners = self.roster.listeners().clone();
        let allow: BTreeMap<_, _> =
            before_config.services.iter().map(|it| (it.name.clone(), it.allow.clone())).collect();
        self.services = Services::of(&config, &roster);
        self.resets.watch_over(&self.services, std::time::Instant::now());
        let renamed = services_with_renamed_backends(&before_config, &self.services);
        let wanted: BTreeSet<_> = self
            .backends
            .iter()
            .filter(|it| roster.backend(it.target.service, it.address) == Some(it.id))
            .map(|it| it.target)
            .collect();
        self.part_with_the_removed(&wanted);
        self.backends.retain(|backend| wanted.contains(&backend.target));
        self.resets.forget_others(&self.backends);
        self.sockets.forget_others(&self.backends);
        self.witnesses.retain(|id, _| self.backends.iter().any(|backend| backend.id == *id));
        self.roster = roster;
        self.config = config;
        self.dataplane.set_source_shares(source_shares(&self.config));
        self.dataplane.set_path_mtu_floor(self.config.dataplane.path_mtu_floor);
        sources.remember(&self.config);
        self.sources = Some(sources);
        self.update_checks();
        // Who gets new flows, before listeners are given to other services. Names are part of a selection, and a family that
        // a service does not listen on any more has none.
        let listens = |number: usize, ipv6: bool| {
            let mut listen = self.services.get(number).into_iter().flat_map(|service| &service.listen);
            listen.any(|listener| listener.is_ipv6() == ipv6)
        };
        self.choices.retain(|(number, ipv6), _| !renamed.contains(number) && listens(*number, *ipv6));
        for number in self.services.numbers() {
            self.select(number, false);
            self.select(number, true);
        }
        self.set_pods();
        let mut failures = self.change_allow_lists(&allow);
        failures.extend(moved.err());
        failures.extend(self.change_over(steps, |id| {
            let service = old_listeners.get(&id).and_then(Seat::service);
            service.and_then(|number| before.get(number)).map(idle_policy)
        }));
        self.wanted_ports.clear();
        self.block();
        failures.extend(self.orders.forget_others(&self.config).err().map(|error| error.to_string()));
        self.vips.follow(plan::vips(&self.config));
        self.probes.send_replace(self.probe_targets());
        self.reloaded = true;
        self.announce(&by, answer, reloaded, &failures);
    }

    fn change_allow_lists(&mut self, before: &BTreeMap<String, Vec<ipnet::IpNet>>) -> Vec<String> {
        let changed: Vec<_> = self
            .services
            .iter()
            .filter(|(_, service)| before.get(&service.name).is_some_and(|allow| *allow != service.allow))
            .map(|(number, service)| (number, service.allow.clone()))
            .collect();
        let results = changed.iter().map(|(number, allow)| self.dataplane.set_allowed(*number, allow));
        results.filter_map(|result| result.err().map(|error| error.to_string())).collect()
    }

    fn announce(&mut self, by: &str, answer: Answer, reloaded: Reloaded, failures: &[String]) {
        for warning in &reloaded.warnings {
            tracing::warn!("{warning}");
        }
        for change in &reloaded.changes {
            tracing::info!("reloaded: {change}");
            self.journal.note(JournalKind::Reload, None, format!("{change} (reload by {by})"));
        }
        if reloaded.changes.is_empty() {
            tracing::info!("reloaded: the file says what already is");
            self.journal.note(JournalKind::Reload, None, format!("reload by {by}: nothing to change"));
        }
        let result = if failures.is_empty() {
            Ok(reloaded)
        } else {
            let error =
                format!("the configuration is in use, but not all of it worked: {}", failures.join("; "));
            tracing::error!("{error}");
            Err(Refusal::new(RefusalKind::Failed, error))
        };
        if let Some(answer) = answer {
            // Whoever asked may have gone meanwhile.
            let _ = answer.send(result);
        }
    }

    /// Lets numbers that were taken out be used again, once nothing can name them: after the flow table was looked
    /// through.
    pub(super) fn release_numbers(&mut self) {
        if self.pending.is_some() || !self.roster.is_leaving() {
            return;
        }
        let named_backends = &self.reaped.named_backends;
        let named_listeners = &self.reaped.named_listeners;
        let is_named = |named: &[bool], id: usize| named.get(id).copied().unwrap_or(true);
        let unlinked = self
            .roster
            .scanned(|id| is_named(named_backends, id.into()), |id| is_named(named_listeners, id.into()));
        for (id, address) in unlinked {
            self.dataplane.remove_listener(id, address);
            tracing::info!("the last flow of the removed listener {address} has ended");
        }
        self.block();
    }

    /// Before the flow table is looked through: what was taken out before this is used by no program afterwards.
    pub(super) fn await_programs(&mut self) {
        if self.pending.is_none() && self.roster.awaits_grace() {
            match wait_grace_period() {
                Ok(()) => self.roster.grace_is_over(),
                Err(error) => tracing::warn!("membarrier: {error}"),
            }
        }
    }
}
