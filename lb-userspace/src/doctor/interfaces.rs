//! The interfaces that the data path uses.

use std::{collections::BTreeSet, fs};

use aya::programs::loaded_programs;

use super::{Finding, bonds, failure, note, ok, warning};
use crate::{
    config::{Config, XdpMode},
    dataplane::LEARNED_HOPS_MAX,
    network::{
        Interface, Kind, Network, Port, TagProtocol, XdpAttachMode, mode_for,
        offloads::{self, Switched},
        virtio,
    },
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
/// fragments, and must know of them itself.
const LARGEST_SINGLE_BUFFER_MTU: u32 = 3498;

/// What our own program's name starts with.
const OUR_PROGRAMS: &str = "sheave";

pub(super) async fn examine(network: &Network, ports: &[Port], config: Option<&Config>) -> Vec<Finding> {
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
        match interface.kind {
            Kind::Bond(_) => {
                let members = network.members(interface.index);
                findings.extend(bonds::examine(&interface, &members, !port.tags.is_empty(), mode));
            }
            _ => findings.push(xdp_mode(&interface, mode, &virtio::obstacles(&interface.name))),
        }
        findings.push(mtu(&interface));
        findings.extend(other_programs(&interface));
        findings.extend(harmful_offloads(&interface, mode, !port.tags.is_empty()));
        findings.extend(unfinished_checksums(&interface, mode));
        findings.extend(unserved(&interface, !port.tags.is_empty(), mode));
        findings.extend(stacked(network, port, &interface));
        findings.extend(other_end(network, &interface, mode).await);
        let addressed = network.local_addresses().iter().map(|it| it.interface).collect();
        let base_of = |index| network.port_of(index).ok().map(|port| port.index);
        let devices = devices(&interface, network.interfaces(), &addressed, base_of);
        let arrangements = devices.iter().filter_map(|it| network.arrangement(it.index));
        findings.extend(arrangements.map(|what| note(subject(&interface), what)));
        findings.extend(devices.iter().filter_map(reverse_path_filter));
    }
    findings.push(note("ip_forward", format!("not needed: packets are forwarded before the kernel's routing, and replies to clients leave by \
         the neighbours that their packets came from. Only with clients behind more than {LEARNED_HOPS_MAX} neighbours at once the replies to \
         further ones are routed by the kernel, which takes ip_forward = 1")));
    findings
}

pub(super) fn subject(interface: &Interface) -> String {
    format!("interface {}", interface.name)
}

fn state(interface: &Interface) -> Finding {
    if interface.up && interface.carrier {
        return ok(subject(interface), "up");
    }
    if !interface.up {
        return failure(subject(interface), "is down").fix(format!("ip link set {} up", interface.name));
    }
    // Setting it up once more would change nothing: it is the other end that is missing.
    failure(subject(interface), "is up and has no carrier").fix(format!(
        "look at the other end: cable, switch port or virtual switch; of a pair (veth) the peer must be up; then `ip link \
         show {}` says LOWER_UP",
        interface.name
    ))
}

