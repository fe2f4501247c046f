//! Closing a flow that both sides have ended, and beginning another of the same tuple in its slot.

use crate::{
    cell::Cell32,
    meta::{BACKEND_FIN, CLIENT_FIN, Kind, Meta, RETRANSMITTED, SYN_WAITS},
};

/// Closes a flow, with one side's FIN noted in its word `meta`, if the `other`'s is there as well.
#[inline(always)]
pub fn close(word: &Cell32, mut meta: Meta, other: u32, closed: Kind) -> Meta {
    // The word may be refreshed or cleared of a RST meanwhile; a slot that stays open here is closed by the reaper.
    for _ in 0..2 {
        if !meta.has(other) || meta.is_closed() {
            break;
        }
        let next = meta.without(RETRANSMITTED).become_kind(closed);
        let now = Meta(word.compare_exchange(meta.0, next.0));
        if now == meta {
            return next;
        }
        meta = now;
    }
    meta
}

/// Marks a slot whose word was `meta`, and which both sides have closed, with [`SYN_WAITS`].
#[inline(always)]
pub fn mark_closed(word: &Cell32, meta: Meta) {
    exchange_closed(word, meta, |meta| {
        let closed = if meta.is_closed() { meta } else { meta.become_kind(Kind::ClosedByBackend) };
        closed.with(SYN_WAITS)
    });
}

/// Makes a closed slot, whose word was `meta`, the half-open one of a new flow. False: it is not closed any more.
#[inline(always)]
pub fn begin_again(word: &Cell32, meta: Meta, half_open: Meta) -> bool {
    exchange_closed(word, meta, |_| half_open)
}

/// Exchanges the word of a slot as long as both sides have closed it: it may be another flow's by now.
#[inline(always)]
fn exchange_closed(word: &Cell32, mut meta: Meta, next: impl Fn(Meta) -> Meta) -> bool {
    // The word may be refreshed meanwhile.
    for _ in 0..2 {
        let now = Meta(word.compare_exchange(meta.0, next(meta).0));
        if now == meta {
            return true;
        }
        if !now.is_closed() && !now.has(CLIENT_FIN | BACKEND_FIN) {
            return false;
        }
        meta = now;
    }
    false
}
