//! Settings of a decoder: what can be wrong with them, and what they cost.

use burn::tensor::Device;
use polyhead_attention::{
    AttentionConfig, ConfigError, Dims, GaussianAdaptiveConfig, RopeLayout, require, require_positive,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Expander;
use crate::rope_scaling::RopeScaling;
use crate::transformer::{MlpKind, NormKind, Part, TransformerConfig};
use crate::{PerLayer, parameters};

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
    /// How the frequencies are stretched for contexts longer than those first learned. Default: not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// A learned vector for each of so many positions, added to the embedded tokens; rows may not be longer. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learned_positions: Option<usize>,
    /// The kind of norms: "rms" or "layer". Default: "rms".
    #[serde(default)]
    pub norm: NormKind,
    /// Inside the square root of the norms. Default: 1e-5.
    #[serde(default = "norm_eps")]
    pub norm_eps: f64,
    /// The kind of feed-forward layers: "swiglu" (gated, without biases), "gelu" (with biases) or "identity" (none: the
    /// normalised stream is added in its place, as Zoology's code does). Default: "swiglu".
    #[serde(default)]
    pub mlp: MlpKind,
    /// Attention and feed-forward layer read the same input, and both are added to it. Default: false, one after the other.
    #[serde(default)]
    pub parallel_residual: bool,
    /// Use the token embedding as output projection too. Default: true.
    #[serde(default = "yes")]
    pub tie_embeddings: bool,
    /// A bias on the output projection, which must not be the embedding then. Default: false.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub head_bias: bool,
    /// Predict every position from what the last one holds, for rows that are their own targets (MAD's compression). Default:
    /// false.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub autoencoder: bool,
    /// Predict masked tokens from both sides instead of the next one from those before it: a masked diffusion language model, as LLaDA
    /// (arXiv 2502.09992). Default: false.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub masked_diffusion: bool,
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

/// Learned positions at most; chosen by us.
const MOST_POSITIONS: usize = 1 << 20;

/// What a whole model costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ModelCosts {
    /// Weights.
    pub parameters: u64,
    /// Elements kept per token while decoding.
    pub kv_cache_elements_per_token: u64,
}

impl DecoderConfig {
    /// Channels inside the feed-forward layers, with the default filled in.
    pub fn feed_forward(&self) -> usize {
        self.d_ff.unwrap_or_else(|| self.d_model.saturating_mul(8).div_ceil(3).next_multiple_of(16))
    }

    /// The settings of the layers.
    pub(super) fn transformer(&self) -> TransformerConfig {
        TransformerConfig {
            d_model: self.d_model,
            n_layers: self.n_layers,
            d_ff: self.feed_forward(),
            norm: self.norm,
            norm_eps: self.norm_eps,
            mlp: self.mlp,
            rope: self.rope,
            parallel_residual: self.parallel_residual,
            attention: self.attention.clone(),
            attention_gate: self.attention_gate.clone(),
            gated: [1, self.d_model],
            grid: None,
        }
    }

    /// The mechanism of a layer.
    ///
    /// # Panics
    /// If the list of mechanisms is too short, which [`validate`](Self::validate) refuses.
    pub fn mechanism(&self, layer: usize) -> &AttentionConfig {
        self.attention.of_layer(layer).expect("validate: one mechanism per layer")
    }

    /// What a layer's mechanism knows of the model.
    pub(crate) fn dims(&self, layer: usize) -> Dims {
        let Self { d_model, n_layers, rope, norm_eps, .. } = *self;
        Dims { d_model, n_layers, layer, rope, norm_eps, grid: None }
    }

    /// Channels of a query head in a layer.
    pub fn head_dim(&self, layer: usize) -> usize {
        self.mechanism(layer).head_dim(&self.dims(layer))
    }

    /// Channels of a query head in a layer that rotate.
    pub fn rotated(&self, layer: usize) -> usize {
        (self.head_dim(layer) as f64 * self.rope_fraction) as usize
    }

    /// Channels of the keys of all heads, where every layer has as many and a key for each token of its own.
    ///
    /// # Errors
    /// Names the mechanism that has none, or the layers that differ.
    pub fn key_channels(&self) -> Result<usize, ConfigError> {
        let of_layer = |layer| {
            let mechanism = self.mechanism(layer);
            let plain = matches!(mechanism.name(), "softmax" | "sink" | "gated_attention");
            require(plain, "attention", || {
                format!(
                    "boundaries are predicted from keys of softmax, sink and gated_attention, not of {}",
                    mechanism.name()
                )
            })?;
            // A key and a value of each key/value head.
            Ok(mechanism.cost(&self.dims(layer)).kv_cache_elements_per_token as usize / 2)
        };
        let all = (0..self.n_layers).map(of_layer).collect::<Result<Vec<_>, ConfigError>>()?;
        let first = all.first().copied().unwrap_or_default();
        require(all.iter().all(|channels| *channels == first), "attention", || {
            format!("one predictor serves all layers, whose keys have {all:?} channels: they must be equal")
        })?;
        Ok(first)
    }

