//! What the rounds say, and whether it is enough.

use serde::Serialize;

use super::{
    contender::Contender,
    quantile,
    rounds::{Round, Window},
};
use crate::aligned::aligned;

/// Something that is read off the windows of one load.
pub(super) struct Measured {
    name: &'static str,
    unit: &'static str,
    of: fn(&Window) -> f64,
    /// What sheave's may be, as a part of another's.
    limits: &'static [(Contender, Limit)],
}

/// Of the node's processor time.
const BALANCER: Measured =
    Measured { name: "... the balancer's part", unit: "us", of: |window| window.balancer_time, limits: &[] };
/// Not of the node's.
const SERVERS: Measured = Measured {
    name: "... and the servers' beside",
    unit: "us",
    of: |window| window.server_time,
    limits: &[],
};

/// Of kept-alive requests.
pub(super) const REQUESTS: [Measured; 6] = [
    Measured {
        name: "kept-alive requests",
        unit: "/s",
        of: |window| window.rate,
        limits: &[(Contender::Direct, Limit::AtLeast(0.97))],
    },
    Measured { name: "a request, median", unit: "us", of: |window| window.median, limits: &[] },
    Measured {
        name: "a request, p99",
        unit: "us",
        of: |window| window.p99,
        limits: &[(Contender::Direct, Limit::AtMost(1.0 / 0.97))],
    },
    Measured {
        name: "a request, processor time of the node",
        unit: "us",
        of: |window| window.node_time,
        limits: &[(Contender::Direct, Limit::AtMost(1.03))],
    },
    BALANCER,
    SERVERS,
];

/// Of new connections.
pub(super) const CONNECTIONS: [Measured; 5] = [
    Measured {
        name: "new TLS connections",
        unit: "/s",
        of: |window| window.rate,
        limits: &[(Contender::Direct, Limit::AtLeast(0.95)), (Contender::HaProxy, Limit::AtLeast(1.5))],
    },
    Measured { name: "a connection, p99", unit: "us", of: |window| window.p99, limits: &[] },
    Measured {
        name: "a connection, processor time of the node",
        unit: "us",
        of: |window| window.node_time,
        limits: &[(Contender::Direct, Limit::AtMost(1.03))],
    },
    BALANCER,
    SERVERS,
];

/// What a ratio may be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Limit {
    AtLeast(f64),
    AtMost(f64),
}

impl Limit {
    fn met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(least) => value >= least,
            Self::AtMost(most) => value <= most,
        }
    }

    fn shown(self) -> String {
        match self {
            Self::AtLeast(least) => format!(">= {least:.2}"),
            Self::AtMost(most) => format!("<= {most:.2}"),
        }
    }
}

/// The median of the rounds, and between which values the middle half of them lies.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) quartiles: [f64; 2],
}

impl Spread {
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<_> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let [low, median, high] = [0.25, 0.5, 0.75].map(|part| quantile(&values, part));
        Self { median, quartiles: [low, high] }
    }

    /// With so many digits after the point.
    pub(super) fn shown(&self, digits: usize) -> String {
        let Self { median, quartiles: [low, high] } = self;
        format!("{median:.digits$} ({low:.digits$}-{high:.digits$})")
    }
}

/// One contender's figure.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Figure {
    measured: &'static str,
    unit: &'static str,
    contender: Contender,
    #[serde(flatten)]
    value: Spread,
    ratios: Vec<Ratio>,
}

/// To another's figure of the same round.
#[derive(Clone, Debug, Serialize)]
struct Ratio {
    to: Contender,
    #[serde(flatten)]
    value: Spread,
    limit: Option<Limit>,
    met: Option<bool>,
}

/// The figures of all contenders.
pub(super) fn figures(measured: &[Measured], rounds: &[Round]) -> Vec<Figure> {
    let each = |it| Contender::ALL.map(|contender| figure(it, contender, rounds));
    measured.iter().flat_map(each).collect()
}

fn figure(measured: &Measured, contender: Contender, rounds: &[Round]) -> Figure {
    let Measured { name, unit, of, limits } = measured;
    let value = |round: &Round, contender: Contender| of(&round[contender as usize]);
    let ratio = |to: Contender| {
        let limit = limits.iter().find(|(other, _)| contender == Contender::Sheave && *other == to);
        let limit = limit.map(|(_, limit)| *limit);
        let value = Spread::of(rounds.iter().map(|round| value(round, contender) / value(round, to)));
        Ratio { to, value, limit, met: limit.map(|limit| limit.met(value.median)) }
    };
    // The balancer's part of nobody's is no measure for anybody.
    let has_measure =
        contender != Contender::Direct && rounds.iter().all(|round| value(round, Contender::Direct) > 0.0);
    let mut ratios = Vec::new();
    if has_measure {
        ratios.push(ratio(Contender::Direct));
        if contender == Contender::Sheave {
            ratios.push(ratio(Contender::HaProxy));
        }
    }
    let value = Spread::of(rounds.iter().map(|round| value(round, contender)));
    Figure { measured: name, unit, contender, value, ratios }
}

