//! Recipes in stages: runs and conversions, each of which starts from the weights of the one before.
//!
//! The file is a recipe with `[[stage]]` tables. What stands around them all stages share; each one names what it changes, or
//! a conversion between two runs. A stage is a run folder of its own, so that all that works with a run works with it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::commands::convert::Conversion;
use crate::compare::comparison::folder_name;
use crate::layers::{Layer, STAGES, parse_layer};
use crate::recipe::{self, Loaded};
use crate::report::{Failure, Problem, Problems, in_words};
use crate::schema;

/// What is written into the folder of the whole run: what each finished stage did.
pub const RECORD: &str = "stages.json";

/// The stages of a file.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Stages {
    stage: Vec<Stage>,
}

/// `[[stage]]`: a part of a run.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Its name, which is part of its folder's.
    pub name: String,
    /// A stage of training: what it changes of the recipe around.
    #[serde(default)]
    #[schemars(with = "serde_json::Map<String, serde_json::Value>")]
    pub recipe: toml::Table,
    /// A conversion instead: the flags of `polyhead convert`.
    #[serde(default)]
    pub convert: Option<Conversion>,
}

/// A recipe in stages with where its keys stand.
pub struct Staged {
    /// Its stages, at least one.
    pub stages: Vec<Stage>,
    /// What all share.
    shared: Vec<Layer>,
    /// The stages' own layer.
    own: Layer,
    /// From the command line, for all stages.
    overrides: Vec<Layer>,
}

/// Reads a recipe in stages; `None` if the file has none.
///
/// # Errors
/// All problems of the first stage that has any, and of reading.
pub fn read(path: &Path, overrides: &[String]) -> Result<Option<Staged>, Problems> {
    let mut file = recipe::read_layer(path)?;
    let Some(own) = file.take("stage") else { return Ok(None) };
    let unknown = schema::unknown_keys_of(&schemars::schema_for!(Stages).to_value(), std::slice::from_ref(&own));
    if !unknown.is_empty() {
        return Err(Problems(unknown));
    }
    let Stages { stage: stages } =
        serde_path_to_error::deserialize(toml::Value::Table(own.values().clone())).map_err(|error| {
            let path = error.path().to_string();
            Problems(vec![Problem::at(std::slice::from_ref(&own), &path, in_words(&error.into_inner().to_string()))])
        })?;
    let (shared, overrides) = (recipe::with_base(path, file)?, recipe::override_layers(overrides)?);
    let staged = Staged { stages, shared, own, overrides };
    let problems = staged.rules();
    if problems.is_empty() { Ok(Some(staged)) } else { Err(Problems(problems)) }
}

impl Staged {
    fn rules(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut rule = |holds: bool, key: String, message: String| {
            if !holds {
                problems.push(Problem::at(std::slice::from_ref(&self.own), &key, message));
            }
        };
        let mut names = BTreeSet::new();
        for (at, stage) in self.stages.iter().enumerate() {
            let (name, key) = (&stage.name, |key: &str| format!("stage.{at}.{key}"));
            let first = names.insert(folder_name(name));
            rule(first, key("name"), format!("stage `{name}`: two stages have this name"));
            rule(
                !folder_name(name).is_empty(),
                key("name"),
                format!("stage `{name}`: its name must hold a letter or a digit"),
            );
            rule(
                stage.convert.is_none() || stage.recipe.is_empty(),
                key("convert"),
                format!("stage `{name}` trains (recipe) and converts (convert): make two stages of it"),
            );
            rule(
                at == 0 || !stage.recipe.contains_key("model"),
                key("recipe.model"),
                format!("stage `{name}` starts from the weights of the stage before: leave model out"),
            );
            if let Some(Err(error)) = stage.convert.as_ref().map(Conversion::check) {
                rule(false, key("convert"), format!("stage `{name}`: {error}"));
            }
        }
        problems
    }

    /// The recipe of a stage that starts from the weights in `from`: of the first stage, whatever the recipe says itself.
    ///
    /// # Errors
    /// If it is no valid recipe, or a conversion has nothing to convert.
    pub fn load(&self, at: usize, from: Option<&Path>) -> Result<Loaded, Failure> {
        let name = &self.stages[at].name;
        let mut layers = self.shared.clone();
        layers.push(self.own.part(&["stage", &at.to_string(), "recipe"]));
        layers.extend(self.overrides.iter().cloned());
        if let Some(from) = from {
            let from = toml::Value::String(from.display().to_string());
            // The last layer, because it replaces the whole description of a fresh model.
            let line = parse_layer(STAGES, &format!("model.pretrained = {from}"));
            layers.push(line.map_err(|problem| Problems(vec![problem]))?);
        }
        let about = |problem: Problem| problem.about(&format!("stage `{name}`"));
        let loaded =
            recipe::from_layers(layers).map_err(|problems| Problems(problems.0.into_iter().map(about).collect()))?;
        if loaded.recipe.model.classifier.is_some() {
            let message =
                format!("stage `{name}`: stages hand over decoders; train a classifier in a recipe of its own");
            return Err(loaded.problem("model.classifier", message).into());
        }
        if self.stages[at].convert.is_some() && loaded.recipe.model.pretrained.is_none() {
            let message =
                format!("stage `{name}` converts, and there is nothing yet: name weights in model.pretrained");
            return Err(Problem::at(std::slice::from_ref(&self.own), &format!("stage.{at}.convert"), message).into());
        }
        Ok(loaded)
    }

    /// The run folder of a stage.
    pub fn folder(&self, out: &Path, at: usize) -> PathBuf {
        out.join(format!("{}-{}", at + 1, folder_name(&self.stages[at].name)))
    }

    /// The run folder of the stage before.
    pub fn before(&self, out: &Path, at: usize) -> Option<PathBuf> {
        at.checked_sub(1).map(|before| self.folder(out, before))
    }
}

/// What a finished stage did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageRecord {
    /// Its name.
    pub name: String,
    /// Its run folder, inside the folder of the whole run.
    pub folder: String,
    /// Steps of training; `None` of a conversion.
    pub steps: Option<u64>,
    /// Weights of the model.
    pub parameters: u64,
    /// Bytes in f32 that decoding keeps per token.
    pub kv_bytes_per_token: u64,
    /// Nats per held-out target before; `None` where there was no model yet.
    pub loss_before: Option<f64>,
    /// Nats per held-out target after.
    pub loss: f64,
    /// Nats per target: how far predictions are from those before.
    pub divergence: Option<f64>,
}

/// The folder of the last finished stage, if `path` is the folder of a run in stages.
///
/// # Errors
/// If its record cannot be read.
pub fn last_finished(path: &Path) -> Result<Option<PathBuf>, Failure> {
    let records = read_records(path)?;
    Ok(records.last().map(|record| path.join(&record.folder)))
}

/// What the finished stages of a run did; nothing where there are none.
///
/// # Errors
/// If the record cannot be read.
pub fn read_records(out: &Path) -> Result<Vec<StageRecord>, Failure> {
    let file = out.join(RECORD);
    match std::fs::read(&file) {
        Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            Ok(Vec::new())
        }
        Err(error) => Err(Failure::file("read", &file, error)),
        Ok(bytes) => {
            serde_json::from_slice(&bytes).map_err(|error| Failure::Run(format!("{}: {error}", file.display())))
        }
    }
}
