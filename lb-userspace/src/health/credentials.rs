//! What a check needs from files: whom to trust, and who we are.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use hyper::header::HeaderValue;
use rustls::{
    ClientConfig, RootCertStore,
    client::{Resumption, WebPkiServerVerifier, danger::ServerCertVerifier},
    crypto::CryptoProvider,
    sign::{CertifiedKey, SingleCertAndKey},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};

use super::{
    certificate::CertificateFacts,
    files::{Reading, Source, Watched},
    unverified::Unverified,
};
use crate::config::{Check, CheckKind, ClientCertificate};

/// A bearer token, ready to be sent, never to be shown.
#[derive(Clone)]
pub(super) struct Token(HeaderValue);

impl Token {
    /// The value of the `Authorization` header, marked as sensitive.
    pub(super) fn header(&self) -> HeaderValue {
        self.0.clone()
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(redacted)")
    }
}

/// Who we are towards a TLS server.
#[derive(Clone)]
pub(super) struct Identity {
    key: Arc<CertifiedKey>,
    facts: Option<Arc<CertificateFacts>>,
}

pub(super) fn ca_source(path: PathBuf) -> Source<Arc<RootCertStore>> {
    Source {
        what: "CA",
        paths: vec![path],
        parse: parse_ca,
        without: "backends' certificates are not verified and no token is sent to them",
        // Never fall back to trusting anybody.
        outlives_its_file: true,
    }
}

pub(super) fn identity_source(files: &ClientCertificate) -> Source<Identity> {
    Source {
        what: "client certificate and key",
        paths: vec![files.cert_file.clone(), files.key_file.clone()],
        parse: parse_identity,
        without: "checks present no certificate",
        outlives_its_file: false,
    }
}

pub(super) fn token_source(path: PathBuf) -> Source<Token> {
    Source {
        what: "bearer token",
        paths: vec![path],
        parse: parse_token,
        without: "checks send no token",
        outlives_its_file: false,
    }
}

fn parse_ca(contents: &[Vec<u8>]) -> Result<Arc<RootCertStore>, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&contents[0])? {
        roots.add(certificate).map_err(|error| {
            format!("certificate {} is not usable as a CA: {error}", roots.len().saturating_add(1))
        })?;
    }
    Ok(Arc::new(roots))
}

fn parse_identity(contents: &[Vec<u8>]) -> Result<Identity, String> {
    let chain = certificates(&contents[0])?;
    let facts = CertificateFacts::from_der(&chain[0]).map(Arc::new);
    // The parser's own errors quote the line: not for a key.
    let key = PrivateKeyDer::from_pem_slice(&contents[1]).map_err(|_| {
        "the key file holds no unencrypted PEM private key (PKCS#8, PKCS#1 or SEC1)".to_owned()
    })?;
    let key = CertifiedKey::from_der(chain, key, provider()).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => "the private key is not the certificate's".to_owned(),
        other => format!("not usable: {other}"),
    })?;
    Ok(Identity { key: Arc::new(key), facts })
}

fn parse_token(contents: &[Vec<u8>]) -> Result<Token, String> {
    let token = contents[0].trim_ascii();
    if token.is_empty() {
        return Err("the file is empty".to_owned());
    }
    if !token.iter().all(u8::is_ascii_graphic) {
        return Err("not a token: it must be one word of visible ASCII characters".to_owned());
    }
    let mut header = HeaderValue::from_bytes(&[b"Bearer ", token].concat())
        .map_err(|_| "not a token: it does not fit into an HTTP header".to_owned())?;
    header.set_sensitive(true);
    Ok(Token(header))
}

/// At least one.
fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        // Somebody may have swapped certificate and key: do not quote.
        .map_err(|_| "not PEM: a section is cut short or is not base64".to_owned())?;
    if certificates.is_empty() {
        return Err("no PEM certificate in it (-----BEGIN CERTIFICATE-----)".to_owned());
    }
    Ok(certificates)
}

fn provider() -> &'static Arc<CryptoProvider> {
    static PROVIDER: std::sync::LazyLock<Arc<CryptoProvider>> =
        std::sync::LazyLock::new(|| Arc::new(rustls::crypto::ring::default_provider()));
    &PROVIDER
}

/// The files of one TLS set-up and the rustls configurations made of them, one for all checks that name the
/// same files.
pub(super) struct Tls {
    ca: Option<Watched<Arc<RootCertStore>>>,
    identity: Option<Watched<Identity>>,
    /// Not verifying is what the operator asked for.
    insecure: bool,
    http: bool,
    built: Option<Built>,
}

struct Built {
    roots: Option<Arc<RootCertStore>>,
    identity: Option<Identity>,
    setup: TlsSetup,
}

/// What one fresh connection needs.
#[derive(Clone)]
pub(super) struct TlsSetup {
    /// With our client certificate, where we have one.
    pub(super) config: Arc<ClientConfig>,
    /// Without it. The same as `config` where we have none.
    pub(super) anonymous: Arc<ClientConfig>,
    /// The backend's certificate is verified.
    pub(super) verified: bool,
    /// Whoever answers may be told our token: it is verified, or the operator asked for no verification.
    pub(super) trusted_with_token: bool,
    /// Our client certificate.
    pub(super) client_certificate: Option<Arc<CertificateFacts>>,
}

impl TlsSetup {
    /// A client certificate is presented to servers that ask for one.
    pub(super) fn has_identity(&self) -> bool {
        !Arc::ptr_eq(&self.config, &self.anonymous)
    }
}

