//! The backward (algorithm 2): tiles are computed again from the kept sums. A task takes all query heads that share key or
//! value heads, so that nobody else adds to the same gradients; where there are too few such families to use all cores,
//! each is cut into chunks of keys, whose parts of the query gradients are added up in order.

use std::mem::MaybeUninit;
use std::ops::Range;

use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{KEYS, Plan, QUERIES, inside, soften};
use crate::cpu::{self, View};
use crate::differentiable::Wanted;
use crate::matrix::{Matrix, MatrixMut};
use crate::product::product;
use crate::scratch::{ScratchBuffer, Shared, write_zeros};
use crate::selected_rows::Rows;
use crate::simd;

/// Tasks that the work is cut into at least, where sequences are long enough: more than any usual number of cores.
const TASKS: usize = 16;
/// Keys of a chunk at least.
const CHUNK: usize = 256;

/// Gradients of q, k, v, the sinks and the bias, as far as they are wanted. A sink is in the kept sums and has no value: the
/// other gradients need nothing more.
pub(super) fn backward(
    [q, k, v, output, output_grad]: [View<'_>; 5],
    sinks: Option<&[f32]>,
    bias: Option<View<'_>>,
    facts: &[f32],
    plan: &Plan,
    [of_q, of_k, of_v, of_sinks, of_bias]: Wanted<5>,
) -> [Option<FlexTensor>; 5] {
    let [batch, heads, queries, width] = q.shape;
    let keys = k.shape[2];
    let n_families = plan.families.len();
    let chunks = TASKS.div_ceil(batch * n_families).min(keys.div_ceil(CHUNK)).max(1);
    let chunk = keys.div_ceil(chunks);
    let size = batch * queries * heads * width;
    let mut q_grad = of_q.then(|| ScratchBuffer::new(chunks * size));
    let mut k_grad = of_k.then(|| buffer_of_heads(k.shape, &plan.key_of));
    let mut v_grad = of_v.then(|| buffer_of_heads(v.shape, &plan.value_of));
    let mut bias_grad = bias.filter(|_| of_bias).map(|bias| ScratchBuffer::new(batch * heads * bias.shape[2] * keys));
    let deltas =
        if of_q || of_k || of_sinks || bias_grad.is_some() { deltas(output, output_grad, plan) } else { Vec::new() };
    let call = Call {
        views: [q, k, v, output_grad],
        bias,
        facts,
        deltas: &deltas,
        plan,
        q_grad: q_grad.as_mut().map(|buffer| Shared::new(buffer.unwritten())),
        k_grad: k_grad.as_mut().map(|buffer| Shared::new(buffer.unwritten())),
        v_grad: v_grad.as_mut().map(|buffer| Shared::new(buffer.unwritten())),
        bias_grad: bias_grad.as_mut().map(|buffer| Shared::new(buffer.unwritten())),
    };
    (0..batch * n_families * chunks).into_par_iter().for_each_init(
        || Workspace::new([width, v.shape[3]]),
        |workspace, task| {
            let (b, rest) = (task / (n_families * chunks), task % (n_families * chunks));
            let part = Part {
                b,
                family: &plan.families[rest / chunks],
                keys: (rest % chunks * chunk).min(keys)..((rest % chunks + 1) * chunk).min(keys),
                q_grad_at: rest % chunks * size,
            };
            call.run(&part, workspace);
        },
    );
    // SAFETY: every query head is in one family, and every key and value head that is read too (the others are full of
    // zeros); the chunks cover all keys, each with queries of its own. `Call::run` begins by writing zeros to all of them.
    let [q_grad, k_grad, v_grad, bias_grad] =
        [q_grad, k_grad, v_grad, bias_grad].map(|grad| grad.map(|buffer| unsafe { buffer.into_values() }));
    let q_grad = q_grad.map(|mut q_grad| {
        let (sum, others) = q_grad.split_at_mut(size);
        for other in others.chunks(size.max(1)) {
            sum.par_chunks_mut(1 << 15).zip(other.par_chunks(1 << 15)).for_each(|(sum, other)| simd::add(sum, other));
        }
        q_grad.truncate(size);
        q_grad
    });
    let tensor = |grad: Option<Vec<f32>>, shape| grad.map(|values| cpu::tensor_by_position(values, shape));
    let sink_grads = sinks.filter(|_| of_sinks).map(|sinks| {
        let grads = sink_grads(sinks, facts, &deltas, plan, [batch, queries]);
        cpu::tensor(grads, [heads])
    });
    let bias_grad = bias.zip(bias_grad).map(|(bias, grad)| summed(&grad, [batch, heads], bias.shape));
    [tensor(q_grad, q.shape), tensor(k_grad, k.shape), tensor(v_grad, v.shape), sink_grads, bias_grad]
}

/// What every row of the batch and head gives to a bias, added up where the bias is shared.
fn summed(grads: &[f32], [batch, heads]: [usize; 2], shape: [usize; 4]) -> FlexTensor {
    let size = shape[2] * shape[3];
    let mut sum = vec![0.0; shape.iter().product()];
    for (at, grad) in grads.chunks(size.max(1)).enumerate().take(batch * heads) {
        let (b, h) = (at / heads % shape[0], at % heads % shape[1]);
        simd::add(&mut sum[(b * shape[1] + h) * size..][..size], grad);
    }
    cpu::tensor(sum, shape)
}

/// `[heads]`: minus the sink's weight times the product of each output with its gradient, summed over queries.
fn sink_grads(sinks: &[f32], facts: &[f32], deltas: &[f32], plan: &Plan, [batch, queries]: [usize; 2]) -> Vec<f32> {
    let of_head = |(h, &sink): (usize, &f32)| {
        let of_query = |b: usize, query: usize| {
            let at = (b * sinks.len() + h) * queries + query;
            f64::from(simd::exp(sink - facts[at]) * deltas[at])
        };
        let of_row = |b| plan.blocks(b, h).into_iter().flat_map(Rows::queries).map(move |query| of_query(b, query));
        -(0..batch).flat_map(of_row).sum::<f64>() as f32
    };
    sinks.par_iter().enumerate().map(of_head).collect()
}

/// For the gradients of key or value heads: those that no query head reads get nothing written to them.
fn buffer_of_heads([batch, heads, keys, width]: [usize; 4], read: &[usize]) -> ScratchBuffer {
    let mut buffer = ScratchBuffer::new(batch * heads * keys * width);
    if !(0..heads).all(|head| read.contains(&head)) {
        write_zeros(buffer.unwritten());
    }
    buffer
}

/// `[batch, heads, queries]`: the product of each output with its gradient, which the softmax's backward subtracts.
fn deltas(output: View<'_>, output_grad: View<'_>, plan: &Plan) -> Vec<f32> {
    let [batch, heads, queries, _] = output.shape;
    let mut deltas = vec![0.0; batch * heads * queries];
    deltas.par_chunks_mut(queries.max(1)).enumerate().for_each(|(task, deltas)| {
        let (b, h) = (task / heads, task % heads);
        for query in plan.blocks(b, h).into_iter().flat_map(Rows::queries) {
            deltas[query] = simd::dot(output.row(b, h, query), output_grad.row(b, h, query));
        }
    });
    deltas
}

/// Scratch buffers of a backward task.
struct Workspace {
    weights: ScratchBuffer,
    score_grads: ScratchBuffer,
    // Copies of rows that are no neighbours.
    q: ScratchBuffer,
    output_grad: ScratchBuffer,
    q_grad: ScratchBuffer,
}

impl Workspace {
    fn new([width, value_width]: [usize; 2]) -> Self {
        Self {
            weights: ScratchBuffer::new(QUERIES * KEYS),
            score_grads: ScratchBuffer::new(QUERIES * KEYS),
            q: ScratchBuffer::new(QUERIES * width),
            output_grad: ScratchBuffer::new(QUERIES * value_width),
            q_grad: ScratchBuffer::new(QUERIES * width),
        }
    }
}

/// The work of one task of the backward.
struct Part<'a> {
    b: usize,
    family: &'a [usize],
    /// The chunk of keys.
    keys: Range<usize>,
    /// Start of this chunk's part of the query gradients.
    q_grad_at: usize,
}

