//! Softmax attention: MHA (Vaswani et al. 2017, arXiv 1706.03762), MQA (Shazeer 2019, arXiv 1911.02150) and
//! GQA (Ainslie et al. 2023, arXiv 2305.13245), which differ only in how many query heads share a key/value head.
//!
//! With a window per layer it is the attention of Mistral and Gemma; Gemma 2 (arXiv 2408.00118) also caps the scores.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};
use polyhead_kernels::{AttentionOptions, rms_norm};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::cache::KvCache;
use crate::config::{PerLayerCount, require};
use crate::projection::{INIT_STD, join_heads, linear, residual_std, split_heads};
use crate::published::uniform;
use crate::settings::head_settings;
use crate::window::{Within, check_window, moved_window, window_of, within};
use crate::{
    Adapters, Attended, Call, ConfigError, Conversion, Cost, Dims, Family, Form, HeadCounts, KvSite, Mechanism,
    MechanismConfig, Observation, Projection, Published, Setting, SharedHeads, Window, Wiring,
};

head_settings! {
    /// Settings of softmax attention.
    #[derive(Default)]
    pub struct SoftmaxConfig {
        /// Query heads.
        pub n_heads: usize,
        @n_kv_heads,
        @head_dim,
        @flag qkv_bias "Biases on the query, key and value projections, as in Qwen2. Default: false.",
        @flag o_bias "A bias on the output projection, as in GPT-NeoX. Default: false.",
        @flag qk_norm "Normalise every query and key head before it is rotated, as in Qwen3. Default: false.",
        @window,
        /// Bound of the scores, softcap · tanh(score / softcap), as in Gemma 2. Default: none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub softcap: Option<f64>,
        /// Factor of the scores; Gemma 2 has query_pre_attn_scalar^-0.5. Default: head_dim^-0.5.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub scale: Option<f64>,
    }
}

impl SoftmaxConfig {
    /// Key/value heads with the default filled in.
    pub fn kv_heads(&self) -> usize {
        self.n_kv_heads.unwrap_or(self.n_heads)
    }

    /// The first setting that changes scores or hides keys, by name; other mechanisms and formats have none of them.
    pub fn beyond_plain(&self) -> Option<&'static str> {
        let set =
            [("window", self.window.is_some()), ("softcap", self.softcap.is_some()), ("scale", self.scale.is_some())];
        set.into_iter().find_map(|(name, set)| set.then_some(name))
    }
}

impl MechanismConfig for SoftmaxConfig {
    type Layer = Softmax;

    fn validate(&self, dims: &Dims) -> Result<(), ConfigError> {
        check_heads(self.n_heads, self.head_dim, dims)?;
        let kv_heads = self.kv_heads();
        require(kv_heads > 0 && self.n_heads.is_multiple_of(kv_heads), "n_kv_heads", || {
            format!("n_kv_heads ({kv_heads}) must divide n_heads ({})", self.n_heads)
        })?;
        for (field, value) in [("softcap", self.softcap), ("scale", self.scale)] {
            require(value.is_none_or(|value| value.is_finite() && value > 0.0), field, || {
                format!("{field} ({}) must be a number above 0", value.unwrap_or_default())
            })?;
        }
        check_window(self.window.as_ref(), dims)
    }

    fn init(&self, dims: &Dims, device: &Device) -> Softmax {
        let (d_model, width, kv_heads) = (dims.d_model, self.head_dim(dims), self.kv_heads());
        let project = |d_output| linear(d_model, d_output, self.qkv_bias, INIT_STD, device);
        let norm = || HeadNorm::where_set(self.qk_norm, width, device);
        Softmax {
            q_proj: project(self.n_heads * width),
            k_proj: project(kv_heads * width),
            v_proj: project(kv_heads * width),
            o_proj: linear(self.n_heads * width, d_model, self.o_bias, residual_std(dims.n_layers), device),
            q_norm: norm(),
            k_norm: norm(),
            n_heads: self.n_heads,
            n_kv_heads: kv_heads,
            norm_eps: dims.norm_eps,
            window: window_of(self.window.as_ref(), dims.layer),
            softcap: self.softcap,
            scale: self.scale,
        }
    }

