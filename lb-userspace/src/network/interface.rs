//! Interfaces, and the port behind a stack of VLANs.

use std::{collections::BTreeMap, fmt};

use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, LinkXdp,
    VlanProtocol,
};

use super::{Mac, NetworkError, bonding::Bonding, ethtool};

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// The kernel's number for it.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its Ethernet address; none for tunnels and the like.
    pub mac: Option<Mac>,
    /// Largest IP packet, in bytes.
    pub mtu: u32,
    /// Switched on by the administrator.
    pub up: bool,
    /// It can carry packets: there is a cable and a link partner, and the kernel has taken note.
    pub carrier: bool,
    /// What it is.
    pub kind: Kind,
    /// Index of the bond, bridge or team it belongs to.
    pub master: Option<u32>,
    /// The kernel driver, where it says.
    pub driver: Option<String>,
    /// XDP programs attached to it.
    pub xdp: Vec<AttachedXdp>,
}

#[cfg(test)]
impl Interface {
    /// An interface that can carry packets.
    pub fn sample(index: u32, name: &str, kind: Kind, master: Option<u32>) -> Self {
        Self {
            index,
            name: name.to_owned(),
            mac: Some([2, 0, 0, 0, 0, index as u8]),
            mtu: 1500,
            up: true,
            carrier: true,
            kind,
            master,
            driver: None,
            xdp: Vec::new(),
        }
    }
}

/// What an interface is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A device of its own: a network card, real or virtual.
    Device,
    /// The loopback interface.
    Loopback,
    /// One VLAN of another interface.
    Vlan {
        /// Index of that interface. None: it is in another network namespace.
        parent: Option<u32>,
        /// The tag of its frames.
        tag: Tag,
    },
    /// Several interfaces used as one.
    Bond(Bonding),
    /// A software switch.
    Bridge,
    /// A pair that is connected back to back.
    Veth,
    /// Another MAC address on an interface.
    Macvlan,
    /// Anything else, by the kernel's name for it.
    Other(String),
}

/// A VLAN tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag {
    /// Which kind of tag.
    pub protocol: TagProtocol,
    /// VLAN id, 0 to 4094.
    pub id: u16,
}

/// The kind of a VLAN tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TagProtocol {
    /// 802.1Q: a customer's tag, the usual one.
    Ieee8021Q,
    /// 802.1ad: a provider's tag.
    Ieee8021Ad,
}

impl TagProtocol {
    /// The EtherType that announces the tag, host byte order.
    pub fn ethertype(self) -> u16 {
        match self {
            Self::Ieee8021Q => 0x8100,
            Self::Ieee8021Ad => 0x88a8,
        }
    }
}

/// An XDP program on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachedXdp {
    /// How it is attached.
    pub mode: XdpAttachMode,
    /// The kernel's id of the program.
    pub program: u32,
}

/// Where an XDP program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpAttachMode {
    /// In the driver.
    Native,
    /// In the network stack.
    Generic,
    /// On the network card.
    Hardware,
}

impl fmt::Display for XdpAttachMode {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Native => "native",
            Self::Generic => "generic",
            Self::Hardware => "hardware",
        })
    }
}

/// Where frames of an interface pass through XDP, and what they look like there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Index of the interface to attach to: below every VLAN, above bonding.
    pub index: u32,
    /// The VLAN tags of the frames, outermost first, at most two.
    pub tags: Vec<Tag>,
    /// The interface's own Ethernet address: what frames to this host are sent to.
    pub mac: Mac,
    /// Largest IP packet, in bytes.
    pub mtu: u32,
}

impl Interface {
    /// None for a message that does not describe a whole interface.
    pub(super) fn from_message(message: &LinkMessage) -> Option<Self> {
        let flags = message.header.flags;
        let mut name = None;
        let mut mac = None;
        let mut mtu = None;
        let mut master = None;
        let mut xdp = Vec::new();
        // The flag follows the carrier up to a second later.
        let mut carrier = flags.contains(LinkFlags::Running);
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::Carrier(0) => carrier = false,
                LinkAttribute::IfName(value) => name = Some(value.clone()),
                LinkAttribute::Address(value) => mac = Mac::try_from(value.as_slice()).ok(),
                LinkAttribute::Mtu(value) => mtu = Some(*value),
                LinkAttribute::Controller(value) => master = Some(*value),
                LinkAttribute::Xdp(values) => xdp = attached_programs(values),
                _ => {}
            }
        }
        let name = name?;
        Some(Self {
            index: message.header.index,
            mac: mac.filter(|_| message.header.link_layer_type == LinkLayerType::Ether),
            mtu: mtu?,
            up: flags.contains(LinkFlags::Up),
            carrier,
            kind: kind(message),
            master,
            driver: ethtool::driver(&name).ok(),
            xdp,
            name,
        })
    }
}

