//! Classifiers: their examples, their first weights, and trained ones.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use polyhead_data::{Labelled, Tokenizer};
use polyhead_kernels::without_drawing;
use polyhead_models::{
    ClassTotals, Classifier, ClassifierConfig, Examples, InputShape, MOST_CONFUSED, Sizes, Trainable,
};
use polyhead_recipe::{ModelConfig, Problems, Recipe, differences_of};
use polyhead_training::evaluate::Batches;
use polyhead_training::state;

use crate::Caller;
use crate::costs::Known;
use crate::data::{Source, TrainingData, options, record};
use crate::device;
use crate::error::Failure;
use crate::kind::Kind;
use crate::pretrained::{find_checkpoint, find_own, recipe_of, tokenizer_of};
use crate::resolve::Resolved;
use crate::result::ClassTable;
use polyhead_training::run_folder::files::DATA;

impl TrainingData<Examples> for Labelled {
    fn description(&self) -> &str {
        &self.description
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }

    fn known(&self) -> Known {
        Known::Examples(sizes(self))
    }

    fn text_hash(&self) -> Option<&str> {
        self.text_hash.as_deref()
    }

    fn record(&self) -> serde_json::Value {
        let Labelled { description, text_hash, classes, .. } = self;
        serde_json::json!({
            "description": description, "text_hash": text_hash, "input": self.train.shape(), "classes": classes,
        })
    }

    fn train(&self) -> Box<dyn Batches<Examples> + '_> {
        Box::new(Source(&self.train))
    }

    fn held_out(&self) -> Box<dyn Batches<Examples> + '_> {
        Box::new(Source(&self.validation))
    }

    fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    fn check(&self, _name: &str) -> Result<Vec<String>, Failure> {
        let many = (self.classes.len() > MOST_CONFUSED).then(|| {
            format!(
                "{} classes: confusions are counted, but no matrix of classes by classes is written (above {MOST_CONFUSED})",
                self.classes.len()
            )
        });
        Ok(many.into_iter().collect())
    }
}

impl Kind for Classifier {
    type Data = Labelled;

    fn open(resolved: &Resolved, _progress: &mut dyn FnMut(u64, u64)) -> Result<Labelled, Failure> {
        let recipe = &resolved.recipe;
        let labelled = labelled(recipe, &resolved.tokenizer)?;
        refuse_one_class(&labelled, recipe.data.name())?;
        let untrained = labelled.classes.iter().zip(&labelled.counts).filter(|(_, count)| **count == 0);
        let untrained: Vec<&str> = untrained.map(|(class, _)| class.as_str()).take(5).collect();
        if !untrained.is_empty() {
            (resolved.caller.tell)(&format!(
                "warning: no example to learn from of {} (a smaller validation.fraction leaves more)",
                untrained.join(", ")
            ));
        }
        let checked = config(resolved)?.validate(Some(labelled.train.shape()));
        checked.map_err(|error| Problems::plain(format!("model.classifier.{error}")))?;
        let checked = recipe.loss.validate(Some(labelled.classes.len()));
        checked.map_err(|error| Problems::plain(format!("loss.{error}")))?;
        if recipe.loss.worst_group > 0.0 && labelled.groups.len() < 2 {
            let problem = format!(
                "loss.worst_group ({}) needs data that tells at least two groups: data.labelled_text.group_field names the \
                 field of a text's group, data.shapes.shortcut makes two",
                recipe.loss.worst_group
            );
            return Err(Problems::plain(problem).into());
        }
        Ok(labelled)
    }

    fn first(resolved: &Resolved, data: &Labelled, device: &Device) -> Result<Self, Failure> {
        let recipe = &resolved.recipe;
        let fresh = config(resolved)?.init(sizes(data), device);
        let model = match recipe.model.pretrained() {
            Some(path) => trained(resolved, path, fresh, data)?,
            None => fresh,
        };
        let training = &recipe.training;
        let model = model.with_precision(training.precision).with_dropout(training.dropout);
        let model = model.with_checkpointing(training.activation_checkpointing);
        Ok(model.with_objective(recipe.loss.objective(&data.counts)))
    }

    fn layers(&self) -> Vec<&'static str> {
        self.config().layers()
    }

    fn class_table(data: &Labelled, totals: &ClassTotals) -> Option<ClassTable> {
        Some(ClassTable::of(totals, &data.classes, &data.groups))
    }
}

