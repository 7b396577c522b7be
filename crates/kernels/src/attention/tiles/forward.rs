//! The forward (algorithm 1): a task takes a block of queries of one head and walks over blocks of keys with a running
//! maximum and sum per query. The log of the sum is kept.

use std::ops::Range;

use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{FACTS, KEYS, Plan, QUERIES, inside, reach};
use crate::active::Rows;
use crate::cpu::{self, Destination, Matrix, Shared, View, product, room};
use crate::simd;

/// The output, and the facts about each query.
pub(super) fn forward(q: View<'_>, k: View<'_>, v: View<'_>, plan: &Plan) -> (FlexTensor, FlexTensor) {
    let [batch, heads, queries, width] = q.shape;
    let value_width = v.shape[3];
    let facts = if plan.measure { FACTS } else { 1 };
    let mut output = plan.room(batch * queries * heads * value_width);
    let mut seen = plan.room(facts * batch * heads * queries);
    if plan.measure && plan.active.is_some() {
        // A query that is not computed has no largest score.
        seen[(FACTS - 1) * batch * heads * queries..].fill(f32::NEG_INFINITY);
    }
    let (output_at, seen_at) = (Shared::new(&mut output), Shared::new(&mut seen));
    let every_head = (0..batch).flat_map(|b| (0..heads).map(move |h| [b, h]));
    let tasks: Vec<([usize; 2], Rows<'_>)> =
        every_head.flat_map(|[b, h]| plan.blocks(b, h, queries).into_iter().map(move |rows| ([b, h], rows))).collect();
    tasks.into_par_iter().for_each_init(
        || [room(QUERIES * KEYS), room(QUERIES * width), room(QUERIES * value_width)],
        |rooms, (head, rows)| forward_block([q, k, v], plan, head, rows, rooms, output_at, seen_at),
    );
    let output = cpu::tensor_by_position(output, [batch, heads, queries, value_width]);
    (output, cpu::tensor(seen, [facts, batch, heads, queries]))
}

/// What is known of a query while its keys come by.
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

/// One block of queries of one head.
fn forward_block(
    [q, k, v]: [View<'_>; 3],
    plan: &Plan,
    [b, h]: [usize; 2],
    rows: Rows<'_>,
    [tile, q_room, output_room]: &mut [Vec<f32>; 3],
    output: Shared,
    facts: Shared,
) {
    let [batch, heads, queries, width] = q.shape;
    let value_width = v.shape[3];
    let output_at = |query: usize| ((b * queries + query) * heads + h) * value_width;
    // Neighbours are summed up where they belong, others in a room of their own.
    let (sums, sums_at, stride) = match rows {
        Rows::Span { from, .. } => (output, output_at(from), heads * value_width),
        Rows::Listed { .. } => (Shared::new(output_room), 0, value_width),
    };
    // SAFETY: one task owns these rows of this head.
    let sum = |r: usize| unsafe { sums.slice(sums_at + r * stride, value_width) };
    let queries_here = rows.matrix(q, [b, h], q_room);
    let start = Running { largest: f32::NEG_INFINITY, total: 0.0, weighted: 0.0, first: 0.0 };
    let mut running = [start; QUERIES];
    let mut scores = if plan.measure { vec![0.0; KEYS] } else { Vec::new() };
    let reach = reach(&plan.visible, b, rows);
    for from in reach.clone().step_by(KEYS) {
        let keys = from..(from + KEYS).min(reach.end);
        let n = keys.len();
        let keys_here = Matrix::by_rows(k.pointer(b, plan.key_of[h], keys.start), k.row_stride());
        let into_tile = Destination { start: tile.as_mut_ptr(), rows: n, add: false, parallel: false };
        // SAFETY: `rows.len() <= QUERIES` and `n <= KEYS`, so the tile has room.
        unsafe { product([rows.len(), width, n], queries_here, keys_here.transposed(), plan.scale, into_tile) };
        let later = from > reach.start;
        for (r, query) in rows.queries().enumerate() {
            let row = &mut tile[r * n..(r + 1) * n];
            let seen = inside(plan.visible.range(b, query), &keys);
            row[..seen.start].fill(0.0);
            row[seen.end..].fill(0.0);
            let first_key = keys.start == 0 && seen.start == 0;
            let seen_keys = keys.start + seen.start..keys.start + seen.end;
            let keep = advance(&mut running[r], &mut row[seen], plan, [b, query], seen_keys, first_key, &mut scores);
            if later && keep != 1.0 {
                simd::scale(sum(r), keep);
            }
        }
        let weights = Matrix::by_rows(tile.as_ptr(), n);
        let values = Matrix::by_rows(v.pointer(b, plan.value_of[h], keys.start), v.row_stride());
        let into_sums = Destination { start: sums.pointer(sums_at), rows: stride, add: later, parallel: false };
        // SAFETY: one task owns these rows of this head.
        unsafe { product([rows.len(), n, value_width], weights, values, 1.0, into_sums) };
    }
    let fact = |index: usize, query: usize, value: f32| {
        // SAFETY: one task owns this query of this head.
        unsafe { facts.slice(((index * batch + b) * heads + h) * queries + query, 1)[0] = value };
    };
    for (r, query) in rows.queries().enumerate() {
        let Running { largest, total, weighted, first } = running[r];
        let blind = total == 0.0;
        if blind {
            sum(r).fill(0.0);
        } else {
            simd::scale(sum(r), 1.0 / total);
        }
        if let Rows::Listed { .. } = rows {
            // SAFETY: one task owns these rows of this head.
            unsafe { output.slice(output_at(query), value_width) }.copy_from_slice(sum(r));
        }
        let log_sum = if blind { f32::INFINITY } else { largest + total.ln() };
        fact(0, query, log_sum);
        if plan.measure {
            fact(1, query, if blind { 0.0 } else { log_sum - weighted / total });
            fact(2, query, if blind { 0.0 } else { first / total });
            fact(3, query, largest);
        }
    }
}

/// Turns a query's scores (those of a block that it may see) into weights relative to its largest score so far. Gives
/// the factor by which everything before has to be scaled.
fn advance(
    running: &mut Running,
    seen: &mut [f32],
    plan: &Plan,
    [b, query]: [usize; 2],
    keys: Range<usize>,
    first_key: bool,
    scores: &mut [f32],
) -> f32 {
    if seen.is_empty() {
        return 1.0;
    }
    plan.visible.hide_inside(b, query, keys.clone(), seen, f32::NEG_INFINITY);
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
    plan.visible.hide_inside(b, query, keys, seen, 0.0);
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
