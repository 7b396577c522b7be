//! What a checkpoint holds, and how it is written and read.

use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::Device;
use polyhead_models::Trainable;
use polyhead_models::is_beside_weights;
use polyhead_models::weights::{
    NonFinite, OnProgress, Reading, TensorFiles, ToWrite, WeightsError, held, load_files, write_safetensors,
};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::checkpoint::{Best, Draft, check_file, info, read_file};
use crate::config::OptimizerConfig;
use crate::optimizer::Optimizer;
use crate::run_folder::files;

/// The counters of a run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Steps taken, skipped ones included; the next one is this plus 1.
    pub step: u64,
    /// Batches read: the loader's position.
    pub position: u64,
    /// Updates of the optimiser.
    pub updates: u64,
    /// Targets learned from.
    pub targets: u64,
    /// Steps left out because something was not finite.
    pub skipped: u64,
    /// How many of them the run has left out in a row, up to its last step.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub skipped_in_row: u64,
    /// Whether a validation's accuracy was what `validation.stop_accuracy` asks for, which ends the run.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reached: bool,
    /// Time spent in steps, in microseconds, over all sessions.
    pub microseconds: u64,
    /// What should have followed the last step and was put off.
    #[serde(default, skip_serializing_if = "Owed::is_nothing")]
    pub owed: Owed,
    /// State of the procedure.
    pub procedure: serde_json::Value,
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// What follows a step beside saving. A run that is told to save at once puts it off, and makes up for it before its next step,
/// be it in another process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Owed {
    /// Validating; before the first step, measuring what the model starts from.
    pub validation: bool,
    /// Numbers of the attention.
    pub numbers: bool,
    /// Maps of the attention.
    pub maps: bool,
    /// Scores of the heads.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub heads: bool,
}

impl Owed {
    /// Whether the step is done with.
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// Files of every checkpoint besides the state: name and content.
pub type Companions = Vec<(String, Vec<u8>)>;

/// What a checkpoint is made of.
pub struct Saving<'a, M: Trainable> {
    /// The weights.
    pub model: &'a M,
    /// The counters, and whatever the procedure keeps beside the optimiser.
    pub progress: &'a Progress,
    /// Other files.
    pub companions: &'a Companions,
    /// The validation loss after this very step, where it was measured.
    pub validation_loss: Option<f64>,
    /// The best step so far, this one included.
    pub best: Option<Best>,
    /// Whether only what is beside the weights is saved: those are the weights of a base model.
    pub adapter_only: bool,
    /// What is done where a weight is not finite.
    pub nonfinite: NonFinite,
}

/// Saves a whole checkpoint, with these tensors of the optimiser, and gives its folder. Weights and optimiser are written piece by piece;
/// no copy of them is made.
///
/// # Errors
/// If a weight is not finite, or a file cannot be written; nothing half-written remains.
pub fn save<M: Trainable>(
    run_dir: &Path,
    saving: &Saving<'_, M>,
    optimizer: &[impl ToWrite],
) -> Result<PathBuf, TrainError> {
    let Saving { model, progress, companions, .. } = *saving;
    let mut draft = Draft::begin(run_dir, progress.step)?;
    let metadata = [("format", "polyhead".to_owned())];
    let mut tensors = held(model);
    let name = match saving.adapter_only {
        true => files::ADAPTER,
        false => files::WEIGHTS,
    };
    tensors.retain(|tensor| !saving.adapter_only || is_beside_weights(&tensor.name));
    let bad = draft.file_with(name, |out| write_safetensors(&tensors, &metadata, out))?;
    if !bad.is_empty() && saving.nonfinite == NonFinite::Refuse {
        return Err(TrainError::NonfiniteWeights { step: progress.step, found: told(&bad) });
    }
    draft.file_with(files::OPTIMIZER, |out| write_safetensors(optimizer, &metadata, out))?;
    let state = serde_json::to_vec_pretty(progress).map_err(|cause| TrainError::Data(Box::new(cause)))?;
    draft.file(files::STATE, &state)?;
    for (name, bytes) in companions {
        draft.file(name, bytes)?;
    }
    let own = saving.validation_loss.map(|validation_loss| Best { step: progress.step, validation_loss });
    Ok(draft.commit(info(progress.targets, own, saving.best))?)
}

