//! Generated data with a known optimum: what a mechanism can learn, without the noise of text.
//!
//! A sample is a pure function of (seed, side, index); training and validation draw from different streams of the
//! generator and never share a sample.

mod associative_recall;
mod copy;
mod induction;
mod markov;
mod needles;

use burn_dataset::Dataset;
use polyhead_models::IGNORE;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::DataError;
use crate::loader::{Sample, Samples};

pub use associative_recall::AssociativeRecallConfig;
pub use copy::CopyConfig;
pub use induction::InductionConfig;
pub use markov::{Markov, MarkovConfig};
pub use needles::NeedlesConfig;

/// Samples of an endless set that count as one epoch.
const EPOCH: u64 = 1 << 40;

/// A setting of generated data that breaks a rule: the field, and the problem in words.
pub type Problem = (&'static str, String);

/// A way of making samples.
pub trait Task: Send + Sync {
    /// How many ids it uses.
    fn vocab_size(&self) -> usize;

    /// A row of `seq_len` tokens.
    fn row(&self, rng: &mut ChaCha8Rng, seq_len: usize) -> Sample;
}

/// Which side of the split a set of samples is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Endless.
    Train,
    /// This many samples.
    Validation(u64),
}

/// Rows of a task.
pub struct Generated {
    /// The task.
    pub task: Box<dyn Task>,
    /// Tokens per row.
    pub seq_len: usize,
    /// Decides all samples.
    pub seed: u64,
    /// Training or validation.
    pub side: Side,
}

impl Samples for Generated {
    fn per_epoch(&self) -> u64 {
        match self.side {
            Side::Train => EPOCH,
            Side::Validation(count) => count,
        }
    }

    fn sample(&self, _epoch: u64, index: u64) -> Result<Sample, DataError> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        // Streams of one generator never overlap: even ones for training, odd ones for validation.
        rng.set_stream(2 * index + u64::from(self.side != Side::Train));
        Ok(self.task.row(&mut rng, self.seq_len))
    }
}

impl Dataset<Sample, DataError> for Generated {
    fn get(&self, index: usize) -> Result<Sample, DataError> {
        self.sample(0, index as u64)
    }

    fn len(&self) -> usize {
        self.per_epoch() as usize
    }
}

/// A row in which nothing is predicted but the `answers`: pairs of a position and what is to follow it.
fn answers_only(tokens: Vec<u32>, answers: &[(usize, u32)]) -> Sample {
    let mut targets = vec![IGNORE; tokens.len()];
    for &(position, answer) in answers {
        targets[position] = i64::from(answer);
    }
    Sample { tokens, targets, documents: None }
}

/// `count` different numbers below `n`, in random order.
fn distinct(rng: &mut ChaCha8Rng, n: usize, count: usize) -> Vec<u32> {
    let mut all: Vec<u32> = (0..n as u32).collect();
    all.shuffle(rng);
    all.truncate(count);
    all
}

fn below(rng: &mut ChaCha8Rng, n: usize) -> u32 {
    rng.random_range(0..n as u32)
}

/// `Ok` if `rule` holds.
fn require(rule: bool, field: &'static str, problem: impl FnOnce() -> String) -> Result<(), Problem> {
    if rule { Ok(()) } else { Err((field, problem())) }
}

#[cfg(test)]
pub(crate) mod testing {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Rows of a task, each checked for its shape.
    pub(crate) fn rows(task: impl Task + Clone + 'static, seq_len: usize) -> Vec<Sample> {
        let set = |side| Generated { task: Box::new(task.clone()), seq_len, seed: 3, side };
        let (train, validation) = (set(Side::Train), set(Side::Validation(30)));
        let rows: Vec<Sample> = (0..30).map(|i| train.sample(0, i).unwrap()).collect();
        for (index, row) in rows.iter().enumerate() {
            assert_eq!((row.tokens.len(), row.targets.len()), (seq_len, seq_len));
            assert!(row.tokens.iter().all(|&id| (id as usize) < task.vocab_size()));
            assert!(row.targets.iter().all(|&id| id == IGNORE || (id as usize) < task.vocab_size()));
            assert!(row.targets.iter().any(|&id| id != IGNORE));
            assert_eq!(*row, train.sample(1, index as u64).unwrap(), "a pure function of the index");
            assert_ne!(*row, validation.sample(0, index as u64).unwrap());
        }
        rows
    }

