//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434; in the form of transformers' DeepSeek-V2 and V3).
//!
//! Keys and values of all heads are projections of one latent vector c per token; rotary positions are on extra channels,
//! whose key all heads share. The cache keeps c and that key, however many heads there are.
//!
//! ```text
//! q = W_qb rms(W_qa x)  or  W_q x       per head [q_n | q_p]                      q_p is rotated
//! (c, k_p) = W_kva x                    c = rms(c), k_p is rotated, one for all heads
//! k_n, v = W_kvb c                      per head
//! out = o_proj(softmax((q_n · k_n + q_p · k_p) / √(n + p)) v)
//! ```
//! With a cache of earlier tokens, W_kvb is absorbed instead: q_n W_k is compared with the latents themselves, and their
//! weighted sum goes through W_v. It is multi-query attention with keys [c | k_p] and values c, and the same numbers.
//!
//! Transformers reorders the channels of V3's rotated parts, which changes no score; here they stay as the model's rotary layout
//! has them. Left out: the factor of the scores that goes with YaRN.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};
use polyhead_kernels::{Attention, AttentionOptions, in_type, rms_norm};
use serde::{Deserialize, Serialize};

use crate::cache::put;
use crate::config::require;
use crate::projection::{INIT_STD, join_heads, linear, residual_std};
use crate::rope::rotate;
use crate::softmax::{HeadNorm, check_width};
use crate::{
    Adapters, Attended, Call, ConfigError, Cost, Dims, KvSite, Mechanism, MechanismCache, MechanismConfig, Observation,
    QuerySite, Site, Sites, Wiring,
};

/// Inside the square root of the latents' norms, whatever the model's other norms have; from the authors' code.
const LATENT_EPS: f64 = 1e-6;

/// Settings of multi-head latent attention. Keys are named as in DeepSeek's config.json.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MlaConfig {
    /// Heads.
    pub n_heads: usize,
    /// Channels of the latent that keys and values are made of. DeepSeek has four times qk_nope_head_dim.
    pub kv_lora_rank: usize,
    /// Channels of the latent that queries are made of. Default: none, queries are projected directly, as in V2-Lite.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub q_lora_rank: Option<usize>,
    /// Channels of a query or key head without positions. Default: d_model / n_heads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qk_nope_head_dim: Option<usize>,
    /// Channels of a query head, and of the key that all heads share, with rotary positions. Default: half of
    /// qk_nope_head_dim, rounded up to an even number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qk_rope_head_dim: Option<usize>,
    /// Channels of a value head. Default: qk_nope_head_dim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v_head_dim: Option<usize>,
    /// Biases on the projections to the latents and on the output projection. Default: false.
    #[serde(default)]
    pub attention_bias: bool,
}

/// The sizes of a layer.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    heads: usize,
    latent: usize,
    /// Of queries and keys, without positions and with them.
    nope: usize,
    rope: usize,
    value: usize,
}

impl MlaConfig {
    fn sizes(&self, dims: &Dims) -> Sizes {
        let nope = self.qk_nope_head_dim.unwrap_or(dims.d_model / self.n_heads.max(1));
        let rope = self.qk_rope_head_dim.unwrap_or(nope.div_ceil(2).next_multiple_of(2));
        Sizes { heads: self.n_heads, latent: self.kv_lora_rank, nope, rope, value: self.v_head_dim.unwrap_or(nope) }
    }
}

impl MechanismConfig for MlaConfig {
    type Layer = Mla;

    fn validate(&self, dims: &Dims) -> Result<(), ConfigError> {
        require(self.n_heads > 0, "n_heads", || "n_heads (0) must be at least 1".into())?;
        require(self.qk_nope_head_dim.is_some() || dims.d_model.is_multiple_of(self.n_heads), "n_heads", || {
            let (heads, d_model) = (self.n_heads, dims.d_model);
            format!("n_heads ({heads}) must divide d_model ({d_model}), or qk_nope_head_dim must be given")
        })?;
        for (field, value) in [
            ("kv_lora_rank", Some(self.kv_lora_rank)),
            ("q_lora_rank", self.q_lora_rank),
            ("qk_nope_head_dim", self.qk_nope_head_dim),
            ("qk_rope_head_dim", self.qk_rope_head_dim),
            ("v_head_dim", self.v_head_dim),
        ] {
            require(value != Some(0), field, || format!("{field} (0) must be at least 1"))?;
            check_width(field, value.unwrap_or(0), "n_heads", self.n_heads)?;
        }
        let rope = self.sizes(dims).rope;
        require(!dims.rope || rope.is_multiple_of(2), "qk_rope_head_dim", || {
            format!("qk_rope_head_dim ({rope}) must be even for rotary positions; rope = false switches them off")
        })
    }

