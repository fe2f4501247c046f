//! Connections through both VIPs that are open and say nothing, as a watch without events.

use std::{net::IpAddr, time::Duration};

use anyhow::{Result, ensure};

use crate::{cluster::Cluster, lab::eventually, load::Crowd};

/// A crowd at each VIP, and the server that each connection of it is at.
#[derive(Debug)]
pub struct Idle {
    crowds: Vec<(Crowd, Vec<String>)>,
    /// What the client's kernel had counted when they were open.
    resets: u64,
}

impl Idle {
    /// Opens so many at each VIP.
    ///
    /// # Errors
    /// When one of them fails.
    pub fn open(cluster: &Cluster, connections: usize) -> Result<Self> {
        let open = |vip: IpAddr| {
            let mut crowd = Crowd::open(&cluster.client, &cluster.client_of(vip)?, connections)?;
            let report = crowd.ask_names();
            report.require_all(connections)?;
            let servers = report.outcomes.into_iter().filter_map(|outcome| outcome.result.ok()).collect();
            Ok((crowd, servers))
        };
        let crowds = cluster.vips().into_iter().map(open).collect::<Result<_>>()?;
        Ok(Self { crowds, resets: cluster.client_resets()? })
    }

    /// How many of them are at a server.
    pub fn at(&self, server: &str) -> u64 {
        let all = self.crowds.iter().flat_map(|(_, servers)| servers);
        all.filter(|at| *at == server).count() as u64
    }

    /// How many of those to a VIP, by its place in [`Cluster::vips`], are at a server.
    pub fn at_vip(&self, vip: usize, server: &str) -> u64 {
        self.crowds[vip].1.iter().filter(|at| *at == server).count() as u64
    }

    /// Connections of the client that were reset since they were open, or since [`Idle::forget_resets`].
    ///
    /// # Errors
    /// When the client's kernel does not say.
    pub fn resets(&self, cluster: &Cluster) -> Result<u64> {
        Ok(cluster.client_resets()? - self.resets)
    }

    /// Counts from now on: other connections of the client may have been reset, and were meant to be.
    ///
    /// # Errors
    /// When the client's kernel does not say.
    pub fn forget_resets(&mut self, cluster: &Cluster) -> Result<()> {
        self.resets = cluster.client_resets()?;
        Ok(())
    }

    /// Waits until so many were reset: without saying anything itself.
    ///
    /// # Errors
    /// When it takes too long, or there are more.
    pub fn wait_reset(&self, cluster: &Cluster, count: u64, limit: Duration) -> Result<()> {
        eventually(limit, &format!("{count} connections are reset"), || {
            let reset = self.resets(cluster)?;
            ensure!(reset == count, "{reset} of {count}");
            Ok(())
        })
    }

    /// None was reset, and each still has its server.
    ///
    /// # Errors
    /// When it is not so.
    pub fn require_alive(&mut self, cluster: &Cluster) -> Result<()> {
        let before = self.resets(cluster)?;
        self.require_gone_only(&[])?;
        let after = self.resets(cluster)?;
        ensure!((before, after) == (0, 0), "{before} were reset before they were asked, {after} after it");
        Ok(())
    }

    /// Those at the servers of `gone` are gone, and all others are where they were.
    ///
    /// # Errors
    /// When it is not so.
    pub fn require_gone_only(&mut self, gone: &[&str]) -> Result<()> {
        for (crowd, servers) in &mut self.crowds {
            let report = crowd.ask_names();
            for (outcome, server) in report.outcomes.iter().zip(servers) {
                match &outcome.result {
                    Ok(_) if gone.contains(&server.as_str()) => anyhow::bail!("one at {server} is alive"),
                    Ok(now) => ensure!(now == server, "one at {server} is at {now} now"),
                    Err(error) => {
                        ensure!(gone.contains(&server.as_str()), "one at {server} is gone: {error}");
                    }
                }
            }
        }
        Ok(())
    }
}
