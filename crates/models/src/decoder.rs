//! The decoder language model: an embedding, the layers of `transformer.rs`, and an output projection, in the form of LLaMA
//! (Touvron et al. 2023, arXiv 2302.13971): RMSNorm, rotary positions, SwiGLU, no biases but those that a mechanism asks for.
//!
//! A few settings make it the form of GPT-NeoX (Black et al. 2022, arXiv 2204.06745) instead: `x + attention(norm(x)) +
//! mlp(norm'(x))`, LayerNorm, GELU with biases, heads that rotate in part.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Distribution, Int, Tensor, TensorData};
use polyhead_attention::sparse::Sparse;
use polyhead_attention::sparse::boundaries::{BoundaryPredictor, PredictorConfig};
use polyhead_attention::{
    Adapter, Adapters, Attention, Cache, Call, INIT_STD, Mask, Observation, Observe, Rope, Sites, frequencies, linear,
};
use polyhead_kernels::{BackwardHook, embedding, in_type, on_backward, random};
use tracing::info_span;

use crate::adapters::Lora;
use crate::gate::dropout;
use crate::intervention::{Context, GuidanceConfig, Intervention};
use crate::sites::{SitePlan, Tap};
use crate::transformer::{ActivationCheckpointing, LayerPass};
use crate::transformer::{Block, Computing, Norm, Precision, TransformerConfig};
use crate::weights::{ParameterMapper, map_parameters};
use crate::{Batch, ConfigError, Gate, RopeScaling};

mod config;
mod expander;
pub use config::{DecoderConfig, ModelCosts};
pub use expander::Expander;

/// The token embedding.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[vocab, d_model]`
    pub weight: Param<Tensor<2>>,
}

/// A decoder language model.
#[derive(Module, Debug)]
pub struct Decoder {
    /// Token embedding
    pub embedding: Embedding,
    /// A vector for each position, added to the embedded tokens; `None` without
    pub positions: Option<Embedding>,
    /// Layers, first to last
    pub layers: Vec<Block>,
    /// What makes all positions of the last one; `None` but in auto-encoders
    pub expander: Option<Expander>,
    /// Before the output projection
    pub norm: Norm,
    /// The output projection; `None` where it is the embedding
    pub head: Option<Linear>,
    /// Low-rank pairs beside the projections; `None` without
    pub lora: Option<Lora>,
    /// Where chunks of keys begin, for sparse attention; `None` without
    pub boundaries: Option<BoundaryPredictor>,
    /// The tensors of its intervention that are trained, flattened
    pub intervention_tensors: Vec<Param<Tensor<1>>>,
    #[module(skip)]
    config: DecoderConfig,
    #[module(skip)]
    transformer: TransformerConfig,
    #[module(skip)]
    gate: Option<Gate>,
    #[module(skip)]
    intervention: Option<Arc<Intervention>>,
    #[module(skip)]
    pub(crate) computing: Computing,
    #[module(skip)]
    hooks: Vec<BackwardHook>,
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
    /// What is read and changed on the way, besides the model's intervention.
    pub sites: SitePlan,
    /// What an intervention can know of the tokens; by default that none of them is generated.
    pub context: Option<Context<'a>>,
    /// For each layer, which keys queries read, in the place of the model's intervention; empty where it says so.
    pub sparse: &'a [Sparse],
}