    fn init(&self, dims: &Dims, device: &Device) -> Mla {
        let (d_model, sizes, bias) = (dims.d_model, self.sizes(dims), self.attention_bias);
        let Sizes { heads, latent, nope, rope, value } = sizes;
        let project = |d_input, d_output, bias| linear(d_input, d_output, bias, INIT_STD, device);
        let norm = |width: usize| HeadNorm { weight: Param::from_tensor(Tensor::ones([width], device)) };
        Mla {
            q_a_proj: self.q_lora_rank.map(|rank| project(d_model, rank, bias)),
            q_a_norm: self.q_lora_rank.map(norm),
            q_proj: project(self.q_lora_rank.unwrap_or(d_model), heads * (nope + rope), false),
            kv_a_proj: project(d_model, latent + rope, bias),
            kv_a_norm: norm(latent),
            kv_b_proj: project(latent, heads * (nope + value), false),
            o_proj: linear(heads * value, d_model, bias, residual_std(dims.n_layers), device),
            sizes,
        }
    }

    fn head_dim(&self, dims: &Dims) -> usize {
        self.sizes(dims).rope
    }

    fn cost(&self, dims: &Dims) -> Cost {
        let Sizes { heads, latent, nope, rope, value } = self.sizes(dims);
        let [d_model, heads, latent, nope, rope, value] =
            [dims.d_model, heads, latent, nope, rope, value].map(|size| size as u64);
        let q_rank = self.q_lora_rank.map(|rank| rank as u64);
        let queries = q_rank.map_or(0, |rank| d_model * rank) + q_rank.unwrap_or(d_model) * heads * (nope + rope);
        let matrices = queries + d_model * (latent + rope) + latent * heads * (nope + value) + heads * value * d_model;
        let norms = q_rank.unwrap_or(0) + latent;
        let biases = if self.attention_bias { q_rank.unwrap_or(0) + latent + rope + d_model } else { 0 };
        Cost {
            parameters: matrices + norms + biases,
            flops_per_token: 2 * matrices,
            flops_per_pair: 2 * heads * (nope + rope + value),
            kv_cache_elements_per_token: latent + rope,
            ..Cost::default()
        }
    }

    fn absent(site: Site) -> Option<&'static str> {
        let rotated = "a key is partly one of all heads until it has been rotated: use rot_k";
        (site == KvSite::K.into()).then_some(rotated)
    }

    fn wiring(&self) -> Result<Vec<Wiring>, &'static str> {
        Ok(Wiring::even(self.n_heads, self.n_heads))
    }

    fn example() -> Self {
        Self {
            n_heads: 4,
            kv_lora_rank: 10,
            q_lora_rank: Some(12),
            qk_nope_head_dim: Some(5),
            qk_rope_head_dim: Some(4),
            v_head_dim: Some(7),
            attention_bias: true,
        }
    }
}

/// A layer of multi-head latent attention.
#[derive(Module, Debug)]
pub struct Mla {
    /// `[d_model, q_lora_rank]`; `None` where queries are projected directly
    pub q_a_proj: Option<Linear>,
    /// `None` where queries are projected directly
    pub q_a_norm: Option<HeadNorm>,
    /// `[q_lora_rank or d_model, n_heads * (qk_nope_head_dim + qk_rope_head_dim)]`
    pub q_proj: Linear,
    /// `[d_model, kv_lora_rank + qk_rope_head_dim]`
    pub kv_a_proj: Linear,
    /// Of the latent of keys and values
    pub kv_a_norm: HeadNorm,
    /// `[kv_lora_rank, n_heads * (qk_nope_head_dim + v_head_dim)]`: for each head its key, then its value
    pub kv_b_proj: Linear,
    /// `[n_heads * v_head_dim, d_model]`
    pub o_proj: Linear,
    #[module(skip)]
    sizes: Sizes,
}

/// The cache of a layer: the latent of each, and the key that its heads share.
#[derive(Debug, Clone, Default)]
pub struct LatentCache {
    tokens: usize,
    /// `[batch, 1, capacity, kv_lora_rank + qk_rope_head_dim]`
    buffer: Option<Tensor<4>>,
}

