//! Reading one table of the file: each key once, with its type, and nothing beside the known keys.

use std::{
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    diagnostic::{Problem, Span},
    values,
};

/// What reading the file needs to know of it, and the warnings so far.
pub(super) struct Document {
    directory: PathBuf,
    warnings: Vec<Problem>,
}

impl Document {
    pub(super) fn new(file_name: &Path) -> Self {
        let directory = file_name.parent().unwrap_or(Path::new("")).to_owned();
        Self { directory, warnings: Vec::new() }
    }

    pub(super) fn warn(&mut self, warning: Problem) {
        self.warnings.push(warning);
    }

    pub(super) fn into_warnings(self) -> Vec<Problem> {
        self.warnings
    }
}

/// A table of the file whose keys are all known.
pub(super) struct Section<'t> {
    /// As it is written in the file: `[service.check]`.
    title: String,
    span: Span,
    /// None: the file does not have the table, every key has its default.
    table: Option<&'t DeTable<'t>>,
}

impl<'t> Section<'t> {
    /// The whole file.
    pub(super) fn root(tree: &'t Spanned<DeTable<'t>>, known: &[&str]) -> Result<Self, Problem> {
        Self::open(String::new(), tree.span(), tree.get_ref(), known)
    }

    fn open(title: String, span: Span, table: &'t DeTable<'t>, known: &[&str]) -> Result<Self, Problem> {
        let unknown = table
            .keys()
            .filter(|key| !known.contains(&key.get_ref().as_ref()))
            .min_by_key(|key| key.span().start);
        match unknown {
            Some(key) => Err(unknown_key(key.span(), key.get_ref(), &title, known)),
            None => Ok(Self { title, span, table: Some(table) }),
        }
    }

    /// Where the table begins.
    pub(super) fn span(&self) -> Span {
        self.span.clone()
    }

    pub(super) fn value(&self, key: &str) -> Option<&'t Spanned<DeValue<'t>>> {
        self.table?.get(key)
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.value(key).is_some()
    }

    /// Where the value of a key stands; the table's own place when the key is absent.
    pub(super) fn span_of(&self, key: &str) -> Span {
        self.value(key).map_or_else(|| self.span(), Spanned::span)
    }

