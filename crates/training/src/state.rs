//! What a checkpoint holds, and how it is written and read.

use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::Device;
use polyhead_models::Learner;
use polyhead_models::weights::{
    Named, NonFinite, WeightsError, check_finite, from_safetensors, load, named, to_safetensors,
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::TrainError;
use crate::checkpoint::{Draft, read_file};
use crate::config::OptimizerConfig;
use crate::optimizer::Optimizer;
use crate::procedure::Procedure;

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
    /// Targets learnt from.
    pub targets: u64,
    /// Steps left out because something was not finite.
    pub skipped: u64,
    /// Time spent in steps, in microseconds, over all sittings.
    pub microseconds: u64,
    /// State of the procedure.
    pub procedure: serde_json::Value,
}

/// Files that lie in every checkpoint besides the state: name and content.
pub type Companions = Vec<(String, Vec<u8>)>;

/// Saves a whole checkpoint of `model` and gives its folder.
///
/// # Errors
/// If a file cannot be written; nothing half-written remains.
pub fn save<M: Learner>(
    run_dir: &Path,
    model: &M,
    procedure: &dyn Procedure<M>,
    progress: &Progress,
    companions: &Companions,
) -> Result<PathBuf, TrainError> {
    let mut draft = Draft::begin(run_dir, progress.step)?;
    let metadata = [("format", "polyhead".to_owned())];
    draft.file("model.safetensors", &to_safetensors(&named(model), &metadata)?)?;
    draft.file("optimizer.safetensors", &to_safetensors(&procedure.optimizer().tensors(), &metadata)?)?;
    let state = serde_json::to_vec_pretty(progress).map_err(|cause| TrainError::Data(Box::new(cause)))?;
    draft.file("state.json", &state)?;
    for (name, bytes) in companions {
        draft.file(name, bytes)?;
    }
    Ok(draft.commit(json!({ "targets": progress.targets }))?)
}

/// The counters of a checkpoint.
///
/// # Errors
/// If the file is missing, altered or not ours.
pub fn read_progress(checkpoint: &Path) -> Result<Progress, TrainError> {
    let bytes = read_file(checkpoint, "state.json")?;
    serde_json::from_slice(&bytes).map_err(|cause| TrainError::State {
        path: checkpoint.join("state.json").display().to_string(),
        problem: cause.to_string(),
    })
}

/// `model` with the weights of a checkpoint.
///
/// # Errors
/// If the file is missing or altered, or does not fit the model, or holds numbers that are not finite.
pub fn read_model<M: Module>(checkpoint: &Path, model: M, nonfinite: NonFinite) -> Result<M, TrainError> {
    const NAME: &str = "model.safetensors";
    let bytes = read_file(checkpoint, NAME)?;
    let check = |tensor: &Named| check_finite(&tensor.name, &tensor.shape, &tensor.values).err();
    let read = from_safetensors(&bytes).and_then(|tensors| {
        let bad: Vec<String> = tensors.values().filter_map(check).collect();
        match nonfinite {
            NonFinite::Refuse if !bad.is_empty() => Err(WeightsError::NonFinite(bad)),
            _ => load(model, tensors),
        }
    });
    read.map_err(|cause| unfit(checkpoint, NAME, &cause))
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
    const NAME: &str = "optimizer.safetensors";
    let bytes = read_file(checkpoint, NAME)?;
    let restored = from_safetensors(&bytes).and_then(|tensors| Optimizer::restore(config, updates, tensors, device));
    restored.map_err(|cause| unfit(checkpoint, NAME, &cause))
}

/// A file that is what was saved, but not what is needed.
fn unfit(checkpoint: &Path, name: &str, cause: &WeightsError) -> TrainError {
    TrainError::State { path: checkpoint.join(name).display().to_string(), problem: cause.to_string() }
}
