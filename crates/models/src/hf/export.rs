//! A decoder as the files of a Hugging Face model folder, without touching the disk.
//!
//! | layers                         | architecture       | read by                        |
//! |--------------------------------|--------------------|--------------------------------|
//! | softmax                        | `LlamaForCausalLM` | transformers 4 and 5, natively |
//! | softmax with biases on q, k, v | `Qwen2ForCausalLM` | transformers 4 and 5, natively |
//! | grouped differential           | `MotifForCausalLM` | Motif's own code               |
//!
//! The formats know one kind of layer, one set of head counts and rotary positions in the rotate-half layout.
//! Interleaved models are exported exactly, by reordering channels; whatever else cannot be said is refused.

use polyhead_attention::{AttentionConfig, GroupedDifferentialConfig, INIT_STD, LambdaInit, RopeLayout, SoftmaxConfig};
use serde_json::{Value, json};

use crate::Decoder;
use crate::weights::{Named, WeightsError, named, to_safetensors};

/// Inside the norm of each signal head: fixed, from Motif's code.
const ATTENTION_NORM_EPS: f64 = 1e-5;

/// What the format states beyond the model itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Export {
    /// The longest sequence that the model was trained on, in tokens.
    pub max_position_embeddings: usize,
    /// The id that begins a text.
    pub bos_token_id: Option<u32>,
    /// The id that ends a text, at which generation stops.
    pub eos_token_id: Option<u32>,
    /// The id that fills up short rows of a batch.
    pub pad_token_id: Option<u32>,
}

/// What [`export`] returns.
#[derive(Debug, Clone, PartialEq)]
pub struct Exported {
    /// Name and bytes of config.json, generation_config.json and model.safetensors.
    pub files: Vec<(String, Vec<u8>)>,
    /// What a person should know before using the files.
    pub notes: Vec<String>,
}

/// Why a model cannot be said in the format. Fields are named as in the decoder's table of a recipe.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// A model without rotary positions.
    #[error("rope (false) cannot be exported: all formats that can be written rotate positions; train with rope = true")]
    NoRope,
    /// Layers of several mechanisms.
    #[error(
        "attention is {name} in layer {layer} but {first} in layer 0: the formats have one mechanism for all layers; \
         train with one, or keep the checkpoint in this project's own format"
    )]
    MixedMechanisms {
        /// The first layer that differs.
        layer: usize,
        /// Its mechanism.
        name: &'static str,
        /// Layer 0's mechanism.
        first: &'static str,
    },
    /// A setting of the mechanism that is not the same in all layers.
    #[error(
        "attention.{layer}.{field} ({value}) differs from layer 0's ({first}): the format states it once for all \
         layers; train with one value"
    )]
    LayersDiffer {
        /// Mechanism and field.
        field: String,
        /// The first layer that differs.
        layer: usize,
        /// Its value.
        value: String,
        /// Layer 0's value.
        first: String,
    },
    /// Heads that do not divide the model's width, which transformers 5 refuses to load as LLaMA.
    #[error(
        "attention.softmax.n_heads ({n_heads}) must divide d_model ({d_model}) in LlamaForCausalLM, also where head_dim \
         is given; choose other heads, or train with qkv_bias = true, which is exported as Qwen2ForCausalLM"
    )]
    UnevenHeads {
        /// Query heads.
        n_heads: usize,
        /// Channels of the residual stream.
        d_model: usize,
    },
    /// Grouped differential layers without their norm.
    #[error(
        "attention.grouped_differential.subln (false) cannot be exported: MotifForCausalLM always normalises its heads; \
         train with subln = true"
    )]
    NoSubln,
    /// A model that was made for no positions.
    #[error("max_position_embeddings (0) must be at least 1: give the length that the model was trained on")]
    NoPositions,
    /// A special token outside of the vocabulary.
    #[error("{field} ({id}) must be below vocab_size ({vocab_size}): give an id of the model's tokenizer, or none")]
    TokenOutside {
        /// Which special token.
        field: &'static str,
        /// Its id.
        id: u32,
        /// Ids that the model knows.
        vocab_size: usize,
    },
    /// A parameter that the format has no name for.
    #[error("parameter {0} has no name in the format; merge or remove what added it before exporting")]
    UnknownParameter(String),
    /// The weights could not be written.
    #[error(transparent)]
    Weights(#[from] WeightsError),
}

