//! What holds between services, and between listeners and backends.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
};

use lb_common::layout;

use super::{
    Dataplane,
    diagnostic::{Problem, Span},
    section::Document,
    service::ReadService,
};

// The data path's ids begin with 1.
const BACKENDS_MAX: usize = layout::BACKENDS as usize - 1;
const SERVICES_MAX: usize = layout::SERVICES as usize - 1;
const LISTENERS_MAX: usize = layout::LISTENERS as usize - 1;
/// Of all services: what the data path's prefix map holds.
const ALLOW_MAX: usize = 4096;

/// Rejects what no single service can see.
pub(super) fn examine(
    dataplane: &Dataplane,
    services: &[ReadService],
    document: &mut Document,
) -> Result<(), Problem> {
    distinct_names(services)?;
    let listeners = distinct_listeners(services)?;
    for service in services {
        no_backend_is_a_listener(service, &listeners)?;
        families_meet(service, dataplane)?;
        warn(service, document);
    }
    snat_is_no_backend(dataplane, services)?;
    few_enough(dataplane, services)
}

fn distinct_names(services: &[ReadService]) -> Result<(), Problem> {
    let mut seen: HashMap<&str, &Span> = HashMap::new();
    for service in services {
        if let Some(first) = seen.insert(&service.service.name, &service.name_span) {
            return Err(Problem::at(
                service.name_span.clone(),
                format!("two services have the name {:?}", service.service.name),
            )
            .first_at(first.clone())
            .help("give each its own name"));
        }
    }
    Ok(())
}

fn distinct_listeners(services: &[ReadService]) -> Result<HashMap<SocketAddr, Span>, Problem> {
    let mut seen = HashMap::new();
    for service in services {
        for (listener, span) in service.service.listen.iter().zip(&service.listen_spans) {
            if let Some(first) = seen.insert(*listener, span.clone()) {
                return Err(Problem::at(span.clone(), format!("listener {listener} is given twice"))
                    .first_at(first)
                    .help("remove one of them: a packet can belong to one service only"));
            }
        }
    }
    Ok(seen)
}

fn no_backend_is_a_listener(
    service: &ReadService,
    listeners: &HashMap<SocketAddr, Span>,
) -> Result<(), Problem> {
    for (backend, span) in service.service.backends.iter().zip(&service.backend_spans) {
        let address = backend.address;
        if let Some(listener) = listeners.get(&address) {
            return Err(Problem::at(span.clone(), format!("backend {address} is itself a listener"))
                .first_at(listener.clone())
                .help("write the address of the server; flows to a listener would go round for ever"));
        }
        // A listener's address is this host's. A local backend gets its packets unchanged, so its port must be the
        // listener's, and then it is the listener.
        if let Some((_, listener)) = listeners.iter().find(|(listener, _)| listener.ip() == address.ip()) {
            return Err(Problem::at(
                span.clone(),
                format!("backend {address} is on an address that sheave listens on"),
            )
            .first_at(listener.clone())
            .help("write another address of that server: what arrives at a VIP is sheave's"));
        }
    }
    Ok(())
}

fn family(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "IPv4" } else { "IPv6" }
}

/// NAT does not translate between families.
fn families_meet(read: &ReadService, dataplane: &Dataplane) -> Result<(), Problem> {
    let service = &read.service;
    for (listener, span) in service.listen.iter().zip(&read.listen_spans) {
        let family = family(listener.ip());
        let known = service.backends.iter().any(|backend| backend.address.is_ipv4() == listener.is_ipv4());
        // A name may stand for either family, and the cluster may list both.
        if !known && service.named_backends.is_empty() && service.discover.is_none() {
            return Err(Problem::at(
                span.clone(),
                format!("listener {listener} is {family}, and no backend of {:?} is", service.name),
            )
            .help(format!(
                "add {family} addresses of the backends, or remove the listener: families are not translated"
            )));
        }
        let snat = &dataplane.snat_addresses;
        if !listener.ip().is_loopback()
            && !snat.is_empty()
            && !snat.iter().any(|address| address.is_ipv4() == listener.is_ipv4())
        {
            return Err(Problem::at(
                span.clone(),
                format!("listener {listener} is {family}, and \"snat_addresses\" has no {family} address"),
            )
            .help(format!(
                "add an {family} address to it, or leave it out: then flows leave from the VIPs"
            )));
        }
    }
    for (backend, span) in service.backends.iter().zip(&read.backend_spans) {
        let address = backend.address;
        if !service.listen.iter().any(|listener| listener.is_ipv4() == address.is_ipv4()) {
            let family = family(address.ip());
            return Err(Problem::at(
                span.clone(),
                format!("backend {address} is {family}, and no listener of {:?} is", service.name),
            )
            .help(format!("add an {family} listener, or remove the backend: it would never get a flow")));
        }
    }
    Ok(())
}

