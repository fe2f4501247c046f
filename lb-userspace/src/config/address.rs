//! Addresses: listeners, backends, SNAT addresses, source prefixes.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use ipnet::IpNet;
use rustls_pki_types::ServerName;
use toml::Spanned;

use super::{diagnostic::Problem, section::Section};

/// What an address and port is for: the same mistakes, other advice.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Listener,
    Backend,
}

/// `"192.168.2.140:6443"` or `"[fd00::140]:6443"`.
pub(super) fn socket_address(written: &Spanned<String>, role: Role) -> Result<SocketAddr, Problem> {
    let text = written.get_ref().as_str();
    let Ok(address) = text.parse::<SocketAddr>() else { return Err(not_an_address(written, role)) };
    if address.port() == 0 {
        return Err(problem(written, format!("port 0 in {text:?}"), "write the port, 1 to 65535"));
    }
    if role == Role::Listener && address.ip().is_unspecified() {
        return Err(every_address(written));
    }
    unicast(address.ip(), written)?;
    if role == Role::Backend && address.ip().is_loopback() {
        return Err(problem(
            written,
            format!("{} is a loopback address, packets cannot be forwarded there", address.ip()),
            "write this host's own address, and let the server listen on it",
        ));
    }
    Ok(address)
}

/// Why `text` is no address and port; most people's mistake has its own answer.
fn not_an_address(written: &Spanned<String>, role: Role) -> Problem {
    let text = written.get_ref().as_str();
    let example = match role {
        Role::Listener => "\"192.168.2.140:6443\" or \"[fd00::140]:6443\"",
        Role::Backend => "\"192.168.2.151:6443\" or \"[fd00::151]:6443\"",
    };
    if let Ok(address) = text.trim_matches(['[', ']']).parse::<IpAddr>() {
        let with_port = SocketAddr::new(address, 6443);
        return problem(written, format!("{text:?} has no port"), &format!("write \"{with_port}\""));
    }
    if let Some((_, rest)) = text.split_once("://") {
        let rest = rest.trim_end_matches('/');
        return problem(written, format!("{text:?} is a URL"), &format!("write {rest:?}"));
    }
    let (host, port) = text.rsplit_once(':').unwrap_or((text, ""));
    if ["", "*"].contains(&host) && !port.is_empty() && role == Role::Listener {
        return every_address(written);
    }
    if host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok() {
        return problem(written, format!("{port:?} is not a port"), "write a number from 1 to 65535");
    }
    match role {
        Role::Listener if is_host_name(host) => problem(
            written,
            format!("{host} is a name; listeners are matched by address"),
            &format!("write its address: {example}"),
        ),
        Role::Backend if is_host_name(text) => {
            problem(written, format!("{text:?} has no port"), &format!("write \"{text}:6443\""))
        }
        _ => problem(written, format!("{text:?} is not an address and port"), &format!("write {example}")),
    }
}

fn is_host_name(host: &str) -> bool {
    host.contains(|character: char| character.is_ascii_alphabetic())
        && host.chars().all(|character| character.is_ascii_alphanumeric() || "-._".contains(character))
        && matches!(ServerName::try_from(host), Ok(ServerName::DnsName(_)))
}

/// Where a backend is.
pub(super) enum Place {
    /// As the data path needs it.
    Address(SocketAddr),
    /// Host and port, to be looked up.
    Name(String, u16),
}

/// `"192.168.2.151:6443"`, `"[fd00::151]:6443"` or `"master-1:6443"`.
pub(super) fn place(written: &Spanned<String>) -> Result<Place, Problem> {
    let text = written.get_ref().as_str();
    let name = text.rsplit_once(':').filter(|(host, _)| is_host_name(host));
    let Some((host, port)) = name else { return socket_address(written, Role::Backend).map(Place::Address) };
    if host.trim_end_matches('.') == "localhost" {
        return Err(problem(
            written,
            "localhost is a loopback address, packets cannot be forwarded there".to_owned(),
            "write this host's own address, and let the server listen on it",
        ));
    }
    match port.parse::<u16>() {
        Ok(port) if port > 0 => Ok(Place::Name(host.to_owned(), port)),
        _ => Err(problem(written, format!("{port:?} is not a port"), "write a number from 1 to 65535")),
    }
}

/// `admin.listen`: loopback is what it is for.
pub(super) fn admin_address(written: &Spanned<String>) -> Result<SocketAddr, Problem> {
    match written.get_ref().parse::<SocketAddr>() {
        Ok(address) if address.port() > 0 => Ok(address),
        _ => Err(problem(
            written,
            format!("{:?} is not an address and port", written.get_ref()),
            "write one such as \"127.0.0.1:1936\"",
        )),
    }
}

