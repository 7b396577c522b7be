//! Grouped Differential Attention (arXiv 2510.06949), which contains the Differential Transformer (Ye et al. 2024,
//! arXiv 2410.05258) as the case of one signal head per noise head.
//!
//! Query heads are divided into groups of `r` signal heads and one noise head. What the noise head attends to is
//! subtracted from each of its signal heads:
//!
//! ```text
//! O1 = softmax(q1 k1ᵀ / sqrt(d)) v        signal heads, [.., 2d]
//! O2 = softmax(q2 k2ᵀ / sqrt(d)) v        noise heads, repeated r times
//! λ  = exp(λ_q1 · λ_k1) - exp(λ_q2 · λ_k2) + λ_init          one number a layer
//! Y  = (1 - λ_init) · RMSNorm(O1 - λ O2)  per head, over its 2d channels ("subln")
//! ```
//!
//! Layout, as in the authors' inference code (Motif) and in unilm: query heads are striped, each group's signal heads
//! first and its noise head last; key heads alternate, even ones for signals and odd ones for noises; a pair of key
//! heads shares one value of width 2d. Keys are split *before* they are shared by grouped queries: unilm's naive file
//! does it after, which under GQA gives both maps the same keys, and its flash files and Motif disagree with it.
//!
//! The paper counts layers from 1 in λ_init; Motif's code uses the same formula with layers counted from 0, which is
//! one step less. Both are selectable; the paper's is the default.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};
use polyhead_kernels::{AttentionOptions, Combination, HeadMap, Statistics, difference, random, subtract_noise};
use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};

use crate::cache::KvCache;
use crate::config::{PerLayerCount, require};
use crate::observe::{NOISE, SCORES};
use crate::projection::{INIT_STD, join_heads, linear, residual_std, split_heads};
use crate::published::uniform;
use crate::settings::head_settings;
use crate::softmax::{check_heads, own_width};
use crate::window::{Within, check_window, moved_window, window_of, within};
use crate::{
    Attended, Call, ConfigError, Cost, Dims, Family, Form, HeadChannels, KvSite, Mechanism, MechanismConfig,
    Observation, Observed, Published, Setting, Wiring,
};

/// The authors' models, whose class also has an activation of its own (PolyNorm), which is not supported here.
static FAMILY: Family = Family::remote("MotifForCausalLM", "motif");

/// The Differential Transformer in transformers.
static DIFF_LLAMA: Family = Family::llama("DiffLlamaForCausalLM", "diffllama");

/// Inside the norm of each signal head; from the authors' code.
const SUBLN_EPS: f64 = 1e-5;
/// Standard deviation of fresh λ vectors; from the authors' code.
const LAMBDA_STD: f64 = 0.1;

const LAMBDA: Observed =
    Observed::new("lambda", "λ, by which noise heads are multiplied before they are subtracted", "");
const CANCELLED: Observed =
    Observed::new("cancelled", "share of the signal heads' output that the subtraction takes away", "");

head_settings! {
    /// Settings of grouped differential attention.
    pub struct GroupedDifferentialConfig {
        /// Query heads in all, signal and noise.
        pub n_heads: usize,
        /// Noise heads among them, one per group. n_heads / 2 gives the Differential Transformer; the paper recommends
        /// three or four signal heads per noise head.
        pub n_noise_heads: usize,
        /// Key/value heads, counted in halves as Motif does: a pair of them is two key heads and one value of twice the
        /// width. Default: 2 * n_noise_heads, no sharing between groups.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub n_kv_heads: Option<usize>,
        /// Channels of a query or key head; values have twice as many. Default: d_model / n_heads.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub head_dim: Option<usize>,
        /// The constant part of λ. Default: "paper".
        #[serde(default)]
        pub lambda_init: LambdaInit,
        /// Normalise every signal head after the subtraction, and scale by 1 - λ_init. Default: true; the papers'
        /// ablation without it is clearly worse.
        #[serde(default = "yes")]
        pub subln: bool,
        /// Fresh weights of that norm. Default: 0.1 (chosen by us). The authors' is 1, with which heads that see nothing yet are as
        /// loud as heads that do, and drown token embeddings where these start at N(0, 0.02²): a decoder of 96 channels is then
        /// 0.3 bits per byte behind softmax attention after 1000 steps, and not behind it with 0.1.
        #[serde(default = "quiet")]
        pub subln_init: f64,
        @window,
    }
}

