//! Requests on the admin socket, turned into questions to the controller.

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Response, StatusCode,
    body::Incoming,
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc, oneshot},
    time::timeout,
};

use super::{
    AdminListener,
    status::{Alive, Failure, Status, Unloaded},
};

/// A question to the controller, with the place for its answer.
///
/// A dropped sender means that there is no answer, which the client is told.
#[derive(Debug)]
pub enum Request {
    /// `GET /v1/status`
    Status(oneshot::Sender<Status>),
    /// `GET /v1/alive`
    Alive(oneshot::Sender<Alive>),
    /// `POST /v1/unload`; an error is one sentence for the operator.
    Unload(oneshot::Sender<Result<Unloaded, String>>),
}

/// Clients served at once; more wait in the kernel's backlog.
const CONNECTIONS_MAX: usize = 32;
/// From the first byte to the end of the headers. Nobody types requests here.
const HEADERS_TIMEOUT: Duration = Duration::from_secs(2);
/// Of a request's headers. Bodies are not read.
const REQUEST_SIZE_MAX: usize = 16 * 1024;
/// For the controller's answer. It never does more than look into memory.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// `sheave alive` gives up after one second: the answer "the daemon hangs" must come before that.
const ALIVE_TIMEOUT: Duration = Duration::from_millis(700);
/// Unloading waits for the kernel.
const UNLOAD_TIMEOUT: Duration = Duration::from_secs(20);
/// A connection altogether, the client reading the answer included.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(25);
/// After `accept` failed, which it does while descriptors are short.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

impl AdminListener {
    /// Answers clients until `controller` is closed. Needs a tokio runtime. The socket's file is removed at the end,
    /// also when the future is dropped.
    pub async fn serve(self, controller: mpsc::Sender<Request>) -> io::Result<()> {
        let Self { socket, file: _file } = self;
        let listener = UnixListener::from_std(socket.into())?;
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let accepted = tokio::select! {
                () = controller.closed() => return Ok(()),
                accepted = accept(&listener, &places) => accepted,
            };
            match accepted {
                Ok((stream, place)) => {
                    let controller = controller.clone();
                    tokio::spawn(async move {
                        let _ = timeout(CONNECTION_TIMEOUT, serve_one(stream, controller)).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!("cannot accept a client on the admin socket: {error}");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }
}

async fn accept(
    listener: &UnixListener,
    places: &Arc<Semaphore>,
) -> io::Result<(UnixStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, place))
}

async fn serve_one(stream: UnixStream, controller: mpsc::Sender<Request>) {
    let service = service_fn(|request| answer(request, &controller));
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS_TIMEOUT)
        .max_buf_size(REQUEST_SIZE_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!("a client of the admin socket: {error}");
    }
}

async fn answer(
    request: hyper::Request<Incoming>,
    controller: &mpsc::Sender<Request>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (path, method) = (request.uri().path(), request.method());
    Ok(match (path, method) {
        ("/v1/status", &Method::GET) => match ask(controller, Request::Status, ANSWER_TIMEOUT).await {
            Ok(status) => json(StatusCode::OK, &status),
            Err(silence) => unavailable(silence),
        },
        ("/v1/alive", &Method::GET) => {
            let answer = ask(controller, Request::Alive, ALIVE_TIMEOUT).await;
            let not_alive = |silence: &str| Alive { alive: false, reasons: vec![silence.to_owned()] };
            json(StatusCode::OK, &answer.unwrap_or_else(not_alive))
        }
        ("/v1/unload", &Method::POST) => match ask(controller, Request::Unload, UNLOAD_TIMEOUT).await {
            Ok(Ok(unloaded)) => json(StatusCode::OK, &unloaded),
            Ok(Err(error)) => failure(StatusCode::INTERNAL_SERVER_ERROR, &error),
            Err(silence) => unavailable(silence),
        },
        ("/v1/status" | "/v1/alive", _) => wrong_method("GET"),
        ("/v1/unload", _) => wrong_method("POST"),
        _ => failure(StatusCode::NOT_FOUND, "there is GET /v1/status, GET /v1/alive and POST /v1/unload"),
    })
}

/// Asks the controller; the error says that it did not answer.
async fn ask<T>(
    controller: &mpsc::Sender<Request>,
    question: impl FnOnce(oneshot::Sender<T>) -> Request,
    limit: Duration,
) -> Result<T, &'static str> {
    let (sender, receiver) = oneshot::channel();
    let exchange = async {
        controller.send(question(sender)).await.map_err(|_| "the daemon is stopping")?;
        receiver.await.map_err(|_| "the daemon is stopping")
    };
    timeout(limit, exchange).await.unwrap_or(Err("the daemon hangs: its controller did not answer in time"))
}

fn unavailable(silence: &str) -> Response<Full<Bytes>> {
    failure(StatusCode::SERVICE_UNAVAILABLE, silence)
}

fn wrong_method(allowed: &'static str) -> Response<Full<Bytes>> {
    let mut response = failure(StatusCode::METHOD_NOT_ALLOWED, &format!("use {allowed} here"));
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    response
}

fn failure(status: StatusCode, error: &str) -> Response<Full<Bytes>> {
    json(status, &Failure { error: error.to_owned() })
}

fn json(status: StatusCode, body: &impl Serialize) -> Response<Full<Bytes>> {
    let (status, text) = match serde_json::to_vec(body) {
        Ok(text) => (status, text),
        // Our own types have string keys only, which is all that can go wrong.
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string().into_bytes()),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
