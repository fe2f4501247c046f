//! What the data path needs to know about this host before it exists: where the VIPs are at home, and which addresses
//! and ports flows to backends leave from. [`Plan::make`] asks, the rest is pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    ops::RangeInclusive,
    time::Duration,
};

use futures_util::future::join_all;
use ipnet::IpNet;

use super::{
    ControllerError,
    backends::{self, Backend},
    difference,
    ports::Ports,
    roster::{Roster, Step},
    services::Services,
};
use crate::{
    config::{Config, Interfaces},
    dataplane::{Known, Previous, Settings, sets_error, usable_ports},
    health::{State, Target, TargetId},
    network::{LocalAddress, Network, NetworkError, Route, first_ephemeral_port},
};

/// A host takes longer to reboot, and a daemon less to restart.
const REBOOT: Duration = Duration::from_secs(5);

/// What is to be loaded, attached and checked.
#[derive(Debug)]
pub struct Plan {
    pub(super) roster: Roster,
    /// What is to be done in the data path to get there.
    pub(super) steps: Vec<Step>,
    pub(super) services: Services,
    pub(super) backends: Vec<Backend>,
    pub(super) ports: Ports,
    pub(super) source: Source,
    snat_room: usize,
    /// Backends on other hosts, and the ways there.
    reach: Vec<Reach>,
    /// Checks leave from an address and ports that flows leave from as well.
    pub(super) checks_use_slots: bool,
    here: BTreeSet<IpAddr>,
}

impl Plan {
    /// Looks at the routes and addresses of this host. Says what the operator should know.
    pub async fn make(config: &Config, network: &Network) -> Result<Self, ControllerError> {
        let Survey { addresses, here, reach, homes } = Survey::make(config, network).await?;
        let nobody = Roster::default();
        let roster = nobody.next(config, |address| here.contains(&address))?;
        let steps = nobody.steps_to(&roster);
        let backends = backends::enumerate(config, &roster)?;
        for (vip, _) in homes.iter().filter(|(_, home)| home.is_none()) {
            tracing::warn!("the VIP {vip} is in no subnet of this host: clients must be routed here");
        }
        let source = Source::choose(config, &homes, &reach, &addresses, first_ephemeral_port());
        source.notes.iter().for_each(|note| tracing::warn!("{note}"));
        let ways = Ways::of(network, &source.addresses, &reach, &addresses).await;
        let ports = if config.forwards_packets() {
            let wanted = ways.interfaces().chain(homes.values().flatten().copied());
            Ports::open(network, &config.dataplane.interfaces, wanted)?
        } else {
            Ports::default()
        };
        if let (Interfaces::Named(_), true) = (&config.dataplane.interfaces, config.forwards_packets()) {
            let name =
                |index| network.interface(index).map_or_else(|_| "?".to_owned(), |interface| interface.name);
            if let Some((backend, interface)) = ways.out.iter().find(|(_, it)| ports.number(**it).is_none()) {
                let (key, interface) = ("interfaces", name(*interface));
                return Err(ControllerError::NotNamed { key, backend: *backend, interface });
            }
            for (address, interface) in ways.back.iter().filter(|(_, it)| ports.number(**it).is_none()) {
                tracing::warn!(
                    "replies to {address} arrive on {}, which dataplane.interfaces does not name: add it there",
                    name(*interface)
                );
            }
        }
        if config.forwards_packets() {
            check_backend_interfaces(config, network, &ports, &ways)?;
        }
        let checks_use_slots = source.is_used_by_checks(&reach);
        let services = Services::of(config, &roster);
        let snat_room = config.dataplane.snat_addresses_max;
        Ok(Self {
            roster,
            steps,
            services,
            backends,
            ports,
            source,
            snat_room,
            reach,
            checks_use_slots,
            here,
        })
    }

    /// Goes on with the SNAT addresses of the flows that there are, `before`, where the configuration leaves the choice, and
    /// where others cannot be had yet; but not if another flow table may be made (`replaces`).
    pub fn keep_source(&mut self, before: &Previous, config: &Config, network: &Network, replaces: bool) {
        let (addresses, ports) = (before.snat_addresses(), before.snat_ports());
        let kept = self.source.keep(&addresses, ports, config, &network.local_addresses());
        if let Some(note) = kept {
            tracing::info!("{note}");
        }
        if !replaces && let Err(error) = before.check_snat_addresses(&self.source.addresses) {
            let former = before.snat_addresses();
            let names = difference::list(&former);
            tracing::warn!("new flows go on leaving from {names} for now: {error}. Then `sheave reload`");
            self.source.addresses = former;
        }
        self.checks_use_slots = self.source.is_used_by_checks(&self.reach);
    }