    /// Positions with a target, and the target.
    pub(crate) fn answers(row: &Sample) -> Vec<(usize, u32)> {
        let with_target = row.targets.iter().enumerate().filter(|&(_, &target)| target != IGNORE);
        with_target.map(|(position, &target)| (position, target as u32)).collect()
    }
}

#[cfg(test)]
mod probe {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{DataConfig, loader::*};
    use std::panic::{AssertUnwindSafe, catch_unwind};
    fn hash(data: &str) -> String {
        let config: DataConfig = serde_json::from_str(data).unwrap();
        let (task, _) = config.task(3).unwrap();
        let mut h = blake3::Hasher::new();
        for side in [Side::Train, Side::Validation(9)] {
            let task = config.task(3).unwrap().0;
            let set = Generated { task, seq_len: 64, seed: 3, side };
            for i in 0..9 {
                let s = set.sample(0, i).unwrap();
                s.tokens.iter().for_each(|t| {
                    h.update(&t.to_le_bytes());
                });
                s.targets.iter().for_each(|t| {
                    h.update(&t.to_le_bytes());
                });
            }
        }
        let _ = task;
        h.finalize().to_hex()[..16].to_owned()
    }
    #[test]
    fn probe() {
        for name in ["markov", "associative_recall", "needles", "induction", "copy"] {
            println!("HASH {name} {}", hash(&format!("{{\"{name}\":{{}}}}")));
        }
        for bad in [
            r#"{"copy":{"vocab":4294967296}}"#,
            r#"{"induction":{"vocab":4294967296}}"#,
            r#"{"needles":{"n_values":4294967297}}"#,
            r#"{"needles":{"n_distractors":6148914691236517200}}"#,
            r#"{"needles":{"n_filler":4294967296}}"#,
            r#"{"associative_recall":{"n_keys":18446744073709551000}}"#,
        ] {
            let r = catch_unwind(AssertUnwindSafe(|| {
                let c: DataConfig = serde_json::from_str(bad).unwrap();
                let v = c.validate(64);
                if v.is_err() {
                    return format!("refused {v:?}");
                }
                let _ = Generated { task: c.task(3).unwrap().0, seq_len: 64, seed: 3, side: Side::Train }.sample(0, 0);
                "made a row".into()
            }));
            println!("BAD {bad} -> {}", r.unwrap_or("PANIC".into()));
        }
        for (what, samples, bytes, batch_size) in [
            ("empty", vec![], None, 2),
            ("batch 0", vec![(1, 1)], None, 0),
            ("ragged", vec![(1, 1), (2, 1)], None, 2),
            ("target", vec![(1, 7)], Some(vec![1u32; 3]), 1),
        ] {
            let samples: Vec<Sample> = samples
                .into_iter()
                .map(|(n, t)| Sample { tokens: vec![0; n], targets: vec![t; n], documents: None })
                .collect();
            let set: std::sync::Arc<dyn Dataset<Sample>> =
                std::sync::Arc::new(burn_dataset::InMemDataset::new(samples));
            let r = catch_unwind(AssertUnwindSafe(|| {
                let l = Loader::new(
                    std::sync::Arc::new(FromDataset(set)),
                    bytes,
                    LoaderOptions { batch_size, seed: 1, shuffle: false },
                );
                format!("{} {:?}", l.batches_per_epoch(), l.batch(0))
            }));
            println!("LOADER {what} -> {}", r.unwrap_or("PANIC".into()));
        }
        for s in [64, 512] {
            let c: DataConfig = serde_json::from_str(&format!(r#"{{"markov":{{"states":{s}}}}}"#)).unwrap();
            let g = Generated { task: c.task(3).unwrap().0, seq_len: 64, seed: 3, side: Side::Train };
            let t = std::time::Instant::now();
            for i in 0..10 {
                g.sample(0, i).unwrap();
            }
            println!("MARKOV {s} states: {:?} per row", t.elapsed() / 10);
        }
    }
}