/// Tensors and how many of their values are not finite, in words.
fn told(found: &[(String, usize)]) -> String {
    /// More are only counted; chosen by us.
    const MOST: usize = 3;
    let named = found.iter().take(MOST).map(|(name, count)| format!("{count} of {name}"));
    let more = found.len().saturating_sub(MOST);
    let rest = (more > 0).then(|| format!("some of {more} other tensors"));
    named.chain(rest).collect::<Vec<_>>().join(", ")
}

/// The counters of a checkpoint.
///
/// # Errors
/// If the file is missing, altered or not ours.
pub fn read_progress(checkpoint: &Path) -> Result<Progress, TrainError> {
    let bytes = read_file(checkpoint, files::STATE)?;
    serde_json::from_slice(&bytes).map_err(|cause| TrainError::State {
        path: checkpoint.join(files::STATE).display().to_string(),
        problem: cause.to_string(),
    })
}

/// The file of a checkpoint's weights, and which parameters it has: all, or those beside the weights of a base model.
fn weights_of(checkpoint: &Path) -> (&'static str, fn(&str) -> bool) {
    match checkpoint.join(files::ADAPTER).exists() {
        true => (files::ADAPTER, is_beside_weights),
        false => (files::WEIGHTS, |_| true),
    }
}

/// `model` with the weights of a checkpoint; where that has only what is beside them, `model` has those of the base model already.
/// They are read tensor by tensor, so that no second copy is ever held.
///
/// # Errors
/// If the file is missing or altered, or does not fit the model, or holds numbers that are not finite.
pub fn read_model<M: Module>(checkpoint: &Path, model: M, nonfinite: NonFinite) -> Result<M, TrainError> {
    check_file(checkpoint, weights_of(checkpoint).0)?;
    read_checked_model(checkpoint, model, nonfinite, &mut |_, _| {})
}

/// [`read_model`] of a checkpoint that [`verify`](crate::checkpoint::verify) has seen just now; `progress` is told how far it is.
///
/// # Errors
/// As [`read_model`], but for what has been altered.
pub fn read_checked_model<M: Module>(
    checkpoint: &Path,
    model: M,
    reading: impl Into<Reading>,
    progress: OnProgress<'_>,
) -> Result<M, TrainError> {
    let (name, part) = weights_of(checkpoint);
    let read = open(checkpoint, name).and_then(|tensors| load_files(model, &tensors, part, reading, progress));
    read.map_err(|cause| unfit(checkpoint, name, &cause))
}

/// The optimiser of a checkpoint.
///
/// # Errors
/// If the file is missing or altered.
pub fn read_optimizer(
    checkpoint: &Path,
    config: OptimizerConfig,
    updates: u64,
    device: &Device,
) -> Result<Optimizer, TrainError> {
    check_file(checkpoint, files::OPTIMIZER)?;
    let restored =
        open(checkpoint, files::OPTIMIZER).and_then(|tensors| Optimizer::restore(config, updates, &tensors, device));
    restored.map_err(|cause| unfit(checkpoint, files::OPTIMIZER, &cause))
}

fn open(checkpoint: &Path, name: &str) -> Result<TensorFiles, WeightsError> {
    TensorFiles::open(&[checkpoint.join(name)])
}

/// A file that is what was saved, but not what is needed.
fn unfit(checkpoint: &Path, name: &str, cause: &WeightsError) -> TrainError {
    TrainError::State { path: checkpoint.join(name).display().to_string(), problem: cause.to_string() }
}
