//! Root mean square normalisation (Zhang & Sennrich 2019, arXiv 1910.07467).

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Tensor};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::{cpu, simd};

/// Rows that one task normalises.
const ROWS: usize = 64;

/// `x / sqrt(mean(x²) + eps) * weight` over the last dimension, computed in f32 whatever the input's type.
///
/// # Shapes
/// - x, output: `[.., channels]`
/// - weight: `[channels]`
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    if cpu::fuses(&x) {
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

#[backend_extension(Flex, Autodiff)]
trait RmsNorm: Backend {
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self>;
}

impl RmsNorm for Flex {
    fn rms_norm(x: FlexTensor, weight: FlexTensor, eps: f32) -> FlexTensor {
        forward(&x.to_contiguous(), &weight.to_contiguous(), eps).0
    }
}

impl<C: CheckpointStrategy> RmsNorm for Autodiff<Flex, C> {
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Step;
        impl Backward<Flex, 2> for Step {
            type State = (FlexTensor, FlexTensor, Vec<f32>);

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let y_grad = grads.consume::<Flex>(&ops.node).to_contiguous();
                let (x, weight, inverses) = ops.state;
                let both = backward(&x, &weight, &inverses, &y_grad);
                for (parent, grad) in ops.parents.into_iter().zip(both) {
                    if let Some(node) = parent {
                        grads.register::<Flex>(node.id, grad);
                    }
                }
            }
        }
        let ((x, x_node), (weight, weight_node)) = (x.into_parts(), weight.into_parts());
        let (x, weight) = (x.to_contiguous(), weight.to_contiguous());
        let (y, inverses) = forward(&x, &weight, eps);
        match Step.prepare::<C>([x_node, weight_node]).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish((x, weight, inverses), y),
            OpsKind::UnTracked(step) => step.finish(y),
        }
    }
}

/// The output, and per row the reciprocal of its root mean square.
fn forward(x: &FlexTensor, weight: &FlexTensor, eps: f32) -> (FlexTensor, Vec<f32>) {
    let (all, weight) = (cpu::values(x), cpu::values(weight));
    let channels = weight.len();
    let mut y = cpu::room(all.len());
    let mut inverses = cpu::room(all.len() / channels.max(1));
    let chunk = ROWS * channels;
    y.par_chunks_mut(chunk).zip(inverses.par_chunks_mut(ROWS)).zip(all.par_chunks(chunk)).for_each(|((y, inv), x)| {
        for ((y, inverse), x) in y.chunks_mut(channels).zip(inv).zip(x.chunks(channels)) {
            *inverse = simd::rms_norm(x, weight, eps, y);
        }
    });
    (cpu::tensor(y, x.layout().shape().to_vec()), inverses)
}

/// Gradients of x and of the weight.
fn backward(x: &FlexTensor, weight: &FlexTensor, inverses: &[f32], y_grad: &FlexTensor) -> [FlexTensor; 2] {
    let (all, weight, y_grads) = (cpu::values(x), cpu::values(weight), cpu::values(y_grad));
    let channels = weight.len();
    let mut x_grad = cpu::room(all.len());
    let chunk = ROWS * channels;
    let parts: Vec<Vec<f32>> = (x_grad.par_chunks_mut(chunk), all.par_chunks(chunk), y_grads.par_chunks(chunk))
        .into_par_iter()
        .zip(inverses.par_chunks(ROWS))
        .map(|((x_grad, x, y_grad), inverses)| {
            let mut weight_grad = vec![0.0; channels];
            let rows = x_grad.chunks_mut(channels).zip(x.chunks(channels)).zip(y_grad.chunks(channels));
            for (((x_grad, x), y_grad), &inverse) in rows.zip(inverses) {
                simd::rms_norm_backward(x, weight, y_grad, inverse, x_grad, &mut weight_grad);
            }
            weight_grad
        })
        .collect();
    let weight_grad = cpu::sum_in_order(channels, &parts);
    [cpu::tensor(x_grad, x.layout().shape().to_vec()), cpu::tensor(weight_grad, [channels])]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{agree_with_gradients, leaf};

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
            // Rows that do not lie together.
            agree_with_gradients(
                &[&x.reshape([-1]), &weight],
                |[x, weight]| rms_norm(x.reshape([rows, channels, 2]).swap_dims(1, 2), weight, eps).reshape([-1]),
                |[x, weight]| plain(x.reshape([rows, channels, 2]).swap_dims(1, 2), weight, eps).reshape([-1]),
            );
        }
    }
}
