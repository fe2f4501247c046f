//! The configuration file: what it may say, and what is wrong with it.
//!
//! The text becomes a TOML tree that knows where each value stands ([`toml::de::DeTable`]), the tree becomes the
//! [model](Config). The tree is walked by hand rather than through serde: the message is the product here, and
//! serde's own ("unknown field `x`, expected one of twenty") cannot say what to write instead.

mod address;
mod check;
mod diagnostic;
mod discover;
mod model;
mod roles;
mod section;
mod service;
mod together;
mod values;

#[cfg(test)]
mod messages;

use std::{
    io::Read as _,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

pub(crate) use address::not_a_backend;
use diagnostic::Problem;
pub use diagnostic::{Diagnostic, Warning};
use lb_common::layout::SNAT_ADDRESSES;
pub use model::*;
use section::{Document, Section};
use toml::de::DeTable;
pub use values::duration as parse_duration;

/// Larger than any real file; keeps `--config /dev/zero` from eating the host.
const FILE_SIZE_MAX: u64 = 1 << 20;

/// From what every network carries whole (RFC 791 §3.2), below which no error may bring a sender (RFC 1191 §3), to what an
/// Ethernet frame carries: with a higher one no error would ever be heeded.
const PATH_MTU_FLOORS: RangeInclusive<i64> = 68..=1500;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the configuration {file}: {reason}{}", read_help(reason))]
    Read {
        /// As it was given.
        file: String,
        /// What the kernel said.
        reason: std::io::Error,
    },
    /// The file was read and is wrong.
    #[error("{0}")]
    Invalid(Box<Diagnostic>),
}

fn read_help(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::NotFound => {
            "\n   = help: name another file with --config FILE; `sheave run --help` shows a first one"
        }
        std::io::ErrorKind::PermissionDenied => "\n   = help: run as root, or as a user who may read it",
        _ => "",
    }
}

impl Config {
    /// Reads and checks a file. Relative paths in it are taken from the directory it is in.
    pub fn load(path: &Path) -> Result<(Self, Vec<Warning>), ConfigError> {
        let file_name = path.display().to_string();
        let text = read_limited(path).map_err(|reason| ConfigError::Read { file: file_name, reason })?;
        Self::parse(&text, path)
    }

    /// Checks the text of a file. `file_name` appears in messages, and relative paths are taken from its directory.
    pub fn parse(text: &str, file_name: impl AsRef<Path>) -> Result<(Self, Vec<Warning>), ConfigError> {
        let file_name = file_name.as_ref();
        let locate = |problem: Problem| problem.locate(&file_name.display().to_string(), text);
        let mut document = Document::new(file_name);
        let config = read_document(text, &mut document)
            .map_err(|problem| ConfigError::Invalid(Box::new(locate(problem))))?;
        Ok((config, document.into_warnings().into_iter().map(locate).collect()))
    }
}

fn read_limited(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    let read = std::fs::File::open(path)?.take(FILE_SIZE_MAX + 1).read_to_string(&mut text)?;
    if read as u64 > FILE_SIZE_MAX {
        return Err(std::io::Error::other("it is larger than 1 MiB, which no configuration is"));
    }
    Ok(text)
}

fn read_document(text: &str, document: &mut Document) -> Result<Config, Problem> {
    let tree = DeTable::parse(text).map_err(|error| diagnostic::syntax_error(&error, text))?;
    let root = Section::root(&tree, &["dataplane", "vip", "admin", "service"])?;
    let config = Config {
        dataplane: read_dataplane(&root, document)?,
        vip: read_vip(&root)?,
        admin: read_admin(&root, document)?,
        services: Vec::new(),
    };
    let services = service::read_all(&root, document)?;
    together::examine(&config.dataplane, &services, document)?;
    roles::examine(&root, &config, &services, document)?;
    Ok(Config { services: services.into_iter().map(|service| service.service).collect(), ..config })
}

