//! The file that describes a comparison: a base recipe, what its arms change, and what is held equal.

pub mod ladder;
mod rules;
mod settings;

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use polyhead_models::ConfigError;
use polyhead_recipe::flags::table_or_flags;
use polyhead_recipe::layers::{self, Layer};
use polyhead_recipe::schema;
use polyhead_recipe::{self as recipe, Conversion, Growth, Problems};

use super::suites::tasks::{Task, expanded};
use super::tune::{Tune, Values, leaves};
use ladder::Ladder;
use rules::{flags_in_strings, rules};
use settings::{Place, multiplied};

/// Keys in which arms name what is prepared: a model, an embedding.
pub(crate) const NAMED: [[&str; 2]; 2] = [["model", "pretrained"], ["intervention", "tensors"]];

/// What arms that take equally long differ in.
pub const STEPS: &str = "training.steps";

/// A comparison. Its `extends` names the base recipe, as in a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Comparison {
    /// What the report is called. Default: the file's name.
    #[serde(default)]
    pub title: Option<String>,
    /// Every arm is trained once with each of them; those of one seed see the same data in the same order.
    pub seeds: Vec<u64>,
    /// The arm that the others are compared with. Default: the first.
    #[serde(default)]
    pub base: Option<String>,
    /// What is made equal to the base arm's. Default: "none".
    #[serde(default, rename = "match")]
    pub matched: Matched,
    /// The key whose value is sought to make it equal. Default: "model.decoder.d_ff"; of match = "time" it is "training.steps" and
    /// nothing else.
    #[serde(default)]
    pub solve: Option<String>,
    /// By which share a matched arm may miss the target. Default: 0.01, of match = "time" 0.02; chosen by us.
    #[serde(default)]
    pub tolerance: Option<f64>,
    /// What the findings are about. Default: "validation_loss".
    #[serde(default)]
    pub metric: Quality,
    /// Refuse arms that would see other data, in another order, or another number of tokens. Default: true.
    #[serde(default = "yes")]
    pub same_data: bool,
    /// Keys with values to choose from: every arm is trained with each of them (all combinations), its best one is chosen on
    /// the first half of the held-out batches and reported on the other half.
    #[serde(default)]
    #[schemars(with = "serde_json::Map<String, serde_json::Value>")]
    pub sweep: toml::Table,
    /// Every arm tries the same settings with the same budget before its best one is trained and reported.
    #[serde(default)]
    pub tune: Option<Tune>,
    /// What is made once for every seed before the arms run: models that arms start from with
    /// `model.pretrained = "{name}"`, and embeddings, `intervention.tensors = "{name}"`.
    #[serde(default)]
    pub prepare: Vec<Preparation>,
    /// Tasks that every trained run is put to, as flags of `polyhead eval`: "--task needles_multi --lengths 1,2,4,8". The
    /// report shows them as `needles_multi/4x` and so on.
    #[serde(default)]
    pub evaluate: Vec<String>,
    /// What all arms change of the base recipe.
    #[serde(default)]
    #[schemars(with = "serde_json::Map<String, serde_json::Value>")]
    pub recipe: toml::Table,
    /// Published suites whose points every arm is trained at, each compared with the base arm at the same point. They bring their
    /// own model, data and training, so that `extends` may be left out; [recipe] and arms change them.
    #[serde(default)]
    pub task: Vec<Task>,
    /// Sizes and compute budgets that every arm is trained at, and the power law that follows.
    #[serde(default)]
    pub ladder: Option<Ladder>,
    /// A dial that every arm is trained at: each is compared with the base arm at the same setting.
    #[serde(default)]
    pub setting: Vec<Setting>,
    /// What is compared.
    pub arm: Vec<Arm>,
    /// What others found, and which arms show it; each is a row of the replication table.
    #[serde(default)]
    pub claim: Vec<Claim>,
}

fn yes() -> bool {
    true
}

