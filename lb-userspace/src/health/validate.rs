//! What is wrong with a check before it is ever run.

use std::path::PathBuf;

use hyper::Uri;
use rustls_pki_types::ServerName;

use super::{
    credentials::{Parts, ca_source, identity_source, kubeconfig_source, token_source},
    files::{Reading, Source},
};
use crate::config::{Check, CheckKind};

/// Why a check cannot be run as configured.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HealthError {
    /// A file is there and is of no use.
    #[error("{what} ({}): {problem}; mend it, or remove it to go without", paths(.files))]
    File {
        /// What it should be: `CA`.
        what: &'static str,
        /// Where it is.
        files: Vec<PathBuf>,
        /// What is wrong with it, without quoting it.
        problem: String,
    },
    /// `server_name` is neither a DNS name nor an address.
    #[error("server_name \"{0}\" is neither a DNS name nor an IP address; write for example \"kubernetes\"")]
    ServerName(String),
    /// `path` cannot be asked for.
    #[error("path \"{0}\" is not a path; write for example \"/readyz\"")]
    Path(String),
}

fn paths(files: &[PathBuf]) -> String {
    let paths: Vec<_> = files.iter().map(|path| path.display().to_string()).collect();
    paths.join(", ")
}

/// Looks for what is wrong with a check, its files included. Absent files are fine: they may come later.
///
/// # Errors
///
/// The first thing found.
pub fn validate(check: &Check) -> Result<(), HealthError> {
    if let Some(name) = &check.server_name
        && ServerName::try_from(name.as_str()).is_err()
    {
        return Err(HealthError::ServerName(name.clone()));
    }
    let path = check.path.parse::<Uri>();
    let speaks_http = matches!(check.kind, CheckKind::Https | CheckKind::Http);
    if speaks_http && !(check.path.starts_with('/') && path.is_ok_and(|uri| uri.authority().is_none())) {
        return Err(HealthError::Path(check.path.clone()));
    }
    if let Some(path) = &check.ca_file {
        usable(&ca_source(path.clone()))?;
    }
    if let Some(files) = &check.client_cert {
        usable(&identity_source(files))?;
    }
    if let Some(path) = &check.token_file {
        usable(&token_source(path.clone()))?;
    }
    if let Some(path) = &check.kubeconfig
        && let Some(kubeconfig) = usable(&kubeconfig_source(path.clone()))?
    {
        let parts = Parts::of(&kubeconfig);
        parts.ca.iter().try_for_each(|source| usable(source).map(drop))?;
        parts.identity.iter().try_for_each(|source| usable(source).map(drop))?;
        parts.token.iter().try_for_each(|source| usable(source).map(drop))?;
    }
    Ok(())
}

/// The value, unless it is absent.
fn usable<T: Clone>(source: &Source<T>) -> Result<Option<T>, HealthError> {
    match source.read() {
        Reading::Value(value) => Ok(Some(value)),
        Reading::Absent => Ok(None),
        Reading::Unusable(problem) => {
            Err(HealthError::File { what: source.what, files: source.paths.clone(), problem })
        }
    }
}
