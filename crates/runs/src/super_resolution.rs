//! Super-resolution: its images, its first weights, and trained networks.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use polyhead_data::ImageSet;
use polyhead_kernels::without_drawing;
use polyhead_models::{Images, SuperResolution};
use polyhead_recipe::{ModelConfig, Problems, Recipe};
use polyhead_training::evaluate::Batches;
use polyhead_training::state;

use crate::Caller;
use crate::costs::Known;
use crate::data::{Source, TrainingData, options};
use crate::device;
use crate::error::Failure;
use crate::kind::Kind;
use crate::pretrained::find_own;
use crate::resolve::Resolved;

impl TrainingData<Images> for ImageSet {
    fn description(&self) -> &str {
        &self.description
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }

    fn known(&self) -> Known {
        Known::Images(self.train.size())
    }

    fn text_hash(&self) -> Option<&str> {
        self.text_hash.as_deref()
    }

    fn record(&self) -> serde_json::Value {
        let ImageSet { description, text_hash, .. } = self;
        serde_json::json!({ "description": description, "text_hash": text_hash, "input": self.train.size() })
    }

    fn train(&self) -> Box<dyn Batches<Images> + '_> {
        Box::new(Source(&self.train))
    }

    fn held_out(&self) -> Box<dyn Batches<Images> + '_> {
        Box::new(Source(&self.validation))
    }
}

impl Kind for SuperResolution {
    type Data = ImageSet;

    fn open(resolved: &Resolved, _progress: &mut dyn FnMut(u64, u64)) -> Result<ImageSet, Failure> {
        image_set(&resolved.recipe)
    }

    fn first(resolved: &Resolved, _data: &ImageSet, device: &Device) -> Result<Self, Failure> {
        match &resolved.recipe.model {
            ModelConfig::SuperResolution(config) => Ok(config.init(device)),
            _ => Err(Problems::plain("model.super_resolution is missing".into()).into()),
        }
    }

    fn layers(&self) -> Vec<&'static str> {
        vec![self.config().mixer_name(); self.config().n_layers]
    }
}

/// Opens the images of a recipe.
///
/// # Errors
/// If they are missing or malformed, or it has none.
pub fn image_set(recipe: &Recipe) -> Result<ImageSet, Failure> {
    Ok(recipe.data.open_images(&options(recipe))?)
}

/// A trained network with what belongs to it.
pub struct TrainedSuperResolution {
    /// Its folder.
    pub path: PathBuf,
    /// The weights, on a plain device.
    pub model: SuperResolution,
    /// The recipe that trained it.
    pub recipe: Recipe,
}

/// Loads the trained network of a run or a checkpoint to use; `None` where there is another kind of model.
///
/// # Errors
/// If it is missing, damaged, or does not fit together.
pub fn open_super_resolution(
    path: &Path,
    device_name: Option<&str>,
    caller: Caller,
) -> Result<Option<TrainedSuperResolution>, Failure> {
    let path = &caller.locate(path)?;
    let Some((path, recipe)) = find_own(path, caller)? else { return Ok(None) };
    let ModelConfig::SuperResolution(config) = &recipe.model else { return Ok(None) };
    config.validate(None).map_err(|error| Failure::Run(format!("{}: {error}", path.display())))?;
    let device = device::open(device_name.unwrap_or(&recipe.training.device)).map_err(Failure::Run)?;
    let model = without_drawing(|| config.init(&device));
    let model = state::read_checked_model(&path, model, caller.nonfinite, &mut caller.loading())?;
    Ok(Some(TrainedSuperResolution { path, model, recipe }))
}
