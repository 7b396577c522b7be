//! One row times a matrix: what a decoder computes for every token that it generates. Nothing is used twice but the row, so
//! that the time is that of bringing the matrix from memory; the loop asks for what comes next while it adds.

use crate::simd::vectorized;

/// Rows of the matrix that are added at a time: the sums are read and written once for all of them.
const TOGETHER: usize = 4;
/// Columns whose sums stay in the first cache, and values between two requests: a cache line.
const BLOCK: usize = 1024;
const LINE: usize = 16;

/// `y += factor · x · w` for a matrix with a row of `y.len()` contiguous values every `stride` values.
///
/// # Panics
/// If they are not all there.
pub(crate) fn add_row_product(y: &mut [f32], x: &[f32], w: &[f32], stride: usize, factor: f32) {
    for (block, y) in y.chunks_mut(BLOCK).enumerate() {
        add_block(y, x, w.get(block * BLOCK..).unwrap_or_default(), stride, factor);
    }
}

vectorized! {
    fn add_block(y: &mut [f32], x: &[f32], w: &[f32], stride: usize, factor: f32) {
        let columns = y.len();
        let row = |k: usize| &w[k * stride..][..columns];
        let whole = x.len() / TOGETHER * TOGETHER;
        for k in (0..whole).step_by(TOGETHER) {
            let x: [f32; TOGETHER] = std::array::from_fn(|row| factor * x[k + row]);
            let w: [_; TOGETHER] = std::array::from_fn(|next| row(k + next).as_chunks::<LINE>());
            let (lines, rest) = y.as_chunks_mut::<LINE>();
            let sum = |of: [f32; TOGETHER]| (x[0] * of[0] + x[1] * of[1]) + (x[2] * of[2] + x[3] * of[3]);
            for (at, line) in lines.iter_mut().enumerate() {
                let w = w.map(|(lines, _)| &lines[at]);
                w.iter().for_each(|w| fetch(&w[..], TOGETHER * stride));
                for (column, y) in line.iter_mut().enumerate() {
                    *y += sum(w.map(|w| w[column]));
                }
            }
            for (column, y) in rest.iter_mut().enumerate() {
                *y += sum(w.map(|(_, rest)| rest[column]));
            }
        }
        for k in whole..x.len() {
            let x = factor * x[k];
            y.iter_mut().zip(row(k)).for_each(|(y, w)| *y += x * w);
        }
    }
}

/// Asks for the cache line of the value `ahead` of the first one, if the processor can be asked.
#[inline(always)]
fn fetch(values: &[f32], ahead: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which reads nothing and may be given for any address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(values.as_ptr().wrapping_add(ahead).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (values, ahead);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_row_is_added_as_the_definition_says() {
        for [rows, columns, gap] in [[1usize, 1, 0], [3, 16, 1], [4, 17, 0], [7, 1025, 3], [9, 40, 0], [0, 5, 0]] {
            let stride = columns + gap;
            let x: Vec<f32> = (0..rows).map(|i| i as f32 - 2.5).collect();
            let w: Vec<f32> = (0..(rows * stride).saturating_sub(gap)).map(|i| (i % 11) as f32 - 4.0).collect();
            let mut y: Vec<f32> = (0..columns).map(|column| column as f32).collect();
            add_row_product(&mut y, &x, &w, stride, 0.5);
            for (column, &y) in y.iter().enumerate() {
                let product: f32 = x.iter().enumerate().map(|(row, x)| x * w[row * stride + column]).sum();
                assert_eq!(y, column as f32 + 0.5 * product, "column {column} of {rows} x {columns}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "out of range")]
    fn rows_that_are_not_there_are_refused() {
        add_row_product(&mut [0.0; 4], &[1.0; 3], &[1.0; 11], 4, 1.0);
    }
}