/// The files of `model` under Hugging Face's names, for the caller to write beside the tokenizer's.
///
/// # Errors
/// If the format cannot say what the model is: the field, its value and the way out.
pub fn export(model: &Decoder, target: &Export) -> Result<Exported, ExportError> {
    let config = model.config();
    check_target(target, model.vocab_size())?;
    if !config.rope {
        return Err(ExportError::NoRope);
    }
    let first = config.mechanism(0);
    for layer in 1..config.n_layers {
        let name = config.mechanism(layer).name();
        if name != first.name() {
            return Err(ExportError::MixedMechanisms { layer, name, first: first.name() });
        }
    }
    let (specific, notes) = match first {
        AttentionConfig::Softmax(softmax) => (softmax_keys(model, softmax)?, Vec::new()),
        AttentionConfig::GroupedDifferential(gda) => motif_keys(model, gda)?,
    };
    let mut keys = common_keys(model, target);
    merge(&mut keys, specific);
    let mut generation = json!({ "do_sample": true });
    merge(&mut generation, special_tokens(target));
    let pairs_in_heads_of = (config.rope_layout == RopeLayout::Interleaved).then(|| config.head_dim(0));
    let tensors: Vec<Named> =
        named(model).into_iter().map(|tensor| translated(tensor, pairs_in_heads_of)).collect::<Result<_, _>>()?;
    let text = |value: &Value| format!("{value:#}\n").into_bytes();
    let files = vec![
        ("config.json".into(), text(&keys)),
        ("generation_config.json".into(), text(&generation)),
        ("model.safetensors".into(), to_safetensors(&tensors, &[("format", "pt".into())])?),
    ];
    Ok(Exported { files, notes })
}

fn check_target(target: &Export, vocab_size: usize) -> Result<(), ExportError> {
    if target.max_position_embeddings == 0 {
        return Err(ExportError::NoPositions);
    }
    let tokens = [
        ("bos_token_id", target.bos_token_id),
        ("eos_token_id", target.eos_token_id),
        ("pad_token_id", target.pad_token_id),
    ];
    for (field, id) in tokens {
        if let Some(id) = id.filter(|&id| id as usize >= vocab_size) {
            return Err(ExportError::TokenOutside { field, id, vocab_size });
        }
    }
    Ok(())
}

/// Refuses values that are not the same in all layers.
fn require_equal<T: PartialEq + ToString>(
    field: &str,
    n_layers: usize,
    of_layer: impl Fn(usize) -> T,
) -> Result<(), ExportError> {
    let first = of_layer(0);
    match (1..n_layers).find(|&layer| of_layer(layer) != first) {
        None => Ok(()),
        Some(layer) => Err(ExportError::LayersDiffer {
            field: field.into(),
            layer,
            value: of_layer(layer).to_string(),
            first: first.to_string(),
        }),
    }
}

fn special_tokens(target: &Export) -> Value {
    // Written as null where there is none: left out, LLaMA's defaults 1 and 2 would take their place.
    json!({ "bos_token_id": target.bos_token_id, "eos_token_id": target.eos_token_id, "pad_token_id": target.pad_token_id })
}

