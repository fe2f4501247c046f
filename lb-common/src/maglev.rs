//! Maglev's selection table (Eisenbud et al., NSDI 2016, §3.4), with weights.
//!
//! Each member has a permutation of the table's entries, from its name alone, and members take turns to claim
//! the next entry of theirs that is still empty. Every load balancer that knows the same names and weights
//! builds the same table, and taking one member away moves few flows of the others.

/// Entries of a selection table: the paper's M for up to 655 members at 1 % imbalance. Prime.
pub const TABLE_SIZE: u32 = 65_537;

/// A backend that takes part, and how far along its permutation it is.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    offset: u32,
    skip: u32,
    next: u32,
    weight: u32,
    credit: u32,
}

impl Member {
    /// A member of a table of `size` entries: its permutation follows from its name.
    #[must_use]
    pub fn new(name: &str, weight: u32, size: u32) -> Self {
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3) // FNV-1a
        });
        let offset = crate::hash::split_mix(hash);
        let skip = crate::hash::split_mix(!hash);
        Self::with_permutation(
            (offset % u64::from(size)) as u32,
            (skip % u64::from(size - 1)) as u32 + 1,
            weight,
        )
    }

    /// A member with a given permutation, `(offset + j · skip) mod size`.
    #[must_use]
    pub const fn with_permutation(offset: u32, skip: u32, weight: u32) -> Self {
        Self { offset, skip, next: offset, weight, credit: 0 }
    }
}

/// Fills `table`, whose length must be prime, with indexes into `members`.
///
/// Members should be in an order that all load balancers agree on: sorted by name. A member of weight 0 gets
/// nothing. Without any member of weight above 0 the table is left alone and the answer is false.
pub fn fill(members: &mut [Member], table: &mut [u16]) -> bool {
    const EMPTY: u16 = u16::MAX;
    let heaviest = members.iter().map(|member| member.weight).max().unwrap_or(0);
    if heaviest == 0 {
        return false;
    }
    let size = table.len() as u32;
    for member in members.iter_mut() {
        (member.next, member.credit) = (member.offset, 0);
    }
    table.fill(EMPTY);
    let mut filled = 0;
    loop {
        for (index, member) in members.iter_mut().enumerate() {
            // A member takes weight turns for every `heaviest` of the heaviest one's.
            member.credit += member.weight;
            if member.credit < heaviest {
                continue;
            }
            member.credit -= heaviest;
            while table[member.next as usize] != EMPTY {
                member.next = (member.next + member.skip) % size;
            }
            table[member.next as usize] = index as u16;
            filled += 1;
            if filled == size {
                return true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn named(count: usize) -> Vec<Member> {
        (0..count).map(|index| Member::new(&format!("backend-{index:04}"), 1, TABLE_SIZE)).collect()
    }

    fn shares(table: &[u16], members: usize) -> Vec<u32> {
        let mut shares = vec![0; members];
        for index in table {
            shares[usize::from(*index)] += 1;
        }
        shares
    }

    #[test]
    fn table_1_of_the_paper() {
        let all = [(3, 4), (0, 2), (3, 1)].map(|(offset, skip)| Member::with_permutation(offset, skip, 1));
        let mut table = [0; 7];
        assert!(fill(&mut all.clone(), &mut table));
        assert_eq!(table, [1, 0, 1, 0, 2, 2, 0]);
        assert!(fill(&mut [all[0], all[2]], &mut table));
        assert_eq!(table.map(|index| [0, 2][usize::from(index)]), [0, 0, 0, 0, 2, 2, 2]);
    }

    #[test]
    fn a_thousand_backends_get_65_or_66_entries_each() {
        let mut table = vec![0; TABLE_SIZE as usize];
        assert!(fill(&mut named(1000), &mut table));
        assert!(shares(&table, 1000).iter().all(|share| (65..=66).contains(share)));
    }

    /// The paper's Figure 12 at M = 65,537: entries that moved from one living backend to another.
    #[test]
    fn excess_change_is_the_papers() {
        let everyone = named(1000);
        let mut before = vec![0; TABLE_SIZE as usize];
        assert!(fill(&mut everyone.clone(), &mut before));
        for (failed, percent) in [(1, 0.58), (10, 2.34), (30, 2.78), (50, 3.26)] {
            let trials = 12;
            let mut moved = 0;
            for trial in 0..trials {
                let dead = |index: usize| {
                    (0..failed).any(|number| {
                        // Distinct indexes, another choice in every trial.
                        (number * 19 + trial * 83 + 7) % 1000 == index
                    })
                };
                let alive: Vec<usize> = (0..1000).filter(|index| !dead(*index)).collect();
                assert_eq!(alive.len(), 1000 - failed);
                let mut members: Vec<_> = alive.iter().map(|index| everyone[*index]).collect();
                let mut after = vec![0; TABLE_SIZE as usize];
                assert!(fill(&mut members, &mut after));
                moved += before
                    .iter()
                    .zip(&after)
                    .filter(|(before, after)| {
                        let before = usize::from(**before);
                        !dead(before) && before != alive[usize::from(**after)]
                    })
                    .count();
            }
            let measured = moved as f64 * 100.0 / f64::from(TABLE_SIZE) / trials as f64;
            println!("{failed} of 1000 failed: {measured:.2} % excess change, the paper has {percent} %");
            assert!((measured / percent - 1.0).abs() < 0.2, "{failed} failed: {measured} %, not {percent} %");
        }
    }

    #[test]
    fn three_masters_share_evenly_and_removing_one_moves_few_others() {
        let names = ["master-1", "master-2", "master-3"];
        let members = names.map(|name| Member::new(name, 1, TABLE_SIZE));
        let mut before = vec![0; TABLE_SIZE as usize];
        assert!(fill(&mut members.clone(), &mut before));
        assert!(shares(&before, 3).iter().all(|share| (21_845..=21_846).contains(share)));
        let mut after = vec![0; TABLE_SIZE as usize];
        assert!(fill(&mut [members[0], members[2]], &mut after));
        let moved = before
            .iter()
            .zip(&after)
            .filter(|(before, after)| **before != 1 && **before != [0, 2][usize::from(**after)])
            .count();
        assert!(moved < 700, "{moved} of {TABLE_SIZE} moved"); // facts: 0.36 % in the worst of 200 seeds, at 1 %
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn shares_follow_weights(weights in proptest::collection::vec(0u32..=256, 1..12)) {
            let mut members: Vec<_> = weights.iter().enumerate()
                .map(|(index, weight)| Member::new(&format!("b{index}"), *weight, TABLE_SIZE)).collect();
            let mut table = vec![0; TABLE_SIZE as usize];
            let total: u32 = weights.iter().sum();
            prop_assert_eq!(fill(&mut members, &mut table), total > 0);
            if total > 0 {
                for (share, weight) in shares(&table, weights.len()).iter().zip(&weights) {
                    let fair = f64::from(TABLE_SIZE) * f64::from(*weight) / f64::from(total);
                    // Each member may be a turn behind its due, and what they leave goes to all by their weights.
                    let left = weights.len() as f64 * f64::from(*weight) / f64::from(total);
                    prop_assert!((f64::from(*share) - fair).abs() <= 2.0 + left, "{share} for {fair}");
                }
            }
        }
    }
}
