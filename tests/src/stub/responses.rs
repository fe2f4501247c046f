//! One request in, one response out.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::atomic::Ordering,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Channel, Full, combinators::BoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Frame, Incoming, SizeHint},
    header::{AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, HeaderValue},
};
use tokio::time::{interval, sleep};

use super::{
    answers::{self, AnonymousMode, Credential, PathKind},
    faults::Health,
    server::{Options, Phase, Server},
    startup::{LAST_HOOK, Stage},
};
use crate::pattern;

/// What a response carries.
pub(super) type Body = BoxBody<Bytes, hyper::Error>;

/// Between two lines of a watch.
const WATCH_INTERVAL: Duration = Duration::from_millis(200);
/// The same, of one that says nothing while anybody is looking.
const SILENCE: Duration = Duration::from_secs(24 * 3600);
/// One etcd check of a health request gives up after this long.
const ETCD_CHECK_TIMEOUT: Duration = Duration::from_secs(2);

/// Who sent a request, by all it presented.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caller {
    credential: Credential,
    anonymous: AnonymousMode,
}

impl Caller {
    /// Any valid credential counts; if none is valid, any presented one makes the caller invalid.
    pub(super) fn new(
        options: &Options,
        certificate: Option<Credential>,
        request: &Request<Incoming>,
    ) -> Self {
        let token = request.headers().get(AUTHORIZATION).map(|header| {
            let presented = header.to_str().ok().and_then(|header| header.strip_prefix("Bearer "));
            if presented.is_some() && presented == options.token.as_deref() {
                Credential::Ordinary
            } else {
                Credential::Invalid
            }
        });
        let presented = [certificate, token].into_iter().flatten();
        let credential = presented
            .reduce(|one, other| if one == Credential::Invalid { other } else { one })
            .unwrap_or(Credential::Anonymous);
        Self { credential, anonymous: options.anonymous }
    }

    pub(super) fn is_authenticated(self) -> bool {
        matches!(self.credential, Credential::Ordinary | Credential::Masters)
    }
}

/// Whether a request asks for health, as load balancers do.
pub(super) fn is_check(request: &Request<Incoming>) -> bool {
    matches!(PathKind::of(request.uri().path()), PathKind::Health | PathKind::SubCheck)
}

/// Answers a request. The paths of the lab's own (`/name`, `/bytes/N`, `/echo`, `/watch`) need no credential.
pub(super) async fn respond(server: &Server, caller: Caller, request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let kind = PathKind::of(&path);
    if *server.stage.borrow() < Stage::BeforeHooks && caller.credential != Credential::Masters {
        return failure(StatusCode::FORBIDDEN, caller, &path);
    }
    if let Some(response) = data(server, &path, request.method()) {
        return response;
    }
    if path == "/echo" {
        return Response::new(request.into_body().boxed());
    }
    if kind == PathKind::Health
        && let Some(response) = ill(server, &path).await
    {
        return response;
    }
    let status = answers::status(request.method(), &path, caller.credential, caller.anonymous);
    let verbose = request.uri().query().is_some_and(|query| query.contains("verbose"));
    match status {
        StatusCode::OK if kind == PathKind::Health && verbose => {
            text(status, answers::checks(path.trim_start_matches('/'), &[]))
        }
        StatusCode::OK if kind == PathKind::Version => {
            json(status, r#"{"major":"1","minor":"36","gitVersion":"v1.36.2"}"#.to_owned())
        }
        StatusCode::OK if path == answers::ENDPOINT_SLICES => {
            let query = request.uri().query().unwrap_or_default();
            server.slices.answer(query).unwrap_or_else(|status| failure(status, caller, &path))
        }
        StatusCode::OK => text(status, "ok".to_owned()),
        _ => failure(status, caller, &path),
    }
}

/// The answer of a health endpoint that does not feel well, after the time it takes.
async fn ill(server: &Server, path: &str) -> Option<Response<Body>> {
    let endpoint = path.trim_start_matches('/');
    let failed = |checks| text(StatusCode::INTERNAL_SERVER_ERROR, answers::checks(endpoint, checks));
    if endpoint == "readyz" && *server.phase.borrow() != Phase::Serving {
        return Some(failed(&["shutdown"]));
    }
    if *server.stage.borrow() != Stage::Started {
        return Some(failed(&[LAST_HOOK]));
    }
    let health = *server.health.borrow();
    match health {
        Health::Normal => None,
        Health::Status(500) => Some(failed(&["informer-sync"])),
        Health::Status(status) => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::IM_A_TEAPOT);
            let stranger = Caller { credential: Credential::Anonymous, anonymous: AnonymousMode::Off };
            Some(if status == StatusCode::OK {
                text(status, "ok".to_owned())
            } else {
                failure(status, stranger, path)
            })
        }
        Health::Late(delay) => {
            sleep(delay).await;
            None
        }
        Health::Never => {
            // Until told otherwise: a request that hangs is answered after all when the server recovers.
            let _ = server.health.subscribe().wait_for(|health| *health != Health::Never).await;
            None
        }
        Health::EtcdHang => {
            let both_checks = server.etcd_checks.fetch_add(1, Ordering::Relaxed).is_multiple_of(2);
            sleep(ETCD_CHECK_TIMEOUT * if both_checks { 2 } else { 1 }).await;
            Some(failed(&["etcd", "etcd-readiness"]))
        }
    }
}

