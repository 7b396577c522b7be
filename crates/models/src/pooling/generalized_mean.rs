//! Group Generalized Mean pooling, GGeM (Ko et al. 2022, arXiv 2212.04114); with one group it is GeM (Radenović et al. 2019,
//! arXiv 1711.02512).
//!
//! ```text
//! out_k = ( mean over tokens of max(x_k, eps)^p )^(1/p),   p = p of the group of channel k
//! ```
//! Groups are contiguous channels, as heads are. p = 1 is the mean of the clamped tokens, p → ∞ their maximum. Computed as
//! `exp(logsumexp(p ln x - ln n) / p)`, because eps^p vanishes in f32 for p > 6.3, and the gradient of 0^(1/p) is no number.
//!
//! No code of the authors is public. The defaults of p and eps are those of GeM; what the paper starts from we could not read.

use burn::module::{Module, Param};
use burn::tensor::{Bool, DType, Device, Tensor};
use polyhead_attention::{ConfigError, require, require_positive};
use polyhead_kernels::in_type;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::count;

/// The least that p may become in training, so that 1/p stays finite.
const SMALLEST_P: f64 = 1e-6;
/// Stands for the logarithm of 0.
const LOG_ZERO: f64 = -1e30;

/// Settings of a generalised mean; one parameter per group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GeneralizedMeanConfig {
    /// Groups of channels with an exponent of their own: as many as heads is GGeM, 1 is GeM (the default).
    #[serde(default = "one")]
    pub n_groups: usize,
    /// The exponent at the start. Default: 3.0, as in GeM.
    #[serde(default = "three")]
    pub p_init: f64,
    /// What smaller values count as. Default: 1e-6, as in GeM.
    #[serde(default = "millionth")]
    pub eps: f64,
    /// Train the exponents. Default: true.
    #[serde(default = "yes")]
    pub learnable: bool,
}

fn one() -> usize {
    1
}

fn three() -> f64 {
    3.0
}

fn millionth() -> f64 {
    1e-6
}

fn yes() -> bool {
    true
}

impl GeneralizedMeanConfig {
    pub(super) fn validate(&self, d_model: usize) -> Result<(), ConfigError> {
        require(self.n_groups > 0 && d_model.is_multiple_of(self.n_groups), "n_groups", || {
            format!("n_groups ({}) must be at least 1 and divide d_model ({d_model})", self.n_groups)
        })?;
        require_positive("p_init", self.p_init)?;
        require_positive("eps", self.eps)
    }

    pub(super) fn init(&self, device: &Device) -> GeneralizedMean {
        let p = Param::from_tensor(Tensor::full([self.n_groups], self.p_init, device));
        GeneralizedMean { p: if self.learnable { p } else { p.set_require_grad(false) }, eps: self.eps }
    }
}

/// A generalised mean.
#[derive(Module, Debug)]
pub struct GeneralizedMean {
    /// `[groups]`: the exponents.
    pub p: Param<Tensor<1>>,
    eps: f64,
}

impl GeneralizedMean {
    /// `[batch, tokens, d_model]` to `[batch, d_model]`; padding, `[batch, tokens]`, is left out.
    pub fn forward(&self, tokens: Tensor<3>, hidden: Option<&Tensor<2, Bool>>) -> Tensor<2> {
        let [batch, n_tokens, d_model] = tokens.dims();
        let dtype = tokens.dtype();
        let groups = self.p.dims()[0];
        let p = self.p.val().clamp_min(SMALLEST_P).reshape([groups, 1]).expand([groups, d_model / groups]);
        let p = p.reshape([1, 1, d_model]);
        let tokens = in_type(tokens, DType::F32);
        let (tokens, n_tokens, hidden) = match hidden {
            None => (tokens, Tensor::full([batch, 1], n_tokens as f64, &self.p.device()), None),
            Some(hidden) => {
                let full = hidden.clone().unsqueeze_dim::<3>(2).expand([batch, n_tokens, d_model]);
                (tokens.mask_fill(full.clone(), 0.0), count(hidden), Some(full))
            }
        };
        let powers = tokens.clamp_min(self.eps).log() * p.clone(); // p ln x
        let powers = match hidden {
            Some(hidden) => powers.mask_fill(hidden, LOG_ZERO),
            None => powers,
        };
        let largest = powers.clone().detach().max_dim(1); // [batch, 1, d_model]
        let sum = (powers - largest.clone()).exp().sum_dim(1);
        let log_mean = sum.log() + largest - n_tokens.log().unsqueeze_dim::<3>(2);
        in_type((log_mean / p).exp().squeeze_dim::<2>(1), dtype)
    }
}
