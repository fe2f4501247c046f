//! The stub apiserver itself: TLS, HTTP/1.1 and HTTP/2, health endpoints, data endpoints, shutdown.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use hyper::{Request, Response, StatusCode, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use rustls::{ServerConfig, server::danger::ClientCertVerifier};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    pin,
    signal::unix::{SignalKind, signal},
    sync::{Notify, watch},
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{
    answers::{self, AnonymousMode},
    credentials,
    faults::{Door, Health, Order},
    responses::{self, Body, Caller},
    shared::Shared,
    slices::Slices,
    startup::{Stage, Startup},
};

/// As `net.core.somaxconn` gives the real server.
const BACKLOG: i32 = 4096;
/// A connection that has not finished its handshake by then is closed.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(32);
/// An idle HTTP/1.1 connection is closed after this long.
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);
/// Streams of one HTTP/2 connection.
const MAX_STREAMS: u32 = 100;
/// Between the last byte sent and the end of the socket.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);
/// Between the order to stop and the closing of the listener, when no delay is configured.
const CLOSING_DELAY: Duration = Duration::from_millis(30);
/// For connections to say good-bye after the last request has ended.
const FAREWELL: Duration = Duration::from_secs(2);

/// What a stub is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// What it answers to `/name`.
    pub name: String,
    /// Where it listens.
    pub listen: SocketAddr,
    /// PEM certificate chain.
    pub certificate: PathBuf,
    /// PEM private key.
    pub key: PathBuf,
    /// PEM certificates of the authority that signs client certificates.
    pub client_ca: PathBuf,
    /// A bearer token that is a user without roles.
    pub token: Option<String>,
    /// What anonymous callers may do.
    pub anonymous: AnonymousMode,
    /// The Unix socket that takes orders.
    pub control: PathBuf,
    /// `--shutdown-delay-duration`.
    pub shutdown_delay: Duration,
    /// `--request-timeout`: how long a watch may go on after the listener has closed.
    pub request_timeout: Duration,
    /// How it comes up.
    pub startup: Startup,
    /// The endpoints of the service `default/kubernetes`.
    pub endpoints: Vec<SocketAddr>,
}

/// How far the shutdown has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Serving,
    /// `/readyz` says 500, everything else works.
    Announced,
    /// Nobody listens; running requests go on.
    Closed,
}

/// What all connections share.
pub(super) struct Server {
    pub(super) options: Options,
    pub(super) health: watch::Sender<Health>,
    pub(super) door: watch::Sender<Door>,
    pub(super) stage: watch::Sender<Stage>,
    pub(super) phase: watch::Sender<Phase>,
    /// Counts health requests while etcd hangs.
    pub(super) etcd_checks: AtomicU64,
    /// Of the namespace `default`.
    pub(super) slices: Slices,
    client_verifier: Arc<dyn ClientCertVerifier>,
    /// Connections that carried anything but health checks, by source.
    connections: Mutex<BTreeMap<IpAddr, u64>>,
    /// Those of them that came before it had started.
    early_connections: AtomicU64,
}

/// Serves until SIGTERM, then shuts down as a kube-apiserver does.
///
/// # Errors
/// When a file cannot be read or an address not be listened on.
pub async fn serve(options: Options) -> Result<()> {
    let client_verifier = credentials::verifier(&options.client_ca)?;
    let config = credentials::server_config(&options.certificate, &options.key, &client_verifier)?;
    let control = UnixListener::bind(&options.control)
        .with_context(|| format!("listening on {}", options.control.display()))?;
    let server = Arc::new(Server {
        options,
        health: watch::Sender::default(),
        door: watch::Sender::default(),
        stage: watch::Sender::new(Stage::TlsSilent),
        phase: watch::Sender::new(Phase::Serving),
        etcd_checks: AtomicU64::new(0),
        slices: Slices::default(),
        client_verifier,
        connections: Mutex::default(),
        early_connections: AtomicU64::new(0),
    });
    server.slices.replace(answers::endpoint_slices(&server.options.endpoints));
    tokio::spawn(take_orders(Arc::clone(&server), control));
    let mut connections = JoinSet::new();
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        result = accept(&server, config, &mut connections) => result?,
        result = come_up(&server) => result?,
        () = async {
            terminate.recv().await;
            server.phase.send_replace(Phase::Announced);
            sleep(server.options.shutdown_delay.max(CLOSING_DELAY)).await;
        } => {}
    }
    // The listener went away with the future that held it.
    server.phase.send_replace(Phase::Closed);
    let limit = server.options.request_timeout + FAREWELL;
    let _ = timeout(limit, async { while connections.join_next().await.is_some() {} }).await;
    Ok(())
}

