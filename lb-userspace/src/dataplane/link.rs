//! What aya's links of cgroups lack: another program for one that is there, on which cgroup it is, and its end. System calls as
//! `bpf(2)` and the kernel's `include/uapi/linux/bpf.h` (`union bpf_attr`) have them.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_LINK_DETACH: libc::c_int = 34;

/// A pinned link.
#[derive(Debug)]
pub(super) struct RawLink(OwnedFd);

#[repr(C)]
struct ObjGet {
    path: u64,
    descriptor: u32,
    flags: u32,
}

#[repr(C)]
struct ObjGetInfo {
    descriptor: u32,
    length: u32,
    info: u64,
}

#[repr(C)]
struct LinkUpdate {
    link: u32,
    program: u32,
    flags: u32,
    program_before: u32,
}

/// The beginning of `struct bpf_link_info`, for links of cgroups. For those of XDP the first half of `cgroup` is the index of
/// the interface.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    padding: u32,
    cgroup: u64,
    attach_type: u32,
    reserved: u32,
}

impl RawLink {
    /// Opens a pin.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let mut request = ObjGet { path: path.as_ptr().addr() as u64, descriptor: 0, flags: 0 };
        let descriptor = bpf(BPF_OBJ_GET, &mut request)?;
        // SAFETY: a descriptor that the kernel has just made for us.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(descriptor) }))
    }

    /// The id (the inode) of the cgroup that it is on; 0: that was removed, or the link was detached from it.
    pub(super) fn cgroup(&self) -> io::Result<u64> {
        Ok(self.info()?.cgroup)
    }

    /// The program (the kernel's id), and the index of the interface that it is on, in the interface's own network
    /// namespace; 0: that interface is gone.
    pub(super) fn interface(&self) -> io::Result<(u32, u32)> {
        let info = self.info()?;
        let [a, b, c, d, ..] = info.cgroup.to_ne_bytes();
        Ok((info.program, u32::from_ne_bytes([a, b, c, d])))
    }

    fn info(&self) -> io::Result<LinkInfo> {
        let mut info = LinkInfo::default();
        let mut request = ObjGetInfo {
            descriptor: self.0.as_raw_fd().cast_unsigned(),
            length: size_of::<LinkInfo>() as u32,
            info: (&raw mut info).expose_provenance() as u64,
        };
        bpf(BPF_OBJ_GET_INFO_BY_FD, &mut request)?;
        Ok(info)
    }

    /// Puts a program in the place of the one before: there is always one of them.
    pub(super) fn update(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let mut request = LinkUpdate {
            link: self.0.as_raw_fd().cast_unsigned(),
            program: program.as_raw_fd().cast_unsigned(),
            flags: 0,
            program_before: 0,
        };
        bpf(BPF_LINK_UPDATE, &mut request).map(drop)
    }

    /// Takes the program away now. When a link's last pin and descriptor go, the kernel does that some time later.
    pub(super) fn detach(&self) -> io::Result<()> {
        let mut link = self.0.as_raw_fd().cast_unsigned();
        bpf(BPF_LINK_DETACH, &mut link).map(drop)
    }
}

fn bpf<T>(command: libc::c_int, request: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: the structure is the one of the command, and what it points to lives until the call returns.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *request, size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result as libc::c_int)
}
