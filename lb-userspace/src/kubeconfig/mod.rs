//! kubeconfig files: the cluster and user of the current context, as far as a check needs them.
//!
//! The format is `k8s.io/client-go/tools/clientcmd/api/v1`. Whatever would make us somebody else than the file says
//! (a plugin, a password, impersonation) is refused rather than left out. No message quotes the file: it holds keys.

mod server;

use std::{
    fmt,
    path::{Path, PathBuf},
};

use data_encoding::BASE64;
use serde::{Deserialize, Deserializer, de::IgnoredAny};

pub(crate) use server::{Server, place, read_file};

/// What the current context leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kubeconfig {
    /// `server`: a URL. Checks ask the backends themselves, whatever it says.
    pub server: String,
    /// The cluster's CA, as PEM; None only with [`Self::insecure_skip_tls_verify`].
    pub certificate_authority: Option<Material>,
    /// `insecure-skip-tls-verify`
    pub insecure_skip_tls_verify: bool,
    /// `tls-server-name`
    pub server_name: Option<String>,
    /// Whether the file wants a proxy between us and `server`.
    pub has_proxy: bool,
    /// Certificate chain and private key, as PEM.
    pub client_certificate: Option<(Material, Material)>,
    /// A bearer token.
    pub token: Option<Material>,
}

/// Something inside the file, or in another that it names.
#[derive(Clone, PartialEq, Eq)]
pub enum Material {
    /// The bytes themselves, decoded.
    Inline(Vec<u8>),
    /// Where they are; absolute, or relative to where this process runs as the kubeconfig's own path was.
    File(PathBuf),
}

/// Inline material is a secret until proven otherwise.
impl fmt::Debug for Material {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inline(_) => out.write_str("Inline(redacted)"),
            Self::File(path) => out.debug_tuple("File").field(path).finish(),
        }
    }
}

/// What is wrong with a kubeconfig, and what to do. Never quotes it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct KubeconfigError(String);

fn wrong<T>(message: impl Into<String>) -> Result<T, KubeconfigError> {
    Err(KubeconfigError(message.into()))
}

impl Kubeconfig {
    /// Reads the text of a kubeconfig; relative paths in it are taken from `directory`, the one it is in.
    ///
    /// # Errors
    ///
    /// When it is no kubeconfig, names no context, or wants what we do not do.
    pub fn parse(contents: &[u8], directory: &Path) -> Result<Self, KubeconfigError> {
        let file = read(contents)?;
        let context = current_context(&file)?;
        let cluster = &named(&file.clusters, &context.cluster, "cluster")?.cluster;
        let nobody = User::default();
        let user = match context.user.as_str() {
            "" => &nobody,
            name => &named(&file.users, name, "user")?.user,
        };
        refuse_unsupported(user)?;
        let paths = Paths(directory);
        Ok(Self {
            server: cluster.server.clone(),
            certificate_authority: certificate_authority(cluster, &paths)?,
            insecure_skip_tls_verify: cluster.insecure_skip_tls_verify,
            server_name: server_name(cluster)?,
            has_proxy: !cluster.proxy_url.is_empty(),
            client_certificate: client_certificate(user, &paths)?,
            // As client-go: what the file says may be newer.
            token: match (user.token_file.as_str(), user.token.as_str()) {
                ("", "") => None,
                ("", token) => Some(Material::Inline(token.as_bytes().to_vec())),
                (file, _) => Some(paths.file(file)),
            },
        })
    }
}

/// The whole file. Keys that do not concern us (`apiVersion`, `preferences`, `extensions`) are left alone.
#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct File {
    #[serde(deserialize_with = "or_default")]
    current_context: String,
    #[serde(deserialize_with = "or_default")]
    contexts: Vec<Entry>,
    #[serde(deserialize_with = "or_default")]
    clusters: Vec<Entry>,
    #[serde(deserialize_with = "or_default")]
    users: Vec<Entry>,
}