impl LatentCache {
    /// Appends this call's tokens and gives all of them back: `[batch, 1, tokens, kv_lora_rank + qk_rope_head_dim]`.
    fn append(&mut self, new: Tensor<4>) -> Tensor<4> {
        let (old, count) = (self.tokens, new.dims()[2]);
        self.tokens += count;
        let buffer = put(self.buffer.take(), old, new);
        let all = buffer.clone().narrow(2, 0, self.tokens);
        self.buffer = Some(buffer);
        all
    }

    /// `[batch, tokens, kv_lora_rank + qk_rope_head_dim]`: normalised latents, and rotated keys behind them.
    pub fn kept(&self) -> Option<Tensor<3>> {
        self.buffer.clone().map(|buffer| buffer.narrow(2, 0, self.tokens).squeeze_dim::<3>(1))
    }
}

impl MechanismCache for LatentCache {
    fn len(&self) -> usize {
        self.tokens
    }

    fn elements(&self) -> usize {
        self.buffer.as_ref().map_or(0, |buffer| self.tokens * buffer.dims()[3])
    }
}

impl Mechanism for Mla {
    type Cache = LatentCache;

    fn forward(&self, hidden: Tensor<3>, call: Call<'_, LatentCache>) -> Attended {
        let ([batch, seq, _], adapters, sites) = (hidden.dims(), call.adapters, call.sites);
        let Sizes { heads, latent, nope, rope, .. } = self.sizes;
        let query_input = match (&self.q_a_proj, &self.q_a_norm) {
            (Some(q_a_proj), Some(norm)) => {
                rms_norm(adapters.project("q_a_proj", q_a_proj, hidden.clone()), norm.weight.val(), LATENT_EPS)
            }
            _ => hidden.clone(),
        };
        let q = adapters.project("q_proj", &self.q_proj, query_input);
        let q = sites.at(QuerySite::Q, q.reshape([batch, seq, heads, nope + rope]).swap_dims(1, 2));
        let halves = |q: Tensor<4>| [q.clone().narrow(3, 0, nope), q.narrow(3, nope, rope)];
        let [q_n, q_p] = halves(q);
        let q_p = rotate(call.rope, q_p);
        let q = match sites.touch(&[QuerySite::RotQ.into()]) {
            true => halves(sites.at(QuerySite::RotQ, Tensor::cat(vec![q_n, q_p], 3))),
            false => [q_n, q_p],
        };
        let kept = adapters.project("kv_a_proj", &self.kv_a_proj, hidden).reshape([batch, 1, seq, latent + rope]);
        let c = rms_norm(kept.clone().narrow(3, 0, latent), self.kv_a_norm.weight.val(), LATENT_EPS);
        let k_p = rotate(call.rope, kept.narrow(3, latent, rope));
        let query_offset = call.past();
        let latents = Tensor::cat(vec![c, k_p], 3);
        let latents = match call.cache {
            Some(cache) => cache.append(latents),
            None => latents,
        };
        let options = AttentionOptions {
            scale: Some(((nope + rope) as f64).powf(-0.5)),
            mask: Some(call.mask),
            query_offset,
            bias: call.bias.cloned(),
            statistics: call.observe.measure(),
            ..Default::default()
        };
        // The keys and values of heads exist in one of the forms.
        let whole = query_offset == 0 || sites.touch(&[KvSite::RotK, KvSite::V].map(Site::from));
        let form = if whole { Self::expanded } else { Self::absorbed };
        let attended = form(self, q, latents, (adapters, sites), options); // [batch, n_heads, seq, v_head_dim]
        let seen = attended.statistics.map(Observation::of);
        let hidden = sites.out(adapters, &self.o_proj, join_heads(attended.hidden), heads);
        Attended { hidden, penalty: None, seen }
    }
}

