//! What a guest says on its console, and what a run says at its end: a table of kernels and cases.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

/// What became of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Ok,
    Failed,
    Skipped,
    /// It failed, and the list of expected failures says so.
    Expected,
    /// It passed, and the list of expected failures says that it fails.
    Unexpected,
}

impl Verdict {
    /// Does the run fail for it?
    pub(super) fn is_bad(self) -> bool {
        matches!(self, Self::Failed | Self::Unexpected)
    }

    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "FAILED",
            Self::Skipped => "skipped",
            Self::Expected => "expected",
            Self::Unexpected => "PASSES",
        }
    }
}

/// A line of a guest's console that is for us. All begin with `sheave-guest: `; the kernel writes there as well.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// `kernel RELEASE`: it has booted.
    Kernel(String),
    /// `begin NAME`
    Begin(String),
    /// `figure NAME NUMBER`
    Figure { name: String, number: u64 },
    /// `case NAME ok|failed|skipped DETAIL`
    Case { name: String, verdict: Verdict, detail: String },
    /// `done`: it has run all cases.
    Done,
}

impl Said {
    pub(super) fn parse(line: &str) -> Option<Self> {
        let (_, said) = line.split_once("sheave-guest: ")?;
        let mut words = said.splitn(4, ' ');
        Some(match words.next()? {
            "kernel" => Self::Kernel(words.next()?.to_owned()),
            "begin" => Self::Begin(words.next()?.to_owned()),
            "figure" => Self::Figure { name: words.next()?.to_owned(), number: words.next()?.parse().ok()? },
            "case" => {
                let name = words.next()?.to_owned();
                let verdict = match words.next()? {
                    "ok" => Verdict::Ok,
                    "failed" => Verdict::Failed,
                    "skipped" => Verdict::Skipped,
                    _ => return None,
                };
                Self::Case { name, verdict, detail: words.next().unwrap_or_default().to_owned() }
            }
            "done" => Self::Done,
            _ => return None,
        })
    }
}

/// Both ends of a detail that is longer than a few lines: it begins with what was tried, and ends with why it failed, which
/// may be a daemon's last words. The console's log has it all.
pub(super) fn shortened(detail: &str) -> String {
    const END: usize = 300;
    let letters: Vec<char> = detail.chars().collect();
    if letters.len() <= 2 * END {
        return detail.to_owned();
    }
    let part = |letters: &[char]| letters.iter().collect::<String>();
    format!("{} … {}", part(&letters[..END]), part(&letters[letters.len() - END..]))
}

/// One kernel's results.
#[derive(Debug, Default)]
pub(super) struct Column {
    /// The series, and the version of the package.
    pub(super) kernel: String,
    pub(super) cases: BTreeMap<String, (Verdict, String)>,
    /// Instructions that the verifier went through, by program.
    pub(super) figures: BTreeMap<String, u64>,
    pub(super) boot: Duration,
    pub(super) took: Duration,
}

/// All results, a row a case and a column a kernel; then the verifier's work, and times.
pub(super) fn table(columns: &[Column], cases: &[&str]) -> String {
    let mut rows = vec![row("case", columns.iter().map(|column| column.kernel.clone()))];
    let ran = |case: &&&str| columns.iter().any(|column| column.cases.contains_key(**case));
    for case in cases.iter().filter(ran) {
        let verdict =
            |column: &Column| column.cases.get(*case).map_or("-", |(verdict, _)| verdict.word()).to_owned();
        rows.push(row(case, columns.iter().map(verdict)));
    }
    let mut programs: Vec<_> = columns.iter().flat_map(|column| column.figures.keys()).collect();
    programs.sort();
    programs.dedup();
    for program in programs {
        let figure = |column: &Column| column.figures.get(program).map_or("-".to_owned(), u64::to_string);
        rows.push(row(&format!("verified: {program}"), columns.iter().map(figure)));
    }
    let seconds = |time: Duration| format!("{} s", time.as_secs());
    rows.push(row("boot", columns.iter().map(|column| seconds(column.boot))));
    rows.push(row("in all", columns.iter().map(|column| seconds(column.took))));
    align(&rows)
}

fn row(name: &str, cells: impl Iterator<Item = String>) -> Vec<String> {
    [name.to_owned()].into_iter().chain(cells).collect()
}

fn align(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or_default()
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_lines_are_told_from_its_kernels() {
        assert_eq!(Said::parse("[    1.2] virtio_net: case of nothing"), None);
        assert_eq!(Said::parse("sheave-guest: begin load"), Some(Said::Begin("load".to_owned())));
        let figure = Said::Figure { name: "sheave".to_owned(), number: 41_000 };
        assert_eq!(Said::parse("sheave-guest: figure sheave 41000"), Some(figure));
        let failed = Said::Case {
            name: "bond".to_owned(),
            verdict: Verdict::Failed,
            detail: "curl: exit status 7".to_owned(),
        };
        assert_eq!(Said::parse("[ 9.9] sheave-guest: case bond failed curl: exit status 7"), Some(failed));
        assert_eq!(Said::parse("sheave-guest: done"), Some(Said::Done));
    }

    #[test]
    fn a_long_detail_keeps_both_ends() {
        assert_eq!(shortened("short"), "short");
        let long = format!("begin {} end", "ü".repeat(1000));
        let short = shortened(&long);
        assert!(
            short.starts_with("begin ü") && short.ends_with("ü end") && short.len() < long.len(),
            "{short}"
        );
    }

    #[test]
    fn the_table_has_a_row_a_case_and_a_column_a_kernel() {
        let column = |kernel: &str, verdict| Column {
            kernel: kernel.to_owned(),
            cases: [("load".to_owned(), (verdict, String::new()))].into(),
            figures: [("sheave".to_owned(), 41)].into(),
            ..Column::default()
        };
        let columns = [column("6.1", Verdict::Ok), column("6.12", Verdict::Expected)];
        let table = table(&columns, &["load", "never-run"]);
        let expected = "case              6.1  6.12\nload              ok   expected\nverified: sheave  41   41\n\
                        boot              0 s  0 s\nin all            0 s  0 s\n";
        assert_eq!(table, expected);
    }
}
