//! The other end of a veth. What the program sends out of a veth in native mode (XDP_TX) waits in the other end's queue: the
//! kernel wakes that end only if it has an XDP program of its own (`veth_xdp_flush` in `drivers/net/veth.c`), and drops the
//! frame if it does not even poll (neither a program nor GRO). With GRO alone a frame waits for the next ordinary packet.

use futures_util::TryStreamExt;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};

use super::{Interface, Kind, Network, XdpAttachMode};

/// What is known about the other end of a veth.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Peer {
    /// It takes what the program sends at once.
    HasProgram,
    /// It does not: its name, and whether it is in another network namespace.
    NoProgram(String, bool),
    /// The kernel does not tell.
    Unknown,
}

impl Network {
    /// What must be done so that frames leave a veth at once, in a sentence. None: they do, or it is no veth. For an
    /// interface that has, or is to have, the program in native mode.
    pub async fn veth_warning(&self, interface: &Interface) -> Option<String> {
        if interface.kind != Kind::Veth {
            return None;
        }
        let peer = self.veth_peer(interface.index).await.unwrap_or(Peer::Unknown);
        warning(&interface.name, &peer)
    }

    async fn veth_peer(&self, index: u32) -> Option<Peer> {
        let mut links = self.requests().link().get().match_index(index).execute();
        let (peer, namespace) = peer_of(&links.try_next().await.ok()??)?;
        let mut question = self.requests().link().get().match_index(peer);
        question.message_mut().attributes.extend(namespace.map(LinkAttribute::IfNetnsId));
        // Another namespace answers root of its owner, which a daemon in a user namespace is not.
        let peer = Interface::from_message(&question.execute().try_next().await.ok()??)?;
        let has_program = peer.xdp.iter().any(|attached| attached.mode == XdpAttachMode::Native);
        Some(if has_program { Peer::HasProgram } else { Peer::NoProgram(peer.name, namespace.is_some()) })
    }
}

/// Index of the other end, and the id of its network namespace where that is another.
fn peer_of(message: &LinkMessage) -> Option<(u32, Option<i32>)> {
    let mut namespace = None;
    let mut peer = None;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Link(index) => peer = Some(*index),
            LinkAttribute::LinkNetNsId(id) => namespace = Some(*id),
            _ => {}
        }
    }
    Some((peer.filter(|index| *index != 0)?, namespace))
}

fn warning(name: &str, peer: &Peer) -> Option<String> {
    let found = match peer {
        Peer::HasProgram => return None,
        Peer::NoProgram(peer, false) => format!("its other end, {peer}, has no XDP program"),
        Peer::NoProgram(peer, true) => {
            format!("its other end, {peer} in another network namespace, has no XDP program")
        }
        Peer::Unknown => "whether its other end has an XDP program cannot be read from here".to_owned(),
    };
    let otherwise = if *peer == Peer::Unknown { "without one, " } else { "" };
    Some(format!(
        "{name}: {found}: {otherwise}the kernel delivers what sheave sends out of a veth in native mode only with other \
         traffic, or never. Attach a program that passes everything to the other end, or set xdp_mode = \"generic\" and run \
         `ethtool -K DEVICE tx off` for the other end"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::testing::{Peer as Host, in_namespace, ip};

    #[test]
    fn the_other_end_is_looked_at_here_and_in_another_namespace() {
        in_namespace(async || {
            let _host = Host::behind("lan", "far");
            ip("link add left type veth peer name right");
            let (network, _changes) = Network::open().await.unwrap();
            let warning = async |name: &str| {
                let interface = network.interface_named(name).unwrap();
                network.veth_warning(&interface).await
            };
            let there = warning("lan").await.unwrap();
            assert!(there.starts_with("lan: its other end, far in another network namespace"), "{there}");
            let here = warning("left").await.unwrap();
            assert!(here.starts_with("left: its other end, right, has no XDP program"), "{here}");
            assert!(here.contains("xdp_mode = \"generic\""), "{here}");
            assert_eq!(warning("lo").await, None);
        });
    }

    #[test]
    fn a_program_at_the_other_end_is_enough_and_what_cannot_be_read_is_said() {
        assert_eq!(warning("eth0", &Peer::HasProgram), None);
        assert!(warning("eth0", &Peer::Unknown).unwrap().contains("cannot be read from here: without one, "));
    }
}