impl Mla {
    /// Attention with the keys and values of every head.
    fn expanded(
        &self,
        [q_n, q_p]: [Tensor<4>; 2],
        latents: Tensor<4>,
        (adapters, sites): (Adapters<'_>, Sites<'_>),
        options: AttentionOptions<'_>,
    ) -> Attention {
        let Sizes { heads, latent, nope, rope, value } = self.sizes;
        let [batch, _, seq, _] = latents.dims();
        let c = latents.clone().narrow(3, 0, latent).reshape([batch, seq, latent]);
        let kv = adapters.project("kv_b_proj", &self.kv_b_proj, c);
        let kv = kv.reshape([batch, seq, heads, nope + value]).swap_dims(1, 2);
        let k_p = latents.narrow(3, latent, rope).expand([batch, heads, seq, rope]);
        let k = sites.at_from(KvSite::RotK, 0, Tensor::cat(vec![kv.clone().narrow(3, 0, nope), k_p], 3));
        let v = sites.at_from(KvSite::V, 0, kv.narrow(3, nope, value));
        sites.attend(Tensor::cat(vec![q_n, q_p], 3), k, v, options)
    }

    /// Attention of queries that ask the latents themselves.
    fn absorbed(
        &self,
        [q_n, q_p]: [Tensor<4>; 2],
        latents: Tensor<4>,
        (adapters, sites): (Adapters<'_>, Sites<'_>),
        options: AttentionOptions<'_>,
    ) -> Attention {
        let Sizes { heads, latent, nope, value, .. } = self.sizes;
        let weight = in_type(adapters.weight("kv_b_proj", &self.kv_b_proj), q_n.dtype());
        let weight = weight.reshape([1, latent, heads, nope + value]).swap_dims(1, 2); // [1, n_heads, latent, ..]
        let to_latent = weight.clone().narrow(3, 0, nope).swap_dims(2, 3);
        let q = Tensor::cat(vec![q_n.matmul(to_latent), q_p], 3);
        let context = sites.weigh(q, latents.clone(), latents.narrow(3, 0, latent), options);
        let attended = context.hidden.matmul(weight.narrow(3, nope, value));
        Attention { hidden: sites.at(QuerySite::Attended, attended), ..context }
    }
}

#[cfg(test)]
mod tests {
    use polyhead_kernels::comparison::{Tolerance, assert_tensors_close, largest_difference};

    use super::*;
    use crate::laws::{Spread, draw};
    use crate::{Rope, RopeLayout};

    #[test]
    fn the_cache_is_as_small_as_the_latents() {
        let (dims, device) = (Dims::example(), Device::flex());
        for n_heads in [2, 8] {
            let config = MlaConfig { n_heads, ..MlaConfig::example() };
            let (mask, mut cache) = (crate::Mask::causal(), LatentCache::default());
            let x = Tensor::<3>::ones([2, 7, dims.d_model], &device);
            config.init(&dims, &device).forward(x, Call { cache: Some(&mut cache), ..Call::new(&mask) });
            assert_eq!(cache.elements(), 7 * (10 + 4));
            assert_eq!(config.cost(&dims).kv_cache_elements_per_token, 10 + 4);
        }
    }

    #[test]
    fn positions_count_only_from_each_other() {
        let (dims, device, mask) = (Dims::example(), Device::flex().autodiff(), crate::Mask::causal());
        let layer = MlaConfig::example().init(&dims, &device).map(&mut Spread);
        let x: Tensor<3> = draw([2, 6, dims.d_model], [0.0, 1.0], &device);
        let at = |start: usize| {
            let rope = Rope::new(start..start + 6, 4, 100.0, RopeLayout::Interleaved, &device);
            layer.forward(x.clone(), Call { rope: Some(&rope), ..Call::new(&mask) }).hidden
        };
        assert_tensors_close("shifted positions", at(9), at(0), Tolerance::absolute(2e-5));
        let still = layer.forward(x.clone(), Call::new(&mask)).hidden;
        assert!(largest_difference(at(0), still) > 1e-3);
    }

    #[test]
    fn mistakes_are_named() {
        let field = |config: MlaConfig| config.validate(&Dims::example()).map_err(|ConfigError { field, .. }| field);
        let good = MlaConfig::example();
        assert_eq!(field(good.clone()), Ok(()));
        assert_eq!(field(MlaConfig { kv_lora_rank: 0, ..good.clone() }), Err("kv_lora_rank".into()));
        assert_eq!(field(MlaConfig { q_lora_rank: Some(0), ..good.clone() }), Err("q_lora_rank".into()));
        assert_eq!(field(MlaConfig { qk_rope_head_dim: Some(3), ..good.clone() }), Err("qk_rope_head_dim".into()));
        assert_eq!(field(MlaConfig { n_heads: 5, qk_nope_head_dim: None, ..good }), Err("n_heads".into()));
    }
}
