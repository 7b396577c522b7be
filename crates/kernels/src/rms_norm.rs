//! Root mean square normalisation (Zhang & Sennrich 2019, arXiv 1910.07467).

use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Dispatch, Flex};
use burn::tensor::{DType, Tensor};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::differentiable::{InputGrads, Wanted, fused};
use crate::scratch::{write_chunks, write_rows};
use crate::shapes::assert_shapes;
use crate::{cpu, gpu, in_type, simd};

/// Rows that one task normalises.
const ROWS: usize = 64;

/// `x / sqrt(mean(x²) + eps) * weight` over the last dimension, computed in f32 whatever the input's type.
///
/// # Shapes
/// - x, output: `[.., channels]`
/// - weight: `[channels]`
///
/// # Panics
/// If the shapes are others.
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    assert_shapes!("rms_norm", x, weight;
        "weight must have a value per channel of x": weight.dims()[0] == x.dims()[D - 1]);
    if cpu::fuses(&x) || gpu::fuses(&x) {
        let weight = in_type(weight, DType::F32);
        return Tensor::from_dispatch(Dispatch::rms_norm(x.into_dispatch(), weight.into_dispatch(), eps as f32));
    }
    plain(x, weight, eps)
}

fn plain<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    let dtype = x.dtype();
    let x = if dtype == DType::F32 { x } else { x.cast(DType::F32) };
    let mean_square = x.clone().square().mean_dim(D - 1); // [.., 1]
    let y = x / mean_square.add_scalar(eps).sqrt() * weight.unsqueeze::<D>();
    if dtype == DType::F32 { y } else { y.cast(dtype) }
}

fused!(RmsNorm: rms_norm(x, weight; eps: f32), forward, backward; gpu: gpu::rms_norm::forward, gpu::rms_norm::backward);

/// What the backward needs: x, the weight, and per row the reciprocal of its root mean square.
type Kept = (FlexTensor, FlexTensor, Vec<f32>);

fn forward(inputs: [FlexTensor; 2], eps: f32) -> (FlexTensor, Kept) {
    let [x, weight] = inputs.map(|input| input.to_contiguous());
    let (all, weights) = (cpu::values(&x), cpu::values(&weight));
    let channels = weights.len();
    let mut inverses = vec![0.0; all.len() / channels.max(1)];
    let chunk = (ROWS * channels).max(1);
    let inputs = (inverses.par_chunks_mut(ROWS), all.par_chunks(chunk)).into_par_iter();
    let (y, _) = write_chunks(all.len(), chunk, inputs, |y, (inverses, x)| {
        let written = write_rows(y, channels, |row, y| {
            let (y, inverse) = simd::rms_norm(&x[row * channels..][..channels], weights, eps, y);
            inverses[row] = inverse;
            y
        });
        (written, ())
    });
    (cpu::tensor(y, cpu::shape(&x)), (x, weight, inverses))
}

/// Gradients of x and of the weight.
fn backward((x, weight, inverses): Kept, y_grad: FlexTensor, [of_x, of_weight]: Wanted<2>) -> InputGrads<Flex, 2> {
    let y_grad = y_grad.to_contiguous();
    let (all, weight, y_grads) = (cpu::values(&x), cpu::values(&weight), cpu::values(&y_grad));
    let channels = weight.len();
    let chunk = (ROWS * channels).max(1);
    let inputs = (all.par_chunks(chunk), y_grads.par_chunks(chunk), inverses.par_chunks(ROWS)).into_par_iter();
    let row = |index: usize| index * channels..(index + 1) * channels;
    let (x_grad, parts) = if of_x {
        let (x_grad, parts) = write_chunks(all.len(), chunk, inputs, |x_grad, (x, y_grad, inverses)| {
            let mut weight_grad = vec![0.0; if of_weight { channels } else { 0 }];
            let written = write_rows(x_grad, channels, |at, x_grad| {
                let (x, y_grad, inverse) = (&x[row(at)], &y_grad[row(at)], inverses[at]);
                match of_weight {
                    true => simd::rms_norm_backward(x, weight, y_grad, inverse, x_grad, &mut weight_grad),
                    false => simd::rms_norm_back_to_x(x, weight, y_grad, inverse, x_grad),
                }
            });
            (written, weight_grad)
        });
        (Some(cpu::tensor(x_grad, cpu::shape(&x))), parts)
    } else {
        let parts = inputs.map(|(x, y_grad, inverses)| {
            let mut weight_grad = vec![0.0; channels];
            for (at, &inverse) in inverses.iter().enumerate() {
                simd::rms_norm_back_to_weight(&x[row(at)], &y_grad[row(at)], inverse, &mut weight_grad);
            }
            weight_grad
        });
        (None, parts.collect())
    };
    [x_grad, of_weight.then(|| cpu::tensor(cpu::sum_in_order(channels, &parts), [channels]))]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{agree_with_gradients, every_subset_of_gradients, leaf};

    #[test]
    fn fused_agrees_with_plain() {
        for (rows, channels) in [(1, 1), (3, 5), (70, 64), (129, 80), (7, 257)] {
            let (x, weight) = (leaf([2, rows, channels]), leaf([channels]));
            // Large, because the gradient of a single channel is nothing but what eps leaves of it.
            let eps = 0.1;
            agree_with_gradients(
                &[&x.clone().reshape([-1]), &weight],
                |[x, weight]| rms_norm(x.reshape([2, rows, channels]), weight, eps).reshape([-1]),
                |[x, weight]| plain(x.reshape([2, rows, channels]), weight, eps).reshape([-1]),
            );
            // Rows that are not contiguous.
            agree_with_gradients(
                &[&x.reshape([-1]), &weight],
                |[x, weight]| rms_norm(x.reshape([rows, channels, 2]).swap_dims(1, 2), weight, eps).reshape([-1]),
                |[x, weight]| plain(x.reshape([rows, channels, 2]).swap_dims(1, 2), weight, eps).reshape([-1]),
            );
        }
    }

    #[test]
    fn gradients_are_the_same_whichever_are_asked_for() {
        every_subset_of_gradients(&[&[130, 33], &[33]], |[x, weight]| {
            rms_norm(x.reshape([130, 33]), weight, 1e-5).reshape([-1])
        });
    }
}