/// Goes through the stages of the start. Returns only where that fails.
async fn come_up(server: &Server) -> Result<()> {
    let begin = Instant::now();
    for (at, stage) in server.options.startup.stages() {
        sleep_until(begin + at).await;
        server.stage.send_replace(stage);
    }
    match server.options.startup.gives_up() {
        Some(after) => sleep_until(begin + after).await,
        None => std::future::pending().await,
    }
    bail!("etcd cannot be reached: context deadline exceeded")
}

/// Accepts for as long as the door is not closed, listens anew when it opens again.
async fn accept(server: &Arc<Server>, config: ServerConfig, connections: &mut JoinSet<()>) -> Result<()> {
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let mut door = server.door.subscribe();
    loop {
        door.wait_for(|door| *door != Door::Refusing).await?;
        let listener = listen(server.options.listen)?;
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((tcp, peer)) => {
                        connections.spawn(connection(Arc::clone(server), acceptor.clone(), tcp, peer));
                    }
                    // Out of descriptors, or a client that is gone already.
                    Err(error) => {
                        eprintln!("accept: {error}");
                        sleep(Duration::from_millis(10)).await;
                    }
                },
                Some(_) = connections.join_next() => {}
                closed = door.wait_for(|door| *door == Door::Refusing) => {
                    closed?;
                    break;
                }
            }
        }
    }
}

/// An IPv6 wildcard takes IPv4 as well.
fn listen(address: SocketAddr) -> Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.ip() == Ipv6Addr::UNSPECIFIED {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into()).with_context(|| format!("binding {address}"))?;
    socket.listen(BACKLOG)?;
    Ok(TcpListener::from_std(socket.into())?)
}

async fn connection(server: Arc<Server>, acceptor: TlsAcceptor, tcp: TcpStream, peer: SocketAddr) {
    let (mut door, mut stage) = (server.door.subscribe(), server.stage.subscribe());
    if stage.wait_for(|stage| *stage != Stage::TlsSilent).await.is_err()
        || door.wait_for(|door| *door != Door::TlsSilent).await.is_err()
    {
        return;
    }
    let _ = tcp.set_nodelay(true);
    let tcp = Shared::new(tcp);
    let handshake = async {
        if speaks_tls(tcp.tcp()).await {
            acceptor.accept(tcp.clone()).await.ok()
        } else {
            refuse_plain_http(tcp.clone()).await
        }
    };
    let Ok(Some(tls)) = timeout(HANDSHAKE_TIMEOUT, handshake).await else { return };
    serve_connection(server, tls, peer).await;
    linger(tcp).await;
}