impl<'a> Pass<'a> {
    /// A pass with a mask and nothing else.
    pub fn new(mask: &'a Mask) -> Self {
        Self {
            mask,
            cache: None,
            observe: Observe::Nothing,
            adapters: &[],
            sites: SitePlan::default(),
            context: None,
            sparse: &[],
        }
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
    /// What was read, in the order of layers and sites.
    pub taps: Vec<Tap>,
}

impl DecoderConfig {
    /// A decoder with fresh weights. Call [`validate`](Self::validate) first, and
    /// [`polyhead_kernels::seed_random`].
    pub fn init(&self, vocab_size: usize, device: &Device) -> Decoder {
        let vocab_size = self.rows(vocab_size);
        let (d_model, transformer) = (self.d_model, self.transformer());
        let table = |rows| {
            let weight = random([rows, d_model], Distribution::Normal(0.0, INIT_STD), device);
            Embedding { weight: Param::from_tensor(weight) }
        };
        Decoder {
            embedding: table(vocab_size),
            positions: self.learned_positions.map(table),
            layers: (0..self.n_layers).map(|index| transformer.init_layer(index, device)).collect(),
            expander: self.autoencoder.then(|| Expander::init(self.norm, d_model, device)),
            norm: transformer.init_norm(device),
            head: (!self.tie_embeddings).then(|| linear(d_model, vocab_size, self.head_bias, INIT_STD, device)),
            lora: None,
            boundaries: None,
            intervention_tensors: Vec::new(),
            config: self.clone(),
            transformer,
            gate: None,
            intervention: None,
            computing: Computing::default(),
            hooks: Vec::new(),
        }
    }
}

impl DecoderConfig {
    /// A layer's attention with fresh weights.
    pub(crate) fn attention(&self, layer: usize, device: &Device) -> Attention {
        self.mechanism(layer).init(&self.dims(layer), device)
    }
}

impl Decoder {
    /// The settings that this model was made from.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The model with other attention, that of `config`, and all else as it is; without a gate and low-rank pairs.
    pub(crate) fn with_attention(self, config: DecoderConfig, attention: Vec<Attention>) -> Self {
        let block = |(block, attention)| Block { attention, ..block };
        Self {
            layers: self.layers.into_iter().zip(attention).map(block).collect(),
            transformer: config.transformer(),
            config,
            lora: None,
            boundaries: None,
            gate: None,
            intervention: None,
            intervention_tensors: Vec::new(),
            computing: Computing::default(),
            ..self
        }
    }

    /// The model with a fresh predictor of the boundaries of its keys.
    ///
    /// # Errors
    /// If its layers do not have keys of one kind.
    pub fn with_boundaries(self, config: &PredictorConfig) -> Result<Self, ConfigError> {
        let boundaries = config.init(self.config.key_channels()?, &self.device());
        Ok(Self { boundaries: Some(boundaries), ..self })
    }

    /// The model without a predictor of boundaries.
    pub fn without_boundaries(self) -> Self {
        Self { boundaries: None, ..self }
    }

    /// The model with other rotary frequencies.
    pub fn with_rope_scaling(mut self, rope_scaling: Option<RopeScaling>) -> Self {
        self.config.rope_scaling = rope_scaling;
        self
    }

    /// The model with all of its weights in f32.
    pub fn in_f32(self) -> Self {
        struct Widen;
        impl ParameterMapper for Widen {
            fn map<const D: usize>(&mut self, _: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                if param.val().dtype() == DType::F32 { param } else { param.map(|weight| in_type(weight, DType::F32)) }
            }
        }
        map_parameters(self, Widen).0
    }

    /// The model with its products in another precision.
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { computing: Computing { precision, ..self.computing }, ..self }
    }

    /// The model with dropout at this rate while it trains.
    pub fn with_dropout(self, dropout: f64) -> Self {
        Self { computing: Computing { dropout, ..self.computing }, ..self }
    }

    /// The model with another rate of dropout on its embedded input while it trains.
    pub fn with_embedding_dropout(self, embedding_dropout: Option<f64>) -> Self {
        Self { computing: Computing { embedding_dropout, ..self.computing }, ..self }
    }

    /// The model that keeps other activations while it is trained.
    pub fn with_checkpointing(self, checkpointing: ActivationCheckpointing) -> Self {
        Self { computing: Computing { checkpointing, ..self.computing }, ..self }
    }

    /// The model that calls `hook` too with the number of each layer once the backward pass has gone through it, before the hooks that it
    /// calls already.
    pub fn with_hook(mut self, hook: BackwardHook) -> Self {
        self.hooks.push(hook);
        self
    }