/// What all formats share.
fn common_keys(model: &Decoder, target: &Export) -> Value {
    let config = model.config();
    let mut keys = json!({
        "hidden_size": config.d_model, "intermediate_size": config.feed_forward(), "num_hidden_layers": config.n_layers,
        "head_dim": config.head_dim(0), "vocab_size": model.vocab_size(),
        "max_position_embeddings": target.max_position_embeddings, "rms_norm_eps": config.norm_eps,
        // transformers 4 reads the first and ignores the second without a word; 5 reads the second.
        "rope_theta": config.rope_theta,
        "rope_parameters": { "rope_type": "default", "rope_theta": config.rope_theta },
        "tie_word_embeddings": config.tie_embeddings, "hidden_act": "silu", "initializer_range": INIT_STD,
        // The old and the new name of the same key.
        "torch_dtype": "float32", "dtype": "float32", "use_cache": true,
    });
    merge(&mut keys, special_tokens(target));
    keys
}

fn merge(keys: &mut Value, more: Value) {
    if let (Some(keys), Value::Object(more)) = (keys.as_object_mut(), more) {
        keys.extend(more);
    }
}

fn softmax_keys(model: &Decoder, first: &SoftmaxConfig) -> Result<Value, ExportError> {
    let config = model.config();
    let settings = |layer| match config.mechanism(layer) {
        AttentionConfig::Softmax(softmax) => softmax,
        _ => first, // other mechanisms are refused before
    };
    require_equal("softmax.n_heads", config.n_layers, |layer| settings(layer).n_heads)?;
    require_equal("softmax.n_kv_heads", config.n_layers, |layer| settings(layer).kv_heads())?;
    require_equal("softmax.head_dim", config.n_layers, |layer| config.head_dim(layer))?;
    require_equal("softmax.qkv_bias", config.n_layers, |layer| settings(layer).qkv_bias)?;
    let mut keys = json!({ "num_attention_heads": first.n_heads, "num_key_value_heads": first.kv_heads() });
    let specific = if first.qkv_bias {
        json!({ "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": false })
    } else {
        if !config.d_model.is_multiple_of(first.n_heads) {
            return Err(ExportError::UnevenHeads { n_heads: first.n_heads, d_model: config.d_model });
        }
        json!({ "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": false,
            "mlp_bias": false })
    };
    merge(&mut keys, specific);
    Ok(keys)
}

fn motif_keys(model: &Decoder, first: &GroupedDifferentialConfig) -> Result<(Value, Vec<String>), ExportError> {
    let config = model.config();
    let settings = |layer| match config.mechanism(layer) {
        AttentionConfig::GroupedDifferential(gda) => gda,
        _ => first, // other mechanisms are refused before
    };
    let name = |field: &str| format!("grouped_differential.{field}");
    require_equal(&name("n_heads"), config.n_layers, |layer| settings(layer).n_heads)?;
    require_equal(&name("n_noise_heads"), config.n_layers, |layer| settings(layer).n_noise_heads)?;
    require_equal(&name("n_kv_heads"), config.n_layers, |layer| settings(layer).kv_heads())?;
    require_equal(&name("head_dim"), config.n_layers, |layer| config.head_dim(layer))?;
    require_equal(&name("subln"), config.n_layers, |layer| settings(layer).subln)?;
    if !first.subln {
        return Err(ExportError::NoSubln);
    }
    let lambdas: Vec<f64> = (0..config.n_layers).map(|layer| settings(layer).lambda_init.of_layer(layer)).collect();
    let mut notes = vec![
        "transformers has no MotifForCausalLM of its own: the files use Motif's names and need Motif's code, with \
         hidden_act \"silu\" in place of its poly_norm"
            .to_owned(),
    ];
    let differs = |(layer, &lambda): (usize, &f64)| (lambda - LambdaInit::Motif.of_layer(layer)).abs() > 1e-9;
    if lambdas.iter().enumerate().any(differs) {
        notes.push(format!(
            "Motif's own code computes lambda_init as 0.8 - 0.6 exp(-0.3 (layer - 1)) with layers counted from 0 and \
             reads no such key; these weights were trained with other constants and need those listed as lambda_init \
             in config.json (layer 0: {:.4}, Motif's code: {:.4})",
            lambdas[0],
            LambdaInit::Motif.of_layer(0)
        ));
    }
    let keys = json!({
        "architectures": ["MotifForCausalLM"], "model_type": "motif", "num_attention_heads": first.n_heads,
        "num_noise_heads": first.n_noise_heads, "num_key_value_heads": first.kv_heads(),
        "attn_rms_norm_eps": ATTENTION_NORM_EPS, "lambda_init": lambdas,
    });
    Ok((keys, notes))
}

