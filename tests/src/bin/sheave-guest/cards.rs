//! The machine's network cards, by the wires between them.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use lb_tests::lab::eventually;

/// Holds for a case what the first process was told about wires.
pub(crate) const VARIABLE: &str = "SHEAVE_WIRES";
/// For a card to be there after its driver has taken it.
const APPEARS: Duration = Duration::from_secs(20);

/// Two cards, each of which receives what the other sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wire {
    name: String,
    /// The places of the cards on the PCI bus. The first is the one under test.
    slots: [String; 2],
}

/// What the host says about wires: `front=10.0,11.0`, names and places on the bus.
pub(crate) fn told() -> Vec<String> {
    match std::env::var(VARIABLE) {
        Ok(told) => told.split(' ').map(str::to_owned).collect(),
        Err(_) => std::env::args().filter(|argument| argument.contains('=')).collect(),
    }
}

impl Wire {
    /// All wires of this machine, whose cards must have interfaces.
    ///
    /// # Errors
    /// When a card has none.
    pub(crate) fn all() -> Result<Vec<Self>> {
        let wires: Vec<_> = told().iter().filter_map(|wire| Self::parse(wire)).collect();
        for slot in wires.iter().flat_map(|wire| &wire.slots) {
            interface_at(slot)?;
        }
        Ok(wires)
    }

    fn parse(told: &str) -> Option<Self> {
        let (name, slots) = told.split_once('=')?;
        let (one, other) = slots.split_once(',')?;
        let slot = |place: &str| format!("0000:00:{place}");
        Some(Self { name: name.to_owned(), slots: [slot(one), slot(other)] })
    }

    /// A wire by its name, both of whose cards are as they were when the machine was switched on: their drivers have
    /// let them go and taken them again. The names of their interfaces, here in the machine's own network namespace.
    ///
    /// # Errors
    /// When there is no such wire, or a card does not come back.
    pub(crate) fn fresh(name: &str) -> Result<[String; 2]> {
        let wires = told();
        let mut wires = wires.iter().filter_map(|wire| Self::parse(wire));
        let wire =
            wires.find(|wire| wire.name == name).with_context(|| format!("there is no wire {name}"))?;
        for slot in &wire.slots {
            renew(slot)?;
        }
        let [card, peer] = &wire.slots;
        Ok([interface_at(card)?, interface_at(peer)?])
    }
}

fn device(slot: &str) -> PathBuf {
    Path::new("/sys/bus/pci/devices").join(slot)
}

fn renew(slot: &str) -> Result<()> {
    let driver =
        fs::canonicalize(device(slot).join("driver")).with_context(|| format!("{slot} has no driver"))?;
    let write = |file: &str| {
        let path = driver.join(file);
        fs::write(&path, slot).with_context(|| format!("writing {slot} to {}", path.display()))
    };
    write("unbind")?;
    write("bind")?;
    eventually(APPEARS, &format!("the card at {slot} is back"), || interface_at(slot).map(drop))
}

/// The interface of the card at a place, which must be in the machine's own network namespace.
fn interface_at(slot: &str) -> Result<String> {
    let device = device(slot);
    // Of virtio there is a device in between.
    let below = fs::read_dir(&device).with_context(|| format!("there is no card at {slot}"))?;
    let below = below.flatten().map(|entry| entry.path()).filter(|path| path.is_dir());
    let mut places = below.chain([device.clone()]).map(|path| path.join("net"));
    let net = places.find_map(|path| fs::read_dir(path).ok()?.flatten().next());
    let net = net.with_context(|| format!("the card at {slot} has no interface"))?;
    Ok(net.file_name().to_string_lossy().into_owned())
}
