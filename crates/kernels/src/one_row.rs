//! One row times a matrix: what a decoder computes for every token that it generates. Nothing is used twice but the row, so
//! that the time is that of bringing the matrix from memory; the loop asks for what comes next while it adds.

use burn::tensor::bf16;

use crate::simd::vectorized;

/// Rows of the matrix that are added at a time: the sums are read and written once for all of them.
const TOGETHER: usize = 4;
/// Columns whose sums stay in the first cache.
const BLOCK: usize = 1024;
/// Values of a cache line.
const LINE: usize = 16;
/// Values of a dot product that are added apart from each other.
const APART: usize = 4 * LINE;

/// A number that stands for an f32.
pub(crate) trait Value: Copy {
    fn wide(self) -> f32;
}

impl Value for f32 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }
}

impl Value for bf16 {
    /// Its bits are the upper half.
    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// Values of a matrix that a row is multiplied by.
pub(crate) trait Row: Value {
    /// `y += factor · x · w`: columns whose sums stay in the first cache.
    fn add_block(y: &mut [f32], x: &[f32], w: &[Self], stride: usize, factor: f32);

    /// [`add_row_dots`]
    fn add_dots(y: &mut [f32], x: &[f32], w: &[Self], stride: usize, factor: f32);
}

impl Row for f32 {
    fn add_block(y: &mut [f32], x: &[f32], w: &[Self], stride: usize, factor: f32) {
        block_of_f32(y, x, w, stride, factor);
    }

    fn add_dots(y: &mut [f32], x: &[f32], w: &[Self], stride: usize, factor: f32) {
        dots_of_f32(y, x, w, stride, factor);
    }
}

impl Row for bf16 {
    fn add_block(y: &mut [f32], x: &[f32], w: &[Self], stride: usize, factor: f32) {
        block_of_bf16(y, x, w, stride, factor);
    }

