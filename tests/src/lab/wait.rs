//! Waiting for a condition with a deadline.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

/// Between two looks at the condition.
const PAUSE: Duration = Duration::from_millis(20);

/// Tries until it succeeds, and returns what it gave.
///
/// # Errors
/// The last failure, when there was no success within `limit`.
pub fn eventually<T>(limit: Duration, what: &str, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if start.elapsed() >= limit => {
                return Err(error).with_context(|| format!("waited {limit:?} for: {what}"));
            }
            Err(_) => thread::sleep(PAUSE),
        }
    }
}
