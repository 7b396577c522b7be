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

use std::mem::MaybeUninit;
use std::ops::Range;

use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::cpu;
use crate::matrix::{Matrix, MatrixMut};
use crate::product::product;
use crate::scratch::{ScratchBuffer, Shared, write_chunks, write_rows};
use crate::weight::Weight;
use crate::{SelectedRows, simd};

/// Positions of a block; with 512 channels its gathered rows take 512 KiB.
const ROWS: usize = 256;
/// Channels that a task of a weight's gradient gathers.
const CHANNELS: usize = 256;

/// The sizes of a call, and its selected rows.
#[derive(Clone, Copy)]
struct Call<'a> {
    selected: &'a SelectedRows,
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
    fn new(selected: &'a SelectedRows, d_model: usize, channels: usize) -> Self {
        let [batch, queries, n_heads] = selected.shape();
        let (tokens, complete) = (batch * queries, selected.complete_heads());
        Self { selected, tokens, complete, n_heads, d_model, width: channels / n_heads }
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

    /// Start of a head's channels at a position.
    fn at(&self, token: u32, head: usize) -> usize {
        token as usize * self.channels() + head * self.width
    }

    /// A head's channels at a position.
    fn head<'v>(&self, all: &'v [f32], token: u32, head: usize) -> &'v [f32] {
        let at = self.at(token, head);
        &all[at..at + self.width]
    }

    /// `[tokens, heads * width]`: `left · block` of each head where it takes part, zero elsewhere; `right` is the heads'
    /// blocks side by side.
    fn by_head(&self, left: Matrix<'_>, right: Weight<'_>) -> Vec<f32> {
        if self.complete == self.n_heads {
            return product(left, right).parallel().values();
        }
        let mut y = vec![0.0; self.tokens * self.channels()];
        let complete = self.complete_channels();
        let mut of_complete = MatrixMut::new(&mut y, [self.tokens, complete], self.channels());
        product(left, right.columns(0..complete)).parallel().replace(&mut of_complete);
        y
    }

    /// The channels of a head.
    fn channels_of(&self, head: usize) -> Range<usize> {
        head * self.width..(head + 1) * self.width
    }
}

pub(super) fn into_heads(x: &FlexTensor, weight: &FlexTensor, selected: &SelectedRows) -> FlexTensor {
    let (x, weight) = (cpu::matrix(x), Weight::of(weight));
    let [d_model, channels] = weight.sizes();
    let call = Call::new(selected, d_model, channels);
    let mut y = call.by_head(x, weight);
    let into = Shared::new(&mut y);
    gathered(
        &call,
        x,
        |head| weight.columns(call.channels_of(head)),
        |head, tokens, products| {
            for (&token, product) in tokens.iter().zip(products.chunks_exact(call.width)) {
                // SAFETY: a position of a head comes once, and the tasks are positions of heads.
                unsafe { into.part(call.at(token, head), call.width) }.copy_from_slice(product);
            }
        },
    );
    let [batch, seq, _] = selected.shape();
    cpu::tensor(y, [batch, seq, channels])
}

pub(super) fn into_heads_back_to_x(weight: &FlexTensor, y_grad: &FlexTensor, selected: &SelectedRows) -> FlexTensor {
    let (weight, y_grads) = (Weight::of(weight).transposed(), cpu::matrix(y_grad));
    let [channels, d_model] = weight.sizes();
    let (call, values) = (Call::new(selected, d_model, channels), cpu::values(y_grad));
    let of_complete = 0..call.complete_channels();
    let complete = (y_grads.columns(of_complete.clone()), weight.rows(of_complete));
    let block = |head: usize| weight.rows(call.channels_of(head));
    let x_grad =
        scattered(&call, complete, block, |head, token, row| row.write_copy_of_slice(call.head(values, token, head)));
    let [batch, seq, _] = selected.shape();
    cpu::tensor(x_grad, [batch, seq, d_model])
}

