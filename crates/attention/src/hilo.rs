//! HiLo attention over a grid of tokens (Pan, Cai and Zhuang 2022, arXiv 2205.13213; code of LITv2, commit 7501c86).
//!
//! Some heads see high frequencies: softmax attention inside windows of s × s tokens. The others see low frequencies: every
//! token asks, the means of all windows answer.
//!
//! ```text
//! Hi-Fi:  softmax(q kᵀ / √e) v          q, k, v of the tokens of one window
//! Lo-Fi:  softmax(q mean(k)ᵀ / √e) mean(v)   q of every token, k and v of the windows' means (taken before the projection)
//! out = [Hi-Fi | Lo-Fi]                 along channels, each after an output projection of its own
//! ```
//! α is the share of heads for low frequencies, rounded down; s = 1 makes all of them low and windows single tokens, which is
//! ordinary attention. There is no position bias and no projection across the two parts.
//!
//! Where s does not divide the grid, the classification code refuses, and the detection code adds zeros on the right and at
//! the bottom that answer as keys and count in the means. Here what is added is hidden, unless `compat_padding` asks for the
//! latter. Left out: dropout, which the authors' code accepts and ignores.

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use polyhead_kernels::{AttentionOptions, Mask, attention};
use serde::{Deserialize, Serialize};

use crate::config::require;
use crate::projection::{INIT_STD, join_heads, linear, split_heads};
use crate::{
    Adapters, Attended, Call, ConfigError, Cost, Dims, Mechanism, MechanismConfig, NoCache, Observation, Observed,
    QuerySite, Site, Sites, Wiring,
};

/// Settings of HiLo attention.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct HiloConfig {
    /// Heads of both kinds together; they divide d_model.
    pub n_heads: usize,
    /// Side of a window, in tokens. Default: 2, as in LITv2's third stage.
    #[serde(default = "window")]
    pub window: usize,
    /// Share of the heads for low frequencies, from 0 to 1. Default: 0.9, as in LITv2.
    #[serde(default = "alpha")]
    pub alpha: f64,
    /// Biases on the query, key and value projections. Default: true, as in LITv2.
    #[serde(default = "yes")]
    pub qkv_bias: bool,
    /// Let the zeros that fill up the last windows answer as keys and count in means, as the authors' detection code does. For
    /// comparisons only. Default: false.
    #[serde(default)]
    pub compat_padding: bool,
}

fn window() -> usize {
    2
}

fn alpha() -> f64 {
    0.9
}

fn yes() -> bool {
    true
}

impl HiloConfig {
    /// Heads for low frequencies; the others are for high ones.
    pub fn lofi_heads(&self) -> usize {
        // Rounded down after the product in f64, as the authors' code does: 12 heads and 0.7 give 8.
        if self.window == 1 { self.n_heads } else { (self.n_heads as f64 * self.alpha) as usize }
    }

    /// Channels of the heads for low frequencies and of those for high ones.
    fn widths(&self, d_model: usize) -> [u64; 2] {
        let low = self.lofi_heads() * (d_model / self.n_heads);
        [low as u64, (d_model - low) as u64]
    }

    /// Multiplications of a forward pass over `tokens`, each with its addition, as the authors count them: projections, scores
    /// and sums of values, without padding. Twice that is what the rest of Polyhead calls operations.
    pub fn multiply_adds(&self, d_model: usize, tokens: usize) -> u64 {
        let (d, n, area) = (d_model as u64, tokens as u64, (self.window * self.window) as u64);
        let [low, high] = self.widths(d_model);
        let hifi = n * high * (3 * d + high) + 2 * area * n * high;
        let lofi = n * low * (d + low) + 2 * n / area * d * low + 2 * n * n / area * low;
        hifi + lofi
    }
}

impl MechanismConfig for HiloConfig {
    type Layer = Hilo;

    fn validate(&self, dims: &Dims) -> Result<(), ConfigError> {
        let d_model = dims.d_model;
        require(self.n_heads > 0 && d_model.is_multiple_of(self.n_heads), "n_heads", || {
            format!("n_heads ({}) must be at least 1 and divide d_model ({d_model})", self.n_heads)
        })?;
        require(self.window > 0, "window", || "window (0) must be at least 1; 1 gives ordinary attention".into())?;
        require((0.0..=1.0).contains(&self.alpha), "alpha", || {
            format!("alpha ({}) must be between 0 (windows only) and 1 (their means only)", self.alpha)
        })?;
        let [rows, columns] = dims.grid.ok_or_else(|| {
            ConfigError::new(
                "",
                "hilo mixes a grid, in which neither texts nor a class token have a place: take it for \
                 model.classifier.vision_transformer, with another pooling than class_token",
            )
        })?;
        require(self.window <= rows.max(columns), "window", || {
            format!("window ({}) must not be larger than the {rows} x {columns} patches", self.window)
        })
    }

