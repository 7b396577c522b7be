//! The backward (algorithm 2): tiles are computed again from the kept sums. A task takes all query heads that share key or
//! value heads, so that nobody else adds to the same gradients; where there are too few such families to use all cores,
//! each is cut into chunks of keys, whose parts of the query gradients are added up in order.

use std::ops::Range;

use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{KEYS, Plan, QUERIES, inside, reach};
use crate::active::Rows;
use crate::cpu::{self, Destination, Matrix, Shared, View, product, room};
use crate::simd;

/// Tasks that the work is cut into at least, where sequences are long enough: more than any usual number of cores.
const TASKS: usize = 16;
/// Keys of a chunk at least.
const CHUNK: usize = 256;

/// Gradients of q, k and v.
pub(super) fn backward([q, k, v, output, output_grad]: [View<'_>; 5], facts: &[f32], plan: &Plan) -> [FlexTensor; 3] {
    let [batch, heads, queries, width] = q.shape;
    let [_, key_heads, keys, _] = k.shape;
    let [_, value_heads, _, value_width] = v.shape;
    let n_families = plan.families.len();
    let chunks = TASKS.div_ceil(batch * n_families).min(keys.div_ceil(CHUNK)).max(1);
    let chunk = keys.div_ceil(chunks);
    let mut q_grad = room(chunks * batch * queries * heads * width);
    let mut k_grad = room_of_heads(batch * keys * width, key_heads, &plan.key_of);
    let mut v_grad = room_of_heads(batch * keys * value_width, value_heads, &plan.value_of);
    let deltas = deltas(output, output_grad, plan);
    let grads = Grads { q: Shared::new(&mut q_grad), k: Shared::new(&mut k_grad), v: Shared::new(&mut v_grad) };
    (0..batch * n_families * chunks).into_par_iter().for_each_init(
        || Rooms {
            tiles: [room(QUERIES * KEYS), room(QUERIES * KEYS)],
            q: room(QUERIES * width),
            output_grad: room(QUERIES * value_width),
            q_grad: room(QUERIES * width),
        },
        |rooms, task| {
            let (b, rest) = (task / (n_families * chunks), task % (n_families * chunks));
            let part = Part {
                b,
                family: &plan.families[rest / chunks],
                keys: (rest % chunks * chunk).min(keys)..((rest % chunks + 1) * chunk).min(keys),
                q_grad_at: rest % chunks * batch * queries * heads * width,
            };
            backward_part([q, k, v, output_grad], facts, &deltas, plan, &part, rooms, &grads);
        },
    );
    let size = batch * queries * heads * width;
    let (sum, others) = q_grad.split_at_mut(size);
    for other in others.chunks(size.max(1)) {
        sum.par_chunks_mut(1 << 15).zip(other.par_chunks(1 << 15)).for_each(|(sum, other)| simd::add(sum, other));
    }
    q_grad.truncate(size);
    [
        cpu::tensor_by_position(q_grad, q.shape),
        cpu::tensor_by_position(k_grad, k.shape),
        cpu::tensor_by_position(v_grad, v.shape),
    ]
}

/// Room for the gradients of `heads` heads, each of `len` values: those that no query head reads get nothing written to them.
fn room_of_heads(len: usize, heads: usize, read: &[usize]) -> Vec<f32> {
    let all_read = (0..heads).all(|head| read.contains(&head));
    if all_read { room(len * heads) } else { vec![0.0; len * heads] }
}

/// `[batch, heads, queries]`: the product of each output with its gradient, which the softmax's backward subtracts.
fn deltas(output: View<'_>, output_grad: View<'_>, plan: &Plan) -> Vec<f32> {
    let [batch, heads, queries, _] = output.shape;
    let mut deltas = plan.room(batch * heads * queries);
    deltas.par_chunks_mut(queries.max(1)).enumerate().for_each(|(task, deltas)| {
        let (b, h) = (task / heads, task % heads);
        for query in plan.blocks(b, h, queries).into_iter().flat_map(Rows::queries) {
            deltas[query] = simd::dot(output.row(b, h, query), output_grad.row(b, h, query));
        }
    });
    deltas
}

/// Where gradients are written; rows of a head lie as in `cpu::tensor_by_position`.
struct Grads {
    q: Shared,
    k: Shared,
    v: Shared,
}

/// What a task of the backward computes in.
struct Rooms {
    /// Weights, and gradients of scores.
    tiles: [Vec<f32>; 2],
    // Copies of rows that are no neighbours.
    q: Vec<f32>,
    output_grad: Vec<f32>,
    q_grad: Vec<f32>,
}

/// The work of one task of the backward.
struct Part<'a> {
    b: usize,
    family: &'a [usize],
    /// The chunk of keys.
    keys: Range<usize>,
    /// Where this chunk's part of the query gradients begins.
    q_grad_at: usize,
}

