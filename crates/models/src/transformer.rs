//! The pre-norm transformer layer, which decoders and encoders stack: `x + attention(norm(x))`, then `x + mlp(norm(x))`, in
//! the form of LLaMA (Touvron et al. 2023, arXiv 2302.13971) or, by its settings, of ViT or GPT-NeoX.

mod checkpointed;

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::activation::gelu;
use burn::tensor::{DType, Device, Tensor};
use polyhead_attention::{
    Adapters, Attended, Attention, AttentionConfig, Call, ConfigError, Cost, Dims, GaussianAdaptive,
    GaussianAdaptiveConfig, INIT_STD, Sites, StreamSite, linear, require, require_positive,
};
use polyhead_kernels::{RmsNorm, add_rms_norm, gated_mlp, in_type, layer_norm, rms_norm, swiglu};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tracing::info_span;

use crate::PerLayer;
use crate::gate::dropout;

pub use checkpointed::ActivationCheckpointing;
pub(crate) use checkpointed::LayerPass;

/// The kind of norms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// Root mean square, without a bias.
    #[default]
    Rms,
    /// Mean and variance, with a bias.
    Layer,
}

/// The kind of feed-forward layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MlpKind {
    /// `down(silu(gate(x)) * up(x))`
    #[default]
    Swiglu,
    /// `down(gelu(up(x)))` with biases.
    Gelu,
    /// `x`: no feed-forward layer, so that the normalised stream itself is added, as in the models of Zoology (arXiv 2312.04927).
    Identity,
}

/// What products run in. Parameters, the residual stream, norms, softmax, λ and the loss are f32 always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32 bits.
    #[default]
    F32,
    /// 16 bits with the range of f32: for GPUs; on a CPU it is slower.
    Bf16,
}

impl Precision {
    /// The type of the numbers that products read.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }

    /// As a recipe writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

/// How layers compute, which is not part of what they are.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Computing {
    /// What products run in.
    pub precision: Precision,
    /// The rate of dropout on the embedded input and on what attention and feed-forward layers write, while training.
    pub dropout: f64,
    /// The rate on the embedded input, where it is another one.
    pub embedding_dropout: Option<f64>,
    /// What is kept for the backward pass.
    pub checkpointing: ActivationCheckpointing,
    /// Weight of the overlap of heads in the loss of a decoder; 0 where it is not computed.
    pub head_overlap: f64,
}

/// The settings of a stack of layers, whatever is before and behind it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TransformerConfig {
    pub d_model: usize,
    pub n_layers: usize,
    pub d_ff: usize,
    pub norm: NormKind,
    pub norm_eps: f64,
    pub mlp: MlpKind,
    /// Whether queries and keys are rotated by position.
    pub rope: bool,
    /// Attention and feed-forward layer read the same input, and both are added to it.
    pub parallel_residual: bool,
    pub attention: PerLayer<AttentionConfig>,
    pub attention_gate: Option<GaussianAdaptiveConfig>,
    /// Positions and channels that the gates are made for.
    pub gated: [usize; 2],
    /// Rows and columns of the grid that the positions form, where they form one.
    pub grid: Option<[usize; 2]>,
}

/// A part of a model with what it costs, for `plan`.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// What it is: `embedding`, `attention: softmax`, ...
    pub name: String,
    /// Its cost, over all its layers.
    pub cost: Cost,
}

impl Part {
    pub(crate) fn new(name: impl Into<String>, parameters: u64, flops_per_token: u64) -> Self {
        Self { name: name.into(), cost: Cost { parameters, flops_per_token, ..Cost::default() } }
    }
}

impl TransformerConfig {
    pub fn dims(&self, layer: usize) -> Dims {
        let Self { d_model, n_layers, rope, norm_eps, grid, .. } = *self;
        Dims { d_model, n_layers, layer, rope, norm_eps, grid }
    }

    fn mechanism(&self, layer: usize) -> &AttentionConfig {
        self.attention.of_layer(layer).expect("validate: one mechanism per layer")
    }

