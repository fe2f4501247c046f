//! One connection, TCP and TLS, and what it means when it does not come about.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use rustls::{AlertDescription, ClientConfig};
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::{Instant, timeout_at},
};
use tokio_rustls::TlsConnector;

use super::{
    certificate::CertificateFacts,
    report::{CheckCode, Failure, Outcome},
};

/// A byte stream to a backend, whatever is below it.
pub(crate) trait Transport: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Transport for T {}

/// Why a check did not pass.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Trouble {
    pub(super) outcome: Outcome,
    pub(super) code: CheckCode,
    pub(super) info: String,
    /// Theirs, by us.
    pub(super) certificate_rejected: bool,
    /// Ours, or that we have none, by them.
    pub(super) identity_refused: bool,
}

impl Trouble {
    pub(super) fn new(outcome: Outcome, code: CheckCode, info: impl Into<String>) -> Self {
        Self { outcome, code, info: info.into(), certificate_rejected: false, identity_refused: false }
    }

    pub(super) fn failed(failure: Failure, code: CheckCode, info: impl Into<String>) -> Self {
        Self::new(Outcome::Fail(failure), code, info)
    }
}

/// What TLS needs.
pub(super) struct TlsTarget<'a> {
    pub(super) config: &'a Arc<ClientConfig>,
    pub(super) name: &'a ServerName<'static>,
}

/// A connection that stands.
pub(super) struct Connected {
    pub(super) transport: Box<dyn Transport>,
    /// What the backend showed, with TLS.
    pub(super) certificate: Option<CertificateFacts>,
}

/// Connects within `limit`, TCP and TLS together.
pub(super) async fn connect(
    address: SocketAddr,
    tls: Option<TlsTarget<'_>>,
    limit: Duration,
) -> Result<Connected, Trouble> {
    let deadline = Instant::now() + limit;
    let tcp = match timeout_at(deadline, TcpStream::connect(address)).await {
        Ok(Ok(tcp)) => tcp,
        Ok(Err(error)) => return Err(tcp_trouble(&error)),
        Err(_) => return Err(Trouble::failed(Failure::Silent, CheckCode::L4Tout, "")),
    };
    // Without it a request may wait for an ACK; with a socket that cannot do it the check is merely slower.
    let _ = tcp.set_nodelay(true);
    let Some(TlsTarget { config, name }) = tls else {
        return Ok(Connected { transport: Box::new(tcp), certificate: None });
    };
    let connector = TlsConnector::from(Arc::clone(config));
    match timeout_at(deadline, connector.connect(name.clone(), tcp)).await {
        Ok(Ok(stream)) => {
            let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
            let certificate = certificates.first().and_then(|der| CertificateFacts::from_der(der));
            Ok(Connected { transport: Box::new(stream), certificate })
        }
        Ok(Err(error)) => Err(tls_trouble(&error)),
        Err(_) => Err(Trouble::failed(Failure::Silent, CheckCode::L6Tout, "")),
    }
}

/// Which errors of `connect(2)` speak about the backend. All others are our own host's.
///
/// A host that does not answer ARP or ND is `EHOSTUNREACH`, and silent. "Network unreachable" is taken for a
/// missing route of ours: a router that says so is rare, and no verdict is the safe one.
fn tcp_trouble(error: &io::Error) -> Trouble {
    let (outcome, code) = match error.raw_os_error() {
        Some(libc::ECONNREFUSED | libc::ECONNRESET | libc::ECONNABORTED | libc::EPIPE) => {
            (Outcome::Fail(Failure::Refused), CheckCode::L4Con)
        }
        Some(libc::ETIMEDOUT) => (Outcome::Fail(Failure::Silent), CheckCode::L4Tout),
        Some(libc::EHOSTUNREACH | libc::EHOSTDOWN) => (Outcome::Fail(Failure::Silent), CheckCode::L4Con),
        _ => (Outcome::Local, CheckCode::SockErr),
    };
    Trouble::new(outcome, code, io_text(error))
}

