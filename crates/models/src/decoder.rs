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
    Adapter, Adapters, Attention, Cache, Call, GaussianAdaptive, INIT_STD, Mask, Observation, Observe, Rope,
    frequencies, linear,
};
use polyhead_kernels::{gated_mlp, in_type, layer_norm, random, rms_norm, swiglu};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::adapters::Lora;
use crate::{Batch, Gate};

mod config;
pub(crate) use config::check_sizes;
pub use config::{DecoderConfig, MlpKind, ModelCosts, NormKind, Part};

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

impl DecoderConfig {
    /// A decoder with fresh weights. Call [`validate`](Self::validate) first, and
    /// [`polyhead_kernels::seed_random`].
    pub fn init(&self, vocab_size: usize, device: &Device) -> Decoder {
        let (d_model, d_ff) = (self.d_model, self.feed_forward());
        let norm = || Norm::init(self.norm, d_model, device);
        let embedding = random([vocab_size, d_model], Distribution::Normal(0.0, INIT_STD), device);
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

    /// What is done to the residual stream from outside, where anything is.
    pub fn gate(&self) -> Option<&Gate> {
        self.gate.as_ref()
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
