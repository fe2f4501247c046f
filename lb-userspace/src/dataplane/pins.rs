//! What outlives the daemon: maps, program and links, pinned in the BPF file system.
//!
//! ```text
//! /sys/fs/bpf/sheave                    `dataplane.pin_dir`: a daemon holds a lock on it
//! └── layout_8c0f5a27d1e94b36           named by `lb_common::layout_hash`
//!     ├── map_FLOW4, map_CONTROL, ...   every map
//!     ├── program                       the XDP program that is attached
//!     ├── link_2                        one for each interface, by index: while it is there, packets are forwarded
//!     └── hook_connect4, ...            one for each program of the connect hook: while they are there, so is it
//! ```
//!
//! A directory appears complete or not at all: it is filled under another name first. One whose layout is not this
//! build's is never touched unless the operator says so, but for the layout before this one, see [`super::convert`].

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use aya::{
    maps::MapInfo,
    programs::links::{FdLink, PinnedLink},
};
use lb_common::layout_hash::layout_hash;
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::{CONTROL, convert, link::RawLink, previous_layout};

/// Where the BPF file system belongs.
const BPF_FILE_SYSTEM: &str = "/sys/fs/bpf";
const LAYOUT: &str = "layout_";
/// Being filled: whoever did that was interrupted.
const UNFINISHED: &str = "new_";
/// Of a layout that the operator has given up.
const REPLACED: &str = "_replaced";
const LINK: &str = "link_";
const HOOK: &str = "hook_";
const MAP: &str = "map_";
const PROGRAM: &str = "program";
const NEXT_PROGRAM: &str = "program_new";

/// The maps without which flows are lost. The others can be made anew and filled from the configuration.
const ESSENTIAL: [&str; 8] =
    [CONTROL, "FLOW4", "FLOW6", "NEXT_HOP", "NUMBERS4", "OVERFLOW6", "RETURN_HOP6", "SELECTION"];

/// Why what is pinned cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PinsError {
    /// Another daemon has these pins.
    #[error(
        "another sheave{} holds {}: stop it first, or give this one its own `dataplane.pin_dir`",
        .pid.map(|pid| format!(" (process {pid})")).unwrap_or_default(), .path.display()
    )]
    InUse {
        /// The pin directory.
        path: PathBuf,
        /// Whose lock it is, as far as the kernel tells.
        pid: Option<u32>,
    },
    /// No BPF file system.
    #[error(
        "dataplane.pin_dir {} is on no BPF file system, so that nothing would outlive the daemon\n   = help: choose a \
         directory below {BPF_FILE_SYSTEM}, or mount one there: `mount -t bpf bpf DIRECTORY`", .0.display()
    )]
    NotBpf(PathBuf),
    /// Maps of another version are in use.
    #[error(
        "the flow table in the kernel was made by a version of sheave with another layout ({}); this version's is {}\n   \
         = help: its program goes on forwarding; run the version that made it, or `sheave run --replace-layout`: \
         packets are then forwarded by a new, empty table, and connections that are open end",
        names(.found), .wanted
    )]
    OtherLayout {
        /// The directories.
        found: Vec<PathBuf>,
        /// The name of this build's.
        wanted: String,
    },
    /// The program is attached in another network namespace.
    #[error(
        "{} belongs to a sheave in another network namespace: its program is on the interface with index {interface} \
         there\n   = help: run this one there, or give it its own `dataplane.pin_dir`", .path.display()
    )]
    OtherNamespace {
        /// The pin directory.
        path: PathBuf,
        /// Index of an interface that is not the one of that index here.
        interface: u32,
    },
    /// The right layout, but not as it must be now.
    #[error(
        "the flow table in the kernel ({}) does not fit: {what}\n   = help: its program goes on forwarding; undo that \
         change, or `sheave run --replace-layout`: packets are then forwarded by a new, empty table, and connections \
         that are open end", .path.display()
    )]
    Different {
        /// The directory.
        path: PathBuf,
        /// What is different.
        what: String,
    },
    /// The kernel said no.
    #[error("cannot {action} {}: {reason}{}", .path.display(), help(.reason))]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        reason: io::Error,
    },
}

fn help(reason: &io::Error) -> &'static str {
    match reason.kind() {
        io::ErrorKind::PermissionDenied => {
            ": it needs root, or the capabilities that packaging/sheave.service lists"
        }
        _ => "",
    }
}

