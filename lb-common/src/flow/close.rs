//! Closing a flow that both sides have ended.

use crate::{
    cell::Cell32,
    meta::{Kind, Meta},
};

/// Closes a flow, with one side's FIN noted in its word `meta`, if the `other`'s is there as well.
#[inline(always)]
pub fn close(word: &Cell32, mut meta: Meta, other: u32, closed: Kind) -> Meta {
    // The word may be refreshed or cleared of a RST meanwhile; a slot that stays open here is closed by the reaper.
    for _ in 0..2 {
        if !meta.has(other) || meta.is_closed() {
            break;
        }
        let now = Meta(word.compare_exchange(meta.0, meta.become_kind(closed).0));
        if now == meta {
            return meta.become_kind(closed);
        }
        meta = now;
    }
    meta
}