pub(super) fn into_heads_back_to_weight(x: &FlexTensor, y_grad: &FlexTensor, selected: &SelectedRows) -> FlexTensor {
    let (x, y_grads, values) = (cpu::matrix(x), cpu::matrix(y_grad), cpu::values(y_grad));
    let ([_, d_model], [_, channels]) = (x.sizes(), y_grads.sizes());
    let call = Call::new(selected, d_model, channels);
    let mut weight_grad = vec![0.0; d_model * channels];
    let of_complete = 0..call.complete_channels();
    let mut to = MatrixMut::new(&mut weight_grad, [d_model, of_complete.len()], channels);
    product(x.transposed(), y_grads.columns(of_complete)).parallel().replace(&mut to);
    let into = Shared::new(&mut weight_grad);
    let fill = rows_filled_by(|head, token, row| copy(row, call.head(values, token, head)));
    crossed(&call, x, fill, |head, part, x_rows, head_rows, add| {
        let at = part.start * channels + head * call.width;
        // SAFETY: a task owns the rows of its part in the columns of its head.
        let mut to = unsafe { MatrixMut::of_shared(&into, at, [part.len(), call.width], channels) };
        let product = product(x_rows.transposed(), head_rows);
        if add { product.add_to(&mut to) } else { product.replace(&mut to) }
    });
    cpu::tensor(weight_grad, [d_model, channels])
}

pub(super) fn out_of_heads([heads, gates, weight]: [&FlexTensor; 3], selected: &SelectedRows) -> FlexTensor {
    let weight = Weight::of(weight);
    let [channels, d_model] = weight.sizes();
    let call = Call::new(selected, d_model, channels);
    let (heads, gates) = (cpu::values(heads), cpu::values(gates));
    let scaled = scaled_complete_heads(&call, heads, gates);
    let of_complete = 0..call.complete_channels();
    let scaled = Matrix::by_rows(&scaled, [call.tokens, of_complete.len()]);
    let block = |head: usize| weight.rows(call.channels_of(head));
    let y = scattered(&call, (scaled, weight.rows(of_complete)), block, |head, token, row| {
        scale_head(&call, heads, gates, head, token, row)
    });
    let [batch, seq, _] = selected.shape();
    cpu::tensor(y, [batch, seq, d_model])
}

/// Tells the compiler that `fill` writes rows of any lifetime.
fn rows_filled_by<F>(fill: F) -> F
where
    F: for<'y> Fn(usize, u32, &'y mut [MaybeUninit<f32>]) -> &'y mut [f32] + Sync,
{
    fill
}

fn copy<'y>(row: &'y mut [MaybeUninit<f32>], values: &[f32]) -> &'y mut [f32] {
    row.write_copy_of_slice(values)
}

/// `gate · head` at a position.
fn scale_head<'y>(
    call: &Call<'_>,
    heads: &[f32],
    gates: &[f32],
    head: usize,
    token: u32,
    row: &'y mut [MaybeUninit<f32>],
) -> &'y mut [f32] {
    let row = row.write_copy_of_slice(call.head(heads, token, head));
    simd::scale(row, gates[token as usize * call.n_heads + head]);
    row
}

/// `[tokens, complete channels]`: `gate · head` of the heads that go through one product.
fn scaled_complete_heads(call: &Call<'_>, heads: &[f32], gates: &[f32]) -> Vec<f32> {
    let channels = call.complete_channels();
    let tokens = if channels == 0 { 0 } else { call.tokens };
    let (scaled, _) = write_chunks(tokens * channels, channels, (0..tokens).into_par_iter(), |rows, token| {
        let written = write_rows(rows, call.width, |head, row| scale_head(call, heads, gates, head, token as u32, row));
        (written, ())
    });
    scaled
}

