//! A cluster's certificate authority and the certificates it signs.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};

/// A certificate authority. Its files live in the directory it was made in.
pub struct Authority {
    directory: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, as PEM files.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Authority").field("directory", &self.directory).finish_non_exhaustive()
    }
}

impl Authority {
    /// Makes a new authority and writes its certificate to `<directory>/ca.crt`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn new(directory: &Path) -> Result<Self> {
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = name("kubernetes", &[]);
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate()?;
        let certificate = parameters.self_signed(&key)?;
        fs::create_dir_all(directory)?;
        let authority = Self { directory: directory.to_owned(), issuer: Issuer::new(parameters, key) };
        fs::write(authority.file(), certificate.pem()).context("writing the CA certificate")?;
        Ok(authority)
    }

    /// The PEM file with the authority's certificate.
    pub fn file(&self) -> PathBuf {
        self.directory.join("ca.crt")
    }

    /// A serving certificate for these addresses and the names a kube-apiserver has.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub fn server(&self, label: &str, addresses: &[IpAddr]) -> Result<Identity> {
        let names = ["kubernetes", "kubernetes.default.svc", "localhost"].map(String::from);
        let mut parameters = CertificateParams::new(names)?;
        parameters.distinguished_name = name("kube-apiserver", &[]);
        parameters.subject_alt_names.extend(addresses.iter().copied().map(SanType::IpAddress));
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.sign(label, &parameters)
    }

    /// A certificate for both ends of a connection, as the members of an etcd need it: each is its peers' client.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub fn peer(&self, label: &str, addresses: &[IpAddr]) -> Result<Identity> {
        let mut parameters = CertificateParams::new(["localhost".to_owned()])?;
        parameters.distinguished_name = name(label, &[]);
        parameters.subject_alt_names.extend(addresses.iter().copied().map(SanType::IpAddress));
        parameters.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(label, &parameters)
    }

    /// A client certificate for a user, with Kubernetes groups (such as `system:masters`) as organisations.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub fn client(&self, user: &str, groups: &[&str]) -> Result<Identity> {
        self.sign(user, &client(user, groups))
    }

    /// A client certificate that is over at this time, to the second.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub fn client_until(&self, user: &str, not_after: SystemTime) -> Result<Identity> {
        let mut parameters = client(user, &[]);
        parameters.not_after = not_after.into();
        self.sign(user, &parameters)
    }

    fn sign(&self, label: &str, parameters: &CertificateParams) -> Result<Identity> {
        let key = KeyPair::generate()?;
        let certificate = parameters.signed_by(&key, &self.issuer)?;
        let identity = Identity {
            certificate: self.directory.join(format!("{label}.crt")),
            key: self.directory.join(format!("{label}.key")),
        };
        fs::write(&identity.certificate, certificate.pem())?;
        fs::write(&identity.key, key.serialize_pem())?;
        Ok(identity)
    }
}

fn client(user: &str, groups: &[&str]) -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = name(user, groups);
    parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    parameters
}

fn name(common_name: &str, organisations: &[&str]) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    for organisation in organisations {
        name.push(DnType::OrganizationName, *organisation);
    }
    name.push(DnType::CommonName, common_name);
    name
}
