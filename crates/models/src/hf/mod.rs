//! Our weights under Hugging Face's names.
//!
//! Softmax decoders become a native `LlamaForCausalLM` or, with biases on queries, keys and values, `Qwen2ForCausalLM`.
//! Grouped differential decoders get the names of Motif (`MotifForCausalLM`).

use polyhead_attention::{AttentionConfig, GroupedDifferentialConfig, RopeLayout, SoftmaxConfig};
use serde_json::{Value, json};

use crate::weights::{Named, WeightsError, named, to_safetensors};
use crate::{Decoder, DecoderConfig, PerLayer};

/// What the format needs to know besides the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportOptions {
    /// The longest sequence that the model was trained on.
    pub max_positions: usize,
    /// The id that ends a text.
    pub end_of_text: Option<u32>,
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
    let first = config.mechanism(0);
    if (0..config.n_layers).any(|layer| config.mechanism(layer) != first)
        || matches!(config.attention, PerLayer::Each(_))
    {
        return unsupported("model.decoder.attention lists mechanisms per layer: the formats have one for all layers");
    }
    let json = match first {
        AttentionConfig::Softmax(softmax) => softmax_config(model, softmax, options)?,
        AttentionConfig::GroupedDifferential(gda) => motif_config(model, gda, options)?,
    };
    let tensors: Vec<Named> = named(model).into_iter().map(|tensor| renamed(tensor, config)).collect();
    let text = |value: &Value| format!("{value:#}\n").into_bytes();
    let generation =
        json!({ "bos_token_id": options.end_of_text, "eos_token_id": options.end_of_text, "do_sample": true });
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
fn common(model: &Decoder, head_dim: usize, options: ExportOptions) -> Value {
    let config = model.config();
    json!({
        "hidden_size": config.d_model, "intermediate_size": config.feed_forward(), "num_hidden_layers": config.n_layers,
        "head_dim": head_dim, "vocab_size": model.vocab_size(), "max_position_embeddings": options.max_positions,
        "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tie_embeddings, "hidden_act": "silu",
        // transformers 4 reads the first and ignores the second without a word; 5 reads the second.
        "rope_theta": config.rope_theta,
        "rope_parameters": { "rope_type": "default", "rope_theta": config.rope_theta },
        "bos_token_id": options.end_of_text, "eos_token_id": options.end_of_text, "pad_token_id": null,
        "torch_dtype": "float32", "use_cache": true, "initializer_range": polyhead_attention::INIT_STD,
    })
}

fn with(mut base: Value, more: Value) -> Value {
    if let (Some(base), Value::Object(more)) = (base.as_object_mut(), more) {
        base.extend(more);
    }
    base
}

fn softmax_config(model: &Decoder, softmax: &SoftmaxConfig, options: ExportOptions) -> Result<Value, ExportError> {
    let config = model.config();
    let head_dim = config.head_dim(0);
    if head_dim * softmax.n_heads != config.d_model {
        return Err(ExportError::Unsupported(format!(
            "n_heads ({}) * head_dim ({head_dim}) must equal d_model ({}) in this format: leave head_dim out",
            softmax.n_heads, config.d_model
        )));
    }
    let heads = json!({ "num_attention_heads": softmax.n_heads, "num_key_value_heads": softmax.kv_heads() });
    let kind = match softmax.qkv_bias {
        true => json!({ "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": false }),
        false => json!({ "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": false,
            "mlp_bias": false }),
    };
    Ok(with(with(common(model, head_dim, options), heads), kind))
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
    // Motif's code computes λ_init from the layer's index; the constants that were trained with are stated beside.
    let lambdas: Vec<f64> = (0..config.n_layers).map(|layer| gda.lambda_init.of_layer(layer)).collect();
    let more = json!({
        "architectures": ["MotifForCausalLM"], "model_type": "motif", "num_attention_heads": gda.n_heads,
        "num_noise_heads": gda.n_noise_heads, "num_key_value_heads": gda.kv_heads(), "attn_rms_norm_eps": 1e-5,
        "lambda_init": lambdas,
    });
    Ok(with(common(model, config.head_dim(0), options), more))
}

