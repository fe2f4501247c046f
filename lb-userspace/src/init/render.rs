//! What is written, and what is left to do. Pure.

use std::{
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};

use super::Here;
use crate::health::CertificateFacts;

/// Where `sheave rbac` says to put the token.
const TOKEN_FILE: &str = "/etc/sheave/token";

/// An apiserver, as one check without a credential saw it.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) address: SocketAddr,
    /// It wants to know who asks.
    pub(super) unauthenticated: bool,
    /// Its certificate is not for its address, but for this name.
    pub(super) server_name: Option<String>,
    /// Why it is neither.
    pub(super) trouble: Option<String>,
    /// What it showed.
    pub(super) certificate: Option<Arc<CertificateFacts>>,
}

/// All that the file depends on.
#[derive(Debug)]
pub(super) struct Draft {
    pub(super) vip: IpAddr,
    /// None: the kubeconfig verifies nobody.
    pub(super) ca_file: Option<PathBuf>,
    /// At least one.
    pub(super) seen: Vec<Seen>,
    pub(super) here: Here,
}

impl Draft {
    fn needs_token(&self) -> bool {
        self.seen.iter().any(|seen| seen.unauthenticated)
    }

    /// The configuration file.
    pub(super) fn text(&self) -> String {
        let port = self.seen.first().map_or(6443, |seen| seen.address.port());
        let mut text =
            String::from("# Written by `sheave init`. Every key and its default: docs/configuration.md\n\n");
        // Writing to a String cannot fail.
        if !self.here.interfaces.is_empty() {
            let _ = writeln!(
                text,
                "[dataplane]\n# From the routes; the apiservers are behind {}.\ninterfaces = \"auto\"\n",
                self.here.interfaces.join(", ")
            );
        }
        let _ = writeln!(
            text,
            "[vip]\n# follow: whoever puts the VIP on this host owns it (keepalived, kube-vip, you); own: sheave does.\n\
             mode = \"follow\"\n"
        );
        let backends: String = self.seen.iter().map(|seen| format!("    \"{}\",\n", seen.address)).collect();
        let _ = writeln!(
            text,
            "[[service]]\nname = \"kube-apiserver\"\nlisten = [\"{}\"]\nbackends = [\n{backends}]\n",
            SocketAddr::new(self.vip, port)
        );
        text.push_str(&self.check());
        text
    }

    fn check(&self) -> String {
        let mut text = String::from("[service.check]\n");
        let quoted = |text: &str| toml::Value::from(text).to_string();
        let _ = match &self.ca_file {
            Some(path) => writeln!(text, "ca_file = {}", quoted(&path.display().to_string())),
            None => writeln!(
                text,
                "# The kubeconfig names no CA: name the cluster's here.\n# ca_file = \"/etc/sheave/ca.crt\""
            ),
        };
        if let Some(name) = self.seen.iter().find_map(|seen| seen.server_name.as_deref()) {
            let _ = writeln!(
                text,
                "# The apiservers' certificates are not for their addresses.\nserver_name = {}",
                quoted(name)
            );
        }
        if self.needs_token() {
            let _ = writeln!(
                text,
                "# /readyz is not for anybody here: `sheave rbac` prints an account for the checks.\n\
                 token_file = \"{TOKEN_FILE}\""
            );
        }
        text
    }

