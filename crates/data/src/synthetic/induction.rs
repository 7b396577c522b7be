//! Induction: a random sequence, then the same again. The second half follows from the first (Olsson et al. 2022,
//! arXiv 2209.11895).

use std::cmp::Ordering;

use polyhead_models::Role;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{MOST_IDS, Side, Task, answers_only, below, open};
use crate::batches::Sample;
use crate::problem::{Problem, require, within};
use crate::{Data, DataError, Opening, Source, Tokenizer};

/// `[data.induction]`. A row: seq_len / 2 random tokens, then the same tokens. What is asked for is in the second half.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct InductionConfig {
    /// Different tokens. Default: 64.
    pub vocab: usize,
}

impl Default for InductionConfig {
    fn default() -> Self {
        Self { vocab: 64 }
    }
}

impl Source for InductionConfig {
    fn validate(&self, seq_len: usize) -> Result<(), Problem> {
        within("vocab", self.vocab, 2..=MOST_IDS)?;
        require(seq_len >= 4, "vocab", || format!("training.seq_len ({seq_len}) must be at least 4 for two halves"))
    }

    fn vocab_size(&self, _tokenizer: &Tokenizer) -> usize {
        self.n_ids()
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        open(self.clone(), opening)
    }
}

impl Task for InductionConfig {
    fn n_ids(&self) -> usize {
        self.vocab
    }

    fn row(&self, rng: &mut ChaCha8Rng, seq_len: usize, _: Side) -> Sample {
        let half = seq_len / 2;
        let first: Vec<u32> = (0..half).map(|_| below(rng, self.vocab)).collect();
        let tokens: Vec<u32> = first.iter().copied().cycle().take(seq_len).collect();
        // The first token of the second half cannot be predicted; the rest can.
        let answers: Vec<(usize, u32)> = (half..seq_len - 1).map(|at| (at, tokens[at + 1])).collect();
        // What is asked is what the sequence begins with; every token behind it is an answer, and what the next one follows from.
        let roles = (0..seq_len).map(|at| match at.cmp(&half) {
            Ordering::Less => Role::Tool,
            Ordering::Equal => Role::Question,
            Ordering::Greater => Role::Assistant,
        });
        Sample { roles: Some(roles.collect()), ..answers_only(tokens, &answers) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::testing::{answers, rows};

    #[test]
    fn answers_repeat_the_first_half() {
        for row in rows(InductionConfig::default(), 20) {
            assert!(answers(&row).iter().all(|&(at, answer)| at >= 10 && row.tokens[at + 1 - 10] == answer));
        }
    }
}
