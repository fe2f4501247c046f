//! What is done with many sockets, one after the other: what goes wrong with one of them holds nobody else up.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use super::{SocketsError, diagnostics::Seen};
use crate::dataplane::FollowedSocket;

/// Payload that is so young is proof enough: nobody else's is looked for.
const ENOUGH: Duration = Duration::from_millis(500);

/// What the kernel does with a socket.
pub(super) trait Kernel {
    /// Looks at it.
    fn look(&self, socket: &FollowedSocket) -> Result<Seen, SocketsError>;
    /// Ends it. `false`: it was closed already.
    fn destroy(&self, socket: &FollowedSocket) -> Result<bool, SocketsError>;
}

/// One turn over sockets.
pub(super) struct Pass<'a> {
    kernel: &'a dyn Kernel,
    /// Those that are closed, although they are in the table.
    pub(super) gone: Vec<FollowedSocket>,
    /// What went wrong first.
    pub(super) failure: Option<SocketsError>,
}

impl<'a> Pass<'a> {
    pub(super) fn new(kernel: &'a dyn Kernel) -> Self {
        Self { kernel, gone: Vec::new(), failure: None }
    }

    /// When the sockets of each backend last received payload.
    pub(super) fn look(&mut self, sockets: &[FollowedSocket]) -> BTreeMap<u8, Instant> {
        let mut heard = BTreeMap::new();
        for socket in sockets {
            let is_recent = |at: &Instant| at.elapsed() < ENOUGH;
            if heard.get(&socket.backend).is_some_and(is_recent) {
                continue;
            }
            if let Some(Some(ago)) = self.look_at(socket)
                && let Some(at) = Instant::now().checked_sub(ago)
            {
                let latest = heard.entry(socket.backend).or_insert(at);
                *latest = at.max(*latest);
            }
        }
        heard
    }

    /// Ends sockets while `goes_on`. How many it were; or none, because one of them has received payload within `quiet`: then.
    /// Who cannot be looked at is no witness, and is not ended either.
    pub(super) fn end_unless_heard(
        &mut self,
        sockets: &[FollowedSocket],
        quiet: Duration,
        goes_on: impl Fn() -> bool,
    ) -> Result<usize, Instant> {
        let mut silent = Vec::new();
        // All are looked at before one is touched.
        for socket in sockets {
            match self.look_at(socket) {
                Some(Some(ago)) if ago < quiet => {
                    let now = Instant::now();
                    return Err(now.checked_sub(ago).unwrap_or(now));
                }
                Some(_) => silent.push(*socket),
                None => {}
            }
        }
        Ok(self.end(&silent, goes_on))
    }

    /// Ends sockets while `goes_on`. How many it were.
    pub(super) fn end(&mut self, sockets: &[FollowedSocket], goes_on: impl Fn() -> bool) -> usize {
        let mut count = 0;
        for socket in sockets {
            if !goes_on() {
                break;
            }
            match self.kernel.destroy(socket) {
                Ok(true) => count += 1,
                Ok(false) => self.gone.push(*socket),
                Err(error) => self.note(error),
            }
        }
        count
    }

    /// How long ago an open socket received payload, if it ever did. None: it is closed, or cannot be looked at.
    fn look_at(&mut self, socket: &FollowedSocket) -> Option<Option<Duration>> {
        match self.kernel.look(socket) {
            Ok(Seen::Open(payload)) => Some(payload),
            Ok(Seen::Gone) => {
                self.gone.push(*socket);
                None
            }
            Err(error) => {
                self.note(error);
                None
            }
        }
    }

    fn note(&mut self, error: SocketsError) {
        self.failure.get_or_insert(error);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        cell::{Cell, RefCell},
        io,
    };

    use super::*;

    /// What it says of each socket, by cookie, and whom it has ended.
    struct Fake {
        seen: Vec<io::Result<Seen>>,
        ended: RefCell<Vec<u64>>,
    }

    impl Fake {
        fn new(seen: Vec<io::Result<Seen>>) -> (Self, Vec<FollowedSocket>) {
            let address = ([127, 0, 0, 1], 1).into();
            let socket = |cookie| FollowedSocket {
                cookie,
                network: 0,
                local: address,
                remote: address,
                interface: 0,
                service: 0,
                backend: 1,
            };
            let sockets = (0..seen.len() as u64).map(socket).collect();
            (Self { seen, ended: RefCell::default() }, sockets)
        }

        fn of(&self, socket: &FollowedSocket) -> io::Result<Seen> {
            match &self.seen[socket.cookie as usize] {
                Ok(seen) => Ok(*seen),
                Err(error) => Err(error.kind().into()),
            }
        }
    }

    impl Kernel for Fake {
        fn look(&self, socket: &FollowedSocket) -> Result<Seen, SocketsError> {
            self.of(socket).map_err(SocketsError::Ask)
        }

        fn destroy(&self, socket: &FollowedSocket) -> Result<bool, SocketsError> {
            let seen = self.of(socket).map_err(SocketsError::Destroy)?;
            self.ended.borrow_mut().push(socket.cookie);
            Ok(seen != Seen::Gone)
        }
    }

    const QUIET: Duration = Duration::from_secs(5);
    const SILENT: io::Result<Seen> = Ok(Seen::Open(None));

    fn broken() -> io::Result<Seen> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    #[test]
    fn what_goes_wrong_with_one_socket_holds_no_other_up() {
        let long_ago = Ok(Seen::Open(Some(Duration::from_secs(6))));
        let (kernel, sockets) = Fake::new(vec![SILENT, broken(), long_ago, Ok(Seen::Gone), broken()]);
        let mut pass = Pass::new(&kernel);
        assert_eq!(pass.look(&sockets).len(), 1);
        assert_eq!(pass.end_unless_heard(&sockets, QUIET, || true), Ok(2));
        assert_eq!(*kernel.ended.borrow(), [0, 2], "whoever cannot be seen is left alone");
        assert!(pass.gone.iter().all(|socket| socket.cookie == 3));
        assert!(matches!(pass.failure, Some(SocketsError::Ask(_))));
        assert_eq!(Pass::new(&kernel).end(&sockets, || true), 2, "an operator's order as well");
    }

    #[test]
    fn one_that_has_heard_saves_all_of_them() {
        let just_now = Ok(Seen::Open(Some(Duration::from_secs(4))));
        let (kernel, sockets) = Fake::new(vec![SILENT, broken(), just_now]);
        assert!(Pass::new(&kernel).end_unless_heard(&sockets, QUIET, || true).is_err());
        assert!(kernel.ended.borrow().is_empty());
    }

    #[test]
    fn whoever_comes_back_to_life_in_the_middle_keeps_the_rest() {
        let (kernel, sockets) = Fake::new(vec![SILENT, SILENT, SILENT]);
        let left = Cell::new(2);
        let goes_on = || left.replace(left.get() - 1) > 0;
        assert_eq!(Pass::new(&kernel).end_unless_heard(&sockets, QUIET, goes_on), Ok(2));
    }
}
