//! Key-driven grouping of query heads: KDGQA, DGQA and PGQA (Khan et al. 2024, arXiv 2408.08454).
//!
//! Grouped-query attention in which groups need not be equal. Query heads of a group stand side by side; how many there are
//! is decided by how large the group's keys are, with `m_g = sum_b |k_bg|`, the norm over positions and channels:
//!
//! ```text
//! KDGQA        z = (m - min m) / (max m - min m),   heads_g = round(H z_g / sum z)        at every call
//! DGQA         heads_g = round(H u_g / sum u)                                               every `window` steps of training
//!   the authors' code                     the paper, as far as we know it
//!   average     u = 0.9 m + 0.1 cache      cache := 0.9 cache + 0.1 m,  u = cache
//!   difference  u = |cache - m|            u = |cache - m|,  cache := m
//!               cache := (cache + m) / window
//! ```
//!
//! Norms are those before rotation, which does not change them. Padding is left out of them. Where the authors' code gives
//! away at random what rounding leaves over (DGQA), we round the largest remainders up.
//!
//! What is allocated at every call reads all keys: those that come later, and those of the other rows of the batch. That
//! suits an encoder. A decoder takes an allocation that was frozen after a calibration ([`FixedConfig`]; `polyhead convert`
//! finds it), and obeys the same laws as any other attention.
//!
//! **State.** A forward pass changes nothing. What DGQA remembers are two vectors among the layer's parameters
//! ([`Memory`], not learned): they are in every checkpoint, and whoever trains moves them on, with [`KeyDriven::regroup`]
//! before a step. In evaluation the authors' DGQA allocates by each batch and remembers it for the next; here it allocates
//! by each batch too, and forgets it, so that the order of evaluation does not matter. In the paper's form what training
//! left is kept.
//!
//! PGQA (`perturb`) is `key_driven/noise.rs`. No form keeps less in a cache than GQA, even for heads that nobody reads.

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{DType, Device, Distribution, Tensor, TensorData};
use polyhead_kernels::{AttentionOptions, HeadMap, in_type, random};
use serde::{Deserialize, Serialize};

use crate::cache::{KvCache, extended};
use crate::config::require;
use crate::observe::SCORES;
use crate::projection::{INIT_STD, join_heads, linear, residual_std, split_heads};
use crate::rope::rotate;
use crate::settings::head_settings;
use crate::{
    Adapters, Attended, Call, ConfigError, Conversion, Cost, Dims, HeadCounts, KvSite, Mask, Mechanism,
    MechanismConfig, Observation, Observed, SharedHeads, SoftmaxConfig, Wiring,
};

pub mod allocation;
mod memory;
mod noise;

pub use memory::{EvolvingConfig, Form, Measured, Memory};
pub use noise::perturbed;

const QUERY_HEADS: Observed = Observed::new("query_heads", "query heads that read each key/value head", "");

head_settings! {
    /// Settings of key-driven attention.
    pub struct KeyDrivenConfig {
        /// Query heads.
        pub n_heads: usize,
        /// Key/value heads: a divisor of n_heads.
        pub n_kv_heads: usize,
        @head_dim,
        @flag qkv_bias "Biases on the query, key and value projections, as in vision transformers. Default: false.",
        @flag o_bias "A bias on the output projection. Default: false.",
        /// The number of query heads of each key/value head.
        pub allocation: AllocationConfig,
        /// PGQA: take noise off the outputs of heads, in training and evaluation alike, so that those of a group differ. It reads
        /// all positions of a row, padding included: for encoders. Default: false.
        #[serde(default)]
        pub perturb: bool,
    }
}

/// The number of query heads of each key/value head: one of its tables.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum AllocationConfig {
    /// As many for each: GQA.
    Even(EvenConfig),
    /// These, as a calibration found them (`polyhead convert --to key_driven`). For decoders too.
    Fixed(FixedConfig),
    /// KDGQA: as many as the norms of the keys of each call say. For encoders.
    PerCall(PerCallConfig),
    /// DGQA: as many as the norms of keys said in the course of training. For encoders.
    Evolving(EvolvingConfig),
}

/// GQA has no settings.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct EvenConfig {}

/// KDGQA has no settings.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct PerCallConfig {}

/// A frozen allocation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct FixedConfig {
    /// For each key/value head, how many query heads read it; n_heads in all, 0 for heads that nobody reads.
    pub query_heads: Vec<usize>,
}

impl KeyDrivenConfig {
    /// The same heads in equal groups.
    fn even(&self) -> SoftmaxConfig {
        let Self { n_heads, n_kv_heads, head_dim, qkv_bias, o_bias, .. } = *self;
        let n_kv_heads = Some(n_kv_heads);
        SoftmaxConfig { n_heads, n_kv_heads, head_dim, qkv_bias, o_bias, ..SoftmaxConfig::default() }
    }
}

impl MechanismConfig for KeyDrivenConfig {
    type Layer = KeyDriven;