    /// Checks everything that a user can get wrong.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self) -> Result<(), ConfigError> {
        require_positive("rope_theta", self.rope_theta)?;
        if let Some(scaling) = &self.rope_scaling {
            scaling.validate().map_err(|error| error.within("rope_scaling"))?;
        }
        if let Some(gate) = &self.attention_gate {
            gate.validate_channels(self.d_model, "a causal model must not look ahead")
                .map_err(|error| error.within("attention_gate"))?;
        }
        require(self.learned_positions.is_none_or(|n| (1..=MOST_POSITIONS).contains(&n)), "learned_positions", || {
            let n = self.learned_positions.unwrap_or_default();
            format!("learned_positions ({n}) must be 1 to {MOST_POSITIONS}: one vector for each position of a row")
        })?;
        require(!self.head_bias || !self.tie_embeddings, "head_bias", || {
            "head_bias takes an output projection of its own: set tie_embeddings = false".into()
        })?;
        require(!self.masked_diffusion || !self.autoencoder, "masked_diffusion", || {
            "masked_diffusion and autoencoder are two ways to be trained: leave one of them out".into()
        })?;
        self.transformer().validate(|_, mechanism| match self.masked_diffusion {
            false => mechanism.check_causal(),
            true => mechanism.check_bidirectional(),
        })?;
        (0..self.n_layers).try_for_each(|layer| self.check_rotation(layer))
    }

    fn check_rotation(&self, layer: usize) -> Result<(), ConfigError> {
        let (fraction, rotated) = (self.rope_fraction, self.rotated(layer));
        let even = fraction > 0.0 && fraction <= 1.0 && rotated > 0 && rotated.is_multiple_of(2);
        require(even || !self.rope || !self.mechanism(layer).rotates(), "rope_fraction", || {
            format!(
                "rope_fraction ({fraction}) must be above 0, up to 1, and leave an even number of channels of a head ({}) to \
                 rotate, not {rotated}",
                self.head_dim(layer)
            )
        })
    }

    /// Rows of the embedding of so many ids: the mask is one more.
    pub fn rows(&self, vocab_size: usize) -> usize {
        vocab_size + usize::from(self.masked_diffusion)
    }

    /// Parameters and costs by part.
    pub fn parts(&self, vocab_size: usize) -> Vec<Part> {
        let vocab_size = self.rows(vocab_size);
        let embedding = (vocab_size * self.d_model) as u64;
        let bias = if self.head_bias { vocab_size as u64 } else { 0 };
        let head = if self.tie_embeddings { 0 } else { embedding + bias };
        let mut parts = vec![Part::new("embedding", embedding, 0)];
        if let Some(positions) = self.learned_positions {
            parts.push(Part::new("positions", (positions * self.d_model) as u64, 0));
        }
        parts.extend(self.transformer().parts(None));
        if self.autoencoder {
            let d_model = self.d_model as u64;
            parts.push(Part::new("expander", Expander::parameters(self.norm, d_model), 4 * d_model * d_model));
        }
        parts.push(Part::new("head", head, 2 * embedding));
        parts
    }

    /// The sums over all [`parts`](Self::parts).
    pub fn costs(&self, vocab_size: usize) -> ModelCosts {
        let add = |sum: ModelCosts, part: Part| ModelCosts {
            parameters: sum.parameters + part.cost.parameters,
            kv_cache_elements_per_token: sum.kv_cache_elements_per_token + part.cost.kv_cache_elements_per_token,
        };
        self.parts(vocab_size).into_iter().fold(ModelCosts::default(), add)
    }

    /// Elements of each token that are there at once for a backward pass, at most; of layers that are run again
    /// (`checkpointed`), what they read.
    pub fn kept_elements(&self, checkpointed: bool) -> usize {
        self.transformer().kept_elements(checkpointed)
    }

    /// The names of all parameters, read off a decoder of the same names with hardly any numbers; `None` where even that is
    /// large.
    pub fn parameter_names(&self) -> Option<Vec<String>> {
        /// Numbers, which are drawn in less than a second; chosen by us.
        const MOST: u64 = 50_000_000;
        let narrow = Self { d_ff: Some(1), ..self.clone() };
        let small = narrow.costs(1).parameters <= MOST;
        small
            .then(|| parameters(&narrow.init(1, &Device::flex())).into_iter().map(|parameter| parameter.name).collect())
    }
}
