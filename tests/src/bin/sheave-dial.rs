//! Opens connections and says what became of them, as JSON: see `lb_tests::dial`. By hand:
//! `sheave-dial --ca ca.crt --count 10 127.0.0.1:16443`.

use std::{
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Result;
use clap::Parser;
use lb_tests::{
    dial::{ASKING, Dialled},
    load::{Client, raise_descriptor_limit},
};
use tokio::{net::TcpStream, task::JoinSet};

/// Opens connections and says what became of them.
#[derive(Parser)]
struct Arguments {
    /// PEM certificates that servers must chain to.
    #[arg(long)]
    ca: PathBuf,
    /// Has the system call wait until a connection stands, as simple programs do.
    #[arg(long)]
    blocking: bool,
    /// How many to open, all at the same time.
    #[arg(long, default_value_t = 1)]
    count: usize,
    /// An IPv4 address in IPv6 notation makes an IPv6 socket.
    address: SocketAddr,
}

/// An answer that has taken this long is lost.
const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let Arguments { ca, blocking, count, address } = Arguments::parse();
    raise_descriptor_limit()?;
    let client = Client::new(&ca, address, PATIENCE)?.expecting("localhost")?;
    let mut opening = JoinSet::new();
    for _ in 0..count {
        let address = client.target();
        opening.spawn(async move {
            let began = Instant::now();
            let tcp = if blocking {
                wait_in_connect(address).await
            } else {
                // As most clients do.
                TcpStream::connect(address).await
            };
            let took = began.elapsed();
            (tcp.and_then(|tcp| Ok((tcp.peer_addr()?, tcp))), took)
        });
    }
    let mut said = Dialled::default();
    let mut open = Vec::new();
    for (opened, took) in opening.join_all().await {
        said.slowest_ms = said.slowest_ms.max(took.as_millis().try_into()?);
        match opened {
            Ok((peer, tcp)) => {
                *said.peers.entry(peer).or_default() += 1;
                open.push(tcp);
            }
            Err(error) => *said.failures.entry(error.to_string()).or_default() += 1,
        }
    }
    let rest = open.split_off(open.len().min(ASKING));
    for tcp in open {
        match async { client.over(tcp).await?.name().await }.await {
            Ok(server) => *said.servers.entry(server).or_default() += 1,
            Err(error) => *said.failures.entry(format!("{error:#}")).or_default() += 1,
        }
    }
    drop(rest);
    println!("{}", serde_json::to_string(&said)?);
    Ok(())
}

async fn wait_in_connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let tcp = tokio::task::spawn_blocking(move || std::net::TcpStream::connect(address)).await??;
    tcp.set_nonblocking(true)?;
    TcpStream::from_std(tcp)
}
