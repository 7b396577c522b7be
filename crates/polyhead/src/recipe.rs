//! Recipes: what a person wrote (layers of TOML), and what it means (typed tables).
//!
//! A recipe is read in layers: the file that `extends` names, the file itself, `key=value` from the command line. Every
//! problem is told with the layer, line and column of the key it is about.

mod rules;

use std::path::{Path, PathBuf};

use polyhead_data::{AugmentConfig, DataConfig, Packing, TokenizerConfig};
use polyhead_models::adapters::LoraConfig;
use polyhead_models::{ClassifierConfig, DecoderConfig, EmbedderConfig, LossConfig, Sampling};
use polyhead_training::config::{
    CheckpointConfig, DebugConfig, LrSchedulerConfig, MetricsConfig, OptimizerConfig, TrainingConfig, ValidationConfig,
};
use polyhead_training::{FreezeConfig, ProcedureConfig};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::layers::{Layer, merge, parse_layer, undecided};
use crate::report::{Problem, Problems, in_words};
use crate::schema;

/// One complete run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// What is trained.
    pub model: ModelConfig,
    /// How text becomes tokens; not used by generated data. Default: that of model.pretrained, else bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<TokenizerConfig>,
    /// What it learns from.
    pub data: DataConfig,
    /// How tokens become rows.
    #[serde(default)]
    pub loader: LoaderConfig,
    /// What is changed about pictures while a classifier learns from them. Default: nothing.
    #[serde(default, skip_serializing_if = "AugmentConfig::is_nothing")]
    pub augmentation: AugmentConfig,
    /// How long, on how much at once.
    pub training: TrainingConfig,
    /// What a classifier's scores are trained by. Default: cross-entropy.
    #[serde(default, skip_serializing_if = "LossConfig::is_plain")]
    pub loss: LossConfig,
    /// What a step does. Default: standard.
    #[serde(default)]
    pub procedure: ProcedureConfig,
    /// What stays as it is. Default: nothing.
    #[serde(default)]
    pub freeze: FreezeConfig,
    /// Train low-rank pairs beside projections, and nothing else. Default: all weights are trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
    /// How weights move. Default: adamw.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// The learning rate over the steps.
    #[serde(default)]
    pub lr_scheduler: LrSchedulerConfig,
    /// How well the model does on text it does not train on.
    #[serde(default)]
    pub validation: ValidationConfig,
    /// When the run is saved.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// What is written down.
    #[serde(default)]
    pub metrics: MetricsConfig,
    /// The sample of text at the end.
    #[serde(default)]
    pub generation: GenerationConfig,
    /// Randomness.
    #[serde(default)]
    pub debug: DebugConfig,
}

/// `[model]`: a model with fresh weights, or one that goes on from trained ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Start from these weights: a run folder, a checkpoint, or a folder in Hugging Face's format. The model's settings and
    /// its tokenizer come from there too; model.decoder beside it, as in the recipe that a run keeps, has to say the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pretrained: Option<PathBuf>,
    /// A decoder language model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decoder: Option<DecoderConfig>,
    /// A classifier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub classifier: Option<ClassifierConfig>,
    /// An embedder of texts, over the features of a decoder that stays as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedder: Option<EmbedderConfig>,
}

impl ModelConfig {
    /// Layers, where they are known.
    fn n_layers(&self) -> Option<usize> {
        let classifier = self.classifier.as_ref().map(ClassifierConfig::n_layers);
        classifier.or(self.decoder.as_ref().map(|decoder| decoder.n_layers))
    }
}

/// `[loader]`: how tokens become rows.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoaderConfig {
    /// "stream" (default): documents follow each other; "documents": attention stays inside each document.
    pub packing: Packing,
}

/// `[generation]`: the sample of text at the end of a run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GenerationConfig {
    /// What the sample starts with. Default: the end-of-text token.
    pub prompt: String,
    /// How tokens are chosen.
    pub sampling: Sampling,
}

