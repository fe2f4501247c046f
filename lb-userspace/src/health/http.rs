//! HTTP/1.1 over a standing connection: one request at a time, a small reply.

use std::{
    error::Error as _,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Request, Response, StatusCode,
    body::Incoming,
    client::conn::http1::{self, SendRequest},
};
use hyper_util::rt::TokioIo;
use tokio::{
    sync::oneshot,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::io::InspectReader;

use super::{
    connect::{Transport, Trouble, io_text, tls_error, tls_text},
    report::{CheckCode, Failure},
};

/// More of a body is not read: `/readyz` gives 2 bytes, or 2 kB of failed checks.
const MAX_BODY: usize = 64 << 10;

/// hyper's least, and enough for a reply's head.
const MAX_HEAD: usize = 16 << 10;

/// For a connection to say good-bye.
const CLOSING: Duration = Duration::from_secs(1);

/// A connection that HTTP is spoken on. Dropping it closes it.
pub(super) struct Connection {
    sender: SendRequest<Empty<Bytes>>,
    heard: Arc<AtomicBool>,
    /// Tells the task that moves the bytes that we are done.
    _open: oneshot::Sender<()>,
}

/// A status, and as much of the body as there was.
pub(super) struct Reply {
    pub(super) status: StatusCode,
    /// At most [`MAX_BODY`] bytes.
    pub(super) body: Vec<u8>,
    pub(super) end: End,
}

/// How the body ended.
pub(super) enum End {
    /// As announced: the connection may be used again.
    Complete,
    /// There is more than we want.
    TooLarge,
    /// Otherwise.
    Broken(Trouble),
}

impl Connection {
    pub(super) async fn open(transport: Box<dyn Transport>) -> Result<Self, Trouble> {
        let heard = Arc::new(AtomicBool::new(false));
        let listening = {
            let heard = Arc::clone(&heard);
            InspectReader::new(transport, move |bytes| {
                heard.fetch_or(!bytes.is_empty(), Ordering::Relaxed);
            })
        };
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(MAX_HEAD)
            .handshake(TokioIo::new(listening))
            .await
            .map_err(|error| trouble(&error))?;
        let (open, closed) = oneshot::channel::<()>();
        tokio::spawn(async move {
            let mut connection = std::pin::pin!(connection);
            tokio::select! {
                // Its end and its errors are seen by whoever waits for a reply.
                _ = &mut connection => {}
                _ = closed => { let _ = timeout(CLOSING, connection).await; }
            }
        });
        Ok(Self { sender, heard, _open: open })
    }

    /// Whether so much as a byte has come over it.
    pub(super) fn has_heard(&self) -> bool {
        self.heard.load(Ordering::Relaxed)
    }

    /// One request and its reply, within `limit`.
    pub(super) async fn ask(
        &mut self,
        request: Request<Empty<Bytes>>,
        limit: Duration,
    ) -> Result<Reply, Trouble> {
        let deadline = Instant::now() + limit;
        let head = async {
            self.sender.ready().await?;
            self.sender.send_request(request).await
        };
        match timeout_at(deadline, head).await {
            Ok(Ok(response)) => Ok(read(response, deadline).await),
            Ok(Err(error)) => Err(trouble(&error)),
            Err(_) => Err(late("")),
        }
    }
}

async fn read(response: Response<Incoming>, deadline: Instant) -> Reply {
    let status = response.status();
    let mut incoming = response.into_body();
    let mut body = Vec::new();
    let end = loop {
        let frame = match timeout_at(deadline, incoming.frame()).await {
            Ok(None) => break End::Complete,
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(error))) => break End::Broken(trouble(&error)),
            Err(_) => break End::Broken(late("the reply did not end in time")),
        };
        let Some(data) = frame.data_ref() else { continue };
        body.extend_from_slice(&data[..data.len().min(MAX_BODY - body.len())]);
        if body.len() == MAX_BODY {
            break End::TooLarge;
        }
    };
    Reply { status, body, end }
}

fn late(info: &str) -> Trouble {
    Trouble::failed(Failure::NoAnswer, CheckCode::L7Tout, info)
}

/// Whatever came, it was no HTTP reply. A connection that breaks off now is an answer too: TLS had completed.
fn trouble(error: &hyper::Error) -> Trouble {
    let info = if error.is_parse() {
        "not an HTTP/1 reply".to_owned()
    } else if error.is_incomplete_message() {
        "connection closed before the end of the reply".to_owned()
    } else {
        match error.source().and_then(|source| source.downcast_ref::<io::Error>()) {
            Some(error) => tls_error(error).map_or_else(|| io_text(error), tls_text),
            None => error.to_string(),
        }
    };
    Trouble::failed(Failure::NotExpected, CheckCode::L7Rsp, info)
}

/// The sub-checks that an apiserver's list names as failed: `etcd` of `[-]etcd failed: reason withheld`.
pub(super) fn failed_checks(body: &[u8]) -> Vec<String> {
    /// More names than this say no more.
    const NAMES_MAX: usize = 16;
    std::str::from_utf8(body)
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.strip_prefix("[-]")?.split(' ').next())
        .filter(|name| !name.is_empty() && name.len() <= 64)
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./:".contains(&byte)))
        .take(NAMES_MAX)
        .map(str::to_owned)
        .collect()
}

/// What a wrong status says about itself: the sub-checks that failed, else the status in words.
pub(super) fn explain(status: StatusCode, failed: &[String]) -> String {
    const NAMES_SHOWN: usize = 4;
    match failed {
        [] => status.canonical_reason().unwrap_or_default().to_owned(),
        names if names.len() <= NAMES_SHOWN => format!("failed: {}", names.join(", ")),
        names => {
            let more = names.len() - NAMES_SHOWN;
            format!("failed: {} and {more} more", names[..NAMES_SHOWN].join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_500_names_the_failed_checks() {
        let body =
            b"[+]ping ok\n[-]etcd failed: reason withheld\n[-]shutdown failed: reason withheld\nreadyz check failed";
        let failed = failed_checks(body);
        assert_eq!(failed, ["etcd", "shutdown"]);
        assert_eq!(explain(StatusCode::INTERNAL_SERVER_ERROR, &failed), "failed: etcd, shutdown");
        assert_eq!(
            explain(StatusCode::UNAUTHORIZED, &failed_checks(b"{\"kind\":\"Status\"}")),
            "Unauthorized"
        );
        assert_eq!(failed_checks(b"[-]\x1b[31mevil\" failed\n[-]"), Vec::<String>::new());
        let many = failed_checks("[-]a failed\n".repeat(40).as_bytes());
        assert_eq!(many.len(), 16);
        assert_eq!(explain(StatusCode::INTERNAL_SERVER_ERROR, &many), "failed: a, a, a, a and 12 more");
    }
}
