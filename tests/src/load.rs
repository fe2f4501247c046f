//! Clients that count: every request's fate, and which server it met.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    path::Path,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Request, Response, StatusCode,
    body::Incoming,
    client::conn::{http1, http2},
    header::{AUTHORIZATION, HOST},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use socket2::{Domain, Socket, Type};
use tokio::{net::TcpStream, runtime::Runtime, task::JoinSet, time::timeout};
use tokio_rustls::TlsConnector;

use crate::{
    lab::Host,
    stub::credentials::{provider, roots},
};

/// One request's fate.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// When it was begun, its connection included.
    pub started: Instant,
    /// When it succeeded or failed.
    pub ended: Instant,
    /// The client's end of its connection, from the first SYN on. None: it was asked on a connection that stood.
    pub source: Option<SocketAddr>,
    /// The server that answered, or what went wrong.
    pub result: Result<String, String>,
}

/// The fates of many requests.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// In the order in which they ended.
    pub outcomes: Vec<Outcome>,
}

impl Report {
    /// How many were answered.
    pub fn answered(&self) -> usize {
        self.outcomes.len() - self.failures().count()
    }

    /// Those that failed.
    pub fn failures(&self) -> impl Iterator<Item = &Outcome> {
        self.outcomes.iter().filter(|outcome| outcome.result.is_err())
    }

    /// How many each server answered.
    pub fn by_server(&self) -> BTreeMap<&str, usize> {
        let mut counts = BTreeMap::new();
        for server in self.outcomes.iter().filter_map(|outcome| outcome.result.as_deref().ok()) {
            *counts.entry(server).or_default() += 1;
        }
        counts
    }

    /// Fails unless all of `expected` requests were answered.
    ///
    /// # Errors
    /// The first few failures.
    pub fn require_all(&self, expected: usize) -> Result<()> {
        let errors: Vec<_> = self.failures().filter_map(|outcome| outcome.result.as_ref().err()).collect();
        ensure!(
            errors.is_empty() && self.answered() == expected,
            "{} of {expected} requests answered, {} failed: {:#?}",
            self.answered(),
            errors.len(),
            &errors[..errors.len().min(5)]
        );
        Ok(())
    }
}

/// An HTTPS client for one address. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    tls: TlsConnector,
    target: SocketAddr,
    /// Whom the certificate must be for.
    name: ServerName<'static>,
    limit: Duration,
    /// It speaks HTTP/2, and this is its bearer token. Else HTTP/1.1, anonymously.
    token: Option<&'static str>,
}

/// One open connection.
#[derive(Debug)]
pub struct Connection {
    sender: Sender,
    host: String,
    limit: Duration,
}

#[derive(Debug)]
enum Sender {
    Http1(http1::SendRequest<Empty<Bytes>>),
    Http2(http2::SendRequest<Empty<Bytes>>, &'static str),
}

/// What must be polled for a connection to live.
pub type Driver = Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>;

/// A connection that was just opened, and what must be polled for it to live.
pub struct Dialled {
    /// To ask on.
    pub connection: Connection,
    /// Comes to its end when the connection does, and says how.
    pub driver: Driver,
    /// How long TCP took: more than a second means that a SYN was lost.
    pub connected_in: Duration,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Client").field("target", &self.target).finish_non_exhaustive()
    }
}

