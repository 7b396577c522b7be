//! [`crate::SumsOfSquares`]: every cube adds up the squares of its share of a tensor, and the host the sums of the cubes.

use burn::backend::TensorMetadata;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::launch::{Lanes, UNITS, addresses, element, reduce_row, vector};

/// Vectors that a unit adds up at least, and cubes of a tensor at most: enough for any card, and few parts to read. Chosen by us.
const VECTORS: usize = 8;
const CUBES: usize = 1024;

/// Parts of the sum of a tensor of so many numbers.
pub(crate) fn parts_of(numbers: usize) -> usize {
    (numbers / vector(numbers)).div_ceil(UNITS as usize * VECTORS).min(CUBES)
}

/// Writes the parts of the sum of x into `parts`, from `start` on.
///
/// # Panics
/// If there is no room for them.
pub(crate) fn add_squares(x: CubeTensor, parts: CubeTensor, start: usize) -> CubeTensor {
    let numbers = x.shape().num_elements();
    let count = parts_of(numbers);
    assert!(start + count <= parts.shape().num_elements(), "{count} parts from {start} on, of {:?}", parts.shape());
    if count > 0 {
        let x = into_contiguous(x);
        // Safe: a unit reads vectors below `vectors`; a cube writes a part of its own.
        unsafe {
            add_share::launch_unchecked(
                &x.client,
                CubeCount::Static(count as u32, 1, 1),
                CubeDim::new_1d(UNITS),
                addresses(&[&x, &parts]),
                vector(numbers),
                x.clone().into_buffer_arg(),
                parts.clone().into_buffer_arg(),
                start,
                numbers / vector(numbers),
                Lanes::of(&x.client, UNITS as usize).plane,
                element(&x),
            );
        }
    }
    parts
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn add_share<F: Float, N: Size>(
    x: &[Vector<F, N>],
    parts: &mut [f32],
    start: usize,
    vectors: usize,
    #[comptime] plane: u32,
    #[define(F)] _dtype: ElemType,
) {
    let mut shared = Shared::<[f32]>::new_slice(UNITS as usize);
    let step = (CUBE_COUNT_X * UNITS) as usize;
    let mut squares = Vector::<f32, N>::new(0.0f32);
    let mut at = ABSOLUTE_POS;
    while at < vectors {
        let value = Vector::<f32, N>::cast_from(x[at]);
        squares += value * value;
        at += step;
    }
    let sum = reduce_row(squares.vector_sum(), &mut shared, UNITS, plane, false);
    if UNIT_POS == 0 {
        parts[start + CUBE_POS] = sum;
    }
}
