//! Trained embedders, and the pairs that they learn.

use std::path::{Path, PathBuf};

use polyhead_data::{PairLoader, Paired};
use polyhead_models::{Embedder, Pairs};
use polyhead_training::evaluate::Batches;
use polyhead_training::{TrainError, state};

use crate::allowed::allowed;
use crate::assemble::{RECORD, options, record};
use crate::device;
use crate::pretrained::{find_checkpoint, recipe_of};
use crate::recipe::Recipe;
use crate::report::Failure;

/// A loader of pairs as the loop sees it.
pub struct PairSource(pub PairLoader);

impl Batches<Pairs> for PairSource {
    fn batch(&self, position: u64) -> Result<Pairs, TrainError> {
        self.0.batch(position).map_err(|error| TrainError::Data(Box::new(error)))
    }

    fn per_epoch(&self) -> u64 {
        self.0.batches_per_epoch()
    }
}

/// Layers of the features that pairs are made of, and numbers of each.
pub fn layers_and_dim(paired: &Paired) -> [usize; 2] {
    let [_, layers, dim] = paired.train.shape();
    [layers, dim]
}

/// Opens the pairs of a recipe.
///
/// # Errors
/// If they are missing or malformed, or it has none.
pub fn paired(recipe: &Recipe) -> Result<Paired, Failure> {
    Ok(recipe.data.open_pairs(&options(recipe))?)
}

/// A trained embedder with what belongs to it.
pub struct TrainedEmbedder {
    /// Its folder.
    pub path: PathBuf,
    /// The weights, on a plain device.
    pub model: Embedder,
    /// The recipe that trained it.
    pub recipe: Recipe,
    /// Layers of the features that it reads, and numbers of each.
    pub input: [usize; 2],
}

/// Loads the trained embedder of a run or a checkpoint to use; `None` where there is another kind of model.
///
/// # Errors
/// If it is missing, damaged, or does not fit together.
pub fn open_embedder(path: &Path, device_name: Option<&str>) -> Result<Option<TrainedEmbedder>, Failure> {
    if path.join("config.json").exists() {
        return Ok(None);
    }
    let path = find_checkpoint(path)?;
    let recipe = recipe_of(&path)?;
    let Some(config) = &recipe.model.embedder else { return Ok(None) };
    let input: [usize; 2] = serde_json::from_value(record(&path)?["input"].clone())
        .map_err(|_| Failure::Run(format!("{}/{RECORD}: input is missing or damaged", path.display())))?;
    let [layers, dim] = input;
    config.validate(Some(dim)).map_err(|error| Failure::Run(format!("{}: {error}", path.display())))?;
    let device = device::open(device_name.unwrap_or(&recipe.training.device)).map_err(Failure::Run)?;
    let model = state::read_model(&path, config.init(layers, dim, &device), allowed().nonfinite)?;
    Ok(Some(TrainedEmbedder { path, model, recipe, input }))
}