fn names(paths: &[PathBuf]) -> String {
    let names = paths.iter().filter_map(|path| path.file_name()).map(|name| name.to_string_lossy());
    names.collect::<Vec<_>>().join(", ")
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PinsError {
    let path = path.to_owned();
    move |reason| PinsError::Io { action, path, reason }
}

/// A map as this build defines it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Definition {
    pub(super) kind: u32,
    pub(super) key_size: u32,
    pub(super) value_size: u32,
    pub(super) entries: u32,
    pub(super) flags: u32,
}

impl Definition {
    fn of_pinned(path: &Path) -> io::Result<Self> {
        let info = MapInfo::from_pin(path).map_err(io::Error::other)?;
        Ok(Self {
            kind: info.map_type().map_err(io::Error::other)? as u32,
            key_size: info.key_size(),
            value_size: info.value_size(),
            entries: info.max_entries(),
            flags: info.map_flags(),
        })
    }

    /// What is different about `found`, in words.
    fn difference(&self, found: &Self) -> Option<String> {
        let parts = [
            ("type", self.kind, found.kind),
            ("key size", self.key_size, found.key_size),
            ("value size", self.value_size, found.value_size),
            ("number of entries", self.entries, found.entries),
            ("flags", self.flags, found.flags),
        ];
        let different = parts.into_iter().filter(|(_, wanted, found)| wanted != found);
        let words = different.map(|(what, wanted, found)| format!("{what} {found} instead of {wanted}"));
        let words: Vec<_> = words.collect();
        (!words.is_empty()).then(|| words.join(", "))
    }
}

/// The pins of one load balancer. While a value or a copy of it lives, no other daemon can have them.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PathBuf,
    directory: PathBuf,
    /// Directories whose program is to be replaced, and that are removed afterwards.
    replaced: Vec<PathBuf>,
    /// The one of these whose flows are copied first: its layout is the one before this build's.
    previous: Option<PathBuf>,
    /// What to do about a layout that does not fit.
    replace: bool,
    /// There were pins before us.
    inherited: bool,
    _lock: Arc<Flock<fs::File>>,
}

