//! Attention in tiles, forward and backward, on the CPU.
//!
//! Forward, after FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithm 1): a task takes a block of queries of one head
//! and walks over blocks of keys with a running maximum and sum per query, so that only one tile of scores exists. The
//! log of the sum is kept.
//!
//! Backward (algorithm 2): tiles are computed again from it. A task takes all query heads that share key or value heads,
//! so that nobody else adds to the same gradients; where there are too few such families to use all cores, each is cut
//! into chunks of keys, whose parts of the query gradients are added up in order. How work is cut depends on shapes
//! alone: the same bits come out for any number of threads.

use std::ops::Range;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{Attention, AttentionOptions, Measure, Statistics};
use crate::active::{ActiveRows, Rows};
use crate::cpu::{self, Destination, Matrix, Shared, View, product, room, row_major};
use crate::mask::Visible;
use crate::simd;

/// Queries of a tile.
const QUERIES: usize = 128;
/// Keys of a tile; with [`QUERIES`] it makes 256 KiB, which fits into a core's second-level cache.
const KEYS: usize = 512;
/// Tasks that the backward is cut into at least, where sequences are long enough: more than any usual number of cores.
const TASKS: usize = 16;
/// Keys of a chunk at least.
const CHUNK: usize = 256;
/// Facts about a query that are kept: the log of its sum, and what statistics are made of.
const FACTS: usize = 4;

/// Everything about a call besides its tensors.
#[derive(Debug)]
pub(super) struct Plan {
    scale: f32,
    key_of: Vec<usize>,
    value_of: Vec<usize>,
    /// Query heads that share key or value heads, directly or through others.
    families: Vec<Vec<usize>>,
    visible: Arc<Visible>,
    /// Which queries of which heads are computed; `None` means all.
    active: Option<Arc<ActiveRows>>,
    measure: bool,
}

impl Plan {
    /// The blocks of queries that a head computes in a row of the batch.
    fn blocks(&self, b: usize, h: usize, queries: usize) -> Vec<Rows<'_>> {
        match &self.active {
            Some(active) => active.blocks(b, h, QUERIES).collect(),
            None => {
                let span = |from: usize| Rows::Span { from, len: QUERIES.min(queries - from) };
                (0..queries).step_by(QUERIES).map(span).collect()
            }
        }
    }

    /// Room that every value of is written to before it is read, but those of queries that are not computed.
    fn room(&self, len: usize) -> Vec<f32> {
        if self.active.is_some() { vec![0.0; len] } else { room(len) }
    }
}

/// The tiles as an operation of Burn's dispatching backend.
#[backend_extension(Flex, Autodiff)]
pub(super) trait TiledAttention: Backend {
    /// The output, and `[FACTS, batch, heads, queries]` (only the first of them where nothing is measured).
    fn tiled_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        plan: Arc<Plan>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

/// See [`super::attention`].
pub(super) fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    visible: Arc<Visible>,
    options: &AttentionOptions<'_>,
) -> Attention {
    let [batch, heads, queries, width] = q.dims();
    let ([k_batch, key_heads, keys, k_width], [v_batch, value_heads, v_keys, _]) = (k.dims(), v.dims());
    assert!(k_batch == batch && v_batch == batch && keys == v_keys && width == k_width, "q, k and v disagree");
    if let Some(active) = &options.active {
        assert_eq!(active.shape(), [batch, queries, heads], "active rows of another call");
    }
    let (key_of, value_of) = (options.keys.of(heads, key_heads), options.values.of(heads, value_heads));
    let plan = Plan {
        scale: options.scale_for(&q) as f32,
        families: families(&key_of, &value_of),
        key_of,
        value_of,
        visible,
        active: options.active.clone(),
        measure: options.statistics != Measure::Nothing,
    };
    // The matrix of one row is asked for by whoever looks at pictures; it is made beside the tiles.
    let weights = (options.statistics == Measure::Weights).then(|| {
        let first = |x: &Tensor<4>| x.clone().narrow(0, 0, 1).detach();
        weights_of_first_row(first(&q), first(&k), &plan)
    });
    let (measure, counted) = (plan.measure, options.counted(q.dims(), &q.device()).clamp_min(1.0));
    let (hidden, facts) =
        Dispatch::tiled_attention(q.into_dispatch(), k.into_dispatch(), v.into_dispatch(), Arc::new(plan));
    let statistics = measure.then(|| {
        let facts = Tensor::<4>::from_dispatch(facts).swap_dims(1, 2); // [FACTS, heads, batch, queries]
        let fact = |index| facts.clone().narrow(0, index, 1).reshape([heads, batch * queries]);
        Statistics {
            entropy: fact(1).sum_dim(1).squeeze_dim::<1>(1) / counted.clone(),
            first_key_mass: fact(2).sum_dim(1).squeeze_dim::<1>(1) / counted,
            largest_score: fact(3).max_dim(1).squeeze_dim::<1>(1),
            weights,
        }
    });
    Attention { hidden: Tensor::from_dispatch(hidden), statistics }
}

/// Groups query heads that share a key or value head.
fn families(key_of: &[usize], value_of: &[usize]) -> Vec<Vec<usize>> {
    let mut families: Vec<Vec<usize>> = Vec::new();
    for head in 0..key_of.len() {
        let shares = |&other: &usize| key_of[other] == key_of[head] || value_of[other] == value_of[head];
        let (related, others): (Vec<_>, Vec<_>) = families.into_iter().partition(|family| family.iter().any(shares));
        families = others;
        let mut family: Vec<usize> = related.into_iter().flatten().chain([head]).collect();
        family.sort_unstable();
        families.push(family);
    }
    families
}

