//! The interfaces that the data path uses.

use std::fs;

use aya::programs::loaded_programs;

use super::{Finding, failure, note, ok, warning};
use crate::{
    config::{Config, XdpMode},
    network::{Interface, Kind, Network, Port, TagProtocol, XdpAttachMode, offloads},
};

/// Drivers with XDP of their own, as ethtool names them.
const NATIVE_DRIVERS: [&str; 36] = [
    "am65-cpsw-nuss",
    "atlantic",
    "bnxt_en",
    "bonding",
    "cpsw",
    "ena",
    "enetc",
    "fec",
    "fsl_dpaa2_eth",
    "fsl_enetc",
    "gve",
    "hv_netvsc",
    "i40e",
    "ice",
    "igb",
    "igc",
    "ixgbe",
    "ixgbevf",
    "lan966x",
    "mana",
    "mlx4_en",
    "mlx5_core",
    "mvneta",
    "mvpp2",
    "netvsc",
    "nfp",
    "nicvf",
    "qede",
    "rvu-nicpf",
    "sfc",
    "st_gmac",
    "tsnep",
    "tun",
    "veth",
    "virtio_net",
    "vmxnet3",
];

/// The longest IP packet that fits a page with XDP's head room: above it the driver wants a program that takes
/// fragments (Linux 5.18).
const LARGEST_SINGLE_BUFFER_MTU: u32 = 3498;

/// What our own program's name starts with.
const OUR_PROGRAMS: &str = "sheave";

pub(super) fn examine(network: &Network, ports: &[Port], config: Option<&Config>) -> Vec<Finding> {
    let mode = config.map_or(XdpMode::Auto, |config| config.dataplane.xdp_mode);
    let mut findings = Vec::new();
    if ports.is_empty() {
        let what = "no Ethernet interface leads to the listeners and backends";
        findings
            .push(failure("interfaces", what).fix("ip -brief link; then dataplane.interfaces = [\"NAME\"]"));
    }
    for port in ports {
        let Ok(interface) = network.interface(port.index) else { continue };
        findings.push(state(&interface));
        findings.push(xdp_mode(&interface, mode));
        findings.push(mtu(&interface));
        findings.extend(other_programs(&interface));
        findings.extend(harmful_offloads(&interface, mode));
        findings.extend(unfinished_checksums(&interface, mode));
        findings.extend(stacked(network, port, &interface));
        findings.extend(reverse_path_filter(&interface));
    }
    findings.push(note("ip_forward", "not needed: packets are forwarded before the kernel's routing, but for replies to clients behind more \
         than 4,095 neighbours at once"));
    findings
}

fn subject(interface: &Interface) -> String {
    format!("interface {}", interface.name)
}

fn state(interface: &Interface) -> Finding {
    if interface.up && interface.carrier {
        return ok(subject(interface), "up");
    }
    let fix = format!("ip link set {} up", interface.name);
    let what = if interface.up { "has no carrier (cable, switch port, virtual switch)" } else { "is down" };
    failure(subject(interface), what).fix(fix)
}

fn xdp_mode(interface: &Interface, mode: XdpMode) -> Finding {
    let driver = interface.driver.as_deref().unwrap_or("unknown");
    let native = NATIVE_DRIVERS.contains(&driver);
    let subject = subject(interface);
    match (mode, native) {
        (XdpMode::Generic, _) => note(subject, format!("driver {driver}: generic XDP, as configured")),
        (_, true) if driver == "virtio_net" => {
            let what =
                "driver virtio_net: native XDP, if the hypervisor gives it a spare pair of queues per CPU";
            ok(subject, what)
        }
        (_, true) => ok(subject, format!("driver {driver}: native XDP")),
        (XdpMode::Native, false) => {
            failure(subject, format!("driver {driver} is not known for native XDP, which is asked for"))
                .fix("dataplane.xdp_mode = \"auto\" in the configuration")
        }
        (XdpMode::Auto, false) => {
            note(subject, format!("driver {driver} is not known for native XDP: generic XDP, slower"))
        }
    }
}

fn mtu(interface: &Interface) -> Finding {
    let what = format!("MTU {}", interface.mtu);
    if interface.mtu <= LARGEST_SINGLE_BUFFER_MTU {
        return ok(subject(interface), what);
    }
    let what = format!("{what}: native XDP needs Linux 5.18 and a driver that takes packets in fragments");
    warning(subject(interface), what)
        .fix(format!("if attaching fails: ip link set {} mtu {LARGEST_SINGLE_BUFFER_MTU}", interface.name))
}