impl Pins {
    /// Takes possession of the pin directory, which is made if need be. `replace`: pins that do not fit are replaced
    /// instead of refused.
    pub fn open(root: &Path, replace: bool) -> Result<Self, PinsError> {
        provide_file_system(root)?;
        if !root.is_dir() {
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true).mode(0o700).create(root).map_err(failed("make the directory", root))?;
        }
        let lock = lock(root)?;
        let directory = layout_directory(root);
        let mut pins = Self {
            root: root.to_owned(),
            inherited: directory.exists(),
            directory,
            replaced: Vec::new(),
            previous: None,
            replace,
            _lock: Arc::new(lock),
        };
        pins.sort_out()?;
        Ok(pins)
    }

    /// Looks at what others have left.
    fn sort_out(&mut self) -> Result<(), PinsError> {
        let mut others = Vec::new();
        for (name, path) in entries(&self.root)? {
            if name.starts_with(UNFINISHED) {
                remove_directory(&path)?;
            } else if name.ends_with(REPLACED) {
                self.replaced.push(path);
            } else if name.starts_with(LAYOUT) && path != self.directory {
                others.push(path);
            }
        }
        self.inherited |= !self.replaced.is_empty() || !others.is_empty();
        let previous = previous_directory(&self.root);
        // Where both are there, and it is not known that the one is being copied into the other, either may be the older.
        if others == [previous.clone()]
            && (!self.adopts() || convert::was_interrupted(&map_path(&self.directory, CONTROL)))
        {
            self.previous = Some(previous);
        } else if !others.is_empty() && !self.replace {
            let wanted = names(std::slice::from_ref(&self.directory));
            return Err(PinsError::OtherLayout { found: others, wanted });
        }
        self.replaced.extend(others);
        Ok(())
    }

    /// Whether there are maps to go on with.
    pub fn adopts(&self) -> bool {
        self.directory.exists()
    }

    /// The directory of the previous layout whose flows are to be copied, or were not all copied yet.
    pub(super) fn previous(&self) -> Option<&Path> {
        self.previous.as_deref()
    }

    /// The pins of these maps in the directory of the previous layout, by name, where they are as this build makes them.
    ///
    /// # Errors
    /// [`PinsError::Different`] where flows would be lost with one that is not.
    pub(super) fn share(
        &self,
        names: &[&str],
        definitions: &BTreeMap<String, Definition>,
    ) -> Result<BTreeMap<String, PathBuf>, PinsError> {
        let mut shared = BTreeMap::new();
        let Some(previous) = self.previous() else { return Ok(shared) };
        for (name, wanted) in definitions.iter().filter(|(name, _)| names.contains(&name.as_str())) {
            let path = previous_layout::map_path(previous, name);
            let difference = match path.exists() {
                true => wanted.difference(&Definition::of_pinned(&path).map_err(failed("look at", &path))?),
                false => Some("it is missing".to_owned()),
            };
            match difference {
                None => drop(shared.insert(name.clone(), path)),
                Some(what) if ESSENTIAL.contains(&name.as_str()) => {
                    return Err(self.different(format!("map {name}: {what}")));
                }
                Some(what) => tracing::info!("map {name} is made anew: {what}"),
            }
        }
        Ok(shared)
    }

    /// Notes that all flows of the previous layout are copied: a daemon that comes after this need not look at it.
    pub(super) fn set_previous_aside(&mut self) -> Result<(), PinsError> {
        let Some(previous) = self.previous.take() else { return Ok(()) };
        self.replaced.retain(|path| *path != previous);
        let aside = self.set_aside(&previous)?;
        self.replaced.push(aside);
        Ok(())
    }

    /// Whether maps that do not fit may be given up.
    pub(super) fn replaces(&self) -> bool {
        self.replace
    }

    /// Whether something of sheave was in the kernel already when this was opened.
    pub fn inherited(&self) -> bool {
        self.inherited
    }

    /// The pin of a map that may be gone on with; None: there is none.
    pub(super) fn map(&self, name: &str) -> Option<PathBuf> {
        let path = self.directory.join(format!("{MAP}{name}"));
        path.exists().then_some(path)
    }

    /// Compares what is pinned with what this build's maps are. Those that nobody would miss are unpinned if they
    /// differ. Returns the pins to go on with, by name of the map.
    pub(super) fn adopt(
        &self,
        definitions: &BTreeMap<String, Definition>,
    ) -> Result<BTreeMap<String, PathBuf>, PinsError> {
        let mut adopted = BTreeMap::new();
        for (name, wanted) in definitions {
            let essential = ESSENTIAL.contains(&name.as_str());
            let difference = match self.map(name) {
                None => Some("it is missing".to_owned()),
                Some(path) => {
                    let found = Definition::of_pinned(&path).map_err(failed("look at", &path))?;
                    adopted.insert(name.clone(), path);
                    wanted.difference(&found)
                }
            };
            match difference {
                None => {}
                Some(what) if essential => return Err(self.different(format!("map {name}: {what}"))),
                Some(what) => {
                    tracing::info!("map {name} is made anew: {what}");
                    if let Some(path) = adopted.remove(name) {
                        fs::remove_file(&path).map_err(failed("remove", &path))?;
                    }
                }
            }
        }
        Ok(adopted)
    }

    /// The pinned maps are not as they must be.
    pub(super) fn different(&self, what: String) -> PinsError {
        PinsError::Different { path: self.previous.as_ref().unwrap_or(&self.directory).clone(), what }
    }

    /// Gives up the maps that were to be gone on with, if the operator allows that: else the error.
    pub(super) fn give_up(&mut self, error: PinsError) -> Result<(), PinsError> {
        if !self.replace {
            return Err(error);
        }
        tracing::warn!("{error}");
        self.previous = None;
        if self.adopts() {
            let aside = self.set_aside(&self.directory)?;
            self.replaced.push(aside);
        }
        Ok(())
    }

    /// Renames a directory, so that nothing takes its maps for those to go on with. Returns its name from now on.
    fn set_aside(&self, directory: &Path) -> Result<PathBuf, PinsError> {
        let name = names(&[directory.to_owned()]);
        let numbered = |number: u32| self.root.join(format!("{name}_{number}{REPLACED}"));
        let aside = (0..).map(numbered).find(|path| !path.exists()).unwrap_or_else(|| numbered(0));
        fs::rename(directory, &aside).map_err(failed("rename", directory))?;
        Ok(aside)
    }

    /// Pins a map: into the directory that is in use, or into the one that is being filled.
    pub(super) fn pin_map(&self, name: &str, map: &aya::maps::Map) -> Result<(), PinsError> {
        let path = self.filling()?.join(format!("{MAP}{name}"));
        map.pin(&path).map_err(|error| failed("pin a map as", &path)(io::Error::other(error)))
    }

    fn filling(&self) -> Result<PathBuf, PinsError> {
        if self.adopts() {
            return Ok(self.directory.clone());
        }
        let path = self.root.join(format!("{UNFINISHED}{}", std::process::id()));
        if !path.exists() {
            fs::create_dir(&path).map_err(failed("make the directory", &path))?;
        }
        Ok(path)
    }

    /// Pins the program, in place of the one before. From now on the next daemon goes on with these maps.
    pub(super) fn commit(&self, program: &mut aya::programs::Xdp) -> Result<(), PinsError> {
        let filling = self.filling()?;
        let (next, path) = (filling.join(NEXT_PROGRAM), filling.join(PROGRAM));
        if next.exists() {
            fs::remove_file(&next).map_err(failed("remove", &next))?;
        }
        program.pin(&next).map_err(|error| failed("pin the program as", &next)(io::Error::other(error)))?;
        fs::rename(&next, &path).map_err(failed("rename", &next))?;
        if filling != self.directory {
            fs::rename(&filling, &self.directory).map_err(failed("rename", &filling))?;
        }
        Ok(())
    }

    /// The links that there are, by interface index: our own, and those of what is being replaced.
    pub(super) fn links(&self) -> Result<BTreeMap<u32, PathBuf>, PinsError> {
        let mut found = BTreeMap::new();
        for directory in self.replaced.iter().chain(self.adopts().then_some(&self.directory)) {
            found.extend(links(directory)?);
        }
        Ok(found)
    }

    /// Sees to it that the links are on interfaces of this network namespace: an index alone means another interface in
    /// each. `programs` says which programs (the kernel's ids) are on an interface here.
    ///
    /// # Errors
    /// [`PinsError::OtherNamespace`], or when a link cannot be read.
    pub async fn check_namespace(
        &self,
        mut programs: impl AsyncFnMut(u32) -> Vec<u32>,
    ) -> Result<(), PinsError> {
        for (_, path) in self.links()? {
            let (program, interface) =
                RawLink::open(&path).and_then(|link| link.interface()).map_err(failed("look at", &path))?;
            let is_gone = interface == 0;
            if !is_gone && !programs(interface).await.contains(&program) {
                return Err(PinsError::OtherNamespace { path: self.root.clone(), interface });
            }
        }
        Ok(())
    }

    /// Opens a link.
    pub(super) fn open_link(path: &Path) -> Result<FdLink, PinsError> {
        PinnedLink::from_pin(path)
            .map(FdLink::from)
            .map_err(|error| failed("open the link", path)(io::Error::other(error)))
    }

    /// Where this layout's link of an interface is pinned.
    pub(super) fn link_path(&self, interface: u32) -> PathBuf {
        self.directory.join(format!("{LINK}{interface}"))
    }

    /// Pins a link, so that it stays when we end.
    pub(super) fn pin_link(&self, interface: u32, link: FdLink) -> Result<FdLink, PinsError> {
        let path = self.link_path(interface);
        if path.exists() {
            return Ok(link);
        }
        link.pin(&path)
            .map(FdLink::from)
            .map_err(|error| failed("pin the link as", &path)(io::Error::other(error)))
    }

    /// Lets a link go once nobody has it open.
    pub(super) fn unpin_link(&self, interface: u32) -> Result<(), PinsError> {
        for directory in self.replaced.iter().chain([&self.directory]) {
            let path = directory.join(format!("{LINK}{interface}"));
            remove_if_there(&path)?;
        }
        Ok(())
    }

    /// The links of the connect hook that there are, by program: our own, and those of what is being replaced.
    pub(super) fn hooks(&self) -> Result<BTreeMap<String, PathBuf>, PinsError> {
        let mut found = BTreeMap::new();
        for directory in self.replaced.iter().chain(self.adopts().then_some(&self.directory)) {
            found.extend(hooks(directory)?);
        }
        Ok(found)
    }

    /// Pins a link of the connect hook in place of the one before.
    pub(super) fn pin_hook(&self, program: &str, link: FdLink) -> Result<FdLink, PinsError> {
        self.unpin_hook(program)?;
        let path = self.hook(program);
        link.pin(&path)
            .map(FdLink::from)
            .map_err(|error| failed("pin the link as", &path)(io::Error::other(error)))
    }

    /// Where a link of the connect hook is pinned, once it is.
    pub(super) fn hook(&self, program: &str) -> PathBuf {
        self.directory.join(format!("{HOOK}{program}"))
    }

    /// Lets a link of the connect hook go once nobody has it open.
    pub(super) fn unpin_hook(&self, program: &str) -> Result<(), PinsError> {
        for directory in self.replaced.iter().chain([&self.directory]) {
            remove_if_there(&directory.join(format!("{HOOK}{program}")))?;
        }
        Ok(())
    }

    /// Removes what was replaced, once its links are ours.
    pub(super) fn drop_replaced(&mut self) -> Result<(), PinsError> {
        for path in std::mem::take(&mut self.replaced) {
            remove_directory(&path)?;
        }
        Ok(())
    }

    /// Removes everything that is sheave's: the links first, so that nothing is forwarded any more by maps that are
    /// half gone. Returns the interfaces that had a link.
    pub fn remove(&self) -> Result<Removed, PinsError> {
        let mut removed = Removed::default();
        let ours = |name: &str| name.starts_with(LAYOUT) || name.starts_with(UNFINISHED);
        let directories: Vec<_> = entries(&self.root)?.into_iter().filter(|(name, _)| ours(name)).collect();
        for (_, directory) in &directories {
            for (interface, path) in links(directory)? {
                remove_if_there(&path)?;
                removed.interfaces.push(interface);
            }
            for path in hooks(directory)?.values() {
                remove_if_there(path)?;
                removed.hook = true;
            }
        }
        for (_, directory) in &directories {
            remove_directory(directory)?;
            removed.maps = true;
        }
        // Other things in it, or another mount: not ours.
        if fs::remove_dir(&self.root).is_err() {
            tracing::debug!("{} stays: it is not empty", self.root.display());
        }
        Ok(removed)
    }

    /// Removes what this process has begun to pin and not committed.
    pub fn abandon(&self) -> Result<(), PinsError> {
        let path = self.root.join(format!("{UNFINISHED}{}", std::process::id()));
        if path.exists() { remove_directory(&path) } else { Ok(()) }
    }
}

