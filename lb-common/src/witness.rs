//! Notices before any health check does that clients wait for a backend.
//!
//! `asked` is the time at which a client first sent data or a SYN after the backend's last payload; `heard` is the time of
//! that payload. While `asked` is the later of the two, a client waits. Both belong to the backend and not to a flow: a
//! process that hangs sends payload to no client, and a process that is slow with one answer sends others. Each word
//! changes at most once in a tick.
//!
//! It is a hint: the daemon checks the backend at once. It decides nothing.

use crate::layout::Backend;

/// Does a client wait, by the two words?
#[inline(always)]
#[must_use]
pub const fn waits(asked: u32, heard: u32) -> bool {
    asked != 0 && (heard == 0 || (asked.wrapping_sub(heard) as i32) > 0)
}

/// Notes that a client sent data or a SYN to the backend.
#[inline(always)]
pub fn ask(backend: &Backend, jiffies: u32) {
    let asked = backend.asked.load();
    if asked != jiffies && !waits(asked, backend.heard.load()) {
        backend.asked.store(jiffies);
    }
}

/// Notes that the backend sent payload.
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