fn failure(status: StatusCode, caller: Caller, path: &str) -> Response<Body> {
    let user = match caller.credential {
        Credential::Anonymous | Credential::Invalid => "system:anonymous",
        Credential::Ordinary => "health",
        Credential::Masters => "admin",
    };
    match status {
        StatusCode::UNAUTHORIZED => json(status, answers::unauthorized()),
        StatusCode::FORBIDDEN => json(status, answers::forbidden(user, path)),
        _ => text(status, status.to_string()),
    }
}

/// The endpoints that tests move data with.
fn data(server: &Server, path: &str, method: &Method) -> Option<Response<Body>> {
    if path == "/name" {
        return Some(text(StatusCode::OK, server.options.name.clone()));
    }
    if path == "/watch" {
        return Some(Response::new(watch(server, WATCH_INTERVAL)));
    }
    if path == "/watch/silent" {
        return Some(Response::new(watch(server, SILENCE)));
    }
    let length = path.strip_prefix("/bytes/")?;
    if method != Method::GET {
        return Some(text(StatusCode::METHOD_NOT_ALLOWED, String::new()));
    }
    Some(match length.parse() {
        Ok(length) => {
            Response::new(PatternBody { position: 0, length }.map_err(|never| match never {}).boxed())
        }
        Err(_) => text(StatusCode::BAD_REQUEST, format!("{length} is no number of bytes\n")),
    })
}

/// A line with the server's name and a number at once and every `pause`, until the client leaves, or the server has
/// closed its port and the time of a request is over.
fn watch(server: &Server, pause: Duration) -> Body {
    let (mut sender, body) = Channel::<Bytes, hyper::Error>::new(1);
    let (name, limit) = (server.options.name.clone(), server.options.request_timeout);
    let mut phase = server.phase.subscribe();
    tokio::spawn(async move {
        let time_is_over = async {
            let _ = phase.wait_for(|phase| *phase == Phase::Closed).await;
            sleep(limit).await;
        };
        tokio::pin!(time_is_over);
        let mut ticks = interval(pause);
        for event in 0_u64.. {
            tokio::select! {
                _ = ticks.tick() => {}
                () = &mut time_is_over => return,
            }
            if sender.send_data(format!("{name} {event}\n").into()).await.is_err() {
                return;
            }
        }
    });
    body.boxed()
}

fn text(status: StatusCode, body: String) -> Response<Body> {
    respond_with(status, "text/plain; charset=utf-8", body)
}

fn json(status: StatusCode, body: String) -> Response<Body> {
    respond_with(status, "application/json", body)
}

fn respond_with(status: StatusCode, content_type: &'static str, body: String) -> Response<Body> {
    let mut response = Response::new(Full::from(body).map_err(|never: Infallible| match never {}).boxed());
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    response
}

/// The first `length` bytes of the pattern.
struct PatternBody {
    position: u64,
    length: u64,
}

impl hyper::body::Body for PatternBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.position == self.length {
            return Poll::Ready(None);
        }
        let piece = pattern::piece(self.position, self.length - self.position);
        self.position += piece.len() as u64;
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.length - self.position)
    }
}
