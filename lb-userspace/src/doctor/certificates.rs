//! Whether the backends' certificates hold the names clients will use, and for how long.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use futures_util::future::join_all;
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::{Finding, failure, ok, warning};
use crate::config::{Backend, CheckKind, Config, Service};

const PATIENCE: Duration = Duration::from_secs(2);
const DAYS_TO_WARN: i64 = 30;

pub(super) async fn examine(config: &Config) -> Vec<Finding> {
    let speaks_tls = |service: &&Service| matches!(service.check.kind, CheckKind::Https | CheckKind::Tls);
    let services = config.services.iter().filter(speaks_tls);
    let pairs = services.flat_map(|service| service.backends.iter().map(move |backend| (service, backend)));
    let findings = pairs.map(|(service, backend)| certificate_of(service, backend));
    join_all(findings).await.into_iter().flatten().collect()
}

async fn certificate_of(service: &Service, backend: &Backend) -> Vec<Finding> {
    let subject = format!("certificate of {}/{}", service.name, backend.name);
    match presented(backend.address, service.check.server_name.as_deref()).await {
        Ok(certificate) => look_at(&certificate, service, &subject),
        Err(error) => {
            let what = format!("cannot be read from {}: {error}", backend.address);
            vec![warning(subject, what).fix(format!("curl -vk https://{}/readyz", backend.address))]
        }
    }
}

fn look_at(certificate: &CertificateDer<'_>, service: &Service, subject: &str) -> Vec<Finding> {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else {
        return vec![failure(subject, "is no X.509 certificate")];
    };
    let days =
        (certificate.validity().not_after.timestamp() - UnixTime::now().as_secs().cast_signed()) / 86_400;
    let mut findings = vec![validity(days, subject)];
    let missing: Vec<IpAddr> =
        service.listen.iter().map(SocketAddr::ip).filter(|ip| !has_address(&certificate, *ip)).collect();
    if missing.is_empty() {
        findings.push(ok(subject, "holds every listener's address"));
    }
    for address in missing {
        let what = format!(
            "does not hold the listener's address {address}: clients that connect to it will refuse it"
        );
        let fix = format!(
            "kubeadm: add \"{address}\" to apiServer.certSANs (kubectl -n kube-system edit cm kubeadm-config), then on \
             each master: rm /etc/kubernetes/pki/apiserver.crt /etc/kubernetes/pki/apiserver.key && kubeadm init phase \
             certs apiserver --config FILE, and restart kube-apiserver"
        );
        findings.push(warning(subject, what).fix(fix));
    }
    findings
}

fn validity(days: i64, subject: &str) -> Finding {
    let fix = "kubeadm certs renew apiserver, and restart kube-apiserver";
    match days {
        ..0 => failure(subject, format!("expired {} days ago", -days)).fix(fix),
        0..DAYS_TO_WARN => warning(subject, format!("expires in {days} days")).fix(fix),
        _ => ok(subject, format!("valid for {days} days")),
    }
}

fn has_address(certificate: &X509Certificate<'_>, address: IpAddr) -> bool {
    let bytes = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let names = certificate.subject_alternative_name().ok().flatten();
    names.is_some_and(|names| {
        names
            .value
            .general_names
            .iter()
            .any(|name| matches!(name, GeneralName::IPAddress(it) if *it == bytes))
    })
}

/// The certificate that a server presents. Nothing is sent to it beyond the handshake.
async fn presented(backend: SocketAddr, name: Option<&str>) -> anyhow::Result<CertificateDer<'static>> {
    let provider = Arc::new(ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody(provider)))
        .with_no_client_auth();
    let name = match name {
        Some(name) => ServerName::try_from(name.to_owned())?,
        None => ServerName::from(backend.ip()),
    };
    let handshake = async {
        let connection = TcpStream::connect(backend).await?;
        let stream = TlsConnector::from(Arc::new(config)).connect(name, connection).await?;
        let certificates = stream.get_ref().1.peer_certificates().and_then(<[_]>::first).cloned();
        certificates.ok_or_else(|| anyhow::anyhow!("it presents none"))
    };
    timeout(PATIENCE, handshake).await.map_err(|_| anyhow::anyhow!("no answer"))?
}

/// Accepts every certificate: here it is looked at, not trusted.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
