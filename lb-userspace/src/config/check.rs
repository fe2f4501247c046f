//! `[service.check]`.

use std::{ops::RangeInclusive, path::PathBuf, time::Duration};

use toml::de::{DeArray, DeValue};

use super::{
    Check, CheckKind, ClientCertificate, address,
    diagnostic::Problem,
    section::{Document, Section, wrong_type},
    values,
};

const KEYS: [&str; 18] = [
    "type",
    "path",
    "expect",
    "interval",
    "fast_interval",
    "connect_timeout",
    "timeout",
    "rise",
    "fall",
    "port",
    "address",
    "server_name",
    "ca_file",
    "client_cert_file",
    "client_key_file",
    "token_file",
    "kubeconfig",
    "insecure_skip_tls_verify",
];

/// A check more often than this is a load test.
const INTERVAL_MIN: Duration = Duration::from_millis(10);
/// Where all clients are on this host, every node of a cluster checks: 5,000 of them are 500 checks a second for each
/// apiserver, not 5,000.
const NODE_INTERVAL: Duration = Duration::from_secs(10);
/// A verdict after more checks than this comes too late for anything.
const RISE_FALL_MAX: i64 = 1000;

impl Default for Check {
    /// What a file without `[service.check]` asks for.
    fn default() -> Self {
        Self {
            kind: CheckKind::Https,
            path: "/readyz".to_owned(),
            expect: vec![200..=200],
            interval: Duration::from_secs(1),
            fast_interval: Duration::from_millis(200),
            connect_timeout: Duration::from_secs(1),
            timeout: Duration::from_secs(5),
            rise: 2,
            fall: 2,
            port: None,
            address: None,
            server_name: None,
            ca_file: None,
            client_cert: None,
            token_file: None,
            kubeconfig: None,
            insecure_skip_tls_verify: false,
        }
    }
}

/// Reads the check of one service. `loopback_only`: all its clients are on this host.
pub(super) fn read(
    service: &Section,
    loopback_only: bool,
    document: &mut Document,
) -> Result<Check, Problem> {
    let section = service.section("check", &KEYS)?;
    let mut default = Check::default();
    if loopback_only {
        default.interval = NODE_INTERVAL;
    }
    let (interval, fast_interval) = read_intervals(&section, &default)?;
    let rise_fall = 1..=RISE_FALL_MAX;
    let timeout = Duration::from_millis(1)..=values::LONGEST;
    let check = Check {
        kind: read_kind(&section)?,
        path: read_path(&section)?.unwrap_or(default.path),
        expect: read_expect(&section)?.unwrap_or(default.expect),
        interval,
        fast_interval,
        connect_timeout: section
            .duration("connect_timeout", timeout.clone())?
            .unwrap_or(default.connect_timeout),
        timeout: section.duration("timeout", timeout)?.unwrap_or(default.timeout),
        rise: section.integer("rise", rise_fall.clone())?.unwrap_or(default.rise),
        fall: section.integer("fall", rise_fall)?.unwrap_or(default.fall),
        port: section.integer("port", 1..=i64::from(u16::MAX))?,
        address: section
            .text("address", "\"192.168.2.151\"")?
            .map(|written| address::ip_address(&written))
            .transpose()?,
        server_name: read_server_name(&section)?,
        ca_file: section.path("ca_file", document)?,
        client_cert: read_client_certificate(&section, document)?,
        token_file: section.path("token_file", document)?,
        kubeconfig: read_kubeconfig(&section, document)?,
        insecure_skip_tls_verify: section.boolean("insecure_skip_tls_verify", false)?,
    };
    warn(&section, &check, document);
    Ok(check)
}

fn read_kind(section: &Section) -> Result<CheckKind, Problem> {
    let kinds = [
        ("https", CheckKind::Https),
        ("http", CheckKind::Http),
        ("tls", CheckKind::Tls),
        ("tcp", CheckKind::Tcp),
        ("none", CheckKind::None),
    ];
    section.choice("type", CheckKind::Https, &kinds, &[])
}

fn read_intervals(section: &Section, default: &Check) -> Result<(Duration, Duration), Problem> {
    let range = INTERVAL_MIN..=values::LONGEST;
    let interval = section.duration("interval", range.clone())?.unwrap_or(default.interval);
    let fast_interval = section.duration("fast_interval", range)?;
    match fast_interval {
        Some(fast) if fast > interval => Err(Problem::at(
            section.span_of("fast_interval"),
            format!("\"fast_interval\" is longer than \"interval\" ({})", values::duration_text(interval)),
        )
        .help("write a shorter one, or leave it out")),
        Some(fast) => Ok((interval, fast)),
        None => Ok((interval, default.fast_interval.min(interval))),
    }
}

fn read_path(section: &Section) -> Result<Option<String>, Problem> {
    let Some(written) = section.text("path", "\"/readyz\"")? else { return Ok(None) };
    let text = written.get_ref();
    // It goes into the request line as it is.
    if text.starts_with('/') && text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#') {
        return Ok(Some(written.into_inner()));
    }
    Err(Problem::at(written.span(), format!("{text:?} is not the path of a URL"))
        .help("write one that begins with a slash and has no spaces, such as \"/readyz\""))
}

