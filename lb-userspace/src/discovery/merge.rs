//! The file's backends and the cluster's become one list. Pure.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::{IpAddr, SocketAddr},
};

use lb_common::layout;

use super::known::Known;
use crate::config::{Backend, Config, Discover, Service, not_a_backend};

/// What the data path holds, of all services; ids begin with 1.
const BACKENDS_MAX: usize = layout::BACKENDS as usize - 1;

/// A backend as it is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Present {
    /// Where its flows go.
    pub address: SocketAddr,
    /// The file does not name it.
    pub discovered: bool,
    /// It is ready.
    pub ready: bool,
    /// It gets new flows, for whatever reason.
    pub usable: bool,
    /// Whether it may go.
    pub leave: Leave,
}

/// Whether a backend may go when it is not listed any more. Whoever goes is not checked any more, so that nobody finds out
/// that it is dead: its clients would wait until they give up by themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Leave {
    /// It answers, and drains; or it is dead, and its flows are reset; or it has none.
    #[default]
    Granted,
    /// Not yet: it is being asked how it is.
    Asked,
    /// Not yet: it does not answer.
    Silent,
}

/// How things are while a list is merged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Situation {
    /// The backends in use, by service.
    pub present: BTreeMap<String, Vec<Present>>,
    /// This host's own addresses.
    pub here: BTreeSet<IpAddr>,
}

/// What should be.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// The configuration with the cluster's backends in place.
    pub config: Config,
    /// Which of the cluster's addresses cannot be used, in sentences.
    pub problems: Vec<String>,
    /// By service: what is kept although the list would take it away, because nobody usable would be left.
    pub held: BTreeMap<String, BTreeSet<SocketAddr>>,
    /// By service: who is not listed any more, and whether they may go. Those that may not are in the configuration.
    pub leaving: BTreeMap<String, BTreeMap<SocketAddr, Leave>>,
}

impl Wanted {
    /// What the operator should know.
    pub fn sentences(&self) -> Vec<String> {
        let held = self.held.iter().map(|(service, addresses)| {
            let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
            format!(
                "{service}: the cluster's list is held, because no usable backend would be left: {} stays until \
                 another is ready",
                addresses.join(", ")
            )
        });
        let silent = self.leaving.iter().flat_map(|(service, leaving)| {
            let silent = leaving.iter().filter(|(_, leave)| **leave == Leave::Silent);
            silent.map(move |(address, _)| {
                format!(
                    "{service}: {address} is not on the cluster's list any more and does not answer: it stays until it is \
                     dead, answers, or has no flows left"
                )
            })
        });
        self.problems.iter().cloned().chain(held).chain(silent).collect()
    }
}

/// Puts what is known into a configuration that holds the backends of the file only, names included.
pub(super) fn merge_all(config: &Config, known: &BTreeMap<String, Known>, situation: &Situation) -> Wanted {
    let mut wanted = Wanted {
        config: config.clone(),
        problems: Vec::new(),
        held: BTreeMap::new(),
        leaving: BTreeMap::new(),
    };
    let mut room = BACKENDS_MAX.saturating_sub(config.services.iter().map(|it| it.backends.len()).sum());
    for service in &mut wanted.config.services {
        let Some(discover) = &service.discover else { continue };
        let list = known.get(&service.name).and_then(|known| known.list.as_ref());
        let list = list.map(|list| suitable(list, config, service, &situation.here, &mut wanted.problems));
        let present = situation.present.get(&service.name).map(Vec::as_slice).unwrap_or_default();
        // Who cannot be a backend any more cannot stay one.
        let there = present.iter().map(|it| it.address).collect();
        let may_stay = suitable(&there, config, service, &situation.here, &mut Vec::new());
        let merged = merge(discover, &service.backends, list.as_ref(), (present, &may_stay));
        let (backends, left_out) = backends_at(&merged.addresses, &service.backends, &mut room);
        if left_out > 0 {
            let problem = format!(
                "{}: {left_out} of the cluster's backends are left out: {BACKENDS_MAX} backends are the most",
                service.name
            );
            wanted.problems.push(problem);
        }
        service.backends = backends;
        if !merged.held.is_empty() {
            wanted.held.insert(service.name.clone(), merged.held);
        }
        if !merged.leaving.is_empty() {
            wanted.leaving.insert(service.name.clone(), merged.leaving);
        }
    }
    wanted
}

