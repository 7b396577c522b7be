//! What a layer of attention does, how a recipe describes it, and what a forward is called with and gives.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use serde::Deserializer;
use serde::de::Error as _;

use crate::{
    Adapters, ConfigError, Conversion, Cost, Dims, Family, Form, HeadChannels, HeadCounts, LayerCache, Mask,
    MechanismCache, Observation, Observe, Observed, Published, Rope, SharedHeads, Site, Sites, Wiring,
};
#[cfg(doc)]
use crate::{KvCache, NoCache};

/// One way of mixing positions. Owns its projections; keeps no state between calls except in the cache it is handed.
pub trait Mechanism: Module {
    /// The cache for decoding: [`KvCache`] for most, [`NoCache`] for what cannot decode.
    type Cache: MechanismCache;

    /// Mixes the positions of `hidden`, `[batch, seq, d_model]`.
    fn forward(&self, hidden: Tensor<3>, call: Call<'_, Self::Cache>) -> Attended;

    /// Whether [`before_step`](Self::before_step) has something to do before `step` of training, counted from 0.
    fn is_due(&self, _step: u64) -> bool {
        false
    }

    /// What the layer does before a step of training, given what it is about to read: `[batch, seq, d_model]`. Only called
    /// where [`is_due`](Self::is_due).
    fn before_step(&mut self, _hidden: Tensor<3>, _mask: &Mask, _step: u64) {}

    /// `[1]` each: what is left to fuse of keys and of values, where heads are being fused.
    fn scatter(&self) -> Option<[Tensor<1>; 2]> {
        None
    }

    /// Sets how far the heads of a group are averaged, 0 to 1, where heads are being fused.
    fn set_anneal(&mut self, _share: f64) {}
}

/// The settings of a mechanism, as in a recipe.
pub trait MechanismConfig: Sized {
    /// The layer that this describes.
    type Layer: Mechanism;

    /// Every mistake that a user can make ends here.
    ///
    /// # Errors
    /// Names the field, its value and the rule it breaks.
    fn validate(&self, dims: &Dims) -> Result<(), ConfigError>;

    /// Refuses what looks at positions that the mask hides, which a decoder cannot use. Most mechanisms never do.
    ///
    /// # Errors
    /// Names the field and the way out.
    fn check_causal(&self) -> Result<(), ConfigError> {
        Ok(())
    }

    /// Refuses what reads positions one after the other, where those behind a position are to be read too. Most mechanisms read all
    /// that the mask leaves them.
    ///
    /// # Errors
    /// Names the mechanism and the way out.
    fn check_bidirectional(&self) -> Result<(), ConfigError> {
        Ok(())
    }

    /// A layer with fresh weights. Cannot fail after [`validate`](Self::validate).
    fn init(&self, dims: &Dims, device: &Device) -> Self::Layer;

    /// Channels of a query or key head, which are what rotary positions turn.
    fn head_dim(&self, dims: &Dims) -> usize;

    /// Whether queries and keys are rotated by position in a model with rotary positions.
    fn rotates(&self) -> bool {
        true
    }

    /// The cost of one layer, for `plan`.
    fn cost(&self, dims: &Dims) -> Cost;

    /// Operations of a forward pass over `positions` that all attend to each other.
    fn encoder_flops(&self, dims: &Dims, positions: u64) -> u64 {
        let cost = self.cost(dims);
        // A window reaches as far behind a position as before it.
        let seen = cost.window.map_or(positions, |window| positions.min((2 * window).saturating_sub(1)));
        let pairs = positions.saturating_mul(seen).saturating_mul(cost.flops_per_pair);
        positions.saturating_mul(cost.flops_per_token).saturating_add(pairs)
    }

    /// The published families of models that have this attention.
    fn families() -> &'static [Family] {
        &[]
    }

    /// The family that has these layers between layers of the form `form`, and what its config.json says of them.
    ///
    /// # Errors
    /// Why no family has them.
    fn published(_layers: &[&Self], _dims: &Dims, _form: Form) -> Result<Published, String> {
        Err("no published model has such attention".into())
    }

    /// The settings that the config.json of one of [`families`](Self::families) means: one for all layers, or one for each.
    ///
    /// # Errors
    /// Names the key.
    fn read_published<'de, D: Deserializer<'de>>(family: &Family, _: D, _: &Dims) -> Result<Vec<Self>, D::Error> {
        Err(D::Error::custom(format!("{} has other attention", family.class())))
    }

