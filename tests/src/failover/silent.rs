//! Connections that are open and say nothing, as a watch without events.

use std::{
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::{
    sync::{mpsc as questions, oneshot},
    task::JoinSet,
};

use super::failure::Failure;
use crate::background::Background;
use crate::{
    lab::{Host, eventually},
    load::{Client, Connection, Dialled},
    stub::TOKEN,
};

/// Handshakes under way at the same time.
const AT_ONCE: usize = 64;
/// Until all of them are open, or have answered.
const OPEN_LIMIT: Duration = Duration::from_secs(80);

/// The end of one of them.
#[derive(Clone, Debug)]
pub(super) struct End {
    /// The server at the other end.
    pub(super) server: String,
    /// When its client was told.
    pub(super) at: Instant,
    /// How.
    pub(super) how: Failure,
}

/// What goes on over them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Over {
    /// HTTP/1.1, and nothing.
    Nothing,
    /// HTTP/2, and a watch that has had one event and gets no other.
    Watch,
}

/// Open connections, each of which was answered once.
#[derive(Debug)]
pub(super) struct Silent {
    servers: Vec<String>,
    ends: Arc<Mutex<Vec<End>>>,
    questions: questions::UnboundedSender<mpsc::Sender<usize>>,
    _background: Background,
}

impl Silent {
    /// Opens `count` connections from a host.
    pub(super) fn open(host: &Host, client: &Client, count: usize, over: Over) -> Result<Self> {
        let ends: Arc<Mutex<Vec<End>>> = Arc::default();
        let (opened, opening) = mpsc::channel();
        let (questions, asked) = questions::unbounded_channel();
        let client = match over {
            Over::Nothing => client.clone(),
            Over::Watch => client.clone().http2(TOKEN),
        };
        let shared = Arc::clone(&ends);
        let background = Background::start(host, move |stop| async move {
            let held = open_all(&client, count, over, &shared).await;
            let servers = held.as_ref().map(|held| held.iter().map(|held| held.server.clone()).collect());
            let told = opened.send(servers.map_err(|error| format!("{error:#}")));
            if let (Ok(held), Ok(())) = (held, told) {
                hold(held, asked, stop).await;
            }
        });
        let servers = opening.recv_timeout(OPEN_LIMIT).context("opening connections")?;
        let servers: Vec<String> = servers.map_err(anyhow::Error::msg)?;
        Ok(Self { servers, ends, questions, _background: background })
    }

    /// How many are at a server, the ended ones included.
    pub(super) fn at(&self, server: &str) -> usize {
        self.servers.iter().filter(|at| *at == server).count()
    }

    /// Those that have come to their end.
    pub(super) fn ends(&self) -> Vec<End> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for the end of all that are at `server`; without an answer within `limit` some live on.
    pub(super) fn wait_ended(&self, server: &str, limit: Duration) -> Vec<End> {
        let ended = || -> Vec<_> { self.ends().into_iter().filter(|end| end.server == server).collect() };
        let expected = self.at(server);
        let all = eventually(limit, "connections end", || {
            let ended = ended();
            ensure!(ended.len() == expected, "{} of {expected}", ended.len());
            Ok(ended)
        });
        all.unwrap_or_else(|_| ended())
    }

    /// Asks on all of them: how many are not answered any more.
    pub(super) fn unanswered(&self) -> Result<usize> {
        let (reply, answer) = mpsc::channel();
        self.questions.send(reply).ok().context("the connections' thread has ended")?;
        Ok(self.servers.len() - answer.recv_timeout(OPEN_LIMIT).context("asking")?)
    }
}

async fn open_all(
    client: &Client,
    count: usize,
    over: Over,
    ends: &Arc<Mutex<Vec<End>>>,
) -> Result<Vec<Held>> {
    let mut held = Vec::with_capacity(count);
    let mut opening = JoinSet::new();
    for begun in 0..count {
        if begun >= AT_ONCE {
            held.push(opening.join_next().await.context("no connection")???);
        }
        opening.spawn(open(client.clone(), over, Arc::clone(ends)));
    }
    while let Some(opened) = opening.join_next().await {
        held.push(opened??);
    }
    Ok(held)
}

/// One of them.
struct Held {
    server: String,
    connection: Connection,
    _watch: Option<Incoming>,
}

async fn open(client: Client, over: Over, ends: Arc<Mutex<Vec<End>>>) -> Result<Held> {
    let Dialled { mut connection, driver, .. } = client.dial().await?;
    let (is_at, server) = oneshot::channel::<String>();
    tokio::spawn(async move {
        let how = driver.await.map_or_else(|error| Failure::of(&error), |()| Failure::Closed);
        let at = Instant::now();
        // Without a name it has not counted as open.
        if let Ok(server) = server.await {
            ends.lock().unwrap_or_else(PoisonError::into_inner).push(End { server, at, how });
        }
    });
    let server = connection.name().await?;
    let watch = match over {
        Over::Nothing => None,
        Over::Watch => {
            let mut events = connection.get("/watch/silent").await?.into_body();
            events.frame().await.context("a watch without its first event")??;
            Some(events)
        }
    };
    let _ = is_at.send(server.clone());
    Ok(Held { server, connection, _watch: watch })
}

/// Keeps them open until told to stop, and asks on all of them when told to.
async fn hold(
    mut held: Vec<Held>,
    mut asked: questions::UnboundedReceiver<mpsc::Sender<usize>>,
    mut stop: oneshot::Receiver<()>,
) {
    loop {
        tokio::select! {
            _ = &mut stop => return,
            Some(reply) = asked.recv() => {
                let mut asking = JoinSet::new();
                for mut held in held.drain(..) {
                    asking.spawn(async move { (held.connection.name().await.is_ok(), held) });
                }
                let answers = asking.join_all().await;
                let _ = reply.send(answers.iter().filter(|(answered, _)| *answered).count());
                held.extend(answers.into_iter().map(|(_, held)| held));
            }
        }
    }
}
