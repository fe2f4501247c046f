//! Who serves whom: packets by XDP, connections of this host by the connect hook.
//!
//! There is no key for it. A listener on loopback has only clients on this host; any other has clients elsewhere, and
//! on this host as well.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use super::{
    Cgroup, Config, Interfaces, Service, VipMode,
    diagnostic::Problem,
    section::{Document, Section},
    service::ReadService,
};

impl Config {
    /// Whether packets of other hosts are forwarded.
    pub fn forwards_packets(&self) -> bool {
        self.dataplane.interfaces != Interfaces::None && self.services.iter().any(|it| !it.is_loopback_only())
    }

    /// Whether some listener answers nobody without the connect hook.
    pub fn needs_hook(&self) -> bool {
        self.dataplane.interfaces == Interfaces::None
            || self.services.iter().any(|service| service.pods || !service.loopback_listeners().is_empty())
    }

    /// The distinct addresses that packets of other hosts are forwarded for, in configuration order.
    pub fn vips(&self) -> Vec<IpAddr> {
        let mut vips = Vec::new();
        if self.dataplane.interfaces == Interfaces::None {
            return vips;
        }
        for listener in self.services.iter().flat_map(|service| &service.listen) {
            if !listener.ip().is_loopback() && !vips.contains(&listener.ip()) {
                vips.push(listener.ip());
            }
        }
        vips
    }
}

impl Service {
    /// Whether all its clients are on this host.
    pub fn is_loopback_only(&self) -> bool {
        self.listen.iter().all(|listener| listener.ip().is_loopback())
    }

    /// The listeners that only this host can reach.
    pub fn loopback_listeners(&self) -> Vec<SocketAddr> {
        self.listen.iter().copied().filter(|listener| listener.ip().is_loopback()).collect()
    }
}

/// `dataplane.cgroup`.
pub(super) fn cgroup(section: &Section) -> Result<Cgroup, Problem> {
    let Some(written) = section.text("cgroup", "\"auto\"")? else { return Ok(Cgroup::Auto) };
    match written.get_ref().as_str() {
        "auto" => Ok(Cgroup::Auto),
        "none" => Ok(Cgroup::None),
        path if path.starts_with('/') && !path.contains(['\0', '\n']) => {
            Ok(Cgroup::Directory(PathBuf::from(path)))
        }
        other => Err(Problem::at(written.span(), format!("{other:?} is not the directory of a cgroup"))
            .help("write \"auto\", \"none\", or a path such as \"/sys/fs/cgroup/system.slice\"")),
    }
}

/// Rejects services that nobody would serve.
pub(super) fn examine(
    root: &Section,
    config: &Config,
    services: &[ReadService],
    document: &mut Document,
) -> Result<(), Problem> {
    // Already read: the names of the keys are known to be right.
    let unhooked = config.dataplane.cgroup == Cgroup::None;
    let unattached = config.dataplane.interfaces == Interfaces::None;
    if unhooked && unattached {
        return Err(Problem::of_file("interfaces = [] and cgroup = \"none\": nobody would be served")
            .help("leave one of them out"));
    }
    if unattached && config.vip.mode == VipMode::Own {
        return Err(Problem::at(root.span_of("vip"), "mode = \"own\" with interfaces = []")
            .help("a VIP that no packets are forwarded for is not to be put here: leave one of them out"));
    }
    for read in services {
        let service = &read.service;
        for (listener, span) in service.listen.iter().zip(&read.listen_spans) {
            if unhooked && listener.ip().is_loopback() {
                return Err(Problem::at(
                    span.clone(),
                    format!("listener {listener} is on loopback, and cgroup = \"none\" leaves the connect hook out"),
                )
                .help("leave \"cgroup\" out: only the hook serves such a listener"));
            }
        }
        if unhooked && service.pods {
            return Err(Problem::at(read.pods_span.clone(), "pods = true, and cgroup = \"none\"")
                .help("leave \"cgroup\" out: pods are served by the connect hook"));
        }
        if service.pods && service.is_loopback_only() {
            document.warn(
                Problem::at(
                    read.pods_span.clone(),
                    format!("pods = true, and every listener of {:?} is on loopback", service.name),
                )
                .help("add a listener that pods can dial: every pod has a loopback interface of its own"),
            );
        }
    }
    Ok(())
}
