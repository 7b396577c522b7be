//! The backward of one head, in products of matrices of a chunk's tokens.
//!
//! Tokens read the state twice: what it holds for the key, before the token's own correction, and for the query, behind it. With the
//! queries and below them the keys as rows of X, the matrices of [`super::chunks`], and L of 0 where a row does not see a column, both are
//! `G X S + W U`, W = X Kᵀ ⊙ L; errors are E = V less the reads of keys, and U = β E. With the gradients Y of these reads and D = Y Uᵀ,
//!
//! ```text
//! dX = G Y Sᵀ + (D ⊙ L) K          dK = that of its reads + (D ⊙ L)ᵀ X + L[last] U dS'ᵀ          dL = D ⊙ X Kᵀ + ..
//! dU = Wᵀ Y + L[last] K dS'        dS = G[last] dS' + (G X)ᵀ Y                                    dE = β dU = dV
//! ```
//! where the gradient of what is read for keys is -dV, so that E is found from the first token on, dU from the last. Nothing is kept of
//! the forward: a first walk over the chunks notes the state before each and the errors.

use std::ops::Range;

use super::walk::{LANES, Lanes, Tokens, load, store};
use crate::matrix::{Matrix, MatrixMut};
use crate::product::product;
use crate::simd::{self, vectorized};

/// The most tokens of a chunk.
const CHUNK: usize = 64;

/// Tokens of a chunk, by channels of a key: of more, what tokens are to each other costs more than the state. Measured.
fn chunk(k_dim: usize) -> usize {
    if k_dim < 128 { CHUNK / 2 } else { CHUNK }
}

/// The gradients of one head's inputs; those of queries and keys are added to.
pub(super) struct TokenGrads<'a> {
    pub q: MatrixMut<'a, f32>,
    pub k: MatrixMut<'a, f32>,
    pub v: MatrixMut<'a, f32>,
    pub beta: MatrixMut<'a, f32>,
    pub decay: MatrixMut<'a, f32>,
}

/// Writes the gradients of a head, of the state before its first token and the gradient of its outputs.
pub(super) fn back(tokens: &Tokens<'_>, start: &[f32], grad: &Matrix<'_>, to: &mut TokenGrads<'_>) {
    let ([seq, k_dim], [_, v_dim]) = (tokens.k.sizes(), tokens.v.sizes());
    let length = chunk(k_dim);
    let chunks: Vec<_> = (0..seq).step_by(length).map(|from| from..(from + length).min(seq)).collect();
    let mut memory = Memory::default();
    let (mut state, mut befores, mut errors) = (start.to_vec(), Vec::new(), vec![0.0; seq * v_dim]);
    for range in &chunks {
        befores.extend_from_slice(&state);
        let errors = &mut errors[range.start * v_dim..range.end * v_dim];
        memory.load(tokens, range.clone());
        memory.correct(&tokens.v.rows(range.clone()), &state, errors);
        memory.advance(&mut state);
    }
    let mut state_grad = vec![0.0; k_dim * v_dim];
    for (range, before) in chunks.iter().zip(befores.chunks_exact(k_dim * v_dim)).rev() {
        memory.load(tokens, range.clone());
        let errors = &errors[range.start * v_dim..range.end * v_dim];
        memory.back(before, errors, &grad.rows(range.clone()), &mut state_grad, range.start, to);
    }
}

/// What is computed of a chunk, row by row.
#[derive(Default)]
struct Memory {
    tokens: usize,
    beta: Vec<f32>,
    decay: Vec<f32>,
    /// `[tokens, 1 + tokens]`: what is left behind a token of the state before the chunk, and of what was written at each token.
    left: Vec<f32>,
    /// `[2 tokens, k_dim]`: the queries, the keys.
    x: Vec<f32>,
    /// `[2 tokens, tokens]`: X Kᵀ
    scores: Vec<f32>,
    /// `[2 tokens, tokens]`: W, then D and D ⊙ L.
    weights: Vec<f32>,
    /// `[tokens, v_dim]`: U
    corrections: Vec<f32>,
    /// `[tokens, k_dim]`: the keys by what is left of them behind the chunk, then part of the gradient of keys.
    keys: Vec<f32>,
    /// `[2 tokens, v_dim]`: Y
    of_reads: Vec<f32>,
    /// `[2 tokens, k_dim]`: dX
    of_x: Vec<f32>,
    /// `[tokens, v_dim]`: dU
    of_corrections: Vec<f32>,
    /// `[tokens, 1 + tokens]`
    of_left: Vec<f32>,
}

