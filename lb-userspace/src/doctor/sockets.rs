//! Sockets of this host that the data path leaves out: clients of a VIP on this very host, and servers it takes the
//! clients from.

use std::{collections::BTreeSet, fs, net::SocketAddr};

use super::{Finding, failure, warning};
use crate::{
    config::{Cgroup, Config},
    network::{Network, TcpSocket, TcpState, tcp_sockets},
};

/// Where Kubernetes components on this host say which apiserver they talk to.
const KUBECONFIGS: [&str; 6] = [
    "/etc/kubernetes/kubelet.conf",
    "/etc/kubernetes/controller-manager.conf",
    "/etc/kubernetes/scheduler.conf",
    "/var/lib/kubelet/kubeconfig",
    "/var/lib/rancher/rke2/agent/kubelet.kubeconfig",
    "/var/lib/rancher/k3s/agent/kubelet.kubeconfig",
];

const NEEDS_HOOK: &str = "XDP never sees connections of this host to its own address; they need the connect hook, which \
                          cgroup = \"none\" leaves out";

pub(super) async fn examine(network: &Network, config: &Config) -> Vec<Finding> {
    let listeners: BTreeSet<SocketAddr> =
        config.services.iter().flat_map(|service| service.listen.iter().copied()).collect();
    let unhooked = config.dataplane.cgroup == Cgroup::None;
    let mut findings: Vec<_> = KUBECONFIGS
        .iter()
        .filter(|_| unhooked)
        .filter_map(|path| Some((path, fs::read_to_string(path).ok()?)))
        .filter_map(|(path, content)| configured_client(path, &content, &listeners))
        .collect();
    let wanted = listeners.clone();
    let sockets = tcp_sockets(move |socket| is_client(socket, &wanted) || is_shadowed(socket, &wanted)).await;
    let sockets = match sockets {
        Ok(sockets) => sockets,
        Err(error) => {
            findings.push(warning("sockets", format!("cannot list this host's TCP sockets: {error}")));
            return findings;
        }
    };
    let clients = sockets.iter().filter(|socket| unhooked && is_client(socket, &listeners));
    let clients: BTreeSet<_> = clients.map(|socket| (owner(socket), socket.remote)).collect();
    for (process, vip) in clients {
        let what = format!("{process} on this host is a client of {vip}: {NEEDS_HOOK}");
        findings.push(failure(format!("client {process}"), what).fix(
            "remove cgroup = \"none\", or let it use a backend's own address while the VIP is on this host",
        ));
    }
    for socket in sockets.iter().filter(|socket| is_shadowed(socket, &listeners)) {
        if !serves_as_backend(network, config, socket) {
            findings.push(shadowed(socket));
        }
    }
    findings
}

fn is_client(socket: &TcpSocket, listeners: &BTreeSet<SocketAddr>) -> bool {
    matches!(socket.state, TcpState::Established | TcpState::SynSent) && listeners.contains(&socket.remote)
}

fn is_shadowed(socket: &TcpSocket, listeners: &BTreeSet<SocketAddr>) -> bool {
    let ip = socket.local.ip();
    let same = |listener: &SocketAddr| {
        listener.port() == socket.local.port() && (ip.is_unspecified() || listener.ip() == ip)
    };
    socket.state == TcpState::Listen && listeners.iter().any(same)
}

/// A backend on this host listens where the service does: that is as it should be.
fn serves_as_backend(network: &Network, config: &Config, socket: &TcpSocket) -> bool {
    config.services.iter().flat_map(|service| &service.backends).any(|backend| {
        backend.address.port() == socket.local.port()
            && network.interface_carrying(backend.address.ip()).is_some()
    })
}

fn shadowed(socket: &TcpSocket) -> Finding {
    let process = owner(socket);
    let what = format!(
        "{process} listens on {}: new connections go to sheave's backends instead once it is attached; those that \
         stand go on",
        socket.local
    );
    warning(format!("server {process}"), what).fix(format!("stop {process} when sheave has taken over"))
}

fn configured_client(path: &str, content: &str, listeners: &BTreeSet<SocketAddr>) -> Option<Finding> {
    let servers =
        content.lines().filter_map(|line| line.trim().trim_start_matches("- ").strip_prefix("server:"));
    let addresses = servers.filter_map(|server| {
        let server = server.trim().trim_matches(['"', '\'']);
        let authority = server.strip_prefix("https://").unwrap_or(server).split('/').next()?;
        // Without a port it is 443, as in any URL.
        authority.parse().ok().or_else(|| format!("{authority}:443").parse().ok())
    });
    let vip: SocketAddr = addresses.into_iter().find(|address| listeners.contains(address))?;
    let what = format!("{path} names {vip}: when the VIP is on this host, {NEEDS_HOOK}");
    let fix = format!(
        "remove cgroup = \"none\"; or in {path}: the address of an apiserver, this node's own if it has one, as `server:`"
    );
    Some(failure("kubeconfig", what).fix(fix))
}

/// The name of the process that holds a socket, and its number.
fn owner(socket: &TcpSocket) -> String {
    let wanted = format!("socket:[{}]", socket.inode);
    let holds = |directory: &fs::DirEntry| {
        let descriptors = fs::read_dir(directory.path().join("fd")).into_iter().flatten().flatten();
        descriptors
            .filter_map(|it| fs::read_link(it.path()).ok())
            .any(|target| target.as_os_str() == wanted.as_str())
    };
    let number = |directory: &fs::DirEntry| directory.file_name().to_str()?.parse::<u32>().ok();
    let mut processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let found = processes.find(|directory| number(directory).is_some() && holds(directory));
    match found.map(|directory| (fs::read_to_string(directory.path().join("comm")), directory.file_name())) {
        Some((Ok(name), number)) => format!("{} (pid {})", name.trim(), number.to_string_lossy()),
        _ => "a process".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kubeconfig_that_names_the_vip_is_found_however_it_is_written() {
        let listeners = ["192.0.2.140:6443".parse().unwrap(), "[fd00::140]:443".parse().unwrap()].into();
        let look = |content: &str| configured_client("/etc/kubernetes/kubelet.conf", content, &listeners);
        for content in [
            "clusters:\n- cluster:\n    server: https://192.0.2.140:6443\n",
            "clusters:\n- cluster: \n  - server: \"https://192.0.2.140:6443/\"\n",
            "    server: 'https://[fd00::140]'\n",
        ] {
            assert!(look(content).is_some(), "{content}");
        }
        for content in
            ["    server: https://192.0.2.151:6443\n", "    server: https://api.example:6443\n", "server", ""]
        {
            assert_eq!(look(content), None, "{content}");
        }
    }
}
