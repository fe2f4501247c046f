//! The controller: the one place where what should be (configuration, check results, the network around) becomes what
//! is (the data path's maps). A single task that takes events and applies the difference.

mod answering;
mod backends;
mod commands;
mod difference;
mod endings;
mod error;
mod flags;
mod flow_list;
mod hash_key;
mod hook;
mod journal;
mod liveness;
mod local_servers;
mod members;
mod next_hops;
mod orders;
mod parting;
mod plan;
mod ports;
mod probe_targets;
mod reload;
mod resets;
mod returning;
mod room;
mod roster;
mod selection;
mod services;
mod sockets;
mod sources;
mod status;
mod steps;
mod taken_off;
mod transitions;
mod ways_back;
mod witness;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::{join_all, try_join_all};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinError,
    time::{MissedTickBehavior, interval},
};

use crate::{
    admin::{Events, JournalKind, ProbeTarget, Request, Unloaded},
    config::{Check, Config, VipMode, XdpMode},
    dataplane::{Attached, Dataplane, DataplaneError, Mode, Reaped, Target},
    discovery,
    health::{self, Event, State, Transition},
    network::{
        CARRIER_WAIT, Change, Interface, Kind, Network, Port, XdpAttachMode, mode_for, native_obstacle,
        offloads, used_tcp_ports,
    },
    sources::Sources,
    systemd,
    vip::{Follower, Owner, Presence, remove_others},
};

use backends::Backend;
pub use error::ControllerError;
pub use hash_key::{HashKeyError, load as load_hash_key};
pub use hook::HOOK;
use hook::Hook;
use journal::Journal;
use next_hops::{Found, Hop};
use orders::Orders;
pub use plan::{Plan, snat_addresses};
use ports::Ports;
use reload::{Naming, Pending};
use resets::Resets;
use room::{Room, source_shares};
pub use roster::NumbersError;
use roster::{Roster, Step};
use selection::Choice;
use services::Services;
use sockets::{Sockets, reported};
use sources::{Taken, news};
use steps::{RETIRED_IDLE, idle_policy};
use taken_off::TakenOff;
use ways_back::LearnedHops;
use witness::Witness;

/// How often the data path is asked what it has noticed.
const SIGNALS_EVERY: Duration = Duration::from_millis(25);
/// How often neighbours are kept in the kernel's memory, and counters looked at.
const REFRESH_EVERY: u64 = 10;
/// How often look-ups are made short again.
const CLEAR_MARKS_EVERY: u64 = 30;
/// How often the host's own sockets are looked at.
const SOCKETS_EVERY: Duration = Duration::from_secs(10);
/// Between taking the VIP away and the program: for the packets that were on their way.
const LAST_PACKETS: Duration = Duration::from_millis(100);
/// Addresses that are nobody's (RFC 5737, RFC 3849): the way to them is the default route.
const FAR_AWAY: [IpAddr; 2] = [
    IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];

/// Checks the configuration against the files it names.
pub fn check_files(config: &Config) -> Result<(), ControllerError> {
    for service in &config.services {
        health::validate(&service.check)
            .map_err(|source| ControllerError::Check { service: service.name.clone(), source })?;
        let kubeconfig = service.discover.as_ref().map(|discover| discover.kubeconfig.clone());
        if kubeconfig.is_some() {
            health::validate(&Check { kubeconfig, ..Check::default() }).map_err(|source| {
                ControllerError::Discover { service: service.name.clone(), reason: source.to_string() }
            })?;
        }
    }
    if let Some((service, reason)) = discovery::wrong_servers(config).into_iter().next() {
        return Err(ControllerError::Discover { service, reason });
    }
    load_hash_key(config.dataplane.hash_key_file.as_deref()).map_err(ControllerError::HashKey)?;
    Ok(())
}

/// Says which offloads of an interface were switched off.
fn say_off(interface: &str, off: &[String]) {
    if !off.is_empty() {
        tracing::info!("{interface}: switched off {} until `sheave unload`", off.join(", "));
    }
}

/// Why the controller ended.
#[derive(Debug)]
pub enum End {
    /// It was told to.
    Stop,
    /// `sheave unload`, which wants to know what was taken away.
    Unload(oneshot::Sender<Result<Unloaded, String>>),
}

/// What the controller hears from.
#[derive(Debug)]
pub struct Inbox {
    /// Finished checks.
    pub checks: mpsc::Receiver<Event>,
    /// What is different about the network.
    pub network: mpsc::Receiver<Change>,
    /// Questions on the admin socket.
    pub requests: mpsc::Receiver<Request>,
    /// Signals that end the daemon.
    pub stop: mpsc::Receiver<()>,
    /// Signals to read the configuration again.
    pub reload: mpsc::Receiver<()>,
}

