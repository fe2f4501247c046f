//! `sheave run`

use std::{path::PathBuf, process::ExitCode};

use crate::{
    config::Config,
    daemon::{self, Options},
};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
A first configuration, for three masters behind a VIP that keepalived (or you) put on this host:

  [[service]]
  name = \"kube-apiserver\"
  listen = [\"192.168.2.140:6443\"]
  backends = [\"192.168.2.151:6443\", \"192.168.2.152:6443\", \"192.168.2.153:6443\"]

  [service.check]
  ca_file = \"/etc/kubernetes/pki/ca.crt\"

Needs root. Ctrl-C or SIGTERM stops the daemon, not the packets: what is in the kernel goes on forwarding, and the next
`sheave run` takes it over without losing a connection. `sheave unload` takes it away.")]
pub(super) struct Arguments {
    /// The configuration file
    #[arg(long, short, value_name = "FILE", default_value = super::CONFIG_FILE)]
    config: PathBuf,
    /// What to log, such as `debug` or `info,lb_userspace::health=debug` [default: $RUST_LOG, else info]
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
    /// Log one packet in N: for finding out why a packet is dropped
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    log_packets: Option<u32>,
    /// Start with a new, empty flow table where the one in the kernel does not fit this version or configuration:
    /// connections that are open end
    #[arg(long)]
    replace_layout: bool,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    // kube tells of every watch that ends; what that means is said by who asked for it.
    super::init_logging(arguments.log.as_deref(), "info,kube_client=error")?;
    let (config, warnings) = Config::load(&arguments.config)?;
    for warning in &warnings {
        tracing::warn!("{}", warning.one_line());
    }
    // A relative path would mean another file after a change of directory.
    let file = std::path::absolute(&arguments.config)?;
    let options = Options { log_one_in: arguments.log_packets, replace_layout: arguments.replace_layout };
    daemon::run(config, file, options)?;
    Ok(ExitCode::SUCCESS)
}