    fn check_causal(&self) -> Result<(), ConfigError> {
        Err(ConfigError::new("", "hilo reads all positions of a grid, which a decoder must not: it is for images"))
    }

    fn init(&self, dims: &Dims, device: &Device) -> Hilo {
        let d_model = dims.d_model;
        let (low, width) = (self.lofi_heads(), d_model / self.n_heads);
        let high = self.n_heads - low;
        let project = |d_input, d_output, bias| linear(d_input, d_output, bias, INIT_STD, device);
        Hilo {
            hifi: (high > 0).then(|| HiFi {
                qkv_proj: project(d_model, 3 * high * width, self.qkv_bias),
                o_proj: project(high * width, high * width, true),
                n_heads: high,
            }),
            lofi: (low > 0).then(|| LoFi {
                q_proj: project(d_model, low * width, self.qkv_bias),
                kv_proj: project(d_model, 2 * low * width, self.qkv_bias),
                o_proj: project(low * width, low * width, true),
                n_heads: low,
            }),
            window: self.window,
            compat_padding: self.compat_padding,
        }
    }

    fn head_dim(&self, dims: &Dims) -> usize {
        dims.d_model / self.n_heads.max(1)
    }

    /// Only the parameters: what a pass costs depends on the grid, see [`multiply_adds`](Self::multiply_adds).
    fn cost(&self, dims: &Dims) -> Cost {
        let part = |width: u64| {
            let biases = if self.qkv_bias { 3 * width } else { 0 };
            3 * dims.d_model as u64 * width + width * width + width + biases
        };
        let parameters = self.widths(dims.d_model).into_iter().filter(|width| *width > 0).map(part).sum();
        Cost { parameters, ..Cost::default() }
    }

    fn encoder_flops(&self, dims: &Dims, positions: u64) -> u64 {
        2 * self.multiply_adds(dims.d_model, positions as usize)
    }

    fn observes() -> &'static [Observed] {
        &[]
    }

    fn wiring(&self) -> Result<Vec<Wiring>, &'static str> {
        Err("attend inside windows and to the means of windows: they have no keys and values by positions")
    }

    fn example() -> Self {
        Self { n_heads: 4, window: 2, alpha: 0.5, qkv_bias: true, compat_padding: false }
    }

    fn absent(site: Site) -> Option<&'static str> {
        (site != QuerySite::Z.into()).then_some(
            "its heads attend inside windows and to the means of windows, each kind with an output projection of its own: \
             only z is of heads and positions",
        )
    }

    fn exemptions() -> &'static [(&'static str, &'static str)] {
        const BOTH_WAYS: &str = "every position reads its whole window and the means of all others";
        &[
            ("no_look_ahead", BOTH_WAYS),
            ("cached_decoding", BOTH_WAYS),
            ("sites_no_look_ahead", BOTH_WAYS),
            ("sites_cached_decoding", BOTH_WAYS),
            ("documents", "images are not packed"),
            ("maps", "its windows and their means have no map over all positions"),
            ("adapters", "adapters are for decoders"),
        ]
    }
}

/// A layer of HiLo attention.
#[derive(Module, Debug)]
pub struct Hilo {
    /// Attention inside windows; `None` where all heads are for low frequencies.
    pub hifi: Option<HiFi>,
    /// Attention to the means of windows; `None` where all heads are for high frequencies.
    pub lofi: Option<LoFi>,
    window: usize,
    compat_padding: bool,
}

/// The heads for high frequencies.
#[derive(Module, Debug)]
pub struct HiFi {
    /// `[d_model, 3 * heads * head_dim]`: queries, keys, values.
    pub qkv_proj: Linear,
    /// `[heads * head_dim, heads * head_dim]`
    pub o_proj: Linear,
    n_heads: usize,
}

/// The heads for low frequencies.
#[derive(Module, Debug)]
pub struct LoFi {
    /// `[d_model, heads * head_dim]`
    pub q_proj: Linear,
    /// `[d_model, 2 * heads * head_dim]`: keys, values.
    pub kv_proj: Linear,
    /// `[heads * head_dim, heads * head_dim]`
    pub o_proj: Linear,
    n_heads: usize,
}