/// The controller and all that it keeps.
pub struct Controller {
    config: Config,
    config_file: PathBuf,
    roster: Roster,
    /// What is yet to be done in the data path until it is as the roster says.
    steps: Vec<Step>,
    /// While a reload is under way, those that it ends as well.
    services: Services,
    network: Network,
    dataplane: Dataplane,
    backends: Vec<Backend>,
    ports: Ports,
    snat: Vec<IpAddr>,
    /// Ports that sockets of this host held when last looked at.
    used_ports: BTreeSet<u16>,
    /// Ports of listeners that a reload is about to open, or was refused to.
    wanted_ports: BTreeSet<u16>,
    orders: Orders,
    journal: Journal,
    pending: Option<Pending>,
    naming: Option<Naming>,
    /// A signal to reload came while a reload was under way.
    reload_again: bool,
    /// A reload is over: the addresses of this host and the names of backends are to be looked at anew.
    reloaded: bool,
    /// By service and family (true: IPv6).
    choices: BTreeMap<(usize, bool), Choice>,
    learned: LearnedHops,
    vips: Follower,
    owner: Option<Owner>,
    reaped: Reaped,
    reaped_at: Instant,
    room: Room,
    /// Replies to slots that are not the sender's, counted every ten seconds, the oldest first.
    strangers: VecDeque<u64>,
    /// Segments in backends' names by ports that no backend answers by, counted in the same way.
    elsewhere: VecDeque<u64>,
    checks_use_slots: bool,
    started: Instant,
    turns: u64,
    last_turn: Instant,
    /// What backends by name stand for, and what the cluster lists. None: nobody looks.
    sources: Option<Sources>,
    taken: Taken,
    checks: health::Handle,
    /// By id of the backend.
    witnesses: BTreeMap<u8, Witness>,
    resets: Resets,
    /// Tells those who ask in a backend's name that there are other backends.
    probes: watch::Sender<Vec<Arc<ProbeTarget>>>,
    hook: Hook,
    /// Of the hook.
    sockets: Sockets,
    /// What the operator should know about interfaces, in sentences.
    interface_flags: BTreeSet<String>,
    /// What the operator should know about the other ends of veths, in sentences.
    veth_flags: BTreeSet<String>,
    /// Names of bonds that the program is to be on, and of their members, by the indexes of both.
    bond_members: BTreeMap<(u32, u32), (String, String)>,
    /// Names of interfaces that had the program, and have gone.
    gone_interfaces: BTreeSet<String>,
    /// Indexes of interfaces that should have the program, and could not be given it.
    unattached: BTreeSet<u32>,
    taken_off: TakenOff,
    /// Backends on this host whose server does not listen where it must, in sentences.
    unreached_servers: BTreeSet<String>,
}

impl Controller {
    /// Fills the maps: interfaces, allow lists, backends, ports that must not be slots. In maps of a daemon before this one
    /// everybody keeps their number ([`Plan::adopt`]).
    ///
    /// `config_file` is read again by a reload.
    pub async fn new(
        config: Config,
        config_file: PathBuf,
        network: Network,
        dataplane: Dataplane,
        plan: Plan,
        checks: health::Handle,
    ) -> Result<Self, ControllerError> {
        let now = Instant::now();
        let vips = plan::vips(&config);
        let resets = Resets::open(&plan.services, now)
            .map_err(|source| ControllerError::System { doing: "open raw sockets", source })?;
        let state_dir = &config.dataplane.state_dir;
        let orders = Orders::load(state_dir).unwrap_or_else(|error| {
            tracing::error!("{error}; as nothing can be read there, no backend is drained or in maintenance");
            Orders::none(state_dir)
        });
        let mut controller = Self {
            orders,
            journal: Journal::open(state_dir),
            config_file,
            network,
            dataplane,
            roster: plan.roster,
            steps: plan.steps,
            services: plan.services,
            backends: plan.backends,
            ports: plan.ports,
            snat: plan.source.addresses,
            used_ports: BTreeSet::new(),
            wanted_ports: BTreeSet::new(),
            pending: None,
            naming: None,
            reload_again: false,
            reloaded: false,
            choices: BTreeMap::new(),
            learned: LearnedHops::default(),
            vips: Follower::new(vips),
            owner: None,
            reaped: Reaped::default(),
            reaped_at: now,
            room: Room::default(),
            strangers: VecDeque::new(),
            elsewhere: VecDeque::new(),
            checks_use_slots: plan.checks_use_slots,
            started: now,
            turns: 0,
            last_turn: now,
            sources: None,
            taken: Taken::default(),
            probes: watch::Sender::new(Vec::new()),
            config,
            checks,
            witnesses: BTreeMap::new(),
            resets,
            hook: Hook::default(),
            sockets: Sockets::default(),
            interface_flags: BTreeSet::new(),
            veth_flags: BTreeSet::new(),
            bond_members: BTreeMap::new(),
            gone_interfaces: BTreeSet::new(),
            unattached: BTreeSet::new(),
            taken_off: TakenOff::default(),
            unreached_servers: BTreeSet::new(),
        };
        controller.obey_orders();
        controller.fill()?;
        controller.used_ports = used_tcp_ports(&controller.own_addresses())
            .await
            .map_err(|source| ControllerError::System { doing: "list the sockets of this host", source })?;
        controller.block();
        // Now that no socket's port on them becomes a slot.
        controller.dataplane.set_snat_addresses(&controller.snat)?;
        Ok(controller)
    }