/// A tensor under the format's name, `[out, in]` where it is a projection, in the rotate-half layout.
fn renamed(tensor: Named, config: &DecoderConfig) -> Named {
    let rotated = tensor.name.contains(".q_proj.") || tensor.name.contains(".k_proj.");
    let projection = tensor.name.ends_with("_proj.weight") || tensor.name == "head.weight";
    let name = match tensor.name.as_str() {
        "embedding.weight" => "model.embed_tokens.weight".into(),
        "norm.weight" => "model.norm.weight".into(),
        "head.weight" => "lm_head.weight".into(),
        inner => format!("model.{inner}")
            .replace(".attention_norm.", ".input_layernorm.")
            .replace(".mlp_norm.", ".post_attention_layernorm.")
            .replace(".attention.", ".self_attn."),
    };
    let tensor = if projection { transposed(tensor) } else { tensor };
    let tensor = match config.rope_layout {
        RopeLayout::Interleaved if rotated => halves_from_pairs(tensor, config.head_dim(0)),
        _ => tensor,
    };
    Named { name, ..tensor }
}

fn transposed(tensor: Named) -> Named {
    let [rows, columns] = tensor.shape[..] else { return tensor };
    let values = (0..rows * columns).map(|i| tensor.values[i % rows * columns + i / rows]).collect();
    Named { shape: vec![columns, rows], values, ..tensor }
}

/// Reorders the rows of every head from pairs (2i, 2i + 1) to pairs (i, i + d/2): scores stay the same.
fn halves_from_pairs(tensor: Named, head_dim: usize) -> Named {
    let rows = tensor.shape[0];
    let width = tensor.values.len() / rows;
    let source = |row: usize| {
        let (head, channel) = (row / head_dim, row % head_dim);
        let half = head_dim / 2;
        head * head_dim + if channel < half { 2 * channel } else { 2 * (channel - half) + 1 }
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
    use burn::tensor::{Device, Int, Tensor, Tolerance};
    use polyhead_attention::{Mask, Observe};

    fn config(layout: RopeLayout, tied: bool) -> DecoderConfig {
        let attention = json!({ "softmax": { "n_heads": 4, "n_kv_heads": 2, "qkv_bias": true } });
        serde_json::from_value(json!({
            "d_model": 16, "n_layers": 2, "d_ff": 24, "rope_layout": layout, "tie_embeddings": tied, "attention": attention,
        }))
        .unwrap()
    }

    fn files(model: &Decoder) -> Vec<(String, Vec<u8>)> {
        export(model, ExportOptions { max_positions: 32, end_of_text: Some(1) }).unwrap()
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
                (true, true) => transposed(halves_from_pairs(transposed(tensor), 4)),
                (true, false) => halves_from_pairs(tensor, 4),
                _ => tensor,
            };
            (name, tensor)
        };
        let halves = config(RopeLayout::RotateHalf, true).init(10, &device);
        let halves = load(halves, named(&pairs).into_iter().map(reorder).collect()).unwrap();
        let logits = |model: &Decoder| {
            let tokens = Tensor::<2, Int>::from_ints([[1, 2, 3, 4, 5, 6, 7]], &device);
            model.logits(model.forward(tokens, &Mask::causal(), None, Observe::Nothing).hidden).into_data()
        };
        logits(&pairs).assert_approx_eq::<f32>(&logits(&halves), Tolerance::absolute(1e-4));
    }

    #[test]
    fn what_the_format_cannot_say_is_refused() {
        let mut config = config(RopeLayout::RotateHalf, true);
        config.rope = false;
        let error = export(&config.init(10, &Device::flex()), ExportOptions { max_positions: 8, end_of_text: None });
        assert!(error.unwrap_err().to_string().contains("rope"));
    }
}