    fn head_dim(&self, dims: &Dims) -> usize {
        self.head_dim.unwrap_or(dims.d_model / self.n_heads.max(1))
    }

    fn cost(&self, dims: &Dims) -> Cost {
        let (d_model, width) = (dims.d_model as u64, self.head_dim(dims) as u64);
        let (heads, kv_heads) = (self.n_heads as u64, self.kv_heads() as u64);
        let weights = d_model * width * (2 * heads + 2 * kv_heads);
        let counted = |present: bool, parameters: u64| if present { parameters } else { 0 };
        let biases = counted(self.qkv_bias, width * (heads + 2 * kv_heads)) + counted(self.o_bias, d_model);
        Cost {
            parameters: weights + biases + counted(self.qk_norm, 2 * width),
            flops_per_token: 2 * weights,
            flops_per_pair: 4 * heads * width,
            kv_cache_elements_per_token: 2 * kv_heads * width,
            window: window_of(self.window.as_ref(), dims.layer).map(|window| window as u64),
            ..Cost::default()
        }
    }

    fn families() -> &'static [Family] {
        FAMILIES
    }

    fn published(layers: &[&Self], dims: &Dims, form: Form) -> Result<Published, String> {
        let own = uniform(layers)?;
        let windows: Vec<_> = (0..layers.len()).map(|layer| window_of(own.window.as_ref(), layer)).collect();
        let without = Self { window: None, ..own.clone() };
        if let Some(setting) = without.beyond_plain() {
            return Err(format!("softmax attention with {setting} is in no family that can be written"));
        }
        let Self { n_heads, qkv_bias, o_bias, qk_norm, .. } = *own;
        let both = qkv_bias == o_bias;
        let bias = ("attention_bias", Setting::Flag(qkv_bias));
        let plain = own.window.is_none();
        let everywhere = windows[0].filter(|_| windows.iter().all(|window| *window == windows[0]));
        let (class, more) = match form {
            Form::GptNeox if !plain => return Err("GPT-NeoX, the family with LayerNorm and GELU, has no window".into()),
            Form::GptNeox
                if own.kv_heads() == n_heads && both && !qk_norm && own.head_dim(dims) * n_heads == dims.d_model =>
            {
                ("GPTNeoXForCausalLM", vec![bias])
            }
            Form::GptNeox => {
                return Err("GPT-NeoX, the family with LayerNorm and GELU, has as many key/value heads as query heads, biases on all \
                            projections or none, no norms of queries and keys, and n_heads * head_dim = d_model; --expanded repeats \
                            key/value heads"
                    .into());
            }
            Form::Llama if qk_norm && both => ("Qwen3ForCausalLM", [vec![bias], qwen_window(&windows)?].concat()),
            Form::Llama if qk_norm => {
                return Err("of families with qk_norm, Qwen3 has qkv_bias and o_bias or neither".into());
            }
            Form::Llama if both && plain => ("LlamaForCausalLM", vec![bias, ("mlp_bias", Setting::Flag(false))]),
            Form::Llama if both => match everywhere.filter(|_| !qkv_bias) {
                Some(window) => ("MistralForCausalLM", vec![("sliding_window", Setting::Count(window))]),
                None => {
                    return Err("of families with windows and without qk_norm, Mistral has the same window in all layers and no \
                                biases, and Qwen2 has qkv_bias alone"
                        .into());
                }
            },
            Form::Llama if qkv_bias => ("Qwen2ForCausalLM", qwen_window(&windows)?),
            Form::Llama => return Err("o_bias without qkv_bias is in no published model".into()),
        };
        let heads = [("num_attention_heads", n_heads), ("num_key_value_heads", own.kv_heads())];
        let heads = heads.map(|(key, count)| (key, Setting::Count(count)));
        Ok(Published { family: family(class), keys: heads.into_iter().chain(more).collect() })
    }

    fn read_published<'de, D: Deserializer<'de>>(family: &Family, keys: D, dims: &Dims) -> Result<Vec<Self>, D::Error> {
        let keys = HeadKeys::deserialize(keys)?;
        // GPT-NeoX has neither key/value heads nor a width of its own.
        let neox = family.form == Form::GptNeox;
        let n_heads = keys.num_attention_heads;
        // Mistral has no biases, whatever the key says, and Qwen2 has three of four.
        let biases = keys.attention_bias.unwrap_or(neox) && family.class != "MistralForCausalLM";
        let qwen2 = family.class == "Qwen2ForCausalLM";
        let window = keys.window(family, dims).map_err(D::Error::custom)?;
        Ok(vec![Self {
            n_heads,
            n_kv_heads: keys.num_key_value_heads.filter(|&kv_heads| kv_heads != n_heads && !neox),
            head_dim: own_width(keys.head_dim, n_heads, dims).filter(|_| !neox),
            qkv_bias: qwen2 || biases,
            o_bias: !qwen2 && biases,
            qk_norm: family.class == "Qwen3ForCausalLM",
            window,
            ..Self::default()
        }])
    }

    fn conversions() -> &'static [Conversion] {
        &[Conversion { name: "grouped_query", from: &["softmax"] }]
    }

    fn grown(&self, dims: &Dims, signal_heads: usize) -> Result<Self, String> {
        match signal_heads {
            1 => Ok(Self { head_dim: Some(self.head_dim(dims)), ..self.clone() }),
            _ => Err("has no signal heads; it grows in width and depth".into()),
        }
    }

    fn moved(self, sources: &[usize]) -> Self {
        Self { window: moved_window(self.window, sources), ..self }
    }

    fn head_counts(&self, _: usize) -> Option<HeadCounts> {
        Some(HeadCounts::KeysAndValues([self.kv_heads(); 2]))
    }

    fn shared_heads(&self) -> Result<SharedHeads, &'static str> {
        let share = self.n_heads / self.kv_heads();
        let map: Vec<usize> = (0..self.n_heads).map(|head| head / share).collect();
        Ok(SharedHeads { softmax: Self { n_kv_heads: None, ..self.clone() }, maps: [map.clone(), map] })
    }

    fn wiring(&self) -> Result<Vec<Wiring>, &'static str> {
        Ok(Wiring::even(self.n_heads, self.kv_heads()))
    }

    fn example() -> Self {
        Self {
            n_heads: 4,
            n_kv_heads: Some(2),
            qkv_bias: true,
            o_bias: true,
            qk_norm: true,
            window: Some(PerLayerCount::Each(vec![0, 5, 0, 5])),
            softcap: Some(3.0),
            scale: Some(0.5),
            ..Self::default()
        }
    }
}

