//! Whether the backends answer the addresses that flows leave from. Checks leave from this host's own address: they pass
//! where a firewall drops the SNAT address, or the way back to it leads elsewhere, and only clients would find that out.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr},
};

use futures_util::{StreamExt as _, future::join_all, stream};

use super::{
    Finding, failure, note, ok,
    syn::{self, Answer, Origin},
    warning,
};
use crate::{config::Config, controller, network::Network};

/// So many backends at a time: each takes a socket for every SNAT address, of which a family has 16 at most.
const AT_ONCE: usize = 32;

/// A backend on another host.
#[derive(Clone, Debug)]
struct Target {
    /// Service and backend.
    name: String,
    address: SocketAddr,
    /// The address that this host itself uses towards it.
    own: Option<IpAddr>,
}

/// What is known of a SNAT address and a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen {
    /// It answers this address.
    Answers,
    /// It refuses this address, and accepts this host's own.
    Refuses,
    /// It answers this host's own address and not this one: what came instead.
    Ignores(String),
    /// It answers nobody.
    Silent,
    /// It answers this host, and no port that is never a slot.
    NoReservedPorts,
    /// No SYN could be sent: why.
    NotTried(String),
}

pub(super) async fn examine(network: &Network, config: &Config) -> Vec<Finding> {
    if !config.forwards_packets() {
        return Vec::new();
    }
    let addresses = match controller::snat_addresses(config, network).await {
        Ok(addresses) => addresses,
        Err(error) => {
            return vec![warning("SNAT addresses", error.to_string()).fix("run sheave doctor as root")];
        }
    };
    let targets = targets(network, config).await;
    let here = |address: &&IpAddr| network.interface_carrying(**address).is_some();
    let listeners =
        config.services.iter().flat_map(|service| &service.listen).map(SocketAddr::port).collect();
    let from: Vec<_> = addresses.iter().filter(here).copied().collect();
    let seen: Vec<_> = stream::iter(&targets)
        .map(async |target| (target, try_all(target, &from, &listeners).await))
        .buffered(AT_ONCE)
        .collect()
        .await;
    let mut findings = Vec::new();
    for address in &addresses {
        let of_address = seen.iter().filter_map(|(target, seen)| Some((*target, seen.get(address)?)));
        findings.extend(report(*address, &of_address.collect::<Vec<_>>(), &addresses));
        let answerable = targets.iter().any(|target| target.address.is_ipv4() == address.is_ipv4());
        if !here(&address) && answerable {
            findings.push(elsewhere(*address, config.vips().contains(address)));
        }
    }
    findings
}

/// Each backend once, however many services have it.
async fn targets(network: &Network, config: &Config) -> Vec<Target> {
    let mut targets = BTreeMap::new();
    for service in &config.services {
        for backend in &service.backends {
            let name = || format!("{}/{}", service.name, backend.name);
            targets.entry(backend.address).or_insert_with(name);
        }
    }
    let routed = targets.into_iter().map(async |(address, name)| {
        // Who is this host has no way back, and to whom there is no way is said elsewhere.
        let route = network.route_to(address.ip()).await.ok().filter(|route| !route.local)?;
        Some(Target { name, address, own: route.preferred_source })
    });
    join_all(routed).await.into_iter().flatten().collect()
}

/// Tries a backend from every SNAT address of its family.
async fn try_all(target: &Target, from: &[IpAddr], listeners: &BTreeSet<u16>) -> BTreeMap<IpAddr, Seen> {
    let from = from.iter().filter(|address| address.is_ipv4() == target.address.is_ipv4());
    let first = join_all(from.map(async |address| {
        (*address, syn::send(Origin::Reserved(Some(*address), listeners), target.address).await)
    }));
    let (answered, doubtful): (Vec<_>, Vec<_>) =
        first.await.into_iter().partition(|(_, answer)| matches!(answer, Ok(Answer::Accepted)));
    let mut seen: BTreeMap<_, _> =
        answered.into_iter().map(|(address, _)| (address, Seen::Answers)).collect();
    if doubtful.is_empty() {
        return seen;
    }
    // Once more, beside this host's own address: a server may have stopped or started meanwhile.
    let own_reserved = syn::send(Origin::Reserved(None, listeners), target.address);
    let own = syn::send(Origin::Usual, target.address);
    let again = join_all(doubtful.iter().map(async |(address, _)| {
        (*address, syn::send(Origin::Reserved(Some(*address), listeners), target.address).await)
    }));
    let (again, own_reserved, own) = tokio::join!(again, own_reserved, own);
    for (address, answer) in again {
        let is_own = target.own == Some(address);
        seen.insert(address, judge(&answer, &own_reserved, &own, is_own));
    }
    seen
}

