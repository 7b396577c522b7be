//! The gated delta rule (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464, eq. 10): per head a state S that every token decays,
//! corrects and reads.
//!
//! ```text
//! S_t = g S_{t-1} + k ⊗ u,   u = β (v - (g S_{t-1})ᵀ k),   o = S_tᵀ q
//! ```
//! Fused, the forward walks over the tokens of a head with 32 columns of its state at a time (`delta_rule/walk.rs`): a sequence in parts
//! gives the same bits as the whole. The backward keeps nothing of the forward, and is the papers' form in products of matrices,
//! chunk by chunk of a head's tokens (`delta_rule/back.rs`). Time grows with the length of the sequence, and memory, of which the backward
//! has a state for every chunk of the heads at work. Elsewhere, on a GPU above all, both ways are those products, of all heads at once
//! (`delta_rule/chunks.rs`). A decay of 0 is as good as any other in all of them.

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Tensor};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use self::back::{TokenGrads, back};
use self::chunks::by_chunks;
use self::walk::{LANES, Lanes, Tokens};
use crate::cpu::{self, View, row_major};
use crate::differentiable::{InputGrads, Wanted, differentiable};
use crate::in_type;
use crate::matrix::{Matrix, MatrixMut};
use crate::scratch::Shared;
use crate::shapes::assert_shapes;

mod back;
mod chunks;
mod walk;

/// The inputs of the recurrence.
#[derive(Debug, Clone)]
pub struct DeltaRule {
    /// `[batch, seq, key_heads, k_dim]`; each key head serves as many consecutive heads as the others.
    pub q: Tensor<4>,
    /// `[batch, seq, key_heads, k_dim]`
    pub k: Tensor<4>,
    /// `[batch, seq, heads, v_dim]`
    pub v: Tensor<4>,
    /// `[batch, seq, heads]`: how much of the error is corrected.
    pub beta: Tensor<3>,
    /// `[batch, seq, heads]`: what is left of the state.
    pub decay: Tensor<3>,
}

/// The outputs, `[batch, seq, heads, v_dim]`, and the last state. No gradient goes through the states.
///
/// # Shapes
/// - state: `[batch, heads, k_dim, v_dim]`, before the first token
///
/// # Panics
/// If the shapes disagree.
pub fn delta_rule(rule: DeltaRule, state: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
    let DeltaRule { q, k, v, beta, decay } = &rule;
    let ([batch, seq, key_heads, k_dim], [.., heads, v_dim]) = (q.dims(), v.dims());
    assert_shapes!("delta_rule", q, k, v, beta, decay, state;
        "k must be of q's shape": k.dims() == q.dims(),
        "v must have q's batch and seq": v.dims() == [batch, seq, heads, v_dim],
        "q's heads must divide those of v": heads.is_multiple_of(key_heads),
        "beta and decay must be [batch, seq, heads]": beta.dims() == [batch, seq, heads] && decay.dims() == beta.dims(),
        "the state must be [batch, heads, k_dim, v_dim]": state.dims() == [batch, heads, k_dim, v_dim],
        "there must be a token and a key head": seq > 0 && key_heads > 0,
    );
    if !cpu::fuses(q) {
        return if seq == 1 { plain(rule, state) } else { by_chunks(rule, state) };
    }
    let [k, v] = [rule.k, rule.v].map(|x| in_type(x, DType::F32));
    let [beta, decay] = [rule.beta, rule.decay].map(|x| in_type(x, DType::F32));
    let (read, state) = Dispatch::delta_rule(
        rule.q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        beta.into_dispatch(),
        decay.into_dispatch(),
        in_type(state, DType::F32).into_dispatch(),
    );
    (Tensor::from_dispatch(read), Tensor::from_dispatch(state))
}

/// The definition in tensor operations, token by token.
fn plain(rule: DeltaRule, mut state: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
    let DeltaRule { q, k, v, beta, decay } = rule;
    let ([batch, seq, key_heads, k_dim], [.., heads, v_dim]) = (q.dims(), v.dims());
    let of_heads = |x: Tensor<4>| {
        let x = x.reshape([batch, seq, key_heads, 1, k_dim]);
        x.expand([batch, seq, key_heads, heads / key_heads, k_dim]).reshape([batch, seq, heads, k_dim])
    };
    let (q, k) = (of_heads(q), of_heads(k));
    let mut read = Vec::with_capacity(seq);
    for token in 0..seq {
        let vector = |x: &Tensor<4>, width: usize| x.clone().narrow(1, token, 1).reshape([batch, heads, 1, width]);
        let number = |x: &Tensor<3>| x.clone().narrow(1, token, 1).reshape([batch, heads, 1, 1]);
        let (q, k, v) = (vector(&q, k_dim), vector(&k, k_dim), vector(&v, v_dim));
        state = state * number(&decay);
        let correction = (v - k.clone().matmul(state.clone())) * number(&beta);
        state = state + k.swap_dims(2, 3).matmul(correction);
        read.push(q.matmul(state.clone()).reshape([batch, 1, heads, v_dim]));
    }
    (Tensor::cat(read, 1), state)
}

