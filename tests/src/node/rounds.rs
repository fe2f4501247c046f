//! The rounds: every contender for a moment, then all again, so that what else happens on the machine meets them alike.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::{
    contender::{Contender, Running},
    worker::{Load, Order},
};
use crate::lab::cgroup::{Group, processor_time_of_all};

/// Everything that runs.
pub(super) struct Ground {
    /// In the order of [`Contender::ALL`].
    pub(super) running: Vec<Running>,
    /// Of all apiservers.
    pub(super) servers: Group,
}

/// What was seen of one contender in one round.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Window {
    /// Requests a second.
    pub(super) rate: f64,
    /// In microseconds.
    pub(super) median: f64,
    /// In microseconds.
    pub(super) p99: f64,
    /// Processor time a request of the client and the balancer, in microseconds.
    pub(super) node_time: f64,
    /// The balancer's part of it.
    pub(super) balancer_time: f64,
    /// Of the apiservers.
    pub(super) server_time: f64,
    /// Processors that others kept busy.
    pub(super) others: f64,
}

/// One for each contender, in the order of [`Contender::ALL`].
pub(super) type Round = [Window; Contender::ALL.len()];

impl Ground {
    /// Plays so many rounds after one that does not count.
    pub(super) fn play(&mut self, load: Load, rounds: usize, time: Duration) -> Result<Vec<Round>> {
        let mut played = Vec::new();
        for number in 0..=rounds {
            let mut round = Round::default();
            for index in order(number) {
                let contender = Contender::ALL[index].name();
                round[index] = self.window(index, load, time).context(contender)?;
            }
            played.push(round);
        }
        Ok(played.split_off(1))
    }

    fn window(&mut self, index: usize, load: Load, time: Duration) -> Result<Window> {
        let Running { worker, client, balancer, .. } = &mut self.running[index];
        let taken = || -> Result<[Duration; 4]> {
            let groups = [&*client, &*balancer, &self.servers];
            let [client, balancer, servers] = groups.map(Group::processor_time);
            Ok([client?, balancer?, servers?, processor_time_of_all()?])
        };
        worker.order(Order::Prepare(load))?;
        let (before, began) = (taken()?, Instant::now());
        let tally = worker.order(Order::Go { milliseconds: u64::try_from(time.as_millis())? })?;
        let (after, lasted) = (taken()?, began.elapsed());
        worker.order(Order::Rest)?;
        ensure!(tally.answered > 0, "nothing was answered within {time:?}: a longer --window may help");

        let [client, balancer, servers, all] =
            std::array::from_fn(|group| (after[group] - before[group]).as_secs_f64() * 1e6);
        let each = |time: f64| time / tally.answered as f64;
        Ok(Window {
            rate: tally.answered as f64 / time.as_secs_f64(),
            median: tally.median,
            p99: tally.p99,
            node_time: each(client + balancer),
            balancer_time: each(balancer),
            server_time: each(servers),
            others: ((all - client - balancer - servers) / lasted.as_secs_f64() / 1e6).max(0.0),
        })
    }
}

/// Each comes at each place in the round, and after each other.
fn order(round: usize) -> impl Iterator<Item = usize> {
    const COUNT: usize = Contender::ALL.len();
    let forward = round.is_multiple_of(2);
    (0..COUNT).map(move |place| {
        let index = (place + round / 2) % COUNT;
        if forward { index } else { COUNT - 1 - index }
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::order;

    #[test]
    fn each_contender_comes_at_each_place() {
        let orders: Vec<Vec<_>> = (0..8).map(|round| order(round).collect()).collect();
        for place in 0..4 {
            let seen: BTreeSet<_> = orders.iter().map(|order| order[place]).collect();
            assert_eq!(seen.len(), 4, "{orders:?}");
        }
        assert!(orders.iter().all(|order| order.iter().collect::<BTreeSet<_>>().len() == 4));
    }
}
