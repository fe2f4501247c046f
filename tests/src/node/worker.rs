//! Both ends of the process that makes the load.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::mpsc::{self, Receiver, Sender},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use http_body_util::BodyExt as _;
use serde::{Deserialize, Serialize};
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep, timeout_at},
};

use super::quantile;
use crate::load::{Client, Connection, raise_descriptor_limit, runtime};

/// A connection or an answer that takes longer is lost.
const PATIENCE: Duration = Duration::from_secs(10);
/// For connections that were let go to be closed.
const CLOSING: Duration = Duration::from_millis(30);
/// A balancer that has not led to every server after so many connections for each does not balance.
const DIALS: usize = 100;

/// What a worker is told.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// Gets ready for a load.
    Prepare(Load),
    /// Makes it for so long.
    Go {
        /// How long.
        milliseconds: u64,
    },
    /// Closes its connections.
    Rest,
}

/// What a worker does.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum Load {
    /// One request after the other, on one open connection to each of so many servers.
    Kept {
        /// Told apart by what they answer.
        servers: usize,
    },
    /// One connection after the other, so many at a time: TCP, TLS, one request.
    New {
        /// In each thread.
        lanes: usize,
    },
    /// `GET /readyz` at a steady rate.
    Checks {
        /// Each on a connection of its own; else on one of [`OPEN`] that stay open, in turns.
        fresh: bool,
        /// Between two of them.
        microseconds: u64,
    },
}

/// As many nodes keep one each; more would be no colder.
const OPEN: usize = 100;

/// What has come of [`Order::Go`]; of others, zeros.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Tally {
    /// Requests that were answered in time.
    pub(super) answered: usize,
    /// Half of them took no longer, in microseconds.
    pub(super) median: f64,
    /// 99 % of them took no longer, in microseconds.
    pub(super) p99: f64,
}

impl Tally {
    fn of(mut latencies: Vec<f64>) -> Self {
        latencies.sort_by(f64::total_cmp);
        Self { answered: latencies.len(), median: quantile(&latencies, 0.5), p99: quantile(&latencies, 0.99) }
    }
}

/// A running `sheave-load`. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Worker {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts it from a command that ends with the program, to which the arguments are added.
    pub(super) fn start(
        mut command: Command,
        ca_file: &Path,
        threads: usize,
        targets: &[SocketAddr],
    ) -> Result<Self> {
        command.arg("--ca").arg(ca_file).arg("--threads").arg(threads.to_string());
        command.args(targets.iter().map(ToString::to_string));
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("sheave-load")?;
        let orders = child.stdin.take().context("no pipe")?;
        let answers = BufReader::new(child.stdout.take().context("no pipe")?);
        Ok(Self { child, orders, answers })
    }

    /// Has an order carried out.
    pub(super) fn order(&mut self, order: Order) -> Result<Tally> {
        writeln!(self.orders, "{}", serde_json::to_string(&order)?)?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        let answer: Result<Tally, String> =
            serde_json::from_str(&line).with_context(|| format!("sheave-load said {line:?}"))?;
        answer.map_err(|error| anyhow!("{order:?}: {error}"))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Carries out the orders on standard input until its end: the process `sheave-load`.
///
/// # Errors
/// When it cannot begin, or nobody listens any more.
pub fn serve_orders(ca_file: &Path, threads: usize, targets: &[SocketAddr]) -> Result<()> {
    raise_descriptor_limit()?;
    let clients: Vec<_> = targets
        .iter()
        .map(|target| Client::new(ca_file, *target, PATIENCE)?.expecting("localhost"))
        .collect::<Result<_>>()?;
    let (sender, answers) = mpsc::channel();
    let hands: Vec<Sender<Order>> = (0..threads)
        .map(|_| {
            let (hand, orders) = mpsc::channel();
            let (clients, sender) = (clients.clone(), sender.clone());
            thread::spawn(move || carry_out(&clients, &orders, &sender));
            hand
        })
        .collect();
    for line in std::io::stdin().lock().lines() {
        let order: Order = serde_json::from_str(&line?)?;
        for hand in &hands {
            hand.send(order).ok().context("a thread has ended")?;
        }
        // Everybody's, also where the first has failed: the next answer is to the next order.
        let all: Vec<_> = answers.iter().take(threads).collect();
        let all: Result<Vec<_>> = all.into_iter().collect();
        let answer = all.map(|each| Tally::of(each.concat())).map_err(|error| format!("{error:#}"));
        println!("{}", serde_json::to_string(&answer)?);
    }
    Ok(())
}

/// A thread with a runtime, and so a share of the connections, of its own.
fn carry_out(clients: &[Client], orders: &Receiver<Order>, answers: &Sender<Result<Vec<f64>>>) {
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(error) => return drop(answers.send(Err(error))),
    };
    let mut lanes = Vec::new();
    for order in orders {
        let answer = runtime.block_on(async {
            match order {
                Order::Prepare(load) => lanes = prepare(clients, load).await?,
                Order::Go { milliseconds } => {
                    return go(&mut lanes, Duration::from_millis(milliseconds)).await;
                }
                Order::Rest => {
                    lanes.clear();
                    sleep(CLOSING).await;
                }
            }
            Ok(Vec::new())
        });
        if answers.send(answer).is_err() {
            return;
        }
    }
}