fn yes() -> bool {
    true
}

fn quiet() -> f64 {
    0.1
}

/// The constant part of λ in each layer.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum LambdaInit {
    /// 0.8 - 0.6 exp(-0.3 (l - 1)) with layers l counted from 1: 0.2 in the first layer (paper, and unilm's code).
    #[default]
    Paper,
    /// The same with layers counted from 0: about -0.01 in the first layer (Motif's code; needed for its weights).
    Motif,
    /// The same number in every layer it is given for.
    Constant(f64),
    /// A number for each layer, which a model that grew in depth keeps.
    Each(Vec<f64>),
}

impl LambdaInit {
    /// λ_init of layer `layer`, counted from 0.
    ///
    /// # Panics
    /// If a list is too short, which validation refuses.
    pub fn of_layer(&self, layer: usize) -> f64 {
        let formula = |depth: f64| 0.8 - 0.6 * (-0.3 * depth).exp();
        match self {
            Self::Paper => formula(layer as f64),
            Self::Motif => formula(layer as f64 - 1.0),
            Self::Constant(value) => *value,
            Self::Each(values) => values[layer],
        }
    }

    /// The shortest that gives these numbers, one per layer.
    fn of(numbers: Vec<f64>) -> Self {
        let gives = |init: &Self| {
            // Numbers that were written and read may differ in their last digit.
            numbers.iter().enumerate().all(|(layer, number)| (init.of_layer(layer) - number).abs() < 1e-12)
        };
        let constant = numbers.first().copied().map(Self::Constant);
        let short = [Self::Paper, Self::Motif].into_iter().chain(constant).find(gives);
        short.unwrap_or(Self::Each(numbers))
    }
}

/// The keys of Motif's config.json.
#[derive(Debug, Deserialize)]
struct MotifKeys {
    num_attention_heads: usize,
    num_noise_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    /// Written by Polyhead only.
    lambda_init: Option<Vec<f64>>,
    /// Written by Polyhead only.
    subln_init: Option<f64>,
}

impl GroupedDifferentialConfig {
    /// Key/value heads (in halves) with the default filled in.
    pub fn kv_heads(&self) -> usize {
        self.n_kv_heads.unwrap_or(2 * self.n_noise_heads)
    }

    /// What the config.json of transformers' DiffLlama says of these layers. Its signal heads come before its noise heads, and
    /// its subln has no weights: whoever writes tensors reorders the heads of queries, keys and values, and multiplies the
    /// output projection by the weights.
    ///
    /// # Errors
    /// What DiffLlama does not have.
    pub fn diff_llama(layers: &[&Self], dims: &Dims, form: Form) -> Result<Published, String> {
        let own = uniform(layers)?;
        let of_paper = |layer| (own.lambda_init.of_layer(layer) - LambdaInit::Paper.of_layer(layer)).abs() < 1e-12;
        let rules = [
            (form == Form::Llama, "LLaMA's form"),
            (own.n_heads == 2 * own.n_noise_heads, "one signal head per noise head (n_heads = 2 n_noise_heads)"),
            (own.subln, "subln"),
            (own.window.is_none(), "no window"),
            ((0..layers.len()).all(of_paper), "lambda_init = \"paper\""),
            ((dims.norm_eps - SUBLN_EPS).abs() < 1e-12, "norm_eps = 1e-5, which is subln's too"),
        ];
        if let Some((_, rule)) = rules.into_iter().find(|(holds, _)| !holds) {
            return Err(format!("transformers' DiffLlama has {rule}"));
        }
        let keys = vec![
            ("num_attention_heads", Setting::Count(own.n_heads)),
            ("num_key_value_heads", Setting::Count(own.kv_heads())),
            ("attention_bias", Setting::Flag(false)),
        ];
        Ok(Published { family: &DIFF_LLAMA, keys })
    }
}

impl MechanismConfig for GroupedDifferentialConfig {
    type Layer = GroupedDifferential;