    fn validate(&self, dims: &Dims) -> Result<(), ConfigError> {
        self.even().validate(dims)?;
        match &self.allocation {
            AllocationConfig::Fixed(FixedConfig { query_heads }) => {
                let (listed, sum) =
                    (query_heads.len(), query_heads.iter().fold(0, |sum: usize, &heads| sum.saturating_add(heads)));
                require(listed == self.n_kv_heads && sum == self.n_heads, "allocation.fixed.query_heads", || {
                    format!(
                        "query_heads lists {listed} numbers with the sum {sum}: give one per key/value head ({}), n_heads ({}) in all",
                        self.n_kv_heads, self.n_heads
                    )
                })
            }
            AllocationConfig::Evolving(evolving) => {
                require(evolving.window > 0, "allocation.evolving.window", || "window (0) must be at least 1".into())
            }
            AllocationConfig::Even(_) | AllocationConfig::PerCall(_) => Ok(()),
        }
    }

    fn check_causal(&self) -> Result<(), ConfigError> {
        let frozen = matches!(self.allocation, AllocationConfig::Even(_) | AllocationConfig::Fixed(_));
        require(frozen, "allocation", || {
            "allocation looks at keys that come later, which a decoder must not: freeze it with allocation.fixed (`polyhead \
             convert CKPT --to key_driven --kv-heads N` finds the numbers), or take allocation.even"
                .into()
        })?;
        require(!self.perturb, "perturb", || {
            "perturb looks at positions that come later, which a decoder must not: leave it out".into()
        })
    }

    fn init(&self, dims: &Dims, device: &Device) -> KeyDriven {
        let (d_model, width) = (dims.d_model, self.head_dim(dims));
        let project = |d_output| linear(d_model, d_output, self.qkv_bias, INIT_STD, device);
        KeyDriven {
            q_proj: project(self.n_heads * width),
            k_proj: project(self.n_kv_heads * width),
            v_proj: project(self.n_kv_heads * width),
            o_proj: linear(self.n_heads * width, d_model, self.o_bias, residual_std(dims.n_layers), device),
            memory: match self.allocation {
                AllocationConfig::Evolving(_) => Some(Memory::begin(self.n_kv_heads, self.n_heads, device)),
                _ => None,
            },
            config: self.clone(),
        }
    }

    fn head_dim(&self, dims: &Dims) -> usize {
        self.even().head_dim(dims)
    }

    fn cost(&self, dims: &Dims) -> Cost {
        let even = self.even().cost(dims);
        let remembered = match self.allocation {
            AllocationConfig::Evolving(_) => 2 * self.n_kv_heads as u64,
            _ => 0,
        };
        Cost { parameters: even.parameters + remembered, ..even }
    }

    fn observes() -> &'static [Observed] {
        const ALL: [Observed; 4] = [SCORES[0], SCORES[1], SCORES[2], QUERY_HEADS];
        &ALL
    }

    fn conversions() -> &'static [Conversion] {
        &[Conversion { name: "key_driven", from: &["softmax"] }]
    }

    fn head_counts(&self, _: usize) -> Option<HeadCounts> {
        match &self.allocation {
            AllocationConfig::Fixed(fixed) => Some(HeadCounts::QueriesOfEach(fixed.query_heads.clone())),
            _ => None,
        }
    }

    fn shared_heads(&self) -> Result<SharedHeads, &'static str> {
        let map = match (&self.allocation, self.perturb) {
            (AllocationConfig::Fixed(FixedConfig { query_heads }), false) => allocation::head_map(query_heads),
            (AllocationConfig::Even(_), false) => {
                allocation::head_map(&allocation::even(self.n_kv_heads, self.n_heads))
            }
            _ => return Err("what changes with the text is no other attention"),
        };
        Ok(SharedHeads { softmax: SoftmaxConfig { n_kv_heads: None, ..self.even() }, maps: [map.clone(), map] })
    }

    fn wiring(&self) -> Result<Vec<Wiring>, &'static str> {
        let heads = match &self.allocation {
            AllocationConfig::Fixed(FixedConfig { query_heads }) => allocation::head_map(query_heads),
            AllocationConfig::Even(_) => allocation::head_map(&allocation::even(self.n_kv_heads, self.n_heads)),
            _ => return Err("read the keys that the text gives them: freeze that with allocation.fixed"),
        };
        Ok(heads.into_iter().enumerate().map(|(head, own)| Wiring::new(head, own, own)).collect())
    }

    fn example() -> Self {
        Self {
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: None,
            qkv_bias: true,
            o_bias: true,
            allocation: AllocationConfig::Fixed(FixedConfig { query_heads: vec![1, 3] }),
            perturb: false,
        }
    }
}

/// A layer of key-driven attention.
#[derive(Module, Debug)]
pub struct KeyDriven {
    /// `[d_model, n_heads * head_dim]`
    pub q_proj: Linear,
    /// `[d_model, n_kv_heads * head_dim]`
    pub k_proj: Linear,
    /// `[d_model, n_kv_heads * head_dim]`
    pub v_proj: Linear,
    /// `[n_heads * head_dim, d_model]`
    pub o_proj: Linear,
    /// Only where the allocation evolves
    pub memory: Option<Memory>,
    #[module(skip)]
    config: KeyDrivenConfig,
}

