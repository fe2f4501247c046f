//! Hosts as network namespaces, joined by bridges.
//!
//! ```text
//!   client ──┐
//!   lb ──────┤ bridge in the namespace `net`, one per segment
//!   api-1 ───┘
//! ```
//!
//! All names carry the prefix `sh<pid>-<n>-`, so that runs and tests side by side never meet, and a later run
//! can tell which namespaces belong to a process that is gone.

pub mod authority;
pub mod capture;
pub mod cgroup;
pub mod host;
pub mod namespace;
pub mod process;
mod switch_port;
pub mod wait;

use std::{
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result, ensure};

pub use cgroup::cgroup_of;
pub use host::{Host, Link};
pub use namespace::Namespace;
pub use process::{Process, run};
pub use wait::eventually;

/// Files of a lab live below this directory, one directory per lab.
const DIRECTORY: &str = "/tmp/sheave-lab";

/// What daemons pin is below this directory, one directory per lab.
const PINS: &str = "/sys/fs/bpf/sheave-lab";

/// Several labs of one process are told apart by this number.
static NEXT_LAB: AtomicU32 = AtomicU32::new(0);

/// A set of hosts and the network between them. Dropping it removes everything.
#[derive(Debug)]
pub struct Lab {
    prefix: String,
    directory: PathBuf,
    /// Holds the bridges. Dropped with the lab: the veth pairs of all hosts end in it.
    net: Namespace,
}

/// One L2 segment: a bridge that hosts are plugged into, with an IPv4 and an IPv6 subnet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    number: u8,
}

