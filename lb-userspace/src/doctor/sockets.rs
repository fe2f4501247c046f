//! Sockets of this host that the data path leaves out: clients of a VIP on this very host, and servers it takes the
//! clients from.

use std::{collections::BTreeSet, fmt, fs, net::SocketAddr};

use super::{Finding, failure, note, warning};
use crate::{
    config::Config,
    hook::Place,
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

const NEEDS_HOOK: &str =
    "XDP never sees connections of this host to its own address; they need the connect hook, which";

/// Whose connections the hook takes.
enum Coverage {
    Everybody,
    /// Only those of the processes with these numbers; in words, why.
    Some(BTreeSet<u32>, String),
    /// In words, why.
    Nobody(&'static str),
}

impl Coverage {
    fn of(config: &Config) -> Self {
        match Place::find(&config.dataplane.cgroup) {
            Ok(None) => Self::Nobody("cgroup = \"none\" leaves out"),
            Err(_) => Self::Nobody("has no cgroup to be put on"),
            Ok(Some(place)) => match place.processes() {
                None => Self::Everybody,
                Some(processes) => {
                    let path = place.path().display();
                    Self::Some(processes, format!("is put on {path}, where that process is not"))
                }
            },
        }
    }

    /// Why a process is left out, if it is.
    fn leaves_out(&self, process: Option<u32>) -> Option<&str> {
        match self {
            Self::Everybody => None,
            Self::Some(processes, why) => {
                let is_in = process.is_some_and(|process| processes.contains(&process));
                (!is_in).then_some(why.as_str())
            }
            Self::Nobody(why) => Some(why),
        }
    }

    /// What puts it right.
    fn fix(&self) -> &'static str {
        match self {
            Self::Nobody("cgroup = \"none\" leaves out") => "remove cgroup = \"none\"",
            Self::Nobody(_) => "give it one, as `connect hook` above says",
            Self::Everybody | Self::Some(..) => {
                "name a cgroup that holds it in dataplane.cgroup, or leave the key out"
            }
        }
    }
}

pub(super) async fn examine(network: &Network, config: &Config) -> Vec<Finding> {
    let listeners: BTreeSet<SocketAddr> =
        config.services.iter().flat_map(|service| service.listen.iter().copied()).collect();
    let coverage = Coverage::of(config);
    let mut findings: Vec<_> = KUBECONFIGS
        .iter()
        .filter_map(|path| Some((path, fs::read_to_string(path).ok()?)))
        .filter_map(|(path, content)| configured_client(path, &content, &listeners, &coverage))
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
    let clients = sockets.iter().filter(|socket| is_client(socket, &listeners));
    let clients: BTreeSet<_> = clients.map(|socket| (Process::holding(socket), socket.remote)).collect();
    findings.extend(clients.iter().filter_map(|(process, vip)| client(process, *vip, &coverage)));
    for socket in sockets.iter().filter(|socket| is_shadowed(socket, &listeners)) {
        if !serves_as_backend(network, config, socket) {
            findings.push(shadowed(socket));
        }
    }
    findings
}

fn client(process: &Process, vip: SocketAddr, coverage: &Coverage) -> Option<Finding> {
    let why = coverage.leaves_out(process.number)?;
    let what = format!("{process} on this host is a client of {vip}: {NEEDS_HOOK} {why}");
    let subject = format!("client {process}");
    // Whoever nobody can name may be in the cgroup.
    let is_sure = process.number.is_some() || matches!(coverage, Coverage::Nobody(_));
    let finding = if is_sure { failure(subject, what) } else { warning(subject, what) };
    let fix = coverage.fix();
    Some(finding.fix(format!("{fix}, or let it use a backend's own address while the VIP is on this host")))
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
    let process = Process::holding(socket);
    let what = format!(
        "{process} listens on {}: new connections go to sheave's backends instead once it is attached; those that \
         stand go on",
        socket.local
    );
    warning(format!("server {process}"), what).fix(format!("stop {process} when sheave has taken over"))
}

fn configured_client(
    path: &str,
    content: &str,
    listeners: &BTreeSet<SocketAddr>,
    coverage: &Coverage,
) -> Option<Finding> {
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
    let instead =
        format!("in {path}: the address of an apiserver, this node's own if it has one, as `server:`");
    match coverage {
        Coverage::Everybody => None,
        // Who reads it is not known here.
        Coverage::Some(..) => Some(
            note("kubeconfig", format!("{what} must hold the process that reads it"))
                .fix(format!("{}; or {instead}", coverage.fix())),
        ),
        Coverage::Nobody(why) => Some(
            failure("kubeconfig", format!("{what} {why}")).fix(format!("{}; or {instead}", coverage.fix())),
        ),
    }
}

/// Who holds a socket, as far as that is seen.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Process {
    name: String,
    number: Option<u32>,
}

impl fmt::Display for Process {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.name)?;
        self.number.iter().try_for_each(|number| write!(out, " (pid {number})"))
    }
}

impl Process {
    fn holding(socket: &TcpSocket) -> Self {
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
        let name = found.as_ref().and_then(|it| fs::read_to_string(it.path().join("comm")).ok());
        match name {
            Some(name) => Self { name: name.trim().to_owned(), number: found.as_ref().and_then(number) },
            None => Self { name: "a process".to_owned(), number: None },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kubeconfig_that_names_the_vip_is_found_however_it_is_written() {
        let listeners = ["192.0.2.140:6443".parse().unwrap(), "[fd00::140]:443".parse().unwrap()].into();
        let unhooked = Coverage::Nobody("has no cgroup to be put on");
        let look =
            |content: &str| configured_client("/etc/kubernetes/kubelet.conf", content, &listeners, &unhooked);
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

    #[test]
    fn who_is_outside_of_the_hooks_cgroup_is_a_failure_and_who_is_in_it_is_none() {
        let vip = "192.0.2.140:6443".parse().unwrap();
        let process = |number| Process { name: "kubelet".to_owned(), number };
        let levels = |coverage: Coverage| {
            let look = |number| client(&process(number), vip, &coverage).map(|finding| finding.level);
            [look(Some(7)), look(Some(8)), look(None)]
        };
        use super::super::Level::{Failure, Warning};
        assert_eq!(levels(Coverage::Everybody), [None, None, None]);
        let part = || Coverage::Some([7].into(), "is put on /a, where that process is not".to_owned());
        assert_eq!(levels(part()), [None, Some(Failure), Some(Warning)]);
        assert_eq!(levels(Coverage::Nobody("has none")), [Some(Failure); 3]);
        let finding = client(&process(Some(8)), vip, &part()).unwrap();
        assert!(
            finding.what.contains("kubelet (pid 8)") && finding.what.contains("which is put on /a"),
            "{finding:?}"
        );
        assert!(finding.fix.unwrap().contains("dataplane.cgroup"));
        // Who will read a kubeconfig is not known.
        let content = "    server: https://192.0.2.140:6443\n";
        let level = |coverage: &Coverage| {
            configured_client("/k", content, &[vip].into(), coverage).map(|finding| finding.level)
        };
        assert_eq!(level(&part()), Some(super::super::Level::Note));
        assert_eq!(level(&Coverage::Everybody), None);
    }
}
