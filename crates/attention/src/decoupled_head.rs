//! Decoupled-Head Attention (arXiv 2406.06567): every layer has numbers of its own of key heads and of value heads, and
//! query heads share them by maps of their own.
//!
//! ```text
//! o_h = softmax(q_h k_{mK(h)}ᵀ / sqrt(d)) v_{mV(h)}
//! ```
//!
//! Identity maps are MHA; equal contiguous maps are GQA. The cache holds the heads that there are, not what query heads
//! make of them. While heads are being *fused*, the layer still has all key and value heads of its parent, each mixed with
//! those of its group by an operator that begins as the identity:
//!
//! ```text
//! E_i = sum_j Ω_ij head_j    j in the group of i;    Ω := (1 - a) Ω + a P Ω,  P averages over each group
//! ```
//!
//! The paper has parents with a key and a value head for every query head. Of a parent with grouped queries, `i` and `j`
//! count what its groups share, and query heads go on sharing it (ours; the equations stay as they are).
//!
//! Mixing by one number per head and turning by position commute, as all heads turn alike, so that heads are mixed before
//! they are rotated and a fused head is exact. Norms of queries and keys (Qwen3's) come between mixing and turning, which keeps
//! that: a fused head is normalised as the mixed ones were. The authors published no code and the text of their fusion loss could not
//! be read: the scatter below is a reconstruction, `a` ("anneal") is ours.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Tensor, TensorData};
use polyhead_kernels::{AttentionOptions, HeadMap, in_type, total};
use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};

use crate::cache::KvCache;
use crate::config::require;
use crate::observe::SCORES;
use crate::projection::{INIT_STD, join_heads, linear, residual_std, split_heads};
use crate::settings::head_settings;
use crate::softmax::{HeadNorm, check_heads, normed, own_width};
use crate::window::{Within, check_window, moved_window, window_of, within};
use crate::{
    Attended, Call, ConfigError, Conversion, Cost, Dims, Family, Form, HeadCounts, KvSite, Mechanism, MechanismConfig,
    Observation, Observed, Published, Setting, SharedHeads, SoftmaxConfig, Wiring,
};

/// Decoupled heads under LLaMA's names, the maps in config.json.
static FAMILY: Family = Family::remote("DecoupledHeadForCausalLM", "decoupled_head");

/// What is left to fuse.
const SCATTER: [Observed; 2] = [
    Observed::new(
        "key_scatter",
        "what is left to fuse of the keys: squared distances to the means of their groups",
        "",
    ),
    Observed::new(
        "value_scatter",
        "what is left to fuse of the values: squared distances to the means of their groups",
        "",
    ),
];

head_settings! {
    /// Settings of decoupled-head attention. `polyhead convert` finds the maps.
    #[derive(Default)]
    pub struct DecoupledHeadConfig {
        /// Query heads.
        pub n_heads: usize,
        @head_dim,
        /// For each query head, which key head it reads: numbers from 0, none left out.
        pub key_map: Vec<usize>,
        /// For each query head, which value head it reads: numbers from 0, none left out.
        pub value_map: Vec<usize>,
        @flag qkv_bias "Biases on the query, key and value projections. Default: false.",
        @flag o_bias "A bias on the output projection. Default: false.",
        @flag qk_norm "Normalise every query and key head before it is rotated, as in Qwen3. Default: false.",
        @window,
        /// Whether the heads of a group are still to be fused: the layer has `n_kv_heads` key and value heads then, mixed within
        /// the groups of the maps. Default: false.
        #[serde(default)]
        pub fusing: bool,
        @n_kv_heads "Key and value heads before fusion, with `fusing`: a divisor of n_heads; query heads that share one have the same entry\n\
            in the maps. Default: n_heads.",
    } => fn unshared
}

impl DecoupledHeadConfig {
    /// Key heads and value heads that the maps lead to.
    pub fn fused_heads(&self) -> [usize; 2] {
        [&self.key_map, &self.value_map].map(|map| map.iter().max().map_or(0, |last| last + 1))
    }

    /// Softmax attention with the heads before fusion.
    pub fn before_fusion(&self) -> SoftmaxConfig {
        self.unshared()
    }

    /// Key heads, and as many value heads, before fusion.
    pub fn heads_to_fuse(&self) -> usize {
        self.n_kv_heads.unwrap_or(self.n_heads)
    }

