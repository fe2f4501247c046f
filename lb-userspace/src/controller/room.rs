//! The room in the flow tables: what is said when it gets scarce, and when a source has used up its budget.

use std::time::{Duration, Instant};

use super::{Controller, family_name};
use crate::{
    admin::FlowTableStatus,
    config::Config,
    dataplane::{HeavySource, SourceShares, Usage},
};

/// Used slots, in per cent, at which the operator is warned, and warned again.
const FILLING: u64 = 70;
const NEARLY_FULL: u64 = 90;
/// By so many per cent less the warning is taken back.
const HYSTERESIS: u64 = 5;
/// A source that has used up its budget is named so often at most.
const NAMED_EVERY: Duration = Duration::from_secs(60);

/// What is known of the flow tables' room.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// Of IPv4, of IPv6.
    usage: [Usage; 2],
    levels: [Level; 2],
    budgets: BudgetWarning,
}

/// How full a table is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    #[default]
    Roomy,
    Filling,
    NearlyFull,
}

impl Level {
    fn of(percent: u64) -> Self {
        match percent {
            NEARLY_FULL.. => Self::NearlyFull,
            FILLING.. => Self::Filling,
            _ => Self::Roomy,
        }
    }

    /// The level now that so much is used: it falls only when the use is well below.
    fn after(self, percent: u64) -> Self {
        Self::of(percent).max(self.min(Self::of(percent + HYSTERESIS)))
    }
}

/// When a source that has used up its budget was last named.
#[derive(Debug, Default)]
struct BudgetWarning {
    /// SYNs dropped until the last look; None: nobody has looked.
    dropped: Option<u64>,
    named: Option<Instant>,
}

impl BudgetWarning {
    /// Takes note of the number of SYNs that were dropped. Returns how many are to be told of now.
    fn heed(&mut self, dropped: u64, now: Instant) -> Option<u64> {
        // Maps outlive the daemon: what was dropped before it was there is not its news. A service that was removed takes its
        // counters with it.
        let before = self.dropped.filter(|before| *before <= dropped).unwrap_or(dropped);
        let recently = self.named.is_some_and(|at| now.saturating_duration_since(at) < NAMED_EVERY);
        if recently || dropped == before {
            // What is not told of now is told of later.
            self.dropped = Some(before);
            return None;
        }
        (self.dropped, self.named) = (Some(dropped), Some(now));
        Some(dropped - before)
    }
}

impl Room {
    /// Takes note of how the slots are used now. Returns what is to be said about it, and whether it is a warning.
    fn observe(&mut self, usage: [Usage; 2]) -> Vec<(String, bool)> {
        self.usage = usage;
        let mut news = Vec::new();
        for ((level, usage), ipv6) in self.levels.iter_mut().zip(usage).zip([false, true]) {
            let before = std::mem::replace(level, level.after(usage.percent()));
            if *level > before {
                news.push((sentence(ipv6, &usage), true));
            } else if *level < before {
                news.push((fill(ipv6, &usage), false));
            }
        }
        news
    }

    /// What the operator should know.
    pub(super) fn flags(&self) -> impl Iterator<Item = String> {
        let scarce = self.levels.iter().zip(&self.usage).zip([false, true]);
        scarce
            .filter(|((level, _), _)| **level > Level::Roomy)
            .map(|((_, usage), ipv6)| sentence(ipv6, usage))
    }

    /// For `sheave status --json`.
    pub(super) fn status(&self) -> Vec<FlowTableStatus> {
        let tables = self.usage.iter().zip(["ipv4", "ipv6"]);
        tables
            .filter(|(usage, _)| usage.slots > 0)
            .map(|(usage, family)| FlowTableStatus {
                family: family.to_owned(),
                slots: usage.slots,
                used: usage.used(),
                established: usage.established,
                half_open: usage.half_open,
                closed: usage.closed,
            })
            .collect()
    }
}

fn fill(ipv6: bool, usage: &Usage) -> String {
    format!(
        "{} of {} {} flow slots are used ({} %)",
        usage.used(),
        usage.slots,
        family_name(ipv6),
        usage.percent()
    )
}

fn sentence(ipv6: bool, usage: &Usage) -> String {
    let Usage { established, half_open, closed, .. } = usage;
    format!(
        "{}: {established} established, {half_open} half-open, {closed} closed; new connections are dropped when all \
         are: name more snat_addresses, or find who opens so many (`sheave flows`)",
        fill(ipv6, usage)
    )
}

