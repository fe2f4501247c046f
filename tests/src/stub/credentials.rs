//! Who is asking: certificates are looked at after the handshake, as the real server does it. A foreign or expired
//! one does not fail the handshake, it makes the request a 401.

use std::{path::Path, sync::Arc};

use anyhow::{Context as _, Result};
use rustls::{
    DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::{CryptoProvider, ring},
    server::{
        WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject as _};
use x509_parser::{oid_registry::OID_X509_ORGANIZATION_NAME, prelude::FromDer as _};

use super::answers::Credential;

/// The cryptography everything in the lab uses.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// The certificates of a PEM file as trust anchors.
///
/// # Errors
/// When the file cannot be read or holds no certificate.
pub fn roots(file: &Path) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    let read = |error| anyhow::Error::new(error).context(format!("reading {}", file.display()));
    for certificate in CertificateDer::pem_file_iter(file).map_err(read)? {
        roots.add(certificate.map_err(read)?)?;
    }
    Ok(roots)
}

/// Checks client certificates against the authority in a PEM file.
pub(super) fn verifier(client_ca: &Path) -> Result<Arc<dyn ClientCertVerifier>> {
    let roots = Arc::new(roots(client_ca)?);
    WebPkiClientVerifier::builder_with_provider(roots, provider()).build().context("the client CA")
}

/// TLS 1.2 and 1.3, ALPN `h2` before `http/1.1`, a client certificate asked for and never required.
pub(super) fn server_config(
    certificate: &Path,
    key: &Path,
    client_verifier: &Arc<dyn ClientCertVerifier>,
) -> Result<ServerConfig> {
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect)
        .with_context(|| format!("reading {}", certificate.display()))?;
    let key = PrivateKeyDer::from_pem_file(key).with_context(|| format!("reading {}", key.display()))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(Arc::new(AnyCertificate(Arc::clone(client_verifier))))
        .with_single_cert(chain, key)?;
    config.alpn_protocols = [b"h2".as_slice(), b"http/1.1"].map(<[u8]>::to_vec).to_vec();
    Ok(config)
}

/// What a client certificate says about its holder, if one was presented.
pub(super) fn of_certificates(
    verifier: &dyn ClientCertVerifier,
    presented: &[CertificateDer<'_>],
) -> Option<Credential> {
    let (own, intermediates) = presented.split_first()?;
    if verifier.verify_client_cert(own, intermediates, UnixTime::now()).is_err() {
        return Some(Credential::Invalid);
    }
    let masters = x509_parser::certificate::X509Certificate::from_der(own).is_ok_and(|(_, certificate)| {
        let mut organisations = certificate.subject().iter_by_oid(&OID_X509_ORGANIZATION_NAME);
        organisations.any(|organisation| organisation.as_str() == Ok("system:masters"))
    });
    Some(if masters { Credential::Masters } else { Credential::Ordinary })
}

/// Lets every certificate through the handshake whose holder has its key.
#[derive(Debug)]
struct AnyCertificate(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for AnyCertificate {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        _own: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
