//! `sheave doctor`: what on this host, or about its surroundings, would keep sheave from working, and the command that
//! puts it right. Looks, and changes nothing but this: backends see a SYN or two, and a daemon's flow table a flow that is ended
//! at once.

use std::{collections::BTreeSet, net::IpAddr};

use serde::Serialize;

use crate::{
    config::{Config, Interfaces},
    controller,
    network::{Network, Port},
};

mod bonds;
mod certificates;
mod firewall;
mod hook;
mod interfaces;
mod kernel;
mod mtu;
mod names;
mod neighbours;
mod path;
mod sockets;
mod syn;
mod vips;
mod way_back;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Good to know.
    Note,
    /// Works, but not as well as it could, or not for everybody.
    Warning,
    /// Does not work.
    Failure,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// What was looked at: `kernel`, `interface eth0`, `backend api/master-1`.
    pub subject: String,
    /// What was found, in a sentence.
    pub what: String,
    /// What puts it right: a command, or a line of a file.
    pub fix: Option<String>,
}

impl Finding {
    fn new(level: Level, subject: impl Into<String>, what: impl Into<String>) -> Self {
        Self { level, subject: subject.into(), what: what.into(), fix: None }
    }

    fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }
}

fn ok(subject: impl Into<String>, what: impl Into<String>) -> Finding {
    Finding::new(Level::Ok, subject, what)
}

fn note(subject: impl Into<String>, what: impl Into<String>) -> Finding {
    Finding::new(Level::Note, subject, what)
}

fn warning(subject: impl Into<String>, what: impl Into<String>) -> Finding {
    Finding::new(Level::Warning, subject, what)
}

fn failure(subject: impl Into<String>, what: impl Into<String>) -> Finding {
    Finding::new(Level::Failure, subject, what)
}

/// Looks at this host; with a configuration, also at what it names. In the order in which one would put things right.
pub async fn examine(config: Option<&Config>) -> Vec<Finding> {
    let mut findings = kernel::examine();
    let network = match Network::open().await {
        Ok((network, _)) => network,
        Err(error) => {
            findings.push(failure("network", error.to_string()).fix("run sheave doctor as root"));
            return findings;
        }
    };
    let resolved = match config {
        Some(config) => {
            let (config, problems) = names::examine(config).await;
            findings.extend(problems);
            let (config, found) = names::discover(&config).await;
            findings.extend(found);
            Some(config)
        }
        None => None,
    };
    let config = resolved.as_ref();
    let (ports, problems) = ports(&network, config).await;
    findings.extend(problems);
    findings.extend(interfaces::examine(&network, &ports, config).await);
    if let Some(config) = config {
        findings.extend(mtu::examine(&network, config).await);
        findings.extend(vips::examine(&network, config).await);
        findings.extend(neighbours::examine(&network, config).await);
        findings.extend(way_back::examine(&network, config).await);
        findings.extend(path::examine(&network, config).await);
        findings.extend(hook::examine(config));
        findings.extend(sockets::examine(&network, config).await);
        findings.extend(firewall::examine(config).await);
        findings.extend(certificates::examine(config).await);
    }
    findings
}

/// Where the program would be attached: as configured, else from the routes to backends and VIPs; without a
/// configuration every Ethernet interface that is up.
async fn ports(network: &Network, config: Option<&Config>) -> (Vec<Port>, Vec<Finding>) {
    let mut found = Vec::new();
    let mut problems = Vec::new();
    match config.map(|config| (&config.dataplane.interfaces, config)) {
        None => {
            let up = network.interfaces().into_iter().filter(|interface| interface.up);
            found.extend(up.filter_map(|interface| network.port_of(interface.index).ok()));
        }
        Some((_, config)) if !config.forwards_packets() => {}
        Some((Interfaces::None, _)) => {}
        Some((Interfaces::Named(names), _)) => {
            for name in names {
                let interface = network.interface_named(name);
                match interface.and_then(|interface| network.port_of(interface.index)) {
                    Ok(port) => found.push(port),
                    Err(error) => problems.push(failure("dataplane.interfaces", error.to_string())),
                }
            }
        }
        Some((Interfaces::Auto, config)) => {
            // Where it cannot be found out, as this host's own packets go.
            let snat = controller::snat_addresses(config, network).await.unwrap_or_default();
            let ends = listeners(config).into_iter().chain(backends(config)).chain(snat.iter().copied());
            for address in ends {
                let from = snat.iter().copied().find(|it| it.is_ipv4() == address.is_ipv4());
                let interface = match network.interface_carrying(address) {
                    Some(interface) => Some(interface),
                    None => network.route_from(from, address).await.ok().map(|route| route.interface),
                };
                found.extend(interface.and_then(|interface| network.port_of(interface).ok()));
            }
        }
    }
    // Of several on one interface one with tags: it says more.
    found.sort_by_key(|port| (port.index, std::cmp::Reverse(port.tags.len())));
    found.dedup_by_key(|port| port.index);
    (found, problems)
}

/// The addresses that packets are forwarded for.
fn listeners(config: &Config) -> BTreeSet<IpAddr> {
    config.vips().into_iter().collect()
}

/// The addresses of all backends.
fn backends(config: &Config) -> BTreeSet<IpAddr> {
    config.services.iter().flat_map(|service| &service.backends).map(|backend| backend.address.ip()).collect()
}

#[cfg(test)]
mod tests;
