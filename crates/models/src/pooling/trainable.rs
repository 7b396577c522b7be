//! Trainable pooling for embeddings of language models (Tang and Yang 2024, arXiv 2409.02727; code `yixuantt/PoolingAndAttn`,
//! commit 57791d5): a few latents attend to hidden states and are averaged.
//!
//! ```text
//! Z  = hidden states [S, d] (+ W, a row per layer)          Q0 = trainable latents [r, d]
//! q  = LN(Q0) Wq,   (k, v) = LN(Z) Wkv,   A = softmax(q kᵀ / √e) v
//! Y  = A Wo + Q0                                            the residual is the latents before their norm
//! Y  = Y + fc2(u gelu(g)),   (u, g) = fc1(LN(Y))
//! out = mean over latents of Y, divided by its length
//! ```
//! What Z is makes the paper's models 2 to 5 ([`PoolInput`]); model 1 is the plain last token. "Multi-Layers" (MLTP) are those
//! with one state per layer. Against the code: the last token is the last that is no padding, where the code takes index -1 and
//! relies on padding on the left; tokens as keys leave padding out, where the code has none to meet; fc and attention default
//! to the width of the model, where the code's are 1.3 billion parameters for a model of 7.
//!
//! Latents begin at N(0, 1), so that a constant, their mean, is part of every output: with few latents as large as the part that
//! comes from the data. `latent_std` makes it smaller.

use burn::module::{Module, Param};
use burn::nn::{LayerNorm, LayerNormConfig, Linear};
use burn::tensor::{Bool, DType, Device, Distribution, Tensor, activation};
use polyhead_attention::{ConfigError, Mask, require};
use polyhead_kernels::{AttentionOptions, attention, in_type, linear, random};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{last_token, mean_of_tokens};

/// Settings of trainable pooling.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainablePoolingConfig {
    /// Which hidden states the latents attend to. Default: "mean_of_each_layer", model 5 of the paper.
    #[serde(default)]
    pub input: PoolInput,
    /// Latents. Default: 16, chosen by us for small models; the paper's code has 768.
    #[serde(default = "latents")]
    pub n_latents: usize,
    /// Heads of the attention. The paper's code has 32.
    pub n_heads: usize,
    /// Channels of a head. Default: d_model / n_heads; the paper's code has 2048.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Standard deviation of fresh latents. Default: 1.0, the code's.
    #[serde(default = "one")]
    pub latent_std: f64,
}

fn latents() -> usize {
    16
}

fn one() -> f64 {
    1.0
}

/// Which hidden states the latents attend to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PoolInput {
    /// One per layer, the mean over its tokens: model 5 (MLTP), for models whose tokens see each other both ways.
    #[default]
    MeanOfEachLayer,
    /// One per layer, its last token: model 3 (MLTP), for causal models.
    LastOfEachLayer,
    /// All tokens of the last layer: model 4.
    TokensOfLastLayer,
    /// The last token of the last layer alone: model 2.
    LastOfLastLayer,
}

impl PoolInput {
    /// Whether there is a state per layer, and with it a table of what is added to each.
    fn of_each_layer(self) -> bool {
        matches!(self, Self::MeanOfEachLayer | Self::LastOfEachLayer)
    }
}

impl TrainablePoolingConfig {
    pub(super) fn validate(&self, d_model: usize) -> Result<(), ConfigError> {
        let Self { n_latents, n_heads, head_dim, latent_std, .. } = *self;
        for (field, size) in [("n_latents", n_latents), ("n_heads", n_heads), ("head_dim", head_dim.unwrap_or(1))] {
            require(size > 0, field, || format!("{field} (0) must be at least 1"))?;
        }
        require(head_dim.is_some() || d_model.is_multiple_of(n_heads), "n_heads", || {
            format!("n_heads ({n_heads}) must divide d_model ({d_model}), or head_dim must be given")
        })?;
        require(latent_std.is_finite() && latent_std >= 0.0, "latent_std", || {
            format!("latent_std ({latent_std}) must be a number from 0 up")
        })
    }

    pub(super) fn parameters(&self, d_model: usize, n_layers: usize) -> u64 {
        let inner = self.n_heads * self.head_dim.unwrap_or(d_model / self.n_heads);
        let rows = self.n_latents + if self.input.of_each_layer() { n_layers } else { 0 };
        let (norms, attention) = (6 * d_model, 4 * d_model * inner);
        let mlp = 12 * d_model * d_model + 9 * d_model;
        (rows * d_model + norms + attention + mlp) as u64
    }

    pub(super) fn init(&self, d_model: usize, n_layers: usize, device: &Device) -> TrainablePooling {
        let inner = self.n_heads * self.head_dim.unwrap_or(d_model / self.n_heads);
        let normal =
            |rows: usize, std: f64| Param::from_tensor(random([rows, d_model], Distribution::Normal(0.0, std), device));
        let norm = || LayerNormConfig::new(d_model).init(device);
        let project = |d_input, d_output, bias| default_linear(d_input, d_output, bias, device);
        TrainablePooling {
            latents: normal(self.n_latents, self.latent_std),
            layer_table: self.input.of_each_layer().then(|| normal(n_layers, 1.0)),
            hidden_norm: norm(),
            latent_norm: norm(),
            q_proj: project(d_model, inner, false),
            kv_proj: project(d_model, 2 * inner, false),
            o_proj: project(inner, d_model, false),
            mlp_norm: norm(),
            up_proj: project(d_model, 8 * d_model, true),
            down_proj: project(4 * d_model, d_model, true),
            n_heads: self.n_heads,
            input: self.input,
        }
    }
}

