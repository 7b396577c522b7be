//! A [`Decoder`] in Hugging Face's format.
//!
//! Softmax decoders become the family whose settings they have: `LlamaForCausalLM`, `Qwen2ForCausalLM` (biases on queries,
//! keys and values), `Qwen3ForCausalLM` (norms of queries and keys), `GPTNeoXForCausalLM` (LayerNorm, GELU). Grouped
//! differential decoders get the names of Motif (`MotifForCausalLM`).

use std::collections::BTreeMap;

use polyhead_attention::{AttentionConfig, GroupedDifferentialConfig, RopeLayout, SoftmaxConfig};
use serde_json::{Value, json};

use super::import::transpose;
use super::names::{Family, Layout};
use crate::surgery::{SurgeryError, decouple_key_driven, standard_grouped};
use crate::weights::{Named, WeightsError, named, to_safetensors};
use crate::{Decoder, DecoderConfig, MlpKind, NormKind, PerLayer, RopeScaling};

/// What the format needs to know besides the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExportOptions {
    /// The longest sequence that the model was trained on.
    pub max_positions: usize,
    /// The id that begins a text, where there is one of its own.
    pub begin_of_text: Option<u32>,
    /// The id that ends a text.
    pub end_of_text: Option<u32>,
    /// The id that fills up rows.
    pub pad: Option<u32>,
}

impl ExportOptions {
    fn begins(self) -> Option<u32> {
        self.begin_of_text.or(self.end_of_text)
    }
}

/// Why a model cannot be said in the format.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The format has no word for a setting.
    #[error("{0}")]
    Unsupported(String),
    /// The weights could not be written.
    #[error(transparent)]
    Weights(#[from] WeightsError),
}

/// The files of an exported model, by name: config.json, generation_config.json, model.safetensors.
///
/// # Errors
/// If the format cannot say what the model is: which setting, and the way out.
pub fn export(model: &Decoder, options: ExportOptions) -> Result<Vec<(String, Vec<u8>)>, ExportError> {
    let config = model.config();
    let unsupported = |problem: &str| Err(ExportError::Unsupported(problem.into()));
    if !config.rope {
        return unsupported("model.decoder.rope = false: the formats that can be written all rotate positions");
    }
    if config.attention_gate.is_some() {
        return unsupported("model.decoder.attention_gate: no format that can be written knows such gates");
    }
    let first = config.mechanism(0);
    let refused = |error: SurgeryError| ExportError::Unsupported(error.to_string());
    if (0..config.n_layers).any(|layer| matches!(config.mechanism(layer), AttentionConfig::KeyDriven(_))) {
        return export(&decouple_key_driven(model).map_err(refused)?, options);
    }
    if (0..config.n_layers).any(|layer| matches!(config.mechanism(layer), AttentionConfig::DecoupledHead(_))) {
        if let Some(grouped) = standard_grouped(model).map_err(refused)? {
            return export(&grouped, options);
        }
        return files(model, Family::DecoupledHead, decoupled_config(model, options)?, options);
    }
    if (0..config.n_layers).any(|layer| config.mechanism(layer) != first)
        || matches!(config.attention, PerLayer::Each(_))
    {
        return unsupported("model.decoder.attention lists mechanisms per layer: the formats have one for all layers");
    }
    let (family, json) = match first {
        AttentionConfig::Softmax(softmax) => softmax_config(model, softmax, options)?,
        AttentionConfig::GroupedDifferential(gda) => (Family::Motif, motif_config(model, gda, options)?),
        other => {
            let name = other.name();
            return unsupported(&format!(
                "{name}: the format has no such model; model.safetensors of the checkpoint holds it"
            ));
        }
    };
    files(model, family, json, options)
}