fn read_server_name(section: &Section) -> Result<Option<String>, Problem> {
    let Some(written) = section.text("server_name", "\"kubernetes\"")? else { return Ok(None) };
    match rustls_pki_types::ServerName::try_from(written.get_ref().as_str()) {
        Ok(_) => Ok(Some(written.into_inner())),
        Err(_) => Err(Problem::at(
            written.span(),
            format!("{:?} is neither a DNS name nor an address", written.get_ref()),
        )
        .help("write a name that is in the server's certificate, without a port")),
    }
}

fn read_client_certificate(
    section: &Section,
    document: &Document,
) -> Result<Option<ClientCertificate>, Problem> {
    let cert_file = section.path("client_cert_file", document)?;
    let key_file = section.path("client_key_file", document)?;
    match (cert_file, key_file) {
        (None, None) => Ok(None),
        (Some(cert_file), Some(key_file)) => Ok(Some(ClientCertificate { cert_file, key_file })),
        (Some(_), None) => Err(lonely(section, "client_cert_file", "client_key_file")),
        (None, Some(_)) => Err(lonely(section, "client_key_file", "client_cert_file")),
    }
}

/// It says who we are and whom we trust, so nothing else may.
fn read_kubeconfig(section: &Section, document: &Document) -> Result<Option<PathBuf>, Problem> {
    const KEY: &str = "kubeconfig";
    let Some(path) = section.path(KEY, document)? else { return Ok(None) };
    let others = ["ca_file", "client_cert_file", "client_key_file", "token_file", "insecure_skip_tls_verify"];
    if let Some(other) = others.iter().find(|other| section.has(other)) {
        return Err(Problem::at(section.span_of(other), format!("both {KEY:?} and {other:?}"))
            .first_at(section.span_of(KEY))
            .help(format!("keep one: the CA and the credential of the check come from {KEY:?}")));
    }
    if read_kind(section)? == CheckKind::Http {
        return Err(Problem::at(section.span_of(KEY), format!("{KEY:?} with a check that speaks no TLS"))
            .help("write `type = \"https\"`, or leave it out: its credential is not sent in the clear"));
    }
    Ok(Some(path))
}

fn lonely(section: &Section, given: &str, missing: &str) -> Problem {
    Problem::at(section.span_of(given), format!("{given:?} without {missing:?}"))
        .help(format!("add {missing:?}; it may be the same file when that holds both"))
}

/// `[200, "300-399"]`
fn read_expect(section: &Section) -> Result<Option<Vec<RangeInclusive<u16>>>, Problem> {
    let Some(value) = section.value("expect") else { return Ok(None) };
    match value.get_ref() {
        DeValue::Array(items) if items.is_empty() => {
            Err(Problem::at(value.span(), "\"expect\" is empty, nothing would ever be ready")
                .help("write `expect = [200]`"))
        }
        DeValue::Array(items) => read_statuses(items).map(Some),
        other => Err(wrong_type(value.span(), "expect", "a list", other).help("write `expect = [200]`")),
    }
}

fn read_statuses(items: &DeArray) -> Result<Vec<RangeInclusive<u16>>, Problem> {
    items
        .iter()
        .map(|item| {
            let range = match item.get_ref() {
                DeValue::Integer(number) => number.as_str().parse().ok().map(|status| status..=status),
                DeValue::String(text) => status_range(text),
                _ => None,
            };
            range
                .filter(|range| *range.start() >= 100 && *range.end() <= 599 && !range.is_empty())
                .ok_or_else(|| {
                    Problem::at(item.span(), "not an HTTP status, nor a range of them")
                        .help("write a number from 100 to 599, or a range such as \"300-399\"")
                })
        })
        .collect()
}

fn status_range(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
}

/// What is allowed, and seldom wise.
fn warn(section: &Section, check: &Check, document: &mut Document) {
    let mut warn = |key: &str, message: &str, help: &str| {
        document.warn(Problem::at(section.span_of(key), message).help(help));
    };
    let http = matches!(check.kind, CheckKind::Https | CheckKind::Http);
    let tls = matches!(check.kind, CheckKind::Https | CheckKind::Tls);
    for key in ["path", "expect", "token_file"] {
        if !http && section.has(key) {
            warn(key, &format!("{key:?} is not used: the check speaks no HTTP"), "leave it out");
        }
    }
    for key in ["ca_file", "client_cert_file", "server_name", "kubeconfig", "insecure_skip_tls_verify"] {
        if !tls && section.has(key) {
            warn(key, &format!("{key:?} is not used: the check speaks no TLS"), "leave it out");
        }
    }
    if http && check.expect.iter().any(|range| range.contains(&401) || range.contains(&403)) {
        warn(
            "expect",
            "401 or 403 counts as ready: the check is unauthenticated and proves only that TLS and HTTP work",
            "give the check a \"token_file\" or client certificate, which needs no role at all, and expect 200",
        );
    }
    if check.kind == CheckKind::Http && check.token_file.is_some() {
        warn("token_file", "the token is sent in the clear", "write `type = \"https\"`");
    }
    if tls && check.insecure_skip_tls_verify {
        warn(
            "insecure_skip_tls_verify",
            "the check accepts any certificate: whoever answers at the address counts as ready",
            "name the cluster's CA with \"ca_file\" instead",
        );
    } else if check.kind == CheckKind::Https && check.token_file.is_some() && check.ca_file.is_none() {
        warn(
            "token_file",
            "without \"ca_file\" the certificate is not verified: the token goes to whoever answers",
            "name the cluster's CA with \"ca_file\"",
        );
    }
}