    fn validate(&self, dims: &Dims) -> Result<(), ConfigError> {
        let Self { n_heads, n_noise_heads: noise, .. } = *self;
        check_heads(n_heads, self.head_dim, dims)?;
        require(noise > 0 && n_heads.is_multiple_of(noise) && n_heads > noise, "n_noise_heads", || {
            format!("n_noise_heads ({noise}) must divide n_heads ({n_heads}) and be smaller, so that groups are equal")
        })?;
        let kv_heads = self.kv_heads();
        require(kv_heads > 0 && kv_heads.is_multiple_of(2), "n_kv_heads", || {
            format!("n_kv_heads ({kv_heads}) must be even: signal and noise heads have keys of their own")
        })?;
        require(noise.is_multiple_of(kv_heads / 2), "n_kv_heads", || {
            format!("n_kv_heads / 2 ({}) must divide n_noise_heads ({noise}): a group shares one pair", kv_heads / 2)
        })?;
        check_window(self.window.as_ref(), dims)?;
        let below_one = |field: &str, value: f64| {
            require(value.is_finite() && value < 1.0, field, || {
                format!("{field} ({value}) must be a number below 1: heads are scaled by 1 - lambda_init")
            })
        };
        require(self.subln_init.is_finite() && self.subln_init > 0.0, "subln_init", || {
            format!("subln_init ({}) must be a number above 0", self.subln_init)
        })?;
        match &self.lambda_init {
            LambdaInit::Constant(value) => below_one("lambda_init.constant", *value),
            LambdaInit::Each(values) => {
                require(values.len() == dims.n_layers, "lambda_init.each", || {
                    format!("lambda_init.each lists {} numbers for n_layers ({})", values.len(), dims.n_layers)
                })?;
                values.iter().try_for_each(|&value| below_one("lambda_init.each", value))
            }
            LambdaInit::Paper | LambdaInit::Motif => Ok(()),
        }
    }

    fn init(&self, dims: &Dims, device: &Device) -> GroupedDifferential {
        let (d_model, width, kv_heads) = (dims.d_model, self.head_dim(dims), self.kv_heads());
        let n_signal = self.n_heads - self.n_noise_heads;
        let project = |d_output| linear(d_model, d_output, false, INIT_STD, device);
        let lambda = || Param::from_tensor(random([width], Distribution::Normal(0.0, LAMBDA_STD), device));
        GroupedDifferential {
            q_proj: project(self.n_heads * width),
            k_proj: project(kv_heads * width),
            v_proj: project(kv_heads * width),
            o_proj: linear(n_signal * 2 * width, d_model, false, residual_std(dims.n_layers), device),
            lambda_q1: lambda(),
            lambda_k1: lambda(),
            lambda_q2: lambda(),
            lambda_k2: lambda(),
            subln: self
                .subln
                .then(|| Subln { weight: Param::from_tensor(Tensor::full([2 * width], self.subln_init, device)) }),
            lambda_init: self.lambda_init.of_layer(dims.layer),
            n_heads: self.n_heads,
            n_noise: self.n_noise_heads,
            n_pairs: kv_heads / 2,
            window: window_of(self.window.as_ref(), dims.layer),
        }
    }

    fn head_dim(&self, dims: &Dims) -> usize {
        self.head_dim.unwrap_or(dims.d_model / self.n_heads.max(1))
    }

    fn cost(&self, dims: &Dims) -> Cost {
        let (d_model, width) = (dims.d_model as u64, self.head_dim(dims) as u64);
        let (heads, kv_heads) = (self.n_heads as u64, self.kv_heads() as u64);
        let signals = heads - self.n_noise_heads as u64;
        let matrices = d_model * width * (heads + 2 * kv_heads + 2 * signals);
        let vectors = 4 * width + if self.subln { 2 * width } else { 0 };
        Cost {
            parameters: matrices + vectors,
            flops_per_token: 2 * matrices,
            // Scores have width d, values width 2d.
            flops_per_pair: 2 * heads * width + 4 * heads * width,
            kv_cache_elements_per_token: 2 * kv_heads * width,
            // What each head attended to, before noise is subtracted.
            kept_elements_per_token: 2 * width * heads,
            window: window_of(self.window.as_ref(), dims.layer).map(|window| window as u64),
            ..Cost::default()
        }
    }