/// Keys that may change when a run is resumed; all others decide what the run is.
pub const MAY_CHANGE: [&str; 9] = [
    "training.steps",
    "training.device",
    "training.on_nonfinite",
    "training.max_skipped_steps",
    "metrics",
    "checkpoint",
    "validation.interval",
    "validation.batches",
    "generation",
];

/// A recipe with where its keys stand.
pub struct Loaded {
    /// What it means.
    pub recipe: Recipe,
    layers: Vec<Layer>,
}

impl Loaded {
    /// A problem about a key, pointed at where it stands.
    pub fn problem(&self, path: &str, message: impl Into<String>) -> Problem {
        Problem::at(&self.layers, path, message.into())
    }
}

/// Reads a recipe with overrides and checks everything.
///
/// # Errors
/// All problems of the first stage that has any: reading, unknown keys, types, rules.
pub fn load(path: &Path, overrides: &[String]) -> Result<Loaded, Problems> {
    from_layers(read_layers(path, overrides)?)
}

/// What layers of keys mean together, later ones over earlier ones.
///
/// # Errors
/// As for [`load`].
pub fn from_layers(layers: Vec<Layer>) -> Result<Loaded, Problems> {
    let unknown = schema::unknown_keys(&layers);
    if !unknown.is_empty() {
        return Err(Problems(unknown));
    }
    let merged = merge(&layers);
    let undecided = undecided(&merged);
    if !undecided.is_empty() {
        let told = undecided.into_iter().map(|(path, names)| {
            let last = names.last().map_or("", String::as_str);
            let message = format!("{path} takes one table, and {} are there: keep one of them", names.join(" and "));
            Problem::at(&layers, &format!("{path}.{last}"), message)
        });
        return Err(Problems(told.collect()));
    }
    let mut recipe: Recipe = serde_path_to_error::deserialize(toml::Value::Table(merged)).map_err(|error| {
        let path = error.path().to_string();
        Problems(vec![Problem::at(&layers, &path, in_words(&error.into_inner().to_string()))])
    })?;
    if recipe.model.pretrained.is_none() {
        recipe.tokenizer.get_or_insert_default();
    }
    let loaded = Loaded { recipe, layers };
    let problems: Vec<Problem> =
        rules::validate(&loaded.recipe).into_iter().map(|(path, message)| loaded.problem(&path, message)).collect();
    if problems.is_empty() { Ok(loaded) } else { Err(Problems(problems)) }
}

/// The resolved recipe as TOML: every key with its value.
///
/// # Errors
/// If a value has no TOML form, which would be our mistake.
pub fn resolved(recipe: &Recipe) -> Result<String, Problems> {
    toml::to_string_pretty(recipe).map_err(|error| Problems::plain(format!("the recipe cannot be written: {error}")))
}

/// Keys in which two recipes differ, apart from those that may change: `key: before -> now`.
pub fn differences(before: &Recipe, now: &Recipe) -> Vec<String> {
    let may_change = |path: &str| MAY_CHANGE.iter().any(|key| path == *key || path.starts_with(&format!("{key}.")));
    let mut all = all_differences(before, now);
    all.retain(|(path, _)| !may_change(path));
    in_lines(all)
}

/// Keys in which two tables differ: `key: before -> now`.
pub fn differences_of(before: &impl Serialize, now: &impl Serialize) -> Vec<String> {
    in_lines(all_differences(before, now))
}

fn in_lines(differences: Vec<Difference>) -> Vec<String> {
    differences.into_iter().map(|(path, [before, now])| format!("{path}: {before} -> {now}")).collect()
}

/// A key with what two tables say.
pub type Difference = (String, [String; 2]);

