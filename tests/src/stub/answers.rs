//! What a kube-apiserver 1.36 answers to whom: status and body by path, credential and anonymous mode.

use std::{net::SocketAddr, str::FromStr};

use hyper::{Method, StatusCode};
use serde_json::{Value, json};

/// Who is asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credential {
    /// Presented nothing.
    Anonymous,
    /// Presented a certificate or token that nobody trusts.
    Invalid,
    /// A known user without any role.
    Ordinary,
    /// A member of `system:masters`.
    Masters,
}

/// What the cluster does with anonymous requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AnonymousMode {
    /// kubeadm's default: `--anonymous-auth=true`, health endpoints readable.
    #[default]
    Allowed,
    /// Anonymous requests are authenticated, but the role that lets them read health endpoints is gone.
    Forbidden,
    /// `--anonymous-auth=false`.
    Off,
    /// An authentication configuration that allows it for the three health endpoints only.
    Conditions,
}

/// The kinds of path that are treated differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathKind {
    /// `/readyz`, `/livez`, `/healthz`, with any query.
    Health,
    /// `/readyz/etcd` and the like: one check alone.
    SubCheck,
    /// `/version`.
    Version,
    /// `/api` and below.
    Api,
    /// Anything else.
    Other,
}

/// The health endpoints.
const HEALTH: [&str; 3] = ["/readyz", "/livez", "/healthz"];
/// The checks behind them that the stub knows by name.
const CHECKS: [&str; 6] =
    ["ping", "log", "etcd", "etcd-readiness", "informer-sync", "poststarthook/rbac/bootstrap-roles"];

impl PathKind {
    /// Classifies a path without its query. Like the real server it is exact: `/readyz/` is no health endpoint.
    pub fn of(path: &str) -> Self {
        let sub_check =
            |check: &str| path.strip_prefix(check)?.strip_prefix('/').filter(|name| !name.is_empty());
        match path {
            _ if HEALTH.contains(&path) => Self::Health,
            _ if HEALTH.iter().any(|endpoint| sub_check(endpoint).is_some()) => Self::SubCheck,
            "/version" => Self::Version,
            _ if path == "/api" || path.starts_with("/api/") => Self::Api,
            _ => Self::Other,
        }
    }
}

impl FromStr for AnonymousMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "allowed" => Ok(Self::Allowed),
            "forbidden" => Ok(Self::Forbidden),
            "off" => Ok(Self::Off),
            "conditions" => Ok(Self::Conditions),
            _ => Err(format!("{text}: allowed, forbidden, off or conditions")),
        }
    }
}

impl std::fmt::Display for AnonymousMode {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Allowed => "allowed",
            Self::Forbidden => "forbidden",
            Self::Off => "off",
            Self::Conditions => "conditions",
        })
    }
}

/// The status a healthy server answers with.
pub fn status(method: &Method, path: &str, credential: Credential, mode: AnonymousMode) -> StatusCode {
    let kind = PathKind::of(path);
    // RBAC grants the health endpoints for `get` alone.
    let kind = if kind == PathKind::Health && method != Method::GET { PathKind::SubCheck } else { kind };
    match (credential, mode) {
        (Credential::Invalid, _) | (Credential::Anonymous, AnonymousMode::Off) => StatusCode::UNAUTHORIZED,
        (Credential::Masters, _) => masters(path),
        (Credential::Ordinary, _) => match kind {
            PathKind::Health | PathKind::Version | PathKind::Api => StatusCode::OK,
            PathKind::SubCheck | PathKind::Other => StatusCode::FORBIDDEN,
        },
        (Credential::Anonymous, AnonymousMode::Conditions) => match kind {
            PathKind::Health => StatusCode::OK,
            _ => StatusCode::UNAUTHORIZED,
        },
        (Credential::Anonymous, AnonymousMode::Allowed) => match kind {
            PathKind::Health | PathKind::Version => StatusCode::OK,
            _ => StatusCode::FORBIDDEN,
        },
        (Credential::Anonymous, AnonymousMode::Forbidden) => match kind {
            PathKind::Version => StatusCode::OK,
            _ => StatusCode::FORBIDDEN,
        },
    }
}

fn masters(path: &str) -> StatusCode {
    let known = PathKind::of(path) != PathKind::SubCheck || CHECKS.iter().any(|check| path.ends_with(check));
    if known { StatusCode::OK } else { StatusCode::NOT_FOUND }
}

/// The body of a 401.
pub fn unauthorized() -> String {
    failure("Unauthorized", "Unauthorized", "", StatusCode::UNAUTHORIZED)
}

/// The body of a 403.
pub fn forbidden(user: &str, path: &str) -> String {
    let message = format!(r#"forbidden: User \"{user}\" cannot get path \"{path}\""#);
    failure(&message, "Forbidden", "\n  \"details\": {},", StatusCode::FORBIDDEN)
}

/// A `Status` object as the server prints it. By hand, since the order of its keys is part of the answer.
fn failure(message: &str, reason: &str, details: &str, code: StatusCode) -> String {
    let code = code.as_u16();
    format!(
        r#"{{
  "kind": "Status",
  "apiVersion": "v1",
  "metadata": {{}},
  "status": "Failure",
  "message": "{message}",
  "reason": "{reason}",{details}
  "code": {code}
}}"#
    )
}

