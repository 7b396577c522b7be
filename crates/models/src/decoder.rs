//! The pre-norm decoder: `x + attention(norm(x))`, then `x + mlp(norm(x))`, in the form of LLaMA (Touvron et al. 2023,
//! arXiv 2302.13971): RMSNorm, rotary positions, SwiGLU, no biases but those that a mechanism asks for.
//!
//! A few settings make it the form of GPT-NeoX (Black et al. 2022, arXiv 2204.06745) instead: `x + attention(norm(x)) +
//! mlp(norm'(x))`, LayerNorm, GELU with biases, heads that rotate in part.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::activation::gelu;
use burn::tensor::{DType, Device, Distribution, Int, Tensor, TensorData};
use polyhead_attention::{
    Adapter, Adapters, Attention, AttentionConfig, Cache, Call, ConfigError, Cost, Dims, GaussianAdaptive,
    GaussianAdaptiveConfig, INIT_STD, Mask, Observation, Observe, Rope, RopeLayout, frequencies, linear,
};
use polyhead_kernels::{gated_mlp, in_type, layer_norm, rms_norm, swiglu};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::adapters::Lora;
use crate::rope_scaling::RopeScaling;
use crate::{Batch, Gate, PerLayer};

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

impl DecoderConfig {
    /// Channels inside the feed-forward layers, with the default filled in.
    pub fn feed_forward(&self) -> usize {
        self.d_ff.unwrap_or_else(|| (self.d_model * 8).div_ceil(3).next_multiple_of(16))
    }

    fn dims(&self, layer: usize) -> Dims {
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
        let positive = |field: &str, value: usize| match value {
            0 => Err(ConfigError::new(field, format!("{field} (0) must be at least 1"))),
            _ => Ok(()),
        };
        positive("d_model", self.d_model)?;
        positive("n_layers", self.n_layers)?;
        positive("d_ff", self.feed_forward())?;
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

    /// A decoder with fresh weights. Call [`validate`](Self::validate) first, and seed the device.
    pub fn init(&self, vocab_size: usize, device: &Device) -> Decoder {
        let (d_model, d_ff) = (self.d_model, self.feed_forward());
        let norm = || Norm::init(self.norm, d_model, device);
        let embedding = Tensor::random([vocab_size, d_model], Distribution::Normal(0.0, INIT_STD), device);
        let layer = |index| Block {
            attention_norm: norm(),
            attention: self.mechanism(index).init(&self.dims(index), device),
            attention_gate: self.attention_gate.as_ref().map(|gate| gate.init(&[1, d_model], device)),
            mlp_norm: norm(),
            mlp: Mlp::init(self.mlp, [d_model, d_ff], self.n_layers, device),
        };
        Decoder {
            embedding: Embedding { weight: Param::from_tensor(embedding) },
            layers: (0..self.n_layers).map(layer).collect(),
            norm: norm(),
            head: (!self.tie_embeddings).then(|| linear(d_model, vocab_size, false, INIT_STD, device)),
            lora: None,
            config: self.clone(),
            gate: None,
            precision: Precision::F32,
        }
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
}

/// What a whole model costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ModelCosts {
    /// Weights.
    pub parameters: u64,
    /// Numbers kept per token while decoding.
    pub cached_numbers_per_token: u64,
}

impl DecoderConfig {
    /// The sums over all [`parts`](Self::parts).
    pub fn costs(&self, vocab_size: usize) -> ModelCosts {
        let add = |sum: ModelCosts, part: Part| ModelCosts {
            parameters: sum.parameters + part.cost.parameters,
            cached_numbers_per_token: sum.cached_numbers_per_token + part.cost.cached_numbers_per_token,
        };
        self.parts(vocab_size).into_iter().fold(ModelCosts::default(), add)
    }
}

/// The token embedding.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[vocab, d_model]`
    pub weight: Param<Tensor<2>>,
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
    pub(crate) fn init(kind: MlpKind, [d_model, d_ff]: [usize; 2], n_layers: usize, device: &Device) -> Self {
        let biases = kind == MlpKind::Gelu;
        // What writes into the residual stream begins smaller, as the output projections of attention do.
        let residual = INIT_STD / (2.0 * n_layers as f64).sqrt();
        Self {
            gate_proj: (kind == MlpKind::Swiglu).then(|| linear(d_model, d_ff, false, INIT_STD, device)),
            up_proj: linear(d_model, d_ff, biases, INIT_STD, device),
            down_proj: linear(d_ff, d_model, biases, residual, device),
        }
    }