    /// What the operator has to do next, in order.
    pub(super) fn remaining(&self, output: &Path) -> Vec<String> {
        let mut steps = Vec::new();
        let file = output.display();
        if self.ca_file.is_none() {
            steps.push(format!(
                "name the cluster's CA in {file} (ca_file): the kubeconfig has insecure-skip-tls-verify"
            ));
        }
        if self.needs_token() {
            steps.push(format!(
                "give the checks a credential, since the apiservers answer 401 or 403 without: sheave rbac | kubectl \
                 apply -f - , then put the token into {TOKEN_FILE} as its first lines say"
            ));
        }
        for seen in &self.seen {
            if let Some(trouble) = &seen.trouble {
                steps.push(format!("look at {}: {trouble}", seen.address));
            }
        }
        let lacking = |seen: &&Seen| {
            seen.certificate.as_ref().is_some_and(|facts| !facts.addresses.contains(&self.vip))
        };
        if let Some(seen) = self.seen.iter().find(lacking) {
            steps.push(format!(
                "add {} to the apiservers' certificates (kubeadm: apiServer.certSANs): that of {} does not hold it, \
                 and clients would refuse it; `sheave doctor` says how",
                self.vip, seen.address
            ));
        }
        if self.here.vip_on.is_none() {
            steps.push(format!(
                "bring the VIP {} here: with keepalived or kube-vip, or let sheave do it (mode = \"own\" in {file})",
                self.vip
            ));
        }
        steps.push(format!("check this host: sheave doctor --config {file}"));
        steps.push(format!("start: sheave run --config {file}"));
        steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn seen(address: &str) -> Seen {
        let address: SocketAddr = address.parse().unwrap();
        let certificate = CertificateFacts {
            subject: String::new(),
            names: vec!["kubernetes".to_owned()],
            addresses: vec![address.ip(), "10.0.0.100".parse().unwrap()],
            not_after: 0,
        };
        Seen {
            address,
            unauthenticated: false,
            server_name: None,
            trouble: None,
            certificate: Some(Arc::new(certificate)),
        }
    }

    fn draft() -> Draft {
        Draft {
            vip: "10.0.0.100".parse().unwrap(),
            ca_file: Some("/etc/sheave/a \"strange\" ca.crt".into()),
            seen: vec![seen("10.0.0.1:6443"), seen("10.0.0.2:6443")],
            here: Here { vip_on: Some("eth0".to_owned()), interfaces: vec!["eth0".to_owned()] },
        }
    }

    #[test]
    fn what_is_written_is_a_configuration() {
        let (config, warnings) = Config::parse(&draft().text(), "sheave.toml").unwrap();
        assert!(warnings.is_empty(), "{warnings:?}");
        let service = &config.services[0];
        assert_eq!(service.listen, ["10.0.0.100:6443".parse().unwrap()]);
        assert_eq!(service.backends.len(), 2);
        assert_eq!(service.check.ca_file, draft().ca_file);
        assert_eq!((&service.check.token_file, &service.check.server_name), (&None, &None));
        let remaining = draft().remaining(Path::new("/etc/sheave/sheave.toml"));
        assert_eq!(
            remaining,
            [
                "check this host: sheave doctor --config /etc/sheave/sheave.toml",
                "start: sheave run --config /etc/sheave/sheave.toml"
            ]
        );
    }

    #[test]
    fn what_is_strange_is_written_and_said() {
        let mut draft = draft();
        draft.ca_file = None;
        draft.here = Here::default();
        draft.seen[0].unauthenticated = true;
        draft.seen[0].server_name = Some("kubernetes".to_owned());
        draft.seen[1].trouble = Some("Layer4 timeout".to_owned());
        draft.seen[0].certificate = Some(Arc::new(CertificateFacts {
            addresses: vec![],
            ..draft.seen[0].certificate.as_deref().unwrap().clone()
        }));
        let (config, _) = Config::parse(&draft.text(), "sheave.toml").unwrap();
        let check = &config.services[0].check;
        assert_eq!(check.server_name.as_deref(), Some("kubernetes"));
        assert_eq!(check.token_file.as_deref(), Some(Path::new(TOKEN_FILE)));
        let remaining = draft.remaining(Path::new("sheave.toml")).join("\n");
        for said in [
            "name the cluster's CA",
            "sheave rbac",
            "look at 10.0.0.2:6443: Layer4 timeout",
            "certSANs",
            "mode = \"own\"",
        ] {
            assert!(remaining.contains(said), "{said}:\n{remaining}");
        }
    }
}