/// An entry of any of the three lists: a name, and one of the bodies.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    #[serde(deserialize_with = "or_default")]
    name: String,
    #[serde(deserialize_with = "or_default")]
    context: Context,
    #[serde(deserialize_with = "or_default")]
    cluster: Cluster,
    #[serde(deserialize_with = "or_default")]
    user: User,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Context {
    #[serde(deserialize_with = "or_default")]
    cluster: String,
    #[serde(deserialize_with = "or_default")]
    user: String,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Cluster {
    #[serde(deserialize_with = "or_default")]
    server: String,
    #[serde(deserialize_with = "or_default")]
    tls_server_name: String,
    #[serde(deserialize_with = "or_default")]
    insecure_skip_tls_verify: bool,
    #[serde(deserialize_with = "or_default")]
    certificate_authority: String,
    #[serde(deserialize_with = "or_default")]
    certificate_authority_data: String,
    #[serde(deserialize_with = "or_default")]
    proxy_url: String,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct User {
    #[serde(deserialize_with = "or_default")]
    client_certificate: String,
    #[serde(deserialize_with = "or_default")]
    client_certificate_data: String,
    #[serde(deserialize_with = "or_default")]
    client_key: String,
    #[serde(deserialize_with = "or_default")]
    client_key_data: String,
    #[serde(deserialize_with = "or_default")]
    token: String,
    #[serde(rename = "tokenFile", deserialize_with = "or_default")]
    token_file: String,
    exec: Option<IgnoredAny>,
    auth_provider: Option<IgnoredAny>,
    username: Option<IgnoredAny>,
    password: Option<IgnoredAny>,
    #[serde(rename = "as")]
    impersonated: Option<IgnoredAny>,
}

/// `key:` with nothing behind it is a key that is not there, as kubectl itself writes `users: null`.
fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

fn read(contents: &[u8]) -> Result<File, KubeconfigError> {
    let Ok(text) = std::str::from_utf8(contents) else { return wrong("it is not text, so no kubeconfig") };
    if text.trim().is_empty() {
        return wrong("the file is empty");
    }
    serde_saphyr::from_str(text).map_err(|error| {
        // The parser's own words quote the line.
        let place = error.location().map(|at| format!(" at line {}, column {}", at.line(), at.column()));
        KubeconfigError(format!("it is not a kubeconfig: wrong YAML{}", place.unwrap_or_default()))
    })
}

fn current_context(file: &File) -> Result<&Context, KubeconfigError> {
    if file.current_context.is_empty() {
        return wrong(
            "it has no current-context: choose one with `kubectl config use-context NAME --kubeconfig FILE`",
        );
    }
    let entry = file.contexts.iter().find(|entry| entry.name == file.current_context);
    match entry.map(|entry| &entry.context) {
        None => wrong("its current-context is not among its contexts"),
        Some(context) if context.cluster.is_empty() => wrong("its current context names no cluster"),
        Some(context) => Ok(context),
    }
}

fn named<'f>(entries: &'f [Entry], name: &str, what: &str) -> Result<&'f Entry, KubeconfigError> {
    match entries.iter().find(|entry| entry.name == name) {
        Some(entry) => Ok(entry),
        None => wrong(format!("the {what} of its current context is not among its {what}s")),
    }
}

fn refuse_unsupported(user: &User) -> Result<(), KubeconfigError> {
    const INSTEAD: &str = "give the check a token or client certificate instead (`sheave rbac` prints a \
                           service account that needs no role)";
    let unsupported = [
        (user.exec.is_some(), "an exec plugin: sheave runs no programs"),
        (user.auth_provider.is_some(), "an auth-provider, which kubectl itself no longer supports"),
        (
            user.username.is_some() || user.password.is_some(),
            "a username and password, which no apiserver takes",
        ),
        (user.impersonated.is_some(), "impersonation (`as`)"),
    ];
    match unsupported.iter().find(|(present, _)| *present) {
        Some((_, what)) => wrong(format!("its current user authenticates with {what}; {INSTEAD}")),
        None => Ok(()),
    }
}

