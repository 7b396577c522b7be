//! Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464), in the form of Qwen3-Next.
//!
//! A recurrent mechanism: instead of keys and values of all earlier tokens it keeps one matrix S per head, which every token
//! decays, corrects by the delta rule and reads. With r value heads for each key head:
//!
//! ```text
//! q, k, v = silu(conv(x W_qkv))       a causal convolution along the tokens, channel by channel, without bias
//! q = q / √(|q|² + ε) / √d_k,  k = k / √(|k|² + ε)                                                   ε = 1e-6
//! β = σ(x W_b),  g = -exp(A_log) softplus(x W_a + dt_bias)
//! S_t = e^g S_{t-1} + k ⊗ β (v - (e^g S_{t-1})ᵀ k),   o = S_tᵀ q
//! out = o_proj(rms_norm(o) ⊙ silu(z)),  z = x W_z
//! ```
//! There is no softmax, no map and no position: rotary positions are not used. Every document begins with an empty state. The
//! recurrence is `kernels/delta_rule.rs`, fused on the CPU; other backends go token by token.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::activation::{sigmoid, silu, softplus};
use burn::tensor::{DType, Device, Distribution, Tensor, TensorData};
use polyhead_kernels::{DeltaRule, delta_rule, in_type, random, rms_norm};
use serde::{Deserialize, Serialize};

use crate::config::require;
use crate::projection::{INIT_STD, linear, residual_std};
use crate::softmax::check_width;
use crate::{
    Attended, Call, ConfigError, Cost, Dims, KvSite, Mask, Mechanism, MechanismCache, MechanismConfig, Observation,
    Observed, QuerySite, Site, Wiring,
};

/// Inside the square root of the norms of queries and keys; from the authors' code.
const UNIT_EPS: f64 = 1e-6;

const DECAY: Observed = Observed::new("decay", "factor by which a token lets the state decay, mean over tokens", "");

/// Settings of Gated DeltaNet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct GatedDeltaNetConfig {
    /// Value heads: states of a layer.
    pub n_heads: usize,
    /// Key heads, each of which serves as many value heads as the others. Default: n_heads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n_key_heads: Option<usize>,
    /// Channels of a query or key head. Default: d_model / n_heads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_k_dim: Option<usize>,
    /// Channels of a value head. Default: head_k_dim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_v_dim: Option<usize>,
    /// Tokens that the convolution spans. Default: 4, as in Qwen3-Next.
    #[serde(default = "conv_kernel")]
    pub conv_kernel: usize,
}

fn conv_kernel() -> usize {
    4
}

/// Positions that a convolution reads at most; chosen by us, far above the 4 of published models.
const LONGEST_KERNEL: usize = 1 << 10;

/// The sizes of a layer.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    key_heads: usize,
    /// Value heads of a key head.
    share: usize,
    k_dim: usize,
    v_dim: usize,
    kernel: usize,
}

impl Sizes {
    fn heads(self) -> usize {
        self.key_heads * self.share
    }

    /// Channels of the convolution: queries, keys, values.
    fn mixed(self) -> usize {
        2 * self.key_heads * self.k_dim + self.heads() * self.v_dim
    }
}

impl GatedDeltaNetConfig {
    fn sizes(&self, dims: &Dims) -> Sizes {
        let key_heads = self.n_key_heads.unwrap_or(self.n_heads);
        let k_dim = self.head_k_dim.unwrap_or(dims.d_model / self.n_heads.max(1));
        let share = self.n_heads / key_heads.max(1);
        Sizes { key_heads, share, k_dim, v_dim: self.head_v_dim.unwrap_or(k_dim), kernel: self.conv_kernel }
    }
}

impl MechanismConfig for GatedDeltaNetConfig {
    type Layer = GatedDeltaNet;

    fn validate(&self, dims: &Dims) -> Result<(), ConfigError> {
        require(self.n_heads > 0, "n_heads", || "n_heads (0) must be at least 1".into())?;
        let Sizes { key_heads, k_dim, v_dim, kernel, .. } = self.sizes(dims);
        require(key_heads > 0 && self.n_heads.is_multiple_of(key_heads), "n_key_heads", || {
            format!("n_key_heads ({key_heads}) must divide n_heads ({})", self.n_heads)
        })?;
        for (field, value) in [("head_k_dim", k_dim), ("head_v_dim", v_dim)] {
            require(value > 0, field, || format!("{field} (0) must be at least 1"))?;
            check_width(field, value, "n_heads", self.n_heads)?;
        }
        require((2..=LONGEST_KERNEL).contains(&kernel), "conv_kernel", || {
            format!("conv_kernel ({kernel}) must be 2 to {LONGEST_KERNEL}")
        })
    }

