//! The heads of a key or value projection: how alike they are, how they cluster, how several become one.
//!
//! Agglomeration is Ward's (1963): merging two clusters costs what their distance to their means grows by. Similarity by CKA
//! (Kornblith et al. 2019, arXiv 1905.00414) is reported only: it does not see rotations inside a head, by which two heads may
//! be orthogonal as vectors, and a sum of heads is nothing to either of them then.

use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::weights::Named;

/// How several heads become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Pool {
    /// Their mean (Ainslie et al. 2023, arXiv 2305.13245).
    #[default]
    Mean,
    /// The first of them.
    First,
    /// Their mean, as long as they were on average: nearly orthogonal heads shrink by the root of their number.
    NormRestoring,
}

/// Whether a set of heads makes keys or values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cell {
    /// Of the key projection.
    Keys,
    /// Of the value projection.
    Values,
}

impl Cell {
    /// The projection's name in its layer.
    pub fn projection(self) -> &'static str {
        match self {
            Self::Keys => "k_proj",
            Self::Values => "v_proj",
        }
    }
}

/// The heads of a projection: each `[width, inputs]`, row-major. A bias is one more input, so that whatever is done to heads
/// is done to their biases.
#[derive(Debug, Clone, PartialEq)]
pub struct Heads {
    width: usize,
    biased: bool,
    heads: Vec<Vec<f64>>,
}

/// One step of agglomeration: the clusters of smallest members `a < b` become one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Merge {
    /// Smallest member of the first cluster.
    pub a: usize,
    /// Smallest member of the second cluster.
    pub b: usize,
    /// What the scatter grows by, as a share of all heads' squared norm.
    pub cost: f64,
}

impl Heads {
    /// The `n` heads of a projection: weight `[inputs, n * width]`, bias `[n * width]`.
    pub fn of(weight: &Named, bias: Option<&Named>, n: usize) -> Self {
        let (inputs, outputs) = (weight.shape[0], weight.shape[1]);
        let width = outputs / n;
        let row = |output: usize| {
            let column = (0..inputs).map(move |input| weight.values[input * outputs + output]);
            column.chain(bias.map(|bias| bias.values[output])).map(f64::from)
        };
        let head = |head: usize| (head * width..(head + 1) * width).flat_map(row).collect();
        Self { width, biased: bias.is_some(), heads: (0..n).map(head).collect() }
    }

    /// Weight `[inputs, n * width]` and bias `[n * width]` again.
    pub fn projection(&self) -> (Named, Option<Named>) {
        let columns = self.columns();
        let (inputs, outputs) = (columns - usize::from(self.biased), self.heads.len() * self.width);
        let at =
            |input: usize, output: usize| self.heads[output / self.width][output % self.width * columns + input] as f32;
        let values = (0..inputs * outputs).map(|i| at(i / outputs, i % outputs)).collect();
        let weight = Named { name: String::new(), shape: vec![inputs, outputs], values };
        let bias = self.biased.then(|| Named {
            name: String::new(),
            shape: vec![outputs],
            values: (0..outputs).map(|output| at(inputs, output)).collect(),
        });
        (weight, bias)
    }

    /// How many heads there are.
    pub fn len(&self) -> usize {
        self.heads.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }

    fn columns(&self) -> usize {
        self.heads.first().map_or(1, |head| head.len() / self.width)
    }

    /// One head for each label: the mean of those that carry it, or as `pool` says.
    pub fn pooled(&self, labels: &[usize], pool: Pool) -> Self {
        let groups = labels.iter().max().map_or(0, |last| last + 1);
        let fuse = |group: usize| {
            let members: Vec<&Vec<f64>> =
                self.heads.iter().zip(labels).filter(|&(_, &label)| label == group).map(|(head, _)| head).collect();
            let mean = combined(members.iter().map(|head| (1.0 / members.len() as f64, *head)));
            match pool {
                Pool::Mean => mean,
                Pool::First => members[0].clone(),
                Pool::NormRestoring => {
                    let length = members.iter().map(|head| square(head).sqrt()).sum::<f64>() / members.len() as f64;
                    let factor = length / square(&mean).sqrt().max(f64::MIN_POSITIVE);
                    mean.into_iter().map(|value| value * factor).collect()
                }
            }
        };
        Self { heads: (0..groups).map(fuse).collect(), ..*self }
    }

    /// One head for each label, by an operator `[n, n]` (row-major): the mean of what it makes of the heads that carry the
    /// label.
    pub fn collapsed(&self, labels: &[usize], operator: &[f64]) -> Self {
        let n = self.len();
        let mixed = |row: usize| combined((0..n).map(|j| (operator[row * n + j], &self.heads[j])));
        let mixed = Self { heads: (0..n).map(mixed).collect(), ..*self };
        mixed.pooled(labels, Pool::Mean)
    }

    /// Heads in another number and order: head `i` of the result is head `order[i]`.
    pub fn reordered(&self, order: &[usize]) -> Self {
        Self { heads: order.iter().map(|&head| self.heads[head].clone()).collect(), ..*self }
    }

