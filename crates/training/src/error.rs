//! What can go wrong while training.

use crate::checkpoint::CheckpointError;
use crate::picture::PictureError;
use crate::run_folder::{FileError, RunFolderError};
use crate::tensorboard::TensorboardError;

/// Why a run ended early. What had been saved is whole.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A loss or gradient was not a number; the weights were not touched by it.
    #[error(
        "step {step}: loss {loss}, gradient norm {grad_norm}: not finite, so the step was not taken. Lower the learning rate or set training.on_nonfinite = \"skip\""
    )]
    Nonfinite {
        /// The step.
        step: u64,
        /// Its loss.
        loss: f64,
        /// Its gradient norm.
        grad_norm: f64,
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
    /// A picture could not be drawn.
    #[error(transparent)]
    Picture(#[from] PictureError),
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
