//! A process that holds connections open: the connect hook looks at the cgroup of a process, and what becomes of its
//! sockets when their backend is dead is for the process to see.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::lab::{Host, eventually, process::sibling_program};

/// For an order to be carried out.
const ORDER: Duration = Duration::from_secs(60);

/// Connections of which each of three servers, chosen by chance, has some, but for once in some million times.
pub const SOME_AT_EACH: usize = 40;

/// What the process is told, a line each.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum Order {
    /// To open so many connections over TLS, and ask each server for its name.
    Open(usize),
    /// The same, and to ask again and again.
    OpenPolling(usize),
    /// To open so many connections and say nothing on them.
    OpenPlain(usize),
    /// To say whom each connection that says nothing is connected to, as `getpeername` has it.
    NamePeers,
    /// To open connections from now on, one after the other, whether that succeeds or not; the last few hundred stay open.
    KeepOpening,
    /// To close the oldest so many.
    Close(usize),
    /// To dial with a socket that is kept, and to be refused.
    BeRefused,
    /// To dial this address with the socket that was refused, and to say as the server's name whom it is connected to.
    DialAgain(SocketAddr),
}

/// What it says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Said {
    /// A connection is open, to this server.
    Opened(String),
    /// One could not be opened.
    Failed(String),
    /// One was ended, and not by the process.
    Ended {
        /// Whose it was, if that was asked.
        server: Option<String>,
        /// How.
        error: String,
    },
    /// A connection is open, and this is its peer's name.
    Peer(SocketAddr),
    /// An order is carried out.
    Done,
}

/// The process. Dropping it ends it.
#[derive(Debug)]
pub struct Holder {
    process: Child,
    orders: ChildStdin,
    said: Arc<Mutex<Vec<(Instant, Said)>>>,
    given: usize,
}

impl Holder {
    /// Starts it on `host`, in the lab's cgroup if `hooked`: its connections go to `address`, its servers' certificates must be
    /// for `localhost` and from the authority in `ca_file`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(host: &Host, hooked: bool, ca_file: &Path, address: SocketAddr) -> Result<Self> {
        let program = sibling_program("sheave-hold")?;
        let command = if hooked { host.hooked_command(program)? } else { host.command(program) };
        Self::start_with(command, ca_file, address)
    }

    /// As [`Holder::start`], with a command that runs the program wherever it is to run.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_with(mut command: Command, ca_file: &Path, address: SocketAddr) -> Result<Self> {
        command.arg("--ca").arg(ca_file).arg(address.to_string());
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let orders = process.stdin.take().context("its standard input")?;
        let lines = BufReader::new(process.stdout.take().context("its standard output")?).lines();
        let said = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&said);
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if let Ok(said) = serde_json::from_str(&line) {
                    heard.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), said));
                }
            }
        });
        Ok(Self { process, orders, said, given: 0 })
    }

    /// Gives an order, and waits until it is carried out.
    ///
    /// # Errors
    /// When it is not, or a connection cannot be opened.
    pub fn order(&mut self, order: Order) -> Result<()> {
        writeln!(self.orders, "{}", serde_json::to_string(&order)?)?;
        self.given += 1;
        eventually(ORDER, &format!("{order:?} is carried out"), || {
            let said = self.said();
            let done = said.iter().filter(|it| **it == Said::Done).count();
            ensure!(done == self.given, "{done} of {} orders", self.given);
            let failed: Vec<_> = said.iter().filter(|it| matches!(it, Said::Failed(_))).collect();
            ensure!(failed.is_empty(), "{failed:?}");
            Ok(())
        })
    }

    /// Waits until it has said what it has seen until now.
    ///
    /// # Errors
    /// As [`Holder::order`].
    pub fn catch_up(&mut self) -> Result<()> {
        // What it sees together with the first is dealt with before the second.
        (0..2).try_for_each(|_| self.order(Order::Close(0)))
    }

    /// Everything it has said.
    pub fn said(&self) -> Vec<Said> {
        self.timed().into_iter().map(|(_, said)| said).collect()
    }

    /// The same, with the time when it was heard.
    pub fn timed(&self) -> Vec<(Instant, Said)> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many connections were opened to a server.
    pub fn opened_to(&self, server: &str) -> usize {
        let opened = |said: &Said| matches!(said, Said::Opened(name) if name == server);
        self.said().iter().filter(|it| opened(it)).count()
    }

    /// The names of the peers that it was asked for.
    pub fn peers(&self) -> Vec<SocketAddr> {
        let peer = |said| if let Said::Peer(address) = said { Some(address) } else { None };
        self.said().into_iter().filter_map(peer).collect()
    }

    /// How each connection ended that the process has not ended itself: whose it was, and the error.
    pub fn ended(&self) -> Vec<(Option<String>, String)> {
        let ended = |said| match said {
            Said::Ended { server, error } => Some((server, error)),
            _ => None,
        };
        self.said().into_iter().filter_map(ended).collect()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
