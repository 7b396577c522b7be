//! The loss in chunks of tokens for any backend, in the backend's own operations: the logits of one chunk exist at a time,
//! and what comes back to both factors is made right with them. Logits and losses are f32 whatever the type of the hidden
//! states; the products run in that type.

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{
    Autodiff, AutodiffBackend, Backend, Dispatch, Flex, TensorMetadata, backend_extension, get_or_init_device_settings,
};
use burn::tensor::{DType, FloatDType, IndexingUpdateOp, Shape, Slice, Tensor};

use super::{CrossEntropy, Targets};
use crate::differentiable::{InputGrads, Wanted, differentiable};
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::precision::cast;

/// Logits of a chunk at most: 256 MiB in f32. Chosen by us.
const LOGITS: usize = 1 << 26;

/// See [`super::cross_entropy`].
pub(super) fn cross_entropy(hidden: Tensor<2>, head: Tensor<2>, targets: &Targets) -> CrossEntropy {
    in_chunks(hidden, head, targets, LOGITS)
}

fn in_chunks(hidden: Tensor<2>, head: Tensor<2>, targets: &Targets, logits: usize) -> CrossEntropy {
    let (ids, counted) = targets.tensors(&hidden.device());
    let rows = (logits / head.dims()[1].max(1)).max(1);
    let (sum, losses, correct) = Dispatch::chunked_cross_entropy(
        hidden.into_dispatch(),
        head.into_dispatch(),
        ids.unsqueeze_dim::<2>(1).into_dispatch(),
        counted.unsqueeze_dim::<2>(1).into_dispatch(),
        rows,
    );
    let per_token = |x| Tensor::<2>::from_dispatch(x).squeeze_dim::<1>(1);
    CrossEntropy { sum: Tensor::from_dispatch(sum), losses: per_token(losses), correct: per_token(correct) }
}

/// What a chunk's logits come to.
struct RowLosses<B: Backend> {
    /// `[rows, 1]` in f32.
    losses: FloatTensor<B>,
    correct: FloatTensor<B>,
    /// `[rows, vocab]`, of the logits for a gradient of 1, in their type; only if it is wanted.
    grad: Option<FloatTensor<B>>,
}

/// The losses of rows of logits, in tensor operations unless a backend has something better.
trait LossOfRows: Backend {
    /// # Shapes
    /// - logits: `[rows, vocab]`, ids and counted: `[rows, 1]`
    fn row_losses(
        logits: FloatTensor<Self>,
        ids: IntTensor<Self>,
        counted: FloatTensor<Self>,
        with_grads: bool,
    ) -> RowLosses<Self> {
        let (dtype, settings) = (logits.dtype(), get_or_init_device_settings::<Self>(&logits.device()));
        let logits = cast::<Self>(logits, DType::F32);
        let best = Self::float_argmax(logits.clone(), 1, settings.int_dtype);
        let hits = Self::int_equal(best, ids.clone(), settings.bool_dtype);
        let correct = Self::float_mul(Self::bool_into_float(hits, FloatDType::F32), counted.clone());
        let shifted = Self::float_sub(logits.clone(), Self::float_max_dim(logits, 1));
        let picked = Self::float_gather(1, shifted.clone(), ids.clone());
        let exponentials = Self::float_exp(shifted);
        let total = Self::float_sum_dim(exponentials.clone(), 1);
        let losses = Self::float_mul(Self::float_sub(Self::float_log(total.clone()), picked), counted.clone());
        let grad = with_grads.then(|| {
            let weights = Self::float_mul(exponentials, Self::float_div(counted.clone(), total));
            let grad = Self::float_scatter(1, weights, ids, Self::float_neg(counted), IndexingUpdateOp::Add);
            cast::<Self>(grad, dtype)
        });
        RowLosses { losses, correct, grad }
    }
}

impl LossOfRows for Flex {}

#[cfg(feature = "ndarray")]
impl LossOfRows for burn::backend::NdArray {}

#[cfg(feature = "gpu")]
impl LossOfRows for burn::backend::Cube {
    fn row_losses(
        logits: FloatTensor<Self>,
        ids: IntTensor<Self>,
        counted: FloatTensor<Self>,
        with_grads: bool,
    ) -> RowLosses<Self> {
        let (losses, correct, grad) = gpu::cross_entropy::row_losses(logits, ids, counted, with_grads);
        RowLosses { losses, correct, grad: with_grads.then_some(grad) }
    }
}

