//! Views of matrices.
//!
//! A view knows its rows, columns and strides and has checked, when it was made, that all of them are in memory that it
//! borrows. So whoever computes with it can check sizes alone.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use burn_flex::Layout;

use crate::scratch::{Shared, write_zeros};

/// A matrix to read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix<'a, T = f32> {
    /// From the first value on.
    values: &'a [T],
    rows: usize,
    columns: usize,
    /// Distances from row to row and from column to column.
    strides: [usize; 2],
}

/// A matrix to write; its columns are contiguous. Of [`MaybeUninit`] values until they are written.
#[derive(Debug)]
pub(crate) struct MatrixMut<'a, T> {
    start: *mut T,
    rows: usize,
    columns: usize,
    /// Distance from row to row.
    stride: usize,
    memory: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]` of each of its rows.
unsafe impl<T: Send> Send for MatrixMut<'_, T> {}

/// The number of values from a matrix's first to its last; `None` where it overflows.
fn reach([rows, columns]: [usize; 2], strides: [usize; 2]) -> Option<usize> {
    if rows == 0 || columns == 0 {
        return Some(0);
    }
    let down = (rows - 1).checked_mul(strides[0])?;
    let along = (columns - 1).checked_mul(strides[1])?;
    // Pointers count in `isize`.
    down.checked_add(along)?.checked_add(1).filter(|&reach| reach <= isize::MAX as usize)
}

fn assert_inside(sizes: [usize; 2], strides: [usize; 2], len: usize) {
    let inside = reach(sizes, strides).is_some_and(|reach| reach <= len);
    assert!(inside, "a matrix {sizes:?} with strides {strides:?} is larger than the {len} values it is made of");
}

impl<'a, T: Copy> Matrix<'a, T> {
    /// Rows and columns of `values`, at these distances.
    ///
    /// # Panics
    /// If they are not all there.
    pub(crate) fn new(values: &'a [T], sizes: [usize; 2], strides: [usize; 2]) -> Self {
        assert_inside(sizes, strides, values.len());
        Self { values, rows: sizes[0], columns: sizes[1], strides }
    }

    /// Contiguous rows.
    pub(crate) fn by_rows(values: &'a [T], [rows, columns]: [usize; 2]) -> Self {
        Self::new(values, [rows, columns], [columns, 1])
    }

    /// The values of a whole tensor of two dimensions, of any strides that are not negative (`cpu::not_backwards`).
    pub(crate) fn laid_out(values: &'a [T], layout: &Layout) -> Self {
        let strides = [layout.strides()[0], layout.strides()[1]];
        assert!(strides.iter().all(|&stride| stride >= 0), "a matrix with a negative stride");
        let values = values.get(layout.start_offset()..).unwrap_or_default();
        Self::new(values, [layout.shape()[0], layout.shape()[1]], strides.map(|stride| stride as usize))
    }

    /// `[rows, columns]`
    pub(crate) fn sizes(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// A row of a matrix with contiguous columns.
    pub(crate) fn row(&self, row: usize) -> &'a [T] {
        assert!(self.strides[1] == 1 && row < self.rows, "row {row} of {}, columns at {}", self.rows, self.strides[1]);
        &self.values[row * self.strides[0]..][..self.columns]
    }

    /// Some of the rows.
    pub(crate) fn rows(self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        // Nothing may be left, and then nothing need be behind the offset.
        let values = self.values.get(rows.start.saturating_mul(self.strides[0])..).unwrap_or_default();
        Self { values, rows: rows.len(), ..self }
    }

    /// Some of the columns.
    pub(crate) fn columns(self, columns: Range<usize>) -> Self {
        self.transposed().rows(columns).transposed()
    }

    /// All values from the first to the last, and the distances from row to row and from column to column.
    pub(crate) fn values_and_strides(&self) -> (&'a [T], [usize; 2]) {
        (self.values, self.strides)
    }

    /// The same values, transposed.
    pub(crate) fn transposed(self) -> Self {
        let [rows, columns] = self.strides;
        Self { rows: self.columns, columns: self.rows, strides: [columns, rows], ..self }
    }
}

impl<'a, T> MatrixMut<'a, T> {
    /// Rows of `values` at a distance of `stride`, to be written.
    ///
    /// # Panics
    /// If they are not all there, or overlap.
    pub(crate) fn new(values: &'a mut [T], sizes: [usize; 2], stride: usize) -> Self {
        let len = values.len();
        // SAFETY: the values are borrowed for 'a, so nobody else reaches them.
        unsafe { Self::from_raw(values.as_mut_ptr(), len, sizes, stride) }
    }

    /// Rows of shared memory, from `memory[at]` on.
    ///
    /// # Safety
    /// As long as it lives, nobody else reads or writes any of its rows.
    pub(crate) unsafe fn of_shared(memory: &Shared<'a, T>, at: usize, sizes: [usize; 2], stride: usize) -> Self {
        let (start, len) = memory.from(at);
        // SAFETY: `start` is followed by `len` values that live for 'a; the rest is the caller's promise.
        unsafe { Self::from_raw(start, len, sizes, stride) }
    }

    /// # Safety
    /// `start` is followed by `len` values that live for 'a, and nobody else reaches the rows for as long.
    pub(crate) unsafe fn from_raw(start: *mut T, len: usize, [rows, columns]: [usize; 2], stride: usize) -> Self {
        assert_inside([rows, columns], [stride, 1], len);
        assert!(rows <= 1 || columns <= stride, "rows of {columns} values overlap at a distance of {stride}");
        Self { start, rows, columns, stride, memory: PhantomData }
    }

    /// `[rows, columns]`
    pub(crate) fn sizes(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// Where the first value is, and the distance from row to row.
    pub(crate) fn place(&self) -> (*mut T, usize) {
        (self.start, self.stride)
    }

    /// A row.
    pub(crate) fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        if self.columns == 0 {
            return &mut [];
        }
        // SAFETY: `new` has checked that the row is inside of the memory, which is borrowed mutably through `self`.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride), self.columns) }
    }

    /// Some of the rows.
    pub(crate) fn rows(&mut self, rows: Range<usize>) -> MatrixMut<'_, T> {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        // `wrapping_add`, because nothing may be left, and then nothing need be behind the offset.
        let start = self.start.wrapping_add(rows.start.wrapping_mul(self.stride));
        MatrixMut { start, rows: rows.len(), columns: self.columns, stride: self.stride, memory: PhantomData }
    }
}

impl<'a> MatrixMut<'a, MaybeUninit<f32>> {
    /// Full of zeros.
    pub(crate) fn zeroed(mut self) -> MatrixMut<'a, f32> {
        for row in 0..self.rows {
            write_zeros(self.row(row));
        }
        // SAFETY: every row was just written.
        unsafe { self.written() }
    }

    /// # Safety
    /// Every row has been written.
    pub(crate) unsafe fn written(self) -> MatrixMut<'a, f32> {
        let Self { start, rows, columns, stride, .. } = self;
        MatrixMut { start: start.cast(), rows, columns, stride, memory: PhantomData }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALUES: [f32; 6] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];

    #[test]
    #[should_panic(expected = "a matrix [2, 4] with strides [4, 1] is larger than the 6 values it is made of")]
    fn a_view_beyond_its_values_is_refused() {
        Matrix::by_rows(&VALUES, [2, 4]);
    }

    #[test]
    #[should_panic(expected = "larger than the 6 values")]
    fn sizes_that_overflow_are_refused() {
        Matrix::new(&VALUES, [usize::MAX, 2], [usize::MAX, 1]);
    }

    #[test]
    #[should_panic(expected = "rows 1..3 of 2")]
    fn rows_beyond_the_last_are_refused() {
        Matrix::by_rows(&VALUES, [2, 3]).rows(1..3);
    }

    #[test]
    #[should_panic(expected = "rows of 3 values overlap at a distance of 2")]
    fn rows_to_write_may_not_overlap() {
        MatrixMut::new(&mut [0.0; 6], [2, 3], 2);
    }
}