impl Client {
    /// A client that trusts the authority in `ca_file`, asks `target`, and gives up on a connection or an answer
    /// after `limit`. TLS sessions are not resumed: each connection is a full handshake.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn new(ca_file: &Path, target: SocketAddr, limit: Duration) -> Result<Self> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots(ca_file)?)
            .with_no_client_auth();
        config.resumption = rustls::client::Resumption::disabled();
        let name = ServerName::from(target.ip());
        Ok(Self { tls: Arc::new(config).into(), target, name, limit, token: None })
    }

    /// The same client, speaking HTTP/2 with a bearer token: who has none is sent away after each answer.
    pub fn http2(self, token: &'static str) -> Self {
        let mut config = ClientConfig::clone(self.tls.config());
        config.alpn_protocols = vec![b"h2".to_vec()];
        Self { tls: Arc::new(config).into(), token: Some(token), ..self }
    }

    /// The same client, for servers whose certificate is for `name` instead of the address.
    ///
    /// # Errors
    /// When it is no name.
    pub fn expecting(self, name: &str) -> Result<Self> {
        Ok(Self { name: ServerName::try_from(name.to_owned())?, ..self })
    }

    /// The address it asks.
    pub fn target(&self) -> SocketAddr {
        self.target
    }

    /// Opens a connection.
    ///
    /// # Errors
    /// When it is refused, reset or not there in time.
    pub async fn connect(&self) -> Result<Connection> {
        let Dialled { connection, driver, .. } = self.dial().await?;
        tokio::spawn(driver);
        Ok(connection)
    }

    /// Opens a connection and leaves it to the caller to drive it.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub async fn dial(&self) -> Result<Dialled> {
        let started = Instant::now();
        let connecting = async {
            let tcp = TcpStream::connect(self.target).await.context("TCP")?;
            let connected_in = started.elapsed();
            let (connection, driver) = self.handshakes(tcp).await?;
            anyhow::Ok(Dialled { connection, driver, connected_in })
        };
        timeout(self.limit, connecting).await.context("connecting")?
    }

    /// Goes on with a TCP connection that stands.
    ///
    /// # Errors
    /// When it is reset, or not ready in time.
    pub async fn over(&self, tcp: TcpStream) -> Result<Connection> {
        let (connection, driver) =
            timeout(self.limit, self.handshakes(tcp)).await.context("connecting")??;
        tokio::spawn(driver);
        Ok(connection)
    }

    async fn handshakes(&self, tcp: TcpStream) -> Result<(Connection, Driver)> {
        tcp.set_nodelay(true)?;
        let tls = self.tls.connect(self.name.clone(), tcp).await.context("TLS")?;
        let (sender, driver): (_, Driver) = match self.token {
            None => {
                let (sender, driver) = http1::handshake(TokioIo::new(tls)).await?;
                (Sender::Http1(sender), Box::pin(driver))
            }
            Some(token) => {
                let (sender, driver) = http2::handshake(TokioExecutor::new(), TokioIo::new(tls)).await?;
                (Sender::Http2(sender, token), Box::pin(driver))
            }
        };
        Ok((Connection { sender, host: self.target.to_string(), limit: self.limit }, driver))
    }

    /// Asks for the server's name on a new connection.
    pub async fn ask_name(&self) -> Outcome {
        let started = Instant::now();
        let mut source = None;
        let result = async {
            let connecting = async {
                let tcp = begin(self.target).context("TCP")?;
                source = tcp.local_addr().ok();
                stands(&tcp).await.context("TCP")?;
                self.handshakes(tcp).await
            };
            let (mut connection, driver) = timeout(self.limit, connecting).await.context("connecting")??;
            tokio::spawn(driver);
            connection.name().await
        };
        let result = result.await.map_err(|error| format!("{error:#}"));
        Outcome { started, ended: Instant::now(), source, result }
    }
}

/// Sends a SYN and does not wait for an answer: the socket has its address from now on, whatever becomes of it.
fn begin(target: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&target.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => TcpStream::from_std(socket.into()),
    }
}

/// Waits until a connection stands.
async fn stands(tcp: &TcpStream) -> io::Result<()> {
    tcp.writable().await?;
    tcp.take_error()?.map_or(Ok(()), Err)
}

impl Connection {
    /// Sends a GET and returns the head of the response, its body still to be read.
    ///
    /// # Errors
    /// When the connection is gone, the answer late, or the status not 200.
    pub async fn get(&mut self, path: &str) -> Result<Response<Incoming>> {
        let answer = match &mut self.sender {
            Sender::Http1(sender) => {
                let request = Request::get(path).header(HOST, &self.host).body(Empty::new())?;
                timeout(self.limit, sender.send_request(request)).await
            }
            Sender::Http2(sender, token) => {
                let request = Request::get(format!("https://{}{path}", self.host));
                let request = request.header(AUTHORIZATION, format!("Bearer {token}")).body(Empty::new())?;
                timeout(self.limit, sender.send_request(request)).await
            }
        };
        let response = answer.context("waiting")??;
        ensure!(response.status() == StatusCode::OK, "GET {path}: {}", response.status());
        Ok(response)
    }

    /// The name of the server at the other end.
    ///
    /// # Errors
    /// As [`Connection::get`].
    pub async fn name(&mut self) -> Result<String> {
        let body =
            timeout(self.limit, self.get("/name").await?.into_body().collect()).await.context("reading")?;
        Ok(String::from_utf8(body?.to_bytes().into())?)
    }
}

/// Sends `count` requests one after another, each on a new connection.
///
/// # Errors
/// When the host cannot be entered.
pub fn sequential(host: &Host, client: &Client, count: usize) -> Result<Report> {
    host.in_namespace(|| {
        runtime()?.block_on(async {
            let mut report = Report::default();
            for _ in 0..count {
                report.outcomes.push(client.ask_name().await);
            }
            Ok(report)
        })
    })?
}