    /// Checks everything that a user can get wrong; `check` adds what a mechanism must obey in this model.
    pub fn validate(
        &self,
        check: impl Fn(usize, &AttentionConfig) -> Result<(), ConfigError>,
    ) -> Result<(), ConfigError> {
        check_sizes([self.d_model, self.n_layers, self.d_ff])?;
        require_positive("norm_eps", self.norm_eps)?;
        if let PerLayer::Each(list) = &self.attention {
            let (listed, n_layers) = (list.len(), self.n_layers);
            require(listed == n_layers, "attention", || {
                format!("attention lists {listed} mechanisms for n_layers ({n_layers}): give one per layer")
            })?;
        }
        for layer in 0..self.n_layers {
            let table = match &self.attention {
                PerLayer::Same(_) => "attention".to_owned(),
                PerLayer::Each(_) => format!("attention.{layer}"),
            };
            let mechanism = self.mechanism(layer);
            mechanism.validate(&self.dims(layer)).map_err(|error| error.within(&table))?;
            check(layer, mechanism).map_err(|error| error.within(&table))?;
        }
        Ok(())
    }

    /// A layer with fresh weights.
    pub fn init_layer(&self, index: usize, device: &Device) -> Block {
        let norm = || Norm::init(self.norm, self.d_model, device);
        Block {
            attention_norm: norm(),
            attention: self.mechanism(index).init(&self.dims(index), device),
            attention_gate: self.attention_gate.as_ref().map(|gate| gate.init(&self.gated, device)),
            mlp_norm: norm(),
            mlp: Mlp::init(self.mlp, [self.d_model, self.d_ff], self.n_layers, device),
        }
    }

    /// The norm behind the last layer, with fresh weights.
    pub fn init_norm(&self, device: &Device) -> Norm {
        Norm::init(self.norm, self.d_model, device)
    }

    /// Costs of the layers and of the last norm, by part: attention by mechanism, feed-forward, gates, norms. Operations are
    /// per token, or, where all `positions` attend to each other, per example.
    pub fn parts(&self, positions: Option<u64>) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::new();
        for layer in 0..self.n_layers {
            let (mechanism, dims) = (self.mechanism(layer), self.dims(layer));
            let cost = match (mechanism.cost(&dims), positions) {
                (cost, None) => cost,
                (Cost { parameters, .. }, Some(positions)) => {
                    let flops_per_token = mechanism.encoder_flops(&dims, positions);
                    Cost { parameters, flops_per_token, ..Cost::default() }
                }
            };
            let window = cost.window.map(|window| format!(", window {window}")).unwrap_or_default();
            let name = format!("attention: {}{window}", mechanism.name());
            match parts.iter_mut().find(|part| part.name == name) {
                Some(part) => part.cost = part.cost + cost,
                None => parts.push(Part { name, cost }),
            }
        }
        let (d_model, d_ff, layers) = (self.d_model as u64, self.d_ff as u64, self.n_layers as u64);
        let [matrices, biases] = match self.mlp {
            MlpKind::Swiglu => [3 * d_model * d_ff, 0],
            MlpKind::Gelu => [2 * d_model * d_ff, d_model + d_ff],
            MlpKind::Identity => [0, 0],
        };
        let flops = positions.unwrap_or(1).saturating_mul(2 * layers * matrices);
        parts.push(Part::new("feed-forward", layers * (matrices + biases), flops));
        if let Some(gate) = &self.attention_gate {
            parts.push(Part::new("attention gates", layers * gate.parameters(&self.gated), 0));
        }
        let vectors = match self.norm {
            NormKind::Rms => 1,
            NormKind::Layer => 2,
        };
        parts.push(Part::new("norms", (2 * layers + 1) * vectors * d_model, 0));
        parts
    }

    /// Elements of each token that are there at once for a backward pass, at most: what all layers keep (what norms and
    /// projections read, what attention and the feed-forward layer computed from it), and as much again as the largest layer
    /// keeps, for the gradients of the layer that is at work. Met within a tenth by measured peaks (`cargo bench --bench memory`).
    pub fn kept_elements(&self, checkpointed: bool) -> usize {
        let of_layer = |layer: usize| {
            let cost = self.mechanism(layer).cost(&self.dims(layer));
            let attention = cost.parameters / (self.d_model as u64).max(1) + cost.kept_elements_per_token;
            let inner = if self.mlp == MlpKind::Identity { 0 } else { self.d_ff };
            let rest = self.d_model.saturating_mul(4).saturating_add(inner.saturating_mul(2));
            rest.saturating_add(attention as usize)
        };
        let largest = (0..self.n_layers).map(of_layer).max().unwrap_or(0);
        match checkpointed {
            true => self.d_model.saturating_mul(self.n_layers).saturating_add(largest.saturating_mul(2)),
            false => (0..self.n_layers).map(of_layer).fold(largest, usize::saturating_add),
        }
    }
}

