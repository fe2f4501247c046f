//! A stub apiserver: answers as kube-apiserver 1.36 was measured to, and falls ill on demand.
//!
//! It is a process of its own (`sheave-stub-apiserver`), so that it can be killed and frozen like the real one.

pub mod answers;
pub mod credentials;
pub mod faults;
pub mod hostile;
mod responses;
mod server;
mod shared;
mod slices;
mod startup;

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, SocketAddr},
    os::unix::net::UnixStream,
    path::PathBuf,
    process::ExitStatus,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

pub use answers::AnonymousMode;
pub use faults::{Door, Health, Order};
pub use server::{Options, serve};
pub use startup::Startup;

use crate::lab::{
    Host, Process,
    authority::{Authority, Identity},
    eventually,
    process::{Signal, sibling_program},
};

/// The bearer token that every stub takes for a user without roles.
pub const TOKEN: &str = "lab-token";
/// The port every stub listens on.
pub const PORT: u16 = 6443;
/// A process start, a TLS configuration and a bind take this long at most, on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(60);

/// A stub apiserver running on a host.
#[derive(Debug)]
pub struct Stub {
    name: String,
    identity: Identity,
    client_ca: PathBuf,
    token_file: PathBuf,
    control: PathBuf,
    anonymous: AnonymousMode,
    shutdown_delay: Duration,
    request_timeout: Duration,
    startup: Startup,
    endpoints: Vec<SocketAddr>,
    process: Option<Process>,
}

