//! The walk over the tokens of one head.
//!
//! What a column of the state becomes depends on no other column, so that the walk takes [`LANES`] of them at a time over many
//! tokens: they stay in the first cache, whatever the width of a head. A token passes over them twice: for what they hold for
//! its key, and for the correction and the read together.

use std::ops::Range;

use crate::matrix::{Matrix, MatrixMut};
use crate::simd::vectorized;

/// Columns of a state that are taken at once: two AVX-512 registers, four of AVX2.
pub(super) const LANES: usize = 32;

/// As many values of a row.
pub(super) type Lanes = [f32; LANES];

/// The inputs of one head, a row for each token.
#[derive(Clone, Copy)]
pub(super) struct Tokens<'a> {
    pub q: Matrix<'a>,
    pub k: Matrix<'a>,
    pub v: Matrix<'a>,
    /// Rows of one number.
    pub beta: Matrix<'a>,
    /// Rows of one number.
    pub decay: Matrix<'a>,
}

/// The gradients of one head's inputs, which are added to.
pub(super) struct TokenGrads<'a> {
    pub q: MatrixMut<'a, f32>,
    pub k: MatrixMut<'a, f32>,
    pub v: MatrixMut<'a, f32>,
    pub beta: MatrixMut<'a, f32>,
    pub decay: MatrixMut<'a, f32>,
}

/// What the backward of some tokens needs of their forward.
#[derive(Default)]
pub(super) struct Kept {
    /// For each token the rows of the state before it.
    before: Vec<Lanes>,
    /// For each token its value less what the state held for its key.
    errors: Vec<Lanes>,
}

/// The columns of `row` from `from` on; zeros behind its end.
#[inline(always)]
pub(super) fn load(row: &[f32], from: usize) -> Lanes {
    let rest = &row[from..];
    if let Some(whole) = rest.first_chunk() {
        return *whole;
    }
    let mut lanes = [0.0; LANES];
    lanes[..rest.len()].copy_from_slice(rest);
    lanes
}

/// Writes as many of the columns as `row` has from `from` on.
#[inline(always)]
pub(super) fn store(lanes: &Lanes, row: &mut [f32], from: usize) {
    let rest = &mut row[from..];
    match rest.first_chunk_mut() {
        Some(whole) => *whole = *lanes,
        None => rest.copy_from_slice(&lanes[..rest.len()]),
    }
}

/// `sums += factor * lanes`
#[inline(always)]
fn add_scaled(sums: &mut Lanes, factor: f32, lanes: &Lanes) {
    for (sum, lane) in sums.iter_mut().zip(lanes) {
        *sum += factor * lane;
    }
}

/// The sum of the lanes, halved step by step.
#[inline(always)]
fn fold(lanes: Lanes) -> f32 {
    let lanes: [f32; 16] = std::array::from_fn(|lane| lanes[lane] + lanes[lane + 16]);
    let lanes: [f32; 8] = std::array::from_fn(|lane| lanes[lane] + lanes[lane + 8]);
    let lanes: [f32; 4] = std::array::from_fn(|lane| lanes[lane] + lanes[lane + 4]);
    (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])
}

/// `factorsᵀ rows`, in two sums, which do not wait for each other.
#[inline(always)]
fn weighted(factors: &[f32], rows: &[Lanes]) -> Lanes {
    let mut sums = [[0.0; LANES]; 2];
    let (pairs, of_pairs) = (rows.chunks_exact(2), factors.chunks_exact(2));
    for (row, factor) in pairs.remainder().iter().zip(of_pairs.remainder()) {
        add_scaled(&mut sums[0], *factor, row);
    }
    for (rows, factors) in pairs.zip(of_pairs) {
        add_scaled(&mut sums[0], factors[0], &rows[0]);
        add_scaled(&mut sums[1], factors[1], &rows[1]);
    }
    std::array::from_fn(|lane| sums[0][lane] + sums[1][lane])
}

/// `v - (decay * state)ᵀ k`
#[inline(always)]
fn error(state: &[Lanes], k: &[f32], v: &Lanes, decay: f32) -> Lanes {
    let held = weighted(k, state);
    std::array::from_fn(|lane| v[lane] - decay * held[lane])
}

/// `x * factor`
#[inline(always)]
fn scaled(x: &Lanes, factor: f32) -> Lanes {
    x.map(|x| x * factor)
}

/// A row behind a token: `decay * row + k * correction`.
#[inline(always)]
fn behind(row: &Lanes, decay: f32, k: f32, correction: &Lanes) -> Lanes {
    std::array::from_fn(|lane| decay * row[lane] + k * correction[lane])
}

