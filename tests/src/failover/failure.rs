//! How a connection came to its end.

use std::{error::Error, io, io::ErrorKind};

use serde::Serialize;
use tokio::time::error::Elapsed;

/// How a connection failed, as far as its client's kernel tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Failure {
    /// A RST answered the SYN.
    Refused,
    /// A RST ended it.
    Reset,
    /// The other side closed it in order.
    Closed,
    /// Nothing came for as long as the client waited.
    Late,
    /// Something else, such as nonsense in the stream.
    Other,
}

impl Failure {
    /// By the first error in the chain of causes that tells.
    pub(super) fn of(error: &(dyn Error + 'static)) -> Self {
        let chain = || std::iter::successors(Some(error), |error| (*error).source());
        let told = chain().find_map(|cause| {
            if cause.is::<Elapsed>() { Some(Self::Late) } else { Self::of_kind(cause.downcast_ref()?) }
        });
        let closed = |cause: &hyper::Error| cause.is_incomplete_message() || cause.is_closed();
        let hyper = || chain().filter_map(|cause| cause.downcast_ref()).any(closed);
        told.unwrap_or_else(|| if hyper() { Self::Closed } else { Self::Other })
    }

    fn of_kind(error: &io::Error) -> Option<Self> {
        Some(match error.kind() {
            ErrorKind::ConnectionRefused => Self::Refused,
            ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::BrokenPipe => Self::Reset,
            ErrorKind::UnexpectedEof => Self::Closed,
            ErrorKind::TimedOut | ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => Self::Late,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use anyhow::Context as _;

    use super::Failure;

    #[test]
    fn the_cause_counts_however_it_is_wrapped() {
        let wrapped = |kind: io::ErrorKind| {
            let error = Err::<(), _>(io::Error::from(kind)).context("TCP").context("connecting").unwrap_err();
            Failure::of(error.as_ref())
        };
        assert_eq!(wrapped(io::ErrorKind::ConnectionRefused), Failure::Refused);
        assert_eq!(wrapped(io::ErrorKind::ConnectionReset), Failure::Reset);
        assert_eq!(wrapped(io::ErrorKind::UnexpectedEof), Failure::Closed);
        assert_eq!(wrapped(io::ErrorKind::InvalidData), Failure::Other);
    }
}