/// A table of figures.
pub(super) fn table(figures: &[Figure]) -> String {
    let head = ["measured", "", "median (quartiles)", "of direct", "of HAProxy", "limit", "met"];
    let mut rows = vec![head.map(str::to_owned)];
    let mut measured = "";
    for figure in figures {
        let name = if figure.measured == measured { "" } else { figure.measured };
        measured = figure.measured;
        let to = |other| figure.ratios.iter().find(|ratio| ratio.to == other);
        let shown = |other| to(other).map(|ratio| ratio.value.shown(3)).unwrap_or_default();
        let limits: Vec<_> = figure.ratios.iter().filter_map(|it| it.limit.zip(it.met)).collect();
        let digits = if figure.unit == "us" { 1 } else { 0 };
        rows.push([
            name.to_owned(),
            figure.contender.name().to_owned(),
            format!("{} {}", figure.value.shown(digits), figure.unit),
            shown(Contender::Direct),
            shown(Contender::HaProxy),
            limits.iter().map(|(limit, _)| limit.shown()).collect::<Vec<_>>().join(", "),
            limits.iter().map(|(_, met)| if *met { "yes" } else { "NO" }).collect::<Vec<_>>().join(", "),
        ]);
    }
    aligned(&rows, [false, false, true, true, true, false, false])
}

#[cfg(test)]
mod tests {
    use super::{CONNECTIONS, Contender, Figure, Limit, REQUESTS, Round, Spread, Window, figures, table};

    /// Rounds in which the machine is slower and slower: what is compared was measured at the same time.
    fn rounds() -> Vec<Round> {
        let rates = |slow: f64| [1000.0, 960.0, 600.0, 800.0].map(|rate| rate / slow);
        let window = |rate: f64| Window { rate, p99: 1e6 / rate, node_time: 50.0, ..Window::default() };
        [1.0, 2.0, 4.0].map(|slow| rates(slow).map(window)).into()
    }

    fn sheave(figures: Vec<Figure>) -> Figure {
        figures.into_iter().find(|figure| figure.contender == Contender::Sheave).unwrap()
    }

    #[test]
    fn ratios_are_of_one_round_and_limits_are_sheaves() {
        let requests = sheave(figures(&REQUESTS, &rounds()));
        assert_eq!(requests.value, Spread { median: 480.0, quartiles: [360.0, 720.0] });
        let to = |figure: &Figure| {
            let shown = |ratio: &super::Ratio| (ratio.to.name(), ratio.value.shown(2), ratio.met);
            figure.ratios.iter().map(shown).collect::<Vec<_>>()
        };
        let expected = [
            ("direct", "0.96 (0.96-0.96)".to_owned(), Some(false)),
            ("HAProxy", "1.60 (1.60-1.60)".to_owned(), None),
        ];
        assert_eq!(to(&requests), expected);
        let connections = to(&sheave(figures(&CONNECTIONS, &rounds())));
        assert_eq!((connections[0].2, connections[1].2), (Some(true), Some(true)), "0.95, and 1.5");
        let all = figures(&REQUESTS, &rounds());
        let others = all.iter().filter(|figure| figure.contender != Contender::Sheave);
        assert!(others.flat_map(|figure| &figure.ratios).all(|ratio| ratio.limit.is_none()));
        let table = table(&all);
        assert!(table.contains("| >= 0.97 | NO  |"), "{table}");
        let json = serde_json::to_string(&all).unwrap();
        assert!(json.contains(r#""contender":"sheave","median":480.0,"quartiles":[360.0,720.0]"#), "{json}");
        assert!(json.contains(r#""limit":{"at_least":0.97},"met":false"#), "{json}");
    }

    #[test]
    fn a_limit_is_kept_from_one_side() {
        assert!(Limit::AtLeast(0.97).met(0.97) && !Limit::AtLeast(0.97).met(0.969));
        assert!(Limit::AtMost(1.03).met(1.03) && !Limit::AtMost(1.03).met(1.031));
    }
}
