//! The kernels of attention: forward; gradients of q; gradients of k and v.

// A kernel is told everything one by one.
#![allow(clippy::too_many_arguments)]

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::tiles::{
    Four, GROUPS, PART, ROWS, SCORES, TILE, TILE_PLACE, WHOLE, add_tile_product, no_sums, place, row_products, rows_of,
    rows_of_output, write_sums, write_tile,
};

use crate::gpu::launch::{UNITS, reduce_row};

/// Score of a row that has seen no key yet.
const NOTHING: f32 = -1e30;
/// The least sum of exponentials.
const TINY: f32 = f32::MIN_POSITIVE;

/// What is known of a call when its kernels are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Form {
    /// Vectors of a unit's columns: of queries and keys, and of values.
    pub width: usize,
    pub value_width: usize,
    /// Whether scores are capped.
    pub capped: bool,
    /// Whether heads have sinks.
    pub sunk: bool,
}

/// The scaled score of a product, with its cap.
#[cube]
fn score(product: f32, scale: f32, cap: f32, #[comptime] form: Form) -> f32 {
    if comptime!(form.capped) { cap * (product * scale / cap).tanh() } else { product * scale }
}

/// Where the plan (`super::plan`) of a row of the batch starts.
#[cube]
fn plan_of(batch: usize, heads: usize, plan_row: usize) -> usize {
    2 * heads + batch * plan_row
}

