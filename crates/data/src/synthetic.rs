//! Generated data with a known optimum: what a mechanism can learn, without the noise of text.
//!
//! A sample is a pure function of (seed, side, index); training and validation draw from different streams of the
//! generator. Where few different rows exist (a copy of two tokens, say), equal ones still come up by chance.

mod associative_recall;
mod copy;
mod facts;
mod in_context;
mod induction;
mod mad;
mod markov;
mod mqar;
mod needles;
mod sets;
mod state_tracking;

use std::sync::Arc;

use polyhead_models::{IGNORE, Role};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::batches::{LoaderOptions, Order, Sample, Samples, first_rows};
use crate::random::{generator, some};
use crate::{Data, DataError, Loader, Opened, Opening};

pub use associative_recall::AssociativeRecallConfig;
pub use copy::CopyConfig;
pub use facts::{FactsConfig, World};
pub use in_context::InContextConfig;
pub use induction::InductionConfig;
pub use mad::{Compression, FuzzyRecall, MadConfig, MadTask, Memorization, Recall, SelectiveCopying};
pub use markov::{Markov, MarkovConfig};
pub use mqar::{Mqar, MqarConfig, MqarKind, MqarSet};
pub use needles::NeedlesConfig;
pub use sets::Rules;
pub use state_tracking::{
    Brackets, Dyck, DyckConfig, Group, Modular, Parity, StateSet, StateTask, StateTrackingConfig, Words, WordsConfig,
};

/// Samples of an endless set that count as one epoch; no other set has more.
pub(crate) const EPOCH: u64 = 1 << 40;

/// Ids of one kind: one table of the model has a row for each. Far more than any task needs, and far below what ids and lengths are
/// counted in.
const MOST_IDS: usize = 1 << 20;

/// A way of making samples.
pub trait Task: Send + Sync {
    /// How many ids it uses.
    fn n_ids(&self) -> usize;

    /// The lowest loss that any model can reach, in nats per target.
    fn floor(&self) -> f64 {
        0.0
    }

    /// What the sources of its targets are called, where rows tell them apart.
    fn sources(&self) -> Arc<[String]> {
        Arc::default()
    }

    /// A row of `seq_len` tokens for one side of the split.
    fn row(&self, rng: &mut ChaCha8Rng, seq_len: usize, side: Side) -> Sample;
}

/// Which side of the split a set of samples is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Endless.
    Train,
    /// This many samples.
    Validation(u64),
    /// This many samples.
    Tracking(u64),
}

impl Side {
    /// The stream of the generator that sample `index` draws from. Streams never overlap: even ones for training, odd ones
    /// for validation, those that neither reaches for tracking.
    pub(crate) fn stream(self, index: u64) -> u64 {
        match self {
            Self::Train => 2 * index,
            Self::Validation(_) => 2 * index + 1,
            Self::Tracking(_) => 4 * EPOCH + index,
        }
    }

    /// What sample `index` draws from.
    pub(crate) fn rng(self, seed: u64, index: u64) -> ChaCha8Rng {
        generator(seed, self.stream(index))
    }

    /// Samples of an epoch.
    pub(crate) fn per_epoch(self) -> u64 {
        match self {
            Self::Train => EPOCH,
            Self::Validation(count) | Self::Tracking(count) => count,
        }
    }
}

/// Rows of a task.
pub struct Generated {
    /// The task.
    pub task: Arc<dyn Task>,
    /// Tokens per row.
    pub seq_len: usize,
    /// Decides all samples.
    pub seed: u64,
    /// Training or validation.
    pub side: Side,
}

impl Samples for Generated {
    fn per_epoch(&self) -> u64 {
        self.side.per_epoch()
    }

    fn sample(&self, _epoch: u64, index: u64) -> Result<Sample, DataError> {
        Ok(self.task.row(&mut self.side.rng(self.seed, index), self.seq_len, self.side))
    }

    fn sources(&self) -> Arc<[String]> {
        self.task.sources()
    }
}

/// Rows of a task without end.
fn open(task: impl Task + 'static, opening: Opening<'_>) -> Result<Data, DataError> {
    let Opening { name, options, .. } = opening;
    let (task, texts): (Arc<dyn Task>, _) =
        (Arc::new(task), options.tracking.map_or(0, |tracking| tracking.texts as u64));
    let (vocab_size, seq_len, seed) = (task.n_ids(), options.seq_len, options.seed);
    let rows = |side| Generated { task: task.clone(), seq_len, seed, side };
    let loader = |side, order| Loader::new(Arc::new(rows(side)), None, LoaderOptions::of(options, order));
    Ok(Data::Tokens(Box::new(Opened {
        train: loader(Side::Train, Order::Endless),
        validation: loader(Side::Validation(options.validation_samples.max(1)), Order::Once),
        tracking: first_rows(&rows(Side::Tracking(texts)), texts)?,
        tokenizer: None,
        vocab_size,
        description: format!("generated: {name} ({vocab_size} ids), new samples without end"),
        notes: Vec::new(),
        text_hash: None,
        floor: Some(task.floor()),
    })))
}

/// A row in which nothing is predicted but the `answers`: pairs of a position and what is to follow it.
fn answers_only(tokens: Vec<u32>, answers: &[(usize, u32)]) -> Sample {
    let mut targets = vec![IGNORE; tokens.len()];
    for &(position, answer) in answers {
        targets[position] = i64::from(answer);
    }
    Sample { tokens, targets, ..Sample::default() }
}