impl Lab {
    /// Makes an empty lab, and first removes what killed runs have left behind.
    ///
    /// # Errors
    /// Without root, or when `ip` is missing.
    pub fn new() -> Result<Self> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "the lab makes network namespaces: run this as root (cargo xtask does it with sudo)"
        );
        namespace::sweep_stale()?;
        sweep_stale_directories();
        cgroup::sweep_stale();
        let prefix = format!("sh{}-{}-", std::process::id(), NEXT_LAB.fetch_add(1, Ordering::Relaxed));
        let directory = Path::new(DIRECTORY).join(prefix.trim_end_matches('-'));
        let cgroup = cgroup_of(&directory);
        for directory in cgroup.iter().chain([&directory]) {
            fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
        }
        let net = Namespace::create(&format!("{prefix}net"))?;
        // The switch itself is no IP host.
        net.sysctl("net/ipv6/conf/all/disable_ipv6", "1")?;
        net.sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
        // Where br_netfilter is present a bridge drops frames with an invalid IP header.
        for family in ["iptables", "ip6tables", "arptables"] {
            let key = format!("net/bridge/bridge-nf-call-{family}");
            if Path::new("/proc/sys").join(&key).exists() {
                net.sysctl(&key, "0")?;
            }
        }
        Ok(Self { prefix, directory, net })
    }

    /// What the names of this lab's namespaces begin with.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// A directory for certificates, sockets and logs, removed with the lab.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A directory of the BPF file system for what outlives a daemon, removed with the lab.
    pub fn pins(&self) -> PathBuf {
        pins_of(&self.directory)
    }

    /// Adds a segment with the subnets `10.77.<number>.0/24` and `fd77:<number>::/64`.
    ///
    /// # Errors
    /// When the number is taken.
    pub fn segment(&self, number: u8) -> Result<Segment> {
        let segment = Segment { number };
        let bridge = segment.bridge();
        self.net.ip(&format!("link add {bridge} type bridge forward_delay 0 mcast_snooping 0"))?;
        self.net.ip(&format!("link set {bridge} up"))?;
        Ok(segment)
    }

    /// Adds a host that is not yet plugged in anywhere.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn host(&self, name: &str) -> Result<Host> {
        Host::new(name, Namespace::create(&format!("{}{name}", self.prefix))?, &self.directory)
    }

    /// Plugs a host into a segment: a new interface `eth0`, `eth1`, ... with the addresses
    /// [`Segment::v4`] and [`Segment::v6`] of `number`.
    ///
    /// # Errors
    /// When `ip` or `ethtool` fails.
    pub fn plug(&self, host: &mut Host, segment: Segment, number: u8) -> Result<()> {
        let link = Self::next_link(host, segment, number);
        self.make_link(host, &link)?;
        self.net.enter(|| switch_port::take_transmitted_frames(&link.port))??;
        host.connected(link)
    }

    /// The same with a cable as it comes: segments are merged, and checksums left to whoever is the last to send.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn plug_plain(&self, host: &mut Host, segment: Segment, number: u8) -> Result<()> {
        let link = Self::next_link(host, segment, number);
        self.lay_cable(host, &link)?;
        host.connected(link)
    }

    /// Makes a host's interface, whose other end is the switch's interface `port`, part of a segment.
    ///
    /// # Errors
    /// When one of them is missing.
    pub fn connect(
        &self,
        host: &mut Host,
        segment: Segment,
        number: u8,
        interface: String,
        port: String,
    ) -> Result<()> {
        self.add_port(segment, &port)?;
        host.connected(Link { interface, port, segment, v4: segment.v4(number), v6: segment.v6(number) })
    }

    /// The next cable of a host to the switch.
    fn next_link(host: &Host, segment: Segment, number: u8) -> Link {
        let interface = format!("eth{}", host.links().len());
        let port = format!("{}.{}", host.name(), host.links().len());
        Link { interface, port, segment, v4: segment.v4(number), v6: segment.v6(number) }
    }

    /// Takes a host's first interface away, as a network card that is reset. Returns its MAC address.
    ///
    /// # Errors
    /// When the host has none.
    pub fn remove_link(&self, host: &Host) -> Result<String> {
        let Link { interface, port, .. } = host.link()?;
        let shown = host.run(&format!("ip -brief link show dev {interface}"))?;
        let mac = shown.split_whitespace().nth(2).context("ip shows no MAC address")?.to_owned();
        self.net.ip(&format!("link del {port}"))?;
        Ok(mac)
    }

    /// Gives a host another interface in place of the one that [`Lab::remove_link`] took: to the kernel a new one, with the
    /// same name and addresses.
    ///
    /// # Errors
    /// When it still has one of that name.
    pub fn restore_link(&self, host: &Host, mac: &str) -> Result<()> {
        let link = host.link()?;
        self.restore_bare_link(host, mac)?;
        self.net.enter(|| switch_port::take_transmitted_frames(&link.port))?
    }

    /// The same, with a switch port that has no XDP program.
    ///
    /// # Errors
    /// As [`Lab::restore_link`].
    pub fn restore_bare_link(&self, host: &Host, mac: &str) -> Result<()> {
        let link = host.link()?;
        self.make_link(host, link)?;
        host.ip(&format!("link set {} address {mac}", link.interface))?;
        host.configure(link)
    }

    fn make_link(&self, host: &Host, link: &Link) -> Result<()> {
        self.lay_cable(host, link)?;
        for (namespace, device) in [(&self.net, &link.port), (host.namespace(), &link.interface)] {
            prepare_for_native_xdp(namespace, device)?;
        }
        Ok(())
    }

    fn lay_cable(&self, host: &Host, link: &Link) -> Result<()> {
        let Link { interface, port, segment, .. } = link;
        self.net.ip(&format!(
            "link add {port} type veth peer name {interface} netns {}",
            host.namespace().name()
        ))?;
        self.add_port(*segment, port)
    }

    /// Makes an interface of the switch part of a segment.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn add_port(&self, segment: Segment, port: &str) -> Result<()> {
        self.net.ip(&format!("link set {port} master {} up", segment.bridge()))
    }

    /// The switch.
    pub fn switch_namespace(&self) -> &Namespace {
        &self.net
    }

    /// Pulls the plug of a host's first link: frames stop, the host itself sees its carrier go.
    ///
    /// # Errors
    /// When the host has no link.
    pub fn unplug(&self, host: &Host) -> Result<()> {
        self.unplug_link(host, 0)
    }

    /// The same with the host's link of this number, from 0.
    ///
    /// # Errors
    /// When the host has no such link.
    pub fn unplug_link(&self, host: &Host, number: usize) -> Result<()> {
        self.switch(host, number, "down")
    }

    /// Undoes [`Lab::unplug`].
    ///
    /// # Errors
    /// When the host has no link.
    pub fn replug(&self, host: &Host) -> Result<()> {
        self.replug_link(host, 0)
    }

    /// Undoes [`Lab::unplug_link`].
    ///
    /// # Errors
    /// When the host has no such link.
    pub fn replug_link(&self, host: &Host, number: usize) -> Result<()> {
        self.switch(host, number, "up")
    }

    fn switch(&self, host: &Host, number: usize, state: &str) -> Result<()> {
        let link = host.links().get(number).with_context(|| format!("{} has no such link", host.name()))?;
        self.net.ip(&format!("link set {} {state}", link.port))
    }

    /// Has the switch not learn from what a host sends, as from a port whose addresses are configured: frames in the
    /// names of others take nothing away from these.
    ///
    /// # Errors
    /// When the host has no link.
    pub fn learn_nothing_from(&self, host: &Host) -> Result<()> {
        self.net.ip(&format!("link set {} type bridge_slave learning off", host.link()?.port))
    }

    /// Has a host send through its first link as a virtual machine does, and as every veth does by itself: nobody
    /// finishes the checksums, neither the host nor the switch towards it.
    ///
    /// # Errors
    /// When it has no link.
    pub fn leave_checksums_unfinished(&self, host: &Host) -> Result<()> {
        let Link { interface, port, .. } = host.link()?;
        for (namespace, device) in [(host.namespace(), interface), (&self.net, port)] {
            run(namespace.command("ethtool").args(["-K", device, "tx", "on"]))?;
        }
        Ok(())
    }

    /// Has the switch finish the checksums of what it sends to a host.
    ///
    /// # Errors
    /// When the host has no link.
    pub fn finish_checksums_towards(&self, host: &Host) -> Result<()> {
        run(self.net.command("ethtool").args(["-K", &host.link()?.port, "tx", "off"])).map(drop)
    }

    /// Has the switch send to a host by more queues than its first link takes: a veth has no native XDP then.
    ///
    /// # Errors
    /// When the host has no link, or this machine has one processor alone.
    pub fn widen(&self, host: &Host) -> Result<()> {
        run(self.net.command("ethtool").args(["-L", &host.link()?.port, "tx", "2"])).map(drop)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // A directory that cannot be removed is left to the next run's sweep.
        let _ = fs::remove_dir_all(&self.directory);
        let _ = fs::remove_dir_all(self.pins());
        if let Some(cgroup) = cgroup_of(&self.directory) {
            cgroup::remove(&cgroup);
        }
    }
}

