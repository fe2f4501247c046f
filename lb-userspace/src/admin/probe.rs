//! `GET /probe/<service>/<backend|self>/<livez|readyz>` over TCP: what an apiserver answers to the check's credential,
//! for those who have none. With anonymous auth off that is a kubelet's own liveness probe, and any monitor.
//!
//! Nothing else is answered here, and every client that can reach the address may ask. A backend is asked about a path
//! once a second at most. An answer that is fresh costs the client nothing; places and questions are counted per client
//! ([`limits`]), so that none starves another.

mod limits;

use std::{
    convert::Infallible,
    io,
    net::{SocketAddr, TcpListener as StdListener},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Response, StatusCode,
    body::Incoming,
    header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, RETRY_AFTER, X_CONTENT_TYPE_OPTIONS},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Mutex, watch},
    time::{Instant, timeout},
};

use super::{ACCEPT_RETRY, http};
use crate::health::{Asker, CheckCode};
use limits::{Client, Place, Places, Rates};

/// What may be asked for.
const PATHS: [&str; 2] = ["livez", "readyz"];
/// The name of the backend that is this host.
const OWN: &str = "self";
/// An answer is given again for so long.
const FRESH: Duration = Duration::from_secs(1);
/// Of a request's headers. Bodies are not read.
const REQUEST_SIZE_MAX: usize = 8 * 1024;
/// A connection altogether, above what the longest sensible check takes.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(20);

/// A backend that may be asked about.
#[derive(Debug)]
pub struct ProbeTarget {
    service: String,
    backend: String,
    local: bool,
    /// None: its check speaks no HTTP.
    asker: Option<Asker>,
    /// The last answer for each of [`PATHS`], held while a new one is fetched.
    answers: [Mutex<Option<(Instant, Told)>>; PATHS.len()],
}

/// What a client is told.
#[derive(Clone, Debug)]
struct Told {
    status: StatusCode,
    body: Bytes,
}

impl ProbeTarget {
    /// `local`: it is this host, so `self` means it too.
    pub fn new(service: &str, backend: &str, local: bool, asker: Option<Asker>) -> Self {
        Self {
            service: service.to_owned(),
            backend: backend.to_owned(),
            local,
            asker,
            answers: Default::default(),
        }
    }

    fn is(&self, service: &str, backend: &str) -> bool {
        self.service == service && (self.backend == backend || backend == OWN && self.local)
    }

    /// The last answer, if it is fresh enough. None also while a new one is fetched.
    fn fresh_answer(&self, path: usize) -> Option<Told> {
        fresh(&*self.answers[path].try_lock().ok()?)
    }

    /// An answer that is fresh enough. The first request fetches it for all that wait.
    async fn answer(&self, path: usize) -> Told {
        let mut last = self.answers[path].lock().await;
        if let Some(told) = fresh(&last) {
            return told;
        }
        let told = self.ask(PATHS[path]).await;
        *last = Some((Instant::now(), told.clone()));
        told
    }

    async fn ask(&self, path: &str) -> Told {
        let Some(asker) = &self.asker else {
            return Told::new(StatusCode::NOT_FOUND, "the check of this service speaks no HTTP\n");
        };
        match asker.get(&format!("/{path}")).await {
            Ok(answer) => match StatusCode::from_u16(answer.status) {
                // Elsewhere is not here: a kubelet takes a 302 for health.
                Ok(status) if !status.is_redirection() && !status.is_informational() => {
                    Told { status, body: answer.body.into() }
                }
                _ => Told::new(StatusCode::BAD_GATEWAY, &format!("the backend answered {}\n", answer.status)),
            },
            Err(report) => {
                let late = matches!(report.code, CheckCode::L4Tout | CheckCode::L6Tout | CheckCode::L7Tout);
                let status = if late { StatusCode::GATEWAY_TIMEOUT } else { StatusCode::BAD_GATEWAY };
                Told::new(status, &format!("{} {}\n", report.code, report.detail()))
            }
        }
    }
}