/// Weights and biases from U(-1/√d_input, 1/√d_input), as PyTorch's linear layers begin and the code leaves them.
pub(crate) fn default_linear(d_input: usize, d_output: usize, bias: bool, device: &Device) -> Linear {
    let bound = (d_input as f64).powf(-0.5);
    let uniform = Distribution::Uniform(-bound, bound);
    Linear {
        weight: Param::from_tensor(random([d_input, d_output], uniform, device)),
        bias: bias.then(|| Param::from_tensor(random([d_output], uniform, device))),
    }
}

/// Trainable pooling.
#[derive(Module, Debug)]
pub struct TrainablePooling {
    /// `[latents, d_model]`: Q0.
    pub latents: Param<Tensor<2>>,
    /// `[layers, d_model]`: W, added to the state of each layer; `None` where there is but one.
    pub layer_table: Option<Param<Tensor<2>>>,
    /// Of the hidden states.
    pub hidden_norm: LayerNorm,
    /// Of the latents, before their projection only.
    pub latent_norm: LayerNorm,
    /// `[d_model, n_heads * head_dim]`
    pub q_proj: Linear,
    /// `[d_model, 2 * n_heads * head_dim]`: keys, values.
    pub kv_proj: Linear,
    /// `[n_heads * head_dim, d_model]`
    pub o_proj: Linear,
    /// Before the feed-forward part.
    pub mlp_norm: LayerNorm,
    /// `[d_model, 8 * d_model]`: values, then their gate.
    pub up_proj: Linear,
    /// `[4 * d_model, d_model]`
    pub down_proj: Linear,
    n_heads: usize,
    #[module(skip)]
    input: PoolInput,
}

impl TrainablePooling {
    /// `[batch, d_model]`, of length 1; arguments as in [`Pooling::forward`](super::Pooling::forward).
    pub fn forward(&self, layers: &[Tensor<3>], hidden: Option<&Tensor<2, Bool>>) -> Tensor<2> {
        let last = layers[layers.len() - 1].clone();
        let each = |pool: fn(Tensor<3>, Option<&Tensor<2, Bool>>) -> Tensor<2>| {
            Tensor::stack::<3>(layers.iter().map(|layer| pool(layer.clone(), hidden)).collect(), 1)
        };
        match self.input {
            PoolInput::MeanOfEachLayer => self.pool(each(mean_of_tokens), None),
            PoolInput::LastOfEachLayer => self.pool(each(last_token), None),
            PoolInput::TokensOfLastLayer => self.pool(last, hidden),
            PoolInput::LastOfLastLayer => self.pool(last_token(last, hidden).unsqueeze_dim(1), None),
        }
    }

    /// The pooling itself: states `[batch, states, d_model]`, of which `hidden` ones are left out, to `[batch, d_model]`.
    pub fn pool(&self, states: Tensor<3>, hidden: Option<&Tensor<2, Bool>>) -> Tensor<2> {
        let [batch, n_states, _] = states.dims();
        let n_latents = self.latents.dims()[0];
        let states = in_type(states, DType::F32);
        let states = match &self.layer_table {
            Some(table) => states + table.val().narrow(0, 0, n_states).unsqueeze::<3>(),
            None => states,
        };
        let states = match hidden {
            Some(hidden) => {
                let dims = states.dims();
                states.mask_fill(hidden.clone().unsqueeze_dim::<3>(2).expand(dims), 0.0)
            }
            None => states,
        };
        let kv = apply(&self.kv_proj, self.hidden_norm.forward(states));
        let width = kv.dims()[2] / 2;
        let [k, v] = [0, 1].map(|part| self.split(kv.clone().narrow(2, part * width, width)));
        let latents = self.latents.val();
        let q = apply(&self.q_proj, self.latent_norm.forward(latents.clone()).unsqueeze::<3>());
        let q = self.split(q.expand([batch, n_latents, width]));
        let mask = hidden.map(|hidden| {
            let hidden = hidden.clone().reshape([batch, 1, 1, n_states]);
            Mask::none().with_dense(hidden.expand([batch, 1, n_latents, n_states]))
        });
        let options = AttentionOptions { mask: mask.as_ref(), ..Default::default() };
        let heads = attention(q, k, v, &options).hidden.swap_dims(1, 2).reshape([batch, n_latents, width]);
        let mixed = apply(&self.o_proj, heads) + latents.unsqueeze::<3>();
        let up = apply(&self.up_proj, self.mlp_norm.forward(mixed.clone()));
        let half = up.dims()[2] / 2;
        let gated = up.clone().narrow(2, 0, half) * activation::gelu(up.narrow(2, half, half));
        let out = apply(&self.down_proj, gated) + mixed;
        unit(out.mean_dim(1).squeeze_dim(1))
    }

    /// `[batch, seq, n_heads * head_dim]` to `[batch, n_heads, seq, head_dim]`.
    fn split(&self, x: Tensor<3>) -> Tensor<4> {
        let [batch, seq, width] = x.dims();
        x.reshape([batch, seq, self.n_heads, width / self.n_heads]).swap_dims(1, 2)
    }
}

fn apply(layer: &Linear, x: Tensor<3>) -> Tensor<3> {
    linear(x, layer.weight.val(), layer.bias.as_ref().map(Param::val))
}

/// Rows divided by their length, which counts as 1e-12 at least: `[rows, d_model]`.
pub(crate) fn unit(x: Tensor<2>) -> Tensor<2> {
    // The bound is inside the root, whose gradient at 0 is NaN.
    let length = x.clone().square().sum_dim(1).clamp_min(1e-24).sqrt();
    x / length
}