/// The gradients that a task writes, full of zeros at first: by head, those of its queries, keys and values.
struct Grads<'a> {
    q: Vec<MatrixMut<'a, f32>>,
    bias: Vec<MatrixMut<'a, f32>>,
    k: ByHead<'a>,
    v: ByHead<'a>,
}

/// Heads that are read, each once, with their gradients.
type ByHead<'a> = Vec<(usize, MatrixMut<'a, f32>)>;

/// The gradient of a head; `None` where nobody wants any.
fn of_head<'g, 'a>(grads: &'g mut ByHead<'a>, head: usize) -> Option<&'g mut MatrixMut<'a, f32>> {
    grads.iter_mut().find(|(of, _)| *of == head).map(|(_, grad)| grad)
}

/// The state shared by all tasks; rows of gradients are in the order of `cpu::tensor_by_position`.
struct Call<'a> {
    /// q, k, v and the gradient of the output.
    views: [View<'a>; 4],
    bias: Option<View<'a>>,
    facts: &'a [f32],
    deltas: &'a [f32],
    plan: &'a Plan,
    q_grad: Option<Shared<'a, MaybeUninit<f32>>>,
    k_grad: Option<Shared<'a, MaybeUninit<f32>>>,
    v_grad: Option<Shared<'a, MaybeUninit<f32>>>,
    /// `[batch, heads, rows of the bias, keys]`
    bias_grad: Option<Shared<'a, MaybeUninit<f32>>>,
}