/// The path of the EndpointSlices of the namespace `default`.
pub const ENDPOINT_SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";

/// A slice of the service `default/kubernetes` with these addresses and ports.
pub fn slice(name: &str, endpoints: &[&str], ports: &Value) -> Value {
    let ready = |address: &&str| json!({"addresses": [address], "conditions": {"ready": true}});
    json!({
        "metadata": {
            "name": name,
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": "kubernetes"},
        },
        "addressType": if endpoints.iter().any(|it| it.contains(':')) { "IPv6" } else { "IPv4" },
        "endpoints": endpoints.iter().map(ready).collect::<Vec<_>>(),
        "ports": ports,
    })
}

/// The slices of the service `default/kubernetes` as the apiservers keep them: one for each family.
pub fn endpoint_slices(endpoints: &[SocketAddr]) -> Vec<Value> {
    let (v4, v6) = endpoints.iter().partition(|address| address.is_ipv4());
    let slices =
        [("ipv4", v4), ("ipv6", v6)].into_iter().filter(|(_, of): &(_, Vec<&SocketAddr>)| !of.is_empty());
    slices
        .map(|(family, of)| {
            let addresses: Vec<_> = of.iter().map(|address| address.ip().to_string()).collect();
            let addresses: Vec<_> = addresses.iter().map(String::as_str).collect();
            let ports = json!([{"name": "https", "protocol": "TCP", "port": of[0].port()}]);
            slice(&format!("kubernetes-{family}"), &addresses, &ports)
        })
        .collect()
}

/// The list of checks, as `?verbose` and every 500 show it.
pub fn checks(endpoint: &str, failing: &[&str]) -> String {
    let shutdown = failing.iter().filter(|check| !CHECKS.contains(*check));
    let lines = CHECKS.iter().chain(shutdown).map(|check| {
        if failing.contains(check) {
            format!("[-]{check} failed: reason withheld\n")
        } else {
            format!("[+]{check} ok\n")
        }
    });
    let verdict = if failing.is_empty() { "passed" } else { "failed" };
    format!("{}{endpoint} check {verdict}\n", lines.collect::<String>())
}

#[cfg(test)]
mod tests {
    use hyper::Method;

    use super::{AnonymousMode, Credential, checks, forbidden, status, unauthorized};

    /// The measured table: a row for each path, a column for each of the callers below.
    const TABLE: [(&str, [u16; 7]); 7] = [
        ("/readyz", [200, 403, 401, 200, 200, 200, 401]),
        ("/healthz", [200, 403, 401, 200, 200, 200, 401]),
        ("/readyz/etcd", [403, 403, 401, 401, 403, 200, 401]),
        ("/version", [200, 200, 401, 401, 200, 200, 401]),
        ("/api", [403, 403, 401, 401, 200, 200, 401]),
        ("/metrics", [403, 403, 401, 401, 403, 200, 401]),
        ("/readyz/", [403, 403, 401, 401, 403, 200, 401]),
    ];
    const CALLERS: [(Credential, AnonymousMode); 7] = [
        (Credential::Anonymous, AnonymousMode::Allowed),
        (Credential::Anonymous, AnonymousMode::Forbidden),
        (Credential::Anonymous, AnonymousMode::Off),
        (Credential::Anonymous, AnonymousMode::Conditions),
        (Credential::Ordinary, AnonymousMode::Allowed),
        (Credential::Masters, AnonymousMode::Allowed),
        (Credential::Invalid, AnonymousMode::Allowed),
    ];

    #[test]
    fn status_by_credential_is_what_was_measured() {
        for (path, expected) in TABLE {
            for ((credential, mode), expected) in CALLERS.into_iter().zip(expected) {
                let answer = status(&Method::GET, path, credential, mode);
                assert_eq!(answer.as_u16(), expected, "GET {path} by {credential:?}, {mode:?}");
            }
        }
    }

    #[test]
    fn health_is_for_get_alone() {
        for method in [Method::HEAD, Method::POST, Method::OPTIONS] {
            let ask = |credential| status(&method, "/readyz", credential, AnonymousMode::Allowed).as_u16();
            assert_eq!(ask(Credential::Anonymous), 403);
            assert_eq!(ask(Credential::Ordinary), 403);
            assert_eq!(ask(Credential::Masters), 200);
        }
    }

    #[test]
    fn error_bodies_have_the_measured_length() {
        assert_eq!(unauthorized().len(), 157);
        assert_eq!(forbidden("system:anonymous", "/readyz").len(), 223);
    }

    #[test]
    fn a_failing_check_is_named() {
        let body = checks("readyz", &["shutdown"]);
        assert!(body.starts_with("[+]ping ok\n"));
        assert!(body.ends_with("[-]shutdown failed: reason withheld\nreadyz check failed\n"));
    }
}