impl Stub {
    /// Makes a stub called like its host, with a certificate for `addresses` in `directory`. It is not started.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn new(host: &Host, authority: &Authority, addresses: &[IpAddr]) -> Result<Self> {
        let name = host.name().to_owned();
        let identity = authority.server(&name, addresses)?;
        let token_file = identity.certificate.with_extension("token");
        fs::write(&token_file, TOKEN)?;
        Ok(Self {
            control: identity.certificate.with_extension("sock"),
            name,
            identity,
            client_ca: authority.file(),
            token_file,
            anonymous: AnonymousMode::default(),
            shutdown_delay: Duration::ZERO,
            request_timeout: Duration::from_secs(60),
            startup: Startup::default(),
            endpoints: Vec::new(),
            process: None,
        })
    }

    /// What it answers to `/name`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Changes what anonymous callers may do, from the next start on.
    pub fn set_anonymous(&mut self, mode: AnonymousMode) {
        self.anonymous = mode;
    }

    /// Changes `--shutdown-delay-duration`, from the next start on.
    pub fn set_shutdown_delay(&mut self, delay: Duration) {
        self.shutdown_delay = delay;
    }

    /// Changes `--request-timeout`, from the next start on: how long a watch goes on after the port has closed.
    pub fn set_request_timeout(&mut self, timeout: Duration) {
        self.request_timeout = timeout;
    }

    /// Changes how it comes up, from the next start on.
    pub fn set_startup(&mut self, startup: Startup) {
        self.startup = startup;
    }

    /// Changes the endpoints of the service `default/kubernetes`, from the next start on.
    pub fn set_endpoints(&mut self, endpoints: &[SocketAddr]) {
        self.endpoints = endpoints.to_vec();
    }

    /// Changes the certificate it shows, from the next start on.
    pub fn set_identity(&mut self, identity: Identity) {
        self.identity = identity;
    }

    /// Starts it on its host and returns when it takes orders and listens.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(&mut self, host: &Host) -> Result<()> {
        let _ = fs::remove_file(&self.control);
        let mut command = host.command(sibling_program("sheave-stub-apiserver")?);
        command.args(["--name", &self.name, "--listen", &format!("[::]:{PORT}")]);
        command.arg("--certificate").arg(&self.identity.certificate).arg("--key").arg(&self.identity.key);
        command.arg("--client-ca").arg(&self.client_ca).arg("--token-file").arg(&self.token_file);
        command.arg("--control").arg(&self.control);
        command.args(["--anonymous", &self.anonymous.to_string()]);
        command.args(["--shutdown-delay", &self.shutdown_delay.as_millis().to_string()]);
        command.args(["--request-timeout", &self.request_timeout.as_millis().to_string()]);
        command.args(["--startup", &self.startup.to_string()]);
        for endpoint in &self.endpoints {
            command.args(["--endpoint", &endpoint.to_string()]);
        }
        let mut process = host.start("apiserver", command)?;
        eventually(START_LIMIT, &format!("{} listens", self.name), || {
            ensure!(process.exited()?.is_none(), "{} ended: {}", self.name, process.log());
            ensure!(listens(host)?, "nobody listens on port {PORT}");
            Ok(())
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// The running process.
    ///
    /// # Errors
    /// When it is not running.
    pub fn process(&mut self) -> Result<&mut Process> {
        self.process.as_mut().with_context(|| format!("{} is not running", self.name))
    }

    /// SIGKILL: port closed, connections reset by the kernel.
    ///
    /// # Errors
    /// When it is not running.
    pub fn kill(&mut self) -> Result<()> {
        self.process()?.kill()?;
        self.process = None;
        Ok(())
    }

    /// SIGTERM: it shuts down in its own time.
    ///
    /// # Errors
    /// When it is not running.
    pub fn terminate(&mut self) -> Result<()> {
        self.process()?.signal(Signal::SIGTERM)
    }

    /// Waits until its port is closed. The process may live on.
    ///
    /// # Errors
    /// When it still listens after `limit`.
    pub fn wait_closed(&self, host: &Host, limit: Duration) -> Result<()> {
        eventually(limit, &format!("{} closes its port", self.name), || {
            ensure!(!listens(host)?, "it listens");
            Ok(())
        })
    }

    /// Waits until it has ended by itself.
    ///
    /// # Errors
    /// When it was not running, or still is after `limit`.
    pub fn wait_end(&mut self, limit: Duration) -> Result<ExitStatus> {
        let status = self.process()?.wait(limit)?;
        self.process = None;
        Ok(status)
    }

    /// SIGSTOP: the kernel goes on accepting connections, nobody answers.
    ///
    /// # Errors
    /// When it is not running.
    pub fn freeze(&mut self) -> Result<()> {
        self.process()?.signal(Signal::SIGSTOP)
    }

    /// SIGCONT.
    ///
    /// # Errors
    /// When it is not running.
    pub fn thaw(&mut self) -> Result<()> {
        self.process()?.signal(Signal::SIGCONT)
    }

    /// Changes how its health endpoints answer.
    ///
    /// # Errors
    /// When it takes no orders (frozen, killed).
    pub fn health(&self, health: Health) -> Result<()> {
        self.order(Order::Health(health)).map(drop)
    }

    /// Changes what happens to new connections, and returns when it is so.
    ///
    /// # Errors
    /// When it takes no orders (frozen, killed).
    pub fn door(&self, host: &Host, door: Door) -> Result<()> {
        self.order(Order::Door(door))?;
        eventually(START_LIMIT, &format!("{} has its door {door:?}", self.name), || {
            let listening = listens(host)?;
            ensure!(listening == (door != Door::Refusing), "listening: {listening}");
            Ok(())
        })
    }

    /// How many connections have carried anything but health checks, by source address.
    ///
    /// # Errors
    /// When it takes no orders (frozen, killed).
    pub fn connections(&self) -> Result<BTreeMap<IpAddr, u64>> {
        let json: serde_json::Value = serde_json::from_str(&self.order(Order::Connections)?)?;
        let entries = json.as_object().context("no JSON object")?;
        entries
            .iter()
            .map(|(source, count)| Ok((source.parse()?, count.as_u64().context("no number")?)))
            .collect()
    }

    /// How many connections have carried anything but health checks before it had started.
    ///
    /// # Errors
    /// When it takes no orders (frozen, killed).
    pub fn early_connections(&self) -> Result<u64> {
        Ok(self.order(Order::EarlyConnections)?.parse()?)
    }

    /// Changes the EndpointSlices of the namespace `default` to these, in the form of [`answers::slice`], while it runs.
    ///
    /// # Errors
    /// When it takes no orders (frozen, killed).
    pub fn slices(&self, items: &[serde_json::Value]) -> Result<()> {
        self.order(Order::Slices(serde_json::Value::from(items.to_vec()).to_string())).map(drop)
    }

    /// Forgets all versions of EndpointSlices but the present one: watches end with 410 Gone.
    ///
    /// # Errors
    /// When it takes no orders (frozen, killed).
    pub fn compact(&self) -> Result<()> {
        self.order(Order::Compact).map(drop)
    }

    /// Answers lists and watches of EndpointSlices with this status; 200: as it should.
    ///
    /// # Errors
    /// When it takes no orders (frozen, killed).
    pub fn list_status(&self, status: u16) -> Result<()> {
        self.order(Order::ListStatus(status)).map(drop)
    }

    /// Answers new watches of EndpointSlices with this status, and lists as ever; 200: as it should.
    ///
    /// # Errors
    /// When it takes no orders (frozen, killed).
    pub fn watch_status(&self, status: u16) -> Result<()> {
        self.order(Order::WatchStatus(status)).map(drop)
    }

    /// How many lists and watches of EndpointSlices there were.
    ///
    /// # Errors
    /// When it takes no orders (frozen, killed).
    pub fn listed(&self) -> Result<(u64, u64)> {
        let json: serde_json::Value = serde_json::from_str(&self.order(Order::Listed)?)?;
        let number = |key: &str| json[key].as_u64().with_context(|| format!("no {key} in {json}"));
        Ok((number("lists")?, number("watches")?))
    }

    fn order(&self, order: Order) -> Result<String> {
        let mut stream = UnixStream::connect(&self.control)
            .with_context(|| format!("connecting to {}", self.control.display()))?;
        stream.set_read_timeout(Some(START_LIMIT))?;
        writeln!(stream, "{order}")?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        ensure!(!answer.starts_with("error"), "{order}: {answer}");
        Ok(answer.trim_end().to_owned())
    }
}

/// Whether somebody listens on a stub's port.
fn listens(host: &Host) -> Result<bool> {
    Ok(!host.run(&format!("ss -Hltn sport = :{PORT}"))?.is_empty())
}
