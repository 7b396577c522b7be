//! The combination of heads in differential attention (arXiv 2410.05258, eq. 3; grouped: arXiv 2510.06949): subtract,
//! normalise, scale, as one operation.

use std::mem::MaybeUninit;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Dispatch, Flex};
use burn::tensor::{DType, Tensor};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::differentiable::{InputGrads, Wanted, fused};
use crate::scratch::{ScratchBuffer, write_chunks, write_rows};
use crate::shapes::assert_shapes;
use crate::{cpu, in_type, rms_norm, simd};

/// Positions of a task.
const POSITIONS: usize = 16;

/// Settings of [`subtract_noise`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Combination {
    /// Signal heads per noise head.
    pub ratio: usize,
    /// Inside the root of the norm.
    pub eps: f64,
    /// Factor of the normalised heads: `1 - λ_init`.
    pub factor: f64,
}

/// `factor · RMSNorm(signal - λ noise) · weight` for every signal head, over its own channels.
///
/// # Shapes
/// - heads: `[batch, groups * (ratio + 1), seq, width]`: each group's signal heads, then its noise head
/// - lambda: `[1]`, weight: `[width]`
/// - output: `[batch, groups * ratio, seq, width]`
///
/// # Panics
/// If the shapes are others, or the ratio is 0.
pub fn subtract_noise(heads: Tensor<4>, lambda: Tensor<1>, weight: Tensor<1>, how: Combination) -> Tensor<4> {
    assert_groups(&heads, &lambda, how.ratio);
    assert_shapes!("subtract_noise", heads, lambda, weight;
        "weight must have a value per channel of a head": weight.dims()[0] == heads.dims()[3]);
    if cpu::fuses(&heads) {
        let [lambda, weight] = [lambda, weight].map(|x| in_type(x, DType::F32));
        let parts = (heads.into_dispatch(), lambda.into_dispatch(), weight.into_dispatch());
        return Tensor::from_dispatch(Dispatch::subtract_noise(parts.0, parts.1, parts.2, how));
    }
    plain(heads, lambda, weight, how)
}

fn assert_groups(heads: &Tensor<4>, lambda: &Tensor<1>, ratio: usize) {
    assert_shapes!("difference of heads", heads, lambda;
        "a group must have a signal head at least (ratio 0)": ratio > 0,
        "heads must come in groups of ratio signal heads and a noise head": heads.dims()[1].is_multiple_of(ratio + 1),
        "lambda must be one number": lambda.dims() == [1],
    );
}

fn plain(heads: Tensor<4>, lambda: Tensor<1>, weight: Tensor<1>, how: Combination) -> Tensor<4> {
    let dtype = heads.dtype();
    let combined = difference(in_type(heads, DType::F32), lambda, how.ratio);
    in_type(rms_norm(combined, weight, how.eps) * how.factor, dtype)
}

/// `signal - λ noise` for every signal head, neither normalised nor scaled; shapes as [`subtract_noise`].
///
/// # Panics
/// If the shapes are others, or the ratio is 0.
pub fn difference(heads: Tensor<4>, lambda: Tensor<1>, ratio: usize) -> Tensor<4> {
    assert_groups(&heads, &lambda, ratio);
    let [batch, all, seq, width] = heads.dims();
    let groups = all / (ratio + 1);
    let grouped = heads.reshape([batch, groups, ratio + 1, seq, width]);
    let signal = grouped.clone().narrow(2, 0, ratio);
    let lambda = in_type(lambda, grouped.dtype());
    let noise = grouped.narrow(2, ratio, 1) * lambda.unsqueeze::<5>();
    (signal - noise).reshape([batch, groups * ratio, seq, width])
}

fused!(SubtractNoise: subtract_noise(heads, lambda, weight; how: Combination), run, back);

fn run([heads, lambda, weight]: [FlexTensor; 3], how: Combination) -> (FlexTensor, ([FlexTensor; 3], Combination)) {
    let inputs = [cpu::row_major(heads), lambda.to_contiguous(), weight.to_contiguous()];
    (forward(&inputs[0], &inputs[1], &inputs[2], how), (inputs, how))
}

fn back((inputs, how): ([FlexTensor; 3], Combination), y_grad: FlexTensor, wanted: Wanted<3>) -> InputGrads<Flex, 3> {
    backward(&inputs, &cpu::row_major(y_grad), how, wanted)
}

fn forward(heads: &FlexTensor, lambda: &FlexTensor, weight: &FlexTensor, how: Combination) -> FlexTensor {
    let (view, lambda, weight) = (cpu::View::new(heads), cpu::values(lambda)[0], cpu::values(weight));
    let [batch, all, seq, width] = view.shape;
    let Combination { ratio, eps, factor } = how;
    let signals = all / (ratio + 1) * ratio;
    let (len, chunk) = (batch * seq * signals * width, (POSITIONS * signals * width).max(1));
    let (y, _) = write_chunks(len, chunk, (0..len.div_ceil(chunk)).into_par_iter(), |y, task| {
        let mut difference = vec![0.0; width];
        let written = write_rows(y, width, |index, y| {
            let (row, signal) = (task * POSITIONS + index / signals, index % signals);
            let (b, position) = (row / seq, row % seq);
            let (group, own) = (signal / ratio, signal % ratio);
            let head = |index: usize| view.row(b, group * (ratio + 1) + index, position);
            simd::subtract(head(own), head(ratio), lambda, &mut difference);
            let (y, _) = simd::rms_norm(&difference, weight, eps as f32, y);
            simd::scale(y, factor as f32);
            y
        });
        (written, ())
    });
    cpu::tensor_by_position(y, [batch, signals, seq, width])
}

