//! `service.discover`: backends that the cluster itself lists.

use toml::Spanned;

use super::{
    Discover,
    diagnostic::Problem,
    section::{Document, Section},
};

const KEYS: [&str; 4] = ["kubeconfig", "namespace", "service", "replace"];
/// RFC 1123: the names of namespaces and services are labels.
const LABEL_MAX: usize = 63;

/// Reads the table of one service, if it has one.
pub(super) fn read(service: &Section, document: &Document) -> Result<Option<Discover>, Problem> {
    if !service.has("discover") {
        return Ok(None);
    }
    let section = service.section("discover", &KEYS)?;
    let Some(kubeconfig) = section.path("kubeconfig", document)? else {
        return Err(section.missing("kubeconfig", "\"/etc/sheave/kubeconfig\""));
    };
    Ok(Some(Discover {
        kubeconfig,
        namespace: label(&section, "namespace", "default")?,
        service: label(&section, "service", "kubernetes")?,
        replace: section.boolean("replace", false)?,
    }))
}

/// It goes into a path and into a label selector as it is.
fn label(section: &Section, key: &str, default: &str) -> Result<String, Problem> {
    let Some(written) = section.text(key, &format!("{default:?}"))? else { return Ok(default.to_owned()) };
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let text = written.get_ref();
    let valid = (1..=LABEL_MAX).contains(&text.len())
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-');
    match valid {
        true => Ok(written.into_inner()),
        false => Err(not_a_label(&written, key, default)),
    }
}

fn not_a_label(written: &Spanned<String>, key: &str, default: &str) -> Problem {
    let what = if key == "service" { "Service" } else { "namespace" };
    let text = written.get_ref();
    let problem =
        Problem::at(written.span(), format!("{text:?} cannot be the name of a {what} in the cluster"));
    match text.split_once('/') {
        Some((namespace, service)) if key == "service" => {
            problem.help(format!("write `namespace = {namespace:?}, service = {service:?}`"))
        }
        _ => problem.help(format!("write lower-case letters, digits and '-', such as {default:?}")),
    }
}
