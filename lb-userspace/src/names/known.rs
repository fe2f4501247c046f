//! What is known of one name. Pure.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

/// A name is asked for no more often, whatever its time to live: it may be 0.
const FRESH_MIN: Duration = Duration::from_secs(5);
/// A name is asked for at least this often: `/etc/hosts` has no time to live, and may get a line any time.
const FRESH_MAX: Duration = Duration::from_secs(300);

/// The families that are of use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Families {
    pub(super) ipv4: bool,
    pub(super) ipv6: bool,
}

impl Families {
    /// The answer for each family (`true`: IPv6) that is of use.
    pub(super) fn each(self, answer: impl Fn(bool) -> Answer) -> Answers {
        Answers { ipv4: self.ipv4.then(|| answer(false)), ipv6: self.ipv6.then(|| answer(true)) }
    }
}

/// The addresses of one family, and how long they may be relied on; or why there is no answer.
pub(super) type Answer = Result<(BTreeSet<IpAddr>, Duration), String>;

/// Of one look-up; None for a family that is of no use.
#[derive(Debug)]
pub(super) struct Answers {
    pub(super) ipv4: Option<Answer>,
    pub(super) ipv6: Option<Answer>,
}

/// The last good answer, and what came after it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Known {
    ipv4: BTreeSet<IpAddr>,
    ipv6: BTreeSet<IpAddr>,
    /// A look-up has ended, with or without success.
    pub(super) asked: bool,
    /// What went wrong with the last look-up.
    problem: Option<String>,
    /// How long the answer is good for. None after a failure.
    pub(super) fresh_for: Option<Duration>,
}

impl Known {
    /// What a daemon before this one knew last.
    pub(super) fn remembered(addresses: &BTreeSet<IpAddr>) -> Self {
        let (ipv4, ipv6) = addresses.iter().partition(|address| address.is_ipv4());
        Self { ipv4, ipv6, ..Self::default() }
    }

    pub(super) fn addresses(&self) -> BTreeSet<IpAddr> {
        self.ipv4.union(&self.ipv6).copied().collect()
    }

    /// Takes in a look-up. A family without an answer keeps its addresses, and so do both when none is left: a name
    /// that stood for something is not believed to stand for nothing.
    pub(super) fn after(&self, answers: Answers) -> Self {
        let (mut fresh, mut problem) = (FRESH_MAX, None);
        let mut take = |answer: Option<Answer>, before: &BTreeSet<IpAddr>| match answer {
            Some(Ok((addresses, good_for))) => {
                fresh = fresh.min(good_for);
                addresses
            }
            Some(Err(text)) => {
                problem.get_or_insert(text);
                before.clone()
            }
            None => BTreeSet::new(),
        };
        let (ipv4, ipv6) = (take(answers.ipv4, &self.ipv4), take(answers.ipv6, &self.ipv6));
        let nothing = ipv4.is_empty() && ipv6.is_empty();
        if nothing && problem.is_none() {
            problem = Some("it has no address of a family that a listener has".to_owned());
        }
        let fresh_for = problem.is_none().then(|| fresh.max(FRESH_MIN));
        let (ipv4, ipv6) = if nothing { (self.ipv4.clone(), self.ipv6.clone()) } else { (ipv4, ipv6) };
        Self { ipv4, ipv6, asked: true, problem, fresh_for }
    }

    /// What the operator should know.
    pub(super) fn sentence(&self, host: &str) -> Option<String> {
        let meanwhile = match self.addresses().is_empty() {
            true => "its backend is left out until it is known".to_owned(),
            false => format!("its last addresses are used: {}", listed(&self.addresses())),
        };
        match &self.problem {
            Some(problem) => Some(format!("cannot look up {host}: {problem}; {meanwhile}")),
            None if !self.asked => Some(format!("{host} is still being looked up; {meanwhile}")),
            None => None,
        }
    }

    /// Says what is different from before.
    pub(super) fn log(&self, before: &Self, host: &str) {
        if before.asked && before.addresses() != self.addresses() {
            tracing::info!("{host} is {} now", listed(&self.addresses()));
        }
        match (&self.problem, &before.problem) {
            (Some(problem), known) if known.as_ref() != Some(problem) => {
                tracing::warn!("{}", self.sentence(host).unwrap_or_default());
            }
            (None, Some(_)) => tracing::info!("{host} can be looked up again: {}", listed(&self.addresses())),
            _ => {}
        }
    }
}

fn listed(addresses: &BTreeSet<IpAddr>) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> BTreeSet<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn found(texts: &[&str], seconds: u64) -> Option<Answer> {
        Some(Ok((addresses(texts), Duration::from_secs(seconds))))
    }

    fn failed() -> Option<Answer> {
        Some(Err("no answer in time".to_owned()))
    }

    #[test]
    fn a_name_moves_and_what_is_known_follows() {
        let known = Known::default().after(Answers { ipv4: found(&["10.0.0.1"], 60), ipv6: None });
        assert_eq!(
            (known.addresses(), known.fresh_for),
            (addresses(&["10.0.0.1"]), Some(Duration::from_secs(60)))
        );
        assert_eq!(known.sentence("master-1"), None);
        let known = known.after(Answers { ipv4: found(&["10.0.0.2"], 0), ipv6: None });
        assert_eq!((known.addresses(), known.fresh_for), (addresses(&["10.0.0.2"]), Some(FRESH_MIN)));
        let known = known.after(Answers { ipv4: found(&["10.0.0.2"], 86_400), ipv6: None });
        assert_eq!(known.fresh_for, Some(FRESH_MAX));
    }

    #[test]
    fn the_last_good_answer_is_kept_family_by_family() {
        let both =
            Known::default().after(Answers { ipv4: found(&["10.0.0.1"], 60), ipv6: found(&["fd00::1"], 60) });
        let kept = both.after(Answers { ipv4: failed(), ipv6: found(&["fd00::2"], 60) });
        assert_eq!(kept.addresses(), addresses(&["10.0.0.1", "fd00::2"]));
        assert_eq!(kept.fresh_for, None, "asked again soon");
        let sentence = kept.sentence("master-1").unwrap();
        assert!(
            sentence.contains("no answer in time; its last addresses are used: 10.0.0.1, fd00::2"),
            "{sentence}"
        );

        let nothing = both.after(Answers { ipv4: found(&[], 60), ipv6: found(&[], 60) });
        assert_eq!(nothing.addresses(), both.addresses());
        assert!(nothing.sentence("master-1").is_some());
        let one_family_gone = both.after(Answers { ipv4: found(&["10.0.0.1"], 60), ipv6: found(&[], 60) });
        assert_eq!(one_family_gone.addresses(), addresses(&["10.0.0.1"]));
    }

    #[test]
    fn a_name_that_never_stood_for_anything_says_so() {
        assert!(Known::default().sentence("master-1").unwrap().contains("still being looked up"));
        let known = Known::default().after(Answers { ipv4: failed(), ipv6: None });
        assert!(known.sentence("master-1").unwrap().contains("left out until it is known"));
    }
}