/// What the answers to a SNAT address mean beside those to this host's own address, at a port as low and at any. Where both
/// are the same address (`is_own`), any port tells.
fn judge(
    snat: &io::Result<Answer>,
    own_reserved: &io::Result<Answer>,
    own: &io::Result<Answer>,
    is_own: bool,
) -> Seen {
    let reason = match (snat, own_reserved) {
        (Ok(Answer::Refused), Ok(Answer::Accepted)) if !is_own => return Seen::Refuses,
        (Ok(Answer::Accepted | Answer::Refused), _) => return Seen::Answers,
        (Err(error), _) | (_, Err(error)) => return Seen::NotTried(why(error)),
        (Ok(Answer::Nothing(reason)), Ok(_)) => reason,
    };
    let came = |answer: &io::Result<Answer>| matches!(answer, Ok(Answer::Accepted | Answer::Refused));
    match (came(own_reserved), came(own)) {
        (false, false) => Seen::Silent,
        _ if is_own => Seen::Answers,
        (true, _) => Seen::Ignores(reason.clone()),
        (false, true) => Seen::NoReservedPorts,
    }
}

fn why(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "a port below 1024 needs CAP_NET_BIND_SERVICE: run sheave doctor as root".to_owned()
        }
        _ => error.to_string(),
    }
}

/// Who answers a SNAT address of this host, in one finding, and one for each who does not and should.
fn report(address: IpAddr, seen: &[(&Target, &Seen)], addresses: &[IpAddr]) -> Vec<Finding> {
    let subject = format!("SNAT address {address}");
    let mut findings: Vec<_> = seen
        .iter()
        .filter_map(|(target, seen)| unanswered(&subject, address, target, seen, addresses))
        .collect();
    if let Some(why) = seen.iter().find_map(|(_, seen)| match seen {
        Seen::NotTried(why) => Some(why),
        _ => None,
    }) {
        let what = format!("whether backends answer it cannot be tried: {why}");
        findings.push(note(&subject, what));
    }
    let answering = seen.iter().filter(|(_, seen)| **seen == Seen::Answers).count();
    let silent =
        seen.iter().filter(|(_, seen)| **seen == Seen::Silent).map(|(target, _)| target.name.as_str());
    let silent: Vec<_> = silent.collect();
    if answering > 0 {
        let mut what = format!("is answered by {answering} of {} backends", seen.len());
        if !silent.is_empty() {
            what += &format!("; no address of this host is answered by {}", silent.join(", "));
        }
        findings.push(ok(subject, what));
    } else if !silent.is_empty() && silent.len() == seen.len() {
        findings.push(note(
            subject,
            "no backend answers this host at all: whether one would answer it cannot be told",
        ));
    }
    findings
}

/// About a backend that answers this host, and not this address.
fn unanswered(
    subject: &str,
    address: IpAddr,
    target: &Target,
    seen: &Seen,
    addresses: &[IpAddr],
) -> Option<Finding> {
    let Target { name, address: backend, own } = target;
    let other = own.map_or_else(|| "this host's own".to_owned(), |own| format!("this host's own {own}"));
    let what = match seen {
        Seen::Ignores(reason) => format!(
            "backend {name} ({backend}) answers {other}, where checks come from, and not this one ({reason}): clients \
             that are sent there hang"
        ),
        Seen::Refuses => format!(
            "backend {name} ({backend}) accepts {other}, where checks come from, and refuses this one: so it does \
             clients that are sent there"
        ),
        Seen::NoReservedPorts => {
            let what = format!(
                "backend {name} ({backend}) answers no port below 1024 of this host, and no other can be tried: \
                 whether it answers this address cannot be told"
            );
            return Some(note(subject, what));
        }
        Seen::Answers | Seen::Silent | Seen::NotTried(_) => return None,
    };
    Some(failure(subject, what).fix(fixes(address, target, seen, addresses)))
}