    fn observes() -> &'static [Observed] {
        const ALL: [Observed; 8] = [SCORES[0], SCORES[1], SCORES[2], NOISE[0], NOISE[1], NOISE[2], LAMBDA, CANCELLED];
        &ALL
    }

    fn families() -> &'static [Family] {
        std::slice::from_ref(&FAMILY)
    }

    fn published(layers: &[&Self], _dims: &Dims, form: Form) -> Result<Published, String> {
        let own = uniform(layers)?;
        if !own.subln || own.window.is_some() || form != Form::Llama {
            return Err("Motif's family has subln, RMSNorm, SwiGLU, wholly rotated heads and no window".into());
        }
        // Motif's code computes λ_init from the layer's index; the constants that were trained with are stated beside.
        let lambdas = (0..layers.len()).map(|layer| own.lambda_init.of_layer(layer)).collect();
        let mut keys = vec![
            ("num_attention_heads", Setting::Count(own.n_heads)),
            ("num_noise_heads", Setting::Count(own.n_noise_heads)),
            ("num_key_value_heads", Setting::Count(own.kv_heads())),
            ("attn_rms_norm_eps", Setting::Number(SUBLN_EPS)),
            ("lambda_init", Setting::Numbers(lambdas)),
        ];
        if own.subln_init != quiet() {
            keys.push(("subln_init", Setting::Number(own.subln_init)));
        }
        Ok(Published { family: &FAMILY, keys })
    }

    fn read_published<'de, D: Deserializer<'de>>(_: &Family, keys: D, dims: &Dims) -> Result<Vec<Self>, D::Error> {
        let keys = MotifKeys::deserialize(keys)?;
        let (n_heads, n_noise_heads) = (keys.num_attention_heads, keys.num_noise_heads);
        let (given, layers) = (keys.lambda_init.as_ref().map_or(dims.n_layers, Vec::len), dims.n_layers);
        if given != layers {
            let problem =
                format!("lambda_init has {given} numbers for num_hidden_layers ({layers}): give one per layer");
            return Err(D::Error::custom(problem));
        }
        Ok(vec![Self {
            n_heads,
            n_noise_heads,
            n_kv_heads: keys.num_key_value_heads.filter(|&kv_heads| Some(kv_heads) != n_noise_heads.checked_mul(2)),
            head_dim: own_width(keys.head_dim, n_heads, dims),
            window: None,
            lambda_init: keys.lambda_init.map_or(LambdaInit::Motif, LambdaInit::of),
            subln: true,
            subln_init: keys.subln_init.unwrap_or_else(quiet),
        }])
    }

    fn grown(&self, dims: &Dims, signal_heads: usize) -> Result<Self, String> {
        Ok(Self {
            n_heads: (self.n_heads - self.n_noise_heads) * signal_heads + self.n_noise_heads,
            n_kv_heads: Some(self.kv_heads()),
            head_dim: Some(self.head_dim(dims)),
            ..self.clone()
        })
    }

    fn repeated_channels(&self, dims: &Dims, signal_heads: usize, of: HeadChannels) -> Option<Vec<usize>> {
        let signals = self.n_heads / self.n_noise_heads - 1;
        // Noise heads, at the end of their groups, write no output; values are twice as wide.
        let (stripe, width) = match of {
            HeadChannels::Queries => (signals + 1, self.head_dim(dims)),
            HeadChannels::Outputs => (signals, 2 * self.head_dim(dims)),
        };
        let heads = (0..self.n_noise_heads * stripe).flat_map(|head| {
            let times = if head % stripe < signals { signal_heads } else { 1 };
            std::iter::repeat_n(head, times)
        });
        Some(heads.flat_map(|head| head * width..(head + 1) * width).collect())
    }

    fn moved(self, sources: &[usize]) -> Self {
        let of = |layer: &usize| self.lambda_init.of_layer(*layer);
        let lambda_init = match (&self.lambda_init, sources) {
            (LambdaInit::Constant(value), _) => LambdaInit::Constant(*value),
            (_, [layer]) => LambdaInit::Constant(of(layer)),
            _ => LambdaInit::Each(sources.iter().map(of).collect()),
        };
        Self { lambda_init, window: moved_window(self.window, sources), ..self }
    }

    fn wiring(&self) -> Result<Vec<Wiring>, &'static str> {
        let stripe = self.n_heads / self.n_noise_heads.max(1);
        let signals = stripe - 1;
        let keys = key_heads(self.n_heads, self.n_noise_heads, self.kv_heads() / 2).into_iter().enumerate();
        let of = |(head, key): (usize, usize)| {
            let first = head / stripe * signals;
            let outputs = match head % stripe {
                noise if noise == signals => first..first + signals,
                signal => first + signal..first + signal + 1,
            };
            Wiring { outputs, ..Wiring::new(head, key, key / 2) }
        };
        Ok(keys.map(of).collect())
    }

    fn example() -> Self {
        Self {
            n_heads: 6,
            n_noise_heads: 2,
            n_kv_heads: Some(2),
            head_dim: Some(4),
            lambda_init: LambdaInit::Paper,
            subln: true,
            subln_init: quiet(),
            window: Some(PerLayerCount::Same(5)),
        }
    }
}

