//! A download through a VIP that goes slowly until it is let go, every byte compared.

use std::{
    io::Read as _,
    net::IpAddr,
    process::{Child, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};

use crate::{cluster::Cluster, pattern::Checker};

/// Longer than what buffers between the ends could hold.
const LENGTH: u64 = 200_000_000;
const PIECE: usize = 1 << 16;
/// After each piece: about 3 MB/s.
const PAUSE: Duration = Duration::from_millis(20);

/// A transfer under way.
#[derive(Debug)]
pub struct SlowTransfer {
    let_go: Arc<AtomicBool>,
    reader: JoinHandle<Result<(u64, Child)>>,
}

impl SlowTransfer {
    /// Returns once bytes flow.
    ///
    /// # Errors
    /// When none do.
    pub fn start(cluster: &Cluster, vip: IpAddr) -> Result<Self> {
        let mut curl = cluster.curl(vip, &format!("/bytes/{LENGTH}"));
        let mut child = curl.args(["--max-time", "300"]).stdout(Stdio::piped()).spawn()?;
        let mut stream = child.stdout.take().context("curl has no output")?;
        let (mut checker, mut buffer) = (Checker::default(), vec![0; PIECE]);
        let differs = |position: u64| anyhow!("the transfer differs from byte {position} on");
        let count = stream.read(&mut buffer)?;
        ensure!(count > 0, "the transfer ended before it began: {}", child.wait()?);
        checker.check(&buffer[..count]).map_err(differs)?;
        let let_go = Arc::new(AtomicBool::new(false));
        let fast = Arc::clone(&let_go);
        let reader = thread::spawn(move || {
            loop {
                match stream.read(&mut buffer)? {
                    0 => return Ok((checker.position(), child)),
                    count => checker.check(&buffer[..count]).map_err(differs)?,
                }
                if !fast.load(Ordering::Relaxed) {
                    thread::sleep(PAUSE);
                }
            }
        });
        Ok(Self { let_go, reader })
    }

    /// Fails unless it is still under way, and then comes to its end.
    ///
    /// # Errors
    /// When it was over too soon to prove anything, or is not whole.
    pub fn finish(self) -> Result<()> {
        let over = self.reader.is_finished();
        self.let_go.store(true, Ordering::Relaxed);
        let (length, mut child) =
            self.reader.join().map_err(|_| anyhow!("the transfer's reader panicked"))??;
        let status = child.wait()?;
        ensure!(status.success() && length == LENGTH, "{length} of {LENGTH} bytes arrived, curl: {status}");
        ensure!(!over, "the transfer was over too soon to prove anything");
        Ok(())
    }
}
