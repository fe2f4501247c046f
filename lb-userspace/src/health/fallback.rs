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
    /// None is ready, and of these some say 401 or 403: it is our credential that is bad.
    CredentialRejected,
    /// None is ready, and these live.
    Draining,
    /// None is ready, and these live as far as their certificates tell, which our CA does not verify.
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
                "no backend gives the expected status, and some answer 401 or 403: new flows go to those, and to \
                 any whose certificate does not verify. \
                 Most likely the check's credential is missing, expired or wrong: \
                 see client_cert_file, client_key_file and token_file",
            ),
            Self::Draining => Some(
                "no backend is ready: new flows go to those that still complete the connection, \
                 whatever their certificate",
            ),
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
/// 2. Of the draining ones, those that say 401 or 403, and those whose certificate our CA does not verify, if anybody
///    says 401 or 403; else all whose last check connected, and those whose certificate does not verify.
/// 3. The same again among those the operator drained (also by weight 0).
///
/// Who shows a certificate that we do not trust lives, and clients judge it for themselves: it is as good as one whose
/// answer is wrong. While a cluster's CA is rotated, master by master, the last one that verifies would otherwise be
/// given everything, also while it stops.
///
/// Never one in maintenance, nor one that is silent, dead or not yet known.
#[must_use]
pub fn select(candidates: &[Candidate]) -> Selection {
    const REASONS: [SelectionReason; 4] = [
        SelectionReason::Ready,
        SelectionReason::CredentialRejected,
        SelectionReason::Draining,
        SelectionReason::CertificateRejected,
    ];
    for drained in [false, true] {
        let eligible = |it: &Candidate| it.operator != OperatorState::Maint && it.is_drained() == drained;
        let tier: Vec<_> = candidates.iter().enumerate().filter(|(_, it)| eligible(it)).collect();
        let is_met = |reason: &SelectionReason| tier.iter().any(|(_, it)| it.qualifies(*reason));
        let Some(reason) = REASONS.into_iter().find(is_met) else { continue };
        let as_well = |it: &Candidate| reason != SelectionReason::Ready && it.is_untrusted();
        let members = tier.iter().filter(|(_, it)| it.qualifies(reason) || as_well(it));
        let members = members.map(|(index, _)| *index).collect();
        let reason = if drained { SelectionReason::OperatorDrained } else { reason };
        return Selection { members, reason };
    }
    Selection { members: Vec::new(), reason: SelectionReason::None }
}

impl Candidate {
    fn is_drained(&self) -> bool {
        self.operator == OperatorState::Drain || self.weight == 0
    }

    /// Somebody is there, and shows a certificate that our CA does not verify.
    fn is_untrusted(&self) -> bool {
        self.state == State::Draining && self.certificate_rejected
    }

    /// Whether its checks, leaving aside the operator, are a reason for this selection.
    fn qualifies(&self, reason: SelectionReason) -> bool {
        let lives = self.state == State::Draining && self.connected;
        match reason {
            SelectionReason::Ready => self.state == State::Ready,
            SelectionReason::CredentialRejected => lives && matches!(self.http_status, Some(401 | 403)),
            SelectionReason::Draining => lives,
            SelectionReason::CertificateRejected => self.is_untrusted(),
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

    fn untrusted() -> Candidate {
        Candidate { connected: false, certificate_rejected: true, ..candidate(State::Draining) }
    }

    #[test]
    fn a_ca_that_verifies_nobody_cuts_nobody_off_but_one_bad_certificate_is_the_backends_own() {
        let untrusted = untrusted();
        assert_eq!(selected(&[untrusted, untrusted]), (vec![0, 1], SelectionReason::CertificateRejected));
        assert_eq!(selected(&[untrusted, candidate(State::Ready)]), (vec![1], SelectionReason::Ready));
    }

    #[test]
    fn while_a_ca_is_rotated_the_last_one_that_verifies_does_not_get_everything() {
        let untrusted = untrusted();
        let refused = Candidate { connected: false, ..candidate(State::Draining) };
        // It is told to stop, and says so; with a credential that it does not know, it says 401 all along.
        let (stopping, unauthorized) = (answering(500), answering(401));
        let all = [untrusted, untrusted, stopping];
        assert_eq!(selected(&all), (vec![0, 1, 2], SelectionReason::Draining));
        let all = [untrusted, unauthorized, stopping];
        assert_eq!(selected(&all), (vec![0, 1], SelectionReason::CredentialRejected));
        // Its port closes.
        let all = [untrusted, untrusted, refused];
        assert_eq!(selected(&all), (vec![0, 1], SelectionReason::CertificateRejected));
        // Or an operator drains it first.
        let drained = Candidate { operator: OperatorState::Drain, ..candidate(State::Ready) };
        assert_eq!(
            selected(&[untrusted, untrusted, drained]),
            (vec![0, 1], SelectionReason::CertificateRejected)
        );
        let drained = Candidate { operator: OperatorState::Drain, ..untrusted };
        assert_eq!(selected(&[drained, drained, stopping]), (vec![2], SelectionReason::Draining));
        assert_eq!(selected(&[drained, refused]), (vec![0], SelectionReason::OperatorDrained));
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
            let untrusted = |c: &Candidate| free(c) && c.state == State::Draining && c.certificate_rejected;

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
            prop_assert_eq!(
                ready == 0 && !alive && candidates.iter().any(untrusted),
                reason == SelectionReason::CertificateRejected
            );
            for (index, candidate) in candidates.iter().enumerate().filter(|(_, c)| untrusted(c)) {
                prop_assert_eq!(members.contains(&index), ready == 0, "{:?}", candidate);
            }
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
