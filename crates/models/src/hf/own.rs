//! config.json of a decoder that no published family has: the settings of [`DecoderConfig`], those that LLaMA has too under
//! LLaMA's names. What the mechanisms are is the entry `attention`, as in a recipe: a table by the mechanism's name, or a list
//! with one per layer.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::config::{Rope, entries, scaling_of};
use super::export::rope;
use crate::DecoderConfig;

/// Our settings that have another name in LLaMA's config.json. `intermediate_size` is left out where it is the default.
const NAMES: [[&str; 2]; 6] = [
    ["d_model", "hidden_size"],
    ["n_layers", "num_hidden_layers"],
    ["d_ff", "intermediate_size"],
    ["norm_eps", "rms_norm_eps"],
    ["rope_fraction", "partial_rotary_factor"],
    ["tie_embeddings", "tie_word_embeddings"],
];

/// Keys that say nothing of the decoder, ours and those that transformers' tools add.
const BESIDE: [&str; 15] = [
    "architectures",
    "auto_map",
    "model_type",
    "vocab_size",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "mask_token_id",
    "torch_dtype",
    "dtype",
    "use_cache",
    "initializer_range",
    "transformers_version",
    "_name_or_path",
];

/// The entry that has transformers' form instead of ours: version 5 writes the second name, and into it what keys of their own
/// say too.
#[derive(Deserialize)]
struct Stretched {
    rope_scaling: Option<Rope>,
    rope_parameters: Option<Rope>,
}

/// The settings of a decoder as keys.
pub(super) fn keys(config: &DecoderConfig) -> Value {
    let theirs =
        |key: &str| NAMES.iter().find(|[ours, _]| *ours == key).map_or(key.to_owned(), |[_, theirs]| (*theirs).into());
    let ours = json!(config);
    let mut keys: Value =
        ours.as_object().into_iter().flatten().map(|(key, value)| (theirs(key), value.clone())).collect();
    keys["rope_scaling"] = rope(config).1;
    keys
}

/// The decoder that keys describe.
///
/// # Errors
/// Names the key, and the rule.
pub(super) fn read(mut keys: Map<String, Value>) -> Result<DecoderConfig, String> {
    keys.retain(|key, _| !BESIDE.contains(&key.as_str()));
    let Stretched { rope_scaling, rope_parameters } = entries::typed(&keys)?;
    let rope = rope_parameters.or(rope_scaling);
    keys.retain(|key, _| !["rope_scaling", "rope_parameters"].contains(&key.as_str()));
    for [ours, theirs] in NAMES {
        if keys.contains_key(ours) {
            return Err(format!("{ours} is {theirs} in config.json: rename the key"));
        }
        if let Some(value) = keys.remove(theirs) {
            keys.insert(ours.into(), value);
        }
    }
    let mut decoder: DecoderConfig = entries::typed(&keys).map_err(|problem| {
        NAMES.iter().fold(problem, |problem, [ours, theirs]| {
            let problem = problem.replace(&format!("`{ours}`"), &format!("`{theirs}`"));
            problem.strip_prefix(&format!("{ours}: ")).map_or(problem.clone(), |rest| format!("{theirs}: {rest}"))
        })
    })?;
    decoder.rope_scaling = rope.as_ref().map(scaling_of).transpose()?.flatten();
    decoder.validate().map_err(|error| match NAMES.iter().find(|[ours, _]| error.problem.contains(ours)) {
        Some([ours, theirs]) => format!("{error} ({ours} is {theirs} in config.json)"),
        None => error.to_string(),
    })?;
    Ok(decoder)
}
