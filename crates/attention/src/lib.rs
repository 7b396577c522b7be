//! Ways of mixing positions: the attention mechanisms, one file each.
//!
//! Start here. [`Mechanism`] is what a layer does, [`MechanismConfig`] how it is described in a recipe, and the table
//! below lists them all. A new mechanism is a file that implements the two traits, a `mod` line and a line in the
//! table; from the table it gets its recipe key, its place in every model and its law test (`laws.rs`).
//!
//! One thing here is not a [`Mechanism`]: [`GaussianAdaptive`] is a gate over features and mixes no positions.
//!
//! This crate depends on Burn and serde only: it knows nothing of losses, optimisers or files.

mod adapter;
mod cache;
mod config;
mod decoupled_head;
mod diff_v2;
mod gated_attention;
mod gated_delta_net;
mod gaussian_adaptive;
mod grouped_differential;
mod hilo;
pub mod key_driven;
#[cfg(test)]
mod laws;
mod mixture_of_head;
mod mla;
mod observe;
mod projection;
mod published;
mod rope;
mod settings;
mod sink;
mod sites;
mod softmax;
pub mod sparse;
mod window;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

pub use adapter::{Adapter, Adapters};
pub use cache::{Cache, KvCache, MechanismCache, NoCache};
pub use config::{
    ConfigError, Cost, Dims, PerLayerCount, UNKNOWN_GRID, broken, require, require_positive, require_range,
};
pub use decoupled_head::{DecoupledHead, DecoupledHeadConfig, Fusion, energy};
pub use diff_v2::{DiffV2, DiffV2Config};
pub use gated_attention::{GatedAttention, GatedAttentionConfig, GatedPlace, Granularity};
pub use gated_delta_net::{DeltaState, GatedDeltaNet, GatedDeltaNetConfig};
pub use gaussian_adaptive::{
    GateMean, Gated, GaussianAdaptive, GaussianAdaptiveConfig, GaussianGate, GaussianGateConfig, Importance,
    MixtureGate, MixtureGateConfig, PaperGate, PaperGateConfig, ProductGate, ProductGateConfig, WidthInit,
};
pub use grouped_differential::{GroupedDifferential, GroupedDifferentialConfig, LambdaInit};
pub use hilo::{Hilo, HiloConfig};
pub use key_driven::{KeyDriven, KeyDrivenConfig};
pub use mixture_of_head::{
    Balance, GateNorm, HeadSplit, LearnedRouter, LearnedRouterConfig, MixtureOfHead, MixtureOfHeadConfig,
    QueryNormConfig, RouterConfig, Routing, StraightThrough,
};
pub use mla::{LatentCache, Mla, MlaConfig};
pub use observe::{Observation, Observe, Observed};
pub use polyhead_kernels::{Mask, RopeLayout};
pub use projection::{INIT_STD, join_heads, linear, split_heads};
pub use published::{
    Conversion, Family, Form, HeadChannels, HeadCounts, Projection, Published, Setting, SharedHeads, Window,
};
pub use rope::{Rope, frequencies};
pub use sink::{Sink, SinkConfig};
pub use sites::{
    Amount, At, Change, Edit, Function, KvHead, KvSite, LayerSites, Place, Positions, QueryHead, QuerySite, Site,
    Sites, StreamSite, Wiring,
};
pub use softmax::{Softmax, SoftmaxConfig};

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
        &observe::SCORES
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
    fn past(&self) -> usize
    where
        C: MechanismCache,
    {
        self.cache.as_ref().map_or(0, |cache| cache.len())
    }

    /// The same call with the cache seen as one mechanism's own.
    fn with_cache<D>(self, own: impl FnOnce(&'a mut C) -> &'a mut D) -> Call<'a, D> {
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

/// Makes the config enum, the module enum and what both do, from the table of mechanisms.
macro_rules! mechanisms {
    ($($(#[$doc:meta])* $key:ident => $Layer:ident, $Config:ident;)+) => {
        /// A mechanism and its settings: in a recipe, the table `attention.<name>`.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        #[serde(rename_all = "snake_case")]
        pub enum AttentionConfig { $($(#[$doc])* $Layer($Config),)+ }

        /// A layer of any mechanism.
        // A model has a handful of layers: boxing them would buy nothing.
        #[allow(clippy::large_enum_variant)]
        #[derive(Module, Debug)]
        pub enum Attention { $($(#[$doc])* $Layer($Layer),)+ }

        impl AttentionConfig {
            /// The names of all mechanisms, as recipes write them.
            pub const NAMES: &'static [&'static str] = &[$(stringify!($key)),+];

            /// This mechanism's name.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$Layer(_) => stringify!($key),)+ }
            }

            /// The settings of one mechanism, where they are this one's.
            pub fn get<'a, C>(&'a self) -> Option<&'a C>
            where
                &'a C: TryFrom<&'a Self>,
            {
                self.try_into().ok()
            }

            /// The conversions to any mechanism.
            pub fn conversions() -> impl Iterator<Item = &'static Conversion> {
                [$($Config::conversions()),+].into_iter().flatten()
            }

            /// See [`MechanismConfig::grown`].
            ///
            /// # Errors
            /// Why it cannot grow so.
            pub fn grown(&self, dims: &Dims, signal_heads: usize) -> Result<Self, String> {
                match self { $(Self::$Layer(config) => config.grown(dims, signal_heads).map(Self::$Layer),)+ }
            }

            /// See [`MechanismConfig::repeated_channels`].
            pub fn repeated_channels(&self, dims: &Dims, signal_heads: usize, of: HeadChannels) -> Option<Vec<usize>> {
                match self { $(Self::$Layer(config) => config.repeated_channels(dims, signal_heads, of),)+ }
            }

            /// See [`MechanismConfig::moved`].
            pub fn moved(self, sources: &[usize]) -> Self {
                match self { $(Self::$Layer(config) => Self::$Layer(config.moved(sources)),)+ }
            }

            /// See [`MechanismConfig::head_counts`].
            pub fn head_counts(&self, layer: usize) -> Option<HeadCounts> {
                match self { $(Self::$Layer(config) => config.head_counts(layer),)+ }
            }

            /// See [`MechanismConfig::fuses`].
            pub fn fuses(&self) -> bool {
                match self { $(Self::$Layer(config) => config.fuses(),)+ }
            }

            /// See [`MechanismConfig::observes`]; of every mechanism, by its name.
            pub fn observed() -> Vec<(&'static str, &'static [Observed])> {
                vec![$((stringify!($key), $Config::observes())),+]
            }

            /// See [`MechanismConfig::absent`].
            pub fn absent(&self, site: Site) -> Option<&'static str> {
                match self { $(Self::$Layer(_) => $Config::absent(site),)+ }
            }

            /// See [`MechanismConfig::wiring`].
            ///
            /// # Errors
            /// Why nobody can tell.
            pub fn wiring(&self) -> Result<Vec<Wiring>, &'static str> {
                match self { $(Self::$Layer(config) => config.wiring(),)+ }
            }

            /// See [`MechanismConfig::example`]; of every mechanism.
            pub fn examples() -> Vec<Self> {
                vec![$(Self::$Layer($Config::example())),+]
            }

            /// The families of all mechanisms.
            pub fn families() -> impl Iterator<Item = &'static Family> {
                [$($Config::families()),+].into_iter().flatten()
            }

            /// See [`MechanismConfig::published`].
            ///
            /// # Errors
            /// Why no family has these layers.
            pub fn published(layers: &[&Self], dims: &Dims, form: Form) -> Result<Published, String> {
                match layers {
                    $([first @ Self::$Layer(_), ..] => {
                        let own: Option<Vec<&$Config>> = layers.iter().map(|layer| layer.get()).collect();
                        let own = own.ok_or("the layers have different mechanisms")?;
                        $Config::published(&own, dims, form).map_err(|problem| format!("{}: {problem}", first.name()))
                    })+
                    [] => Err("there are no layers".into()),
                }
            }

            /// See [`MechanismConfig::read_published`].
            ///
            /// # Errors
            /// Names the key.
            pub fn read_published<'de, D: Deserializer<'de>>(
                family: &Family,
                keys: D,
                dims: &Dims,
            ) -> Result<Vec<Self>, D::Error> {
                $(if $Config::families().contains(family) {
                    let layers = $Config::read_published(family, keys, dims)?;
                    return Ok(layers.into_iter().map(Self::$Layer).collect());
                })+
                Err(D::Error::custom(format!("{} is no published family", family.class())))
            }

            /// See [`MechanismConfig::shared_heads`].
            ///
            /// # Errors
            /// Why there is none.
            pub fn shared_heads(&self) -> Result<SharedHeads, &'static str> {
                match self { $(Self::$Layer(config) => config.shared_heads(),)+ }
            }

            /// See [`MechanismConfig::validate`].
            ///
            /// # Errors
            /// Names the field, its value and the rule it breaks.
            pub fn validate(&self, dims: &Dims) -> Result<(), ConfigError> {
                match self { $(Self::$Layer(config) => config.validate(dims).map_err(|e| e.within(self.name())),)+ }
            }

            /// See [`MechanismConfig::check_causal`].
            ///
            /// # Errors
            /// Names the field and the way out.
            pub fn check_causal(&self) -> Result<(), ConfigError> {
                match self { $(Self::$Layer(config) => config.check_causal().map_err(|e| e.within(self.name())),)+ }
            }

            /// See [`MechanismConfig::check_bidirectional`].
            ///
            /// # Errors
            /// Names the mechanism and the way out.
            pub fn check_bidirectional(&self) -> Result<(), ConfigError> {
                match self { $(Self::$Layer(config) => config.check_bidirectional().map_err(|e| e.within(self.name())),)+ }
            }

            /// See [`MechanismConfig::init`].
            pub fn init(&self, dims: &Dims, device: &Device) -> Attention {
                match self { $(Self::$Layer(config) => Attention::$Layer(config.init(dims, device)),)+ }
            }

            /// See [`MechanismConfig::head_dim`].
            pub fn head_dim(&self, dims: &Dims) -> usize {
                match self { $(Self::$Layer(config) => config.head_dim(dims),)+ }
            }

            /// See [`MechanismConfig::rotates`].
            pub fn rotates(&self) -> bool {
                match self { $(Self::$Layer(config) => config.rotates(),)+ }
            }

            /// See [`MechanismConfig::cost`].
            pub fn cost(&self, dims: &Dims) -> Cost {
                match self { $(Self::$Layer(config) => config.cost(dims),)+ }
            }

            /// See [`MechanismConfig::encoder_flops`].
            pub fn encoder_flops(&self, dims: &Dims, positions: u64) -> u64 {
                match self { $(Self::$Layer(config) => config.encoder_flops(dims, positions),)+ }
            }
        }

        $(impl From<$Config> for AttentionConfig {
            fn from(config: $Config) -> Self {
                Self::$Layer(config)
            }
        }

        impl<'a> TryFrom<&'a AttentionConfig> for &'a $Config {
            type Error = ();

            fn try_from(config: &'a AttentionConfig) -> Result<Self, ()> {
                match config {
                    AttentionConfig::$Layer(config) => Ok(config),
                    _ => Err(()),
                }
            }
        }

        impl<'a> TryFrom<&'a Attention> for &'a $Layer {
            type Error = ();

            fn try_from(layer: &'a Attention) -> Result<Self, ()> {
                match layer {
                    Attention::$Layer(layer) => Ok(layer),
                    _ => Err(()),
                }
            }
        })+

        /// The cache of a layer of any mechanism.
        #[derive(Debug, Clone, Default)]
        pub enum LayerCache {
            /// There have been no tokens yet.
            #[default]
            Empty,
            $($(#[$doc])* $Layer(<$Layer as Mechanism>::Cache),)+
        }

        impl LayerCache {
            /// See [`MechanismCache::len`].
            pub fn len(&self) -> usize {
                match self { Self::Empty => 0, $(Self::$Layer(cache) => cache.len(),)+ }
            }

            /// Whether there have been no tokens yet.
            pub fn is_empty(&self) -> bool {
                self.len() == 0
            }

            /// See [`MechanismCache::elements`].
            pub fn elements(&self) -> usize {
                match self { Self::Empty => 0, $(Self::$Layer(cache) => cache.elements(),)+ }
            }
        }

        impl Attention {
            /// See [`Mechanism::forward`].
            ///
            /// # Panics
            /// If the cache was filled by a layer of another mechanism.
            pub fn forward(&self, hidden: Tensor<3>, call: Call<'_>) -> Attended {
                match self {
                    $(Self::$Layer(layer) => layer.forward(hidden, call.with_cache(|cache| {
                        if let LayerCache::Empty = cache {
                            *cache = LayerCache::$Layer(Default::default());
                        }
                        match cache {
                            LayerCache::$Layer(own) => own,
                            other => panic!("a layer of {} was handed the cache {other:?}", stringify!($key)),
                        }
                    })),)+
                }
            }

            /// The layer of one mechanism, where it is this one's.
            pub fn get<'a, L>(&'a self) -> Option<&'a L>
            where
                &'a L: TryFrom<&'a Self>,
            {
                self.try_into().ok()
            }

            /// See [`Mechanism::scatter`].
            pub fn scatter(&self) -> Option<[Tensor<1>; 2]> {
                match self { $(Self::$Layer(layer) => Mechanism::scatter(layer),)+ }
            }

            /// See [`Mechanism::set_anneal`].
            pub fn set_anneal(&mut self, share: f64) {
                match self { $(Self::$Layer(layer) => Mechanism::set_anneal(layer, share),)+ }
            }

            /// See [`Mechanism::is_due`].
            pub fn is_due(&self, step: u64) -> bool {
                match self { $(Self::$Layer(layer) => layer.is_due(step),)+ }
            }

            /// See [`Mechanism::before_step`].
            pub fn before_step(&mut self, hidden: Tensor<3>, mask: &Mask, step: u64) {
                match self { $(Self::$Layer(layer) => layer.before_step(hidden, mask, step),)+ }
            }
        }

        #[cfg(test)]
        mod laws_of {
            $(#[test]
            fn $key() {
                use super::{AttentionConfig, $Config, MechanismConfig};
                let config = AttentionConfig::$Layer($Config::example());
                crate::laws::hold(&config, $Config::exemptions());
            })+
        }
    };
}

