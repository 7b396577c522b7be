//! The output projection and the cross-entropy over the vocabulary, as one operation.
//!
//! They belong together because the `[tokens, vocab]` logits of training are the largest tensor of a small model and
//! nobody but the loss needs them. They are made a chunk of tokens at a time, and the gradients of both
//! factors right with them (as Liger Kernel does, arXiv 2410.10989, section 3.2): the sum of losses is linear in what
//! comes back, so the backward only has to scale them. Below for the CPU, in
//! `cross_entropy/chunks.rs` for every backend.

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::differentiable::{InputGrads, Wanted, differentiable};
use crate::matrix::{Matrix, MatrixMut};
use crate::product::product;
use crate::scratch::ScratchBuffer;
use crate::shapes::assert_shapes;
use crate::weight::{Weight, as_weight};
use crate::{cpu, simd};

mod chunks;

/// Logits of a chunk at most (8 MiB), as long as it has [`FEWEST_ROWS`].
const LOGITS: usize = 1 << 21;
/// Tokens of a chunk at least: each chunk packs the whole head twice, which of 64 rows took a fifth of the time of a step (a
/// model of 135 million parameters, vocabulary 49,152).
const FEWEST_ROWS: usize = 512;
/// Where at most one of so many tokens is counted, the others are left out of the products. Chosen by us: gathering rows costs
/// little beside a product over the vocabulary.
const FEW: usize = 4;

/// Tokens whose logits are there at once, of so many and over such a vocabulary (on a CPU).
pub fn tokens_of_a_chunk(tokens: usize, vocab: usize) -> usize {
    (LOGITS / vocab.max(1)).max(FEWEST_ROWS).min(tokens.max(1))
}

/// The ids to predict, one per token.
#[derive(Debug, Clone)]
pub struct Targets {
    ids: std::sync::Arc<[i64]>,
}

impl Targets {
    /// Targets from the host; negative ids are ignored positions.
    pub fn new(ids: &[i64]) -> Self {
        Self { ids: ids.into() }
    }

    /// The number of tokens, ignored ones too.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// `[tokens]`: the ids, 0 where ignored; and 1 where a token counts, else 0.
    fn tensors(&self, device: &Device) -> (Tensor<1, Int>, Tensor<1>) {
        let ids: Vec<i32> = self.ids.iter().map(|&id| id.max(0) as i32).collect();
        let counted: Vec<f32> = self.ids.iter().map(|&id| if id < 0 { 0.0 } else { 1.0 }).collect();
        let shape = [self.ids.len()];
        (
            Tensor::from_data(TensorData::new(ids, shape), device),
            Tensor::from_data(TensorData::new(counted, shape), device),
        )
    }
}

/// The result of [`cross_entropy`].
#[derive(Debug, Clone)]
pub struct CrossEntropy {
    /// `[1]`, nats: the sum of the losses; differentiable.
    pub sum: Tensor<1>,
    /// `[tokens]`, nats: `-log softmax(logits)[target]`; 0 where the target is ignored. Without gradient.
    pub losses: Tensor<1>,
    /// `[tokens]`: 1 where the largest logit is the target's (the first of equals), else 0; 0 where ignored.
    pub correct: Tensor<1>,
}

/// Cross-entropy of `hidden · head` against targets, in nats.
///
/// # Shapes
/// - hidden: `[tokens, d_model]`
/// - head: `[d_model, vocab]`
/// - targets: `[tokens]`, every id below vocab
///
/// # Panics
/// If the shapes are others, or an id is not below vocab.
pub fn cross_entropy(hidden: Tensor<2>, head: Tensor<2>, targets: &Targets) -> CrossEntropy {
    let ([tokens, d_model], [rows, vocab]) = (hidden.dims(), head.dims());
    assert_shapes!("cross_entropy", hidden, head, targets;
        "head must have a row per channel of hidden": rows == d_model,
        "there must be a target per token": targets.len() == tokens,
    );
    if let Some(token) = targets.ids.iter().position(|&id| id >= vocab as i64) {
        let id = targets.ids[token];
        panic!("cross_entropy: every target must be below the vocabulary's size, {vocab}; token {token} has {id}");
    }
    if !cpu::fuses(&hidden) {
        return chunks::cross_entropy(hidden, head, targets);
    }
    let (sum, per_token) =
        Dispatch::linear_cross_entropy(hidden.into_dispatch(), as_weight(head).into_dispatch(), targets.clone());
    let per_token = Tensor::<2>::from_dispatch(per_token);
    let row = |index| per_token.clone().narrow(0, index, 1).squeeze_dim::<1>(0);
    CrossEntropy { sum: Tensor::from_dispatch(sum), losses: row(0), correct: row(1) }
}