fn files(
    model: &Decoder,
    family: Family,
    json: Value,
    options: ExportOptions,
) -> Result<Vec<(String, Vec<u8>)>, ExportError> {
    let tensors = placed(named(model), model.config(), family);
    let text = |value: &Value| format!("{value:#}\n").into_bytes();
    let generation =
        json!({ "bos_token_id": options.begins(), "eos_token_id": options.end_of_text, "do_sample": true });
    Ok(vec![
        ("config.json".into(), text(&json)),
        ("generation_config.json".into(), text(&generation)),
        ("model.safetensors".into(), to_safetensors(&tensors, &[("format", "pt".into())])?),
    ])
}

/// What a person has to know to load the tokenizer of an exported model, if there is anything.
///
/// For every model of the type qwen2, `AutoTokenizer` of transformers 5 builds Qwen's own tokenizer (its way of splitting,
/// and NFC) around the vocabulary, whatever the files say: some texts then get other ids than in training.
pub fn tokenizer_note(config: &DecoderConfig) -> Option<&'static str> {
    let AttentionConfig::Softmax(SoftmaxConfig { qkv_bias: true, .. }) = config.mechanism(0) else { return None };
    Some(
        "AutoTokenizer of transformers 5 gives every Qwen2 model Qwen's own rules of splitting text; unless this \
         tokenizer is Qwen's, load it with PreTrainedTokenizerFast.from_pretrained instead",
    )
}

/// What all formats share.
fn common(model: &Decoder, family: Family, options: ExportOptions) -> Value {
    let config = model.config();
    let (rope, old_scaling) = rope(config);
    let mut json = json!({
        "architectures": [family.class()], "model_type": family.model_type(),
        "hidden_size": config.d_model, "intermediate_size": config.feed_forward(), "num_hidden_layers": config.n_layers,
        "head_dim": config.head_dim(0), "vocab_size": model.vocab_size(), "max_position_embeddings": options.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        // transformers 4 reads the first two and ignores the third without a word; 5 reads the third.
        "rope_theta": config.rope_theta, "rope_scaling": old_scaling, "rope_parameters": rope,
        "bos_token_id": options.begins(), "eos_token_id": options.end_of_text, "pad_token_id": options.pad,
        "torch_dtype": "float32", "use_cache": true, "initializer_range": polyhead_attention::INIT_STD,
    });
    let norm = if config.norm == NormKind::Layer { "layer_norm_eps" } else { "rms_norm_eps" };
    json[norm] = config.norm_eps.into();
    json["hidden_act"] = if config.mlp == MlpKind::Gelu { "gelu" } else { "silu" }.into();
    json
}

/// Rotary positions as transformers 5 and as transformers 4 want them.
fn rope(config: &DecoderConfig) -> (Value, Value) {
    let (kind, scaling) = match &config.rope_scaling {
        None => ("default", json!({})),
        Some(RopeScaling::Linear(linear)) => ("linear", json!(linear)),
        Some(RopeScaling::Llama3(llama3)) => ("llama3", json!(llama3)),
    };
    let scaling = with(json!({ "rope_type": kind }), scaling);
    let old = if config.rope_scaling.is_some() { scaling.clone() } else { Value::Null };
    let more = json!({ "rope_theta": config.rope_theta, "partial_rotary_factor": config.rope_fraction });
    (with(scaling, more), old)
}

fn with(mut base: Value, more: Value) -> Value {
    if let (Some(base), Value::Object(more)) = (base.as_object_mut(), more) {
        base.extend(more);
    }
    base
}