fn read_dataplane(root: &Section, document: &Document) -> Result<Dataplane, Problem> {
    let section = root.section(
        "dataplane",
        &[
            "interfaces",
            "backend_interfaces",
            "xdp_mode",
            "snat_addresses",
            "snat_addresses_max",
            "snat_ports",
            "hash_key_file",
            "source_share",
            "half_open_share",
            "path_mtu_floor",
            "state_dir",
            "pin_dir",
            "cgroup",
        ],
    )?;
    Ok(Dataplane {
        interfaces: values::interfaces(&section)?,
        backend_interfaces: values::backend_interfaces(&section)?,
        xdp_mode: section.choice(
            "xdp_mode",
            XdpMode::Auto,
            &[("auto", XdpMode::Auto), ("native", XdpMode::Native), ("generic", XdpMode::Generic)],
            &[],
        )?,
        snat_addresses: address::snat_addresses(&section)?,
        snat_addresses_max: section
            .integer("snat_addresses_max", 1..=SNAT_ADDRESSES as i64)?
            .unwrap_or(Dataplane::SNAT_ADDRESSES_MAX),
        snat_ports: values::snat_ports(&section)?,
        hash_key_file: section.path("hash_key_file", document)?,
        source_share: values::share(&section, "source_share", Some(Dataplane::SOURCE_SHARE))?,
        half_open_share: values::share(&section, "half_open_share", None)?,
        path_mtu_floor: section
            .integer("path_mtu_floor", PATH_MTU_FLOORS)?
            .unwrap_or(Dataplane::PATH_MTU_FLOOR),
        state_dir: section
            .path("state_dir", document)?
            .unwrap_or_else(|| Path::new(Dataplane::STATE_DIR).to_owned()),
        pin_dir: pin_dir(&section, document)?,
        cgroup: roles::cgroup(&section)?,
    })
}

fn pin_dir(section: &Section, document: &Document) -> Result<PathBuf, Problem> {
    let Some(path) = section.path("pin_dir", document)? else {
        return Ok(Path::new(Dataplane::PIN_DIR).to_owned());
    };
    // The BPF file system keeps dots for itself.
    let text = path.to_string_lossy();
    if text.contains('.') {
        return Err(Problem::at(section.span_of("pin_dir"), format!("\"pin_dir\" has a dot: {text:?}"))
            .help(format!(
                "the BPF file system takes no dots: write `pin_dir = \"{}\"`",
                Dataplane::PIN_DIR
            )));
    }
    Ok(path)
}

fn read_vip(root: &Section) -> Result<Vip, Problem> {
    let section = root.section("vip", &["mode"])?;
    let mode = section.choice(
        "mode",
        VipMode::Follow,
        &[("follow", VipMode::Follow), ("own", VipMode::Own)],
        &[],
    )?;
    Ok(Vip { mode })
}

fn read_admin(root: &Section, document: &Document) -> Result<Admin, Problem> {
    let section = root.section("admin", &["socket", "group", "listen"])?;
    let socket = values::socket_path(&section, document)?;
    let listen = section.text("listen", "\"127.0.0.1:1936\"")?;
    Ok(Admin {
        socket: socket.unwrap_or_else(|| Path::new(Admin::SOCKET).to_owned()),
        listen: listen.map(|written| address::admin_address(&written)).transpose()?,
        group: section.text("group", "\"sheave\"")?.map(toml::Spanned::into_inner),
    })
}

impl Dataplane {
    /// `state_dir` where the file names none.
    pub const STATE_DIR: &str = "/var/lib/sheave";
    /// `snat_addresses_max` where the file names none.
    pub const SNAT_ADDRESSES_MAX: usize = 4;
    /// `source_share` where the file names none, in per cent. All of a NAT or a pod network is one source.
    pub const SOURCE_SHARE: u8 = 50;
    /// `path_mtu_floor` where the file names none: below it Linux heeds no error by default (`net.ipv4.route.min_pmtu`,
    /// `Documentation/networking/ip-sysctl.rst`).
    pub const PATH_MTU_FLOOR: u16 = 552;
    /// `pin_dir` where the file names none.
    pub const PIN_DIR: &str = "/sys/fs/bpf/sheave";
}

impl Admin {
    /// `socket` where the file names none.
    pub const SOCKET: &str = "/run/sheave/admin.sock";
}
