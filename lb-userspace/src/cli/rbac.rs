//! `sheave rbac`

use std::process::ExitCode;

use super::output;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
For clusters whose apiservers answer 401 or 403 to an anonymous GET /readyz (--anonymous-auth=false).

Examples:
  sheave rbac | kubectl apply -f -
  sheave rbac --namespace monitoring > sheave-rbac.yaml")]
pub(super) struct Arguments {
    /// Where the service account lives
    #[arg(long, value_name = "NAME", default_value = "kube-system", value_parser = namespace)]
    namespace: String,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    output::print(&manifest(&arguments.namespace))?;
    Ok(ExitCode::SUCCESS)
}

/// RFC 1123 labels, as Kubernetes wants them: whatever else is written would change the manifest's meaning.
fn namespace(text: &str) -> Result<String, String> {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let valid = (1..=63).contains(&text.len())
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-');
    match valid {
        true => Ok(text.to_owned()),
        false => Err("not the name of a namespace: lower-case letters, digits and '-'".to_owned()),
    }
}

/// A service account without any role. `GET /readyz` is allowed to every authenticated user by the default bindings
/// `system:public-info-viewer` and `system:discovery`.
fn manifest(namespace: &str) -> String {
    format!(
        "\
# A service account that may do nothing, and its token: enough to GET /readyz, which every authenticated user may
# (the cluster's own role system:public-info-viewer). No Role and no binding is needed.
#
#   sheave rbac --namespace {namespace} | kubectl apply -f -
#
# Then, on every load balancer:
#
#   kubectl -n {namespace} get secret sheave-health -o jsonpath='{{.data.token}}' | base64 -d \\
#     | install -m 0600 /dev/stdin /etc/sheave/token
#
# and in /etc/sheave/sheave.toml, below [service.check]:
#
#   token_file = \"/etc/sheave/token\"
#
# The token does not expire. Delete the Secret to revoke it, apply this again for a new one; sheave reads the file again.
---
apiVersion: v1
kind: ServiceAccount
metadata:
  name: sheave-health
  namespace: {namespace}
automountServiceAccountToken: false
---
apiVersion: v1
kind: Secret
metadata:
  name: sheave-health
  namespace: {namespace}
  annotations:
    kubernetes.io/service-account.name: sheave-health
type: kubernetes.io/service-account-token
"
    )
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Object {
        kind: String,
        metadata: Metadata,
    }

    #[derive(Deserialize)]
    struct Metadata {
        name: String,
        namespace: String,
    }

    #[test]
    fn the_manifest_is_a_service_account_and_its_token_and_grants_nothing() {
        let text = manifest("kube-system");
        let objects: Vec<Object> = serde_saphyr::from_multiple(&text).unwrap();
        let kinds: Vec<_> = objects.iter().map(|object| object.kind.as_str()).collect();
        assert_eq!(kinds, ["ServiceAccount", "Secret"]);
        assert!(objects.iter().all(|it| it.metadata.name == "sheave-health"));
        assert!(objects.iter().all(|it| it.metadata.namespace == "kube-system"));
    }

    #[test]
    fn a_namespace_cannot_change_the_manifest() {
        assert!(namespace("monitoring-2").is_ok());
        for wrong in ["", "a\nkind: ClusterRoleBinding", "A", "-a", "a b", "a/b"] {
            assert!(namespace(wrong).is_err(), "{wrong:?}");
        }
    }
}
