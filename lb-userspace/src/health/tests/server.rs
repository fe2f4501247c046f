//! A stub apiserver on loopback, well-behaved or not.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::{
    DigitallySignedStruct, DistinguishedName, Error, RootCertStore, ServerConfig, SignatureScheme,
    SupportedProtocolVersion,
    client::danger::HandshakeSignatureValid,
    crypto::CryptoProvider,
    server::{
        WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;

/// A certificate authority of a test's own.
pub(super) struct Ca {
    pub(super) pem: String,
    der: rustls_pki_types::CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key.
pub(super) struct Pair {
    pub(super) cert: rcgen::Certificate,
    pub(super) key: KeyPair,
}

impl Ca {
    pub(super) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        params.distinguished_name.push(DnType::CommonName, "kubernetes");
        let cert = params.self_signed(&key).unwrap();
        Self { pem: cert.pem(), der: cert.der().clone(), issuer: Issuer::new(params, key) }
    }

    /// For those who trust nobody else.
    fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.der.clone()).unwrap();
        Arc::new(roots)
    }

    pub(super) fn issue(&self, names: &[&str]) -> Pair {
        self.issue_until(names, None)
    }

    /// Its time was over long ago.
    pub(super) fn issue_expired(&self, names: &[&str]) -> Pair {
        self.issue_until(names, Some(2001))
    }

    fn issue_until(&self, names: &[&str], year: Option<i32>) -> Pair {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).unwrap();
        if let Some(year) = year {
            params.not_before = rcgen::date_time_ymd(year - 1, 1, 1);
            params.not_after = rcgen::date_time_ymd(year, 1, 1);
        }
        params.distinguished_name.push(DnType::CommonName, "kube-apiserver");
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        Pair { cert, key }
    }
}

/// What a request looked like to the server.
pub(super) struct Asked {
    pub(super) path: String,
    pub(super) host: String,
    pub(super) authorization: Option<String>,
    pub(super) client_certificate: bool,
    /// Counts from 1.
    pub(super) on_this_connection: usize,
}

/// What the server does with a request.
pub(super) enum Answer {
    /// These bytes, and then the next request.
    Bytes(String),
    /// These bytes, and then a closed connection.
    Last(String),
    /// These bytes, then one more every 10 ms for ever.
    Trickle(String),
    /// These bytes, then more, as fast as it gets rid of them.
    Flood(String),
    /// Nothing, for ever.
    Silence,
}

impl Answer {
    /// A whole reply.
    pub(super) fn status(status: &str, body: &str) -> Self {
        Self::Bytes(format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len()))
    }

    pub(super) fn ok() -> Self {
        Self::status("200 OK", "ok")
    }
}

/// Before HTTP.
pub(super) enum Layer {
    Tls(Arc<ServerConfig>),
    Plain,
    /// Takes connections and does nothing with them.
    Frozen,
    /// Reads the first bytes and hangs up.
    HangUp,
    /// Begins a TLS record, and goes on with a byte every 10 ms for ever.
    Dribble,
}

impl Layer {
    /// TLS as kube-apiserver does it: a client certificate is asked for, never required.
    pub(super) fn tls(ca: &Ca, pair: &Pair) -> Self {
        Self::tls_with(ca, pair, false)
    }

    pub(super) fn tls_that_requires_a_client_certificate(ca: &Ca, pair: &Pair) -> Self {
        Self::tls_with(ca, pair, true)
    }

    /// The same before TLS 1.3, where the handshake does not complete without one that is known.
    pub(super) fn tls12_that_requires_a_client_certificate(ca: &Ca, pair: &Pair) -> Self {
        let verifier = WebPkiClientVerifier::builder_with_provider(ca.roots(), provider());
        Self::tls_of(pair, verifier.build().unwrap(), &[&rustls::version::TLS12])
    }

    /// As kube-apiserver: whatever is wrong with a client certificate, the handshake completes.
    pub(super) fn tls_that_takes_any_client_certificate(pair: &Pair) -> Self {
        Self::tls_verifying(pair, Arc::new(AnyCertificate))
    }

    fn tls_with(ca: &Ca, pair: &Pair, require_client_certificate: bool) -> Self {
        let verifier = WebPkiClientVerifier::builder_with_provider(ca.roots(), provider());
        let verifier = match require_client_certificate {
            true => verifier,
            false => verifier.allow_unauthenticated(),
        };
        Self::tls_verifying(pair, verifier.build().unwrap())
    }

    fn tls_verifying(pair: &Pair, verifier: Arc<dyn ClientCertVerifier>) -> Self {
        Self::tls_of(pair, verifier, rustls::DEFAULT_VERSIONS)
    }

