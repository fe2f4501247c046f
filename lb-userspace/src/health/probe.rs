//! Asks one backend, as its [`Check`] says.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::Empty;
use hyper::{
    Request, StatusCode,
    header::{ACCEPT, AUTHORIZATION, HOST, HeaderValue, USER_AGENT},
};
use rustls_pki_types::ServerName;
use tokio::{io::AsyncWriteExt as _, time::timeout};

use super::{
    certificate::CertificateFacts,
    connect::{Connected, TlsTarget, Transport, Trouble, connect},
    credentials::{Credentials, TlsSetup, Token},
    http::{Connection, End, Reply, explain, failed_checks},
    report::{CheckCode, CheckReport, Failure, Outcome},
};
use crate::config::{Check, CheckKind};

/// A connection carries this many checks: so every fifth one proves that a new client could connect.
const CHECKS_PER_CONNECTION: u32 = 5;

/// For the good-bye of a TLS-only check.
const CLOSING: Duration = Duration::from_secs(1);

const USER_AGENT_VALUE: &str = concat!("sheave/", env!("CARGO_PKG_VERSION"), " (health check)");

/// Asks one backend again and again, and keeps its connection.
pub(super) struct Prober {
    address: SocketAddr,
    check: Check,
    /// The name that the next fresh connection is for.
    name: ServerName<'static>,
    /// Without a configured name, and without one in a kubeconfig.
    own_name: ServerName<'static>,
    credentials: Credentials,
    kept: Option<Kept>,
}

/// A connection whose last check passed.
struct Kept {
    connection: Connection,
    checks: u32,
    facts: Facts,
    credential: Credential,
}

/// What stays true for the life of a connection.
#[derive(Clone, Default)]
struct Facts {
    verified: bool,
    server_certificate: Option<Arc<CertificateFacts>>,
    client_certificate: Option<Arc<CertificateFacts>>,
}

/// What we present on a connection.
#[derive(Clone)]
enum Credential {
    Anonymous,
    /// A client certificate may have been presented, and the token is sent.
    Presented(Option<Token>),
}

impl Prober {
    pub(super) fn new(backend: SocketAddr, check: &Check, credentials: Credentials) -> Self {
        let mut address = backend;
        address.set_port(check.port.unwrap_or(backend.port()));
        if let Some(ip) = check.address {
            address.set_ip(ip);
        }
        let own_name = ServerName::IpAddress(address.ip().into());
        Self { address, check: check.clone(), name: own_name.clone(), own_name, credentials, kept: None }
    }

    /// The backend was found by this host name: its certificate is for that, unless something else is configured.
    pub(super) fn found_by(self, host: Option<&str>) -> Self {
        let elsewhere = self.check.address.is_some();
        match host.filter(|_| !elsewhere).and_then(|host| ServerName::try_from(host.to_owned()).ok()) {
            Some(own_name) => Self { own_name, ..self },
            None => self,
        }
    }

