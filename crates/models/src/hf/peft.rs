//! Adapters of PEFT (`adapter_config.json` beside `adapter_model.safetensors`): LoRA's pairs, folded into the weights of their
//! base model as these are read, `W + B A · alpha / r` (with `use_rslora` alpha / √r: Kalajdzievski 2023, arXiv 2312.03732).
//!
//! What computes something else (DoRA), needs more than pairs (biases, whole modules, embeddings) or starts from another base
//! (PiSSA and other initialisations that change it) is refused by its key.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::config::entries;
use super::files;
use super::import::FindBase;
use crate::weights::TensorFiles;

/// What the names of tensors begin with, before the base model's.
pub(super) const PREFIX: &str = "base_model.model.";

/// Keys that have any value: they are read below, or say nothing of what is computed. All others must be null, false, empty or
/// "none".
const KNOWN: [&str; 22] = [
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
];

/// Initialisations that leave the base model as it is.
const PLAIN_INIT: [&str; 3] = ["gaussian", "eva", "orthogonal"];

#[derive(Debug, Deserialize)]
struct Config {
    peft_type: String,
    base_model_name_or_path: Option<String>,
    r: usize,
    lora_alpha: f64,
    use_rslora: Option<bool>,
    rank_pattern: Option<BTreeMap<String, usize>>,
    alpha_pattern: Option<BTreeMap<String, f64>>,
}

/// The pairs of an adapter, mapped and not read.
#[derive(Debug)]
pub(super) struct Adapter {
    path: PathBuf,
    config: Config,
    files: TensorFiles,
}

impl Adapter {
    /// Opens the folder of an adapter; gives the folder of its base model too.
    ///
    /// # Errors
    /// What cannot be read or is not supported, as a sentence.
    pub fn open(folder: &Path, find: FindBase<'_>) -> Result<(Self, PathBuf), String> {
        let text = std::fs::read_to_string(folder.join(files::ADAPTER_CONFIG)).map_err(|error| error.to_string())?;
        let keys = entries::read(&text)?;
        let config = read(&keys)?;
        let name = config.base_model_name_or_path.clone().unwrap_or_default();
        let places = [PathBuf::from(&name), folder.join(&name)];
        let base = match places.into_iter().find(|place| !name.is_empty() && place.join(files::CONFIG).is_file()) {
            Some(base) => Some(base),
            None => {
                find(Path::new(&name)).map_err(|problem| format!("base_model_name_or_path ({name:?}): {problem}"))?
            }
        };
        let base = base.ok_or_else(|| {
            format!(
                "base_model_name_or_path ({name:?}) is neither a folder with a config.json nor a model in the cache of the \
                 Hugging Face hub: put the base model's folder there, its whole path or the one from here"
            )
        })?;
        let pairs = TensorFiles::open(&[folder.join(files::ADAPTER_WEIGHTS)]).map_err(|error| error.to_string())?;
        Ok((Self { path: folder.to_owned(), config, files: pairs }, base))
    }

