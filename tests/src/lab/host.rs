//! One host of the lab.

use std::{
    ffi::OsStr,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::{Namespace, Process, Segment, run};

/// A host: a namespace with interfaces and processes.
#[derive(Debug)]
pub struct Host {
    name: String,
    namespace: Namespace,
    links: Vec<Link>,
    directory: PathBuf,
}

/// One interface of a host and what it is plugged into.
#[derive(Clone, Debug)]
pub struct Link {
    /// The interface's name in the host, `eth0` for the first.
    pub interface: String,
    /// The name of the switch port at the other end.
    pub port: String,
    /// The segment it is plugged into.
    pub segment: Segment,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

impl Host {
    pub(super) fn new(name: &str, namespace: Namespace, directory: &Path) -> Result<Self> {
        Ok(Self { name: name.to_owned(), namespace, links: Vec::new(), directory: directory.to_owned() })
    }

    pub(super) fn connected(&mut self, link: Link) -> Result<()> {
        self.configure(&link)?;
        self.links.push(link);
        Ok(())
    }

    pub(super) fn configure(&self, link: &Link) -> Result<()> {
        let interface = &link.interface;
        self.ip(&format!("address add {}/24 dev {interface}", link.v4))?;
        self.ip(&format!("address add {}/64 dev {interface} nodad", link.v6))?;
        self.ip(&format!("link set {interface} up"))
    }

    /// Its name within the lab.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Its interfaces, in the order in which they were plugged in.
    pub fn links(&self) -> &[Link] {
        &self.links
    }

    /// Its first interface.
    ///
    /// # Errors
    /// When it has none.
    pub fn link(&self) -> Result<&Link> {
        self.links.first().with_context(|| format!("{} is not plugged in", self.name))
    }

    /// The address of its first interface in the family of `like`.
    ///
    /// # Errors
    /// When it has no interface.
    pub fn address(&self, like: IpAddr) -> Result<IpAddr> {
        let link = self.link()?;
        Ok(if like.is_ipv4() { link.v4.into() } else { link.v6.into() })
    }

    /// A command that runs on this host.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        self.namespace.command(program)
    }

    /// The same in the lab's cgroup: daemons of the lab put their connect hooks there.
    ///
    /// # Errors
    /// On a machine without cgroup v2.
    pub fn hooked_command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let cgroup = super::cgroup_of(&self.directory).context("no cgroup v2 hierarchy is mounted")?;
        Ok(super::cgroup::command_in(&cgroup, &self.namespace.path(), program))
    }

    /// Runs a command line (split at white space) on this host and returns what it printed.
    ///
    /// # Errors
    /// When it fails, with what it wrote to standard error.
    pub fn run(&self, line: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        let program = words.next().context("an empty command line")?;
        run(self.command(program).args(words))
    }

    /// Runs `ip <arguments>` on this host.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub fn ip(&self, arguments: &str) -> Result<()> {
        self.namespace.ip(arguments)
    }

    /// Starts a process from a command made by [`Host::command`], with its log in the lab's directory.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, label: &str, command: Command) -> Result<Process> {
        Process::start(&format!("{}-{label}", self.name), command, &self.directory)
    }

    /// Runs a closure on a thread inside this host.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn in_namespace<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> Result<T> {
        self.namespace.enter(inside)
    }

    /// Turns the host into a router, for both families.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn forward(&self) -> Result<()> {
        self.namespace.sysctl("net/ipv4/ip_forward", "1")?;
        self.namespace.sysctl("net/ipv6/conf/all/forwarding", "1")
    }

    /// Loads nftables rules, as `nft -f` reads them.
    ///
    /// # Errors
    /// When nft refuses them.
    pub fn nft(&self, rules: &str) -> Result<String> {
        run(self.command("nft").arg(rules))
    }

    /// Gives the host a further address as a load balancer would carry it: as /32 or /128, and never chosen as
    /// a source.
    ///
    /// # Errors
    /// When the host has it already.
    pub fn add_vip(&self, vip: IpAddr) -> Result<()> {
        let interface = &self.link()?.interface;
        match vip {
            IpAddr::V4(vip) => self.ip(&format!("address add {vip}/32 dev {interface}")),
            IpAddr::V6(vip) => {
                self.ip(&format!("address add {vip}/128 dev {interface} nodad noprefixroute preferred_lft 0"))
            }
        }
    }

    /// Whether its first interface has this address.
    ///
    /// # Errors
    /// When it has no interface.
    pub fn has_address(&self, address: IpAddr) -> Result<bool> {
        let shown = self.run(&format!("ip -o address show dev {}", self.link()?.interface))?;
        Ok(shown.contains(&format!(" {address}/")))
    }

    /// Drops every IP packet to and from this host, as a broken path would: nobody is told.
    ///
    /// # Errors
    /// When it is cut off already.
    pub fn cut_off(&self) -> Result<()> {
        self.nft(
            "add table inet cut_off; \
             add chain inet cut_off in { type filter hook prerouting priority -400; policy drop; }; \
             add chain inet cut_off out { type filter hook output priority -400; policy drop; }",
        )?;
        Ok(())
    }

    /// Undoes [`Host::cut_off`].
    ///
    /// # Errors
    /// When it is not cut off.
    pub fn reconnect(&self) -> Result<()> {
        self.nft("delete table inet cut_off")?;
        Ok(())
    }

    /// A counter from `/proc/net/snmp`, `netstat` or `snmp6`, such as `("Tcp", "OutRsts")`.
    ///
    /// # Errors
    /// When the kernel has no such counter.
    pub fn counter(&self, group: &str, name: &str) -> Result<u64> {
        // `/proc/net` would show the namespace of the process' first thread.
        let tables = self.in_namespace(|| -> Result<String> {
            let tables = ["snmp", "netstat", "snmp6"];
            Ok(tables
                .map(|table| fs::read_to_string(format!("/proc/thread-self/net/{table}")))
                .into_iter()
                .collect::<Result<_, _>>()?)
        })??;
        find_counter(&tables, group, name).with_context(|| format!("no counter {group}{name}"))
    }
}

/// IPv4's tables come as pairs of lines, `Tcp: OutRsts ...` and `Tcp: 3 ...`; IPv6's has a counter a line,
/// `Icmp6OutPktTooBigs 3`.
fn find_counter(tables: &str, group: &str, name: &str) -> Option<u64> {
    let mut lines =
        tables.lines().filter_map(|line| line.strip_prefix(group).and_then(|line| line.strip_prefix(": ")));
    while let (Some(names), Some(values)) = (lines.next(), lines.next()) {
        let mut columns = names.split_whitespace().zip(values.split_whitespace());
        if let Some((_, value)) = columns.find(|(column, _)| *column == name) {
            return value.parse().ok();
        }
    }
    let own_lines = tables.lines().filter_map(|line| line.strip_prefix(group)?.strip_prefix(name));
    own_lines.filter(|rest| rest.starts_with([' ', '\t'])).find_map(|value| value.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::find_counter;

    #[test]
    fn a_counter_is_found_by_group_and_name() {
        let tables = "Ip: Forwarding OutRsts\nIp: 1 9\nTcp: InSegs OutRsts\nTcp: 7 3\n\
                      Icmp6OutErrorsTotal\t8\nIcmp6OutErrors  \t5\n";
        assert_eq!(find_counter(tables, "Tcp", "OutRsts"), Some(3));
        assert_eq!(find_counter(tables, "Icmp6", "OutErrors"), Some(5));
        assert_eq!(find_counter(tables, "Tcp", "Nonsense"), None);
    }
}