/// Refuses sizes of nothing, and sizes beyond those of any model, whose products would leave the numbers: channels, layers,
/// channels of the feed-forward layers. The limits are chosen by us.
///
/// # Errors
/// Names the field, its value and the rule.
fn check_sizes([d_model, n_layers, d_ff]: [usize; 3]) -> Result<(), ConfigError> {
    for (field, value, most) in
        [("d_model", d_model, 1 << 20), ("n_layers", n_layers, 1 << 14), ("d_ff", d_ff, 1 << 24)]
    {
        require(value > 0, field, || format!("{field} (0) must be at least 1"))?;
        require(value <= most, field, || format!("{field} ({value}) must be at most {most}"))?;
    }
    Ok(())
}

/// A norm's weights; the epsilon is the model's.
#[derive(Module, Debug)]
pub struct Norm {
    /// `[d_model]`
    pub weight: Param<Tensor<1>>,
    /// `[d_model]`: makes it a LayerNorm; without it, it is an RMSNorm
    pub bias: Option<Param<Tensor<1>>>,
}

impl Norm {
    pub(crate) fn init(kind: NormKind, d_model: usize, device: &Device) -> Self {
        Self {
            weight: Param::from_tensor(Tensor::ones([d_model], device)),
            bias: (kind == NormKind::Layer).then(|| Param::from_tensor(Tensor::zeros([d_model], device))),
        }
    }

    pub(crate) fn forward(&self, hidden: Tensor<3>, eps: f64) -> Tensor<3> {
        match &self.bias {
            Some(bias) => layer_norm(hidden, self.weight.val(), bias.val(), eps),
            None => rms_norm(hidden, self.weight.val(), eps),
        }
    }

    /// The residual stream with what is written to it added, and its norm as `dtype`, all `[batch, seq, d_model]`.
    pub(crate) fn of_sum(
        &self,
        hidden: Tensor<3>,
        written: Option<Tensor<3>>,
        eps: f64,
        dtype: DType,
    ) -> (Tensor<3>, Tensor<3>) {
        if self.bias.is_none() {
            return add_rms_norm(hidden, written, RmsNorm { weight: self.weight.val(), eps, dtype });
        }
        let sum = match written {
            Some(written) => hidden + in_type(written, DType::F32),
            None => hidden,
        };
        (sum.clone(), in_type(self.forward(sum, eps), dtype))
    }

    /// `[batch, seq, 1]`: what the norm divides by, √(mean x² + ε), of a LayerNorm that of x without its mean.
    pub(crate) fn scale(&self, hidden: Tensor<3>, eps: f64) -> Tensor<3> {
        let centred = match self.bias {
            Some(_) => hidden.clone() - hidden.mean_dim(2),
            None => hidden,
        };
        (centred.square().mean_dim(2) + eps).sqrt()
    }

    /// Reads the scale of `hidden`, where the site is asked for.
    fn read_scale(&self, sites: Sites<'_>, site: StreamSite, hidden: &Tensor<3>, eps: f64) {
        if sites.touch(&[site.into()]) {
            sites.stream(site, self.scale(hidden.clone(), eps));
        }
    }
}

/// A feed-forward layer: gated SwiGLU, or GELU where there is no gate.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[d_model, d_ff]`
    pub gate_proj: Option<Linear>,
    /// `[d_model, d_ff]`
    pub up_proj: Linear,
    /// `[d_ff, d_model]`
    pub down_proj: Linear,
}

