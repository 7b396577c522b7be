//! Mixture-of-Head attention (Jin et al. 2024, arXiv 2410.11842): the heads of multi-head attention as experts.
//!
//! The first `h_s` heads are shared: they take part at every position. Of the `E` others, a router chooses `k` for each
//! position, by its query; keys and values stay those of all positions. With `H_i` the output of a head and `W_i` its rows
//! of the output projection:
//!
//! ```text
//! y = Σ_i g_i · H_i W_i           over the heads that take part
//! ```
//!
//! The gates `g`, and the penalty that keeps the load of the heads even, are `router.rs`. The authors compute all heads
//! everywhere and multiply by zero; here the queries, scores, values and output of a head are computed only where it takes
//! part, forward and backward, with the same numbers.
//!
//! Keys and values are computed for all heads at all positions, because a later position may choose the head: the cache
//! of a decoder is no smaller than that of multi-head attention.
//!
//! Left out: the cosine attention of the authors' vision backbone (TransNeXt), which is no part of the method.

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};
use polyhead_kernels::{AttentionOptions, in_type, linear_into_heads, linear_out_of_heads};
use serde::{Deserialize, Serialize};

use crate::cache::KvCache;
use crate::config::{PerLayerCount, require};
use crate::observe::SCORES;
use crate::projection::{INIT_STD, join_heads, linear, residual_std, split_heads};
use crate::settings::head_settings;
use crate::softmax::{HeadNorm, normed};
use crate::window::{Within, window_of, within};
use crate::{
    Adapters, Attended, Call, ConfigError, Conversion, Cost, Dims, HeadCounts, KvSite, Mechanism, MechanismConfig,
    Observation, Observed, QuerySite, Site, Wiring,
};
use router::{GATE, LOAD};

mod router;

pub use router::{
    Balance, GateNorm, LearnedRouter, LearnedRouterConfig, QueryNormConfig, RouterConfig, Routing, StraightThrough,
};

head_settings! {
    /// Settings of mixture-of-head attention.
    pub struct MixtureOfHeadConfig {
        /// Query heads in all, shared and routed.
        pub n_heads: usize,
        @n_kv_heads,
        @head_dim,
        @flag qkv_bias "Biases on the query, key and value projections. Default: false.",
        @flag o_bias "A bias on the output projection, as in the authors' vision models. Default: false.",
        @flag qk_norm "Normalise every query and key head before it is rotated, as in Qwen3; not with router.query_norm, which such\n\
            queries leave nothing to choose by. Default: false.",
        /// Heads that take part at every position: the first ones. A number, or a list with one per layer. The authors advise
        /// more than 40 % of those that take part.
        pub shared_heads: PerLayerCount,
        /// Routed heads that take part at each position. A number, or a list with one per layer; 0 only where all heads are
        /// shared, which leaves a weighted sum of all heads.
        pub top_k: PerLayerCount,
        /// The router. Default: learned.
        #[serde(default)]
        pub router: RouterConfig,
        /// The normalisation of the load-balance penalty; its weight is training.penalty_weight, 0.01 in the paper. "code"
        /// (default): balanced heads give top_k in every layer. "paper": smaller by the number of routed heads.
        #[serde(default)]
        pub penalty_norm: GateNorm,
        @window,
    } => fn dense
}

impl MixtureOfHeadConfig {
    /// Key/value heads with the default filled in.
    pub fn kv_heads(&self) -> usize {
        self.n_kv_heads.unwrap_or(self.n_heads)
    }

    /// The split of a layer's heads.
    ///
    /// # Panics
    /// If a list is too short, which [`validate`](MechanismConfig::validate) refuses.
    pub fn split(&self, layer: usize) -> HeadSplit {
        let of = |counts: &PerLayerCount| counts.of_layer(layer).expect("validate: one number per layer");
        let shared = of(&self.shared_heads);
        HeadSplit { shared, routed: self.n_heads.saturating_sub(shared), top_k: of(&self.top_k) }
    }
}

/// The split of a layer's heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadSplit {
    /// Heads that take part everywhere.
    pub shared: usize,
    /// Heads that are chosen.
    pub routed: usize,
    /// Routed heads that are selected at each position.
    pub top_k: usize,
}

impl HeadSplit {
    /// Heads in all.
    pub fn heads(self) -> usize {
        self.shared + self.routed
    }

    /// Heads that take part at a position.
    pub fn active(self) -> usize {
        self.shared + self.top_k
    }
}

impl MechanismConfig for MixtureOfHeadConfig {
    type Layer = MixtureOfHead;

