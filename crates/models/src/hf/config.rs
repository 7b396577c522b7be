//! config.json as transformers 4 and 5 write it, read as our settings. What would change the numbers and is not supported is
//! refused; keys that say nothing about the forward pass are not looked at. Where a key is missing, what transformers 5.24
//! takes for it is taken (`configuration_*.py` of each model). What the keys say of attention is read by the mechanism.

pub(super) mod entries;
mod keys;

use polyhead_attention::{AttentionConfig, ConfigError, Dims, Family, Form, RopeLayout};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::names::{MASKED, POLYHEAD};
use super::own;
use crate::surgery::per_layer;
use crate::{DecoderConfig, LinearScaling, Llama3Scaling, MlpKind, NormKind, RopeScaling};
pub(super) use keys::special_ids;
use keys::{family, fill_in};

/// The keys that matter, of all families.
#[derive(Debug, Deserialize)]
struct Config {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    hidden_act: String,
    rms_norm_eps: Option<f64>,
    layer_norm_eps: Option<f64>,
    tie_word_embeddings: Option<bool>,
    mlp_bias: Option<bool>,
    use_parallel_residual: Option<bool>,
    quantization_config: Option<Value>,
    // Rotary positions: transformers 5 has them in one table ...
    rope_parameters: Option<Rope>,
    // ... transformers 4 apart, and GPT-NeoX under names of its own.
    rope_theta: Option<f64>,
    rotary_emb_base: Option<f64>,
    rope_scaling: Option<Rope>,
    partial_rotary_factor: Option<f64>,
    rotary_pct: Option<f64>,
}

/// What every family says of a model as a whole.
#[derive(Debug, Deserialize)]
struct Sizes {
    vocab_size: usize,
    max_position_embeddings: usize,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct Rope {
    rope_type: Option<String>,
    #[serde(rename = "type")]
    old_type: Option<String>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
}

/// What a config.json says.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Described {
    pub family: &'static Family,
    pub decoder: DecoderConfig,
    pub vocab_size: usize,
    pub max_positions: usize,
    /// Tokens that end a text.
    pub ends: Vec<u32>,
    /// What was taken for keys that are missing, as a sentence.
    pub notes: Vec<String>,
}

/// Reads the text of a config.json.
///
/// # Errors
/// What cannot be read or is not supported, as a sentence.
pub(super) fn read(text: &str) -> Result<Described, String> {
    let mut keys = entries::read(text)?;
    let family = family(&keys)?;
    let own = [&POLYHEAD, &MASKED].contains(&family);
    let notes = if own { Vec::new() } else { fill_in(&mut keys, family) };
    let vocab = keys.get("vocab_size").and_then(Value::as_u64);
    let ends = special_ids(&keys, vocab.unwrap_or(u64::MAX))?;
    check_sizes(&keys)?;
    let Sizes { vocab_size, max_position_embeddings } = entries::typed(&keys)?;
    let mask = keys.get("mask_token_id").cloned().unwrap_or_default();
    let decoder = if own {
        own::read(keys)?
    } else {
        let config: Config = entries::typed(&keys)?;
        refuse_unsupported(&config, family)?;
        published(&config, family, &keys)?
    };
    check_mask(family, &decoder, vocab_size, &mask)?;
    let vocab_size = vocab_size - (decoder.rows(vocab_size) - vocab_size);
    Ok(Described { family, decoder, vocab_size, max_positions: max_position_embeddings, ends, notes })
}

/// Refuses a model of our own whose keys disagree on whether, and by which id, tokens are masked.
fn check_mask(family: &Family, decoder: &DecoderConfig, vocab_size: usize, mask: &Value) -> Result<(), String> {
    let masked = decoder.masked_diffusion;
    if masked != (*family == MASKED) {
        let class = family.class();
        return Err(format!("architectures names {class:?}, and masked_diffusion is {masked}: make them agree"));
    }
    let last = vocab_size as u64 - 1;
    match mask.as_u64() {
        Some(id) if masked && id == last && last > 0 => Ok(()),
        _ if !masked => Ok(()),
        _ => Err(format!("mask_token_id ({mask}) must be the last id, {last}, and not the only one")),
    }
}

/// Refuses sizes of nothing, and sizes beyond those of any model, whose products would leave the numbers.
fn check_sizes(keys: &Map<String, Value>) -> Result<(), String> {
    for (name, most) in [
        ("hidden_size", 1 << 20),
        ("intermediate_size", 1 << 24),
        ("num_hidden_layers", 1 << 14),
        ("num_attention_heads", 1 << 14),
        ("num_key_value_heads", 1 << 14),
        ("head_dim", 1 << 20),
        ("vocab_size", 1 << 30),
    ] {
        match keys.get(name).and_then(Value::as_u64) {
            Some(0) => return Err(format!("{name} (0) must be at least 1")),
            Some(value) if value > most => return Err(format!("{name} ({value}) must be at most {most}")),
            _ => {}
        }
    }
    Ok(())
}

