//! The two forms whose weights sum to one along the chunk of a head: the package's product and the true mixture.
//!
//! ```text
//! y_i = (x - (μ + δ_i)) / σ,   σ² = unbiased variance + 1e-8
//! product:  w = ∏ exp(-y_i² / 2c_i²) / sqrt(2π c_i²)
//! mixture:  w = Σ π_i exp(-y_i² / 2c_i²),   π = softmax(weights)
//! out = x w / max(Σ w, 1e-8)          1e-8 is `eps` in both places
//! ```
//! A product of Gaussians in one variable is a Gaussian. With `Λ = Σ 1/c_i²`, `δ* = Σ (δ_i/c_i²) / Λ` and
//! `K = Σ (δ_i - δ*)²/c_i²`, the sum of squares is completed to
//!
//! ```text
//! log w = -½ Λ ((x - μ - δ*)/σ)² - ½ K/σ² - ½ Σ log(2π c_i²)
//! ```
//! so that any number of Gaussians costs as much as one. All but the first term is constant along a chunk and cancels in
//! the division, unless its lower bound is reached: then the weights are what the package's are, and do not sum to one. So
//! more Gaussians add nothing to a head that one with c = Λ^-½ and offset δ* could not do.
//!
//! Both are computed as logarithms, and the largest of a chunk is taken off before the exponential: nothing under- or
//! overflows that the exact result would not.

use std::f64::consts::PI;

use burn::module::{Module, Param};
use burn::tensor::{Bool, Device, Distribution, Tensor, activation};
use polyhead_kernels::random;
use serde::{Deserialize, Serialize};

use super::{Chunks, Moments, check_heads};
use crate::ConfigError;
use crate::config::require;

/// Elements of a head at least: the unbiased variance divides by one less.
const FEWEST_ELEMENTS: usize = 2;
/// In place of the logarithm of 0.
const LOG_ZERO: f64 = -1e30;

/// Fresh widths c.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum WidthInit {
    /// exp(N(0, 1)), as in the package's repository.
    #[default]
    LogNormal,
    /// N(0, 1), as in its release 0.1.5: only c² is used, so the sign means nothing, but c can be next to 0.
    Normal,
    /// This number.
    Constant(f64),
}

/// Settings of the product of Gaussians; 2 parameters per head and Gaussian.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ProductGateConfig {
    /// The axis that is normalised; 0 is the batch, negative numbers count from the last. Default: 1.
    #[serde(default = "one")]
    pub axis: i64,
    /// Heads, each over its share of the axis: 8 in the paper, 4 in the package's example.
    pub n_heads: usize,
    /// Gaussians of a head: 4 in the paper, 5 in the package's example. More than 1 can do no more than 1. Default: 1.
    #[serde(default = "one_gaussian")]
    pub n_gaussians: usize,
    /// c at the start. Default: "log_normal".
    #[serde(default)]
    pub c_init: WidthInit,
    /// Added to the variance, and the least that weights are divided by. Default: 1e-8, which the package's heads and blocks
    /// keep whatever they are told: they hand the number to another argument.
    #[serde(default = "eps", skip_serializing_if = "is_eps")]
    pub eps: f64,
    /// Treat padding as the package does: elements that equal this number are passed on as they are, and count as zeros in mean
    /// and variance; a residual doubles them, so that the next gate takes them for data unless they are 0. For comparisons only;
    /// masks do it right. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compat_padding_value: Option<f64>,
}

/// Settings of the mixture of Gaussians; 3 parameters per head and Gaussian.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MixtureGateConfig {
    /// The axis that is normalised; 0 is the batch, negative numbers count from the last. Default: 1.
    #[serde(default = "one")]
    pub axis: i64,
    /// Heads, each over its share of the axis.
    pub n_heads: usize,
    /// Gaussians of a head.
    pub n_gaussians: usize,
    /// c at the start. Default: "log_normal". The old package's is the constant 2.0, with which all Gaussians of a head begin
    /// equal, get equal gradients and stay equal: one Gaussian, whatever their number.
    #[serde(default)]
    pub c_init: WidthInit,
    /// Added to the variance, and the least that weights are divided by. Default: 1e-8.
    #[serde(default = "eps", skip_serializing_if = "is_eps")]
    pub eps: f64,
    /// Treat padding as the old package does, as in `product`. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compat_padding_value: Option<f64>,
}

fn one() -> i64 {
    1
}

fn eps() -> f64 {
    1e-8
}

#[allow(clippy::float_cmp)] // the default itself
fn is_eps(value: &f64) -> bool {
    *value == eps()
}

