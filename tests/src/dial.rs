//! A client as a process of its own: the connect hook looks at the cgroup of the process, so that a thread of the test
//! will not do.

use std::{collections::BTreeMap, net::SocketAddr, path::Path, process::Command};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::lab::{Host, process::sibling_program};

/// So many of the connections ask at most: TLS for thousands would keep the servers from answering checks.
pub const ASKING: usize = 200;

/// What became of connections that were all open at the same time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dialled {
    /// How many each server answered.
    pub servers: BTreeMap<String, usize>,
    /// How many the kernel said were connected to each address (`getpeername`).
    pub peers: BTreeMap<SocketAddr, usize>,
    /// How many failed for which reason.
    pub failures: BTreeMap<String, usize>,
    /// How long the slowest took to be connected or refused.
    pub slowest_ms: u64,
}

impl Dialled {
    /// Fails unless all of `count` connections were opened, each as one to `address`, and those that asked answered.
    ///
    /// # Errors
    /// What else became of them.
    pub fn require_all(&self, count: usize, address: SocketAddr) -> Result<()> {
        let answered: usize = self.servers.values().sum();
        let as_dialled = self.peers.get(&address).copied().unwrap_or_default();
        anyhow::ensure!(
            (answered, as_dialled, self.failures.is_empty()) == (count.min(ASKING), count, true),
            "{count} connections to {address}: {self:?}"
        );
        Ok(())
    }
}

/// Opens `count` connections to `address` at once from a process on `host`, in the lab's cgroup if `hooked`. While
/// all are open, the first [`ASKING`] ask the server for its name; its certificate must be for `localhost`, and from the
/// authority in `ca_file`.
///
/// # Errors
/// When the process fails: connections may.
pub fn dial(host: &Host, hooked: bool, ca_file: &Path, address: SocketAddr, count: usize) -> Result<Dialled> {
    let program = sibling_program("sheave-dial")?;
    let command = if hooked { host.hooked_command(program)? } else { host.command(program) };
    run(command, ca_file, address, count)
}

/// The same from the lab's cgroup, with sockets that wait in `connect(2)`.
///
/// # Errors
/// As [`dial`].
pub fn dial_blocking(host: &Host, ca_file: &Path, address: SocketAddr, count: usize) -> Result<Dialled> {
    let mut command = host.hooked_command(sibling_program("sheave-dial")?)?;
    command.arg("--blocking");
    run(command, ca_file, address, count)
}

fn run(mut command: Command, ca_file: &Path, address: SocketAddr, count: usize) -> Result<Dialled> {
    command.arg("--ca").arg(ca_file).arg("--count").arg(count.to_string()).arg(address.to_string());
    let output = crate::lab::run(&mut command)?;
    serde_json::from_str(&output).with_context(|| format!("sheave-dial printed {output:?}"))
}
