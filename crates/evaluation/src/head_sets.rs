//! Sets of heads: the largest by a score, how far two of them agree, and how they change over the checkpoints of a run (after arXiv
//! 2509.25758, whose code is not published; the score there is that of circuits, here it is any).

use std::collections::BTreeSet;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// A head with its layer.
pub type HeadOf = (usize, usize);

/// The `count` heads of the largest scores; of equal ones the first.
pub fn largest(scores: &[(HeadOf, f64)], count: usize) -> BTreeSet<HeadOf> {
    let mut order: Vec<&(HeadOf, f64)> = scores.iter().collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    order.into_iter().take(count).map(|(head, _)| *head).collect()
}

/// As many heads, drawn from all: what any set has to be compared with.
pub fn random(all: &[HeadOf], count: usize, seed: u64) -> BTreeSet<HeadOf> {
    let mut all = all.to_vec();
    all.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    all.into_iter().take(count).collect()
}

/// The shares of two sets that they have in common: of both together (Jaccard), and of the first. 1 for two empty ones.
pub fn overlap<T: Ord>(a: &BTreeSet<T>, b: &BTreeSet<T>) -> [f64; 2] {
    let common = a.intersection(b).count() as f64;
    let share = |all: usize| if all == 0 { 1.0 } else { common / all as f64 };
    [share(a.union(b).count()), share(a.len())]
}

/// What became of a set by the next checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Turnover {
    /// Heads that were not in the set before.
    pub births: BTreeSet<HeadOf>,
    /// Heads that were, and are not now.
    pub deaths: BTreeSet<HeadOf>,
    /// Jaccard with the first set.
    pub jaccard: f64,
    /// How many of its heads were in a set first at each checkpoint so far: the cohorts.
    pub cohorts: Vec<usize>,
}

/// The turnover of sets in the order of their checkpoints, the first of which is the base.
pub fn turnover(sets: &[BTreeSet<HeadOf>]) -> Vec<Turnover> {
    let first_seen = |head: &HeadOf| sets.iter().position(|set| set.contains(head));
    let of = |at: usize| {
        let (set, before) = (&sets[at], &sets[at.saturating_sub(1)]);
        let mut cohorts = vec![0; at + 1];
        set.iter().filter_map(first_seen).for_each(|first| cohorts[first] += 1);
        Turnover {
            births: set.difference(before).copied().collect(),
            deaths: before.difference(set).copied().collect(),
            jaccard: overlap(&sets[0], set)[0],
            cohorts,
        }
    };
    (0..sets.len()).map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn births_deaths_and_cohorts_of_known_sets() {
        let set = |heads: &[usize]| heads.iter().map(|&head| (0, head)).collect::<BTreeSet<_>>();
        let found = turnover(&[set(&[1, 2]), set(&[2, 3]), set(&[3, 4, 1])]);
        assert_eq!([found[0].births.len(), found[0].deaths.len()], [0, 0]);
        assert_eq!((found[1].births.clone(), found[1].deaths.clone()), (set(&[3]), set(&[1])));
        // A head that comes back is of the cohort in which it was first seen.
        assert_eq!(found[2].births, set(&[1, 4]));
        assert_eq!(found[2].cohorts, [1, 1, 1]);
        assert_eq!(found.iter().map(|of| of.jaccard).collect::<Vec<_>>(), [1.0, 1.0 / 3.0, 0.25]);
        assert_eq!(overlap(&set(&[1, 2]), &set(&[2, 3, 4])), [0.25, 0.5]);
        let scores = [((0, 0), 1.0), ((0, 1), 3.0), ((1, 0), 3.0)];
        assert_eq!(largest(&scores, 1), BTreeSet::from([(0, 1)]));
        let all: Vec<HeadOf> = (0..9).map(|head| (0, head)).collect();
        assert_eq!(random(&all, 4, 1), random(&all, 4, 1));
        assert_ne!(random(&all, 4, 1), random(&all, 4, 2));
    }
}
