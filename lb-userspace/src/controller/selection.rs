//! Who gets the new flows of a service and family, and what is said about it.

use super::backends::Backend;
use crate::health::{Selection, SelectionReason, select};

/// A choice of backends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    /// Why these.
    pub(super) reason: SelectionReason,
    /// Ids and shares of new flows, above 0.
    pub(super) members: Vec<(u8, u16)>,
}

impl Choice {
    /// Chooses among the backends of one service and family.
    pub(super) fn among(backends: &[&Backend]) -> Self {
        let candidates: Vec<_> = backends.iter().map(|backend| backend.candidate()).collect();
        let Selection { members, reason } = select(&candidates);
        let mut members: Vec<_> =
            members.into_iter().map(|index| (backends[index].id, backends[index].weight)).collect();
        // Drained ones are the last resort, and weight 0 is a way to drain: then they share equally.
        if members.iter().all(|(_, weight)| *weight == 0) {
            members.iter_mut().for_each(|(_, weight)| *weight = 1);
        }
        members.retain(|(_, weight)| *weight > 0);
        Self { reason, members }
    }

    /// Whether a backend is in it.
    pub(super) fn has(&self, id: u8) -> bool {
        self.members.iter().any(|(member, _)| *member == id)
    }

    /// For the operator's log, when the reason has changed.
    pub(super) fn sentence(&self, service: &str, backends: &[&Backend]) -> String {
        let names: Vec<_> = backends
            .iter()
            .filter(|backend| self.has(backend.id))
            .map(|backend| backend.name.as_str())
            .collect();
        match self.reason.explanation() {
            None => format!("{service}: new flows go to ready backends ({})", names.join(", ")),
            Some(explanation) if names.is_empty() => format!("{service}: {explanation}"),
            Some(explanation) => format!("{service}: {explanation} ({})", names.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::backends::tests::backends, *};
    use crate::health::State;

    #[test]
    fn nobody_is_chosen_before_the_first_checks() {
        let backends = backends(&["10.0.0.1:6443", "10.0.0.2:6443"]);
        assert_eq!(
            Choice::among(&backends.iter().collect::<Vec<_>>()),
            Choice { reason: SelectionReason::None, members: Vec::new() }
        );
    }

    #[test]
    fn ready_ones_are_chosen_by_their_weight() {
        let mut backends = backends(&["10.0.0.1:6443", "10.0.0.2:6443", "10.0.0.3:6443"]);
        (backends[0].state, backends[0].weight) = (State::Ready, 3);
        (backends[1].state, backends[1].weight) = (State::Ready, 0);
        (backends[2].state, backends[2].weight) = (State::Ready, 1);
        let choice = Choice::among(&backends.iter().collect::<Vec<_>>());
        assert_eq!(choice, Choice { reason: SelectionReason::Ready, members: vec![(1, 3), (3, 1)] });
    }

    #[test]
    fn backends_without_weight_share_equally_when_there_is_nobody_else() {
        let mut backends = backends(&["10.0.0.1:6443", "10.0.0.2:6443", "10.0.0.3:6443"]);
        for backend in &mut backends[..2] {
            (backend.state, backend.weight) = (State::Ready, 0);
        }
        backends[2].state = State::Silent;
        let all: Vec<_> = backends.iter().collect();
        let choice = Choice::among(&all);
        assert_eq!(
            choice,
            Choice { reason: SelectionReason::OperatorDrained, members: vec![(1, 1), (2, 1)] }
        );
        assert_eq!(
            choice.sentence("api", &all),
            "api: no other backend is usable: new flows go to drained ones (10.0.0.1:6443, 10.0.0.2:6443)"
        );
    }
}
