//! The maps into heads and out of them on the CPU, and their backwards.
//!
//! A head is a block of columns of the map into heads, and a block of rows of the map out of them. The first heads, as
//! long as they take part everywhere (the shared ones), go through one product. Of each of the others, the rows at which
//! it takes part are gathered, block by block, multiplied with the head's block of the weight, and scattered. Both maps
//! and their backwards are made of three such products:
//!
//! ```text
//! gathered   rows of x at the head's positions · block              queries;  gradient of heads
//! scattered  rows of the head · block, added to the rows of y       output;   gradient of x
//! crossed    the sum over positions of gathered rowsᵀ · rows        gradients of the weights
//! ```

use std::ops::Range;

use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::cpu::{self, Destination, Matrix, Shared};
use crate::{ActiveRows, simd};

/// Positions of a block; with 512 channels its gathered rows take 512 KiB.
const ROWS: usize = 256;
/// Channels that a task of a weight's gradient gathers.
const CHANNELS: usize = 256;

/// The sizes of a call, and its active rows.
#[derive(Clone, Copy)]
struct Call<'a> {
    active: &'a ActiveRows,
    /// Positions of the whole batch.
    tokens: usize,
    /// Heads that go through one product; the others are gathered.
    complete: usize,
    n_heads: usize,
    d_model: usize,
    /// Channels of a head.
    width: usize,
}

impl<'a> Call<'a> {
    fn new(active: &'a ActiveRows, d_model: usize, channels: usize) -> Self {
        let [batch, queries, n_heads] = active.shape();
        let (tokens, complete) = (batch * queries, active.complete_heads());
        Self { active, tokens, complete, n_heads, d_model, width: channels / n_heads }
    }

    /// Channels of all heads.
    fn channels(&self) -> usize {
        self.n_heads * self.width
    }

    /// Channels of the heads that go through one product.
    fn complete_channels(&self) -> usize {
        self.complete * self.width
    }

    fn gathered_heads(&self) -> Range<usize> {
        self.complete..self.n_heads
    }

    /// Where a head's channels begin at a position.
    fn at(&self, token: u32, head: usize) -> usize {
        token as usize * self.channels() + head * self.width
    }

    /// A head's channels at a position.
    fn head<'v>(&self, all: &'v [f32], token: u32, head: usize) -> &'v [f32] {
        let at = self.at(token, head);
        &all[at..at + self.width]
    }

    /// Room for what all heads write to, zero where they rest.
    fn room(&self, len: usize) -> Vec<f32> {
        if self.complete == self.n_heads { cpu::room(len) } else { vec![0.0; len] }
    }
}

pub(super) fn into_heads(x: &FlexTensor, weight: &FlexTensor, active: &ActiveRows) -> FlexTensor {
    let [d_model, channels] = cpu::sizes(weight);
    let call = Call::new(active, d_model, channels);
    let (x, weight) = (cpu::values(x), Matrix::new(weight));
    let mut y = call.room(call.tokens * channels);
    let to = Destination { start: y.as_mut_ptr(), rows: channels, add: false, parallel: true };
    let sizes = [call.tokens, d_model, call.complete_channels()];
    // SAFETY: the first columns of y, `[tokens, channels]`, which nobody else has.
    unsafe { cpu::product(sizes, Matrix::by_rows(x.as_ptr(), d_model), weight, 1.0, to) };
    let into = Shared::new(&mut y);
    gathered(
        &call,
        x,
        |head| weight.columns_from(head * call.width),
        |head, tokens, products| {
            for (&token, product) in tokens.iter().zip(products.chunks_exact(call.width)) {
                // SAFETY: a position of a head comes once.
                unsafe { into.slice(call.at(token, head), call.width) }.copy_from_slice(product);
            }
        },
    );
    let [batch, seq, _] = active.shape();
    cpu::tensor(y, [batch, seq, channels])
}

pub(super) fn into_heads_back_to_x(weight: &FlexTensor, y_grad: &FlexTensor, active: &ActiveRows) -> FlexTensor {
    let [d_model, channels] = cpu::sizes(weight);
    let call = Call::new(active, d_model, channels);
    let (weight, y_grads) = (Matrix::new(weight).transposed(), cpu::values(y_grad));
    let complete = (Matrix::by_rows(y_grads.as_ptr(), channels), weight);
    let block = |head: usize| weight.rows_from(head * call.width);
    let x_grad = scattered(&call, complete, block, |head, token, row| {
        row.copy_from_slice(call.head(y_grads, token, head));
    });
    let [batch, seq, _] = active.shape();
    cpu::tensor(x_grad, [batch, seq, d_model])
}

