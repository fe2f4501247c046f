//! The addresses of this host.

use std::net::IpAddr;

use netlink_packet_route::address::{AddressAttribute, AddressMessage};

/// An address of this host on one interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LocalAddress {
    /// The address.
    pub address: IpAddr,
    /// Length of the prefix of its subnet, in bits.
    pub prefix_length: u8,
    /// Index of the interface that has it.
    pub interface: u32,
}

impl LocalAddress {
    pub(super) fn from_message(message: &AddressMessage) -> Option<Self> {
        let mut local = None;
        let mut address = None;
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Local(value) => local = Some(*value),
                AddressAttribute::Address(value) => address = Some(*value),
                _ => {}
            }
        }
        // On a point-to-point interface "address" is the peer's; without a peer only it may be present (IPv6).
        Some(Self {
            address: local.or(address)?,
            prefix_length: message.header.prefix_len,
            interface: message.header.index,
        })
    }
}
