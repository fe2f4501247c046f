//! One message about one place in the file, in the manner of rustc.

use std::{fmt, ops::Range};

/// Where something stands in the text, in bytes.
pub(super) type Span = Range<usize>;

/// Something wrong, before it is known which line it is in.
#[derive(Debug)]
pub(super) struct Problem {
    span: Option<Span>,
    message: String,
    first: Option<Span>,
    help: Option<String>,
}

impl Problem {
    pub(super) fn at(span: Span, message: impl Into<String>) -> Self {
        Self { span: Some(span), message: message.into(), first: None, help: None }
    }

    /// Of the file as a whole.
    pub(super) fn of_file(message: impl Into<String>) -> Self {
        Self { span: None, message: message.into(), first: None, help: None }
    }

    /// What to write instead.
    pub(super) fn help(self, help: impl Into<String>) -> Self {
        Self { help: Some(help.into()), ..self }
    }

    /// The other place that this one is in conflict with.
    pub(super) fn first_at(self, span: Span) -> Self {
        Self { first: Some(span), ..self }
    }

    /// With line numbers and the line itself.
    pub(super) fn locate(self, file: &str, text: &str) -> Diagnostic {
        let mut message = self.message;
        if let Some(first) = self.first {
            message.push_str(&format!(" (first in line {})", line_number(text, first.start)));
        }
        let place = self.span.map(|span| Place::new(text, span));
        Diagnostic { file: file.to_owned(), place, message, help: self.help }
    }
}

/// The toml crate's message, in a shape that names what to write.
pub(super) fn syntax_error(error: &toml::de::Error, text: &str) -> Problem {
    let span = error.span().unwrap_or(0..0);
    let found = text.get(span.clone()).unwrap_or_default();
    let problem = Problem::at(span, format!("this is not TOML: {}", error.message()));
    match error.message() {
        "duplicate key" => {
            let name = found.trim();
            Problem { message: format!("{name} is given twice"), ..problem }
                .help("keep one of them; several services are several [[service]], with double brackets")
        }
        message if is_bare_word(found) && !message.contains("key") => {
            problem.help("strings are written in double quotes")
        }
        _ => problem,
    }
}

fn is_bare_word(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.chars().all(|character| character.is_ascii_alphanumeric() || "-_./:".contains(character))
}

/// Something to know about a file that is otherwise fine.
pub type Warning = Diagnostic;

/// A message about the configuration file: where, what, and what to write instead.
///
/// [`Display`](fmt::Display) is several lines for a terminal, [`Diagnostic::one_line`] is for a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    file: String,
    place: Option<Place>,
    message: String,
    help: Option<String>,
}

impl Diagnostic {
    /// `file:line: message; help`
    pub fn one_line(&self) -> String {
        let line = self.place.as_ref().map(|place| format!(":{}", place.line)).unwrap_or_default();
        let help = self.help.as_ref().map(|help| format!("; {help}")).unwrap_or_default();
        format!("{}{line}: {}{help}", self.file, self.message)
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "{}", self.message)?;
        let Some(place) = &self.place else {
            write!(out, "  --> {}", self.file)?;
            return self.help.iter().try_for_each(|help| write!(out, "\n   = help: {help}"));
        };
        let number = place.line.to_string();
        let margin = " ".repeat(number.len());
        writeln!(out, "{margin} --> {}:{}:{}", self.file, place.line, place.column)?;
        writeln!(out, "{margin}  |")?;
        writeln!(out, " {number} | {}", place.text)?;
        write!(out, "{margin}  | {}{}", " ".repeat(place.indent), "^".repeat(place.width))?;
        self.help.iter().try_for_each(|help| write!(out, "\n{margin}  = help: {help}"))
    }
}

/// A line of the file with the offending part marked.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    /// From 1.
    line: usize,
    /// In characters, from 1.
    column: usize,
    /// The line, or the part of a long one around the marked characters.
    text: String,
    /// Characters of `text` before the marked ones.
    indent: usize,
    /// Characters marked, at least one.
    width: usize,
}

/// Longer lines are cut around the marked part.
const LINE_SHOWN_MAX: usize = 96;

impl Place {
    fn new(text: &str, span: Span) -> Self {
        let start = floor_char_boundary(text, span.start);
        let end = floor_char_boundary(text, span.end).max(start);
        let line_start = text[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let line_end = text[start..].find('\n').map_or(text.len(), |newline| start + newline);
        let line = without_secret(text[line_start..line_end].trim_end());

        let before = text[line_start..start].chars().count();
        let shown: Vec<char> = line.chars().map(printable).collect();
        let before_shown = before.min(shown.len());
        let marked = text[start..end.min(line_end)].trim_end().chars().count();
        let width = marked.min(shown.len() - before_shown).clamp(1, LINE_SHOWN_MAX / 2);

        let cut = if shown.len() <= LINE_SHOWN_MAX {
            0
        } else {
            (before_shown + width).saturating_sub(LINE_SHOWN_MAX * 3 / 4)
        };
        Self {
            line: line_number(text, start),
            column: before + 1,
            text: shown.iter().skip(cut).take(LINE_SHOWN_MAX).collect(),
            indent: before_shown - cut,
            width,
        }
    }
}

/// A key that is named like a secret keeps its value out of messages: somebody pastes a token where the name of a
/// file belongs, and the message ends up in a log.
fn without_secret(line: &str) -> String {
    let mut end = 0;
    for part in line.split_inclusive('=') {
        end += part.len();
        let name = part.to_ascii_lowercase();
        if ["token", "password", "secret", "key"].iter().any(|word| name.contains(word)) {
            return if end < line.len() { format!("{} …", &line[..end]) } else { line.to_owned() };
        }
    }
    line.to_owned()
}

/// The file may be anything, the terminal must not obey it.
fn printable(character: char) -> char {
    match character {
        '\t' => ' ',
        control if control.is_control() => '\u{fffd}',
        other => other,
    }
}

fn line_number(text: &str, offset: usize) -> usize {
    let end = offset.min(text.len());
    text.as_bytes()[..end].iter().filter(|byte| **byte == b'\n').count() + 1
}

fn floor_char_boundary(text: &str, offset: usize) -> usize {
    let mut boundary = offset.min(text.len());
    while !text.is_char_boundary(boundary) {
        boundary -= 1;
    }
    boundary
}