/// About SYNs that were dropped for their source's budget; `source` is the largest there is now.
fn over_budget(dropped: u64, source: Option<&HeavySource>) -> String {
    let dropped = format!("{dropped} SYNs dropped, as their source has used up its share of the flow slots");
    match source {
        None => format!("{dropped}; it uses less by now"),
        Some(HeavySource { prefix, used, limit }) => {
            let of = |used: u32, limit: u32| match limit {
                u32::MAX => format!("{used}"),
                limit => format!("{used} of {limit}"),
            };
            format!(
                "{dropped}: the largest is {prefix} with {} slots (dataplane.source_share), {} half-open \
                 (dataplane.half_open_share)",
                of(used.slots(), limit.slots()),
                of(used.half_open(), limit.half_open())
            )
        }
    }
}

/// What a configuration says one source may use.
pub(super) fn source_shares(config: &Config) -> SourceShares {
    SourceShares { slots: config.dataplane.source_share, half_open: config.dataplane.half_open_share }
}

impl Controller {
    /// Counts how the slots of the flow tables are used, and by whom, and says what is new about it. Every second.
    pub(super) fn look_at_room(&mut self) {
        match self.dataplane.count_sources() {
            Ok(usage) => {
                for (line, is_warning) in self.room.observe(usage) {
                    if is_warning {
                        tracing::warn!("{line}");
                    } else {
                        tracing::info!("{line}");
                    }
                }
            }
            Err(error) => tracing::warn!("cannot count the flow slots in use: {error}"),
        }
        let dropped = match self.dataplane.over_budget(self.services.numbers().into_iter()) {
            Ok(dropped) => dropped,
            Err(error) => return tracing::warn!("cannot read the counters: {error}"),
        };
        if let Some(dropped) = self.room.budgets.heed(dropped, Instant::now()) {
            match self.dataplane.heaviest_source() {
                Ok(source) => tracing::warn!("{}", over_budget(dropped, source.as_ref())),
                Err(error) => tracing::warn!("cannot look for the source that uses most flow slots: {error}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lb_common::source_budget::SourceCount;

    use super::*;

    fn usage(established: u64) -> Usage {
        Usage { slots: 1000, established, half_open: 0, closed: 0 }
    }

    #[test]
    fn scarce_room_is_said_once_and_taken_back_well_below() {
        let mut room = Room::default();
        let mut said = |used| room.observe([Usage::default(), usage(used)]);
        assert_eq!(said(699), []);
        let [(line, true)] = &said(700)[..] else { panic!("a warning") };
        assert!(line.starts_with("700 of 1000 IPv6 flow slots are used (70 %): 700 established"), "{line}");
        assert_eq!(said(899), []);
        assert!(matches!(said(900)[..], [(_, true)]));
        for used in [899, 850, 905] {
            assert_eq!(said(used), [], "{used}");
        }
        assert!(matches!(said(849)[..], [(_, false)]));
        assert!(matches!(said(900)[..], [(_, true)]));
        assert!(matches!(said(100)[..], [(_, false)]));
        assert_eq!(said(649), []);
    }

    #[test]
    fn scarce_room_is_a_flag_for_as_long() {
        let mut room = Room::default();
        let mut flags = |used| {
            room.observe([usage(used), Usage::default()]);
            room.flags().count()
        };
        assert_eq!([700, 650, 649].map(&mut flags), [1, 1, 0]);
        assert_eq!(room.status().len(), 1, "a family without slots has no table");
    }

    #[test]
    fn dropped_syns_are_told_of_once_a_minute() {
        let mut warning = BudgetWarning::default();
        let start = Instant::now();
        let mut heed = |dropped, seconds: u64| warning.heed(dropped, start + Duration::from_secs(seconds));
        assert_eq!(heed(500, 0), None, "of a daemon before this one");
        assert_eq!(heed(501, 1), Some(1));
        assert_eq!(heed(503, 2), None);
        assert_eq!(heed(503, 60), None);
        assert_eq!(heed(503, 61), Some(2));
        assert_eq!(heed(503, 200), None);
        assert_eq!(heed(10, 201), None, "a service was removed");
        assert_eq!(heed(11, 202), Some(1));
    }

    #[test]
    fn the_source_is_named_with_what_it_may_have() {
        let source = |limit| HeavySource {
            prefix: "10.0.0.7/32".parse().unwrap(),
            used: SourceCount::new(500, 3),
            limit,
        };
        let line = over_budget(7, Some(&source(SourceCount::new(500, u32::MAX))));
        assert!(
            line.contains("10.0.0.7/32 with 500 of 500 slots") && line.contains(", 3 half-open"),
            "{line}"
        );
        assert!(over_budget(7, None).starts_with("7 SYNs dropped"));
    }
}