/// Statistics of the two parts.
struct Windows {
    /// `[batch, windows, window², d_model]`; zeros where nothing is.
    tokens: Tensor<4>,
    /// `[batch, windows, window², 1]`: 1 where a token is, 0 where none is; `None` where all are.
    present: Option<Tensor<4>>,
}

impl Mechanism for Hilo {
    type Cache = NoCache;

    /// High frequencies first, along the channels.
    ///
    /// # Panics
    /// If the call names no grid, which `validate` refuses.
    fn forward(&self, hidden: Tensor<3>, call: Call<'_, NoCache>) -> Attended {
        let grid = call.grid.expect("validate: a grid");
        let [batch, tokens, _] = hidden.dims();
        let padding = call.mask.real_queries(batch, 0, tokens).map(|real| {
            let padding: Vec<i32> = real.into_iter().map(|real| i32::from(!real)).collect();
            Tensor::<2, Int>::from_data(TensorData::new(padding, [batch, tokens]), &hidden.device()).equal_elem(1)
        });
        let hidden = self.mix(hidden, grid, padding.as_ref(), call.sites);
        // There are no maps to show, but layers are counted.
        let seen = call.observe.wanted().then(Observation::default);
        Attended { hidden, penalty: None, seen }
    }
}

impl Hilo {
    /// # Shapes
    /// - x: `[batch, rows * columns, d_model]`, row by row; grid: `[rows, columns]`
    /// - padding: `[batch, rows * columns]`, true where a token is padding, which no other attends to
    /// - output: `[batch, rows * columns, d_model]`, high frequencies first
    fn mix(&self, x: Tensor<3>, grid: [usize; 2], padding: Option<&Tensor<2, Bool>>, sites: Sites<'_>) -> Tensor<3> {
        let dims = x.dims();
        let x = match padding {
            Some(padding) => x.mask_fill(padding.clone().unsqueeze_dim::<3>(2).expand(dims), 0.0),
            None => x,
        };
        let windows = self.windows(&x, grid, padding);
        let high = self.hifi.as_ref().map(|part| part.heads(&windows));
        let low = self.lofi.as_ref().map(|part| part.heads(x, &windows));
        let adapters = Adapters::default();
        let (of_high, of_low) = (self.hifi.as_ref().zip(high), self.lofi.as_ref().zip(low));
        let z = [QuerySite::Z.into()];
        if sites.touch(&z) {
            let high = of_high.iter().map(|(_, heads)| join(heads.clone(), grid, self.window));
            let all: Vec<Tensor<3>> = high.chain(of_low.iter().map(|(_, heads)| heads.clone())).collect();
            let n_heads = [self.hifi.as_ref().map(|part| part.n_heads), self.lofi.as_ref().map(|part| part.n_heads)];
            let all = sites.z(Tensor::cat(all, 2), n_heads.into_iter().flatten().sum());
            if sites.edit(&z) {
                let width = of_high.as_ref().map_or(0, |(_, heads)| heads.dims()[3]);
                let low = all.dims()[2] - width;
                let high = self.hifi.iter().map(|part| (&part.o_proj, all.clone().narrow(2, 0, width)));
                let parts = high.chain(self.lofi.iter().map(|part| (&part.o_proj, all.clone().narrow(2, width, low))));
                return Tensor::cat(
                    parts.map(|(o_proj, heads)| adapters.project("o_proj", o_proj, heads)).collect(),
                    2,
                );
            }
        }
        let high = of_high.map(|(part, heads)| {
            let [batch, count, area, width] = heads.dims();
            let written = adapters.project("o_proj", &part.o_proj, heads.reshape([batch * count, area, width]));
            join(written.reshape([batch, count, area, width]), grid, self.window)
        });
        let low = of_low.map(|(part, heads)| adapters.project("o_proj", &part.o_proj, heads));
        Tensor::cat(high.into_iter().chain(low).collect(), 2)
    }

    fn windows(&self, x: &Tensor<3>, grid: [usize; 2], padding: Option<&Tensor<2, Bool>>) -> Windows {
        let [batch, _, d_model] = x.dims();
        let [rows, columns] = grid;
        let tokens = cut(x.clone().reshape([batch, rows, columns, d_model]), self.window, 0.0);
        let whole = grid.iter().all(|size| size.is_multiple_of(self.window)) || self.compat_padding;
        let present = (padding.is_some() || !whole).then(|| {
            let present = match padding {
                Some(padding) => padding.clone().bool_not().float().reshape([batch, rows, columns, 1]),
                None => Tensor::ones([batch, rows, columns, 1], &x.device()),
            };
            cut(present, self.window, if self.compat_padding { 1.0 } else { 0.0 })
        });
        Windows { tokens, present }
    }
}