/// Gradients of heads and gates, as far as they are wanted.
pub(super) fn out_of_heads_back_to_heads(
    [heads, gates, weight]: [&FlexTensor; 3],
    y_grad: &FlexTensor,
    selected: &SelectedRows,
    [of_heads, of_gates]: [bool; 2],
) -> [Option<FlexTensor>; 2] {
    if !(of_heads || of_gates) {
        return [None, None];
    }
    let (weight, y_grads) = (Weight::of(weight).transposed(), cpu::matrix(y_grad));
    let [d_model, channels] = weight.sizes();
    let call = Call::new(selected, d_model, channels);
    let (heads, gates) = (cpu::values(heads), cpu::values(gates));
    let mut heads_grad = of_heads.then(|| vec![0.0; heads.len()]);
    let mut gates_grad = of_gates.then(|| vec![0.0; gates.len()]);
    let [heads_into, gates_into] = [&mut heads_grad, &mut gates_grad].map(|grad| grad.as_deref_mut().map(Shared::new));
    // What comes back to a gated head: its product with the head is the gate's gradient, times the gate it is the head's.
    let take = |head: usize, token: u32, row: &[f32]| {
        let gate_at = token as usize * call.n_heads + head;
        if let Some(into) = &gates_into {
            // SAFETY: a position of a head comes once.
            let gate_grad = unsafe { into.part(gate_at, 1) };
            gate_grad[0] = simd::dot(call.head(heads, token, head), row);
        }
        if let Some(into) = &heads_into {
            // SAFETY: as above.
            let head_grad = unsafe { into.part(call.at(token, head), call.width) };
            head_grad.copy_from_slice(row);
            simd::scale(head_grad, gates[gate_at]);
        }
    };
    let of_complete = 0..call.complete_channels();
    let complete = product(y_grads, weight.columns(of_complete.clone())).parallel().values();
    complete.par_chunks(of_complete.len().max(1)).enumerate().for_each(|(token, rows)| {
        for (head, row) in rows.chunks_exact(call.width).enumerate() {
            take(head, token as u32, row);
        }
    });
    gathered(
        &call,
        y_grads,
        |head| weight.columns(call.channels_of(head)),
        |head, tokens, products| {
            for (&token, row) in tokens.iter().zip(products.chunks_exact(call.width)) {
                take(head, token, row);
            }
        },
    );
    let [batch, seq, n_heads] = selected.shape();
    [
        heads_grad.map(|values| cpu::tensor(values, [batch, seq, channels])),
        gates_grad.map(|values| cpu::tensor(values, [batch, seq, n_heads])),
    ]
}

pub(super) fn out_of_heads_back_to_weight(
    [heads, gates]: [&FlexTensor; 2],
    y_grad: &FlexTensor,
    selected: &SelectedRows,
) -> FlexTensor {
    let ([_, channels], y_grads) = (cpu::matrix(heads).sizes(), cpu::matrix(y_grad));
    let [_, d_model] = y_grads.sizes();
    let call = Call::new(selected, d_model, channels);
    let (heads, gates) = (cpu::values(heads), cpu::values(gates));
    let scaled = scaled_complete_heads(&call, heads, gates);
    let of_complete = call.complete_channels();
    let scaled = Matrix::by_rows(&scaled, [call.tokens, of_complete]);
    let mut weight_grad = vec![0.0; channels * d_model];
    let mut to = MatrixMut::new(&mut weight_grad, [of_complete, d_model], d_model);
    product(scaled.transposed(), y_grads).parallel().replace(&mut to);
    let into = Shared::new(&mut weight_grad);
    let fill = rows_filled_by(|head, token, row| scale_head(&call, heads, gates, head, token, row));
    crossed(&call, y_grads, fill, |head, part, y_rows, head_rows, add| {
        let at = head * call.width * d_model + part.start;
        // SAFETY: a task owns the columns of its part in the rows of its head.
        let mut to = unsafe { MatrixMut::of_shared(&into, at, [call.width, part.len()], d_model) };
        let product = product(head_rows.transposed(), y_rows);
        if add { product.add_to(&mut to) } else { product.replace(&mut to) }
    });
    cpu::tensor(weight_grad, [channels, d_model])
}

/// Rows of `x`, `[tokens, d_model]`, at the positions of each gathered head, times the head's `block`, `[d_model, width]`;
/// `take` is handed a head, some of its positions, and their products.
fn gathered<'w>(
    call: &Call<'_>,
    x: Matrix<'_>,
    block: impl Fn(usize) -> Weight<'w> + Sync,
    take: impl Fn(usize, &[u32], &[f32]) + Sync,
) {
    let d_model = call.d_model;
    let tasks: Vec<(usize, &[u32])> = call
        .gathered_heads()
        .flat_map(|head| call.selected.of_head(head).chunks(ROWS).map(move |tokens| (head, tokens)))
        .collect();
    tasks.into_par_iter().for_each_init(
        || [ScratchBuffer::new(ROWS * d_model), ScratchBuffer::new(ROWS * call.width)],
        |[rows, products], (head, tokens)| {
            let rows = gather(x, 0..d_model, tokens, rows);
            take(head, tokens, product(rows, block(head)).write_into(products.unwritten()));
        },
    );
}