/// Something that is done over and over.
enum Lane {
    Kept(Connection),
    New { clients: Vec<Client>, next: usize },
    Checks { client: Client, open: Vec<Connection>, pause: Duration, next: usize },
}

async fn prepare(clients: &[Client], load: Load) -> Result<Vec<Lane>> {
    match load {
        Load::Kept { servers } => {
            Ok(one_to_each(clients, servers).await?.into_iter().map(Lane::Kept).collect())
        }
        Load::New { lanes } => {
            Ok((0..lanes).map(|next| Lane::New { clients: clients.to_vec(), next }).collect())
        }
        Load::Checks { fresh, microseconds } => {
            let client = clients.first().context("no target")?.clone();
            let mut open = Vec::new();
            for _ in 0..if fresh { 0 } else { OPEN } {
                open.push(client.connect().await?);
            }
            Ok(vec![Lane::Checks { client, open, pause: Duration::from_micros(microseconds), next: 0 }])
        }
    }
}

/// Whoever balances, and however: the load is the same for all, one connection to each server.
async fn one_to_each(clients: &[Client], servers: usize) -> Result<Vec<Connection>> {
    let mut found = BTreeMap::new();
    for client in clients.iter().cycle().take(DIALS * servers) {
        let mut connection = client.connect().await?;
        let name = connection.name().await?;
        found.entry(name).or_insert(connection);
        if found.len() == servers {
            return Ok(found.into_values().collect());
        }
    }
    bail!("{} connections led to {} of {servers} servers", DIALS * servers, found.len())
}

/// How long each request took, in microseconds.
async fn go(lanes: &mut Vec<Lane>, time: Duration) -> Result<Vec<f64>> {
    ensure!(!lanes.is_empty(), "nothing is prepared");
    let until = Instant::now() + time;
    let running: JoinSet<_> = lanes.drain(..).map(|lane| lane.run(until)).collect();
    let mut latencies = Vec::new();
    for result in running.join_all().await {
        let (lane, took) = result?;
        lanes.push(lane);
        latencies.extend(took);
    }
    Ok(latencies)
}

impl Lane {
    async fn run(mut self, until: Instant) -> Result<(Self, Vec<f64>)> {
        let mut took = Vec::new();
        let mut ticks = match &self {
            Self::Checks { pause, .. } => {
                let mut ticks = interval(*pause);
                ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
                Some(ticks)
            }
            Self::Kept(_) | Self::New { .. } => None,
        };
        loop {
            if let Some(ticks) = &mut ticks
                && timeout_at(until.into(), ticks.tick()).await.is_err()
            {
                break;
            }
            let began = Instant::now();
            if began >= until {
                break;
            }
            self.once().await?;
            let ended = Instant::now();
            if ended <= until {
                took.push((ended - began).as_secs_f64() * 1e6);
            }
        }
        Ok((self, took))
    }

    async fn once(&mut self) -> Result<()> {
        match self {
            Self::Kept(connection) => get(connection, "/name").await,
            Self::New { clients, next } => {
                *next += 1;
                get(&mut clients[*next % clients.len()].connect().await?, "/name").await
            }
            Self::Checks { client, open, next, .. } => {
                *next += 1;
                let place = *next % open.len().max(1);
                match open.get_mut(place) {
                    Some(connection) => get(connection, "/readyz").await,
                    None => get(&mut client.connect().await?, "/readyz").await,
                }
            }
        }
    }
}

async fn get(connection: &mut Connection, path: &str) -> Result<()> {
    connection.get(path).await?.into_body().collect().await?;
    Ok(())
}