/// Those of a list that can be backends of a service. Another family than any listener's is no mistake: a cluster has
/// both.
fn suitable(
    list: &BTreeSet<SocketAddr>,
    config: &Config,
    service: &Service,
    here: &BTreeSet<IpAddr>,
    problems: &mut Vec<String>,
) -> BTreeSet<SocketAddr> {
    let listeners = config.services.iter().flat_map(|service| &service.listen).map(SocketAddr::ip);
    let vips: HashSet<IpAddr> = listeners.filter(|ip| !ip.is_loopback()).collect();
    let listens = |address: &&SocketAddr| service.listen.iter().any(|it| it.is_ipv4() == address.is_ipv4());
    let usable = |address: &SocketAddr| {
        let reason = not_a_backend(address.ip(), &vips, &config.dataplane.snat_addresses)
            .or_else(|| other_port(config, service, *address, here));
        reason
            .map(|reason| format!("{}: {address} of the cluster's list is left out: {reason}", service.name))
    };
    let mut suitable = BTreeSet::new();
    for address in list.iter().filter(listens) {
        match usable(address) {
            Some(problem) => problems.push(problem),
            None => drop(suitable.insert(*address)),
        }
    }
    suitable
}

/// A backend on this host gets its packets unchanged, so it must have the listener's port.
fn other_port(
    config: &Config,
    service: &Service,
    address: SocketAddr,
    here: &BTreeSet<IpAddr>,
) -> Option<String> {
    if !config.forwards_packets() || !here.contains(&address.ip()) {
        return None;
    }
    let mut listeners = service.listen.iter().filter(|it| !it.ip().is_loopback());
    let other = listeners.find(|it| it.is_ipv4() == address.is_ipv4() && it.port() != address.port())?;
    Some(format!("it is on this host and has not the port of listener {other}"))
}

/// The addresses that a service should have.
#[derive(Debug, Default)]
struct Merged {
    addresses: BTreeSet<SocketAddr>,
    held: BTreeSet<SocketAddr>,
    leaving: BTreeMap<SocketAddr, Leave>,
}

/// `own` are the backends of the file. A list that was never known changes nothing.
fn merge(
    discover: &Discover,
    own: &[Backend],
    list: Option<&BTreeSet<SocketAddr>>,
    (present, may_stay): (&[Present], &BTreeSet<SocketAddr>),
) -> Merged {
    let own: BTreeSet<_> = own.iter().map(|backend| backend.address).collect();
    let there = || present.iter().filter(|it| it.discovered).map(|it| it.address).collect();
    let listed: BTreeSet<_> = list.cloned().unwrap_or_else(there);
    let mut addresses: BTreeSet<_> = own.union(&listed).copied().collect();
    // What the file does not name any more is not the list's to hold.
    let ours = |it: &&Present| it.discovered || own.contains(&it.address);
    let mut held = BTreeSet::new();
    for ipv6 in [false, true] {
        let of_family: Vec<_> = present.iter().filter(|it| it.address.is_ipv6() == ipv6).collect();
        if discover.replace && replaces(&of_family, &own, &listed) {
            addresses.retain(|address| address.is_ipv6() != ipv6 || listed.contains(address));
        }
        let usable: BTreeSet<_> = of_family.iter().filter(|it| it.usable).map(|it| it.address).collect();
        if addresses.is_disjoint(&usable) {
            let ours = of_family.iter().copied().filter(ours).filter(|it| it.usable);
            held.extend(ours.map(|it| it.address));
        }
    }
    addresses.extend(&held);
    let leaving = present.iter().filter(ours).filter(|it| !addresses.contains(&it.address));
    let leave = |it: &Present| if may_stay.contains(&it.address) { it.leave } else { Leave::Granted };
    let leaving: BTreeMap<_, _> = leaving.map(|it| (it.address, leave(it))).collect();
    addresses
        .extend(leaving.iter().filter(|(_, leave)| **leave != Leave::Granted).map(|(address, _)| *address));
    Merged { addresses, held, leaving }
}

/// Whether a family's listed backends stand in for the file's: when one of them is ready, and from then on for as long
/// as one of them gets new flows.
fn replaces(present: &[&Present], own: &BTreeSet<SocketAddr>, listed: &BTreeSet<SocketAddr>) -> bool {
    let there = |address: &SocketAddr| present.iter().any(|it| it.address == *address);
    let family = present.first().map(|it| it.address.is_ipv6());
    let mut replaceable =
        own.iter().filter(|it| Some(it.is_ipv6()) == family && !listed.contains(it)).peekable();
    let already = replaceable.peek().is_some() && !replaceable.any(there);
    present.iter().filter(|it| listed.contains(&it.address)).any(|it| it.ready || (it.usable && already))
}

