//! New connections at a steady rate, whatever becomes of them.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tokio::{sync::oneshot, task::JoinSet, time::interval};

use super::{failure::Failure, machine::Punctuality};
use crate::{
    background::Background,
    lab::{Host, eventually},
    load::{Client, Dialled},
};

/// A SYN is sent again after a second: a connection that took nearly as long has lost one.
const SYN_LOST: Duration = Duration::from_millis(900);
/// Until the rate is reached, on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(20);

/// One connection's fate.
#[derive(Clone, Debug)]
pub(super) struct Arrival {
    /// When it was begun.
    pub(super) started: Instant,
    /// Whether it took a SYN more than usual.
    pub(super) syn_lost: bool,
    /// The server that answered.
    pub(super) result: Result<String, Failure>,
}

/// A client that opens connections at a rate and asks one question on each.
#[derive(Debug)]
pub(super) struct Arrivals {
    log: Arc<Mutex<Vec<Arrival>>>,
    background: Background,
}

impl Arrivals {
    /// Begins, and returns when half a second's worth of connections has been answered.
    pub(super) fn start(host: &Host, client: &Client, rate: u32, punctuality: &Punctuality) -> Result<Self> {
        let log = Arc::new(Mutex::new(Vec::new()));
        let (client, punctuality, shared) = (client.clone(), punctuality.clone(), Arc::clone(&log));
        let background =
            Background::start(host, move |stop| keep_arriving(client, rate, punctuality, shared, stop));
        let arrivals = Self { log, background };
        eventually(START_LIMIT, "connections are answered", || {
            let answered = arrivals.so_far().iter().filter(|arrival| arrival.result.is_ok()).count();
            ensure!(answered >= rate as usize / 2, "{answered} were");
            Ok(())
        })?;
        Ok(arrivals)
    }

    /// Ends, once those under way have met their fate, and returns all, as they ended.
    pub(super) fn stop(mut self) -> Vec<Arrival> {
        self.background.stop();
        self.so_far()
    }

    fn so_far(&self) -> Vec<Arrival> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn keep_arriving(
    client: Client,
    rate: u32,
    punctuality: Punctuality,
    log: Arc<Mutex<Vec<Arrival>>>,
    mut stop: oneshot::Receiver<()>,
) {
    let mut ticks = interval(Duration::from_secs(1) / rate);
    let mut under_way = JoinSet::new();
    loop {
        tokio::select! {
            _ = &mut stop => break,
            due = ticks.tick() => {
                punctuality.count(due.elapsed());
                under_way.spawn(arrive(client.clone(), Arc::clone(&log)));
                while under_way.try_join_next().is_some() {}
            }
        }
    }
    under_way.join_all().await;
}

async fn arrive(client: Client, log: Arc<Mutex<Vec<Arrival>>>) {
    let started = Instant::now();
    let mut syn_lost = false;
    let asking = async {
        let Dialled { mut connection, driver, connected_in } = client.dial().await?;
        syn_lost = connected_in >= SYN_LOST;
        tokio::spawn(driver);
        connection.name().await.context("asking")
    };
    let result = asking.await.map_err(|error| Failure::of(error.as_ref()));
    let arrival = Arrival { started, syn_lost, result };
    log.lock().unwrap_or_else(PoisonError::into_inner).push(arrival);
}

/// How those that failed did, and when after `event`: for whoever wants to know why.
pub(super) fn tell_failures(arrivals: &[Arrival], event: Instant) {
    for kind in [Failure::Refused, Failure::Reset, Failure::Closed, Failure::Late, Failure::Other] {
        let failed = || arrivals.iter().filter(|it| it.result.as_ref().err() == Some(&kind));
        let begun = |it: &Arrival| {
            let before = event.saturating_duration_since(it.started).as_secs_f64();
            it.started.saturating_duration_since(event).as_secs_f64() - before
        };
        let (first, last) = (failed().map(begun).reduce(f64::min), failed().map(begun).reduce(f64::max));
        if let (Some(first), Some(last)) = (first, last) {
            let count = failed().count();
            eprintln!("      {kind:?}: {count} connections that were begun {first:.2} to {last:.2} s after");
        }
    }
}
