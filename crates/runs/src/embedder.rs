//! Embedders: their pairs, their first weights, and trained ones.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use polyhead_data::Paired;
use polyhead_kernels::without_drawing;
use polyhead_models::{Embedder, EmbedderConfig, Pairs};
use polyhead_recipe::{ModelConfig, Problems, Recipe};
use polyhead_training::evaluate::Batches;
use polyhead_training::state;

use crate::Caller;
use crate::costs::Known;
use crate::data::{Source, TrainingData, options, record};
use crate::device;
use crate::error::Failure;
use crate::kind::Kind;
use crate::pretrained::find_own;
use crate::resolve::Resolved;
use polyhead_training::run_folder::files::DATA;

impl TrainingData<Pairs> for Paired {
    fn description(&self) -> &str {
        &self.description
    }

    fn known(&self) -> Known {
        Known::Pairs(layers_and_dim(self))
    }

    fn text_hash(&self) -> Option<&str> {
        Some(&self.text_hash)
    }

    fn record(&self) -> serde_json::Value {
        let Paired { description, text_hash, .. } = self;
        serde_json::json!({ "description": description, "text_hash": text_hash, "input": layers_and_dim(self) })
    }

    fn train(&self) -> Box<dyn Batches<Pairs> + '_> {
        Box::new(Source(&self.train))
    }

    fn held_out(&self) -> Box<dyn Batches<Pairs> + '_> {
        Box::new(Source(&self.validation))
    }
}

impl Kind for Embedder {
    type Data = Paired;

    fn open(resolved: &Resolved, _progress: &mut dyn FnMut(u64, u64)) -> Result<Paired, Failure> {
        let paired = paired(&resolved.recipe)?;
        let [_, dim] = layers_and_dim(&paired);
        let checked = config(resolved)?.validate(Some(dim));
        checked.map_err(|error| Problems::plain(format!("model.embedder.{error}")))?;
        Ok(paired)
    }

    fn first(resolved: &Resolved, data: &Paired, device: &Device) -> Result<Self, Failure> {
        let [layers, dim] = layers_and_dim(data);
        Ok(config(resolved)?.init(layers, dim, device))
    }

    fn layers(&self) -> Vec<&'static str> {
        vec!["mltp"]
    }
}

fn config(resolved: &Resolved) -> Result<&EmbedderConfig, Failure> {
    match &resolved.recipe.model {
        ModelConfig::Embedder(config) => Ok(config),
        _ => Err(Problems::plain("model.embedder is missing".into()).into()),
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
pub fn open_embedder(
    path: &Path,
    device_name: Option<&str>,
    caller: Caller,
) -> Result<Option<TrainedEmbedder>, Failure> {
    let path = &caller.locate(path)?;
    let Some((path, recipe)) = find_own(path, caller)? else { return Ok(None) };
    let ModelConfig::Embedder(config) = &recipe.model else { return Ok(None) };
    let input: [usize; 2] = serde_json::from_value(record(&path)?["input"].clone())
        .map_err(|_| Failure::Run(format!("{}/{DATA}: input is missing or damaged", path.display())))?;
    let [layers, dim] = input;
    config.validate(Some(dim)).map_err(|error| Failure::Run(format!("{}: {error}", path.display())))?;
    let device = device::open(device_name.unwrap_or(&recipe.training.device)).map_err(Failure::Run)?;
    let model = without_drawing(|| config.init(layers, dim, &device));
    let model = state::read_checked_model(&path, model, caller.nonfinite, &mut caller.loading())?;
    Ok(Some(TrainedEmbedder { path, model, recipe, input }))
}