/// The loss as an operation of Burn's dispatching backend.
#[backend_extension(Flex, NdArray: cfg(feature = "ndarray"), Cube: cfg(feature = "gpu"), Autodiff)]
trait ChunkedCrossEntropy: Backend {
    /// The sum `[1]`; losses and hits, `[tokens, 1]` each.
    ///
    /// # Shapes
    /// - hidden: `[tokens, d_model]`, head: `[d_model, vocab]`, ids and counted: `[tokens, 1]`
    fn chunked_cross_entropy(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        ids: IntTensor<Self>,
        counted: FloatTensor<Self>,
        rows: usize,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}

macro_rules! chunked {
    ($($On:ty),+) => {
        $(impl ChunkedCrossEntropy for $On {
            fn chunked_cross_entropy(
                hidden: FloatTensor<Self>,
                head: FloatTensor<Self>,
                ids: IntTensor<Self>,
                counted: FloatTensor<Self>,
                rows: usize,
            ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
                let made = forward::<Self>(Inputs { hidden, head, ids, counted }, rows, [false; 2]);
                (made.sum, made.losses, made.correct)
            }
        })+
    };
}

chunked!(Flex);
#[cfg(feature = "ndarray")]
chunked!(burn::backend::NdArray);
#[cfg(feature = "gpu")]
chunked!(burn::backend::Cube);

impl<B: ChunkedCrossEntropy + LossOfRows, C: CheckpointStrategy> ChunkedCrossEntropy for Autodiff<B, C> {
    fn chunked_cross_entropy(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        ids: IntTensor<Self>,
        counted: FloatTensor<Self>,
        rows: usize,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let counted = counted.into_primitive();
        let run = |[hidden, head]: [FloatTensor<B>; 2], wanted: Wanted<2>| {
            let made = forward::<B>(Inputs { hidden, head, ids, counted }, rows, wanted);
            (made.sum, made.grads, (made.losses, made.correct))
        };
        let (sum, (losses, correct)) = differentiable::<B, C, _, _, 2>([hidden, head], run, backward::<B>);
        let constant = <Self as AutodiffBackend>::from_inner;
        (sum, constant(losses), constant(correct))
    }
}

fn backward<B: Backend>(grads: InputGrads<B, 2>, sum_grad: FloatTensor<B>, _: Wanted<2>) -> InputGrads<B, 2> {
    let factor = B::float_reshape(sum_grad, Shape::new([1, 1]));
    grads.map(|grad| {
        grad.map(|grad| {
            let factor = cast::<B>(factor.clone(), grad.dtype());
            B::float_mul(grad, factor)
        })
    })
}

struct Inputs<B: Backend> {
    hidden: FloatTensor<B>,
    head: FloatTensor<B>,
    ids: IntTensor<B>,
    counted: FloatTensor<B>,
}

struct Made<B: Backend> {
    sum: FloatTensor<B>,
    losses: FloatTensor<B>,
    correct: FloatTensor<B>,
    /// Of hidden and head, for a gradient of 1; those that are wanted.
    grads: InputGrads<B, 2>,
}

/// `of_hidden`, `of_head`: whose gradients to make right with it.
fn forward<B: LossOfRows>(inputs: Inputs<B>, rows: usize, [of_hidden, of_head]: Wanted<2>) -> Made<B> {
    let Inputs { hidden, head, ids, counted } = inputs;
    let [tokens, d_model] = hidden.shape().dims::<2>();
    let (dtype, head_dtype, device) = (hidden.dtype(), head.dtype(), hidden.device());
    let head = cast::<B>(head, dtype);
    let (mut losses, mut correct, mut hidden_grads, mut head_grad) = (Vec::new(), Vec::new(), Vec::new(), None);
    for from in (0..tokens).step_by(rows) {
        let count = rows.min(tokens - from);
        let chunk = |x: &FloatTensor<B>| {
            let columns = x.shape()[1];
            B::float_slice(x.clone(), &[Slice::from(from..from + count), Slice::from(0..columns)])
        };
        let (hidden, counted) = (chunk(&hidden), chunk(&counted));
        let ids = B::int_slice(ids.clone(), &[Slice::from(from..from + count), Slice::from(0..1)]);
        let logits = B::float_matmul(hidden.clone(), head.clone());
        let made = B::row_losses(logits, ids, counted, of_hidden || of_head);
        losses.push(made.losses);
        correct.push(made.correct);
        if let Some(grad) = made.grad {
            if of_hidden {
                hidden_grads.push(B::float_matmul(grad.clone(), B::float_swap_dims(head.clone(), 0, 1)));
            }
            if of_head {
                // Summed in the head's own type.
                let part = cast::<B>(B::float_matmul(B::float_swap_dims(hidden, 0, 1), grad), head_dtype);
                head_grad = Some(match head_grad {
                    Some(sum) => B::float_add(sum, part),
                    None => part,
                });
            }
        }
    }
    if tokens == 0 {
        let none = || B::float_zeros(Shape::new([0, 1]), &device, FloatDType::F32);
        (losses, correct) = (vec![none()], vec![none()]);
        hidden_grads = vec![B::float_zeros(Shape::new([0, d_model]), &device, FloatDType::from(dtype))];
        head_grad = Some(B::float_zeros(head.shape(), &device, FloatDType::from(head_dtype)));
    }
    let losses = B::float_cat(losses, 0);
    let grads = [of_hidden.then(|| B::float_cat(hidden_grads, 0)), head_grad.filter(|_| of_head)];
    // A sum over a dimension repeats bit for bit, a sum over everything does not on GPUs.
    let sum = B::float_reshape(B::float_sum_dim(losses.clone(), 0), Shape::new([1]));
    Made { sum, losses, correct: B::float_cat(correct, 0), grads }
}

#[cfg(test)]
mod tests {
    use super::super::plain;
    use super::*;
    use crate::testing::{agree, agree_with_gradients, leaf, numbers};