impl HiFi {
    /// `[batch, windows, window², heads * head_dim]`: what the heads attend to.
    fn heads(&self, windows: &Windows) -> Tensor<4> {
        let [batch, count, area, d_model] = windows.tokens.dims();
        let adapters = Adapters::default();
        let tokens = windows.tokens.clone().reshape([batch * count, area, d_model]);
        let qkv = adapters.project("qkv_proj", &self.qkv_proj, tokens);
        let width = qkv.dims()[2] / 3;
        let [q, k, v] = [0, 1, 2].map(|part| split_heads(qkv.clone().narrow(2, part * width, width), self.n_heads));
        let mask = windows.present.clone().map(|present| {
            let hidden = present.reshape([batch * count, 1, 1, area]).equal_elem(0.0);
            Mask::none().with_dense(hidden.expand([batch * count, 1, area, area]))
        });
        let options = AttentionOptions { mask: mask.as_ref(), ..Default::default() };
        join_heads(attention(q, k, v, &options).hidden).reshape([batch, count, area, width])
    }
}

impl LoFi {
    /// `[batch, rows * columns, heads * head_dim]`: what the heads attend to.
    fn heads(&self, x: Tensor<3>, windows: &Windows) -> Tensor<3> {
        let [batch, tokens, _] = x.dims();
        let [_, count, area, d_model] = windows.tokens.dims();
        let adapters = Adapters::default();
        let sums = windows.tokens.clone().sum_dim(2);
        let (means, mask) = match &windows.present {
            None => (sums / area as f64, None),
            Some(present) => {
                let present = present.clone().sum_dim(2); // [batch, windows, 1, 1]
                let empty = present.clone().reshape([batch, 1, 1, count]).equal_elem(0.0);
                let mask = Mask::none().with_dense(empty.expand([batch, 1, tokens, count]));
                (sums / present.clamp_min(1.0), Some(mask))
            }
        };
        let q = split_heads(adapters.project("q_proj", &self.q_proj, x), self.n_heads);
        let kv = adapters.project("kv_proj", &self.kv_proj, means.reshape([batch, count, d_model]));
        let width = kv.dims()[2] / 2;
        let [k, v] = [0, 1].map(|part| split_heads(kv.clone().narrow(2, part * width, width), self.n_heads));
        let options = AttentionOptions { mask: mask.as_ref(), ..Default::default() };
        join_heads(attention(q, k, v, &options).hidden)
    }
}

/// `[batch, rows, columns, channels]` to `[batch, windows, side², channels]`, filled up with `filling` on the right and at the
/// bottom.
fn cut(map: Tensor<4>, side: usize, filling: f64) -> Tensor<4> {
    let map = fill(fill(map, 1, side, filling), 2, side, filling);
    let [batch, rows, columns, channels] = map.dims();
    let (down, across) = (rows / side, columns / side);
    let windows = map.reshape([batch, down, side, across, side, channels]).swap_dims(2, 3);
    windows.reshape([batch, down * across, side * side, channels])
}

/// The inverse of [`cut`]: `[batch, rows * columns, channels]`.
fn join(windows: Tensor<4>, [rows, columns]: [usize; 2], side: usize) -> Tensor<3> {
    let [batch, _, _, channels] = windows.dims();
    let (down, across) = (rows.div_ceil(side), columns.div_ceil(side));
    let lines = windows.reshape([batch, down, across, side, side, channels]).swap_dims(2, 3);
    let map = lines.reshape([batch, down * side, across * side, channels]);
    map.narrow(1, 0, rows).narrow(2, 0, columns).reshape([batch, rows * columns, channels])
}

/// Lengthens an axis to the next multiple of `side`.
fn fill(map: Tensor<4>, axis: usize, side: usize, filling: f64) -> Tensor<4> {
    let mut dims = map.dims();
    let missing = dims[axis].next_multiple_of(side) - dims[axis];
    if missing == 0 {
        return map;
    }
    dims[axis] = missing;
    let more = Tensor::full(dims, filling, &map.device());
    Tensor::cat(vec![map, more], axis)
}

#[cfg(test)]
mod tests;