    /// For each key head and each value head before fusion, its group.
    pub fn groups(&self) -> [Vec<usize>; 2] {
        let share = (self.n_heads / self.heads_to_fuse().max(1)).max(1);
        [&self.key_map, &self.value_map].map(|map| map.iter().copied().step_by(share).collect())
    }

    /// Key heads and value heads that the layer has.
    fn heads(&self) -> [usize; 2] {
        if self.fusing { [self.heads_to_fuse(); 2] } else { self.fused_heads() }
    }

    /// Checks `n_kv_heads`, and the maps with it.
    fn check_heads_to_fuse(&self) -> Result<(), ConfigError> {
        let Some(kv_heads) = self.n_kv_heads else { return Ok(()) };
        require(self.fusing, "n_kv_heads", || {
            format!("n_kv_heads ({kv_heads}) goes with fusing = true: the maps tell how many heads a layer has else")
        })?;
        require(kv_heads > 0 && self.n_heads.is_multiple_of(kv_heads), "n_kv_heads", || {
            format!("n_kv_heads ({kv_heads}) must divide n_heads ({})", self.n_heads)
        })?;
        let share = self.n_heads / kv_heads;
        for (field, map) in [("key_map", &self.key_map), ("value_map", &self.value_map)] {
            let split = map.chunks(share).position(|shared| shared.iter().any(|label| *label != shared[0]));
            require(split.is_none(), field, || {
                let first = split.unwrap_or_default() * share;
                format!(
                    "{field} divides query heads {first} to {}, which share one of n_kv_heads ({kv_heads}) heads: give them \
                     the same entry",
                    first + share - 1
                )
            })?;
        }
        Ok(())
    }
}

impl MechanismConfig for DecoupledHeadConfig {
    type Layer = DecoupledHead;

    fn validate(&self, dims: &Dims) -> Result<(), ConfigError> {
        check_heads(self.n_heads, self.head_dim, dims)?;
        for (field, map) in [("key_map", &self.key_map), ("value_map", &self.value_map)] {
            require(map.len() == self.n_heads, field, || {
                format!("{field} has {} entries for n_heads ({}): give one per query head", map.len(), self.n_heads)
            })?;
            let heads = map.iter().max().map_or(0, |last| last + 1);
            let unread = (0..heads).find(|head| !map.contains(head));
            require(unread.is_none(), field, || {
                format!(
                    "{field} leaves out head {}: heads are numbered from 0 without gaps",
                    unread.unwrap_or_default()
                )
            })?;
        }
        check_window(self.window.as_ref(), dims)?;
        self.check_heads_to_fuse()
    }

    fn init(&self, dims: &Dims, device: &Device) -> DecoupledHead {
        let (d_model, width, [keys, values]) = (dims.d_model, self.head_dim(dims), self.heads());
        let project = |d_output| linear(d_model, d_output, self.qkv_bias, INIT_STD, device);
        let mut layer = DecoupledHead {
            q_proj: project(self.n_heads * width),
            k_proj: project(keys * width),
            v_proj: project(values * width),
            o_proj: linear(self.n_heads * width, d_model, self.o_bias, residual_std(dims.n_layers), device),
            q_norm: HeadNorm::where_set(self.qk_norm, width, device),
            k_norm: HeadNorm::where_set(self.qk_norm, width, device),
            fusion: None,
            norm_eps: dims.norm_eps,
            window: window_of(self.window.as_ref(), dims.layer),
            maps: [self.key_map.clone(), self.value_map.clone()],
            groups: self.groups(),
        };
        if self.fusing {
            let energy = [energy(&layer.k_proj), energy(&layer.v_proj)];
            layer.fusion = Some(Fusion::identity(self.heads_to_fuse(), Tensor::cat(energy.to_vec(), 0)));
        }
        layer
    }

    fn head_dim(&self, dims: &Dims) -> usize {
        self.head_dim.unwrap_or(dims.d_model / self.n_heads.max(1))
    }

