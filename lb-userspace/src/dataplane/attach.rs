//! Putting the program on an interface, and only where nobody else's is.

use std::{collections::BTreeSet, time::Instant};

use aya::programs::{
    ProgramError, Xdp, XdpMode,
    links::FdLink,
    loaded_programs,
    xdp::{XdpLink, XdpLinkId},
};

use super::{Dataplane, DataplaneError, Removed, convert::New, grace, link::RawLink, pins::Pins};
use crate::network::{offloads, virtio};

/// A bond's driver, as ethtool names it.
const BOND: &str = "bonding";
/// What makes a bond take the program, whose own settings allow it.
const BOND_FIX: &str = "every member of the bond needs a driver with native XDP that has room for the program (`sheave doctor`), \
                        and no program of its own (`ip link`)";

/// How the program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// In the driver.
    Native,
    /// In the network stack.
    Generic,
}

impl Mode {
    /// As it is called in the configuration and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }

    fn aya(self) -> XdpMode {
        match self {
            Self::Native => XdpMode::Driver,
            Self::Generic => XdpMode::Skb,
        }
    }
}

/// An interface that the program is on: until it is unloaded, or where nothing is pinned until the [`Dataplane`] is
/// dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The interface's name.
    pub name: String,
    /// The interface's index.
    pub interface: u32,
    /// How.
    pub mode: Mode,
}

/// An interface to attach to.
#[derive(Clone, Debug)]
pub struct Target<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its index.
    pub index: u32,
    /// Its driver's name, empty if unknown.
    pub driver: &'a str,
    /// The id of the XDP program that is there already.
    pub occupied_by: Option<u32>,
}

impl Dataplane {
    /// Attaches the program. With None the mode is chosen: native, or generic where the driver cannot and it is safe.
    pub fn attach(&mut self, target: &Target<'_>, mode: Option<Mode>) -> Result<Attached, DataplaneError> {
        if let Some(id) = target.occupied_by {
            return Err(DataplaneError::Occupied { interface: target.name.to_owned(), owner: owner(id) });
        }
        let attached = match mode {
            Some(mode) => {
                self.attach_in(target, mode).map_err(|source| failure(target, mode, source))?;
                mode
            }
            None => self.attach_in_best(target)?,
        };
        let attached = Attached { name: target.name.to_owned(), interface: target.index, mode: attached };
        self.attached.push(attached.clone());
        Ok(attached)
    }

    fn attach_in_best(&mut self, target: &Target<'_>) -> Result<Mode, DataplaneError> {
        let Err(source) = self.attach_in(target, Mode::Native) else {
            return Ok(Mode::Native);
        };
        if !is_unsupported(&source) {
            return Err(failure(target, Mode::Native, source));
        }
        if offloads::leaves_checksums_unfinished(target.driver) {
            return Err(DataplaneError::NoNativeMode {
                interface: target.name.to_owned(),
                driver: target.driver.to_owned(),
                fix: native_fix(target),
                source: Box::new(source),
            });
        }
        let why = match target.driver {
            BOND => format!("its members do not all take the program in native mode ({})", chain(&source)),
            driver => format!("driver {driver} has no native XDP"),
        };
        tracing::warn!("{}: {why}, attaching in generic mode: slower, but the same", target.name);
        self.attach_in(target, Mode::Generic).map_err(|source| failure(target, Mode::Generic, source))?;
        Ok(Mode::Generic)
    }

    fn attach_in(&mut self, target: &Target<'_>, mode: Mode) -> Result<(), ProgramError> {
        let program = self.xdp()?;
        let link = program.attach_to_if_index(target.index, mode.aya())?;
        if let Some(pins) = self.pins.clone() {
            let link = self.take_link(link)?;
            let pinned = pins.pin_link(target.index, link);
            self.links.insert(
                target.index,
                pinned.map_err(|error| ProgramError::IOError(std::io::Error::other(error)))?,
            );
        }
        Ok(())
    }

    fn xdp(&mut self) -> Result<&mut Xdp, ProgramError> {
        self.ebpf.program_mut("sheave").ok_or(ProgramError::NotLoaded)?.try_into()
    }

    fn take_link(&mut self, link: XdpLinkId) -> Result<FdLink, ProgramError> {
        let link = self.xdp()?.take_link(link)?;
        // Where the kernel has no links for XDP (before 5.9) there is nothing that could be pinned.
        FdLink::try_from(link).map_err(|error| ProgramError::IOError(std::io::Error::other(error)))
    }