/// The keys of a config.json that are about heads, as transformers has them.
#[derive(Debug, Deserialize)]
struct HeadKeys {
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    attention_bias: Option<bool>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
}

/// What transformers calls layers without a window and with one.
const LAYER_TYPES: [&str; 2] = ["full_attention", "sliding_attention"];

impl HeadKeys {
    /// The window of each layer: of Mistral in all of them; of Qwen where it is switched on, in the layers that `layer_types`
    /// names, else in those from `max_window_layers` on. `None` for full attention in all layers.
    ///
    /// # Errors
    /// Names the key that says something else, and the rule.
    fn window(&self, family: &Family, dims: &Dims) -> Result<Option<PerLayerCount>, String> {
        let used = match family.window {
            Window::Always => true,
            Window::IfSwitchedOn => self.use_sliding_window == Some(true),
            Window::Never => false,
        };
        let Some(window) = self.sliding_window.filter(|_| used) else { return Ok(None) };
        if window == 0 {
            return Err("sliding_window (0) must be at least 1: null is full attention".into());
        }
        let types = self.layer_types.as_deref();
        if let Some(other) = types.into_iter().flatten().find(|kind| !LAYER_TYPES.contains(&kind.as_str())) {
            return Err(format!(
                "layer_types names {other:?}; {} and {} are supported",
                LAYER_TYPES[0], LAYER_TYPES[1]
            ));
        }
        if let Some(given) = types.map(<[String]>::len).filter(|&given| given != dims.n_layers) {
            return Err(format!("layer_types lists {given} layers for num_hidden_layers ({})", dims.n_layers));
        }
        let slides = |layer: usize| match types {
            Some(types) => types[layer] == LAYER_TYPES[1],
            None => family.window == Window::Always || layer >= self.max_window_layers.unwrap_or(0),
        };
        let each: Vec<usize> = (0..dims.n_layers).map(|layer| if slides(layer) { window } else { 0 }).collect();
        if family.window == Window::Always && each.contains(&0) {
            return Err(format!(
                "layer_types has layers without a window, and transformers gives every layer of {} one: leave layer_types out, or \
                 name the class that has both",
                family.class
            ));
        }
        Ok(match each.iter().all(|one| *one == each[0]) {
            true => Some(each[0]).filter(|&window| window > 0).map(PerLayerCount::Same),
            false => Some(PerLayerCount::Each(each)),
        })
    }
}

