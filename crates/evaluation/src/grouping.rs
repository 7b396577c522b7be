//! How near a grouping of texts is to the true one, as puzzles of the kind of Only Connect's walls are scored (Taati et al. 2023,
//! arXiv 2306.11167): 16 words, four groups of four. Groups are found by embeddings: equally large ones whose members are near to
//! each other.
//!
//! ```text
//! n_ij       texts of true group i that are in found group j,  a_i and b_j its sums,  pairs(n) = n (n - 1) / 2
//! FM         Σ pairs(n_ij) / √(Σ pairs(a_i) Σ pairs(b_j))                                Fowlkes and Mallows 1983
//! ARI        (Σ pairs(n_ij) - e) / ((Σ pairs(a_i) + Σ pairs(b_j)) / 2 - e),  e = Σ pairs(a_i) Σ pairs(b_j) / pairs(n)
//! AMI        (MI - E[MI]) / ((H(a) + H(b)) / 2 - E[MI])                                    Vinh, Epps and Bailey 2010
//! WD         mean over groups of min(1, distance), 0 for found groups that are whole ones
//! ```
//! WD is the authors' code's: found groups as lists of true numbers, groups that are in both left out, the others compared in
//! their order by Wasserstein's distance between numbers. It depends on that order, which is here that of their first texts.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Random starts of a grouping; chosen by us.
const STARTS: usize = 32;

/// How near a grouping is to the true one.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Grouping {
    /// Groups that were found whole.
    pub groups: usize,
    /// Whether all were.
    pub solved: bool,
    /// See above: 0 is best, 1 worst.
    pub wasserstein: f64,
    /// Fowlkes and Mallows: 1 is best.
    pub fowlkes_mallows: f64,
    /// Adjusted Rand index: 1 is best, 0 chance.
    pub ari: f64,
    /// Adjusted mutual information: 1 is best, 0 chance.
    pub ami: f64,
}

impl Grouping {
    /// Of texts in order: the group that each belongs to, and the one it was found in. Numbers of groups may be any.
    ///
    /// # Panics
    /// If there is no text, or not as many of both.
    pub fn of(truth: &[usize], found: &[usize]) -> Self {
        assert!(!truth.is_empty() && truth.len() == found.len(), "a group and a found group for each text");
        let [(truth, rows), (found, columns)] = [numbered(truth), numbered(found)];
        let mut table = vec![vec![0; columns.len()]; rows.len()];
        truth.iter().zip(&found).for_each(|(&i, &j)| table[i][j] += 1);
        let counts = Counts { n: truth.len(), table, rows, columns };
        let groups = counts.whole();
        Self {
            groups,
            solved: groups == counts.rows.len() && groups == counts.columns.len(),
            wasserstein: wasserstein(&truth, &found, counts.rows.len()),
            fowlkes_mallows: counts.fowlkes_mallows(),
            ari: counts.ari(),
            ami: counts.ami(),
        }
    }
}

/// Groups numbered by their first texts, with the size of each.
fn numbered(groups: &[usize]) -> (Vec<usize>, Vec<usize>) {
    let (mut names, mut sizes): (Vec<usize>, Vec<usize>) = (Vec::new(), Vec::new());
    let number = |name: &usize| {
        let number = names.iter().position(|known| known == name).unwrap_or(names.len());
        if number == names.len() {
            names.push(*name);
            sizes.push(0);
        }
        sizes[number] += 1;
        number
    };
    (groups.iter().map(number).collect(), sizes)
}

/// How many texts true and found groups share.
struct Counts {
    n: usize,
    /// `[true groups][found groups]`
    table: Vec<Vec<usize>>,
    /// Sizes of the true groups.
    rows: Vec<usize>,
    /// Sizes of the found groups.
    columns: Vec<usize>,
}

impl Counts {
    /// Shared texts with the sizes of both groups, where there are some.
    fn cells(&self) -> impl Iterator<Item = [usize; 3]> {
        let row = move |(row, &a): (&Vec<usize>, &usize)| {
            let cell = |(&n, &b): (&usize, &usize)| [n, a, b];
            row.iter().zip(&self.columns).map(cell).filter(|[n, ..]| *n > 0).collect::<Vec<_>>()
        };
        self.table.iter().zip(&self.rows).flat_map(row)
    }

    fn whole(&self) -> usize {
        self.cells().filter(|[n, a, b]| n == a && n == b).count()
    }

