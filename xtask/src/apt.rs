//! Debian's packages, where a host has them.

use std::{
    io,
    path::Path,
    process::{Command, Stdio},
    sync::Once,
};

use anyhow::{Context as _, Result};

use crate::process;

/// True where packages are Debian's.
pub(crate) fn is_here() -> bool {
    Path::new("/usr/bin/apt-get").exists()
}

/// True if all these packages can be installed, by lists read now: a container has none, or old ones.
pub(crate) fn offers(packages: &[&str]) -> bool {
    is_here() && {
        update();
        packages.iter().all(|package| {
            let policy = Command::new("apt-cache").args(["policy", package]).env("LC_ALL", "C").output();
            policy.is_ok_and(|output| has_candidate(&String::from_utf8_lossy(&output.stdout)))
        })
    }
}

/// Installs packages, and says so. Their services are not started, now or at boot, and no other package is removed
/// for them.
///
/// # Errors
///
/// apt-get fails, or the user may not; the message holds the command to run as root.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    update();
    process::phase(format_args!("installing {} (apt-get)", packages.join(" ")));
    let install = || process::run(process::as_root("sh")?.args(["-c", INSTALL, "sh"]).args(packages));
    install().with_context(|| format!("cannot install packages; as root: {}", by_hand(packages)))
}

/// What a person types to install packages.
pub(crate) fn by_hand(packages: &[&str]) -> String {
    format!("apt-get update && apt-get install --no-install-recommends {}", packages.join(" "))
}

/// A package's service starts as it is installed, with a configuration nobody wrote, unless a policy denies it; and
/// again at the next boot, unless it is disabled.
const INSTALL: &str = r#"
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    trap 'rm -f $policy' EXIT
    printf '#!/bin/sh\nexit 101\n' > $policy
    chmod 755 $policy
fi
export DEBIAN_FRONTEND=noninteractive
apt-get install --quiet --yes --no-remove --no-install-recommends "$@" >&2 </dev/null || exit
[ -d /run/systemd/system ] || exit 0
for package; do
    # Not always called like the package: etcd-server has etcd.service.
    for unit in $(dpkg -L "$package" | sed -n 's,.*/systemd/system/\([^/@]*\.service\)$,\1,p'); do
        if systemctl cat "$unit" >/dev/null 2>&1; then
            systemctl disable --quiet "$unit" >&2
        fi
    done
done
"#;

/// Reads the package lists, once. If that fails the old ones may do.
fn update() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        process::phase("reading the package lists (apt-get update)");
        let update = || {
            let mut command = process::as_root("apt-get")?;
            process::run(
                command.args(["--quiet", "--quiet", "update"]).stdin(Stdio::null()).stdout(io::stderr()),
            )
        };
        if let Err(error) = update() {
            process::phase(format_args!("{error:#}"));
        }
    });
}

fn has_candidate(policy: &str) -> bool {
    policy
        .lines()
        .find_map(|line| line.trim_start().strip_prefix("Candidate: "))
        .is_some_and(|candidate| candidate != "(none)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_without_a_version_to_install_is_not_offered() {
        assert!(has_candidate("curl:\n  Installed: (none)\n  Candidate: 7.88.1-10\n  Version table:\n"));
        assert!(!has_candidate("rustc-mozilla:\n  Installed: (none)\n  Candidate: (none)\n"));
        assert!(!has_candidate(""));
    }
}
