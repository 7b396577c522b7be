//! Root mean square normalisation (Zhang & Sennrich 2019, arXiv 1910.07467).

use burn::tensor::{DType, Tensor};

/// `x / sqrt(mean(x²) + eps) * weight` over the last dimension, computed in f32 whatever the input's type.
///
/// # Shapes
/// - x, output: `[.., channels]`
/// - weight: `[channels]`
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    let dtype = x.dtype();
    let x = if dtype == DType::F32 { x } else { x.cast(DType::F32) };
    let mean_square = x.clone().square().mean_dim(D - 1); // [.., 1]
    let y = x / mean_square.add_scalar(eps).sqrt() * weight.unsqueeze::<D>();
    if dtype == DType::F32 { y } else { y.cast(dtype) }
}