/// Where relative paths begin.
struct Paths<'a>(&'a Path);

impl Paths<'_> {
    fn file(&self, written: &str) -> Material {
        Material::File(self.0.join(written))
    }

    /// Data goes before a file, as with client-go.
    fn material(&self, data: &str, file: &str, what: &str) -> Result<Option<Material>, KubeconfigError> {
        if data.is_empty() {
            return Ok((!file.is_empty()).then(|| self.file(file)));
        }
        let packed: String = data.split_ascii_whitespace().collect();
        match BASE64.decode(packed.as_bytes()) {
            Ok(bytes) => Ok(Some(Material::Inline(bytes))),
            Err(_) => wrong(format!("its {what}-data is not base64")),
        }
    }
}

fn certificate_authority(cluster: &Cluster, paths: &Paths<'_>) -> Result<Option<Material>, KubeconfigError> {
    const WHAT: &str = "certificate-authority";
    let data = &cluster.certificate_authority_data;
    let material = paths.material(data, &cluster.certificate_authority, WHAT)?;
    match (material, cluster.insecure_skip_tls_verify) {
        // kubectl refuses both together; the one that protects wins nothing then.
        (Some(_), true) => {
            wrong("its cluster has a certificate-authority and insecure-skip-tls-verify: keep one")
        }
        (None, false) => wrong(
            "its cluster has no certificate-authority: add the cluster's CA (the host's own list of CAs is not used)",
        ),
        (material, _) => Ok(material),
    }
}

fn server_name(cluster: &Cluster) -> Result<Option<String>, KubeconfigError> {
    match cluster.tls_server_name.as_str() {
        "" => Ok(None),
        name if rustls_pki_types::ServerName::try_from(name).is_err() => {
            wrong("its tls-server-name is neither a DNS name nor an address")
        }
        name => Ok(Some(name.to_owned())),
    }
}