    fn fill(&mut self) -> Result<(), DataplaneError> {
        self.dataplane.set_ports(&self.ports.layout())?;
        self.write_members()?;
        self.bond_members = self.bond_members();
        for (number, service) in self.services.iter() {
            self.dataplane.set_allowed(number, &service.allow)?;
        }
        self.dataplane.set_source_shares(source_shares(&self.config));
        self.dataplane.set_path_mtu_floor(self.config.dataplane.path_mtu_floor);
        self.set_pods();
        let steps = self.steps.clone();
        let seats = self.roster.backends().clone();
        self.make_ready(&steps, |id| seats.get(&id).map(|seat| (seat.address, seat.local)))
    }

    /// The addresses that flows of ours may share with sockets of this host.
    fn own_addresses(&self) -> Vec<IpAddr> {
        let mut addresses = self.snat.clone();
        addresses.extend(plan::vips(&self.config));
        addresses
    }

    /// Keeps slots away from listeners, also from those that leave, and from ports that sockets of this host hold.
    fn block(&mut self) {
        let mut used = self.used_ports.clone();
        used.extend(self.roster.listeners().values().map(|seat| seat.address.port()));
        used.extend(&self.wanted_ports);
        self.dataplane.set_blocked(&used);
    }

    fn obey_orders(&mut self) {
        self.carry_orders_over(&self.config.clone());
        for backend in &mut self.backends {
            let service = &self.services[backend.target.service].name;
            backend.obey(&self.orders.about(service, backend.address));
        }
    }

    /// Takes in the first check results, finds the next hops, gives every service its first selection, and opens the
    /// listeners.
    pub async fn begin(&mut self, results: Vec<Event>) {
        self.resolve().await;
        for event in results {
            self.observe(&event);
        }
        for service in self.services.numbers() {
            for ipv6 in [false, true] {
                self.select(service, ipv6);
            }
        }
        let steps = std::mem::take(&mut self.steps);
        for failure in self.change_over(steps, |_| None) {
            tracing::error!("cannot take away a service that is not configured any more: {failure}");
        }
        let version = env!("CARGO_PKG_VERSION");
        let how =
            if self.dataplane.adopted() { "goes on from where another ended" } else { "began to balance" };
        self.journal.note(JournalKind::Daemon, None, format!("sheave {version} {how}"));
    }

    /// Attaches the program and the connect hook wherever they are not yet, and nowhere else.
    pub async fn attach(&mut self) -> Result<(), ControllerError> {
        if !self.dataplane.adopted() {
            self.dataplane.take_over()?;
        }
        // Before any of them is touched.
        for index in self.ports.bases() {
            self.mode_on(&self.network.interface(index)?)?;
        }
        for described in self.ports.interfaces().into_iter().filter_map(|it| self.network.arrangement(it)) {
            tracing::info!("{described}");
        }
        // Cards may start anew: what checks do not find meanwhile says nothing of the backends.
        self.checks.cut_off(Instant::now() + CARRIER_WAIT);
        let mut had_carrier = Vec::new();
        for index in self.ports.bases() {
            had_carrier.extend(self.attach_to(index).await?.then_some(index));
        }
        self.await_carriers(&had_carrier).await?;
        self.checks.cut_off(Instant::now());
        self.look_at_veths().await;
        self.attach_hook().await?;
        self.leave_others()?;
        // Of a daemon that was killed while it was off an interface.
        if let Err(error) = self.network.lower_guard().await {
            tracing::warn!("{error}: see `ip rule`");
        }
        Ok(())
    }

    /// How the program is to be attached to an interface; None: as its driver can.
    fn mode_on(&self, interface: &Interface) -> Result<Option<Mode>, ControllerError> {
        let tagged = self.ports.is_tagged(interface.index);
        let mode = mode_for(interface, tagged, self.config.dataplane.xdp_mode);
        Ok(match mode.map_err(ControllerError::Arrangement)? {
            XdpMode::Auto => None,
            XdpMode::Native => Some(Mode::Native),
            XdpMode::Generic => Some(Mode::Generic),
        })
    }

    /// Looks whether the other ends of veths take at once what the program sends. What is new is said.
    pub(super) async fn look_at_veths(&mut self) {
        let mut found = BTreeSet::new();
        for attached in self.dataplane.attached().iter().filter(|it| it.mode == Mode::Native) {
            if let Ok(interface) = self.network.interface(attached.interface) {
                found.extend(self.network.veth_warning(&interface).await);
            }
        }
        found.difference(&self.veth_flags).for_each(|warning| tracing::warn!("{warning}"));
        self.veth_flags = found;
    }

