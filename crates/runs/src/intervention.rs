//! Interventions in a trained model: of a file, of the recipe of a run, or of that of a checkpoint.

mod spans;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use polyhead_data::Tokenizer;
use polyhead_models::intervention::{Decode, Intervention, InterventionConfig};
use polyhead_models::weights::{Named, from_safetensors, to_safetensors};
use polyhead_models::{ConfigError, Decoder};
use polyhead_recipe::{Problems, Recipe, StatedIntervention};
use polyhead_training::checkpoint::read_file;
use polyhead_training::run_folder::{atomic_write, files};

pub use spans::{Rows, check_phases, check_rows, check_spans, note_phases, note_rows};

use crate::{Failure, Trained};

/// An intervention with its tensors, read.
#[derive(Clone)]
pub struct ReadIntervention {
    /// As it was written.
    pub stated: StatedIntervention,
    /// The file of its tensors, where it names one.
    bytes: Option<Vec<u8>>,
}

impl ReadIntervention {
    /// With the tensors of the file that it names.
    ///
    /// # Errors
    /// If the file cannot be read; with the place of its name.
    pub fn open(stated: StatedIntervention) -> Result<Self, Failure> {
        let read = |file: &PathBuf| {
            let problem =
                |error| format!("tensors: {}: {error}; it is found beside the file that names it", file.display());
            std::fs::read(file).map_err(|error| stated.problem(&ConfigError::new("tensors", problem(error))))
        };
        let bytes = stated.config.tensors.as_ref().map(read).transpose()?;
        Ok(Self { stated, bytes })
    }

    /// With the tensors that a checkpoint keeps; those of older versions keep none.
    ///
    /// # Errors
    /// If they are altered.
    fn kept(stated: StatedIntervention, checkpoint: &Path) -> Result<Self, Failure> {
        match checkpoint.join(files::INTERVENTION).exists() {
            true => Ok(Self { stated, bytes: Some(read_file(checkpoint, files::INTERVENTION)?) }),
            false => Self::open(stated),
        }
    }

    /// That of a run that goes on, with the tensors that it began with.
    ///
    /// # Errors
    /// If the file of tensors has others by now.
    pub fn resumed(stated: StatedIntervention, checkpoint: &Path) -> Result<Self, Failure> {
        let kept = Self::kept(stated, checkpoint)?;
        let now = kept.stated.config.tensors.as_ref().and_then(|file| Some((file, std::fs::read(file).ok()?)));
        if let Some((file, _)) = now.filter(|(_, bytes)| Some(bytes) != kept.bytes.as_ref()) {
            let problem = format!(
                "tensors: {} has other numbers than the run began with, which are in {}: put them back, or start another run \
                 with --out",
                file.display(),
                checkpoint.join(files::INTERVENTION).display()
            );
            return Err(kept.stated.problem(&ConfigError::new("tensors", problem)).into());
        }
        Ok(kept)
    }

    /// The file of its tensors as runs and checkpoints keep it, where there is one.
    pub fn file(&self) -> Option<(String, Vec<u8>)> {
        self.bytes.clone().map(|bytes| (files::INTERVENTION.to_owned(), bytes))
    }

    /// The model under it; what it trains has its initial numbers.
    ///
    /// # Errors
    /// If it says something that the model does not have, with its place.
    pub fn apply(&self, model: Decoder, tokenizer: Option<&Tokenizer>) -> Result<Decoder, Failure> {
        let decode = tokenizer.map(decode);
        let intervention = Intervention::new(&self.stated.config, &self.tensors()?, &model, decode);
        let intervention = intervention.map_err(|error| self.stated.problem(&error))?;
        Ok(model.intervened(Some(intervention)))
    }

    fn tensors(&self) -> Result<BTreeMap<String, Named>, Failure> {
        let Some(bytes) = &self.bytes else { return Ok(BTreeMap::new()) };
        let file = self.stated.config.tensors.as_deref().unwrap_or(Path::new(files::INTERVENTION)).display();
        let problem = |error| ConfigError::new("tensors", format!("tensors: {file}: {error}"));
        from_safetensors(bytes).map_err(|error| self.stated.problem(&problem(error)).into())
    }

