//! What another configuration would change, in words. Pure.

use std::net::IpAddr;

use crate::config::{Backend, Config, Service};

/// Keys that the flow table was made for: a restart does not change them either.
pub(super) const FLOW_TABLE: [&str; 2] = ["dataplane.snat_addresses_max", "dataplane.hash_key_file"];

/// What cannot change while the daemon runs, and is different: keys of the file.
pub(super) fn needs_restart(old: &Config, new: &Config) -> Vec<&'static str> {
    let (before, after) = (&old.dataplane, &new.dataplane);
    [
        ("dataplane.interfaces", before.interfaces != after.interfaces),
        ("dataplane.backend_interfaces", before.backend_interfaces != after.backend_interfaces),
        ("dataplane.xdp_mode", before.xdp_mode != after.xdp_mode),
        ("dataplane.snat_addresses_max", before.snat_addresses_max != after.snat_addresses_max),
        ("dataplane.hash_key_file", before.hash_key_file != after.hash_key_file),
        ("dataplane.state_dir", before.state_dir != after.state_dir),
        ("dataplane.pin_dir", before.pin_dir != after.pin_dir),
        ("dataplane.cgroup", before.cgroup != after.cgroup),
        ("vip.mode", old.vip != new.vip),
        ("admin.socket", old.admin.socket != new.admin.socket),
        ("admin.group", old.admin.group != new.admin.group),
        ("admin.listen", old.admin.listen != new.admin.listen),
    ]
    .into_iter()
    .filter_map(|(key, differs)| differs.then_some(key))
    .collect()
}

/// What is different between two configurations, a line each, for the operator.
pub(super) fn changes(old: &Config, new: &Config) -> Vec<String> {
    let mut lines = of_dataplane(old, new);
    for service in &new.services {
        match old.services.iter().find(|before| before.name == service.name) {
            Some(before) => of_service(before, service, &mut lines),
            None => lines.push(format!(
                "service {} is new, on {}",
                service.name,
                service.listen.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
            )),
        }
    }
    let stays = |name: &str| new.services.iter().any(|service| service.name == name);
    for service in old.services.iter().filter(|service| !stays(&service.name)) {
        lines.push(format!(
            "service {} is gone: it takes no new connections, those it has live on",
            service.name
        ));
    }
    lines
}

/// What a source may use, and what an ICMP error may ask for.
fn of_dataplane(old: &Config, new: &Config) -> Vec<String> {
    let (before, after) = (&old.dataplane, &new.dataplane);
    let text = |share: Option<u8>| share.map_or("off".to_owned(), |percent| format!("{percent}%"));
    [
        ("source_share", text(before.source_share), text(after.source_share)),
        ("half_open_share", text(before.half_open_share), text(after.half_open_share)),
        ("path_mtu_floor", before.path_mtu_floor.to_string(), after.path_mtu_floor.to_string()),
    ]
    .into_iter()
    .filter(|(_, before, after)| before != after)
    .map(|(key, before, after)| format!("{key} is {after}, before {before}"))
    .collect()
}

/// What becomes of flows when they leave from other addresses than before.
pub(super) fn of_snat_addresses(old: &[IpAddr], new: &[IpAddr]) -> Vec<String> {
    let only_in = |these: &[IpAddr], others: &[IpAddr]| -> Vec<IpAddr> {
        these.iter().filter(|address| !others.contains(address)).copied().collect()
    };
    let (come, go) = (only_in(new, old), only_in(old, new));
    let as_well = if go.len() < old.len() { " as well" } else { "" };
    let come = (!come.is_empty()).then(|| format!("new connections leave from {}{as_well}", list(&come)));
    let go = (!go.is_empty())
        .then(|| format!("no new connection leaves from {}: those that do live on", list(&go)));
    come.into_iter().chain(go).collect()
}