    /// Pairs of texts that are together in both, in truth, and as found.
    fn pairs(&self) -> [f64; 3] {
        let pairs = |n: usize| (n * n.saturating_sub(1)) as f64 / 2.0;
        let all = |sizes: &[usize]| sizes.iter().map(|&size| pairs(size)).sum();
        [self.cells().map(|[n, ..]| pairs(n)).sum(), all(&self.rows), all(&self.columns)]
    }

    fn fowlkes_mallows(&self) -> f64 {
        let [both, truth, found] = self.pairs();
        if both == 0.0 { 0.0 } else { both / (truth * found).sqrt() }
    }

    fn ari(&self) -> f64 {
        let [both, truth, found] = self.pairs();
        let chance = truth * found / ((self.n * (self.n - 1)) as f64 / 2.0).max(1.0);
        adjusted(both, (truth + found) / 2.0, chance)
    }

    fn ami(&self) -> f64 {
        let n = self.n as f64;
        let entropy =
            |sizes: &[usize]| -> f64 { -sizes.iter().map(|&a| a as f64 / n * (a as f64 / n).ln()).sum::<f64>() };
        let information = |count: f64, a: f64, b: f64| count / n * (n * count / (a * b)).ln();
        let found: f64 = self.cells().map(|[count, a, b]| information(count as f64, a as f64, b as f64)).sum();
        // Every number of shared texts that groups of these sizes can have, by its hypergeometric probability.
        let logs: Vec<f64> = std::iter::once(0.0)
            .chain((1..=self.n).scan(0.0, |sum, at| {
                *sum += (at as f64).ln();
                Some(*sum)
            }))
            .collect();
        let mut chance = 0.0;
        for (&a, &b) in self.rows.iter().flat_map(|a| self.columns.iter().map(move |b| (a, b))) {
            for count in (a + b).saturating_sub(self.n).max(1)..=a.min(b) {
                let above = logs[a] + logs[b] + logs[self.n - a] + logs[self.n - b];
                let below = [self.n, count, a - count, b - count, self.n + count - a - b].map(|at| logs[at]);
                let probability = (above - below.iter().sum::<f64>()).exp();
                chance += probability * information(count as f64, a as f64, b as f64);
            }
        }
        adjusted(found, (entropy(&self.rows) + entropy(&self.columns)) / 2.0, chance)
    }
}

/// What is found beyond chance, as a share of what can be; 1 where chance finds all.
fn adjusted(found: f64, most: f64, chance: f64) -> f64 {
    if (most - chance).abs() < 1e-12 { 1.0 } else { (found - chance) / (most - chance) }
}

/// See the head of the file.
fn wasserstein(truth: &[usize], found: &[usize], groups: usize) -> f64 {
    let lists = |of: &[usize]| {
        let mut lists = vec![Vec::new(); of.iter().max().map_or(0, |last| last + 1)];
        of.iter().zip(truth).for_each(|(&group, &number)| lists[group].push(number));
        lists.iter_mut().for_each(|list: &mut Vec<usize>| list.sort_unstable());
        lists
    };
    let (ours, theirs) = (lists(found), lists(truth));
    let left = |all: &[Vec<usize>], others: &[Vec<usize>]| -> Vec<Vec<usize>> {
        all.iter().filter(|list| !others.contains(list)).cloned().collect()
    };
    let pairs = left(&ours, &theirs).into_iter().zip(left(&theirs, &ours));
    pairs.map(|(ours, theirs)| distance(&ours, &theirs).min(1.0)).sum::<f64>() / groups as f64
}

/// Wasserstein's distance between two sets of sorted numbers: the area between their distribution functions.
fn distance(ours: &[usize], theirs: &[usize]) -> f64 {
    let share = |of: &[usize], at: usize| of.partition_point(|&number| number <= at) as f64 / of.len() as f64;
    let last = ours.iter().chain(theirs).max().copied().unwrap_or(0);
    (0..last).map(|at| (share(ours, at) - share(theirs, at)).abs()).sum()
}

