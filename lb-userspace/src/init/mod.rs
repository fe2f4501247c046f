//! `sheave init`: writes a first configuration from what a cluster says of itself.
//!
//! Asks the apiserver of a kubeconfig who all the apiservers are, looks at each of them as a check would, and writes
//! the file that fits. Nothing that exists is overwritten, and nothing is written unless all of it is known to be right.

mod endpoints;
mod render;

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    net::{IpAddr, SocketAddr},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use futures_util::future::join_all;

use crate::{
    config::{Check, Config, ConfigError},
    health::{Asker, CheckReport, Outcome, check_once},
    kubeconfig::{self, Kubeconfig, KubeconfigError, Material, Server},
    network::Network,
};
use render::{Draft, Seen};

/// The slices of the service `default/kubernetes`, which the apiservers keep themselves.
const ENDPOINT_SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices\
                               ?labelSelector=kubernetes.io%2Fservice-name%3Dkubernetes";
/// The name that every apiserver's certificate holds.
const USUAL_NAME: &str = "kubernetes";

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// Something has the name already.
    #[error("{} exists and is not overwritten\n   = help: name another file with --output FILE, or move it away", .0.display())]
    Exists(PathBuf),
    /// A file could not be read or written.
    #[error("cannot {doing} {}: {reason}", .file.display())]
    File {
        /// `read`, `write`.
        doing: &'static str,
        /// Which.
        file: PathBuf,
        /// What the kernel said.
        reason: io::Error,
    },
    /// The kubeconfig is of no use.
    #[error("kubeconfig {}: {reason}", .file.display())]
    Kubeconfig {
        /// Where it is.
        file: PathBuf,
        /// What is wrong with it.
        reason: KubeconfigError,
    },
    /// The kubeconfig's server cannot be asked.
    #[error("the server of kubeconfig {}{}, {reason}", .file.display(), .place.as_ref().map(|it| format!(", {it}")).unwrap_or_default())]
    Server {
        /// Where the kubeconfig is.
        file: PathBuf,
        /// Host and port of the server, where they can be told: the rest of its URL may be a secret.
        place: Option<String>,
        /// What is wrong with it.
        reason: String,
    },
    /// It answered, and not with what was asked for.
    #[error("cannot learn who the apiservers are: {0}")]
    Answer(String),
    /// The VIP cannot be one.
    #[error("--vip {vip}: {reason}")]
    Vip {
        /// As it was given.
        vip: IpAddr,
        /// Why not.
        reason: String,
    },
    /// What was drafted is no configuration.
    #[error(transparent)]
    Draft(#[from] ConfigError),
}

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// A kubeconfig of somebody who may list EndpointSlices in the namespace `default`.
    pub kubeconfig: PathBuf,
    /// The address clients will use.
    pub vip: IpAddr,
    /// The file to be written. A CA that is only inside the kubeconfig is written beside it, as `ca.crt`.
    pub output: PathBuf,
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// The files that were written.
    pub written: Vec<PathBuf>,
    /// What the operator has still to do, in order.
    pub remaining: Vec<String>,
}

/// Does it.
///
/// # Errors
///
/// Before anything is written; a CA file that was written goes again when the rest fails.
pub async fn run(request: &Request) -> Result<Done, InitError> {
    if fs::symlink_metadata(&request.output).is_ok() {
        return Err(InitError::Exists(request.output.clone()));
    }
    let kubeconfig = read_kubeconfig(&request.kubeconfig)?;
    let backends = apiservers(&request.kubeconfig, &kubeconfig).await?;
    let backends = suitable(backends, request.vip)?;
    let mut files = Files::default();
    let ca_file = files.certificate_authority(&kubeconfig, &request.output)?;
    let seen = look_at(&backends, ca_file.as_deref(), &kubeconfig).await;
    let draft = Draft { vip: request.vip, ca_file, seen, here: Here::look(request.vip, &backends).await };
    let text = draft.text();
    // What we write must be what `sheave run` takes.
    Config::parse(&text, &request.output)?;
    files.create(&request.output, text.as_bytes(), 0o644)?;
    Ok(Done { remaining: draft.remaining(&request.output), written: files.keep() })
}

fn read_kubeconfig(file: &Path) -> Result<Kubeconfig, InitError> {
    let failed = |reason| InitError::File { doing: "read", file: file.to_owned(), reason };
    let contents = kubeconfig::read_file(file).map_err(failed)?;
    let directory = file.parent().unwrap_or(Path::new(""));
    Kubeconfig::parse(&contents, directory)
        .map_err(|reason| InitError::Kubeconfig { file: file.to_owned(), reason })
}

