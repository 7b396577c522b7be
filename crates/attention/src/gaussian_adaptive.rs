//! Gaussian Adaptive Attention (Ioannides, Chadha and Elkins 2024, arXiv 2401.11143; "Density Adaptive Attention" in its
//! later versions): a gate over features.
//!
//! Along one axis of a tensor, the mean μ and variance σ² of the data place Gaussians with a learnable offset δ and width c;
//! every element is multiplied by their value there. There are no queries, keys or values, and nothing is mixed between
//! positions: elements near the (shifted) mean pass, outliers are damped. So this is no [`Mechanism`](crate::Mechanism) but
//! a seam of its own: [`GaussianGate`] is one gate, [`GaussianAdaptive`] a stack of them with or without residuals.
//!
//! The authors published three forms that do not agree, and all three are here:
//!
//! | name | where | gate of an element, `y = (x - μ - δ) / σ` |
//! |---|---|---|
//! | `paper` | the experiments behind the tables (commit 093212b) and Algorithm 1 | `exp(-y² / 2c)`; δ, c per feature and head |
//! | `product` | the package (commit 145d1bc, PyPI 0.1.5) | `∏ N(y_i; 0, c_i²)`, divided by its sum along the axis; δ, c per head |
//! | `mixture` | an older version of the package (commit e074ca1) | `Σ π_i exp(-y_i² / 2c_i²)`, divided by its sum |
//!
//! The package and the paper's appendix call the product a mixture; it is one Gaussian, whatever their number
//! (`normalised.rs`). Heads cut the axis into contiguous chunks with statistics of their own; where they do not divide
//! it, the last one takes the remainder. (The old package drops the remainder, so that its output is shorter than its input; to
//! compare with it, drop it before the gate.)
//!
//! Left out: fixed weights of the old mixture, which are used there without a softmax; the reshape of the experiments' code
//! that scrambles time and features when there is more than one frame (average over time before the gate).

mod importance;
mod normalised;
mod paper;

use std::ops::Range;

use burn::module::Module;
use burn::tensor::{Bool, DType, Device, Tensor};
use polyhead_kernels::in_type;
use serde::{Deserialize, Serialize};

use crate::ConfigError;
use crate::config::require;

pub use importance::{GateMean, Importance};
pub use normalised::{MixtureGate, MixtureGateConfig, ProductGate, ProductGateConfig, WidthInit};
pub use paper::{PaperGate, PaperGateConfig};

/// A stack of gates.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct GaussianAdaptiveConfig {
    /// The gates, first to last.
    pub gates: Vec<GaussianGateConfig>,
    /// Whether a gate's output is added to its input, as the package's blocks do, or takes its place, as in the paper's
    /// experiments. Default: false.
    #[serde(default)]
    pub residual: bool,
}

/// One gate and its settings: in a recipe, a table `paper`, `product` or `mixture`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum GaussianGateConfig {
    /// The gate behind the paper's tables: not normalised, δ and c per feature.
    Paper(PaperGateConfig),
    /// The package's product of Gaussians, normalised along the axis.
    Product(ProductGateConfig),
    /// A weighted sum of Gaussians, normalised along the axis.
    Mixture(MixtureGateConfig),
}

/// One gate of any form.
#[derive(Module, Debug)]
pub enum GaussianGate {
    /// See [`GaussianGateConfig::Paper`].
    Paper(PaperGate),
    /// See [`GaussianGateConfig::Product`].
    Product(ProductGate),
    /// See [`GaussianGateConfig::Mixture`].
    Mixture(MixtureGate),
}

/// A stack of gates with their parameters.
#[derive(Module, Debug)]
pub struct GaussianAdaptive {
    /// First to last.
    pub gates: Vec<GaussianGate>,
    residual: bool,
}

/// The result of a gate.
#[derive(Debug, Clone)]
pub struct Gated<const D: usize> {
    /// The shape of the input.
    pub features: Tensor<D>,
    /// The factor of every element; without gradient. Hidden elements have 0.
    pub weights: Tensor<D>,
}