    fn cost(&self, dims: &Dims) -> Cost {
        let (d_model, width) = (dims.d_model as u64, self.head_dim(dims) as u64);
        let (heads, [keys, values]) = (self.n_heads as u64, self.heads().map(|heads| heads as u64));
        let weights = d_model * width * (2 * heads + keys + values);
        let counted = |present: bool, parameters: u64| if present { parameters } else { 0 };
        let mixed = self.heads_to_fuse() as u64;
        let biases = counted(self.qkv_bias, width * (heads + keys + values)) + counted(self.o_bias, d_model);
        Cost {
            parameters: weights
                + biases
                + counted(self.qk_norm, 2 * width)
                + counted(self.fusing, 2 * mixed * mixed + 3),
            flops_per_token: 2 * weights + counted(self.fusing, 4 * mixed * mixed * width),
            flops_per_pair: 4 * heads * width,
            kv_cache_elements_per_token: (keys + values) * width,
            window: window_of(self.window.as_ref(), dims.layer).map(|window| window as u64),
            ..Cost::default()
        }
    }

    fn observes() -> &'static [Observed] {
        const ALL: [Observed; 5] = [SCORES[0], SCORES[1], SCORES[2], SCATTER[0], SCATTER[1]];
        &ALL
    }

    fn families() -> &'static [Family] {
        std::slice::from_ref(&FAMILY)
    }

    fn published(layers: &[&Self], _dims: &Dims, form: Form) -> Result<Published, String> {
        let first = layers[0];
        let alike = |layer: &&Self| {
            Self { key_map: first.key_map.clone(), value_map: first.value_map.clone(), ..(*layer).clone() } == *first
        };
        let beyond = first.qk_norm || first.window.is_some();
        if form != Form::Llama || first.fusing || beyond || !layers.iter().all(alike) {
            return Err("such heads are written for others in LLaMA's form only, fused, without window and qk_norm, and with as many \
                        query heads and the same biases in all layers; --expanded writes them as heads of the parent's form"
                .into());
        }
        let maps = |of: fn(&Self) -> &Vec<usize>| Setting::Maps(layers.iter().map(|layer| of(layer).clone()).collect());
        let keys = vec![
            ("num_attention_heads", Setting::Count(first.n_heads)),
            ("attention_bias", Setting::Flag(first.qkv_bias)),
            ("dha_output_bias", Setting::Flag(first.o_bias)),
            ("dha_key_map", maps(|layer| &layer.key_map)),
            ("dha_value_map", maps(|layer| &layer.value_map)),
        ];
        Ok(Published { family: &FAMILY, keys })
    }

    fn read_published<'de, D: Deserializer<'de>>(_: &Family, keys: D, dims: &Dims) -> Result<Vec<Self>, D::Error> {
        let MapKeys {
            num_attention_heads: n_heads,
            head_dim,
            attention_bias,
            dha_key_map,
            dha_value_map,
            dha_output_bias,
        } = MapKeys::deserialize(keys)?;
        for (name, maps) in [("dha_key_map", &dha_key_map), ("dha_value_map", &dha_value_map)] {
            if maps.len() != dims.n_layers {
                let (given, layers) = (maps.len(), dims.n_layers);
                let problem = format!("{name} has {given} lists for num_hidden_layers ({layers}): give one per layer");
                return Err(D::Error::custom(problem));
            }
            if maps.iter().flatten().any(|&head| head >= n_heads) {
                let problem = format!("{name} names a head that is not below num_attention_heads ({n_heads})");
                return Err(D::Error::custom(problem));
            }
        }
        let (head_dim, qkv_bias) = (own_width(head_dim, n_heads, dims), attention_bias.unwrap_or(false));
        let o_bias = dha_output_bias.unwrap_or(qkv_bias);
        let layer =
            |(key_map, value_map)| Self { n_heads, head_dim, key_map, value_map, qkv_bias, o_bias, ..Self::default() };
        Ok(dha_key_map.into_iter().zip(dha_value_map).map(layer).collect())
    }

    fn conversions() -> &'static [Conversion] {
        &[Conversion { name: "decoupled_head", from: &["softmax", "key_driven", "decoupled_head"] }]
    }

    fn head_counts(&self, _: usize) -> Option<HeadCounts> {
        Some(HeadCounts::KeysAndValues(self.fused_heads()))
    }

    fn fuses(&self) -> bool {
        self.fusing
    }

    fn shared_heads(&self) -> Result<SharedHeads, &'static str> {
        if self.fusing {
            return Err("its heads are still being fused: collapse them with convert --to decoupled_head");
        }
        let softmax = SoftmaxConfig { n_kv_heads: None, ..self.unshared() };
        Ok(SharedHeads { softmax, maps: [self.key_map.clone(), self.value_map.clone()] })
    }

    fn wiring(&self) -> Result<Vec<Wiring>, &'static str> {
        if self.fusing {
            return Ok(Wiring::even(self.n_heads, self.heads_to_fuse()));
        }
        let maps = self.key_map.iter().zip(&self.value_map).enumerate();
        Ok(maps.map(|(head, (&key, &value))| Wiring::new(head, key, value)).collect())
    }

    fn example() -> Self {
        Self {
            n_heads: 4,
            head_dim: None,
            key_map: vec![0, 1, 0, 2],
            value_map: vec![0, 0, 1, 0],
            qkv_bias: true,
            o_bias: true,
            ..Self::default()
        }
    }

    fn moved(self, sources: &[usize]) -> Self {
        Self { window: moved_window(self.window, sources), ..self }
    }
}

