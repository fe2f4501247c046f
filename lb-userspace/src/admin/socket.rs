//! The socket file: one daemon owns it, a dead one's is replaced.

use std::{
    fs, io,
    os::{
        fd::AsFd,
        unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::socket::{getsockopt, sockopt::PeerCredentials},
    unistd::{Group, chown},
};
use socket2::{Domain, SockAddr, Socket, Type};

/// Root and root's group: whoever may write here may unload the load balancer.
const SOCKET_MODE: u32 = 0o660;
const DIRECTORY_MODE: u32 = 0o755;
/// Connections the kernel holds until they are accepted.
const BACKLOG: i32 = 64;
/// For another daemon that is binding at this moment.
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);
const LOCK_RETRY: Duration = Duration::from_millis(10);

/// Why the admin socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// A daemon answers there.
    #[error(
        "another sheave is running{}: it owns {}; stop it first, or give this one its own `admin.socket`",
        process(*.pid), .path.display()
    )]
    InUse {
        /// The socket.
        path: PathBuf,
        /// Its process, as far as the kernel tells.
        pid: Option<i32>,
    },
    /// Something that is no socket has the name.
    #[error("{} exists and is not a socket; remove it, or set `admin.socket` to another path", .0.display())]
    NotASocket(PathBuf),
    /// There is no such group on this host.
    #[error("admin.group: there is no group {0:?} on this host: `groupadd --system {0}`, or name another")]
    NoGroup(String),
    /// Anything else.
    #[error("cannot {action} {}: {reason}", .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// What the kernel said.
        reason: io::Error,
    },
}

fn process(pid: Option<i32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

/// A bound admin socket. Its file goes away with it.
#[derive(Debug)]
pub struct AdminListener {
    pub(super) socket: Socket,
    pub(super) file: SocketFile,
}

impl AdminListener {
    /// Lets the members of a group use the socket as root may.
    pub fn share_with(&self, group: &str) -> Result<(), BindError> {
        let path = &self.file.path;
        let failed = |reason| BindError::Io { action: "give the group", path: path.clone(), reason };
        let found = Group::from_name(group).map_err(|error| failed(error.into()))?;
        let found = found.ok_or_else(|| BindError::NoGroup(group.to_owned()))?;
        chown(path, None, Some(found.gid)).map_err(|error| failed(error.into()))
    }
}

/// Binds the admin socket: makes its directory, replaces the socket of a daemon that is gone, refuses when one lives.
pub fn bind(path: &Path) -> Result<AdminListener, BindError> {
    let failed = |action, path: &Path| {
        let path = path.to_owned();
        move |reason| BindError::Io { action, path, reason }
    };
    let directory = match path.parent() {
        Some(directory) if directory != Path::new("") => directory,
        _ => Path::new("."),
    };
    make_directory(directory).map_err(failed("make the directory", directory))?;
    // Two daemons that start together must not both find a dead socket and replace each other's.
    let _lock = lock(directory).map_err(failed("lock the directory", directory))?;
    remove_dead_socket(path)?;

    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed("make the socket", path))?;
    let address = SockAddr::unix(path).map_err(failed("bind the socket", path))?;
    socket.set_nonblocking(true).map_err(failed("bind the socket", path))?;
    socket.bind(&address).map_err(failed("bind the socket", path))?;
    let file = SocketFile::new(path).map_err(failed("find the socket", path))?;
    // Before `listen`, so that nobody connects while the mode is still the umask's.
    fs::set_permissions(path, fs::Permissions::from_mode(SOCKET_MODE))
        .map_err(failed("set the mode of", path))?;
    socket.listen(BACKLOG).map_err(failed("listen on", path))?;
    Ok(AdminListener { socket, file })
}

fn make_directory(directory: &Path) -> io::Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(directory)?;
    fs::set_permissions(directory, fs::Permissions::from_mode(DIRECTORY_MODE))
}

fn lock(directory: &Path) -> io::Result<Flock<fs::File>> {
    let deadline = Instant::now() + LOCK_TIMEOUT;
    let mut file = fs::File::open(directory)?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((_, error)) if Instant::now() > deadline => return Err(error.into()),
            Err((unlocked, _)) => file = unlocked,
        }
        std::thread::sleep(LOCK_RETRY);
    }
}

fn remove_dead_socket(path: &Path) -> Result<(), BindError> {
    let failed = |action| move |reason| BindError::Io { action, path: path.to_owned(), reason };
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result.map_err(failed("look at"))?,
    };
    if !metadata.file_type().is_socket() {
        return Err(BindError::NotASocket(path.to_owned()));
    }
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed("probe"))?;
    let address = SockAddr::unix(path).map_err(failed("probe"))?;
    probe.set_nonblocking(true).map_err(failed("probe"))?;
    match probe.connect(&address) {
        Ok(()) => Err(BindError::InUse { path: path.to_owned(), pid: owner(&probe) }),
        // Its backlog is full: it is there, and busy.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(BindError::InUse { path: path.to_owned(), pid: None })
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed("remove the dead socket"))
        }
        Err(error) => Err(failed("probe")(error)),
    }
}

/// The process that listens at the other end.
fn owner(connected: &impl AsFd) -> Option<i32> {
    getsockopt(connected, PeerCredentials).ok().map(|credentials| credentials.pid())
}

/// The file of a socket that we bound. Dropped: removed, unless someone has put another in its place.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)? })
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            // Nothing can be done about a failure; the next daemon replaces a dead socket anyway.
            let _ = fs::remove_file(&self.path);
        }
    }
}
