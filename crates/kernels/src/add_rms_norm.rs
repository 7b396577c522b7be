//! What is written to the residual stream, added and normalised at once, as pre-norm layers do before each of their parts (Xiong et al.
//! 2020, arXiv 2002.04745).
//!
//! On a GPU a kernel forward and two back, all limited by memory: 12 bytes per number forward where the stream is f32 and the rest bf16,
//! 32 in single operations; 16 back to the stream, 36 in single operations.

use burn::tensor::{DType, Tensor};

#[cfg(feature = "gpu")]
use crate::gpu;
use crate::shapes::assert_shapes;
use crate::{in_type, rms_norm};

/// The norm of [`add_rms_norm`].
#[derive(Debug, Clone)]
pub struct RmsNorm {
    /// `[channels]`
    pub weight: Tensor<1>,
    /// Added to the mean square.
    pub eps: f64,
    /// The type of the result.
    pub dtype: DType,
}

/// `sum = x + written`, or x where nothing is written, in the type of x; and [`rms_norm`] of it in the norm's.
///
/// # Shapes
/// - x, written, both outputs: `[.., channels]`
///
/// # Panics
/// If the shapes are others.
pub fn add_rms_norm<const D: usize>(x: Tensor<D>, written: Option<Tensor<D>>, norm: RmsNorm) -> (Tensor<D>, Tensor<D>) {
    let weight = &norm.weight;
    assert_shapes!("add_rms_norm", x, weight;
        "weight must have a value per channel of x": weight.dims()[0] == x.dims()[D - 1]);
    if let Some(written) = &written {
        assert_shapes!("add_rms_norm", x, written; "what is written must be of the shape of x": written.dims() == x.dims());
    }
    #[cfg(feature = "gpu")]
    if gpu::fuses(&x) && gpu::takes(norm.dtype) && written.as_ref().is_none_or(gpu::fuses) {
        return fused::add_rms_norm(x, written, norm);
    }
    plain(x, written, norm)
}

fn plain<const D: usize>(x: Tensor<D>, written: Option<Tensor<D>>, norm: RmsNorm) -> (Tensor<D>, Tensor<D>) {
    let RmsNorm { weight, eps, dtype } = norm;
    let sum = match written {
        Some(written) => {
            let written = in_type(written, x.dtype());
            x + written
        }
        None => x,
    };
    (sum.clone(), in_type(rms_norm(sum, weight, eps), dtype))
}

#[cfg(feature = "gpu")]
mod fused {
    use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
    use burn::backend::tensor::FloatTensor;
    use burn::backend::{Autodiff, Backend, Cube, Dispatch, TensorMetadata, backend_extension};
    use burn::tensor::{DType, Tensor};
    use burn_cubecl::tensor::CubeTensor;

    use super::RmsNorm;
    use crate::gpu::rms_norm::{Kept, add_and_normalise, back_through_sum};
    use crate::in_type;
    use crate::two_outputs::differentiable;

    pub(super) fn add_rms_norm<const D: usize>(
        x: Tensor<D>,
        written: Option<Tensor<D>>,
        RmsNorm { weight, eps, dtype }: RmsNorm,
    ) -> (Tensor<D>, Tensor<D>) {
        let (x, weight) = (x.into_dispatch(), in_type(weight, DType::F32).into_dispatch());
        let (sum, normed) = match written {
            Some(written) => Dispatch::add_rms_norm(x, weight, written.into_dispatch(), eps as f32, dtype),
            None => Dispatch::pass_rms_norm(x, weight, eps as f32, dtype),
        };
        (Tensor::from_dispatch(sum), Tensor::from_dispatch(normed))
    }

    #[backend_extension(Cube, Autodiff)]
    trait AddRmsNorm: Backend {
        fn add_rms_norm(
            x: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            written: FloatTensor<Self>,
            eps: f32,
            dtype: DType,
        ) -> (FloatTensor<Self>, FloatTensor<Self>);

        /// The same where nothing is written.
        fn pass_rms_norm(
            x: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            eps: f32,
            dtype: DType,
        ) -> (FloatTensor<Self>, FloatTensor<Self>);
    }

    impl AddRmsNorm for Cube {
        fn add_rms_norm(
            x: CubeTensor,
            weight: CubeTensor,
            written: CubeTensor,
            eps: f32,
            dtype: DType,
        ) -> (CubeTensor, CubeTensor) {
            add_and_normalise([x, weight], Some(written), eps, dtype).0.into()
        }

        fn pass_rms_norm(x: CubeTensor, weight: CubeTensor, eps: f32, dtype: DType) -> (CubeTensor, CubeTensor) {
            add_and_normalise([x, weight], None, eps, dtype).0.into()
        }
    }

    impl<C: CheckpointStrategy> AddRmsNorm for Autodiff<Cube, C> {
        fn add_rms_norm(
            x: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            written: FloatTensor<Self>,
            eps: f32,
            dtype: DType,
        ) -> (FloatTensor<Self>, FloatTensor<Self>) {
            let narrow = written.dtype();
            let run = |[x, weight, written]: [CubeTensor; 3]| {
                let (outputs, kept) = add_and_normalise([x, weight], Some(written), eps, dtype);
                (outputs, (kept, narrow))
            };
            let back = |(kept, narrow): (Kept, DType), grads, wanted| back_through_sum(kept, grads, wanted, narrow);
            differentiable::<Cube, C, _, 3>([x, weight, written], run, back).into()
        }

        fn pass_rms_norm(
            x: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            eps: f32,
            dtype: DType,
        ) -> (FloatTensor<Self>, FloatTensor<Self>) {
            let run = |inputs| add_and_normalise(inputs, None, eps, dtype);
            let back = |kept: Kept, grads, [of_x, of_weight]: [bool; 2]| {
                let narrow = kept.dtype();
                let [x, weight, _] = back_through_sum(kept, grads, [of_x, of_weight, false], narrow);
                [x, weight]
            };
            differentiable::<Cube, C, _, 2>([x, weight], run, back).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{agree_with_gradients, leaf};

    #[test]
    fn it_is_the_norm_of_the_sum() {
        let (x, written, weight) = (leaf([6 * 5]), leaf([6 * 5]), leaf([5]));
        let rows = |x: Tensor<1>| x.reshape([2, 3, 5]);
        let together = |a: Tensor<3>, b: Tensor<3>| (a.exp() * b).reshape([-1]);
        let norm = |weight| RmsNorm { weight, eps: 0.1, dtype: DType::F32 };
        agree_with_gradients(
            &[&x, &written, &weight],
            |[x, written, weight]| {
                let (sum, normed) = add_rms_norm(rows(x), Some(rows(written)), norm(weight));
                together(sum, normed)
            },
            |[x, written, weight]| {
                together(rows(x.clone() + written.clone()), rms_norm(rows(x + written), weight, 0.1))
            },
        );
        agree_with_gradients(
            &[&x, &weight],
            |[x, weight]| {
                let (sum, normed) = add_rms_norm(rows(x), None, norm(weight));
                together(sum, normed)
            },
            |[x, weight]| together(rows(x.clone()), rms_norm(rows(x), weight, 0.1)),
        );
    }
}