    /// Attaches the program to one interface. Returns whether it had a carrier before.
    async fn attach_to(&mut self, index: u32) -> Result<bool, ControllerError> {
        let interface = self.network.interface_now(index).await?;
        let mode = self.mode_on(&interface)?;
        let had_carrier = interface.carrier;
        if !interface.up {
            tracing::warn!("{0} is down: `ip link set {0} up`", interface.name);
        }
        let there = self.network.xdp_programs(index).await?.unwrap_or_default();
        let tagged = self.ports.is_tagged(index);
        let is_ours = self.dataplane.took_over(index);
        if (is_ours || there.is_empty())
            && mode != Some(Mode::Generic)
            && matches!(interface.kind, Kind::Bond(_))
        {
            // The program is there, and not on the bond. In generic mode there is more to do, once that is known.
            for member in self.network.members(index) {
                self.ready_member(index, &member.name, Mode::Native)?;
            }
        }
        let mut harm = BTreeSet::new();
        let state_dir = self.config.dataplane.state_dir.clone();
        let mut turn_off = |mode| {
            let switched = offloads::turn_off(&interface.name, mode == Some(Mode::Generic), &state_dir)?;
            say_off(&interface.name, &switched.off);
            harm.extend(switched.consequences(&interface.name, tagged)?);
            Ok::<_, ControllerError>(())
        };
        if is_ours {
            let generic = there.iter().any(|it| it.mode == XdpAttachMode::Generic);
            let attached = if generic { Mode::Generic } else { Mode::Native };
            let attached = match mode.filter(|mode| *mode != attached) {
                Some(wanted) => self.switch_mode(&interface, attached, wanted).await?,
                None => {
                    self.dataplane.note_attached(Attached {
                        name: interface.name.clone(),
                        interface: index,
                        mode: attached,
                    });
                    attached
                }
            };
            turn_off(Some(attached))?;
            self.note_harm(harm);
            self.see_to_checksums(&interface, attached)?;
            return Ok(had_carrier);
        }
        if there.is_empty() {
            turn_off(mode)?;
        }
        let target = Target {
            name: &interface.name,
            index,
            driver: interface.driver.as_deref().unwrap_or_default(),
            occupied_by: there.first().map(|attached| attached.program),
        };
        let chosen = self.config.dataplane.xdp_mode == XdpMode::Auto && mode == Some(Mode::Generic);
        if let Some(obstacle) = native_obstacle(&interface).filter(|_| chosen) {
            tracing::warn!("{}: attaching in generic mode: slower, but the same", obstacle.reason);
        }
        let attached = self.dataplane.attach(&target, mode)?;
        if mode.is_none() && attached.mode == Mode::Generic {
            turn_off(Some(Mode::Generic))?;
        }
        self.note_harm(harm);
        self.see_to_checksums(&interface, attached.mode)?;
        Ok(had_carrier)
    }

    /// Attaches in another mode than the program is in. The kernel has no step from one to the other (a driver's and a
    /// generic program exclude each other): for some milliseconds packets reach this host's own stack. Flows live on, for
    /// it may not answer meanwhile; new connections wait for their next SYN.
    async fn switch_mode(
        &mut self,
        interface: &Interface,
        from: Mode,
        to: Mode,
    ) -> Result<Mode, ControllerError> {
        let Interface { name, index, driver, .. } = interface;
        if let Err(error) = self.network.raise_guard(&self.silenced()).await {
            tracing::warn!(
                "{name} stays attached in {} mode, because connections would be reset in a change ({error}): `sheave \
                 unload` first",
                from.name()
            );
            self.dataplane.note_attached(Attached { name: name.clone(), interface: *index, mode: from });
            return Ok(from);
        }
        let target =
            Target { name, index: *index, driver: driver.as_deref().unwrap_or_default(), occupied_by: None };
        let result = self.dataplane.detach(*index).and_then(|()| self.dataplane.attach(&target, Some(to)));
        let result = match result {
            Ok(_) => {
                tracing::info!("{name}: attached in {} mode now, {} before", to.name(), from.name());
                Ok(to)
            }
            Err(error) => {
                tracing::error!("{error}; {name} stays in {} mode", from.name());
                self.dataplane.attach(&target, Some(from)).map(|_| from)
            }
        };
        self.network.lower_guard().await?;
        Ok(result?)
    }

    /// Waits until interfaces that had a carrier before they were touched have it again.
    async fn await_carriers(&self, interfaces: &[u32]) -> Result<(), ControllerError> {
        let waits = interfaces.iter().map(|index| self.network.await_carrier(*index, CARRIER_WAIT));
        for interface in try_join_all(waits).await?.iter().filter(|it| !it.carrier) {
            tracing::warn!(
                "{0} has lost its carrier when sheave switched offloads or attached its program, and has none after {1} s: \
                 look at the other end, and at `ip link show {0}` and the kernel's log",
                interface.name,
                CARRIER_WAIT.as_secs()
            );
        }
        Ok(())
    }

    /// What offloads do that stay on.
    fn note_harm(&mut self, sentences: BTreeSet<String>) {
        sentences.iter().for_each(|sentence| tracing::warn!("{sentence}"));
        self.interface_flags.extend(sentences);
    }

