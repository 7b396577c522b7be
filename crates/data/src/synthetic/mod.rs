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