/// What Qwen's config.json says of the windows of its layers.
///
/// # Errors
/// If they differ in size.
fn qwen_window(windows: &[Option<usize>]) -> Result<Vec<(&'static str, Setting)>, String> {
    let Some(window) = windows.iter().copied().flatten().next() else {
        return Ok(vec![("use_sliding_window", Setting::Flag(false)), ("sliding_window", Setting::Null)]);
    };
    if windows.iter().flatten().any(|other| *other != window) {
        return Err("Qwen has windows of one size".into());
    }
    let types = windows.iter().map(|window| LAYER_TYPES[usize::from(window.is_some())]).collect();
    // Where transformers 4 does not read layer_types, it is in the layers from max_window_layers on.
    let first = windows.iter().position(Option::is_some).unwrap_or_default();
    Ok(vec![
        ("use_sliding_window", Setting::Flag(true)),
        ("sliding_window", Setting::Count(window)),
        ("max_window_layers", Setting::Count(first)),
        ("layer_types", Setting::Names(types)),
    ])
}

/// The width of heads of a config.json, where it is not the default.
pub(crate) fn own_width(head_dim: Option<usize>, n_heads: usize, dims: &Dims) -> Option<usize> {
    head_dim.filter(|width| width.checked_mul(n_heads) != Some(dims.d_model))
}

/// The family of a class, which has to be one of softmax attention's.
fn family(class: &str) -> &'static Family {
    FAMILIES.iter().find(|family| family.class == class).expect("a family of this file")
}