/// The backends at these addresses: as the file says where it names them. And how many did not fit.
fn backends_at(addresses: &BTreeSet<SocketAddr>, own: &[Backend], room: &mut usize) -> (Vec<Backend>, usize) {
    let mut backends: Vec<_> =
        own.iter().filter(|backend| addresses.contains(&backend.address)).cloned().collect();
    let mut left_out = 0;
    for address in addresses.iter().filter(|address| own.iter().all(|it| it.address != **address)) {
        if *room == 0 {
            left_out += 1;
            continue;
        }
        *room -= 1;
        let taken = |name: &String| own.iter().any(|backend| backend.name == *name);
        let name = Some(address.to_string()).filter(|name| !taken(name));
        backends.push(Backend {
            name: name.unwrap_or_else(|| format!("{address}@cluster")),
            address: *address,
            weight: 1,
            host: None,
            discovered: true,
        });
    }
    (backends, left_out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config(backends: &str, more: &str) -> Config {
        let text = format!(
            "[[service]]\nname = \"api\"\nlisten = [\"192.0.2.1:6443\", \"127.0.0.1:16443\"]\n\
             backends = [{backends}]\ndiscover = {{ kubeconfig = \"/k\"{more} }}"
        );
        Config::parse(&text, "test.toml").unwrap().0
    }

    fn at(last: u8) -> SocketAddr {
        ([10, 0, 0, last], 6443).into()
    }

    /// `d` discovered, `r` ready, `u` usable, `a` to be asked, `s` silent.
    fn present(last: u8, how: &str) -> Present {
        let is = |letter| how.contains(letter);
        let leave = match () {
            () if is('s') => Leave::Silent,
            () if is('a') => Leave::Asked,
            () => Leave::Granted,
        };
        Present { address: at(last), discovered: is('d'), ready: is('r'), usable: is('u') || is('r'), leave }
    }

    fn wanted(config: &Config, list: Option<&[u8]>, present: &[Present]) -> Wanted {
        let list = list.map(|list| list.iter().map(|last| at(*last)).collect());
        let known = Known::remembered("default/kubernetes".to_owned(), list);
        let situation = Situation {
            present: BTreeMap::from([("api".to_owned(), present.to_vec())]),
            here: BTreeSet::from([[10, 0, 0, 99].into()]),
        };
        merge_all(config, &BTreeMap::from([("api".to_owned(), known)]), &situation)
    }

    fn lasts(wanted: &Wanted) -> Vec<u8> {
        let last = |backend: &Backend| match backend.address {
            SocketAddr::V4(address) => address.ip().octets()[3],
            SocketAddr::V6(_) => 0,
        };
        wanted.config.services[0].backends.iter().map(last).collect()
    }

    const ADDED: &str = "\"10.0.0.1:6443\"";

    #[test]
    fn what_is_listed_is_added_and_no_address_is_there_twice() {
        let mut config = config(ADDED, "");
        config.services[0].backends[0].name = "master-1".to_owned();
        let wanted = wanted(&config, Some(&[2, 1]), &[]);
        assert_eq!(lasts(&wanted), [1, 2]);
        let backends = &wanted.config.services[0].backends;
        assert_eq!((backends[0].name.as_str(), backends[0].discovered), ("master-1", false));
        assert_eq!((backends[1].name.as_str(), backends[1].discovered), ("10.0.0.2:6443", true));
        assert_eq!(wanted.sentences(), Vec::<String>::new());
    }

    #[test]
    fn without_a_list_nothing_changes() {
        let config = config(ADDED, "");
        assert_eq!(lasts(&wanted(&config, None, &[])), [1]);
        let there = [present(1, "r"), present(2, "dr"), present(9, "r")];
        assert_eq!(lasts(&wanted(&config, None, &there)), [1, 2], "the file does not name the last any more");
    }

    #[test]
    fn one_that_is_not_listed_any_more_leaves_while_another_is_usable() {
        let config = config(ADDED, "");
        let there = [present(1, "r"), present(2, "dr"), present(3, "dr")];
        assert_eq!(lasts(&wanted(&config, Some(&[3]), &there)), [1, 3]);
        assert_eq!(lasts(&wanted(&config, Some(&[]), &there)), [1]);
        let only_listed = [present(1, ""), present(2, "dr"), present(3, "dr")];
        assert_eq!(lasts(&wanted(&config, Some(&[3]), &only_listed)), [1, 3]);
    }

    #[test]
    fn a_list_that_leaves_nobody_usable_is_held_until_somebody_is() {
        let config = config(ADDED, "");
        let before = [present(1, ""), present(2, "dr"), present(3, "d")];
        for list in [&[][..], &[3], &[4]] {
            let held = wanted(&config, Some(list), &before);
            assert_eq!(held.held["api"], BTreeSet::from([at(2)]), "{list:?}");
            assert!(lasts(&held).contains(&2) && !lasts(&held).iter().any(|it| *it == 3 && list != [3]));
            assert!(held.sentences()[0].contains("is held"), "{:?}", held.sentences());
        }
        // The newcomer is there already, and becomes ready.
        let after = [present(1, ""), present(2, "dr"), present(4, "dr")];
        let released = wanted(&config, Some(&[4]), &after);
        assert_eq!((lasts(&released), released.held.len()), (vec![1, 4], 0));
    }

    #[test]
    fn who_leaves_the_list_stays_until_it_is_known_how_it_is() {
        let config = config(ADDED, "");
        let leaves =
            |how: &str| wanted(&config, Some(&[3]), &[present(1, "r"), present(2, how), present(3, "dr")]);
        for (how, stays, said) in
            [("dra", true, false), ("ds", true, true), ("d", false, false), ("dr", false, false)]
        {
            let wanted = leaves(how);
            assert_eq!(lasts(&wanted).contains(&2), stays, "{how}");
            assert_eq!(
                wanted.sentences().iter().any(|it| it.contains("does not answer: it stays")),
                said,
                "{how}"
            );
            assert_eq!(wanted.leaving["api"].keys().collect::<Vec<_>>(), [&at(2)], "{how}");
            assert!(wanted.held.is_empty(), "{how}");
        }
        let listed = wanted(&config, Some(&[2, 3]), &[present(1, "r"), present(2, "ds"), present(3, "dr")]);
        assert_eq!((lasts(&listed), listed.leaving.len()), (vec![1, 2, 3], 0));
        // All are silent: who is usable is none, and who is silent stays.
        let all = [present(1, "s"), present(2, "ds"), present(3, "ds")];
        let blind = wanted(&config, Some(&[]), &all);
        assert_eq!((lasts(&blind), blind.sentences().len()), (vec![1, 2, 3], 2));
        // An operator's word goes before it.
        let unnamed = wanted(&config, Some(&[]), &[present(1, "r"), present(9, "s")]);
        assert_eq!((lasts(&unnamed), unnamed.leaving.len()), (vec![1], 0));
    }

    #[test]
    fn the_files_backends_leave_a_list_that_replaces_them_in_the_same_way() {
        let config = config("\"10.0.0.1:6443\", \"10.0.0.2:6443\"", ", replace = true");
        let there = |how: &str| [present(1, how), present(2, ""), present(3, "dr")];
        assert_eq!(lasts(&wanted(&config, Some(&[3]), &there("s"))), [1, 3]);
        assert_eq!(lasts(&wanted(&config, Some(&[3]), &there("a"))), [1, 3]);
        assert_eq!(lasts(&wanted(&config, Some(&[3]), &there(""))), [3]);
    }

    #[test]
    fn who_cannot_be_a_backend_any_more_goes_however_it_is() {
        let mut config = config(ADDED, "");
        config.services[0].listen.push("10.0.0.2:6443".parse().unwrap());
        let gone = wanted(&config, Some(&[3]), &[present(1, "r"), present(2, "ds"), present(3, "dr")]);
        assert_eq!((lasts(&gone), gone.sentences().len()), (vec![1, 3], 0));
    }

    #[test]
    fn nobody_usable_before_is_nobody_to_be_held() {
        let config = config(ADDED, "");
        let wanted = wanted(&config, Some(&[4]), &[present(1, ""), present(2, "d")]);
        assert_eq!((lasts(&wanted), wanted.held.len()), (vec![1, 4], 0));
    }

    #[test]
    fn the_files_backends_are_replaced_once_one_of_the_clusters_is_ready_and_come_back() {
        let config = config("\"10.0.0.1:6443\", \"10.0.0.2:6443\"", ", replace = true");
        let list = Some(&[2, 3][..]);
        assert_eq!(lasts(&wanted(&config, list, &[present(1, "r"), present(2, "")])), [1, 2, 3]);
        let draining = [present(1, "u"), present(2, "u"), present(3, "du")];
        assert_eq!(lasts(&wanted(&config, list, &draining)), [1, 2, 3], "nobody is ready");
        let ready = [present(1, "r"), present(2, ""), present(3, "dr")];
        assert_eq!(lasts(&wanted(&config, list, &ready)), [2, 3]);
        let still = [present(2, "u"), present(3, "du")];
        assert_eq!(lasts(&wanted(&config, list, &still)), [2, 3], "replaced already");
        let gone = [present(2, ""), present(3, "d")];
        assert_eq!(lasts(&wanted(&config, list, &gone)), [1, 2, 3], "better than nobody");
    }

    #[test]
    fn what_cannot_be_a_backend_is_left_out_and_named() {
        let mut config = config(ADDED, "");
        config.services[0].listen.push("192.0.2.1:443".parse().unwrap());
        let list = ["192.0.2.1:6443", "127.0.0.1:6443", "224.0.0.1:6443", "10.0.0.99:6443", "[fd00::1]:6443"];
        let list = list.iter().map(|text| text.parse().unwrap()).chain([at(2)]).collect();
        let known = Known::remembered("default/kubernetes".to_owned(), Some(list));
        let situation = Situation { here: BTreeSet::from([[10, 0, 0, 99].into()]), ..Situation::default() };
        let wanted = merge_all(&config, &BTreeMap::from([("api".to_owned(), known)]), &situation);
        assert_eq!(lasts(&wanted), [1, 2]);
        let said = wanted.sentences().join("\n");
        for reason in
            ["it is a VIP", "loopback", "not the address of one host", "has not the port of listener"]
        {
            assert!(said.contains(reason), "{said}");
        }
        assert_eq!(wanted.problems.len(), 4, "another family is no mistake: {said}");
    }

    #[test]
    fn more_than_the_data_path_holds_are_left_out() {
        let own: Vec<_> = (1..=250).map(|last| format!("\"10.0.1.{last}:6443\"")).collect();
        let wanted = wanted(&config(&own.join(","), ""), Some(&Vec::from_iter(1..=20)), &[]);
        assert_eq!(wanted.config.services[0].backends.len(), BACKENDS_MAX);
        assert!(wanted.sentences()[0].contains("15 of the cluster's backends are left out"));
    }

    proptest! {
        #[test]
        fn as_long_as_somebody_is_usable_somebody_usable_stays(
            replace in any::<bool>(),
            own in proptest::collection::btree_set(1_u8..8, 1..4),
            list in proptest::collection::btree_set(1_u8..8, 0..5),
            there in proptest::collection::btree_map(1_u8..8, (any::<bool>(), any::<bool>(), 0..3_usize), 0..7),
        ) {
            let own_text: Vec<_> = own.iter().map(|last| format!("\"10.0.0.{last}:6443\"")).collect();
            let config = config(&own_text.join(","), &format!(", replace = {replace}"));
            let leaves = [Leave::Granted, Leave::Asked, Leave::Silent];
            let there: Vec<_> = there.into_iter().map(|(last, (ready, usable, leave))| Present {
                address: at(last), discovered: !own.contains(&last), ready, usable: usable || ready,
                leave: leaves[leave],
            }).collect();
            let list: Vec<_> = list.into_iter().collect();
            let wanted = wanted(&config, Some(&list), &there);
            let after: BTreeSet<_> =
                wanted.config.services[0].backends.iter().map(|it| it.address).collect();
            prop_assert_eq!(after.len(), wanted.config.services[0].backends.len(), "each once");
            let usable: BTreeSet<_> = there.iter().filter(|it| it.usable).map(|it| it.address).collect();
            prop_assert!(usable.is_empty() || !after.is_disjoint(&usable));
            for last in &list {
                prop_assert!(after.contains(&at(*last)), "what is listed is there");
            }
            for address in &after {
                let known = list.iter().chain(&own).any(|last| at(*last) == *address);
                let held = wanted.held.get("api").is_some_and(|held| held.contains(address));
                let stays = wanted.leaving.get("api").and_then(|it| it.get(address));
                prop_assert!(known || held || stays.is_some_and(|it| *it != Leave::Granted), "and nobody else");
            }
            for it in there.iter().filter(|it| it.leave != Leave::Granted) {
                prop_assert!(after.contains(&it.address), "nobody goes without leave");
            }
        }
    }
}
