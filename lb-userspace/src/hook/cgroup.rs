//! Finding the cgroup to put the hook on.
//!
//! Programs live in the cgroup v2 hierarchy, also where resources are managed by version 1 beside it. There is one such
//! hierarchy, mounted in the place that the distribution likes, several times, or not at all. A container is often
//! shown a branch of it as if that were the whole; what is put there sees only the container's own processes.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use crate::config::Cgroup;

/// Why there is no cgroup to put the hook on.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No hierarchy of version 2.
    #[error(
        "no cgroup v2 hierarchy is mounted\n   = help: `mkdir -p /run/sheave/cgroup && mount -t cgroup2 none \
         /run/sheave/cgroup`; in a container, mount the host's /sys/fs/cgroup into it"
    )]
    NotMounted,
    /// What is configured is something else.
    #[error(
        "dataplane.cgroup: {} is not a directory of the cgroup v2 hierarchy\n   = help: name one below the place that \
         `findmnt -t cgroup2` shows, or leave the key out", .0.display()
    )]
    NotACgroup(PathBuf),
    /// The kernel said no.
    #[error("cannot {action} {}: {reason}", .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        reason: io::Error,
    },
}

/// A cgroup, held open.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    directory: File,
    inode: u64,
    is_root: bool,
}

impl Place {
    /// The one that is configured; None: there is to be no hook.
    pub fn find(configured: &Cgroup) -> Result<Option<Self>, CgroupError> {
        let path = match configured {
            Cgroup::None => return Ok(None),
            Cgroup::Directory(path) => path.clone(),
            Cgroup::Auto => {
                let table = Path::new("/proc/self/mountinfo");
                let text = fs::read_to_string(table).map_err(|reason| CgroupError::Io {
                    action: "read",
                    path: table.to_owned(),
                    reason,
                })?;
                // One that shows the whole, if there is one.
                let mounts = mounts(&text);
                let whole = mounts.iter().find(|path| is_root(path));
                whole.or(mounts.first()).ok_or(CgroupError::NotMounted)?.clone()
            }
        };
        Self::open(path).map(Some)
    }

    fn open(path: PathBuf) -> Result<Self, CgroupError> {
        if !statfs(&path).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC) {
            return Err(CgroupError::NotACgroup(path));
        }
        let open = || {
            let directory = File::open(&path)?;
            let metadata = directory.metadata()?;
            Ok((directory, metadata))
        };
        match open() {
            Ok((directory, metadata)) if metadata.is_dir() => {
                Ok(Self { is_root: is_root(&path), inode: metadata.ino(), directory, path })
            }
            Ok(_) => Err(CgroupError::NotACgroup(path)),
            Err(reason) => Err(CgroupError::Io { action: "open", path, reason }),
        }
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its directory, open.
    pub fn directory(&self) -> &File {
        &self.directory
    }

    /// Whether it is still there: what was on a cgroup that was removed goes with it.
    pub fn exists(&self) -> bool {
        fs::metadata(&self.path).is_ok_and(|found| found.ino() == self.inode)
    }

    /// The processes in it and below it, as far as they are seen here. None: all of this host's.
    pub fn processes(&self) -> Option<BTreeSet<u32>> {
        (!self.is_root).then(|| {
            let mut found = BTreeSet::new();
            collect_processes(&self.path, &mut found);
            found
        })
    }

    /// What it leaves out although nobody has asked for that.
    pub fn reservation(&self, configured: &Cgroup) -> Option<String> {
        (*configured == Cgroup::Auto && !self.is_root).then(|| {
            format!(
                "{} is only a part of this host's cgroups: connections of processes outside of it are not served; mount \
                 the host's /sys/fs/cgroup, or name a directory in dataplane.cgroup",
                self.path.display()
            )
        })
    }
}

/// Cgroups come and go while one looks: what cannot be read is not there.
fn collect_processes(cgroup: &Path, found: &mut BTreeSet<u32>) {
    let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    found.extend(processes.lines().filter_map(|line| line.parse::<u32>().ok()));
    let below = fs::read_dir(cgroup).into_iter().flatten().flatten();
    let below = below.filter(|it| it.file_type().is_ok_and(|kind| kind.is_dir()));
    below.for_each(|it| collect_processes(&it.path(), found));
}

/// Only the root of the hierarchy has no type (`Documentation/admin-guide/cgroup-v2.rst`, "Core Interface Files").
fn is_root(path: &Path) -> bool {
    path.join("cgroup.procs").exists() && !path.join("cgroup.type").exists()
}

/// Where cgroup v2 is mounted, from the content of `/proc/self/mountinfo` (`proc_pid_mountinfo(5)`): the roots of the
/// hierarchy, as far as this process sees it, before branches of it.
fn mounts(mountinfo: &str) -> Vec<PathBuf> {
    let mut found: Vec<_> = mountinfo
        .lines()
        .filter_map(|line| {
            let (mount, file_system) = line.split_once(" - ")?;
            let mut words = mount.split(' ').skip(3);
            let (branch, place) = (words.next()?, words.next()?);
            (file_system.split(' ').next()? == "cgroup2").then(|| (branch != "/", unescaped(place)))
        })
        .collect();
    found.sort_by_key(|(is_branch, _)| *is_branch);
    found.into_iter().map(|(_, place)| place).collect()
}

/// Spaces and the like are written as three octal digits.
fn unescaped(text: &str) -> PathBuf {
    let mut plain = String::with_capacity(text.len());
    let mut parts = text.split('\\');
    plain.push_str(parts.next().unwrap_or_default());
    for part in parts {
        match part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                plain.push(char::from(byte));
                plain.push_str(&part[3..]);
            }
            None => {
                plain.push('\\');
                plain.push_str(part);
            }
        }
    }
    plain.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
24 30 0:22 / /sys rw,nosuid - sysfs sysfs rw
31 24 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
40 31 0:36 /kubepods /run/a\\040branch rw shared:9 - cgroup2 cgroup2 rw
41 31 0:36 / /sys/fs/cgroup/unified rw,relatime shared:9 master:3 - cgroup2 cgroup2 rw,nsdelegate
";

    #[test]
    fn the_hierarchy_is_found_wherever_it_is_mounted_and_before_its_branches() {
        assert_eq!(mounts(HYBRID), [Path::new("/sys/fs/cgroup/unified"), Path::new("/run/a branch")]);
        assert_eq!(mounts("24 30 0:22 / /sys rw,nosuid - sysfs sysfs rw\n"), Vec::<PathBuf>::new());
        assert_eq!(mounts("cgroup2\n - \n"), Vec::<PathBuf>::new());
    }

    #[test]
    fn what_is_no_cgroup_is_refused() {
        for path in ["/proc", "/nowhere"] {
            let error = Place::find(&Cgroup::Directory(path.into())).unwrap_err();
            assert!(matches!(error, CgroupError::NotACgroup(_)), "{error}");
        }
        assert!(Place::find(&Cgroup::None).unwrap().is_none());
    }
}
