//! VIPs that went with their interface: put back when it is here again.

use super::{
    Duration, Instant, Interface, IpAddr, Link, Owner, Placed, Plan, VipError, add_address, open, plan, probe,
};

/// Where another host has the VIP meanwhile, it is asked for again so much later.
const ASK_AGAIN: Duration = Duration::from_secs(60);

/// A VIP that went with its interface.
#[derive(Debug)]
pub(super) struct Lost {
    /// The name of the interface.
    interface: String,
    /// The question whether another host has the VIP is not answered yet.
    is_asked_for: bool,
    /// It is not asked for before this.
    from: Instant,
}

/// A VIP that no other host has, with what it takes to put it here; or why it cannot be put here.
pub(super) type Asked = (IpAddr, Result<(Link, Interface), VipError>);

impl Owner {
    /// Takes in that a VIP of ours is not on this host any more. Returns the name of the interface that it went with, which is
    /// gone or was set down: [`Owner::put_back`] waits for it. None: the interface was there all the time, so another program
    /// has taken the VIP off it, and has its reason.
    pub fn lose(&mut self, vip: IpAddr) -> Option<String> {
        let carrier = self.carriers.get(&vip)?;
        let is_up = self.network.interface(carrier.index).is_ok_and(|interface| interface.up);
        if is_up && self.network.downs(carrier.index) == carrier.downs {
            return None;
        }
        carrier.guard.abort();
        let interface = carrier.name.clone();
        let lost = Lost { interface: interface.clone(), is_asked_for: false, from: Instant::now() };
        self.lost.insert(vip, lost);
        self.carriers.remove(&vip);
        Some(interface)
    }

    /// Puts the VIPs back that went with their interface, once one of that name is here, has an address in the VIP's subnet,
    /// and is `served`; as [`Owner::acquire`], after asking whether another host has the VIP. To be called every second: what
    /// takes time goes on between the calls. Returns what was put back.
    pub async fn put_back(&mut self, served: impl Fn(u32) -> bool) -> Vec<Placed> {
        self.note_survivors();
        let mut back = Vec::new();
        while let Some(asked) = self.asking.try_join_next() {
            let Ok((vip, answer)) = asked else { continue };
            let result = match answer {
                Ok((link, interface)) => self.place(link, interface).await,
                Err(error) => Err(error),
            };
            match result {
                Ok(placed) => back.push(placed),
                Err(error) => self.wait_for_another_try(vip, &error),
            }
        }
        let now = Instant::now();
        let due = self.lost.iter().filter(|(_, lost)| !lost.is_asked_for && lost.from <= now);
        for vip in due.map(|(vip, _)| *vip).collect::<Vec<_>>() {
            back.extend(self.try_again(vip, &served).await);
        }
        back
    }

    /// A VIP that is still on its interface was not lost when that was set down.
    fn note_survivors(&mut self) {
        for (vip, carrier) in &mut self.carriers {
            let is_up = self.network.interface(carrier.index).is_ok_and(|interface| interface.up);
            if is_up && self.network.interface_carrying(*vip) == Some(carrier.index) {
                carrier.downs = self.network.downs(carrier.index);
            }
        }
    }

    /// Begins to ask for a VIP, if its interface is here. Returns what is here already.
    async fn try_again(&mut self, vip: IpAddr, served: impl Fn(u32) -> bool) -> Option<Placed> {
        let lost = self.lost.get_mut(&vip)?;
        let is_it = |interface: &Interface| interface.name == lost.interface && served(interface.index);
        // An interface that is not ready yet is no error: it has just come, or is still to come.
        match plan(&self.network, vip, Some(&self.record), Duration::ZERO).await.ok()? {
            Plan::Add(interface) if is_it(&interface) => {
                let link = open(&interface, vip).ok()?;
                lost.is_asked_for = true;
                self.asking.spawn(async move {
                    let answer = probe(&link, &interface).await;
                    (vip, answer.map(|()| (link, interface)))
                });
                None
            }
            // What configures the interface has added it, where the record says that it is ours.
            Plan::Adopt(interface) if is_it(&interface) => {
                let placed = Placed { vip, interface: interface.name.clone() };
                let link = open(&interface, vip).ok()?;
                self.keep(link, interface);
                Some(placed)
            }
            Plan::Leave => {
                tracing::warn!(
                    "the VIP {vip} is on this host again, put there by another program: sheave will neither announce \
                     nor remove it"
                );
                self.lost.remove(&vip);
                None
            }
            Plan::Add(_) | Plan::Adopt(_) => None,
        }
    }

    async fn place(&mut self, link: Link, interface: Interface) -> Result<Placed, VipError> {
        let vip = link.address;
        let placed = Placed { vip, interface: interface.name.clone() };
        self.record.add(placed.clone())?;
        add_address(&self.network, &interface, vip).await?;
        self.keep(link, interface);
        self.network.reread_addresses().await.map_err(|source| VipError::Network { vip, source })?;
        Ok(placed)
    }

    fn wait_for_another_try(&mut self, vip: IpAddr, error: &VipError) {
        let is_in_use = matches!(error, VipError::InUse { .. });
        if is_in_use {
            tracing::error!("cannot put the VIP {vip} back: {error}");
        } else {
            tracing::debug!("cannot put the VIP {vip} back yet: {error}");
        }
        if let Some(lost) = self.lost.get_mut(&vip) {
            lost.is_asked_for = false;
            lost.from = Instant::now() + if is_in_use { ASK_AGAIN } else { Duration::ZERO };
        }
    }
}
