//! The real daemon, run on a host of the lab.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Output},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::lab::{
    Host, Process, cgroup_of, eventually, namespace::command_in, pins_of, process::Signal, run,
};

/// Loading, first checks and attaching take well under a second on an idle machine; the suite shares two cores.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// For an orderly end.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// What a test's `sheave.toml` says. Everything not named here keeps its default.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `vip.mode`
    pub vip_mode: &'static str,
    /// The listeners. Those of one family are a service together with the backends of that family.
    pub listen: Vec<SocketAddr>,
    /// Name and address of each backend.
    pub backends: Vec<(String, SocketAddr)>,
    /// `check.ca_file`; empty: none
    pub ca_file: PathBuf,
    /// Further lines of `[dataplane]`.
    pub dataplane: Vec<String>,
    /// Further lines of every `[[service]]`.
    pub service: Vec<String>,
    /// Further lines of every `[service.check]`.
    pub check: Vec<String>,
}

impl Settings {
    /// The configuration file, with what the daemon keeps on disk below `directory`.
    pub fn to_toml(&self, directory: &Path) -> String {
        let mut toml = String::new();
        let mut line = |text: &str| {
            toml.push_str(text);
            toml.push('\n');
        };
        line("[dataplane]");
        line(&format!("state_dir = {:?}", directory.join("state")));
        line(&format!("pin_dir = {:?}", pins_of(directory)));
        let cgroup = cgroup_of(directory).unwrap_or_else(|| "none".into());
        if !self.dataplane.iter().any(|text| text.starts_with("cgroup = ")) {
            line(&format!("cgroup = {cgroup:?}"));
        }
        self.dataplane.iter().for_each(|text| line(text));
        line(&format!("[vip]\nmode = {:?}", self.vip_mode));
        line(&format!("[admin]\nsocket = {:?}", directory.join("admin.sock")));
        for (name, is_family) in [
            ("kube-apiserver", SocketAddr::is_ipv4 as fn(&SocketAddr) -> bool),
            ("kube-apiserver-v6", SocketAddr::is_ipv6),
        ] {
            let listen: Vec<_> = self.listen.iter().filter(|address| is_family(address)).collect();
            if listen.is_empty() {
                continue;
            }
            let listen: Vec<_> = listen.iter().map(ToString::to_string).collect();
            line(&format!("[[service]]\nname = {name:?}\nlisten = {listen:?}"));
            self.service.iter().for_each(|text| line(text));
            line("[service.check]");
            if !self.ca_file.as_os_str().is_empty() {
                line(&format!("ca_file = {:?}", self.ca_file));
            }
            self.check.iter().for_each(|text| line(text));
            for (name, address) in self.backends.iter().filter(|(_, address)| is_family(address)) {
                line(&format!("[[service.backend]]\nname = {name:?}\naddress = \"{address}\""));
            }
        }
        toml
    }
}

/// `sheave run` on a host. Dropping it kills it; what it has put into the kernel stays until the lab goes.
#[derive(Debug)]
pub struct Daemon {
    process: Process,
    /// Of the host it runs on.
    namespace: PathBuf,
    /// Of everything it keeps.
    directory: PathBuf,
    socket: PathBuf,
}

/// What `sheave status --json` says, as far as tests look at it.
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    /// All services.
    pub services: Vec<ServiceStatus>,
    /// Counters by name.
    #[serde(default)]
    pub packets: BTreeMap<String, u64>,
}

/// One service of [`Status`].
#[derive(Clone, Debug, Deserialize)]
pub struct ServiceStatus {
    /// Its name.
    pub name: String,
    /// Its backends.
    pub backends: Vec<BackendStatus>,
}

/// One backend of [`ServiceStatus`].
#[derive(Clone, Debug, Deserialize)]
pub struct BackendStatus {
    /// Its name.
    pub name: String,
    /// ready, draining, silent, dead, maint or unknown.
    pub state: String,
    /// Flows that are open.
    pub active_flows: u64,
    /// Flows that were ever opened.
    pub total_flows: u64,
    /// The last check.
    pub check: Option<CheckStatus>,
}

/// The last check of a [`BackendStatus`].
#[derive(Clone, Debug, Deserialize)]
pub struct CheckStatus {
    /// HAProxy's code, such as `L7OK`.
    pub code: Option<String>,
    /// The HTTP status, where there was one.
    pub http_status: Option<u16>,
    /// In words.
    pub detail: String,
    /// The sub-checks that the server has named as failed.
    pub failed: Vec<String>,
}