#[backend_extension(Flex, Autodiff)]
trait DeltaRuleOps: Backend {
    fn delta_rule(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        decay: FloatTensor<Self>,
        state: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

impl DeltaRuleOps for Flex {
    fn delta_rule(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        beta: FlexTensor,
        decay: FlexTensor,
        state: FlexTensor,
    ) -> (FlexTensor, FlexTensor) {
        forward(&laid_out([q, k, v, beta, decay]), &state.to_contiguous())
    }
}

impl<C: CheckpointStrategy> DeltaRuleOps for Autodiff<Flex, C> {
    fn delta_rule(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        decay: FloatTensor<Self>,
        state: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let state = state.into_primitive().to_contiguous();
        let run = |inputs: [FlexTensor; 5], _: Wanted<5>| {
            let inputs = laid_out(inputs);
            let (read, last) = forward(&inputs, &state);
            (read, (inputs, state), last)
        };
        let back = |(inputs, state): ([FlexTensor; 5], FlexTensor), grad: FlexTensor, wanted: Wanted<5>| {
            backward(&inputs, &state, &row_major(grad), wanted) as InputGrads<Flex, 5>
        };
        let (read, last) = differentiable::<Flex, C, _, _, 5>([q, k, v, beta, decay], run, back);
        (read, <Self as AutodiffBackend>::from_inner(last))
    }
}

/// Vectors with contiguous rows, numbers contiguous.
fn laid_out([q, k, v, beta, decay]: [FlexTensor; 5]) -> [FlexTensor; 5] {
    [row_major(q), row_major(k), row_major(v), beta.to_contiguous(), decay.to_contiguous()]
}

/// The inputs of all heads.
struct Inputs<'a> {
    q: View<'a>,
    k: View<'a>,
    v: View<'a>,
    beta: &'a [f32],
    decay: &'a [f32],
    sizes: Sizes,
}

#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    seq: usize,
    key_heads: usize,
    heads: usize,
    k_dim: usize,
    v_dim: usize,
}

impl Sizes {
    /// Heads of a key head.
    fn share(self) -> usize {
        self.heads / self.key_heads
    }
}

impl<'a> Inputs<'a> {
    fn of([q, k, v, beta, decay]: &'a [FlexTensor; 5]) -> Self {
        let [q, k, v] = [q, k, v].map(View::new);
        let ([batch, seq, key_heads, k_dim], [.., heads, v_dim]) = (q.shape, v.shape);
        let sizes = Sizes { batch, seq, key_heads, heads, k_dim, v_dim };
        Self { q, k, v, beta: cpu::values(beta), decay: cpu::values(decay), sizes }
    }

    fn of_head(&self, row: usize, head: usize) -> Tokens<'a> {
        let Sizes { seq, heads, .. } = self.sizes;
        let number = |x: &'a [f32]| Matrix::new(&x[row * seq * heads + head..], [seq, 1], [heads, 1]);
        let key_head = head / self.sizes.share();
        Tokens {
            q: self.q.positions(row, key_head),
            k: self.k.positions(row, key_head),
            v: self.v.positions(row, head),
            beta: number(self.beta),
            decay: number(self.decay),
        }
    }
}

/// Some columns of a state, from the one at `from` on.
fn columns(state: &[f32], v_dim: usize, from: usize) -> Vec<Lanes> {
    state.chunks_exact(v_dim).map(|row| walk::load(row, from)).collect()
}

/// The outputs, and the last state.
fn forward(inputs: &[FlexTensor; 5], state: &FlexTensor) -> (FlexTensor, FlexTensor) {
    let inputs = Inputs::of(inputs);
    let Sizes { batch, seq, heads, k_dim, v_dim, .. } = inputs.sizes;
    let mut read = vec![0.0; batch * seq * heads * v_dim];
    let mut states = cpu::values(state).to_vec();
    let to = Shared::new(&mut read);
    states.par_chunks_mut((k_dim * v_dim).max(1)).enumerate().for_each(|(task, state)| {
        let (row, head) = (task / heads, task % heads);
        let tokens = inputs.of_head(row, head);
        // SAFETY: a head's outputs are written by this task alone.
        let mut read = unsafe { rows_of(&to, [row, head], inputs.sizes, v_dim) };
        for from in (0..v_dim).step_by(LANES) {
            let mut lanes = columns(state, v_dim, from);
            walk::read(&mut lanes, &tokens, from, &mut read);
            for (row, lanes) in state.chunks_exact_mut(v_dim).zip(&lanes) {
                walk::store(lanes, row, from);
            }
        }
    });
    (cpu::tensor(read, [batch, seq, heads, v_dim]), cpu::tensor(states, [batch, heads, k_dim, v_dim]))
}

