//! What was measured, and how it is shown.

use std::time::Duration;

use serde::Serialize;

use super::{balancer::Contender, machine::Load};
use crate::aligned::aligned;

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
    /// What the machine was like meanwhile.
    pub(super) machine: Load,
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

    pub(super) fn of(self, contender: Contender, scenario: &'static str, machine: Load) -> Figure {
        let Self { measured, value, unit, limit } = self;
        let met = limit.map(|limit| value <= limit);
        Figure { contender, scenario, measured, value, unit, limit, met, machine }
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
        let Some(other) = kept.iter_mut().find(same) else {
            kept.push(figure);
            continue;
        };
        let machine = other.machine.worse(figure.machine);
        if other.value < figure.value {
            *other = figure;
        }
        other.machine = machine;
    }
    kept
}

/// A table of one contender's figures.
pub(super) fn table(contender: Contender, figures: &[Figure]) -> String {
    let mut rows = vec![["scenario", "measured", contender.name(), "limit", "met"].map(str::to_owned)];
    let mut scenario = "";
    for figure in figures.iter().filter(|figure| figure.contender == contender) {
        let name = if figure.scenario == scenario { "" } else { figure.scenario };
        scenario = figure.scenario;
        let met = figure.met.map_or("", |met| if met { "yes" } else { "NO" });
        let limit = figure.limit.map(|limit| shown(limit, figure.unit)).unwrap_or_default();
        let value = shown(figure.value, figure.unit);
        rows.push([name.to_owned(), figure.measured.to_owned(), value, limit, met.to_owned()]);
    }
    aligned(&rows, [false, false, true, true, false])
}

/// A table of what the machine was like: first of all for whoever doubts a figure.
pub(super) fn machine_table(figures: &[Figure]) -> String {
    let head = ["scenario", "contender", "processors busy", "waiting for one", "clients late", ""];
    let mut rows = vec![head.map(str::to_owned)];
    let mut last = None;
    for figure in figures {
        let of = (figure.scenario, figure.contender);
        if last == Some(of) {
            continue;
        }
        let same = last.is_some_and(|(scenario, _)| scenario == figure.scenario);
        let name = if same { "" } else { figure.scenario };
        last = Some(of);
        let Load { busy_percent, waiting_percent, late_percent } = figure.machine;
        rows.push([
            name.to_owned(),
            figure.contender.name().to_owned(),
            format!("{busy_percent:.0} %"),
            waiting_percent.map_or_else(|| "?".to_owned(), |percent| format!("{percent:.0} %")),
            format!("{late_percent:.1} %"),
            if figure.machine.is_too_busy() { "too busy" } else { "" }.to_owned(),
        ]);
    }
    aligned(&rows, [false, false, true, true, true, false])
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

    use super::{count, machine_table, table, time, worst};
    use crate::failover::{
        balancer::Contender::{HaProxy, Sheave},
        machine::Load,
    };

    const QUIET: Load = Load { busy_percent: 20.4, waiting_percent: Some(3.0), late_percent: 0.0 };
    const BUSY: Load = Load { busy_percent: 99.9, waiting_percent: None, late_percent: 12.34 };

    #[test]
    fn a_limit_is_met_missed_or_absent() {
        let figures = vec![
            time("last failure", Some(Duration::from_millis(90))).at_most(100).of(Sheave, "killed", QUIET),
            count("lost SYNs", 3).of(Sheave, "killed", QUIET),
            time("until reset", None).at_most(300).of(Sheave, "cut off", QUIET),
            count("not in this table", 1).of(HaProxy, "killed", QUIET),
        ];
        let table = table(Sheave, &figures);
        assert!(table.contains("| killed   | last failure |  90 ms | 100 ms | yes |"), "{table}");
        assert!(table.contains("|          | lost SYNs    |      3 |        |     |"), "{table}");
        assert!(table.contains("| cut off  | until reset  |  never | 300 ms | NO  |"), "{table}");
        assert!(!table.contains("not in this"), "{table}");
        let json = serde_json::to_string(&figures).unwrap();
        assert!(json.contains(r#""value":null,"unit":"ms""#), "{json}");
        assert!(json.contains(r#""machine":{"busy_percent":20.4,"waiting_percent":3.0"#), "{json}");
    }

    #[test]
    fn of_several_rounds_the_worst_counts() {
        let of = |(value, load)| count("lost", value).at_most(6).of(Sheave, "killed", load);
        let kept = worst([(3, QUIET), (7, QUIET), (5, BUSY)].map(of).into());
        assert_eq!((kept.len(), kept[0].value, kept[0].met), (1, 7.0, Some(false)));
        assert_eq!(kept[0].machine, QUIET.worse(BUSY), "the worst the machine was in any of them");
    }

    #[test]
    fn a_busy_machine_is_told_of() {
        let figures = [
            count("one", 1).of(Sheave, "killed", QUIET),
            count("another", 1).of(Sheave, "killed", QUIET),
            count("one", 1).of(HaProxy, "killed", BUSY),
        ];
        let table = machine_table(&figures);
        assert_eq!(table.lines().count(), 4, "{table}");
        let rows = [
            "| killed   | sheave    |            20 % |             3 % |        0.0 % |          |",
            "|          | HAProxy   |           100 % |               ? |       12.3 % | too busy |",
        ];
        assert!(rows.iter().all(|row| table.contains(row)), "{table}");
    }
}