fn fresh(last: &Option<(Instant, Told)>) -> Option<Told> {
    let (when, told) = last.as_ref()?;
    (when.elapsed() < FRESH).then(|| told.clone())
}

impl Told {
    fn new(status: StatusCode, text: &str) -> Self {
        Self { status, body: Bytes::from(text.to_owned()) }
    }
}

/// The backends as they are now; send others when they change.
pub type ProbeTargets = watch::Receiver<Vec<Arc<ProbeTarget>>>;

/// A bound `admin.listen`.
#[derive(Debug)]
pub struct ProbeListener(StdListener);

impl ProbeListener {
    /// Binds the address. Nobody is answered until [`Self::serve`].
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let listener = StdListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(Self(listener))
    }

    /// Where it listens.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    /// Answers until the future is dropped. Needs a tokio runtime.
    pub async fn serve(self, targets: ProbeTargets) -> io::Result<()> {
        let listener = TcpListener::from_std(self.0)?;
        let (places, rates) = (Arc::new(Places::default()), Arc::new(Rates::default()));
        loop {
            // Accepted at once, whatever is open already: the kernel's queue is one for all clients.
            match listener.accept().await {
                Ok((stream, peer)) => admit(stream, peer, &targets, &places, &rates),
                Err(error) => {
                    tracing::warn!("cannot accept a client on admin.listen: {error}");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }
}

/// Serves a connection in a task of its own, or closes it if there is no place for its client.
fn admit(
    stream: TcpStream,
    peer: SocketAddr,
    targets: &ProbeTargets,
    places: &Arc<Places>,
    rates: &Arc<Rates>,
) {
    // It has gone already.
    let Ok(ours) = stream.local_addr() else { return };
    let client = Client::of(peer, ours);
    let Some((place, must_end)) = places.enter(client) else {
        tracing::debug!("closed a connection to admin.listen: {} has all places it may have", peer.ip());
        return;
    };
    let (targets, rates) = (targets.clone(), Arc::clone(rates));
    tokio::spawn(async move {
        let served = timeout(CONNECTION_TIMEOUT, serve_one(stream, &place, client, &targets, &rates));
        tokio::select! {
            _ = served => {}
            _ = must_end => {}
        }
    });
}

async fn serve_one(stream: TcpStream, place: &Place, client: Client, targets: &ProbeTargets, rates: &Rates) {
    let service = service_fn(|request| {
        place.asks();
        respond(request, client, targets, rates)
    });
    let served = http(REQUEST_SIZE_MAX).serve_connection(TokioIo::new(stream), service).await;
    if let Err(error) = served {
        tracing::debug!("a client of admin.listen: {error}");
    }
}

async fn respond(
    request: hyper::Request<Incoming>,
    client: Client,
    targets: &ProbeTargets,
    rates: &Rates,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (target, path) = match route(&request, targets) {
        Ok(found) => found,
        Err(told) => return Ok(response(told)),
    };
    // Before the client's bucket: an answer that is here costs nothing.
    if let Some(told) = target.fresh_answer(path) {
        return Ok(response(told));
    }
    if !rates.take(client) {
        let mut refusal = response(Told::new(StatusCode::TOO_MANY_REQUESTS, "too many probes\n"));
        refusal.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        return Ok(refusal);
    }
    // In a task of its own: clients that hang up must not make a backend be asked more often.
    let asked = tokio::spawn(async move { target.answer(path).await }).await;
    Ok(response(asked.unwrap_or_else(|_| Told::new(StatusCode::INTERNAL_SERVER_ERROR, ""))))
}

/// Which backend is asked about, and which of [`PATHS`].
fn route(
    request: &hyper::Request<Incoming>,
    targets: &ProbeTargets,
) -> Result<(Arc<ProbeTarget>, usize), Told> {
    const USAGE: &str = "there is GET /probe/SERVICE/BACKEND/livez and .../readyz; BACKEND may be self\n";
    let not_found = |text: &str| Told::new(StatusCode::NOT_FOUND, text);
    let mut parts = request.uri().path().split('/').map(unescape);
    let (
        Some(Some(root)),
        Some(Some(probe)),
        Some(Some(service)),
        Some(Some(backend)),
        Some(Some(path)),
        None,
    ) = (parts.next(), parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(not_found(USAGE));
    };
    let path = PATHS.iter().position(|known| *known == path);
    let (Some(path), true) = (path, root.is_empty() && probe == "probe" && request.uri().query().is_none())
    else {
        return Err(not_found(USAGE));
    };
    if request.method() != Method::GET {
        return Err(Told::new(StatusCode::METHOD_NOT_ALLOWED, "use GET here\n"));
    }
    let targets = targets.borrow();
    match targets.iter().find(|target| target.is(&service, &backend)) {
        Some(target) => Ok((Arc::clone(target), path)),
        None if backend == OWN && targets.iter().any(|target| target.service == service) => {
            Err(not_found("no backend of this service is this host\n"))
        }
        None => Err(not_found("no such service or backend: `sheave status` shows them\n")),
    }
}

/// A segment of a path without its percent signs (RFC 3986, 2.1). None when they are wrong.
fn unescape(segment: &str) -> Option<String> {
    let mut bytes = segment.bytes();
    let mut plain = Vec::with_capacity(segment.len());
    while let Some(byte) = bytes.next() {
        plain.push(match byte {
            b'%' => {
                let digits = [bytes.next()?, bytes.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            other => other,
        });
    }
    String::from_utf8(plain).ok()
}

fn response(told: Told) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(told.body));
    *response.status_mut() = told.status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if told.status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(ALLOW, HeaderValue::from_static("GET"));
    }
    response
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::config::{Check, CheckKind};

    /// A server in the clear that answers every request with `reply` and counts them.
    async fn backend(reply: &'static str) -> (SocketAddr, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let count = Arc::new(AtomicUsize::new(0));
        let asked = Arc::clone(&count);
        tokio::spawn(async move {
            loop {
                let (mut tcp, _) = listener.accept().await.unwrap();
                let mut request = [0; 4096];
                let _ = tcp.read(&mut request).await;
                asked.fetch_add(1, Ordering::Relaxed);
                let _ = tcp.write_all(reply.as_bytes()).await;
            }
        });
        (address, count)
    }

    fn target(name: &str, address: SocketAddr, local: bool) -> Arc<ProbeTarget> {
        let check = Check { kind: CheckKind::Http, ..Check::default() };
        Arc::new(ProbeTarget::new("api", name, local, Some(Asker::new(address, None, &check))))
    }

    /// A probe listener for these targets, and what keeps them.
    fn listen(targets: Vec<Arc<ProbeTarget>>) -> (SocketAddr, watch::Sender<Vec<Arc<ProbeTarget>>>) {
        let listener = ProbeListener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.address().unwrap();
        let (sender, receiver) = watch::channel(targets);
        tokio::spawn(listener.serve(receiver));
        (address, sender)
    }

    /// Status and body of what comes back for these bytes.
    async fn send(address: SocketAddr, request: &str) -> (u16, String) {
        let mut tcp = TcpStream::connect(address).await.unwrap();
        tcp.write_all(request.as_bytes()).await.unwrap();
        let mut reply = String::new();
        tcp.read_to_string(&mut reply).await.unwrap();
        let (head, body) = reply.split_once("\r\n\r\n").unwrap_or((&reply, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_default();
        (status, body.to_owned())
    }

    async fn get(address: SocketAddr, path: &str) -> (u16, String) {
        send(address, &format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n")).await
    }

    const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

    #[tokio::test]
    async fn a_backend_answers_through_us_by_its_name_and_as_self() {
        let (here, _) = backend(OK).await;
        let (ill, _) = backend("HTTP/1.1 500 Oh\r\nContent-Length: 4\r\n\r\n[-]x").await;
        let (address, targets) =
            listen(vec![target("10.0.0.1:6443", ill, false), target("here", here, true)]);
        assert_eq!(get(address, "/probe/api/here/readyz").await, (200, "ok".to_owned()));
        assert_eq!(get(address, "/probe/api/self/livez").await, (200, "ok".to_owned()));
        assert_eq!(get(address, "/probe/api/10.0.0.1%3A6443/livez").await, (500, "[-]x".to_owned()));
        targets.send_replace(vec![target("here", ill, false)]);
        assert_eq!(get(address, "/probe/api/here/readyz").await.0, 500, "a reload changes who is meant");
        assert_eq!(get(address, "/probe/api/self/readyz").await.0, 404);
    }

    #[tokio::test]
    async fn nothing_else_is_to_be_had() {
        let (here, count) = backend(OK).await;
        let (address, _targets) = listen(vec![target("here", here, true)]);
        for path in [
            "/",
            "/probe",
            "/probe/api/here",
            "/probe/api/here/metrics",
            "/probe/api/here/readyz/etcd",
            "/probe/api/here/readyz?verbose",
            "/probe/api/other/readyz",
            "/probe/other/self/readyz",
            "/probe/api/here/../../api",
            "/probe/api/%zz/readyz",
            "/probe/api/here/%72eadyz%2f..",
        ] {
            assert_eq!(get(address, path).await.0, 404, "{path}");
        }
        let posted =
            send(address, "POST /probe/api/here/readyz HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n");
        assert_eq!(posted.await.0, 405);
        let huge = format!("GET /probe/api/here/readyz HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(20_000));
        let mut tcp = TcpStream::connect(address).await.unwrap();
        let _ = tcp.write_all(huge.as_bytes()).await;
        let mut reply = Vec::new();
        let _ = tcp.read_to_end(&mut reply).await;
        assert!(!reply.starts_with(b"HTTP/1.1 200"));
        assert_eq!(count.load(Ordering::Relaxed), 0, "the backend heard nothing of it");
    }

    #[tokio::test(start_paused = true)]
    async fn a_backend_is_asked_once_a_second_however_many_ask_us() {
        let (here, count) = backend(OK).await;
        let target = target("here", here, true);
        let crowd = futures_util::future::join_all((0..50).map(|_| target.answer(0))).await;
        assert!(crowd.iter().all(|told| told.status == StatusCode::OK));
        assert_eq!(count.load(Ordering::Relaxed), 1);
        tokio::time::advance(FRESH).await;
        target.answer(0).await;
        assert_eq!(count.load(Ordering::Relaxed), 2);
        target.answer(1).await;
        assert_eq!(count.load(Ordering::Relaxed), 3, "the other path is another answer");
    }

    #[tokio::test]
    async fn no_answer_is_said_with_the_checks_own_words() {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let closed = socket.local_addr().unwrap();
        let (elsewhere, _) =
            backend("HTTP/1.1 302 Found\r\nLocation: /login\r\nContent-Length: 0\r\n\r\n").await;
        let mute = Arc::new(ProbeTarget::new("api", "mute", false, None));
        let (address, _targets) =
            listen(vec![target("closed", closed, false), target("elsewhere", elsewhere, false), mute]);
        let (status, body) = get(address, "/probe/api/closed/readyz").await;
        assert_eq!((status, body.as_str()), (502, "L4CON Layer4 connection problem: Connection refused\n"));
        assert_eq!(get(address, "/probe/api/elsewhere/readyz").await.0, 502);
        assert_eq!(get(address, "/probe/api/mute/readyz").await.0, 404);
    }

    /// A connection to the listener from another address of the loopback interface.
    async fn connect_from(source: &str, address: SocketAddr) -> TcpStream {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::new(source.parse().unwrap(), 0)).unwrap();
        socket.connect(address).await.unwrap()
    }

    /// The status of the answer; 0: the connection was closed without one.
    async fn get_from(source: &str, address: SocketAddr, path: &str) -> u16 {
        let mut tcp = connect_from(source, address).await;
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n");
        let _ = tcp.write_all(request.as_bytes()).await;
        let mut reply = String::new();
        let _ = tcp.read_to_string(&mut reply).await;
        reply.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_default()
    }

    const PROBE: &str = "/probe/api/self/livez";

    #[tokio::test]
    async fn a_client_that_asks_all_the_time_takes_no_answer_from_another() {
        let (here, count) = backend(OK).await;
        let (address, _targets) = listen(vec![target("here", here, true)]);
        let flood = async {
            let mut passed = 0;
            for _ in 0..50 {
                let asked = (0..20).map(|_| get_from("127.0.0.2", address, PROBE));
                let answers = futures_util::future::join_all(asked).await;
                passed += answers.iter().filter(|status| **status == 200).count();
            }
            passed
        };
        let prober = async {
            let mut answers = Vec::new();
            for _ in 0..100 {
                answers.push(get_from("127.0.0.3", address, PROBE).await);
            }
            answers
        };
        let (passed, answers) = tokio::join!(flood, prober);
        assert_eq!(answers, [200; 100]);
        // More than all the tokens there are: nearly all of them are answered from memory.
        assert!(passed > 500, "{passed} of 1000");
        assert!(count.load(Ordering::Relaxed) < 30, "the backend was asked {count:?} times");
    }

    #[tokio::test]
    async fn questions_that_need_the_backend_are_counted_by_client() {
        // Each is asked about once: no answer is fresh.
        let (here, _) = backend(OK).await;
        let targets: Vec<_> = (0..1000).map(|number| target(&number.to_string(), here, false)).collect();
        let (address, _targets) = listen(targets);
        let mut statuses = Vec::new();
        while statuses.last() != Some(&429) {
            assert!(statuses.len() < 1000, "none of 1000 was refused");
            let path = format!("/probe/api/{}/livez", statuses.len());
            statuses.push(get_from("127.0.0.2", address, &path).await);
        }
        assert!(statuses.len() > 100, "refused after {}", statuses.len());
        assert_eq!(get_from("127.0.0.3", address, "/probe/api/0/readyz").await, 200);
    }

    #[tokio::test]
    async fn silent_connections_take_no_place_from_another_client() {
        let (here, _) = backend(OK).await;
        let (address, _targets) = listen(vec![target("here", here, true)]);
        let mut silent = Vec::new();
        for number in 0..900 {
            silent.push(connect_from("127.0.0.2", address).await);
            if number % 100 == 0 {
                let asked = get_from("127.0.0.3", address, PROBE);
                let status = timeout(Duration::from_secs(1), asked).await;
                assert_eq!(status, Ok(200), "after {number} silent connections");
            }
        }
        let asked = timeout(Duration::from_secs(1), get_from("127.0.0.2", address, PROBE)).await;
        assert_eq!(asked, Ok(200), "the same client's oldest makes room");
    }

    #[tokio::test]
    async fn a_connection_that_says_nothing_is_closed() {
        let (here, _) = backend(OK).await;
        let (address, _targets) = listen(vec![target("here", here, true)]);
        for beginning in ["", "GET /probe/api/self/livez HTTP/1.1\r\nHo"] {
            let mut tcp = connect_from("127.0.0.2", address).await;
            tcp.write_all(beginning.as_bytes()).await.unwrap();
            let mut reply = Vec::new();
            let closed = timeout(Duration::from_secs(5), tcp.read_to_end(&mut reply)).await;
            assert!(closed.is_ok(), "{beginning:?} is still open after 5 s");
        }
    }
}