/// The keys of a config.json with decoupled heads: for each layer, which head every query head reads.
#[derive(Debug, Deserialize)]
struct MapKeys {
    num_attention_heads: usize,
    head_dim: Option<usize>,
    attention_bias: Option<bool>,
    dha_key_map: Vec<Vec<usize>>,
    dha_value_map: Vec<Vec<usize>>,
    dha_output_bias: Option<bool>,
}

/// A layer of decoupled-head attention.
#[derive(Module, Debug)]
pub struct DecoupledHead {
    /// `[d_model, n_heads * head_dim]`
    pub q_proj: Linear,
    /// `[d_model, key heads * head_dim]`
    pub k_proj: Linear,
    /// `[d_model, value heads * head_dim]`
    pub v_proj: Linear,
    /// `[n_heads * head_dim, d_model]`
    pub o_proj: Linear,
    /// `None` where switched off
    pub q_norm: Option<HeadNorm>,
    /// `None` where switched off
    pub k_norm: Option<HeadNorm>,
    /// Only while heads are fused.
    pub fusion: Option<Fusion>,
    norm_eps: f64,
    window: Option<usize>,
    /// For each query head, its key head and its value head
    #[module(skip)]
    maps: [Vec<usize>; 2],
    /// For each key head and value head before fusion, its group
    #[module(skip)]
    groups: [Vec<usize>; 2],
}

/// The mixing weights of each group's heads while they are fused.
#[derive(Module, Debug)]
pub struct Fusion {
    /// `[heads * heads]`, of the heads before fusion, row-major: Ω of the keys. A vector, so that it does not decay towards nothing.
    pub key_operator: Param<Tensor<1>>,
    /// `[heads * heads]`, row-major: Ω of the values.
    pub value_operator: Param<Tensor<1>>,
    /// `[1]`: how far every operator is pulled to the average of its group, 0 to 1. Set, not learned.
    pub anneal: Param<Tensor<1>>,
    /// `[2]`: Z, the squared norms of the key and value projections when fusion began. Not learned.
    pub energy: Param<Tensor<1>>,
}

impl Fusion {
    /// Every head as it is. `energy`: `[2]`, the squared norms of the key and value projections.
    pub fn identity(heads: usize, energy: Tensor<1>) -> Self {
        let device = energy.device();
        let operator = || Param::from_tensor(Tensor::<2>::eye(heads, &device).reshape([heads * heads]));
        let fixed = |value: Tensor<1>| Param::from_tensor(value.detach()).set_require_grad(false);
        Self {
            key_operator: operator(),
            value_operator: operator(),
            anneal: fixed(Tensor::zeros([1], &device)),
            energy: fixed(energy),
        }
    }
}

/// `[1]`: the squared norm of a projection, its bias included.
pub fn energy(projection: &Linear) -> Tensor<1> {
    let square = |tensor: Tensor<1>| total(tensor.square());
    let [inputs, outputs] = projection.weight.dims();
    let weight = square(projection.weight.val().reshape([inputs * outputs]));
    projection.bias.iter().fold(weight, |sum, bias| sum + square(bias.val()))
}

