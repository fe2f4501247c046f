//! Loaded programs that a test is done with, for the next one: emptied, they are as good as new.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test as well as the test itself")]

use std::{
    net::IpAddr,
    ops::{Deref, DerefMut},
    sync::Mutex,
    thread,
};

use lb_userspace::dataplane::{Dataplane, Settings};

use super::world::chain;

/// Those that no test has now.
static IDLE: Mutex<Vec<(Kind, Dataplane)>> = Mutex::new(Vec::new());

/// What must be the same for a loaded program to be used again: where the object is, and how many SNAT addresses of
/// IPv4 and of IPv6 there are. The other settings are the same for all tests, or written when maps are emptied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind {
    object: usize,
    snat4: usize,
    snat6: usize,
}

/// A data path of a test, which has it to itself until it is dropped.
pub struct Reused {
    kind: Kind,
    /// None: only while it is dropped.
    dataplane: Option<Dataplane>,
}

impl Reused {
    /// One that was used before, emptied, or else a new one.
    ///
    /// # Panics
    /// When the kernel does not take the program.
    pub(super) fn load(object: &'static [u8], settings: &Settings) -> Self {
        let snat4 = settings.snat_addresses.iter().filter(|address| IpAddr::is_ipv4(address)).count();
        let kind =
            Kind { object: object.as_ptr().addr(), snat4, snat6: settings.snat_addresses.len() - snat4 };
        let idle = {
            let mut idle = IDLE.lock().unwrap();
            idle.iter().position(|(it, _)| *it == kind).map(|index| idle.swap_remove(index))
        };
        let dataplane = match idle {
            Some((_, used)) => used.emptied(settings),
            None => Dataplane::load(object, settings),
        };
        let dataplane = dataplane.unwrap_or_else(|error| panic!("{}", chain(&error)));
        Self { kind, dataplane: Some(dataplane) }
    }

    /// The data path for good: no other test uses it again.
    pub fn into_inner(mut self) -> Dataplane {
        self.dataplane.take().unwrap()
    }
}

impl Drop for Reused {
    fn drop(&mut self) {
        // After a failure a thread of the test may still run the program.
        if let Some(dataplane) = self.dataplane.take().filter(|_| !thread::panicking()) {
            IDLE.lock().unwrap().push((self.kind, dataplane));
        }
    }
}

impl Deref for Reused {
    type Target = Dataplane;

    fn deref(&self) -> &Dataplane {
        self.dataplane.as_ref().unwrap()
    }
}

impl DerefMut for Reused {
    fn deref_mut(&mut self) -> &mut Dataplane {
        self.dataplane.as_mut().unwrap()
    }
}