/// Where this build's pins are below `root`.
pub(super) fn layout_directory(root: &Path) -> PathBuf {
    root.join(format!("{LAYOUT}{:016x}", layout_hash()))
}

/// Where this build's program is pinned below `root`.
pub(super) fn program_path(root: &Path) -> PathBuf {
    layout_directory(root).join(PROGRAM)
}

/// Where the pins of the layout before this one are below `root`.
pub(super) fn previous_directory(root: &Path) -> PathBuf {
    root.join(previous_layout::DIRECTORY)
}

/// The pin of a map.
pub(super) fn map_path(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{MAP}{name}"))
}

/// The names of other builds' directories below `root`; empty: there are none.
pub(super) fn other_layouts(root: &Path) -> String {
    let directory = layout_directory(root);
    let others = entries(root).unwrap_or_default().into_iter().filter(|(name, _)| name.starts_with(LAYOUT));
    let others: Vec<_> = others.map(|(_, path)| path).filter(|path| *path != directory).collect();
    names(&others)
}

/// What [`Pins::remove`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Indexes of the interfaces that had a link.
    pub interfaces: Vec<u32>,
    /// Whether the connect hook was on a cgroup.
    pub hook: bool,
    /// Whether there were any pins.
    pub maps: bool,
}

/// The links in a directory, by interface index.
fn links(directory: &Path) -> Result<BTreeMap<u32, PathBuf>, PinsError> {
    let index = |name: &str| name.strip_prefix(LINK)?.parse().ok();
    Ok(entries(directory)?.into_iter().filter_map(|(name, path)| Some((index(&name)?, path))).collect())
}