    fn check_bidirectional(&self) -> Result<(), ConfigError> {
        let problem = "gated_delta_net reads positions one after the other, and this model reads those behind a position too: \
                       take another mechanism";
        Err(ConfigError::new("", problem))
    }

    fn init(&self, dims: &Dims, device: &Device) -> GatedDeltaNet {
        let (d_model, sizes) = (dims.d_model, self.sizes(dims));
        let heads = sizes.heads();
        let uniform = |shape: [usize; 1], [from, to]: [f64; 2]| -> Tensor<1> {
            random(shape, Distribution::Uniform(from, to), device)
        };
        // As PyTorch draws a convolution, and Qwen3-Next the decays: A between 0 and 16.
        let bound = 1.0 / (sizes.kernel as f64).sqrt();
        let conv = uniform([sizes.mixed() * sizes.kernel], [-bound, bound]);
        GatedDeltaNet {
            qkvz_proj: linear(d_model, sizes.mixed() + heads * sizes.v_dim, false, INIT_STD, device),
            ba_proj: linear(d_model, 2 * heads, false, INIT_STD, device),
            conv: Convolution { weight: Param::from_tensor(conv.reshape([sizes.mixed(), 1, sizes.kernel])) },
            dt_bias: Param::from_tensor(Tensor::ones([heads], device)),
            a_log: Param::from_tensor(uniform([heads], [1e-3, 16.0]).log()),
            norm: HeadScale { weight: Param::from_tensor(Tensor::ones([sizes.v_dim], device)) },
            o_proj: linear(heads * sizes.v_dim, d_model, false, residual_std(dims.n_layers), device),
            sizes,
            norm_eps: dims.norm_eps,
        }
    }

    fn head_dim(&self, dims: &Dims) -> usize {
        self.sizes(dims).k_dim
    }

    fn rotates(&self) -> bool {
        false
    }

    fn cost(&self, dims: &Dims) -> Cost {
        let sizes = self.sizes(dims);
        let [d_model, heads, mixed] = [dims.d_model, sizes.heads(), sizes.mixed()].map(|size| size as u64);
        let [k_dim, v_dim, kernel] = [sizes.k_dim, sizes.v_dim, sizes.kernel].map(|size| size as u64);
        let products = d_model * (mixed + 2 * heads * v_dim + 2 * heads);
        // Decay, what the state holds for the key, the correction, what the query reads.
        let state = heads * k_dim * v_dim;
        Cost {
            parameters: products + mixed * kernel + 2 * heads + v_dim,
            flops_per_token: 2 * products + 2 * mixed * kernel + 7 * state,
            state_elements: state + mixed * (kernel - 1),
            ..Cost::default()
        }
    }

    fn wiring(&self) -> Result<Vec<Wiring>, &'static str> {
        let share = self.n_heads / self.n_key_heads.unwrap_or(self.n_heads).max(1);
        Ok((0..self.n_heads).map(|head| Wiring::new(head, head / share.max(1), head)).collect())
    }

    fn example() -> Self {
        Self { n_heads: 4, n_key_heads: Some(2), head_k_dim: Some(5), head_v_dim: Some(6), conv_kernel: 3 }
    }

    fn observes() -> &'static [Observed] {
        &[DECAY]
    }

    fn absent(site: Site) -> Option<&'static str> {
        let rotated = [Site::from(QuerySite::RotQ), KvSite::RotK.into()].contains(&site);
        match site.is_map() {
            true => Some("a state is no map: what a query reads of a single earlier token is written nowhere"),
            false => rotated.then_some("it has no positions that rotate: use q and k"),
        }
    }

    fn exemptions() -> &'static [(&'static str, &'static str)] {
        &[("maps", "a state is no map: what a query reads of a single earlier token is written nowhere")]
    }
}

