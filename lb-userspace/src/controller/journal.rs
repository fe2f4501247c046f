//! The last events, in memory and on disk: a ring of JSON lines in the state directory, so that "what happened last
//! night" can be answered after any number of restarts.

use std::{
    collections::VecDeque,
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{
    admin::{JournalEvent, JournalKind},
    state,
};

/// Events that are kept.
const KEPT: usize = 1000;
/// Lines in the file before it is written anew.
const LINES: usize = 2 * KEPT;
/// A file larger than this was not written by us.
const FILE_SIZE_MAX: u64 = 16 << 20;

/// The ring.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    events: VecDeque<JournalEvent>,
    lines: usize,
    /// Writing failed, which was said.
    broken: bool,
}

impl Journal {
    /// Takes up what was kept. Lines that are no events (a crash in the middle of one) are passed over.
    pub(super) fn open(state_dir: &Path) -> Self {
        let path = state_dir.join("events.jsonl");
        let mut journal = Self { path, events: VecDeque::new(), lines: 0, broken: false };
        match read(&journal.path) {
            Ok(text) => {
                journal.lines = text.lines().count();
                let events = text.lines().filter_map(|line| serde_json::from_str(line).ok());
                for event in events {
                    journal.keep(event);
                }
                // The next event must begin a line of its own.
                if !text.is_empty() && !text.ends_with('\n') {
                    let result = journal.rewrite();
                    journal.said(result);
                }
            }
            Err(error) => journal.said(Err(error)),
        }
        journal
    }

    /// All of them, the oldest first.
    pub(super) fn events(&self) -> impl ExactSizeIterator<Item = &JournalEvent> {
        self.events.iter()
    }

    /// Notes that something happened now.
    pub(super) fn note(&mut self, kind: JournalKind, subject: Option<(&str, &str)>, text: impl Into<String>) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let event = JournalEvent {
            time_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            kind,
            service: subject.map(|(service, _)| service.to_owned()),
            backend: subject.map(|(_, backend)| backend.to_owned()),
            text: text.into(),
        };
        let line = serde_json::to_string(&event);
        self.keep(event);
        let result = match line {
            _ if self.lines >= LINES => self.rewrite(),
            Ok(line) => self.append(&line),
            Err(error) => Err(error.into()),
        };
        self.said(result);
    }

    fn keep(&mut self, event: JournalEvent) {
        self.events.push_back(event);
        if self.events.len() > KEPT {
            self.events.pop_front();
        }
    }

    /// In one write: a crash leaves all of the line or a part that the next start passes over.
    fn append(&mut self, line: &str) -> io::Result<()> {
        let open = || fs::File::options().append(true).create(true).open(&self.path);
        let mut file = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.path.parent().map_or(Ok(()), fs::create_dir_all)?;
                open()?
            }
            other => other?,
        };
        file.write_all(format!("{line}\n").as_bytes())?;
        self.lines += 1;
        Ok(())
    }

    fn rewrite(&mut self) -> io::Result<()> {
        let mut text = String::new();
        for event in &self.events {
            text.push_str(&serde_json::to_string(event)?);
            text.push('\n');
        }
        state::replace(&self.path, &self.path.with_extension("new"), text.as_bytes())?;
        self.lines = self.events.len();
        Ok(())
    }

    /// A full disk must not fill the log as well.
    fn said(&mut self, result: io::Result<()>) {
        match result {
            Ok(()) => self.broken = false,
            Err(error) if !self.broken => {
                self.broken = true;
                tracing::warn!("events are not kept across restarts: {}: {error}", self.path.display());
            }
            Err(_) => {}
        }
    }
}

fn read(path: &Path) -> io::Result<String> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        Ok(file) if file.len() > FILE_SIZE_MAX => {
            return Err(io::Error::other("it is too large to be sheave's: move it away"));
        }
        Ok(_) => {}
        Err(error) => return Err(error),
    }
    Ok(String::from_utf8_lossy(&fs::read(path)?).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(journal: &Journal) -> Vec<&str> {
        journal.events().map(|event| event.text.as_str()).collect()
    }

    #[test]
    fn events_are_there_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let state_dir = directory.path().join("not/yet/there");
        let mut journal = Journal::open(&state_dir);
        journal.note(JournalKind::Daemon, None, "began");
        journal.note(JournalKind::Operator, Some(("api", "master-1")), "drained");
        let again = Journal::open(&state_dir);
        assert_eq!(texts(&again), ["began", "drained"]);
        assert_eq!(again.events, journal.events);
    }

    #[test]
    fn a_line_that_was_not_finished_costs_only_itself() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(directory.path());
        journal.note(JournalKind::Daemon, None, "one");
        let path = directory.path().join("events.jsonl");
        let whole = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("{whole}{}", &whole[..whole.len() / 2])).unwrap();
        Journal::open(directory.path()).note(JournalKind::Daemon, None, "two");
        assert_eq!(texts(&Journal::open(directory.path())), ["one", "two"]);
    }

    #[test]
    fn the_ring_and_its_file_are_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(directory.path());
        for number in 0..LINES + 10 {
            journal.note(JournalKind::Daemon, None, number.to_string());
        }
        let text = fs::read_to_string(directory.path().join("events.jsonl")).unwrap();
        assert!(text.lines().count() <= LINES);
        let again = Journal::open(directory.path());
        assert_eq!(again.events.len(), KEPT);
        assert_eq!(again.events.back().unwrap().text, (LINES + 9).to_string());
        assert_eq!(again.events, journal.events);
    }
}
