//! The output projection and the cross-entropy over the vocabulary, as one operation.
//!
//! They belong together because the `[tokens, vocab]` logits of training are the largest tensor of a small model and
//! nobody but the loss needs them. They are made a chunk of tokens at a time, and the gradients of both
//! factors right with them (as Liger Kernel does, arXiv 2410.10989, section 3.2): the sum of losses is linear in what
//! comes back, so the backward only has to scale them. Below for the CPU, in
//! `cross_entropy/chunks.rs` for every backend.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::cpu::{Destination, Matrix};
use crate::{cpu, simd};

mod chunks;

/// Logits of a chunk at most (8 MiB), as long as it has [`FEWEST_ROWS`].
const LOGITS: usize = 1 << 21;
/// Tokens of a chunk at least; fewer would make the products slow.
const FEWEST_ROWS: usize = 64;

/// What is to be predicted, one entry a token.
#[derive(Debug, Clone)]
pub struct Targets {
    ids: std::sync::Arc<[i64]>,
}

impl Targets {
    /// Targets from the host; negative ids are ignored positions.
    pub fn new(ids: &[i64]) -> Self {
        Self { ids: ids.into() }
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
pub fn cross_entropy(hidden: Tensor<2>, head: Tensor<2>, targets: &Targets) -> CrossEntropy {
    if !cpu::fuses(&hidden) {
        return chunks::cross_entropy(hidden, head, targets);
    }
    let (sum, per_token) =
        Dispatch::linear_cross_entropy(hidden.into_dispatch(), head.into_dispatch(), targets.clone());
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
        let made = forward(&hidden.to_contiguous(), &head, &targets, false);
        (made.sum, made.per_token)
    }
}

impl<C: CheckpointStrategy> LinearCrossEntropy for Autodiff<Flex, C> {
    fn linear_cross_entropy(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: Targets,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        #[derive(Debug)]
        struct Step;
        impl Backward<Flex, 2> for Step {
            type State = [FlexTensor; 2];

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
                let factor = cpu::values(&grads.consume::<Flex>(&ops.node))[0];
                for (parent, mut grad) in ops.parents.into_iter().zip(ops.state) {
                    if let Some(node) = parent {
                        grad.storage_mut::<f32>().par_chunks_mut(1 << 15).for_each(|part| simd::scale(part, factor));
                        grads.register::<Flex>(node.id, grad);
                    }
                }
            }
        }
        let ((hidden, hidden_node), (head, head_node)) = (hidden.into_parts(), head.into_parts());
        let hidden = hidden.to_contiguous();
        let (sum, per_token) = match Step.prepare::<C>([hidden_node, head_node]).compute_bound().stateful() {
            OpsKind::Tracked(step) => {
                let made = forward(&hidden, &head, &targets, true);
                let grads = made.grads.unwrap_or_else(|| unreachable!("asked for"));
                (step.finish(grads, made.sum), made.per_token)
            }
            OpsKind::UnTracked(step) => {
                let made = forward(&hidden, &head, &targets, false);
                (step.finish(made.sum), made.per_token)
            }
        };
        (sum, <Self as AutodiffBackend>::from_inner(per_token))
    }
}

struct Made {
    sum: FlexTensor,
    per_token: FlexTensor,
    /// Of hidden and head, for a gradient of 1.
    grads: Option<[FlexTensor; 2]>,
}

fn forward(hidden: &FlexTensor, head: &FlexTensor, targets: &Targets, with_grads: bool) -> Made {
    let all = cpu::values(hidden);
    let ([d_model, vocab], strides) = (cpu::sizes(head), head.layout().strides());
    let tokens = targets.ids.len();
    assert_eq!(all.len(), tokens * d_model, "one target per token");
    let head_matrix = Matrix::new(head);
    let rows = (LOGITS / vocab.max(1)).max(FEWEST_ROWS).min(tokens.max(1));
    let mut logits = cpu::room(rows * vocab);
    let mut per_token = cpu::room(2 * tokens);
    let (losses, correct) = per_token.split_at_mut(tokens);
    let mut hidden_grad = if with_grads { cpu::room(tokens * d_model) } else { Vec::new() };
    // The head's gradient lies as the head does: a tied one is the embedding, seen from the side.
    let tied = strides[0] == 1 && strides[1] != 1;
    let mut head_grad = if with_grads { cpu::room(d_model * vocab) } else { Vec::new() };
    let into = |start: *mut f32, rows: usize, add: bool| Destination { start, rows, add, parallel: true };

    for from in (0..tokens).step_by(rows) {
        let count = rows.min(tokens - from);
        let chunk = Matrix::by_rows(all[from * d_model..].as_ptr(), d_model);
        let logits = &mut logits[..count * vocab];
        // SAFETY: `logits` is `[count, vocab]`, and nobody else has it.
        unsafe {
            cpu::product([count, d_model, vocab], chunk, head_matrix, 1.0, into(logits.as_mut_ptr(), vocab, false))
        };
        let ids = &targets.ids[from..from + count];
        let outs = losses[from..from + count].par_iter_mut().zip(&mut correct[from..from + count]);
        logits.par_chunks_mut(vocab).zip(ids).zip(outs).for_each(|((logits, &id), (loss, correct))| {
            (*loss, *correct) = loss_of_row(logits, id, with_grads);
        });
        if !with_grads {
            continue;
        }
        let scores = Matrix::by_rows(logits.as_ptr(), vocab);
        let hidden_into = into(hidden_grad[from * d_model..].as_mut_ptr(), d_model, false);
        // SAFETY: both results are this function's own, and of the sizes given.
        unsafe {
            cpu::product([count, vocab, d_model], scores, head_matrix.transposed(), 1.0, hidden_into);
            if tied {
                let head_into = into(head_grad.as_mut_ptr(), d_model, from > 0);
                cpu::product([vocab, count, d_model], scores.transposed(), chunk, 1.0, head_into);
            } else {
                let head_into = into(head_grad.as_mut_ptr(), vocab, from > 0);
                cpu::product([d_model, count, vocab], chunk.transposed(), scores, 1.0, head_into);
            }
        }
    }
    // In f64: sums of many losses must not depend on how many there are.
    let sum = losses.iter().map(|&loss| f64::from(loss)).sum::<f64>() as f32;
    let grads = with_grads.then(|| {
        let head_grad = match tied {
            true => transposed(cpu::tensor(head_grad, [vocab, d_model])),
            false => cpu::tensor(head_grad, [d_model, vocab]),
        };
        [cpu::tensor(hidden_grad, [tokens, d_model]), head_grad]
    });
    Made { sum: cpu::tensor(vec![sum], [1]), per_token: cpu::tensor(per_token, [2, tokens]), grads }
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
    use crate::testing::{agree, agree_with_gradients, leaf, numbers};

    #[test]
    fn fused_agrees_with_plain() {
        for (tokens, d_model, vocab) in [(1, 1, 2), (7, 5, 3), (129, 16, 70), (150, 8, 30_000)] {
            let ids: Vec<i64> = (0..tokens).map(|i| if i % 4 == 1 { -100 } else { (i * 7 % vocab) as i64 }).collect();
            let targets = Targets::new(&ids);
            let (hidden, head) = (leaf([tokens * d_model]) * 2.0, leaf([d_model * vocab]));
            for tied in [false, true] {
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
}
