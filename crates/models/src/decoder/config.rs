//! Settings of a decoder: what can be wrong with them, and what they cost.

use polyhead_attention::{AttentionConfig, ConfigError, Cost, Dims, GaussianAdaptiveConfig, RopeLayout};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::PerLayer;
use crate::rope_scaling::RopeScaling;

/// Settings of a decoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DecoderConfig {
    /// Channels of the residual stream.
    pub d_model: usize,
    /// Layers.
    pub n_layers: usize,
    /// Channels inside the feed-forward layers. Default: 8/3 d_model, rounded up to a multiple of 16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub d_ff: Option<usize>,
    /// Rotary positions. Default: true.
    #[serde(default = "yes")]
    pub rope: bool,
    /// Base of the rotary frequencies. Default: 10000.
    #[serde(default = "rope_theta")]
    pub rope_theta: f64,
    /// Which channels form the rotated pairs. Default: "rotate_half".
    #[serde(default)]
    pub rope_layout: RopeLayout,
    /// Share of each head's channels that rotate, the first ones. Default: 1.
    #[serde(default = "one")]
    pub rope_fraction: f64,
    /// How the frequencies are stretched for contexts longer than those first learnt. Default: not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// The kind of norms: "rms" or "layer". Default: "rms".
    #[serde(default)]
    pub norm: NormKind,
    /// Inside the square root of the norms. Default: 1e-5.
    #[serde(default = "norm_eps")]
    pub norm_eps: f64,
    /// The kind of feed-forward layers: "swiglu" (gated, without biases) or "gelu" (with biases). Default: "swiglu".
    #[serde(default)]
    pub mlp: MlpKind,
    /// Attention and feed-forward layer read the same input, and both are added to it. Default: false, one after the other.
    #[serde(default)]
    pub parallel_residual: bool,
    /// Use the token embedding as output projection too. Default: true.
    #[serde(default = "yes")]
    pub tie_embeddings: bool,
    /// The attention mechanism: one table for all layers, or a list with one per layer.
    pub attention: PerLayer<AttentionConfig>,
    /// Gaussian adaptive gates on what attention writes in every layer; along the channels, axis = -1. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_gate: Option<GaussianAdaptiveConfig>,
}

fn yes() -> bool {
    true
}

fn one() -> f64 {
    1.0
}

fn rope_theta() -> f64 {
    10_000.0
}

fn norm_eps() -> f64 {
    1e-5
}

/// The kind of a decoder's norms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// Root mean square, without a bias.
    #[default]
    Rms,
    /// Mean and variance, with a bias.
    Layer,
}

impl NormKind {
    /// Vectors of a norm.
    pub(crate) fn vectors(self) -> u64 {
        match self {
            Self::Rms => 1,
            Self::Layer => 2,
        }
    }
}

/// The kind of a decoder's feed-forward layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MlpKind {
    /// `down(silu(gate(x)) * up(x))`
    #[default]
    Swiglu,
    /// `down(gelu(up(x)))` with biases.
    Gelu,
}

impl MlpKind {
    /// Weights of a layer's matrices, and of its biases.
    pub(crate) fn parameters(self, d_model: u64, d_ff: u64) -> [u64; 2] {
        match self {
            Self::Swiglu => [3 * d_model * d_ff, 0],
            Self::Gelu => [2 * d_model * d_ff, d_model + d_ff],
        }
    }
}

/// A part of a model with what it costs, for `plan`.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// What it is: `embedding`, `layer 0-3: softmax`, ...
    pub name: String,
    /// Its cost, over all its layers.
    pub cost: Cost,
}

/// What a whole model costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ModelCosts {
    /// Weights.
    pub parameters: u64,
    /// Numbers kept per token while decoding.
    pub cached_numbers_per_token: u64,
}

/// Refuses sizes of nothing, and sizes beyond those of any model, whose products would leave the numbers: channels, layers,
/// channels of the feed-forward layers. The limits are chosen by us.
///
/// # Errors
/// Names the field, its value and the rule.
pub(crate) fn check_sizes([d_model, n_layers, d_ff]: [usize; 3]) -> Result<(), ConfigError> {
    for (field, value, most) in
        [("d_model", d_model, 1 << 20), ("n_layers", n_layers, 1 << 14), ("d_ff", d_ff, 1 << 24)]
    {
        if value == 0 {
            return Err(ConfigError::new(field, format!("{field} (0) must be at least 1")));
        }
        if value > most {
            return Err(ConfigError::new(field, format!("{field} ({value}) must be at most {most}")));
        }
    }
    Ok(())
}

impl DecoderConfig {
    /// Channels inside the feed-forward layers, with the default filled in.
    pub fn feed_forward(&self) -> usize {
        self.d_ff.unwrap_or_else(|| self.d_model.saturating_mul(8).div_ceil(3).next_multiple_of(16))
    }

    pub(super) fn dims(&self, layer: usize) -> Dims {
        Dims { d_model: self.d_model, n_layers: self.n_layers, layer, rope: self.rope, norm_eps: self.norm_eps }
    }

