//! Running watches: an event a moment, each with a number.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::task::JoinSet;

use crate::{
    background::Background,
    lab::{Host, eventually},
    load::{Client, Dialled},
};

/// Until each has had its first event.
const START_LIMIT: Duration = Duration::from_secs(20);
/// The stub sends an event every 200 ms.
const EVENT_LIMIT: Duration = Duration::from_secs(3);

/// What is known of one watch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// The server, once there was an event.
    pub server: Option<String>,
    /// How many have come.
    pub events: u64,
    /// It has ended, or an event was missing.
    pub end: Option<End>,
}

/// How a watch was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// When its client heard of it.
    pub at: SystemTime,
    /// What its client was told.
    pub why: String,
}

impl End {
    fn now(result: Result<()>) -> Self {
        let why = result.map_or_else(|error| format!("{error:#}"), |()| "the response ended".to_owned());
        Self { at: SystemTime::now(), why }
    }
}

/// Watches that are running. Dropping it ends them.
#[derive(Debug)]
pub struct Watches {
    seen: Arc<Mutex<Vec<Seen>>>,
    _background: Background,
}

impl Watches {
    /// Begins `count` watches from a host.
    ///
    /// # Errors
    /// When they do not all get an event.
    pub fn start(host: &Host, client: &Client, count: usize) -> Result<Self> {
        let seen = Arc::new(Mutex::new(vec![Seen::default(); count]));
        let (client, shared) = (client.clone(), Arc::clone(&seen));
        let background = Background::start(host, move |stop| async move {
            let mut watches = JoinSet::new();
            for number in 0..count {
                let (client, seen) = (client.clone(), Arc::clone(&shared));
                watches.spawn(async move {
                    // It goes on for ever: whatever ends it, it is broken.
                    let end = End::now(watch(&client, number, &seen).await);
                    look(&seen)[number].end = Some(end);
                });
            }
            let _ = stop.await;
        });
        let watches = Self { seen, _background: background };
        eventually(START_LIMIT, "all watches have events", || {
            ensure!(look(&watches.seen).iter().all(|seen| seen.events > 0 && seen.end.is_none()));
            Ok(())
        })?;
        Ok(watches)
    }

    /// What is known of each by now.
    pub fn seen(&self) -> Vec<Seen> {
        look(&self.seen).clone()
    }

    /// Waits for another event on each watch of a server: how many of how many do not get it.
    pub fn broken_at(&self, server: &str) -> (usize, usize) {
        let before = look(&self.seen).clone();
        let here = || before.iter().enumerate().filter(|(_, seen)| seen.server.as_deref() == Some(server));
        let stuck = || {
            let now = look(&self.seen);
            here()
                .filter(|(number, seen)| now[*number].end.is_some() || now[*number].events == seen.events)
                .count()
        };
        let _ = eventually(EVENT_LIMIT, "another event", || {
            ensure!(stuck() == 0);
            Ok(())
        });
        (stuck(), here().count())
    }
}

fn look(seen: &Mutex<Vec<Seen>>) -> std::sync::MutexGuard<'_, Vec<Seen>> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads events until one is missing or the connection ends.
async fn watch(client: &Client, number: usize, seen: &Mutex<Vec<Seen>>) -> Result<()> {
    let Dialled { mut connection, driver, .. } = client.dial().await?;
    tokio::spawn(driver);
    let mut body: Incoming = connection.get("/watch").await?.into_body();
    let (mut text, mut expected) = (String::new(), 0);
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        text.push_str(std::str::from_utf8(&data)?);
        while let Some((line, rest)) = text.split_once('\n') {
            let (server, event) = line.split_once(' ').context("no event")?;
            let event: u64 = event.parse()?;
            ensure!(event == expected, "event {event} came instead of {expected}");
            expected += 1;
            {
                let mut seen = look(seen);
                seen[number].server = Some(server.to_owned());
                seen[number].events = expected;
            }
            text = rest.to_owned();
        }
    }
    Ok(())
}
