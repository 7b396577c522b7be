//! The losses of rows of logits, for [`crate::cross_entropy()`]: a cube reads its row twice and writes the gradient over it, where
//! tensor operations read and write it a dozen times.

// A kernel is told everything one by one.
#![allow(clippy::too_many_arguments)]

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::launch::{Lanes, UNITS, addresses, cubes, element, element_of, empty, reduce_row, vector};

/// Losses and hits, `[rows, 1]`, and the gradient of the logits of every row for a gradient of 1 if it is wanted, in the type
/// of the logits.
///
/// # Shapes
/// - logits: `[rows, vocab]`; ids, counted: `[rows, 1]`
pub(crate) fn row_losses(
    logits: CubeTensor,
    ids: CubeTensor,
    counted: CubeTensor,
    with_grads: bool,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let [logits, ids, counted] = [logits, ids, counted].map(into_contiguous);
    // The gradient takes the place of the logits.
    let logits = if with_grads && !logits.can_mut() { logits.copy() } else { logits };
    let [rows, vocab] = logits.shape().dims::<2>();
    let [losses, correct] = [(); 2].map(|()| empty(&logits, [rows, 1], DType::F32));
    if rows * vocab > 0 {
        let client = logits.client.clone();
        let lanes = Lanes::of(&client, UNITS as usize);
        let types = [element(&logits), element_of(ids.dtype)];
        // Safe: a cube reads and writes the vectors of its row, and ids are below `vocab`.
        unsafe {
            lose::launch_unchecked(
                &client,
                cubes(&client, rows),
                CubeDim::new_1d(UNITS),
                addresses(&[&logits]),
                vector(vocab),
                logits.clone().into_buffer_arg(),
                ids.into_buffer_arg(),
                counted.into_buffer_arg(),
                losses.clone().into_buffer_arg(),
                correct.clone().into_buffer_arg(),
                rows,
                vocab / vector(vocab),
                lanes.plane,
                with_grads,
                types,
            );
        }
    }
    (losses, correct, logits)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn lose<F: Float, I: Int, N: Size>(
    logits: &mut [Vector<F, N>],
    ids: &[I],
    counted: &[f32],
    losses: &mut [f32],
    correct: &mut [f32],
    rows: usize,
    vectors: usize,
    #[comptime] plane: u32,
    #[comptime] with_grads: bool,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    let mut shared = Shared::<[f32]>::new_slice(UNITS as usize);
    let row = CUBE_POS;
    if row < rows {
        let lane = UNIT_POS as usize;
        let wide = N::value();
        let start = row * vectors;
        let id = usize::cast_from(ids[row]);
        let of_id = logits[start + id / wide];
        let mut target = 0.0f32;
        #[unroll]
        for j in 0..N::value() {
            if id % wide == j {
                target = f32::cast_from(of_id.extract(j));
            }
        }

        // The largest logit and the sum of exponentials so far; logits that come before the target's.
        let (mut largest, mut sum, mut before) = (f32::new(-1e30), 0.0f32, 0.0f32);
        let mut at = lane;
        while at < vectors {
            let four = Vector::<f32, N>::cast_from(logits[start + at]);
            let mut top = largest;
            #[unroll]
            for j in 0..N::value() {
                top = f32::max(top, four.extract(j));
            }
            sum *= (largest - top).exp();
            #[unroll]
            for j in 0..N::value() {
                let logit = four.extract(j);
                sum += (logit - top).exp();
                if logit > target || (logit == target && at * wide + j < id) {
                    before += 1.0f32;
                }
            }
            largest = top;
            at += comptime!(UNITS as usize);
        }
        let top = reduce_row(largest, &mut shared, UNITS, plane, true);
        sync_cube();
        let total = reduce_row(sum * (largest - top).exp(), &mut shared, UNITS, plane, false);
        sync_cube();
        before = reduce_row(before, &mut shared, UNITS, plane, false);
        let count = counted[row];
        if lane == 0 {
            losses[row] = (total.ln() - (target - top)) * count;
            correct[row] = select(before == 0.0f32, count, 0.0f32);
        }
        if comptime!(with_grads) {
            let share = count / total;
            let mut at = lane;
            while at < vectors {
                let mut four = Vector::<f32, N>::cast_from(logits[start + at]);
                #[unroll]
                for j in 0..N::value() {
                    let weight = (four.extract(j) - top).exp() * share;
                    four.insert(j, select(at * wide + j == id, weight - count, weight));
                }
                logits[start + at] = Vector::cast_from(four);
                at += comptime!(UNITS as usize);
            }
        }
    }
}