    /// Keeps packets from the program whose checksums nobody has finished, as far as it can be done from here; the rest is
    /// said. Where the program is in generic mode, also in the status.
    fn see_to_checksums(&mut self, interface: &Interface, mode: Mode) -> Result<(), ControllerError> {
        let generic = mode == Mode::Generic;
        if let Some(warning) = offloads::unfinished_checksums(interface) {
            tracing::warn!("{warning}");
            self.interface_flags.extend(generic.then_some(warning));
        }
        if generic {
            for member in self.network.members(interface.index) {
                self.ready_member(interface.index, &member.name, mode)?;
            }
        }
        Ok(())
    }

    /// Takes the program off interfaces that lead to no listener or backend any more; while flows of removed ones live on,
    /// not yet.
    fn leave_others(&mut self) -> Result<(), DataplaneError> {
        let mut wanted = self.ports.bases();
        if self.roster.is_leaving() {
            wanted.extend(self.dataplane.linked());
        }
        for index in self.dataplane.leave_others(&wanted)? {
            let name =
                self.network.interface(index).map_or_else(|_| format!("interface {index}"), |it| it.name);
            tracing::info!("took the program off {name}: it leads to no listener or backend any more");
        }
        Ok(())
    }

    /// Puts the VIPs here, if they are ours to put. Then they are watched in either mode.
    pub async fn place_vips(&mut self) -> Result<(), ControllerError> {
        let own = self.config.vip.mode == VipMode::Own;
        let vips = if own { plan::vips(&self.config) } else { Vec::new() };
        // Of a daemon before this one, with another configuration.
        for placed in remove_others(&self.network, &self.config.dataplane.state_dir, &vips).await? {
            tracing::info!(
                "took the VIP {} off {}: it is not ours to put there any more",
                placed.vip,
                placed.interface
            );
        }
        if own {
            let owner = Owner::acquire(&self.network, vips, &self.config.dataplane.state_dir).await?;
            for placed in owner.placed() {
                tracing::info!("put the VIP {} on {}", placed.vip, placed.interface);
            }
            self.owner = Some(owner);
        }
        Ok(())
    }

    /// What is served, in a line.
    pub fn summary(&self) -> String {
        let services = self.services.iter().map(|(number, service)| {
            let backends = || self.backends.iter().filter(|it| it.target.service == number);
            let ready = backends().filter(|it| it.state == State::Ready).count();
            let listen: Vec<_> = service.listen.iter().map(ToString::to_string).collect();
            format!(
                "{} on {}, {ready} of {} backends ready",
                service.name,
                listen.join(" "),
                backends().count()
            )
        });
        let mut parts: Vec<_> = services.collect();
        let interfaces =
            self.dataplane.attached().iter().map(|it| format!("{} ({})", it.name, it.mode.name()));
        let interfaces: Vec<_> = interfaces.collect();
        if !interfaces.is_empty() {
            parts.push(format!("attached to {}", interfaces.join(", ")));
            parts.push(format!("flows leave from {}", difference::list(&self.snat)));
        }
        parts.extend(self.hook_place());
        parts.join("; ")
    }

    /// The same in fewer words, for the service manager.
    pub fn short_summary(&self) -> String {
        let ready = self.backends.iter().filter(|it| it.state == State::Ready).count();
        let interfaces: Vec<_> = self.dataplane.attached().iter().map(|it| it.name.as_str()).collect();
        let on = (!interfaces.is_empty()).then(|| format!("on {}", interfaces.join(", ")));
        let parts = [format!("{ready} of {} backends ready", self.backends.len())];
        parts.into_iter().chain(on).chain(self.hook_place()).collect::<Vec<_>>().join(", ")
    }

    /// Where the program and the connect hook are.
    pub fn places(&self) -> String {
        let interfaces: Vec<_> = self.dataplane.attached().iter().map(|it| it.name.as_str()).collect();
        let program = (!interfaces.is_empty()).then(|| format!("the program on {}", interfaces.join(", ")));
        program.into_iter().chain(self.hook_place()).collect::<Vec<_>>().join(" and ")
    }