    pub(crate) fn forward(&self, x: Tensor<3>, adapters: Adapters<'_>) -> Tensor<3> {
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

/// One layer of a decoder.
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
    /// The feed-forward layer
    pub mlp: Mlp,
}

/// A decoder language model.
#[derive(Module, Debug)]
pub struct Decoder {
    /// Token embedding
    pub embedding: Embedding,
    /// Layers, first to last
    pub layers: Vec<Block>,
    /// Before the output projection
    pub norm: Norm,
    /// The output projection; `None` where it is the embedding
    pub head: Option<Linear>,
    /// Low-rank pairs beside the projections; `None` without
    pub lora: Option<Lora>,
    #[module(skip)]
    config: DecoderConfig,
    #[module(skip)]
    gate: Option<Gate>,
    #[module(skip)]
    precision: Precision,
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
    fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// What a pass through the layers is told.
#[derive(Debug)]
pub struct Pass<'a> {
    /// Which keys are hidden from whom.
    pub mask: &'a Mask,
    /// Keys and values of earlier tokens.
    pub cache: Option<&'a mut Cache>,
    /// What to measure on the way.
    pub observe: Observe,
    /// For each layer of the model, what is added to its projections; empty where nothing is.
    pub adapters: &'a [Vec<Adapter>],
}

impl<'a> Pass<'a> {
    /// A pass with a mask and nothing else.
    pub fn new(mask: &'a Mask) -> Self {
        Self { mask, cache: None, observe: Observe::Nothing, adapters: &[] }
    }
}

/// What [`Decoder::forward`] returns.
#[derive(Debug, Clone)]
pub struct Forward {
    /// `[batch, seq, d_model]`, normalised: what the output projection reads. Of [`Decoder::run_layers`]: not normalised.
    pub hidden: Tensor<3>,
    /// `[1]` each: the layers' auxiliary losses, unweighted.
    pub penalties: Vec<Tensor<1>>,
    /// One per layer, if asked for.
    pub seen: Vec<Observation>,
}

impl Decoder {
    /// The settings that this model was made from.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The model with its products in another precision.
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// Ids that the model knows.
    pub fn vocab_size(&self) -> usize {
        self.embedding.weight.dims()[0]
    }

    /// The device of the weights.
    pub fn device(&self) -> Device {
        self.embedding.weight.val().device()
    }

    /// `[batch, seq]` token ids on the model's device.
    pub fn tokens(&self, batch: &Batch) -> Tensor<2, Int> {
        let ids: Vec<i32> = batch.tokens.iter().map(|&id| id as i32).collect();
        Tensor::from_data(TensorData::new(ids, [batch.batch, batch.seq]), &self.device())
    }

    /// The same model with another gate, or with none.
    pub fn gated(self, gate: Option<Gate>) -> Self {
        Self { gate, ..self }
    }

    /// Runs all layers over `tokens`, `[batch, seq]`. With a cache, the tokens continue what is in it.
    pub fn forward(&self, tokens: Tensor<2, Int>, mask: &Mask, cache: Option<&mut Cache>, observe: Observe) -> Forward {
        self.pass(tokens, Pass { mask, cache, observe, adapters: &[] })
    }

    /// Runs all layers over `tokens`, `[batch, seq]`.
    pub fn pass(&self, tokens: Tensor<2, Int>, pass: Pass<'_>) -> Forward {
        let forward = self.run_layers(0..self.layers.len(), self.embed(tokens), pass);
        Forward { hidden: self.normed(forward.hidden), ..forward }
    }

    /// `[batch, seq, d_model]`: the residual stream behind layer `layer` (from 0), before any gate there.
    pub fn hidden_after(&self, layer: usize, tokens: Tensor<2, Int>, mask: &Mask) -> Tensor<3> {
        let ungated = self.clone().gated(self.gate.clone().filter(|gate| gate.after_layer < layer));
        ungated.run_layers(0..layer + 1, ungated.embed(tokens), Pass::new(mask)).hidden
    }