    /// Puts this program in the place of the one that a daemon before us has attached, interface by interface: every
    /// packet meets one of them. Where nothing outlives us, nothing is done.
    ///
    /// To be called once: before maps that were adopted are written to, and after new ones are filled. Returns when
    /// the program before has ended everywhere, and all flows of an earlier layout are copied.
    pub fn take_over(&mut self) -> Result<(), DataplaneError> {
        let Some(pins) = self.pins.clone() else { return Ok(()) };
        self.begin_conversion()?;
        pins.commit(self.program("sheave")?)?;
        let since = Instant::now();
        let replaced = self.replace_programs(&pins);
        if !self.links.is_empty() {
            grace::wait().map_err(|source| DataplaneError::System { call: "membarrier", source })?;
        }
        // Also where an interface was left out: nothing may be held for good.
        self.end_conversion(since)?;
        replaced
    }

    fn replace_programs(&mut self, pins: &Pins) -> Result<(), DataplaneError> {
        for (interface, path) in pins.links()? {
            match self.replace_program(Pins::open_link(&path)?) {
                Ok(link) => {
                    self.links.insert(interface, pins.pin_link(interface, link)?);
                }
                Err(error) if errno(error.as_ref()) == Some(libc::ENOLINK) => {
                    tracing::info!("the interface with index {interface} is gone");
                    pins.unpin_link(interface)?;
                }
                Err(source) => return Err(DataplaneError::Replace { interface, source }),
            }
        }
        Ok(())
    }

    /// Copies the flows of an earlier layout for the first time, where another process has not done so already, and holds
    /// from now on what belongs to none of them.
    fn begin_conversion(&mut self) -> Result<(), DataplaneError> {
        if self.pins.as_ref().is_some_and(Pins::adopts) {
            return Ok(());
        }
        let Some(conversion) = &mut self.conversion else { return Ok(()) };
        let flows = conversion.first_pass(New { tables: &self.tables, next_hops: &self.next_hops });
        conversion.add_counts(&mut self.counters)?;
        tracing::info!("copies {flows} flows from the flow table of an earlier version");
        self.hold(true);
        Ok(())
    }

    /// Copies what has changed in the tables of an earlier layout, which no program uses any more, and holds nothing from now
    /// on. `since`: when packets may first have been held.
    fn end_conversion(&mut self, since: Instant) -> Result<(), DataplaneError> {
        if let Some(conversion) = &mut self.conversion {
            let changed = conversion.second_pass(New { tables: &self.tables, next_hops: &self.next_hops });
            if let Some(pins) = &mut self.pins {
                pins.set_previous_aside()?;
            }
            let held = since.elapsed();
            self.hold(false);
            tracing::info!(
                "all flows of the earlier version are in this one's table: {changed} slots had changed meanwhile; what \
                 belonged to no flow was held for {:.1} ms",
                held.as_secs_f64() * 1000.0
            );
            if let Some(conversion) = &mut self.conversion {
                conversion.add_counts(&mut self.counters)?;
            }
        } else if self.adopted && self.settings().hold != 0 {
            // A daemon was ended just before it did this.
            self.hold(false);
        }
        Ok(())
    }

    fn replace_program(&mut self, link: FdLink) -> Result<FdLink, Box<dyn std::error::Error + Send + Sync>> {
        let link = XdpLink::try_from(link)?;
        let id = self.xdp()?.attach_to_link(link)?;
        Ok(self.take_link(id)?)
    }

    /// Whether the program is on this interface since before we came.
    pub fn took_over(&self, interface: u32) -> bool {
        self.links.contains_key(&interface)
    }

    /// Notes how an interface is attached that was [taken over](Self::took_over).
    pub fn note_attached(&mut self, attached: Attached) {
        self.attached.push(attached);
    }

    /// The interfaces whose links are pinned.
    pub fn linked(&self) -> Vec<u32> {
        self.links.keys().copied().collect()
    }

    /// Detaches from every interface that is not in `wanted`, and removes the pins of what was replaced. Returns the
    /// indexes of the interfaces left.
    pub fn leave_others(&mut self, wanted: &BTreeSet<u32>) -> Result<Vec<u32>, DataplaneError> {
        if let Some(mut conversion) = self.conversion.take() {
            // The connect hook before this one has counted there until now.
            conversion.add_counts(&mut self.counters)?;
        }
        let Some(pins) = &mut self.pins else { return Ok(Vec::new()) };
        let left: Vec<_> = self.links.keys().copied().filter(|index| !wanted.contains(index)).collect();
        for interface in &left {
            pins.unpin_link(*interface)?;
            // With the pin and these descriptors the link goes.
            self.links.remove(interface);
            self.link_watch.remove(interface);
            self.attached.retain(|attached| attached.interface != *interface);
        }
        pins.drop_replaced()?;
        Ok(left)
    }

    /// Takes the program off an interface now. Until it is attached again the kernel gets the packets.
    ///
    /// # Errors
    /// When the kernel refuses, or nothing is pinned.
    pub fn detach(&mut self, interface: u32) -> Result<(), DataplaneError> {
        let failed = |source| DataplaneError::System { call: "detaching the program", source };
        if let Some(path) =
            self.pins.as_ref().map(|pins| pins.links()).transpose()?.and_then(|mut it| it.remove(&interface))
        {
            // Without this it would go some time after the last one who has it open.
            RawLink::open(&path).and_then(|link| link.detach()).map_err(failed)?;
        }
        self.forget_interface(interface)
    }

