//! The six tasks of mechanistic architecture design (Poli et al. 2024, "MAD", arXiv 2403.17844) as its code makes them
//! (athms/mad-lab@0f49a45). Ids are 0 to vocab_size - 1; each task has a file or a section below.
//!
//! Training rows of the recall tasks predict every next token, test rows only what can be known.

mod fuzzy;
mod recall;

use std::sync::Arc;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::sets::{Rules, Set, SetData, labels, open, rule};
use super::{EPOCH, MOST_IDS, Side, Task, answers_only, below};
use crate::batches::{Order, Sample};
use crate::problem::{Problem, require, within};
use crate::{Data, DataError, Opening, Source, Tokenizer};

pub use fuzzy::FuzzyRecall;
pub use recall::Recall;

/// Decides the map of memorisation, which is the same for every seed.
const MAP_SEED: u64 = 12345;

/// `[data.mad]`. Rows have `training.seq_len` tokens; of recall with several queries, whose last token is only predicted, that is
/// one less than the published length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MadConfig {
    /// Which task. Default: "in_context_recall".
    pub task: MadTask,
    /// Ids, those of noise included. Default: 16.
    pub vocab_size: usize,
    /// For in_context_recall: ids of noise, the last ones. Default: 0.
    pub noise_vocab_size: usize,
    /// For in_context_recall: the share of pairs that are noise. Default: 0.
    pub noise: f64,
    /// For in_context_recall: whether every repeated key is asked for, not the last alone. Default: true.
    pub multi_query: bool,
    /// For fuzzy_in_context_recall: ids of a key or of a value at most. Default: 3.
    pub motif: usize,
    /// For selective_copying: ids to copy. Default: 16.
    pub n_copied: usize,
    /// Rows to train on. Default: 12800.
    pub rows: u64,
    /// Rows to test on. Default: 1280.
    pub test_rows: u64,
}

/// A task of MAD.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MadTask {
    /// The value of a key that was shown before; with noise between pairs.
    #[default]
    InContextRecall,
    /// The same where keys and values are several ids.
    FuzzyInContextRecall,
    /// The ids among blanks, in their order.
    SelectiveCopying,
    /// The row again, from its last position; for models with `autoencoder`.
    Compression,
    /// The values of a fixed map.
    Memorization,
}

impl Default for MadConfig {
    fn default() -> Self {
        Self {
            task: MadTask::default(),
            vocab_size: 16,
            noise_vocab_size: 0,
            noise: 0.0,
            multi_query: true,
            motif: 3,
            n_copied: 16,
            rows: 12_800,
            test_rows: 1280,
        }
    }
}

impl Source for MadConfig {
    fn validate(&self, seq_len: usize) -> Result<(), Problem> {
        let Self { vocab_size, noise_vocab_size, noise, n_copied, motif, .. } = *self;
        within("vocab_size", vocab_size, 8..=MOST_IDS)?;
        require(noise_vocab_size + 5 <= vocab_size, "noise_vocab_size", || {
            format!("noise_vocab_size ({noise_vocab_size}) must leave 5 ids or more of vocab_size ({vocab_size})")
        })?;
        within("noise", noise, 0.0..=1.0)?;
        require(noise == 0.0 || noise_vocab_size > 0, "noise", || {
            format!("noise ({noise}) takes ids: noise_vocab_size must be at least 1")
        })?;
        let recall = self.task == MadTask::InContextRecall;
        require(recall || (noise == 0.0 && noise_vocab_size == 0), "noise", || {
            "noise is for in_context_recall".into()
        })?;
        for (field, rows) in [("rows", self.rows), ("test_rows", self.test_rows)] {
            within(field, rows, 1..=EPOCH)?;
        }
        let (least, why) = match self.task {
            MadTask::InContextRecall => (5, "two pairs".to_owned()),
            MadTask::FuzzyInContextRecall => {
                let half = (vocab_size - 1) / 2;
                require((1..=half).contains(&motif), "motif", || {
                    format!("motif ({motif}) must be 1 to {half}: ids of a key differ, and there are as many")
                })?;
                (4 * motif, "two pairs".to_owned())
            }
            MadTask::SelectiveCopying => {
                within("n_copied", n_copied, 1..=MOST_IDS)?;
                (2 * n_copied + 1, format!("n_copied ({n_copied}) ids twice and the sign to copy"))
            }
            MadTask::Compression | MadTask::Memorization => (2, "a row".to_owned()),
        };
        require(seq_len >= least, "task", || {
            format!("training.seq_len ({seq_len}) must be at least {least}, for {why}")
        })?;
        let even = match self.task {
            MadTask::InContextRecall => seq_len % 2 == usize::from(self.multi_query),
            MadTask::Memorization => seq_len.is_multiple_of(2),
            _ => true,
        };
        require(even, "task", || {
            format!(
                "training.seq_len ({seq_len}) must be even, and odd for in_context_recall with multi_query: whole pairs, the last \
                 value being predicted only"
            )
        })
    }

