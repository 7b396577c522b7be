//! The short convolution of recurrent mechanisms (Gu and Dao 2023, arXiv 2312.00752; Yang et al. 2024, arXiv 2412.06464): causal
//! along the tokens, channel by channel, without bias, then silu.
//!
//! ```text
//! y_t = silu(Σ_j w_j ⊙ x_{t-j})      j from 0 to kernel - 1
//! ```
//! Fused, a task takes some tokens of a row of the batch with the few before them; the backward computes what goes into the silu
//! once more.

use std::ops::Range;
use std::sync::Arc;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Dispatch, Flex};
use burn::tensor::{DType, Tensor, TensorData, activation};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::differentiable::{InputGrads, Wanted, fused};
use crate::shapes::assert_shapes;
use crate::simd::{gate_gradient, sigmoid, vectorized};
use crate::{cpu, in_type};

/// Tokens of a task. Chosen by us.
const TOKENS: usize = 64;

/// What a convolution reads before the first token, and where it stops.
#[derive(Debug, Clone)]
pub struct Before {
    /// `[batch, kernel - 1, channels]`: the inputs before the first token; none means zeros. No gradient goes to them.
    pub inputs: Option<Tensor<3>>,
    /// `[batch * seq]`: how many tokens directly before each token are of its document; none means all.
    pub of_document: Option<Arc<[usize]>>,
}

/// `silu` of the convolution.
///
/// # Shapes
/// - x, output: `[batch, seq, channels]`
/// - weight: `[channels, kernel]`; the last is of the token itself
///
/// # Panics
/// If the shapes are others, or there are documents and inputs before the first token.
pub fn short_convolution(x: Tensor<3>, weight: Tensor<2>, before: Before) -> Tensor<3> {
    let ([batch, seq, channels], [of_weight, kernel]) = (x.dims(), weight.dims());
    assert_shapes!("short_convolution", x, weight;
        "weight must have a row per channel of x, and a column": of_weight == channels && kernel > 0);
    if let Some(inputs) = &before.inputs {
        assert_shapes!("short_convolution", x, weight, inputs;
            "inputs before must be [batch, kernel - 1, channels]": inputs.dims() == [batch, kernel - 1, channels],
            "inputs before a document are none": before.of_document.is_none());
    }
    if let Some(counts) = &before.of_document {
        assert_eq!(counts.len(), batch * seq, "short_convolution: a count for every token; x {:?}", x.dims());
    }
    if !cpu::fuses(&x) {
        return plain(x, weight, before);
    }
    let (weight, of_document) = (in_type(weight, DType::F32), before.of_document);
    match before.inputs {
        // They are a part of the sequence whose outputs nobody wants.
        Some(inputs) => {
            let x = Tensor::cat(vec![in_type(inputs, DType::F32).detach(), x], 1);
            let y = Dispatch::short_convolution(x.into_dispatch(), weight.into_dispatch(), of_document);
            Tensor::<3>::from_dispatch(y).narrow(1, kernel - 1, seq)
        }
        None => {
            Tensor::from_dispatch(Dispatch::short_convolution(x.into_dispatch(), weight.into_dispatch(), of_document))
        }
    }
}

fn plain(x: Tensor<3>, weight: Tensor<2>, before: Before) -> Tensor<3> {
    let ([batch, seq, channels], [_, kernel], device) = (x.dims(), weight.dims(), x.device());
    let inputs = before.inputs.unwrap_or_else(|| Tensor::zeros([batch, kernel - 1, channels], &device));
    let inputs = Tensor::cat(vec![inputs, x], 1); // [batch, kernel - 1 + seq, channels]
    let tap = |at: usize| {
        let weight = weight.clone().narrow(1, at, 1).reshape([1, 1, channels]);
        let shifted = inputs.clone().narrow(1, at, seq) * weight;
        let Some(counts) = &before.of_document else { return shifted };
        let reached: Vec<f32> = counts.iter().map(|&count| f32::from(count >= kernel - 1 - at)).collect();
        shifted * Tensor::from_data(TensorData::new(reached, [batch, seq, 1]), &device)
    };
    activation::silu((1..kernel).fold(tap(0), |sum, at| sum + tap(at)))
}

fused!(ShortConvolution: short_convolution(x, weight; of_document: Option<Arc<[usize]>>), forward, backward);

/// What a task needs of the forward.
#[derive(Debug, Clone)]
struct Kept {
    x: FlexTensor,
    /// `[kernel, channels]`: of the token itself first.
    weight: Vec<f32>,
    of_document: Option<Arc<[usize]>>,
}