fn softmax_config(
    model: &Decoder,
    softmax: &SoftmaxConfig,
    options: ExportOptions,
) -> Result<(Family, Value), ExportError> {
    let config = model.config();
    let unsupported = |problem: String| Err(ExportError::Unsupported(problem));
    if let Some(setting) = softmax.beyond_plain() {
        return unsupported(format!("softmax attention with {setting} is in no format that can be written"));
    }
    let SoftmaxConfig { n_heads, qkv_bias, o_bias, qk_norm, .. } = *softmax;
    let (whole, gated) = (config.rope_fraction == 1.0, (config.norm, config.mlp) == (NormKind::Rms, MlpKind::Swiglu));
    let heads = json!({ "num_attention_heads": n_heads, "num_key_value_heads": softmax.kv_heads() });
    let (family, more) = if (config.norm, config.mlp) == (NormKind::Layer, MlpKind::Gelu) {
        if softmax.kv_heads() != n_heads
            || qk_norm
            || qkv_bias != o_bias
            || config.head_dim(0) * n_heads != config.d_model
        {
            return unsupported(
                "GPT-NeoX, the format with LayerNorm and GELU, has as many key/value heads as query heads, biases on all \
                 projections or none, no norms of queries and keys, and n_heads * head_dim = d_model; --expanded repeats key/value heads"
                    .into(),
            );
        }
        let old_rope = json!({ "rotary_emb_base": config.rope_theta, "rotary_pct": config.rope_fraction });
        let kind = json!({ "use_parallel_residual": config.parallel_residual, "attention_bias": qkv_bias });
        (Family::GptNeox, with(kind, old_rope))
    } else if !gated || !whole || config.parallel_residual {
        return unsupported(format!(
            "norm {:?} with mlp {:?}, rope_fraction {} and parallel_residual {} are together in no format that can be written",
            config.norm, config.mlp, config.rope_fraction, config.parallel_residual
        ));
    } else if qk_norm {
        if qkv_bias != o_bias {
            return unsupported("qk_norm with qkv_bias and o_bias: Qwen3 has both biases or none".into());
        }
        (Family::Qwen3, json!({ "attention_bias": qkv_bias, "use_sliding_window": false, "sliding_window": null }))
    } else if qkv_bias && !o_bias {
        (Family::Qwen2, json!({ "use_sliding_window": false }))
    } else if o_bias && !qkv_bias {
        return unsupported("o_bias without qkv_bias is in no format that can be written".into());
    } else {
        (Family::Llama, json!({ "attention_bias": qkv_bias, "mlp_bias": false }))
    };
    Ok((family, with(with(common(model, family, options), heads), more)))
}

/// The settings of decoupled heads, as nobody else writes them: LLaMA's, and for each layer which key head and which value
/// head every query head reads.
fn decoupled_config(model: &Decoder, options: ExportOptions) -> Result<Value, ExportError> {
    let config = model.config();
    let gated = (config.norm, config.mlp) == (NormKind::Rms, MlpKind::Swiglu);
    if !gated || config.parallel_residual || config.rope_fraction != 1.0 {
        let problem =
            "decoupled heads are written in LLaMA's form only; --expanded writes them as heads of the parent's form";
        return Err(ExportError::Unsupported(problem.into()));
    }
    let mut layers = Vec::new();
    for layer in 0..config.n_layers {
        match config.mechanism(layer) {
            AttentionConfig::DecoupledHead(heads) => layers.push(heads),
            _ => {
                return Err(ExportError::Unsupported("decoupled heads in some layers only: no format has both".into()));
            }
        }
    }
    let more = json!({
        "num_attention_heads": layers[0].n_heads, "attention_bias": layers[0].qkv_bias, "dha_output_bias": layers[0].o_bias,
        "dha_key_map": layers.iter().map(|layer| &layer.key_map).collect::<Vec<_>>(),
        "dha_value_map": layers.iter().map(|layer| &layer.value_map).collect::<Vec<_>>(),
    });
    Ok(with(common(model, Family::DecoupledHead, options), more))
}