    fn validate(&self, dims: &Dims) -> Result<(), ConfigError> {
        self.dense().validate(dims)?;
        for (field, counts) in [("shared_heads", &self.shared_heads), ("top_k", &self.top_k)] {
            counts.check(field, dims)?;
        }
        let (HeadSplit { shared, routed, top_k }, n_heads) = (self.split(dims.layer), self.n_heads);
        require(shared <= n_heads, "shared_heads", || {
            format!("shared_heads ({shared}) must not exceed n_heads ({n_heads})")
        })?;
        require(top_k <= routed, "top_k", || {
            format!("top_k ({top_k}) must not exceed the routed heads: n_heads ({n_heads}) - shared_heads ({shared})")
        })?;
        require(top_k > 0 || routed == 0, "top_k", || {
            format!("top_k (0) would never use {routed} of n_heads ({n_heads}); 0 goes with shared_heads = {n_heads}")
        })?;
        if let RouterConfig::QueryNorm(_) = self.router {
            require(!self.qk_norm, "qk_norm", || {
                "qk_norm makes all queries equally long, and router.query_norm chooses by their lengths: use the learned router".into()
            })?;
            require(routed != 1, "router.query_norm", || {
                format!(
                    "router.query_norm compares routed heads, and n_heads ({n_heads}) - shared_heads ({shared}) leaves one"
                )
            })?;
        }
        Ok(())
    }

    fn init(&self, dims: &Dims, device: &Device) -> MixtureOfHead {
        let (d_model, width, kv_heads) = (dims.d_model, self.head_dim(dims), self.kv_heads());
        let split = self.split(dims.layer);
        let project = |d_output| linear(d_model, d_output, self.qkv_bias, INIT_STD, device);
        MixtureOfHead {
            q_proj: project(self.n_heads * width),
            k_proj: project(kv_heads * width),
            v_proj: project(kv_heads * width),
            o_proj: linear(self.n_heads * width, d_model, self.o_bias, residual_std(dims.n_layers), device),
            q_norm: HeadNorm::where_set(self.qk_norm, width, device),
            k_norm: HeadNorm::where_set(self.qk_norm, width, device),
            router: match &self.router {
                RouterConfig::Learned(config) => Some(LearnedRouter::new(d_model, split, *config, device)),
                RouterConfig::QueryNorm(_) => None,
            },
            n_kv_heads: kv_heads,
            norm_eps: dims.norm_eps,
            split,
            window: window_of(self.window.as_ref(), dims.layer),
            config: self.clone(),
        }
    }

    fn head_dim(&self, dims: &Dims) -> usize {
        self.dense().head_dim(dims)
    }

    fn cost(&self, dims: &Dims) -> Cost {
        let dense = self.dense().cost(dims);
        let (d_model, width) = (dims.d_model as u64, self.head_dim(dims) as u64);
        let split = self.split(dims.layer);
        let inactive = (split.heads() - split.active()) as u64;
        let (router, skipped_projections) = match &self.router {
            RouterConfig::Learned(config) => (d_model * config.outputs(split) as u64, 2),
            // Queries are computed everywhere, because their norms choose.
            RouterConfig::QueryNorm(_) => (0, 1),
        };
        Cost {
            parameters: dense.parameters + router,
            flops_per_token: dense.flops_per_token + 2 * router - 2 * skipped_projections * inactive * d_model * width,
            flops_per_pair: dense.flops_per_pair - 4 * inactive * width,
            ..dense
        }
    }

    fn conversions() -> &'static [Conversion] {
        &[Conversion { name: "mixture_of_head", from: &["softmax"] }]
    }

    fn head_counts(&self, layer: usize) -> Option<HeadCounts> {
        Some(HeadCounts::Selected(self.split(layer)))
    }

    fn observes() -> &'static [Observed] {
        const ALL: [Observed; 8] = [SCORES[0], SCORES[1], SCORES[2], GATE, LOAD[0], LOAD[1], LOAD[2], LOAD[3]];
        &ALL
    }

    fn wiring(&self) -> Result<Vec<Wiring>, &'static str> {
        Ok(Wiring::even(self.n_heads, self.kv_heads()))
    }

    fn example() -> Self {
        Self {
            n_heads: 6,
            n_kv_heads: Some(3),
            head_dim: Some(4),
            qkv_bias: true,
            o_bias: false,
            qk_norm: false,
            shared_heads: PerLayerCount::Same(2),
            top_k: PerLayerCount::Each(vec![2, 2, 1, 1]),
            router: RouterConfig::default(),
            penalty_norm: GateNorm::default(),
            window: Some(PerLayerCount::Same(5)),
        }
    }
}