/// The model of a published family.
fn published(config: &Config, family: &Family, keys: &Map<String, Value>) -> Result<DecoderConfig, String> {
    let neox = family.form == Form::GptNeox;
    let rope = config.rope_parameters.clone().unwrap_or_default();
    let norm_eps = if neox { config.layer_norm_eps.unwrap_or(1e-5) } else { config.rms_norm_eps.unwrap_or(1e-6) };
    let (d_model, n_layers) = (config.hidden_size, config.num_hidden_layers);
    let dims = Dims { d_model, n_layers, layer: 0, rope: true, norm_eps, grid: None };
    let layers = entries::typed_by(keys, |keys| AttentionConfig::read_published(family, keys, &dims))?;
    let decoder = DecoderConfig {
        d_model,
        n_layers,
        d_ff: Some(config.intermediate_size),
        rope: true,
        rope_theta: theta(config, &rope)?,
        rope_layout: RopeLayout::RotateHalf,
        rope_fraction: rope.partial_rotary_factor.or(config.partial_rotary_factor).or(config.rotary_pct).unwrap_or(
            // The default of GPTNeoXConfig.
            if neox { 0.25 } else { 1.0 },
        ),
        rope_scaling: scaling(config)?,
        norm: if neox { NormKind::Layer } else { NormKind::Rms },
        norm_eps,
        learned_positions: None,
        head_bias: false,
        masked_diffusion: false,
        autoencoder: false,
        mlp: if neox { MlpKind::Gelu } else { MlpKind::Swiglu },
        parallel_residual: neox && config.use_parallel_residual.unwrap_or(true),
        tie_embeddings: config.tie_word_embeddings.unwrap_or(false),
        attention: per_layer(layers),
        attention_gate: None,
    };
    decoder.validate().map_err(|error| in_their_words(&error))?;
    Ok(decoder)
}

/// The base of the rotary frequencies, wherever it stands.
fn theta(config: &Config, rope: &Rope) -> Result<f64, String> {
    let places = [
        ("rope_parameters.rope_theta", rope.rope_theta),
        ("rope_theta", config.rope_theta),
        ("rotary_emb_base", config.rotary_emb_base),
    ];
    match places.into_iter().find_map(|(key, value)| Some((key, value?))) {
        None => Ok(10_000.0),
        Some((_, value)) if value.is_finite() && value > 0.0 => Ok(value),
        Some((key, value)) => Err(format!("{key} ({value}) must be a positive number")),
    }
}

/// A broken rule with the key that config.json has for the field.
fn in_their_words(error: &ConfigError) -> String {
    const NAMES: [(&str, &str); 8] = [
        ("n_heads", "num_attention_heads"),
        ("n_kv_heads", "num_key_value_heads"),
        ("d_model", "hidden_size"),
        ("n_layers", "num_hidden_layers"),
        ("d_ff", "intermediate_size"),
        ("norm_eps", "rms_norm_eps or layer_norm_eps"),
        ("rope_fraction", "partial_rotary_factor or rotary_pct"),
        ("rope_scaling", "rope_parameters or rope_scaling"),
    ];
    let theirs = NAMES.iter().find(|(ours, _)| error.field.split('.').any(|part| part == *ours));
    match theirs {
        Some((ours, theirs)) => format!("{} ({ours} is {theirs} there)", error.problem),
        None => error.problem.clone(),
    }
}

fn refuse_unsupported(config: &Config, family: &Family) -> Result<(), String> {
    let activation = if family.form == Form::GptNeox { "gelu" } else { "silu" };
    if config.hidden_act != activation {
        return Err(format!("hidden_act is {:?}; {:?} is supported here", config.hidden_act, activation));
    }
    if config.mlp_bias == Some(true) {
        return Err("mlp_bias = true: gated feed-forward layers with biases are not supported".into());
    }
    if config.quantization_config.is_some() {
        return Err("quantization_config: quantised weights are not supported; take the original ones".into());
    }
    Ok(())
}

fn scaling(config: &Config) -> Result<Option<RopeScaling>, String> {
    match (&config.rope_parameters, &config.rope_scaling) {
        (None, None) => Ok(None),
        (Some(rope), None) | (None, Some(rope)) => scaling_of(rope),
        // An edit in the manner of transformers 4, in a file that transformers 5 wrote.
        (Some(new), Some(old)) => {
            let (kept, scaling) = (scaling_of(new), scaling_of(old)?);
            match kept? == scaling {
                true => Ok(scaling),
                false => Err(format!(
                    "rope_parameters ({:?}) and rope_scaling ({:?}) say different things: leave one of them out",
                    new.kind(),
                    old.kind()
                )),
            }
        }
    }
}

impl Rope {
    fn kind(&self) -> &str {
        self.rope_type.as_deref().or(self.old_type.as_deref()).unwrap_or("default")
    }
}

pub(super) fn scaling_of(rope: &Rope) -> Result<Option<RopeScaling>, String> {
    let kind = rope.kind();
    let number =
        |name: &str, value: Option<f64>| value.ok_or_else(|| format!("rope scaling {kind}: {name} is missing"));
    match kind {
        "default" => Ok(None),
        "linear" => Ok(Some(RopeScaling::Linear(LinearScaling { factor: number("factor", rope.factor)? }))),
        "llama3" => Ok(Some(RopeScaling::Llama3(Llama3Scaling {
            factor: number("factor", rope.factor)?,
            low_freq_factor: number("low_freq_factor", rope.low_freq_factor)?,
            high_freq_factor: number("high_freq_factor", rope.high_freq_factor)?,
            original_max_position_embeddings: rope
                .original_max_position_embeddings
                .ok_or("rope scaling llama3: original_max_position_embeddings is missing")?,
        }))),
        other => Err(format!("rope scaling {other:?} is not supported; linear and llama3 are")),
    }
}