fn problem(written: &Spanned<String>, message: String, help: &str) -> Problem {
    Problem::at(written.span(), message).help(help)
}

fn every_address(written: &Spanned<String>) -> Problem {
    problem(
        written,
        format!("{:?} stands for every address of the host", written.get_ref()),
        "write the VIP itself: packets are matched by their exact destination",
    )
}

/// An address that one host on the network can have.
fn unicast(address: IpAddr, written: &Spanned<String>) -> Result<(), Problem> {
    not_unicast(address).map_or(Ok(()), |(message, help)| Err(problem(written, message, &help)))
}

/// Why an address that was found, not written, can be no backend's. What is checked when literal ones are read is
/// checked here, where a mistake costs one backend and not the start.
pub(crate) fn not_a_backend(ip: IpAddr, vips: &HashSet<IpAddr>, snat_addresses: &[IpAddr]) -> Option<String> {
    if vips.contains(&ip) {
        return Some("it is a VIP, and flows to a listener would go round for ever".to_owned());
    }
    if snat_addresses.contains(&ip) {
        return Some("it is in dataplane.snat_addresses".to_owned());
    }
    if ip.is_loopback() {
        return Some("packets cannot be forwarded to a loopback address".to_owned());
    }
    not_unicast(ip).map(|(message, _)| message)
}

/// Why an address is not that of one host on the network, and what to write.
fn not_unicast(address: IpAddr) -> Option<(String, String)> {
    Some(match address {
        _ if address.is_unspecified() => {
            (format!("{address} is no host's address"), "write the address that is meant".to_owned())
        }
        _ if address.is_multicast() || address == Ipv4Addr::BROADCAST => {
            (format!("{address} is not the address of one host"), "write a unicast address".to_owned())
        }
        IpAddr::V6(v6) if v6.is_unicast_link_local() => (
            format!("{address} is a link-local address, which is not forwarded"),
            "write a global or unique local (fd00::/8) one".to_owned(),
        ),
        IpAddr::V6(v6) => {
            let v4 = v6.to_ipv4_mapped()?;
            (format!("{address} is an IPv4 address in IPv6 notation"), format!("write {v4}"))
        }
        IpAddr::V4(_) => return None,
    })
}

/// `dataplane.snat_addresses`.
pub(super) fn snat_addresses(section: &Section) -> Result<Vec<IpAddr>, Problem> {
    let written = section.texts("snat_addresses", "\"192.168.2.141\"")?.unwrap_or_default();
    let mut addresses = Vec::with_capacity(written.len());
    for text in &written {
        let address = ip_address(text)?;
        if address.is_loopback() {
            return Err(problem(
                text,
                format!("{address} is a loopback address, backends cannot answer to it"),
                "write an address that the backends have a route to",
            ));
        }
        if let Some(first) = addresses.iter().position(|earlier| *earlier == address) {
            return Err(problem(text, format!("{address} is given twice"), "remove one of them")
                .first_at(written[first].span()));
        }
        addresses.push(address);
    }
    Ok(addresses)
}

/// An address without a port.
pub(super) fn ip_address(written: &Spanned<String>) -> Result<IpAddr, Problem> {
    let text = written.get_ref();
    let Ok(address) = text.parse::<IpAddr>() else {
        return Err(match text.parse::<SocketAddr>() {
            Ok(with_port) => problem(
                written,
                format!("{text:?} has a port"),
                &format!("write the address alone: \"{}\"", with_port.ip()),
            ),
            Err(_) => problem(
                written,
                format!("{text:?} is not an address"),
                "write one such as \"192.168.2.141\" or \"fd00::141\"",
            ),
        });
    };
    unicast(address, written)?;
    Ok(address)
}

/// `service.allow`: prefixes, or single addresses.
pub(super) fn prefixes(section: &Section) -> Result<Vec<IpNet>, Problem> {
    let written = section.texts("allow", "\"10.0.0.0/8\"")?.unwrap_or_default();
    written.iter().map(prefix).collect()
}

fn prefix(written: &Spanned<String>) -> Result<IpNet, Problem> {
    let text = written.get_ref();
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(IpNet::from(address));
    }
    match text.parse::<IpNet>() {
        Ok(prefix) if prefix == prefix.trunc() => Ok(prefix),
        Ok(prefix) => Err(problem(
            written,
            format!("{text:?} has bits set after its prefix"),
            &format!("write \"{}\" for the network, or \"{}\" for the host", prefix.trunc(), prefix.addr()),
        )),
        Err(_) => Err(problem(
            written,
            format!("{text:?} is not a source prefix"),
            "write one such as \"10.0.0.0/8\" or \"fd00::/8\"",
        )),
    }
}