    /// Takes events until told to stop.
    pub async fn run(&mut self, mut inbox: Inbox) -> End {
        let mut second = interval(Duration::from_secs(1));
        second.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut signals = interval(SIGNALS_EVERY);
        signals.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut sockets = watch_sockets(self.own_addresses());
        let mut servers = self.watch_servers();
        self.look_for_vips().await;
        let mut sources = self.sources.clone();
        let mut reports = self.sockets.take_reports();
        loop {
            let reset_turn = self.resets.due();
            tokio::select! {
                Some(event) = inbox.checks.recv() => self.take(&event),
                () = reload_is_due(self.pending.as_ref()) => self.finish_reload(),
                sources = looked_up(self.naming.as_mut()), if self.pending.is_none() => {
                    self.go_on_reloading(sources).await;
                }
                Some(()) = inbox.reload.recv() => self.begin_reload(None, None),
                Some(change) = inbox.network.recv() => {
                    let mut changes = BTreeSet::from([change]);
                    while let Ok(change) = inbox.network.try_recv() {
                        changes.insert(change);
                    }
                    self.follow(&changes).await;
                }
                // Those of the addresses that a reload is about to bring are not among them.
                Some(used) = sockets.recv(), if self.pending.is_none() => {
                    self.used_ports = used;
                    self.block();
                }
                Some(found) = servers.recv() => self.note_servers(&found),
                report = reported(&mut reports) => self.heed_sockets(report),
                Some(request) = inbox.requests.recv() => match request {
                    // Whoever asked may have gone meanwhile.
                    Request::Status(answer) => drop(answer.send(self.status())),
                    Request::Alive(answer) => drop(answer.send(self.alive().await)),
                    Request::Unload(answer) => return End::Unload(answer),
                    Request::Reload(caller, answer) => self.begin_reload(Some(caller), Some(answer)),
                    Request::SetState(order, by, answer) => drop(answer.send(self.set_state(&order, by))),
                    Request::SetWeight(order, by, answer) => drop(answer.send(self.set_weight(&order, by))),
                    Request::Flows(filter, from, answer) => drop(answer.send(self.flow_page(&filter, from))),
                    Request::Kill(order, by, answer) => self.begin_kill(&order, by, answer),
                    Request::Events(answer) => {
                        drop(answer.send(Events { events: self.journal.events().cloned().collect() }));
                    }
                },
                () = news(&mut sources) => self.take_in_sources().await,
                _ = signals.tick() => {
                    self.heed_detached().await;
                    self.heed_signals();
                    self.look_at_sockets(Instant::now());
                }
                _ = second.tick() => self.turn().await,
                () = tokio::time::sleep_until(reset_turn) => self.reset_turn(),
                _ = inbox.stop.recv() => return End::Stop,
            }
            self.reload_again();
            if std::mem::take(&mut self.reloaded) {
                sockets = watch_sockets(self.own_addresses());
                sources = self.sources.clone();
                self.look_for_vips().await;
            }
        }
    }

    /// Has backends checked at once about which flows say something new.
    fn heed_signals(&mut self) {
        let now = Instant::now();
        let signals = match self.dataplane.signals(self.backends.iter().map(|backend| backend.id)) {
            Ok(signals) => signals,
            Err(error) => {
                tracing::debug!("cannot read what the data path has noticed: {error}");
                return;
            }
        };
        for (backend, signal) in self.backends.iter().zip(signals) {
            let witness = self.witnesses.entry(backend.id).or_insert_with(|| Witness::new(signal));
            let interval = self.services[backend.target.service].check.interval;
            let testimony = witness.hear(signal, interval, now);
            self.checks.accuse(backend.target, testimony.against);
            if testimony.news {
                tracing::debug!("flows say that {} does not answer: checking it", backend.name);
                self.checks.check_now(backend.target);
            }
            if testimony.stale {
                self.dataplane.forget_wait(backend.id, signal.asked);
            }
        }
    }

    /// Takes in the result of a check: at most one flip of a selection away from the data path.
    fn take(&mut self, event: &Event) {
        if let Some(ipv6) = self.observe(event) {
            self.select(event.id.service, ipv6);
        }
        if self.pending.as_mut().is_some_and(|pending| pending.observe(event)) {
            self.finish_reload();
        }
    }

    /// Returns the family of the backend.
    fn observe(&mut self, event: &Event) -> Option<bool> {
        let index = self.backends.iter().position(|backend| backend.target == event.id)?;
        let backend = &mut self.backends[index];
        let before = backend.clone();
        backend.observe(event, Instant::now());
        let ipv6 = backend.address.is_ipv6();
        if let Some(witness) = self.witnesses.get_mut(&backend.id) {
            let interval = self.services[backend.target.service].check.interval;
            witness.heed(event, interval, Instant::now());
        }
        self.consider_asking(event, &before);
        if let Some(transition) = &event.transition {
            // The checks know of no death.
            let transition = Transition { from: before.state, ..transition.clone() };
            self.tell_transition(index, &transition);
        }
        Some(ipv6)
    }

