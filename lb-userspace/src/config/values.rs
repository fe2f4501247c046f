//! The small languages inside strings: durations, names, ranges of ports.

use std::{ops::RangeInclusive, path::PathBuf, time::Duration};

use toml::{Spanned, de::DeValue};

use super::{
    Interfaces,
    diagnostic::Problem,
    section::{Document, Section},
};

/// No duration in the file is longer: times added to it must not overflow.
pub(super) const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// `"200ms"`, `"1s"`, `"5m"`, `"3h"`, `"1m30s"`; at most [`LONGEST`]. Whole numbers only.
pub fn duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|character: char| !character.is_ascii_digit())?;
        let (number, tail) = rest.split_at(digits);
        let unit_end = tail.find(|character: char| character.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        let unit_milliseconds = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60 * 1000,
            "h" => 3600 * 1000,
            _ => return None,
        };
        let part = number.parse::<u64>().ok()?.checked_mul(unit_milliseconds)?;
        total = total.checked_add(Duration::from_millis(part))?;
        rest = tail;
    }
    (!text.is_empty() && total <= LONGEST).then_some(total)
}

/// The shortest text that [`duration`] reads as this.
pub(super) fn duration_text(duration: Duration) -> String {
    let milliseconds = duration.as_millis();
    [(3_600_000, "h"), (60_000, "m"), (1000, "s")]
        .into_iter()
        .find(|(unit, _)| milliseconds > 0 && milliseconds.is_multiple_of(*unit))
        .map_or_else(|| format!("{milliseconds}ms"), |(unit, name)| format!("{}{name}", milliseconds / unit))
}

const NAME_MAX: usize = 64;

/// The name of a service or backend. It appears as `service/backend` in logs and commands.
pub(super) fn name(written: &Spanned<String>) -> Result<String, Problem> {
    let text = written.get_ref();
    let allowed = |character: char| {
        character.is_ascii_alphanumeric() || ['-', '_', '.', ':', '[', ']'].contains(&character)
    };
    if text.is_empty() || text.len() > NAME_MAX || !text.chars().all(allowed) {
        return Err(Problem::at(written.span(), format!("{text:?} cannot be a name"))
            .help("write 1 to 64 letters, digits, '-', '_' or '.'"));
    }
    Ok(text.clone())
}

/// `interfaces = "auto"` or a list of names.
pub(super) fn interfaces(section: &Section) -> Result<Interfaces, Problem> {
    Ok(match interface_names(section, "interfaces")? {
        None => Interfaces::Auto,
        Some(names) if names.is_empty() => Interfaces::None,
        Some(names) => Interfaces::Named(names),
    })
}

/// `backend_interfaces = "auto"` or a list of names. None: `"auto"`.
pub(super) fn backend_interfaces(section: &Section) -> Result<Option<Vec<String>>, Problem> {
    const KEY: &str = "backend_interfaces";
    let names = interface_names(section, KEY)?;
    if names.as_ref().is_some_and(Vec::is_empty) {
        return Err(Problem::at(section.span_of(KEY), format!("{KEY:?} names no interface"))
            .help("name those that backends answer by, or write \"auto\""));
    }
    Ok(names)
}

