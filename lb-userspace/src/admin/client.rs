//! The other end of the admin socket, for the commands.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Response, StatusCode, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::{net::UnixStream, task::JoinSet, time::timeout};

use super::{
    commands::{
        Events, Flow, FlowFilter, KillOrder, Killed, Ordered, Refusal, RefusalKind, Reloaded, StateOrder,
        WeightOrder,
    },
    query,
    status::{Alive, Failure, Status, Unloaded},
};

/// Far above the status of 255 backends.
const ANSWER_SIZE_MAX: usize = 4 << 20;
/// While the daemon has more clients than it takes.
const BUSY_RETRY: Duration = Duration::from_millis(20);
/// Far above one flow's.
const LINE_SIZE_MAX: usize = 64 << 10;

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
    #[error("the sheave daemon says: {}", .0.error)]
    Refused(Refusal),
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

    /// Whether the command or the configuration must be changed, rather than the host.
    pub fn is_mistake(&self) -> bool {
        matches!(self, Self::Refused(refusal)
            if matches!(refusal.kind, RefusalKind::Usage | RefusalKind::Configuration))
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

    /// `POST /v1/reload`
    pub async fn reload(&self) -> Result<Reloaded, ClientError> {
        self.ask(Method::POST, "/v1/reload").await
    }

    /// `POST /v1/backends/state`
    pub async fn set_state(&self, order: &StateOrder) -> Result<Ordered, ClientError> {
        self.tell("/v1/backends/state", order).await
    }

    /// `POST /v1/backends/weight`
    pub async fn set_weight(&self, order: &WeightOrder) -> Result<Ordered, ClientError> {
        self.tell("/v1/backends/weight", order).await
    }

    /// `POST /v1/flows/kill`
    pub async fn kill(&self, order: &KillOrder) -> Result<Killed, ClientError> {
        self.tell("/v1/flows/kill", order).await
    }

    /// `GET /v1/events`
    pub async fn events(&self) -> Result<Events, ClientError> {
        self.ask(Method::GET, "/v1/events").await
    }

    /// `GET /v1/flows`: hands each flow to `each` as it comes, until that says it has enough. A daemon that sends
    /// nothing for as long as one answer may take is given up.
    pub async fn flows(
        &self,
        filter: &FlowFilter,
        mut each: impl FnMut(Flow) -> io::Result<bool>,
    ) -> Result<(), FlowsError> {
        let timed_out = || ClientError::Timeout { path: self.path.clone(), limit: self.limit };
        let (response, connection) =
            timeout(self.limit, self.send(Method::GET, &query::of_flows(filter), Bytes::new()))
                .await
                .unwrap_or_else(|_| Err(timed_out()))?;
        let _connection = connection;
        let mut body = response;
        if !body.status().is_success() {
            let answer = timeout(self.limit, self.read(body)).await.unwrap_or_else(|_| Err(timed_out()))?;
            return Err(self.failure(answer.0, &answer.1).into());
        }
        let mut rest = Vec::new();
        loop {
            let frame = timeout(self.limit, body.body_mut().frame()).await.map_err(|_| timed_out())?;
            let Some(frame) = frame else { break };
            let Ok(data) = frame.map_err(|error| self.strange(error))?.into_data() else { continue };
            rest.extend_from_slice(&data);
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                if !each(self.line(&line)?)? {
                    return Ok(());
                }
            }
            if rest.len() > LINE_SIZE_MAX {
                return Err(self.strange("a line without an end").into());
            }
        }
        if rest.is_empty() {
            Ok(())
        } else {
            Err(self.strange("the list ends in the middle of a line").into())
        }
    }

    fn line(&self, line: &[u8]) -> Result<Flow, ClientError> {
        serde_json::from_slice(line).map_err(|error| match serde_json::from_slice::<Failure>(line) {
            Ok(failure) => ClientError::Refused(Refusal::new(failure.kind, failure.error)),
            Err(_) => self.strange(error),
        })
    }

    async fn tell<T: DeserializeOwned>(
        &self,
        uri: &str,
        order: &impl serde::Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(order).map_err(|error| self.strange(error))?;
        self.within(Method::POST, uri, body.into()).await
    }

    async fn ask<T: DeserializeOwned>(&self, method: Method, uri: &str) -> Result<T, ClientError> {
        self.within(method, uri, Bytes::new()).await
    }

    async fn within<T: DeserializeOwned>(
        &self,
        method: Method,
        uri: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let (path, limit) = (self.path.clone(), self.limit);
        let exchange = self.exchange(method, uri, body);
        timeout(limit, exchange).await.unwrap_or(Err(ClientError::Timeout { path, limit }))
    }

    async fn exchange<T: DeserializeOwned>(
        &self,
        method: Method,
        uri: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let (response, _connection) = self.send(method, uri, body).await?;
        let (status, body) = self.read(response).await?;
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|error| self.strange(error));
        }
        Err(self.failure(status, &body))
    }

    /// Sends a request and waits for the head of the answer. What moves the bytes ends with the second value.
    async fn send(
        &self,
        method: Method,
        uri: &str,
        body: Bytes,
    ) -> Result<(Response<Incoming>, JoinSet<()>), ClientError> {
        let stream = self.connect().await?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.strange(error))?;
        let mut moving = JoinSet::new();
        // Its own errors reach the exchange as well.
        moving.spawn(async move { drop(connection.await) });
        let request = hyper::Request::builder()
            .method(method)
            .uri(uri)
            .header(hyper::header::HOST, "sheave")
            .body(Full::new(body))
            .map_err(|error| self.strange(error))?;
        let response = sender.send_request(request).await.map_err(|error| self.strange(error))?;
        Ok((response, moving))
    }

    /// Waits for as long as the daemon has too many clients: whoever calls sets the limit.
    async fn connect(&self) -> Result<UnixStream, ClientError> {
        loop {
            match UnixStream::connect(&self.path).await {
                // A full backlog: a Unix socket does not wait by itself.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    tokio::time::sleep(BUSY_RETRY).await;
                }
                result => {
                    return result
                        .map_err(|reason| ClientError::NoDaemon { path: self.path.clone(), reason });
                }
            }
        }
    }

    async fn read(&self, response: Response<Incoming>) -> Result<(StatusCode, Bytes), ClientError> {
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_SIZE_MAX).collect().await;
        Ok((status, body.map_err(|error| self.strange(error))?.to_bytes()))
    }

    fn failure(&self, status: StatusCode, body: &[u8]) -> ClientError {
        match serde_json::from_slice::<Failure>(body) {
            Ok(failure) => ClientError::Refused(Refusal::new(failure.kind, failure.error)),
            Err(_) => self.strange(format!("HTTP status {status}")),
        }
    }

    fn strange(&self, reason: impl ToString) -> ClientError {
        ClientError::Strange { path: self.path.clone(), reason: reason.to_string() }
    }
}

/// Why a list of flows ended early.
#[derive(Debug, thiserror::Error)]
pub enum FlowsError {
    /// The daemon's part.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Whoever took the flows could not go on.
    #[error(transparent)]
    Output(#[from] io::Error),
}
