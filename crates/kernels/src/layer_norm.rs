//! Layer normalisation (Ba et al. 2016, arXiv 1607.06450): root mean square normalisation of what differs from the mean.

use burn::tensor::Tensor;

use crate::rms_norm;

/// `(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias` over the last dimension.
///
/// # Shapes
/// - x, output: `[.., channels]`
/// - weight, bias: `[channels]`
pub fn layer_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, bias: Tensor<1>, eps: f64) -> Tensor<D> {
    let centred = x.clone() - x.mean_dim(D - 1);
    rms_norm(centred, weight, eps) + bias.unsqueeze::<D>()
}