    fn repeats(&self) -> bool {
        true
    }

    fn vocab_size(&self, _tokenizer: &Tokenizer) -> usize {
        self.vocab_size
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        let (task, seq_len) = (self.rules(), opening.options.seq_len);
        let set = |name: &str, rows| vec![Set { name: name.into(), rows, seq_len, task: task.clone() }];
        let (train, test) = (set("train", self.rows), set("test", self.test_rows));
        open(SetData { train, order: Order::Shuffled, test, n_ids: self.vocab_size }, opening)
    }
}

impl MadConfig {
    fn rules(&self) -> Arc<dyn Rules> {
        let Self { vocab_size, noise_vocab_size, noise, multi_query, motif, n_copied, .. } = *self;
        match self.task {
            MadTask::InContextRecall => Arc::new(Recall { vocab_size, noise_vocab_size, noise, multi_query }),
            MadTask::FuzzyInContextRecall => Arc::new(FuzzyRecall { vocab_size, motif }),
            MadTask::SelectiveCopying => Arc::new(SelectiveCopying { vocab_size, n_copied }),
            MadTask::Compression => Arc::new(Compression { vocab_size }),
            MadTask::Memorization => Arc::new(Memorization::new(vocab_size)),
        }
    }
}

/// The targets of a row that predicts every next token, `last` behind its last.
fn next_tokens(tokens: &[u32], last: u32) -> Vec<i64> {
    tokens.iter().skip(1).chain([&last]).map(|&id| i64::from(id)).collect()
}

/// Ids among blanks, a sign to copy, blanks in which the ids are to be predicted in their order. The last id stands right before the
/// sign: each blank was put before an id.
#[derive(Debug, Clone, PartialEq)]
pub struct SelectiveCopying {
    /// Ids; the last but one is the blank, the last the sign to copy.
    pub vocab_size: usize,
    /// Ids to copy.
    pub n_copied: usize,
}

impl Task for SelectiveCopying {
    fn n_ids(&self) -> usize {
        self.vocab_size
    }

    fn row(&self, rng: &mut ChaCha8Rng, seq_len: usize, _: Side) -> Sample {
        let (n, blank, copy) = (self.n_copied, self.vocab_size as u32 - 2, self.vocab_size as u32 - 1);
        let content: Vec<u32> = (0..n).map(|_| below(rng, self.vocab_size - 2)).collect();
        let mut blanks = vec![0usize; n];
        (0..seq_len - 2 * n - 1).for_each(|_| blanks[below(rng, n) as usize] += 1);
        let mut tokens = Vec::with_capacity(seq_len);
        for (id, blanks) in content.iter().zip(blanks) {
            tokens.extend(std::iter::repeat_n(blank, blanks));
            tokens.push(*id);
        }
        tokens.push(copy);
        tokens.resize(seq_len, blank);
        let answers: Vec<(usize, u32)> = (seq_len - n..seq_len).zip(content).collect();
        answers_only(tokens, &answers)
    }
}