/// A list of names of interfaces. None: `"auto"`, or nothing.
fn interface_names(section: &Section, key: &str) -> Result<Option<Vec<String>>, Problem> {
    let Some(value) = section.value(key) else { return Ok(None) };
    match value.get_ref() {
        DeValue::String(text) if text == "auto" => return Ok(None),
        DeValue::String(text) => {
            return Err(Problem::at(value.span(), format!("{key:?} cannot be {text:?}"))
                .help(format!("write \"auto\", or a list: `{key} = [{text:?}]`")));
        }
        _ => {}
    }
    let names = section.texts(key, "\"eth0\"")?.unwrap_or_default();
    for (position, written) in names.iter().enumerate() {
        let text = written.get_ref();
        // The kernel's own rule: dev_valid_name.
        let valid = (1..=15).contains(&text.len())
            && ![".", ".."].contains(&text.as_str())
            && !text.chars().any(|c| c.is_whitespace() || c.is_control() || ['/', ':'].contains(&c));
        if !valid {
            return Err(Problem::at(written.span(), format!("{text:?} cannot be the name of an interface"))
                .help("write a name that `ip link` shows"));
        }
        if let Some(first) = names[..position].iter().find(|earlier| earlier.get_ref() == text) {
            return Err(Problem::at(written.span(), format!("interface {text:?} is named twice"))
                .first_at(first.span())
                .help("remove one of them"));
        }
    }
    Ok(Some(names.into_iter().map(Spanned::into_inner).collect()))
}

/// Slots below are for services with well-known ports (filters, RPC).
const SNAT_PORT_MIN: u16 = 1024;
/// Fewer would fill up with closed flows.
const SNAT_PORTS_WIDTH_MIN: usize = 4096;

/// `snat_ports = "A-B"`.
pub(super) fn snat_ports(section: &Section) -> Result<Option<RangeInclusive<u16>>, Problem> {
    const EXAMPLE: &str = "\"20000-32767\"";
    let Some(written) = section.text("snat_ports", EXAMPLE)? else {
        return Ok(None);
    };
    let range = written
        .get_ref()
        .split_once('-')
        .and_then(|(first, last)| Some(first.trim().parse::<u16>().ok()?..=last.trim().parse::<u16>().ok()?));
    let (message, help) = match range {
        None => (
            format!("{:?} is not a range of ports", written.get_ref()),
            format!("write the first and the last: {EXAMPLE}"),
        ),
        Some(range) if *range.start() < SNAT_PORT_MIN => (
            format!("\"snat_ports\" begins below {SNAT_PORT_MIN}"),
            format!("write \"{SNAT_PORT_MIN}-65535\" or a part of it"),
        ),
        Some(range) if range.len() < SNAT_PORTS_WIDTH_MIN => (
            format!("\"snat_ports\" holds {} ports, too few", range.len()),
            format!("write a range of at least {SNAT_PORTS_WIDTH_MIN}, such as {EXAMPLE}"),
        ),
        Some(range) => return Ok(Some(range)),
    };
    Err(Problem::at(written.span(), message).help(help))
}

/// A share of the flow table, in per cent: `"50%"`; None: `"off"`.
pub(super) fn share(section: &Section, key: &str, default: Option<u8>) -> Result<Option<u8>, Problem> {
    let example = format!("\"{}%\"", default.unwrap_or(25));
    let Some(written) = section.text(key, &example)? else { return Ok(default) };
    let text = written.get_ref().as_str();
    if text == "off" {
        return Ok(None);
    }
    let percent = text.strip_suffix('%').and_then(|number| number.trim_end().parse::<u8>().ok());
    match percent.filter(|percent| (1..=100).contains(percent)) {
        Some(percent) => Ok(Some(percent)),
        None => Err(Problem::at(written.span(), format!("{key:?} is not a share: {text:?}"))
            .help(format!("write \"1%\" to \"100%\" of the flow table, such as {example}, or \"off\""))),
    }
}

/// What fits into a `sockaddr_un` with its final zero.
const SOCKET_PATH_MAX: usize = 107;

/// `admin.socket`.
pub(super) fn socket_path(section: &Section, document: &Document) -> Result<Option<PathBuf>, Problem> {
    let path = section.path("socket", document)?;
    match &path {
        Some(long) if long.as_os_str().len() > SOCKET_PATH_MAX => Err(Problem::at(
            section.span_of("socket"),
            format!("the socket's path is longer than the {SOCKET_PATH_MAX} bytes that the kernel takes"),
        )
        .help("write a shorter one, such as \"/run/sheave/admin.sock\"")),
        _ => Ok(path),
    }
}
