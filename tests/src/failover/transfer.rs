//! A download that goes slowly until it is let go, every byte compared.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use http_body_util::BodyExt as _;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use crate::{
    background::Background,
    lab::{Host, eventually},
    load::{Client, Dialled},
    pattern::Checker,
};

/// Longer than what the buffers between the ends hold, and than any event takes.
const LENGTH: u64 = 120_000_000;
/// Bytes a second.
const RATE: f64 = 2_000_000.0;
/// Until the first bytes, and from letting go to the last.
const LIMIT: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
struct Progress {
    position: u64,
    result: Option<Result<()>>,
}

/// A download under way.
#[derive(Debug)]
pub(super) struct Transfer {
    progress: Arc<Mutex<Progress>>,
    let_go: watch::Sender<bool>,
    _background: Background,
}

impl Transfer {
    /// Begins, and returns once bytes flow.
    pub(super) fn start(host: &Host, client: &Client) -> Result<Self> {
        let progress: Arc<Mutex<Progress>> = Arc::default();
        let (let_go, may_go) = watch::channel(false);
        let (client, shared) = (client.clone(), Arc::clone(&progress));
        let background = Background::start(host, move |stop| async move {
            tokio::select! {
                _ = stop => {}
                result = download(&client, &shared, may_go) => lock(&shared).result = Some(result),
            }
        });
        let transfer = Self { progress, let_go, _background: background };
        eventually(LIMIT, "bytes flow", || {
            ensure!(lock(&transfer.progress).position > 0);
            Ok(())
        })?;
        Ok(transfer)
    }

    /// Lets it go on as fast as it can; fails unless it was still under way and every byte arrives.
    pub(super) fn finish(self) -> Result<()> {
        if let Some(result) = lock(&self.progress).result.take() {
            return result.and(Err(anyhow!("the transfer was over too soon to prove anything")));
        }
        let _ = self.let_go.send(true);
        eventually(LIMIT, "the transfer ends", || lock(&self.progress).result.take().context("it goes on"))?
    }
}

fn lock(progress: &Mutex<Progress>) -> std::sync::MutexGuard<'_, Progress> {
    progress.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn download(
    client: &Client,
    progress: &Mutex<Progress>,
    mut may_go: watch::Receiver<bool>,
) -> Result<()> {
    let Dialled { mut connection, driver, .. } = client.dial().await?;
    tokio::spawn(driver);
    let mut body = connection.get(&format!("/bytes/{LENGTH}")).await?.into_body();
    let (mut checker, began) = (Checker::default(), Instant::now());
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        let differs = |position| anyhow!("bytes differ from {position} on");
        checker.check(&data).map_err(differs)?;
        lock(progress).position = checker.position();
        let due = began + Duration::from_secs_f64(checker.position() as f64 / RATE);
        tokio::select! {
            () = sleep_until(due) => {}
            _ = may_go.wait_for(|go| *go) => {}
        }
    }
    ensure!(checker.position() == LENGTH, "{} of {LENGTH} bytes arrived", checker.position());
    Ok(())
}