/// The likeliest first, a line each.
fn fixes(address: IpAddr, target: &Target, seen: &Seen, addresses: &[IpAddr]) -> String {
    let backend = target.address.ip();
    let mut fixes =
        vec![format!("on {backend}: nft list ruleset; iptables-save: its firewall must let {address} in")];
    if matches!(seen, Seen::Ignores(_)) {
        fixes.push(format!("on {backend}: ip route get {address}: must lead to this host"));
        if address.is_ipv4() {
            fixes.push(format!(
                "on {backend}, where that is not the interface by which {address} comes: sysctl -w \
                 net.ipv4.conf.all.rp_filter=2"
            ));
        }
        fixes.push(format!(
            "a virtual network must allow this host the address {address} (port security, allowed address pairs)"
        ));
        fixes.push(format!(
            "here: nft list ruleset: an input rule that drops what comes for {address} keeps the answer from doctor alone"
        ));
    }
    if let Some(own) = target.own.filter(|own| !addresses.contains(own)) {
        let others = addresses.iter().filter(|other| other.is_ipv4() != own.is_ipv4());
        let named: Vec<_> = [&own].into_iter().chain(others).map(|it| format!("\"{it}\"")).collect();
        fixes.push(format!("or here: snat_addresses = [{}] in [dataplane]", named.join(", ")));
    }
    fixes.join("\n")
}

/// About a SNAT address that is not on this host.
fn elsewhere(address: IpAddr, is_vip: bool) -> Finding {
    let subject = format!("SNAT address {address}");
    if is_vip {
        let what =
            "is not on this host now: sheave doctor tries whether backends answer it, where and when it is";
        return note(subject, what);
    }
    let length = if address.is_ipv4() { 32 } else { 128 };
    warning(subject, "is neither a VIP nor on this host: backends find nobody there").fix(format!(
        "ip address add {address}/{length} dev INTERFACE, or name an address of this host in dataplane.snat_addresses"
    ))
}

#[cfg(test)]
mod tests {
    use super::{super::Level, *};

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn target(name: &str, address: &str, own: &str) -> Target {
        Target { name: name.to_owned(), address: address.parse().unwrap(), own: Some(ip(own)) }
    }

    #[test]
    fn a_missing_answer_counts_only_beside_one_to_this_hosts_own_address() {
        let yes = || Ok(Answer::Accepted);
        let refused = || Ok(Answer::Refused);
        let nothing = || Ok(Answer::Nothing("no answer".to_owned()));
        let ignored = Seen::Ignores("no answer".to_owned());
        for (snat, own_reserved, own, is_own, wanted) in [
            (yes(), nothing(), nothing(), false, Seen::Answers),
            (nothing(), yes(), yes(), false, ignored.clone()),
            // A server that is away has a way back too.
            (nothing(), refused(), refused(), false, ignored),
            (refused(), refused(), refused(), false, Seen::Answers),
            (refused(), nothing(), nothing(), false, Seen::Answers),
            (refused(), yes(), yes(), false, Seen::Refuses),
            (nothing(), nothing(), yes(), false, Seen::NoReservedPorts),
            (nothing(), nothing(), nothing(), false, Seen::Silent),
            // One address: it has the answer at one of its ports.
            (nothing(), nothing(), yes(), true, Seen::Answers),
            (nothing(), nothing(), nothing(), true, Seen::Silent),
            (refused(), yes(), yes(), true, Seen::Answers),
        ] {
            let case = format!("{snat:?} {own_reserved:?} {own:?} {is_own}");
            assert_eq!(judge(&snat, &own_reserved, &own, is_own), wanted, "{case}");
        }
        let denied = || Err(io::Error::from(io::ErrorKind::PermissionDenied));
        let Seen::NotTried(why) = judge(&denied(), &denied(), &yes(), false) else { panic!("tried") };
        assert!(why.contains("CAP_NET_BIND_SERVICE"), "{why}");
        assert_eq!(judge(&yes(), &denied(), &yes(), false), Seen::Answers);
    }