fn other_programs(interface: &Interface) -> Vec<Finding> {
    let describe = |id: u32| {
        let mut programs = loaded_programs().filter_map(Result::ok);
        programs.find(|program| program.id() == id).and_then(|it| it.name_as_str().map(str::to_owned))
    };
    let finding = |attached: &crate::network::AttachedXdp| {
        let name = describe(attached.program).unwrap_or_default();
        if name.starts_with(OUR_PROGRAMS) {
            return ok(subject(interface), format!("sheave is attached ({})", attached.mode));
        }
        let flag = match attached.mode {
            XdpAttachMode::Native => "xdpdrv",
            XdpAttachMode::Generic => "xdpgeneric",
            XdpAttachMode::Hardware => "xdpoffload",
        };
        let what = format!(
            "another XDP program is attached ({name:?}, id {}, {}); sheave never replaces it",
            attached.program, attached.mode
        );
        let fix = format!("stop its owner, or: ip link set {} {flag} off", interface.name);
        failure(subject(interface), what).fix(fix)
    };
    interface.xdp.iter().map(finding).collect()
}

fn harmful_offloads(interface: &Interface, mode: XdpMode) -> Option<Finding> {
    let on = offloads::harmful(&interface.name, mode == XdpMode::Generic).ok()?;
    if on.is_empty() {
        return Some(ok(subject(interface), "no offload keeps packets from XDP"));
    }
    let fixed = offloads::fixed(&interface.name, &on).ok()?;
    if !fixed.is_empty() {
        let what = format!("{} on, and its driver lets nobody switch it off", fixed.join(", "));
        return Some(
            failure(subject(interface), what).fix("use another driver or network card for this interface"),
        );
    }
    let switches: Vec<String> = on.iter().map(|name| format!("{name} off")).collect();
    Some(
        note(subject(interface), format!("{} on: sheave switches off while it is attached", on.join(", ")))
            .fix(format!("ethtool -K {} {}", interface.name, switches.join(" "))),
    )
}

/// What switching off an offload of this interface does not help against.
fn unfinished_checksums(interface: &Interface, mode: XdpMode) -> Option<Finding> {
    let driver = interface.driver.as_deref().filter(|driver| *driver == "veth")?;
    let what = offloads::unfinished_checksums(&interface.name, driver, mode == XdpMode::Generic)?;
    Some(if mode == XdpMode::Generic {
        warning(subject(interface), what)
    } else {
        note(subject(interface), what)
    })
}

/// VLANs, bonds and bridges: where the program really is.
fn stacked(network: &Network, port: &Port, interface: &Interface) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !port.tags.is_empty() {
        let tag = |tag: &crate::network::Tag| match tag.protocol {
            TagProtocol::Ieee8021Q => format!("802.1Q {}", tag.id),
            TagProtocol::Ieee8021Ad => format!("802.1ad {}", tag.id),
        };
        let tags: Vec<_> = port.tags.iter().map(tag).collect();
        let what =
            format!("carries the VLAN ({}): the program is attached here, below the VLAN", tags.join(", "));
        findings.push(note(subject(interface), what));
    }
    let members = || network.interfaces().into_iter().filter(|it| it.master == Some(interface.index));
    match interface.kind {
        Kind::Bond => {
            for member in members() {
                let driver = member.driver.as_deref().unwrap_or("unknown");
                if !NATIVE_DRIVERS.contains(&driver) {
                    let what = format!(
                        "its member {} (driver {driver}) is not known for native XDP: the bond falls back to generic",
                        member.name
                    );
                    findings.push(note(subject(interface), what));
                }
            }
        }
        Kind::Bridge => {
            let what = "a bridge: generic XDP sees only what is addressed to this host, not what the bridge forwards";
            findings.push(note(subject(interface), what));
        }
        _ => {}
    }
    if let Some(master) = interface.master.and_then(|index| network.interface(index).ok()) {
        let what = format!("belongs to {}: addresses and routes are there, attach there", master.name);
        findings.push(
            warning(subject(interface), what)
                .fix(format!("dataplane.interfaces = [\"{}\"] in the configuration", master.name)),
        );
    }
    findings
}

fn reverse_path_filter(interface: &Interface) -> Option<Finding> {
    let read = |name: &str| -> Option<u8> {
        let path = format!("/proc/sys/net/ipv4/conf/{name}/rp_filter");
        fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    let strict = read("all")?.max(read(&interface.name)?) == 1;
    strict.then(|| {
        let what = "strict reverse path filter: forwarded packets pass it by, but packets for a backend on this host \
                    that come in by another interface are dropped silently";
        note(subject(interface), what).fix(format!("sysctl -w net.ipv4.conf.{}.rp_filter=2", interface.name))
    })
}
