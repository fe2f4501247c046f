//! One daemon for each state directory: the lock, and whose it is.
//!
//! The kernel releases the lock when its holder ends, however it ends. What the file says may be old; the lock never is.

use std::{
    fs,
    io::{self, Read as _, Seek as _, Write as _},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

/// Longer than a process id.
const PID_LENGTH_MAX: u64 = 32;

/// Held for as long as the value lives.
#[derive(Debug)]
pub(crate) struct Lock(#[expect(dead_code, reason = "held, never looked at")] Flock<fs::File>);

/// Why there is no lock.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another daemon lives.
    #[error(
        "another sheave is running{}: it holds {}; stop it first, or give this one its own `dataplane.state_dir`, \
         `dataplane.pin_dir` and `admin.socket`",
        .pid.map(|pid| format!(" (process {pid})")).unwrap_or_default(), .path.display()
    )]
    Held {
        /// The lock file.
        path: PathBuf,
        /// Its owner, if it has said so.
        pid: Option<u32>,
    },
    /// Anything else.
    #[error("cannot lock {}: {source}", .path.display())]
    Io {
        /// The lock file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Lock {
    /// Takes the lock of a state directory, which is made if need be, and says so in the file.
    pub(crate) fn take(state_dir: &Path) -> Result<Self, LockError> {
        let path = state_dir.join("lock");
        let failed = |source| LockError::Io { path: path.clone(), source };
        fs::create_dir_all(state_dir).map_err(failed)?;
        // Not truncated: it may be another's.
        let file = fs::File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => {
                write_pid(&mut lock).map_err(failed)?;
                Ok(Self(lock))
            }
            Err((file, Errno::EWOULDBLOCK)) => Err(LockError::Held { path, pid: read_pid(&file) }),
            Err((_, errno)) => Err(failed(errno.into())),
        }
    }
}

fn write_pid(file: &mut fs::File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

fn read_pid(file: &fs::File) -> Option<u32> {
    let mut text = String::new();
    file.take(PID_LENGTH_MAX).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_one_is_told_whose_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let state_dir = directory.path().join("state");
        let first = Lock::take(&state_dir).unwrap();
        let error = Lock::take(&state_dir).unwrap_err().to_string();
        assert!(error.contains(&format!("(process {})", std::process::id())), "{error}");
        drop(first);
        Lock::take(&state_dir).unwrap();
    }

    #[test]
    fn what_a_dead_owner_wrote_is_no_lock() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("lock"), "4194305 and what it wrote before it was killed\n").unwrap();
        let _lock = Lock::take(directory.path()).unwrap();
        let text = fs::read_to_string(directory.path().join("lock")).unwrap();
        assert_eq!(text, format!("{}\n", std::process::id()));
    }
}
