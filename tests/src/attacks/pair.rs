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
        let (from, source) = (self.from, self.source);
        pass(&mut self.client, &mut self.server, b'>')
            .and_then(|()| pass(&mut self.server, &mut self.client, b'<'))
            .with_context(|| format!("the connection of {from}, which its server sees as {source}"))
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

fn pass(from: &mut TcpStream, to: &mut TcpStream, byte: u8) -> Result<()> {
    from.write_all(&[byte]).context("sending a byte")?;
    to.set_read_timeout(Some(BYTE))?;
    let mut received = [0];
    to.read_exact(&mut received).context("waiting for a byte")?;
    ensure!(received == [byte], "{received:?} arrived instead of {byte}");
    Ok(())
}

fn told(stream: &mut TcpStream, deadline: Instant) -> Result<Ended> {
    /// Also a client whose time is over is looked at.
    const LOOK: Duration = Duration::from_millis(1);
    stream.set_read_timeout(Some(deadline.saturating_duration_since(Instant::now()).max(LOOK)))?;
    match stream.read(&mut [0]) {
        Ok(0) => Ok(Ended::Closed),
        Ok(_) => bail!("got a byte instead"),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(Ended::Reset),
        Err(error) => Err(error).context("was not told that its connection is over"),
    }
}
