//! What a check needs from files: whom to trust, and who we are.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use hyper::header::HeaderValue;
use rustls::{
    ClientConfig, RootCertStore,
    client::{Resumption, WebPkiServerVerifier, danger::ServerCertVerifier},
    crypto::CryptoProvider,
    sign::{CertifiedKey, SingleCertAndKey},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};

use super::{
    certificate::CertificateFacts,
    files::{Parse, Reading, Source, Watched},
    unverified::Unverified,
};
use crate::{
    config::{Check, CheckKind, ClientCertificate},
    kubeconfig::{Kubeconfig, Material},
};

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
    ca_of(Material::File(path))
}

fn ca_of(material: Material) -> Source<Arc<RootCertStore>> {
    let (paths, parse) = assemble(vec![material], parse_ca);
    Source {
        what: "CA",
        paths,
        parse,
        without: "backends' certificates are not verified and no token is sent to them",
        // Never fall back to trusting anybody.
        outlives_its_file: true,
    }
}

pub(super) fn identity_source(files: &ClientCertificate) -> Source<Identity> {
    identity_of(Material::File(files.cert_file.clone()), Material::File(files.key_file.clone()))
}

fn identity_of(certificate: Material, key: Material) -> Source<Identity> {
    let (paths, parse) = assemble(vec![certificate, key], parse_identity);
    Source {
        what: "client certificate and key",
        paths,
        parse,
        without: "checks present no certificate",
        outlives_its_file: false,
    }
}

pub(super) fn token_source(path: PathBuf) -> Source<Token> {
    token_of(Material::File(path))
}

fn token_of(material: Material) -> Source<Token> {
    let (paths, parse) = assemble(vec![material], parse_token);
    Source { what: "bearer token", paths, parse, without: "checks send no token", outlives_its_file: false }
}

/// A kubeconfig whose parts are right as far as they are inside it; the files it names are looked at on their own.
pub(super) fn kubeconfig_source(path: PathBuf) -> Source<Arc<Kubeconfig>> {
    let directory = path.parent().unwrap_or(Path::new("")).to_owned();
    Source {
        what: "kubeconfig",
        paths: vec![path],
        parse: Box::new(move |contents| {
            let kubeconfig =
                Kubeconfig::parse(&contents[0], &directory).map_err(|error| error.to_string())?;
            let parts = Parts::of(&kubeconfig);
            let inline = [
                parts.ca.as_ref().and_then(Source::problem_inside),
                parts.identity.as_ref().and_then(Source::problem_inside),
                parts.token.as_ref().and_then(Source::problem_inside),
            ];
            match inline.into_iter().flatten().next() {
                Some(problem) => Err(problem),
                None => Ok(Arc::new(kubeconfig)),
            }
        }),
        without: "backends' certificates are not verified and checks are anonymous",
        // The CA in it protects us.
        outlives_its_file: true,
    }
}

/// What a kubeconfig gives.
pub(super) struct Parts {
    pub(super) ca: Option<Source<Arc<RootCertStore>>>,
    pub(super) identity: Option<Source<Identity>>,
    pub(super) token: Option<Source<Token>>,
}

impl Parts {
    pub(super) fn of(kubeconfig: &Kubeconfig) -> Self {
        Self {
            ca: kubeconfig.certificate_authority.clone().map(ca_of),
            identity: kubeconfig.client_certificate.clone().map(|(cert, key)| identity_of(cert, key)),
            token: kubeconfig.token.clone().map(token_of),
        }
    }
}

/// The files among the materials, and what makes a value of their contents together with those that need no file.
fn assemble<T: 'static>(
    materials: Vec<Material>,
    parse: fn(&[Vec<u8>]) -> Result<T, String>,
) -> (Vec<PathBuf>, Parse<T>) {
    let path = |material: &Material| match material {
        Material::File(path) => Some(path.clone()),
        Material::Inline(_) => None,
    };
    let paths = materials.iter().filter_map(path).collect();
    let parse = move |contents: &[Vec<u8>]| {
        let mut read = contents.iter();
        let all: Vec<Vec<u8>> = materials
            .iter()
            .map(|material| match material {
                Material::Inline(bytes) => bytes.clone(),
                Material::File(_) => read.next().cloned().unwrap_or_default(),
            })
            .collect();
        parse(&all)
    };
    (paths, Box::new(parse))
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
        return Err("it is empty".to_owned());
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
    /// Where the rest is from, if from there.
    kubeconfig: Option<Watched<Arc<Kubeconfig>>>,
    /// What the rest was made of.
    made_of: Option<Arc<Kubeconfig>>,
    ca: Option<Watched<Arc<RootCertStore>>>,
    identity: Option<Watched<Identity>>,
    /// Of the kubeconfig; others are kept beside.
    token: Option<Watched<Token>>,
    /// `tls-server-name` of the kubeconfig.
    server_name: Option<ServerName<'static>>,
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
    /// Not verifying is what the operator asked for.
    pub(super) insecure: bool,
    /// The name that the kubeconfig says backends have.
    pub(super) server_name: Option<ServerName<'static>>,
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
        self.follow_kubeconfig()?;
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

    /// Takes the parts from the kubeconfig as it is now.
    fn follow_kubeconfig(&mut self) -> Result<(), String> {
        let Some(kubeconfig) = optional(self.kubeconfig.as_mut())? else { return Ok(()) };
        if self.made_of.as_ref().is_some_and(|before| Arc::ptr_eq(before, &kubeconfig)) {
            return Ok(());
        }
        let parts = Parts::of(&kubeconfig);
        self.ca = match (self.ca.take(), parts.ca) {
            (Some(before), Some(source)) => Some(before.moved_to(source)),
            (None, Some(source)) => Some(Watched::new(source)),
            (_, None) => None,
        };
        self.identity = parts.identity.map(Watched::new);
        self.token = parts.token.map(Watched::new);
        // Validated when the file was read.
        self.server_name = kubeconfig.server_name.clone().and_then(|name| ServerName::try_from(name).ok());
        self.insecure = kubeconfig.insecure_skip_tls_verify;
        (self.made_of, self.built) = (Some(kubeconfig), None);
        Ok(())
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
            insecure: self.insecure,
            server_name: self.server_name.clone(),
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

    /// For one fresh connection, after [`Self::tls`]: looks at the file again.
    pub(super) fn token(&self) -> Result<Option<Token>, String> {
        match (&self.token, &self.tls) {
            (Some(token), _) => optional(Some(&mut *lock(token))),
            (None, Some(tls)) => optional(lock(tls).token.as_mut()),
            (None, None) => Ok(None),
        }
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
    kubeconfig: Option<PathBuf>,
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
            kubeconfig: check.kubeconfig.clone(),
            ca: check.ca_file.clone().filter(|_| !insecure),
            identity: check.client_cert.as_ref().map(|it| (it.cert_file.clone(), it.key_file.clone())),
            insecure,
            http: check.kind == CheckKind::Https,
        };
        let new = || {
            Arc::new(Mutex::new(Tls {
                kubeconfig: key.kubeconfig.clone().map(|path| Watched::new(kubeconfig_source(path))),
                made_of: None,
                token: None,
                server_name: None,
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