impl DecoupledHead {
    /// `[1]` each: what is left to fuse of keys and values, `sum_i |E_i - mean of i's group|² / Z`. 0 means that the heads
    /// of a group act as one.
    pub fn scatter(&self) -> Option<[Tensor<1>; 2]> {
        let fusion = self.fusion.as_ref()?;
        let [keys, values] = self.operators()?;
        let of = |projection: &Linear, operator: Tensor<2>, at: usize| {
            let group = &self.groups[at];
            let mixed = operator.matmul(heads_of(projection, group.len())); // [heads, head_dim * inputs]
            let centre = average(group, &mixed.device()).matmul(mixed.clone());
            // Heads of zeros are alike, not apart by 0/0.
            total((mixed - centre).square()) / fusion.energy.val().narrow(0, at, 1).clamp_min(1e-12)
        };
        Some([of(&self.k_proj, keys, 0), of(&self.v_proj, values, 1)])
    }

    /// Sets how far operators are pulled to the average of their groups; without effect where nothing is fused.
    pub fn set_anneal(&mut self, share: f64) {
        if let Some(fusion) = &mut self.fusion {
            let value = Tensor::from_floats([share as f32], &fusion.anneal.val().device());
            fusion.anneal = Param::from_tensor(value).set_require_grad(false);
        }
    }

    /// `[heads, heads]` each: the operators of keys and values as they act, groups and annealing considered.
    pub fn operators(&self) -> Option<[Tensor<2>; 2]> {
        let fusion = self.fusion.as_ref()?;
        let act = |operator: &Param<Tensor<1>>, group: &[usize]| {
            let heads = group.len();
            let within = same_group(group, |_| 1.0, &operator.val().device());
            let average = average(group, &operator.val().device());
            let operator = operator.val().reshape([heads, heads]) * within;
            let anneal = fusion.anneal.val().unsqueeze::<2>();
            let averaged = average.matmul(operator.clone());
            operator.clone() + (averaged - operator) * anneal
        };
        let [keys, values] = &self.groups;
        Some([act(&fusion.key_operator, keys), act(&fusion.value_operator, values)])
    }
}

/// `[heads, numbers of a head]`: the heads of a projection, the bias as one more input.
fn heads_of(projection: &Linear, heads: usize) -> Tensor<2> {
    let [inputs, outputs] = projection.weight.dims();
    let width = outputs / heads;
    let weight = projection.weight.val().transpose().reshape([heads, width * inputs]);
    match &projection.bias {
        Some(bias) => Tensor::cat(vec![weight, bias.val().reshape([heads, width])], 1),
        None => weight,
    }
}

/// `[heads, heads]`: `value(size of the group)` where two heads share a group, else 0.
fn same_group(map: &[usize], value: impl Fn(usize) -> f32, device: &Device) -> Tensor<2> {
    let size = |label: usize| map.iter().filter(|&&other| other == label).count();
    let entry = |i: usize, j: usize| if map[i] == map[j] { value(size(map[i])) } else { 0.0 };
    let n = map.len();
    let entries: Vec<f32> = (0..n * n).map(|at| entry(at / n, at % n)).collect();
    Tensor::from_data(TensorData::new(entries, [n, n]), device)
}

/// `[heads, heads]`: P, which averages over each group.
fn average(map: &[usize], device: &Device) -> Tensor<2> {
    same_group(map, |size| 1.0 / size as f32, device)
}

/// Every head mixed by `operator`: `[batch, heads, seq, width]`.
fn mix(heads: Tensor<4>, operator: Tensor<2>) -> Tensor<4> {
    let [batch, n_heads, seq, width] = heads.dims();
    let operator = in_type(operator, heads.dtype()).unsqueeze::<3>().expand([batch, n_heads, n_heads]);
    operator.matmul(heads.reshape([batch, n_heads, seq * width])).reshape([batch, n_heads, seq, width])
}

impl Mechanism for DecoupledHead {
    type Cache = KvCache;

    fn scatter(&self) -> Option<[Tensor<1>; 2]> {
        Self::scatter(self)
    }

    fn set_anneal(&mut self, share: f64) {
        Self::set_anneal(self, share);
    }