/// Output and log of the sum of exponentials of a tile of queries of a head. The cubes with the last queries start first: under a
/// causal mask they have most to do.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn attend<F: Float>(
    q: &Tensor<Four<F>>,
    k: &Tensor<Four<F>>,
    v: &Tensor<Four<F>>,
    sinks: &[f32],
    plan: &[i32],
    out: &mut Tensor<Four<F>>,
    log_sums: &mut [f32],
    scale: f32,
    cap: f32,
    plan_row: usize,
    #[comptime] form: Form,
    #[define(F)] _dtype: ElemType,
) {
    let mut tile = Shared::<[Four<f32>]>::new_slice(WHOLE);
    let mut part = Shared::<[Four<f32>]>::new_slice(PART);
    let mut halves = Shared::<[f32]>::new_slice(2 * TILE);
    let mut factors = Shared::<[f32]>::new_slice(TILE);

    let (head, batch) = (CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let (heads, queries) = (q.shape(1), q.shape(2));
    let tiles = queries.div_ceil(TILE);
    let own_tile = tiles - 1 - CUBE_POS_X as usize;
    let first_query = own_tile * TILE;
    let own_plan = plan_of(batch, heads, plan_row);
    let (key_head, value_head) = (plan[2 * head] as usize, plan[2 * head + 1] as usize);
    let (span_start, span_end) = (plan[own_plan + 2 * own_tile] as usize, plan[own_plan + 2 * own_tile + 1] as usize);

    // Two units have a row of scores, a half each.
    let unit = UNIT_POS as usize;
    let (row, half) = (unit % TILE, unit / TILE);
    let mut seen_from = 0usize;
    let mut seen_to = 0usize;
    if first_query + row < queries {
        let at = own_plan + 2 * (tiles + first_query + row);
        seen_from = plan[at] as usize;
        seen_to = plan[at + 1] as usize;
    }
    let mut largest = f32::new(NOTHING);
    let mut sum = 0.0f32;
    if comptime!(form.sunk) {
        largest = sinks[head];
        if half == 0 {
            sum = 1.0f32;
        }
    }

    let q_rows = rows_of(q, batch, head, first_query);
    let mut products = Array::<f32>::new(SCORES);
    let mut sums = no_sums(form.value_width);
    let (down, _) = place();
    let mut first = span_start;
    while first < span_end {
        let k_rows = rows_of(k, batch, key_head, first);
        row_products(&mut products, q, q_rows, k, k_rows, &mut tile, &mut part);
        sync_cube();
        write_tile(&products, &mut tile);
        sync_cube();

        let own = row * TILE_PLACE + half * (TILE / 8);
        let first_key = first + half * (TILE / 2);
        let mut top = largest;
        for at in 0..TILE / 8 {
            let mut scores = tile[own + at];
            #[unroll]
            for j in 0..4usize {
                let key = first_key + at * 4 + j;
                let value = score(scores.extract(j), scale, cap, form);
                scores.insert(j, value);
                if key >= seen_from && key < seen_to {
                    top = f32::max(top, value);
                }
            }
            tile[own + at] = scores;
        }
        halves[unit] = top;
        sync_cube();
        top = f32::max(halves[row], halves[row + TILE]);
        let factor = (largest - top).exp();
        let mut total = 0.0f32;
        for at in 0..TILE / 8 {
            let mut weights = tile[own + at];
            #[unroll]
            for j in 0..4usize {
                let key = first_key + at * 4 + j;
                let mut weight = 0.0f32;
                if key >= seen_from && key < seen_to {
                    weight = (weights.extract(j) - top).exp();
                }
                total += weight;
                weights.insert(j, weight);
            }
            tile[own + at] = weights;
        }
        sum = sum * factor + total;
        largest = top;
        if half == 0 {
            factors[row] = factor;
        }
        sync_cube();
        scale_rows(&mut sums, &factors, down, form.value_width);
        add_tile_product(&mut sums, &tile, v, rows_of(v, batch, value_head, first), &mut part, form.value_width);
        first += TILE;
    }

    sync_cube();
    halves[unit] = sum;
    sync_cube();
    if half == 0 {
        let total = f32::max(halves[row] + halves[row + TILE], TINY);
        factors[row] = 1.0f32 / total;
        if first_query + row < queries {
            log_sums[(batch * heads + head) * queries + first_query + row] = largest + total.ln();
        }
    }
    sync_cube();
    scale_rows(&mut sums, &factors, down, form.value_width);
    let out_rows = rows_of_output(out, batch, head, first_query);
    write_sums(&sums, out, out_rows, form.value_width);
}

/// The unit's rows times their factors.
#[cube]
fn scale_rows(sums: &mut Array<Four<f32>>, factors: &Shared<[f32]>, down: usize, #[comptime] columns: usize) {
    #[unroll]
    for r in 0..ROWS {
        let factor = Four::<f32>::new(factors[down + TILE / ROWS * r]);
        #[unroll]
        for c in 0..columns {
            let index = comptime!(r * columns + c);
            sums[index] *= factor;
        }
    }
}

/// The mean gradients of every row's weights, which are the products of the rows of output and its gradient; `lanes` units have a row.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn multiply_rows<F: Float>(
    out: &Tensor<Four<F>>,
    out_grad: &Tensor<Four<F>>,
    means: &mut [f32],
    rows: usize,
    #[comptime] lanes: u32,
    #[comptime] plane: u32,
    #[define(F)] _dtype: ElemType,
) {
    let mut shared = Shared::<[f32]>::new_slice(UNITS as usize);
    let row = CUBE_POS * comptime!((UNITS / lanes) as usize) + (UNIT_POS / lanes) as usize;
    let lane = (UNIT_POS % lanes) as usize;
    let mut products = Four::<f32>::new(0.0f32);
    if row < rows {
        let (heads, queries) = (out.shape(1), out.shape(2));
        let (query, head) = (row % queries, row / queries % heads);
        let batch = row / queries / heads;
        let out_row = rows_of(out, batch, head, query);
        let grad_row = rows_of(out_grad, batch, head, query);
        let mut at = lane;
        while at < out_row.width {
            let value = Four::<f32>::cast_from(out[out_row.start + at]);
            products += value * Four::<f32>::cast_from(out_grad[grad_row.start + at]);
            at += comptime!(lanes as usize);
        }
    }
    let sum = reduce_row(products.vector_sum(), &mut shared, lanes, plane, false);
    if row < rows && lane == 0 {
        means[row] = sum;
    }
}

/// The weight of a visible key, and the gradient of its product from that of its weight.
#[cube]
fn weight_and_grad(
    product: f32,
    weight_grad: f32,
    log_sum: f32,
    mean: f32,
    scale: f32,
    cap: f32,
    #[comptime] form: Form,
) -> (f32, f32) {
    let score = score(product, scale, cap, form);
    let weight = (score - log_sum).exp();
    let mut grad = weight * (weight_grad - mean) * scale;
    if comptime!(form.capped) {
        let relative = score / cap;
        grad *= 1.0f32 - relative * relative;
    }
    (weight, grad)
}