/// The norm of signal heads after the subtraction; one weight vector for all heads of a layer.
#[derive(Module, Debug)]
pub struct Subln {
    /// `[2 * head_dim]`
    pub weight: Param<Tensor<1>>,
}

/// A layer of grouped differential attention.
#[derive(Module, Debug)]
pub struct GroupedDifferential {
    /// `[d_model, n_heads * head_dim]`, striped: each group's signal heads, then its noise head
    pub q_proj: Linear,
    /// `[d_model, n_kv_heads * head_dim]`: even heads for signals, odd ones for noises
    pub k_proj: Linear,
    /// `[d_model, n_kv_heads * head_dim]`: one value of width 2 head_dim per pair
    pub v_proj: Linear,
    /// `[n_signal_heads * 2 * head_dim, d_model]`
    pub o_proj: Linear,
    /// `[head_dim]`
    pub lambda_q1: Param<Tensor<1>>,
    /// `[head_dim]`
    pub lambda_k1: Param<Tensor<1>>,
    /// `[head_dim]`
    pub lambda_q2: Param<Tensor<1>>,
    /// `[head_dim]`
    pub lambda_k2: Param<Tensor<1>>,
    /// `None` where switched off
    pub subln: Option<Subln>,
    lambda_init: f64,
    n_heads: usize,
    n_noise: usize,
    n_pairs: usize,
    window: Option<usize>,
}

/// The key head of each (striped) query head: of a pair, the even one serves signals and the odd one noises.
fn key_heads(n_heads: usize, n_noise: usize, n_pairs: usize) -> Vec<usize> {
    let (stripe, per_pair) = (n_heads / n_noise, n_noise / n_pairs);
    (0..n_heads).map(|head| 2 * (head / stripe / per_pair) + usize::from(head % stripe == stripe - 1)).collect()
}

impl GroupedDifferential {
    /// `[1]`: λ, in f32 whatever the compute type.
    pub fn lambda(&self) -> Tensor<1> {
        let exp_dot = |q: &Param<Tensor<1>>, k: &Param<Tensor<1>>| (q.val() * k.val()).sum().exp();
        exp_dot(&self.lambda_q1, &self.lambda_k1) - exp_dot(&self.lambda_q2, &self.lambda_k2) + self.lambda_init
    }

    /// The signals (or noises) among the striped heads.
    fn striped(&self, noise: bool, device: &Device) -> Tensor<1, Int> {
        let stripe = self.n_heads / self.n_noise;
        let heads = (0..self.n_heads).filter(|head| (head % stripe == stripe - 1) == noise);
        Tensor::from_data(TensorData::from(heads.map(|head| head as i32).collect::<Vec<_>>().as_slice()), device)
    }

    /// Statistics of the heads, signals and noises apart.
    fn observe(&self, seen: Statistics, heads: Tensor<4>, lambda: Tensor<1>) -> Observation {
        let ratio = self.n_heads / self.n_noise - 1;
        let (heads, lambda) = (heads.detach(), lambda.detach());
        let [signals, noises] = [false, true].map(|noise| self.striped(noise, &lambda.device()));
        let of = |numbers: &Tensor<1>, heads: &Tensor<1, Int>| numbers.clone().select(0, heads.clone());
        let mut observation = Observation::default();
        for (rows, heads) in [(&SCORES, &signals), (&NOISE, &noises)] {
            observation.scores(rows, [&seen.entropy, &seen.first_key_mass, &seen.largest_score].map(|x| of(x, heads)));
        }
        observation.number(LAMBDA, lambda.clone());
        let signal = heads.clone().select(1, signals);
        observation.number(CANCELLED, cancelled_share(signal, difference(heads, lambda.clone(), ratio)));
        // Weights are heads of one batch row whose "channels" are keys.
        observation.maps =
            seen.weights.map(|weights| difference(weights.unsqueeze::<4>(), lambda.clone(), ratio).squeeze_dim::<3>(0));
        observation.span_mass = seen.span_mass.map(|mass| difference(mass, lambda, ratio));
        observation
    }
}

impl Mechanism for GroupedDifferential {
    type Cache = KvCache;

