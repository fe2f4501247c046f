//! Requests on the admin socket, turned into questions to the controller.

use std::{
    convert::Infallible,
    fmt, io,
    os::fd::AsFd as _,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt as _, Full, Limited, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Method, Response, StatusCode,
    body::{Frame, Incoming},
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc, oneshot},
    time::{Instant, sleep_until, timeout},
};

use super::{
    ACCEPT_RETRY, AdminListener, CONNECTIONS_MAX,
    commands::{
        Events, FlowFilter, FlowPage, KillOrder, Killed, Ordered, Refusal, RefusalKind, Reloaded, StateOrder,
        WeightOrder,
    },
    http, query,
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
    /// `POST /v1/reload`
    Reload(Caller, oneshot::Sender<Result<Reloaded, Refusal>>),
    /// `POST /v1/backends/state`
    SetState(StateOrder, Caller, oneshot::Sender<Result<Ordered, Refusal>>),
    /// `POST /v1/backends/weight`
    SetWeight(WeightOrder, Caller, oneshot::Sender<Result<Ordered, Refusal>>),
    /// `GET /v1/flows`, a page at a time: the number is 0 at first, then [`FlowPage::next`].
    Flows(FlowFilter, u64, oneshot::Sender<Result<FlowPage, Refusal>>),
    /// `POST /v1/flows/kill`
    Kill(KillOrder, Caller, oneshot::Sender<Result<Killed, Refusal>>),
    /// `GET /v1/events`
    Events(oneshot::Sender<Events>),
}

/// Who sent a request, as the kernel says: for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// User id; None: the kernel did not say.
    pub user: Option<u32>,
}

impl fmt::Display for Caller {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.user {
            Some(0) => out.write_str("root"),
            Some(user) => write!(out, "user {user}"),
            None => out.write_str("somebody"),
        }
    }
}

/// For the body of a request.
const BODY_TIMEOUT: Duration = Duration::from_secs(2);
/// Of a request's headers.
const REQUEST_SIZE_MAX: usize = 16 * 1024;
/// Of a request's body: an order is a few words.
const BODY_SIZE_MAX: usize = 16 * 1024;
/// For the controller's answer. It never does more than look into memory, and write a line to the disk.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// `sheave alive` gives up after one second: the answer "the daemon hangs" must come before that.
const ALIVE_TIMEOUT: Duration = Duration::from_millis(700);
/// Reloading waits for the first checks of new backends.
const RELOAD_TIMEOUT: Duration = Duration::from_secs(20);
/// Resetting flows goes on in batches until all are done.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);
/// Unloading waits for the kernel.
const UNLOAD_TIMEOUT: Duration = Duration::from_secs(20);
/// A connection altogether, the client reading the answer included; in a list of flows from one page to the next.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(25);

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
                        let patience = Patience::begin();
                        tokio::select! {
                            () = serve_one(stream, controller, &patience) => {}
                            () = patience.ends() => {}
                        }
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

/// Until when a connection may take.
#[derive(Clone, Debug)]
struct Patience(Arc<Mutex<Instant>>);

impl Patience {
    fn begin() -> Self {
        Self(Arc::new(Mutex::new(Instant::now() + CONNECTION_TIMEOUT)))
    }

    /// The client has taken what it was given.
    fn renew(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now() + CONNECTION_TIMEOUT;
    }