impl GaussianAdaptiveConfig {
    /// Checks against the sizes of the axes behind the batch, `[rows, features]` for example.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self, sizes: &[usize]) -> Result<(), ConfigError> {
        require(!self.gates.is_empty(), "gates", || {
            "gates is empty: give at least one, or leave the stack out".into()
        })?;
        let check = |(index, gate): (usize, &GaussianGateConfig)| {
            gate.validate(sizes).map_err(|error| error.within(&format!("gates[{index}]")))
        };
        self.gates.iter().enumerate().try_for_each(check)
    }

    /// Checks a stack that works on `[batch, tokens, d_model]` where only the channels are left: in a causal model later tokens
    /// would decide about earlier ones, and texts that differ in length have no fixed number of tokens to divide among heads.
    /// `because` is that reason, in words.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate_channels(&self, d_model: usize, because: &str) -> Result<(), ConfigError> {
        const TOKENS: usize = 1;
        for (index, gate) in self.gates.iter().enumerate() {
            let (form, axis) = match gate {
                GaussianGateConfig::Paper(_) => ("paper", Some(TOKENS)),
                GaussianGateConfig::Product(config) => ("product", normalised::resolve(config.axis, 2)),
                GaussianGateConfig::Mixture(config) => ("mixture", normalised::resolve(config.axis, 2)),
            };
            require(axis != Some(TOKENS), &format!("gates[{index}].{form}"), || {
                format!(
                    "{form} runs along the tokens here, and {because}: take product or mixture with axis = -1, along the \
                     channels"
                )
            })?;
        }
        // How many tokens there are decides nothing along the channels.
        self.validate(&[TOKENS, d_model])
    }

    /// Weights of a stack for inputs `[batch, sizes..]`.
    pub fn parameters(&self, sizes: &[usize]) -> u64 {
        let of_gate = |gate: &GaussianGateConfig| match gate {
            GaussianGateConfig::Paper(config) => 2 * config.n_heads * sizes[1..].iter().product::<usize>(),
            GaussianGateConfig::Product(config) => 2 * config.n_heads * config.n_gaussians,
            GaussianGateConfig::Mixture(config) => 3 * config.n_heads * config.n_gaussians,
        };
        self.gates.iter().map(|gate| of_gate(gate) as u64).sum()
    }

    /// A fresh stack for inputs `[batch, sizes..]`. Cannot fail after [`validate`](Self::validate).
    pub fn init(&self, sizes: &[usize], device: &Device) -> GaussianAdaptive {
        let gates = self.gates.iter().map(|gate| gate.init(sizes, device)).collect();
        GaussianAdaptive { gates, residual: self.residual }
    }
}

impl GaussianGateConfig {
    /// See [`GaussianAdaptiveConfig::validate`].
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self, sizes: &[usize]) -> Result<(), ConfigError> {
        let (name, checked) = match self {
            Self::Paper(config) => ("paper", config.validate(sizes)),
            Self::Product(config) => ("product", config.validate(sizes)),
            Self::Mixture(config) => ("mixture", config.validate(sizes)),
        };
        checked.map_err(|error| error.within(name))
    }

    /// See [`GaussianAdaptiveConfig::init`].
    pub fn init(&self, sizes: &[usize], device: &Device) -> GaussianGate {
        match self {
            Self::Paper(config) => GaussianGate::Paper(config.init(sizes, device)),
            Self::Product(config) => GaussianGate::Product(config.init(sizes, device)),
            Self::Mixture(config) => GaussianGate::Mixture(config.init(sizes, device)),
        }
    }
}

impl GaussianAdaptive {
    /// Passes `x` through the gates.
    ///
    /// # Shapes
    /// - x: `[batch, sizes..]`
    /// - hidden: true where an element is padding; of the shape of x, or 1 along axes where all are alike. Hidden elements take
    ///   no part in any statistic. What is left of them is 0 after a gate, and their own value after a residual.
    pub fn forward<const D: usize>(
        &self,
        x: Tensor<D>,
        hidden: Option<&Tensor<D, Bool>>,
    ) -> (Tensor<D>, Vec<Tensor<D>>) {
        let mut weights = Vec::with_capacity(self.gates.len());
        let features = self.gates.iter().fold(x, |x, gate| {
            let gated = gate.forward(x.clone(), hidden);
            weights.push(gated.weights);
            if self.residual { x + gated.features } else { gated.features }
        });
        (features, weights)
    }
}

impl GaussianAdaptive {
    /// The factor of every element by all gates together, from the weights that [`forward`](Self::forward) gives; `None`
    /// without a gate.
    pub fn factor<const D: usize>(&self, weights: Vec<Tensor<D>>) -> Option<Tensor<D>> {
        let of_gate = |weights: Tensor<D>| if self.residual { weights + 1.0 } else { weights };
        weights.into_iter().map(of_gate).reduce(|a, b| a * b)
    }
}

