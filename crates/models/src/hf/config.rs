//! config.json as transformers 4 and 5 write it, read as our settings. What would change the numbers and is not supported is
//! refused; keys that say nothing about the forward pass are not looked at.

use polyhead_attention::{AttentionConfig, DecoupledHeadConfig, RopeLayout, SoftmaxConfig};
use serde::Deserialize;
use serde_json::Value;

use super::names::Family;
use crate::{DecoderConfig, LinearScaling, Llama3Scaling, MlpKind, NormKind, PerLayer, RopeScaling};

/// The keys that matter, of all families.
#[derive(Debug, Deserialize)]
struct Config {
    #[serde(default)]
    architectures: Option<Vec<String>>,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: usize,
    hidden_act: String,
    rms_norm_eps: Option<f64>,
    layer_norm_eps: Option<f64>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    use_parallel_residual: Option<bool>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    layer_types: Option<Vec<String>>,
    quantization_config: Option<Value>,
    // Rotary positions: transformers 5 has them in one table ...
    rope_parameters: Option<Rope>,
    // ... transformers 4 apart, and GPT-NeoX under names of its own.
    rope_theta: Option<f64>,
    rotary_emb_base: Option<f64>,
    rope_scaling: Option<Rope>,
    partial_rotary_factor: Option<f64>,
    rotary_pct: Option<f64>,
    // Of decoupled heads: for each layer, which head every query head reads.
    dha_key_map: Option<Vec<Vec<usize>>>,
    dha_value_map: Option<Vec<Vec<usize>>>,
    dha_output_bias: Option<bool>,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct Rope {
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
    pub family: Family,
    pub decoder: DecoderConfig,
    pub vocab_size: usize,
    pub max_positions: usize,
}

/// Reads the text of a config.json.
///
/// # Errors
/// What cannot be read or is not supported, as a sentence.
pub(super) fn read(text: &str) -> Result<Described, String> {
    let config: Config = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let class = config.architectures.as_ref().and_then(|names| names.first()).cloned().unwrap_or_default();
    let readable = Family::READ.map(Family::class).join(", ");
    let family = Family::READ.into_iter().find(|family| family.class() == class);
    let family = family.ok_or_else(|| format!("architectures names {class:?}; {readable} can be read"))?;
    refuse_unsupported(&config, family)?;
    // Larger than any model, and small enough for every product of them.
    for (name, value, most) in [
        ("hidden_size", config.hidden_size, 1 << 20),
        ("intermediate_size", config.intermediate_size, 1 << 24),
        ("num_hidden_layers", config.num_hidden_layers, 1 << 14),
        ("num_attention_heads", config.num_attention_heads, 1 << 14),
        ("vocab_size", config.vocab_size, 1 << 30),
    ] {
        if value > most {
            return Err(format!("{name} ({value}) must be at most {most}"));
        }
    }
    let neox = family == Family::GptNeox;
    let rope = config.rope_parameters.clone().unwrap_or_default();
    let biases = config.attention_bias.unwrap_or(neox);
    let n_heads = config.num_attention_heads;
    let softmax = SoftmaxConfig {
        n_heads,
        n_kv_heads: config.num_key_value_heads.filter(|&kv_heads| kv_heads != n_heads),
        head_dim: config.head_dim.filter(|width| width * n_heads != config.hidden_size),
        qkv_bias: family == Family::Qwen2 || biases,
        o_bias: family != Family::Qwen2 && biases,
        qk_norm: family == Family::Qwen3,
    };
    let decoder = DecoderConfig {
        d_model: config.hidden_size,
        n_layers: config.num_hidden_layers,
        d_ff: Some(config.intermediate_size),
        rope: true,
        rope_theta: rope.rope_theta.or(config.rope_theta).or(config.rotary_emb_base).unwrap_or(10_000.0),
        rope_layout: RopeLayout::RotateHalf,
        rope_fraction: rope.partial_rotary_factor.or(config.partial_rotary_factor).or(config.rotary_pct).unwrap_or(
            // The default of GPTNeoXConfig.
            if neox { 0.25 } else { 1.0 },
        ),
        rope_scaling: scaling(&config)?,
        norm: if neox { NormKind::Layer } else { NormKind::Rms },
        norm_eps: if neox { config.layer_norm_eps.unwrap_or(1e-5) } else { config.rms_norm_eps.unwrap_or(1e-6) },
        mlp: if neox { MlpKind::Gelu } else { MlpKind::Swiglu },
        parallel_residual: neox && config.use_parallel_residual.unwrap_or(true),
        tie_embeddings: config.tie_word_embeddings.unwrap_or(false),
        attention: match family {
            Family::DecoupledHead => PerLayer::Each(decoupled(&config, &softmax)?),
            _ => PerLayer::Same(AttentionConfig::Softmax(softmax)),
        },
        attention_gate: None,
    };
    decoder.validate().map_err(|error| error.to_string())?;
    Ok(Described { family, decoder, vocab_size: config.vocab_size, max_positions: config.max_position_embeddings })
}

/// The layers of decoupled heads, by their maps.
fn decoupled(config: &Config, softmax: &SoftmaxConfig) -> Result<Vec<AttentionConfig>, String> {
    let (Some(keys), Some(values)) = (&config.dha_key_map, &config.dha_value_map) else {
        return Err("dha_key_map and dha_value_map must give a list for every layer".into());
    };
    for (name, maps) in [("dha_key_map", keys), ("dha_value_map", values)] {
        if maps.len() != config.num_hidden_layers {
            let layers = config.num_hidden_layers;
            return Err(format!(
                "{name} has {} lists for num_hidden_layers ({layers}): give one per layer",
                maps.len()
            ));
        }
        if maps.iter().flatten().any(|&head| head >= softmax.n_heads) {
            return Err(format!("{name} names a head that is not below num_attention_heads ({})", softmax.n_heads));
        }
    }
    let layer = |(key_map, value_map): (&Vec<usize>, &Vec<usize>)| {
        AttentionConfig::DecoupledHead(DecoupledHeadConfig {
            n_heads: softmax.n_heads,
            head_dim: softmax.head_dim,
            key_map: key_map.clone(),
            value_map: value_map.clone(),
            qkv_bias: softmax.qkv_bias,
            o_bias: config.dha_output_bias.unwrap_or(softmax.o_bias),
            fusing: false,
        })
    };
    Ok(keys.iter().zip(values).map(layer).collect())
}

fn refuse_unsupported(config: &Config, family: Family) -> Result<(), String> {
    let activation = if family == Family::GptNeox { "gelu" } else { "silu" };
    if config.hidden_act != activation {
        return Err(format!("hidden_act is {:?}; {:?} is supported here", config.hidden_act, activation));
    }
    if config.mlp_bias == Some(true) {
        return Err("mlp_bias = true: gated feed-forward layers with biases are not supported".into());
    }
    if config.quantization_config.is_some() {
        return Err("quantization_config: quantised weights are not supported; take the original ones".into());
    }
    // Mistral always uses its window, Qwen only where it is told to.
    let uses_window = config.use_sliding_window.unwrap_or(family == Family::Mistral);
    let window = config.sliding_window.filter(|&window| uses_window && window < config.max_position_embeddings);
    let slides = config.layer_types.iter().flatten().any(|kind| kind != "full_attention");
    if window.is_some() || slides && uses_window {
        return Err(format!(
            "sliding_window ({}) is not supported, only full attention; where texts are shorter than the window, \
             \"sliding_window\": null in config.json gives the same numbers",
            window.map_or("layer_types".into(), |window| window.to_string())
        ));
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

fn scaling_of(rope: &Rope) -> Result<Option<RopeScaling>, String> {
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