    /// Goes on with the numbers of a daemon before this one: whoever was there keeps theirs, and backends that had new
    /// flows are ready until their checks have another verdict. If nobody has looked for `unattended`, they may have rebooted
    /// meanwhile.
    pub fn adopt(
        &mut self,
        config: &Config,
        known: &Known,
        unattended: Duration,
    ) -> Result<(), ControllerError> {
        self.ports.keep_numbers(&known.ports);
        let before = Roster::known(config, known);
        self.roster = before.next(config, |address| self.here.contains(&address))?;
        self.steps = before.steps_to(&self.roster);
        self.services = Services::of(config, &self.roster);
        self.backends = backends::enumerate(config, &self.roster)?;
        for backend in &mut self.backends {
            if known.backends.iter().any(|before| before.id == backend.id && before.accepts) {
                backend.state = State::Ready;
            }
            backend.unattended = unattended >= REBOOT;
        }
        Ok(())
    }

    /// What is believed of a backend before its first check.
    pub fn state(&self, target: TargetId) -> State {
        let backend = self.backends.iter().find(|backend| backend.target == target);
        backend.map_or(State::Unknown, |backend| backend.state)
    }

    /// What the checks are to be made of.
    pub fn targets(&self) -> Vec<Target> {
        backends::targets(&self.services, &self.backends)
    }

    /// What the data path is to be loaded with.
    pub fn settings(&self, secret: [u64; 2], log_one_in: Option<u32>) -> Settings {
        Settings {
            snat_addresses: self.source.addresses.clone(),
            snat_room: self.snat_room,
            snat_ports: self.source.ports.clone(),
            secret,
            log_one_in,
            sets_error: sets_error(),
        }
    }
}

/// What this host says about the addresses of a configuration.
#[derive(Debug)]
pub(super) struct Survey {
    /// This host's own.
    pub(super) addresses: Vec<LocalAddress>,
    /// This host's own, as routes see it.
    pub(super) here: BTreeSet<IpAddr>,
    /// Backends on other hosts, and the ways there.
    pub(super) reach: Vec<Reach>,
    /// The interface of each VIP: see [`homes`].
    pub(super) homes: BTreeMap<IpAddr, Option<u32>>,
}

impl Survey {
    /// Asks the kernel. Says to which backends there is no way.
    pub(super) async fn make(config: &Config, network: &Network) -> Result<Self, ControllerError> {
        let (survey, unreachable) = Self::look(config, network).await?;
        unreachable.iter().for_each(|sentence| tracing::warn!("{sentence}"));
        Ok(survey)
    }

    /// The same, with what there is to be said.
    async fn look(config: &Config, network: &Network) -> Result<(Self, Vec<String>), ControllerError> {
        let addresses = network.local_addresses();
        let targets: BTreeSet<_> = config
            .services
            .iter()
            .flat_map(|service| &service.backends)
            .map(|backend| backend.address.ip())
            .collect();
        let routes = join_all(targets.iter().map(|address| network.route_to(*address))).await;
        let (mut reach, mut unreachable) = (Vec::new(), Vec::new());
        let mut here: BTreeSet<IpAddr> = addresses.iter().map(|local| local.address).collect();
        for (address, route) in targets.into_iter().zip(routes) {
            match route {
                Ok(route) if route.local => {
                    here.insert(address);
                }
                Ok(route) => reach.push(Reach { address, route }),
                Err(error @ NetworkError::NoRoute { .. }) => {
                    unreachable.push(format!("backend {address}: {error}"));
                }
                Err(error) => return Err(error.into()),
            }
        }
        let homes = homes(&vips(config), &addresses, |interface| network.port_of(interface).is_ok());
        Ok((Self { addresses, here, reach, homes }, unreachable))
    }
}

