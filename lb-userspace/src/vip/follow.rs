//! `vip.mode = "follow"`: somebody else moves the VIP, we look on.

use std::{collections::BTreeMap, net::IpAddr};

use crate::network::Network;

/// What became of a VIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It is on this host now, on the interface with this index (also: it moved to that interface).
    Here {
        /// The VIP.
        vip: IpAddr,
        /// Index of its interface.
        interface: u32,
    },
    /// It is not on this host (any more).
    Elsewhere {
        /// The VIP.
        vip: IpAddr,
    },
}

/// Remembers where the VIPs were when last looked at.
#[derive(Debug)]
pub struct Follower {
    known: BTreeMap<IpAddr, Option<Option<u32>>>,
}

impl Follower {
    /// Nothing is known about these VIPs yet: the first look reports each of them.
    pub fn new(vips: impl IntoIterator<Item = IpAddr>) -> Self {
        Self { known: vips.into_iter().map(|vip| (vip, None)).collect() }
    }

    /// Follows these from now on. What is known of those that were followed before stays known.
    pub fn follow(&mut self, vips: impl IntoIterator<Item = IpAddr>) {
        let before = std::mem::take(&mut self.known);
        let known = |vip| (vip, before.get(&vip).copied().flatten());
        self.known = vips.into_iter().map(known).collect();
    }

    /// What is different since the last look. Call it after [`Change::Addresses`](crate::network::Change).
    ///
    /// A VIP that seems to be gone is looked for in the kernel's own list first: the notification about an address that
    /// has just been added may still be on its way.
    pub async fn look(&mut self, network: &Network) -> Vec<Presence> {
        let mut news = Vec::new();
        let seems_gone = |(vip, known): (&IpAddr, &Option<Option<u32>>)| {
            network.interface_carrying(*vip).is_none() && *known != Some(None)
        };
        if self.known.iter().any(seems_gone)
            && let Err(error) = network.reread_addresses().await
        {
            // What cannot be proven is not told; the next change brings another look.
            tracing::warn!("cannot find out whether the VIPs are on this host: {error}");
            return news;
        }
        for (&vip, known) in &mut self.known {
            let interface = network.interface_carrying(vip);
            if known.replace(interface) != Some(interface) {
                news.push(match interface {
                    Some(interface) => Presence::Here { vip, interface },
                    None => Presence::Elsewhere { vip },
                });
            }
        }
        news
    }
}