impl Memory {
    fn k_dim(&self) -> usize {
        self.x.len() / (2 * self.tokens)
    }

    /// What is left behind the chunk of the state before it, and of what was written at each token.
    fn left_behind(&self) -> (f32, &[f32]) {
        let last = &self.left[(self.tokens - 1) * (self.tokens + 1)..];
        (last[0], &last[1..])
    }

    fn load(&mut self, tokens: &Tokens<'_>, range: Range<usize>) {
        let n = range.len();
        self.tokens = n;
        let number = |of: &Matrix<'_>| range.clone().map(|t| of.row(t)[0]).collect();
        (self.beta, self.decay) = (number(&tokens.beta), number(&tokens.decay));
        self.x.clear();
        for of in [&tokens.q, &tokens.k] {
            range.clone().for_each(|t| self.x.extend_from_slice(of.row(t)));
        }
        let x = Matrix::by_rows(&self.x, [2 * n, self.k_dim()]);
        self.scores.resize(2 * n * n, 0.0);
        product(x, x.rows(n..2 * n).transposed()).replace(&mut rows(&mut self.scores, n));
        decays(&self.decay, zeroed(&mut self.left, n * (n + 1)));
        weigh(&self.scores, &self.left, zeroed(&mut self.weights, 2 * n * n));
        let k_dim = self.k_dim();
        self.keys.clear();
        self.keys.extend_from_slice(&self.x[n * k_dim..]);
        for (key, left) in self.keys.chunks_exact_mut(k_dim).zip(&self.left[(n - 1) * (n + 1) + 1..]) {
            simd::scale(key, *left);
        }
    }

    /// Writes the errors of the chunk's values, and the corrections.
    fn correct(&mut self, v: &Matrix<'_>, state: &[f32], errors: &mut [f32]) {
        let ([n, v_dim], k_dim) = (v.sizes(), self.k_dim());
        let keys = Matrix::by_rows(&self.x[n * k_dim..], [n, k_dim]);
        product(keys, Matrix::by_rows(state, [k_dim, v_dim])).scaled(-1.0).replace(&mut rows(errors, v_dim));
        for (t, error) in errors.chunks_exact_mut(v_dim).enumerate() {
            simd::scale(error, self.left[t * (n + 1)]);
            simd::add(error, v.row(t));
        }
        self.corrections.resize(n * v_dim, 0.0);
        substitute(&self.weights[n * n..], &self.beta, false, errors, &mut self.corrections);
    }

    /// The state behind the chunk, of that before it.
    fn advance(&mut self, state: &mut [f32]) {
        let (n, k_dim) = (self.tokens, self.k_dim());
        let v_dim = self.corrections.len() / n;
        simd::scale(state, self.left_behind().0);
        let keys = Matrix::by_rows(&self.keys, [n, k_dim]).transposed();
        product(keys, Matrix::by_rows(&self.corrections, [n, v_dim])).add_to(&mut rows(state, v_dim));
    }