    /// Gives a service and family the backends for its new flows.
    fn select(&mut self, service: usize, ipv6: bool) {
        let listens = |family| self.services[service].listen.iter().any(|it| it.is_ipv6() == family);
        if !listens(ipv6) {
            return;
        }
        let backends: Vec<_> = self.of_family(service, ipv6).collect();
        let choice = Choice::among(&backends);
        let before = self.choices.get(&(service, ipv6));
        if before == Some(&choice) {
            return;
        }
        let mut said = None;
        let news =
            before.map_or(choice.reason != health::SelectionReason::Ready, |it| it.reason != choice.reason);
        if news {
            let name = &self.services[service].name;
            let both = listens(!ipv6);
            let name = if both { format!("{name} ({})", family_name(ipv6)) } else { name.clone() };
            let sentence = choice.sentence(&name, &backends);
            match choice.reason {
                health::SelectionReason::Ready => tracing::info!("{sentence}"),
                _ => tracing::warn!("{sentence}"),
            }
            said = Some(sentence);
        }
        let left: Vec<_> = backends.iter().map(|it| it.id).filter(|id| !choice.has(*id)).collect();
        let members: Vec<_> = choice
            .members
            .iter()
            .filter_map(|(id, weight)| {
                let of_it = |it: &&Backend| (it.target.service, it.id) == (service, *id);
                Some((*id, self.backends.iter().find(of_it)?.name.as_str(), *weight))
            })
            .collect();
        if before.is_none_or(|before| before.members != choice.members) {
            // First who may have new flows, then who gets them, then who may not: no SYN falls between.
            members.iter().for_each(|(id, ..)| self.dataplane.set_accepts(*id, true));
            if let Err(error) = self.dataplane.select(service, ipv6, &members) {
                // Kept as it was, so that the next check tries again.
                tracing::error!("cannot change who gets new flows: {error}");
                return;
            }
            left.iter().for_each(|id| self.dataplane.set_accepts(*id, false));
        }
        self.choices.insert((service, ipv6), choice);
        if let Some(sentence) = said {
            self.journal.note(JournalKind::Selection, None, sentence);
        }
    }

    fn of_family(&self, service: usize, ipv6: bool) -> impl Iterator<Item = &Backend> {
        self.backends.iter().filter(move |it| it.target.service == service && it.address.is_ipv6() == ipv6)
    }

    /// Takes in what is different about the network.
    async fn follow(&mut self, changes: &BTreeSet<Change>) {
        if changes.contains(&Change::Links) {
            self.ports.refresh(&self.network);
            self.write_ports();
            self.follow_members();
            self.follow_interfaces().await;
        }
        // An interface that goes takes with it what is on it.
        if changes.contains(&Change::Addresses) || changes.contains(&Change::Links) {
            self.look_for_vips().await;
        }
        // Each of them may move a next hop: an address that comes brings a route.
        self.resolve().await;
        self.correct_learned_hops();
    }

    /// See [`Ports::number_or_append`].
    fn number_or_append(&mut self, port: &Port) -> Result<usize, String> {
        let mode = self.mode_to_keep(port.index);
        self.ports.number_or_append(&self.network, port, mode)
    }

    /// The mode that the program stays in on an interface for as long as this process runs.
    fn mode_to_keep(&self, interface: u32) -> XdpMode {
        match self.mode_there(interface) {
            Some(Mode::Native) => XdpMode::Native,
            Some(Mode::Generic) => XdpMode::Generic,
            None => self.config.dataplane.xdp_mode,
        }
    }

    fn write_ports(&mut self) {
        if let Err(error) = self.dataplane.set_ports(&self.ports.layout()) {
            tracing::error!("cannot tell the program about an interface: {error}");
        }
    }

    async fn look_for_vips(&mut self) {
        for news in self.vips.look(&self.network).await {
            match news {
                Presence::Here { vip, interface } => {
                    let name =
                        self.network.interface(interface).map_or_else(|_| "?".to_owned(), |it| it.name);
                    let attached =
                        self.network.port_of(interface).map(|port| self.ports.bases().contains(&port.index));
                    if let Ok(false) = attached {
                        tracing::warn!(
                            "the VIP {vip} is on {name}, which sheave is not attached to: restart sheave"
                        );
                    } else {
                        tracing::info!("the VIP {vip} is here, on {name}");
                    }
                }
                Presence::Elsewhere { vip } => self.miss_vip(vip),
            }
        }
    }

    /// Finds the way to every backend anew, and asks the kernel for neighbours it is not sure of.
    async fn resolve(&mut self) {
        if !self.config.forwards_packets() {
            return;
        }
        let remote: Vec<usize> =
            (0..self.backends.len()).filter(|index| !self.backends[*index].local).collect();
        let network = self.network.clone();
        let asked = remote.iter().map(|index| {
            let address = self.backends[*index].address.ip();
            network.next_hop(plan::source_for(&self.snat, address), address)
        });
        let answers = join_all(asked).await;
        let known = self.ports.interfaces().len();
        for (index, answer) in remote.into_iter().zip(answers) {
            let found = match answer {
                Err(error) => Found::Lost(error.to_string()),
                Ok(next) => match self
                    .number_or_append(&next.port)
                    .and_then(|port| self.answers_by(&self.ports, port))
                {
                    Err(reason) => Found::Lost(reason),
                    Ok(port) => match next.mac {
                        Some(mac) => Found::Hop(Hop { neighbour: next.neighbour, port, mac }),
                        None => Found::NoAnswer { neighbour: next.neighbour, port },
                    },
                },
            };
            if self.ports.interfaces().len() > known {
                self.write_ports();
            }
            self.set_way(index, found);
        }
        self.write_clients_only();
    }

