//! Which backends get new flows, also when none is ready. Pure.
//!
//! The cluster may be ill (a lost etcd makes every apiserver say 500), our credential may be bad, or we may be
//! the blind one. Cutting everything off would make each of these worse, so there is an order, [`select`].

use super::state::State;

/// What the operator said about a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OperatorState {
    /// Nothing.
    #[default]
    None,
    /// No new flows, unless there is nobody else.
    Drain,
    /// No new flows, whatever happens.
    Maint,
}

/// What the order looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The verdict of its checks.
    pub state: State,
    /// Its last check's [`CheckReport::connected`](super::CheckReport::connected).
    pub connected: bool,
    /// Its last check's status.
    pub http_status: Option<u16>,
    /// Its last check's [`CheckReport::certificate_rejected`](super::CheckReport::certificate_rejected).
    pub certificate_rejected: bool,
    /// What the operator said.
    pub operator: OperatorState,
    /// Its share of new flows. 0 is an operator's drain by another name.
    pub weight: u16,
}

/// Who gets new flows, and why them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// Indexes of the candidates, ascending. With [`SelectionReason::OperatorDrained`] all may have weight 0, and
    /// then share equally.
    pub members: Vec<usize>,
    /// Why them.
    pub reason: SelectionReason,
}

/// Why these backends were selected, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SelectionReason {
    /// They are ready.
    Ready,
    /// None is ready, and these say 401 or 403: it is our credential that is bad.
    CredentialRejected,
    /// None is ready, and these live.
    Draining,
    /// None completed TLS, because our CA verifies none of those that answer.
    CertificateRejected,
    /// There is nobody else than those the operator drained.
    OperatorDrained,
    /// Nobody.
    None,
}

impl SelectionReason {
    /// What to tell the operator, where something is out of order.
    #[must_use]
    pub fn explanation(self) -> Option<&'static str> {
        match self {
            Self::Ready => None,
            Self::CredentialRejected => Some(
                "no backend gives the expected status, and some answer 401 or 403: new flows go to those. \
                 Most likely the check's credential is missing, expired or wrong: \
                 see client_cert_file, client_key_file and token_file",
            ),
            Self::Draining => {
                Some("no backend is ready: new flows go to those that still complete the connection")
            }
            Self::CertificateRejected => Some(
                "no backend's certificate verifies: new flows go to those that answer. \
                 Most likely the check's CA or server name is wrong: see ca_file and server_name",
            ),
            Self::OperatorDrained => Some("no other backend is usable: new flows go to drained ones"),
            Self::None => Some("no backend is usable: new connections are refused"),
        }
    }
}

/// Picks who gets new flows.
///
/// 1. The ready ones.
/// 2. Of the draining ones whose last check connected, those that say 401 or 403; else all of them.
/// 3. If nobody connected: those that answered with a certificate we do not trust. (When some connect, the CA
///    works and the others are rightly refused.)
/// 4. The same again among those the operator drained (also by weight 0).
///
/// Never one in maintenance, nor one that is silent, dead or not yet known.
#[must_use]
pub fn select(candidates: &[Candidate]) -> Selection {
    let eligible = |candidate: &&Candidate| candidate.operator != OperatorState::Maint;
    let nobody_connects = !candidates.iter().filter(eligible).any(|candidate| candidate.connected);
    let tier = |reason, drained| -> Vec<usize> {
        let wanted = |candidate: &&Candidate| {
            candidate.is_drained() == drained && candidate.qualifies(reason, nobody_connects)
        };
        let indexed = candidates.iter().enumerate();
        indexed.filter(|(_, it)| eligible(it) && wanted(it)).map(|(index, _)| index).collect()
    };
    for drained in [false, true] {
        for reason in [
            SelectionReason::Ready,
            SelectionReason::CredentialRejected,
            SelectionReason::Draining,
            SelectionReason::CertificateRejected,
        ] {
            let members = tier(reason, drained);
            if !members.is_empty() {
                let reason = if drained { SelectionReason::OperatorDrained } else { reason };
                return Selection { members, reason };
            }
        }
    }
    Selection { members: Vec::new(), reason: SelectionReason::None }
}

impl Candidate {
    fn is_drained(&self) -> bool {
        self.operator == OperatorState::Drain || self.weight == 0
    }