async fn serve_connection(server: Arc<Server>, tls: TlsStream<Shared>, peer: SocketAddr) {
    let presented = tls.get_ref().1.peer_certificates().unwrap_or_default();
    let certificate = credentials::of_certificates(&*server.client_verifier, presented);

    let goaway = Arc::new(Notify::new());
    let counted = AtomicBool::new(false);
    let service = service_fn(|request: Request<Incoming>| {
        if !responses::is_check(&request) && !counted.swap(true, Ordering::Relaxed) {
            server.count(peer.ip());
        }
        let caller = Caller::new(&server.options, certificate, &request);
        answer(Arc::clone(&server), caller, request, Arc::clone(&goaway))
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE_TIMEOUT);
    builder.http2().timer(TokioTimer::new()).max_concurrent_streams(MAX_STREAMS);
    let connection = builder.serve_connection(TokioIo::new(tls), service);
    pin!(connection);
    let mut phase = server.phase.subscribe();
    let finished = tokio::select! {
        result = connection.as_mut() => Some(result),
        () = goaway.notified() => None,
        _ = phase.wait_for(|phase| *phase == Phase::Closed) => None,
    };
    // A client that goes away in the middle is no error of ours.
    if finished.is_none() {
        connection.as_mut().graceful_shutdown();
        let _ = connection.await;
    }
}

/// Reads what the client still sends until it closes as well. A socket closed with something unread in it sends a
/// RST, which takes from the client what it has not read yet.
async fn linger(mut tcp: Shared) {
    let mut rest = [0; 4096];
    let _ = timeout(LINGER_TIMEOUT, async { while matches!(tcp.read(&mut rest).await, Ok(1..)) {} }).await;
}

/// Answers one request, and asks for the connection's end where the real server does: an HTTP/2 connection whose
/// caller is not authenticated gets a GOAWAY with every answer (the mitigation of CVE-2023-44487).
async fn answer(
    server: Arc<Server>,
    caller: Caller,
    request: Request<Incoming>,
    goaway: Arc<Notify>,
) -> Result<Response<Body>, std::convert::Infallible> {
    let is_http2 = request.version() == hyper::Version::HTTP_2;
    let response = responses::respond(&server, caller, request).await;
    if is_http2 && !caller.is_authenticated() {
        goaway.notify_one();
    }
    Ok(response)
}

/// The first byte of a TLS handshake record.
const TLS_HANDSHAKE: u8 = 0x16;

async fn speaks_tls(tcp: &TcpStream) -> bool {
    let mut first = [0];
    matches!(tcp.peek(&mut first).await, Ok(1) if first == [TLS_HANDSHAKE])
}

async fn refuse_plain_http<T>(mut tcp: Shared) -> Option<T> {
    let answer = b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n";
    let _ = tcp.write_all(answer).await;
    None
}

impl Server {
    fn count(&self, source: IpAddr) {
        if *self.stage.borrow() != Stage::Started {
            self.early_connections.fetch_add(1, Ordering::Relaxed);
        }
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        *connections.entry(source.to_canonical()).or_default() += 1;
    }

    fn obey(&self, order: Order) -> String {
        match order {
            Order::Health(health) => {
                self.health.send_replace(health);
            }
            Order::Door(door) => {
                self.door.send_replace(door);
            }
            Order::Connections => {
                let connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
                return serde_json::json!(*connections).to_string();
            }
            Order::Slices(json) => match serde_json::from_str(&json) {
                Ok(items) => self.slices.replace(items),
                Err(error) => return format!("error: {error}"),
            },
            Order::Compact => self.slices.compact(),
            Order::ListStatus(status) => match StatusCode::from_u16(status) {
                Ok(status) => self.slices.refuse_with(status),
                Err(error) => return format!("error: {error}"),
            },
            Order::WatchStatus(status) => match StatusCode::from_u16(status) {
                Ok(status) => self.slices.refuse_watches_with(status),
                Err(error) => return format!("error: {error}"),
            },
            Order::Listed => return self.slices.asked().to_string(),
            Order::EarlyConnections => return self.early_connections.load(Ordering::Relaxed).to_string(),
        }
        "ok".to_owned()
    }
}

/// Takes one order a line, answers each with one line.
async fn take_orders(server: Arc<Server>, control: UnixListener) {
    while let Ok((stream, _)) = control.accept().await {
        let server = Arc::clone(&server);
        tokio::spawn(async move {
            let _ = obey_lines(&server, stream).await;
        });
    }
}

async fn obey_lines(server: &Server, stream: UnixStream) -> std::io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut lines = BufReader::new(reader).lines();
    while let Some(line) = lines.next_line().await? {
        let answer = match line.parse() {
            Ok(order) => server.obey(order),
            Err(message) => format!("error: {message}"),
        };
        writer.write_all(format!("{answer}\n").as_bytes()).await?;
    }
    Ok(())
}