    /// Writes what was trained as an intervention of its own, with the tensors that it has besides.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn write_trained(&self, model: &Decoder, folder: &Path) -> Result<(), Failure> {
        let mut tensors = self.tensors()?;
        tensors.extend(model.trained_tensors().into_iter().map(|tensor| (tensor.name.clone(), tensor)));
        let used = |name: &String| self.stated.config.tensor_names().any(|(.., used)| used == name);
        let tensors: Vec<Named> =
            tensors.into_iter().filter(|(name, _)| used(name)).map(|(_, tensor)| tensor).collect();
        let config = InterventionConfig { train: BTreeMap::new(), ..self.stated.config.clone() };
        write(&folder.join(files::TRAINED_INTERVENTION), config, &tensors)
    }
}

/// Writes an intervention, and beside it the file of its tensors, where it has any.
///
/// # Errors
/// If a file cannot be written.
pub fn write(file: &Path, mut config: InterventionConfig, tensors: &[Named]) -> Result<(), Failure> {
    let beside = file.with_extension("safetensors");
    config.tensors = None;
    if !tensors.is_empty() {
        config.tensors = beside.file_name().map(Into::into);
        atomic_write(&beside, &to_safetensors(tensors, &[("format", "polyhead".into())])?)?;
    }
    let text = toml::to_string_pretty(&config).map_err(|error| Failure::Run(error.to_string()))?;
    Ok(atomic_write(file, text.as_bytes())?)
}

/// How a tokenizer turns ids into text.
pub fn decode(tokenizer: &Tokenizer) -> Decode {
    let own = tokenizer.clone();
    Arc::new(move |ids: &[u32]| own.decode(ids))
}

/// A recipe as run folders and checkpoints keep it: the tensors of its intervention are beside it.
pub fn kept(recipe: &Recipe) -> Recipe {
    let mut recipe = recipe.clone();
    if let Some(tensors) = recipe.intervention.as_mut().and_then(|own| own.tensors.as_mut()) {
        *tensors = files::INTERVENTION.into();
    }
    recipe
}

/// Whether a recipe trains tensors of its intervention, and nothing else.
pub fn trains_intervention(recipe: &Recipe) -> bool {
    recipe.intervention.as_ref().is_some_and(|own| !own.train.is_empty())
}

/// That of the recipe of a checkpoint, where there is one.
///
/// # Errors
/// If the checkpoint is altered.
pub fn of_checkpoint(recipe: &Recipe, checkpoint: &Path) -> Result<Option<ReadIntervention>, Failure> {
    let text = String::from_utf8_lossy(&read_file(checkpoint, files::RECIPE)?).into_owned();
    let stated = StatedIntervention::of_checkpoint(recipe, &checkpoint.join(files::RECIPE), &text);
    stated.map(|stated| ReadIntervention::kept(stated, checkpoint)).transpose()
}

impl Trained {
    /// The model under the intervention of a file, where one is named.
    ///
    /// # Errors
    /// If the file cannot be read, or says something that the model does not have; with its place.
    pub fn intervened(self, path: Option<&Path>) -> Result<Self, Failure> {
        let Some(path) = path else { return Ok(self) };
        let read = ReadIntervention::open(StatedIntervention::read(path)?)?;
        let model = read.apply(self.model, self.tokenizer.as_ref())?;
        Ok(Self { model, intervention: Some(read.stated), ..self })
    }

    /// Refuses an intervention that depends on whose tokens are whose, where nobody says so.
    ///
    /// # Errors
    /// Names the span and the way out.
    pub fn check_roles(&self, known: bool) -> Result<(), Failure> {
        check_roles(&self.model, self.intervention.as_ref(), known)
    }
}

/// Refuses an intervention that depends on whose tokens are whose, where that is not known.
///
/// # Errors
/// Names the span and the way out.
pub fn check_roles(model: &Decoder, stated: Option<&StatedIntervention>, known: bool) -> Result<(), Failure> {
    model.intervention().map_or(Ok(()), |own| check_known_roles(own, stated, known))
}

fn check_known_roles(own: &Intervention, stated: Option<&StatedIntervention>, known: bool) -> Result<(), Failure> {
    let Some((field, span)) = own.needs_roles().filter(|_| !known) else { return Ok(()) };
    let span = serde_json::to_string(&span).unwrap_or_default();
    let problem = format!(
        "the intervention names the span {span}, and nobody says whose tokens are whose here: conversations do (a model \
         fine-tuned on them, generate --chat), and associative_recall, needles, in_context and induction; a range or a text needs no roles"
    );
    Err(placed(stated, &ConfigError::new(field, problem)))
}

fn placed(stated: Option<&StatedIntervention>, error: &ConfigError) -> Failure {
    match stated {
        Some(stated) => stated.problem(error).into(),
        None => Problems::plain(error.to_string()).into(),
    }
}