/// Gradients of a tile of queries of a head. `rows` are the logs of the sums and the mean gradients of the weights.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn back_to_queries<F: Float>(
    q: &Tensor<Four<F>>,
    k: &Tensor<Four<F>>,
    v: &Tensor<Four<F>>,
    out_grad: &Tensor<Four<F>>,
    log_sums: &[f32],
    means: &[f32],
    plan: &[i32],
    q_grad: &mut Tensor<Four<F>>,
    scale: f32,
    cap: f32,
    plan_row: usize,
    #[comptime] form: Form,
    #[define(F)] _dtype: ElemType,
) {
    let mut tile = Shared::<[Four<f32>]>::new_slice(WHOLE);
    let mut part = Shared::<[Four<f32>]>::new_slice(PART);

    let (head, batch) = (CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let (heads, queries) = (q.shape(1), q.shape(2));
    let tiles = queries.div_ceil(TILE);
    let own_tile = tiles - 1 - CUBE_POS_X as usize;
    let first_query = own_tile * TILE;
    let own_plan = plan_of(batch, heads, plan_row);
    let (key_head, value_head) = (plan[2 * head] as usize, plan[2 * head + 1] as usize);
    let (span_start, span_end) = (plan[own_plan + 2 * own_tile] as usize, plan[own_plan + 2 * own_tile + 1] as usize);

    let (down, across) = place();
    let mut row_log_sums = Array::<f32>::new(ROWS);
    let mut row_means = Array::<f32>::new(ROWS);
    let mut seen_from = Array::<usize>::new(ROWS);
    let mut seen_to = Array::<usize>::new(ROWS);
    #[unroll]
    for r in 0..ROWS {
        let query = first_query + down + TILE / ROWS * r;
        seen_from[r] = 0usize;
        seen_to[r] = 0usize;
        row_log_sums[r] = 0.0f32;
        row_means[r] = 0.0f32;
        if query < queries {
            let at = own_plan + 2 * (tiles + query);
            seen_from[r] = plan[at] as usize;
            seen_to[r] = plan[at + 1] as usize;
            let row = (batch * heads + head) * queries + query;
            row_log_sums[r] = log_sums[row];
            row_means[r] = means[row];
        }
    }

    let q_rows = rows_of(q, batch, head, first_query);
    let out_rows = rows_of(out_grad, batch, head, first_query);
    let mut products = Array::<f32>::new(SCORES);
    let mut grads = Array::<f32>::new(SCORES);
    let mut sums = no_sums(form.width);
    let mut first = span_start;
    while first < span_end {
        let k_rows = rows_of(k, batch, key_head, first);
        let v_rows = rows_of(v, batch, value_head, first);
        row_products(&mut products, q, q_rows, k, k_rows, &mut tile, &mut part);
        row_products(&mut grads, out_grad, out_rows, v, v_rows, &mut tile, &mut part);
        #[unroll]
        for r in 0..ROWS {
            #[unroll]
            for g in 0..GROUPS {
                #[unroll]
                for j in 0..4usize {
                    let index = comptime!((r * GROUPS + g) * 4 + j);
                    let key = first + 4 * across + comptime!(32 * g + j);
                    let mut grad = 0.0f32;
                    if key >= seen_from[r] && key < seen_to[r] {
                        let (_, of_product) = weight_and_grad(
                            products[index],
                            grads[index],
                            row_log_sums[r],
                            row_means[r],
                            scale,
                            cap,
                            form,
                        );
                        grad = of_product;
                    }
                    grads[index] = grad;
                }
            }
        }
        sync_cube();
        write_tile(&grads, &mut tile);
        add_tile_product(&mut sums, &tile, k, k_rows, &mut part, form.width);
        first += TILE;
    }
    let grad_rows = rows_of_output(q_grad, batch, head, first_query);
    write_sums(&sums, q_grad, grad_rows, form.width);
}

/// What comes back to a tile of keys and its values from one query head.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn back_to_keys<F: Float>(
    q: &Tensor<Four<F>>,
    k: &Tensor<Four<F>>,
    v: &Tensor<Four<F>>,
    out_grad: &Tensor<Four<F>>,
    log_sums: &[f32],
    means: &[f32],
    plan: &[i32],
    k_grad: &mut Tensor<Four<F>>,
    v_grad: &mut Tensor<Four<F>>,
    scale: f32,
    cap: f32,
    plan_row: usize,
    #[comptime] form: Form,
    #[define(F)] _dtype: ElemType,
) {
    let mut tile = Shared::<[Four<f32>]>::new_slice(WHOLE);
    let mut part = Shared::<[Four<f32>]>::new_slice(PART);
    let mut column_log_sums = Shared::<[f32]>::new_slice(TILE);
    let mut column_means = Shared::<[f32]>::new_slice(TILE);
    let mut seen_from = Shared::<[u32]>::new_slice(TILE);
    let mut seen_to = Shared::<[u32]>::new_slice(TILE);

    let (head, batch) = (CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let (heads, queries) = (q.shape(1), q.shape(2));
    let tiles = queries.div_ceil(TILE);
    let first_key = CUBE_POS_X as usize * TILE;
    let own_plan = plan_of(batch, heads, plan_row);
    let (key_head, value_head) = (plan[2 * head] as usize, plan[2 * head + 1] as usize);
    let k_rows = rows_of(k, batch, key_head, first_key);
    let v_rows = rows_of(v, batch, value_head, first_key);

    let unit = UNIT_POS as usize;
    let (down, across) = place();
    let mut products = Array::<f32>::new(SCORES);
    let mut grads = Array::<f32>::new(SCORES);
    let mut k_sums = no_sums(form.width);
    let mut v_sums = no_sums(form.value_width);
    for query_tile in 0..tiles {
        let (from, to) = (plan[own_plan + 2 * query_tile] as usize, plan[own_plan + 2 * query_tile + 1] as usize);
        if from < first_key + TILE && to > first_key {
            let first_query = query_tile * TILE;
            let q_rows = rows_of(q, batch, head, first_query);
            let out_rows = rows_of(out_grad, batch, head, first_query);
            // Who reads these of the last tile is done: its products ended in a wait.
            if unit < TILE {
                let query = first_query + unit;
                seen_from[unit] = 0u32;
                seen_to[unit] = 0u32;
                if query < queries {
                    let at = own_plan + 2 * (tiles + query);
                    seen_from[unit] = plan[at] as u32;
                    seen_to[unit] = plan[at + 1] as u32;
                    let row = (batch * heads + head) * queries + query;
                    column_log_sums[unit] = log_sums[row];
                    column_means[unit] = means[row];
                }
            }
            row_products(&mut products, k, k_rows, q, q_rows, &mut tile, &mut part);
            row_products(&mut grads, v, v_rows, out_grad, out_rows, &mut tile, &mut part);
            #[unroll]
            for g in 0..GROUPS {
                #[unroll]
                for j in 0..4usize {
                    let column = 4 * across + comptime!(32 * g + j);
                    let (from, to) = (seen_from[column] as usize, seen_to[column] as usize);
                    let (log_sum, mean) = (column_log_sums[column], column_means[column]);
                    #[unroll]
                    for r in 0..ROWS {
                        let index = comptime!((r * GROUPS + g) * 4 + j);
                        let key = first_key + down + comptime!(TILE / ROWS * r);
                        let mut weight = 0.0f32;
                        let mut grad = 0.0f32;
                        if key >= from && key < to {
                            let (of_key, of_product) =
                                weight_and_grad(products[index], grads[index], log_sum, mean, scale, cap, form);
                            weight = of_key;
                            grad = of_product;
                        }
                        products[index] = weight;
                        grads[index] = grad;
                    }
                }
            }
            sync_cube();
            write_tile(&products, &mut tile);
            add_tile_product(&mut v_sums, &tile, out_grad, out_rows, &mut part, form.value_width);
            sync_cube();
            write_tile(&grads, &mut tile);
            add_tile_product(&mut k_sums, &tile, q, q_rows, &mut part, form.width);
        }
    }
    let k_grad_rows = rows_of_output(k_grad, batch, head, first_key);
    write_sums(&k_sums, k_grad, k_grad_rows, form.width);
    let v_grad_rows = rows_of_output(v_grad, batch, head, first_key);
    write_sums(&v_sums, v_grad, v_grad_rows, form.value_width);
}