pub(super) fn into_heads_back_to_weight(x: &FlexTensor, y_grad: &FlexTensor, active: &ActiveRows) -> FlexTensor {
    let d_model = *x.layout().shape().last().unwrap_or(&1);
    let channels = *y_grad.layout().shape().last().unwrap_or(&1);
    let call = Call::new(active, d_model, channels);
    let (x, y_grads) = (cpu::values(x), cpu::values(y_grad));
    let mut weight_grad = cpu::room(d_model * channels);
    let to = Destination { start: weight_grad.as_mut_ptr(), rows: channels, add: false, parallel: true };
    let (left, right) =
        (Matrix::by_rows(x.as_ptr(), d_model).transposed(), Matrix::by_rows(y_grads.as_ptr(), channels));
    // SAFETY: the first columns of the gradient, `[d_model, channels]`, which nobody else has.
    unsafe { cpu::product([d_model, call.tokens, call.complete_channels()], left, right, 1.0, to) };
    let into = Shared::new(&mut weight_grad);
    let fill = |head: usize, token: u32, row: &mut [f32]| row.copy_from_slice(call.head(y_grads, token, head));
    crossed(&call, x, fill, |head, part, x_rows, head_rows, add| {
        let at = into.pointer(part.start * channels + head * call.width);
        let to = Destination { start: at, rows: channels, add, parallel: false };
        // SAFETY: a task owns its rows and columns of the gradient.
        unsafe { cpu::product([part.len(), x_rows.1, call.width], x_rows.0.transposed(), head_rows, 1.0, to) };
    });
    cpu::tensor(weight_grad, [d_model, channels])
}

pub(super) fn out_of_heads([heads, gates, weight]: [&FlexTensor; 3], active: &ActiveRows) -> FlexTensor {
    let [channels, d_model] = cpu::sizes(weight);
    let call = Call::new(active, d_model, channels);
    let (heads, gates, weight) = (cpu::values(heads), cpu::values(gates), Matrix::new(weight));
    let scaled = scaled_complete_heads(&call, heads, gates);
    let complete = (Matrix::by_rows(scaled.as_ptr(), call.complete_channels()), weight);
    let block = |head: usize| weight.rows_from(head * call.width);
    let y = scattered(&call, complete, block, |head, token, row| scale_head(&call, heads, gates, head, token, row));
    let [batch, seq, _] = active.shape();
    cpu::tensor(y, [batch, seq, d_model])
}

/// `gate · head` at a position.
fn scale_head(call: &Call<'_>, heads: &[f32], gates: &[f32], head: usize, token: u32, row: &mut [f32]) {
    row.copy_from_slice(call.head(heads, token, head));
    simd::scale(row, gates[token as usize * call.n_heads + head]);
}

/// `[tokens, complete channels]`: `gate · head` of the heads that go through one product.
fn scaled_complete_heads(call: &Call<'_>, heads: &[f32], gates: &[f32]) -> Vec<f32> {
    let mut scaled = cpu::room(call.tokens * call.complete_channels());
    scaled.par_chunks_mut(call.complete_channels().max(1)).enumerate().for_each(|(token, rows)| {
        for (head, row) in rows.chunks_exact_mut(call.width).enumerate() {
            scale_head(call, heads, gates, head, token as u32, row);
        }
    });
    scaled
}

