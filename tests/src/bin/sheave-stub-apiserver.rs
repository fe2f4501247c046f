//! A stub apiserver as a process. Tests start it through `lb_tests::stub::Stub`; by hand, orders go to its
//! control socket: `echo 'health status 500' | nc -U SOCKET`.

use std::{fs, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use clap::Parser;
use lb_tests::stub::{AnonymousMode, Options, Startup, serve};

/// Answers as kube-apiserver 1.36 does, and falls ill on demand.
#[derive(Parser)]
struct Arguments {
    /// What it answers to /name.
    #[arg(long)]
    name: String,
    /// Where it listens.
    #[arg(long, default_value = "[::]:6443")]
    listen: SocketAddr,
    /// PEM certificate chain.
    #[arg(long)]
    certificate: PathBuf,
    /// PEM private key.
    #[arg(long)]
    key: PathBuf,
    /// PEM certificates of the authority that signs client certificates.
    #[arg(long)]
    client_ca: PathBuf,
    /// A file with the bearer token of a user without roles.
    #[arg(long)]
    token_file: Option<PathBuf>,
    /// What anonymous callers may do: allowed, forbidden, off or conditions.
    #[arg(long, default_value_t)]
    anonymous: AnonymousMode,
    /// The Unix socket that takes orders.
    #[arg(long)]
    control: PathBuf,
    /// Milliseconds between SIGTERM and the closing of the listener, with /readyz at 500.
    #[arg(long, default_value_t = 0)]
    shutdown_delay: u64,
    /// Milliseconds that a watch may go on after the listener has closed.
    #[arg(long, default_value_t = 60_000)]
    request_timeout: u64,
    /// How it comes up: at-once, TLS,ROLES,READY or without-etcd:END, in milliseconds.
    #[arg(long, default_value_t)]
    startup: Startup,
    /// An endpoint of the service default/kubernetes; may be given several times.
    #[arg(long = "endpoint")]
    endpoints: Vec<SocketAddr>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let token = arguments
        .token_file
        .map(|file| fs::read_to_string(&file).with_context(|| format!("reading {}", file.display())))
        .transpose()?
        .map(|token| token.trim().to_owned());
    serve(Options {
        name: arguments.name,
        listen: arguments.listen,
        certificate: arguments.certificate,
        key: arguments.key,
        client_ca: arguments.client_ca,
        token,
        anonymous: arguments.anonymous,
        control: arguments.control,
        shutdown_delay: Duration::from_millis(arguments.shutdown_delay),
        request_timeout: Duration::from_millis(arguments.request_timeout),
        startup: arguments.startup,
        endpoints: arguments.endpoints,
    })
    .await
}
