//! Words of a finite group: behind a token that begins, elements; at each, the product of all elements so far.
//!
//! Elements are permutations in lexicographic order, of A groups the even ones; of A4 x Z5, 5 a + z. `a·b` is "b first, then a".

use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::sets::{Rules, labels, rule};
use super::super::{Side, Task, below};
use crate::batches::Sample;

/// A finite group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)] // the names say it
pub enum Group {
    S3,
    S4,
    S5,
    A4,
    A5,
    Z60,
    A4xZ5,
}

impl Group {
    /// Whether it is all permutations of some things.
    pub fn is_symmetric(self) -> bool {
        matches!(self, Self::S3 | Self::S4 | Self::S5)
    }

    /// The permutations that it is made of, in their order; none for Z60.
    fn permutations(self) -> Vec<Vec<u8>> {
        let (n, even) = match self {
            Self::S3 => (3, false),
            Self::S4 => (4, false),
            Self::S5 => (5, false),
            Self::A4 | Self::A4xZ5 => (4, true),
            Self::A5 => (5, true),
            Self::Z60 => return Vec::new(),
        };
        let mut all = lexicographic(n);
        all.retain(|permutation| !even || inversions(permutation).is_multiple_of(2));
        all
    }

    /// `[a][b]` is `a·b`.
    pub fn table(self) -> Vec<Vec<u32>> {
        let all = self.permutations();
        let product = |a: &[u8], b: &[u8]| {
            let both: Vec<u8> = b.iter().map(|&to| a[to as usize]).collect();
            all.iter().position(|permutation| *permutation == both).unwrap_or_default() as u32
        };
        let of_permutations: Vec<Vec<u32>> = all.iter().map(|a| all.iter().map(|b| product(a, b)).collect()).collect();
        match self {
            Self::Z60 => (0..60).map(|a| (0..60).map(|b| (a + b) % 60).collect()).collect(),
            Self::A4xZ5 => {
                let pair = |a: usize, b: usize| 5 * of_permutations[a / 5][b / 5] + ((a % 5 + b % 5) % 5) as u32;
                (0..60).map(|a| (0..60).map(|b| pair(a, b)).collect()).collect()
            }
            _ => of_permutations,
        }
    }

    /// The identity and the swaps of two.
    fn swaps(self) -> Vec<u32> {
        let moved = |permutation: &Vec<u8>| (0..).zip(permutation).filter(|(at, to)| at != *to).count();
        let all = self.permutations();
        (0..).zip(&all).filter(|(_, permutation)| matches!(moved(permutation), 0 | 2)).map(|(id, _)| id).collect()
    }
}

/// All permutations of `0..n` in lexicographic order.
fn lexicographic(n: u8) -> Vec<Vec<u8>> {
    let mut all = vec![Vec::new()];
    for _ in 0..n {
        let longer = |begun: &Vec<u8>| {
            let begun = begun.clone();
            (0..n).filter(move |next| !begun.contains(next)).collect::<Vec<u8>>()
        };
        all = all
            .iter()
            .flat_map(|begun| {
                longer(begun).into_iter().map(|next| [begun.as_slice(), &[next]].concat()).collect::<Vec<_>>()
            })
            .collect();
    }
    all
}

fn inversions(permutation: &[u8]) -> usize {
    let behind = |(at, a): (usize, &u8)| permutation[at + 1..].iter().filter(|&b| b < a).count();
    permutation.iter().enumerate().map(behind).sum()
}

/// Words of one size.
#[derive(Debug, Clone, PartialEq)]
pub struct Words {
    /// `[a][b]` is `a·b`.
    pub table: Vec<Vec<u32>>,
    /// Elements of a word.
    pub k: usize,
    /// The elements that words are made of.
    pub alphabet: Vec<u32>,
}

impl Words {
    /// Words of all elements of a group, or of its swaps.
    pub fn new(group: Group, k: usize, swaps: bool) -> Self {
        let table = group.table();
        let alphabet = if swaps { group.swaps() } else { (0..table.len() as u32).collect() };
        Self { table, k, alphabet }
    }

    /// The token that begins a word: behind the elements come PAD and BOS.
    fn begin(&self) -> u32 {
        self.table.len() as u32 + 1
    }
}

impl Task for Words {
    /// Elements, PAD, BOS, UNK, EOS, SEP, CLS, MASK.
    fn n_ids(&self) -> usize {
        self.table.len() + 7
    }

    fn row(&self, rng: &mut ChaCha8Rng, _: usize, _: Side) -> Sample {
        let begin = self.begin();
        let (mut tokens, mut targets, mut product) = (vec![begin], vec![i64::from(begin)], 0u32);
        for _ in 0..self.k {
            let element = self.alphabet[below(rng, self.alphabet.len()) as usize];
            product = self.table[product as usize][element as usize];
            tokens.push(element);
            targets.push(i64::from(product));
        }
        Sample { tokens, targets, ..Sample::default() }
    }
}

impl Rules for Words {
    fn check(&self, row: &Sample, _side: Side) -> Result<(), String> {
        let begin = self.begin();
        let labels = labels(row, self.k + 1, self.n_ids())?;
        rule(labels.len() == self.k + 1, || "every position has a target".into())?;
        let first = (row.tokens[0], labels[0].1);
        rule(first == (begin, begin), || format!("a word begins with {begin} and predicts it, not {first:?}"))?;
        let elements = &row.tokens[1..];
        let strange = elements.iter().find(|id| !self.alphabet.contains(id));
        rule(strange.is_none(), || format!("{} is no element", strange.copied().unwrap_or_default()))?;
        for at in 0..self.k {
            // From the right: another way than that of the generator.
            let right = |product: u32, &element: &u32| self.table[element as usize][product as usize];
            let wanted = elements[..at].iter().rev().fold(elements[at], right);
            let found = labels[at + 1].1;
            rule(found == wanted, || format!("position {}: the product is {wanted}, not {found}", at + 1))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_obey_their_laws() {
        let groups = [Group::S3, Group::S4, Group::S5, Group::A4, Group::A5, Group::Z60, Group::A4xZ5];
        for (group, order) in groups.into_iter().zip([6, 24, 120, 12, 60, 60, 60]) {
            let table = group.table();
            assert_eq!(table.len(), order, "{group:?}");
            for a in 0..order {
                assert_eq!((table[0][a], table[a][0]), (a as u32, a as u32), "{group:?}: 0 is the identity");
                let mut row = table[a].clone();
                row.sort_unstable();
                assert!(row.into_iter().eq(0..order as u32), "{group:?}: rows are permutations");
                for (b, c) in [(1, order - 1), (order / 2, 2), (a, 3)] {
                    let ab_c = table[table[a][b] as usize][c];
                    assert_eq!(ab_c, table[a][table[b][c] as usize], "{group:?} is associative");
                }
            }
        }
        assert_eq!(Group::S5.swaps().len(), 11);
    }
}
