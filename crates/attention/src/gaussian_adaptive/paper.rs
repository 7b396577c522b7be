//! The form behind the paper's tables, and its Algorithm 1: `exp(-y² / 2c)`, neither normalised nor weighted.
//!
//! ```text
//! y = (x - (μ + δ)) / sqrt(σ² + 1e-8 + 1e-5),   g = exp(-y² / (2 c)),   out = x g
//! ```
//! μ and σ² (of the population) are taken along the rows of a head. The paper's text writes c² where its Algorithm 1 and the
//! code have c; followed is the code. Nothing keeps c positive there; training hardly moves it (1.88 to 2.06 in the paper).

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::{Chunks, Moments, check_heads};
use crate::ConfigError;
use crate::config::require;

/// Added to the variance, and once more below its root (the code's values).
const EPS: f64 = 1e-8 + 1e-5;
/// Rows of a head at least. With two, `|y|` is 1 whatever they hold.
const FEWEST_ROWS: usize = 3;

/// Settings of the gate behind the paper's tables. It normalises along axis 1, the rows, and has 2 parameters per head and
/// feature.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct PaperGateConfig {
    /// Heads, each over its share of the rows: 8 ("v1") or 1 ("v2") in the paper.
    pub n_heads: usize,
    /// c (the scaled variance ξ) at the start. Default: 2.0, the code's.
    #[serde(default = "two")]
    pub c_init: f64,
}

fn two() -> f64 {
    2.0
}

impl PaperGateConfig {
    pub(super) fn validate(&self, sizes: &[usize]) -> Result<(), ConfigError> {
        check_heads(self.n_heads, 1, FEWEST_ROWS, sizes)?;
        require(self.c_init.is_finite() && self.c_init > 0.0, "c_init", || {
            format!("c_init ({}) must be a positive number", self.c_init)
        })
    }

    pub(super) fn init(&self, sizes: &[usize], device: &Device) -> PaperGate {
        let shape = [self.n_heads, sizes[1..].iter().product()];
        PaperGate {
            mean_offset: Param::from_tensor(Tensor::zeros(shape, device)),
            c: Param::from_tensor(Tensor::full(shape, self.c_init, device)),
        }
    }
}

/// The gate behind the paper's tables.
#[derive(Module, Debug)]
pub struct PaperGate {
    /// `[heads, features]`: δ, in units of the data.
    pub mean_offset: Param<Tensor<2>>,
    /// `[heads, features]`
    pub c: Param<Tensor<2>>,
}

impl PaperGate {
    pub(super) fn n_heads(&self) -> usize {
        self.c.dims()[0]
    }

    pub(super) fn weights(&self, chunks: Chunks) -> Tensor<4> {
        let Moments { mean, variance } = chunks.moments(0.0);
        let of_heads = |parameter: &Param<Tensor<2>>| {
            let heads = parameter.val().narrow(0, chunks.heads.start, chunks.heads.len());
            heads.unsqueeze_dim::<3>(1).unsqueeze::<4>() // [1, heads, 1, features]
        };
        let y2 = (chunks.x - mean - of_heads(&self.mean_offset)).square() / (variance + EPS);
        let gate = (y2 / (of_heads(&self.c) * -2.0)).exp();
        match chunks.hidden {
            Some(hidden) => gate.mask_fill(hidden, 0.0),
            None => gate,
        }
    }
}