/// Asks the server of the kubeconfig.
async fn apiservers(file: &Path, kubeconfig: &Kubeconfig) -> Result<Vec<SocketAddr>, InitError> {
    let failed = |reason| InitError::Server {
        file: file.to_owned(),
        place: kubeconfig::place(&kubeconfig.server),
        reason,
    };
    let server = Server::of(kubeconfig).map_err(failed)?;
    let addresses = server.addresses().await.map_err(failed)?;
    let check = Check { kubeconfig: Some(file.to_owned()), ..Check::default() };
    let mut silence = String::new();
    for address in &addresses {
        let asker = Asker::new(*address, server.host_name(), &check);
        match asker.get(&format!("{}{ENDPOINT_SLICES}", server.prefix)).await {
            Ok(answer) => return endpoints::read(&answer).map_err(InitError::Answer),
            Err(report) => silence = format!("{address}: {}", report.detail()),
        }
    }
    Err(InitError::Answer(silence))
}

/// The apiservers of the VIP's family, which must not have the VIP for their own address.
fn suitable(apiservers: Vec<SocketAddr>, vip: IpAddr) -> Result<Vec<SocketAddr>, InitError> {
    let refuse = |reason: String| Err(InitError::Vip { vip, reason });
    let family = if vip.is_ipv4() { "IPv4" } else { "IPv6" };
    let suitable: Vec<_> =
        apiservers.iter().copied().filter(|address| address.is_ipv4() == vip.is_ipv4()).collect();
    if suitable.is_empty() {
        let known: Vec<_> = apiservers.iter().map(ToString::to_string).collect();
        return refuse(format!("no apiserver has an {family} address; they are {}", known.join(", ")));
    }
    if suitable.iter().any(|address| address.ip() == vip) {
        return refuse(
            "it is the address of one of the apiservers: choose one that no host has for itself".to_owned(),
        );
    }
    Ok(suitable)
}

/// Looks at each apiserver without a credential, as a check would.
async fn look_at(backends: &[SocketAddr], ca_file: Option<&Path>, kubeconfig: &Kubeconfig) -> Vec<Seen> {
    let check = Check {
        ca_file: ca_file.map(Path::to_owned),
        insecure_skip_tls_verify: ca_file.is_none(),
        ..Check::default()
    };
    let name = kubeconfig.server_name.as_deref().unwrap_or(USUAL_NAME);
    join_all(backends.iter().map(|address| async {
        let report = check_once(*address, &check).await;
        let (report, server_name) = match report.certificate_rejected {
            false => (report, None),
            true => {
                let named = Check { server_name: Some(name.to_owned()), ..check.clone() };
                (check_once(*address, &named).await, Some(name.to_owned()))
            }
        };
        seen(*address, report, server_name)
    }))
    .await
}

fn seen(address: SocketAddr, report: CheckReport, server_name: Option<String>) -> Seen {
    let trouble = match (report.outcome, report.http_status) {
        (Outcome::Pass, _) | (_, Some(401 | 403)) => None,
        _ => Some(report.detail()),
    };
    Seen {
        address,
        unauthenticated: matches!(report.http_status, Some(401 | 403)),
        server_name: server_name.filter(|_| !report.certificate_rejected),
        trouble,
        certificate: report.server_certificate,
    }
}

/// What this host has to do with it.
#[derive(Debug, Default)]
struct Here {
    /// The interface that carries the VIP now.
    vip_on: Option<String>,
    /// The interfaces by which the apiservers are reached.
    interfaces: Vec<String>,
}

impl Here {
    /// Where the network cannot be asked, nothing is known.
    async fn look(vip: IpAddr, backends: &[SocketAddr]) -> Self {
        let Ok((network, _)) = Network::open().await else { return Self::default() };
        let name = |index| network.interface(index).ok().map(|interface| interface.name);
        let mut interfaces = Vec::new();
        for backend in backends {
            if let Ok(route) = network.route_to(backend.ip()).await
                && !route.local
                && let Some(name) = name(route.interface)
                && !interfaces.contains(&name)
            {
                interfaces.push(name);
            }
        }
        Self { vip_on: network.interface_carrying(vip).and_then(name), interfaces }
    }
}

/// The files that were written; gone again unless they are kept.
#[derive(Default)]
struct Files(Vec<PathBuf>);

