//! Offloads that would keep packets, or parts of them, from the data path. They are switched off where the program is
//! attached, and what was on is remembered so that it can be switched on again.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
};

use super::{Interface, ethtool, virtio};
use crate::state;

/// Takes the VLAN tag out of the frame before XDP sees it.
const TAGS: &str = "rx-vlan-hw-parse";

/// What is switched off in either mode.
pub const HARMFUL: [&str; 3] = [
    TAGS,        // see there
    "rx-lro",    // merges segments in a way that cannot be undone
    "rx-gro-hw", // likewise
];

/// What is harmful in generic mode only: the checksum of such a frame may not have been computed yet.
pub const HARMFUL_IN_GENERIC_MODE: &str = "rx-checksum";

/// What is harmful on the members of a bridge or bond that is in generic mode: its program gets what they have merged, and
/// nobody has finished the checksum of that. On the interface itself the kernel leaves it off (`netif_elide_gro`).
pub const HARMFUL_BELOW_GENERIC_MODE: &str = "rx-gro";

/// Drivers of virtual machines: their peers leave checksums to be finished by a card that is not there.
const OF_VIRTUAL_MACHINES: [&str; 4] = ["virtio_net", "xen_netfront", "hv_netvsc", "veth"];

/// Why offloads could not be switched.
#[derive(Debug, thiserror::Error)]
pub enum OffloadError {
    /// The network card's driver refused.
    #[error(
        "cannot {doing} on {interface}: {source}; try `ethtool -K {interface} rxvlan off lro off rx-gro-hw off`"
    )]
    Driver {
        /// What was tried.
        doing: &'static str,
        /// On which interface.
        interface: String,
        /// The driver's answer.
        source: io::Error,
    },
    /// Frames come in without the tags that tell a VLAN's from others'.
    #[error(
        "{interface}: its driver takes the VLAN tag out of every frame ({TAGS}) and lets nobody switch that off: the \
         program would recognise no packet of the VLANs that are in use, and this host's kernel would refuse every \
         connection\n   = help: use another network card or driver for it, or listeners and backends without a VLAN"
    )]
    TagsLost {
        /// Which interface.
        interface: String,
    },
    /// The record of what was on could not be read or written.
    #[error("{path}: {source}: the directory must be writable for what was changed to be restored later", path = path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// The offloads at work on an interface that harm the data path. Empty for an interface that has none.
pub fn harmful(interface: &str, generic: bool) -> io::Result<Vec<String>> {
    let features = ethtool::features(interface)?;
    let names = HARMFUL.into_iter().chain(generic.then_some(HARMFUL_IN_GENERIC_MODE));
    Ok(names.filter(|name| features.get(*name).is_some_and(|it| it.active)).map(str::to_owned).collect())
}

/// Those of `names` that the driver lets nobody switch.
pub fn fixed(interface: &str, names: &[String]) -> io::Result<Vec<String>> {
    let features = ethtool::features(interface)?;
    let fixed = |name: &&String| features.get(*name).is_some_and(|feature| !feature.changeable);
    Ok(names.iter().filter(fixed).cloned().collect())
}

/// Whether packets come through a driver's generic mode with checksums that nobody has finished, if nothing is done
/// about it.
pub fn leaves_checksums_unfinished(driver: &str) -> bool {
    OF_VIRTUAL_MACHINES.contains(&driver)
}

/// What to do about packets of a veth: they come with unfinished checksums in either mode, whatever [`turn_off`] does. The
/// program would send them on as they are, and whoever gets them drops them. None: it is no veth.
pub fn unfinished_checksums(interface: &Interface) -> Option<String> {
    let Interface { name, driver, .. } = interface;
    (driver.as_deref() == Some("veth")).then(|| {
        format!(
            "{name}: connections of virtual machines and containers on the same machine may hang, as driver veth hands their \
             packets over before the checksums are finished: run `ethtool -K DEVICE tx off` for the other end of {name}"
        )
    })
}

/// What became of the harmful offloads of an interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Switched {
    /// They were on, and are off now.
    pub off: Vec<String>,
    /// They are on, and the driver lets nobody switch them.
    pub fixed: Vec<String>,
    /// What must be set outside of this virtual machine for its driver to take the program in native mode, if anything.
    pub hypervisor_fix: Option<String>,
}

impl Switched {
    /// What comes of those that stay on, in sentences; `tagged`: frames with a VLAN tag are ours. Refuses only what surely
    /// leaves clients without service: merged segments and unfinished checksums harm some packets of some peers, and perhaps
    /// none.
    pub fn consequences(&self, interface: &str, tagged: bool) -> Result<Vec<String>, OffloadError> {
        let mut sentences = Vec::new();
        for name in &self.fixed {
            let harm = match name.as_str() {
                TAGS if tagged => return Err(OffloadError::TagsLost { interface: interface.to_owned() }),
                // Frames without a tag are as they should be.
                TAGS => continue,
                HARMFUL_IN_GENERIC_MODE if self.hypervisor_fix.is_some() => {
                    "in generic mode packets whose checksum is not finished yet, such as those of virtual machines beside \
                     this one, are sent on with a wrong one, and their connections hang"
                }
                HARMFUL_IN_GENERIC_MODE => {
                    "in generic mode packets whose checksum is not finished yet, such as those of virtual machines beside \
                     this one, are sent on with a wrong one, and their connections hang: if there are any, set xdp_mode = \
                     \"native\", or use another network card"
                }
                _ => {
                    "it merges segments, and what is larger than the MTU is lost on its way out: connections that send much \
                     become slow or hang; use another network card or driver"
                }
            };
            let fix = self.hypervisor_fix.iter().filter(|_| name == HARMFUL_IN_GENERIC_MODE);
            let fix: String = fix.map(|fix| format!(": {fix}")).collect();
            sentences.push(format!("{interface}: its driver lets nobody switch {name} off: {harm}{fix}"));
        }
        Ok(sentences)
    }
}

