//! The connect hook's programs: loading them, and putting them on a cgroup.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::Path,
};

use aya::programs::{
    CgroupAttachMode, CgroupSockAddr, Program, ProgramError, ProgramFd, ProgramType, SockOps,
    links::{FdLink, LinkError},
};
use lb_common::layout;

use super::{Dataplane, DataplaneError, Pins, attach::errno, grace, link::RawLink, mapped, service_id};

/// Those that show the address that was dialled come first, and the one that follows sockets: a connection is not
/// redirected before it can be shown, and counted.
pub(super) const PROGRAMS: [&str; 5] = [FOLLOW, "getpeername4", "getpeername6", "connect4", "connect6"];
const FOLLOW: &str = "follow_sockets";

/// Whether the kernel lets the connect hook choose the error of a connection that it refuses (Linux 6.0). Else such a
/// connection is sent to a port where nobody can listen.
pub fn sets_error() -> bool {
    use aya::sys::{BpfHelper, is_helper_supported};
    is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval).unwrap_or(false)
}

impl Dataplane {
    /// Puts the connect hook on a cgroup, for the processes of the network namespace with this cookie, and as far as
    /// services say so for all. Where a daemon before us has put it there, its programs are replaced, and every
    /// connection meets the old ones or the new.
    pub fn attach_hook(&mut self, cgroup: &File, network: u64) -> Result<(), DataplaneError> {
        let id = cgroup.metadata().map_err(|source| DataplaneError::System { call: "fstat", source })?.ino();
        self.change_hook(|before| layout::Hook { network, ..before })?;
        self.load_hook()?;
        let pins = self.pins.clone();
        let pinned = pins.as_ref().map(Pins::hooks).transpose()?.unwrap_or_default();
        self.hook_watch = (id, BTreeMap::new());
        for name in PROGRAMS {
            let before = match pinned.get(name) {
                Some(path) => self.replace_hook_program(name, path, id)?,
                None => Before::Nowhere,
            };
            let is_kept = matches!(before, Before::Here(_));
            let (link, elsewhere) = match before {
                Before::Here(link) => (link, None),
                Before::Elsewhere(link) => (self.attach_hook_program(name, cgroup)?, Some(link)),
                Before::Nowhere => (self.attach_hook_program(name, cgroup)?, None),
            };
            let link = match &pins {
                Some(pins) => {
                    let link = pins.pin_hook(name, link)?;
                    let watched = RawLink::open(&pins.hook(name))
                        .map_err(|source| DataplaneError::System { call: "bpf(BPF_OBJ_GET)", source })?;
                    self.hook_watch.1.insert(name, watched);
                    link
                }
                None => link,
            };
            self.hook_links.insert(name, link);
            // Now that this one is there.
            if let Some(elsewhere) = elsewhere {
                elsewhere
                    .detach()
                    .map_err(|source| DataplaneError::System { call: "bpf(BPF_LINK_DETACH)", source })?;
            }
            // Not before the program is gone from the cgroup that it was on, whose sockets it would count now, and of whose
            // end it would never hear; and before the first connection is redirected by maps that were never followed.
            if name == FOLLOW && !(is_kept && self.change_hook(|same| same)?.is_following()) {
                self.follow_anew()?;
            }
        }
        Ok(())
    }

    /// Loads the programs, each of which must be known to the kernel before one of them is put anywhere.
    pub(super) fn load_hook(&mut self) -> Result<(), DataplaneError> {
        for name in PROGRAMS {
            self.hook_program(name)?.load().map_err(|source| DataplaneError::not_loaded(name, source))?;
        }
        Ok(())
    }

    /// Takes the connect hook away that a daemon before us has put on a cgroup.
    pub fn leave_hook(&mut self) -> Result<(), DataplaneError> {
        self.hook_links.clear();
        self.hook_watch.1.clear();
        if let Some(pins) = &self.pins {
            for name in pins.hooks()?.keys() {
                pins.unpin_hook(name)?;
            }
        }
        self.follow_none()
    }

    /// Counts sockets from nothing: nobody has followed those that there are without a break.
    fn follow_anew(&mut self) -> Result<(), DataplaneError> {
        self.follow_none()?;
        self.change_hook(|before| layout::Hook { epoch: before.epoch.wrapping_add(1), ..before }).map(drop)
    }

    /// Counts no sockets, and forgets those that there are.
    fn follow_none(&mut self) -> Result<(), DataplaneError> {
        let even = |epoch: u32| epoch.wrapping_add(epoch % 2);
        self.change_hook(|before| layout::Hook { epoch: even(before.epoch), ..before })?;
        // A program that runs just now may count one more.
        grace::wait().map_err(|source| DataplaneError::System { call: "membarrier", source })?;
        self.forget_sockets()
    }