/// A model that arms start from, trained or made of an earlier one, or what is measured on one. Exactly one of `train`, `convert`,
/// `grow` and `embedding` is given.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Preparation {
    /// Its name, as arms and later preparations write it.
    pub name: String,
    /// The earlier preparation that it is made of; `train` may do without.
    #[serde(default)]
    pub from: Option<String>,
    /// Train this recipe, which is found as `extends` is; the seed is the arms'.
    #[serde(default)]
    pub train: Option<PathBuf>,
    /// What to change of the recipe that is trained; of `embedding`, of the recipe of the model, whose held-out rows are the prompts.
    #[serde(default)]
    #[schemars(with = "serde_json::Map<String, serde_json::Value>")]
    pub recipe: toml::Table,
    /// Convert it: `{ to = "grouped_query", kv_heads = 2 }`, as a stage does.
    #[serde(default, deserialize_with = "table_or_flags")]
    pub convert: Option<Conversion>,
    /// Grow it: `{ signal_heads = 4 }`.
    #[serde(default, deserialize_with = "table_or_flags")]
    pub grow: Option<Growth>,
    /// Write the embedding of a task, as `polyhead tune embedding` does: `{}`.
    #[serde(default)]
    pub embedding: Option<Embedding>,
}

/// Mean outputs of heads behind prompts, for soft injection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Embedding {
    /// Write random directions of the same lengths in its place, to compare with; the number decides which. Default: none.
    #[serde(default)]
    pub random: Option<u64>,
}

/// A setting of the dial.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Setting {
    /// Its name; arms are reported as `ARM; SETTING`.
    pub name: String,
    /// What it changes of the base recipe, before an arm does.
    #[serde(default)]
    #[schemars(with = "serde_json::Map<String, serde_json::Value>")]
    pub recipe: toml::Table,
}

/// One of the things that are compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Arm {
    /// Its name in the report.
    pub name: String,
    /// What it changes of the base recipe.
    #[serde(default)]
    #[schemars(with = "serde_json::Map<String, serde_json::Value>")]
    pub recipe: toml::Table,
    /// The key that is sought for this arm, where it is another one.
    #[serde(default)]
    pub solve: Option<String>,
    /// Its place in the file.
    #[serde(skip)]
    pub place: Place,
}

/// What is made equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Matched {
    /// Nothing.
    #[default]
    None,
    /// Weights of the model.
    Parameters,
    /// Operations of a forward pass per token.
    Flops,
    /// Bytes kept per token while decoding.
    KvCache,
    /// Seconds spent in training steps, by the speed of a calibration run on this machine: every arm takes as many steps as fit.
    Time,
}

/// What findings are about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Quality {
    /// Nats per target on held-out data.
    #[default]
    ValidationLoss,
    /// Bits per byte of held-out text.
    BitsPerByte,
    /// Share of held-out targets that were the first choice.
    Accuracy,
}

/// A finding of others that a comparison tries again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    /// What they found.
    pub claim: String,
    /// Where: authors, year, arXiv id.
    pub paper: String,
    /// What their code does, where that matters.
    #[serde(default)]
    pub code: String,
    /// The arms that show it; the first one is what the others are compared with.
    pub arms: Vec<String>,
    /// The setting that it is about. Default: each, a row for every one.
    #[serde(default)]
    pub setting: Option<String>,
    /// What is looked at: "validation_loss", "bits_per_byte", "accuracy", or a further number of the report by its name,
    /// such as "facts/ees". Default: the comparison's metric.
    #[serde(default)]
    pub metric: Option<Looked>,
}

/// What a claim is about.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Looked {
    /// A score.
    Quality(Quality),
    /// The last value of what runs logged under this name.
    Logged(String),
}

/// A comparison with where its keys stand.
#[derive(Clone)]
pub struct Read {
    /// What it says, every arm at every setting.
    pub comparison: Comparison,
    /// Its own layer.
    pub layer: Layer,
    /// The layers of the recipe that it extends.
    pub base: Vec<Layer>,
    /// What is written as it will not be read much longer.
    pub warnings: Vec<String>,
}

/// Says what is wrong with flags of `polyhead eval`.
pub type CheckTask = fn(&str) -> Result<(), String>;

/// The schema of the file, without the recipe that it extends.
pub fn schema() -> serde_json::Value {
    schemars::schema_for!(Comparison).to_value()
}

/// Whether a file describes a comparison rather than a recipe.
pub fn is_one(path: &Path) -> bool {
    recipe::read_layer(path).is_ok_and(|layer| layer.values().contains_key("arm"))
}

