//! One update of AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), element by element in a single pass.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Tensor};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::shapes::assert_shapes;
use crate::{cpu, gpu, in_type, simd};

/// Elements of a task.
const CHUNK: usize = 1 << 14;

/// The numbers of one update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamwStep {
    /// Factor of the gradient, applied first: the clipping factor.
    pub grad_scale: f64,
    /// The learning rate divided by the bias correction of the first moment, `1 - beta1^t`.
    pub rate: f64,
    /// Factor of the values, applied first: `1 - lr * weight_decay`.
    pub keep: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// The root of the second moment's bias correction, `sqrt(1 - beta2^t)`.
    pub correction: f64,
    /// Added to the corrected root of the second moment.
    pub eps: f64,
}

/// The parameter and its moments after the update:
/// `m = β1 m + (1 - β1) g`, `v = β2 v + (1 - β2) g²`, `x = keep x - rate m / (sqrt(v) / correction + eps)`.
///
/// All four are `[numbers]` on a device without autodiff.
///
/// # Panics
/// If they differ in length.
pub fn adamw(
    value: Tensor<1>,
    grad: Tensor<1>,
    moments: [Tensor<1>; 2],
    step: AdamwStep,
) -> (Tensor<1>, [Tensor<1>; 2]) {
    let [first, second] = moments;
    assert_shapes!("adamw", value, grad, first, second;
        "the gradient and both moments must be as long as the values":
            [&grad, &first, &second].iter().all(|x| x.dims() == value.dims()));
    if !(cpu::fuses(&value) || gpu::fuses(&value) && value.dtype() == DType::F32) {
        return plain(value, grad, [first, second], step);
    }
    let [grad, first, second] = [grad, first, second].map(|x| in_type(x, DType::F32));
    let (value, first, second) = Dispatch::adamw(
        value.into_dispatch(),
        grad.into_dispatch(),
        first.into_dispatch(),
        second.into_dispatch(),
        step,
    );
    (Tensor::from_dispatch(value), [first, second].map(Tensor::from_dispatch))
}

fn plain(value: Tensor<1>, grad: Tensor<1>, moments: [Tensor<1>; 2], step: AdamwStep) -> (Tensor<1>, [Tensor<1>; 2]) {
    let AdamwStep { grad_scale, rate, keep, beta1, beta2, correction, eps } = step;
    let ([first, second], grad) = (moments, grad * grad_scale);
    let first = first * beta1 + grad.clone() * (1.0 - beta1);
    let second = second * beta2 + grad.square() * (1.0 - beta2);
    let direction = first.clone() / (second.clone().sqrt() / correction + eps);
    (value * keep - direction * rate, [first, second])
}

#[backend_extension(Flex, Cube: cfg(feature = "gpu"))]
trait Adamw: Backend {
    fn adamw(
        value: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        step: AdamwStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}

impl Adamw for Flex {
    fn adamw(
        value: FlexTensor,
        grad: FlexTensor,
        first: FlexTensor,
        second: FlexTensor,
        step: AdamwStep,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        let grad = grad.to_contiguous();
        // In place, unless somebody else still holds the old values.
        let [mut value, mut first, mut second] = [value, first, second].map(cpu::whole);
        let chunks = (
            value.storage_mut::<f32>().par_chunks_mut(CHUNK),
            first.storage_mut::<f32>().par_chunks_mut(CHUNK),
            second.storage_mut::<f32>().par_chunks_mut(CHUNK),
            cpu::values(&grad).par_chunks(CHUNK),
        );
        let numbers = [
            step.grad_scale,
            step.rate,
            step.keep,
            step.beta1,
            1.0 - step.beta1,
            step.beta2,
            1.0 - step.beta2,
            1.0 / step.correction,
            step.eps,
        ]
        .map(|number| number as f32);
        chunks
            .into_par_iter()
            .for_each(|(value, first, second, grad)| simd::adamw(value, first, second, grad, &numbers));
        (value, first, second)
    }
}

#[cfg(feature = "gpu")]
impl Adamw for burn::backend::Cube {
    fn adamw(
        value: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        step: AdamwStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        gpu::elementwise::adamw(value, grad, [first, second], step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{agree, normal, numbers};
    use burn::tensor::Device;

    #[test]
    fn fused_agrees_with_plain() {
        let step =
            AdamwStep { grad_scale: 0.3, rate: 0.02, keep: 0.99, beta1: 0.9, beta2: 0.95, correction: 0.4, eps: 1e-8 };
        for n in [1, 63, 40_000] {
            let random = || normal([n], &Device::flex());
            let (value, grad, moments) = (random(), random(), [random(), random().square()]);
            let got = adamw(value.clone(), grad.clone(), moments.clone(), step);
            let want = plain(value.clone(), grad, moments.clone(), step);
            agree("value", &numbers(got.0), &numbers(want.0));
            agree("first", &numbers(got.1[0].clone()), &numbers(want.1[0].clone()));
            agree("second", &numbers(got.1[1].clone()), &numbers(want.1[1].clone()));
            assert!(numbers(moments[0].clone()).iter().all(|x| x.is_finite()), "what is held elsewhere stays");
        }
    }
}
