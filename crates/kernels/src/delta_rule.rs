//! The gated delta rule (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464, eq. 10): per head a state S that every token decays,
//! corrects and reads.
//!
//! ```text
//! S_t = g S_{t-1} + k ⊗ u,   u = β (v - (g S_{t-1})ᵀ k),   o = S_tᵀ q
//! ```
//! Fused, a task takes one head of one row of the batch and walks over its tokens with the state in cache; cost and time grow
//! with the length of the sequence. The backward keeps nothing of the forward: it walks once more to note the state at the
//! start of every chunk of tokens, then takes the chunks from the last to the first, each with its states before it.

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Bytes, DType, Shape, Tensor};
use burn_flex::{FlexTensor, Layout};
use rayon::prelude::*;

use crate::cpu::{self, View, row_major};
use crate::differentiable::{InputGrads, Wanted, differentiable};
use crate::shapes::assert_shapes;
use crate::{in_type, simd};

/// Tokens of a chunk: as many states are kept at once, 1 MiB of them for heads of 64 by 64. Chosen by us.
const CHUNK: usize = 64;

/// The inputs of the recurrence.
#[derive(Debug, Clone)]
pub struct DeltaRule {
    /// `[batch, seq, heads, k_dim]`
    pub q: Tensor<4>,
    /// `[batch, seq, heads, k_dim]`
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
    let ([batch, seq, heads, k_dim], v_dim) = (q.dims(), v.dims()[3]);
    assert_shapes!("delta_rule", q, k, v, beta, decay, state;
        "k must be of q's shape": k.dims() == q.dims(),
        "v must have q's batch, seq and heads": v.dims() == [batch, seq, heads, v_dim],
        "beta and decay must be [batch, seq, heads]": beta.dims() == [batch, seq, heads] && decay.dims() == beta.dims(),
        "the state must be [batch, heads, k_dim, v_dim]": state.dims() == [batch, heads, k_dim, v_dim],
        "there must be a token": seq > 0,
    );
    if !cpu::fuses(q) {
        return plain(rule, state);
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

/// The definition in tensor operations.
fn plain(rule: DeltaRule, mut state: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
    let DeltaRule { q, k, v, beta, decay } = rule;
    let ([batch, seq, heads, k_dim], v_dim) = (q.dims(), v.dims()[3]);
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
}

impl<'a> Inputs<'a> {
    fn of([q, k, v, beta, decay]: &'a [FlexTensor; 5]) -> Self {
        let [q, k, v] = [q, k, v].map(View::new);
        Self { q, k, v, beta: cpu::values(beta), decay: cpu::values(decay) }
    }

    /// Batch, tokens, heads, channels of a key and of a value.
    fn sizes(&self) -> [usize; 5] {
        let [batch, seq, heads, k_dim] = self.q.shape;
        [batch, seq, heads, k_dim, self.v.shape[3]]
    }

    fn token(&self, [b, h]: [usize; 2], t: usize) -> Token<'a> {
        let [_, seq, heads, ..] = self.sizes();
        let at = (b * seq + t) * heads + h;
        let row = |x: &View<'a>| x.row(b, t, h);
        Token { q: row(&self.q), k: row(&self.k), v: row(&self.v), beta: self.beta[at], decay: self.decay[at] }
    }
}

/// One token of one head.
struct Token<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    beta: f32,
    decay: f32,
}

/// Values that are by head, `[batch, heads, seq, width]`, as a tensor `[batch, seq, heads, width]`.
fn tensor_by_head(values: Vec<f32>, [batch, seq, heads, width]: [usize; 4]) -> FlexTensor {
    let strides = [heads * seq * width, width, seq * width, 1].map(|stride| stride as isize);
    let layout = Layout::new(Shape::from(vec![batch, seq, heads, width]), strides.to_vec(), 0);
    FlexTensor::new(Bytes::from_elems(values), layout, DType::F32)
}