fn motif_config(
    model: &Decoder,
    gda: &GroupedDifferentialConfig,
    options: ExportOptions,
) -> Result<Value, ExportError> {
    if !gda.subln {
        return Err(ExportError::Unsupported("grouped_differential.subln = false: Motif's format has the norm".into()));
    }
    let config = model.config();
    if (config.norm, config.mlp) != (NormKind::Rms, MlpKind::Swiglu)
        || config.parallel_residual
        || config.rope_fraction != 1.0
    {
        let problem = "Motif's format has RMSNorm, SwiGLU and wholly rotated heads, one layer after the other";
        return Err(ExportError::Unsupported(problem.into()));
    }
    // Motif's code computes λ_init from the layer's index; the constants that were trained with are stated beside.
    let lambdas: Vec<f64> = (0..config.n_layers).map(|layer| gda.lambda_init.of_layer(layer)).collect();
    let more = json!({
        "num_attention_heads": gda.n_heads,
        "num_noise_heads": gda.n_noise_heads, "num_key_value_heads": gda.kv_heads(), "attn_rms_norm_eps": 1e-5,
        "lambda_init": lambdas,
    });
    Ok(with(common(model, Family::Motif, options), more))
}

/// The tensors under the format's names, `[out, in]` where they are projections, in the rotate-half layout.
fn placed(tensors: Vec<Named>, config: &DecoderConfig, family: Family) -> Vec<Named> {
    let mut out = Vec::new();
    let mut thirds: BTreeMap<String, Vec<Named>> = BTreeMap::new();
    for tensor in tensors {
        let rotated = [".q_proj.", ".k_proj.", ".q_norm.", ".k_norm."].iter().any(|part| tensor.name.contains(part));
        let place = family.place(&tensor.name);
        let tensor = match (place.layout, &tensor.shape[..]) {
            (Layout::Same, _) | (Layout::Third(_), [_]) => tensor,
            _ => transposed(tensor),
        };
        let tensor = match config.rope_layout {
            RopeLayout::Interleaved if rotated => halves_from_pairs(tensor, config.head_dim(0), config.rotated(0)),
            _ => tensor,
        };
        let tensor = Named { name: place.name.clone(), ..tensor };
        match place.layout {
            // Queries, keys and values come in this order, as fields of the layer.
            Layout::Third(_) => thirds.entry(place.name).or_default().push(tensor),
            _ => out.push(tensor),
        }
    }
    out.extend(thirds.into_values().map(|parts| joined(parts, config.head_dim(0))));
    out
}

/// Queries, keys and values with their rows as `[n_heads, 3, head_dim]`.
fn joined(parts: Vec<Named>, head_dim: usize) -> Named {
    let first = &parts[0];
    let head = head_dim * first.values.len() / first.shape[0];
    let mut values = Vec::with_capacity(3 * first.values.len());
    for at in (0..first.values.len()).step_by(head) {
        for part in &parts {
            values.extend_from_slice(&part.values[at..at + head]);
        }
    }
    let mut shape = first.shape.clone();
    shape[0] *= 3;
    Named { name: first.name.clone(), shape, values }
}

fn transposed(tensor: Named) -> Named {
    let [rows, columns] = tensor.shape[..] else { return tensor };
    Named { values: transpose(&tensor.values, rows), shape: vec![columns, rows], ..tensor }
}

