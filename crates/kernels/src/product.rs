//! Products of matrices: sizes alone have to be checked, and the one place that hands pointers to `gemm` is here.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use crate::matrix::{Matrix, MatrixMut};
use crate::scratch::write_zeros;
use crate::weight::Weight;

/// Rows or columns that a thread takes at least, and steps between the parts of two threads; measured, see benches/RESULTS.md.
const FEWEST: usize = 128;
const STEP: usize = 32;
/// Rows and columns below which `gemm` has other ways, which depend on the size.
const NARROW: usize = 8;
/// Values of a matrix that a thread takes at least where a single row is multiplied: 1 MiB, longer than it takes to wake it.
const FEWEST_OF_ONE_ROW: usize = 1 << 18;

/// `factor · left right`, before it is known where to.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    left: Matrix<'a>,
    right: Weight<'a>,
    factor: f32,
    parallel: bool,
}

/// `left right`, on this thread.
///
/// # Panics
/// If there are not as many columns on the left as rows on the right.
pub(crate) fn product<'a>(left: Matrix<'a>, right: impl Into<Weight<'a>>) -> Product<'a> {
    let right = right.into();
    let [[_, inner], [rows, _]] = [left.sizes(), right.sizes()];
    assert!(inner == rows, "a product of matrices {:?} and {:?}", left.sizes(), right.sizes());
    Product { left, right, factor: 1.0, parallel: false }
}

