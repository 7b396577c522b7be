//! The seam between the loop and what one step does.
//!
//! A procedure is a file with its settings and its step, a variant of [`ProcedureConfig`] and an arm of its
//! [`build`](ProcedureConfig::build).

use polyhead_models::{Batch, Decoder};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::config::TrainingConfig;
use crate::optimizer::Optimizer;
use crate::picture::Png;
use crate::standard::{Standard, StandardConfig};

/// `[procedure]`: one of its tables, what a step of training does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProcedureConfig {
    /// Forward, backward, update.
    Standard(StandardConfig),
}

impl Default for ProcedureConfig {
    fn default() -> Self {
        Self::Standard(StandardConfig::default())
    }
}

impl ProcedureConfig {
    /// The procedure, with `state` as [`Procedure::state`] gave it where a run is resumed.
    ///
    /// # Errors
    /// If the state is not one of this procedure's.
    pub fn build(&self, parts: Parts<'_>, state: &serde_json::Value) -> Result<Box<dyn Procedure>, TrainError> {
        let _ = state; // the standard procedure has none
        match self {
            Self::Standard(_) => Ok(Box::new(Standard::new(parts.optimizer, parts.training))),
        }
    }
}

/// What a procedure is made of.
pub struct Parts<'a> {
    /// Fresh, or with the state of an earlier sitting.
    pub optimizer: Optimizer,
    /// The loop's settings.
    pub training: &'a TrainingConfig,
    /// Token ids of texts that are kept out of training, for procedures that watch the model on some.
    pub tracking: &'a [Vec<u32>],
    /// Batches until everything has been learnt from once.
    pub batches_per_epoch: u64,
}

/// One step of training: forward, backward, update.
pub trait Procedure {
    /// The model after a step over `batches` (one per forward pass).
    ///
    /// # Errors
    /// If the loss or a gradient is not finite and the run is to stop; nothing has been updated then.
    fn step(
        &mut self,
        model: Decoder,
        batches: &[Batch],
        context: &StepContext,
    ) -> Result<(Decoder, StepReport), TrainError>;

    /// The optimiser, whose state goes into checkpoints.
    fn optimizer(&self) -> &Optimizer;

    /// Whatever beyond model and optimiser must survive a restart. Asked for when the run is saved.
    fn state(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// Whether the run has reached what it was to reach before its last step.
    fn finished(&self) -> bool {
        false
    }
}

/// What a procedure is told about a step.
#[derive(Debug, Clone, Copy)]
pub struct StepContext {
    /// The step, from 1.
    pub step: u64,
    /// The learning rate.
    pub lr: f64,
    /// The run's seed: what a procedure draws is a function of it and the position.
    pub seed: u64,
    /// Where in the data the step's first batch stands.
    pub position: u64,
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
    /// A picture.
    Picture(Png),
}