impl Rules for SelectiveCopying {
    fn check(&self, row: &Sample, _side: Side) -> Result<(), String> {
        let (n, seq_len) = (self.n_copied, row.tokens.len());
        let (blank, copy) = (self.vocab_size as u32 - 2, self.vocab_size as u32 - 1);
        rule(seq_len > 2 * n, || format!("{seq_len} tokens have no room for {n} ids twice"))?;
        let labels = labels(row, seq_len, self.vocab_size)?;
        let at = seq_len - n - 1;
        let signs: Vec<usize> = (0..seq_len).filter(|&at| row.tokens[at] == copy).collect();
        rule(signs == [at], || format!("the sign to copy is at {signs:?}, and belongs at {at} alone"))?;
        let content: Vec<u32> = row.tokens[..at].iter().copied().filter(|&id| id != blank).collect();
        rule(content.len() == n, || format!("{} ids to copy, not {n}", content.len()))?;
        rule(row.tokens[at - 1] != blank, || "a blank between the last id and the sign to copy".into())?;
        rule(row.tokens[at + 1..].iter().all(|&id| id == blank), || "behind the sign to copy are blanks only".into())?;
        let wanted: Vec<(usize, u32)> = (seq_len - n..seq_len).zip(content).collect();
        rule(labels == wanted, || "targets must be the ids in their order, on the last positions".into())
    }
}

/// Random ids and a last one that stands for the whole row; the row itself is to be predicted.
#[derive(Debug, Clone, PartialEq)]
pub struct Compression {
    /// Ids; the last one ends every row.
    pub vocab_size: usize,
}

impl Task for Compression {
    fn n_ids(&self) -> usize {
        self.vocab_size
    }

    fn row(&self, rng: &mut ChaCha8Rng, seq_len: usize, _: Side) -> Sample {
        let mut tokens: Vec<u32> = (1..seq_len).map(|_| below(rng, self.vocab_size - 1)).collect();
        tokens.push(self.vocab_size as u32 - 1);
        Sample { targets: tokens.iter().map(|&id| i64::from(id)).collect(), tokens, ..Sample::default() }
    }
}

impl Rules for Compression {
    fn check(&self, row: &Sample, _side: Side) -> Result<(), String> {
        let (seq_len, last) = (row.tokens.len(), self.vocab_size as u32 - 1);
        let labels = labels(row, seq_len, self.vocab_size)?;
        rule(labels.iter().map(|(_, id)| id).eq(&row.tokens), || "every id is its own target, the last too".into())?;
        let at: Vec<usize> = (0..seq_len).filter(|&at| row.tokens[at] == last).collect();
        rule(at == [seq_len - 1], || format!("id {last} is at {at:?}, and belongs at the end alone"))
    }
}

/// Keys of a fixed map with a sign behind each, where the key's value is to be predicted.
#[derive(Debug, Clone, PartialEq)]
pub struct Memorization {
    /// Ids; the last one is the sign.
    pub vocab_size: usize,
    /// The value of each key.
    pub values: Vec<u32>,
}

impl Memorization {
    /// The map of a number of ids: as many keys as values, and the sign.
    pub fn new(vocab_size: usize) -> Self {
        let n = (vocab_size - 1) / 2;
        let mut values: Vec<u32> = (n as u32..vocab_size as u32 - 1).collect();
        values.shuffle(&mut ChaCha8Rng::seed_from_u64(MAP_SEED));
        values.truncate(n);
        Self { vocab_size, values }
    }
}

impl Task for Memorization {
    fn n_ids(&self) -> usize {
        self.vocab_size
    }

    fn row(&self, rng: &mut ChaCha8Rng, seq_len: usize, _: Side) -> Sample {
        let sign = self.vocab_size as u32 - 1;
        let keys: Vec<u32> = (0..seq_len / 2).map(|_| below(rng, self.values.len())).collect();
        let answers: Vec<(usize, u32)> =
            keys.iter().enumerate().map(|(at, &key)| (2 * at + 1, self.values[key as usize])).collect();
        answers_only(keys.into_iter().flat_map(|key| [key, sign]).collect(), &answers)
    }
}

