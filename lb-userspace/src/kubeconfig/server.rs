//! The server of a kubeconfig: where it is, and what its certificate is for.

use std::{
    fs, io,
    io::Read as _,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use hyper::Uri;
use tokio::net::lookup_host;

use super::Kubeconfig;

/// Larger than any kubeconfig of a person.
const KUBECONFIG_MAX: u64 = 4 << 20;

/// The bytes of a kubeconfig.
///
/// # Errors
///
/// The kernel's; a file that is far too long is cut, and then no kubeconfig.
pub(crate) fn read_file(file: &Path) -> io::Result<Vec<u8>> {
    let mut contents = Vec::new();
    fs::File::open(file)?.take(KUBECONFIG_MAX).read_to_end(&mut contents)?;
    Ok(contents)
}

/// Where a kubeconfig's server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Server {
    /// Its name or address: what its certificate is for.
    host: String,
    port: u16,
    /// Before every path, without a slash at its end.
    pub(crate) prefix: String,
}

impl Server {
    /// # Errors
    ///
    /// Why it cannot be asked, in words that follow its URL.
    pub(crate) fn of(kubeconfig: &Kubeconfig) -> Result<Self, String> {
        if kubeconfig.has_proxy {
            return Err("is behind a proxy (proxy-url): use a kubeconfig without".to_owned());
        }
        let uri: Uri = kubeconfig.server.parse().map_err(|_| "is not a URL".to_owned())?;
        if uri.scheme_str() != Some("https") {
            return Err("is not an https:// URL".to_owned());
        }
        if kubeconfig.server.contains('@') {
            return Err("is given with a password: use a kubeconfig with a certificate or a token".to_owned());
        }
        let written = uri.host().unwrap_or_default();
        Ok(Self {
            host: written.trim_matches(['[', ']']).to_owned(),
            port: uri.port_u16().unwrap_or(443),
            prefix: uri.path().trim_end_matches('/').to_owned(),
        })
    }

    /// The name that the certificate must hold, unless the kubeconfig names another.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    /// The same, unless the server is given by its address.
    pub(crate) fn host_name(&self) -> Option<&str> {
        Some(self.host.as_str()).filter(|host| host.parse::<IpAddr>().is_err())
    }

    /// Where it is now, at least one address.
    ///
    /// # Errors
    ///
    /// Why that is not known, in words that follow its URL.
    pub(crate) async fn addresses(&self) -> Result<Vec<SocketAddr>, String> {
        if let Ok(ip) = self.host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(ip, self.port)]);
        }
        let found = lookup_host((self.host.as_str(), self.port)).await;
        let addresses: Vec<_> = found.map_err(|error| format!("cannot be looked up: {error}"))?.collect();
        match addresses.is_empty() {
            true => Err("has no address".to_owned()),
            false => Ok(addresses),
        }
    }
}

/// What may be shown of a server's URL: not `user:password@`, nor a path or a query that may be as secret.
pub(crate) fn place(server: &str) -> Option<String> {
    let uri: Uri = server.parse().ok()?;
    let authority = uri.authority().filter(|_| uri.scheme().is_some())?.as_str();
    // A password may hold what ends the authority: then what looks like the host is a part of it.
    let host = uri.host().filter(|_| authority.contains('@') || !server.contains('@'))?;
    Some(match uri.port_u16() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_server_is_an_https_url() {
        let of = |server: &str| {
            let text = format!(
                "current-context: c\ncontexts: [{{name: c, context: {{cluster: c}}}}]\n\
                 clusters: [{{name: c, cluster: {{server: '{server}', insecure-skip-tls-verify: true}}}}]\n"
            );
            Server::of(&Kubeconfig::parse(text.as_bytes(), Path::new("/")).unwrap())
        };
        let at = |text: &str| vec![text.parse::<SocketAddr>().unwrap()];
        let server = of("https://[fd00::1]:6443/k8s/clusters/c-1/").unwrap();
        assert_eq!(server.addresses().await.unwrap(), at("[fd00::1]:6443"));
        assert_eq!(
            (server.prefix.as_str(), server.host(), server.host_name()),
            ("/k8s/clusters/c-1", "fd00::1", None)
        );
        assert_eq!(of("https://192.0.2.1").unwrap().addresses().await.unwrap(), at("192.0.2.1:443"));
        assert_eq!(of("https://localhost:1").unwrap().host_name(), Some("localhost"));
        for wrong in ["", "http://192.0.2.1", "192.0.2.1:6443", "https://"] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }
}