    fn tls_of(
        pair: &Pair,
        verifier: Arc<dyn ClientCertVerifier>,
        versions: &[&'static SupportedProtocolVersion],
    ) -> Self {
        let key = PrivateKeyDer::try_from(pair.key.serialize_der()).unwrap();
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(versions)
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![pair.cert.der().clone()], key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Self::Tls(Arc::new(config))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Asks for a client certificate and takes what comes.
#[derive(Debug)]
struct AnyCertificate;

impl ClientCertVerifier for AnyCertificate {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _own: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let provider = rustls::crypto::ring::default_provider();
        provider.signature_verification_algorithms.supported_schemes()
    }
}

/// A running server; dropping it closes its port and its connections.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    accepted: Arc<AtomicUsize>,
    _task: JoinSet<()>,
}

impl Server {
    pub(super) async fn start(
        layer: Layer,
        answer: impl Fn(&Asked) -> Answer + Send + Sync + 'static,
    ) -> Self {
        Self::start_on(Ipv4Addr::LOCALHOST.into(), layer, answer).await
    }

    pub(super) async fn start_on(
        ip: IpAddr,
        layer: Layer,
        answer: impl Fn(&Asked) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind((ip, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let accepted = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&accepted);
        let (layer, answer) = (Arc::new(layer), Arc::new(answer));
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                counter.fetch_add(1, Ordering::Relaxed);
                connections.spawn(serve(tcp, Arc::clone(&layer), Arc::clone(&answer)));
            }
        });
        Self { address, accepted, _task: task }
    }

    /// How many connections it took.
    pub(super) fn accepted(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
    }
}

async fn serve(mut tcp: TcpStream, layer: Arc<Layer>, answer: Arc<impl Fn(&Asked) -> Answer>) {
    match &*layer {
        Layer::Frozen => std::future::pending().await,
        Layer::HangUp => {
            let _ = tcp.read(&mut [0; 64]).await;
        }
        Layer::Dribble => {
            // A handshake record of 16 KiB with a ServerHello of as much.
            let _ = tcp.write_all(&[0x16, 3, 3, 0x40, 0, 2, 0, 0x3f, 0xfc]).await;
            while tcp.write_all(&[0]).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        Layer::Plain => talk(tcp, false, &*answer).await,
        Layer::Tls(config) => {
            let Ok(tls) = TlsAcceptor::from(Arc::clone(config)).accept(tcp).await else { return };
            let client_certificate = tls.get_ref().1.peer_certificates().is_some();
            talk(tls, client_certificate, &*answer).await;
        }
    }
}

async fn talk(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    client_certificate: bool,
    answer: &impl Fn(&Asked) -> Answer,
) {
    for on_this_connection in 1.. {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            match stream.read_u8().await {
                Ok(byte) => head.push(byte),
                Err(_) => return,
            }
            // Not HTTP (a TLS hello): as kube-apiserver's plain-text answer.
            if head.len() == 1 && head[0] == 0x16 {
                let _ = stream.write_all(b"HTTP/1.0 400 Bad Request\r\n\r\n").await;
                return;
            }
        }
        let head = String::from_utf8(head).unwrap();
        let header = |name: &str| {
            let line = head.lines().find(|line| line.to_lowercase().starts_with(name))?;
            line.split_once(": ").map(|(_, value)| value.to_owned())
        };
        let asked = Asked {
            path: head.split(' ').nth(1).unwrap().to_owned(),
            host: header("host:").unwrap(),
            authorization: header("authorization:"),
            client_certificate,
            on_this_connection,
        };
        if give(&mut stream, answer(&asked)).await.is_err() {
            return;
        }
    }
}

/// An error ends the connection.
async fn give(stream: &mut (impl AsyncWrite + Unpin), answer: Answer) -> std::io::Result<()> {
    match answer {
        Answer::Bytes(bytes) => stream.write_all(bytes.as_bytes()).await,
        Answer::Last(bytes) => {
            stream.write_all(bytes.as_bytes()).await?;
            stream.shutdown().await?;
            Err(std::io::ErrorKind::ConnectionAborted.into())
        }
        Answer::Trickle(bytes) => {
            stream.write_all(bytes.as_bytes()).await?;
            loop {
                tokio::time::sleep(Duration::from_millis(10)).await;
                stream.write_all(b"x").await?;
                stream.flush().await?;
            }
        }
        Answer::Flood(bytes) => {
            stream.write_all(bytes.as_bytes()).await?;
            loop {
                stream.write_all(&[b'x'; 4096]).await?;
            }
        }
        Answer::Silence => std::future::pending().await,
    }
}