/// A layer of Gated DeltaNet.
#[derive(Module, Debug)]
pub struct GatedDeltaNet {
    /// `[d_model, n_key_heads * (2 head_k_dim + 2 share * head_v_dim)]`: for each key head its query, its key, the values and
    /// the gates z of its value heads
    pub qkvz_proj: Linear,
    /// `[d_model, 2 n_heads]`: for each key head b and a of its value heads
    pub ba_proj: Linear,
    /// Along the tokens, channel by channel: queries, keys, values
    pub conv: Convolution,
    /// `[n_heads]`
    pub dt_bias: Param<Tensor<1>>,
    /// `[n_heads]`
    pub a_log: Param<Tensor<1>>,
    /// Of what a head reads
    pub norm: HeadScale,
    /// `[n_heads * head_v_dim, d_model]`
    pub o_proj: Linear,
    #[module(skip)]
    sizes: Sizes,
    norm_eps: f64,
}

/// The weights of a convolution along the tokens.
#[derive(Module, Debug)]
pub struct Convolution {
    /// `[channels, 1, kernel]`; the last is of the token itself
    pub weight: Param<Tensor<3>>,
}

/// The weights of a norm.
#[derive(Module, Debug)]
pub struct HeadScale {
    /// `[head_v_dim]`
    pub weight: Param<Tensor<1>>,
}

/// The cache of a layer: of the same size for ten tokens as for ten thousand.
#[derive(Debug, Clone, Default)]
pub struct DeltaState {
    tokens: usize,
    kept: Option<Kept>,
}

#[derive(Debug, Clone)]
struct Kept {
    /// `[batch, n_heads, head_k_dim, head_v_dim]`
    state: Tensor<4>,
    /// `[batch, conv_kernel - 1, channels]`: the last inputs of the convolution
    inputs: Tensor<3>,
}

impl DeltaState {
    /// `[batch, n_heads, head_k_dim, head_v_dim]`; `None` before the first token.
    pub fn state(&self) -> Option<&Tensor<4>> {
        self.kept.as_ref().map(|kept| &kept.state)
    }
}

impl MechanismCache for DeltaState {
    fn len(&self) -> usize {
        self.tokens
    }

    fn elements(&self) -> usize {
        let of_row = |dims: &[usize]| dims[1..].iter().product::<usize>();
        self.kept.as_ref().map_or(0, |kept| of_row(&kept.state.dims()) + of_row(&kept.inputs.dims()))
    }
}

impl Mechanism for GatedDeltaNet {
    type Cache = DeltaState;

    fn forward(&self, hidden: Tensor<3>, call: Call<'_, DeltaState>) -> Attended {
        let (adapters, sites, dtype) = (call.adapters, call.sites, hidden.dtype());
        let [batch, seq, _] = hidden.dims();
        let Sizes { key_heads, share, k_dim, v_dim, kernel } = self.sizes;
        let (heads, channels) = (self.sizes.heads(), self.sizes.mixed());
        let starts = Starts::of(call.mask, batch, seq);

        let qkvz = in_type(adapters.project("qkvz_proj", &self.qkvz_proj, hidden.clone()), DType::F32);
        let qkvz = qkvz.reshape([batch, seq, key_heads, 2 * k_dim + 2 * share * v_dim]);
        let part =
            |from: usize, width: usize| qkvz.clone().narrow(3, from, width).reshape([batch, seq, key_heads * width]);
        let mixed = Tensor::cat(vec![part(0, k_dim), part(k_dim, k_dim), part(2 * k_dim, share * v_dim)], 2);
        let z = part(2 * k_dim + share * v_dim, share * v_dim).reshape([batch, seq, heads, v_dim]);
        let ba = in_type(adapters.project("ba_proj", &self.ba_proj, hidden), DType::F32).reshape([
            batch,
            seq,
            key_heads,
            2 * share,
        ]);
        let of_heads = |from: usize| ba.clone().narrow(3, from, share).reshape([batch, seq, heads]);
        let beta = sigmoid(of_heads(0)); // [batch, seq, n_heads]
        let rate = softplus(of_heads(share) + self.dt_bias.val().reshape([1, 1, heads]), 1.0);
        let decay = (-(self.a_log.val().exp().reshape([1, 1, heads]) * rate)).exp();

        let before = call.cache.as_ref().and_then(|cache| cache.kept.clone());
        let device = mixed.device();
        let (state, past) = match before {
            Some(Kept { state, inputs }) => (state, inputs),
            None => (
                Tensor::zeros([batch, heads, k_dim, v_dim], &device),
                Tensor::zeros([batch, kernel - 1, channels], &device),
            ),
        };
        let inputs = Tensor::cat(vec![past, mixed], 1); // [batch, kernel - 1 + seq, channels]
        let mixed = silu(self.convolved(&inputs, seq, starts.as_ref()));
        let head = |from: usize, count: usize, width: usize| {
            mixed.clone().narrow(2, from, count * width).reshape([batch, seq, count, width])
        };
        let shared = |x: Tensor<4>| {
            let x = x.reshape([batch, seq, key_heads, 1, k_dim]);
            x.expand([batch, seq, key_heads, share, k_dim]).reshape([batch, seq, heads, k_dim])
        };
        let q = shared(unit(head(0, key_heads, k_dim))) / (k_dim as f64).sqrt();
        let q = sites.at_tokens(QuerySite::Q, q);
        let k = shared(sites.at_tokens(KvSite::K, unit(head(key_heads * k_dim, key_heads, k_dim))));
        let v = sites.at_tokens(KvSite::V, head(2 * key_heads * k_dim, heads, v_dim));
        let decay = match &starts {
            Some(starts) => decay.clone() * (1.0 - starts.first(&device)),
            None => decay,
        };
        let mean_decay = decay.clone().mean_dim(0).mean_dim(1).reshape([heads]);
        let (read, state) = delta_rule(DeltaRule { q, k, v, beta, decay }, state); // [batch, seq, n_heads, head_v_dim]
        if let Some(cache) = call.cache {
            let inputs = inputs.narrow(1, seq, kernel - 1);
            *cache = DeltaState { tokens: cache.tokens + seq, kept: Some(Kept { state, inputs }) };
        }
        let read = sites.at_tokens(QuerySite::Attended, read);
        let gated = rms_norm(read, self.norm.weight.val(), self.norm_eps) * silu(z);
        let gated = in_type(gated.reshape([batch, seq, heads * v_dim]), dtype);
        let seen = call.observe.wanted().then(|| {
            let mut seen = Observation::default();
            seen.number(DECAY, mean_decay);
            seen
        });
        Attended { hidden: sites.out(adapters, &self.o_proj, gated, heads), penalty: None, seen }
    }
}

