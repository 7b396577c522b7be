//! The combination of heads in differential attention (arXiv 2410.05258, eq. 3; grouped: arXiv 2510.06949): subtract,
//! normalise, scale, as one operation.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Tensor};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::{cpu, in_type, rms_norm, simd};

/// Positions of a task.
const POSITIONS: usize = 16;

/// How [`subtract_noise`] combines heads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Combination {
    /// Signal heads per noise head.
    pub ratio: usize,
    /// Inside the root of the norm.
    pub eps: f64,
    /// What the normalised heads are multiplied by: `1 - λ_init`.
    pub factor: f64,
}

/// `factor · RMSNorm(signal - λ noise) · weight` for every signal head, over its own channels.
///
/// # Shapes
/// - heads: `[batch, groups * (ratio + 1), seq, width]`: each group's signal heads, then its noise head
/// - lambda: `[1]`, weight: `[width]`
/// - output: `[batch, groups * ratio, seq, width]`
pub fn subtract_noise(heads: Tensor<4>, lambda: Tensor<1>, weight: Tensor<1>, how: Combination) -> Tensor<4> {
    if cpu::fuses(&heads) {
        let parts = (heads.into_dispatch(), lambda.into_dispatch(), weight.into_dispatch());
        return Tensor::from_dispatch(Dispatch::subtract_noise(parts.0, parts.1, parts.2, how));
    }
    plain(heads, lambda, weight, how)
}

fn plain(heads: Tensor<4>, lambda: Tensor<1>, weight: Tensor<1>, how: Combination) -> Tensor<4> {
    let dtype = heads.dtype();
    let combined = difference(in_type(heads, DType::F32), lambda, how.ratio);
    in_type(rms_norm(combined, weight, how.eps) * how.factor, dtype)
}

/// `signal - λ noise` for every signal head, neither normalised nor scaled; shapes as [`subtract_noise`].
pub fn difference(heads: Tensor<4>, lambda: Tensor<1>, ratio: usize) -> Tensor<4> {
    let [batch, all, seq, width] = heads.dims();
    let groups = all / (ratio + 1);
    let grouped = heads.reshape([batch, groups, ratio + 1, seq, width]);
    let signal = grouped.clone().narrow(2, 0, ratio);
    let lambda = in_type(lambda, grouped.dtype());
    let noise = grouped.narrow(2, ratio, 1) * lambda.unsqueeze::<5>();
    (signal - noise).reshape([batch, groups * ratio, seq, width])
}

#[backend_extension(Flex, Autodiff)]
trait SubtractNoise: Backend {
    fn subtract_noise(
        heads: FloatTensor<Self>,
        lambda: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        how: Combination,
    ) -> FloatTensor<Self>;
}

impl SubtractNoise for Flex {
    fn subtract_noise(heads: FlexTensor, lambda: FlexTensor, weight: FlexTensor, how: Combination) -> FlexTensor {
        forward(&cpu::row_major(heads), &lambda, &weight.to_contiguous(), how)
    }
}

impl<C: CheckpointStrategy> SubtractNoise for Autodiff<Flex, C> {
    fn subtract_noise(
        heads: FloatTensor<Self>,
        lambda: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        how: Combination,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Step;
        impl Backward<Flex, 3> for Step {
            type State = ([FlexTensor; 3], Combination);

            fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
                let y_grad = cpu::row_major(grads.consume::<Flex>(&ops.node));
                let (inputs, how) = ops.state;
                for (parent, grad) in ops.parents.into_iter().zip(backward(&inputs, &y_grad, how)) {
                    if let Some(node) = parent {
                        grads.register::<Flex>(node.id, grad);
                    }
                }
            }
        }
        let (heads, heads_node) = heads.into_parts();
        let ((lambda, lambda_node), (weight, weight_node)) = (lambda.into_parts(), weight.into_parts());
        let (heads, weight) = (cpu::row_major(heads), weight.to_contiguous());
        let y = forward(&heads, &lambda, &weight, how);
        match Step.prepare::<C>([heads_node, lambda_node, weight_node]).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish(([heads, lambda, weight], how), y),
            OpsKind::UnTracked(step) => step.finish(y),
        }
    }
}

