//! `sheave init`

use std::{net::IpAddr, path::PathBuf, process::ExitCode};

use super::{block_on, output};
use crate::init::{self, Request};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Asks the kubeconfig's apiserver who the apiservers are (the EndpointSlice of default/kubernetes),
looks at each of them, and writes the configuration. Needs a user who may list EndpointSlices there;
the checks will not use it.

Examples:
  sheave init --kubeconfig /etc/kubernetes/admin.conf --vip 192.168.2.140
  sheave init --kubeconfig ~/.kube/config --vip fd00::140 --output ./sheave.toml

Nothing is overwritten. Exit codes: 0 written, 1 failed, 2 wrong usage.")]
pub(super) struct Arguments {
    /// Whose cluster, and who asks
    #[arg(long, value_name = "FILE")]
    kubeconfig: PathBuf,
    /// The address that clients will use
    #[arg(long, value_name = "ADDRESS")]
    vip: IpAddr,
    /// The file to write
    #[arg(long, short, value_name = "FILE", default_value = super::CONFIG_FILE)]
    output: PathBuf,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    super::init_logging(None, "warn")?;
    let Arguments { kubeconfig, vip, output: file } = arguments;
    let done = block_on(init::run(&Request { kubeconfig, vip, output: file }))??;
    let written = done.written.iter().map(|file| format!("wrote {}\n", file.display()));
    let steps = done
        .remaining
        .iter()
        .zip(1..)
        .map(|(step, number)| format!("  {number}. {}\n", output::printable(step)));
    let text: String = written.chain(["\nWhat remains to do:\n".to_owned()]).chain(steps).collect();
    output::print(&text)?;
    Ok(ExitCode::SUCCESS)
}