/// The same for `[batch, seq, heads]`.
fn numbers_by_head(values: Vec<f32>, [batch, seq, heads]: [usize; 3]) -> FlexTensor {
    let strides = [heads * seq, 1, seq].map(|stride| stride as isize);
    let layout = Layout::new(Shape::from(vec![batch, seq, heads]), strides.to_vec(), 0);
    FlexTensor::new(Bytes::from_elems(values), layout, DType::F32)
}

/// The outputs, and the last state.
fn forward(inputs: &[FlexTensor; 5], state: &FlexTensor) -> (FlexTensor, FlexTensor) {
    let inputs = Inputs::of(inputs);
    let [batch, seq, heads, k_dim, v_dim] = inputs.sizes();
    let mut read = vec![0.0; batch * heads * seq * v_dim];
    let mut states = cpu::values(state).to_vec();
    let tasks = (read.par_chunks_mut((seq * v_dim).max(1)), states.par_chunks_mut((k_dim * v_dim).max(1)));
    tasks.into_par_iter().enumerate().for_each(|(task, (read, state))| {
        let mut correction = vec![0.0; v_dim];
        for (t, read) in read.chunks_mut(v_dim).enumerate() {
            let Token { q, k, v, beta, decay } = inputs.token([task / heads, task % heads], t);
            simd::delta_step(state, k, v, beta, decay, &mut correction);
            simd::delta_read(state, q, read);
        }
    });
    (tensor_by_head(read, [batch, seq, heads, v_dim]), cpu::tensor(states, [batch, heads, k_dim, v_dim]))
}

