//! Copying: random tokens, a separator, the same tokens.

use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{MOST_IDS, Side, Task, answers_only, below, open};
use crate::batches::Sample;
use crate::problem::{Problem, require, within};
use crate::{Data, DataError, Opening, Source, Tokenizer};

/// `[data.copy]`. A row: random tokens, a separator, the same tokens. What is asked for is behind the separator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CopyConfig {
    /// Different tokens, besides the separator. Default: 64.
    pub vocab: usize,
}

impl Default for CopyConfig {
    fn default() -> Self {
        Self { vocab: 64 }
    }
}

impl Source for CopyConfig {
    fn validate(&self, seq_len: usize) -> Result<(), Problem> {
        within("vocab", self.vocab, 2..=MOST_IDS)?;
        require(seq_len >= 3, "vocab", || format!("training.seq_len ({seq_len}) must be at least 3 for a copy"))
    }

    fn vocab_size(&self, _tokenizer: &Tokenizer) -> usize {
        self.n_ids()
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        open(self.clone(), opening)
    }
}

// Ids: tokens, then the separator.
impl Task for CopyConfig {
    fn n_ids(&self) -> usize {
        self.vocab + 1
    }

    fn row(&self, rng: &mut ChaCha8Rng, seq_len: usize, _: Side) -> Sample {
        let length = seq_len / 2;
        let first: Vec<u32> = (0..length).map(|_| below(rng, self.vocab)).collect();
        let mut tokens = first.clone();
        tokens.push(self.vocab as u32);
        tokens.extend(&first);
        tokens.truncate(seq_len);
        let answers: Vec<(usize, u32)> = (length..seq_len).map(|at| (at, first[at - length])).take(length).collect();
        answers_only(tokens, &answers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::testing::{answers, rows};

    #[test]
    fn answers_copy_what_stands_before_the_separator() {
        for (seq_len, length) in [(11, 5), (12, 6)] {
            for row in rows(CopyConfig::default(), seq_len) {
                assert_eq!(row.tokens[length], 64);
                let copied: Vec<u32> = answers(&row).iter().map(|&(_, answer)| answer).collect();
                assert_eq!(copied, row.tokens[..length]);
            }
        }
    }
}