fn backward_part(
    [q, k, v, output_grad]: [View<'_>; 4],
    facts: &[f32],
    deltas: &[f32],
    plan: &Plan,
    part: &Part<'_>,
    rooms: &mut Rooms,
    grads: &Grads,
) {
    let Rooms { tiles: [weights, score_grads], q: q_room, output_grad: grad_room, q_grad: q_grad_room } = rooms;
    let [_, heads, queries, width] = q.shape;
    let ([_, key_heads, all_keys, _], [_, value_heads, _, value_width]) = (k.shape, v.shape);
    let b = part.b;
    let q_at = |h: usize, query: usize| part.q_grad_at + ((b * queries + query) * heads + h) * width;
    let k_at = |h: usize, key: usize| ((b * all_keys + key) * key_heads + h) * width;
    let v_at = |h: usize, key: usize| ((b * all_keys + key) * value_heads + h) * value_width;
    for &h in part.family {
        // SAFETY: nobody but this family touches gradients of its heads, nor another chunk this chunk's.
        unsafe {
            (0..queries).for_each(|query| grads.q.slice(q_at(h, query), width).fill(0.0));
            part.keys.clone().for_each(|key| grads.k.slice(k_at(plan.key_of[h], key), width).fill(0.0));
            part.keys.clone().for_each(|key| grads.v.slice(v_at(plan.value_of[h], key), value_width).fill(0.0));
        }
    }
    for from in part.keys.clone().step_by(KEYS) {
        let block = from..(from + KEYS).min(part.keys.end);
        let blocks = |&h: &usize| plan.blocks(b, h, queries).into_iter().map(move |rows| (h, rows));
        for (h, rows) in part.family.iter().flat_map(blocks) {
            let reach = reach(&plan.visible, b, rows);
            let keys = reach.start.max(block.start)..reach.end.min(block.end);
            if keys.is_empty() {
                continue;
            }
            let (m, n) = (rows.len(), keys.len());
            let (key_head, value_head) = (plan.key_of[h], plan.value_of[h]);
            let q_rows = rows.matrix(q, [b, h], q_room);
            let k_rows = Matrix::by_rows(k.pointer(b, key_head, keys.start), k.row_stride());
            let v_rows = Matrix::by_rows(v.pointer(b, value_head, keys.start), v.row_stride());
            let grad_rows = rows.matrix(output_grad, [b, h], grad_room);
            let tile =
                |start: &mut [f32]| Destination { start: start.as_mut_ptr(), rows: n, add: false, parallel: false };
            // SAFETY: `m <= QUERIES` and `n <= KEYS`, so the tiles have room.
            unsafe {
                product([m, width, n], q_rows, k_rows.transposed(), plan.scale, tile(weights));
                product([m, value_width, n], grad_rows, v_rows.transposed(), 1.0, tile(score_grads));
            }
            for (r, query) in rows.queries().enumerate() {
                let seen = inside(plan.visible.range(b, query), &keys);
                let (weights, score_grads) = (&mut weights[r * n..(r + 1) * n], &mut score_grads[r * n..(r + 1) * n]);
                for row in [&mut *weights, &mut *score_grads] {
                    row[..seen.start].fill(0.0);
                    row[seen.end..].fill(0.0);
                }
                let fact = (b * heads + h) * queries + query;
                let seen_keys = keys.start + seen.start..keys.start + seen.end;
                let weights = &mut weights[seen.clone()];
                simd::exp_only(weights, facts[fact]);
                plan.visible.hide_inside(b, query, seen_keys, weights, 0.0);
                simd::softmax_backward(&mut score_grads[seen], weights, deltas[fact], plan.scale);
            }
            let (weights, score_grads) =
                (Matrix::by_rows(weights.as_ptr(), n), Matrix::by_rows(score_grads.as_ptr(), n));
            let add = |start: *mut f32, rows: usize| Destination { start, rows, add: true, parallel: false };
            let q_into = match rows {
                Rows::Span { from, .. } => add(grads.q.pointer(q_at(h, from)), heads * width),
                Rows::Listed { .. } => {
                    Destination { start: q_grad_room.as_mut_ptr(), rows: width, add: false, parallel: false }
                }
            };
            let (k_into, v_into) = (
                add(grads.k.pointer(k_at(key_head, keys.start)), key_heads * width),
                add(grads.v.pointer(v_at(value_head, keys.start)), value_heads * value_width),
            );
            // SAFETY: as above, these gradients are this task's own.
            unsafe {
                product([m, n, width], score_grads, k_rows, 1.0, q_into);
                product([n, m, width], score_grads.transposed(), q_rows, 1.0, k_into);
                product([n, m, value_width], weights.transposed(), grad_rows, 1.0, v_into);
            }
            if let Rows::Listed { .. } = rows {
                for (query, row) in rows.queries().zip(q_grad_room.chunks_exact(width)) {
                    // SAFETY: as above.
                    simd::add(unsafe { grads.q.slice(q_at(h, query), width) }, row);
                }
            }
        }
    }
}
