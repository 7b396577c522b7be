//! The gated unit of LLaMA-like feed-forward layers (Shazeer 2020, arXiv 2002.05202).

use burn::tensor::{Tensor, activation};

/// `silu(gate) * up`, element by element.
///
/// # Shapes
/// - gate, up, output: `[batch, seq, d_ff]`
pub fn swiglu(gate: Tensor<3>, up: Tensor<3>) -> Tensor<3> {
    activation::silu(gate) * up
}
