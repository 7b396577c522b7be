//! GQDAAM: a gate in front of grouped-query attention between the layers of the encoder (arXiv 2401.11143; code of the
//! experiments, commit 093212b, with an early open-source form of grouped-query attention).
//!
//! ```text
//! x = gate(features) W + b                                [layers, d_attention]
//! q_h = Σ over the query heads of key head h              k_h, v_h: n_kv_heads of them
//! out = LN(concat_h softmax(q_h k_hᵀ / width) v_h) Wo + bo
//! ```
//! Two things there are not what the name says, and are followed, because the numbers of the paper come from them. The query
//! heads of a group are added up *before* the softmax, so that there are only n_kv_heads maps: that is attention with fewer
//! heads, whose queries have redundant parameters. And scores are divided by the square root of the width twice. There is no
//! residual. Grouped-query attention as it is meant is `attention.mechanism.softmax` with n_kv_heads.

use burn::module::{Module, Param};
use burn::nn::{LayerNorm, LayerNormConfig, Linear};
use burn::tensor::{Device, Distribution, Tensor};
use polyhead_attention::{ConfigError, GaussianAdaptive, GaussianAdaptiveConfig, require};
use polyhead_kernels::{AttentionOptions, attention, linear, random};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pooling::default_linear;

/// Settings of GQDAAM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GqdaamConfig {
    /// The gate; the paper's is one of form `paper` with 8 heads.
    pub gate: GaussianAdaptiveConfig,
    /// Channels of attention. Default: 512, the paper's.
    #[serde(default = "d_attention")]
    pub d_attention: usize,
    /// Query heads. Default: 8, the paper's.
    #[serde(default = "eight")]
    pub n_heads: usize,
    /// Heads of keys and values. Default: 2, the paper's.
    #[serde(default = "two")]
    pub n_kv_heads: usize,
}

fn d_attention() -> usize {
    512
}

fn eight() -> usize {
    8
}

fn two() -> usize {
    2
}

impl GqdaamConfig {
    pub(super) fn validate(&self, sizes: &[usize]) -> Result<(), ConfigError> {
        self.gate.validate(sizes).map_err(|error| error.within("gate"))?;
        let Self { d_attention, n_heads, n_kv_heads, .. } = *self;
        require(n_heads > 0 && d_attention > 0 && d_attention.is_multiple_of(n_heads), "n_heads", || {
            format!("n_heads ({n_heads}) must be at least 1 and divide d_attention ({d_attention})")
        })?;
        require(n_kv_heads > 0 && n_heads.is_multiple_of(n_kv_heads), "n_kv_heads", || {
            format!("n_kv_heads ({n_kv_heads}) must be at least 1 and divide n_heads ({n_heads})")
        })
    }

    /// Weights for features `[layers, d_model]`.
    pub(super) fn parameters(&self, sizes: &[usize]) -> u64 {
        let (attention, inner) = (self.d_attention, self.inner());
        let linear = |d_input: usize, d_output: usize| d_input * d_output + d_output;
        let into = linear(sizes[1], attention) + linear(attention, attention) + 2 * linear(attention, inner);
        self.gate.parameters(sizes) + (into + 2 * inner + linear(inner, attention)) as u64
    }

    /// Operations on features `[layers, d_model]`.
    pub(super) fn flops(&self, sizes: &[usize]) -> u64 {
        let (attention, inner, rows) = (self.d_attention, self.inner(), sizes[0]);
        let matrices = sizes[1] * attention + attention * attention + 3 * attention * inner;
        (2 * rows * matrices + 4 * rows * rows * inner) as u64
    }

    /// Channels of keys and values.
    fn inner(&self) -> usize {
        self.d_attention / self.n_heads * self.n_kv_heads
    }

    pub(super) fn init(&self, sizes: &[usize], device: &Device) -> Gqdaam {
        let (d_attention, inner) = (self.d_attention, self.inner());
        let project = |d_input, d_output| xavier_normal(d_input, d_output, device);
        Gqdaam {
            gate: self.gate.init(sizes, device),
            in_proj: default_linear(sizes[1], d_attention, true, device),
            q_proj: project(d_attention, d_attention),
            k_proj: project(d_attention, inner),
            v_proj: project(d_attention, inner),
            norm: LayerNormConfig::new(inner).init(device),
            o_proj: project(inner, d_attention),
            n_heads: self.n_heads,
            n_kv_heads: self.n_kv_heads,
        }
    }
}

/// Weights from N(0, 2 / (d_input + d_output)), biases of zeros, as that attention begins.
fn xavier_normal(d_input: usize, d_output: usize, device: &Device) -> Linear {
    let std = (2.0 / (d_input + d_output) as f64).sqrt();
    Linear {
        weight: Param::from_tensor(random([d_input, d_output], Distribution::Normal(0.0, std), device)),
        bias: Some(Param::from_tensor(Tensor::zeros([d_output], device))),
    }
}

/// A gate in front of grouped-query attention.
#[derive(Module, Debug)]
pub struct Gqdaam {
    /// Over the features as they come.
    pub gate: GaussianAdaptive,
    /// `[d_model, d_attention]`
    pub in_proj: Linear,
    /// `[d_attention, d_attention]`
    pub q_proj: Linear,
    /// `[d_attention, n_kv_heads * width]`
    pub k_proj: Linear,
    /// `[d_attention, n_kv_heads * width]`
    pub v_proj: Linear,
    /// Before the output projection.
    pub norm: LayerNorm,
    /// `[n_kv_heads * width, d_attention]`
    pub o_proj: Linear,
    n_heads: usize,
    n_kv_heads: usize,
}

impl Gqdaam {
    /// `[batch, layers, d_model]` to `[batch, layers, d_attention]`, and the gates.
    pub(super) fn forward(&self, features: Tensor<3>) -> (Tensor<3>, Vec<Tensor<3>>) {
        let (gated, gates) = self.gate.forward(features, None);
        let apply = |layer: &Linear, x: Tensor<3>| linear(x, layer.weight.val(), layer.bias.as_ref().map(Param::val));
        let x = apply(&self.in_proj, gated);
        let [batch, n_layers, d_attention] = x.dims();
        let (width, group) = (d_attention / self.n_heads, self.n_heads / self.n_kv_heads);
        let heads = |x: Tensor<3>| x.reshape([batch, n_layers, self.n_kv_heads, width]).swap_dims(1, 2);
        let q = apply(&self.q_proj, x.clone()).reshape([batch, n_layers, self.n_kv_heads, group, width]);
        let q = heads(q.sum_dim(3).reshape([batch, n_layers, self.n_kv_heads * width]));
        let [k, v] = [&self.k_proj, &self.v_proj].map(|layer| heads(apply(layer, x.clone())));
        let options = AttentionOptions { scale: Some(1.0 / width as f64), ..Default::default() };
        let out = attention(q, k, v, &options).hidden.swap_dims(1, 2);
        let out = self.norm.forward(out.reshape([batch, n_layers, self.n_kv_heads * width]));
        (apply(&self.o_proj, out), gates)
    }
}
