//! One question to a server, with the credential of a check: for those who want the answer, not a verdict.

use std::net::SocketAddr;

use super::{
    credentials::{Credentials, Store},
    http::{End, Reply},
    probe::Prober,
    report::CheckReport,
};
use crate::config::Check;

/// What a server answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status, 200 to 599.
    pub status: u16,
    /// At most 64 KiB of it.
    pub body: Vec<u8>,
    /// There was more of it.
    pub cut: bool,
}

/// Asks a server as a [`Check`] does, its timeouts, verification and credential included.
pub struct Asker {
    address: SocketAddr,
    host: Option<String>,
    check: Check,
    credentials: Credentials,
}

impl std::fmt::Debug for Asker {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Asker").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Asker {
    /// For a backend at `address` that was found by the name `host`, if by one.
    pub fn new(address: SocketAddr, host: Option<&str>, check: &Check) -> Self {
        Self {
            address,
            host: host.map(str::to_owned),
            check: check.clone(),
            credentials: Store::default().credentials(check),
        }
    }

    /// `GET path`, on a connection of its own.
    ///
    /// # Errors
    ///
    /// Without a whole reply: what went wrong, as a check would report it.
    pub async fn get(&self, path: &str) -> Result<Answer, CheckReport> {
        let prober = Prober::new(self.address, &self.check, self.credentials.clone());
        let Reply { status, body, end } =
            prober.found_by(self.host.as_deref()).get(path).await.map_err(CheckReport::from)?;
        let cut = match end {
            End::Complete => false,
            End::TooLarge => true,
            End::Broken(trouble) => return Err(trouble.into()),
        };
        Ok(Answer { status: status.as_u16(), body, cut })
    }
}