fn attached_programs(attributes: &[LinkXdp]) -> Vec<AttachedXdp> {
    let mut programs: Vec<_> = attributes
        .iter()
        .filter_map(|attribute| match attribute {
            LinkXdp::DrvProgId(program) => Some((XdpAttachMode::Native, *program)),
            LinkXdp::SkbProgId(program) => Some((XdpAttachMode::Generic, *program)),
            LinkXdp::HwProgId(program) => Some((XdpAttachMode::Hardware, *program)),
            _ => None,
        })
        .filter(|(_, program)| *program != 0)
        .map(|(mode, program)| AttachedXdp { mode, program })
        .collect();
    programs.sort_by_key(|attached| attached.program);
    programs
}

fn kind(message: &LinkMessage) -> Kind {
    let mut parent = None;
    let mut parent_is_foreign = false;
    let mut info: &[LinkInfo] = &[];
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Link(index) => parent = Some(*index),
            LinkAttribute::LinkNetNsId(_) => parent_is_foreign = true,
            LinkAttribute::LinkInfo(values) => info = values,
            _ => {}
        }
    }
    let kind = info.iter().find_map(|value| match value {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    });
    match kind {
        None if message.header.flags.contains(LinkFlags::Loopback) => Kind::Loopback,
        None => Kind::Device,
        Some(InfoKind::Vlan) => {
            Kind::Vlan { parent: parent.filter(|_| !parent_is_foreign), tag: vlan_tag(info) }
        }
        Some(InfoKind::Bond) => Kind::Bond(Bonding::from_info(info)),
        Some(InfoKind::Bridge) => Kind::Bridge,
        Some(InfoKind::Veth) => Kind::Veth,
        Some(InfoKind::MacVlan) => Kind::Macvlan,
        Some(other) => Kind::Other(other.to_string()),
    }
}

fn vlan_tag(info: &[LinkInfo]) -> Tag {
    let mut tag = Tag { protocol: TagProtocol::Ieee8021Q, id: 0 };
    let data = info.iter().filter_map(|value| match value {
        LinkInfo::Data(InfoData::Vlan(data)) => Some(data),
        _ => None,
    });
    for attribute in data.flatten() {
        match attribute {
            InfoVlan::Id(id) => tag.id = *id,
            InfoVlan::Protocol(VlanProtocol::Ieee8021Ad) => tag.protocol = TagProtocol::Ieee8021Ad,
            _ => {}
        }
    }
    tag
}