/// The same of a row that shows `shown` tokens and then asks: behind these, questions are what answers are behind, and what is neither
/// fills the row up.
fn asked_only(tokens: Vec<u32>, shown: usize, questions: usize, answers: &[(usize, u32)]) -> Sample {
    let mut roles = vec![Role::Padding; tokens.len()];
    roles[..shown].fill(Role::Tool);
    for &(position, _) in answers {
        roles[position + 1 - questions..=position].fill(Role::Question);
        if let Some(answer) = roles.get_mut(position + 1) {
            *answer = Role::Assistant;
        }
    }
    Sample { roles: Some(roles), ..answers_only(tokens, answers) }
}

/// `count` different numbers below `n`, in random order.
fn distinct(rng: &mut ChaCha8Rng, n: usize, count: usize) -> Vec<u32> {
    some(&(0..n as u32).collect::<Vec<_>>(), count, rng)
}

fn below(rng: &mut ChaCha8Rng, n: usize) -> u32 {
    rng.random_range(0..n as u32)
}

#[cfg(test)]
pub(crate) mod testing {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Rows of a task, each checked for its shape.
    pub(crate) fn rows(task: impl Task + Clone + 'static, seq_len: usize) -> Vec<Sample> {
        let set = |side| Generated { task: Arc::new(task.clone()), seq_len, seed: 3, side };
        let (train, validation) = (set(Side::Train), set(Side::Validation(30)));
        let rows: Vec<Sample> = (0..30).map(|i| train.sample(0, i).unwrap()).collect();
        for (index, row) in rows.iter().enumerate() {
            assert_eq!((row.tokens.len(), row.targets.len()), (seq_len, seq_len));
            assert!(row.tokens.iter().all(|&id| (id as usize) < task.n_ids()));
            assert!(row.targets.iter().all(|&id| id == IGNORE || (id as usize) < task.n_ids()));
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
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::DataConfig;

    const HUGE: [u64; 5] = [1 << 20, 1 << 32, (1 << 32) + 1, u64::MAX / 3 + 1, i64::MAX as u64];

    fn opened(config: &DataConfig, seed: u64) -> Opened {
        let options = crate::tests::options(64, 1, seed);
        config.open_tokens(&crate::Tokenizer::bytes(), &options, &mut |_, _| {}).unwrap()
    }

    #[test]
    fn a_value_is_refused_by_its_name_or_works() {
        let fields = [
            ("markov", vec!["states"]),
            ("associative_recall", vec!["n_pairs", "n_queries", "n_keys", "n_values"]),
            ("needles", vec!["n_needles", "n_queried", "n_distractors", "n_keys", "n_values", "n_filler"]),
            ("in_context", vec!["n_tasks", "n_inputs", "n_shots", "n_queries", "task"]),
            ("induction", vec!["vocab"]),
            ("copy", vec!["vocab"]),
        ];
        for (name, fields) in fields {
            for field in fields {
                for value in [0, 1, 2].into_iter().chain(HUGE) {
                    let json = format!(r#"{{"{name}":{{"{field}":{value}}}}}"#);
                    let config: DataConfig = serde_json::from_str(&json).unwrap();
                    match config.source().validate(64) {
                        Err(error) => assert!(error.problem.contains(&error.field), "{json}: {error}"),
                        Ok(()) => {
                            assert!(value <= MOST_IDS as u64, "{json}");
                            assert_eq!(opened(&config, 3).train.batch(0).unwrap().tokens.len(), 64);
                        }
                    }
                }
            }
        }
    }

    /// What is shown is context, what is asked a question, and an answer is what a question has as its target.
    #[test]
    fn tasks_say_what_is_context_question_and_answer() {
        for (name, shown, asked) in [
            ("associative_recall", 16, [Role::Question, Role::Assistant].repeat(8)),
            ("needles", 58, [Role::Question, Role::Question, Role::Assistant].repeat(2)),
            ("in_context", 24, vec![Role::Question, Role::Question, Role::Assistant]),
            ("induction", 32, [vec![Role::Question], vec![Role::Assistant; 31]].concat()),
        ] {
            let config: DataConfig = serde_json::from_str(&format!(r#"{{"{name}":{{}}}}"#)).unwrap();
            let row = opened(&config, 3).train.batch(0).unwrap();
            let roles = row.roles.as_ref().unwrap();
            let mut want = [vec![Role::Tool; shown], asked].concat();
            want.resize(64, Role::Padding);
            assert_eq!(roles, &want, "{name}");
            for at in (1..64).filter(|&at| row.targets[at - 1] != IGNORE) {
                assert_eq!(
                    (roles[at], i64::from(row.tokens[at])),
                    (Role::Assistant, row.targets[at - 1]),
                    "{name} {at}"
                );
            }
        }
    }

    // A recipe and a seed mean the same samples for ever. (Markov chains are left out: they use the platform's `powf`.)
    #[test]
    fn samples_never_change_between_versions() {
        let known = [
            ("associative_recall", "4289d9910b3dba99"),
            ("needles", "ecd7342be3092507"),
            ("induction", "8ac783be46116a35"),
            ("copy", "ecb6f853498d3ef2"),
        ];
        for (name, known) in known {
            let config: DataConfig = serde_json::from_str(&format!(r#"{{"{name}":{{}}}}"#)).unwrap();
            let mut hash = blake3::Hasher::new();
            let Opened { train, validation, .. } = opened(&config, 3);
            for side in [train, validation] {
                for index in 0..9 {
                    let row = side.batch(index).unwrap();
                    for id in &row.tokens {
                        hash.update(&id.to_le_bytes());
                    }
                    for id in &row.targets {
                        hash.update(&id.to_le_bytes());
                    }
                }
            }
            assert_eq!(&hash.finalize().to_hex()[..16], known, "{name}");
            let row = |seed| opened(&config, seed).train.batch(0).unwrap();
            assert_ne!(row(3), row(4), "{name}: the seed decides");
        }
    }
}