impl Status {
    /// The state of a backend in every service that has it.
    pub fn states(&self, backend: &str) -> Vec<&str> {
        let backends = self.services.iter().flat_map(|service| &service.backends);
        backends.filter(|candidate| candidate.name == backend).map(|found| found.state.as_str()).collect()
    }
}

impl Daemon {
    /// Writes the configuration and starts the daemon. It may not be ready yet.
    ///
    /// # Errors
    /// When the program is missing.
    pub fn start(host: &Host, directory: &Path, settings: &Settings) -> Result<Self> {
        Self::start_arguing(host, directory, settings, &[])
    }

    /// As [`Daemon::start`], with further arguments of `sheave run`.
    ///
    /// # Errors
    /// When the program is missing.
    pub fn start_arguing(
        host: &Host,
        directory: &Path,
        settings: &Settings,
        arguments: &[&str],
    ) -> Result<Self> {
        let config = |directory: &Path| settings.to_toml(directory);
        Self::launch(host, directory, config, host.command(program()?), arguments)
    }

    /// Starts the daemon with a configuration that [`Settings`] cannot say: `config` makes its text, with what the
    /// daemon keeps on disk below the directory it is given, and the admin socket there as `admin.sock`. `command`
    /// ends with the program, to which `run` is added.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_with(
        host: &Host,
        directory: &Path,
        config: impl FnOnce(&Path) -> String,
        command: Command,
    ) -> Result<Self> {
        Self::launch(host, directory, config, command, &[])
    }

    fn launch(
        host: &Host,
        directory: &Path,
        config: impl FnOnce(&Path) -> String,
        mut command: Command,
        arguments: &[&str],
    ) -> Result<Self> {
        let directory = directory_on(host, directory);
        fs::create_dir_all(&directory)?;
        let file = directory.join("sheave.toml");
        fs::write(&file, config(&directory))?;
        command.arg("run").arg("--config").arg(&file).args(arguments);
        let process = host.start("sheave", command)?;
        let socket = directory.join("admin.sock");
        Ok(Self { process, namespace: host.namespace().path(), directory, socket })
    }

    /// Waits until every service has this many ready backends.
    ///
    /// # Errors
    /// When the daemon ends, or it takes too long.
    pub fn wait_ready(&mut self, backends: usize) -> Result<()> {
        eventually(READY_LIMIT, &format!("{backends} backends are ready"), || {
            // There is nothing to wait for any more.
            if let Err(ended) = self.require_running() {
                return Ok(Err(ended));
            }
            let status = self.status()?;
            for service in &status.services {
                let ready = service.backends.iter().filter(|backend| backend.state == "ready").count();
                ensure!(ready == backends, "{} has {ready} ready backends: {service:?}", service.name);
            }
            Ok(Ok(()))
        })?
    }

    /// Waits until a backend is in this state in every service that has it.
    ///
    /// # Errors
    /// When it takes too long.
    pub fn wait_state(&mut self, backend: &str, state: &str, limit: Duration) -> Result<()> {
        eventually(limit, &format!("{backend} is {state}"), || {
            self.require_running()?;
            let status = self.status()?;
            let states = status.states(backend);
            ensure!(!states.is_empty() && states.iter().all(|now| *now == state), "{backend} is {states:?}");
            Ok(())
        })
    }

    fn require_running(&mut self) -> Result<()> {
        if let Some(status) = self.process.exited()? {
            bail!("sheave ended, {status}:\n{}", self.process.log());
        }
        Ok(())
    }

    /// A `sheave` command that talks to this daemon.
    ///
    /// # Errors
    /// When the program is missing.
    pub fn command(&self, subcommand: &str) -> Result<Command> {
        let mut command = command_in(&self.namespace, program()?);
        command.arg(subcommand).arg("--socket").arg(&self.socket);
        Ok(command)
    }

    /// `sheave status --json`. Its exit code is not looked at: it tells about the services, not about the command.
    ///
    /// # Errors
    /// When it prints no status.
    pub fn status(&self) -> Result<Status> {
        Ok(serde_json::from_value(self.status_json()?)?)
    }

    /// All that `sheave status --json` says.
    ///
    /// # Errors
    /// When it prints no status.
    pub fn status_json(&self) -> Result<Value> {
        let output = self.command("status")?.arg("--json").output()?;
        serde_json::from_slice(&output.stdout).with_context(|| {
            format!("sheave status: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr))
        })
    }

    /// The sentences about the first service, and about the load balancer.
    ///
    /// # Errors
    /// When it prints no status.
    pub fn flags(&self) -> Result<String> {
        let status = self.status_json()?;
        Ok([&status["services"][0]["flags"], &status["flags"]].map(ToString::to_string).concat())
    }

    /// Waits until one of [`Daemon::flags`] says this.
    ///
    /// # Errors
    /// When it takes too long.
    pub fn wait_flag(&self, words: &str, limit: Duration) -> Result<()> {
        eventually(limit, &format!("a flag says {words:?}"), || {
            let flags = self.flags()?;
            ensure!(flags.contains(words), "{flags}");
            Ok(())
        })
    }

    /// What `sheave status` prints for people.
    ///
    /// # Errors
    /// When there is no daemon, or it prints nothing.
    pub fn status_table(&self) -> Result<String> {
        let output = self.command("status")?.output()?;
        ensure!(!output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Whether `sheave alive` says that this load balancer works.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn is_alive(&self) -> Result<bool> {
        Ok(self.command("alive")?.output()?.status.success())
    }

    /// The path of its admin socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Where it pins maps, program and links.
    pub fn pins(&self) -> PathBuf {
        pins_of(&self.directory)
    }

    /// `sheave reload` with other settings: what it said.
    ///
    /// # Errors
    /// When the program is missing.
    pub fn reload(&self, settings: &Settings) -> Result<Output> {
        fs::write(self.directory.join("sheave.toml"), settings.to_toml(&self.directory))?;
        Ok(self.command("reload")?.output()?)
    }

    /// `sheave unload`, whether it still runs or not: what it said.
    ///
    /// # Errors
    /// When the program is missing.
    pub fn unload(&self) -> Result<Output> {
        let config = self.directory.join("sheave.toml");
        Ok(self.command("unload")?.arg("--config").arg(config).output()?)
    }

    /// SIGTERM, and waits for its end. Packets go on.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(mut self) -> Result<ExitStatus> {
        self.process.signal(Signal::SIGTERM)?;
        self.process.wait(STOP_LIMIT)
    }
}

/// Where a daemon on a host keeps its files, in a lab's directory.
pub fn directory_on(host: &Host, directory: &Path) -> PathBuf {
    directory.join(format!("{}-sheave", host.name()))
}

/// Whether an XDP program is attached to a host's interface.
///
/// # Errors
/// When there is no such interface.
pub fn has_xdp(host: &Host, interface: &str) -> Result<bool> {
    let shown = run(host.command("ip").args(["-details", "link", "show", "dev", interface]))?;
    Ok(shown.contains("prog/xdp"))
}

/// The `sheave` program: the environment variable `SHEAVE`, or the release build beside this one.
///
/// # Errors
/// When it is not there.
pub fn program() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("SHEAVE") {
        return Ok(path.into());
    }
    let ourselves = std::env::current_exe()?;
    ourselves
        .ancestors()
        .map(|directory| directory.join("release/sheave"))
        .find(|path| path.is_file())
        .context("no release build of sheave: run `cargo xtask build`, or name the program in SHEAVE")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::Settings;

    #[test]
    fn settings_become_a_service_for_each_family() {
        let settings = Settings {
            vip_mode: "follow",
            listen: vec!["10.77.1.100:6443".parse().unwrap(), "[fd77:1::100]:6443".parse().unwrap()],
            backends: vec![
                ("api-1".to_owned(), "10.77.1.11:6443".parse().unwrap()),
                ("api-1".to_owned(), "[fd77:1::11]:6443".parse().unwrap()),
            ],
            ca_file: "/lab/ca.crt".into(),
            dataplane: vec![],
            service: vec![],
            check: vec!["fall = 2".to_owned()],
        };
        let toml = settings.to_toml(Path::new("/lab"));
        assert_eq!(toml.matches("[[service]]").count(), 2);
        assert_eq!(toml.matches("[[service.backend]]\nname = \"api-1\"").count(), 2);
        assert!(
            toml.contains("listen = [\"[fd77:1::100]:6443\"]\n[service.check]\nca_file = \"/lab/ca.crt\"\n")
        );
    }
}