    fn name_with(&self, tls: Option<&TlsSetup>) -> ServerName<'static> {
        let configured = self.check.server_name.clone().and_then(|name| ServerName::try_from(name).ok());
        configured
            .or_else(|| tls.and_then(|tls| tls.server_name.clone()))
            .unwrap_or_else(|| self.own_name.clone())
    }

    /// One check. What goes wrong on a connection that was kept says nothing about the backend (it may have been
    /// closed for being idle): then a fresh one is asked at once, and its result is the result.
    pub(super) async fn check(&mut self) -> CheckReport {
        self.check_doubting(std::future::pending()).await
    }

    /// As [`Prober::check`]. As soon as `doubt` comes to its end, a connection that was kept is waited for no longer: only
    /// a fresh one proves anything, and to wait for both takes twice as long.
    pub(super) async fn check_doubting(&mut self, doubt: impl Future<Output = ()>) -> CheckReport {
        if self.check.kind == CheckKind::None {
            return CheckReport::new(Outcome::Pass, CheckCode::NoCheck);
        }
        if let Some(kept) = self.kept.take() {
            let again = tokio::select! {
                biased;
                () = doubt => None,
                report = self.ask_again(kept) => report,
            };
            if let Some(report) = again {
                return self.unless_rejected(report).await;
            }
        }
        let start = Instant::now();
        let report = match self.materials() {
            Ok((tls, token)) => {
                self.name = self.name_with(tls.as_ref());
                self.fresh(tls.as_ref(), Credential::of(tls.as_ref(), token)).await
            }
            Err(info) => (CheckReport::from(Trouble::new(Outcome::Local, CheckCode::Unk, info)), false),
        };
        let mut report = self.unless_rejected(report).await;
        report.duration = start.elapsed();
        report
    }

    /// What the files hold now.
    fn materials(&self) -> Result<(Option<TlsSetup>, Option<Token>), String> {
        let tls = self.credentials.tls()?;
        let withheld = tls.as_ref().is_some_and(|tls| !tls.trusted_with_token);
        let token = self.credentials.token()?.filter(|_| !withheld);
        Ok((tls, token))
    }

    /// `None` unless a whole reply came, and soon: a host that died is not waited for as long as a slow answer.
    async fn ask_again(&mut self, mut kept: Kept) -> Option<(CheckReport, bool)> {
        let start = Instant::now();
        let request = self.request(&kept.credential);
        let limit = self.check.timeout.min(self.check.connect_timeout);
        let reply = kept.connection.ask(request, limit).await.ok()?;
        if matches!(reply.end, End::Broken(_)) {
            return None;
        }
        let mut report = self.judge(&reply);
        self.ask_what_failed(&mut kept.connection, &kept.credential, &reply, &mut report).await;
        kept.facts.describe(&mut report);
        report.fresh_connection = false;
        report.duration = start.elapsed();
        let presented = matches!(kept.credential, Credential::Presented(_));
        kept.checks += 1;
        self.keep(kept, &report, &reply);
        Some((report, presented))
    }

    /// A check on a new connection, and whether a credential was presented.
    async fn fresh(&mut self, tls: Option<&TlsSetup>, credential: Credential) -> (CheckReport, bool) {
        let presented = matches!(credential, Credential::Presented(_));
        let report = self.fresh_report(tls, credential).await.unwrap_or_else(|trouble| {
            let mut report = CheckReport::from(trouble);
            report.client_certificate = tls.and_then(|tls| tls.client_certificate.clone());
            report
        });
        (report, presented)
    }

    async fn fresh_report(
        &mut self,
        tls: Option<&TlsSetup>,
        credential: Credential,
    ) -> Result<CheckReport, Trouble> {
        let (mut transport, facts) = self.open(tls, &credential).await?;
        let mut report = match self.check.kind {
            CheckKind::Https | CheckKind::Http => {
                let mut connection = Connection::open(transport).await?;
                let asked = connection.ask(self.request(&credential), self.check.timeout).await;
                let mut report = match asked {
                    Ok(reply) => {
                        let mut report = self.judge(&reply);
                        self.ask_what_failed(&mut connection, &credential, &reply, &mut report).await;
                        let kept = Kept { connection, checks: 1, facts: facts.clone(), credential };
                        self.keep(kept, &report, &reply);
                        report
                    }
                    Err(trouble) => self.without_a_word(trouble, &connection).into(),
                };
                facts.describe(&mut report);
                return Ok(report);
            }
            CheckKind::Tls => CheckReport::new(Outcome::Pass, CheckCode::L6Ok),
            CheckKind::Tcp | CheckKind::None => CheckReport::new(Outcome::Pass, CheckCode::L4Ok),
        };
        facts.describe(&mut report);
        // The verdict does not wait for the good-bye.
        tokio::spawn(async move {
            let _ = timeout(CLOSING, transport.shutdown()).await;
        });
        Ok(report)
    }

    /// A kernel completes TCP and takes a request for a process that is frozen. Behind TLS somebody has shown to be
    /// there; without it, who has not said a byte is as silent as who completes no handshake.
    fn without_a_word(&self, trouble: Trouble, connection: &Connection) -> Trouble {
        let no_answer = trouble.outcome == Outcome::Fail(Failure::NoAnswer);
        if self.check.kind == CheckKind::Http && no_answer && !connection.has_heard() {
            return Trouble { outcome: Outcome::Fail(Failure::Silent), ..trouble };
        }
        trouble
    }

    async fn open(
        &self,
        tls: Option<&TlsSetup>,
        credential: &Credential,
    ) -> Result<(Box<dyn Transport>, Facts), Trouble> {
        let config = tls.map(|tls| match credential {
            Credential::Anonymous => &tls.anonymous,
            Credential::Presented(_) => &tls.config,
        });
        let target = config.map(|config| TlsTarget { config, name: &self.name });
        let Connected { transport, certificate } =
            connect(self.address, target, self.check.connect_timeout).await?;
        let facts = Facts {
            verified: tls.is_some_and(|tls| tls.verified),
            server_certificate: certificate.map(Arc::new),
            client_certificate: tls.and_then(|tls| tls.client_certificate.clone()),
        };
        Ok((transport, facts))
    }

    /// The reply to one request for `path`, on a connection of its own and with the check's credential.
    pub(super) async fn get(&mut self, path: &str) -> Result<Reply, Trouble> {
        let own_trouble = |info: String| Trouble::new(Outcome::Local, CheckCode::Unk, info);
        let (tls, token) = self.materials().map_err(own_trouble)?;
        self.name = self.name_with(tls.as_ref());
        let credential = Credential::of(tls.as_ref(), token);
        let (transport, _) = self.open(tls.as_ref(), &credential).await?;
        let mut connection = Connection::open(transport).await?;
        connection.ask(self.request_for(path, &credential), self.check.timeout).await
    }

    /// A failure that does not say what failed is asked for the list, in passing: the verdict stands, and waits no
    /// longer than a connection may take. A kube-apiserver's 500 has the list in it anyway.
    async fn ask_what_failed(
        &self,
        connection: &mut Connection,
        credential: &Credential,
        reply: &Reply,
        report: &mut CheckReport,
    ) {
        let silent_failure = report.outcome != Outcome::Pass
            && reply.status.is_server_error()
            && report.failed.is_empty()
            && matches!(reply.end, End::Complete);
        if !silent_failure || self.check.path.contains('?') {
            return;
        }
        let request = self.request_for(&format!("{}?verbose", self.check.path), credential);
        let limit = self.check.timeout.min(self.check.connect_timeout);
        let Ok(list) = connection.ask(request, limit).await else { return };
        report.failed = failed_checks(&list.body);
        report.info = explain(reply.status, &report.failed);
    }

    /// A presented credential that is not known is 401 even where anonymous requests are answered: before a
    /// backend is blamed for our expired credential, it is asked once more without.
    async fn unless_rejected(&mut self, (report, presented): (CheckReport, bool)) -> CheckReport {
        let unauthorized = report.http_status == Some(StatusCode::UNAUTHORIZED.as_u16());
        if !(presented && unauthorized && report.outcome != Outcome::Pass) {
            return report;
        }
        let Ok(tls) = self.credentials.tls() else { return report };
        let (mut anonymous, _) = self.fresh(tls.as_ref(), Credential::Anonymous).await;
        // The next check presents the credential again.
        self.kept = None;
        if anonymous.outcome != Outcome::Pass {
            return report;
        }
        anonymous.credential_rejected = true;
        anonymous.duration += report.duration;
        anonymous.info = "our credential was answered with 401; without it the check passes".to_owned();
        anonymous
    }

    /// Keeps a connection for the next check, if that may use it.
    fn keep(&mut self, kept: Kept, report: &CheckReport, reply: &Reply) {
        let whole = matches!(reply.end, End::Complete);
        if whole && report.outcome == Outcome::Pass && kept.checks < CHECKS_PER_CONNECTION {
            self.kept = Some(kept);
        }
    }

    fn request(&self, credential: &Credential) -> Request<Empty<Bytes>> {
        self.request_for(&self.check.path, credential)
    }

    fn request_for(&self, path: &str, credential: &Credential) -> Request<Empty<Bytes>> {
        let mut request = Request::new(Empty::new());
        // Validated with the configuration.
        *request.uri_mut() = path.parse().unwrap_or_default();
        let host = match &self.name {
            ServerName::DnsName(name) => format!("{}:{}", name.as_ref(), self.address.port()),
            _ => self.address.to_string(),
        };
        let headers = request.headers_mut();
        if let Ok(host) = HeaderValue::try_from(host) {
            headers.insert(HOST, host);
        }
        headers.insert(USER_AGENT, HeaderValue::from_static(USER_AGENT_VALUE));
        headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
        if let Credential::Presented(Some(token)) = credential {
            headers.insert(AUTHORIZATION, token.header());
        }
        request
    }

    /// The status decides; a reply with the expected one must also come to its end, or be longer than we read.
    fn judge(&self, reply: &Reply) -> CheckReport {
        let status = reply.status.as_u16();
        let expected = self.check.expect.iter().any(|range| range.contains(&status));
        let mut report = match &reply.end {
            _ if !expected => {
                let wrong = Outcome::Fail(Failure::NotExpected);
                let mut report = CheckReport::new(wrong, CheckCode::L7Sts);
                report.failed = failed_checks(&reply.body);
                report.info = explain(reply.status, &report.failed);
                report
            }
            End::Complete | End::TooLarge => CheckReport::new(Outcome::Pass, CheckCode::L7Ok),
            End::Broken(trouble) => CheckReport::from(trouble.clone()),
        };
        report.http_status = Some(status);
        report
    }
}

impl Credential {
    fn of(tls: Option<&TlsSetup>, token: Option<Token>) -> Self {
        if token.is_some() || tls.is_some_and(TlsSetup::has_identity) {
            Self::Presented(token)
        } else {
            Self::Anonymous
        }
    }
}

impl Facts {
    fn describe(&self, report: &mut CheckReport) {
        report.verified = self.verified;
        report.server_certificate.clone_from(&self.server_certificate);
        report.client_certificate.clone_from(&self.client_certificate);
    }
}

impl From<Trouble> for CheckReport {
    fn from(trouble: Trouble) -> Self {
        let Trouble { outcome, code, info, certificate_rejected, identity_refused } = trouble;
        let mut report = Self { info, certificate_rejected, ..Self::new(outcome, code) };
        report.connected |= identity_refused;
        report
    }
}