    /// `[batch, seq, d_model]`: what the first layer reads.
    pub fn embed(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let [batch, seq] = tokens.dims();
        let rows = self.embedding.weight.val().select(0, tokens.reshape([batch * seq]));
        rows.reshape([batch, seq, self.config.d_model])
    }

    /// `[batch, seq, d_model]`: what the output projection reads, from what the last layer writes.
    pub fn normed(&self, hidden: Tensor<3>) -> Tensor<3> {
        in_type(self.norm.forward(hidden, self.config.norm_eps), self.precision.dtype())
    }

    /// Runs some layers over what the layer before them wrote, `[batch, seq, d_model]`.
    pub fn run_layers(&self, layers: std::ops::Range<usize>, mut hidden: Tensor<3>, pass: Pass<'_>) -> Forward {
        let Pass { mask, mut cache, observe, adapters } = pass;
        let (eps, inner) = (self.config.norm_eps, self.precision.dtype());
        let start = cache.as_ref().map_or(0, |cache| cache.len());
        let ropes = self.ropes(start..start + hidden.dims()[1]);
        let (mut penalties, mut seen) = (Vec::new(), Vec::new());
        for index in layers {
            let layer = &self.layers[index];
            let own = self.lora.iter().flat_map(|lora| lora.layers[index].adapters());
            let all: Vec<Adapter> = own.chain(adapters.get(index).into_iter().flatten().cloned()).collect();
            let adapters = Adapters(&all);
            let call = Call {
                rope: ropes.get(&self.config.head_dim(index)),
                mask,
                bias: None,
                cache: cache.as_deref_mut().map(|cache| &mut cache.layers[index]),
                observe: observe.clone(),
                adapters,
            };
            let normed = layer.attention_norm.forward(hidden.clone(), eps);
            let attended = layer.attention.forward(in_type(normed, inner), call);
            penalties.extend(attended.penalty);
            seen.extend(attended.seen);
            let written = in_type(attended.hidden, DType::F32);
            let written = match &layer.attention_gate {
                Some(gate) => gate.forward(written, None).0,
                None => written,
            };
            let mixed = hidden.clone() + written;
            let read = if self.config.parallel_residual { hidden } else { mixed.clone() };
            let normed = layer.mlp_norm.forward(read, eps);
            hidden = mixed + in_type(layer.mlp.forward(in_type(normed, inner), adapters), DType::F32);
            if let Some(gate) = self.gate.as_ref().filter(|gate| gate.after_layer == index) {
                hidden = gate.pass(hidden);
            }
        }
        Forward { hidden, penalties, seen }
    }

    /// `[d_model, vocab]`: the output projection.
    pub fn output_projection(&self) -> Tensor<2> {
        match &self.head {
            Some(head) => head.weight.val(),
            None => self.embedding.weight.val().transpose(),
        }
    }

    /// `[batch, seq, vocab]` from `[batch, seq, d_model]`.
    pub fn logits(&self, hidden: Tensor<3>) -> Tensor<3> {
        let [batch, seq, d_model] = hidden.dims();
        let head = in_type(self.output_projection(), hidden.dtype());
        let logits = hidden.reshape([batch * seq, d_model]).matmul(head).reshape([batch, seq, self.vocab_size()]);
        in_type(logits, DType::F32)
    }

    fn ropes(&self, positions: std::ops::Range<usize>) -> BTreeMap<usize, Rope> {
        let config = &self.config;
        let make = |layer| {
            let frequencies = frequencies(config.rotated(layer), config.rope_theta);
            let frequencies = match &config.rope_scaling {
                Some(scaling) => scaling.stretch(frequencies),
                None => frequencies,
            };
            Rope::with_frequencies(positions.clone(), &frequencies, config.rope_layout, &self.device())
        };
        let layers = if config.rope { 0..config.n_layers } else { 0..0 };
        let mut ropes = BTreeMap::new();
        for layer in layers {
            ropes.entry(config.head_dim(layer)).or_insert_with(|| make(layer));
        }
        ropes
    }
}

#[cfg(test)]
mod gated;
