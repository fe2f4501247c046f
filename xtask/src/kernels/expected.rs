//! The list of expected failures, `expected-failures.txt`: `KERNEL CASE reason`, a line each. It may only shrink.

use anyhow::{Context as _, Result, ensure};

use super::report::Verdict;

/// In the source tree, so that a change of it is seen in review.
const LIST: &str = include_str!("expected-failures.txt");
/// Where people find it.
pub(super) const FILE: &str = "xtask/src/kernels/expected-failures.txt";

/// One line.
#[derive(Debug, PartialEq, Eq)]
struct Failure {
    /// A series, or `*` for all.
    kernel: String,
    case: String,
    reason: String,
}

/// The list.
#[derive(Debug)]
pub(super) struct Expected(Vec<Failure>);

impl Expected {
    /// Reads the list of this source tree.
    ///
    /// # Errors
    ///
    /// A line has no kernel, case and reason.
    pub(super) fn of_this_tree() -> Result<Self> {
        Self::read(LIST)
    }

    fn read(text: &str) -> Result<Self> {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
        let failures = lines.map(|(number, line)| {
            let failure = parse(line).with_context(|| format!("{FILE}:{}: {line:?}", number + 1))?;
            Ok(failure)
        });
        failures.collect::<Result<_>>().map(Self)
    }

    /// What the list says of a case on a kernel's series.
    pub(super) fn reason(&self, kernel: &str, case: &str) -> Option<&str> {
        let found = self
            .0
            .iter()
            .find(|failure| failure.case == case && (failure.kernel == "*" || failure.kernel == kernel));
        found.map(|failure| failure.reason.as_str())
    }

    /// A verdict in the light of the list.
    pub(super) fn judge(&self, kernel: &str, case: &str, verdict: Verdict) -> Verdict {
        match (verdict, self.reason(kernel, case)) {
            (Verdict::Failed, Some(_)) => Verdict::Expected,
            (Verdict::Ok, Some(_)) => Verdict::Unexpected,
            (verdict, _) => verdict,
        }
    }
}

fn parse(line: &str) -> Result<Failure> {
    let mut words = line.splitn(3, ' ').map(str::trim);
    let mut word =
        |what: &str| words.next().filter(|word| !word.is_empty()).with_context(|| format!("no {what}"));
    let (kernel, case) = (word("kernel")?.to_owned(), word("case")?.to_owned());
    let reason = word("reason")?.to_owned();
    ensure!(
        kernel == "*" || super::series::Series::parse(&kernel).is_some(),
        "{kernel} is no series of kernels"
    );
    ensure!(super::cases::ALL.contains(&case.as_str()), "there is no case {case}");
    Ok(Failure { kernel, case, reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_this_tree_can_be_read() {
        Expected::of_this_tree().expect("every line is a kernel, a case and a reason");
    }

    #[test]
    fn what_is_expected_is_no_failure_and_what_passes_by_surprise_is_one() {
        let list =
            Expected::read("# a comment\n\n* load none loads\n6.12 smoke for a reason\n").expect("a list");
        assert_eq!(list.judge("6.1", "load", Verdict::Failed), Verdict::Expected);
        assert_eq!(list.judge("6.1", "load", Verdict::Ok), Verdict::Unexpected);
        assert_eq!(list.judge("6.1", "load", Verdict::Skipped), Verdict::Skipped);
        assert_eq!(list.judge("6.12", "smoke", Verdict::Failed), Verdict::Expected);
        assert_eq!(list.judge("6.1", "smoke", Verdict::Failed), Verdict::Failed);
        assert_eq!(list.judge("6.1", "packets", Verdict::Ok), Verdict::Ok);
        assert_eq!(list.reason("6.12", "smoke"), Some("for a reason"));
    }

    #[test]
    fn a_line_without_a_reason_or_with_an_unknown_case_is_refused() {
        for line in ["6.1 load", "6.1 nonsense because", "six load because"] {
            let error = Expected::read(line).expect_err("not a line of the list");
            assert!(format!("{error:#}").contains(&format!("{FILE}:1")), "{error:#}");
        }
    }
}