fn one_gaussian() -> usize {
    1
}

/// An axis counted from the first, among the batch and `behind` axes.
pub(super) fn resolve(axis: i64, behind: usize) -> Option<usize> {
    let count = behind as i64 + 1;
    let axis = if axis < 0 { axis + count } else { axis };
    (1..count).contains(&axis).then_some(axis as usize)
}

fn check(axis: i64, n_heads: usize, n_gaussians: usize, sizes: &[usize]) -> Result<(), ConfigError> {
    let Some(resolved) = resolve(axis, sizes.len()) else {
        let problem = format!(
            "axis ({axis}) must be 1 to {} or, counted from the last, -1 to -{}: across the batch, samples would mix",
            sizes.len(),
            sizes.len()
        );
        return Err(ConfigError::new("axis", problem));
    };
    check_heads(n_heads, resolved, FEWEST_ELEMENTS, sizes)?;
    require(n_gaussians > 0, "n_gaussians", || "n_gaussians (0) must be at least 1".into())
}

/// The rules about the numbers beside the data.
fn check_numbers(eps: f64, padding: Option<f64>) -> Result<(), ConfigError> {
    require(eps.is_finite() && eps > 0.0, "eps", || format!("eps ({eps}) must be a number above 0"))?;
    require(!padding.is_some_and(f64::is_nan), "compat_padding_value", || {
        "compat_padding_value (nan) equals no number: give a number, or leave it out".into()
    })
}

impl WidthInit {
    fn validate(self) -> Result<(), ConfigError> {
        match self {
            Self::Constant(c) => require(c.is_finite() && c != 0.0, "c_init.constant", || {
                format!("constant ({c}) must be a number other than 0")
            }),
            Self::LogNormal | Self::Normal => Ok(()),
        }
    }

    fn widths(self, shape: [usize; 2], device: &Device) -> Param<Tensor<2>> {
        let normal = || random(shape, Distribution::Normal(0.0, 1.0), device);
        Param::from_tensor(match self {
            Self::LogNormal => normal().exp(),
            Self::Normal => normal(),
            Self::Constant(c) => Tensor::full(shape, c, device),
        })
    }
}

impl ProductGateConfig {
    pub(super) fn validate(&self, sizes: &[usize]) -> Result<(), ConfigError> {
        check(self.axis, self.n_heads, self.n_gaussians, sizes)?;
        self.c_init.validate()?;
        check_numbers(self.eps, self.compat_padding_value)
    }

    pub(super) fn init(&self, sizes: &[usize], device: &Device) -> ProductGate {
        let shape = [self.n_heads, self.n_gaussians];
        ProductGate {
            mean_offset: Param::from_tensor(Tensor::zeros(shape, device)),
            c: self.c_init.widths(shape, device),
            axis: resolve(self.axis, sizes.len()).expect("validate: an axis behind the batch"),
            eps: self.eps,
            padding_value: self.compat_padding_value,
        }
    }
}

impl MixtureGateConfig {
    pub(super) fn validate(&self, sizes: &[usize]) -> Result<(), ConfigError> {
        check(self.axis, self.n_heads, self.n_gaussians, sizes)?;
        self.c_init.validate()?;
        check_numbers(self.eps, self.compat_padding_value)
    }

    pub(super) fn init(&self, sizes: &[usize], device: &Device) -> MixtureGate {
        let shape = [self.n_heads, self.n_gaussians];
        let full = |value: f64| Param::from_tensor(Tensor::full(shape, value, device));
        let axis = resolve(self.axis, sizes.len()).expect("validate: an axis behind the batch");
        let (eps, padding_value) = (self.eps, self.compat_padding_value);
        let c = self.c_init.widths(shape, device);
        MixtureGate { mean_offset: full(0.0), c, weights: full(1.0), axis, eps, padding_value }
    }
}

/// The product of Gaussians.
#[derive(Module, Debug)]
pub struct ProductGate {
    /// `[heads, gaussians]`: δ, in units of the data.
    pub mean_offset: Param<Tensor<2>>,
    /// `[heads, gaussians]`: c, in units of σ.
    pub c: Param<Tensor<2>>,
    pub(super) axis: usize,
    pub(super) eps: f64,
    pub(super) padding_value: Option<f64>,
}

/// The mixture of Gaussians.
#[derive(Module, Debug)]
pub struct MixtureGate {
    /// `[heads, gaussians]`: δ, in units of the data.
    pub mean_offset: Param<Tensor<2>>,
    /// `[heads, gaussians]`: c, in units of σ.
    pub c: Param<Tensor<2>>,
    /// `[heads, gaussians]`: the shares of the Gaussians before their softmax.
    pub weights: Param<Tensor<2>>,
    pub(super) axis: usize,
    pub(super) eps: f64,
    pub(super) padding_value: Option<f64>,
}