/// A task of the backward: some positions, what it computes in, and what it adds up over them.
struct Task<'a> {
    heads: cpu::View<'a>,
    y_grads: cpu::View<'a>,
    lambda: f32,
    weight: &'a [f32],
    how: Combination,
    wanted: Wanted<3>,
    /// `signal - λ noise`
    difference: Vec<f32>,
    /// The gradient of the normalised difference.
    scaled: Vec<f32>,
    weight_grad: Vec<f32>,
    lambda_grad: f64,
}

impl Task<'_> {
    /// The gradient of a signal head at a position, written to `to`, if it is needed for anything; adds to the sums.
    fn signal<'y>(
        &mut self,
        [b, position, group, own]: [usize; 4],
        to: &'y mut [MaybeUninit<f32>],
    ) -> Option<&'y mut [f32]> {
        let Combination { ratio, eps, factor } = self.how;
        let (heads, [of_heads, of_lambda, of_weight]) = (self.heads, self.wanted);
        let head = |index: usize| heads.row(b, group * (ratio + 1) + index, position);
        simd::subtract(head(own), head(ratio), self.lambda, &mut self.difference);
        let inverse = simd::rms_inverse(&self.difference, eps as f32);
        self.scaled.copy_from_slice(self.y_grads.row(b, group * ratio + own, position));
        simd::scale(&mut self.scaled, factor as f32);
        let (x, dy, dw) = (&self.difference, &self.scaled, &mut self.weight_grad);
        let grad = match (of_heads || of_lambda, of_weight) {
            (true, true) => simd::rms_norm_backward(x, self.weight, dy, inverse, to, dw),
            (true, false) => simd::rms_norm_back_to_x(x, self.weight, dy, inverse, to),
            (false, _) => {
                simd::rms_norm_back_to_weight(x, dy, inverse, dw);
                return None;
            }
        };
        if of_lambda {
            self.lambda_grad -= f64::from(simd::dot(grad, head(ratio)));
        }
        Some(grad)
    }

    fn totals(self) -> (Vec<f32>, f64) {
        (self.weight_grad, self.lambda_grad)
    }
}

/// Gradients of heads, λ and the weight.
fn backward(
    [heads, lambda, weight]: &[FlexTensor; 3],
    y_grad: &FlexTensor,
    how: Combination,
    wanted: Wanted<3>,
) -> InputGrads<Flex, 3> {
    let (view, weight) = (cpu::View::new(heads), cpu::values(weight));
    let [batch, all, seq, width] = view.shape;
    let [of_heads, of_lambda, of_weight] = wanted;
    let task = || Task {
        heads: view,
        y_grads: cpu::View::new(y_grad),
        lambda: cpu::values(lambda)[0],
        weight,
        how,
        wanted,
        difference: vec![0.0; width],
        scaled: vec![0.0; width],
        weight_grad: vec![0.0; width],
        lambda_grad: 0.0,
    };
    // Row by row of the heads' gradient: each group's signal heads, then its noise head.
    let place = |index: usize, row: usize| {
        let (row, head) = (index * POSITIONS + row / all, row % all);
        [row / seq, row % seq, head / (how.ratio + 1), head % (how.ratio + 1)]
    };
    let (len, chunk) = (batch * seq * all * width, (POSITIONS * all * width).max(1));
    let tasks = (0..len.div_ceil(chunk)).into_par_iter();
    let (heads_grad, sums) = if of_heads {
        let (heads_grad, sums) = write_chunks(len, chunk, tasks, |grads, index| {
            let (mut task, mut noise_grad) = (task(), vec![0.0; width]);
            let written = write_rows(grads, width, |row, grad| {
                let place = place(index, row);
                if place[3] == how.ratio {
                    let written = grad.write_copy_of_slice(&noise_grad);
                    noise_grad.fill(0.0);
                    return written;
                }
                let grad = task.signal(place, grad).unwrap_or_default();
                simd::add_scaled(&mut noise_grad, grad, -task.lambda);
                grad
            });
            (written, task.totals())
        });
        (Some(cpu::tensor_by_position(heads_grad, view.shape)), sums)
    } else {
        let sums = tasks.map(|index| {
            let (mut task, mut grad) = (task(), ScratchBuffer::new(width));
            let rows = (batch * seq - index * POSITIONS).min(POSITIONS) * all;
            let places = (0..rows).map(|row| place(index, row)).filter(|place| place[3] < how.ratio);
            places.for_each(|place| {
                task.signal(place, grad.unwritten());
            });
            task.totals()
        });
        (None, sums.collect())
    };
    let lambda_grad = sums.iter().map(|(_, lambda)| lambda).sum::<f64>() as f32;
    let parts: Vec<Vec<f32>> = sums.into_iter().map(|(weight, _)| weight).collect();
    [
        heads_grad,
        of_lambda.then(|| cpu::tensor(vec![lambda_grad], [1])),
        of_weight.then(|| cpu::tensor(cpu::sum_in_order(width, &parts), [width])),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{agree_with_gradients, every_subset_of_gradients, leaf};

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

    #[test]
    fn gradients_are_the_same_whichever_are_asked_for() {
        let how = Combination { ratio: 2, eps: 1e-5, factor: 0.7 };
        every_subset_of_gradients(&[&[2, 6, 19, 33], &[1], &[33]], |[heads, lambda, weight]| {
            subtract_noise(heads.reshape([2, 6, 19, 33]), lambda, weight, how).reshape([-1])
        });
    }
}
