//! Recipes: what a person wrote (layers of TOML), and what it means (typed tables).
//!
//! A recipe is read in layers: the file that `extends` names, the file itself, `key=value` from the command line. Every
//! problem is told with the layer, line and column of the key it is about.

use std::path::{Path, PathBuf};

use polyhead_data::{AugmentConfig, DataConfig, Packing, TokenizerConfig};
use polyhead_models::adapters::LoraConfig;
use polyhead_models::{ClassifierConfig, ContextMask, DecoderConfig, EmbedderConfig, LossConfig, Precision, Sampling};
use polyhead_training::config::{
    CheckpointConfig, DebugConfig, LrSchedulerConfig, MetricsConfig, OptimizerConfig, TrainingConfig, ValidationConfig,
};
use polyhead_training::{FreezeConfig, ProcedureConfig};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::layers::{Layer, merge, parse_layer};
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
        let classifier = self.classifier.as_ref().map(|classifier| classifier.layers().len());
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
pub const MAY_CHANGE: [&str; 7] = [
    "training.steps",
    "training.device",
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
    let mut recipe: Recipe = serde_path_to_error::deserialize(toml::Value::Table(merged)).map_err(|error| {
        let path = error.path().to_string();
        Problems(vec![Problem::at(&layers, &path, in_words(&error.into_inner().to_string()))])
    })?;
    if recipe.model.pretrained.is_none() {
        recipe.tokenizer.get_or_insert_default();
    }
    let loaded = Loaded { recipe, layers };
    let problems: Vec<Problem> =
        validate(&loaded.recipe).into_iter().map(|(path, message)| loaded.problem(&path, message)).collect();
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

/// The text of a recipe's file.
///
/// # Errors
/// If there is none, or it is no text.
pub fn read_file(path: &Path) -> Result<String, Problems> {
    std::fs::read_to_string(path).map_err(|error| {
        Problems::plain(format!(
            "recipe {}: {error}\n  hint: recipes are files that end in .toml; `polyhead ls` lists those at hand",
            path.display()
        ))
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
            let problem = format!("{} is {what}, not one recipe\n  hint: {hint}", path.display());
            return Err(Problems::plain(problem));
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
    let mut base = read_layer(&base_path)?;
    if base.take_extends()?.is_some() {
        let problem = format!("{} extends another recipe itself; one level is allowed", base_path.display());
        return Err(Problems::plain(problem));
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

/// Every rule about values, with the key it is about.
fn validate(recipe: &Recipe) -> Vec<(String, String)> {
    let mut problems = Vec::new();
    let mut rule = |holds: bool, key: &str, message: String| {
        if !holds {
            problems.push((key.to_owned(), message));
        }
    };
    let Recipe { model, training, validation, lr_scheduler, generation, .. } = recipe;
    let decoder = model.decoder.as_ref();
    rule(
        model.pretrained.is_some() || decoder.is_some() || model.classifier.is_some() || model.embedder.is_some(),
        "model",
        "model is empty: describe a fresh one in model.decoder, model.classifier or model.embedder, or name a folder with trained weights \
         in model.pretrained"
            .into(),
    );
    let labelled = recipe.data.is_labelled();
    rule(
        labelled == model.classifier.is_some(),
        "data",
        match labelled {
            true => format!("data.{} is examples with classes, which model.classifier learns", recipe.data.name()),
            false => format!("data.{} has no classes for model.classifier to learn", recipe.data.name()),
        },
    );
    let pairs = recipe.data.is_pairs();
    rule(
        pairs == model.embedder.is_some(),
        "data",
        match pairs {
            true => format!("data.{} is pairs that belong together, which model.embedder learns", recipe.data.name()),
            false => format!("data.{} has no pairs for model.embedder to learn", recipe.data.name()),
        },
    );
    let reads_tokens = !(labelled || pairs) || recipe.data.is_text();
    rule(
        reads_tokens || training.seq_len == 0,
        "training.seq_len",
        format!("training.seq_len ({}) has no meaning for data.{}: leave it out", training.seq_len, recipe.data.name()),
    );
    let at_least_one = |key: &str, value: u64| (value >= 1, format!("{key} ({value}) must be at least 1"));
    for (key, value) in [
        ("training.steps", training.steps),
        ("training.seq_len", if reads_tokens { training.seq_len as u64 } else { 1 }),
        ("training.batch_size", training.batch_size as u64),
        ("training.gradient_accumulation_steps", training.gradient_accumulation_steps as u64),
        ("metrics.log_freq", recipe.metrics.log_freq),
    ] {
        let (holds, message) = at_least_one(key, value);
        rule(holds, key, message);
    }
    // Sizes beyond these are typing mistakes, and would otherwise end as a failed allocation.
    for (key, value, most) in [
        ("training.seq_len", training.seq_len, 1 << 20),
        ("training.batch_size", training.batch_size, 1 << 16),
        ("training.gradient_accumulation_steps", training.gradient_accumulation_steps, 1 << 16),
        ("model.decoder.d_model", decoder.map_or(1, |decoder| decoder.d_model), 1 << 17),
        ("model.decoder.n_layers", decoder.map_or(1, |decoder| decoder.n_layers), 4096),
        ("model.decoder.d_ff", decoder.and_then(|decoder| decoder.d_ff).unwrap_or(1), 1 << 20),
    ] {
        rule(value <= most, key, format!("{key} ({value}) must be at most {most}"));
    }
    let numbers = [
        ("training.max_norm", training.max_norm, 0.0, f64::MAX, "0 (off) or more"),
        ("training.penalty_weight", training.penalty_weight, 0.0, f64::MAX, "0 or more"),
        ("lr_scheduler.min_lr_ratio", lr_scheduler.min_lr_ratio, 0.0, 1.0, "0 to 1"),
        ("generation.sampling.temperature", generation.sampling.temperature, 0.0, 1e6, "0 (greedy) or more"),
        ("generation.sampling.top_p", generation.sampling.top_p, 1e-9, 1.0, "above 0, up to 1"),
        ("validation.fraction", validation.fraction, 1e-9, 0.5, "above 0, up to 0.5"),
    ];
    for (key, value, low, high, words) in numbers {
        rule((low..=high).contains(&value), key, format!("{key} ({value}) must be {words}"));
    }
    let optimizer: Vec<(&str, f64, f64, f64)> = match &recipe.optimizer {
        OptimizerConfig::Adamw(o) => vec![
            ("adamw.lr", o.lr, 0.0, 1e3),
            ("adamw.beta1", o.beta1, 0.0, 0.999_999_9),
            ("adamw.beta2", o.beta2, 0.0, 0.999_999_9),
            ("adamw.eps", o.eps, 0.0, 1.0),
            ("adamw.weight_decay", o.weight_decay, 0.0, 1e3),
        ],
        OptimizerConfig::Muon(o) => vec![
            ("muon.lr", o.lr, 0.0, 1e3),
            ("muon.momentum", o.momentum, 0.0, 0.999_999_9),
            ("muon.beta1", o.beta1, 0.0, 0.999_999_9),
            ("muon.beta2", o.beta2, 0.0, 0.999_999_9),
            ("muon.eps", o.eps, 0.0, 1.0),
            ("muon.weight_decay", o.weight_decay, 0.0, 1e3),
        ],
    };
    for (key, value, low, high) in optimizer {
        let key = format!("optimizer.{key}");
        rule((low..=high).contains(&value), &key, format!("{key} ({value}) must be {low} to {high}"));
    }
    rule(
        lr_scheduler.warmup_steps <= training.steps,
        "lr_scheduler.warmup_steps",
        format!(
            "lr_scheduler.warmup_steps ({}) must not exceed training.steps ({})",
            lr_scheduler.warmup_steps, training.steps
        ),
    );
    rule(
        crate::device::NAMES.contains(&training.device.as_str()),
        "training.device",
        format!("training.device (\"{}\") must be one of {}", training.device, crate::device::NAMES.join(", ")),
    );
    if let Err((field, message)) = recipe.data.validate(training.seq_len) {
        problems.push((format!("data.{}.{field}", recipe.data.name()), message));
    }
    if let Err((field, message)) = recipe.procedure.validate(decoder) {
        problems.push((format!("procedure.{field}"), message));
    }
    if let Err((field, message)) = recipe.freeze.validate(model.n_layers().unwrap_or(usize::MAX)) {
        problems.push((format!("freeze.{field}"), message));
    }
    if let Some(Err((field, message))) = recipe.lora.as_ref().map(LoraConfig::validate) {
        problems.push((format!("lora.{field}"), message));
    }
    if let Some(embedder) = &model.embedder {
        problems.extend(validate_embedder(recipe, embedder));
    }
    if let Some(classifier) = &model.classifier {
        problems.extend(validate_classifier(recipe, classifier));
    } else if recipe.loss != LossConfig::default() || !recipe.augmentation.is_nothing() {
        let key = if recipe.augmentation.is_nothing() { "loss" } else { "augmentation" };
        problems.push((key.into(), format!("{key} is for model.classifier: leave it out")));
    }
    if problems.is_empty()
        && let Some(Err(error)) = decoder.map(DecoderConfig::validate)
    {
        problems.push((format!("model.decoder.{}", error.field), error.problem));
    }
    problems
}

/// The rules of recipes for embedders, as far as they can be told without the features.
fn validate_embedder(recipe: &Recipe, embedder: &EmbedderConfig) -> Vec<(String, String)> {
    let Recipe { model, procedure, training, .. } = recipe;
    let alone = model.decoder.is_none() && model.classifier.is_none() && model.pretrained.is_none();
    let rules = [
        (
            alone,
            "model",
            "model.embedder stands alone: it reads the features of another model, made by `polyhead features`",
        ),
        (recipe.lora.is_none(), "lora", "lora is for decoders"),
        (
            *procedure == ProcedureConfig::default(),
            "procedure",
            "procedure: an embedder is trained by procedure.standard, as it is",
        ),
        (
            training.precision == Precision::F32,
            "training.precision",
            "training.precision must be \"f32\" for an embedder",
        ),
    ];
    let broken =
        rules.into_iter().filter(|(holds, ..)| !holds).map(|(_, key, words)| (key.to_owned(), words.to_owned()));
    let settings =
        embedder.validate(None).err().map(|error| (format!("model.embedder.{}", error.field), error.problem));
    broken.chain(settings).collect()
}

/// The rules of recipes for classifiers.
fn validate_classifier(recipe: &Recipe, classifier: &ClassifierConfig) -> Vec<(String, String)> {
    let mut problems = Vec::new();
    let mut refuse = |holds: bool, key: &str, message: &str| {
        if !holds {
            problems.push((key.to_owned(), format!("{key} {message}")));
        }
    };
    let Recipe { model, procedure, .. } = recipe;
    refuse(model.decoder.is_none(), "model.decoder", "cannot stand beside model.classifier: choose one");
    refuse(model.pretrained.is_none(), "model.pretrained", "is for decoders: a classifier starts afresh");
    refuse(recipe.lora.is_none(), "lora", "is for decoders");
    let key = format!("procedure.{}", procedure.name());
    match procedure {
        ProcedureConfig::Standard(standard) => {
            let causal = standard.context_mask == ContextMask::Causal;
            refuse(
                causal,
                "procedure.standard.context_mask",
                "is about conversations, which a classifier does not learn",
            );
        }
        _ => refuse(false, &key, "is for decoders; a classifier is trained by procedure.standard"),
    }
    refuse(recipe.training.precision == Precision::F32, "training.precision", "must be \"f32\" for a classifier");
    refuse(
        recipe.augmentation.is_nothing() || recipe.data.shows_pictures(),
        "augmentation",
        "changes pictures, which this data has none of",
    );
    if let Err((field, message)) = recipe.augmentation.validate() {
        problems.push((format!("augmentation.{field}"), message));
    }
    if let Err((field, message)) = recipe.loss.validate(None) {
        problems.push((format!("loss.{field}"), message));
    }
    let shape = recipe.data.shape().filter(|_| problems.is_empty());
    if let Err(error) = classifier.validate(shape) {
        problems.push((format!("model.classifier.{}", error.field), error.problem));
    }
    problems
}
