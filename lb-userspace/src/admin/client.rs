//! The other end of the admin socket, for the commands.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Method, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::{net::UnixStream, time::timeout};

use super::status::{Alive, Failure, Status, Unloaded};

/// Far above the status of 255 backends.
const ANSWER_SIZE_MAX: usize = 4 << 20;

/// Why the daemon gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "no sheave daemon answers at {}: {reason}\n   = help: {}",
        .path.display(), connect_help(reason)
    )]
    NoDaemon {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        reason: io::Error,
    },
    /// It accepted, and said nothing.
    #[error("the sheave daemon at {} did not answer within {limit:?}", .path.display())]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// How long it was given.
        limit: Duration,
    },
    /// It said no.
    #[error("the sheave daemon says: {0}")]
    Refused(String),
    /// It is no sheave daemon, or a very different version.
    #[error("what answers at {} is not this version of sheave: {reason}", .path.display())]
    Strange {
        /// The socket.
        path: PathBuf,
        /// What was wrong with the answer.
        reason: String,
    },
}

fn connect_help(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "run this command as root",
        _ => {
            "start it: `systemctl start sheave`, or `sheave run --config FILE`; \
             --socket names another daemon's socket"
        }
    }
}

impl ClientError {
    /// Whether there is no daemon at all.
    pub fn is_no_daemon(&self) -> bool {
        matches!(self, Self::NoDaemon { reason, .. }
            if matches!(reason.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused))
    }
}

/// Asks the daemon whose socket is at `path`, each question on its own connection.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
    limit: Duration,
}

impl Client {
    /// Each answer must be complete within `limit`.
    pub fn new(path: &Path, limit: Duration) -> Self {
        Self { path: path.to_owned(), limit }
    }

    /// `GET /v1/status`
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.ask(Method::GET, "/v1/status").await
    }

    /// `GET /v1/alive`
    pub async fn alive(&self) -> Result<Alive, ClientError> {
        self.ask(Method::GET, "/v1/alive").await
    }

    /// `POST /v1/unload`
    pub async fn unload(&self) -> Result<Unloaded, ClientError> {
        self.ask(Method::POST, "/v1/unload").await
    }

    async fn ask<T: DeserializeOwned>(&self, method: Method, uri: &str) -> Result<T, ClientError> {
        let (path, limit) = (self.path.clone(), self.limit);
        timeout(limit, self.exchange(method, uri)).await.unwrap_or(Err(ClientError::Timeout { path, limit }))
    }

    async fn exchange<T: DeserializeOwned>(&self, method: Method, uri: &str) -> Result<T, ClientError> {
        let stream = UnixStream::connect(&self.path)
            .await
            .map_err(|reason| ClientError::NoDaemon { path: self.path.clone(), reason })?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.strange(error))?;
        let request = hyper::Request::builder()
            .method(method)
            .uri(uri)
            .header(hyper::header::HOST, "sheave")
            .body(Empty::<Bytes>::new())
            .map_err(|error| self.strange(error))?;
        let exchange = async move {
            let response = sender.send_request(request).await.map_err(|error| self.strange(error))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), ANSWER_SIZE_MAX).collect().await;
            Ok((status, body.map_err(|error| self.strange(error))?.to_bytes()))
        };
        // The connection moves the bytes of the exchange; its own errors reach the exchange as well.
        let (_, answer) = tokio::join!(connection, exchange);
        let (status, body) = answer?;
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|error| self.strange(error));
        }
        match serde_json::from_slice::<Failure>(&body) {
            Ok(failure) => Err(ClientError::Refused(failure.error)),
            Err(_) => Err(self.strange(format!("HTTP status {status}"))),
        }
    }

    fn strange(&self, reason: impl ToString) -> ClientError {
        ClientError::Strange { path: self.path.clone(), reason: reason.to_string() }
    }
}