/// The definition, with all logits at once; what the tests compare with.
#[cfg(test)]
fn plain(hidden: Tensor<2>, head: Tensor<2>, targets: &Targets) -> CrossEntropy {
    let logits = hidden.matmul(head); // [tokens, vocab]
    let (ids, counted) = targets.tensors(&logits.device());
    let best = logits.clone().detach().argmax(1).squeeze_dim::<1>(1);
    let correct = best.equal(ids.clone()).float() * counted.clone();
    // Subtracting the largest logit changes neither value nor gradient, so it need not be differentiated.
    let largest = logits.clone().detach().max_dim(1); // [tokens, 1]
    let shifted = logits - largest;
    let picked = shifted.clone().gather(1, ids.unsqueeze_dim::<2>(1));
    let losses = (shifted.exp().sum_dim(1).log() - picked).squeeze_dim::<1>(1) * counted;
    CrossEntropy { sum: losses.clone().sum(), losses: losses.detach(), correct }
}

#[backend_extension(Flex, Autodiff)]
trait LinearCrossEntropy: Backend {
    /// The sum `[1]`; losses and hits `[2, tokens]`.
    fn linear_cross_entropy(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: Targets,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

impl LinearCrossEntropy for Flex {
    fn linear_cross_entropy(hidden: FlexTensor, head: FlexTensor, targets: Targets) -> (FlexTensor, FlexTensor) {
        let made = forward(&hidden.to_contiguous(), &cpu::not_backwards(head), &targets, [false; 2]);
        (made.sum, made.per_token)
    }
}

impl<C: CheckpointStrategy> LinearCrossEntropy for Autodiff<Flex, C> {
    fn linear_cross_entropy(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: Targets,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let run = |[hidden, head]: [FlexTensor; 2], wanted: Wanted<2>| {
            let made = forward(&hidden.to_contiguous(), &cpu::not_backwards(head), &targets, wanted);
            (made.sum, made.grads, made.per_token)
        };
        let (sum, per_token) = differentiable::<Flex, C, _, _, 2>([hidden, head], run, backward);
        (sum, <Self as AutodiffBackend>::from_inner(per_token))
    }
}

struct Made {
    sum: FlexTensor,
    per_token: FlexTensor,
    /// Of hidden and head, for a gradient of 1; those that are wanted.
    grads: InputGrads<Flex, 2>,
}

fn backward(grads: InputGrads<Flex, 2>, sum_grad: FlexTensor, _: Wanted<2>) -> InputGrads<Flex, 2> {
    let factor = cpu::values(&sum_grad)[0];
    grads.map(|grad| {
        grad.map(|mut grad| {
            grad.storage_mut::<f32>().par_chunks_mut(1 << 15).for_each(|part| simd::scale(part, factor));
            grad
        })
    })
}

/// `of_hidden`, `of_head`: whose gradients to make right with it.
fn forward(all: &FlexTensor, whole_head: &FlexTensor, targets: &Targets, [of_hidden, of_head]: Wanted<2>) -> Made {
    let (strides, hidden, head) = (whole_head.layout().strides(), cpu::matrix(all), Weight::of(whole_head));
    let ([d_model, vocab], tokens, with_grads) = (head.sizes(), targets.len(), of_hidden || of_head);
    assert_eq!(hidden.sizes(), [tokens, d_model], "one target per token");
    let counted: Vec<usize> = (0..tokens).filter(|&at| targets.ids[at] >= 0).collect();
    if FEW * counted.len() <= tokens && tokens > 0 {
        return of_few(all, whole_head, targets, &counted, [of_hidden, of_head]);
    }
    let rows = tokens_of_a_chunk(tokens, vocab);
    let mut logits_buffer = ScratchBuffer::new(rows * vocab);
    let mut per_token = vec![0.0; 2 * tokens];
    let (losses, correct) = per_token.split_at_mut(tokens);
    let mut hidden_grad = Vec::with_capacity(if of_hidden { tokens * d_model } else { 0 });
    // The head's gradient has the layout of the head: a tied one is the embedding, transposed.
    let tied = strides[0] == 1 && strides[1] != 1;
    let mut head_grad: Option<Vec<f32>> = None;

    for from in (0..tokens).step_by(rows) {
        let part = from..(from + rows).min(tokens);
        let chunk = hidden.rows(part.clone());
        let logits = product(chunk, head).parallel().write_into(logits_buffer.unwritten());
        let outs = losses[part.clone()].par_iter_mut().zip(&mut correct[part.clone()]);
        logits.par_chunks_mut(vocab.max(1)).zip(&targets.ids[part.clone()]).zip(outs).for_each(
            |((logits, &id), (loss, correct))| {
                (*loss, *correct) = loss_of_row(logits, id, with_grads);
            },
        );
        let scores = Matrix::by_rows(logits, [part.len(), vocab]);
        if of_hidden {
            product(scores, head.transposed()).parallel().append_to(&mut hidden_grad);
        }
        if of_head {
            let (sizes, of_chunk) = match tied {
                true => ([vocab, d_model], product(scores.transposed(), chunk)),
                false => ([d_model, vocab], product(chunk.transposed(), scores)),
            };
            match &mut head_grad {
                Some(sum) => of_chunk.parallel().add_to(&mut MatrixMut::new(sum, sizes, sizes[1])),
                None => head_grad = Some(of_chunk.parallel().values()),
            }
        }
    }
    // In f64: sums of many losses must not depend on how many there are.
    let sum = losses.iter().map(|&loss| f64::from(loss)).sum::<f64>() as f32;
    let head_grad = || {
        // Without any token, nothing has written it.
        let values = head_grad.unwrap_or_else(|| vec![0.0; d_model * vocab]);
        match tied {
            true => transposed(cpu::tensor(values, [vocab, d_model])),
            false => cpu::tensor(values, [d_model, vocab]),
        }
    };
    let grads = [of_hidden.then(|| cpu::tensor(hidden_grad, [tokens, d_model])), of_head.then(head_grad)];
    Made { sum: cpu::tensor(vec![sum], [1]), per_token: cpu::tensor(per_token, [2, tokens]), grads }
}

/// The same where few tokens are `counted`: of these alone, with zeros for all others.
fn of_few(hidden: &FlexTensor, head: &FlexTensor, targets: &Targets, counted: &[usize], wanted: Wanted<2>) -> Made {
    let (tokens, d_model) = (targets.len(), head.layout().shape()[0]);
    let values = cpu::values(hidden);
    let rows: Vec<f32> = counted.iter().flat_map(|&at| &values[at * d_model..(at + 1) * d_model]).copied().collect();
    let ids: Vec<i64> = counted.iter().map(|&at| targets.ids[at]).collect();
    let made = forward(&cpu::tensor(rows, [counted.len(), d_model]), head, &Targets::new(&ids), wanted);
    let spread = |few: &[f32], width: usize| {
        let mut all = vec![0.0; tokens * width];
        for (row, &at) in few.chunks(width.max(1)).zip(counted) {
            all[at * width..(at + 1) * width].copy_from_slice(row);
        }
        all
    };
    let per_token = cpu::values(&made.per_token).chunks(counted.len().max(1)).flat_map(|few| spread(few, 1)).collect();
    let per_token = if counted.is_empty() { vec![0.0; 2 * tokens] } else { per_token };
    let [of_hidden, of_head] = made.grads;
    let of_hidden = of_hidden.map(|few| cpu::tensor(spread(cpu::values(&few), d_model), [tokens, d_model]));
    Made { sum: made.sum, per_token: cpu::tensor(per_token, [2, tokens]), grads: [of_hidden, of_head] }
}

fn transposed(matrix: FlexTensor) -> FlexTensor {
    let layout = matrix.layout().transpose(0, 1);
    matrix.with_layout(layout)
}

/// Loss and hit of a token; with gradients, its logits are replaced by the gradient of the loss.
fn loss_of_row(logits: &mut [f32], id: i64, with_grads: bool) -> (f32, f32) {
    let Ok(id) = usize::try_from(id) else {
        logits.fill(0.0);
        return (0.0, 0.0);
    };
    let (target, largest) = (logits[id], simd::max(logits));
    let correct = target == largest && !logits[..id].contains(&largest);
    let total = simd::exp_shifted(logits, largest);
    if with_grads {
        simd::scale(logits, 1.0 / total);
        logits[id] -= 1.0;
    }
    (total.ln() - (target - largest), if correct { 1.0 } else { 0.0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{agree, agree_with_gradients, every_subset_of_gradients, leaf, numbers};

    #[test]
    fn fused_agrees_with_plain() {
        // The last one in two chunks.
        for (tokens, d_model, vocab) in [(1, 1, 2), (7, 5, 3), (129, 16, 70), (600, 8, 4100)] {
            let (hidden, head) = (leaf([tokens * d_model]) * 2.0, leaf([d_model * vocab]));
            // Most tokens counted; one of nine; none.
            let counts: [fn(usize) -> bool; 3] = [|i| i % 4 != 1, |i| i % 9 == 4, |_| false];
            for (tied, counts) in counts.into_iter().flat_map(|counts| [(false, counts), (true, counts)]) {
                let id = |i: usize| if counts(i) { (i * 7 % vocab) as i64 } else { -100 };
                let targets = Targets::new(&(0..tokens).map(id).collect::<Vec<i64>>());
                let shaped = |[hidden, head]: [Tensor<1>; 2]| {
                    let head = match tied {
                        false => head.reshape([d_model, vocab]),
                        true => head.reshape([vocab, d_model]).transpose(),
                    };
                    (hidden.reshape([tokens, d_model]), head)
                };
                let run = |form: fn(Tensor<2>, Tensor<2>, &Targets) -> CrossEntropy, inputs| {
                    let (hidden, head) = shaped(inputs);
                    form(hidden, head, &targets)
                };
                let inputs = [&hidden, &head];
                agree_with_gradients(&inputs, |x| run(cross_entropy, x).sum, |x| run(plain, x).sum);
                let (got, want) = (run(cross_entropy, inputs.map(Clone::clone)), run(plain, inputs.map(Clone::clone)));
                agree("losses", &numbers(got.losses), &numbers(want.losses));
                assert_eq!(numbers(got.correct), numbers(want.correct));
            }
        }
    }

    #[test]
    fn ignored_tokens_get_no_gradient() {
        let (hidden, head) = (leaf([5, 4]), leaf([4, 7]));
        let out = cross_entropy(hidden.clone(), head, &Targets::new(&[3, -100, 0, 6, -100]));
        let grads = out.sum.backward();
        let grad = numbers(hidden.grad(&grads).expect("gradient"));
        assert!(grad[4..8].iter().chain(&grad[16..]).all(|&g| g == 0.0) && grad[..4].iter().all(|&g| g != 0.0));
        assert_eq!(numbers(out.losses)[1], 0.0);
    }

    #[test]
    fn survives_large_logits() {
        let device = Device::flex();
        let hidden = Tensor::<2>::from_floats([[1000.0, -1000.0]], &device);
        let head = Tensor::<2>::from_floats([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]], &device);
        let out = cross_entropy(hidden, head, &Targets::new(&[2]));
        assert_eq!((numbers(out.losses), numbers(out.correct)), (vec![2000.0], vec![0.0]));
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let (hidden, head) = (leaf([300, 64]), leaf([64, 500]));
        let targets = Targets::new(&(0..300).collect::<Vec<i64>>());
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            pool.install(|| {
                let out = cross_entropy(hidden.clone(), head.clone(), &targets);
                let grads = out.sum.clone().backward();
                [numbers(out.sum), numbers(hidden.grad(&grads).expect("g")), numbers(head.grad(&grads).expect("g"))]
            })
        };
        assert!(run(1) == run(3));
    }

    #[test]
    fn gradients_are_the_same_whichever_are_asked_for() {
        let targets = Targets::new(&(0..90).map(|i| i % 50 - 3).collect::<Vec<i64>>());
        every_subset_of_gradients(&[&[90, 6], &[6, 30_000]], |[hidden, head]| {
            cross_entropy(hidden.reshape([90, 6]), head.reshape([6, 30_000]), &targets).sum
        });
    }

    #[test]
    fn no_tokens_give_gradients_of_zero() {
        let (hidden, head) = (leaf([0, 4]), leaf([4, 7]));
        let out = cross_entropy(hidden.clone(), head.clone(), &Targets::new(&[]));
        assert_eq!((numbers(out.sum.clone()), numbers(out.losses).len()), (vec![0.0], 0));
        let grads = out.sum.backward();
        assert_eq!(numbers(head.grad(&grads).expect("gradient")), [0.0; 28]);
        assert_eq!(hidden.grad(&grads).expect("gradient").dims(), [0, 4]);
    }
}