    /// Adds the gradients of the chunk's tokens, the first of which is `first`; of the gradient of the state behind the chunk it makes that
    /// of the state before it.
    fn back(
        &mut self,
        state: &[f32],
        errors: &[f32],
        grad: &Matrix<'_>,
        state_grad: &mut [f32],
        first: usize,
        to: &mut TokenGrads<'_>,
    ) {
        let ([n, v_dim], k_dim) = (grad.sizes(), self.k_dim());
        let (tokens_by_v, tokens_by_k) = ([n, v_dim], [n, k_dim]);
        let by_reads = |width| [2 * n, width];
        // U; Y, whose half of keys comes by substitution from the last token on.
        self.corrections.clear();
        self.corrections.extend_from_slice(errors);
        for (row, beta) in self.corrections.chunks_exact_mut(v_dim).zip(&self.beta) {
            simd::scale(row, *beta);
        }
        self.of_reads.clear();
        (0..n).for_each(|t| self.of_reads.extend_from_slice(grad.row(t)));
        self.of_reads.resize(2 * n * v_dim, 0.0);
        self.of_corrections.resize(n * v_dim, 0.0);
        let (of_queries, of_keys) = self.of_reads.split_at_mut(n * v_dim);
        let seen = Matrix::by_rows(&self.weights, by_reads(n)).rows(0..n).transposed();
        let mut of_corrections = rows(&mut self.of_corrections, v_dim);
        product(seen, Matrix::by_rows(of_queries, tokens_by_v)).replace(&mut of_corrections);
        let behind = Matrix::by_rows(state_grad, [k_dim, v_dim]);
        product(Matrix::by_rows(&self.keys, tokens_by_k), behind).add_to(&mut of_corrections);
        substitute(&self.weights[n * n..], &self.beta, true, &mut self.of_corrections, of_keys);
        for (t, of_key) in of_keys.chunks_exact_mut(v_dim).enumerate() {
            let of_token = t * v_dim..(t + 1) * v_dim;
            to.v.row(first + t).copy_from_slice(of_key);
            to.beta.row(first + t)[0] = simd::dot(&self.of_corrections[of_token.clone()], &errors[of_token]);
            simd::scale(of_key, -1.0);
        }

        // D; of_left, L's gradient; D ⊙ L.
        let y = Matrix::by_rows(&self.of_reads, by_reads(v_dim));
        let corrections = Matrix::by_rows(&self.corrections, tokens_by_v);
        product(y, corrections.transposed()).replace(&mut rows(&mut self.weights, n));
        back_to_left(&self.weights, &self.scores, zeroed(&mut self.of_left, n * (n + 1)));
        mask(&mut self.weights, &self.left);
        // dX.
        let x = Matrix::by_rows(&self.x, by_reads(k_dim));
        self.of_x.resize(2 * n * k_dim, 0.0);
        product(y, Matrix::by_rows(state, [k_dim, v_dim]).transposed()).replace(&mut rows(&mut self.of_x, k_dim));
        for (read, of_x) in self.of_x.chunks_exact_mut(k_dim).enumerate() {
            let at = read % n * (n + 1);
            self.of_left[at] += simd::dot(of_x, x.row(read));
            simd::scale(of_x, self.left[at]);
        }
        let weights = Matrix::by_rows(&self.weights, by_reads(n));
        product(weights, x.rows(n..2 * n)).add_to(&mut rows(&mut self.of_x, k_dim));
        // What keys have written, in this chunk and behind it.
        product(corrections, behind.transposed()).replace(&mut rows(&mut self.keys, k_dim));
        let last = (n - 1) * (n + 1);
        self.of_left[last] += simd::dot(state, state_grad);
        for (t, of_key) in self.keys.chunks_exact_mut(k_dim).enumerate() {
            self.of_left[last + 1 + t] += simd::dot(of_key, x.row(n + t));
            simd::scale(of_key, self.left[last + 1 + t]);
        }
        product(weights.transposed(), x).add_to(&mut rows(&mut self.keys, k_dim));
        let of_x = Matrix::by_rows(&self.of_x, by_reads(k_dim));
        for t in 0..n {
            simd::add(to.q.row(first + t), of_x.row(t));
            let of_key = to.k.row(first + t);
            simd::add(of_key, of_x.row(n + t));
            simd::add(of_key, &self.keys[t * k_dim..(t + 1) * k_dim]);
        }
        // dS, of rows that are not needed any more.
        simd::scale(state_grad, self.left[last]);
        for (read, row) in self.x.chunks_exact_mut(k_dim).enumerate() {
            simd::scale(row, self.left[read % n * (n + 1)]);
        }
        let x = Matrix::by_rows(&self.x, by_reads(k_dim));
        product(x.transposed(), y).add_to(&mut rows(state_grad, v_dim));
        back_to_decays(&self.decay, &self.left, &mut self.of_left);
        for t in 0..n {
            to.decay.row(first + t)[0] = self.of_left[t * (n + 1)];
        }
    }
}

/// All of `values`, in rows of `width`.
fn rows(values: &mut [f32], width: usize) -> MatrixMut<'_, f32> {
    let rows = values.len() / width;
    MatrixMut::new(values, [rows, width], width)
}

/// `values` as so many zeros.
fn zeroed(values: &mut Vec<f32>, len: usize) -> &mut [f32] {
    values.clear();
    values.resize(len, 0.0);
    values
}

/// How many of the columns a row of the queries' and keys' sees: a query its own, a key those before it.
#[inline(always)]
fn seen(read: usize, tokens: usize) -> usize {
    if read < tokens { read + 1 } else { read - tokens }
}

