//! What is known of the list of one service. Pure.

use std::{collections::BTreeSet, net::SocketAddr, time::SystemTime};

use super::slices::Listed;

/// More than the masters that a cluster exchanges in a year.
const FORMER_MAX: usize = 32;

/// The last good list, and what came before and after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Known {
    /// `namespace/service`
    pub(super) origin: String,
    /// None: there never was one.
    pub(super) list: Option<BTreeSet<SocketAddr>>,
    /// Those that lists before it had: asked when nobody else answers. Apiservers that restarted in turn may have left a list
    /// of one that died after them.
    pub(super) former: BTreeSet<SocketAddr>,
    /// Somebody was asked, with or without success.
    pub(super) asked: bool,
    /// The apiserver that tells of changes, while one does.
    pub(super) through: Option<SocketAddr>,
    /// When the list was last heard of.
    pub(super) heard: Option<SystemTime>,
    /// Why nobody tells, or what was told is not believed.
    problem: Option<String>,
    /// What of the list is of no use.
    junk: Option<String>,
}

impl Known {
    /// Nothing yet, but what a daemon before this one knew last.
    pub(super) fn remembered(origin: String, list: Option<BTreeSet<SocketAddr>>) -> Self {
        let former = BTreeSet::new();
        Self { origin, list, former, asked: false, through: None, heard: None, problem: None, junk: None }
    }

    /// Who was listed before that.
    pub(super) fn after(self, former: BTreeSet<SocketAddr>) -> Self {
        Self { former, ..self }
    }

    /// The list as `through` tells it. One that is not to be believed leaves the one before.
    pub(super) fn told(&self, through: SocketAddr, told: Result<Listed, String>, now: SystemTime) -> Self {
        let known = Self { asked: true, through: Some(through), heard: Some(now), ..self.clone() };
        match told {
            Ok(Listed { addresses, junk }) => {
                let mut former: BTreeSet<_> =
                    self.former.iter().chain(self.list.iter().flatten()).copied().collect();
                former.retain(|address| !addresses.contains(address));
                while former.len() > FORMER_MAX {
                    former.pop_first();
                }
                Self { list: Some(addresses), former, problem: None, junk, ..known }
            }
            Err(problem) => Self { problem: Some(problem), ..known },
        }
    }

    /// Nobody has told anything.
    pub(super) fn untold(&self, problem: String) -> Self {
        Self { asked: true, through: None, problem: Some(problem), ..self.clone() }
    }

    /// Who told does not any more, and another is to be asked.
    pub(super) fn left(&self) -> Self {
        Self { through: None, ..self.clone() }
    }

    /// Why nobody tells, in words.
    pub(super) fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// What the operator should know.
    pub(super) fn sentences(&self) -> Vec<String> {
        let Self { origin, list, .. } = self;
        let meanwhile = match list {
            None => "there is no list from before: the backends of the file are used".to_owned(),
            Some(list) => format!("the last list is used: {}", listed(list)),
        };
        let problem = self.problem.as_ref().map(|problem| {
            format!("cannot learn from the cluster which backends {origin} has: {problem}; {meanwhile}")
        });
        let junk = self.junk.as_ref().map(|junk| format!("{origin}: {junk}, and is left out"));
        problem.into_iter().chain(junk).collect()
    }

    /// Says what is different from before.
    pub(super) fn log(&self, before: &Self) {
        let origin = &self.origin;
        if let Some(list) = self.list.as_ref().filter(|list| before.list.as_ref() != Some(list)) {
            tracing::info!("{origin} lists {}", listed(list));
        }
        let known = before.sentences();
        for sentence in self.sentences().iter().filter(|sentence| !known.contains(sentence)) {
            tracing::warn!("{sentence}");
        }
        if let (None, Some(_), Some(through)) = (&self.problem, &before.problem, self.through) {
            tracing::info!("{origin}: {through} tells the list again");
        }
    }
}

/// For people: all of a few, and the number of many.
fn listed(list: &BTreeSet<SocketAddr>) -> String {
    const SHOWN: usize = 9;
    if list.is_empty() {
        return "no addresses".to_owned();
    }
    let mut texts: Vec<_> = list.iter().take(SHOWN).map(ToString::to_string).collect();
    if list.len() > SHOWN {
        texts.push(format!("and {} more", list.len() - SHOWN));
    }
    texts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(last: &[u8]) -> Result<Listed, String> {
        let addresses = last.iter().map(|last| ([10, 0, 0, *last], 6443).into()).collect();
        Ok(Listed { addresses, junk: None })
    }

    #[test]
    fn the_last_good_list_is_kept_whatever_comes_after_it() {
        let (now, through) = (SystemTime::now(), ([10, 0, 0, 1], 6443).into());
        let nothing = Known::remembered("default/kubernetes".to_owned(), None);
        assert!(nothing.sentences().is_empty() && !nothing.asked);
        let untold = nothing.untold("10.0.0.1:6443: Connection refused".to_owned());
        assert_eq!(
            untold.sentences(),
            [
                "cannot learn from the cluster which backends default/kubernetes has: 10.0.0.1:6443: Connection \
                 refused; there is no list from before: the backends of the file are used"
            ]
        );
        let good = untold.told(through, list(&[1, 2]), now);
        assert!(good.sentences().is_empty(), "{:?}", good.sentences());
        assert_eq!((good.through, good.heard), (Some(through), Some(now)));
        for bad in
            [good.told(through, Err("junk".to_owned()), now), good.untold("gone".to_owned()), good.left()]
        {
            assert_eq!(bad.list, good.list);
        }
        let said = good.told(through, Err("junk".to_owned()), now).sentences();
        assert!(
            said[0].ends_with("has: junk; the last list is used: 10.0.0.1:6443, 10.0.0.2:6443"),
            "{said:?}"
        );
    }

    #[test]
    fn who_was_listed_is_not_forgotten_for_a_while() {
        let (now, through) = (SystemTime::now(), ([10, 0, 0, 1], 6443).into());
        let at = |last: u8| SocketAddr::from(([10, 0, 0, last], 6443));
        let nothing = Known::remembered("default/kubernetes".to_owned(), None);
        let known = nothing.told(through, list(&[1, 2, 3]), now).told(through, list(&[1, 2]), now);
        assert_eq!(known.former, BTreeSet::from([at(3)]));
        let known = known.told(through, list(&[3]), now);
        assert_eq!(known.former, BTreeSet::from([at(1), at(2)]));
        let known = (1..=200).fold(known, |known, last| known.told(through, list(&[last]), now));
        assert_eq!(known.former.len(), FORMER_MAX);
    }

    #[test]
    fn many_are_not_all_said() {
        let Ok(Listed { addresses, .. }) = list(&Vec::from_iter(1..=100)) else { unreachable!() };
        assert!(listed(&addresses).ends_with("10.0.0.9:6443, and 91 more"));
    }
}
