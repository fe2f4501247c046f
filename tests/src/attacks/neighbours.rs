//! Many clients in one segment, each with a MAC of its own, that begin a handshake.

use std::{
    collections::HashMap,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use super::{Attacker, Forged};

/// Between two SYNs of a client that has no answer, as a real one waits at first (RFC 6298 §2.1). A backend answers a
/// client again after 500 ms at the earliest (`net.ipv4.tcp_invalid_ratelimit`).
const AGAIN: Duration = Duration::from_secs(1);
/// SYNs in a row, so that no queue on the way is full.
const BURST: usize = 250;
/// For the answers to a burst; later ones are heard with the next burst's.
const BURST_TIME: Duration = Duration::from_millis(50);
/// For frames that have arrived and were not looked at, in bytes: a SYN-ACK takes 2.7 kB of it.
const ROOM: usize = 64 << 20;

/// Sends a SYN from each of these MACs, and again each second from those that have no answer, until all have one. An answer
/// is a SYN-ACK that acknowledges the SYN, to the SYN's address and port, at its MAC.
///
/// A client whose answer is lost on the way, or by the capture of this test, gets another: the backend answers again.
///
/// # Errors
/// When one has no answer within `limit`, or nothing can be sent.
pub fn require_neighbours_answered(
    attacker: &Attacker,
    syns: &[([u8; 6], Forged<'_>)],
    limit: Duration,
) -> Result<()> {
    attacker.make_room(ROOM)?;
    let begin = Instant::now();
    let mut waiting: HashMap<[u8; 6], &Forged<'_>> = syns.iter().map(|(mac, syn)| (*mac, syn)).collect();
    ensure!(waiting.len() == syns.len(), "two of {} neighbours have one MAC", syns.len());
    let (mut sent, mut lost) = (0, 0);
    loop {
        let round = Instant::now();
        let senders: Vec<_> = waiting.iter().map(|(mac, syn)| (*mac, *syn)).collect();
        for burst in senders.chunks(BURST) {
            for (mac, syn) in burst.iter().filter(|(mac, _)| waiting.contains_key(mac)) {
                attacker.send_frame(&attacker.frame(*mac, syn)?)?;
                sent += 1;
            }
            let unanswered = |waiting: &HashMap<_, _>| burst.iter().any(|(mac, _)| waiting.contains_key(mac));
            attacker.hear_syn_acks(BURST_TIME, |mac, answer| {
                if waiting.get(&mac).is_some_and(|syn| answer.is_to(syn)) {
                    waiting.remove(&mac);
                }
                !unanswered(&waiting)
            });
        }
        lost += attacker.lost()?;
        if waiting.is_empty() {
            return Ok(());
        }
        ensure!(
            begin.elapsed() < limit,
            "{} of {} neighbours have no answer within {limit:?}, to {sent} SYNs; the capture lost {lost} frames",
            waiting.len(),
            syns.len()
        );
        thread::sleep(AGAIN.saturating_sub(round.elapsed()));
    }
}