/// The links of the connect hook in a directory, by program.
fn hooks(directory: &Path) -> Result<BTreeMap<String, PathBuf>, PinsError> {
    let program = |name: &str| name.strip_prefix(HOOK).map(str::to_owned);
    Ok(entries(directory)?.into_iter().filter_map(|(name, path)| Some((program(&name)?, path))).collect())
}

fn entries(directory: &Path) -> Result<Vec<(String, PathBuf)>, PinsError> {
    let list = || {
        fs::read_dir(directory)?
            .map(|entry| entry.map(|it| (it.file_name().to_string_lossy().into_owned(), it.path())))
            .collect::<io::Result<Vec<_>>>()
    };
    list().map_err(failed("list", directory))
}

/// Removes a directory of pins, the links first.
fn remove_directory(directory: &Path) -> Result<(), PinsError> {
    for path in links(directory)?.values().chain(hooks(directory)?.values()) {
        remove_if_there(path)?;
    }
    for (name, path) in entries(directory)? {
        if name.starts_with(MAP) || name == PROGRAM || name == NEXT_PROGRAM {
            remove_if_there(&path)?;
        }
    }
    // Somebody else's pin in it makes this fail, and stays.
    fs::remove_dir(directory).map_err(failed("remove the directory", directory))
}

fn remove_if_there(path: &Path) -> Result<(), PinsError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Sees to it that `root` will be on a BPF file system. systemd mounts one at boot; a container or a small system may
/// lack it.
fn provide_file_system(root: &Path) -> Result<(), PinsError> {
    let is_bpf = |path: &Path| statfs(path).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC);
    if root.ancestors().find(|path| path.exists()).is_some_and(is_bpf) {
        return Ok(());
    }
    let place = Path::new(BPF_FILE_SYSTEM);
    if !root.starts_with(place) || is_bpf(place) {
        return Err(PinsError::NotBpf(root.to_owned()));
    }
    mount(Some("bpf"), place, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
        .map_err(|errno| failed("mount the BPF file system at", place)(errno.into()))?;
    tracing::info!("mounted the BPF file system at {BPF_FILE_SYSTEM}");
    Ok(())
}

