//! Where the commands meet the rest of the daemon.

use crate::config::Config;

/// `sheave run`, once the configuration is right. Returns when the daemon was told to stop.
pub(super) fn run_daemon(_config: Config) -> anyhow::Result<()> {
    anyhow::bail!("internal: not linked yet")
}

/// `sheave doctor`.
pub(super) async fn examine(_config: Option<&Config>) -> anyhow::Result<Vec<super::doctor::Finding>> {
    anyhow::bail!("internal: not linked yet")
}

/// `sheave unload` where no daemon runs. What was removed, in words.
pub(super) fn unload_leftovers() -> anyhow::Result<Vec<String>> {
    anyhow::bail!("internal: not linked yet")
}