/// Whether the interfaces that backends are to answer by are served, and every backend is reached by one of them.
fn check_backend_interfaces(
    config: &Config,
    network: &Network,
    ports: &Ports,
    ways: &Ways,
) -> Result<(), ControllerError> {
    let Some(names) = &config.dataplane.backend_interfaces else { return Ok(()) };
    let mut named = BTreeSet::new();
    for name in names {
        let index = network.interface_named(name).map_err(ControllerError::BackendInterface)?.index;
        if ports.number(index).is_none() {
            return Err(ControllerError::NotServed(name.clone()));
        }
        named.insert(index);
    }
    let Some((backend, index)) = ways.out.iter().find(|(_, index)| !named.contains(*index)) else {
        return Ok(());
    };
    let interface = network.interface(*index).map_or_else(|_| "?".to_owned(), |interface| interface.name);
    Err(ControllerError::NotNamed { key: "backend_interfaces", backend: *backend, interface })
}

/// The interfaces that packets to backends leave by, and those that the replies arrive on.
#[derive(Debug)]
pub(super) struct Ways {
    /// By backend, as the kernel routes packets from the SNAT address.
    pub(super) out: BTreeMap<IpAddr, u32>,
    /// By SNAT address: the one that has it, or has its subnet. A backend may answer by another way than it is asked.
    pub(super) back: BTreeMap<IpAddr, u32>,
}

impl Ways {
    /// Asks the kernel. Backends to which there is no way are left out.
    pub(super) async fn of(
        network: &Network,
        snat: &[IpAddr],
        reach: &[Reach],
        addresses: &[LocalAddress],
    ) -> Self {
        let asked = reach.iter().map(async |reach| {
            let source = source_for(snat, reach.address);
            let route = network.route_from(source, reach.address).await.ok().filter(|route| !route.local);
            (reach.address, route.map(|route| route.interface))
        });
        let out =
            join_all(asked).await.into_iter().filter_map(|(backend, it)| Some((backend, it?))).collect();
        let is_used = |address: &IpAddr| reach.iter().any(|it| it.address.is_ipv4() == address.is_ipv4());
        let used: Vec<_> = snat.iter().copied().filter(is_used).collect();
        let back = homes(&used, addresses, |interface| network.port_of(interface).is_ok());
        Self { out, back: back.into_iter().filter_map(|(address, it)| Some((address, it?))).collect() }
    }

    /// All of them.
    pub(super) fn interfaces(&self) -> impl Iterator<Item = u32> {
        self.out.values().chain(self.back.values()).copied()
    }
}

/// The SNAT address that packets to a backend are routed by.
pub(super) fn source_for(snat: &[IpAddr], backend: IpAddr) -> Option<IpAddr> {
    snat.iter().copied().find(|address| address.is_ipv4() == backend.is_ipv4())
}

/// What flows to backends leave from, or would with this configuration: the choice of a daemon that is started now, on
/// the flow table that there may be.
///
/// # Errors
/// When the kernel does not answer.
pub async fn snat_addresses(config: &Config, network: &Network) -> Result<Vec<IpAddr>, ControllerError> {
    let (Survey { addresses, reach, homes, .. }, _) = Survey::look(config, network).await?;
    let mut source = Source::choose(config, &homes, &reach, &addresses, first_ephemeral_port());
    if let Some(before) = Previous::recorded(&config.dataplane.pin_dir) {
        source.keep(&before.snat_addresses(), before.snat_ports(), config, &addresses);
    }
    Ok(source.addresses)
}

/// The slots of a SNAT address of our own.
const EVERY_PORT: RangeInclusive<u16> = 1024..=u16::MAX;
/// Ports that an address which this host's own connections use too should have for slots at least.
const ENOUGH_PORTS: u16 = 4096;

/// Distinct addresses that packets are forwarded for, in configuration order.
pub(super) fn vips(config: &Config) -> Vec<IpAddr> {
    config.vips()
}

