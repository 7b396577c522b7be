//! What can go wrong while training.

use crate::checkpoint::CheckpointError;
use crate::image::ImageError;
use crate::run_folder::{FileError, RunFolderError};
use crate::tensorboard::TensorboardError;

/// Why a run ended early. What had been saved is whole.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A loss or gradient was not a number; the weights were not touched by it.
    #[error(
        "step {step}: loss {loss}, gradient norm {grad_norm}: not finite, so the step was not taken. {kept}\n  hint: \
         training.on_nonfinite = \"skip\" goes on from there without the batches that give such numbers; a lower learning rate \
         is another run (--out), which may start from its weights (model.pretrained)"
    )]
    Nonfinite {
        /// The step.
        step: u64,
        /// Its loss.
        loss: f64,
        /// Its gradient norm.
        grad_norm: f64,
        /// Where the state before it is saved, or why it is not.
        kept: String,
    },
    /// A gradient was not a number once some layers had been updated by others.
    #[error(
        "step {step}: gradient norm {grad_norm} at a loss of {loss}: not finite, and training.optimizer_in_backward had updated layers by \
         then, so that this state is not kept. {kept}\n  hint: with training.optimizer_in_backward = false the state before such a step is \
         saved; a lower learning rate is another run (--out)"
    )]
    Torn {
        /// The step.
        step: u64,
        /// Its loss.
        loss: f64,
        /// Its gradient norm.
        grad_norm: f64,
        /// Where the last state is that was saved, if one was.
        kept: String,
    },
    /// Step after step was left out.
    #[error(
        "step {step}: {in_row} steps in a row were left out because their loss or gradient was not finite \
         (training.max_skipped_steps). The weights have not moved meanwhile, so others will not do better. {kept}\n  hint: start \
         another run (--out) with a lower learning rate; model.pretrained takes the weights of an earlier checkpoint"
    )]
    Skipped {
        /// The step.
        step: u64,
        /// How many steps were left out.
        in_row: u64,
        /// Where the state is saved, or why it is not.
        kept: String,
    },
    /// Weights are NaN or infinite, so that they are not saved.
    #[error(
        "the weights after step {step} are not finite, so they are not saved: {found}. What they compute is no number\n  hint: \
         the last checkpoint is whole; start another run (--out) with a lower learning rate"
    )]
    NonfiniteWeights {
        /// The step.
        step: u64,
        /// Which tensors, and how many of their values.
        found: String,
    },
    /// Something long was given up because the run is to be saved first. The loop makes up for it; nobody else meets it.
    #[error("put off: the run is to be saved first")]
    PutOff,
    /// Another rank could not go on, so that none can.
    #[error("rank {rank} on {host}: {problem}")]
    OtherRank {
        /// The rank.
        rank: usize,
        /// The machine that it runs on.
        host: String,
        /// What it met.
        problem: String,
    },
    /// A setting that does not fit the model: where it stands, the rule, the way out.
    #[error("{0}")]
    Setting(String),
    /// The data could not give a batch.
    #[error("data: {0}")]
    Data(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A checkpoint could not be written or read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The run folder is in use or cannot be written.
    #[error(transparent)]
    RunFolder(#[from] RunFolderError),
    /// A file could not be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// TensorBoard's files could not be written.
    #[error(transparent)]
    Tensorboard(#[from] TensorboardError),
    /// An image could not be drawn.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The curve of the run could not be drawn.
    #[error("the curve of the run could not be drawn: {0}")]
    Curve(String),
    /// A procedure's settings do not fit, or its state is not its own.
    #[error("{0}")]
    Procedure(String),
    /// What is to be frozen cannot be.
    #[error("{0}")]
    Freeze(String),
    /// Weights or optimiser state do not fit.
    #[error(transparent)]
    Weights(#[from] polyhead_models::weights::WeightsError),
    /// A checkpoint's state is not as it was written.
    #[error("{path}: {problem}")]
    State {
        /// The file.
        path: String,
        /// What is wrong.
        problem: String,
    },
}