/// The format's name of a parameter.
fn format_name(ours: &str) -> Option<String> {
    let whole = match ours {
        "embedding.weight" => Some("model.embed_tokens.weight"),
        "norm.weight" => Some("model.norm.weight"),
        "head.weight" => Some("lm_head.weight"),
        _ => None,
    };
    if let Some(whole) = whole {
        return Some(whole.into());
    }
    let (layer, inner) = ours.strip_prefix("layers.")?.split_once('.')?;
    let theirs = match inner {
        "attention_norm.weight" => "input_layernorm.weight".into(),
        "mlp_norm.weight" => "post_attention_layernorm.weight".into(),
        "mlp.gate_proj.weight" | "mlp.up_proj.weight" | "mlp.down_proj.weight" => inner.to_owned(),
        _ => {
            let name = inner.strip_prefix("attention.")?;
            let known = matches!(
                name,
                "q_proj.weight" | "k_proj.weight" | "v_proj.weight" | "o_proj.weight" | "subln.weight"
            ) || matches!(name, "q_proj.bias" | "k_proj.bias" | "v_proj.bias")
                || matches!(name, "lambda_q1" | "lambda_k1" | "lambda_q2" | "lambda_k2");
            known.then(|| format!("self_attn.{name}"))?
        }
    };
    Some(format!("model.layers.{layer}.{theirs}"))
}

/// A parameter under the format's name: matrices `[out, in]`, queries and keys in the rotate-half layout.
fn translated(tensor: Named, pairs_in_heads_of: Option<usize>) -> Result<Named, ExportError> {
    let name = format_name(&tensor.name).ok_or_else(|| ExportError::UnknownParameter(tensor.name.clone()))?;
    // The embedding is [vocab, d_model] in both.
    let projection = name.ends_with("_proj.weight") || name == "lm_head.weight";
    let rotated = name.contains(".q_proj.") || name.contains(".k_proj.");
    let tensor = Named { name, ..if projection { transposed(tensor) } else { tensor } };
    Ok(match pairs_in_heads_of {
        Some(head_dim) if rotated => halves_from_pairs(tensor, head_dim),
        _ => tensor,
    })
}

/// `[rows, columns]` to `[columns, rows]`.
fn transposed(tensor: Named) -> Named {
    let [rows, columns] = tensor.shape[..] else { return tensor };
    let values = (0..columns).flat_map(|column| tensor.values.iter().skip(column).step_by(columns).copied()).collect();
    Named { shape: vec![columns, rows], values, ..tensor }
}

/// Reorders the rows of every head from pairs (2i, 2i + 1) to pairs (i, i + d/2). Queries and keys in the same order
/// give the same scores, and their order reaches nothing else. `[n_heads * head_dim, ..]` in and out.
fn halves_from_pairs(tensor: Named, head_dim: usize) -> Named {
    let width = tensor.values.len() / tensor.shape[0];
    let half = head_dim / 2;
    let source = |channel: usize| if channel < half { 2 * channel } else { 2 * (channel - half) + 1 };
    let rows: Vec<&[f32]> = tensor.values.chunks_exact(width).collect();
    let values = rows
        .chunks_exact(head_dim)
        .flat_map(|head| (0..head_dim).flat_map(|channel| head[source(channel)].iter().copied()))
        .collect();
    Named { values, ..tensor }
}

#[cfg(test)]
#[path = "export_tests.rs"]
mod tests;