/// The rows of one head, of `width` numbers each, of memory for all heads.
///
/// # Safety
/// As long as they live, nobody else reads or writes them.
unsafe fn rows_of<'a>(
    memory: &Shared<'a, f32>,
    [row, head]: [usize; 2],
    Sizes { seq, heads, .. }: Sizes,
    width: usize,
) -> MatrixMut<'a, f32> {
    let at = (row * seq * heads + head) * width;
    // SAFETY: the caller's promise.
    unsafe { MatrixMut::of_shared(memory, at, [seq, width], heads * width) }
}

/// Gradients of q, k, v, beta and decay.
fn backward(
    inputs: &[FlexTensor; 5],
    state: &FlexTensor,
    grad: &FlexTensor,
    wanted: Wanted<5>,
) -> [Option<FlexTensor>; 5] {
    let (inputs, grad, starts) = (Inputs::of(inputs), View::new(grad), cpu::values(state));
    let sizes = inputs.sizes;
    let Sizes { batch, seq, key_heads, heads, k_dim, v_dim } = sizes;
    let zeros = |heads: usize, width: usize| vec![0.0f32; batch * seq * heads * width];
    let (mut q, mut k, mut v) = (zeros(key_heads, k_dim), zeros(key_heads, k_dim), zeros(heads, v_dim));
    let (mut beta, mut decay) = (zeros(heads, 1), zeros(heads, 1));
    let [to_q, to_k, to_v, to_beta, to_decay] =
        [&mut q, &mut k, &mut v, &mut beta, &mut decay].map(|values| Shared::new(values));
    (0..batch * key_heads).into_par_iter().for_each(|task| {
        let (row, key_head) = (task / key_heads, task % key_heads);
        for head in key_head * sizes.share()..(key_head + 1) * sizes.share() {
            let of_keys = Sizes { heads: key_heads, ..sizes };
            // SAFETY: the gradients of a key head and of the heads that it serves are written by this task alone.
            let mut to = unsafe {
                TokenGrads {
                    q: rows_of(&to_q, [row, key_head], of_keys, k_dim),
                    k: rows_of(&to_k, [row, key_head], of_keys, k_dim),
                    v: rows_of(&to_v, [row, head], sizes, v_dim),
                    beta: rows_of(&to_beta, [row, head], sizes, 1),
                    decay: rows_of(&to_decay, [row, head], sizes, 1),
                }
            };
            let start = &starts[(row * heads + head) * k_dim * v_dim..][..k_dim * v_dim];
            back(&inputs.of_head(row, head), start, &grad.positions(row, head), &mut to);
        }
    });
    let shaped = |at: usize, values: Vec<f32>, shape: &[usize]| wanted[at].then(|| cpu::tensor(values, shape));
    [
        shaped(0, q, &[batch, seq, key_heads, k_dim]),
        shaped(1, k, &[batch, seq, key_heads, k_dim]),
        shaped(2, v, &[batch, seq, heads, v_dim]),
        shaped(3, beta, &[batch, seq, heads]),
        shaped(4, decay, &[batch, seq, heads]),
    ]
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, activation};

    use super::*;
    use crate::testing::{agree, agree_with_gradients, every_subset_of_gradients, leaf, normal, numbers};

    /// How the decays of a test are made of normal numbers.
    type Decays = fn(Tensor<1>) -> Tensor<1>;

    /// As the layer makes them.
    const BETWEEN: Decays = |x| activation::sigmoid(x + 2.0);

    /// Batch, tokens, key heads, heads of each, channels of a key and of a value.
    type Sizes = [usize; 6];

    /// Inputs as the layer makes them: keys of length 1, corrections between 0 and 1.
    fn rule(sizes: Sizes, decays: Decays, [q, k, v, beta, decay]: [Tensor<1>; 5]) -> DeltaRule {
        let [batch, seq, key_heads, share, k_dim, v_dim] = sizes;
        let heads = key_heads * share;
        let k = k.reshape([batch, seq, key_heads, k_dim]);
        DeltaRule {
            q: q.reshape([batch, seq, key_heads, k_dim]),
            k: k.clone() / (k.square().sum_dim(3) + 1e-3).sqrt(),
            // By head, so that rows are not in the order of positions.
            v: v.reshape([batch, heads, seq, v_dim]).swap_dims(1, 2),
            beta: activation::sigmoid(beta).reshape([batch, seq, heads]),
            decay: decays(decay).reshape([batch, seq, heads]),
        }
    }

    /// The lengths of q, k, v, beta and decay.
    fn lengths([batch, seq, key_heads, share, k_dim, v_dim]: Sizes) -> [usize; 5] {
        let [of_keys, of_heads] = [batch * seq * key_heads, batch * seq * key_heads * share];
        [of_keys * k_dim, of_keys * k_dim, of_heads * v_dim, of_heads, of_heads]
    }

    fn states([batch, _, key_heads, share, k_dim, v_dim]: Sizes) -> [usize; 4] {
        [batch, key_heads * share, k_dim, v_dim]
    }

    fn agrees_with_plain(sizes: Sizes, decays: Decays) {
        let inputs = lengths(sizes).map(|length| leaf([length]));
        let start = normal(states(sizes), &Device::flex().autodiff());
        let run = |form: fn(DeltaRule, Tensor<4>) -> (Tensor<4>, Tensor<4>), inputs| {
            form(rule(sizes, decays, inputs), start.clone())
        };
        let inputs = inputs.each_ref();
        let last = |form| numbers(run(form, inputs.map(Tensor::clone)).1);
        for form in [delta_rule, by_chunks] {
            agree_with_gradients(&inputs, |x| run(form, x).0.reshape([-1]), |x| run(plain, x).0.reshape([-1]));
            agree("last state", &last(form), &last(plain));
        }
    }

    #[test]
    fn fused_and_by_chunks_agree_with_plain() {
        let lengths = [[1, 1, 1, 1, 1, 1], [2, 7, 3, 1, 5, 6], [1, 64, 2, 1, 16, 3], [3, 65, 1, 1, 4, 32]];
        let shared = [[1, 130, 2, 1, 8, 17], [1, 70, 1, 1, 128, 5], [2, 33, 2, 3, 5, 40], [1, 31, 1, 2, 64, 64]];
        lengths.into_iter().chain(shared).for_each(|sizes| agrees_with_plain(sizes, BETWEEN));
    }

    #[test]
    fn fused_and_by_chunks_agree_with_plain_whatever_the_decays() {
        // Nearly everything forgotten; nothing; everything; and all of these in turn, as where documents begin.
        let all: [Decays; 4] = [
            |x| x * 0.0 + 1e-6,
            |x| x * 0.0 + 1.0,
            |x| x * 0.0,
            |x| {
                let device = x.device();
                let [count] = x.dims();
                let kinds: Vec<f32> = (0..count).map(|at| [1.0, 0.0, 1e-6, 0.9, 1.0, 1e-20, 1.0][at % 7]).collect();
                activation::sigmoid(x) * Tensor::<1>::from_floats(&kinds[..], &device)
            },
        ];
        all.into_iter().for_each(|decays| agrees_with_plain([2, 75, 2, 1, 8, 35], decays));
    }

    #[test]
    fn a_sequence_in_parts_is_the_whole() {
        let sizes = [2, 90, 1, 2, 8, 5];
        let inputs = lengths(sizes).map(|length| normal([length], &Device::flex()));
        let whole = rule(sizes, BETWEEN, inputs);
        let zeros = || Tensor::<4>::zeros([2, 2, 8, 5], &Device::flex());
        let (read, last) = delta_rule(whole.clone(), zeros());
        let (mut parts, mut state) = (Vec::new(), zeros());
        for (from, len) in [(0, 1), (1, 70), (71, 19)] {
            let vectors = |x: &Tensor<4>| x.clone().narrow(1, from, len);
            let part = DeltaRule {
                q: vectors(&whole.q),
                k: vectors(&whole.k),
                v: vectors(&whole.v),
                beta: whole.beta.clone().narrow(1, from, len),
                decay: whole.decay.clone().narrow(1, from, len),
            };
            let (read, last) = delta_rule(part, state);
            parts.push(read);
            state = last;
        }
        assert!(numbers(Tensor::cat(parts, 1)) == numbers(read), "the same bits");
        assert!(numbers(state) == numbers(last), "the same bits");
    }

    #[test]
    fn gradients_are_the_same_whichever_are_asked_for() {
        let sizes = [2, 70, 1, 2, 4, 3];
        let shapes: [&[usize]; 5] = [&[2, 70, 1, 4], &[2, 70, 1, 4], &[2, 70, 2, 3], &[2, 70, 2], &[2, 70, 2]];
        every_subset_of_gradients(&shapes, |inputs| {
            let start = Tensor::zeros(states(sizes), &Device::flex().autodiff());
            delta_rule(rule(sizes, BETWEEN, inputs), start).0.reshape([-1])
        });
    }
}
