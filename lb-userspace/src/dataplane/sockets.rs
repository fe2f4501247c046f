//! Sockets of this host's processes that the connect hook has redirected: how many each backend has, and which.

use std::net::SocketAddr;

use aya::{
    Ebpf,
    maps::{HashMap, MapData, MapError},
};
use lb_common::layout::{FOLLOWED, Followed};

use super::{Dataplane, DataplaneError, Mapped, change::clear, known::endpoint, mapped, typed};

const SOCKETS: &str = "FOLLOWED_SOCKETS";
const MISSED: &str = "SOCKETS_MISSED";

/// A socket that the connect hook has redirected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FollowedSocket {
    /// The kernel's number for it, which no other socket has until the next boot (`SO_COOKIE`, `socket(7)`).
    pub cookie: u64,
    /// The cookie of the network namespace it is in.
    pub network: u64,
    /// Its own end.
    pub local: SocketAddr,
    /// The backend.
    pub remote: SocketAddr,
    /// The interface it is bound to, or 0.
    pub interface: u32,
    /// The service's number, from 0.
    pub service: usize,
    /// The backend's id.
    pub backend: u8,
}

impl FollowedSocket {
    fn new(cookie: u64, entry: &Followed) -> Option<Self> {
        Some(Self {
            cookie,
            network: entry.network,
            local: endpoint(entry.family, entry.local, entry.local_port),
            remote: endpoint(entry.family, entry.remote, entry.remote_port),
            interface: entry.interface,
            service: usize::from(entry.service).checked_sub(1)?,
            backend: entry.backend,
        })
    }
}

/// The sockets that the connect hook has redirected and that are not closed, at most [`FOLLOWED`].
pub struct SocketTable {
    sockets: HashMap<MapData, u64, [u64; 7]>,
    /// By id of the backend: those that were taken out here.
    missed: Mapped<u64>,
}

impl SocketTable {
    pub(super) fn of(ebpf: &Ebpf) -> Result<Self, DataplaneError> {
        Ok(Self { missed: mapped(ebpf, MISSED)?, sockets: typed(ebpf, SOCKETS)? })
    }

    /// All of them. One that is opened or closed meanwhile may be among them or not.
    pub fn all(&self) -> Result<Vec<FollowedSocket>, DataplaneError> {
        let mut sockets = Vec::new();
        // While entries are removed the kernel may begin anew: that must end some time.
        for entry in self.sockets.iter().take(2 * FOLLOWED as usize) {
            let (cookie, words) = entry.map_err(failed)?;
            sockets.extend(FollowedSocket::new(cookie, &Followed::from_words(words)));
        }
        sockets.sort_unstable_by_key(|socket| socket.cookie);
        sockets.dedup_by_key(|socket| socket.cookie);
        Ok(sockets)
    }

    /// Takes a socket out that is closed, as the kernel says, without any program having heard of it (another one on the
    /// cgroup can turn that off), and counts its end. Where a program hears of it meanwhile, only one of the two counts.
    pub fn forget(&mut self, socket: &FollowedSocket) -> Result<(), DataplaneError> {
        let there = match self.sockets.get(&socket.cookie, 0) {
            Ok(words) => FollowedSocket::new(socket.cookie, &Followed::from_words(words)),
            Err(MapError::KeyNotFound) => None,
            Err(error) => return Err(failed(error)),
        };
        // It may have been connected anew.
        if there == Some(*socket) && self.remove(socket.cookie)? {
            let id = usize::from(socket.backend);
            self.missed.write(id, self.missed.read(id).unwrap_or_default().wrapping_add(1));
        }
        Ok(())
    }

    /// `false`: it was closed meanwhile.
    fn remove(&mut self, cookie: u64) -> Result<bool, DataplaneError> {
        match self.sockets.remove(&cookie) {
            Ok(()) => Ok(true),
            Err(MapError::KeyNotFound) => Ok(false),
            Err(error) => Err(failed(error)),
        }
    }

    fn clear(&mut self) -> Result<(), DataplaneError> {
        for socket in self.all()? {
            self.remove(socket.cookie)?;
        }
        Ok(())
    }
}

fn failed(source: MapError) -> DataplaneError {
    DataplaneError::Map { name: SOCKETS, source }
}

impl Dataplane {
    /// How many sockets of this host's processes are connected to each backend by the connect hook, by id.
    pub fn open_sockets(&self) -> Result<Vec<u64>, DataplaneError> {
        let count = |id: u8| {
            let missed = self.sockets_missed.read(id.into()).unwrap_or_default();
            let counted = super::sum(&self.backend_sockets, "BACKEND_SOCKETS", id.into())?;
            Ok(at_least_none(counted.wrapping_sub(missed)))
        };
        (0..=u8::MAX).map(count).collect()
    }

    /// Gives the table of sockets away, once.
    pub fn take_sockets(&mut self) -> Option<SocketTable> {
        self.sockets.take()
    }

    /// Knows of no socket any more: nobody would hear of the end of those that there are.
    pub(super) fn forget_sockets(&mut self) -> Result<(), DataplaneError> {
        for id in 0..=u8::MAX {
            clear(&mut self.backend_sockets, "BACKEND_SOCKETS", id.into())?;
            self.sockets_missed.write(id.into(), 0);
        }
        self.sockets.as_mut().map_or(Ok(()), SocketTable::clear)
    }
}

/// The CPUs' counts are read one after the other: a socket that moves between them may be missed where it was opened, and
/// seen where it was closed.
fn at_least_none(sum: u64) -> u64 {
    if sum > i64::MAX as u64 { 0 } else { sum }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_that_was_read_in_between_is_none() {
        assert_eq!([0, 7, u64::MAX].map(at_least_none), [0, 7, 0]);
    }
}