impl KeyDriven {
    /// For each key/value head, how many query heads read it in a call with these keys, before rotation.
    fn query_heads(&self, keys: &Tensor<4>, mask: &Mask, query_offset: usize) -> Vec<usize> {
        let KeyDrivenConfig { n_heads, n_kv_heads, .. } = self.config;
        let norms = || key_norms(keys.clone(), mask, query_offset);
        match (&self.config.allocation, &self.memory) {
            (AllocationConfig::Fixed(FixedConfig { query_heads }), _) => query_heads.clone(),
            (AllocationConfig::PerCall(_), _) => allocation::by_range(&norms(), n_heads),
            // As Burn's dropout, training is known by its tape.
            (AllocationConfig::Evolving(evolving), Some(memory)) => {
                match evolving.form == Form::Paper || keys.device().is_autodiff() {
                    true => memory.query_heads(),
                    false => memory.at_call(evolving, &norms(), n_heads),
                }
            }
            (AllocationConfig::Even(_) | AllocationConfig::Evolving(_), _) => allocation::even(n_kv_heads, n_heads),
        }
    }

    /// `[batch, n_kv_heads, seq, head_dim]`, before rotation.
    fn keys(&self, hidden: Tensor<3>, adapters: Adapters<'_>) -> Tensor<4> {
        split_heads(adapters.project("k_proj", &self.k_proj, hidden), self.config.n_kv_heads)
    }
}

/// For each key/value head, the norm of its keys over positions and channels, summed over the batch. Padding is left out.
///
/// # Shapes
/// - keys: `[batch, n_kv_heads, seq, head_dim]`, before or after rotation
pub fn key_norms(keys: Tensor<4>, mask: &Mask, query_offset: usize) -> Vec<f64> {
    let keys = in_type(keys.detach(), DType::F32);
    let [batch, _, seq, _] = keys.dims();
    let squares = keys.square().sum_dim(3); // [batch, n_kv_heads, seq, 1]
    let squares = match mask.real_queries(batch, query_offset, seq) {
        Some(real) => {
            let real: Vec<f32> = real.into_iter().map(f32::from).collect();
            let real = Tensor::from_data(TensorData::new(real, [batch, 1, seq, 1]), &squares.device());
            squares * real
        }
        None => squares,
    };
    squares.sum_dim(2).sqrt().sum_dim(0).into_data().iter::<f64>().collect()
}

impl Mechanism for KeyDriven {
    type Cache = KvCache;

    fn is_due(&self, step: u64) -> bool {
        matches!(&self.config.allocation, AllocationConfig::Evolving(evolving) if step.is_multiple_of(evolving.window))
    }

    /// Allocates anew, by the keys of what the layer is about to read.
    fn before_step(&mut self, hidden: Tensor<3>, mask: &Mask, _step: u64) {
        let norms = key_norms(self.keys(hidden, Adapters::default()), mask, 0);
        if let (Some(memory), AllocationConfig::Evolving(evolving)) = (&mut self.memory, &self.config.allocation) {
            memory.update(evolving, &norms, self.config.n_heads);
        }
    }

    fn forward(&self, hidden: Tensor<3>, call: Call<'_, KvCache>) -> Attended {
        let (adapters, sites, device) = (call.adapters, call.sites, hidden.device());
        let KeyDrivenConfig { n_heads, n_kv_heads, .. } = self.config;
        let query_offset = call.past();
        let q = split_heads(adapters.project("q_proj", &self.q_proj, hidden.clone()), n_heads);
        let k = sites.at(KvSite::K, self.keys(hidden.clone(), adapters));
        let v = sites.at(KvSite::V, split_heads(adapters.project("v_proj", &self.v_proj, hidden), n_kv_heads));
        let query_heads = self.query_heads(&k, call.mask, query_offset);
        let (q, k) = (sites.query(call.rope, q), sites.at(KvSite::RotK, rotate(call.rope, k)));
        let (k, v) = extended(call.cache, k, v);
        let map = HeadMap::Each(allocation::head_map(&query_heads));
        let options = AttentionOptions {
            mask: Some(call.mask),
            query_offset,
            bias: call.bias.cloned(),
            keys: map.clone(),
            values: map,
            statistics: call.observe.measure(),
            ..Default::default()
        };
        let attended = sites.attend(q, k, v, options); // [batch, n_heads, seq, head_dim]
        let seen = attended.statistics.map(|statistics| {
            let mut seen = Observation::of(statistics);
            let counts: Vec<f32> = query_heads.iter().map(|&count| count as f32).collect();
            seen.number(QUERY_HEADS, Tensor::from_data(TensorData::new(counts, [n_kv_heads]), &device));
            seen
        });
        let mut heads = attended.hidden;
        if self.config.perturb {
            let [_, _, seq, width] = heads.dims();
            let uniform = Distribution::Uniform(0.0, 1.0);
            let uniform = random([n_heads, seq * width], uniform, &device);
            heads = perturbed(heads, &query_heads, uniform);
        }
        let hidden = sites.out(adapters, &self.o_proj, join_heads(heads), n_heads);
        Attended { hidden, penalty: None, seen }
    }
}

#[cfg(test)]
mod tests;
