//! `[[service]]` and its backends.

use std::{ops::RangeInclusive, time::Duration};

use toml::{Spanned, de::DeValue};

use super::{
    Backend, Balance, Forward, NamedBackend, OnDead, OnIdle, Service,
    address::{self, Place, Role},
    check,
    diagnostic::{Problem, Span},
    discover,
    section::{Document, Section},
    values,
};

const KEYS: [&str; 16] = [
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
    "on_idle",
    "reset_after",
    "reset_rate",
    "drain_timeout",
    "pods",
    "discover",
];

const IDLE_TIMEOUT_DEFAULT: Duration = Duration::from_secs(3 * 3600);
/// The flow table's clock wraps at 18 hours; half of that less a margin can be told apart.
const IDLE_TIMEOUT: RangeInclusive<Duration> = Duration::from_secs(60)..=Duration::from_secs(8 * 3600);
const RESET_AFTER_DEFAULT: Duration = Duration::from_secs(5);
/// Shorter than a check may take, it would be no proof; longer than TCP itself has patience, no use.
const RESET_AFTER: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);
/// A day: nobody waits longer for an upgrade.
const DRAIN_TIMEOUT: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(24 * 3600);
/// Ten thousand flows in five seconds.
const RESET_RATE_DEFAULT: u32 = 2000;
const RESET_RATE_MAX: i64 = 1_000_000;
const WEIGHT_MAX: i64 = 256;