    fn forward(&self, hidden: Tensor<3>, call: Call<'_, KvCache>) -> Attended {
        let (adapters, sites, [key_map, value_map]) = (call.adapters, call.sites, &self.maps);
        let counts = match &self.fusion {
            Some(_) => self.groups.each_ref().map(Vec::len),
            None => self.maps.each_ref().map(|map| map.iter().max().map_or(0, |last| last + 1)),
        };
        let q = split_heads(adapters.project("q_proj", &self.q_proj, hidden.clone()), key_map.len());
        let k = split_heads(adapters.project("k_proj", &self.k_proj, hidden.clone()), counts[0]);
        let v = split_heads(adapters.project("v_proj", &self.v_proj, hidden), counts[1]);
        let (k, v) = match self.operators() {
            Some([keys, values]) => (mix(k, keys), mix(v, values)),
            None => (k, v),
        };
        let q = sites.query(call.rope, normed(q, self.q_norm.as_ref(), self.norm_eps));
        let k = sites.key(call.rope, normed(k, self.k_norm.as_ref(), self.norm_eps));
        let v = sites.at(KvSite::V, v);
        let Within { keys: k, values: v, mask, query_offset } = within(self.window, call.mask, call.cache, [k, v]);
        let map = |map: &[usize]| if self.fusion.is_some() { HeadMap::Even } else { HeadMap::Each(map.to_vec()) };
        let options = AttentionOptions {
            mask: Some(&mask),
            query_offset,
            bias: call.bias.cloned(),
            keys: map(key_map),
            values: map(value_map),
            statistics: call.observe.measure(),
            ..Default::default()
        };
        let attended = sites.attend(q, k, v, options); // [batch, n_heads, seq, head_dim]
        let seen = attended.statistics.map(|statistics| {
            let mut seen = Observation::of(statistics);
            for (row, value) in SCATTER.into_iter().zip(self.scatter().into_iter().flatten()) {
                seen.number(row, value.detach());
            }
            seen
        });
        let hidden = sites.out(adapters, &self.o_proj, join_heads(attended.hidden), key_map.len());
        let penalty = self.scatter().map(|[keys, values]| (keys + values) / 2.0);
        Attended { hidden, penalty, seen }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AttentionConfig, PerLayerCount};

    /// Six query heads that share three key and value heads, which are being fused.
    fn fusing() -> DecoupledHeadConfig {
        DecoupledHeadConfig {
            n_heads: 6,
            head_dim: Some(4),
            key_map: vec![0, 0, 1, 1, 0, 0],
            value_map: vec![0, 0, 0, 0, 1, 1],
            fusing: true,
            n_kv_heads: Some(3),
            ..DecoupledHeadConfig::default()
        }
    }

    #[test]
    fn fusing_heads_of_grouped_queries_obeys_the_laws() {
        let fixed = "anneal is set and energy is measured, neither is learned";
        crate::laws::hold(&AttentionConfig::DecoupledHead(fusing()), &[("gradients", fixed)]);
    }

    #[test]
    fn windows_and_norms_obey_the_laws() {
        let more = |config: DecoupledHeadConfig| DecoupledHeadConfig {
            qk_norm: true,
            window: Some(PerLayerCount::Each(vec![0, 5, 0, 5])),
            ..config
        };
        crate::laws::hold(&AttentionConfig::DecoupledHead(more(DecoupledHeadConfig::example())), &[]);
        let fixed = "anneal is set and energy is measured, neither is learned";
        crate::laws::hold(&AttentionConfig::DecoupledHead(more(fusing())), &[("gradients", fixed)]);
    }

    #[test]
    fn maps_and_heads_that_do_not_fit_are_refused_by_name() {
        let problem = |change: fn(&mut DecoupledHeadConfig)| {
            let mut config = fusing();
            change(&mut config);
            config.validate(&Dims::example()).err().map(|error| error.field)
        };
        assert_eq!(problem(|_| {}), None);
        assert_eq!(fusing().groups(), [vec![0, 1, 0], vec![0, 0, 1]]);
        assert_eq!((fusing().heads(), fusing().fused_heads()), ([3, 3], [2, 2]));
        let field = |change| problem(change).unwrap_or_default();
        assert_eq!(field(|config| config.key_map[1] = 1), "key_map");
        assert_eq!(field(|config| config.value_map[5] = 0), "value_map");
        assert_eq!(field(|config| config.n_kv_heads = Some(4)), "n_kv_heads");
        assert_eq!(field(|config| config.n_kv_heads = Some(0)), "n_kv_heads");
        assert_eq!(field(|config| config.fusing = false), "n_kv_heads");
    }
}