/// A handshake that broke off is an answer: somebody's kernel sent a FIN or RST, so it is not silence. The process
/// behind it may be gone (killed with connections in its backlog), which is what *refused* stands for.
fn tls_trouble(error: &io::Error) -> Trouble {
    if let Some(error) = tls_error(error) {
        let mut trouble = Trouble::failed(Failure::NotExpected, CheckCode::L6Rsp, tls_text(error));
        trouble.certificate_rejected = matches!(error, rustls::Error::InvalidCertificate(_));
        trouble.identity_refused = refuses_identity(error);
        return trouble;
    }
    match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            Trouble::failed(Failure::Refused, CheckCode::L6Rsp, "Connection closed during TLS handshake")
        }
        io::ErrorKind::TimedOut | io::ErrorKind::HostUnreachable => {
            Trouble::failed(Failure::Silent, CheckCode::L6Tout, io_text(error))
        }
        _ => Trouble::failed(Failure::Refused, CheckCode::L6Rsp, io_text(error)),
    }
}

/// Whether the backend has come as far in the handshake as to judge who we are, by its alert (RFC 8446, section 6.2).
/// TLS 1.3 says so only after our side of the handshake.
fn refuses_identity(error: &rustls::Error) -> bool {
    let rustls::Error::AlertReceived(alert) = error else { return false };
    matches!(
        alert,
        AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied
            | AlertDescription::CertificateRequired
            // A CA of the same name with another key, after a rotation: the signature is what does not fit.
            | AlertDescription::DecryptError
    )
}

/// The TLS error inside an I/O error.
pub(super) fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// What went wrong with TLS, in words that lead to the remedy.
pub(super) fn tls_text(error: &rustls::Error) -> String {
    use rustls::CertificateError;
    match error {
        rustls::Error::InvalidMessage(_) => "SSL handshake failure: not TLS".to_owned(),
        rustls::Error::AlertReceived(alert) if refuses_identity(error) => {
            format!("our client certificate is refused: alert {alert:?}")
        }
        rustls::Error::AlertReceived(alert) => format!("SSL handshake failure: alert {alert:?}"),
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "SSL handshake failure: certificate not issued by our CA".to_owned()
        }
        // A rotated CA keeps its name, as kubeadm's does: what does not fit is the signature.
        rustls::Error::InvalidCertificate(CertificateError::BadSignature) => {
            "SSL handshake failure: certificate not issued by our CA, but by one of the same name".to_owned()
        }
        other => printable(&format!("SSL handshake failure: {other}")),
    }
}

/// The system's words without Rust's: `Connection refused`.
pub(super) fn io_text(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => printable(&text),
    }
}

/// What a backend made us say may not break lines, terminals or quotes, nor be endless.
pub(crate) fn printable(text: &str) -> String {
    text.chars().take(200).map(|c| if c.is_control() || c == '"' { '.' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_errors_are_no_verdict() {
        for own in [
            libc::ENETUNREACH,
            libc::ENETDOWN,
            libc::EADDRNOTAVAIL,
            libc::EMFILE,
            libc::ENFILE,
            libc::ENOBUFS,
            libc::ENOMEM,
            libc::EPERM,
            libc::EACCES,
            libc::EINVAL,
        ] {
            let trouble = tcp_trouble(&io::Error::from_raw_os_error(own));
            assert_eq!(
                (trouble.outcome, trouble.code),
                (Outcome::Local, CheckCode::SockErr),
                "{}",
                trouble.info
            );
        }
    }

    #[test]
    fn a_host_that_is_not_there_is_silent_and_a_closed_port_is_not() {
        let trouble = tcp_trouble(&io::Error::from_raw_os_error(libc::EHOSTUNREACH));
        assert_eq!(trouble, Trouble::failed(Failure::Silent, CheckCode::L4Con, "No route to host"));
        let trouble = tcp_trouble(&io::Error::from_raw_os_error(libc::ECONNREFUSED));
        assert_eq!(trouble, Trouble::failed(Failure::Refused, CheckCode::L4Con, "Connection refused"));
    }
}