impl GaussianGate {
    /// Multiplies every element of `x` by its gate; shapes as in [`GaussianAdaptive::forward`]. Computes in f32.
    pub fn forward<const D: usize>(&self, x: Tensor<D>, hidden: Option<&Tensor<D, Bool>>) -> Gated<D> {
        let dtype = x.dtype();
        let hidden = hidden.map(|hidden| hidden.clone().expand(x.dims()));
        let x = in_type(x, DType::F32);
        let x = match &hidden {
            Some(hidden) => x.mask_fill(hidden.clone(), 0.0),
            None => x,
        };
        let weights = match self {
            Self::Paper(gate) => over_chunks(&x, 1, gate.n_heads(), hidden, |chunks| gate.weights(chunks)),
            Self::Product(gate) => over_chunks(&x, gate.axis, gate.n_heads(), hidden, |chunks| gate.weights(chunks)),
            Self::Mixture(gate) => over_chunks(&x, gate.axis, gate.n_heads(), hidden, |chunks| gate.weights(chunks)),
        };
        let mut features = x.clone() * weights.clone();
        let padding = match self {
            Self::Paper(_) => None,
            Self::Product(gate) => gate.padding_value,
            Self::Mixture(gate) => gate.padding_value,
        };
        if let Some(padding) = padding {
            features = features.mask_where(x.clone().equal_elem(padding), x);
        }
        Gated { features: in_type(features, dtype), weights: weights.detach() }
    }
}

/// The elements of some heads, cut out of the axis that is normalised.
struct Chunks {
    /// `[outer, heads, chunk, inner]`: outer and inner are the axes before and behind the normalised one.
    x: Tensor<4>,
    /// The same shape: true where an element is padding. Those of `x` are 0 there.
    hidden: Option<Tensor<4, Bool>>,
    /// Which heads these are.
    heads: Range<usize>,
}

/// Mean and variance along a chunk.
struct Moments {
    /// `[outer, heads, 1, inner]`
    mean: Tensor<4>,
    /// `[outer, heads, 1, inner]`
    variance: Tensor<4>,
}

impl Chunks {
    /// The moments of what is not hidden. The variance's divisor is the number of elements less `lost`.
    ///
    /// The variance is the mean of squared differences. The experiments' code takes `|mean(x²) - μ²|`, which is the same, but
    /// cancels digits.
    fn moments(&self, lost: f64) -> Moments {
        let chunk = self.x.dims()[2] as f64;
        let Some(hidden) = &self.hidden else {
            let mean = self.x.clone().mean_dim(2);
            let variance = (self.x.clone() - mean.clone()).square().sum_dim(2) / (chunk - lost);
            return Moments { mean, variance };
        };
        let count = hidden.clone().float().sum_dim(2).neg() + chunk;
        let mean = self.x.clone().sum_dim(2) / count.clone().clamp_min(1.0);
        let centred = (self.x.clone() - mean.clone()).mask_fill(hidden.clone(), 0.0);
        Moments { mean, variance: centred.square().sum_dim(2) / (count - lost).clamp_min(1.0) }
    }
}

/// The weights of all elements of `x`, computed chunk by chunk of `axis`.
fn over_chunks<const D: usize>(
    x: &Tensor<D>,
    axis: usize,
    n_heads: usize,
    hidden: Option<Tensor<D, Bool>>,
    weights: impl Fn(Chunks) -> Tensor<4>,
) -> Tensor<D> {
    let dims = x.dims();
    let (outer, length) = (dims[..axis].iter().product::<usize>(), dims[axis]);
    let inner = dims[axis + 1..].iter().product::<usize>();
    let flat = [outer, length, inner];
    let (x, hidden) = (x.clone().reshape(flat), hidden.map(|hidden| hidden.reshape(flat)));
    let chunk = length / n_heads;
    // Heads of one size at a time: all, or all but the last, which takes the remainder too.
    let groups = if length.is_multiple_of(n_heads) {
        vec![(0..n_heads, chunk)]
    } else {
        vec![(0..n_heads - 1, chunk), (n_heads - 1..n_heads, length - (n_heads - 1) * chunk)]
    };
    let of_group = |(heads, size): (Range<usize>, usize)| {
        let (start, shape) = (heads.start * chunk, [outer, heads.len(), size, inner]);
        let part = |all: Tensor<3>| all.narrow(1, start, heads.len() * size).reshape(shape);
        let hidden = hidden.clone().map(|all| all.narrow(1, start, heads.len() * size).reshape(shape));
        let made = weights(Chunks { x: part(x.clone()), hidden, heads: heads.clone() });
        made.reshape([outer, heads.len() * size, inner])
    };
    Tensor::cat(groups.into_iter().map(of_group).collect(), 1).reshape(dims)
}

/// The rules about heads on an axis; the length of the axis.
fn check_heads(n_heads: usize, axis: usize, smallest: usize, sizes: &[usize]) -> Result<(), ConfigError> {
    require(n_heads > 0, "n_heads", || "n_heads (0) must be at least 1".into())?;
    let length = sizes[axis - 1];
    require(length / n_heads >= smallest, "n_heads", || {
        format!(
            "n_heads ({n_heads}) leaves {} of {length} elements a head: at least {smallest} are needed for a variance",
            length / n_heads
        )
    })
}

#[cfg(test)]
mod tests;
