//! Linear projections and the reshaping between channels and heads.

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::{Device, Distribution, Tensor};
use polyhead_kernels::random;

/// Standard deviation of fresh weights: N(0, 0.02²), as GPT-2 and LLaMA-like models use.
pub const INIT_STD: f64 = 0.02;

/// A linear layer with weights from N(0, std²) and, if wanted, a bias of zeros.
///
/// The weights are made at once (not lazily, as Burn's own initialisers do), so that the same seed gives the same model
/// whatever is computed first.
pub fn linear(d_input: usize, d_output: usize, bias: bool, std: f64, device: &Device) -> Linear {
    let weight = random([d_input, d_output], Distribution::Normal(0.0, std), device);
    let bias = bias.then(|| Param::from_tensor(Tensor::zeros([d_output], device)));
    Linear { weight: Param::from_tensor(weight), bias }
}

/// Standard deviation of the projections that write into the residual stream: smaller by sqrt(2 n_layers), so that the
/// stream's variance does not grow with depth (Radford et al. 2019, GPT-2).
pub(crate) fn residual_std(n_layers: usize) -> f64 {
    INIT_STD / (2.0 * n_layers as f64).sqrt()
}

/// `[batch, seq, n_heads * width]` to `[batch, n_heads, seq, width]`.
pub fn split_heads(x: Tensor<3>, n_heads: usize) -> Tensor<4> {
    let [batch, seq, channels] = x.dims();
    x.reshape([batch, seq, n_heads, channels / n_heads]).swap_dims(1, 2)
}

/// `[batch, n_heads, seq, width]` to `[batch, seq, n_heads * width]`.
pub fn join_heads(x: Tensor<4>) -> Tensor<3> {
    let [batch, n_heads, seq, width] = x.dims();
    x.swap_dims(1, 2).reshape([batch, seq, n_heads * width])
}
