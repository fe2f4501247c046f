//! What the data path notices about a backend before any check does: that clients wait for it.
//!
//! `asked` is when a client first wanted something (it sent data, or a SYN) since the backend was last heard; `heard` is
//! when the backend last sent payload. While `asked` is the later of the two, somebody waits. Both belong to the backend
//! and not to a flow: a process that hangs says nothing to anybody, and one that is slow with one answer is heard by
//! others. Two words that change at most once in a tick cost nothing per flow.
//!
//! It is a hint: it has a check made at once, and decides nothing.

use crate::layout::Backend;

/// Does somebody wait, by the two words?
#[inline(always)]
#[must_use]
pub const fn waits(asked: u32, heard: u32) -> bool {
    asked != 0 && (heard == 0 || (asked.wrapping_sub(heard) as i32) > 0)
}

/// A client wants something of the backend, at this time.
#[inline(always)]
pub fn ask(backend: &Backend, jiffies: u32) {
    let asked = backend.asked.load();
    if asked != jiffies && !waits(asked, backend.heard.load()) {
        backend.asked.store(jiffies);
    }
}

/// The backend has sent payload.
#[inline(always)]
pub fn hear(backend: &Backend, jiffies: u32) {
    if backend.heard.load() != jiffies {
        backend.heard.store(jiffies);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_waited_for(backend: &Backend) -> bool {
        waits(backend.asked.load(), backend.heard.load())
    }

    #[test]
    fn the_wait_begins_with_the_first_question_and_ends_with_any_answer() {
        let backend = Backend::default();
        assert!(!is_waited_for(&backend));
        ask(&backend, 100);
        ask(&backend, 150);
        assert!(is_waited_for(&backend));
        assert_eq!(backend.asked.load(), 100, "since the first");
        hear(&backend, 160);
        assert!(!is_waited_for(&backend));
        ask(&backend, 200);
        assert_eq!(backend.asked.load(), 200);
        assert!(is_waited_for(&backend));
    }

    #[test]
    fn jiffies_may_wrap() {
        let backend = Backend::default();
        hear(&backend, u32::MAX - 10);
        ask(&backend, u32::MAX - 5);
        assert!(is_waited_for(&backend));
        hear(&backend, 3);
        assert!(!is_waited_for(&backend));
    }
}