/// Switches the harmful offloads of an interface off and records them in `state_dir`. What the driver has fixed stays as it
/// is.
pub fn turn_off(interface: &str, generic: bool, state_dir: &Path) -> Result<Switched, OffloadError> {
    let names = harmful(interface, generic).map_err(failed("read the offloads", interface))?;
    turn_off_these(interface, names, state_dir)
}

/// The same for a member of a bridge or bond that has the program in generic mode.
pub fn turn_off_below(interface: &str, state_dir: &Path) -> Result<Switched, OffloadError> {
    let mut names = harmful(interface, true).map_err(failed("read the offloads", interface))?;
    let features = ethtool::features(interface).map_err(failed("read the offloads", interface))?;
    if features.get(HARMFUL_BELOW_GENERIC_MODE).is_some_and(|it| it.active) {
        names.push(HARMFUL_BELOW_GENERIC_MODE.to_owned());
    }
    turn_off_these(interface, names, state_dir)
}

fn turn_off_these(interface: &str, names: Vec<String>, state_dir: &Path) -> Result<Switched, OffloadError> {
    let fixed = fixed(interface, &names).map_err(failed("read the offloads", interface))?;
    let off: Vec<String> = names.into_iter().filter(|name| !fixed.contains(name)).collect();
    let switched = Switched { off, fixed, hypervisor_fix: virtio::hypervisor_fix(interface) };
    if switched.off.is_empty() {
        return Ok(switched);
    }
    // Recorded first: an offload that stays off for ever is worse than one switched on that never was off.
    let mut record = Record::load(state_dir)?;
    record.was_on.entry(interface.to_owned()).or_default().extend(switched.off.iter().cloned());
    record.save(state_dir)?;
    switch(interface, &switched.off, false).map_err(failed("switch offloads off", interface))?;
    Ok(switched)
}

fn failed(doing: &'static str, interface: &str) -> impl FnOnce(io::Error) -> OffloadError {
    let interface = interface.to_owned();
    move |source| OffloadError::Driver { doing, interface, source }
}

/// Switches on again what [`turn_off`] switched off. An interface that is gone is forgotten. Returns the interfaces
/// restored.
pub fn restore(state_dir: &Path) -> Result<Vec<String>, OffloadError> {
    let mut record = Record::load(state_dir)?;
    let mut restored = Vec::new();
    while let Some((interface, names)) = record.was_on.pop_first() {
        let names: Vec<String> = names.into_iter().collect();
        match switch(&interface, &names, true) {
            Ok(()) => restored.push(interface),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
            Err(source) => {
                return Err(OffloadError::Driver { doing: "switch offloads on again", interface, source });
            }
        }
        record.save(state_dir)?;
    }
    Ok(restored)
}

fn switch(interface: &str, names: &[String], on: bool) -> io::Result<()> {
    let features = ethtool::features(interface)?;
    let wanted: Vec<_> = names.iter().filter_map(|name| Some((*features.get(name)?, on))).collect();
    ethtool::set_features(interface, &wanted)
}

/// The offloads that were on before we came, by interface.
#[derive(Debug, Default, serde::Serialize, serde::Deserialize)]
struct Record {
    was_on: BTreeMap<String, BTreeSet<String>>,
}

impl Record {
    fn path(state_dir: &Path) -> PathBuf {
        state_dir.join("offloads.json")
    }

    fn load(state_dir: &Path) -> Result<Self, OffloadError> {
        let path = Self::path(state_dir);
        state::load(&path).map_err(|source| OffloadError::Record { path, source })
    }

    fn save(&self, state_dir: &Path) -> Result<(), OffloadError> {
        let path = Self::path(state_dir);
        let content = (!self.was_on.is_empty()).then_some(self);
        state::save(&path, content).map_err(|source| OffloadError::Record { path, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_driver_does_not_let_go_is_said_and_refused_only_where_nobody_would_be_served() {
        let of = |name: &str, tagged| {
            let switched = Switched { fixed: vec![name.to_owned()], ..Switched::default() };
            switched.consequences("eth0", tagged)
        };
        let said = |name, what: &str| {
            for tagged in [false, true] {
                let sentences = of(name, tagged).unwrap();
                let begin = format!("eth0: its driver lets nobody switch {name} off: ");
                assert!(sentences[0].starts_with(&begin) && sentences[0].contains(what), "{sentences:?}");
            }
        };
        said("rx-lro", "larger than the MTU");
        said("rx-gro-hw", "larger than the MTU");
        said(HARMFUL_IN_GENERIC_MODE, "xdp_mode = \"native\"");
        assert_eq!(of(TAGS, false).unwrap(), Vec::<String>::new(), "there are no tags");
        let error = of(TAGS, true).unwrap_err().to_string();
        assert!(
            error.contains("eth0") && error.contains("rx-vlan-hw-parse") && error.contains("= help"),
            "{error}"
        );
        assert_eq!(Switched::default().consequences("eth0", true).unwrap(), Vec::<String>::new());
        let virtual_machine = Switched {
            fixed: vec![HARMFUL_IN_GENERIC_MODE.to_owned()],
            hypervisor_fix: Some("set guest_csum=off there".to_owned()),
            ..Switched::default()
        };
        let [sentence] = &virtual_machine.consequences("eth0", false).unwrap()[..] else { panic!() };
        assert!(sentence.ends_with("set guest_csum=off there") && !sentence.contains("native"), "{sentence}");
    }
}