/// A layer of mixture-of-head attention.
#[derive(Module, Debug)]
pub struct MixtureOfHead {
    /// `[d_model, n_heads * head_dim]`: shared heads, then routed ones
    pub q_proj: Linear,
    /// `[d_model, n_kv_heads * head_dim]`
    pub k_proj: Linear,
    /// `[d_model, n_kv_heads * head_dim]`
    pub v_proj: Linear,
    /// `[n_heads * head_dim, d_model]`
    pub o_proj: Linear,
    /// `None` where switched off
    pub q_norm: Option<HeadNorm>,
    /// `None` where switched off
    pub k_norm: Option<HeadNorm>,
    /// `None` where the norms of the queries choose
    pub router: Option<LearnedRouter>,
    n_kv_heads: usize,
    norm_eps: f64,
    window: Option<usize>,
    #[module(skip)]
    split: HeadSplit,
    #[module(skip)]
    config: MixtureOfHeadConfig,
}

impl MixtureOfHead {
    /// The routing of a call with `hidden`, `[batch, seq, d_model]`.
    pub fn routing(&self, hidden: Tensor<3>) -> Routing {
        self.route(hidden, None, Adapters::default()).1
    }

    /// `[batch, seq, n_heads * head_dim]` queries, and which of them take part.
    fn route(&self, hidden: Tensor<3>, real: Option<&[bool]>, adapters: Adapters<'_>) -> (Tensor<3>, Routing) {
        match (&self.router, &self.config.router) {
            (Some(router), _) => {
                let routing = router.route(hidden.clone(), real);
                let q = linear_into_heads(hidden, adapters.weight("q_proj", &self.q_proj), &routing.selected);
                (with_bias(q, &self.q_proj), routing)
            }
            (None, RouterConfig::QueryNorm(config)) => {
                let q = adapters.project("q_proj", &self.q_proj, hidden);
                let routing =
                    router::by_query_norm(split_heads(q.clone(), self.split.heads()), self.split, *config, real);
                (q, routing)
            }
            (None, RouterConfig::Learned(_)) => unreachable!("init: a learned router is there"),
        }
    }
}

impl Mechanism for MixtureOfHead {
    type Cache = KvCache;

    fn forward(&self, hidden: Tensor<3>, call: Call<'_, KvCache>) -> Attended {
        let ([batch, seq, _], adapters, sites) = (hidden.dims(), call.adapters, call.sites);
        let real = call.mask.real_queries(batch, call.past(), seq);
        let (q, routing) = self.route(hidden.clone(), real.as_deref(), adapters);
        let k = adapters.project("k_proj", &self.k_proj, hidden.clone());
        let v = adapters.project("v_proj", &self.v_proj, hidden);
        let n_heads = self.split.heads();
        let q = normed(split_heads(q, n_heads), self.q_norm.as_ref(), self.norm_eps);
        let k = normed(split_heads(k, self.n_kv_heads), self.k_norm.as_ref(), self.norm_eps);
        let (q, k) = (sites.query(call.rope, q), sites.key(call.rope, k));
        let v = sites.at(KvSite::V, split_heads(v, self.n_kv_heads));
        let Within { keys, values, mask, query_offset } = within(self.window, call.mask, call.cache, [k, v]);
        let options = AttentionOptions {
            mask: Some(&mask),
            query_offset,
            bias: call.bias.cloned(),
            selected: Some(routing.selected.clone()),
            statistics: call.observe.measure(),
            ..Default::default()
        };
        let attended = sites.attend(q, keys, values, options); // [batch, n_heads, seq, head_dim], zero where unselected
        let seen = attended.statistics.map(|statistics| {
            let mut seen = Observation::of(statistics);
            routing.observe(self.split, &mut seen);
            seen
        });
        let outputs = [QuerySite::Z, QuerySite::Result].map(Site::from);
        let written = sites.touch(&outputs).then(|| {
            let gates = in_type(routing.gates.clone(), attended.hidden.dtype()).swap_dims(1, 2).unsqueeze_dim::<4>(3);
            sites.out(adapters, &self.o_proj, join_heads(attended.hidden.clone() * gates), n_heads)
        });
        let hidden = match written.filter(|_| sites.edit(&outputs)) {
            // Where outputs are changed, those of heads that were not selected may count.
            Some(written) => written,
            None => {
                let (heads, weight) = (join_heads(attended.hidden), adapters.weight("o_proj", &self.o_proj));
                with_bias(linear_out_of_heads(heads, routing.gates, weight, &routing.selected), &self.o_proj)
            }
        };
        let penalty = routing.balance.map(|balance| balance.penalty(self.split, self.config.penalty_norm));
        Attended { hidden, penalty, seen }
    }
}

/// `x` and the bias of a projection, where it has one.
fn with_bias(x: Tensor<3>, projection: &Linear) -> Tensor<3> {
    match &projection.bias {
        Some(bias) => {
            let bias = in_type(bias.val(), x.dtype());
            x + bias.unsqueeze::<3>()
        }
        None => x,
    }
}

#[cfg(test)]
mod tests;
