//! Which addresses we put on this host: known even after a kill, so that they can be taken away and nothing else.

use std::{
    collections::BTreeSet,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{VipError, own::remove_address};
use crate::{network::Network, state};

/// A VIP that we put on an interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Placed {
    /// The VIP.
    pub vip: IpAddr,
    /// The name of the interface.
    pub interface: String,
}

/// The content of the file.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Content {
    /// The kernel's name for this boot: addresses do not survive a reboot, and whoever has added the same one since is
    /// not us.
    boot: String,
    placed: BTreeSet<Placed>,
}

/// The record in a state directory.
#[derive(Debug)]
pub(super) struct Record {
    path: PathBuf,
    content: Content,
}

impl Record {
    pub(super) fn load(state_dir: &Path) -> Result<Self, VipError> {
        let path = state_dir.join("vips.json");
        let failed = |source| VipError::Record { path: path.clone(), source };
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(failed)?;
        let mut content: Content = state::load(&path).map_err(failed)?;
        if content.boot != boot.trim() {
            content = Content { boot: boot.trim().to_owned(), placed: BTreeSet::new() };
        }
        Ok(Self { path, content })
    }

    pub(super) fn placed(&self) -> &BTreeSet<Placed> {
        &self.content.placed
    }

    pub(super) fn add(&mut self, placed: Placed) -> Result<(), VipError> {
        self.content.placed.insert(placed);
        self.save()
    }

    pub(super) fn remove(&mut self, placed: &Placed) -> Result<(), VipError> {
        self.content.placed.remove(placed);
        self.save()
    }

    fn save(&self) -> Result<(), VipError> {
        let content = (!self.content.placed.is_empty()).then_some(&self.content);
        state::save(&self.path, content)
            .map_err(|source| VipError::Record { path: self.path.clone(), source })
    }
}

/// The VIPs that an owner put on this host and did not take away: it was killed, or still runs.
pub fn leftovers(state_dir: &Path) -> Result<Vec<Placed>, VipError> {
    Ok(Record::load(state_dir)?.placed().iter().cloned().collect())
}

/// Takes away what an owner left behind. Returns what was taken away.
pub async fn remove_leftovers(network: &Network, state_dir: &Path) -> Result<Vec<Placed>, VipError> {
    remove_others(network, state_dir, &[]).await
}

/// The same for all but those in `keep`.
pub async fn remove_others(
    network: &Network,
    state_dir: &Path,
    keep: &[IpAddr],
) -> Result<Vec<Placed>, VipError> {
    let mut record = Record::load(state_dir)?;
    let others: Vec<_> =
        record.placed().iter().filter(|placed| !keep.contains(&placed.vip)).cloned().collect();
    for placed in &others {
        remove_address(network, placed).await?;
        record.remove(placed)?;
    }
    Ok(others)
}