fn warn(read: &ReadService, document: &mut Document) {
    let service = &read.service;
    for (listener, span) in service.listen.iter().zip(&read.listen_spans) {
        let is_family = |address: IpAddr| address.is_ipv4() == listener.is_ipv4();
        let mut backends = service.backends.iter().filter(|backend| is_family(backend.address.ip()));
        let by_name = service.named_backends.iter().any(|backend| backend.weight > 0);
        if !by_name && service.discover.is_none() && backends.all(|backend| backend.weight == 0) {
            document.warn(
                Problem::at(span.clone(), format!("every backend for {listener} has weight 0: no new flows"))
                    .help("give at least one a weight from 1 to 256"),
            );
        }
        if !service.allow.is_empty() && !service.allow.iter().any(|prefix| is_family(prefix.addr())) {
            let family = family(listener.ip());
            document.warn(
                Problem::at(
                    read.allow_span.clone(),
                    format!("\"allow\" has no {family} prefix: nobody may connect to {listener}"),
                )
                .help(format!("add an {family} prefix, or remove the listener")),
            );
        }
    }
}

fn snat_is_no_backend(dataplane: &Dataplane, services: &[ReadService]) -> Result<(), Problem> {
    for service in services {
        for (backend, span) in service.service.backends.iter().zip(&service.backend_spans) {
            if dataplane.snat_addresses.contains(&backend.address.ip()) {
                return Err(Problem::at(
                    span.clone(),
                    format!("backend {} has an address that is in \"snat_addresses\"", backend.address),
                )
                .help("a SNAT address belongs to the load balancer: write another one there"));
            }
        }
    }
    Ok(())
}

fn few_enough(dataplane: &Dataplane, services: &[ReadService]) -> Result<(), Problem> {
    let listeners = services.iter().flat_map(|service| &service.listen_spans);
    let backends = services.iter().flat_map(|it| it.backend_spans.iter().chain(&it.named_spans));
    let names = services.iter().map(|service| &service.name_span);
    let prefixes = services.iter().flat_map(|read| read.service.allow.iter().map(|_prefix| &read.allow_span));
    beyond(names, SERVICES_MAX, "services")?;
    beyond(listeners, LISTENERS_MAX, "listeners")?;
    beyond(backends, BACKENDS_MAX, "backends")?;
    beyond(prefixes, ALLOW_MAX, "\"allow\" prefixes")?;
    few_listeners_per_port(services)?;
    few_snat_addresses(dataplane, services)
}

fn few_listeners_per_port(services: &[ReadService]) -> Result<(), Problem> {
    let mut ports: HashMap<u16, Vec<&Span>> = HashMap::new();
    for (listener, span) in listeners(services) {
        let spans = ports.entry(listener.port()).or_default();
        spans.push(span);
        let what = format!("listeners on port {}", listener.port());
        beyond(spans.iter().copied(), layout::LISTENERS_PER_PORT, &what)?;
    }
    Ok(())
}

/// Without SNAT addresses of their own, flows leave from the listeners' addresses.
fn few_snat_addresses(dataplane: &Dataplane, services: &[ReadService]) -> Result<(), Problem> {
    let most = layout::SNAT_ADDRESSES;
    for ipv4 in [true, false] {
        let named = dataplane.snat_addresses.iter().filter(|address| address.is_ipv4() == ipv4).count();
        if named > most {
            return Err(Problem::of_file(format!("more than {most} \"snat_addresses\" of one family"))
                .help(format!("write at most {most}: each is good for 64,000 flows")));
        }
        if !dataplane.snat_addresses.is_empty() {
            continue;
        }
        let mut vips = HashSet::new();
        let vip = |listener: &SocketAddr| listener.is_ipv4() == ipv4 && !listener.ip().is_loopback();
        for (listener, span) in listeners(services).filter(|(listener, _)| vip(listener)) {
            vips.insert(listener.ip());
            if vips.len() > most {
                return Err(Problem::at(span.clone(), format!("more than {most} VIPs of one family"))
                    .help(format!("name up to {most} addresses that flows leave from: \"snat_addresses\"")));
            }
        }
    }
    Ok(())
}

fn listeners(services: &[ReadService]) -> impl Iterator<Item = (&SocketAddr, &Span)> {
    services.iter().flat_map(|read| read.service.listen.iter().zip(&read.listen_spans))
}

fn beyond<'s>(mut spans: impl Iterator<Item = &'s Span>, most: usize, what: &str) -> Result<(), Problem> {
    match spans.nth(most) {
        None => Ok(()),
        Some(span) => Err(Problem::at(span.clone(), format!("more than {most} {what} in all"))
            .help(format!("{most} is the most that one data path holds; run the rest on another host"))),
    }
}