fn lock(root: &Path) -> Result<Flock<fs::File>, PinsError> {
    let directory = fs::File::open(root).map_err(failed("open", root))?;
    Flock::lock(directory, FlockArg::LockExclusiveNonblock).map_err(|(directory, errno)| {
        if errno != nix::errno::Errno::EWOULDBLOCK {
            return failed("lock", root)(errno.into());
        }
        let inode = directory.metadata().map(|metadata| metadata.ino()).unwrap_or_default();
        let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
        PinsError::InUse { path: root.to_owned(), pid: lock_holder(&locks, inode) }
    })
}

/// Who holds an exclusive lock on an inode, from the content of `/proc/locks`, whose lines read
/// `1: FLOCK  ADVISORY  WRITE 708 00:15:20 0 EOF`.
fn lock_holder(locks: &str, inode: u64) -> Option<u32> {
    locks.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip_while(|word| *word != "FLOCK");
        let (pid, place) = (words.nth(3)?, words.next()?);
        (place.rsplit(':').next()? == inode.to_string()).then(|| pid.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: Definition =
        Definition { kind: 2, key_size: 4, value_size: 64, entries: 16_384, flags: 1024 };

    #[test]
    fn a_map_that_differs_is_told_by_what_differs() {
        assert_eq!(WANTED.difference(&WANTED), None);
        let found = Definition { value_size: 32, entries: 8, ..WANTED };
        assert_eq!(
            WANTED.difference(&found).unwrap(),
            "value size 32 instead of 64, number of entries 8 instead of 16384"
        );
    }

    #[test]
    fn the_holder_of_a_lock_is_found_by_inode() {
        let locks = "1: FLOCK  ADVISORY  WRITE 708 00:15:20 0 EOF\n2: POSIX  ADVISORY  WRITE 5 00:15:21 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 4711 00:1d:21 0 EOF\n";
        assert_eq!(lock_holder(locks, 21), Some(4711));
        assert_eq!(lock_holder(locks, 20), Some(708));
        assert_eq!(lock_holder(locks, 22), None);
    }

    #[test]
    fn only_a_bpf_file_system_will_do() {
        let directory = tempfile::tempdir().unwrap();
        let error = Pins::open(&directory.path().join("pins"), false).unwrap_err();
        assert!(error.to_string().contains("no BPF file system"), "{error}");
    }
}
