//! What was measured, and how it is shown.

use std::time::Duration;

use serde::Serialize;

use super::balancer::Contender;

/// One figure, with the most it may be.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Figure {
    pub(super) contender: Contender,
    pub(super) scenario: &'static str,
    pub(super) measured: &'static str,
    /// A time that was not reached is `null`.
    #[serde(serialize_with = "finite")]
    pub(super) value: f64,
    pub(super) unit: Unit,
    /// None: for information.
    pub(super) limit: Option<f64>,
    pub(super) met: Option<bool>,
}

/// What a figure counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Unit {
    #[serde(rename = "ms")]
    Milliseconds,
    Count,
}

/// A figure before it is known whose it is.
#[derive(Clone, Debug)]
pub(super) struct Measure {
    measured: &'static str,
    value: f64,
    unit: Unit,
    limit: Option<f64>,
}

/// Something that was counted.
pub(super) fn count(measured: &'static str, value: usize) -> Measure {
    Measure { measured, value: value as f64, unit: Unit::Count, limit: None }
}

/// Something that took a time. None: it did not happen while it was waited for.
pub(super) fn time(measured: &'static str, took: Option<Duration>) -> Measure {
    let value = took.map_or(f64::INFINITY, |took| took.as_secs_f64() * 1000.0);
    Measure { measured, value, unit: Unit::Milliseconds, limit: None }
}

impl Measure {
    /// The most it may be.
    pub(super) fn at_most(self, limit: u32) -> Self {
        Self { limit: Some(limit.into()), ..self }
    }

    pub(super) fn of(self, contender: Contender, scenario: &'static str) -> Figure {
        let Self { measured, value, unit, limit } = self;
        let met = limit.map(|limit| value <= limit);
        Figure { contender, scenario, measured, value, unit, limit, met }
    }
}

/// Of several rounds the worst counts.
pub(super) fn worst(figures: Vec<Figure>) -> Vec<Figure> {
    let mut kept: Vec<Figure> = Vec::new();
    for figure in figures {
        let same = |other: &&mut Figure| {
            (other.contender, other.scenario, other.measured)
                == (figure.contender, figure.scenario, figure.measured)
        };
        match kept.iter_mut().find(same) {
            Some(other) if other.value < figure.value => *other = figure,
            Some(_) => {}
            None => kept.push(figure),
        }
    }
    kept
}

/// A table of one contender's figures.
pub(super) fn table(contender: Contender, figures: &[Figure]) -> String {
    let head = ["scenario", "measured", contender.name(), "limit", "met"].map(str::to_owned);
    let mut rows = vec![head];
    let mut scenario = "";
    for figure in figures.iter().filter(|figure| figure.contender == contender) {
        let name = if figure.scenario == scenario { "" } else { figure.scenario };
        scenario = figure.scenario;
        let met = figure.met.map_or("", |met| if met { "yes" } else { "NO" });
        let limit = figure.limit.map(|limit| shown(limit, figure.unit)).unwrap_or_default();
        rows.push([
            name.to_owned(),
            figure.measured.to_owned(),
            shown(figure.value, figure.unit),
            limit,
            met.to_owned(),
        ]);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: [usize; 5] = std::array::from_fn(width);
    let line = |[scenario, measured, value, limit, met]: &[String; 5]| {
        let [one, two, three, four, five] = widths;
        format!("| {scenario:<one$} | {measured:<two$} | {value:>three$} | {limit:>four$} | {met:<five$} |\n")
    };
    let rule = widths.map(|width| "-".repeat(width));
    rows.iter().take(1).chain([&rule]).chain(rows.iter().skip(1)).map(line).collect()
}

fn shown(value: f64, unit: Unit) -> String {
    match unit {
        _ if value.is_infinite() => "never".to_owned(),
        Unit::Milliseconds => format!("{value:.0} ms"),
        Unit::Count => format!("{value:.0}"),
    }
}

fn finite<S: serde::Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    value.is_finite().then_some(value).serialize(serializer)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{count, table, time, worst};
    use crate::failover::balancer::Contender::{HaProxy, Sheave};

    #[test]
    fn a_limit_is_met_missed_or_absent() {
        let figures = vec![
            time("last failure", Some(Duration::from_millis(90))).at_most(100).of(Sheave, "killed"),
            count("lost SYNs", 3).of(Sheave, "killed"),
            time("until reset", None).at_most(300).of(Sheave, "cut off"),
            count("not in this table", 1).of(HaProxy, "killed"),
        ];
        let table = table(Sheave, &figures);
        assert!(table.contains("| killed   | last failure |  90 ms | 100 ms | yes |"), "{table}");
        assert!(table.contains("|          | lost SYNs    |      3 |        |     |"), "{table}");
        assert!(table.contains("| cut off  | until reset  |  never | 300 ms | NO  |"), "{table}");
        assert!(!table.contains("not in this"), "{table}");
        assert!(serde_json::to_string(&figures).unwrap().contains(r#""value":null,"unit":"ms""#));
    }

    #[test]
    fn of_several_rounds_the_worst_counts() {
        let rounds = [3, 7, 5].map(|value| count("lost", value).at_most(6).of(Sheave, "killed"));
        let kept = worst(rounds.into());
        assert_eq!((kept.len(), kept[0].value, kept[0].met), (1, 7.0, Some(false)));
    }
}