/// One row of the batch.
struct Row<'a> {
    /// `[seq, channels]`
    x: &'a [f32],
    /// `[kernel, channels]`
    weight: &'a [f32],
    channels: usize,
    of_document: Option<&'a [usize]>,
}

impl Kept {
    /// The rows of the batch, and the number of tokens and channels.
    fn sizes(&self) -> [usize; 3] {
        let shape = cpu::shape(&self.x);
        [shape[0], shape[1], shape[2]]
    }

    fn row(&self, row: usize) -> Row<'_> {
        let [_, seq, channels] = self.sizes();
        let x = &cpu::values(&self.x)[row * seq * channels..][..seq * channels];
        let of_document = self.of_document.as_ref().map(|counts| &counts[row * seq..(row + 1) * seq]);
        Row { x, weight: &self.weight, channels, of_document }
    }
}

impl Row<'_> {
    /// How many tokens before it token `t` reads.
    fn reach(&self, t: usize) -> usize {
        let kernel = self.weight.len() / self.channels.max(1);
        self.of_document.map_or(t, |counts| counts[t].min(t)).min(kernel - 1)
    }

    /// What goes into the silu of token `t`.
    fn sum(&self, t: usize, sum: &mut [f32]) {
        sum.fill(0.0);
        for back in 0..=self.reach(t) {
            add_product(sum, self.tap(back), self.token(t - back));
        }
    }

    fn token(&self, t: usize) -> &[f32] {
        &self.x[t * self.channels..][..self.channels]
    }

    fn tap(&self, back: usize) -> &[f32] {
        &self.weight[back * self.channels..][..self.channels]
    }
}

vectorized! {
    /// `sum += x * y`
    fn add_product(sum: &mut [f32], x: &[f32], y: &[f32]) {
        let n = sum.len();
        let (x, y) = (&x[..n], &y[..n]);
        for i in 0..n {
            sum[i] += x[i] * y[i];
        }
    }

    /// `x = silu(x)`
    fn silu(x: &mut [f32]) {
        for x in x {
            *x *= sigmoid(*x);
        }
    }

    /// Backward of [`silu`]: `x` becomes its gradient.
    fn silu_backward(x: &mut [f32], y_grad: &[f32]) {
        let y_grad = &y_grad[..x.len()];
        for (x, dy) in x.iter_mut().zip(y_grad) {
            *x = gate_gradient(*x, 1.0, *dy, sigmoid(*x));
        }
    }
}

/// The tasks of a batch: memory for each, its row of the batch, its tokens.
fn tasks(memory: &mut [f32], [batch, seq, channels]: [usize; 3]) -> Vec<(&mut [f32], usize, Range<usize>)> {
    let of_row = |row| (0..seq).step_by(TOKENS).map(move |from| (row, from..(from + TOKENS).min(seq)));
    let mut rest = memory;
    let mut next = |(row, tokens): (usize, Range<usize>)| {
        let (own, behind) = std::mem::take(&mut rest).split_at_mut(tokens.len() * channels);
        rest = behind;
        (own, row, tokens)
    };
    (0..batch).flat_map(of_row).map(&mut next).collect()
}

fn forward([x, weight]: [FlexTensor; 2], of_document: Option<Arc<[usize]>>) -> (FlexTensor, Kept) {
    let [channels, kernel] = weight.layout().shape()[..] else { panic!("a weight {:?}", weight.layout()) };
    let weight = weight.to_contiguous();
    let of_channels = cpu::values(&weight);
    let weight = (0..kernel * channels).map(|at| of_channels[at % channels * kernel + kernel - 1 - at / channels]);
    let kept = Kept { x: x.to_contiguous(), weight: weight.collect(), of_document };
    let sizes @ [batch, seq, _] = kept.sizes();
    let mut y = vec![0.0; batch * seq * channels];
    tasks(&mut y, sizes).into_par_iter().for_each(|(y, row, tokens)| {
        let row = kept.row(row);
        for (t, y) in tokens.zip(y.chunks_mut(channels)) {
            row.sum(t, y);
            silu(y);
        }
    });
    (cpu::tensor(y, sizes), kept)
}

