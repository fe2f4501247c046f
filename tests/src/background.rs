//! Something that goes on in a host while the story is told.

use std::thread::{self, JoinHandle};

use anyhow::Result;
use tokio::sync::oneshot;

use crate::{
    lab::{Host, namespace},
    load,
};

/// A thread inside a host, with a runtime of its own. Dropping it tells it to stop, and waits until it has.
#[derive(Debug)]
pub(crate) struct Background {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    /// Runs the future that `work` makes; it is given what tells it to stop.
    pub(crate) fn start<F: Future<Output = ()>>(
        host: &Host,
        work: impl FnOnce(oneshot::Receiver<()>) -> F + Send + 'static,
    ) -> Self {
        let (stop, stopped) = oneshot::channel();
        let path = host.namespace().path();
        let thread = thread::spawn(move || {
            let ran = namespace::enter(&path, || -> Result<()> {
                load::raise_descriptor_limit()?;
                load::runtime()?.block_on(work(stopped));
                Ok(())
            });
            if let Err(error) = ran.and_then(|inner| inner) {
                eprintln!("a client could not start: {error:#}");
            }
        });
        Self { stop: Some(stop), thread: Some(thread) }
    }

    /// Tells it to stop and waits until it has.
    pub(crate) fn stop(&mut self) {
        // It may have come to its end already.
        self.stop.take().map(|stop| stop.send(()));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.stop();
    }
}