/// Sends `count` requests at the same time, each on a new connection.
///
/// # Errors
/// When the host cannot be entered.
pub fn parallel(host: &Host, client: &Client, count: usize) -> Result<Report> {
    raise_descriptor_limit()?;
    host.in_namespace(|| {
        runtime()?.block_on(async {
            let mut requests = JoinSet::new();
            for _ in 0..count {
                let client = client.clone();
                requests.spawn(async move { client.ask_name().await });
            }
            Ok(Report { outcomes: requests.join_all().await })
        })
    })?
}

/// Connections that are open at the same time and stay open.
#[derive(Debug)]
pub struct Crowd {
    connections: Vec<Connection>,
    runtime: Runtime,
}

impl Crowd {
    /// Opens `count` connections from a host.
    ///
    /// # Errors
    /// When one of them fails.
    pub fn open(host: &Host, client: &Client, count: usize) -> Result<Self> {
        raise_descriptor_limit()?;
        // A socket belongs to the namespace it was made in; afterwards any thread may use it.
        host.in_namespace(|| {
            let runtime = runtime()?;
            let connections = runtime.block_on(async {
                let mut opening = JoinSet::new();
                for _ in 0..count {
                    let client = client.clone();
                    opening.spawn(async move { client.connect().await });
                }
                opening.join_all().await.into_iter().collect::<Result<_>>()
            })?;
            Ok(Self { connections, runtime })
        })?
    }

    /// Sends a request on each of them, one after another.
    pub fn ask_names(&mut self) -> Report {
        let Self { connections, runtime } = self;
        runtime.block_on(async {
            let mut report = Report::default();
            for connection in connections {
                let started = Instant::now();
                let result = connection.name().await.map_err(|error| format!("{error:#}"));
                report.outcomes.push(Outcome { started, ended: Instant::now(), source: None, result });
            }
            report
        })
    }
}

/// A client that keeps asking, a new connection each time, on a thread of its own. Dropping it ends it.
#[derive(Debug)]
pub struct Asker {
    report: Arc<Mutex<Report>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Asker {
    /// Starts asking from a host, `lanes` requests at a time, so that one that hangs does not stop the others,
    /// and with a `pause` after each.
    pub fn start(host: &Host, client: &Client, lanes: usize, pause: Duration) -> Self {
        let report = Arc::default();
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..lanes)
            .map(|_| {
                let (client, report, stop) = (client.clone(), Arc::clone(&report), Arc::clone(&stop));
                let namespace = host.namespace().path();
                thread::spawn(move || {
                    let asked = crate::lab::namespace::enter(&namespace, || -> Result<()> {
                        runtime()?.block_on(ask_until(&client, pause, &report, &stop));
                        Ok(())
                    });
                    if let Err(error) = asked.and_then(|inner| inner) {
                        eprintln!("a client could not start: {error:#}");
                    }
                })
            })
            .collect();
        Self { report, stop, threads }
    }

    /// What has happened so far.
    pub fn report(&self) -> Report {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Those that have failed among all but the `first` so many, and how many there are by now.
    pub fn failures_after(&self, first: usize) -> (Vec<Outcome>, usize) {
        let report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        let new = report.outcomes.iter().skip(first);
        (new.filter(|outcome| outcome.result.is_err()).cloned().collect(), report.outcomes.len())
    }

    /// Lets the requests under way end and returns what has happened.
    pub fn stop(mut self) -> Report {
        self.end();
        self.report()
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.end();
    }
}

async fn ask_until(client: &Client, pause: Duration, report: &Mutex<Report>, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let outcome = client.ask_name().await;
        report.lock().unwrap_or_else(PoisonError::into_inner).outcomes.push(outcome);
        tokio::time::sleep(pause).await;
    }
}

/// A runtime for the calling thread alone.
pub(crate) fn runtime() -> Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting tokio")
}

/// Ten thousand connections with two descriptors each, as a stub has, and some more.
const DESCRIPTORS: u64 = 1 << 15;

/// Thousands of connections need more descriptors than the usual 1,024. Processes that are started later inherit this. Returns
/// how many there may be now.
pub fn raise_descriptor_limit() -> Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let raised = hard.max(DESCRIPTORS);
    // The hard limit is for root to raise, and not in every container.
    setrlimit(Resource::RLIMIT_NOFILE, raised, raised)
        .or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, hard, hard))
        .context("raising RLIMIT_NOFILE")?;
    Ok(getrlimit(Resource::RLIMIT_NOFILE)?.0)
}