impl Rules for Memorization {
    fn check(&self, row: &Sample, _side: Side) -> Result<(), String> {
        let (seq_len, sign) = (row.tokens.len(), self.vocab_size as u32 - 1);
        let labels = labels(row, seq_len, self.vocab_size)?;
        rule(seq_len.is_multiple_of(2), || format!("{seq_len} tokens: keys and signs take turns"))?;
        let mut wanted = Vec::new();
        for (at, pair) in row.tokens.chunks(2).enumerate() {
            let value = self.values.get(pair[0] as usize);
            let value = value.ok_or_else(|| format!("position {}: {} is no key", 2 * at, pair[0]))?;
            rule(pair[1] == sign, || format!("position {}: {} where the sign {sign} belongs", 2 * at + 1, pair[1]))?;
            wanted.push((2 * at + 1, *value));
        }
        rule(labels == wanted, || "targets must be the values of the fixed map, at the signs alone".into())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::synthetic::sets::testing::{checked, is_uniform};
    use crate::synthetic::testing::answers;

    #[test]
    fn rows_obey_their_rules() {
        for (task, seq_len) in [
            (MadConfig::default(), 127),
            (MadConfig { vocab_size: 32, noise_vocab_size: 16, noise: 0.2, ..MadConfig::default() }, 127),
            (MadConfig { multi_query: false, ..MadConfig::default() }, 128),
            (MadConfig { task: MadTask::FuzzyInContextRecall, ..MadConfig::default() }, 128),
            (MadConfig { task: MadTask::SelectiveCopying, ..MadConfig::default() }, 256),
            (MadConfig { task: MadTask::Compression, ..MadConfig::default() }, 32),
            (MadConfig { task: MadTask::Memorization, vocab_size: 256, ..MadConfig::default() }, 32),
        ] {
            task.validate(seq_len).unwrap();
            checked(&*task.rules(), seq_len, 200);
        }
    }

    #[test]
    fn the_law_is_that_of_the_code() {
        // What is scored of a test row: 56 of 127 positions in recall, 4.4 in fuzzy recall (measured with the published code).
        let scored = |config: MadConfig, seq_len| {
            let [_, test] = checked(&*config.rules(), seq_len, 2000);
            test.iter().map(|row| answers(row).len()).sum::<usize>() as f64 / 2000.0
        };
        let recall = scored(MadConfig::default(), 127);
        assert!((recall - 56.0).abs() < 0.3, "{recall}");
        let fuzzy = scored(MadConfig { task: MadTask::FuzzyInContextRecall, ..MadConfig::default() }, 128);
        assert!((fuzzy - 4.4).abs() < 0.3, "{fuzzy}");
        // A share of noise; and contents that are uniform.
        let noisy = MadConfig { vocab_size: 32, noise_vocab_size: 16, noise: 0.6, ..MadConfig::default() };
        let [rows, _] = checked(&*noisy.rules(), 127, 400);
        let noise = rows.iter().flat_map(|row| &row.tokens).filter(|&&id| id >= 16).count() as f64 / (400.0 * 127.0);
        assert!((noise - 0.6 * 62.0 / 63.5).abs() < 0.02, "{noise}");
        let [rows, _] = checked(&SelectiveCopying { vocab_size: 18, n_copied: 16 }, 256, 1000);
        let mut counts = [0u64; 16];
        rows.iter().flat_map(answers).for_each(|(_, id)| counts[id as usize] += 1);
        assert!(is_uniform(&counts), "{counts:?}");
    }

    #[test]
    fn the_map_is_the_same_for_all_rows_and_has_different_values() {
        let task = Memorization::new(256);
        let mut values = task.values.clone();
        values.sort_unstable();
        values.dedup();
        assert_eq!((values.len(), task), (127, Memorization::new(256)));
    }

    #[test]
    fn settings_that_cannot_be_are_refused_by_name() {
        let problem = |config: MadConfig, seq_len| config.validate(seq_len).unwrap_err().to_string();
        let default = MadConfig::default;
        assert!(problem(MadConfig { vocab_size: 3, ..default() }, 127).contains("vocab_size (3)"));
        assert!(problem(MadConfig { noise: 0.2, ..default() }, 127).contains("noise_vocab_size must be at least 1"));
        assert!(problem(default(), 128).contains("must be even, and odd"));
        assert!(problem(MadConfig { task: MadTask::SelectiveCopying, ..default() }, 32).contains("at least 33"));
        assert!(problem(MadConfig { rows: 0, ..default() }, 127).contains("rows (0)"));
        assert!(
            problem(MadConfig { task: MadTask::FuzzyInContextRecall, motif: 8, ..default() }, 128)
                .contains("motif (8)")
        );
    }
}
