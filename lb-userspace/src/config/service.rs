//! `[[service]]` and its backends.

use std::{ops::RangeInclusive, time::Duration};

use toml::{Spanned, de::DeValue};

use super::{
    Backend, Balance, Forward, OnDead, Service,
    address::{self, Role},
    check,
    diagnostic::{Problem, Span},
    section::{Document, Section},
    values,
};

const KEYS: [&str; 13] = [
    "name",
    "listen",
    "backends",
    "backend",
    "check",
    "balance",
    "forward",
    "idle_timeout",
    "allow",
    "on_dead",
    "reset_after",
    "reset_rate",
    "pods",
];

const IDLE_TIMEOUT_DEFAULT: Duration = Duration::from_secs(3 * 3600);
/// The flow table's clock wraps at 18 hours; half of that less a margin can be told apart.
const IDLE_TIMEOUT: RangeInclusive<Duration> = Duration::from_secs(60)..=Duration::from_secs(8 * 3600);
const RESET_AFTER_DEFAULT: Duration = Duration::from_secs(5);
/// Shorter than a check may take, it would be no proof; longer than TCP itself has patience, no use.
const RESET_AFTER: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);
/// Ten thousand flows in five seconds.
const RESET_RATE_DEFAULT: u32 = 2000;
const RESET_RATE_MAX: i64 = 1_000_000;
const WEIGHT_MAX: i64 = 256;

/// A service that is right by itself, and where its parts stand: what it may share with others is seen later.
pub(super) struct ReadService {
    pub(super) service: Service,
    pub(super) name_span: Span,
    pub(super) allow_span: Span,
    /// As long as `service.listen`.
    pub(super) listen_spans: Vec<Span>,
    /// As long as `service.backends`.
    pub(super) backend_spans: Vec<Span>,
}

/// Reads every `[[service]]`.
pub(super) fn read_all(root: &Section, document: &mut Document) -> Result<Vec<ReadService>, Problem> {
    let sections = root.sections("service", &KEYS)?;
    if sections.is_empty() {
        return Err(Problem::of_file("there is no [[service]], nothing to balance")
            .help("add a [[service]] with \"name\", \"listen\" and \"backends\""));
    }
    sections.iter().map(|section| read(section, document)).collect()
}

fn read(section: &Section, document: &mut Document) -> Result<ReadService, Problem> {
    section.only_default_yet("pods", "false")?;
    let name = section.required_text("name", "\"kube-apiserver\"")?;
    let listen = read_listen(section)?;
    let backends = read_backends(section)?;
    let service = Service {
        name: values::name(&name)?,
        listen: listen.iter().map(|listener| *listener.get_ref()).collect(),
        balance: section.choice(
            "balance",
            Balance::Maglev,
            &[("maglev", Balance::Maglev)],
            &["round-robin", "least-connections"],
        )?,
        forward: section.choice("forward", Forward::Nat, &[("nat", Forward::Nat)], &["dsr", "ipip"])?,
        idle_timeout: section.duration("idle_timeout", IDLE_TIMEOUT)?.unwrap_or(IDLE_TIMEOUT_DEFAULT),
        allow: address::prefixes(section)?,
        on_dead: section.choice(
            "on_dead",
            OnDead::Reset,
            &[("reset", OnDead::Reset), ("keep", OnDead::Keep)],
            &[],
        )?,
        reset_after: section.duration("reset_after", RESET_AFTER)?.unwrap_or(RESET_AFTER_DEFAULT),
        reset_rate: section.integer("reset_rate", 0..=RESET_RATE_MAX)?.unwrap_or(RESET_RATE_DEFAULT),
        check: check::read(section, document)?,
        backends: backends.iter().map(|backend| backend.get_ref().clone()).collect(),
    };
    Ok(ReadService {
        service,
        name_span: name.span(),
        allow_span: section.span_of("allow"),
        listen_spans: listen.iter().map(Spanned::span).collect(),
        backend_spans: backends.iter().map(Spanned::span).collect(),
    })
}