    /// Whether its checks, leaving aside the operator, would have it selected for this reason.
    fn qualifies(&self, reason: SelectionReason, nobody_connects: bool) -> bool {
        let lives = self.state == State::Draining && self.connected;
        match reason {
            SelectionReason::Ready => self.state == State::Ready,
            SelectionReason::CredentialRejected => lives && matches!(self.http_status, Some(401 | 403)),
            SelectionReason::Draining => lives,
            SelectionReason::CertificateRejected => {
                nobody_connects && self.state == State::Draining && self.certificate_rejected
            }
            SelectionReason::OperatorDrained | SelectionReason::None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn candidate(state: State) -> Candidate {
        Candidate {
            state,
            connected: matches!(state, State::Ready | State::Draining),
            http_status: None,
            certificate_rejected: false,
            operator: OperatorState::None,
            weight: 1,
        }
    }

    fn answering(http_status: u16) -> Candidate {
        Candidate { http_status: Some(http_status), ..candidate(State::Draining) }
    }

    fn selected(candidates: &[Candidate]) -> (Vec<usize>, SelectionReason) {
        let Selection { members, reason } = select(candidates);
        (members, reason)
    }

    #[test]
    fn ready_ones_are_enough() {
        let candidates = [answering(500), candidate(State::Ready), answering(401), candidate(State::Dead)];
        assert_eq!(selected(&candidates), (vec![1], SelectionReason::Ready));
    }

    #[test]
    fn a_lost_etcd_cuts_nobody_off() {
        let refused = Candidate { connected: false, ..candidate(State::Draining) };
        let candidates = [answering(500), refused, answering(500)];
        assert_eq!(selected(&candidates), (vec![0, 2], SelectionReason::Draining));
    }

    #[test]
    fn an_expired_credential_cuts_nobody_off() {
        let candidates = [answering(401), answering(500), answering(403), candidate(State::Silent)];
        assert_eq!(selected(&candidates), (vec![0, 2], SelectionReason::CredentialRejected));
    }

    #[test]
    fn a_ca_that_verifies_nobody_cuts_nobody_off_but_one_bad_certificate_is_the_backends_own() {
        let untrusted =
            Candidate { connected: false, certificate_rejected: true, ..candidate(State::Draining) };
        assert_eq!(selected(&[untrusted, untrusted]), (vec![0, 1], SelectionReason::CertificateRejected));
        assert_eq!(selected(&[untrusted, answering(500)]), (vec![1], SelectionReason::Draining));
        let drained = Candidate { operator: OperatorState::Drain, ..candidate(State::Ready) };
        assert_eq!(selected(&[untrusted, drained]), (vec![1], SelectionReason::OperatorDrained));
    }

    #[test]
    fn drained_ones_are_the_last_and_maintenance_is_never() {
        let drained = Candidate { operator: OperatorState::Drain, ..candidate(State::Ready) };
        let weightless = Candidate { weight: 0, ..candidate(State::Ready) };
        let maint = Candidate { operator: OperatorState::Maint, ..candidate(State::Ready) };
        assert_eq!(selected(&[drained, answering(500)]), (vec![1], SelectionReason::Draining));
        assert_eq!(
            selected(&[drained, maint, weightless, candidate(State::Silent)]),
            (vec![0, 2], SelectionReason::OperatorDrained)
        );
        assert_eq!(selected(&[maint]), (vec![], SelectionReason::None));
    }

    #[test]
    fn nobody_known_or_everybody_silent_is_nobody() {
        assert_eq!(selected(&[candidate(State::Unknown); 3]), (vec![], SelectionReason::None));
        assert_eq!(selected(&[candidate(State::Silent); 3]), (vec![], SelectionReason::None));
        assert_eq!(selected(&[candidate(State::Dead); 3]), (vec![], SelectionReason::None));
        assert_eq!(selected(&[]), (vec![], SelectionReason::None));
    }

    fn any_candidate() -> impl Strategy<Value = Candidate> {
        (
            prop_oneof![
                Just(State::Unknown),
                Just(State::Ready),
                Just(State::Draining),
                Just(State::Silent),
                Just(State::Dead)
            ],
            any::<bool>(),
            prop_oneof![Just(None), Just(Some(200)), Just(Some(401)), Just(Some(403)), Just(Some(500))],
            any::<bool>(),
            prop_oneof![Just(OperatorState::None), Just(OperatorState::Drain), Just(OperatorState::Maint)],
            0_u16..3,
        )
            .prop_map(|(state, connected, http_status, certificate_rejected, operator, weight)| {
                Candidate { state, connected, http_status, certificate_rejected, operator, weight }
            })
    }

    proptest! {
        #[test]
        fn the_order_holds(candidates in proptest::collection::vec(any_candidate(), 0..8)) {
            let Selection { members, reason } = select(&candidates);
            let free = |candidate: &Candidate| {
                candidate.operator == OperatorState::None && candidate.weight > 0
            };
            let ready = candidates.iter().filter(|c| free(c) && c.state == State::Ready).count();
            let alive = candidates.iter().any(|c| free(c) && c.state == State::Draining && c.connected);

            prop_assert!(members.is_sorted_by(|a, b| a < b));
            prop_assert_eq!(members.is_empty(), reason == SelectionReason::None);
            prop_assert_eq!(ready > 0, reason == SelectionReason::Ready);
            if reason == SelectionReason::Ready {
                prop_assert_eq!(members.len(), ready);
            }
            prop_assert_eq!(
                ready == 0 && alive,
                matches!(reason, SelectionReason::Draining | SelectionReason::CredentialRejected)
            );
            for index in members {
                let member = candidates[index];
                prop_assert!(matches!(member.state, State::Ready | State::Draining));
                prop_assert_ne!(member.operator, OperatorState::Maint);
                prop_assert_eq!(free(&member), reason != SelectionReason::OperatorDrained);
            }
            if candidates.iter().all(|c| matches!(c.state, State::Silent | State::Dead | State::Unknown)) {
                prop_assert_eq!(reason, SelectionReason::None);
            }
        }
    }
}