    /// The model whose loss has the overlap of its heads in it, with this weight while it trains; see
    /// [`head_overlap`](crate::head_overlap()).
    pub fn with_head_overlap(self, head_overlap: f64) -> Self {
        Self { computing: Computing { head_overlap, ..self.computing }, ..self }
    }

    /// Ids that the model knows, without the mask of a masked diffusion model.
    pub fn vocab_size(&self) -> usize {
        self.embedding.weight.dims()[0] - self.config.rows(0)
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

    /// What is changed in every forward, where anything is.
    pub fn intervention(&self) -> Option<&Intervention> {
        self.intervention.as_deref()
    }

    /// The same model with another intervention, whose tensors have their initial numbers, or with none.
    pub fn intervened(self, intervention: Option<Intervention>) -> Self {
        let intervention_tensors = intervention.as_ref().map_or_else(Vec::new, |own| own.parameters(&self.device()));
        Self { intervention: intervention.map(Arc::new), intervention_tensors, ..self }
    }

    /// The same model without guidance, and without the edits that are for it.
    pub fn unguided(self) -> Self {
        match self.intervention.as_ref().and_then(|own| own.unguided()) {
            Some(unguided) => self.intervened(Some(unguided)),
            None => self,
        }
    }

    /// An empty cache, whose layers drop keys where the model's intervention says so.
    pub fn new_cache(&self) -> Cache {
        let sparse = self.intervention.as_ref().and_then(|intervention| intervention.sparse_config());
        let layer = |layer| sparse.map(|sparse| sparse.cache(self.config.mechanism(layer))).unwrap_or_default();
        let layers = 0..self.layers.len();
        // The run that guidance steers away from has a cache of its own, behind the other one.
        let other = self.guidance().map_or(0..0, |_| layers.clone());
        Cache { layers: layers.chain(other).map(layer).collect() }
    }

    fn guidance(&self) -> Option<GuidanceConfig> {
        self.intervention.as_ref().and_then(|intervention| intervention.guidance())
    }

    /// Runs all layers over `tokens`, `[batch, seq]`. With a cache, the tokens continue what is in it.
    pub fn forward(&self, tokens: Tensor<2, Int>, mask: &Mask, cache: Option<&mut Cache>, observe: Observe) -> Forward {
        self.pass(tokens, Pass { cache, observe, ..Pass::new(mask) })
    }

    /// Runs all layers over `tokens`, `[batch, seq]`.
    pub fn pass(&self, tokens: Tensor<2, Int>, pass: Pass<'_>) -> Forward {
        let _span = info_span!("forward").entered();
        let start = pass.cache.as_ref().map_or(0, |cache| cache.len());
        let embedded = self.embed_from(start, tokens);
        let Some(guidance) = self.guidance() else {
            let forward = self.run_layers(0..self.layers.len(), embedded, pass);
            return Forward { hidden: self.normed(forward.hidden), ..forward };
        };
        self.guided(embedded, pass, guidance.weight)
    }

    /// A pass whose predictions are steered away from those under the edits of the model's intervention. Logits are linear in `hidden`:
    /// `(1 + weight) hidden - weight hidden'` has the logits `(1 + weight) logits - weight logits'`. What is read on the way is of the
    /// model as it is.
    fn guided(&self, embedded: Tensor<3>, pass: Pass<'_>, weight: f64) -> Forward {
        let layers = 0..self.layers.len();
        let Pass { mask, mut cache, observe, adapters, sites, context, sparse } = pass;
        let mut other_cache = cache.as_deref_mut().map(|cache| Cache { layers: cache.layers.split_off(layers.end) });
        let edits = SitePlan { edits: sites.edits.clone(), taps: Vec::new() };
        let own = Pass { mask, cache: cache.as_deref_mut(), observe, adapters, sites, context, sparse };
        let forward = self.run_layers(layers.clone(), embedded.clone(), own);
        let observe = Observe::Nothing;
        let other = Pass { mask, cache: other_cache.as_mut(), observe, adapters, sites: edits, context, sparse };
        let other = self.run_edited(layers, embedded, other).hidden;
        if let (Some(cache), Some(other)) = (cache, other_cache) {
            cache.layers.extend(other.layers);
        }
        let hidden = self.normed(forward.hidden) * (1.0 + weight) - self.normed(other) * weight;
        Forward { hidden, ..forward }
    }

    /// `[batch, seq, d_model]`: the residual stream behind layer `layer` (from 0), before any gate there.
    pub fn hidden_after(&self, layer: usize, tokens: Tensor<2, Int>, mask: &Mask) -> Tensor<3> {
        let ungated = self.clone().gated(self.gate.clone().filter(|gate| gate.after_layer < layer));
        ungated.run_layers(0..layer + 1, ungated.embed(tokens), Pass::new(mask)).hidden
    }

    /// `[batch, seq, d_model]`: what the first layer reads.
    pub fn embed(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        self.embed_from(0, tokens)
    }

    /// The same of tokens whose first one is at position `start`. Positions behind the last learned one take its vector.
    fn embed_from(&self, start: usize, tokens: Tensor<2, Int>) -> Tensor<3> {
        let ([batch, seq], d_model) = (tokens.dims(), self.config.d_model);
        // Burn's products of empty matrices read whatever is there.
        assert!(batch > 0 && seq > 0, "tokens [{batch}, {seq}]: nothing to read");
        let device = tokens.device();
        let rows = embedding(self.embedding.weight.val(), tokens.reshape([batch * seq]));
        let mut rows = rows.reshape([batch, seq, d_model]);
        if let Some(positions) = &self.positions {
            let last = positions.weight.dims()[0] - 1;
            let ids: Vec<i32> = (start..start + seq).map(|position| position.min(last) as i32).collect();
            let ids = Tensor::from_data(TensorData::new(ids, [seq]), &device);
            rows = rows + embedding(positions.weight.val(), ids).reshape([1, seq, d_model]);
        }
        dropout(rows, self.computing.embedding_dropout.unwrap_or(self.computing.dropout))
    }

    /// `[batch, seq, d_model]`: what the output projection reads, from what the last layer writes.
    pub fn normed(&self, hidden: Tensor<3>) -> Tensor<3> {
        let hidden = match &self.expander {
            Some(expander) => expander.forward(hidden, self.config.norm_eps),
            None => hidden,
        };
        self.norm.of_sum(hidden, None, self.config.norm_eps, self.computing.precision.dtype()).1
    }

    /// `[batch, seq, d_model]`: what the attention of a layer reads, from the residual stream before it.
    pub fn layer_input(&self, layer: usize, hidden: Tensor<3>) -> Tensor<3> {
        let normed = self.layers[layer].attention_norm.forward(hidden, self.config.norm_eps);
        in_type(normed, self.computing.precision.dtype())
    }

    /// Runs some layers over what the layer before them wrote, `[batch, seq, d_model]`, without guidance.
    pub fn run_layers(&self, layers: Range<usize>, hidden: Tensor<3>, pass: Pass<'_>) -> Forward {
        match self.guidance() {
            Some(_) => self.run_planned(layers, hidden, pass),
            None => self.run_edited(layers, hidden, pass),
        }
    }

    /// The same under the edits of the model's intervention.
    fn run_edited(&self, layers: Range<usize>, hidden: Tensor<3>, mut pass: Pass<'_>) -> Forward {
        if let Some(intervention) = &self.intervention {
            let start = pass.cache.as_ref().map_or(0, |cache| cache.len());
            let [rows, seq, _] = hidden.dims();
            let context = pass.context.unwrap_or(Context { rows, prompt: start + seq, ..Context::default() });
            pass.sites.edits.extend(intervention.plan(&context, &self.intervention_tensors).edits);
        }
        self.run_planned(layers, hidden, pass)
    }

    /// The same under the edits of the pass alone.
    fn run_planned(&self, layers: Range<usize>, mut hidden: Tensor<3>, pass: Pass<'_>) -> Forward {
        let Pass { mask, mut cache, observe, adapters, sites, sparse, .. } = pass;
        let start = cache.as_ref().map_or(0, |cache| cache.len());
        let ropes = self.ropes(start..start + hidden.dims()[1]);
        let (mut penalties, mut seen, mut taps) = (Vec::new(), Vec::new(), Vec::new());
        let pass = LayerPass::new(self.computing.checkpointing);
        let all_layers = self.intervention.as_ref().and_then(|intervention| intervention.sparse());
        for index in layers {
            let _span = info_span!("layer", index).entered();
            let own = self.lora.iter().flat_map(|lora| lora.layers[index].adapters());
            let all: Vec<Adapter> = own.chain(adapters.get(index).into_iter().flatten().cloned()).collect();
            let own = sites.of_layer(index, start);
            let call = Call {
                sites: Sites { own: own.as_ref(), sparse: sparse.get(index).or(all_layers) },
                rope: ropes.get(&self.config.head_dim(index)),
                cache: cache.as_deref_mut().map(|cache| &mut cache.layers[index]),
                observe: observe.clone(),
                adapters: Adapters(&all),
                ..Call::new(mask)
            };
            for hook in &self.hooks {
                hidden = on_backward(hidden, index, hook);
            }
            let attended = pass.forward(&self.layers[index], hidden, call, &self.transformer, self.computing);
            hidden = attended.hidden;
            penalties.extend(attended.penalty);
            seen.extend(attended.seen);
            taps.extend(own.into_iter().flat_map(|own| Tap::of_layer(index, own)));
            if let Some(gate) = self.gate.as_ref().filter(|gate| gate.after_layer == index) {
                hidden = gate.pass(hidden);
            }
        }
        Forward { hidden, penalties, seen, taps }
    }

    /// `[tokens, d_model]` and the output projection as two factors of the logits: a bias is a channel more, which is 1 everywhere.
    pub(crate) fn factors(&self, hidden: Tensor<2>) -> [Tensor<2>; 2] {
        let projection = self.output_projection();
        let Some(bias) = self.head.as_ref().and_then(|head| head.bias.as_ref()) else { return [hidden, projection] };
        let projection = in_type(projection, hidden.dtype());
        let ones = in_type(Tensor::ones([hidden.dims()[0], 1], &hidden.device()), hidden.dtype());
        let bias = in_type(bias.val(), hidden.dtype()).unsqueeze::<2>();
        [Tensor::cat(vec![hidden, ones], 1), Tensor::cat(vec![projection, bias], 0)]
    }

    /// `[d_model, vocab]`: the output projection, without its bias.
    pub fn output_projection(&self) -> Tensor<2> {
        match &self.head {
            Some(head) => head.weight.val(),
            None => self.embedding.weight.val().transpose(),
        }
    }

    /// `[batch, seq, vocab]` from `[batch, seq, d_model]`.
    pub fn logits(&self, hidden: Tensor<3>) -> Tensor<3> {
        let [batch, seq, d_model] = hidden.dims();
        let [hidden, head] = self.factors(hidden.reshape([batch * seq, d_model]));
        let logits = polyhead_kernels::linear(hidden, head, None);
        let rows = logits.dims()[1];
        let logits = in_type(logits.reshape([batch, seq, rows]), DType::F32);
        if rows == self.vocab_size() { logits } else { logits.narrow(2, 0, self.vocab_size()) }
    }

    fn ropes(&self, positions: Range<usize>) -> BTreeMap<usize, Rope> {
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
        for layer in layers.filter(|&layer| config.mechanism(layer).rotates()) {
            ropes.entry(config.head_dim(layer)).or_insert_with(|| make(layer));
        }
        ropes
    }
}

#[cfg(test)]
mod gated;