/// The interface that carries each VIP or, while it is elsewhere, would carry it: the one in whose subnet it is.
///
/// `ethernet` tells the interfaces that can have clients: a VIP on the loopback interface is at home nowhere.
pub(super) fn homes(
    vips: &[IpAddr],
    addresses: &[LocalAddress],
    ethernet: impl Fn(u32) -> bool,
) -> BTreeMap<IpAddr, Option<u32>> {
    let addresses: Vec<_> = addresses.iter().filter(|local| ethernet(local.interface)).collect();
    let home = |vip: IpAddr| {
        let carrying = addresses.iter().find(|local| local.address == vip);
        let subnet = || {
            let holds = |local: &&&LocalAddress| {
                IpNet::new(local.address, local.prefix_length).is_ok_and(|subnet| subnet.contains(&vip))
            };
            addresses.iter().filter(holds).max_by_key(|local| local.prefix_length)
        };
        carrying.or_else(subnet).map(|local| local.interface)
    };
    vips.iter().map(|vip| (*vip, home(*vip))).collect()
}

/// A backend that is another host, and the way there.
#[derive(Clone, Debug)]
pub(super) struct Reach {
    /// Its address.
    pub(super) address: IpAddr,
    /// As the kernel routes it now.
    pub(super) route: Route,
}

/// What flows to backends leave from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Source {
    /// SNAT addresses.
    pub(super) addresses: Vec<IpAddr>,
    /// Slots.
    pub(super) ports: RangeInclusive<u16>,
    /// What the operator should know about the choice.
    pub(super) notes: Vec<String>,
}

impl Source {
    /// As configured; else the VIPs; else, for backends that would answer a VIP by another way, the address that this
    /// host itself uses towards them.
    pub(super) fn choose(
        config: &Config,
        homes: &BTreeMap<IpAddr, Option<u32>>,
        reach: &[Reach],
        addresses: &[LocalAddress],
        first_ephemeral: u16,
    ) -> Self {
        let vips = vips(config);
        let mut notes = Vec::new();
        let mut chosen = config.dataplane.snat_addresses.clone();
        if chosen.is_empty() {
            for is_family in [IpAddr::is_ipv4 as fn(&IpAddr) -> bool, IpAddr::is_ipv6] {
                let family: Vec<IpAddr> = vips.iter().copied().filter(is_family).collect();
                match host_source(&family, homes, reach, addresses) {
                    Some((source, note)) => {
                        chosen.push(source);
                        notes.push(note);
                    }
                    None => chosen.extend(family),
                }
            }
        }
        let locals: BTreeSet<_> = addresses.iter().map(|local| local.address).collect();
        let shared = chosen.iter().any(|address| !vips.contains(address) && locals.contains(address));
        for address in chosen.iter().filter(|address| !vips.contains(address) && !locals.contains(address)) {
            notes.push(format!(
                "SNAT address {address} is neither a VIP nor on this host: backends will find nobody there"
            ));
        }
        let below = *EVERY_PORT.start()..=first_ephemeral.max(EVERY_PORT.start() + ENOUGH_PORTS) - 1;
        let ports = match config.dataplane.snat_ports.clone() {
            Some(ports) => ports,
            None if shared => below,
            None => EVERY_PORT,
        };
        if shared && *ports.end() >= first_ephemeral {
            notes.push(format!(
                "slots {}-{} reach into the ports of this host's own connections, from {first_ephemeral} on: narrow \
                 snat_ports, or move net.ipv4.ip_local_port_range",
                ports.start(),
                ports.end()
            ));
        }
        Self { addresses: chosen, ports, notes }
    }

    /// Other slots would be another flow table, and other addresses of our own choice help nobody: as long as those `before`
    /// work, they stay. Says so when these are not the addresses that would be chosen now. A family that has no VIP any
    /// more keeps its addresses for the flows that it has.
    pub(super) fn keep(
        &mut self,
        before: &[IpAddr],
        ports: RangeInclusive<u16>,
        config: &Config,
        addresses: &[LocalAddress],
    ) -> Option<String> {
        let given = config.dataplane.snat_ports.clone();
        let kept = self.keep_addresses(before, config, addresses);
        // Fewer slots than there could be will do.
        let are_within = self.ports.contains(ports.start()) && self.ports.contains(ports.end());
        if given.is_none() && (are_within || self.addresses == before) {
            self.ports = ports;
        }
        kept
    }

