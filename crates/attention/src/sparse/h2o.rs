//! H2O (Zhang et al. 2023, arXiv 2306.14048; the authors' code, commit ac75c2a): while decoding, each head keeps the keys that were
//! attended to most so far, the heavy hitters, and the most recent ones.
//!
//! ```text
//! score_j += Σ of the weights of new queries on key j              of a prompt all queries: early keys have a head start
//! keep the last `recent` keys, and of the others the `heavy` best       once there are more; scores of what is dropped are forgotten
//! ```
//! Keys are dropped after the attention of a call, which so sees one more. Here every row of the batch has scores of its own, and where
//! query heads share a key head, their weights are added up; the code can do neither.
//!
//! For texts that are evaluated at once there are masks: [`local_mask`] keeps what decoding would keep of the heavy hitters,
//! [`global_columns`], the code's later form, ranks keys by the whole map, the future included.

use serde::{Deserialize, Serialize};

use super::largest;
use crate::{ConfigError, require_range};

/// Keys that each head keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct H2oConfig {
    /// Keys that were attended to most.
    pub heavy: usize,
    /// Most recent keys.
    pub recent: usize,
}

impl H2oConfig {
    /// Checks the numbers.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self) -> Result<(), ConfigError> {
        require_range("heavy", self.heavy, 0..=1 << 30)?;
        require_range("recent", self.recent, 1..=1 << 30)
    }
}

/// The keys that one head keeps.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HeavyHitters {
    /// Their positions, ascending.
    pub positions: Vec<usize>,
    /// The weights that they were given so far.
    pub scores: Vec<f32>,
    tokens: usize,
}

impl HeavyHitters {
    /// Adds the weights on all keys, those of `new` tokens the last; gives the indices of the keys to keep, where some are dropped.
    pub fn update(&mut self, config: &H2oConfig, weights: &[f32], new: usize) -> Option<Vec<usize>> {
        self.positions.extend(self.tokens..self.tokens + new);
        self.scores.resize(self.positions.len(), 0.0);
        self.tokens += new;
        self.scores.iter_mut().zip(weights).for_each(|(score, weight)| *score += weight);
        let (keys, H2oConfig { heavy, recent }) = (self.positions.len(), *config);
        if keys <= heavy + recent {
            return None;
        }
        let mut kept = largest(&self.scores[..keys - recent], heavy);
        kept.sort_unstable();
        kept.extend(keys - recent..keys);
        self.positions = kept.iter().map(|&at| self.positions[at]).collect();
        self.scores = kept.iter().map(|&at| self.scores[at]).collect();
        Some(kept)
    }
}

/// `[seq, seq]`: the heavy hitters of each query of one head, with causal weights `[seq, seq]`. The first `heavy` queries see the first
/// `heavy` keys; a later one the `heavy - 1` best of those that the one before saw, and itself.
pub fn local_mask(weights: &[f32], heavy: usize) -> Vec<bool> {
    let seq = weights.len().isqrt();
    let first = heavy.min(seq);
    let mut seen = vec![false; seq * seq];
    let mut scores = vec![0.0; seq];
    for query in 0..first {
        seen[query * seq..query * seq + first].fill(true);
        (0..first).for_each(|key| scores[key] += weights[query * seq + key]);
    }
    for query in first..if heavy == 0 { 0 } else { seq } {
        let (row, weights) = (&mut seen[query * seq..(query + 1) * seq], &weights[query * seq..(query + 1) * seq]);
        largest(&scores, heavy - 1).into_iter().chain([query]).for_each(|key| row[key] = true);
        for (key, score) in scores.iter_mut().enumerate() {
            *score = if row[key] { *score + weights[key] } else { 0.0 };
        }
    }
    seen
}

/// `[seq]`: the `heavy` keys that have the largest sums of weights, `[seq, seq]`, of one head.
pub fn global_columns(weights: &[f32], heavy: usize) -> Vec<bool> {
    let seq = weights.len().isqrt();
    let sums: Vec<f32> = (0..seq).map(|key| weights.iter().skip(key).step_by(seq.max(1)).sum()).collect();
    let mut columns = vec![false; seq];
    largest(&sums, heavy).into_iter().for_each(|key| columns[key] = true);
    columns
}

/// `[seq, seq]`: these keys, or those at most `recent` positions before the query, and none after it.
pub fn with_recent(seen: impl Fn(usize, usize) -> bool, seq: usize, recent: usize) -> Vec<bool> {
    let visible = |query: usize, key: usize| key <= query && (query - key <= recent || seen(query, key));
    (0..seq * seq).map(|at| visible(at / seq, at % seq)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heavy_keys_stay_and_others_go() {
        let config = H2oConfig { heavy: 1, recent: 2 };
        let mut head = HeavyHitters::default();
        assert_eq!(head.update(&config, &[0.5, 2.0, 0.1], 3), None);
        assert_eq!(head.update(&config, &[0.0, 0.0, 0.0, 1.0], 1), Some(vec![1, 2, 3]));
        // The third token leaves the recent ones with the weight that it has had: too little.
        assert_eq!(head.update(&config, &[0.0, 0.2, 0.3, 0.5], 1), Some(vec![0, 2, 3]));
        assert_eq!(head, HeavyHitters { positions: vec![1, 3, 4], scores: vec![2.0, 1.3, 0.5], tokens: 5 });
    }
}
