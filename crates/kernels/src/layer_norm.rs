//! Layer normalisation (Ba et al. 2016, arXiv 1607.06450): root mean square normalisation of what differs from the mean.

use burn::tensor::Tensor;

use crate::shapes::assert_shapes;
use crate::{in_type, rms_norm};

/// `(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias` over the last dimension.
///
/// # Shapes
/// - x, output: `[.., channels]`
/// - weight, bias: `[channels]`
///
/// # Panics
/// If the shapes are others.
pub fn layer_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, bias: Tensor<1>, eps: f64) -> Tensor<D> {
    let channels = [x.dims()[D - 1]];
    assert_shapes!("layer_norm", x, weight, bias;
        "weight must have a value per channel of x": weight.dims() == channels,
        "bias must have a value per channel of x": bias.dims() == channels,
    );
    if channels == [0] {
        return x;
    }
    let bias = in_type(bias, x.dtype());
    let centred = x.clone() - x.mean_dim(D - 1);
    rms_norm(centred, weight, eps) + bias.unsqueeze::<D>()
}
