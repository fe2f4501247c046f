//! Both ends of a connection through a load balancer.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

/// For a byte to pass. A segment that met a busy moment is sent again after 200 ms.
const BYTE: Duration = Duration::from_secs(5);

/// A connection, and its sockets at both ends.
#[derive(Debug)]
pub struct Pair {
    /// The client's end.
    pub client: TcpStream,
    /// The server's end.
    pub server: TcpStream,
    /// The number of the server, from 0.
    pub at: usize,
    /// The client's address.
    pub from: SocketAddr,
    /// The listener.
    pub to: SocketAddr,
    /// The client's address as the server sees it.
    pub source: SocketAddr,
    /// The server's address.
    pub backend: SocketAddr,
}

/// How an end of a connection learned that it is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// By a FIN.
    Closed,
    /// By a RST.
    Reset,
}

impl Pair {
    /// Sends a byte each way and waits for both.
    ///
    /// # Errors
    /// When one does not arrive, or another does.
    pub fn exchange(&mut self) -> Result<()> {
        exchange_all(std::slice::from_mut(self)).pop().map_or(Ok(()), Err)
    }

    fn of(&self) -> String {
        format!("the connection of {}, which its server sees as {}", self.from, self.source)
    }

    /// Waits until the client is told that it is over.
    ///
    /// # Errors
    /// When it is not told until `deadline`.
    pub fn client_told(&mut self, deadline: Instant) -> Result<Ended> {
        told(&mut self.client, deadline).with_context(|| format!("the client {}", self.from))
    }

    /// Waits until the server is told that it is over.
    ///
    /// # Errors
    /// When it is not told until `deadline`.
    pub fn server_told(&mut self, deadline: Instant) -> Result<Ended> {
        told(&mut self.server, deadline).with_context(|| format!("the server of {}", self.source))
    }

    /// Closes the client's way to the server.
    ///
    /// # Errors
    /// When it is closed already.
    pub fn close_client(&self) -> Result<()> {
        Ok(self.client.shutdown(Shutdown::Write)?)
    }

    /// Closes the server's way to the client.
    ///
    /// # Errors
    /// When it is closed already.
    pub fn close_server(&self) -> Result<()> {
        Ok(self.server.shutdown(Shutdown::Write)?)
    }
}

/// Sends a byte each way on each of them, all at the same time, and waits for all. Returns what failed, one for each
/// connection on which something did.
pub fn exchange_all(pairs: &mut [Pair]) -> Vec<anyhow::Error> {
    let mut errors: Vec<Option<anyhow::Error>> = pairs.iter().map(|_| None).collect();
    pass_all(pairs, &mut errors, b'>', |pair| (&mut pair.client, &mut pair.server));
    pass_all(pairs, &mut errors, b'<', |pair| (&mut pair.server, &mut pair.client));
    errors.into_iter().flatten().collect()
}

/// A byte one way on each of those that have no error yet.
fn pass_all(
    pairs: &mut [Pair],
    errors: &mut [Option<anyhow::Error>],
    byte: u8,
    ends: impl Fn(&mut Pair) -> (&mut TcpStream, &mut TcpStream),
) {
    let mut each = |act: &dyn Fn(&mut Pair) -> Result<()>| {
        for (pair, error) in pairs.iter_mut().zip(errors.iter_mut()).filter(|(_, error)| error.is_none()) {
            *error = act(pair).err().map(|error| error.context(pair.of()));
        }
    };
    each(&|pair| ends(pair).0.write_all(&[byte]).context("sending a byte"));
    let deadline = Instant::now() + BYTE;
    each(&|pair| {
        let stream = ends(pair).1;
        let mut received = [0];
        set_deadline(stream, deadline)?;
        stream.read_exact(&mut received).context("waiting for a byte")?;
        ensure!(received == [byte], "{received:?} arrived instead of {byte}");
        Ok(())
    });
}

/// Reads of this socket fail from then on, but not before it was looked at.
fn set_deadline(stream: &TcpStream, deadline: Instant) -> Result<()> {
    const LOOK: Duration = Duration::from_millis(1);
    stream.set_read_timeout(Some(deadline.saturating_duration_since(Instant::now()).max(LOOK)))?;
    Ok(())
}

fn told(stream: &mut TcpStream, deadline: Instant) -> Result<Ended> {
    set_deadline(stream, deadline)?;
    match stream.read(&mut [0]) {
        Ok(0) => Ok(Ended::Closed),
        Ok(_) => bail!("got a byte instead"),
        // The test was stopped and goes on: the kernel does not begin a wait with a limit again (signal(7)).
        Err(error) if error.kind() == ErrorKind::Interrupted => told(stream, deadline),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(Ended::Reset),
        Err(error) => Err(error).context("was not told that its connection is over"),
    }
}
