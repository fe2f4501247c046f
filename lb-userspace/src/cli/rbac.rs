//! `sheave rbac`

use std::process::ExitCode;

use super::output;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
For clusters whose apiservers answer 401 or 403 to an anonymous GET /readyz (--anonymous-auth=false), and for services
whose backends are discovered.

Examples:
  sheave rbac | kubectl apply -f -
  sheave rbac --discover | kubectl apply -f -
  sheave rbac --namespace monitoring > sheave-rbac.yaml")]
pub(super) struct Arguments {
    /// Where the service account lives
    #[arg(long, value_name = "NAME", default_value = "kube-system", value_parser = namespace)]
    namespace: String,
    /// Let it also list and watch the EndpointSlices of this namespace, as `discover` does: that of `discover`'s Service, which
    /// is "default" where none is named
    #[arg(long, value_name = "NAMESPACE", num_args = 0..=1, default_missing_value = "default", value_parser = namespace)]
    discover: Option<String>,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let Arguments { namespace, discover } = arguments;
    let role = discover.map(|service| role(&namespace, &service));
    output::print(&(account(&namespace) + &role.unwrap_or_default()))?;
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
fn account(namespace: &str) -> String {
    format!(
        "\
# A service account that may do nothing, and its token: enough to GET /readyz, which every authenticated user may
# (the cluster's own role system:public-info-viewer). For that no Role and no binding is needed.
#
# When this is applied, on every load balancer:
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

/// What `discover` asks apiservers for, and nothing else: one list, then a watch, in one namespace.
fn role(namespace: &str, service: &str) -> String {
    format!(
        "\
---
# The same account may also list and watch the EndpointSlices of the namespace {service}, for discover, which takes the token
# from a kubeconfig (APISERVER: a name or address that the apiservers' certificates have):
#
#   cat > /etc/sheave/discover.conf <<END
#   apiVersion: v1
#   kind: Config
#   current-context: sheave
#   contexts: [{{name: sheave, context: {{cluster: this, user: sheave}}}}]
#   clusters: [{{name: this, cluster: {{server: 'https://APISERVER:6443', certificate-authority: /etc/kubernetes/pki/ca.crt}}}}]
#   users: [{{name: sheave, user: {{tokenFile: /etc/sheave/token}}}}]
#   END
#
# and in /etc/sheave/sheave.toml, below [[service]]:
#
#   discover = {{ kubeconfig = \"/etc/sheave/discover.conf\", namespace = \"{service}\" }}
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: sheave-discover
  namespace: {service}
rules:
- apiGroups: [discovery.k8s.io]
  resources: [endpointslices]
  verbs: [list, watch]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: sheave-discover
  namespace: {service}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: sheave-discover
subjects:
- kind: ServiceAccount
  name: sheave-health
  namespace: {namespace}
"
    )
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde::Deserialize;
    use serde_json::{Value, json};

    use super::*;
    use crate::kubeconfig::{Kubeconfig, Material};

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
        let text = account("kube-system");
        let objects: Vec<Object> = serde_saphyr::from_multiple(&text).unwrap();
        let kinds: Vec<_> = objects.iter().map(|object| object.kind.as_str()).collect();
        assert_eq!(kinds, ["ServiceAccount", "Secret"]);
        assert!(objects.iter().all(|it| it.metadata.name == "sheave-health"));
        assert!(objects.iter().all(|it| it.metadata.namespace == "kube-system"));
    }

    #[test]
    fn the_role_is_for_slices_of_one_namespace_and_for_that_account() {
        let text = account("kube-system") + &role("kube-system", "default");
        let objects: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
        let kinds: Vec<_> = objects.iter().map(|object| object["kind"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["ServiceAccount", "Secret", "Role", "RoleBinding"]);
        let [account, _, role, binding] = objects.as_slice() else { unreachable!("four") };
        let slices = json!({
            "apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]
        });
        assert_eq!(role["rules"], json!([slices]));
        for it in [role, binding] {
            assert_eq!(it["metadata"], json!({"name": "sheave-discover", "namespace": "default"}));
        }
        assert_eq!(binding["roleRef"]["name"], role["metadata"]["name"]);
        let subject = &binding["subjects"][0];
        assert_eq!(
            (&subject["kind"], &subject["name"], &subject["namespace"]),
            (&account["kind"], &account["metadata"]["name"], &account["metadata"]["namespace"])
        );
    }

    #[test]
    fn the_kubeconfig_of_the_role_is_one() {
        let text = role("kube-system", "default");
        let lines = text.lines().skip_while(|line| !line.ends_with("<<END")).skip(1);
        let lines = lines.map(|line| line.trim_start_matches("#   ")).take_while(|line| *line != "END");
        let file = lines.collect::<Vec<_>>().join("\n");
        let read = Kubeconfig::parse(file.as_bytes(), Path::new("/etc/sheave")).unwrap();
        assert_eq!(read.token, Some(Material::File("/etc/sheave/token".into())));
        assert_eq!(read.certificate_authority, Some(Material::File("/etc/kubernetes/pki/ca.crt".into())));
        assert_eq!(read.server, "https://APISERVER:6443");
    }

    #[test]
    fn a_namespace_cannot_change_the_manifest() {
        assert!(namespace("monitoring-2").is_ok());
        for wrong in ["", "a\nkind: ClusterRoleBinding", "A", "-a", "a b", "a/b"] {
            assert!(namespace(wrong).is_err(), "{wrong:?}");
        }
    }
}