/// `[heads, queries, keys]`, with zeros where keys are hidden and where queries are not computed.
fn weights_of_first_row(q: Tensor<4>, k: Tensor<4>, plan: &Plan) -> Tensor<3> {
    let [_, heads, queries, _] = q.dims();
    let (keys, device) = (k.dims()[2], q.device());
    let all: Vec<f32> = (0..heads)
        .flat_map(|head| {
            let own = |x: &Tensor<4>, head| x.clone().narrow(1, head, 1).squeeze_dims::<2>(&[0, 1]);
            let scores = own(&q, head).matmul(own(&k, plan.key_of[head]).transpose()) * f64::from(plan.scale);
            let mut scores: Vec<f32> = scores.into_data().iter::<f32>().collect();
            let mut weights = vec![0.0; queries * keys];
            for query in plan.blocks(0, head, queries).into_iter().flat_map(Rows::queries) {
                let of_query = query * keys..(query + 1) * keys;
                softmax_of_visible(&mut scores[of_query.clone()], &plan.visible, query);
                weights[of_query.clone()].copy_from_slice(&scores[of_query]);
            }
            weights
        })
        .collect();
    Tensor::<1>::from_floats(all.as_slice(), &device).reshape([heads, queries, keys])
}

/// One row of the first row of the batch, in place.
fn softmax_of_visible(row: &mut [f32], visible: &Visible, query: usize) {
    let range = visible.range(0, query);
    row[..range.start].fill(0.0);
    row[range.end..].fill(0.0);
    let seen = &mut row[range.clone()];
    visible.hide_inside(0, query, range.clone(), seen, f32::NEG_INFINITY);
    let largest = simd::max(seen);
    let total = simd::exp_shifted(seen, largest);
    visible.hide_inside(0, query, range, seen, 0.0);
    simd::scale(seen, 1.0 / total);
}

impl TiledAttention for Flex {
    fn tiled_attention(q: FlexTensor, k: FlexTensor, v: FlexTensor, plan: Arc<Plan>) -> (FlexTensor, FlexTensor) {
        let (q, k, v) = (row_major(q), row_major(k), row_major(v));
        forward(View::new(&q), View::new(&k), View::new(&v), &plan)
    }
}

impl<C: CheckpointStrategy> TiledAttention for Autodiff<Flex, C> {
    fn tiled_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        plan: Arc<Plan>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        #[derive(Debug)]
        struct Step;
        impl Backward<Flex, 3> for Step {
            type State = ([FlexTensor; 5], Arc<Plan>);

            fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
                let output_grad = row_major(grads.consume::<Flex>(&ops.node));
                let ([q, k, v, output, facts], plan) = ops.state;
                let views = [&q, &k, &v, &output, &output_grad].map(View::new);
                let input_grads = backward(views, cpu::values(&facts), &plan);
                for (parent, grad) in ops.parents.into_iter().zip(input_grads) {
                    if let Some(node) = parent {
                        grads.register::<Flex>(node.id, grad);
                    }
                }
            }
        }
        let ((q, q_node), (k, k_node), (v, v_node)) = (q.into_parts(), k.into_parts(), v.into_parts());
        let (q, k, v) = (row_major(q), row_major(k), row_major(v));
        let (output, facts) = forward(View::new(&q), View::new(&k), View::new(&v), &plan);
        let seen = <Self as AutodiffBackend>::from_inner(facts.clone());
        let output = match Step.prepare::<C>([q_node, k_node, v_node]).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish(([q, k, v, output.clone(), facts], plan), output),
            OpsKind::UnTracked(step) => step.finish(output),
        };
        (output, seen)
    }
}

/// The keys that any of these queries may see.
fn reach(visible: &Visible, batch: usize, rows: Rows<'_>) -> Range<usize> {
    let (mut from, mut to) = (usize::MAX, 0);
    for range in rows.queries().map(|query| visible.range(batch, query)).filter(|range| !range.is_empty()) {
        (from, to) = (from.min(range.start), to.max(range.end));
    }
    from.min(to)..to
}

/// The part of `range` inside the block `keys`, counted from the block's first key.
fn inside(range: Range<usize>, keys: &Range<usize>) -> Range<usize> {
    let from = range.start.clamp(keys.start, keys.end);
    let to = range.end.clamp(from, keys.end);
    from - keys.start..to - keys.start
}

fn forward(q: View<'_>, k: View<'_>, v: View<'_>, plan: &Plan) -> (FlexTensor, FlexTensor) {
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

/// Gradients of q, k and v.
fn backward([q, k, v, output, output_grad]: [View<'_>; 5], facts: &[f32], plan: &Plan) -> [FlexTensor; 3] {
    let [batch, heads, queries, width] = q.shape;
    let [_, key_heads, keys, _] = k.shape;
    let [_, value_heads, _, value_width] = v.shape;
    let n_families = plan.families.len();
    let chunks = TASKS.div_ceil(batch * n_families).min(keys.div_ceil(CHUNK)).max(1);
    let chunk = keys.div_ceil(chunks);
    let mut q_grad = room(chunks * batch * queries * heads * width);
    let mut k_grad = room(batch * keys * key_heads * width);
    let mut v_grad = room(batch * keys * value_heads * value_width);
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