impl Files {
    /// The cluster's CA as a file: the one the kubeconfig names, or one beside `output`.
    fn certificate_authority(
        &mut self,
        kubeconfig: &Kubeconfig,
        output: &Path,
    ) -> Result<Option<PathBuf>, InitError> {
        let failed = |doing, file: &Path| {
            let file = file.to_owned();
            move |reason| InitError::File { doing, file, reason }
        };
        match &kubeconfig.certificate_authority {
            None => Ok(None),
            Some(Material::File(path)) => std::path::absolute(path).map(Some).map_err(failed("find", path)),
            Some(Material::Inline(pem)) => {
                let path = output.with_file_name("ca.crt");
                match fs::read(&path) {
                    // From an earlier attempt, or kubeadm's own: it is what we would write.
                    Ok(there) if there == *pem => {}
                    Ok(_) => return Err(InitError::Exists(path)),
                    Err(_) => self.create(&path, pem, 0o644)?,
                }
                std::path::absolute(&path).map(Some).map_err(failed("find", &path))
            }
        }
    }

    /// Writes a file that does not exist yet.
    fn create(&mut self, path: &Path, contents: &[u8], mode: u32) -> Result<(), InitError> {
        let failed = |reason: io::Error| match reason.kind() {
            io::ErrorKind::AlreadyExists => InitError::Exists(path.to_owned()),
            _ => InitError::File { doing: "write", file: path.to_owned(), reason },
        };
        if let Some(directory) = path.parent().filter(|directory| *directory != Path::new("")) {
            fs::create_dir_all(directory).map_err(failed)?;
        }
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(failed)?;
        self.0.push(path.to_owned());
        file.write_all(contents).map_err(failed)
    }

    fn keep(mut self) -> Vec<PathBuf> {
        std::mem::take(&mut self.0)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for file in &self.0 {
            // What is left is in nobody's way: it is looked at before anything is written.
            let _ = fs::remove_file(file);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn the_vip_has_a_family_and_is_nobodys_own_address() {
        let both = addresses(&["10.0.0.1:6443", "[fd00::1]:6443"]);
        let vip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(suitable(both.clone(), vip("10.0.0.100")).unwrap(), addresses(&["10.0.0.1:6443"]));
        assert_eq!(suitable(both.clone(), vip("fd00::100")).unwrap(), addresses(&["[fd00::1]:6443"]));
        let error = suitable(both, vip("10.0.0.1")).unwrap_err().to_string();
        assert!(error.contains("--vip 10.0.0.1: it is the address of one of the apiservers"), "{error}");
        let error = suitable(addresses(&["10.0.0.1:6443"]), vip("fd00::1")).unwrap_err().to_string();
        assert!(error.contains("no apiserver has an IPv6 address; they are 10.0.0.1:6443"), "{error}");
    }

    #[tokio::test]
    async fn a_password_in_the_servers_url_is_refused_and_never_shown() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("admin.conf");
        for (server, shown) in [
            (
                "https://admin:hunter2@192.0.2.1:6443/hunter2",
                "admin.conf, 192.0.2.1:6443, is given with a password",
            ),
            ("https://hunter2@[2001:db8::1]", "admin.conf, [2001:db8::1], is given with a password"),
            (
                "http://admin:hunter2@master-1:8080?hunter2",
                "admin.conf, master-1:8080, is not an https:// URL",
            ),
            ("https://admin:hunter2@hunter2@master-1", "admin.conf, master-1, is given with a password"),
            ("https://admin:hunter2 @master-1", "admin.conf, is not a URL"),
            ("hunter2", "admin.conf, is not an https:// URL"),
            // As people write them: the password holds what ends the authority.
            ("https://hunter2/x@master-1", "admin.conf, is given with a password"),
            ("https://hunter2#x@master-1", "admin.conf, is given with a password"),
        ] {
            let text = format!(
                "current-context: c\ncontexts: [{{name: c, context: {{cluster: c}}}}]\n\
                 clusters: [{{name: c, cluster: {{server: '{server}', insecure-skip-tls-verify: true}}}}]\n"
            );
            let kubeconfig = Kubeconfig::parse(text.as_bytes(), directory.path()).unwrap();
            let error = apiservers(&file, &kubeconfig).await.unwrap_err();
            let said = error.to_string();
            assert!(said.contains(shown), "{server}: {said}");
            assert!(!format!("{said} {error:?}").contains("hunter2"), "{server}: {said}");
        }
    }

    #[test]
    fn files_go_again_unless_they_are_kept_and_none_is_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/sheave.toml");
        let mut files = Files::default();
        files.create(&path, b"a", 0o644).unwrap();
        assert!(matches!(Files::default().create(&path, b"b", 0o644), Err(InitError::Exists(_))));
        drop(files);
        assert!(!path.exists());
        let mut files = Files::default();
        files.create(&path, b"c", 0o644).unwrap();
        assert_eq!(files.keep(), std::slice::from_ref(&path));
        assert_eq!(fs::read(path).unwrap(), b"c");
    }
}