mechanisms! {
    /// Softmax attention with one key head per query head (MHA), per group of them (GQA) or for all (MQA).
    softmax => Softmax, SoftmaxConfig;
    /// Grouped Differential Attention: noise heads, shared by groups of signal heads, are subtracted from them.
    grouped_differential => GroupedDifferential, GroupedDifferentialConfig;
    /// Mixture-of-Head attention: at each position a router chooses which heads are computed.
    mixture_of_head => MixtureOfHead, MixtureOfHeadConfig;
    /// Decoupled-Head Attention: each layer has its own key heads and value heads, shared by maps of their own.
    decoupled_head => DecoupledHead, DecoupledHeadConfig;
    /// Key-driven grouping: groups of query heads as large as the norms of their keys say.
    key_driven => KeyDriven, KeyDrivenConfig;
    /// HiLo: windows of a grid for high frequencies, their means for low ones. For images.
    hilo => Hilo, HiloConfig;
    /// Gated DeltaNet: a recurrent state for each head, corrected by the delta rule.
    gated_delta_net => GatedDeltaNet, GatedDeltaNetConfig;
    /// Softmax attention with learnable sinks: a logit per head in the denominator, which no value belongs to.
    sink => Sink, SinkConfig;
    /// Differential attention, version 2: of neighbouring heads the second is subtracted, as much as each position says.
    diff_v2 => DiffV2, DiffV2Config;
    /// Gated attention: a sigmoid gate on what heads read, or on values, keys, queries or the output.
    gated_attention => GatedAttention, GatedAttentionConfig;
    /// Multi-head latent attention: keys and values are projections of one small latent per token, which is cached.
    mla => Mla, MlaConfig;
}