/// Defaults: `configuration_*.py` of each model in transformers 5.24.
const FAMILIES: &[Family] = &[
    Family::llama("LlamaForCausalLM", "llama"),
    Family { defaults: MISTRAL, window: Window::Always, ..Family::llama("MistralForCausalLM", "mistral") },
    Family { defaults: QWEN2, window: Window::IfSwitchedOn, ..Family::llama("Qwen2ForCausalLM", "qwen2") },
    Family { defaults: QWEN3, window: Window::IfSwitchedOn, ..Family::llama("Qwen3ForCausalLM", "qwen3") },
    Family {
        form: Form::GptNeox,
        defaults: GPT_NEOX,
        projections: &[
            ("q_proj", Projection::Third("query_key_value", 0)),
            ("k_proj", Projection::Third("query_key_value", 1)),
            ("v_proj", Projection::Third("query_key_value", 2)),
            ("o_proj", Projection::Named("dense")),
        ],
        ..Family::llama("GPTNeoXForCausalLM", "gpt_neox")
    },
];
const MISTRAL: &[(&str, Setting)] = &[
    ("num_key_value_heads", Setting::Count(8)),
    ("max_position_embeddings", Setting::Count(131_072)),
    ("sliding_window", Setting::Count(4096)),
];
const QWEN2: &[(&str, Setting)] = &[
    ("num_key_value_heads", Setting::Count(32)),
    ("max_position_embeddings", Setting::Count(32_768)),
    ("sliding_window", Setting::Count(4096)),
    ("max_window_layers", Setting::Count(28)),
];
const QWEN3: &[(&str, Setting)] = &[
    ("num_key_value_heads", Setting::Count(32)),
    ("head_dim", Setting::Count(128)),
    ("max_position_embeddings", Setting::Count(32_768)),
    ("sliding_window", Setting::Count(4096)),
    ("max_window_layers", Setting::Count(28)),
];
const GPT_NEOX: &[(&str, Setting)] =
    &[("max_position_embeddings", Setting::Count(2048)), ("layer_norm_eps", Setting::Number(1e-5))];

/// Rules about query heads that every mechanism shares.
///
/// # Errors
/// Where there are no heads, they do not divide d_model, or rotary positions meet an odd width.
pub(crate) fn check_heads(n_heads: usize, head_dim: Option<usize>, dims: &Dims) -> Result<(), ConfigError> {
    require(n_heads > 0, "n_heads", || "n_heads (0) must be at least 1".into())?;
    match head_dim {
        None => require(dims.d_model.is_multiple_of(n_heads), "n_heads", || {
            format!("n_heads ({n_heads}) must divide d_model ({}), or head_dim must be given", dims.d_model)
        })?,
        Some(width) => require(width > 0, "head_dim", || "head_dim (0) must be at least 1".into())?,
    }
    let width = head_dim.unwrap_or(dims.d_model / n_heads);
    check_width("head_dim", width, "n_heads", n_heads)?;
    let field = if head_dim.is_some() { "head_dim" } else { "n_heads" };
    require(!dims.rope || width.is_multiple_of(2), field, || {
        format!("head_dim ({width}) must be even for rotary positions; rope = false switches them off")
    })
}

/// Channels of all heads of a layer at most: more than any model has, and every product of two sizes stays far from the end
/// of the numbers. Chosen by us.
const WIDEST: usize = 1 << 24;

/// Refuses heads that are wider together than any layer.
///
/// # Errors
/// Names both sizes and the rule.
pub(crate) fn check_width(width_field: &str, width: usize, count_field: &str, count: usize) -> Result<(), ConfigError> {
    require(width.checked_mul(count).is_some_and(|all| all <= WIDEST), width_field, || {
        format!("{width_field} ({width}) times {count_field} ({count}) must be at most {WIDEST}")
    })
}

/// The norm of query or key heads; one weight vector for all heads of a layer.
#[derive(Module, Debug)]
pub struct HeadNorm {
    /// `[head_dim]`
    pub weight: Param<Tensor<1>>,
}

impl HeadNorm {
    /// A fresh one, where the setting is on.
    pub(crate) fn where_set(qk_norm: bool, head_dim: usize, device: &Device) -> Option<Self> {
        qk_norm.then(|| Self { weight: Param::from_tensor(Tensor::ones([head_dim], device)) })
    }
}

/// `[.., head_dim]` heads, normalised where there is a norm.
pub(crate) fn normed(heads: Tensor<4>, norm: Option<&HeadNorm>, eps: f64) -> Tensor<4> {
    match norm {
        Some(norm) => rms_norm(heads, norm.weight.val(), eps),
        None => heads,
    }
}