impl Product<'_> {
    /// Times a factor.
    pub(crate) fn scaled(self, factor: f32) -> Self {
        Self { factor, ..self }
    }

    /// Spread over all threads.
    pub(crate) fn parallel(self) -> Self {
        Self { parallel: true, ..self }
    }

    fn sizes(&self) -> [usize; 2] {
        [self.left.sizes()[0], self.right.sizes()[1]]
    }

    /// Written over what is there, if anything.
    pub(crate) fn write_to<'o>(self, out: MatrixMut<'o, MaybeUninit<f32>>) -> MatrixMut<'o, f32> {
        self.assert_fits(&out);
        // SAFETY: a matrix of this size that nobody else reaches, from which nothing is read.
        unsafe { self.run(out.place().0.cast(), out.place().1, false) };
        // SAFETY: the product has written all of it.
        unsafe { out.written() }
    }

    /// Written over the values of `out`.
    pub(crate) fn replace(self, out: &mut MatrixMut<'_, f32>) {
        self.assert_fits(out);
        // SAFETY: a matrix of this size that nobody else reaches.
        unsafe { self.run(out.place().0, out.place().1, false) };
    }

    /// Added to the values of `out`.
    pub(crate) fn add_to(self, out: &mut MatrixMut<'_, f32>) {
        self.assert_fits(out);
        // SAFETY: a matrix of this size that nobody else reaches, full of values.
        unsafe { self.run(out.place().0, out.place().1, true) };
    }

    /// Written row by row into the beginning of `buffer`; gives that part.
    pub(crate) fn write_into(self, buffer: &mut [MaybeUninit<f32>]) -> &mut [f32] {
        let [rows, columns] = self.sizes();
        let part = &mut buffer[..rows * columns];
        self.write_to(MatrixMut::new(part, [rows, columns], columns));
        // SAFETY: the product has written all of its rows, which are contiguous.
        unsafe { part.assume_init_mut() }
    }

    /// Written row by row behind what is in `values` already.
    pub(crate) fn append_to(self, values: &mut Vec<f32>) {
        let [rows, columns] = self.sizes();
        let (before, added) = (values.len(), rows * columns);
        values.reserve_exact(added);
        self.write_into(values.spare_capacity_mut());
        // SAFETY: the length was checked, and the product has written these values.
        unsafe { values.set_len(before + added) };
    }

    /// Its rows one behind the other.
    pub(crate) fn values(self) -> Vec<f32> {
        let mut values = Vec::new();
        self.append_to(&mut values);
        values
    }

    fn assert_fits<T>(&self, out: &MatrixMut<'_, T>) {
        let (sizes, found) = (self.sizes(), out.sizes());
        assert!(sizes == found, "a product of size {sizes:?} into a matrix {found:?}");
    }

    /// # Safety
    /// From `start` on there is a matrix of this product's size with rows at a distance of `stride`, which nobody else
    /// reads or writes meanwhile; if the product is to be added to it, it is full of values.
    unsafe fn run(self, start: *mut f32, stride: usize, add: bool) {
        let threads = if self.parallel { rayon::current_num_threads() } else { 1 };
        let [rows, columns] = self.sizes();
        if rows == 1 && self.left.values_and_strides().1[1] == 1 && self.right.is_along_lines() {
            // SAFETY: the only row, as the caller has promised.
            let row = unsafe { std::slice::from_raw_parts_mut(start.cast::<MaybeUninit<f32>>(), columns) };
            // SAFETY: if something is to be added, there are values, as the caller has promised.
            return self.one_row(if add { unsafe { row.assume_init_mut() } } else { write_zeros(row) }, threads);
        }
        let (longer, shorter) = (rows.max(columns), rows.min(columns));
        // Products of a few rows or columns add up in another order in parts.
        if threads == 1 || longer < FEWEST * threads || shorter < NARROW {
            let parallelism = if self.parallel { gemm::Parallelism::Rayon(0) } else { gemm::Parallelism::None };
            // SAFETY: as the caller has promised.
            return unsafe { self.multiply(start, stride, add, parallelism) };
        }
        // A part of the longer side for each thread, which packs what it needs of the operands by itself: `gemm`, told to use
        // several threads, packs one operand before they begin, and parts of the other twice.
        let cut = |index: usize| if index == threads { longer } else { longer * index / threads / STEP * STEP };
        rayon::in_place_scope(|scope| {
            for index in 0..threads {
                let (from, to) = (cut(index), cut(index + 1));
                let (product, offset) = match rows > columns {
                    true => (Self { left: self.left.rows(from..to), ..self }, from * stride),
                    false => (Self { right: self.right.columns(from..to), ..self }, from),
                };
                let [rows, columns] = product.sizes();
                // SAFETY: inside of the matrix that the caller has promised, and no two parts overlap.
                let start = unsafe { start.add(offset) };
                let reach = rows.saturating_sub(1) * stride + columns;
                // SAFETY: inside of the matrix that the caller has promised, of which this is the only handle on its part.
                let out = unsafe { MatrixMut::from_raw(start, reach, [rows, columns], stride) };
                scope.spawn(move |_| {
                    let out: MatrixMut<'_, f32> = out;
                    // SAFETY: it is this product's part.
                    unsafe { product.multiply(out.place().0, stride, add, gemm::Parallelism::None) };
                });
            }
        });
    }

    /// Adds a product of one row; by columns, so that the order of additions is that of one thread.
    fn one_row(self, sum: &mut [f32], threads: usize) {
        let Self { left, right, factor, .. } = self;
        let [rows, columns] = right.sizes();
        if rows == 0 {
            return;
        }
        let x = left.row(0);
        let parts = threads.min(rows * columns / FEWEST_OF_ONE_ROW);
        if parts < 2 {
            return right.add_row_product(sum, x, factor);
        }
        let width = columns.div_ceil(parts).next_multiple_of(STEP);
        sum.par_chunks_mut(width).enumerate().for_each(|(index, sum)| {
            let from = index * width;
            right.columns(from..from + sum.len()).add_row_product(sum, x, factor);
        });
    }

    /// # Safety
    /// That of [`Self::run`].
    unsafe fn multiply(self, start: *mut f32, stride: usize, add: bool, parallelism: gemm::Parallelism) {
        self.right.in_f32(|columns, right| {
            // SAFETY: the caller's promise; these are some of the columns.
            unsafe { multiply(self.left, right, self.factor, start.add(columns.start), stride, add, parallelism) }
        });
    }
}

