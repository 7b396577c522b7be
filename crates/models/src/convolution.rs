//! Convolutions that keep the height and width of an image, which is surrounded by zeros.

use burn::module::{Module, Param};
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Device, Distribution, Tensor, module};
use polyhead_kernels::random;

/// A convolution that keeps the size of its input.
#[derive(Module, Debug)]
pub struct Convolution {
    /// `[out, in / groups, side, side]`, of an odd side
    pub weight: Param<Tensor<4>>,
    /// `[out]`
    pub bias: Param<Tensor<1>>,
}

impl Convolution {
    /// Fresh weights, as PyTorch's convolutions begin.
    ///
    /// # Shapes
    /// - shape: `[out, in / groups, side, side]`
    pub(crate) fn init(shape: [usize; 4], device: &Device) -> Self {
        let [d_output, inputs, side, _] = shape;
        let bound = ((inputs * side * side) as f64).powf(-0.5);
        let uniform = Distribution::Uniform(-bound, bound);
        let weight = Param::from_tensor(random(shape, uniform, device));
        Self { weight, bias: Param::from_tensor(random([d_output], uniform, device)) }
    }

    /// `[batch, in, height, width]` to `[batch, out, height, width]`.
    pub(crate) fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [_, inputs, side, _] = self.weight.dims();
        let (groups, around) = (x.dims()[1] / inputs, [side / 2; 2]);
        module::conv2d(x, self.weight.val(), Some(self.bias.val()), ConvOptions::new([1, 1], around, [1, 1], groups))
    }
}
