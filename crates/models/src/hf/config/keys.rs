//! What the keys of a config.json say before they are settings: which kind of model they are of, what stands for those that are
//! missing, and whether the special tokens are in the vocabulary.

use polyhead_attention::{Family, Form, Window};
use serde_json::{Map, Value, json};

use crate::hf::names::families;

/// The kind of model: by `architectures`, or where that is missing or null by `model_type`, as transformers tells it.
pub(super) fn family(keys: &Map<String, Value>) -> Result<&'static Family, String> {
    let readable = || families().map(Family::class).collect::<Vec<_>>().join(", ");
    let kind = keys.get("model_type").and_then(Value::as_str);
    let by_kind = families().find(|family| Some(family.model_type()) == kind);
    let class = match keys.get("architectures") {
        None | Some(Value::Null) => None,
        Some(Value::Array(names)) => names.first().map(|name| name.as_str().unwrap_or_default()),
        Some(other) => return Err(format!("architectures must be a list of names, found {other}")),
    };
    let Some(class) = class else {
        return by_kind.ok_or_else(|| match kind {
            Some(kind) => format!("architectures is missing, and model_type is {kind:?}; {} can be read", readable()),
            None => format!("architectures and model_type are missing; {} can be read", readable()),
        });
    };
    let family = families().find(|family| family.class() == class);
    let family = family.ok_or_else(|| format!("architectures names {class:?}; {} can be read", readable()))?;
    match by_kind {
        Some(other) if other.model_type() != family.model_type() => Err(format!(
            "architectures names {class:?}, and model_type is {:?}, which is {}: make them agree",
            other.model_type(),
            other.class()
        )),
        _ => Ok(family),
    }
}

/// Puts what transformers takes for missing keys in their place, and tells of those that decide numbers.
pub(super) fn fill_in(keys: &mut Map<String, Value>, family: &Family) -> Vec<String> {
    let of_all: &[(&str, Value)] = match family.form {
        Form::GptNeox => &[("hidden_act", json!("gelu"))],
        Form::Llama => &[("hidden_act", json!("silu")), ("rms_norm_eps", json!(1e-6))],
    };
    let defaults = family.defaults.iter().map(|(key, value)| (*key, json!(value)));
    let mut filled = Vec::new();
    for (key, value) in defaults.chain(of_all.iter().cloned()) {
        if !keys.contains_key(key) {
            filled.push(format!("{key} = {value}"));
            keys.insert(key.into(), value);
        }
    }
    // A window decides numbers where it is used without being switched on.
    filled.retain(|key| family.window == Window::Always || !key.contains("window"));
    match filled.is_empty() {
        true => Vec::new(),
        false => vec![format!("config.json leaves out what transformers has defaults for: {}", filled.join(", "))],
    }
}

/// The ids of the tokens that end a text (`eos_token_id`), after a check of all special ids.
///
/// # Errors
/// The key, the id that the model does not know, and the rule.
pub(in crate::hf) fn special_ids(keys: &Map<String, Value>, vocab_size: u64) -> Result<Vec<u32>, String> {
    let mut ends = Vec::new();
    for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        let value = keys.get(key).unwrap_or(&Value::Null);
        let ids = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        for id in ids.iter().filter(|id| !id.is_null()) {
            match id.as_u64() {
                Some(id) if id < vocab_size => ends.extend(u32::try_from(id).ok().filter(|_| key == "eos_token_id")),
                _ if !id.is_number() => return Err(format!("{key} must be a number or a list of numbers, found {id}")),
                _ => {
                    return Err(format!(
                        "{key} ({id}) must be 0 or more and below vocab_size ({vocab_size}); null says that there is none"
                    ));
                }
            }
        }
    }
    Ok(ends)
}