/// # Safety
/// That of [`Product::run`], for these operands.
unsafe fn multiply(
    left: Matrix<'_>,
    right: Matrix<'_>,
    factor: f32,
    start: *mut f32,
    stride: usize,
    add: bool,
    parallelism: gemm::Parallelism,
) {
    let ([rows, inner], [_, columns]) = (left.sizes(), right.sizes());
    let ((left, [left_down, left_along]), (right, [right_down, right_along])) =
        (left.values_and_strides(), right.values_and_strides());
    // SAFETY: operands: a view has checked that its rows and columns at its strides are inside the slice that it borrows,
    // and `product` that the inner sizes agree. Output: the caller's promise; nothing is read from it unless `add`.
    unsafe {
        gemm::gemm(
            rows,
            columns,
            inner,
            start,
            1,
            stride as isize,
            add,
            left.as_ptr(),
            left_along as isize,
            left_down as isize,
            right.as_ptr(),
            right_along as isize,
            right_down as isize,
            1.0,
            factor,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::ScratchBuffer;

    const LEFT: [f32; 6] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];

    #[test]
    fn products_of_parts_and_of_transposed_matrices() {
        let left = Matrix::by_rows(&LEFT, [2, 3]);
        assert_eq!(product(left, left.transposed()).values(), [14.0, 32.0, 32.0, 77.0]);
        assert_eq!(product(left.columns(1..3), left.rows(1..2).columns(0..2).transposed()).values(), [23.0, 50.0]);
        // One column of a matrix of three, added to what is there.
        let mut out = [1.0; 6];
        let mut column = MatrixMut::new(&mut out[1..], [2, 1], 3);
        product(left, left.rows(0..1).transposed()).scaled(2.0).add_to(&mut column);
        assert_eq!(out, [1.0, 29.0, 1.0, 1.0, 65.0, 1.0]);
    }

    #[test]
    fn however_many_threads_cut_it_a_product_has_the_same_bits() {
        let numbers = |count: usize| (0..count).map(|i| (i % 97) as f32 / 31.0 - 1.5).collect::<Vec<_>>();
        for [rows, inner, columns] in
            [[520, 33, 70], [70, 33, 520], [500, 600, 500], [1000, 3, 1], [9, 40, 1000], [1000, 2, 8], [1, 515, 1100]]
        {
            let (left, right) = (numbers(rows * inner), numbers(inner * columns));
            let left = Matrix::by_rows(&left, [rows, inner]);
            for right in
                [Matrix::by_rows(&right, [inner, columns]), Matrix::by_rows(&right, [columns, inner]).transposed()]
            {
                let on = |threads: usize| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
                    pool.install(|| {
                        let mut sum = vec![0.5; rows * (columns + 3)];
                        product(left, right).parallel().add_to(&mut MatrixMut::new(
                            &mut sum,
                            [rows, columns],
                            columns + 3,
                        ));
                        sum
                    })
                };
                let alone = on(1);
                assert!([2, 3, 4, 7].into_iter().all(|threads| on(threads) == alone), "{rows} {inner} {columns}");
                let untouched = alone.chunks(columns + 3).all(|row| row[columns..] == [0.5; 3]);
                assert!(untouched, "what lies between the rows is not the product's");
            }
        }
    }

    #[test]
    fn nothing_times_something() {
        let (none, some) = (Matrix::by_rows(&[], [2, 0]), Matrix::by_rows(&[], [0, 2]));
        assert_eq!(product(none, some).values(), [0.0; 4]);
        assert_eq!(product(some, none).values(), [0.0; 0]);
        assert_eq!(Matrix::by_rows(&LEFT, [2, 3]).rows(2..2).sizes(), [0, 3]);
    }

    #[test]
    #[should_panic(expected = "a product of matrices [2, 3] and [2, 3]")]
    fn inner_sizes_that_disagree_are_refused() {
        let left = Matrix::by_rows(&LEFT, [2, 3]);
        product(left, left);
    }

    #[test]
    #[should_panic(expected = "a product of size [2, 2] into a matrix [2, 3]")]
    fn a_result_of_another_size_is_refused() {
        let left = Matrix::by_rows(&LEFT, [2, 3]);
        let mut buffer = ScratchBuffer::new(6);
        product(left, left.transposed()).write_to(MatrixMut::new(buffer.unwritten(), [2, 3], 3));
    }
}
