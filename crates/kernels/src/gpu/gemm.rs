//! A product of matrices as BLAS takes it: matrices are stored column by column there, and row by row here.
//!
//! What is stored row by row is, read column by column, the transposed matrix. So `left right` is asked for as
//! `rightᵀ leftᵀ`, which BLAS writes down column by column: row by row it is the product.

/// How a matrix lies in memory: lines of contiguous numbers at equal distances.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Lines {
    count: usize,
    length: usize,
    /// From the start of a line to that of the next; not less than `length`.
    stride: usize,
    /// Whether lines are the columns of the matrix, not its rows.
    are_columns: bool,
}

impl Lines {
    /// A matrix of these sizes and distances of neighbours; `None` if there are no such lines, or it is empty.
    pub(crate) fn of([rows, columns]: [usize; 2], [down, along]: [usize; 2]) -> Option<Self> {
        let lines = |count: usize, length: usize, stride: usize, step: usize, are_columns| {
            let stride = if count == 1 { length } else { stride };
            let fits = (step == 1 || length == 1) && stride >= length && count > 0 && length > 0;
            fits.then_some(Self { count, length, stride, are_columns })
        };
        lines(rows, columns, down, along, false).or_else(|| lines(columns, rows, along, down, true))
    }

    /// `[rows, columns]`
    pub(crate) fn sizes(&self) -> [usize; 2] {
        if self.are_columns { [self.length, self.count] } else { [self.count, self.length] }
    }

    /// The same memory as BLAS reads it, of which it is to take the transposed matrix or not.
    fn by_columns(self) -> Operand {
        Operand { rows: self.length, columns: self.count, stride: self.stride, transposed: self.are_columns }
    }
}

/// A matrix that is stored column by column.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Operand {
    pub rows: usize,
    pub columns: usize,
    /// From the start of a column to that of the next.
    pub stride: usize,
    /// Whether the transposed matrix is multiplied.
    pub transposed: bool,
}

impl Operand {
    /// Numbers from the first of the matrix to its last, with those between columns.
    pub(crate) fn span(&self) -> usize {
        (self.columns - 1) * self.stride + self.rows
    }
}

/// `first second`, all of them stored column by column: of memory that is read row by row, `second first`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Gemm {
    /// The right matrix.
    pub first: Operand,
    /// The left matrix.
    pub second: Operand,
    /// The product, without gaps.
    pub product: Operand,
}