    fn set_way(&mut self, index: usize, found: Found) {
        let backend = &mut self.backends[index];
        let way = backend.way.after(found);
        if way == backend.way {
            return;
        }
        let service = &self.services[backend.target.service].name;
        match way.news(&backend.way) {
            Some((line, true)) => tracing::warn!("backend {service}/{}: {line}", backend.name),
            Some((line, false)) => tracing::info!("backend {service}/{}: {line}", backend.name),
            None => {}
        }
        if way.next_hop() != backend.way.next_hop() {
            self.dataplane.set_next_hop(backend.id, way.next_hop());
        }
        backend.way = way;
    }

    /// What is done every second, and what is done every so many.
    async fn turn(&mut self) {
        self.last_turn = Instant::now();
        systemd::turning();
        self.end_drains();
        self.begin_queued_reload();
        self.review_sources().await;
        self.find_ways_back().await;
        self.put_vips_back().await;
        self.reap();
        self.look_at_room();
        if self.turns.is_multiple_of(REFRESH_EVERY) {
            self.resolve().await;
            self.network.keep_fresh(FAR_AWAY).await;
            self.correct_learned_hops();
            self.attach_to_returned().await;
            self.look_at_veths().await;
            self.age_learned_hops();
            self.count_strangers();
        }
        if self.turns % CLEAR_MARKS_EVERY == CLEAR_MARKS_EVERY - 1
            && let Err(error) = self.dataplane.clear_marks()
        {
            tracing::warn!("cannot shorten look-ups: {error}");
        }
        self.turns += 1;
    }

    fn reap(&mut self) {
        let idle = self.services.by_number(RETIRED_IDLE, idle_policy);
        self.await_programs();
        if !self.roster.is_leaving()
            && let Err(error) = self.leave_others()
        {
            tracing::warn!("{error}");
        }
        match self.dataplane.reap(&idle) {
            Ok(reaped) => {
                for address in &reaped.left {
                    tracing::info!("the last flow that left from {address} has ended");
                }
                (self.reaped, self.reaped_at) = (reaped, Instant::now());
                self.look_after_flows();
                self.release_numbers();
            }
            Err(error) => tracing::warn!("cannot look through the flow table: {error}"),
        }
    }

    /// Takes everything away again: the VIP, then the program, then what was changed for it.
    pub async fn dismantle(mut self) -> Dismantled {
        let mut done = Dismantled::default();
        if let Some(owner) = self.owner.take() {
            let placed = owner.placed();
            match owner.release().await {
                Ok(()) => {
                    done.removed
                        .extend(placed.iter().map(|it| format!("the VIP {} from {}", it.vip, it.interface)));
                }
                Err(error) => done.failures.push(error.to_string()),
            }
            tokio::time::sleep(LAST_PACKETS).await;
        }
        done.removed.extend(self.hook_place());
        let attached: Vec<_> =
            self.dataplane.attached().iter().map(|it| format!("the program from {}", it.name)).collect();
        match self.dataplane.unload() {
            Ok(removed) => {
                done.removed.extend(attached);
                done.removed.extend(removed.maps.then(|| PINS.to_owned()));
            }
            Err(error) => done.failures.push(error.to_string()),
        }
        // Now that nothing of ours is there, this host may answer for itself.
        if let Err(error) = self.network.lower_guard().await {
            done.failures.push(error.to_string());
        }
        match offloads::restore(&self.config.dataplane.state_dir) {
            Ok(interfaces) => {
                done.removed
                    .extend(interfaces.iter().map(|it| format!("its changes to the offloads of {it}")));
            }
            Err(error) => done.failures.push(error.to_string()),
        }
        done
    }
}

/// What pins are called when they are gone.
pub const PINS: &str = "its maps and their pins";

/// What was taken away in the end.
#[derive(Debug, Default)]
pub struct Dismantled {
    /// In words that follow "removed".
    pub removed: Vec<String>,
    /// What could not be.
    pub failures: Vec<String>,
}

/// When a reload has waited long enough; never, where there is none.
async fn reload_is_due(pending: Option<&Pending>) {
    match pending {
        Some(pending) => tokio::time::sleep_until(pending.deadline).await,
        None => std::future::pending().await,
    }
}

/// When the names of a new configuration were looked up; never, where there is none.
async fn looked_up(naming: Option<&mut Naming>) -> Result<Sources, JoinError> {
    match naming {
        Some(naming) => naming.looked_up().await,
        None => std::future::pending().await,
    }
}

fn family_name(ipv6: bool) -> &'static str {
    if ipv6 { "IPv6" } else { "IPv4" }
}

/// The ports that sockets of this host hold on these addresses, again and again: a large host takes its time to list
/// them.
fn watch_sockets(addresses: Vec<IpAddr>) -> mpsc::Receiver<BTreeSet<u16>> {
    let (sender, receiver) = mpsc::channel(1);
    // Without an address there are no slots.
    if addresses.is_empty() {
        return receiver;
    }
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(SOCKETS_EVERY).await;
            match used_tcp_ports(&addresses).await {
                Ok(used) => {
                    if sender.send(used).await.is_err() {
                        return;
                    }
                }
                Err(error) => tracing::warn!("cannot list the sockets of this host: {error}"),
            }
        }
    });
    receiver
}
