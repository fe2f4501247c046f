//! The network namespaces of this host: those of processes, and those that are mounted somewhere (`ip-netns(8)`, container
//! runtimes), found by their cookies.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
};

use nix::sched::{CloneFlags, setns};

use super::SocketsError;
use crate::hook::own_network;

/// Does something in each of these network namespaces, as far as they can be found. Moves this thread there and back: it must
/// be one that nobody else works on.
pub(super) fn open_each<T>(
    wanted: &BTreeSet<u64>,
    open: impl Fn() -> io::Result<T>,
) -> Result<BTreeMap<u64, T>, SocketsError> {
    let own = File::open("/proc/thread-self/ns/net").map_err(SocketsError::Enter)?;
    let mut opened = BTreeMap::new();
    let mut refused = None;
    for file in candidates(&own).map_err(SocketsError::Enter)? {
        let result = setns(&file, CloneFlags::CLONE_NEWNET).map_err(io::Error::from).and_then(|()| {
            let network = own_network()?;
            if wanted.contains(&network) {
                opened.insert(network, open()?);
            }
            Ok(())
        });
        refused = result.err().or(refused);
        if opened.len() == wanted.len() {
            break;
        }
    }
    setns(&own, CloneFlags::CLONE_NEWNET).map_err(|errno| SocketsError::Enter(errno.into()))?;
    // Where some are found, the others are those of processes that have ended meanwhile.
    if opened.is_empty() {
        Err(refused.map_or(SocketsError::Hidden, SocketsError::Enter))
    } else {
        Ok(opened)
    }
}

/// Every network namespace once, but this thread's own.
fn candidates(own: &File) -> io::Result<Vec<File>> {
    let identity = |file: &File| file.metadata().map(|it| (it.dev(), it.ino()));
    let mut seen = HashSet::from([identity(own)?]);
    let mut found = Vec::new();
    for path in named()?.into_iter().chain(of_processes()?) {
        // Gone meanwhile, or somebody's whom we may not look at.
        let Ok(metadata) = fs::metadata(&path) else { continue };
        if seen.contains(&(metadata.dev(), metadata.ino())) {
            continue;
        }
        let Ok(file) = File::open(&path) else { continue };
        if seen.insert(identity(&file)?) {
            found.push(file);
        }
    }
    Ok(found)
}

fn of_processes() -> io::Result<Vec<PathBuf>> {
    let is_process = |name: &str| name.bytes().all(|byte| byte.is_ascii_digit());
    let entries = fs::read_dir("/proc")?.filter_map(Result::ok);
    let processes = entries.filter(|entry| entry.file_name().to_str().is_some_and(is_process));
    Ok(processes.map(|entry| entry.path().join("ns/net")).collect())
}

fn named() -> io::Result<Vec<PathBuf>> {
    Ok(mounts(&fs::read_to_string("/proc/thread-self/mountinfo")?))
}

/// Where network namespaces are mounted, from the content of `/proc/self/mountinfo` (`proc_pid_mountinfo(5)`).
fn mounts(mountinfo: &str) -> Vec<PathBuf> {
    let place = |line: &str| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut words = mount.split(' ').skip(3);
        let (root, place) = (words.next()?, words.next()?);
        (root.starts_with("net:[") && file_system.starts_with("nsfs ")).then(|| place.into())
    };
    mountinfo.lines().filter_map(place).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn named_network_namespaces_are_found_where_they_are_mounted() {
        let mountinfo = "\
24 30 0:22 / /sys rw,nosuid - sysfs sysfs rw
77 31 0:4 net:[4026532281] /run/netns/cni-1 rw shared:9 - nsfs nsfs rw
78 31 0:4 mnt:[4026532282] /run/snapd/ns/x.mnt rw - nsfs nsfs rw
";
        assert_eq!(mounts(mountinfo), [Path::new("/run/netns/cni-1")]);
    }

    #[test]
    fn this_threads_own_is_not_among_the_others() {
        let own = File::open("/proc/thread-self/ns/net").unwrap();
        let inode = own.metadata().unwrap().ino();
        assert!(candidates(&own).unwrap().iter().all(|file| file.metadata().unwrap().ino() != inode));
    }
}