    #[test]
    fn chunks_agree_with_plain() {
        for (tokens, d_model, vocab) in [(1, 1, 2), (7, 5, 3), (129, 16, 70)] {
            let ids: Vec<i64> = (0..tokens).map(|i| if i % 4 == 1 { -100 } else { (i * 7 % vocab) as i64 }).collect();
            let targets = Targets::new(&ids);
            let (hidden, head) = (leaf([tokens * d_model]) * 2.0, leaf([d_model * vocab]));
            for logits in [LOGITS, 20 * vocab] {
                let run = |chunked: bool, [hidden, head]: [Tensor<1>; 2]| {
                    let (hidden, head) = (hidden.reshape([tokens, d_model]), head.reshape([d_model, vocab]));
                    if chunked { in_chunks(hidden, head, &targets, logits) } else { plain(hidden, head, &targets) }
                };
                let inputs = [&hidden, &head];
                agree_with_gradients(&inputs, |x| run(true, x).sum, |x| run(false, x).sum);
                let (got, want) = (run(true, inputs.map(Clone::clone)), run(false, inputs.map(Clone::clone)));
                agree("losses", &numbers(got.losses), &numbers(want.losses));
                assert_eq!(numbers(got.correct), numbers(want.correct));
            }
        }
    }

    #[test]
    fn bf16_states_leave_the_gradient_of_an_f32_head_in_f32() {
        let (hidden, head) = (leaf([40, 16]), leaf([16, 30]));
        let targets = Targets::new(&(0..40).map(|i| i % 30).collect::<Vec<i64>>());
        let run = |dtype: DType| {
            let out = super::super::cross_entropy(hidden.clone().cast(dtype), head.clone(), &targets);
            assert_eq!(out.sum.dtype(), DType::F32);
            let grads = out.sum.clone().backward();
            let head_grad = head.grad(&grads).expect("gradient");
            assert_eq!(head_grad.dtype(), DType::F32);
            [numbers(out.sum), numbers(head_grad), numbers(hidden.grad(&grads).expect("gradient"))]
        };
        for (got, want) in run(DType::BF16).iter().zip(&run(DType::F32)) {
            let norm = |x: &[f32]| x.iter().map(|v| v * v).sum::<f32>().sqrt();
            let difference: Vec<f32> = got.iter().zip(want).map(|(a, b)| a - b).collect();
            assert!(norm(&difference) < 2e-2 * norm(want), "{} of {}", norm(&difference), norm(want));
        }
    }
}
