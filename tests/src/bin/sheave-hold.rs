//! Holds connections open, as told on its standard input, and says what becomes of them: see `lb_tests::hold`.

use std::{
    collections::VecDeque,
    io::ErrorKind,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Weak},
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::Parser;
use lb_tests::{
    hold::{Order, Said},
    load::{Client, Connection, raise_descriptor_limit},
};
use socket2::{Domain, Socket, Type};
use tokio::{net::TcpStream, sync::mpsc, task::JoinHandle};

/// Holds connections open, as told on its standard input.
#[derive(Parser)]
struct Arguments {
    /// PEM certificates that servers must chain to.
    #[arg(long)]
    ca: PathBuf,
    /// Where to.
    address: SocketAddr,
}

/// An answer that has taken this long is lost.
const PATIENCE: Duration = Duration::from_secs(20);

/// Between questions on a connection.
const PAUSE: Duration = Duration::from_millis(200);

/// Connections of [`Order::KeepOpening`] that are open at once.
const KEPT_OPEN: usize = 300;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let Arguments { ca, address } = Arguments::parse();
    raise_descriptor_limit()?;
    let client = Client::new(&ca, address, PATIENCE)?.expecting("localhost")?;
    let (sender, mut orders) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        std::io::stdin().lines().map_while(Result::ok).try_for_each(|it| sender.send(it))
    });
    let mut held = Vec::new();
    let mut plain: Vec<Weak<TcpStream>> = Vec::new();
    let mut refused = None;
    // Whoever started us has gone when there is nothing to read any more.
    while let Some(order) = orders.recv().await {
        match serde_json::from_str(&order).with_context(|| format!("no order: {order:?}"))? {
            Order::OpenPlain(count) => {
                for _ in 0..count {
                    match TcpStream::connect(client.target()).await {
                        Ok(tcp) => {
                            let tcp = Arc::new(tcp);
                            plain.push(Arc::downgrade(&tcp));
                            held.push(tokio::spawn(hold_plain(tcp)));
                        }
                        Err(error) => say(&Said::Failed(error.to_string()))?,
                    }
                }
            }
            order @ (Order::Open(count) | Order::OpenPolling(count)) => {
                for _ in 0..count {
                    match open(&client, matches!(order, Order::OpenPolling(_))).await {
                        Ok(holding) => held.push(holding),
                        Err(error) => say(&Said::Failed(format!("{error:#}")))?,
                    }
                }
            }
            Order::NamePeers => {
                for tcp in plain.iter().filter_map(Weak::upgrade) {
                    say(&Said::Peer(tcp.peer_addr()?))?;
                }
            }
            Order::KeepOpening => held.push(tokio::spawn(keep_opening(client.target()))),
            Order::BeRefused => {
                let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
                match socket.connect(&address.into()) {
                    Err(error) if error.kind() == ErrorKind::ConnectionRefused => refused = Some(socket),
                    other => say(&Said::Failed(format!("not refused: {other:?}")))?,
                }
            }
            Order::DialAgain(other) => match dial_again(refused.take(), other) {
                Ok(tcp) => {
                    say(&Said::Opened(tcp.peer_addr()?.to_string()))?;
                    held.push(tokio::spawn(hold_plain(Arc::new(tcp))));
                }
                Err(error) => say(&Said::Failed(error.to_string()))?,
            },
            Order::Close(count) => {
                for holding in held.drain(..count.min(held.len())) {
                    holding.abort();
                    // It is closed when the task is gone.
                    let _ = holding.await;
                }
            }
        }
        say(&Said::Done)?;
    }
    Ok(())
}

fn dial_again(socket: Option<Socket>, address: SocketAddr) -> Result<TcpStream> {
    let socket = socket.context("no socket was refused")?;
    socket.connect(&address.into())?;
    socket.set_nonblocking(true)?;
    Ok(TcpStream::from_std(socket.into())?)
}

/// Opens connections again and again.
async fn keep_opening(target: SocketAddr) {
    let mut open = VecDeque::new();
    loop {
        open.extend(TcpStream::connect(target).await);
        if open.len() > KEPT_OPEN {
            open.pop_front();
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// A connection that says nothing.
async fn hold_plain(tcp: Arc<TcpStream>) {
    let ended = match hear(&tcp).await {
        Ok(0) => "closed".to_owned(),
        Ok(_) => "it spoke".to_owned(),
        Err(error) => error.to_string(),
    };
    let _ = say(&Said::Ended { server: None, error: ended });
}

async fn hear(tcp: &TcpStream) -> std::io::Result<usize> {
    loop {
        tcp.readable().await?;
        match tcp.try_read(&mut [0]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            other => return other,
        }
    }
}

/// A connection that has asked once, and waits from then on, as a watch does; or asks again and again.
async fn open(client: &Client, polling: bool) -> Result<JoinHandle<()>> {
    let dialled = client.dial().await?;
    let (mut connection, driver) = (dialled.connection, dialled.driver);
    let driver = tokio::spawn(driver);
    let server = connection.name().await?;
    say(&Said::Opened(server.clone()))?;
    Ok(tokio::spawn(async move {
        let driver = AbortOnDrop(driver);
        let ended = if polling { poll(&mut connection, driver).await } else { hold(driver).await };
        let _ = say(&Said::Ended { server: Some(server), error: ended });
        drop(connection);
    }))
}

struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn poll<T>(connection: &mut Connection, driver: AbortOnDrop<T>) -> String {
    let error = loop {
        tokio::time::sleep(PAUSE).await;
        if let Err(error) = connection.name().await {
            break error;
        }
    };
    drop(driver);
    format!("{error:#}")
}

async fn hold<T>(mut driver: AbortOnDrop<Result<T, hyper::Error>>) -> String {
    match (&mut driver.0).await {
        Ok(Ok(_)) => "closed".to_owned(),
        Ok(Err(error)) => format!("{:#}", anyhow::Error::from(error)),
        Err(error) => error.to_string(),
    }
}

fn say(said: &Said) -> Result<()> {
    println!("{}", serde_json::to_string(said)?);
    Ok(())
}
