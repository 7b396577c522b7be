//! The seam between the loop and what one step does.

use polyhead_models::{Batch, Decoder};

use crate::TrainError;
use crate::optimizer::Optimizer;

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

    /// Whatever beyond model and optimiser must survive a restart.
    fn state(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
}

/// What a procedure is told about a step.
#[derive(Debug, Clone, Copy)]
pub struct StepContext {
    /// The step, from 1.
    pub step: u64,
    /// The learning rate.
    pub lr: f64,
}

/// What a step tells.
#[derive(Debug, Clone, Copy, PartialEq)]
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
}