    /// Of [`Source::keep`] what is about addresses.
    fn keep_addresses(
        &mut self,
        before: &[IpAddr],
        config: &Config,
        addresses: &[LocalAddress],
    ) -> Option<String> {
        let set = |addresses: &[IpAddr]| addresses.iter().copied().collect::<BTreeSet<_>>();
        let has = |addresses: &[IpAddr], v4: bool| addresses.iter().any(|address| address.is_ipv4() == v4);
        for v4 in [true, false] {
            if !has(&self.addresses, v4) {
                self.addresses.extend(before.iter().filter(|address| address.is_ipv4() == v4));
            }
        }
        let same = set(before) == set(&self.addresses);
        if !same {
            let vips = vips(config);
            let works = |address: &IpAddr| {
                vips.contains(address) || addresses.iter().any(|local| local.address == *address)
            };
            let enough = [true, false].iter().all(|v4| !has(&self.addresses, *v4) || has(before, *v4));
            if !config.dataplane.snat_addresses.is_empty() || !enough || !before.iter().all(works) {
                return None;
            }
        }
        let chosen = std::mem::replace(&mut self.addresses, before.to_vec());
        (!same).then(|| {
            format!(
                "flows go on leaving from {}, as those that there are; without them it would be {} (name these as \
                 dataplane.snat_addresses to change that)",
                difference::list(before),
                difference::list(&chosen)
            )
        })
    }
}

impl Source {
    /// Do checks leave from an address and ports that flows leave from as well?
    pub(super) fn is_used_by_checks(&self, reach: &[Reach]) -> bool {
        let shared = |reach: &Reach| {
            reach.route.preferred_source.is_some_and(|address| self.addresses.contains(&address))
        };
        *self.ports.end() >= first_ephemeral_port() && reach.iter().any(shared)
    }

    /// Are its slots those of a flow table with these?
    pub(super) fn fits(&self, ports: &RangeInclusive<u16>) -> bool {
        usable_ports(&self.ports) == *ports
    }
}

/// The host's address to use instead of the VIPs of a family, if backends would not answer those to this host, and why.
fn host_source(
    vips: &[IpAddr],
    homes: &BTreeMap<IpAddr, Option<u32>>,
    reach: &[Reach],
    addresses: &[LocalAddress],
) -> Option<(IpAddr, String)> {
    let first = vips.first()?;
    let family = || reach.iter().filter(|reach| reach.address.is_ipv4() == first.is_ipv4());
    let beside = |reach: &Reach, vip: &IpAddr| {
        reach.route.gateway.is_none() && homes.get(vip).copied().flatten() == Some(reach.route.interface)
    };
    let away = |reach: &&Reach| !vips.iter().all(|vip| beside(reach, vip));
    let example = family().find(away)?;
    let source = source_towards(example, vips, addresses)?;
    let mut note = format!(
        "backend {} is not in the subnet of the VIP, so flows leave from this host's address {source}: \
         set dataplane.snat_addresses to choose another",
        example.address
    );
    if family().any(|other| source_towards(other, vips, addresses) != Some(source)) {
        note.push_str(
            "; other backends are reached from other addresses, and must be able to answer this one",
        );
    }
    Some((source, note))
}