    /// Returns the hook's entry as it is then.
    fn change_hook(
        &mut self,
        change: impl FnOnce(layout::Hook) -> layout::Hook,
    ) -> Result<layout::Hook, DataplaneError> {
        let entry = mapped::<layout::Hook>(&self.ebpf, "HOOK")?;
        let changed = change(entry.read(0).unwrap_or_default());
        entry.write(0, changed);
        Ok(changed)
    }

    fn attach_hook_program(&mut self, name: &'static str, cgroup: &File) -> Result<FdLink, DataplaneError> {
        let mut program = self.hook_program(name)?;
        // A link is always one of several, whatever the mode is called (`cgroup_bpf_link_attach` in the kernel).
        program
            .attach(cgroup, CgroupAttachMode::Single)
            .map_err(|source| match errno(&source) {
                Some(libc::EPERM) => DataplaneError::HookRefused { name, source: Box::new(source) },
                _ => DataplaneError::Program { name, source: Box::new(source) },
            })?
            .map_err(|error| DataplaneError::System {
                call: "bpf(BPF_LINK_CREATE)",
                source: io::Error::other(error),
            })
    }

    /// Puts a program in the place of the one of a pinned link, if that is on this cgroup.
    fn replace_hook_program(
        &mut self,
        name: &'static str,
        path: &Path,
        cgroup: u64,
    ) -> Result<Before, DataplaneError> {
        let failed = |call| move |source| DataplaneError::System { call, source };
        let link = RawLink::open(path).map_err(failed("bpf(BPF_OBJ_GET)"))?;
        if link.cgroup().map_err(failed("bpf(BPF_OBJ_GET_INFO_BY_FD)"))? != cgroup {
            return Ok(Before::Elsewhere(link));
        }
        let error = |source| DataplaneError::Program { name, source: Box::new(source) };
        let program = self.hook_program(name)?;
        let program = program.fd().map_err(error)?.as_fd();
        link.update(program).map_err(failed("bpf(BPF_LINK_UPDATE)"))?;
        Ok(Before::Here(Pins::open_link(path)?))
    }

    fn hook_program(&mut self, name: &'static str) -> Result<HookProgram<'_>, DataplaneError> {
        match self.ebpf.program_mut(name) {
            Some(Program::CgroupSockAddr(program)) => Ok(HookProgram::Address(program)),
            Some(Program::SockOps(program)) => Ok(HookProgram::Sockets(program)),
            _ => Err(DataplaneError::Missing(name)),
        }
    }

    /// Whether the connect hook is on a cgroup.
    pub fn is_hooked(&self) -> bool {
        !self.hook_links.is_empty()
    }

    /// The programs of the connect hook that are not on its cgroup any more: somebody has detached them, or the cgroup was
    /// removed. The kernel is asked; where nothing is pinned, the links are nobody else's to detach.
    pub fn hook_programs_lost(&self) -> Vec<&'static str> {
        let (cgroup, links) = &self.hook_watch;
        let is_there = |link: &RawLink| link.cgroup().is_ok_and(|id| id == *cgroup);
        links.iter().filter(|(_, link)| !is_there(link)).map(|(name, _)| *name).collect()
    }

    /// Says whether the hook serves processes of every network namespace for a service.
    pub fn set_pods(&mut self, service: usize, pods: bool) {
        let id = usize::from(service_id(service));
        let mut entry = self.services.read(id).unwrap_or_default();
        entry.pods = pods.into();
        self.services.write(id, entry);
    }
}

/// Where a program of the hook was before.
enum Before {
    Nowhere,
    /// On another cgroup.
    Elsewhere(RawLink),
    /// On this one, and another program is in its place now.
    Here(FdLink),
}

/// One of the hook's programs: both types are loaded and attached in the same way.
enum HookProgram<'a> {
    /// Of a system call that names an address.
    Address(&'a mut CgroupSockAddr),
    /// Of what happens to sockets.
    Sockets(&'a mut SockOps),
}

impl HookProgram<'_> {
    fn load(&mut self) -> Result<(), ProgramError> {
        match self {
            Self::Address(program) => program.load(),
            Self::Sockets(program) => program.load(),
        }
    }

    fn fd(&self) -> Result<&ProgramFd, ProgramError> {
        match self {
            Self::Address(program) => program.fd(),
            Self::Sockets(program) => program.fd(),
        }
    }

    fn attach(
        &mut self,
        cgroup: &File,
        mode: CgroupAttachMode,
    ) -> Result<Result<FdLink, LinkError>, ProgramError> {
        match self {
            Self::Address(program) => {
                let id = program.attach(cgroup, mode)?;
                Ok(program.take_link(id)?.try_into())
            }
            Self::Sockets(program) => {
                let id = program.attach(cgroup, mode)?;
                Ok(program.take_link(id)?.try_into())
            }
        }
    }
}
