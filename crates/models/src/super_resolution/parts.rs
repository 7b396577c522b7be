//! What the layers of a super-resolution network are made of besides convolutions.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::activation::gelu;
use burn::tensor::{Device, Tensor};
use polyhead_attention::{INIT_STD, join_heads, linear, split_heads};
use polyhead_kernels::{AttentionOptions, attention};

use crate::convolution::Convolution;

/// Side of the convolution between the channels of a feed-forward layer; the authors'.
const KERNEL: usize = 5;

/// How wide layers are.
#[derive(Debug, Clone, Copy)]
pub struct Widths {
    /// Channels of the stream, and of values.
    pub d_model: usize,
    /// Channels of queries and keys, of all heads together.
    pub qk_dim: usize,
    /// Heads.
    pub n_heads: usize,
    /// Channels inside the feed-forward layers.
    pub d_ff: usize,
}

/// The four maps of an attention whose queries and keys may be narrower than its values; without biases.
#[derive(Module, Debug)]
pub struct Projections {
    /// `[d_model, qk_dim]`
    pub q_proj: Linear,
    /// `[d_model, qk_dim]`
    pub k_proj: Linear,
    /// `[d_model, d_model]`
    pub v_proj: Linear,
    /// `[d_model, d_model]`
    pub o_proj: Linear,
    n_heads: usize,
}

impl Projections {
    pub(super) fn init(widths: Widths, device: &Device) -> Self {
        let Widths { d_model, qk_dim, n_heads, .. } = widths;
        let to = |d_output| linear(d_model, d_output, false, INIT_STD, device);
        Self { q_proj: to(qk_dim), k_proj: to(qk_dim), v_proj: to(d_model), o_proj: to(d_model), n_heads }
    }

    /// Every token attends to all tokens of its row: `[rows, tokens, d_model]`.
    pub(super) fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [q, k, v] = [&self.q_proj, &self.k_proj, &self.v_proj].map(|map| project(map, x.clone()));
        project(&self.o_proj, self.attend(q, k, v))
    }

    /// What the heads read of each row, side by side: `[rows, queries, d_model]`.
    ///
    /// # Shapes
    /// - q: `[rows, queries, qk_dim]`; k: `[rows, keys, qk_dim]`; v: `[rows, keys, d_model]`
    pub(super) fn attend(&self, q: Tensor<3>, k: Tensor<3>, v: Tensor<3>) -> Tensor<3> {
        let [q, k, v] = [q, k, v].map(|x| split_heads(x, self.n_heads));
        join_heads(attention(q, k, v, &AttentionOptions::default()).hidden)
    }
}

/// A feed-forward layer with a convolution between its two maps:
/// `down(y + gelu(conv(y)))`, y = gelu(up(x)).
#[derive(Module, Debug)]
pub struct ConvMlp {
    /// `[d_model, d_ff]`
    pub up_proj: Linear,
    /// `[d_ff, 1, 5, 5]`: each channel by itself
    pub conv: Convolution,
    /// `[d_ff, d_model]`
    pub down_proj: Linear,
}

impl ConvMlp {
    pub(super) fn init(widths: Widths, device: &Device) -> Self {
        let Widths { d_model, d_ff, .. } = widths;
        Self {
            up_proj: linear(d_model, d_ff, true, INIT_STD, device),
            conv: Convolution::init([d_ff, 1, KERNEL, KERNEL], device),
            down_proj: linear(d_ff, d_model, true, INIT_STD, device),
        }
    }

    /// `[batch, rows * columns, d_model]`, row by row.
    pub(super) fn forward(&self, x: Tensor<3>, grid: [usize; 2]) -> Tensor<3> {
        let inner = gelu(project(&self.up_proj, x));
        let near = tokens(self.conv.forward(image(inner.clone(), grid)));
        project(&self.down_proj, inner + gelu(near))
    }

    /// Parameters, and multiplications with additions for each pixel.
    pub(super) fn costs(widths: Widths) -> [u64; 2] {
        let [d_model, d_ff] = [widths.d_model, widths.d_ff].map(|width| width as u64);
        let products = 2 * d_model * d_ff + (KERNEL * KERNEL) as u64 * d_ff;
        [products + 2 * d_ff + d_model, products]
    }
}

/// A linear map of every token.
pub(super) fn project(map: &Linear, x: Tensor<3>) -> Tensor<3> {
    polyhead_kernels::linear(x, map.weight.val(), map.bias.as_ref().map(Param::val))
}

/// `[batch, channels, rows, columns]` to `[batch, rows * columns, channels]`.
pub(super) fn tokens(image: Tensor<4>) -> Tensor<3> {
    let [batch, channels, rows, columns] = image.dims();
    image.reshape([batch, channels, rows * columns]).swap_dims(1, 2)
}

/// The inverse of [`tokens`].
pub(super) fn image(tokens: Tensor<3>, [rows, columns]: [usize; 2]) -> Tensor<4> {
    let [batch, _, channels] = tokens.dims();
    tokens.swap_dims(1, 2).reshape([batch, channels, rows, columns])
}