/// A layer of softmax attention.
#[derive(Module, Debug)]
pub struct Softmax {
    /// `[d_model, n_heads * head_dim]`
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
    n_heads: usize,
    n_kv_heads: usize,
    norm_eps: f64,
    window: Option<usize>,
    softcap: Option<f64>,
    scale: Option<f64>,
}

impl Softmax {
    /// Query heads.
    pub fn query_heads(&self) -> usize {
        self.n_heads
    }

    /// `[batch, heads, seq, head_dim]`: queries (0), keys (1) or values (2) of what the layer reads, before rotation.
    pub fn projected_heads(&self, hidden: Tensor<3>, kind: usize) -> Tensor<4> {
        let project = |layer: &Linear| Adapters::default().project("", layer, hidden.clone());
        match kind {
            0 => self.heads(project(&self.q_proj), self.n_heads, self.q_norm.as_ref()),
            1 => self.heads(project(&self.k_proj), self.n_kv_heads, self.k_norm.as_ref()),
            _ => split_heads(project(&self.v_proj), self.n_kv_heads),
        }
    }

    /// `[batch, seq, n_heads * head_dim]` to `[batch, n_heads, seq, head_dim]`, normalised where the layer has the norm.
    fn heads(&self, x: Tensor<3>, n_heads: usize, norm: Option<&HeadNorm>) -> Tensor<4> {
        let [batch, seq, channels] = x.dims();
        let heads = x.reshape([batch, seq, n_heads, channels / n_heads]);
        normed(heads, norm, self.norm_eps).swap_dims(1, 2)
    }

    /// From queries, keys and values as they are projected, `[batch, seq, channels]`, to what goes into the output projection;
    /// with the logit of a sink for every query head, `[n_heads]`, where there are sinks.
    pub(crate) fn mix(
        &self,
        [q, k, v]: [Tensor<3>; 3],
        mut call: Call<'_, KvCache>,
        sinks: Option<Tensor<1>>,
    ) -> (Tensor<3>, Option<Observation>) {
        let mut sites = call.sites;
        let q = sites.query(call.rope, self.heads(q, self.n_heads, self.q_norm.as_ref()));
        let k = sites.key(call.rope, self.heads(k, self.n_kv_heads, self.k_norm.as_ref()));
        let v = sites.at(KvSite::V, split_heads(v, self.n_kv_heads));
        let Within { keys, values, mask, query_offset } =
            within(self.window, call.mask, call.cache.as_deref_mut(), [k, v]);
        let options = AttentionOptions {
            mask: Some(&mask),
            query_offset,
            scale: self.scale,
            softcap: self.softcap,
            sinks,
            bias: call.bias.cloned(),
            statistics: call.observe.measure(),
            ..Default::default()
        };
        if call.cache.is_some_and(|cache| cache.evict(&q, &keys, &options)) {
            // A cache that drops keys reads all it has.
            sites.sparse = None;
        }
        let attended = sites.attend(q, keys, values, options); // [batch, n_heads, seq, head_dim]
        (join_heads(attended.hidden), attended.statistics.map(Observation::of))
    }

    /// See [`Mechanism::forward`]; `sinks` as in [`mix`](Self::mix).
    pub(crate) fn attend(&self, hidden: Tensor<3>, call: Call<'_, KvCache>, sinks: Option<Tensor<1>>) -> Attended {
        let (adapters, sites) = (call.adapters, call.sites);
        let q = adapters.project("q_proj", &self.q_proj, hidden.clone());
        let k = adapters.project("k_proj", &self.k_proj, hidden.clone());
        let v = adapters.project("v_proj", &self.v_proj, hidden);
        let (heads, seen) = self.mix([q, k, v], call, sinks);
        Attended { hidden: sites.out(adapters, &self.o_proj, heads, self.n_heads), penalty: None, seen }
    }
}

impl Mechanism for Softmax {
    type Cache = KvCache;

    fn forward(&self, hidden: Tensor<3>, call: Call<'_, KvCache>) -> Attended {
        self.attend(hidden, call, None)
    }
}