impl Tls {
    /// The configuration as the files are now; the same as before unless one has changed.
    ///
    /// # Errors
    ///
    /// A file that cannot be used and never could: our own trouble.
    pub(super) fn current(&mut self) -> Result<TlsSetup, String> {
        let roots = optional(self.ca.as_mut())?;
        let identity = optional(self.identity.as_mut())?;
        if let Some(built) = &self.built
            && same(built.roots.as_ref(), roots.as_ref())
            && same(built.identity.as_ref().map(|it| &it.key), identity.as_ref().map(|it| &it.key))
        {
            return Ok(built.setup.clone());
        }
        let setup = self.build(roots.as_ref(), identity.as_ref())?;
        self.built = Some(Built { roots, identity, setup: setup.clone() });
        Ok(setup)
    }

    fn build(
        &self,
        roots: Option<&Arc<RootCertStore>>,
        identity: Option<&Identity>,
    ) -> Result<TlsSetup, String> {
        let verifier: Arc<dyn ServerCertVerifier> = match roots {
            Some(roots) => {
                WebPkiServerVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(provider()))
                    .build()
                    .map_err(|error| format!("CA not usable: {error}"))?
            }
            None => Arc::new(Unverified::new(Arc::clone(provider()))),
        };
        let make = |identity: Option<&Identity>| -> Result<Arc<ClientConfig>, String> {
            let builder = ClientConfig::builder_with_provider(Arc::clone(provider()))
                .with_safe_default_protocol_versions()
                .map_err(|error| format!("TLS not usable: {error}"))?
                .dangerous()
                .with_custom_certificate_verifier(Arc::clone(&verifier));
            let mut config = match identity {
                Some(identity) => {
                    let key = SingleCertAndKey::from(Arc::clone(&identity.key));
                    builder.with_client_cert_resolver(Arc::new(key))
                }
                None => builder.with_no_client_auth(),
            };
            // A fresh connection is meant to prove that a whole handshake works; and tickets cost memory.
            config.resumption = Resumption::disabled();
            if self.http {
                config.alpn_protocols = vec![b"http/1.1".to_vec()];
            }
            Ok(Arc::new(config))
        };
        let anonymous = make(None)?;
        let config = if identity.is_some() { make(identity)? } else { Arc::clone(&anonymous) };
        Ok(TlsSetup {
            config,
            anonymous,
            verified: roots.is_some(),
            trusted_with_token: roots.is_some() || self.insecure || self.ca.is_none(),
            client_certificate: identity.and_then(|identity| identity.facts.clone()),
        })
    }
}

fn optional<T: Clone>(watched: Option<&mut Watched<T>>) -> Result<Option<T>, String> {
    match watched.map(Watched::current) {
        Some(Reading::Value(value)) => Ok(Some(value)),
        Some(Reading::Unusable(problem)) => Err(problem),
        Some(Reading::Absent) | None => Ok(None),
    }
}

fn same<T>(one: Option<&Arc<T>>, other: Option<&Arc<T>>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => Arc::ptr_eq(one, other),
        (None, None) => true,
        _ => false,
    }
}

/// The credentials of one check, shared with the checks that name the same files.
#[derive(Clone)]
pub(super) struct Credentials {
    tls: Option<Arc<Mutex<Tls>>>,
    token: Option<Arc<Mutex<Watched<Token>>>>,
}

impl Credentials {
    /// For one fresh connection: looks at the files again. `None` for a check without TLS.
    pub(super) fn tls(&self) -> Result<Option<TlsSetup>, String> {
        self.tls.as_ref().map(|tls| lock(tls).current()).transpose()
    }

    /// For one fresh connection: looks at the file again.
    pub(super) fn token(&self) -> Result<Option<Token>, String> {
        optional(self.token.as_ref().map(|token| lock(token)).as_deref_mut())
    }
}

/// A panic elsewhere leaves at worst an old value behind.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hands out the same credentials to checks that name the same files.
#[derive(Default)]
pub(super) struct Store {
    tls: HashMap<TlsKey, Arc<Mutex<Tls>>>,
    tokens: HashMap<PathBuf, Arc<Mutex<Watched<Token>>>>,
}

#[derive(PartialEq, Eq, Hash)]
struct TlsKey {
    ca: Option<PathBuf>,
    identity: Option<(PathBuf, PathBuf)>,
    insecure: bool,
    http: bool,
}

impl Store {
    pub(super) fn credentials(&mut self, check: &Check) -> Credentials {
        let speaks_http = matches!(check.kind, CheckKind::Https | CheckKind::Http);
        let speaks_tls = matches!(check.kind, CheckKind::Https | CheckKind::Tls);
        Credentials {
            tls: speaks_tls.then(|| self.tls(check)),
            token: check.token_file.clone().filter(|_| speaks_http).map(|path| {
                let new = || Arc::new(Mutex::new(Watched::new(token_source(path.clone()))));
                Arc::clone(self.tokens.entry(path.clone()).or_insert_with(new))
            }),
        }
    }

    fn tls(&mut self, check: &Check) -> Arc<Mutex<Tls>> {
        let insecure = check.insecure_skip_tls_verify;
        let key = TlsKey {
            ca: check.ca_file.clone().filter(|_| !insecure),
            identity: check.client_cert.as_ref().map(|it| (it.cert_file.clone(), it.key_file.clone())),
            insecure,
            http: check.kind == CheckKind::Https,
        };
        let new = || {
            Arc::new(Mutex::new(Tls {
                ca: key.ca.clone().map(|path| Watched::new(ca_source(path))),
                identity: check.client_cert.as_ref().map(|files| Watched::new(identity_source(files))),
                insecure,
                http: key.http,
                built: None,
            }))
        };
        let tls = self.tls.get(&key).map_or_else(new, Arc::clone);
        self.tls.insert(key, Arc::clone(&tls));
        tls
    }
}