    /// The softmax attention that computes the same, and which heads its query heads share.
    ///
    /// # Errors
    /// Why there is none.
    fn shared_heads(&self) -> Result<SharedHeads, &'static str> {
        Err("it is no softmax attention with heads that are shared")
    }

    /// The conversions that lead to this mechanism.
    fn conversions() -> &'static [Conversion] {
        &[]
    }

    /// The settings in a wider model with `signal_heads` times as many signal heads, where heads keep their width.
    ///
    /// # Errors
    /// Why it cannot grow so, as what a mechanism does: "has no signal heads".
    fn grown(&self, _dims: &Dims, _signal_heads: usize) -> Result<Self, String> {
        Err("cannot grow".into())
    }

    /// Where the channels of heads come from once each signal head has been repeated behind itself; `None` where none is.
    fn repeated_channels(&self, _dims: &Dims, _signal_heads: usize, _of: HeadChannels) -> Option<Vec<usize>> {
        None
    }

    /// The settings in a deeper model whose layers are `sources` of this one's; of a single layer, its own. What follows the
    /// depth of a layer stays what it was.
    fn moved(self, _sources: &[usize]) -> Self {
        self
    }

    /// How the heads of layer `layer` are divided, where the numbers say something.
    fn head_counts(&self, _layer: usize) -> Option<HeadCounts> {
        None
    }

    /// Whether the heads of layers are being fused.
    fn fuses(&self) -> bool {
        false
    }

    /// The numbers that layers may observe; by default those of the softmax over scores.
    fn observes() -> &'static [Observed] {
        &crate::observe::SCORES
    }

    /// Why the mechanism has no such site, where it has none. Sites of the residual stream are the model's.
    fn absent(_site: Site) -> Option<&'static str> {
        None
    }

    /// Of each query head, which key head and value head it reads, and which head outputs it is part of.
    ///
    /// # Errors
    /// Why nobody can tell, as what heads do: "attend inside windows".
    fn wiring(&self) -> Result<Vec<Wiring>, &'static str>;

    /// A small valid description for a model of [`Dims::example`], for the laws.
    fn example() -> Self;

    /// The laws of `laws.rs` that do not apply: the name of each, and the reason.
    fn exemptions() -> &'static [(&'static str, &'static str)] {
        &[]
    }
}

/// The inputs of one call besides the hidden states.
#[derive(Debug)]
pub struct Call<'a, C = LayerCache> {
    /// Rotary positions of this call's tokens; `None` for a model without.
    pub rope: Option<&'a Rope>,
    /// The mask of queries and keys.
    pub mask: &'a Mask,
    /// `[batch or 1, heads or 1, queries, keys]`, added to the scores of every head.
    pub bias: Option<&'a Tensor<4>>,
    /// Rows and columns of the grid that the positions form, row by row; `None` for a sequence.
    pub grid: Option<[usize; 2]>,
    /// The cache of earlier tokens; this call's are added.
    pub cache: Option<&'a mut C>,
    /// The statistics to measure.
    pub observe: Observe,
    /// Additions to the layer's projections: hand each of them to [`Adapters::project`].
    pub adapters: Adapters<'a>,
    /// What is read and changed on the way: see `sites.rs` for what goes through them.
    pub sites: Sites<'a>,
}

impl<'a, C> Call<'a, C> {
    /// A call with a mask and nothing else.
    pub fn new(mask: &'a Mask) -> Self {
        Self {
            rope: None,
            mask,
            bias: None,
            grid: None,
            cache: None,
            observe: Observe::Nothing,
            adapters: Adapters::default(),
            sites: Sites::default(),
        }
    }

    /// Tokens before this call's.
    pub(crate) fn past(&self) -> usize
    where
        C: MechanismCache,
    {
        self.cache.as_ref().map_or(0, |cache| cache.len())
    }

    /// The same call with the cache seen as one mechanism's own.
    pub(crate) fn with_cache<D>(self, own: impl FnOnce(&'a mut C) -> &'a mut D) -> Call<'a, D> {
        let Self { rope, mask, bias, grid, cache, observe, adapters, sites } = self;
        Call { rope, mask, bias, grid, cache: cache.map(own), observe, adapters, sites }
    }
}

/// The result of a layer.
#[derive(Debug, Clone)]
pub struct Attended {
    /// `[batch, seq, d_model]`
    pub hidden: Tensor<3>,
    /// `[1]`: an auxiliary loss of the mechanism, differentiable and unweighted.
    pub penalty: Option<Tensor<1>>,
    /// Only if the call asked to observe.
    pub seen: Option<Observation>,
}