    /// `[key]` under this table; one without keys when the file has none.
    pub(super) fn section(&self, key: &str, known: &[&str]) -> Result<Section<'t>, Problem> {
        let title = self.title_of(key);
        match self.value(key) {
            None => Ok(Section { title: format!("[{title}]"), span: self.span(), table: None }),
            Some(value) => match value.get_ref() {
                DeValue::Table(table) => Section::open(format!("[{title}]"), value.span(), table, known),
                DeValue::Array(_) => Err(Problem::at(value.span(), format!("there is only one [{title}]"))
                    .help(format!("write [{title}] with single brackets, once"))),
                other => Err(wrong_type(value.span(), key, "a table", other)
                    .help(format!("write [{title}] on a line of its own, its keys below"))),
            },
        }
    }

    /// Every `[[key]]` under this table, in file order.
    pub(super) fn sections(&self, key: &str, known: &[&str]) -> Result<Vec<Section<'t>>, Problem> {
        let title = self.title_of(key);
        let Some(value) = self.value(key) else { return Ok(Vec::new()) };
        let double_brackets = format!("write [[{title}]], with double brackets");
        let DeValue::Array(items) = value.get_ref() else {
            return Err(Problem::at(value.span(), format!("there can be several {title} entries"))
                .help(double_brackets));
        };
        items
            .iter()
            .map(|item| match item.get_ref() {
                DeValue::Table(table) => Section::open(format!("[[{title}]]"), item.span(), table, known),
                other => Err(wrong_type(item.span(), key, "a table", other).help(&double_brackets)),
            })
            .collect()
    }

    fn title_of(&self, key: &str) -> String {
        match self.title.trim_matches(['[', ']']) {
            "" => key.to_owned(),
            outer => format!("{outer}.{key}"),
        }
    }

    /// A string; `example` is shown to who wrote something else.
    pub(super) fn text(&self, key: &str, example: &str) -> Result<Option<Spanned<String>>, Problem> {
        self.value(key).map(|value| text_of(value, key, example)).transpose()
    }

    /// A string that must be there.
    pub(super) fn required_text(&self, key: &str, example: &str) -> Result<Spanned<String>, Problem> {
        self.text(key, example)?.ok_or_else(|| self.missing(key, example))
    }

    /// `key` is not there and has no default.
    pub(super) fn missing(&self, key: &str, example: &str) -> Problem {
        Problem::at(self.span(), format!("{} has no {key:?}", self.title))
            .help(format!("add `{key} = {example}`"))
    }

    /// A list of strings; None when the key is absent.
    pub(super) fn texts(&self, key: &str, example: &str) -> Result<Option<Vec<Spanned<String>>>, Problem> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let DeValue::Array(items) = value.get_ref() else {
            return Err(wrong_type(value.span(), key, "a list", value.get_ref())
                .help(format!("write `{key} = [{example}]`")));
        };
        items.iter().map(|item| text_of(item, key, example)).collect::<Result<_, _>>().map(Some)
    }

    pub(super) fn boolean(&self, key: &str, default: bool) -> Result<bool, Problem> {
        match self.value(key).map(|value| (value.span(), value.get_ref())) {
            None => Ok(default),
            Some((_, DeValue::Boolean(boolean))) => Ok(*boolean),
            Some((span, other)) => Err(wrong_type(span, key, "true or false", other)
                .help(format!("write `{key} = {default}`, without quotes"))),
        }
    }

    /// A whole number within `range`.
    pub(super) fn integer<T: TryFrom<i64>>(
        &self,
        key: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<T>, Problem> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let example = range.start().max(&1);
        let DeValue::Integer(written) = value.get_ref() else {
            return Err(wrong_type(value.span(), key, "a whole number", value.get_ref())
                .help(format!("write `{key} = {example}`, without quotes")));
        };
        i64::from_str_radix(&written.as_str().replace('_', ""), written.radix())
            .ok()
            .filter(|number| range.contains(number))
            .and_then(|number| T::try_from(number).ok())
            .map(Some)
            .ok_or_else(|| {
                Problem::at(value.span(), format!("{key:?} is out of range")).help(format!(
                    "write a number from {} to {}",
                    range.start(),
                    range.end()
                ))
            })
    }

    /// A duration within `range`.
    pub(super) fn duration(
        &self,
        key: &str,
        range: RangeInclusive<Duration>,
    ) -> Result<Option<Duration>, Problem> {
        let Some(written) = self.text(key, "\"1s\"")? else { return Ok(None) };
        let Some(duration) = values::duration(written.get_ref()) else {
            return Err(Problem::at(
                written.span(),
                format!("{key:?} is not a duration: {:?}", written.get_ref()),
            )
            .help("write a whole number with its unit: \"200ms\", \"1s\", \"5m\", \"3h\", \"1m30s\""));
        };
        if range.contains(&duration) {
            return Ok(Some(duration));
        }
        let (shortest, longest) =
            (values::duration_text(*range.start()), values::duration_text(*range.end()));
        Err(Problem::at(
            written.span(),
            format!("{key:?} is too {}", if duration < *range.start() { "short" } else { "long" }),
        )
        .help(format!("write {shortest:?} to {longest:?}")))
    }

    /// One of the words in `built`; those in `planned` are known and not built yet.
    pub(super) fn choice<T: Copy>(
        &self,
        key: &str,
        default: T,
        built: &[(&str, T)],
        planned: &[&str],
    ) -> Result<T, Problem> {
        let (example, _) = built[0];
        let Some(written) = self.text(key, &format!("{example:?}"))? else { return Ok(default) };
        let word = written.get_ref().as_str();
        if let Some((_, value)) = built.iter().find(|(name, _)| *name == word) {
            return Ok(*value);
        }
        let names: Vec<&str> = built.iter().map(|(name, _)| *name).collect();
        if planned.contains(&word) {
            return Err(Problem::at(written.span(), format!("{key} = {word:?} is not built yet"))
                .help(format!("write `{key} = {example:?}`")));
        }
        let problem = Problem::at(written.span(), format!("{key:?} cannot be {word:?}"));
        Err(match nearest(word, &names) {
            Some(name) => problem.help(format!("did you mean {name:?}?")),
            None => problem.help(format!("write {}", alternatives(&names))),
        })
    }

    /// A file name; a relative one is taken from the directory of the configuration.
    pub(super) fn path(&self, key: &str, document: &Document) -> Result<Option<PathBuf>, Problem> {
        let Some(written) = self.text(key, "\"/etc/sheave/…\"")? else { return Ok(None) };
        if written.get_ref().is_empty() || written.get_ref().contains(['\0', '\n']) {
            return Err(Problem::at(written.span(), format!("{key:?} is not the name of a file"))
                .help("write the path of a file, or leave the key out"));
        }
        Ok(Some(document.directory.join(written.get_ref())))
    }
}

fn text_of(value: &Spanned<DeValue>, key: &str, example: &str) -> Result<Spanned<String>, Problem> {
    match value.get_ref() {
        DeValue::String(text) => Ok(Spanned::new(value.span(), text.to_string())),
        other => Err(wrong_type(value.span(), key, "a string", other)
            .help(format!("write {example}, in double quotes"))),
    }
}

pub(super) fn wrong_type(span: Span, key: &str, wanted: &str, found: &DeValue) -> Problem {
    let article = match found {
        DeValue::Integer(_) | DeValue::Array(_) => "an",
        _ => "a",
    };
    Problem::at(span, format!("{key:?} must be {wanted}, not {article} {}", found.type_str()))
}

fn unknown_key(span: Span, key: &str, title: &str, known: &[&str]) -> Problem {
    let place = if title.is_empty() { String::new() } else { format!(" in {title}") };
    let problem = Problem::at(span, format!("unknown key {key:?}{place}"));
    match nearest(key, known) {
        Some(name) => problem.help(format!("did you mean {name:?}?")),
        None => problem.help(format!("known here: {}", known.join(", "))),
    }
}

/// The known word that was probably meant: near in spelling, or the longer form of a word that was begun.
fn nearest<'k>(word: &str, known: &[&'k str]) -> Option<&'k str> {
    let word = word.to_lowercase().replace('-', "_");
    let begun = known.iter().find(|name| word.len() >= 3 && name.starts_with(&word)).copied();
    let near = known
        .iter()
        .map(|name| (strsim::jaro_winkler(&word, name), *name))
        .filter(|(similarity, _)| *similarity > 0.85)
        .max_by(|(left, _), (right, _)| left.total_cmp(right))
        .map(|(_, name)| name);
    begun.or(near)
}

/// `"a", "b" or "c"`
fn alternatives(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("{name:?}")).collect();
    match quoted.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => quoted.join(""),
    }
}
