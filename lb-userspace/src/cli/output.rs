//! Writing to a terminal, or to whoever reads instead.

use std::io::{self, IsTerminal as _, Write as _};

/// Writes all of `text` to stdout. A reader that has gone (`| head`) is no failure.
pub(super) fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// Pretty JSON on stdout.
pub(super) fn print_json(facts: &impl serde::Serialize) -> anyhow::Result<()> {
    Ok(print(&format!("{}\n", serde_json::to_string_pretty(facts)?))?)
}

/// What the reader of stdout can show.
#[derive(Clone, Copy, Debug)]
pub(super) struct Screen {
    /// Whether escape sequences are understood and wanted.
    pub(super) colours: bool,
    /// Characters in a line; None: as many as there are.
    pub(super) width: Option<usize>,
}

impl Screen {
    /// Of this process's stdout.
    pub(super) fn stdout() -> Self {
        let terminal = io::stdout().is_terminal();
        let width = terminal_size::terminal_size().map(|(width, _)| usize::from(width.0));
        Self { colours: colours(terminal), width: width.filter(|_| terminal) }
    }
}

/// Whether to colour what goes to a stream that is a terminal, or is not: <https://no-color.org>.
pub(super) fn colours(terminal: bool) -> bool {
    terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Words that came from elsewhere must not command the terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { '\u{fffd}' } else { character }).collect()
}
