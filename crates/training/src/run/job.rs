//! What a run is made of, who watches it, and how it ends.

use std::path::PathBuf;

use polyhead_models::mup::Scalings;
use polyhead_models::weights::{NonFinite, held, write_safetensors};
use polyhead_models::{Decoder, Evaluated, Trainable};

use super::Requests;
use crate::TrainError;
use crate::checkpoint::Best;
use crate::config::{CheckpointConfig, MetricsConfig, OptimizerConfig, TrainingConfig, ValidationConfig};
use crate::evaluate::Batches;
use crate::procedures::ProcedureConfig;
use crate::ranks::Ranks;
use crate::run_folder::RunLock;
use crate::state::{Companions, Progress};

/// Everything that a run is made of.
pub struct Job<'a, M: Trainable = Decoder> {
    /// Who trains together.
    pub ranks: &'a Ranks<'a>,
    /// Where the run is written by rank 0, which holds its lock.
    pub run_dir: PathBuf,
    /// On rank 0, proof that nobody else writes there.
    pub lock: Option<RunLock>,
    /// A checkpoint to go on from, already verified; `None` starts afresh.
    pub resume: Option<PathBuf>,
    /// How long, on how much.
    pub training: TrainingConfig,
    /// What a step does.
    pub procedure: ProcedureConfig,
    /// Optimizer settings.
    pub optimizer: OptimizerConfig,
    /// What the learning rates of parameters are multiplied by.
    pub scalings: Scalings,
    /// How fast.
    pub lr_scheduler: crate::config::LrSchedulerConfig,
    /// When the model is validated.
    pub validation: ValidationConfig,
    /// When it is saved.
    pub checkpoint: CheckpointConfig,
    /// What is written down.
    pub metrics: MetricsConfig,
    /// Decides the device's random numbers, step by step.
    pub seed: u64,
    /// Batches to learn from.
    pub train: &'a dyn Batches<M::Batch>,
    /// Batches to validate on.
    pub held_out: &'a dyn Batches<M::Batch>,
    /// Further numbers about the model, by name: measured before the first step and with each validation.
    pub probe: Option<&'a Probe<'a, M>>,
    /// Numbers about its heads: measured before the first step and every metrics.heads_interval steps.
    pub heads: Option<&'a Probe<'a, M>>,
    /// Validate before the first step too: what a model that was trained elsewhere starts from.
    pub validate_first: bool,
    /// Texts that the procedure watches the model on, a row each; no part of `train`.
    pub tracking: &'a [M::Batch],
    /// Files that go into every checkpoint as they are: recipe, tokenizer.
    pub companions: Companions,
    /// Whether only low-rank pairs are saved: the other weights are those of a base model, which the companions name.
    pub adapter_only: bool,
    /// The recipe as text, for TensorBoard.
    pub recipe: String,
    /// What decides the run, key by key, for TensorBoard's table of runs: numbers, texts, true or false.
    pub hyperparameters: Vec<(String, serde_json::Value)>,
    /// What is done where weights are not finite: those that the run goes on from, those that it saves.
    pub nonfinite: NonFinite,
    /// What is asked for from outside while it runs.
    pub requests: &'a Requests,
}

impl<M: Trainable> Job<'_, M> {
    /// A hash of what all ranks must have in common: the recipe, the data, the initial weights.
    pub(super) fn identity(&self, model: &M) -> Result<String, TrainError> {
        let mut hasher = blake3::Hasher::new();
        for (_, bytes) in &self.companions {
            hasher.update(bytes);
        }
        write_safetensors(&held(model), &[], &mut hasher).map_err(|cause| TrainError::Data(Box::new(cause)))?;
        Ok(hasher.finalize().to_string())
    }
}

/// Measures a model, on a device without a tape; `None` once the second argument says that the run is to be saved first.
pub type Probe<'a, M = Decoder> = dyn Fn(&M, &dyn Fn() -> bool) -> Option<Vec<(String, f64)>> + 'a;

/// Somebody who watches: a progress bar, a dashboard. Nothing that is told here changes the run.
pub trait View {
    /// A step was taken.
    fn stepped(&mut self, step: &Logged);
    /// The model was validated.
    fn validated(&mut self, step: u64, sums: &Evaluated);
    /// The run was saved.
    fn saved(&mut self, step: u64);
    /// Something that a person should know, as it is to be read.
    fn note(&mut self, note: &str);
}

/// A step as it is logged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Logged {
    /// The step, from 1.
    pub step: u64,
    /// Mean cross-entropy in nats.
    pub loss: f64,
    /// Bits per byte, where the data is text.
    pub bits_per_byte: Option<f64>,
    /// Before clipping.
    pub grad_norm: f64,
    /// The learning rate.
    pub lr: f64,
    /// Input tokens (for classifiers: examples) per second since the last logged step; time spent validating and saving does not count.
    pub tokens_per_second: f64,
    /// Largest resident set, in bytes.
    pub memory: Option<u64>,
    /// Whether the step was left out.
    pub skipped: bool,
    /// Whether this step is written to the logs.
    pub logged: bool,
}

/// How a run ended.
#[derive(Debug)]
pub struct Outcome<M: Trainable = Decoder> {
    /// The trained model.
    pub model: M,
    /// Counters at the end.
    pub progress: Progress,
    /// The last validation, if there was one in this session.
    pub validation: Option<M::Totals>,
    /// The best checkpoint by validation loss.
    pub best: Option<Best>,
    /// The last checkpoint.
    pub checkpoint: PathBuf,
    /// Why the procedure has ended the run, where it has: more steps change nothing.
    pub ended: Option<String>,
    /// The signal that ended the run.
    pub interrupted: Option<usize>,
    /// Why a log lacks its end, where it could not be written to the last.
    pub missing: Option<String>,
}