/// Gradients of q, k, v, beta and decay.
fn backward(
    inputs: &[FlexTensor; 5],
    state: &FlexTensor,
    grad: &FlexTensor,
    wanted: Wanted<5>,
) -> [Option<FlexTensor>; 5] {
    let (inputs, grad, start) = (Inputs::of(inputs), View::new(grad), cpu::values(state));
    let [batch, seq, heads, k_dim, v_dim] = inputs.sizes();
    let size = k_dim * v_dim;
    let zeros = |width: usize| vec![0.0f32; batch * heads * seq * width];
    let (mut q, mut k, mut v, mut beta, mut decay) = (zeros(k_dim), zeros(k_dim), zeros(v_dim), zeros(1), zeros(1));
    let tasks = (
        q.par_chunks_mut(seq * k_dim),
        k.par_chunks_mut(seq * k_dim),
        v.par_chunks_mut(seq * v_dim),
        beta.par_chunks_mut(seq),
        decay.par_chunks_mut(seq),
    );
    tasks.into_par_iter().enumerate().for_each(|(task, (q_grad, k_grad, v_grad, beta_grad, decay_grad))| {
        let head = [task / heads, task % heads];
        let mut correction = vec![0.0; v_dim];
        let mut step = |state: &mut [f32], t: usize| {
            let Token { k, v, beta, decay, .. } = inputs.token(head, t);
            simd::delta_step(state, k, v, beta, decay, &mut correction);
        };
        let mut state = start[task * size..(task + 1) * size].to_vec();
        let mut starts = Vec::with_capacity(seq.div_ceil(CHUNK));
        for t in 0..seq {
            if t % CHUNK == 0 {
                starts.push(state.clone());
            }
            step(&mut state, t);
        }
        let mut before = vec![0.0; CHUNK.min(seq) * size];
        let mut state_grad = vec![0.0; size];
        for (chunk, start) in starts.iter().enumerate().rev() {
            let tokens = chunk * CHUNK..((chunk + 1) * CHUNK).min(seq);
            state.copy_from_slice(start);
            for (t, before) in tokens.clone().zip(before.chunks_mut(size)) {
                before.copy_from_slice(&state);
                step(&mut state, t);
            }
            for t in tokens.clone().rev() {
                let Token { q, k, v, beta, decay } = inputs.token(head, t);
                let before = &before[(t - tokens.start) * size..][..size];
                let (of_k, of_v) = (t * k_dim..(t + 1) * k_dim, t * v_dim..(t + 1) * v_dim);
                [beta_grad[t], decay_grad[t]] = simd::delta_backward(
                    before,
                    &mut state_grad,
                    grad.row(head[0], t, head[1]),
                    q,
                    k,
                    v,
                    beta,
                    decay,
                    &mut q_grad[of_k.clone()],
                    &mut k_grad[of_k],
                    &mut v_grad[of_v],
                );
            }
        }
    });
    let numbers = [batch, seq, heads];
    let of_keys = [batch, seq, heads, k_dim];
    [
        wanted[0].then(|| tensor_by_head(q, of_keys)),
        wanted[1].then(|| tensor_by_head(k, of_keys)),
        wanted[2].then(|| tensor_by_head(v, [batch, seq, heads, v_dim])),
        wanted[3].then(|| numbers_by_head(beta, numbers)),
        wanted[4].then(|| numbers_by_head(decay, numbers)),
    ]
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, activation};

    use super::*;
    use crate::testing::{agree, agree_with_gradients, every_subset_of_gradients, leaf, normal, numbers};

    /// Inputs as the layer makes them: keys of length 1, decays and corrections between 0 and 1.
    fn rule([batch, seq, heads, k_dim, v_dim]: [usize; 5], [q, k, v, beta, decay]: [Tensor<1>; 5]) -> DeltaRule {
        let k = k.reshape([batch, seq, heads, k_dim]);
        DeltaRule {
            q: q.reshape([batch, seq, heads, k_dim]),
            k: k.clone() / (k.square().sum_dim(3) + 1e-3).sqrt(),
            // By head, so that rows are not in the order of positions.
            v: v.reshape([batch, heads, seq, v_dim]).swap_dims(1, 2),
            beta: activation::sigmoid(beta).reshape([batch, seq, heads]),
            decay: activation::sigmoid(decay + 2.0).reshape([batch, seq, heads]),
        }
    }

    #[test]
    fn fused_agrees_with_plain() {
        for sizes in [[1, 1, 1, 1, 1], [2, 7, 3, 5, 6], [1, 64, 2, 16, 3], [1, 130, 2, 8, 17], [3, 65, 1, 4, 32]] {
            let [batch, seq, heads, k_dim, v_dim] = sizes;
            let of = |width: usize| leaf([batch * seq * heads * width]);
            let (q, k, v, beta, decay) = (of(k_dim), of(k_dim), of(v_dim), of(1), of(1));
            let start = normal([batch, heads, k_dim, v_dim], &Device::flex().autodiff());
            let run = |form: fn(DeltaRule, Tensor<4>) -> (Tensor<4>, Tensor<4>), inputs| {
                form(rule(sizes, inputs), start.clone())
            };
            let inputs = [&q, &k, &v, &beta, &decay];
            agree_with_gradients(&inputs, |x| run(delta_rule, x).0.reshape([-1]), |x| run(plain, x).0.reshape([-1]));
            let last = |form| numbers(run(form, inputs.map(Tensor::clone)).1);
            agree("last state", &last(delta_rule), &last(plain));
        }
    }

    #[test]
    fn a_sequence_in_parts_is_the_whole() {
        let sizes = [2, 90, 2, 8, 5];
        let of = |width: usize| normal([2 * 90 * 2 * width], &Device::flex());
        let whole = rule(sizes, [of(8), of(8), of(5), of(1), of(1)]);
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
        let shapes: [&[usize]; 5] = [&[2, 70, 2, 4], &[2, 70, 2, 4], &[2, 70, 2, 3], &[2, 70, 2], &[2, 70, 2]];
        every_subset_of_gradients(&shapes, |inputs| {
            let start = Tensor::zeros([2, 2, 4, 3], &Device::flex().autodiff());
            delta_rule(rule([2, 70, 2, 4, 3], inputs), start).0.reshape([-1])
        });
    }
}