fn forward(heads: &FlexTensor, lambda: &FlexTensor, weight: &FlexTensor, how: Combination) -> FlexTensor {
    let (view, lambda, weight) = (cpu::View::new(heads), cpu::values(lambda)[0], cpu::values(weight));
    let [batch, all, seq, width] = view.shape;
    let Combination { ratio, eps, factor } = how;
    let signals = all / (ratio + 1) * ratio;
    let mut y = cpu::room(batch * seq * signals * width);
    y.par_chunks_mut((signals * width).max(1)).enumerate().for_each_init(
        || cpu::room(width),
        |difference, (row, y)| {
            let (b, position) = (row / seq, row % seq);
            for (signal, y) in y.chunks_mut(width).enumerate() {
                let (group, own) = (signal / ratio, signal % ratio);
                let head = |index: usize| view.row(b, group * (ratio + 1) + index, position);
                simd::subtract(head(own), head(ratio), lambda, difference);
                simd::rms_norm(difference, weight, eps as f32, y);
                simd::scale(y, factor as f32);
            }
        },
    );
    cpu::tensor_by_position(y, [batch, signals, seq, width])
}

/// What a task adds up over its positions.
struct Sums {
    weight: Vec<f32>,
    lambda: f64,
}

/// Gradients of heads, λ and the weight.
fn backward([heads, lambda, weight]: &[FlexTensor; 3], y_grad: &FlexTensor, how: Combination) -> [FlexTensor; 3] {
    let (view, y_grads) = (cpu::View::new(heads), cpu::View::new(y_grad));
    let (lambda, weight) = (cpu::values(lambda)[0], cpu::values(weight));
    let [batch, all, seq, width] = view.shape;
    let Combination { ratio, eps, factor } = how;
    let mut heads_grad = cpu::room(batch * seq * all * width);
    let parts: Vec<Sums> = heads_grad
        .par_chunks_mut((POSITIONS * all * width).max(1))
        .enumerate()
        .map(|(task, grads)| {
            let mut sums = Sums { weight: vec![0.0; width], lambda: 0.0 };
            let (mut difference, mut scaled, mut unused) = (cpu::room(width), cpu::room(width), cpu::room(width));
            for (offset, grads) in grads.chunks_mut(all * width).enumerate() {
                let row = task * POSITIONS + offset;
                let (b, position) = (row / seq, row % seq);
                for (group, grads) in grads.chunks_mut((ratio + 1) * width).enumerate() {
                    let head = |index: usize| view.row(b, group * (ratio + 1) + index, position);
                    let (signal_grads, noise_grad) = grads.split_at_mut(ratio * width);
                    noise_grad.fill(0.0);
                    for (own, signal_grad) in signal_grads.chunks_mut(width).enumerate() {
                        simd::subtract(head(own), head(ratio), lambda, &mut difference);
                        let inverse = simd::rms_norm(&difference, weight, eps as f32, &mut unused);
                        scaled.copy_from_slice(y_grads.row(b, group * ratio + own, position));
                        simd::scale(&mut scaled, factor as f32);
                        let (dy, dw) = (&scaled, &mut sums.weight);
                        simd::rms_norm_backward(&difference, weight, dy, inverse, signal_grad, dw);
                        simd::add_scaled(noise_grad, signal_grad, -lambda);
                        sums.lambda -= f64::from(simd::dot(signal_grad, head(ratio)));
                    }
                }
            }
            sums
        })
        .collect();
    let lambda_grad = parts.iter().map(|part| part.lambda).sum::<f64>() as f32;
    let parts: Vec<Vec<f32>> = parts.into_iter().map(|part| part.weight).collect();
    [
        cpu::tensor_by_position(heads_grad, view.shape),
        cpu::tensor(vec![lambda_grad], [1]),
        cpu::tensor(cpu::sum_in_order(width, &parts), [width]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{agree_with_gradients, leaf};

    #[test]
    fn fused_agrees_with_plain() {
        for (batch, groups, ratio, seq, width) in
            [(1, 1, 1, 1, 2), (3, 2, 3, 7, 5), (2, 1, 2, 129, 80), (1, 2, 1, 63, 64)]
        {
            let (lambda, weight) = (leaf([1]), leaf([width]));
            let heads = leaf([batch * seq * groups * (ratio + 1) * width]);
            let how = Combination { ratio, eps: 1e-5, factor: 0.7 };
            for by_position in [true, false] {
                let shaped = |x: Tensor<1>| match by_position {
                    true => x.reshape([batch, seq, groups * (ratio + 1), width]).swap_dims(1, 2),
                    false => x.reshape([batch, groups * (ratio + 1), seq, width]),
                };
                agree_with_gradients(
                    &[&heads, &lambda, &weight],
                    |[heads, lambda, weight]| subtract_noise(shaped(heads), lambda, weight, how).reshape([-1]),
                    |[heads, lambda, weight]| plain(shaped(heads), lambda, weight, how).reshape([-1]),
                );
            }
        }
    }
}