impl Mlp {
    /// `None` where there is no such layer.
    fn init(kind: MlpKind, [d_model, d_ff]: [usize; 2], n_layers: usize, device: &Device) -> Option<Self> {
        if kind == MlpKind::Identity {
            return None;
        }
        let biases = kind == MlpKind::Gelu;
        // What writes into the residual stream begins smaller, as the output projections of attention do.
        let residual = INIT_STD / (2.0 * n_layers as f64).sqrt();
        Some(Self {
            gate_proj: (kind == MlpKind::Swiglu).then(|| linear(d_model, d_ff, false, INIT_STD, device)),
            up_proj: linear(d_model, d_ff, biases, INIT_STD, device),
            down_proj: linear(d_ff, d_model, biases, residual, device),
        })
    }

    fn forward(&self, x: Tensor<3>, adapters: Adapters<'_>) -> Tensor<3> {
        let Self { gate_proj, up_proj, down_proj } = self;
        let touched = adapters.touch(&["gate_proj", "up_proj", "down_proj"]);
        let up = |x| adapters.project("up_proj", up_proj, x);
        let inner = match gate_proj {
            Some(gate) if !touched => {
                return gated_mlp(x, gate.weight.val(), up_proj.weight.val(), down_proj.weight.val());
            }
            Some(gate) => swiglu(adapters.project("gate_proj", gate, x.clone()), up(x)),
            None => gelu(up(x)),
        };
        adapters.project("down_proj", down_proj, inner)
    }
}

/// One layer.
#[derive(Module, Debug)]
pub struct Block {
    /// Before attention
    pub attention_norm: Norm,
    /// The mechanism
    pub attention: Attention,
    /// On what the mechanism writes; `None` without
    pub attention_gate: Option<GaussianAdaptive>,
    /// Before the feed-forward layer
    pub mlp_norm: Norm,
    /// The feed-forward layer; `None` where its place is taken by the identity
    pub mlp: Option<Mlp>,
}

impl Block {
    /// What the layer makes of the residual stream, `[batch, seq, d_model]`. The adapters of the call are those of the
    /// feed-forward layer too.
    pub(crate) fn forward(
        &self,
        hidden: Tensor<3>,
        call: Call<'_>,
        config: &TransformerConfig,
        computing: Computing,
    ) -> Attended {
        let (eps, inner, adapters, sites) = (config.norm_eps, computing.precision.dtype(), call.adapters, call.sites);
        let hidden = sites.stream(StreamSite::ResidPre, hidden);
        self.attention_norm.read_scale(sites, StreamSite::AttnScale, &hidden, eps);
        let (hidden, normed) = self.attention_norm.of_sum(hidden, None, eps, inner);
        let attended = info_span!("attention").in_scope(|| self.attention.forward(normed, call));
        // Only the addition takes what the products give as it is.
        let only_added = self.attention_gate.is_none() && computing.dropout == 0.0;
        let written = match only_added && !sites.touch(&[StreamSite::AttnOut.into()]) {
            true => attended.hidden,
            false => in_type(attended.hidden, DType::F32),
        };
        let written = match &self.attention_gate {
            Some(gate) => gate.forward(written, None).0,
            None => written,
        };
        let written = dropout(sites.stream(StreamSite::AttnOut, written), computing.dropout);
        let read_as = if self.mlp.is_some() { inner } else { DType::F32 };
        let between = [StreamSite::ResidMid, StreamSite::MlpIn, StreamSite::MlpScale].map(Into::into);
        let (mixed, normed) = if config.parallel_residual || sites.touch(&between) {
            let mixed = sites.stream(StreamSite::ResidMid, hidden.clone() + in_type(written, DType::F32));
            let read = if config.parallel_residual { hidden } else { mixed.clone() };
            let read = sites.stream(StreamSite::MlpIn, read);
            self.mlp_norm.read_scale(sites, StreamSite::MlpScale, &read, eps);
            (mixed, in_type(self.mlp_norm.forward(read, eps), read_as))
        } else {
            self.mlp_norm.of_sum(hidden, Some(written), eps, read_as)
        };
        let written = match &self.mlp {
            Some(mlp) => info_span!("feed-forward").in_scope(|| mlp.forward(normed, adapters)),
            None => normed,
        };
        let written = sites.stream(StreamSite::MlpOut, in_type(written, DType::F32));
        let hidden = sites.stream(StreamSite::ResidPost, mixed + dropout(written, computing.dropout));
        Attended { hidden, ..attended }
    }
}