vectorized! {
    /// Rows of what is left; behind a token's own column there are zeros.
    fn decays(decay: &[f32], left: &mut [f32]) {
        let width = decay.len() + 1;
        left[0] = decay[0];
        left[1] = 1.0;
        for (t, &decay) in decay.iter().enumerate().skip(1) {
            let (before, row) = left.split_at_mut(t * width);
            for (left, before) in row[..=t].iter_mut().zip(&before[(t - 1) * width..]) {
                *left = before * decay;
            }
            row[t + 1] = 1.0;
        }
    }

    /// `weights = scores * left` where they are seen.
    fn weigh(scores: &[f32], left: &[f32], weights: &mut [f32]) {
        let n = (scores.len() / 2).isqrt();
        for (read, (weights, scores)) in weights.chunks_exact_mut(n).zip(scores.chunks_exact(n)).enumerate() {
            let left = &left[read % n * (n + 1) + 1..];
            for ((weight, score), left) in weights[..seen(read, n)].iter_mut().zip(scores).zip(left) {
                *weight = score * left;
            }
        }
    }

    /// `weights *= left` where they are seen, else 0.
    fn mask(weights: &mut [f32], left: &[f32]) {
        let n = (weights.len() / 2).isqrt();
        for (read, weights) in weights.chunks_exact_mut(n).enumerate() {
            let left = &left[read % n * (n + 1) + 1..];
            let (seen, rest) = weights.split_at_mut(seen(read, n));
            for (weight, left) in seen.iter_mut().zip(left) {
                *weight *= left;
            }
            rest.fill(0.0);
        }
    }

    /// `of_left += of_weights * scores` where they are seen.
    fn back_to_left(of_weights: &[f32], scores: &[f32], of_left: &mut [f32]) {
        let n = (scores.len() / 2).isqrt();
        for (read, (weights, scores)) in of_weights.chunks_exact(n).zip(scores.chunks_exact(n)).enumerate() {
            let of_left = &mut of_left[read % n * (n + 1) + 1..];
            for ((weight, score), of_left) in weights[..seen(read, n)].iter().zip(scores).zip(of_left) {
                *of_left += weight * score;
            }
        }
    }

    /// Of the gradient of what is left makes, in its first column, that of the decays: each row is the one before by a decay.
    fn back_to_decays(decay: &[f32], left: &[f32], of_left: &mut [f32]) {
        let n = decay.len();
        for t in (1..n).rev() {
            let (before, row) = of_left.split_at_mut(t * (n + 1));
            let (before, row) = (&mut before[(t - 1) * (n + 1)..], &mut row[..=t]);
            let mut of_decay = 0.0;
            for ((of_left, left), before) in row.iter().zip(&left[(t - 1) * (n + 1)..]).zip(before) {
                of_decay += of_left * left;
                *before += of_left * decay[t];
            }
            row[0] = of_decay;
        }
    }

    /// From the first row on, or from the last: takes from each row `of` the rows of `scaled` that are done, by the weights, and writes
    /// the rest by `factors` to `scaled`. Weights are those of a row for the ones before it, `[rows, rows]`.
    fn substitute(weights: &[f32], factors: &[f32], from_last: bool, of: &mut [f32], scaled: &mut [f32]) {
        let (n, width) = (factors.len(), of.len() / factors.len());
        let mut taken = [0.0; CHUNK];
        for step in 0..n {
            let at = if from_last { n - 1 - step } else { step };
            let done = if from_last { at + 1..n } else { 0..at };
            for (taken, other) in taken.iter_mut().zip(done.clone()) {
                *taken = if from_last { weights[other * n + at] } else { weights[at * n + other] };
            }
            for from in (0..width).step_by(LANES) {
                let rest = less(load(&of[at * width..][..width], from), &taken[..done.len()], &scaled[done.start * width..done.end * width], width, from);
                store(&rest, &mut of[at * width..][..width], from);
                store(&rest.map(|rest| rest * factors[at]), &mut scaled[at * width..][..width], from);
            }
        }
    }
}

/// `lanes` less the rows by their weights, in two sums, which do not wait for each other.
#[inline(always)]
fn less(lanes: Lanes, weights: &[f32], rows: &[f32], width: usize, from: usize) -> Lanes {
    let mut sums = [lanes, [0.0; LANES]];
    let (pairs, of_pairs) = (rows.chunks_exact(2 * width), weights.chunks_exact(2));
    for (row, weight) in pairs.remainder().chunks_exact(width).zip(of_pairs.remainder()) {
        take(&mut sums[0], *weight, &load(row, from));
    }
    for (rows, weights) in pairs.zip(of_pairs) {
        take(&mut sums[0], weights[0], &load(&rows[..width], from));
        take(&mut sums[1], weights[1], &load(&rows[width..], from));
    }
    std::array::from_fn(|lane| sums[0][lane] + sums[1][lane])
}

/// `sums -= factor * lanes`
#[inline(always)]
fn take(sums: &mut Lanes, factor: f32, lanes: &Lanes) {
    for (sum, lane) in sums.iter_mut().zip(lanes) {
        *sum -= factor * lane;
    }
}