    /// Agglomeration from single heads to one cluster. Of equally cheap merges, the one of the smallest members goes first.
    pub fn agglomerate(&self) -> Vec<Merge> {
        struct Cluster {
            smallest: usize,
            size: f64,
            mean: Vec<f64>,
        }
        let all: f64 = self.heads.iter().map(|head| square(head)).sum();
        let cost = |a: &Cluster, b: &Cluster| {
            let distance: f64 = a.mean.iter().zip(&b.mean).map(|(a, b)| (a - b) * (a - b)).sum();
            a.size * b.size / (a.size + b.size) * distance / all
        };
        let single = |(smallest, head): (usize, &Vec<f64>)| Cluster { smallest, size: 1.0, mean: head.clone() };
        let mut clusters: Vec<Cluster> = self.heads.iter().enumerate().map(single).collect();
        let mut costs: Vec<Vec<f64>> = clusters.iter().map(|a| clusters.iter().map(|b| cost(a, b)).collect()).collect();
        let mut merges = Vec::new();
        while clusters.len() > 1 {
            // Clusters stay sorted by their smallest member, so that the first of equal costs is the one that is wanted.
            let pairs = (0..clusters.len()).flat_map(|a| (a + 1..clusters.len()).map(move |b| (a, b)));
            let best = pairs.min_by(|&(a, b), &(c, d)| costs[a][b].total_cmp(&costs[c][d]));
            let Some((a, b)) = best else { break };
            merges.push(Merge { a: clusters[a].smallest, b: clusters[b].smallest, cost: costs[a][b] });
            let gone = clusters.remove(b);
            let kept = &mut clusters[a];
            let size = kept.size + gone.size;
            kept.mean = combined([(kept.size / size, &kept.mean), (gone.size / size, &gone.mean)].into_iter());
            kept.size = size;
            costs.remove(b);
            for row in &mut costs {
                row.remove(b);
            }
            for other in 0..clusters.len() {
                let cost = cost(&clusters[a], &clusters[other]);
                (costs[a][other], costs[other][a]) = (cost, cost);
            }
        }
        merges
    }

    /// `[n, n]`: linear CKA of heads as maps of the inputs.
    pub fn cka(&self) -> Vec<f64> {
        let columns = self.columns();
        let centred: Vec<Vec<f64>> = self
            .heads
            .iter()
            .map(|head| {
                let centre = |row: &[f64]| {
                    let mean = row.iter().sum::<f64>() / columns as f64;
                    row.iter().map(|value| value - mean).collect::<Vec<f64>>()
                };
                head.chunks(columns).flat_map(centre).collect()
            })
            .collect();
        let product = |a: &[f64], b: &[f64]| -> f64 {
            let rows = |x| <[f64]>::chunks(x, columns);
            rows(a).flat_map(|a| rows(b).map(move |b| wide_dot(a, b))).map(|entry| entry * entry).sum()
        };
        let own: Vec<f64> = centred.iter().map(|head| product(head, head).sqrt()).collect();
        self.pairs(|i, j| product(&centred[i], &centred[j]) / (own[i] * own[j]).max(f64::MIN_POSITIVE))
    }

    /// `[n, n]`: cosines of heads as vectors.
    pub fn cosine(&self) -> Vec<f64> {
        let norms: Vec<f64> = self.heads.iter().map(|head| square(head).sqrt()).collect();
        self.pairs(|i, j| dot(&self.heads[i], &self.heads[j]) / (norms[i] * norms[j]).max(f64::MIN_POSITIVE))
    }

    /// `[n, n]`: squared distances of heads as vectors.
    pub fn distance(&self) -> Vec<f64> {
        self.pairs(|i, j| self.heads[i].iter().zip(&self.heads[j]).map(|(a, b)| (a - b) * (a - b)).sum())
    }

    /// `[n, n]` of a measure that does not tell a pair from its reverse.
    fn pairs(&self, value: impl Fn(usize, usize) -> f64 + Sync) -> Vec<f64> {
        let n = self.len();
        let half: Vec<(usize, usize)> = (0..n).flat_map(|i| (i..n).map(move |j| (i, j))).collect();
        let values: Vec<f64> = half.par_iter().map(|&(i, j)| value(i, j)).collect();
        let mut out = vec![0.0; n * n];
        for ((i, j), value) in half.into_iter().zip(values) {
            (out[i * n + j], out[j * n + i]) = (value, value);
        }
        out
    }
}

/// The labels of `n` heads after merges: clusters numbered by their smallest member.
pub fn labels_after(n: usize, merges: &[Merge]) -> Vec<usize> {
    let mut first: Vec<usize> = (0..n).collect();
    for merge in merges {
        for smallest in &mut first {
            if *smallest == merge.b {
                *smallest = merge.a;
            }
        }
    }
    let mut order: Vec<usize> = first.clone();
    order.sort_unstable();
    order.dedup();
    first.iter().map(|smallest| order.binary_search(smallest).unwrap_or_default()).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The same in eight sums at a time, in another order, which processors can do at once.
fn wide_dot(a: &[f64], b: &[f64]) -> f64 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0.0; 8];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f64>() + dot(a_rest, b_rest)
}

fn square(head: &[f64]) -> f64 {
    dot(head, head)
}

/// The sum of heads, each with its factor; heads with the factor 0 are not looked at.
fn combined<'a>(parts: impl Iterator<Item = (f64, &'a Vec<f64>)>) -> Vec<f64> {
    let mut sum: Vec<f64> = Vec::new();
    for (factor, head) in parts {
        sum.resize(head.len(), 0.0);
        if factor != 0.0 {
            sum.iter_mut().zip(head).for_each(|(sum, value)| *sum += factor * value);
        }
    }
    sum
}