/// Walks from an interface down its VLANs to where XDP is attached.
pub(super) fn port_of(links: &BTreeMap<u32, Interface>, interface: u32) -> Result<Port, NetworkError> {
    let find = |index: u32| {
        links.get(&index).ok_or_else(|| NetworkError::NoInterface(format!("with index {index}")))
    };
    let top = find(interface)?;
    let mut tags = Vec::new();
    let mut below = top;
    while let Kind::Vlan { parent, tag } = &below.kind {
        if tags.len() == 2 {
            return Err(NetworkError::TooManyTags(top.name.clone()));
        }
        tags.insert(0, *tag);
        below = find(parent.ok_or_else(|| NetworkError::ForeignParent(below.name.clone()))?)?;
    }
    let mac = top.mac.filter(|_| top.kind != Kind::Loopback);
    let mac = mac.ok_or_else(|| NetworkError::NotEthernet(top.name.clone()))?;
    Ok(Port { index: below.index, tags, mac, mtu: top.mtu })
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::{Emitable, Parseable};
    use netlink_packet_route::link::{BondMode, BondXmitHashPolicy, InfoBond};

    use super::*;

    fn device(index: u32, name: &str) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.link_layer_type = LinkLayerType::Ether;
        message.header.flags = LinkFlags::Up | LinkFlags::Running;
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Mtu(1500),
            LinkAttribute::Address(vec![2, 0, 0, 0, 0, index as u8]),
        ];
        message
    }

    fn vlan(index: u32, parent: u32, id: u16, protocol: VlanProtocol) -> LinkMessage {
        let mut message = device(index, &format!("vlan{id}"));
        message.attributes.push(LinkAttribute::Link(parent));
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vlan),
            LinkInfo::Data(InfoData::Vlan(vec![InfoVlan::Id(id), InfoVlan::Protocol(protocol)])),
        ]));
        message
    }

    /// The interfaces that the kernel would describe with these messages, through their bytes.
    fn table(messages: &[LinkMessage]) -> BTreeMap<u32, Interface> {
        let parse = |message: &LinkMessage| {
            let mut bytes = vec![0; message.buffer_len()];
            message.emit(&mut bytes);
            let parsed = LinkMessage::parse(bytes.as_slice()).unwrap();
            Interface::from_message(&parsed).unwrap()
        };
        messages.iter().map(parse).map(|interface| (interface.index, interface)).collect()
    }

    #[test]
    fn an_interface_without_vlans_is_its_own_port() {
        let links = table(&[device(2, "eth0")]);
        assert_eq!(
            port_of(&links, 2).unwrap(),
            Port { index: 2, tags: vec![], mac: [2, 0, 0, 0, 0, 2], mtu: 1500 }
        );
    }

    #[test]
    fn a_vlan_in_a_provider_vlan_has_its_port_at_the_bottom_and_the_outer_tag_first() {
        let links = table(&[
            device(2, "bond0"),
            vlan(3, 2, 7, VlanProtocol::Ieee8021Ad),
            vlan(4, 3, 100, VlanProtocol::Ieee8021Q),
        ]);
        let port = port_of(&links, 4).unwrap();
        assert_eq!(port.index, 2);
        assert_eq!(port.mac, [2, 0, 0, 0, 0, 4], "frames carry the VLAN interface's own address");
        assert_eq!(
            port.tags,
            [
                Tag { protocol: TagProtocol::Ieee8021Ad, id: 7 },
                Tag { protocol: TagProtocol::Ieee8021Q, id: 100 }
            ]
        );
    }

    #[test]
    fn a_third_tag_is_refused() {
        let mut messages = vec![device(1, "eth0")];
        messages.extend((2..=4).map(|index| vlan(index, index - 1, index as u16, VlanProtocol::Ieee8021Q)));
        let error = port_of(&table(&messages), 4).unwrap_err();
        assert!(matches!(error, NetworkError::TooManyTags(name) if name == "vlan4"));
    }

    #[test]
    fn a_parent_in_another_namespace_is_not_taken_for_a_local_interface_of_that_number() {
        let mut message = vlan(3, 2, 7, VlanProtocol::Ieee8021Q);
        message.attributes.push(LinkAttribute::LinkNetNsId(0));
        let error = port_of(&table(&[device(2, "eth0"), message]), 3).unwrap_err();
        assert!(matches!(error, NetworkError::ForeignParent(name) if name == "vlan7"));
    }

    #[test]
    fn a_tunnel_is_no_port() {
        let mut tunnel = device(5, "wg0");
        tunnel.header.link_layer_type = LinkLayerType::None;
        let error = port_of(&table(&[tunnel]), 5).unwrap_err();
        assert!(matches!(error, NetworkError::NotEthernet(name) if name == "wg0"));
    }

    #[test]
    fn a_bond_is_read_with_its_mode_and_policy() {
        let bond = |data| {
            let mut message = device(2, "bond0");
            let info = vec![LinkInfo::Kind(InfoKind::Bond), LinkInfo::Data(InfoData::Bond(data))];
            message.attributes.push(LinkAttribute::LinkInfo(info));
            table(&[message])[&2].kind.clone()
        };
        let (mode, policy) = (BondMode::Ieee8023Ad, BondXmitHashPolicy::VlanSrcMac);
        let said = bond(vec![InfoBond::Mode(mode), InfoBond::MiiMon(100), InfoBond::XmitHashPolicy(policy)]);
        assert_eq!(said, Kind::Bond(Bonding { mode, policy }));
        let as_made = Bonding { mode: BondMode::BalanceRr, policy: BondXmitHashPolicy::Layer2 };
        assert_eq!(bond(vec![InfoBond::MiiMon(100)]), Kind::Bond(as_made));
    }

    #[test]
    fn attached_programs_are_seen_with_their_mode() {
        let mut message = device(2, "eth0");
        message.attributes.push(LinkAttribute::Xdp(vec![LinkXdp::ProgId(9), LinkXdp::SkbProgId(9)]));
        assert_eq!(table(&[message])[&2].xdp, [AttachedXdp { mode: XdpAttachMode::Generic, program: 9 }]);
    }
}