/// A service that is right by itself, and where its parts stand: what it may share with others is seen later.
pub(super) struct ReadService {
    pub(super) service: Service,
    pub(super) name_span: Span,
    pub(super) allow_span: Span,
    pub(super) pods_span: Span,
    /// As long as `service.listen`.
    pub(super) listen_spans: Vec<Span>,
    /// As long as `service.backends`.
    pub(super) backend_spans: Vec<Span>,
    /// As long as `service.named_backends`.
    pub(super) named_spans: Vec<Span>,
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
    let name = section.required_text("name", "\"kube-apiserver\"")?;
    let listen = read_listen(section)?;
    let loopback_only = listen.iter().all(|listener| listener.get_ref().ip().is_loopback());
    let discover = discover::read(section, document)?;
    let backends = read_backends(section, discover.is_some())?;
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
        on_idle: section.choice(
            "on_idle",
            OnIdle::Reset,
            &[("reset", OnIdle::Reset), ("silent", OnIdle::Silent)],
            &[],
        )?,
        on_dead: section.choice(
            "on_dead",
            OnDead::Reset,
            &[("reset", OnDead::Reset), ("keep", OnDead::Keep)],
            &[],
        )?,
        reset_after: section.duration("reset_after", RESET_AFTER)?.unwrap_or(RESET_AFTER_DEFAULT),
        reset_rate: section.integer("reset_rate", 0..=RESET_RATE_MAX)?.unwrap_or(RESET_RATE_DEFAULT),
        drain_timeout: section.duration("drain_timeout", DRAIN_TIMEOUT)?,
        pods: section.boolean("pods", false)?,
        check: check::read(section, loopback_only, document)?,
        backends: backends.by_address.iter().map(|backend| backend.get_ref().clone()).collect(),
        named_backends: backends.by_name.iter().map(|backend| backend.get_ref().clone()).collect(),
        discover,
    };
    Ok(ReadService {
        service,
        name_span: name.span(),
        allow_span: section.span_of("allow"),
        pods_span: section.span_of("pods"),
        listen_spans: listen.iter().map(Spanned::span).collect(),
        backend_spans: backends.by_address.iter().map(Spanned::span).collect(),
        named_spans: backends.by_name.iter().map(Spanned::span).collect(),
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

/// The backends of a service, by how they are found.
#[derive(Default)]
struct Backends {
    by_address: Vec<Spanned<Backend>>,
    by_name: Vec<Spanned<NamedBackend>>,
}

impl Backends {
    /// Takes in a backend as it is written; `name` where the file gives one.
    fn add(&mut self, written: &Spanned<String>, name: Option<String>, weight: u16) -> Result<(), Problem> {
        match address::place(written)? {
            Place::Address(address) => {
                let name = name.unwrap_or_else(|| address.to_string());
                let backend = Backend { name, address, weight, host: None, discovered: false };
                self.by_address.push(Spanned::new(written.span(), backend));
            }
            Place::Name(host, port) => {
                let name = name.unwrap_or_else(|| format!("{host}:{port}"));
                let backend = NamedBackend { name, host, port, weight };
                self.by_name.push(Spanned::new(written.span(), backend));
            }
        }
        Ok(())
    }
}

/// From `backends`, the short form, or `[[service.backend]]`, the long one. There may be none where the cluster lists them.
fn read_backends(section: &Section, discovers: bool) -> Result<Backends, Problem> {
    const EXAMPLE: &str = "[\"192.168.2.151:6443\"]";
    let mut backends = Backends::default();
    match (section.value("backends"), section.value("backend")) {
        (Some(short), Some(_)) => {
            return Err(Problem::at(short.span(), "both \"backends\" and [[service.backend]]")
                .help("keep one form: the short list, or a table for each backend"));
        }
        (None, None) if discovers => {}
        (None, None) => return Err(section.missing("backends", EXAMPLE)),
        (Some(_), None) => read_short_form(section, &mut backends)?,
        (None, Some(value)) => {
            if let DeValue::String(_) = value.get_ref() {
                return Err(Problem::at(value.span(), "\"backend\" is a table, not a string")
                    .help(format!("write `backends = {EXAMPLE}`, or [[service.backend]] with \"address\"")));
            }
            read_long_form(section, &mut backends)?;
        }
    }
    if backends.by_address.is_empty() && backends.by_name.is_empty() && !discovers {
        return Err(Problem::at(section.span_of("backends"), "\"backends\" is empty")
            .help(format!("write at least one: `backends = {EXAMPLE}`")));
    }
    reject_duplicates(&backends)?;
    Ok(backends)
}

fn read_short_form(section: &Section, backends: &mut Backends) -> Result<(), Problem> {
    let written = section.texts("backends", "\"192.168.2.151:6443\"")?.unwrap_or_default();
    written.iter().try_for_each(|text| backends.add(text, None, 1))
}

fn read_long_form(section: &Section, backends: &mut Backends) -> Result<(), Problem> {
    for section in section.sections("backend", &["name", "address", "weight"])? {
        let written = section.required_text("address", "\"192.168.2.151:6443\"")?;
        let name = section.text("name", "\"master-1\"")?.map(|name| values::name(&name)).transpose()?;
        let weight = section.integer("weight", 0..=WEIGHT_MAX)?.unwrap_or(1);
        backends.add(&written, name, weight)?;
    }
    Ok(())
}

/// Places must differ, and names, whichever way a backend is found.
fn reject_duplicates(backends: &Backends) -> Result<(), Problem> {
    let by_address = backends.by_address.iter().map(|it| {
        let Backend { name, address, .. } = it.get_ref();
        (it.span(), address.to_string(), name)
    });
    let by_name = backends.by_name.iter().map(|it| {
        let NamedBackend { name, host, port, .. } = it.get_ref();
        (it.span(), format!("{}:{port}", host.to_ascii_lowercase()), name)
    });
    let mut all: Vec<(Span, String, &String)> = by_address.chain(by_name).collect();
    all.sort_by_key(|(span, ..)| span.start);
    for (position, (span, place, name)) in all.iter().enumerate() {
        for (earlier, its_place, its_name) in &all[..position] {
            let problem = if place == its_place {
                Problem::at(span.clone(), format!("backend {place} is given twice"))
                    .help("remove one of them; for a larger share of the flows use \"weight\"")
            } else if name == its_name {
                Problem::at(span.clone(), format!("two backends have the name {name:?}"))
                    .help("give each its own name")
            } else {
                continue;
            };
            return Err(problem.first_at(earlier.clone()));
        }
    }
    Ok(())
}