/// Gradients of heads and gates.
pub(super) fn out_of_heads_back_to_heads(
    [heads, gates, weight]: [&FlexTensor; 3],
    y_grad: &FlexTensor,
    active: &ActiveRows,
) -> [FlexTensor; 2] {
    let [channels, d_model] = cpu::sizes(weight);
    let call = Call::new(active, d_model, channels);
    let (heads, gates, y_grads) = (cpu::values(heads), cpu::values(gates), cpu::values(y_grad));
    let weight = Matrix::new(weight).transposed();
    let (mut heads_grad, mut gates_grad) = (call.room(heads.len()), call.room(gates.len()));
    let (heads_into, gates_into) = (Shared::new(&mut heads_grad), Shared::new(&mut gates_grad));
    // What comes back to a gated head: its product with the head is the gate's gradient, times the gate it is the head's.
    let take = |head: usize, token: u32, row: &[f32]| {
        let gate_at = token as usize * call.n_heads + head;
        // SAFETY: a position of a head comes once.
        let (head_grad, gate_grad) =
            unsafe { (heads_into.slice(call.at(token, head), call.width), gates_into.slice(gate_at, 1)) };
        gate_grad[0] = simd::dot(call.head(heads, token, head), row);
        head_grad.copy_from_slice(row);
        simd::scale(head_grad, gates[gate_at]);
    };
    let mut complete = cpu::room(call.tokens * call.complete_channels());
    let to = Destination { start: complete.as_mut_ptr(), rows: call.complete_channels(), add: false, parallel: true };
    let sizes = [call.tokens, d_model, call.complete_channels()];
    // SAFETY: the room is `[tokens, complete channels]`.
    unsafe { cpu::product(sizes, Matrix::by_rows(y_grads.as_ptr(), d_model), weight, 1.0, to) };
    complete.par_chunks(call.complete_channels().max(1)).enumerate().for_each(|(token, rows)| {
        for (head, row) in rows.chunks_exact(call.width).enumerate() {
            take(head, token as u32, row);
        }
    });
    gathered(
        &call,
        y_grads,
        |head| weight.columns_from(head * call.width),
        |head, tokens, products| {
            for (&token, row) in tokens.iter().zip(products.chunks_exact(call.width)) {
                take(head, token, row);
            }
        },
    );
    let [batch, seq, n_heads] = active.shape();
    [cpu::tensor(heads_grad, [batch, seq, channels]), cpu::tensor(gates_grad, [batch, seq, n_heads])]
}

pub(super) fn out_of_heads_back_to_weight(
    [heads, gates]: [&FlexTensor; 2],
    y_grad: &FlexTensor,
    active: &ActiveRows,
) -> FlexTensor {
    let d_model = *y_grad.layout().shape().last().unwrap_or(&1);
    let channels = *heads.layout().shape().last().unwrap_or(&1);
    let call = Call::new(active, d_model, channels);
    let (heads, gates, y_grads) = (cpu::values(heads), cpu::values(gates), cpu::values(y_grad));
    let scaled = scaled_complete_heads(&call, heads, gates);
    let mut weight_grad = cpu::room(channels * d_model);
    let to = Destination { start: weight_grad.as_mut_ptr(), rows: d_model, add: false, parallel: true };
    let left = Matrix::by_rows(scaled.as_ptr(), call.complete_channels()).transposed();
    let right = Matrix::by_rows(y_grads.as_ptr(), d_model);
    // SAFETY: the first rows of the gradient, `[channels, d_model]`, which nobody else has.
    unsafe { cpu::product([call.complete_channels(), call.tokens, d_model], left, right, 1.0, to) };
    let into = Shared::new(&mut weight_grad);
    let fill = |head: usize, token: u32, row: &mut [f32]| scale_head(&call, heads, gates, head, token, row);
    crossed(&call, y_grads, fill, |head, part, y_rows, head_rows, add| {
        let at = into.pointer(head * call.width * d_model + part.start);
        let to = Destination { start: at, rows: d_model, add, parallel: false };
        // SAFETY: a task owns its rows and columns of the gradient.
        unsafe { cpu::product([call.width, y_rows.1, part.len()], head_rows.transposed(), y_rows.0, 1.0, to) };
    });
    cpu::tensor(weight_grad, [channels, d_model])
}

/// Rows of `x`, `[tokens, d_model]`, at the positions of each gathered head, times the head's `block`, `[d_model, width]`;
/// `take` is handed a head, some of its positions, and their products.
fn gathered(
    call: &Call<'_>,
    x: &[f32],
    block: impl Fn(usize) -> Matrix + Sync,
    take: impl Fn(usize, &[u32], &[f32]) + Sync,
) {
    let d_model = call.d_model;
    let tasks: Vec<(usize, &[u32])> = call
        .gathered_heads()
        .flat_map(|head| call.active.of_head(head).chunks(ROWS).map(move |tokens| (head, tokens)))
        .collect();
    tasks.into_par_iter().for_each_init(
        || [cpu::room(ROWS * d_model), cpu::room(ROWS * call.width)],
        |[rows, products], (head, tokens)| {
            gather(x, d_model, 0..d_model, tokens, rows);
            let to = Destination { start: products.as_mut_ptr(), rows: call.width, add: false, parallel: false };
            let sizes = [tokens.len(), d_model, call.width];
            // SAFETY: there is room for ROWS products.
            unsafe { cpu::product(sizes, Matrix::by_rows(rows.as_ptr(), d_model), block(head), 1.0, to) };
            take(head, tokens, &products[..tokens.len() * call.width]);
        },
    );
}