impl Gemm {
    /// `left right`.
    ///
    /// # Panics
    /// If there are not as many columns on the left as rows on the right.
    pub(crate) fn of(left: Lines, right: Lines) -> Self {
        let ([rows, inner], [right_rows, columns]) = (left.sizes(), right.sizes());
        assert!(inner == right_rows, "a product of matrices {:?} and {:?}", left.sizes(), right.sizes());
        let product = Operand { rows: columns, columns: rows, stride: columns, transposed: false };
        Self { first: right.by_columns(), second: left.by_columns(), product }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What BLAS's documentation says of an operand: the number at a place of the matrix that is multiplied.
    fn at(operand: Operand, values: &[f32], row: usize, column: usize) -> f32 {
        let [row, column] = if operand.transposed { [column, row] } else { [row, column] };
        assert!(row < operand.rows && column < operand.columns && operand.stride >= operand.rows);
        values[column * operand.stride + row]
    }

    /// The product as BLAS does it, in memory of its own.
    fn multiplied(gemm: Gemm, first: &[f32], second: &[f32]) -> Vec<f32> {
        let sizes = |operand: Operand| match operand.transposed {
            true => [operand.columns, operand.rows],
            false => [operand.rows, operand.columns],
        };
        let ([rows, inner], [same, columns]) = (sizes(gemm.first), sizes(gemm.second));
        assert_eq!((inner, [rows, columns]), (same, [gemm.product.rows, gemm.product.columns]));
        let mut product = vec![f32::NAN; gemm.product.stride * columns];
        for row in 0..rows {
            for column in 0..columns {
                let terms = (0..inner).map(|k| at(gemm.first, first, row, k) * at(gemm.second, second, k, column));
                product[column * gemm.product.stride + row] = terms.sum();
            }
        }
        product
    }

    /// Rows or columns at a distance with gaps, full of numbers that are in no product.
    struct Stored {
        values: Vec<f32>,
        sizes: [usize; 2],
        strides: [usize; 2],
    }

    impl Stored {
        fn new(sizes: [usize; 2], by_columns: bool, gap: usize) -> Self {
            let [rows, columns] = sizes;
            let strides = if by_columns { [1, rows + gap] } else { [columns + gap, 1] };
            let mut values = vec![f32::NAN; (rows + gap) * (columns + gap)];
            for row in 0..rows {
                for column in 0..columns {
                    // Small whole numbers, whose products are exact in any order.
                    values[row * strides[0] + column * strides[1]] = ((row * 7 + column * 3) % 11) as f32 - 5.0;
                }
            }
            Self { values, sizes, strides }
        }

        fn at(&self, row: usize, column: usize) -> f32 {
            self.values[row * self.strides[0] + column * self.strides[1]]
        }

        fn lines(&self) -> Lines {
            Lines::of(self.sizes, self.strides).expect("lines")
        }
    }

    #[test]
    fn products_are_those_of_the_matrices_however_they_are_stored() {
        for [rows, inner, columns] in [[2, 3, 4], [5, 4, 3], [1, 3, 4], [4, 3, 1], [3, 1, 2], [1, 1, 1], [1, 5, 1]] {
            for (left_turned, right_turned, gap) in
                [false, true].into_iter().flat_map(|l| [(l, false, 0), (l, true, 0), (l, false, 3), (l, true, 2)])
            {
                let left = Stored::new([rows, inner], left_turned, gap);
                let right = Stored::new([inner, columns], right_turned, gap);
                let gemm = Gemm::of(left.lines(), right.lines());
                let product = multiplied(gemm, &right.values, &left.values);
                let plain: Vec<f32> = (0..rows * columns)
                    .map(|place| (place / columns, place % columns))
                    .map(|(row, column)| (0..inner).map(|k| left.at(row, k) * right.at(k, column)).sum())
                    .collect();
                assert_eq!(product, plain, "{rows} x {inner} x {columns}, {left_turned} {right_turned} {gap}");
            }
        }
    }

    #[test]
    fn a_matrix_ends_with_its_last_number() {
        assert_eq!(Lines::of([3, 4], [6, 1]).map(|lines| lines.by_columns().span()), Some(16));
        assert_eq!(Lines::of([3, 4], [1, 5]).map(|lines| lines.by_columns().span()), Some(18));
        // Where a dimension is 1, its distance means nothing: a row stays a row.
        assert_eq!(Lines::of([1, 4], [0, 1]), Lines::of([1, 4], [4, 1]));
        assert_eq!(Lines::of([1, 4], [0, 1]).map(|lines| lines.by_columns().span()), Some(4));
        assert_eq!(Lines::of([4, 1], [1, 9]).map(|lines| lines.by_columns().span()), Some(4));
        assert_eq!(Lines::of([4, 1], [3, 9]).map(|lines| lines.by_columns().span()), Some(10));
    }

    #[test]
    fn what_has_no_lines_is_refused() {
        assert_eq!(Lines::of([3, 4], [8, 2]), None, "gaps between numbers");
        assert_eq!(Lines::of([3, 4], [0, 1]), None, "one row for all");
        assert_eq!(Lines::of([3, 4], [2, 1]), None, "rows on top of each other");
        assert_eq!(Lines::of([0, 4], [4, 1]), None, "empty");
        assert_eq!(Lines::of([4, 0], [1, 1]), None, "empty");
    }

    #[test]
    #[should_panic(expected = "a product of matrices [2, 3] and [4, 5]")]
    fn sizes_that_do_not_match_are_refused() {
        let lines = |sizes: [usize; 2]| Lines::of(sizes, [sizes[1], 1]).expect("lines");
        Gemm::of(lines([2, 3]), lines([4, 5]));
    }
}