/// With commas between them.
pub(super) fn list(addresses: &[IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn of_service(old: &Service, new: &Service, lines: &mut Vec<String>) {
    let name = &new.name;
    for listener in new.listen.iter().filter(|it| !old.listen.contains(it)) {
        lines.push(format!("{name}: listener {listener} is new"));
    }
    for listener in old.listen.iter().filter(|it| !new.listen.contains(it)) {
        lines.push(format!("{name}: listener {listener} is gone: its connections live on"));
    }
    for backend in &new.backends {
        match old.backends.iter().find(|before| before.address == backend.address) {
            None => lines.push(format!("{name}: backend {} is new, at {}", backend.name, backend.address)),
            Some(before) => of_backend(name, before, backend, lines),
        }
    }
    let stays = |backend: &Backend| new.backends.iter().any(|after| after.address == backend.address);
    for backend in old.backends.iter().filter(|backend| !stays(backend)) {
        lines.push(format!(
            "{name}: backend {} ({}) is gone: no new flows, those it has live on",
            backend.name, backend.address
        ));
    }
    for (what, differs) in [
        ("idle_timeout", old.idle_timeout != new.idle_timeout),
        ("allow", old.allow != new.allow),
        ("on_dead", old.on_dead != new.on_dead),
        ("on_idle", old.on_idle != new.on_idle),
        ("reset_after", old.reset_after != new.reset_after),
        ("reset_rate", old.reset_rate != new.reset_rate),
        ("drain_timeout", old.drain_timeout != new.drain_timeout),
        ("pods", old.pods != new.pods),
        ("check", old.check != new.check),
        ("discover", old.discover != new.discover),
    ] {
        if differs {
            lines.push(format!("{name}: {what} is another"));
        }
    }
    // Keys of later releases, and any that this list does not know by name.
    let known = Service {
        listen: new.listen.clone(),
        backends: new.backends.clone(),
        // What they stand for is among the backends.
        named_backends: new.named_backends.clone(),
        idle_timeout: new.idle_timeout,
        allow: new.allow.clone(),
        on_dead: new.on_dead,
        on_idle: new.on_idle,
        reset_after: new.reset_after,
        reset_rate: new.reset_rate,
        drain_timeout: new.drain_timeout,
        pods: new.pods,
        check: new.check.clone(),
        discover: new.discover.clone(),
        ..old.clone()
    };
    if known != *new {
        lines.push(format!("{name}: other settings are different"));
    }
}

fn of_backend(service: &str, old: &Backend, new: &Backend, lines: &mut Vec<String>) {
    if old.name != new.name {
        lines.push(format!("{service}: backend {} is called {} now", old.name, new.name));
    }
    if old.weight != new.weight {
        lines.push(format!(
            "{service}: backend {} has weight {}, before {}",
            new.name, new.weight, old.weight
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: &str = "[[service]]\nname = \"api\"\nlisten = [\"10.0.0.100:6443\"]\n\
                         backends = [\"10.0.0.1:6443\", \"10.0.0.2:6443\"]\n";

    fn config(text: &str) -> Config {
        Config::parse(text, "test.toml").unwrap().0
    }

    fn said(text: &str) -> Vec<String> {
        changes(&config(FIRST), &config(text))
    }

    #[test]
    fn what_cannot_change_in_place_is_named_by_its_key() {
        for (text, key) in [
            ("[dataplane]\ninterfaces = [\"eth0\"]\n", "dataplane.interfaces"),
            ("[dataplane]\nxdp_mode = \"generic\"\n", "dataplane.xdp_mode"),
            ("[dataplane]\nsnat_addresses_max = 5\n", "dataplane.snat_addresses_max"),
            ("[dataplane]\nhash_key_file = \"/key\"\n", "dataplane.hash_key_file"),
            ("[dataplane]\nstate_dir = \"/tmp/other\"\n", "dataplane.state_dir"),
            ("[vip]\nmode = \"own\"\n", "vip.mode"),
            ("[admin]\nsocket = \"/tmp/other.sock\"\n", "admin.socket"),
            ("[admin]\ngroup = \"adm\"\n", "admin.group"),
            ("[admin]\nlisten = \"127.0.0.1:1936\"\n", "admin.listen"),
        ] {
            assert_eq!(needs_restart(&config(FIRST), &config(&format!("{text}{FIRST}"))), [key]);
        }
        assert_eq!(needs_restart(&config(FIRST), &config(FIRST)), Vec::<&str>::new());
    }

    #[test]
    fn the_same_is_no_change() {
        assert_eq!(said(FIRST), Vec::<String>::new());
    }

    #[test]
    fn the_shares_of_sources_and_the_path_mtu_floor_change_in_place() {
        let with = |lines: &str| config(&format!("[dataplane]\n{lines}\n{FIRST}"));
        let other = with("source_share = \"off\"\nhalf_open_share = \"10%\"\npath_mtu_floor = 1280");
        assert_eq!(
            changes(&config(FIRST), &other),
            [
                "source_share is off, before 50%",
                "half_open_share is 10%, before off",
                "path_mtu_floor is 1280, before 552"
            ]
        );
        assert_eq!(needs_restart(&config(FIRST), &other), [""; 0]);
    }

    #[test]
    fn a_name_is_told_by_the_addresses_it_stands_for() {
        assert_eq!(
            said(&FIRST.replace("\"10.0.0.2:6443\"", "\"10.0.0.2:6443\", \"master-3:6443\"")),
            [""; 0]
        );
    }

    #[test]
    fn every_change_has_its_line() {
        assert_eq!(
            said(
                "[[service]]\nname = \"api\"\nlisten = [\"10.0.0.100:9345\"]\nidle_timeout = \"1h\"\nallow = [\"10.0.0.0/8\"]\n\
                 [[service.backend]]\nname = \"master-1\"\naddress = \"10.0.0.1:6443\"\nweight = 3\n\
                 [[service.backend]]\naddress = \"10.0.0.3:6443\"\n\
                 [service.check]\ntype = \"tcp\"\n\
                 [[service]]\nname = \"etcd\"\nlisten = [\"10.0.0.100:2379\"]\nbackends = [\"10.0.0.1:2379\"]\n"
            ),
            [
                "api: listener 10.0.0.100:9345 is new",
                "api: listener 10.0.0.100:6443 is gone: its connections live on",
                "api: backend 10.0.0.1:6443 is called master-1 now",
                "api: backend master-1 has weight 3, before 1",
                "api: backend 10.0.0.3:6443 is new, at 10.0.0.3:6443",
                "api: backend 10.0.0.2:6443 (10.0.0.2:6443) is gone: no new flows, those it has live on",
                "api: idle_timeout is another",
                "api: allow is another",
                "api: check is another",
                "service etcd is new, on 10.0.0.100:2379",
            ]
        );
        let renamed = FIRST.replace("\"api\"", "\"other\"");
        assert_eq!(
            said(&renamed),
            [
                "service other is new, on 10.0.0.100:6443",
                "service api is gone: it takes no new connections, those it has live on"
            ]
        );
    }
}
