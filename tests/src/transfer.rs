//! Transfers through a VIP, every byte compared; one that goes slowly until it is let go.

use std::{
    fs,
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

use crate::{
    cluster::Cluster,
    lab::process::said,
    pattern::{self, Checker},
};

/// Longer than what buffers between the ends could hold.
const LENGTH: u64 = 200_000_000;
const PIECE: usize = 1 << 16;
/// After each piece: about 3 MB/s.
const PAUSE: Duration = Duration::from_millis(20);

/// Downloads `length` bytes through `vip`.
///
/// # Errors
/// When they do not all arrive as they were sent.
pub fn download(cluster: &Cluster, vip: IpAddr, length: u64) -> Result<()> {
    let mut curl = cluster.curl(vip, &format!("/bytes/{length}"));
    let mut child = curl.args(["--max-time", "300"]).stdout(Stdio::piped()).spawn()?;
    let stream = child.stdout.take().context("curl has no output")?;
    let position = Checker::default().check_all(stream)?;
    let status = child.wait()?;
    ensure!(status.success() && position == length, "{position} of {length} bytes arrived, curl: {status}");
    Ok(())
}

/// Sends `length` bytes through `vip` and has them sent back.
///
/// # Errors
/// When they do not all come back as they were sent.
pub fn upload_and_back(cluster: &Cluster, vip: IpAddr, length: u64) -> Result<()> {
    let file = cluster.lab.directory().join("upload");
    let mut sent = Vec::new();
    while (sent.len() as u64) < length {
        sent.extend_from_slice(&pattern::piece(sent.len() as u64, length - sent.len() as u64));
    }
    fs::write(&file, &sent)?;
    let mut curl = cluster.curl(vip, "/echo");
    curl.args(["--max-time", "300"]).arg("--data-binary").arg(format!("@{}", file.display()));
    let output = curl.output()?;
    ensure!(output.status.success(), "curl: {}", said(&output));
    ensure!(output.stdout == sent, "what came back is not what was sent");
    Ok(())
}

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