    /// Adds the pair of a tensor of the base model, `[out, in]`, to its values; gives the names of the pair.
    ///
    /// # Errors
    /// If a half is missing or does not fit.
    pub fn add(&self, tensor: &str, shape: &[usize], values: &mut [f32]) -> Result<Vec<String>, String> {
        let Some(module) = tensor.strip_suffix(".weight") else { return Ok(Vec::new()) };
        let [a_name, b_name] = ["lora_A", "lora_B"].map(|half| format!("{PREFIX}{module}.{half}.weight"));
        let (a, b) = match [&a_name, &b_name].map(|name| self.files.shape(name)) {
            [None, None] => return Ok(Vec::new()),
            [Some(a), Some(b)] => (a.to_vec(), b.to_vec()),
            [None, _] => return Err(format!("{a_name} is missing")),
            [_, None] => return Err(format!("{b_name} is missing")),
        };
        let rank = pattern(self.config.rank_pattern.as_ref(), module)?.unwrap_or(self.config.r);
        let alpha = pattern(self.config.alpha_pattern.as_ref(), module)?.unwrap_or(self.config.lora_alpha);
        let (&[rows, columns], true) = (shape, a.len() == 2 && b.len() == 2) else {
            return Err(format!("{a_name} belongs to {tensor}, which is no matrix"));
        };
        if a != [rank, columns] || b != [rows, rank] {
            return Err(format!(
                "{a_name} has shape {a:?} and lora_B {b:?}, expected [{rank}, {columns}] and [{rows}, {rank}]"
            ));
        }
        let read = |name: &str| self.files.values(name).map_err(|error| error.to_string());
        let (a, b) = (read(&a_name)?, read(&b_name)?);
        let divisor = if self.config.use_rslora == Some(true) { (rank as f64).sqrt() } else { rank as f64 };
        let scale = (alpha / divisor) as f32;
        for (row, b) in values.chunks_mut(columns).zip(b.chunks(rank)) {
            for (a, b) in a.chunks(columns).zip(b) {
                row.iter_mut().zip(a).for_each(|(value, a)| *value += scale * b * a);
            }
        }
        Ok(vec![a_name, b_name])
    }

    /// The file of its pairs.
    pub fn file(&self) -> PathBuf {
        self.path.join(files::ADAPTER_WEIGHTS)
    }

    /// The tensors that are not among `used`.
    pub fn unused(&self, used: &BTreeSet<String>) -> impl Iterator<Item = &str> {
        self.files.names().filter(|name| !used.contains(*name))
    }

    /// What it is, as a sentence.
    pub fn note(&self, base: &Path) -> String {
        format!("an adapter of rank {}, folded into the weights of {}", self.config.r, base.display())
    }
}

fn read(keys: &Map<String, Value>) -> Result<Config, String> {
    let config: Config = entries::typed(keys)?;
    if config.peft_type != "LORA" {
        return Err(format!("peft_type is {:?}; \"LORA\" is supported", config.peft_type));
    }
    if config.r == 0 || !config.lora_alpha.is_finite() {
        return Err(format!("r ({}) must be at least 1, and lora_alpha ({}) a number", config.r, config.lora_alpha));
    }
    let neutral = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text == "none",
        Value::Array(list) => list.is_empty(),
        Value::Object(table) => table.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    };
    if let Some((key, value)) = keys.iter().find(|(key, value)| !KNOWN.contains(&key.as_str()) && !neutral(value)) {
        return Err(format!(
            "{key} ({value}) is not supported: merge the adapter with PEFT (merge_and_unload) instead"
        ));
    }
    match keys.get("init_lora_weights") {
        None | Some(Value::Null | Value::Bool(_)) => Ok(config),
        Some(Value::String(init)) if PLAIN_INIT.contains(&init.as_str()) => Ok(config),
        Some(init) => Err(format!(
            "init_lora_weights ({init}) changes the base model: save the adapter with PEFT's path_initial_model_for_weight_conversion, \
             or merge it there"
        )),
    }
}

/// The value of a module: of the pattern that is the end of its name, from a dot on.
///
/// # Errors
/// If two patterns are, or one is a regular expression.
fn pattern<T: Copy + PartialEq>(patterns: Option<&BTreeMap<String, T>>, module: &str) -> Result<Option<T>, String> {
    let mut found = None;
    for (key, value) in patterns.into_iter().flatten() {
        if !key.chars().all(|sign| sign.is_ascii_alphanumeric() || ['_', '.'].contains(&sign)) {
            return Err(format!(
                "rank_pattern and alpha_pattern: {key:?} is a regular expression; names of modules are supported"
            ));
        }
        let ends = module.strip_suffix(key.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        if ends && found.is_some_and(|other| other != *value) {
            return Err(format!(
                "rank_pattern and alpha_pattern: two names are the end of {module}, with different values"
            ));
        }
        if ends {
            found = Some(*value);
        }
    }
    Ok(found)
}