    #[test]
    fn whoever_does_not_answer_is_named_with_what_puts_it_right() {
        let targets = [
            target("api/m1", "10.0.0.11:6443", "10.0.0.2"),
            target("api/m2", "10.0.0.12:6443", "10.0.0.2"),
            target("api/m3", "10.0.0.13:6443", "10.0.0.2"),
        ];
        let seen = [Seen::Answers, Seen::Ignores("no answer".to_owned()), Seen::Silent];
        let vips = [ip("10.0.0.100"), ip("fd00::100")];
        let findings = report(vips[0], &targets.iter().zip(&seen).collect::<Vec<_>>(), &vips);
        let [ignores, rest] = findings.as_slice() else { panic!("{findings:#?}") };
        assert_eq!((ignores.level, ignores.subject.as_str()), (Level::Failure, "SNAT address 10.0.0.100"));
        assert!(
            ignores.what.contains("backend api/m2 (10.0.0.12:6443) answers this host's own 10.0.0.2, where")
        );
        let fix = ignores.fix.as_deref().unwrap();
        for part in [
            "on 10.0.0.12: ip route get 10.0.0.100",
            "net.ipv4.conf.all.rp_filter=2",
            "port security",
            // The configuration wants one of each family.
            "snat_addresses = [\"10.0.0.2\", \"fd00::100\"]",
        ] {
            assert!(fix.contains(part), "{part} is missing in {fix}");
        }
        assert_eq!(rest.level, Level::Ok);
        assert_eq!(
            rest.what,
            "is answered by 1 of 3 backends; no address of this host is answered by api/m3"
        );
    }

    #[test]
    fn a_refusal_is_the_firewalls_and_no_address_is_proposed_that_is_one_already() {
        let target = target("api/m1", "[fd00::11]:6443", "fd00::2");
        let snat = [ip("fd00::100"), ip("fd00::2")];
        let findings = report(snat[0], &[(&target, &Seen::Refuses)], &snat);
        let [refuses] = findings.as_slice() else { panic!("{findings:#?}") };
        assert_eq!(refuses.level, Level::Failure);
        let fix = refuses.fix.as_deref().unwrap();
        assert!(fix.starts_with("on fd00::11: nft list ruleset") && fix.lines().count() == 1, "{fix}");
        let findings = report(snat[0], &[(&target, &Seen::Ignores("no answer".to_owned()))], &snat);
        let fix = findings[0].fix.as_deref().unwrap();
        assert!(!fix.contains("rp_filter") && !fix.contains("snat_addresses"), "IPv6 has none: {fix}");
    }

    #[test]
    fn what_could_not_be_tried_is_no_failure() {
        let target = target("api/m1", "10.0.0.11:6443", "10.0.0.2");
        let about = |seen: Seen| {
            let findings =
                report(ip("10.0.0.100"), &[(&target, &seen), (&target, &seen)], &[ip("10.0.0.100")]);
            assert!(findings.iter().all(|finding| finding.level == Level::Note), "{findings:#?}");
            findings
        };
        let denied = about(Seen::NotTried("Permission denied".to_owned()));
        assert_eq!(denied.len(), 1, "once for an address: {denied:#?}");
        assert!(denied[0].what.contains("cannot be tried: Permission denied"), "{denied:#?}");
        assert!(
            about(Seen::NoReservedPorts)[0]
                .what
                .contains("api/m1 (10.0.0.11:6443) answers no port below 1024")
        );
        let silent = about(Seen::Silent);
        assert!(silent.len() == 1 && silent[0].what.contains("cannot be told"), "{silent:#?}");
        assert_eq!(report(ip("10.0.0.100"), &[], &[]), [], "nobody there to answer");
    }

    #[test]
    fn an_address_elsewhere_is_tried_where_it_is() {
        assert_eq!(elsewhere(ip("10.0.0.100"), true).level, Level::Note);
        let nowhere = elsewhere(ip("fd00::9"), false);
        assert_eq!(nowhere.level, Level::Warning);
        assert!(nowhere.fix.unwrap().contains("ip address add fd00::9/128"));
    }
}