impl ProductGate {
    pub(super) fn n_heads(&self) -> usize {
        self.c.dims()[0]
    }

    pub(super) fn weights(&self, chunks: Chunks) -> Tensor<4> {
        let (x, Moments { mean, variance }) = moments(&chunks, self.padding_value);
        let variance = variance + self.eps;
        let own = |parameter: &Param<Tensor<2>>| parameter.val().narrow(0, chunks.heads.start, chunks.heads.len());
        let over_heads = |x: Tensor<2>| x.unsqueeze_dim::<3>(2).unsqueeze::<4>(); // [heads, 1] to [1, heads, 1, 1]
        let (offset, c2) = (own(&self.mean_offset), own(&self.c).square()); // [heads, gaussians]
        let precision = c2.clone().recip().sum_dim(1); // Λ
        let centre = (offset.clone() / c2.clone()).sum_dim(1) / precision.clone(); // δ*
        let spread = ((offset - centre.clone()).square() / c2.clone()).sum_dim(1); // K
        let factor = (c2 * (2.0 * PI)).log().sum_dim(1); // Σ log(2π c²)
        let square = (x - mean - over_heads(centre)).square() * over_heads(precision);
        let log_weights = ((square + over_heads(spread)) / variance + over_heads(factor)) * -0.5;
        normalise(log_weights, chunks.hidden, self.eps)
    }
}

impl MixtureGate {
    pub(super) fn n_heads(&self) -> usize {
        self.c.dims()[0]
    }

    pub(super) fn weights(&self, chunks: Chunks) -> Tensor<4> {
        let (x, Moments { mean, variance }) = moments(&chunks, self.padding_value);
        let variance = variance + self.eps;
        let heads = chunks.heads.clone();
        let own = |values: Tensor<2>| values.narrow(0, heads.start, heads.len());
        let (offset, c2) = (own(self.mean_offset.val()), own(self.c.val()).square()); // [heads, gaussians]
        let log_shares = own(activation::log_softmax(self.weights.val(), 1));
        let centred = x - mean;
        let of_gaussian = |index: usize| {
            let pick = |x: &Tensor<2>| x.clone().narrow(1, index, 1).unsqueeze_dim::<3>(2).unsqueeze::<4>();
            let square = (centred.clone() - pick(&offset)).square() / variance.clone();
            pick(&log_shares) - square / (pick(&c2) * 2.0)
        };
        let logs: Vec<Tensor<4>> = (0..self.c.dims()[1]).map(of_gaussian).collect();
        let largest = logs.iter().cloned().map(Tensor::detach).reduce(Tensor::max_pair).expect("validate: a Gaussian");
        let sum = logs.into_iter().map(|log| (log - largest.clone()).exp()).reduce(|a, b| a + b);
        normalise(sum.expect("validate: a Gaussian").log() + largest, chunks.hidden, self.eps)
    }
}

/// The elements of a chunk, and their moments: padding that is known by its number counts as zeros there, and nowhere else.
fn moments(chunks: &Chunks, padding: Option<f64>) -> (Tensor<4>, Moments) {
    let x = chunks.x.clone();
    let Some(padding) = padding else { return (x, chunks.moments(1.0)) };
    let zeroed = x.clone().mask_fill(x.clone().equal_elem(padding), 0.0);
    let (hidden, heads) = (chunks.hidden.clone(), chunks.heads.clone());
    (x, Chunks { x: zeroed, hidden, heads }.moments(1.0))
}

/// `w / max(Σ w, eps)` along a chunk, `[outer, heads, chunk, inner]`; hidden elements have no weight.
fn normalise(log_weights: Tensor<4>, hidden: Option<Tensor<4, Bool>>, eps: f64) -> Tensor<4> {
    let log_weights = match &hidden {
        Some(hidden) => log_weights.mask_fill(hidden.clone(), LOG_ZERO),
        None => log_weights,
    };
    // A common factor cancels in the division, as long as the lower bound has it too.
    let largest = log_weights.clone().detach().max_dim(2);
    let bound = largest.clone().neg().exp() * eps;
    let weights = (log_weights - largest).exp();
    let sum = weights.clone().sum_dim(2);
    let weights = weights / sum.clone().mask_where(sum.lower(bound.clone()), bound);
    match hidden {
        Some(hidden) => weights.mask_fill(hidden, 0.0),
        None => weights,
    }
}