impl Segment {
    fn bridge(self) -> String {
        format!("br{}", self.number)
    }

    /// The IPv4 address of the host with this number.
    pub fn v4(self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.number, host)
    }

    /// The IPv6 address of the host with this number: its last group *looks* like the number, so that
    /// `10.77.1.100` and `fd77:1::100` belong together at a glance.
    pub fn v6(self, host: u8) -> Ipv6Addr {
        let looks_like = |number: u8| {
            let (hundreds, tens, ones) = (number / 100, number / 10 % 10, number % 10);
            u16::from(hundreds) << 8 | u16::from(tens) << 4 | u16::from(ones)
        };
        Ipv6Addr::new(0xfd77, looks_like(self.number), 0, 0, 0, 0, 0, looks_like(host))
    }
}

/// A veth behaves as a network card only with these: no frame leaves with an unfinished checksum (an XDP program
/// on the way would pass it on as it is), and the receiving end polls (a frame sent by `XDP_TX` is dropped by a
/// peer that does not). See also [`switch_port`].
fn prepare_for_native_xdp(namespace: &Namespace, device: &str) -> Result<()> {
    run(namespace.command("ethtool").args(["-K", device, "tx", "off", "gro", "on"]))?;
    Ok(())
}

/// Where a daemon pins that keeps its files in `directory`, which is a lab's or below it.
pub fn pins_of(directory: &Path) -> PathBuf {
    Path::new(PINS).join(directory.strip_prefix(DIRECTORY).unwrap_or(Path::new("other")))
}

/// Removes directories of labs whose process is gone.
fn sweep_stale_directories() {
    for place in [DIRECTORY, PINS] {
        let Ok(entries) = fs::read_dir(place) else { continue };
        for entry in entries.flatten() {
            if entry.file_name().to_str().is_some_and(namespace::owner_is_gone) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Segment;

    #[test]
    fn both_addresses_of_a_host_look_alike() {
        let segment = Segment { number: 2 };
        assert_eq!(segment.v4(150).to_string(), "10.77.2.150");
        assert_eq!(segment.v6(150).to_string(), "fd77:2::150");
        assert_eq!(segment.v6(9).to_string(), "fd77:2::9");
    }
}
