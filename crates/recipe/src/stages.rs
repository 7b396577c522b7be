//! Recipes in stages: runs and conversions, each of which starts from the weights of the one before.
//!
//! The file is a recipe with `[[stage]]` tables. What stands around them all stages share; each one names what it changes, or
//! a conversion between two runs. A stage is a run folder of its own, so that all that works with a run works with it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Deserialize;

use crate::conversion::Conversion;

use crate::layers::{self, Layer, STAGES, parse_layer, read_layer};
use crate::load::{Loaded, from_layers, override_layers, with_base};
use crate::problem::{Problem, Problems};
use crate::settings::ModelConfig;
use crate::{folder_name, schema};

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

/// The schema of the file of a run in stages, without what is around them.
pub fn schema() -> serde_json::Value {
    schemars::schema_for!(Stages).to_value()
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
    let mut file = read_layer(path)?;
    let Some(own) = file.take("stage") else { return Ok(None) };
    let only = std::slice::from_ref(&own);
    Problems::none(schema::unknown_keys_of(&schema(), only))?;
    let Stages { stage: stages } = layers::read_as(own.values().clone(), only)?;
    let (shared, overrides) = (with_base(path, file)?, override_layers(overrides)?);
    let staged = Staged { stages, shared, own, overrides };
    Problems::none(staged.rules())?;
    Ok(Some(staged))
}

impl Staged {
    fn rules(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut rule = |holds: bool, key: String, message: String| {
            if !holds {
                problems.push(layers::at(std::slice::from_ref(&self.own), &key, message));
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
    pub fn load(&self, at: usize, from: Option<&Path>) -> Result<Loaded, Problems> {
        let name = &self.stages[at].name;
        let mut layers = self.shared.clone();
        layers.push(self.own.part(&["stage", &at.to_string(), "recipe"]));
        layers.extend(self.overrides.iter().cloned());
        if let Some(from) = from {
            let from = toml::Value::String(from.display().to_string());
            // The last layer, because it replaces the whole description of a fresh model.
            layers.push(parse_layer(STAGES, &format!("model.pretrained = {from}"))?);
        }
        let loaded = from_layers(layers).map_err(|problems| problems.about(&format!("stage `{name}`")))?;
        if !matches!(loaded.recipe.model, ModelConfig::Decoder { .. }) {
            let message = format!(
                "stage `{name}`: stages hand over decoders; train another kind of model in a recipe of its own"
            );
            return Err(loaded.problem("model", message).into());
        }
        if self.stages[at].convert.is_some() && loaded.recipe.model.pretrained().is_none() {
            let message =
                format!("stage `{name}` converts, and there is nothing yet: name weights in model.pretrained");
            return Err(layers::at(std::slice::from_ref(&self.own), &format!("stage.{at}.convert"), message).into());
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
