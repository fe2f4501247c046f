//! The way into an apiserver with the credential of a kubeconfig: for those who have more to say than a check.

use std::{net::SocketAddr, path::Path, time::Duration};

use hyper::header::HeaderValue;
use rustls_pki_types::ServerName;

use super::{
    connect::{Connected, TlsTarget, Transport, connect},
    credentials::{Credentials, Store, Token},
    report::CheckReport,
};
use crate::config::Check;

/// Connects with what a kubeconfig says, as it is at that moment.
pub(crate) struct Dialer {
    credentials: Credentials,
}

/// A connection that may be told everything.
pub(crate) struct Dialled {
    /// TLS, the server verified.
    pub(crate) transport: Box<dyn Transport>,
    /// Of every request, marked as sensitive. The client certificate was presented already.
    pub(crate) authorization: Option<HeaderValue>,
}

impl Dialer {
    /// The file may come later: see [`Dialer::dial`].
    pub(crate) fn new(kubeconfig: &Path) -> Self {
        let check = Check { kubeconfig: Some(kubeconfig.to_owned()), ..Check::default() };
        Self { credentials: Store::default().credentials(&check) }
    }

    /// Connects to `address`, TCP and TLS within `limit`. Its certificate must be for `name`, unless the kubeconfig names
    /// another.
    ///
    /// # Errors
    ///
    /// What went wrong, in words. Whoever cannot be verified is not connected to, unless the kubeconfig says
    /// `insecure-skip-tls-verify`.
    pub(crate) async fn dial(
        &self,
        address: SocketAddr,
        name: &str,
        limit: Duration,
    ) -> Result<Dialled, String> {
        let tls = self.credentials.tls()?.ok_or("the kubeconfig is not there")?;
        if !tls.verified && !tls.insecure {
            return Err("the CA that the kubeconfig names is not there yet".to_owned());
        }
        let token = self.credentials.token()?;
        let own_name = || ServerName::try_from(name.to_owned()).ok();
        let name = tls.server_name.clone().or_else(own_name).unwrap_or(ServerName::from(address.ip()));
        let target = TlsTarget { config: &tls.config, name: &name };
        let Connected { transport, .. } = connect(address, Some(target), limit)
            .await
            .map_err(|trouble| CheckReport::from(trouble).detail())?;
        Ok(Dialled { transport, authorization: token.as_ref().map(Token::header) })
    }
}