/// `[tokens, d_model]`: the sum over heads of their rows times their blocks: `left · right` for those that go through one
/// product; of the others, `fill` writes a head's row at a position, and `block` is `[width, d_model]`.
fn scattered(
    call: &Call<'_>,
    (left, right): (Matrix, Matrix),
    block: impl Fn(usize) -> Matrix + Sync,
    fill: impl Fn(usize, u32, &mut [f32]) + Sync,
) -> Vec<f32> {
    let (d_model, width) = (call.d_model, call.width);
    let mut y = if call.complete == 0 { vec![0.0; call.tokens * d_model] } else { cpu::room(call.tokens * d_model) };
    let to = Destination { start: y.as_mut_ptr(), rows: d_model, add: false, parallel: true };
    // SAFETY: y is `[tokens, d_model]`, and nobody else has it.
    unsafe { cpu::product([call.tokens, call.complete_channels(), d_model], left, right, 1.0, to) };
    // A task owns the rows of a block of positions, so that nobody else adds to them.
    y.par_chunks_mut((ROWS * d_model).max(1)).enumerate().for_each_init(
        || [cpu::room(ROWS * width), cpu::room(ROWS * d_model)],
        |[rows, products], (index, y)| {
            let from = index * ROWS;
            for head in call.gathered_heads() {
                let tokens = call.active.of_head_within(head, from..from + ROWS);
                tokens.iter().zip(rows.chunks_exact_mut(width)).for_each(|(&token, row)| fill(head, token, row));
                let to = Destination { start: products.as_mut_ptr(), rows: d_model, add: false, parallel: false };
                let sizes = [tokens.len(), width, d_model];
                // SAFETY: there is room for ROWS products.
                unsafe { cpu::product(sizes, Matrix::by_rows(rows.as_ptr(), width), block(head), 1.0, to) };
                for (&token, product) in tokens.iter().zip(products.chunks_exact(d_model)) {
                    let at = (token as usize - from) * d_model;
                    simd::add(&mut y[at..at + d_model], product);
                }
            }
        },
    );
    y
}

/// For each gathered head and each part of the channels of `x`: block by block of the head's positions, `multiply` is
/// handed the head, the part, the gathered part of the rows of `x` with their number, the head's rows as `fill` writes
/// them, and whether to add to what the blocks before gave.
fn crossed(
    call: &Call<'_>,
    x: &[f32],
    fill: impl Fn(usize, u32, &mut [f32]) + Sync,
    multiply: impl Fn(usize, Range<usize>, (Matrix, usize), Matrix, bool) + Sync,
) {
    let (d_model, width) = (call.d_model, call.width);
    let part = |from: usize| from..(from + CHANNELS).min(d_model);
    let tasks: Vec<(usize, Range<usize>)> = call
        .gathered_heads()
        .flat_map(|head| (0..d_model).step_by(CHANNELS).map(move |from| (head, part(from))))
        .collect();
    tasks.into_par_iter().for_each_init(
        || [cpu::room(ROWS * CHANNELS), cpu::room(ROWS * width)],
        |[x_rows, head_rows], (head, part)| {
            let all = call.active.of_head(head);
            // A head that takes part nowhere still has a gradient: zero.
            let blocks = all.chunks(ROWS).chain(all.is_empty().then_some(all));
            for (index, tokens) in blocks.enumerate() {
                gather(x, d_model, part.clone(), tokens, x_rows);
                tokens.iter().zip(head_rows.chunks_exact_mut(width)).for_each(|(&token, row)| fill(head, token, row));
                let x_rows = (Matrix::by_rows(x_rows.as_ptr(), part.len()), tokens.len());
                multiply(head, part.clone(), x_rows, Matrix::by_rows(head_rows.as_ptr(), width), index > 0);
            }
        },
    );
}

/// Copies a part of some rows behind each other.
fn gather(x: &[f32], d_model: usize, part: Range<usize>, tokens: &[u32], rows: &mut [f32]) {
    for (&token, row) in tokens.iter().zip(rows.chunks_exact_mut(part.len())) {
        let at = token as usize * d_model;
        row.copy_from_slice(&x[at + part.start..at + part.end]);
    }
}
