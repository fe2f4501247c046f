//! Whether the connect hook has a cgroup to be put on.

use super::{Finding, failure, note, ok, warning};
use crate::{config::Config, hook::Place};

const SUBJECT: &str = "connect hook";

pub(super) fn examine(config: &Config) -> Vec<Finding> {
    let configured = &config.dataplane.cgroup;
    match Place::find(configured) {
        Ok(None) => {
            let what = "is left out (cgroup = \"none\"): clients on this host cannot use the listeners";
            vec![note(SUBJECT, what)]
        }
        Ok(Some(place)) => match place.reservation(configured) {
            Some(reservation) => {
                vec![warning(SUBJECT, reservation).fix("mount the host's /sys/fs/cgroup here")]
            }
            None => vec![ok(SUBJECT, format!("can be put on {}", place.path().display()))],
        },
        Err(error) => {
            let text = error.to_string();
            let (what, help) =
                text.split_once("\n   = help: ").unwrap_or((&text, "run sheave doctor as root"));
            let level = if config.needs_hook() { failure } else { warning };
            vec![level(SUBJECT.to_owned(), what.to_owned()).fix(help)]
        }
    }
}