impl GatedDeltaNet {
    /// `[batch, seq, channels]` from the inputs of this call behind those of `kernel - 1` earlier tokens.
    fn convolved(&self, inputs: &Tensor<3>, seq: usize, starts: Option<&Starts>) -> Tensor<3> {
        let kernel = self.sizes.kernel;
        let tap = |at: usize| {
            let weight = self.conv.weight.val().narrow(2, at, 1).reshape([1, 1, self.sizes.mixed()]);
            let shifted = inputs.clone().narrow(1, at, seq) * weight;
            match starts {
                Some(starts) => shifted * starts.reached(kernel - 1 - at, &inputs.device()),
                None => shifted,
            }
        };
        (1..kernel).fold(tap(0), |sum, at| sum + tap(at))
    }
}

/// `x / √(|x|² + ε)` of every head.
fn unit(x: Tensor<4>) -> Tensor<4> {
    let length = (x.clone().square().sum_dim(3) + UNIT_EPS).sqrt();
    x / length
}

/// The starts of documents, which nothing is read across.
struct Starts {
    /// `[batch, seq]`: how many tokens of the same document are directly before each token.
    before: Vec<usize>,
    sizes: [usize; 2],
}

impl Starts {
    fn of(mask: &Mask, batch: usize, seq: usize) -> Option<Self> {
        let documents = mask.documents()?;
        assert_eq!(documents.len(), batch * seq, "one document for every token: packed rows are not decoded");
        let mut before = vec![0; batch * seq];
        for at in 0..batch * seq {
            if at % seq > 0 && documents[at] == documents[at - 1] {
                before[at] = before[at - 1] + 1;
            }
        }
        Some(Self { before, sizes: [batch, seq] })
    }

    fn numbers(&self, of: impl Fn(usize) -> bool, device: &Device) -> Tensor<3> {
        let [batch, seq] = self.sizes;
        let numbers: Vec<f32> = self.before.iter().map(|&before| f32::from(of(before))).collect();
        Tensor::from_data(TensorData::new(numbers, [batch, seq, 1]), device)
    }

    /// `[batch, seq, 1]`: 1 where a document begins.
    fn first(&self, device: &Device) -> Tensor<3> {
        self.numbers(|before| before == 0, device)
    }

    /// `[batch, seq, 1]`: 1 where the token `back` places before is of the same document.
    fn reached(&self, back: usize, device: &Device) -> Tensor<3> {
        self.numbers(|before| before >= back, device)
    }
}
