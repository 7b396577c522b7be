//! The walk over the tokens of one head.
//!
//! What a column of the state becomes depends on no other column, so that the walk takes [`LANES`] of them at a time over many
//! tokens: they stay in the first cache, whatever the width of a head. A token passes over them twice: for what they hold for
//! its key, and for the correction and the read together.

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
}