    async fn ends(&self) {
        loop {
            let deadline = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if Instant::now() >= deadline {
                return;
            }
            sleep_until(deadline).await;
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

async fn serve_one(stream: UnixStream, controller: mpsc::Sender<Request>, patience: &Patience) {
    let caller = Caller { user: getsockopt(&stream.as_fd(), PeerCredentials).ok().map(|it| it.uid()) };
    let service = service_fn(|request| answer(request, &controller, caller, patience));
    let served = http(REQUEST_SIZE_MAX).serve_connection(TokioIo::new(stream), service).await;
    if let Err(error) = served {
        tracing::debug!("a client of the admin socket: {error}");
    }
}

type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

async fn answer(
    request: hyper::Request<Incoming>,
    controller: &mpsc::Sender<Request>,
    caller: Caller,
    patience: &Patience,
) -> Result<Answer, Infallible> {
    let (head, body) = request.into_parts();
    Ok(match (head.uri.path(), &head.method) {
        ("/v1/status", &Method::GET) => plain(ask(controller, Request::Status, ANSWER_TIMEOUT).await),
        ("/v1/alive", &Method::GET) => {
            let answer = ask(controller, Request::Alive, ALIVE_TIMEOUT).await;
            let not_alive = |silence: &str| Alive { alive: false, reasons: vec![silence.to_owned()] };
            json(StatusCode::OK, &answer.unwrap_or_else(not_alive))
        }
        ("/v1/unload", &Method::POST) => match ask(controller, Request::Unload, UNLOAD_TIMEOUT).await {
            Ok(Ok(unloaded)) => json(StatusCode::OK, &unloaded),
            Ok(Err(error)) => refused(&Refusal::new(RefusalKind::Failed, error)),
            Err(silence) => unavailable(silence),
        },
        ("/v1/reload", &Method::POST) => {
            let question = |answer| Request::Reload(caller, answer);
            decided(ask(controller, question, RELOAD_TIMEOUT).await)
        }
        ("/v1/backends/state", &Method::POST) => match read(body).await {
            Ok(order) => {
                let question = |answer| Request::SetState(order, caller, answer);
                decided(ask(controller, question, ANSWER_TIMEOUT).await)
            }
            Err((status, error)) => failure(status, RefusalKind::Usage, &error),
        },
        ("/v1/backends/weight", &Method::POST) => match read(body).await {
            Ok(order) => {
                let question = |answer| Request::SetWeight(order, caller, answer);
                decided(ask(controller, question, ANSWER_TIMEOUT).await)
            }
            Err((status, error)) => failure(status, RefusalKind::Usage, &error),
        },
        ("/v1/flows/kill", &Method::POST) => match read(body).await {
            Ok(order) => {
                let question = |answer| Request::Kill(order, caller, answer);
                decided(ask(controller, question, KILL_TIMEOUT).await)
            }
            Err((status, error)) => failure(status, RefusalKind::Usage, &error),
        },
        ("/v1/flows", &Method::GET) => match query::flows(head.uri.query().unwrap_or_default()) {
            Ok(filter) => flows(filter, controller.clone(), patience.clone()).await,
            Err(error) => refused(&Refusal::new(RefusalKind::Usage, error)),
        },
        ("/v1/events", &Method::GET) => plain(ask(controller, Request::Events, ANSWER_TIMEOUT).await),
        ("/v1/status" | "/v1/alive" | "/v1/flows" | "/v1/events", _) => wrong_method("GET"),
        (
            "/v1/unload" | "/v1/reload" | "/v1/backends/state" | "/v1/backends/weight" | "/v1/flows/kill",
            _,
        ) => wrong_method("POST"),
        _ => failure(
            StatusCode::NOT_FOUND,
            RefusalKind::Usage,
            "there is GET /v1/status, /v1/alive, /v1/flows and /v1/events, and POST /v1/reload, \
             /v1/backends/state, /v1/backends/weight, /v1/flows/kill and /v1/unload",
        ),
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

/// Reads an order, or says what is wrong with it.
async fn read<T: DeserializeOwned>(body: Incoming) -> Result<T, (StatusCode, String)> {
    let collected = match timeout(BODY_TIMEOUT, Limited::new(body, BODY_SIZE_MAX).collect()).await {
        Ok(Ok(collected)) => collected.to_bytes(),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            return Err((StatusCode::PAYLOAD_TOO_LARGE, "an order is at most 16 KiB of JSON".to_owned()));
        }
        Ok(Err(error)) => {
            return Err((StatusCode::BAD_REQUEST, format!("the body cannot be read: {error}")));
        }
        Err(_) => return Err((StatusCode::REQUEST_TIMEOUT, "the body did not come within 2 s".to_owned())),
    };
    serde_json::from_slice(&collected).map_err(|error| {
        (StatusCode::BAD_REQUEST, format!("the body is not the JSON that is expected: {error}"))
    })
}

/// The flows as JSON lines, a page at a time, no faster than the client reads. What goes wrong after the first page is
/// told in a last line.
async fn flows(filter: FlowFilter, controller: mpsc::Sender<Request>, patience: Patience) -> Answer {
    let first = match page(&controller, &filter, 0).await {
        Ok(first) => first,
        Err(Ok(refusal)) => return refused(&refusal),
        Err(Err(silence)) => return unavailable(silence),
    };
    let pages = stream::unfold(Some(Ok(first)), move |state| {
        let (controller, filter, patience) = (controller.clone(), filter.clone(), patience.clone());
        async move {
            let page: FlowPage = match state? {
                Ok(page) => page,
                Err(next) => match self::page(&controller, &filter, next).await {
                    Ok(page) => page,
                    Err(error) => return Some((Ok(Frame::data(last_words(error))), None)),
                },
            };
            patience.renew();
            let mut lines = Vec::new();
            for flow in &page.flows {
                // Our own types have string keys only, which is all that can go wrong.
                let _ = serde_json::to_writer(&mut lines, flow);
                lines.push(b'\n');
            }
            Some((Ok::<_, Infallible>(Frame::data(Bytes::from(lines))), page.next.map(Err)))
        }
    });
    let mut response = Response::new(StreamBody::new(pages).boxed_unsync());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/jsonl"));
    response
}

async fn page(
    controller: &mpsc::Sender<Request>,
    filter: &FlowFilter,
    from: u64,
) -> Result<FlowPage, Result<Refusal, &'static str>> {
    let question = |answer| Request::Flows(filter.clone(), from, answer);
    ask(controller, question, ANSWER_TIMEOUT).await.map_err(Err)?.map_err(Ok)
}

fn last_words(error: Result<Refusal, &'static str>) -> Bytes {
    let failure = match error {
        Ok(refusal) => Failure { error: refusal.error, kind: refusal.kind },
        Err(silence) => Failure { error: silence.to_owned(), kind: RefusalKind::Failed },
    };
    let mut line = serde_json::to_vec(&failure).unwrap_or_default();
    line.push(b'\n');
    line.into()
}

fn plain(answer: Result<impl Serialize, &'static str>) -> Answer {
    match answer {
        Ok(facts) => json(StatusCode::OK, &facts),
        Err(silence) => unavailable(silence),
    }
}

fn decided(answer: Result<Result<impl Serialize, Refusal>, &'static str>) -> Answer {
    match answer {
        Ok(Ok(facts)) => json(StatusCode::OK, &facts),
        Ok(Err(refusal)) => refused(&refusal),
        Err(silence) => unavailable(silence),
    }
}

fn refused(refusal: &Refusal) -> Answer {
    let status = match refusal.kind {
        RefusalKind::Usage => StatusCode::BAD_REQUEST,
        RefusalKind::Configuration => StatusCode::UNPROCESSABLE_ENTITY,
        RefusalKind::Conflict => StatusCode::CONFLICT,
        RefusalKind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
    };
    failure(status, refusal.kind, &refusal.error)
}

fn unavailable(silence: &str) -> Answer {
    failure(StatusCode::SERVICE_UNAVAILABLE, RefusalKind::Failed, silence)
}

fn wrong_method(allowed: &'static str) -> Answer {
    let error = format!("use {allowed} here");
    let mut response = failure(StatusCode::METHOD_NOT_ALLOWED, RefusalKind::Usage, &error);
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    response
}

fn failure(status: StatusCode, kind: RefusalKind, error: &str) -> Answer {
    json(status, &Failure { error: error.to_owned(), kind })
}

fn json(status: StatusCode, body: &impl Serialize) -> Answer {
    let (status, text) = match serde_json::to_vec(body) {
        Ok(text) => (status, text),
        // Our own types have string keys only, which is all that can go wrong.
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string().into_bytes()),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