fn read_listen(section: &Section) -> Result<Vec<Spanned<std::net::SocketAddr>>, Problem> {
    const EXAMPLE: &str = "\"192.168.2.140:6443\"";
    let written = section
        .texts("listen", EXAMPLE)?
        .ok_or_else(|| section.missing("listen", &format!("[{EXAMPLE}]")))?;
    if written.is_empty() {
        return Err(Problem::at(section.span_of("listen"), "\"listen\" is empty, no client could connect")
            .help(format!("write `listen = [{EXAMPLE}]`, with the VIP")));
    }
    written
        .iter()
        .map(|text| Ok(Spanned::new(text.span(), address::socket_address(text, Role::Listener)?)))
        .collect()
}

/// From `backends`, the short form, or `[[service.backend]]`, the long one.
fn read_backends(section: &Section) -> Result<Vec<Spanned<Backend>>, Problem> {
    const EXAMPLE: &str = "[\"192.168.2.151:6443\"]";
    let backends = match (section.value("backends"), section.value("backend")) {
        (Some(short), Some(_)) => {
            return Err(Problem::at(short.span(), "both \"backends\" and [[service.backend]]")
                .help("keep one form: the short list, or a table for each backend"));
        }
        (None, None) => return Err(section.missing("backends", EXAMPLE)),
        (Some(_), None) => read_short_form(section)?,
        (None, Some(value)) => {
            if let DeValue::String(_) = value.get_ref() {
                return Err(Problem::at(value.span(), "\"backend\" is a table, not a string")
                    .help(format!("write `backends = {EXAMPLE}`, or [[service.backend]] with \"address\"")));
            }
            read_long_form(section)?
        }
    };
    if backends.is_empty() {
        return Err(Problem::at(section.span_of("backends"), "\"backends\" is empty")
            .help(format!("write at least one: `backends = {EXAMPLE}`")));
    }
    reject_duplicates(&backends)?;
    Ok(backends)
}

fn read_short_form(section: &Section) -> Result<Vec<Spanned<Backend>>, Problem> {
    let written = section.texts("backends", "\"192.168.2.151:6443\"")?.unwrap_or_default();
    written
        .iter()
        .map(|text| {
            let address = address::socket_address(text, Role::Backend)?;
            Ok(Spanned::new(text.span(), Backend { name: address.to_string(), address, weight: 1 }))
        })
        .collect()
}

fn read_long_form(section: &Section) -> Result<Vec<Spanned<Backend>>, Problem> {
    let sections = section.sections("backend", &["name", "address", "weight"])?;
    sections
        .iter()
        .map(|section| {
            let written = section.required_text("address", "\"192.168.2.151:6443\"")?;
            let address = address::socket_address(&written, Role::Backend)?;
            let name = match section.text("name", "\"master-1\"")? {
                Some(name) => values::name(&name)?,
                None => address.to_string(),
            };
            let weight = section.integer("weight", 0..=WEIGHT_MAX)?.unwrap_or(1);
            Ok(Spanned::new(written.span(), Backend { name, address, weight }))
        })
        .collect()
}

fn reject_duplicates(backends: &[Spanned<Backend>]) -> Result<(), Problem> {
    for (position, backend) in backends.iter().enumerate() {
        for earlier in &backends[..position] {
            let (this, that) = (backend.get_ref(), earlier.get_ref());
            let problem = if this.address == that.address {
                Problem::at(backend.span(), format!("backend {} is given twice", this.address))
                    .help("remove one of them; for a larger share of the flows use \"weight\"")
            } else if this.name == that.name {
                Problem::at(backend.span(), format!("two backends have the name {:?}", this.name))
                    .help("give each its own name")
            } else {
                continue;
            };
            return Err(problem.first_at(earlier.span()));
        }
    }
    Ok(())
}
