//! What the data path has noticed about backends (`lb_common::witness`).

use std::time::Duration;

use lb_common::witness::waits;

use super::{Dataplane, DataplaneError};

/// What was noticed about one backend. The two words say when, each in a way that is good for comparison only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Signal {
    /// How long clients have been waiting for it; None: nobody waits.
    pub waiting: Option<Duration>,
    /// Since when, as a word.
    pub asked: u32,
    /// When it last refused a SYN, as a word; 0: never.
    pub refused: u32,
}

impl Dataplane {
    /// What was noticed about the backends with these ids, in their order.
    pub fn signals(&mut self, ids: impl Iterator<Item = u8>) -> Result<Vec<Signal>, DataplaneError> {
        let mut signals: Vec<_> = ids.map(|id| self.signal(id)).collect();
        if signals.iter().any(|signal| signal.waiting.is_some()) {
            // Read only now: it takes a system call, and most of the time nobody waits.
            let now = self.jiffies()? as u32;
            for signal in &mut signals {
                let ticks = now.wrapping_sub(signal.asked);
                let waiting = Duration::from_secs_f64(f64::from(ticks) / f64::from(self.ticks.frequency));
                signal.waiting = signal.waiting.map(|_| waiting);
            }
        }
        Ok(signals)
    }

    /// Nobody has waited for a backend since `asked` ([`Signal::asked`]), unless somebody else began to meanwhile.
    pub fn forget_wait(&self, id: u8, asked: u32) {
        if let Some(backend) = self.backends.get(usize::from(id)) {
            backend.asked.compare_exchange(asked, 0);
        }
    }

    /// [`Signal::waiting`] only says whether.
    fn signal(&self, id: u8) -> Signal {
        self.backends.get(usize::from(id)).map_or_else(Signal::default, |backend| {
            // In this order: an answer that comes between ends the wait.
            let (asked, heard) = (backend.asked.load(), backend.heard.load());
            Signal {
                waiting: waits(asked, heard).then_some(Duration::ZERO),
                asked,
                refused: backend.refused.load(),
            }
        })
    }
}
