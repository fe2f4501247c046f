//! A bad path: every frame between two interfaces of a host is carried by hand, and some are lost, doubled or late.
//!
//! The kernel's own `netem` is a module that not every machine has.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Result;

use super::Noise;
use crate::lab::{Host, capture::Capture};

/// Of so many frames one is lost, one sent twice, and one goes after those that follow it.
const ONE_OF: usize = 40;
/// So many overtake a late one.
const OVERTAKE: usize = 3;
/// A late frame goes where nothing follows it for so long.
const LATE: Duration = Duration::from_millis(5);

/// What was done to frames.
#[derive(Debug, Default)]
pub struct Harm {
    /// Not sent.
    pub lost: AtomicU64,
    /// Sent twice.
    pub doubled: AtomicU64,
    /// Sent after others that came later.
    pub late: AtomicU64,
}

/// Threads that carry frames. Dropping it ends them.
#[derive(Debug)]
pub struct Shuttle {
    harm: Arc<Harm>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Shuttle {
    /// Carries frames between the first two interfaces of a host, both ways.
    ///
    /// # Errors
    /// When it has not two.
    pub fn start(host: &Host) -> Result<Self> {
        let mut ends = Vec::new();
        for link in host.links().iter().take(2) {
            let interface = &link.interface;
            // It is to take what is for others, and as it was sent.
            host.ip(&format!("link set {interface} promisc on"))?;
            host.run(&format!("ethtool -K {interface} gro off"))?;
            ends.push(Arc::new(Capture::open(host, interface)?));
        }
        let (harm, stop) = (Arc::new(Harm::default()), Arc::new(AtomicBool::new(false)));
        let carry = |from: usize, to: usize| {
            let (from, to) = (Arc::clone(&ends[from]), Arc::clone(&ends[to]));
            let (harm, stop) = (Arc::clone(&harm), Arc::clone(&stop));
            thread::spawn(move || carry(&from, &to, &harm, &stop))
        };
        anyhow::ensure!(ends.len() == 2, "{} has not two interfaces", host.name());
        let threads = vec![carry(0, 1), carry(1, 0)];
        Ok(Self { harm, stop, threads })
    }

    /// What was done so far.
    pub fn harm(&self) -> &Harm {
        &self.harm
    }
}

fn carry(from: &Capture, to: &Capture, harm: &Harm, stop: &AtomicBool) {
    let mut noise = Noise::new(40);
    // Late frames, with how many are yet to overtake them.
    let mut late: VecDeque<(usize, Vec<u8>)> = VecDeque::new();
    while !stop.load(Ordering::Relaxed) {
        let Ok(frame) = from.receive(LATE, |_| true) else {
            late.drain(..).for_each(|(_, frame)| drop(to.send(&frame)));
            continue;
        };
        match noise.below(ONE_OF) {
            0 => drop(harm.lost.fetch_add(1, Ordering::Relaxed)),
            1 => {
                harm.doubled.fetch_add(1, Ordering::Relaxed);
                drop((to.send(&frame), to.send(&frame)));
            }
            2 => {
                harm.late.fetch_add(1, Ordering::Relaxed);
                late.push_back((OVERTAKE, frame));
                continue;
            }
            _ => drop(to.send(&frame)),
        }
        late.iter_mut().for_each(|(left, _)| *left -= 1);
        while late.front().is_some_and(|(left, _)| *left == 0) {
            late.pop_front().into_iter().for_each(|(_, frame)| drop(to.send(&frame)));
        }
    }
}

impl Drop for Shuttle {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