/// The weights of a trained classifier of the same settings; the head of `fresh` where it tells other classes apart.
fn trained(resolved: &Resolved, path: &Path, fresh: Classifier, data: &Labelled) -> Result<Classifier, Failure> {
    let caller = resolved.caller;
    let folder = find_checkpoint(path, caller)?;
    let refuse = |problem: String| Failure::from(Problems::plain(format!("model.pretrained: {problem}")));
    let ModelConfig::Classifier { config: theirs, .. } = recipe_of(&folder)?.model else {
        return Err(refuse(format!("{} is not a classifier", folder.display())));
    };
    let ours = config(resolved)?;
    if theirs != *ours {
        let changed = differences_of(&theirs, ours).join("\n  ");
        return Err(refuse(format!(
            "model.classifier does not describe the weights of {}:\n  {changed}",
            folder.display()
        )));
    }
    let (input, classes) = described(&folder)?;
    if input != data.train.shape() {
        let (before, now) = (serde_json::json!(input), serde_json::json!(data.train.shape()));
        return Err(refuse(format!("{} was trained on inputs {before}, and the data has {now}", folder.display())));
    }
    let donor = without_drawing(|| ours.init(Sizes { input, n_classes: classes.len() }, &fresh.device()));
    let donor = state::read_checked_model(&folder, donor, caller.nonfinite, &mut caller.loading())?;
    if classes == data.classes {
        return Ok(donor);
    }
    (caller.tell)(&format!(
        "note: {} tells {} classes apart, the data has {} others: the head is newly initialized",
        folder.display(),
        classes.len(),
        data.classes.len()
    ));
    Ok(donor.with_head_of(fresh))
}

/// What the record of a checkpoint says of its inputs and classes.
fn described(folder: &Path) -> Result<(InputShape, Vec<String>), Failure> {
    let record = record(folder)?;
    let unfit = |what: &str| Failure::Run(format!("{}/{DATA}: {what} is missing or damaged", folder.display()));
    let input = serde_json::from_value(record["input"].clone()).map_err(|_| unfit("input"))?;
    Ok((input, serde_json::from_value(record["classes"].clone()).map_err(|_| unfit("classes"))?))
}

fn config(resolved: &Resolved) -> Result<&ClassifierConfig, Failure> {
    match &resolved.recipe.model {
        ModelConfig::Classifier { config, .. } => Ok(config),
        _ => Err(Problems::plain("model.classifier is missing".into()).into()),
    }
}

/// Opens the examples of a recipe.
fn labelled(recipe: &Recipe, tokenizer: &Tokenizer) -> Result<Labelled, Failure> {
    Ok(recipe.data.open_examples(tokenizer, &options(recipe))?)
}

/// Examples that all belong to one class teach nothing: any answer but that class would be wrong.
fn refuse_one_class(labelled: &Labelled, data: &str) -> Result<(), Failure> {
    let learned = labelled.classes.iter().zip(&labelled.counts).filter(|(_, count)| **count > 0);
    let learned: Vec<&str> = learned.map(|(class, _)| class.as_str()).collect();
    if learned.len() > 1 {
        return Ok(());
    }
    Err(Failure::Run(format!(
        "data.{data}: all {} examples to learn from are of one class ({}), so that there is nothing to tell apart\n  hint: give \
         examples of another class, or name the field that holds the classes; a smaller validation.fraction leaves more",
        labelled.counts.iter().sum::<u64>(),
        learned.join(", ")
    )))
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
pub fn open_classifier(
    path: &Path,
    device_name: Option<&str>,
    caller: Caller,
) -> Result<Option<TrainedClassifier>, Failure> {
    let path = &caller.locate(path)?;
    let Some((path, recipe)) = find_own(path, caller)? else { return Ok(None) };
    let ModelConfig::Classifier { config, .. } = &recipe.model else { return Ok(None) };
    let (input, classes) = described(&path)?;
    config.validate(Some(input)).map_err(|error| Failure::Run(format!("{}: {error}", path.display())))?;
    let device = device::open_for(device_name.unwrap_or(&recipe.training.device), recipe.training.precision)
        .map_err(Failure::Run)?;
    let model = without_drawing(|| config.init(Sizes { input, n_classes: classes.len() }, &device));
    let model = state::read_checked_model(&path, model, caller.nonfinite, &mut caller.loading())?;
    let model = model.with_precision(recipe.training.precision);
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