fn client_certificate(
    user: &User,
    paths: &Paths<'_>,
) -> Result<Option<(Material, Material)>, KubeconfigError> {
    let certificate =
        paths.material(&user.client_certificate_data, &user.client_certificate, "client-certificate")?;
    let key = paths.material(&user.client_key_data, &user.client_key, "client-key")?;
    match (certificate, key) {
        (None, None) => Ok(None),
        (Some(certificate), Some(key)) => Ok(Some((certificate, key))),
        (Some(_), None) => wrong("its current user has a client-certificate and no client-key"),
        (None, Some(_)) => wrong("its current user has a client-key and no client-certificate"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KUBEADM: &str = "\
apiVersion: v1
kind: Config
preferences: {}
current-context: kubernetes-admin@kubernetes
contexts:
- name: kubernetes-admin@kubernetes
  context: {cluster: kubernetes, user: kubernetes-admin}
clusters:
- name: other
  cluster: {server: https://192.0.2.9:6443}
- name: kubernetes
  cluster:
    server: https://192.0.2.1:6443
    certificate-authority-data: Y2E=
users:
- name: kubernetes-admin
  user:
    client-certificate-data: Y2Vy
      dA==
    client-key-data: a2V5
";

    fn parse(text: &str) -> Result<Kubeconfig, KubeconfigError> {
        Kubeconfig::parse(text.as_bytes(), Path::new("/etc/kubernetes"))
    }

    fn complaint(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    fn inline(text: &str) -> Material {
        Material::Inline(text.as_bytes().to_vec())
    }

    #[test]
    fn kubeadms_file_is_read() {
        let kubeconfig = parse(KUBEADM).unwrap();
        assert_eq!(kubeconfig.server, "https://192.0.2.1:6443");
        assert_eq!(kubeconfig.certificate_authority, Some(inline("ca")));
        assert_eq!(kubeconfig.client_certificate, Some((inline("cert"), inline("key"))));
        assert_eq!((kubeconfig.token, kubeconfig.server_name), (None, None));
    }

    #[test]
    fn files_are_found_from_where_the_kubeconfig_is() {
        let text = "\
current-context: it
contexts: [{name: it, context: {cluster: it, user: kubelet}}]
clusters: [{name: it, cluster: {server: 'https://a', certificate-authority: pki/ca.crt, tls-server-name: kubernetes}}]
users:
- {name: kubelet, user: {client-certificate: /var/lib/kubelet/c.pem, client-key: ../k.pem, token: old, tokenFile: token}}
";
        let kubeconfig = parse(text).unwrap();
        let file = |path: &str| Material::File(path.into());
        assert_eq!(kubeconfig.certificate_authority, Some(file("/etc/kubernetes/pki/ca.crt")));
        assert_eq!(
            kubeconfig.client_certificate,
            Some((file("/var/lib/kubelet/c.pem"), file("/etc/kubernetes/../k.pem")))
        );
        assert_eq!(kubeconfig.token, Some(file("/etc/kubernetes/token")), "the file goes before the word");
        assert_eq!(kubeconfig.server_name.as_deref(), Some("kubernetes"));
    }

    #[test]
    fn a_json_kubeconfig_is_yaml_too() {
        let text = r#"{"current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "c"}}],
            "clusters": [{"name": "c", "cluster": {"server": "https://a", "insecure-skip-tls-verify": true}}],
            "users": null}"#;
        let kubeconfig = parse(text).unwrap();
        assert!(kubeconfig.insecure_skip_tls_verify && kubeconfig.client_certificate.is_none());
    }

    #[test]
    fn what_is_missing_or_not_supported_is_said() {
        let user = "    client-certificate-data: Y2Vy\n      dA==\n    client-key-data: a2V5\n";
        let with_user = |lines: &str| KUBEADM.replace(user, lines);
        for (text, said) in [
            (String::new(), "the file is empty"),
            ("hunter2: [".to_owned(), "wrong YAML"),
            ("just words".to_owned(), "wrong YAML"),
            ("a: b".to_owned(), "no current-context: choose one"),
            (KUBEADM.replace("current-context: ", "current-context: no-"), "not among its contexts"),
            (
                KUBEADM.replace("{cluster: kubernetes,", "{cluster: gone,"),
                "the cluster of its current context",
            ),
            (KUBEADM.replace("user: kubernetes-admin}", "user: gone}"), "the user of its current context"),
            (KUBEADM.replace("    certificate-authority-data: Y2E=\n", ""), "no certificate-authority"),
            (KUBEADM.replace("Y2E=", "hunter2!"), "certificate-authority-data is not base64"),
            (with_user("    client-key-data: a2V5\n"), "no client-certificate"),
            (with_user("    exec: {command: aws, args: [hunter2]}\n"), "an exec plugin"),
            (with_user("    auth-provider: {name: gcp}\n"), "auth-provider"),
            (with_user("    username: admin\n    password: hunter2\n"), "username and password"),
            (with_user("    token: hunter2\n    as: root\n"), "impersonation"),
        ] {
            let complaint = complaint(&text);
            assert!(complaint.contains(said), "{said}: {complaint}");
            assert!(!complaint.contains("hunter2") && !complaint.contains('\n'), "{complaint}");
        }
        assert!(parse(&with_user("    {}\n")).unwrap().token.is_none(), "nobody in particular");
    }

    #[test]
    fn secrets_are_not_shown() {
        assert!(!format!("{:?}", inline("hunter2")).contains("hunter2"));
        assert!(!format!("{:?}", parse(KUBEADM).unwrap()).contains(&format!("{:?}", b"key")));
    }

    #[test]
    fn a_bomb_of_aliases_is_refused_in_time() {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..12 {
            let earlier = format!("*a{}, ", level - 1).repeat(10);
            text.push_str(&format!("a{level}: &a{level} [{earlier}]\n"));
        }
        assert!(complaint(&text).contains("wrong YAML"), "{}", complaint(&text));
    }
}