/// Equally large groups of embeddings whose members are near to each other: the sum of the squared distances within groups is the
/// smallest that exchanging two texts at a time finds, from several starts that depend on nothing else.
///
/// # Shapes
/// - embeddings: `[texts, dim]`
///
/// # Panics
/// If the texts cannot be divided into so many groups.
pub fn grouped(embeddings: &[f32], dim: usize, groups: usize) -> Vec<usize> {
    let n = embeddings.len() / dim;
    assert!(groups > 0 && n.is_multiple_of(groups), "{n} texts cannot be {groups} groups of one size");
    let row = |at: usize| &embeddings[at * dim..(at + 1) * dim];
    let squared = |a: usize, b: usize| row(a).iter().zip(row(b)).map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>();
    let distances: Vec<Vec<f64>> = (0..n).map(|a| (0..n).map(|b| squared(a, b)).collect()).collect();
    let start = |seed: usize| {
        let mut group: Vec<usize> = (0..n).map(|text| text * groups / n).collect();
        group.shuffle(&mut ChaCha8Rng::seed_from_u64(seed as u64));
        let cost = descend(&mut group, groups, &distances);
        (cost, group)
    };
    let best = (0..STARTS).map(start).min_by(|a, b| a.0.total_cmp(&b.0));
    best.map(|(_, group)| group).unwrap_or_default()
}

/// Exchanges two texts as long as that brings members nearer to each other; gives the sum of their distances.
fn descend(group: &mut [usize], groups: usize, distances: &[Vec<f64>]) -> f64 {
    let n = group.len();
    // Of each text to the members of each group.
    let mut sums = vec![vec![0.0; groups]; n];
    for (sums, distances) in sums.iter_mut().zip(distances) {
        group.iter().zip(distances).for_each(|(&group, distance)| sums[group] += distance);
    }
    loop {
        let mut moved = false;
        for a in 0..n {
            for b in a + 1..n {
                let (of_a, of_b) = (group[a], group[b]);
                let now = sums[a][of_a] + sums[b][of_b];
                let then = sums[a][of_b] + sums[b][of_a] - 2.0 * distances[a][b];
                // By more than what rounding leaves of the changes below.
                if of_a != of_b && then < now - 1e-9 * (1.0 + now) {
                    group.swap(a, b);
                    for (sums, distances) in sums.iter_mut().zip(distances) {
                        let change = distances[b] - distances[a];
                        (sums[of_a], sums[of_b]) = (sums[of_a] + change, sums[of_b] - change);
                    }
                    moved = true;
                }
            }
        }
        if !moved {
            return sums.iter().zip(&*group).map(|(sums, &group)| sums[group]).sum();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_together_is_found_together_in_groups_of_one_size() {
        // Four places, around each of which four texts lie, and one text of each group astray by less than half of the way.
        let truth: Vec<usize> = (0..16).map(|text| text * 7 % 16 / 4).collect();
        let place = |group: usize| [(group % 2) as f32, (group / 2) as f32];
        let astray = |text: usize| 0.05 * ((text * 37 % 11) as f32 - 5.0) / 5.0;
        let embeddings: Vec<f32> = truth
            .iter()
            .enumerate()
            .flat_map(|(text, &group)| [place(group)[0] + astray(text), place(group)[1] + astray(text + 5)])
            .collect();
        let found = Grouping::of(&truth, &grouped(&embeddings, 2, 4));
        let perfect = Grouping { groups: 4, solved: true, wasserstein: 0.0, fowlkes_mallows: 1.0, ari: 1.0, ami: 1.0 };
        let near = |a: f64, b: f64| (a - b).abs() < 1e-12;
        assert!(found.solved && near(found.ami, 1.0) && Grouping { ami: 1.0, ..found } == perfect, "{found:?}");
        // Groups are of one size even where texts are not: five near each other are torn apart.
        let line: Vec<f32> = [0.0, 0.1, 0.2, 0.3, 0.4, 9.0, 9.1, 9.2].to_vec();
        let found = grouped(&line, 1, 2);
        assert_eq!(found.iter().filter(|&&group| group == found[7]).count(), 4);
        assert_eq!([5, 6, 7].map(|text| found[text]), [found[4]; 3], "the nearest one joins the three");
    }

    #[test]
    fn names_of_groups_do_not_matter_and_one_group_is_no_grouping() {
        let truth = [0, 0, 1, 1, 2, 2];
        let found = [5, 5, 9, 1, 9, 1];
        let renamed = Grouping::of(&[7, 7, 3, 3, 0, 0], &[1, 1, 0, 2, 0, 2]);
        assert_eq!(Grouping::of(&truth, &found), renamed);
        assert_eq!((renamed.groups, renamed.solved), (1, false));
        let all = Grouping::of(&truth, &[4; 6]);
        assert!(all.ari.abs() < 1e-12 && all.ami.abs() < 1e-12 && all.groups == 0, "{all:?}");
    }
}