/// Gradients of x and of the weight.
fn backward(kept: Kept, y_grad: FlexTensor, wanted: Wanted<2>) -> InputGrads<Flex, 2> {
    let y_grad = y_grad.to_contiguous();
    let (y_grads, sizes) = (cpu::values(&y_grad), kept.sizes());
    let [batch, seq, channels] = sizes;
    let kernel = kept.weight.len() / channels.max(1);
    let mut x_grad = vec![0.0; batch * seq * channels];
    let parts: Vec<Vec<f32>> = tasks(&mut x_grad, sizes)
        .into_par_iter()
        .map(|(x_grad, at, tokens)| {
            let (row, y_grads) = (kept.row(at), &y_grads[at * seq * channels..][..seq * channels]);
            // Of the task's tokens, and of those behind them that read them.
            let first = tokens.start;
            let read_by = first..(tokens.end + kernel - 1).min(seq);
            let mut sums = vec![0.0; read_by.len() * channels];
            for (t, sum) in read_by.clone().zip(sums.chunks_exact_mut(channels)) {
                row.sum(t, sum);
                silu_backward(sum, &y_grads[t * channels..]);
            }
            let sum = |t: usize| &sums[(t - first) * channels..][..channels];
            let mut weight_grad = vec![0.0; kernel * channels];
            for (t, x_grad) in tokens.zip(x_grad.chunks_exact_mut(channels)) {
                for reader in (t..read_by.end.min(t + kernel)).filter(|&reader| reader - t <= row.reach(reader)) {
                    add_product(x_grad, row.tap(reader - t), sum(reader));
                }
                for (back, grad) in weight_grad.chunks_exact_mut(channels).enumerate().take(row.reach(t) + 1) {
                    add_product(grad, sum(t), row.token(t - back));
                }
            }
            weight_grad
        })
        .collect();
    let of_weight = || {
        let grad = cpu::sum_in_order(kernel * channels, &parts);
        let by_channel = (0..channels * kernel).map(|at| grad[(kernel - 1 - at % kernel) * channels + at / kernel]);
        cpu::tensor(by_channel.collect(), [channels, kernel])
    };
    [wanted[0].then(|| cpu::tensor(x_grad, sizes)), wanted[1].then(of_weight)]
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::testing::{agree, agree_with_gradients, every_subset_of_gradients, leaf, normal, numbers};

    fn agrees_with_plain([batch, seq, channels, kernel]: [usize; 4], before: &Before) {
        let (x, weight) = (leaf([batch * seq * channels]), leaf([channels * kernel]));
        let apply = |form: fn(Tensor<3>, Tensor<2>, Before) -> Tensor<3>, [x, weight]: [Tensor<1>; 2]| {
            let x = x.reshape([batch, channels, seq]).swap_dims(1, 2);
            form(x, weight.reshape([channels, kernel]), before.clone()).reshape([-1])
        };
        agree_with_gradients(&[&x, &weight], |x| apply(short_convolution, x), |x| apply(plain, x));
    }

    const NOTHING: Before = Before { inputs: None, of_document: None };

    #[test]
    fn fused_agrees_with_plain() {
        for sizes in [[1, 1, 1, 1], [2, 3, 5, 4], [1, 64, 33, 2], [3, 130, 8, 4], [1, 67, 3, 70]] {
            agrees_with_plain(sizes, &NOTHING);
        }
    }

    #[test]
    fn fused_agrees_with_plain_behind_other_inputs_and_in_documents() {
        let inputs = normal([2, 3, 5], &Device::flex().autodiff());
        agrees_with_plain([2, 70, 5, 4], &Before { inputs: Some(inputs), of_document: None });
        // Documents of seven tokens.
        let counts = (0..2 * 70).map(|at| at % 70 % 7).collect();
        agrees_with_plain([2, 70, 5, 4], &Before { inputs: None, of_document: Some(counts) });
    }

    #[test]
    fn a_sequence_in_parts_is_the_whole() {
        let device = Device::flex();
        let (x, weight) = (normal([2, 9, 5], &device), normal([5, 4], &device));
        let whole = short_convolution(x.clone(), weight.clone(), NOTHING);
        let inputs = Some(x.clone().narrow(1, 3, 3));
        let rest = short_convolution(x.narrow(1, 6, 3), weight, Before { inputs, of_document: None });
        agree("the last three", &numbers(rest), &numbers(whole.narrow(1, 6, 3)));
    }

    #[test]
    fn gradients_are_the_same_whichever_are_asked_for() {
        every_subset_of_gradients(&[&[2, 70, 5], &[5, 4]], |[x, weight]| {
            short_convolution(x.reshape([2, 70, 5]), weight.reshape([5, 4]), NOTHING).reshape([-1])
        });
    }
}