/// Reads a comparison and checks what can be told without looking into its recipes.
///
/// # Errors
/// All problems of the first stage that has any: reading, unknown keys, types, rules.
pub fn read(path: &Path, check_task: CheckTask) -> Result<Read, Problems> {
    let mut layer = expanded(path, recipe::read_layer(path)?)?;
    if !layer.values().contains_key("arm") {
        let problem = format!(
            "{}: no comparison, for it has no [[arm]]\n  hint: `polyhead train` runs a recipe; recipes/compare holds comparisons (docs: Comparisons)",
            path.display()
        );
        return Err(Problems::plain(problem));
    }
    let base = match layer.take_extends()? {
        Some(base) => recipe::read_layers(&path.parent().unwrap_or(Path::new("")).join(base), &[])?,
        None => Vec::new(),
    };
    let only = std::slice::from_ref(&layer);
    Problems::none(schema::unknown_keys_of(&schema(), only))?;
    let comparison: Comparison = layers::read_as(layer.values().clone(), only)?;
    let told = |error: ConfigError| layers::at(only, &error.field, error.problem);
    Problems::none(rules(&comparison, check_task).into_iter().map(told).collect())?;
    let warnings = flags_in_strings(&layer);
    Ok(Read { comparison: multiplied(comparison), layer, base, warnings })
}

impl Arm {
    /// What its setting changes of the base recipe, and what it changes itself.
    pub fn layers(&self, layer: &Layer) -> Vec<Layer> {
        let part = |of: &[&str], at: usize| layer.part(&[of, &[at.to_string().as_str(), "recipe"]].concat());
        let setting = match self.place.size {
            Some(size) => Some(part(&["ladder", "size"], size)),
            None => self.place.setting.map(|at| part(&["setting"], at)),
        };
        // What a suite's point says, all arms may change.
        let recipe = layer.values().contains_key("task").then(|| layer.part(&["recipe"]));
        setting.into_iter().chain(recipe).chain([layer.part(&["arm", &self.place.arm.to_string(), "recipe"])]).collect()
    }
}

impl Comparison {
    /// The key whose value is sought for an arm.
    pub fn solve<'a>(&'a self, arm: &'a Arm) -> &'a str {
        let default = if self.matched == Matched::Time { STEPS } else { "model.decoder.d_ff" };
        arm.solve.as_deref().or(self.solve.as_deref()).unwrap_or(default)
    }

    /// By which share a matched arm may miss the target.
    pub fn tolerance(&self) -> f64 {
        self.tolerance.unwrap_or(if self.matched == Matched::Time { 0.02 } else { 0.01 })
    }

    /// The settings that every arm is trained with: trials, or all combinations of a sweep; one without keys where nothing is
    /// chosen.
    pub fn choices(&self) -> Vec<Values> {
        if let Some(tune) = &self.tune {
            return tune.trials().unwrap_or_default(); // what is wrong was told when the file was read
        }
        leaves(&self.sweep, &|_| false).into_iter().fold(vec![Values::new()], |choices, (key, values)| {
            let values = values.as_array().map(Vec::as_slice).unwrap_or_default();
            let longer = |choice: &Values, value: &toml::Value| {
                choice.iter().cloned().chain([(key.clone(), value.clone())]).collect()
            };
            choices.iter().flat_map(|choice| values.iter().map(move |value| longer(choice, value))).collect()
        })
    }

    /// Whether settings are chosen, so that what is reported comes from the other half of the held-out batches.
    pub fn chooses(&self) -> bool {
        !self.sweep.is_empty() || self.tune.is_some()
    }

    /// Seeds of trials that choose the settings; none where those of the report do.
    pub fn trial_seeds(&self) -> Vec<u64> {
        self.tune.as_ref().map_or(Vec::new(), |tune| tune.seeds(&self.seeds))
    }

    /// Every seed that something is trained with, those of the report first.
    pub fn all_seeds(&self) -> Vec<u64> {
        let more = self.trial_seeds().into_iter().filter(|seed| !self.seeds.contains(seed));
        self.seeds.iter().copied().chain(more).collect()
    }
}

/// The name in `{name}`.
pub fn in_braces(text: &str) -> Option<&str> {
    text.strip_prefix('{')?.strip_suffix('}')
}
