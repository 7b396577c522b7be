//! The forward (algorithm 1): a task takes a block of queries of one head and walks over blocks of keys with a running
//! maximum and sum per query. The log of the sum is kept.

use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{FACTS, KEYS, LARGEST, Plan, QUERIES, inside, soften};
use crate::cpu::{self, View};
use crate::matrix::{Matrix, MatrixMut};
use crate::product::Product;
use crate::product::product;
use crate::scratch::{ScratchBuffer, Shared, write_zeros};
use crate::selected_rows::Rows;
use crate::simd;

/// The output, and the facts about each query.
pub(super) fn forward(
    [q, k, v]: [View<'_>; 3],
    sinks: Option<&[f32]>,
    bias: Option<View<'_>>,
    plan: &Plan,
) -> (FlexTensor, FlexTensor) {
    let [batch, heads, queries, width] = q.shape;
    let value_width = v.shape[3];
    let mut output = ScratchBuffer::new(batch * queries * heads * value_width);
    if plan.selected.is_some() {
        write_zeros(output.unwritten()); // where queries are not computed
    }
    let facts = Facts::new(plan, [batch, heads, queries]);
    let shared = Shared::new(output.unwritten());
    let every_head = (0..batch).flat_map(|b| (0..heads).map(move |h| [b, h]));
    let tasks: Vec<([usize; 2], Rows<'_>)> =
        every_head.flat_map(|[b, h]| plan.blocks(b, h).into_iter().map(move |rows| ([b, h], rows))).collect();
    tasks.into_par_iter().for_each_init(
        || Workspace {
            tile: ScratchBuffer::new(QUERIES * KEYS),
            q: ScratchBuffer::new(QUERIES * width),
            sums: ScratchBuffer::new(QUERIES * value_width),
        },
        |workspace, (head, rows)| {
            forward_block(([q, k, v], sinks, bias), plan, head, rows, workspace, &shared, &facts);
        },
    );
    // SAFETY: where some queries are not computed, it was full of zeros. Else the blocks of a head cover all its queries,
    // and `forward_block` writes every row of its own.
    let output = unsafe { output.into_values() };
    (cpu::tensor_by_position(output, [batch, heads, queries, value_width]), facts.into_tensor())
}

/// `[kept, batch, heads, queries]`: what is kept of each query. Whole numbers that hold the bits of an f32, because threads
/// write them at places between each other's.
struct Facts {
    values: Vec<AtomicU32>,
    kept: usize,
    shape: [usize; 3],
}

impl Facts {
    fn new(plan: &Plan, shape: [usize; 3]) -> Self {
        let kept = if plan.measure { FACTS } else { 1 };
        // A query that is not computed has no largest score.
        let none = |fact: usize| if fact == LARGEST { f32::NEG_INFINITY } else { 0.0 };
        let count: usize = shape.iter().product();
        let values = (0..kept * count).map(|at| AtomicU32::new(none(at / count).to_bits())).collect();
        Self { values, kept, shape }
    }

    fn set(&self, fact: usize, [b, h, query]: [usize; 3], value: f32) {
        let [batch, heads, queries] = self.shape;
        self.values[((fact * batch + b) * heads + h) * queries + query].store(value.to_bits(), Ordering::Relaxed);
    }

    fn into_tensor(self) -> FlexTensor {
        let [batch, heads, queries] = self.shape;
        let values = self.values.into_iter().map(|bits| f32::from_bits(bits.into_inner())).collect();
        cpu::tensor(values, [self.kept, batch, heads, queries])
    }
}

/// Scratch buffers of a forward task.
struct Workspace {
    /// Scores, then weights.
    tile: ScratchBuffer,
    // Copies of rows that are no neighbours.
    q: ScratchBuffer,
    sums: ScratchBuffer,
}

/// The weighted values of a block of queries, added up over blocks of keys.
enum WeightedSums<'a> {
    /// Before the first block of keys.
    Unwritten(MatrixMut<'a, MaybeUninit<f32>>),
    Summed(MatrixMut<'a, f32>),
}

impl<'a> WeightedSums<'a> {
    fn add(self, product: Product<'_>) -> Self {
        match self {
            Self::Unwritten(to) => Self::Summed(product.write_to(to)),
            Self::Summed(mut sums) => {
                product.add_to(&mut sums);
                Self::Summed(sums)
            }
        }
    }

    /// A query's sum so far, times a factor.
    fn scale(&mut self, row: usize, factor: f32) {
        if let Self::Summed(sums) = self {
            simd::scale(sums.row(row), factor);
        }
    }

    fn finished(self) -> MatrixMut<'a, f32> {
        match self {
            Self::Unwritten(to) => to.zeroed(),
            Self::Summed(sums) => sums,
        }
    }
}

/// The running softmax of a query.
#[derive(Clone, Copy)]
struct Running {
    /// The largest score.
    largest: f32,
    /// The sum of e^(score - largest).
    total: f32,
    /// The sum of e^(score - largest) * score.
    weighted: f32,
    /// e^(score - largest) of the very first key.
    first: f32,
}

impl Running {
    /// Lets a sink take part: the factor by which everything before has to be scaled, and e^(sink - largest).
    fn with_sink(&mut self, sink: f32) -> (f32, f32) {
        let shift = self.largest.max(sink);
        let (keep, weight) = (simd::exp(self.largest - shift), simd::exp(sink - shift));
        self.total = self.total * keep + weight;
        // A sink of negative infinity has weight 0.
        self.weighted = self.weighted * keep + if weight == 0.0 { 0.0 } else { weight * sink };
        self.first *= keep;
        self.largest = shift;
        (keep, weight)
    }
}

/// One block of queries of one head: writes their rows of the output and their facts.
fn forward_block(
    ([q, k, v], sinks, bias): ([View<'_>; 3], Option<&[f32]>, Option<View<'_>>),
    plan: &Plan,
    [b, h]: [usize; 2],
    rows: Rows<'_>,
    workspace: &mut Workspace,
    output: &Shared<'_, MaybeUninit<f32>>,
    facts: &Facts,
) {
    let Workspace { tile, q: q_rows, sums } = workspace;
    let ([_, heads, queries, _], value_width) = (q.shape, v.shape[3]);
    let output_at = |query: usize| ((b * queries + query) * heads + h) * value_width;
    let sizes = [rows.len(), value_width];
    // Neighbours are summed up where they belong, others in a buffer of their own.
    let mut sums = WeightedSums::Unwritten(match rows {
        // SAFETY: a query of a head is in one block, and a block is one task: nobody else has these rows.
        Rows::Span { from, .. } => unsafe { MatrixMut::of_shared(output, output_at(from), sizes, heads * value_width) },
        Rows::Listed { .. } => MatrixMut::new(sums.unwritten(), sizes, value_width),
    });
    let queries_here = rows.matrix(q, [b, h], q_rows.unwritten());
    let start = Running { largest: f32::NEG_INFINITY, total: 0.0, weighted: 0.0, first: 0.0 };
    let mut running = [start; QUERIES];
    let mut scores = if plan.measure { vec![0.0; KEYS] } else { Vec::new() };
    let spans = plan.spans([b, h], rows, 0..k.shape[2]);
    for keys in spans.iter().flat_map(|span| span.clone().step_by(KEYS).map(|from| from..(from + KEYS).min(span.end))) {
        let n = keys.len();
        let keys_here = k.rows(b, plan.key_of[h], keys.clone());
        let tile = product(queries_here, keys_here.transposed()).scaled(plan.scale).write_into(tile.unwritten());
        for (r, query) in rows.queries().enumerate() {
            let row = &mut tile[r * n..(r + 1) * n];
            let seen = inside(plan.visible.range(b, query), &keys);
            row[..seen.start].fill(0.0);
            row[seen.end..].fill(0.0);
            let first_key = keys.start == 0 && seen.start == 0;
            let seen_keys = keys.start + seen.start..keys.start + seen.end;
            if let Some(cap) = plan.softcap {
                soften(&mut row[seen.clone()], cap);
            }
            if let Some(bias) = bias {
                simd::add(&mut row[seen.clone()], &bias.spread_row([b, h, query])[seen_keys.clone()]);
            }
            let keep = advance(&mut running[r], &mut row[seen], plan, [b, h, query], seen_keys, first_key, &mut scores);
            if keep != 1.0 {
                sums.scale(r, keep);
            }
        }
        let weights = Matrix::by_rows(tile, [rows.len(), n]);
        sums = sums.add(product(weights, v.rows(b, plan.value_of[h], keys)));
    }
    let mut sums = sums.finished();
    for (r, query) in rows.queries().enumerate() {
        let largest_score = running[r].largest;
        let (blind, sum) = (running[r].total == 0.0, sums.row(r));
        let in_sink = sinks.filter(|_| !blind).map(|sinks| running[r].with_sink(sinks[h]));
        let Running { largest, total, weighted, first } = running[r];
        if blind {
            sum.fill(0.0);
        } else {
            simd::scale(sum, in_sink.map_or(1.0, |(keep, _)| keep) / total);
        }
        if let Rows::Listed { .. } = rows {
            // SAFETY: as above, nobody else has this query of this head.
            unsafe { output.part(output_at(query), value_width) }.write_copy_of_slice(sum);
        }
        let log_sum = if blind { f32::INFINITY } else { largest + total.ln() };
        facts.set(0, [b, h, query], log_sum);
        if plan.measure {
            facts.set(1, [b, h, query], if blind { 0.0 } else { log_sum - weighted / total });
            facts.set(2, [b, h, query], if blind { 0.0 } else { first / total });
            facts.set(LARGEST, [b, h, query], largest_score);
            let alone = if blind && sinks.is_some() { 1.0 } else { 0.0 };
            facts.set(4, [b, h, query], in_sink.map_or(alone, |(_, weight)| weight / total));
        }
    }
}

/// Turns a query's scores (those of a block that it may see) into weights relative to its largest score so far. Gives
/// the factor by which everything before has to be scaled.
fn advance(
    running: &mut Running,
    seen: &mut [f32],
    plan: &Plan,
    [b, h, query]: [usize; 3],
    keys: Range<usize>,
    first_key: bool,
    scores: &mut [f32],
) -> f32 {
    if seen.is_empty() {
        return 1.0;
    }
    plan.visible.hide_inside([b, h], query, keys.clone(), seen, f32::NEG_INFINITY);
    let largest = simd::max(seen);
    // Not a number is no reason to be silent: it has to reach the loss.
    if largest == f32::NEG_INFINITY && !seen.iter().any(|score| score.is_nan()) {
        seen.fill(0.0);
        return 1.0;
    }
    let shift = running.largest.max(largest);
    let keep = if running.total == 0.0 { 0.0 } else { simd::exp(running.largest - shift) };
    if plan.measure {
        scores[..seen.len()].copy_from_slice(seen);
    }
    let total = simd::exp_shifted(seen, shift);
    plan.visible.hide_inside([b, h], query, keys, seen, 0.0);
    running.largest = shift;
    running.total = running.total * keep + total;
    if plan.measure {
        // A hidden key has weight 0 and a score of negative infinity, whose product is no number.
        let product = |(weight, score): (&f32, &f32)| if *weight == 0.0 { 0.0 } else { weight * score };
        let weighted: f32 = seen.iter().zip(&*scores).map(product).sum();
        running.weighted = running.weighted * keep + weighted;
        running.first = running.first * keep + if first_key { seen[0] } else { 0.0 };
    }
    keep
}