/// `[tokens, d_model]`: the sum over heads of their rows times their blocks: `left · right` for those that go through one
/// product; of the others, `fill` writes a head's row at a position, and `block` is `[width, d_model]`.
fn scattered<'w>(
    call: &Call<'_>,
    (left, right): (Matrix<'_>, Weight<'_>),
    block: impl Fn(usize) -> Weight<'w> + Sync,
    fill: impl for<'y> Fn(usize, u32, &'y mut [MaybeUninit<f32>]) -> &'y mut [f32] + Sync,
) -> Vec<f32> {
    let (d_model, width) = (call.d_model, call.width);
    let mut y = product(left, right).parallel().values();
    // A task owns the rows of a block of positions, so that nobody else adds to them.
    y.par_chunks_mut((ROWS * d_model).max(1)).enumerate().for_each_init(
        || [ScratchBuffer::new(ROWS * width), ScratchBuffer::new(ROWS * d_model)],
        |[rows, products], (index, y)| {
            let from = index * ROWS;
            for head in call.gathered_heads() {
                let tokens = call.selected.of_head_within(head, from..from + ROWS);
                let rows = head_rows(tokens, width, rows, |token, row| fill(head, token, row));
                let products = product(rows, block(head)).write_into(products.unwritten());
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
/// handed the head, the part, the gathered part of the rows of `x`, the head's rows as `fill` writes them, and whether to
/// add to what the blocks before gave.
fn crossed(
    call: &Call<'_>,
    x: Matrix<'_>,
    fill: impl for<'y> Fn(usize, u32, &'y mut [MaybeUninit<f32>]) -> &'y mut [f32] + Sync,
    multiply: impl Fn(usize, Range<usize>, Matrix<'_>, Matrix<'_>, bool) + Sync,
) {
    let (d_model, width) = (call.d_model, call.width);
    let part = |from: usize| from..(from + CHANNELS).min(d_model);
    let tasks: Vec<(usize, Range<usize>)> = call
        .gathered_heads()
        .flat_map(|head| (0..d_model).step_by(CHANNELS).map(move |from| (head, part(from))))
        .collect();
    tasks.into_par_iter().for_each_init(
        || [ScratchBuffer::new(ROWS * CHANNELS), ScratchBuffer::new(ROWS * width)],
        |[x_rows, of_head], (head, part)| {
            // A head that takes part nowhere keeps its gradient of zero.
            for (index, tokens) in call.selected.of_head(head).chunks(ROWS).enumerate() {
                let x_rows = gather(x, part.clone(), tokens, x_rows);
                let of_head = head_rows(tokens, width, of_head, |token, row| fill(head, token, row));
                multiply(head, part.clone(), x_rows, of_head, index > 0);
            }
        },
    );
}

/// `[tokens, part]`: a part of some rows, one behind the other in `buffer`.
fn gather<'b>(x: Matrix<'_>, part: Range<usize>, tokens: &[u32], buffer: &'b mut ScratchBuffer) -> Matrix<'b> {
    head_rows(tokens, part.len(), buffer, |token, row| copy(row, &x.row(token as usize)[part.clone()]))
}

/// `[tokens, width]`: rows as `fill` writes them, one behind the other in `buffer`.
fn head_rows<'b>(
    tokens: &[u32],
    width: usize,
    buffer: &'b mut ScratchBuffer,
    fill: impl for<'y> Fn(u32, &'y mut [MaybeUninit<f32>]) -> &'y mut [f32],
) -> Matrix<'b> {
    let part = &mut buffer.unwritten()[..tokens.len() * width];
    Matrix::by_rows(write_rows(part, width, |r, row| fill(tokens[r], row)), [tokens.len(), width])
}
