//! Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927): pairs of a key and a value, then keys
//! again, each to be answered with its value.

use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{MOST_IDS, Side, Task, asked_only, below, distinct, open};
use crate::batches::Sample;
use crate::problem::{Problem, require, within};
use crate::{Data, DataError, Opening, Source, Tokenizer};

/// `[data.associative_recall]`. A row: `key value` n_pairs times, then n_queries of the keys with their values behind
/// them, then padding. The answer is asked for at the queried key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AssociativeRecallConfig {
    /// Pairs to remember. Default: 8.
    pub n_pairs: usize,
    /// Pairs asked for; at most n_pairs. Default: 8.
    pub n_queries: usize,
    /// Different keys that exist. Default: 64.
    pub n_keys: usize,
    /// Different values that exist. Default: 64.
    pub n_values: usize,
}

impl Default for AssociativeRecallConfig {
    fn default() -> Self {
        Self { n_pairs: 8, n_queries: 8, n_keys: 64, n_values: 64 }
    }
}

impl Source for AssociativeRecallConfig {
    fn validate(&self, seq_len: usize) -> Result<(), Problem> {
        let Self { n_pairs, n_queries, n_keys, n_values } = *self;
        require(n_pairs > 0 && n_pairs <= n_keys, "n_pairs", || {
            format!("n_pairs ({n_pairs}) must be 1 to n_keys ({n_keys}): keys of a row differ")
        })?;
        require(n_queries > 0 && n_queries <= n_pairs, "n_queries", || {
            format!("n_queries ({n_queries}) must be 1 to n_pairs ({n_pairs})")
        })?;
        within("n_keys", n_keys, 1..=MOST_IDS)?;
        within("n_values", n_values, 2..=MOST_IDS)?;
        let needed = 2 * (n_pairs + n_queries);
        require(needed <= seq_len, "n_pairs", || {
            format!("2 * (n_pairs + n_queries) = {needed} must fit into training.seq_len ({seq_len})")
        })
    }

    fn vocab_size(&self, _tokenizer: &Tokenizer) -> usize {
        self.n_ids()
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        open(self.clone(), opening)
    }
}

// Ids: keys, then values, then padding.
impl Task for AssociativeRecallConfig {
    fn n_ids(&self) -> usize {
        self.n_keys + self.n_values + 1
    }

    fn row(&self, rng: &mut ChaCha8Rng, seq_len: usize, _: Side) -> Sample {
        let keys = distinct(rng, self.n_keys, self.n_pairs);
        let mut pairs: Vec<(u32, u32)> =
            keys.into_iter().map(|key| (key, self.n_keys as u32 + below(rng, self.n_values))).collect();
        let mut tokens: Vec<u32> = pairs.iter().flat_map(|&(key, value)| [key, value]).collect();
        pairs.shuffle(rng);
        let mut answers = Vec::new();
        for &(key, value) in &pairs[..self.n_queries] {
            answers.push((tokens.len(), value));
            tokens.extend([key, value]);
        }
        tokens.resize(seq_len, (self.n_ids() - 1) as u32);
        asked_only(tokens, 2 * self.n_pairs, 1, &answers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::testing::{answers, rows};

    #[test]
    fn every_answer_stands_behind_its_key() {
        let config = AssociativeRecallConfig { n_queries: 5, ..Default::default() };
        assert!(config.validate(40).is_ok());
        assert_eq!(config.validate(20).err().map(|e| e.field), Some("n_pairs".into()));
        for row in rows(config, 40) {
            let all = answers(&row);
            assert_eq!(all.len(), 5);
            for (position, answer) in all {
                let key = row.tokens[position];
                let first = row.tokens[..16].iter().position(|&id| id == key).map(|at| row.tokens[at + 1]);
                assert_eq!(first, Some(answer));
            }
        }
    }
}