/// Every key in which two tables differ, with both values as they are written.
pub fn all_differences(before: &impl Serialize, now: &impl Serialize) -> Vec<Difference> {
    fn walk(path: &str, a: Option<&toml::Value>, b: Option<&toml::Value>, out: &mut Vec<Difference>) {
        if a == b {
            return;
        }
        if let (Some(toml::Value::Table(a)), Some(toml::Value::Table(b))) = (a, b) {
            let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for key in keys {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                walk(&path, a.get(key), b.get(key), out);
            }
            return;
        }
        let show = |value: Option<&toml::Value>| value.map_or("(not set)".into(), ToString::to_string);
        out.push((path.to_owned(), [show(a), show(b)]));
    }
    let mut out = Vec::new();
    let (before, now) = (toml::Value::try_from(before).ok(), toml::Value::try_from(now).ok());
    walk("", before.as_ref(), now.as_ref(), &mut out);
    out
}

const NO_FILE: &str = "recipes are files that end in .toml; `polyhead ls` lists those at hand";

/// The text of a recipe's file.
///
/// # Errors
/// If there is none, or it is no text, with the line where it is none.
pub fn read_file(path: &Path) -> Result<String, Problems> {
    let bytes = std::fs::read(path)
        .map_err(|error| Problems::plain(format!("recipe {}: {error}\n  hint: {NO_FILE}", path.display())))?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let bytes = error.into_bytes();
        let text = String::from_utf8_lossy(&bytes[..at]).into_owned() + "\u{fffd}";
        let message = format!("byte {:#04x} is not valid UTF-8: recipes are UTF-8 text", bytes[at]);
        Problems(vec![Problem::in_text(&path.display().to_string(), &text, Some(at..at), message)])
    })
}

/// The file's layer.
///
/// # Errors
/// If it cannot be read or is no TOML.
pub fn read_layer(path: &Path) -> Result<Layer, Problems> {
    let text = read_file(path)?;
    parse_layer(&path.display().to_string(), &text).map_err(|problem| Problems(vec![problem]))
}

/// The layers of a recipe: what it extends, the file, the overrides.
///
/// # Errors
/// If a file cannot be read, is no TOML, or is no recipe.
pub fn read_layers(path: &Path, overrides: &[String]) -> Result<Vec<Layer>, Problems> {
    let file = read_layer(path)?;
    for (key, what, hint) in [
        ("arm", "a comparison of several runs", "`polyhead compare` runs it, with --dry-run it shows its plan"),
        ("stage", "a run in stages", "train, plan, validate and cat take it"),
    ] {
        if file.values().contains_key(key) {
            let problem = format!("{} is {what}, not one recipe", path.display());
            return Err(Problems(vec![Problem::at(&[file], key, problem).hint(Some(hint.into()))]));
        }
    }
    let mut layers = with_base(path, file)?;
    layers.extend(override_layers(overrides)?);
    Ok(layers)
}

/// A file's layer, and below it that of the recipe that it extends.
///
/// # Errors
/// If that cannot be read, is no TOML, or extends another one itself.
pub fn with_base(path: &Path, mut file: Layer) -> Result<Vec<Layer>, Problems> {
    let Some(base) = file.take_extends()? else { return Ok(vec![file]) };
    let base_path = path.parent().unwrap_or(Path::new("")).join(PathBuf::from(base));
    let here = |problem: String| Problems(vec![Problem::at(std::slice::from_ref(&file), "extends", problem)]);
    if let Err(error) = std::fs::File::open(&base_path) {
        return Err(here(format!("extends: recipe {}: {error}", base_path.display())));
    }
    let mut base = read_layer(&base_path)?;
    if base.take_extends()?.is_some() {
        return Err(here(format!("{} extends another recipe itself; one level is allowed", base_path.display())));
    }
    Ok(vec![base, file])
}

/// `key=value` from the command line, a layer each.
///
/// # Errors
/// If one is no override.
pub fn override_layers(overrides: &[String]) -> Result<Vec<Layer>, Problems> {
    let parse = |text: &String| crate::layers::parse_override(text).map_err(|problem| Problems(vec![problem]));
    overrides.iter().map(parse).collect()
}