/// Reorders the rotated rows of every head from pairs (2i, 2i + 1) to pairs (i, i + rotated/2): scores stay the same.
fn halves_from_pairs(tensor: Named, head_dim: usize, rotated: usize) -> Named {
    let rows = tensor.shape[0];
    let width = tensor.values.len() / rows;
    let source = |row: usize| {
        let (head, channel) = (row / head_dim, row % head_dim);
        let half = rotated / 2;
        let from = match channel {
            channel if channel < half => 2 * channel,
            channel if channel < rotated => 2 * (channel - half) + 1,
            still => still,
        };
        head * head_dim + from
    };
    let row = |at: usize| &tensor.values[at * width..(at + 1) * width];
    let values = (0..rows).flat_map(|at| row(source(at)).iter().copied()).collect();
    Named { values, ..tensor }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::weights::{from_safetensors, load};
    use burn::tensor::{Device, Int, Tensor};
    use polyhead_attention::{Mask, Observe};
    use polyhead_kernels::comparison::{Tolerance, assert_tensors_close};

    fn config(layout: RopeLayout, tied: bool) -> DecoderConfig {
        let attention = json!({ "softmax": { "n_heads": 4, "n_kv_heads": 2, "qkv_bias": true } });
        serde_json::from_value(json!({
            "d_model": 16, "n_layers": 2, "d_ff": 24, "rope_layout": layout, "tie_embeddings": tied, "attention": attention,
        }))
        .unwrap()
    }

    fn files(model: &Decoder) -> Vec<(String, Vec<u8>)> {
        export(model, ExportOptions { max_positions: 32, end_of_text: Some(1), ..Default::default() }).unwrap()
    }

    #[test]
    fn names_and_shapes_are_the_formats() {
        for tied in [true, false] {
            let files = files(&config(RopeLayout::RotateHalf, tied).init(10, &Device::flex()));
            let tensors = from_safetensors(&files[2].1).unwrap();
            assert_eq!(tensors["model.layers.1.self_attn.k_proj.weight"].shape, [8, 16]);
            assert_eq!(tensors["model.layers.0.self_attn.q_proj.bias"].shape, [16]);
            assert_eq!(tensors["model.layers.0.mlp.down_proj.weight"].shape, [16, 24]);
            assert_eq!(tensors["model.embed_tokens.weight"].shape, [10, 16]);
            assert_eq!(tensors.contains_key("lm_head.weight"), !tied);
            assert_eq!(tensors.len(), 2 + 2 * 12 + usize::from(!tied));
            let json: Value = serde_json::from_slice(&files[0].1).unwrap();
            assert_eq!(json["architectures"][0], "Qwen2ForCausalLM");
            assert!(tokenizer_note(&config(RopeLayout::RotateHalf, tied)).is_some());
        }
    }

    #[test]
    fn interleaved_pairs_are_reordered_without_changing_a_logit() {
        let device = Device::flex();
        let pairs = config(RopeLayout::Interleaved, true).init(10, &device);
        // Large weights, so that rotations matter; the same in every run, as the device's random numbers are not.
        let louder = |tensor: Named| {
            let wave = |(at, value): (usize, &f32)| match tensor.shape.len() {
                2 => 0.4 * ((at * 37 + tensor.values.len()) as f32).sin(),
                _ => *value + 0.1 * (at as f32).sin(),
            };
            let values = tensor.values.iter().enumerate().map(wave).collect();
            (tensor.name.clone(), Named { values, ..tensor })
        };
        let pairs = load(pairs.clone(), named(&pairs).into_iter().map(louder).collect()).unwrap();
        let reorder = |tensor: Named| {
            let (name, rotated) =
                (tensor.name.clone(), tensor.name.contains("q_proj") || tensor.name.contains("k_proj"));
            let two = tensor.shape.len() == 2;
            let tensor = match (rotated, two) {
                (true, true) => transposed(halves_from_pairs(transposed(tensor), 4, 4)),
                (true, false) => halves_from_pairs(tensor, 4, 4),
                _ => tensor,
            };
            (name, tensor)
        };
        let halves = config(RopeLayout::RotateHalf, true).init(10, &device);
        let halves = load(halves, named(&pairs).into_iter().map(reorder).collect()).unwrap();
        let logits = |model: &Decoder| {
            let tokens = Tensor::<2, Int>::from_ints([[1, 2, 3, 4, 5, 6, 7]], &device);
            model.logits(model.forward(tokens, &Mask::causal(), None, Observe::Nothing).hidden)
        };
        assert_tensors_close("logits", logits(&pairs), logits(&halves), Tolerance::absolute(1e-4));
    }

    #[test]
    fn what_the_format_cannot_say_is_refused() {
        let mut config = config(RopeLayout::RotateHalf, true);
        config.rope = false;
        let error = export(&config.init(10, &Device::flex()), ExportOptions { max_positions: 8, ..Default::default() });
        assert!(error.unwrap_err().to_string().contains("rope"));
    }
}