vectorized! {
    /// Walks over all tokens and writes what they read, to the columns from `from` on.
    fn read(state: &mut [Lanes], tokens: &Tokens<'_>, from: usize, out: &mut MatrixMut<'_, f32>) {
        for t in 0..tokens.k.sizes()[0] {
            let (q, k) = (tokens.q.row(t), tokens.k.row(t));
            let (beta, decay) = (tokens.beta.row(t)[0], tokens.decay.row(t)[0]);
            let correction = scaled(&error(state, k, &load(tokens.v.row(t), from), decay), beta);
            let mut sum = [0.0; LANES];
            for ((row, &k), &q) in state.iter_mut().zip(k).zip(q) {
                *row = behind(row, decay, k, &correction);
                add_scaled(&mut sum, q, row);
            }
            store(&sum, out.row(t), from);
        }
    }

    /// Walks over some of the tokens.
    fn advance(state: &mut [Lanes], tokens: &Tokens<'_>, from: usize, range: Range<usize>) {
        for t in range {
            let (k, beta, decay) = (tokens.k.row(t), tokens.beta.row(t)[0], tokens.decay.row(t)[0]);
            let correction = scaled(&error(state, k, &load(tokens.v.row(t), from), decay), beta);
            for (row, &k) in state.iter_mut().zip(k) {
                *row = behind(row, decay, k, &correction);
            }
        }
    }

    /// Walks over some of the tokens from `state` and keeps what their backward needs.
    fn keep(state: &[Lanes], tokens: &Tokens<'_>, from: usize, range: Range<usize>, kept: &mut Kept) {
        let k_dim = state.len();
        kept.errors.clear();
        kept.before.clear();
        kept.before.extend_from_slice(state);
        for t in range.clone() {
            let (k, beta, decay) = (tokens.k.row(t), tokens.beta.row(t)[0], tokens.decay.row(t)[0]);
            let start = (t - range.start) * k_dim;
            let before = &kept.before[start..start + k_dim];
            let error = error(before, k, &load(tokens.v.row(t), from), decay);
            let correction = scaled(&error, beta);
            kept.errors.push(error);
            if t + 1 < range.end {
                for (row, &k) in k.iter().enumerate() {
                    let next = behind(&kept.before[start + row], decay, k, &correction);
                    kept.before.push(next);
                }
            }
        }
    }

    /// Walks back over some of the tokens, from the gradient of the state behind them to that of the state before them.
    fn back(
        state_grad: &mut [Lanes], tokens: &Tokens<'_>, from: usize, range: Range<usize>, kept: &Kept, grad: &Matrix<'_>,
        to: &mut TokenGrads<'_>,
    ) {
        let k_dim = state_grad.len();
        for t in range.clone().rev() {
            let (q, k) = (tokens.q.row(t), tokens.k.row(t));
            let (beta, decay) = (tokens.beta.row(t)[0], tokens.decay.row(t)[0]);
            let at = t - range.start;
            let (before, error) = (&kept.before[at * k_dim..][..k_dim], &kept.errors[at]);
            let (correction, out) = (scaled(error, beta), load(grad.row(t), from));
            // What is read of the state, then what the correction is to it.
            for (row, &q) in state_grad.iter_mut().zip(q) {
                add_scaled(row, q, &out);
            }
            let of_correction = weighted(k, state_grad);
            let of_error = scaled(&of_correction, beta);
            let (to_q, to_k) = (&mut to.q.row(t)[..k_dim], &mut to.k.row(t)[..k_dim]);
            let mut of_decay = [0.0; LANES];
            let rows = before.iter().zip(&mut *state_grad).zip(k);
            for (((before, grad), &k), (to_q, to_k)) in rows.zip(to_q.iter_mut().zip(to_k)) {
                let (mut of_q, mut of_k) = ([0.0; LANES], [0.0; LANES]);
                for lane in 0..LANES {
                    let decayed = decay * before[lane];
                    of_q[lane] = (decayed + k * correction[lane]) * out[lane];
                    of_k[lane] = grad[lane] * correction[lane] - decayed * of_error[lane];
                    let rest = grad[lane] - k * of_error[lane];
                    of_decay[lane] += rest * before[lane];
                    grad[lane] = rest * decay;
                }
                *to_q += fold(of_q);
                *to_k += fold(of_k);
            }
            store(&of_error, to.v.row(t), from);
            to.beta.row(t)[0] += fold(std::array::from_fn(|lane| of_correction[lane] * error[lane]));
            to.decay.row(t)[0] += fold(of_decay);
        }
    }
}
