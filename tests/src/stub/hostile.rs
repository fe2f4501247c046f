//! Servers that are broken, or mean harm to whoever asks them for their health.

use std::{
    net::{SocketAddr, TcpListener as StdTcpListener},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result};
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinSet,
    time::sleep,
};
use tokio_rustls::TlsAcceptor;

use super::credentials;
use crate::lab::{Host, authority::Authority};

/// What is sent by those who send a lot.
const HUGE: usize = 10 << 20;
/// Between two bytes of those who send slowly.
const TRICKLE: Duration = Duration::from_secs(1);

/// What a server does to who asks it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harm {
    /// A 500 of 10 MB that begins with a failed sub-check.
    HugeFailure,
    /// A head of 10 MB.
    HugeHead,
    /// A head that never ends, a byte a second.
    Trickle,
    /// Closes in the middle of a 200.
    BreaksOff,
    /// A redirect to a place that would say 200.
    Redirects(SocketAddr),
    /// A body without a head, as HTTP/0.9 had it.
    Http09,
    /// Begins its part of the TLS handshake, and goes on a byte a second.
    NeverFinishesTls,
    /// Closes in the middle of the TLS handshake.
    HangsUp,
}

/// A running server on a host. Dropping it ends it and its connections.
#[derive(Debug)]
pub struct Hostile {
    /// Where it listens.
    pub address: SocketAddr,
    accepted: Arc<AtomicU64>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Hostile {
    /// Starts it, with a certificate that `authority` has signed.
    ///
    /// # Errors
    /// When the address is taken, or a file cannot be written.
    pub fn start(host: &Host, authority: &Authority, address: SocketAddr, harm: Harm) -> Result<Self> {
        let label = format!("{}-{}", host.name(), address.port());
        let identity = authority.server(&label, &[address.ip()])?;
        let verifier = credentials::verifier(&authority.file())?;
        let config = credentials::server_config(&identity.certificate, &identity.key, &verifier)?;
        let listener = host.in_namespace(|| StdTcpListener::bind(address))??;
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let listener = {
            let _guard = runtime.enter();
            TcpListener::from_std(listener).context("listening")?
        };
        let accepted = Arc::<AtomicU64>::default();
        let (stop, stopped) = oneshot::channel();
        let serving = serve(listener, Arc::new(config), harm, Arc::clone(&accepted));
        let thread = thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = serving => {}
                    _ = stopped => {}
                }
            });
        });
        Ok(Self { address, accepted, stop: Some(stop), thread: Some(thread) })
    }

    /// How many connections it has accepted.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve(listener: TcpListener, config: Arc<ServerConfig>, harm: Harm, accepted: Arc<AtomicU64>) {
    let acceptor = TlsAcceptor::from(config);
    let mut connections = JoinSet::new();
    while let Ok((tcp, _)) = listener.accept().await {
        accepted.fetch_add(1, Ordering::Relaxed);
        connections.spawn(talk(tcp, acceptor.clone(), harm));
        while connections.try_join_next().is_some() {}
    }
}

/// Whatever becomes of the connection: who asked has hung up, or has what it deserves.
async fn talk(mut tcp: TcpStream, acceptor: TlsAcceptor, harm: Harm) {
    let _ = match harm {
        Harm::HangsUp => tcp.read(&mut [0; 64]).await.map(drop),
        // A handshake record of 16 KiB with a ServerHello of as much.
        Harm::NeverFinishesTls => trickle(tcp, &[0x16, 3, 3, 0x40, 0, 2, 0, 0x3f, 0xfc]).await,
        _ => match acceptor.accept(tcp).await {
            Ok(tls) => answer(tls, harm).await,
            Err(error) => Err(error),
        },
    };
}

async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin, harm: Harm) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    match harm {
        Harm::HugeFailure => {
            let head = format!("HTTP/1.1 500 Internal Server Error\r\nContent-Length: {HUGE}\r\n\r\n");
            flood(&mut stream, &format!("{head}[-]etcd failed: reason withheld\n")).await?;
        }
        Harm::HugeHead => flood(&mut stream, "HTTP/1.1 200 OK\r\nX: ").await?,
        Harm::Trickle => trickle(&mut stream, b"HTTP/1.1 200 OK\r\nX: ").await?,
        Harm::BreaksOff => stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf").await?,
        Harm::Redirects(to) => {
            let head = format!("HTTP/1.1 302 Found\r\nLocation: https://{to}/readyz\r\n");
            stream.write_all(format!("{head}Content-Length: 0\r\n\r\n").as_bytes()).await?;
        }
        Harm::Http09 => stream.write_all(b"ok\n").await?,
        Harm::NeverFinishesTls | Harm::HangsUp => {}
    }
    stream.shutdown().await
}

async fn flood(stream: &mut (impl AsyncWrite + Unpin), begin: &str) -> std::io::Result<()> {
    const PIECE: usize = 1 << 16;
    stream.write_all(begin.as_bytes()).await?;
    for _ in 0..HUGE / PIECE {
        stream.write_all(&[b'x'; PIECE]).await?;
    }
    Ok(())
}

async fn trickle(mut stream: impl AsyncWrite + Unpin, begin: &[u8]) -> std::io::Result<()> {
    stream.write_all(begin).await?;
    loop {
        stream.flush().await?;
        sleep(TRICKLE).await;
        stream.write_all(b"x").await?;
    }
}