    fn forward(&self, hidden: Tensor<3>, call: Call<'_, KvCache>) -> Attended {
        let ratio = self.n_heads / self.n_noise - 1;
        let (adapters, sites) = (call.adapters, call.sites);
        let q = adapters.project("q_proj", &self.q_proj, hidden.clone());
        let k = adapters.project("k_proj", &self.k_proj, hidden.clone());
        let v = adapters.project("v_proj", &self.v_proj, hidden);
        let q = sites.query(call.rope, split_heads(q, self.n_heads));
        let k = sites.key(call.rope, split_heads(k, 2 * self.n_pairs));
        let v = sites.at(KvSite::V, split_heads(v, self.n_pairs)); // [batch, n_pairs, seq, 2 * head_dim]
        let keys = key_heads(self.n_heads, self.n_noise, self.n_pairs);
        let values = keys.iter().map(|key_head| key_head / 2).collect();
        let Within { keys: k, values: v, mask, query_offset } = within(self.window, call.mask, call.cache, [k, v]);
        let options = AttentionOptions {
            mask: Some(&mask),
            query_offset,
            bias: call.bias.cloned(),
            keys: HeadMap::Each(keys),
            values: HeadMap::Each(values),
            statistics: call.observe.measure(),
            ..Default::default()
        };
        let attended = sites.attend(q, k, v, options); // [batch, n_heads, seq, 2 * head_dim], striped
        let (heads, lambda) = (attended.hidden, self.lambda());
        let seen = attended.statistics.map(|seen| self.observe(seen, heads.clone(), lambda.clone()));
        let combined = match &self.subln {
            Some(subln) => {
                let how = Combination { ratio, eps: SUBLN_EPS, factor: 1.0 - self.lambda_init };
                subtract_noise(heads, lambda, subln.weight.val(), how)
            }
            None => difference(heads, lambda, ratio),
        };
        let hidden = sites.out(adapters, &self.o_proj, join_heads(combined), self.n_heads - self.n_noise);
        Attended { hidden, penalty: None, seen }
    }
}

/// `[signal heads]`: the share of each signal head's energy that the subtraction takes away, `1 - |O1 - λ O2|² / |O1|²`
/// over batch, positions and channels. Negative where the subtraction adds energy. Chosen by us.
fn cancelled_share(signal: Tensor<4>, difference: Tensor<4>) -> Tensor<1> {
    let energy = |x: Tensor<4>| x.square().sum_dims_squeeze::<1, _>(&[0, 2, 3]);
    (energy(difference) / energy(signal).clamp_min(1e-30)).neg() + 1.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lambda_init_of_paper_and_motif() {
        let close = |a: f64, b: f64| assert!((a - b).abs() < 5e-5, "{a} is not {b}");
        close(LambdaInit::Paper.of_layer(0), 0.2);
        close(LambdaInit::Motif.of_layer(0), -0.00992);
        close(LambdaInit::Motif.of_layer(3), 0.4707);
        close(LambdaInit::Constant(0.5).of_layer(7), 0.5);
    }

    #[test]
    fn heads_that_do_not_divide_are_refused_by_name() {
        let dims = Dims::example();
        let good = GroupedDifferentialConfig::example();
        assert!(good.validate(&dims).is_ok());
        let field = |config: GroupedDifferentialConfig| config.validate(&dims).err().map(|e| e.field);
        assert_eq!(
            field(GroupedDifferentialConfig { n_noise_heads: 4, ..good.clone() }).as_deref(),
            Some("n_noise_heads")
        );
        assert_eq!(
            field(GroupedDifferentialConfig { n_noise_heads: 6, ..good.clone() }).as_deref(),
            Some("n_noise_heads")
        );
        assert_eq!(
            field(GroupedDifferentialConfig { n_kv_heads: Some(3), ..good.clone() }).as_deref(),
            Some("n_kv_heads")
        );
        assert_eq!(
            field(GroupedDifferentialConfig { n_kv_heads: Some(8), ..good.clone() }).as_deref(),
            Some("n_kv_heads")
        );
        let silent = GroupedDifferentialConfig { subln_init: 0.0, ..good.clone() };
        assert_eq!(field(silent).as_deref(), Some("subln_init"));
        let constant = LambdaInit::Constant(1.0);
        let field_of_constant = field(GroupedDifferentialConfig { lambda_init: constant, ..good });
        assert_eq!(field_of_constant.as_deref(), Some("lambda_init.constant"));
    }
}