fn source_towards(reach: &Reach, vips: &[IpAddr], addresses: &[LocalAddress]) -> Option<IpAddr> {
    let usable = |address: &IpAddr| {
        !vips.contains(address) && !matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
    };
    let on_the_way = || {
        addresses
            .iter()
            .filter(|local| local.interface == reach.route.interface)
            .map(|local| local.address)
            .find(|address| address.is_ipv4() == reach.address.is_ipv4() && usable(address))
    };
    reach.route.preferred_source.filter(usable).or_else(on_the_way)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::testing::{Peer, in_namespace, ip};

    const FRONT: u32 = 2;
    const BACK: u32 = 3;

    fn config(dataplane: &str) -> Config {
        let text = format!(
            "[dataplane]\n{dataplane}\n[[service]]\nname = \"api\"\nlisten = [\"10.0.1.100:6443\"]\n\
             backends = [\"10.0.1.11:6443\", \"10.0.2.12:6443\"]"
        );
        Config::parse(&text, "test.toml").unwrap().0
    }

    fn local(address: &str, prefix_length: u8, interface: u32) -> LocalAddress {
        LocalAddress { address: address.parse().unwrap(), prefix_length, interface }
    }

    fn host() -> Vec<LocalAddress> {
        vec![local("127.0.0.1", 8, 1), local("10.0.1.2", 24, FRONT), local("10.0.2.2", 24, BACK)]
    }

    fn reach(address: &str, interface: u32, gateway: Option<&str>, source: &str) -> Reach {
        Reach {
            address: address.parse().unwrap(),
            route: Route {
                interface,
                gateway: gateway.map(|gateway| gateway.parse().unwrap()),
                preferred_source: Some(source.parse().unwrap()),
                local: false,
            },
        }
    }

    #[test]
    fn packets_leave_by_the_rules_and_replies_arrive_where_the_snat_address_is() {
        in_namespace(async || {
            let (_lan, away) = (Peer::behind("lan", "far"), Peer::behind("wan", "away"));
            ip("addr add 10.1.0.1/24 dev lan");
            ip("addr add 10.1.0.140/32 dev lan");
            ip("addr add 10.8.0.1/24 dev wan");
            away.ip("addr add 10.8.0.2/24 dev away");
            ip("route add 10.9.0.0/24 via 10.1.0.2");
            ip("rule add from 10.1.0.140 lookup 100");
            ip("route add default via 10.8.0.2 table 100");
            let (network, _changes) = Network::open().await.unwrap();
            let [lan, wan] = ["lan", "wan"].map(|name| network.interface_named(name).unwrap().index);
            let (vip, backend) = ("10.1.0.140".parse().unwrap(), "10.9.0.1".parse().unwrap());
            let route = network.route_to(backend).await.unwrap();
            assert_eq!(route.interface, lan, "this host's own packets go elsewhere");
            let reach = [Reach { address: backend, route }];
            let ways = Ways::of(&network, &[vip], &reach, &network.local_addresses()).await;
            assert_eq!(ways.out, BTreeMap::from([(backend, wan)]));
            assert_eq!(ways.back, BTreeMap::from([(vip, lan)]));
            // An address of the other family has no replies to wait for.
            let other = ["fd01::1".parse().unwrap()];
            let ways = Ways::of(&network, &other, &reach, &network.local_addresses()).await;
            assert_eq!(ways.back, BTreeMap::new());
        });
    }

    fn choose(config: &Config, reach: &[Reach]) -> Source {
        let homes = homes(&vips(config), &host(), |interface| interface != 1);
        Source::choose(config, &homes, reach, &host(), 32_768)
    }

    #[test]
    fn a_vip_is_at_home_where_it_is_or_where_its_subnet_is() {
        let vip: IpAddr = "10.0.1.100".parse().unwrap();
        let home = |addresses: &[LocalAddress]| homes(&[vip], addresses, |interface| interface != 1)[&vip];
        assert_eq!(home(&host()), Some(FRONT));
        let mut carried = host();
        carried.push(local("10.0.1.100", 32, BACK));
        assert_eq!(home(&carried), Some(BACK));
        assert_eq!(home(&[local("10.0.1.100", 32, 1)]), None, "no client comes by the loopback interface");
    }

    #[test]
    fn flows_leave_from_the_vip_where_backends_are_beside_it() {
        let config = config("");
        let source = choose(&config, &[reach("10.0.1.11", FRONT, None, "10.0.1.2")]);
        assert_eq!(source.addresses, vips(&config));
        assert_eq!(source.ports, EVERY_PORT);
        assert_eq!(source.notes, Vec::<String>::new());
    }

    #[test]
    fn backends_elsewhere_see_this_hosts_address_and_ports_that_it_does_not_use() {
        let beside = reach("10.0.1.11", FRONT, None, "10.0.1.2");
        for elsewhere in [
            reach("10.0.2.12", BACK, None, "10.0.2.2"),
            reach("10.0.9.12", FRONT, Some("10.0.1.1"), "10.0.1.2"),
        ] {
            let source = choose(&config(""), &[beside.clone(), elsewhere.clone()]);
            assert_eq!(source.addresses, [elsewhere.route.preferred_source.unwrap()]);
            assert_eq!(source.ports, 1024..=32_767);
            assert!(source.notes[0].contains("snat_addresses"), "{:?}", source.notes);
        }
    }

    #[test]
    fn flows_go_on_from_where_they_are_as_long_as_that_works() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let beside = [reach("10.0.1.11", FRONT, None, "10.0.1.2")];
        let mut source = choose(&config(""), &beside);
        let chosen = source.clone();
        assert_eq!(source.keep(&[ip("10.0.1.100")], EVERY_PORT, &config(""), &host()), None);
        assert_eq!(source, chosen, "nothing is different");
        let note = source.keep(&[ip("10.0.2.2")], 1024..=4095, &config(""), &host()).unwrap();
        assert!(note.contains("go on leaving from 10.0.2.2"), "{note}");
        assert_eq!((source.addresses[0], source.ports.clone()), (ip("10.0.2.2"), 1024..=4095));

        let mut source = chosen.clone();
        assert_eq!(
            source.keep(&[ip("10.0.9.9")], EVERY_PORT, &config(""), &host()),
            None,
            "that address is gone"
        );
        assert_eq!(source, chosen);
        let named = config("snat_addresses = [\"10.0.2.2\"]");
        let mut source = choose(&named, &beside);
        assert_eq!(
            source.keep(&[ip("10.0.1.100")], EVERY_PORT, &named, &host()),
            None,
            "the operator has chosen"
        );
        assert_eq!(source.addresses, [ip("10.0.2.2")]);
    }

    #[test]
    fn a_flow_table_with_fewer_slots_than_there_could_be_will_do() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let beside = [reach("10.0.1.11", FRONT, None, "10.0.1.2")];
        let elsewhere = [reach("10.0.2.12", BACK, None, "10.0.2.2")];
        let narrow = 1024..=32_767;
        // From this host's own address to the VIP: the table's ports are among those of the VIP.
        let to_vip = config("snat_addresses = [\"10.0.1.100\"]");
        let mut source = choose(&to_vip, &beside);
        assert_eq!(source.ports, EVERY_PORT);
        source.keep(&[ip("10.0.2.2")], narrow.clone(), &to_vip, &host());
        assert_eq!((source.addresses.clone(), source.fits(&narrow)), (vec![ip("10.0.1.100")], true));
        // The other way they are not, unless the operator says so.
        let to_own = config("snat_addresses = [\"10.0.2.2\"]");
        let mut source = choose(&to_own, &elsewhere);
        source.keep(&[ip("10.0.1.100")], EVERY_PORT, &to_own, &host());
        assert!(!source.fits(&EVERY_PORT), "{source:?}");
        let named = config("snat_addresses = [\"10.0.2.2\"]\nsnat_ports = \"1024-65535\"");
        let mut source = choose(&named, &elsewhere);
        source.keep(&[ip("10.0.1.100")], EVERY_PORT, &named, &host());
        assert!(source.fits(&EVERY_PORT));
    }

    #[test]
    fn slots_keep_away_from_the_hosts_own_ports_also_where_these_were_moved() {
        let back = [reach("10.0.2.12", BACK, None, "10.0.2.2")];
        let homes = homes(&vips(&config("")), &host(), |interface| interface != 1);
        let choose = |dataplane: &str, first_ephemeral| {
            Source::choose(&config(dataplane), &homes, &back, &host(), first_ephemeral)
        };
        assert_eq!(choose("", 20_000).ports, 1024..=19_999);
        let crowded = choose("", 1024);
        assert_eq!(crowded.ports, 1024..=5119);
        assert!(crowded.notes.iter().any(|note| note.contains("ip_local_port_range")), "{:?}", crowded.notes);
        // What is written is meant, also when it is everything.
        let written = choose("snat_ports = \"1024-65535\"", 32_768);
        assert_eq!(written.ports, EVERY_PORT);
        assert!(written.notes.iter().any(|note| note.contains("narrow snat_ports")), "{:?}", written.notes);
    }

    #[test]
    fn what_is_configured_holds() {
        let back = [reach("10.0.2.12", BACK, None, "10.0.2.2")];
        let source = choose(&config("snat_addresses = [\"10.0.2.2\"]\nsnat_ports = \"20000-29999\""), &back);
        assert_eq!(source.addresses, ["10.0.2.2".parse::<IpAddr>().unwrap()]);
        assert_eq!(source.ports, 20_000..=29_999);
        let stranger = choose(&config("snat_addresses = [\"10.0.2.77\"]"), &back);
        assert!(stranger.notes[0].contains("10.0.2.77"), "{:?}", stranger.notes);
        assert_eq!(stranger.ports, EVERY_PORT, "an address of our own");
    }
}
