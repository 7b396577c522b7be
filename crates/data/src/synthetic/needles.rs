//! Needles in filler, after the multi-needle retrieval of the Differential Transformer (arXiv 2410.05258, section 3.4):
//! N needles are scattered, R of them asked for; look-alikes distract.

use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{MOST_IDS, Side, Task, asked_only, below, distinct, open};
use crate::batches::Sample;
use crate::problem::{Problem, require, within};
use crate::{Data, DataError, Opening, Source, Tokenizer};

/// `[data.needles]`. A row: filler in which `<needle> key value` and look-alikes `<other> key value` are scattered, then
/// `<query> key value` n_queried times. The value is asked for at the queried key. Look-alikes use the keys of the
/// needles with other values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NeedlesConfig {
    /// Needles in a row. Default: 4.
    pub n_needles: usize,
    /// Needles asked for. Default: 2.
    pub n_queried: usize,
    /// Look-alikes. Default: 4.
    pub n_distractors: usize,
    /// Different keys that exist. Default: 32.
    pub n_keys: usize,
    /// Different values that exist. Default: 32.
    pub n_values: usize,
    /// Different filler tokens. Default: 32.
    pub n_filler: usize,
}

impl Default for NeedlesConfig {
    fn default() -> Self {
        Self { n_needles: 4, n_queried: 2, n_distractors: 4, n_keys: 32, n_values: 32, n_filler: 32 }
    }
}

impl Source for NeedlesConfig {
    fn validate(&self, seq_len: usize) -> Result<(), Problem> {
        let Self { n_needles, n_queried, n_keys, n_values, n_filler, .. } = *self;
        require(n_needles > 0 && n_needles <= n_keys, "n_needles", || {
            format!("n_needles ({n_needles}) must be 1 to n_keys ({n_keys}): keys of a row differ")
        })?;
        require(n_queried > 0 && n_queried <= n_needles, "n_queried", || {
            format!("n_queried ({n_queried}) must be 1 to n_needles ({n_needles})")
        })?;
        within("n_keys", n_keys, 1..=MOST_IDS)?;
        within("n_values", n_values, 2..=MOST_IDS)?;
        within("n_filler", n_filler, 1..=MOST_IDS)?;
        // Look-alikes are bounded by nothing else yet.
        let needed = (n_needles + n_queried).saturating_add(self.n_distractors).saturating_mul(3);
        require(needed <= seq_len, "n_needles", || {
            format!("3 * (n_needles + n_distractors + n_queried) = {needed} must fit into training.seq_len ({seq_len})")
        })
    }

    fn vocab_size(&self, _tokenizer: &Tokenizer) -> usize {
        self.n_ids()
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        open(self.clone(), opening)
    }
}

// Ids: keys, values, filler, then the three markers.
impl Task for NeedlesConfig {
    fn n_ids(&self) -> usize {
        self.n_keys + self.n_values + self.n_filler + 3
    }

    fn row(&self, rng: &mut ChaCha8Rng, seq_len: usize, _: Side) -> Sample {
        let first_filler = self.n_keys + self.n_values;
        let [needle, other, query] = [0, 1, 2].map(|marker| (first_filler + self.n_filler + marker) as u32);
        let keys = distinct(rng, self.n_keys, self.n_needles);
        let value = |rng: &mut ChaCha8Rng| self.n_keys as u32 + below(rng, self.n_values);
        let mut needles: Vec<[u32; 3]> = keys.iter().map(|&key| [needle, key, value(rng)]).collect();
        let mut scattered = needles.clone();
        for _ in 0..self.n_distractors {
            let twin = needles[below(rng, needles.len()) as usize];
            let false_value = self.n_keys as u32
                + (twin[2] - self.n_keys as u32 + 1 + below(rng, self.n_values - 1)) % self.n_values as u32;
            scattered.push([other, twin[1], false_value]);
        }
        scattered.shuffle(rng);
        let filler = seq_len - 3 * (scattered.len() + self.n_queried);
        // Each piece goes behind a random number of filler tokens.
        let mut places: Vec<u32> = scattered.iter().map(|_| below(rng, filler + 1)).collect();
        places.sort_unstable();
        let mut tokens = Vec::with_capacity(seq_len);
        let mut filled = 0;
        for (piece, place) in scattered.iter().zip(places) {
            tokens.extend((filled..place).map(|_| (first_filler as u32) + below(rng, self.n_filler)));
            tokens.extend(piece);
            filled = place;
        }
        tokens.extend((filled..filler as u32).map(|_| (first_filler as u32) + below(rng, self.n_filler)));
        needles.shuffle(rng);
        let (shown, mut answers) = (tokens.len(), Vec::new());
        for &[_, key, value] in &needles[..self.n_queried] {
            answers.push((tokens.len() + 1, value));
            tokens.extend([query, key, value]);
        }
        asked_only(tokens, shown, 2, &answers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::testing::{answers, rows};

    #[test]
    fn every_answer_is_in_its_needle_and_not_in_look_alikes() {
        let config = NeedlesConfig::default();
        assert!(config.validate(64).is_ok() && config.validate(29).is_err());
        let needle = (config.n_ids() - 3) as u32;
        for row in rows(config, 64) {
            let all = answers(&row);
            assert_eq!(all.len(), 2);
            for (position, answer) in all {
                let key = row.tokens[position];
                let behind = |marker| {
                    let hit = row.tokens.windows(3).find(|piece| piece[0] == marker && piece[1] == key);
                    hit.map(|piece| piece[2])
                };
                assert_eq!(behind(needle), Some(answer));
                assert_ne!(behind(needle + 1), Some(answer));
            }
        }
    }
}
