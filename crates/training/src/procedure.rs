//! The seam between the loop and what one step does.

use polyhead_kernels::seed_random;
use polyhead_models::{Decoder, Trainable};

use crate::TrainError;
use crate::config::TrainingConfig;
use crate::evaluate::Batches;
use crate::image::Png;
use crate::optimizer::Optimizer;
use crate::ranks::Ranks;

/// What a procedure is made of.
pub struct Parts<'a, M: Trainable = Decoder> {
    /// Fresh, or with the state of an earlier session.
    pub optimizer: Optimizer,
    /// The loop's settings.
    pub training: &'a TrainingConfig,
    /// The model before the next step.
    pub model: &'a M,
    /// Texts that are kept out of training, a row each, for procedures that watch the model on some.
    pub tracking: &'a [M::Batch],
    /// Batches until everything has been learned from once.
    pub batches_per_epoch: u64,
}

/// One step of training: forward, backward, update.
pub trait Procedure<M: Trainable = Decoder> {
    /// The model after a step over `batches`: one for each forward pass of this rank, in the order of the data.
    ///
    /// # Errors
    /// If the model or the data does not fit the procedure.
    fn step(
        &mut self,
        model: M,
        batches: &[M::Batch],
        context: &StepContext<'_>,
    ) -> Result<(M, StepReport), TrainError>;

    /// The optimiser, whose state goes into checkpoints.
    fn optimizer(&self) -> &Optimizer;

    /// Whatever beyond model and optimiser must survive a restart. Asked for when the run is saved.
    fn state(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// What is measured with each validation beside the loss of the plain, causal model: names and values.
    ///
    /// # Errors
    /// If the data cannot be read, or the model does not fit the procedure.
    fn measure(&self, model: &M, held_out: HeldOut<'_, M>) -> Result<Vec<(String, f64)>, TrainError> {
        let _ = (model, held_out);
        Ok(Vec::new())
    }

    /// Why the run has ended before its last step, in words, where it has.
    fn ended(&self) -> Option<String> {
        None
    }
}

/// What a procedure may measure with.
pub struct HeldOut<'a, M: Trainable = Decoder> {
    /// The batches.
    pub batches: &'a dyn Batches<M::Batch>,
    /// How many of them were validated on, from the first on.
    pub count: u64,
    /// The run's seed.
    pub seed: u64,
    /// Whether attention is looked at too.
    pub observe: bool,
}

// Derived, these would ask the model to be `Copy`.
impl<M: Trainable> Clone for HeldOut<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M: Trainable> Copy for HeldOut<'_, M> {}

/// What a procedure is told about a step.
#[derive(Debug, Clone, Copy)]
pub struct StepContext<'a> {
    /// The step, from 1.
    pub step: u64,
    /// The learning rate.
    pub lr: f64,
    /// The run's seed: what a procedure draws is a function of it and the position.
    pub seed: u64,
    /// Where in the data the step's first batch stands.
    pub position: u64,
    /// Forward passes of the step on all ranks.
    pub passes: u64,
    /// Targets of the step on all ranks.
    pub targets: u64,
    /// Who shares the step.
    pub ranks: &'a Ranks<'a>,
}

impl StepContext<'_> {
    /// From here on numbers are drawn as they are in this pass of the step, counted over all ranks: a function of the seed, the step and
    /// the pass, so that a resumed run, or one on other ranks, draws the same.
    pub(crate) fn seed_pass(&self, pass: u64) {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"polyhead step");
        hasher.update(&self.seed.to_le_bytes());
        hasher.update(&self.step.to_le_bytes());
        if pass > 0 {
            hasher.update(&pass.to_le_bytes());
        }
        let bytes = *hasher.finalize().as_bytes();
        seed_random(u64::from_le_bytes(std::array::from_fn(|i| bytes[i])));
    }
}

/// What a step tells.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepReport {
    /// Mean cross-entropy in nats over the step's targets, before the update.
    pub loss: f64,
    /// Mean auxiliary loss, where the mechanism has one.
    pub penalty: Option<f64>,
    /// Global norm of the gradients, before clipping.
    pub grad_norm: f64,
    /// Targets of the step.
    pub targets: u64,
    /// Whether the step was left out because something was not finite.
    pub skipped: bool,
    /// Whether it is to end the run besides: then nothing of the procedure has moved either.
    pub refused: bool,
    /// Whether some layers had been updated before what is not finite was found, so that this is no state to go on from.
    pub torn: bool,
    /// Further numbers of the procedure, by their names in the logs: `bilevel/inner_loss`, ...
    pub measured: Vec<(String, f64)>,
    /// Further things to see, by their names in TensorBoard.
    pub shown: Vec<(String, Shown)>,
    /// Write this step to the logs, whatever the interval.
    pub log: bool,
}

/// What TensorBoard shows besides numbers.
#[derive(Debug, Clone, PartialEq)]
pub enum Shown {
    /// The spread of these values.
    Histogram(Vec<f32>),
    /// An image.
    Image(Png),
}
