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
mod mechanism;
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
pub use mechanism::{Attended, Call, Mechanism, MechanismConfig};
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