    fn add_dots(y: &mut [f32], x: &[f32], w: &[Self], stride: usize, factor: f32) {
        dots_of_bf16(y, x, w, stride, factor);
    }
}

/// `y += factor · x · w` for a matrix with a row of `y.len()` contiguous values every `stride` values.
///
/// # Panics
/// If they are not all there.
pub(crate) fn add_row_product<T: Row>(y: &mut [f32], x: &[f32], w: &[T], stride: usize, factor: f32) {
    for (block, y) in y.chunks_mut(BLOCK).enumerate() {
        T::add_block(y, x, w.get(block * BLOCK..).unwrap_or_default(), stride, factor);
    }
}

/// `y += factor · x · wᵀ` for a matrix with a row of `x.len()` contiguous values every `stride` values: a dot product for
/// each value of y.
///
/// # Panics
/// If they are not all there.
pub(crate) fn add_row_dots<T: Row>(y: &mut [f32], x: &[f32], w: &[T], stride: usize, factor: f32) {
    T::add_dots(y, x, w, stride, factor);
}

vectorized! {
    fn block_of_f32(y: &mut [f32], x: &[f32], w: &[f32], stride: usize, factor: f32) {
        add_block(y, x, w, stride, factor);
    }

    fn block_of_bf16(y: &mut [f32], x: &[f32], w: &[bf16], stride: usize, factor: f32) {
        add_block(y, x, w, stride, factor);
    }

    fn dots_of_f32(y: &mut [f32], x: &[f32], w: &[f32], stride: usize, factor: f32) {
        add_dots(y, x, w, stride, factor);
    }

    fn dots_of_bf16(y: &mut [f32], x: &[f32], w: &[bf16], stride: usize, factor: f32) {
        add_dots(y, x, w, stride, factor);
    }
}

#[inline(always)]
fn add_dots<T: Value>(y: &mut [f32], x: &[f32], w: &[T], stride: usize, factor: f32) {
    let (chunks, rest) = x.as_chunks::<APART>();
    for (row, y) in y.iter_mut().enumerate() {
        let (row, row_rest) = w[row * stride..][..x.len()].as_chunks::<APART>();
        let mut sums = [0f32; APART];
        for (x, w) in chunks.iter().zip(row) {
            (0..APART).step_by(LINE).for_each(|line| fetch(w, TOGETHER * stride + line));
            for lane in 0..APART {
                sums[lane] += x[lane] * w[lane].wide();
            }
        }
        // By halves: the order is fixed, and no addition waits for all others.
        let sums: [f32; 32] = std::array::from_fn(|lane| sums[lane] + sums[lane + 32]);
        let sums: [f32; 16] = std::array::from_fn(|lane| sums[lane] + sums[lane + 16]);
        let sums: [f32; 8] = std::array::from_fn(|lane| sums[lane] + sums[lane + 8]);
        let sums: [f32; 4] = std::array::from_fn(|lane| sums[lane] + sums[lane + 4]);
        let rest: f32 = rest.iter().zip(row_rest).map(|(x, w)| x * w.wide()).sum();
        *y += factor * ((sums[0] + sums[2]) + (sums[1] + sums[3]) + rest);
    }
}

#[inline(always)]
fn add_block<T: Value>(y: &mut [f32], x: &[f32], w: &[T], stride: usize, factor: f32) {
    let columns = y.len();
    let row = |k: usize| &w[k * stride..][..columns];
    let whole = x.len() / TOGETHER * TOGETHER;
    for k in (0..whole).step_by(TOGETHER) {
        let x: [f32; TOGETHER] = std::array::from_fn(|row| factor * x[k + row]);
        let w: [_; TOGETHER] = std::array::from_fn(|next| row(k + next).as_chunks::<LINE>());
        let (lines, rest) = y.as_chunks_mut::<LINE>();
        let sum = |of: [T; TOGETHER]| {
            let of = of.map(T::wide);
            (x[0] * of[0] + x[1] * of[1]) + (x[2] * of[2] + x[3] * of[3])
        };
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
        y.iter_mut().zip(row(k)).for_each(|(y, w)| *y += x * w.wide());
    }
}

/// Asks for the cache line of the value `ahead` of the first one, if the processor can be asked.
#[inline(always)]
fn fetch<T>(values: &[T], ahead: usize) {
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
        for [inner, columns, gap] in
            [[1usize, 1, 0], [3, 16, 1], [4, 17, 0], [7, 1025, 3], [9, 40, 0], [0, 5, 0], [129, 3, 2]]
        {
            let x: Vec<f32> = (0..inner).map(|i| (i % 5) as f32 - 2.5).collect();
            // Small integers: bf16 holds them too.
            let w: Vec<f32> = (0..(inner.max(1) + gap) * (columns + gap)).map(|i| (i % 11) as f32 - 4.0).collect();
            let narrow: Vec<bf16> = w.iter().map(|&w| bf16::from_f32(w)).collect();
            let check = |add: &dyn Fn(&mut [f32], usize), [down, along]: [usize; 2]| {
                let last = (inner.max(1) - 1) * down + (columns - 1) * along;
                let mut y: Vec<f32> = (0..columns).map(|column| column as f32).collect();
                add(&mut y, last + 1);
                for (column, &y) in y.iter().enumerate() {
                    let product: f32 = x.iter().enumerate().map(|(i, x)| x * w[i * down + column * along]).sum();
                    assert_eq!(y, column as f32 + 0.5 * product, "column {column} of {inner} x {columns}");
                }
            };
            let (by_rows, by_columns) = ([columns + gap, 1], [1, inner + gap]);
            check(&|y, len| add_row_product(y, &x, &w[..len], columns + gap, 0.5), by_rows);
            check(&|y, len| add_row_product(y, &x, &narrow[..len], columns + gap, 0.5), by_rows);
            check(&|y, len| add_row_dots(y, &x, &w[..len], inner + gap, 0.5), by_columns);
            check(&|y, len| add_row_dots(y, &x, &narrow[..len], inner + gap, 0.5), by_columns);
        }
    }

    #[test]
    #[should_panic(expected = "out of range")]
    fn rows_that_are_not_there_are_refused() {
        add_row_product(&mut [0.0; 4], &[1.0; 3], &[1.0; 11], 4, 1.0);
    }

    #[test]
    #[should_panic(expected = "out of range")]
    fn columns_that_are_not_there_are_refused() {
        add_row_dots(&mut [0.0; 4], &[1.0; 3], &[1.0; 11], 3, 1.0);
    }
}