impl<'a> Call<'a> {
    fn grads(&self, part: &Part<'_>) -> Grads<'a> {
        let [q, k, v, _] = self.views;
        let [_, heads, queries, width] = q.shape;
        let of_query_head = |grad: &Shared<'a, MaybeUninit<f32>>, h: usize| {
            let at = part.q_grad_at + (part.b * queries * heads + h) * width;
            // SAFETY: a query head is in one family, a family is one task in each row of the batch and chunk of keys, and
            // each chunk has a part of its own: nobody else has these rows.
            unsafe { MatrixMut::of_shared(grad, at, [queries, width], heads * width) }.zeroed()
        };
        let of_heads = |grad: Option<&Shared<'a, MaybeUninit<f32>>>, view: View<'_>, read: &[usize]| -> ByHead<'a> {
            let [_, heads, keys, width] = view.shape;
            let mut here: Vec<usize> = part.family.iter().map(|&h| read[h]).collect();
            here.sort_unstable();
            here.dedup();
            let zeroed = |grad: &Shared<'a, MaybeUninit<f32>>, head: usize| {
                let at = ((part.b * keys + part.keys.start) * heads + head) * width;
                // SAFETY: all query heads that read this head are in this family, which is one task in each row of the
                // batch and chunk of keys: nobody else has these rows, and here each head comes once.
                unsafe { MatrixMut::of_shared(grad, at, [part.keys.len(), width], heads * width) }.zeroed()
            };
            grad.map(|grad| here.iter().map(|&head| (head, zeroed(grad, head))).collect()).unwrap_or_default()
        };
        let of_bias = |grad: &Shared<'a, MaybeUninit<f32>>, h: usize| {
            let (keys, rows) = (k.shape[2], self.bias.map_or(0, |bias| bias.shape[2]));
            let at = (part.b * heads + h) * rows * keys + part.keys.start;
            // SAFETY: as for queries, and each chunk has its own keys: nobody else has these columns of the head.
            unsafe { MatrixMut::of_shared(grad, at, [rows, part.keys.len()], keys) }.zeroed()
        };
        let of_queries = self.q_grad.as_ref().map(|grad| part.family.iter().map(|&h| of_query_head(grad, h)).collect());
        Grads {
            q: of_queries.unwrap_or_default(),
            bias: self.bias_grad.iter().flat_map(|grad| part.family.iter().map(|&h| of_bias(grad, h))).collect(),
            k: of_heads(self.k_grad.as_ref(), k, &self.plan.key_of),
            v: of_heads(self.v_grad.as_ref(), v, &self.plan.value_of),
        }
    }

    fn run(&self, part: &Part<'_>, workspace: &mut Workspace) {
        let mut grads = self.grads(part);
        for from in part.keys.clone().step_by(KEYS) {
            let block = from..(from + KEYS).min(part.keys.end);
            for (index, &h) in part.family.iter().enumerate() {
                for rows in self.plan.blocks(part.b, h) {
                    for keys in self.plan.spans([part.b, h], rows, block.clone()) {
                        let tile = Tile { b: part.b, h, rows, keys, chunk_from: part.keys.start };
                        self.tile(tile, workspace, &mut grads, index);
                    }
                }
            }
        }
    }

    /// Adds what one tile of the family's head `index` gives to the gradients that there are.
    fn tile(
        &self,
        Tile { b, h, rows, keys, chunk_from }: Tile<'_>,
        workspace: &mut Workspace,
        grads: &mut Grads<'_>,
        index: usize,
    ) {
        let (plan, [q, k, v, output_grad]) = (self.plan, self.views);
        let [_, heads, queries, _] = q.shape;
        let (key_head, value_head) = (plan.key_of[h], plan.value_of[h]);
        let (q_grad, mut bias_grad) = (grads.q.get_mut(index), grads.bias.get_mut(index));
        let (k_grad, v_grad) = (of_head(&mut grads.k, key_head), of_head(&mut grads.v, value_head));
        let of_scores = q_grad.is_some() || k_grad.is_some() || bias_grad.is_some();
        let q_rows = rows.matrix(q, [b, h], workspace.q.unwritten());
        let k_rows = k.rows(b, key_head, keys.clone());
        let grad_rows = rows.matrix(output_grad, [b, h], workspace.output_grad.unwritten());
        let (m, n) = (rows.len(), keys.len());
        let weights = product(q_rows, k_rows.transposed()).scaled(plan.scale).write_into(workspace.weights.unwritten());
        let score_grads: &mut [f32] = if of_scores {
            let v_rows = v.rows(b, value_head, keys.clone());
            product(grad_rows, v_rows.transposed()).write_into(workspace.score_grads.unwritten())
        } else {
            &mut []
        };
        let mut slopes = plan.softcap.map(|_| vec![0.0; n]).unwrap_or_default();
        for (r, query) in rows.queries().enumerate() {
            let seen = inside(plan.visible.range(b, query), &keys);
            let (row, fact) = (r * n..(r + 1) * n, (b * heads + h) * queries + query);
            let hide = |row: &mut [f32]| {
                row[..seen.start].fill(0.0);
                row[seen.end..].fill(0.0);
            };
            let weights = &mut weights[row.clone()];
            hide(weights);
            let weights = &mut weights[seen.clone()];
            if let Some(cap) = plan.softcap {
                soften(weights, cap);
                let slope = |score: &f32| 1.0 - (score / cap) * (score / cap);
                slopes.iter_mut().zip(&*weights).for_each(|(to, score)| *to = slope(score));
            }
            let seen_keys = keys.start + seen.start..keys.start + seen.end;
            if let Some(bias) = self.bias {
                simd::add(weights, &bias.spread_row([b, h, query])[seen_keys.clone()]);
            }
            simd::exp_only(weights, self.facts[fact]);
            plan.visible.hide_inside([b, h], query, seen_keys, weights, 0.0);
            if of_scores {
                let score_grads = &mut score_grads[row];
                hide(score_grads);
                let score_grads = &mut score_grads[seen.clone()];
                // A bias is added to scores that are scaled and capped.
                let factor = if bias_grad.is_some() { 1.0 } else { plan.scale };
                simd::softmax_backward(score_grads, weights, self.deltas[fact], factor);
                if let (Some(grad), Some(bias)) = (&mut bias_grad, self.bias) {
                    let row = grad.row(if bias.shape[2] == 1 { 0 } else { query });
                    let here = keys.start - chunk_from..keys.end - chunk_from;
                    simd::add(&mut row[here][seen.clone()], score_grads);
                    simd::scale(score_grads, plan.scale);
                }
                if plan.softcap.is_some() {
                    score_grads.iter_mut().zip(&slopes).for_each(|(grad, slope)| *grad *= slope);
                }
            }
        }
        let here = keys.start - chunk_from..keys.end - chunk_from;
        if of_scores {
            let score_grads = Matrix::by_rows(score_grads, [m, n]);
            if let Some(q_grad) = q_grad {
                add_rows(q_grad, rows, product(score_grads, k_rows), workspace.q_grad.unwritten());
            }
            if let Some(k_grad) = k_grad {
                product(score_grads.transposed(), q_rows).add_to(&mut k_grad.rows(here.clone()));
            }
        }
        if let Some(v_grad) = v_grad {
            let weights = Matrix::by_rows(weights, [m, n]);
            product(weights.transposed(), grad_rows).add_to(&mut v_grad.rows(here));
        }
    }
}

/// Some queries of a head against some keys.
struct Tile<'a> {
    b: usize,
    h: usize,
    rows: Rows<'a>,
    keys: Range<usize>,
    /// The first key of the task's chunk.
    chunk_from: usize,
}

/// Adds a product to rows of a head's gradient; those that are no neighbours through `buffer`.
fn add_rows(
    grad: &mut MatrixMut<'_, f32>,
    rows: Rows<'_>,
    product: crate::product::Product<'_>,
    buffer: &mut [MaybeUninit<f32>],
) {
    match rows {
        Rows::Span { from, len } => product.add_to(&mut grad.rows(from..from + len)),
        Rows::Listed { .. } => {
            let products = product.write_into(buffer);
            let width = products.len() / rows.len().max(1);
            for (query, row) in rows.queries().zip(products.chunks_exact(width.max(1))) {
                simd::add(grad.row(query), row);
            }
        }
    }
}
