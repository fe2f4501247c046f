//! The load of `sheave-bench node`, as a process of its own: what its connections meet and whose processor time it takes
//! depends on the cgroup it runs in. Takes an order a line and answers each with a line, both JSON: see `lb_tests::node`.

use std::{net::SocketAddr, path::PathBuf};

use anyhow::Result;
use clap::Parser;
use lb_tests::node::serve_orders;

/// Opens connections and sends requests as it is told, and says how long they took.
#[derive(Parser)]
struct Arguments {
    /// PEM certificates that servers must chain to.
    #[arg(long)]
    ca: PathBuf,
    /// Threads, each with connections of its own.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Where to: taken in turns.
    #[arg(required = true)]
    targets: Vec<SocketAddr>,
}

fn main() -> Result<()> {
    let Arguments { ca, threads, targets } = Arguments::parse();
    serve_orders(&ca, threads, &targets)
}