    /// Lets go of an interface that does not exist any more: its index may be another's soon.
    ///
    /// # Errors
    /// When its pin cannot be removed.
    pub fn forget_interface(&mut self, interface: u32) -> Result<(), DataplaneError> {
        self.attached.retain(|attached| attached.interface != interface);
        if let Some(pins) = &self.pins {
            pins.unpin_link(interface)?;
        }
        self.links.remove(&interface);
        self.link_watch.remove(&interface);
        Ok(())
    }

    /// Takes program, maps and pins away.
    pub fn unload(self) -> Result<Removed, DataplaneError> {
        // What is still open goes with this value.
        let removed = self.pins.as_ref().map(Pins::remove).transpose()?;
        Ok(removed.unwrap_or_default())
    }

    /// The interfaces (by index) that the program was put on and is not on any more: it was detached, or the interface is gone. The
    /// kernel is asked; where nothing is pinned, the links are nobody else's to detach.
    pub fn detached(&mut self) -> Vec<u32> {
        let Some(pins) = &self.pins else { return Vec::new() };
        self.link_watch.retain(|interface, _| self.links.contains_key(interface));
        for interface in self.links.keys() {
            // One without its pin can be detached by no path, and is not watched.
            if !self.link_watch.contains_key(interface)
                && let Ok(link) = RawLink::open(&pins.link_path(*interface))
            {
                self.link_watch.insert(*interface, link);
            }
        }
        let is_off = |link: &RawLink| matches!(link.interface(), Ok((_, 0)));
        self.link_watch.iter().filter(|(_, link)| is_off(link)).map(|(interface, _)| *interface).collect()
    }

    /// Where the program is.
    pub fn attached(&self) -> &[Attached] {
        &self.attached
    }

    /// The kernel's id of the program.
    pub fn program_id(&self) -> Option<u32> {
        match self.ebpf.program("sheave")? {
            aya::programs::Program::Xdp(program) => program.info().ok().map(|info| info.id()),
            _ => None,
        }
    }
}

fn failure(target: &Target<'_>, mode: Mode, source: ProgramError) -> DataplaneError {
    if let Some(libc::EBUSY) = errno(&source) {
        return DataplaneError::Occupied { interface: target.name.to_owned(), owner: String::new() };
    }
    let fix = (mode == Mode::Native).then(|| match target.driver {
        BOND => Some(BOND_FIX.to_owned()),
        _ => virtio::hypervisor_fix(target.name),
    });
    let fix = fix.flatten();
    DataplaneError::Attach {
        interface: target.name.to_owned(),
        mode: mode.name(),
        source: Box::new(source),
        fix: fix.map(|fix| format!("\n   = help: {fix}")).unwrap_or_default(),
    }
}

pub(super) fn errno(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut source = Some(error);
    while let Some(error) = source {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return io.raw_os_error();
        }
        source = error.source();
    }
    None
}

/// An error with its causes.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let mut said: Vec<String> = causes.map(ToString::to_string).collect();
    said.dedup();
    said.join(": ")
}

fn is_unsupported(error: &ProgramError) -> bool {
    matches!(errno(error), Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ERANGE | libc::ENOMEM | libc::ENOSPC))
}

/// What makes the driver take the program after all, or generic mode safe.
fn native_fix(target: &Target<'_>) -> String {
    let name = target.name;
    let in_generic_mode = |precaution| format!(", or set `xdp_mode = \"generic\"` after {precaution}");
    match target.driver {
        // Generic mode is not safe before that either: the guest cannot have the checksums finished.
        "virtio_net" if let Some(fix) = virtio::hypervisor_fix(name) => fix,
        "virtio_net" => {
            "give the virtual machine more queues than processors (in libvirt `<driver queues=…>`)".to_owned()
                + &in_generic_mode(format!("`ethtool -K {name} rx off` on this host"))
        }
        driver => {
            let precaution = match driver {
                "veth" => format!("`ethtool -K DEVICE tx off` for the other end of {name}"),
                _ => format!("`ethtool -K {name} rx off` on this host"),
            };
            "lower the MTU to 3498 or below and leave the driver at least one free transmit queue for each processor"
                .to_owned()
                + &in_generic_mode(precaution)
        }
    }
}

/// Who an XDP program is, as far as the kernel tells.
fn owner(id: u32) -> String {
    let name = loaded_programs()
        .filter_map(Result::ok)
        .find(|program| program.id() == id)
        .and_then(|program| program.name_as_str().map(str::to_owned));
    match name {
        Some(name) => format!(" (id {id}, `{name}`)"),
        None => format!(" (id {id})"),
    }
}