    /// The mechanism of a layer.
    ///
    /// # Panics
    /// If the list of mechanisms is too short, which [`validate`](Self::validate) refuses.
    pub fn mechanism(&self, layer: usize) -> &AttentionConfig {
        self.attention.of_layer(layer).expect("validate: one mechanism per layer")
    }

    /// Channels of a query head in a layer.
    pub fn head_dim(&self, layer: usize) -> usize {
        self.mechanism(layer).head_dim(&self.dims(layer))
    }

    /// Channels of a query head in a layer that rotate.
    pub fn rotated(&self, layer: usize) -> usize {
        (self.head_dim(layer) as f64 * self.rope_fraction) as usize
    }

    /// Checks everything that a user can get wrong.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_sizes([self.d_model, self.n_layers, self.feed_forward()])?;
        for (field, value) in [("rope_theta", self.rope_theta), ("norm_eps", self.norm_eps)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(ConfigError::new(field, format!("{field} ({value}) must be a positive number")));
            }
        }
        if let Some(scaling) = &self.rope_scaling {
            scaling.validate().map_err(|error| error.within("rope_scaling"))?;
        }
        if let Some(gate) = &self.attention_gate {
            gate.validate_channels(self.d_model, "a causal model must not look ahead")
                .map_err(|error| error.within("attention_gate"))?;
        }
        if let PerLayer::Each(list) = &self.attention
            && list.len() != self.n_layers
        {
            let problem = format!(
                "attention lists {} mechanisms for n_layers ({}): give one per layer",
                list.len(),
                self.n_layers
            );
            return Err(ConfigError::new("attention", problem));
        }
        for layer in 0..self.n_layers {
            let table = match &self.attention {
                PerLayer::Same(_) => "attention".to_owned(),
                PerLayer::Each(_) => format!("attention.{layer}"),
            };
            let mechanism = self.mechanism(layer);
            mechanism.validate(&self.dims(layer)).map_err(|e| e.within(&table))?;
            mechanism.check_causal().map_err(|e| e.within(&table))?;
            let (fraction, rotated) = (self.rope_fraction, self.rotated(layer));
            if !(fraction > 0.0 && fraction <= 1.0 && rotated > 0 && rotated.is_multiple_of(2)) && self.rope {
                let problem = format!(
                    "rope_fraction ({fraction}) must be above 0, up to 1, and leave an even number of channels of a head \
                     ({}) to rotate, not {rotated}",
                    self.head_dim(layer)
                );
                return Err(ConfigError::new("rope_fraction", problem));
            }
        }
        Ok(())
    }

    /// Parameters and costs by part. Neighbouring layers of one mechanism are one part.
    pub fn parts(&self, vocab_size: usize) -> Vec<Part> {
        let (d_model, d_ff, vocab) = (self.d_model as u64, self.feed_forward() as u64, vocab_size as u64);
        let plain = |parameters: u64, flops_per_token: u64| Cost { parameters, flops_per_token, ..Default::default() };
        let mut parts = vec![Part { name: "embedding".into(), cost: plain(vocab * d_model, 0) }];
        for layer in 0..self.n_layers {
            let cost = self.mechanism(layer).cost(&self.dims(layer));
            let name = format!("attention: {}", self.mechanism(layer).name());
            match parts.iter_mut().find(|part| part.name == name) {
                Some(part) => {
                    part.cost.parameters += cost.parameters;
                    part.cost.flops_per_token += cost.flops_per_token;
                    part.cost.flops_per_pair += cost.flops_per_pair;
                    part.cost.cached_numbers_per_token += cost.cached_numbers_per_token;
                }
                None => parts.push(Part { name, cost }),
            }
        }
        let layers = self.n_layers as u64;
        let [matrices, biases] = self.mlp.parameters(d_model, d_ff);
        let cost = plain(layers * (matrices + biases), 2 * layers * matrices);
        parts.push(Part { name: "feed-forward".into(), cost });
        parts.push(Part { name: "norms".into(), cost: plain((2 * layers + 1) * self.norm.vectors() * d_model, 0) });
        if let Some(gate) = &self.attention_gate {
            let parameters = layers * gate.parameters(&[1, self.d_model]);
            parts.push(Part { name: "attention gates".into(), cost: plain(parameters, 0) });
        }
        let head = if self.tie_embeddings { 0 } else { vocab * d_model };
        parts.push(Part { name: "head".into(), cost: plain(head, 2 * vocab * d_model) });
        parts
    }
    /// The sums over all [`parts`](Self::parts).
    pub fn costs(&self, vocab_size: usize) -> ModelCosts {
        let add = |sum: ModelCosts, part: Part| ModelCosts {
            parameters: sum.parameters + part.cost.parameters,
            cached_numbers_per_token: sum.cached_numbers_per_token + part.cost.cached_numbers_per_token,
        };
        self.parts(vocab_size).into_iter().fold(ModelCosts::default(), add)
    }
}
