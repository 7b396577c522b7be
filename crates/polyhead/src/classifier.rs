//! Trained classifiers, and the examples that they learn.

use std::path::{Path, PathBuf};

use polyhead_data::{ExampleLoader, Labelled, Tokenizer};
use polyhead_models::{Classifier, Examples, Sizes};
use polyhead_training::evaluate::Batches;
use polyhead_training::{TrainError, state};

use crate::allowed::allowed;
use crate::assemble::{RECORD, labelled, record};
use crate::device;
use crate::pretrained::{find_checkpoint, recipe_of, tokenizer_of};
use crate::recipe::Recipe;
use crate::report::Failure;

/// A loader of examples as the loop sees it.
pub struct ExampleSource(pub ExampleLoader);

impl Batches<Examples> for ExampleSource {
    fn batch(&self, position: u64) -> Result<Examples, TrainError> {
        self.0.batch(position).map_err(|error| TrainError::Data(Box::new(error)))
    }

    fn per_epoch(&self) -> u64 {
        self.0.batches_per_epoch()
    }
}

/// What data tells about the size of a classifier.
pub fn sizes(labelled: &Labelled) -> Sizes {
    Sizes { input: labelled.train.shape(), n_classes: labelled.classes.len() }
}

/// A trained classifier with what belongs to it.
pub struct TrainedClassifier {
    /// Its folder.
    pub path: PathBuf,
    /// The weights, on a plain device.
    pub model: Classifier,
    /// The recipe that trained it.
    pub recipe: Recipe,
    /// The names of its classes.
    pub classes: Vec<String>,
    /// For text.
    pub tokenizer: Option<Tokenizer>,
}

/// Loads the trained classifier of a run or a checkpoint to use; `None` where there is a decoder.
///
/// # Errors
/// If it is missing, damaged, or does not fit together.
pub fn open_classifier(path: &Path, device_name: Option<&str>) -> Result<Option<TrainedClassifier>, Failure> {
    if path.join("config.json").exists() {
        return Ok(None);
    }
    let path = find_checkpoint(path)?;
    let recipe = recipe_of(&path)?;
    let Some(config) = &recipe.model.classifier else { return Ok(None) };
    let record = record(&path)?;
    let unfit = |what: &str| Failure::Run(format!("{}/{RECORD}: {what} is missing or damaged", path.display()));
    let input = serde_json::from_value(record["input"].clone()).map_err(|_| unfit("input"))?;
    let classes: Vec<String> = serde_json::from_value(record["classes"].clone()).map_err(|_| unfit("classes"))?;
    config.validate(Some(input)).map_err(|error| Failure::Run(format!("{}: {error}", path.display())))?;
    let device = device::open(device_name.unwrap_or(&recipe.training.device)).map_err(Failure::Run)?;
    let model = config.init(Sizes { input, n_classes: classes.len() }, &device);
    let model = state::read_model(&path, model, allowed().nonfinite)?.with_precision(recipe.training.precision);
    let tokenizer = tokenizer_of(&path)?;
    Ok(Some(TrainedClassifier { path, model, recipe, classes, tokenizer }))
}

impl TrainedClassifier {
    /// Opens the examples that its recipe names.
    ///
    /// # Errors
    /// If they are missing or malformed, or are no longer of the kind that it learned.
    pub fn data(&self) -> Result<Labelled, Failure> {
        let labelled = labelled(&self.recipe, self.tokenizer.as_ref().unwrap_or(&Tokenizer::bytes()))?;
        match labelled.classes == self.classes && labelled.train.shape() == self.model.sizes().input {
            true => Ok(labelled),
            false => Err(Failure::Run(format!(
                "the data has other classes or inputs than {} learned: put it back",
                self.path.display()
            ))),
        }
    }
}