/// `obstacles`: [`virtio::obstacles`].
pub(super) fn xdp_mode(interface: &Interface, mode: XdpMode, obstacles: &[&str]) -> Finding {
    let driver = interface.driver.as_deref().unwrap_or("unknown");
    let native = NATIVE_DRIVERS.contains(&driver);
    let subject = subject(interface);
    match (mode, native) {
        (XdpMode::Generic, _) => note(subject, format!("driver {driver}: generic XDP, as configured")),
        (_, true) if driver == "virtio_net" && !obstacles.is_empty() => {
            let what = format!(
                "driver virtio_net does not take the program: the hypervisor leaves packets merged or without checksum \
                 ({}), and does not let this host switch that off (ctrl_guest_offloads)",
                obstacles.join(", ")
            );
            failure(subject, what).fix(virtio::fix_for(obstacles).unwrap_or_default())
        }
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
    let what = format!("{what}: native XDP needs a driver that takes packets in fragments");
    warning(subject(interface), what)
        .fix(format!("if attaching fails: ip link set {} mtu {LARGEST_SINGLE_BUFFER_MTU}", interface.name))
}

pub(super) fn other_programs(interface: &Interface) -> Vec<Finding> {
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

/// `tagged`: frames with a VLAN tag are ours.
pub(super) fn harmful_offloads(interface: &Interface, mode: XdpMode, tagged: bool) -> Vec<Finding> {
    let Ok(on) = offloads::harmful(&interface.name, mode == XdpMode::Generic) else { return Vec::new() };
    let Ok(fixed) = offloads::fixed(&interface.name, &on) else { return Vec::new() };
    let off: Vec<String> = on.into_iter().filter(|name| !fixed.contains(name)).collect();
    if off.is_empty() && fixed.is_empty() {
        return vec![ok(subject(interface), "no offload keeps packets from XDP")];
    }
    let switches: Vec<String> = off.iter().map(|name| format!("{name} off")).collect();
    let switchable = (!off.is_empty()).then(|| {
        let what = format!("{} on: sheave switches off while it is attached", off.join(", "));
        note(subject(interface), what).fix(format!("ethtool -K {} {}", interface.name, switches.join(" ")))
    });
    let hypervisor_fix = virtio::hypervisor_fix(&interface.name);
    let fixed = fixed_offloads(interface, Switched { off, fixed, hypervisor_fix }, tagged);
    fixed.into_iter().chain(switchable).collect()
}

/// As `sheave run` would say it.
fn fixed_offloads(interface: &Interface, switched: Switched, tagged: bool) -> Vec<Finding> {
    let fix = switched
        .hypervisor_fix
        .clone()
        .unwrap_or_else(|| "use another driver or network card for this interface".to_owned());
    match switched.consequences(&interface.name, tagged) {
        Ok(sentences) => sentences.into_iter().map(|it| warning(subject(interface), it).fix(&fix)).collect(),
        Err(error) => {
            let text = error.to_string();
            let what = text.split_once("\n   = help: ").map_or(text.as_str(), |(what, _)| what);
            vec![failure(subject(interface), what).fix(fix)]
        }
    }
}

/// What switching off an offload of this interface does not help against.
fn unfinished_checksums(interface: &Interface, mode: XdpMode) -> Option<Finding> {
    let what = offloads::unfinished_checksums(interface)?;
    Some(if mode == XdpMode::Generic {
        warning(subject(interface), what)
    } else {
        note(subject(interface), what)
    })
}

/// Whether the program would see nothing of what comes in there.
fn unserved(interface: &Interface, tagged: bool, mode: XdpMode) -> Option<Finding> {
    let reason = mode_for(interface, tagged, mode).err()?;
    Some(
        failure(subject(interface), reason)
            .fix("use another interface, or another dataplane.xdp_mode, as said"),
    )
}

/// Whether what the program sends arrives at the other end of a veth.
async fn other_end(network: &Network, interface: &Interface, mode: XdpMode) -> Option<Finding> {
    let is_generic = interface.xdp.iter().any(|it| it.mode == XdpAttachMode::Generic);
    if mode == XdpMode::Generic || is_generic {
        return None;
    }
    network.veth_warning(interface).await.map(|what| {
        warning(subject(interface), what)
            .fix("dataplane.xdp_mode = \"generic\", or a program at the other end")
    })
}

/// VLANs and bridges: where the program really is.
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
    if interface.kind == Kind::Bridge {
        let what =
            "a bridge: generic XDP sees only what is addressed to this host, not what the bridge forwards";
        findings.push(note(subject(interface), what));
    }
    let is_vrf = |it: &Interface| matches!(&it.kind, Kind::Other(kind) if kind == "vrf");
    let master = interface.master.and_then(|index| network.interface(index).ok());
    if let Some(master) = master.filter(|master| !is_vrf(master)) {
        let what = format!("belongs to {}: addresses and routes are there, attach there", master.name);
        findings.push(
            warning(subject(interface), what)
                .fix(format!("dataplane.interfaces = [\"{}\"] in the configuration", master.name)),
        );
    }
    findings
}

/// Where the kernel filters what comes in by an interface: there, and on those of its VLANs that this host has an address on.
fn devices(
    base: &Interface,
    all: Vec<Interface>,
    addressed: &BTreeSet<u32>,
    base_of: impl Fn(u32) -> Option<u32>,
) -> Vec<Interface> {
    let is_above = |it: &Interface| {
        it.index != base.index && addressed.contains(&it.index) && base_of(it.index) == Some(base.index)
    };
    std::iter::once(base.clone()).chain(all.into_iter().filter(is_above)).collect()
}

/// The stricter of what is set for the device and for all (`Documentation/networking/ip-sysctl.rst`: the maximum is used).
fn reverse_path_filter(interface: &Interface) -> Option<Finding> {
    let read = |name: &str| -> Option<u8> {
        let path = format!("/proc/sys/net/ipv4/conf/{name}/rp_filter");
        fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    let strict = read("all")?.max(read(&interface.name)?) == 1;
    strict.then(|| {
        let what = "strict reverse path filter: forwarded packets pass it by, but packets for a backend on this host \
                    that come in by another interface are dropped silently";
        // In names a dot is written as a slash: sysctl(8).
        let name = interface.name.replace('.', "/");
        note(subject(interface), what).fix(format!("sysctl -w net.ipv4.conf.{name}.rp_filter=2"))
    })
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::{BondMode, BondXmitHashPolicy};

    use super::{super::Level, *};
    use crate::network::Bonding;

    fn interface(index: u32, name: &str) -> Interface {
        Interface {
            index,
            name: name.to_owned(),
            mac: None,
            mtu: 1500,
            up: true,
            carrier: true,
            kind: Kind::Device,
            master: None,
            driver: None,
            xdp: Vec::new(),
        }
    }

    #[test]
    fn an_offload_that_stays_on_is_as_bad_as_what_comes_of_it() {
        let levels = |name: &str, tagged| -> Vec<_> {
            let switched = Switched { fixed: vec![name.to_owned()], ..Switched::default() };
            fixed_offloads(&interface(1, "eth0"), switched, tagged).into_iter().map(|it| it.level).collect()
        };
        assert_eq!(levels("rx-lro", false), [Level::Warning]);
        assert_eq!(levels("rx-vlan-hw-parse", false), []);
        assert_eq!(levels("rx-vlan-hw-parse", true), [Level::Failure]);
    }

    #[test]
    fn a_virtio_card_that_takes_no_program_is_a_failure_with_the_hypervisors_settings() {
        let card = Interface { driver: Some("virtio_net".to_owned()), ..interface(1, "eth0") };
        assert_eq!(xdp_mode(&card, XdpMode::Auto, &[]).level, Level::Ok);
        for mode in [XdpMode::Auto, XdpMode::Native] {
            let finding = xdp_mode(&card, mode, &["guest_csum", "guest_ufo"]);
            assert_eq!(finding.level, Level::Failure);
            assert!(finding.what.contains("guest_csum, guest_ufo"), "{finding:?}");
            assert!(finding.fix.unwrap().contains("guest_csum=off,guest_ufo=off"));
        }
        assert_eq!(xdp_mode(&card, XdpMode::Generic, &["guest_csum"]).level, Level::Note);
    }

    #[test]
    fn what_the_program_would_not_see_or_the_kernel_not_take_is_a_failure() {
        let level = |kind, tagged, mode| {
            let interface = Interface { kind, ..interface(1, "it0") };
            unserved(&interface, tagged, mode).map(|finding| finding.level)
        };
        let bond = |mode| Kind::Bond(Bonding { mode, policy: BondXmitHashPolicy::Layer2 });
        let (native, refused) = (bond(BondMode::ActiveBackup), bond(BondMode::BalanceAlb));
        assert_eq!(level(native.clone(), true, XdpMode::Auto), None);
        assert_eq!(level(native.clone(), false, XdpMode::Native), None);
        assert_eq!(level(native, true, XdpMode::Generic), Some(Level::Failure));
        assert_eq!(level(refused.clone(), true, XdpMode::Auto), Some(Level::Failure));
        assert_eq!(level(refused.clone(), false, XdpMode::Native), Some(Level::Failure));
        assert_eq!(level(refused, false, XdpMode::Auto), None);
        assert_eq!(level(Kind::Bridge, true, XdpMode::Generic), Some(Level::Failure));
        assert_eq!(level(Kind::Device, true, XdpMode::Native), None);
    }

    #[test]
    fn a_vlan_with_an_address_is_filtered_on_its_own() {
        let all = ["eth0", "eth0.100", "eth0.200", "eth1", "eth1.100"];
        let all: Vec<_> = all.iter().zip(1..).map(|(name, index)| interface(index, name)).collect();
        let base_of = |index| Some(if index < 4 { 1 } else { 4 });
        let found = devices(&all[0], all.clone(), &BTreeSet::from([2, 4, 5]), base_of);
        let names: Vec<_> = found.iter().map(|it| it.name.as_str()).collect();
        assert_eq!(names, ["eth0", "eth0.100"]);
    }
}
