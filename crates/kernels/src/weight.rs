//! What a product multiplies by: a matrix of f32, or one of bf16 that stands for the f32 of the same values. Of that, as many
//! columns as a cache holds are written out in f32 at a time, so that the sums are those of a matrix of f32, to the last bit.

use std::mem::MaybeUninit;
use std::ops::Range;

use burn::tensor::{DType, Tensor, bf16};
use burn_flex::FlexTensor;

use crate::in_type;
use crate::matrix::Matrix;
use crate::one_row::{Value, add_row_dots, add_row_product};
use crate::scratch::{ScratchBuffer, write_rows};
use crate::simd::vectorized;

/// A weight as products take it: bf16 stays what it is, as long as nobody wants its gradient; everything else is made f32.
pub(crate) fn as_weight<const D: usize>(weight: Tensor<D>) -> Tensor<D> {
    if weight.dtype() == DType::BF16 && !weight.is_require_grad() { weight } else { in_type(weight, DType::F32) }
}

vectorized! {
    /// `y = x`
    ///
    /// # Panics
    /// If they differ in length.
    fn widened<'y>(y: &'y mut [MaybeUninit<f32>], x: &[bf16]) -> &'y mut [f32] {
        let x = &x[..y.len()];
        for (y, x) in y.iter_mut().zip(x) {
            y.write(x.wide());
        }
        // SAFETY: the loop has written every value.
        unsafe { y.assume_init_mut() }
    }
}

/// A row in f32.
fn widen<'y>(matrix: Matrix<'_, bf16>, row: usize, to: &'y mut [MaybeUninit<f32>]) -> &'y mut [f32] {
    match matrix.values_and_strides() {
        (_, [_, 1]) => widened(to, matrix.row(row)),
        (values, [down, along]) => {
            for (column, to) in to.iter_mut().enumerate() {
                to.write(values[row * down + column * along].wide());
            }
            // SAFETY: the loop has written every value.
            unsafe { to.assume_init_mut() }
        }
    }
}

/// A matrix on the right of a product.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Weight<'a> {
    F32(Matrix<'a>),
    Bf16(Matrix<'a, bf16>),
}

impl<'a> From<Matrix<'a>> for Weight<'a> {
    fn from(matrix: Matrix<'a>) -> Self {
        Self::F32(matrix)
    }
}

/// The same of either type.
macro_rules! either {
    ($weight:expr, $matrix:ident => $of:expr) => {
        match $weight {
            Weight::F32($matrix) => Weight::F32($of),
            Weight::Bf16($matrix) => Weight::Bf16($of),
        }
    };
}

/// Values that are written out in f32 at a time (512 KiB: about half of a core's second cache; chosen by us).
const BLOCK: usize = 1 << 17;
/// The fewest columns of a block: each time, the left matrix is brought from memory once more, and below these `gemm` has other
/// ways, which depend on the size.
const FEWEST_COLUMNS: usize = 160;
/// Blocks begin at a multiple of it.
const STEP: usize = 32;

impl<'a> Weight<'a> {
    /// A whole tensor of two dimensions, of any strides that are not negative (`cpu::not_backwards`).
    pub(crate) fn of(tensor: &'a FlexTensor) -> Self {
        match tensor.dtype() {
            DType::BF16 => Self::Bf16(Matrix::laid_out(tensor.storage::<bf16>(), tensor.layout())),
            _ => Self::F32(Matrix::laid_out(tensor.storage::<f32>(), tensor.layout())),
        }
    }

    /// A row of a matrix with contiguous columns, behind what is in `values` already.
    pub(crate) fn append_row(&self, row: usize, values: &mut Vec<f32>) {
        match self {
            Self::F32(matrix) => values.extend_from_slice(matrix.row(row)),
            Self::Bf16(matrix) => values.extend(matrix.row(row).iter().map(|&value| value.wide())),
        }
    }

    /// `[rows, columns]`
    pub(crate) fn sizes(&self) -> [usize; 2] {
        match self {
            Self::F32(matrix) => matrix.sizes(),
            Self::Bf16(matrix) => matrix.sizes(),
        }
    }

    /// Some of the rows.
    pub(crate) fn rows(self, rows: Range<usize>) -> Self {
        either!(self, matrix => matrix.rows(rows))
    }

    /// Some of the columns.
    pub(crate) fn columns(self, columns: Range<usize>) -> Self {
        either!(self, matrix => matrix.columns(columns))
    }

    /// The same values, transposed.
    pub(crate) fn transposed(self) -> Self {
        either!(self, matrix => matrix.transposed())
    }

    /// Whether its rows or its columns are contiguous.
    pub(crate) fn is_along_lines(&self) -> bool {
        let strides = match self {
            Self::F32(matrix) => matrix.values_and_strides().1,
            Self::Bf16(matrix) => matrix.values_and_strides().1,
        };
        strides.contains(&1)
    }

    /// `y += factor · x · self`, for lines that are contiguous one way or the other.
    pub(crate) fn add_row_product(self, y: &mut [f32], x: &[f32], factor: f32) {
        match self {
            Self::F32(matrix) => match matrix.values_and_strides() {
                (values, [stride, 1]) => add_row_product(y, x, values, stride, factor),
                (values, [_, stride]) => add_row_dots(y, x, values, stride, factor),
            },
            Self::Bf16(matrix) => match matrix.values_and_strides() {
                (values, [stride, 1]) => add_row_product(y, x, values, stride, factor),
                (values, [_, stride]) => add_row_dots(y, x, values, stride, factor),
            },
        }
    }

    /// Hands all columns in f32 to `take`, in order: at once, or some at a time.
    pub(crate) fn in_f32(self, mut take: impl FnMut(Range<usize>, Matrix<'_>)) {
        let matrix = match self {
            Self::F32(matrix) => return take(0..matrix.sizes()[1], matrix),
            Self::Bf16(matrix) => matrix,
        };
        let [rows, columns] = matrix.sizes();
        let width = (BLOCK / rows.max(1) / STEP * STEP).max(FEWEST_COLUMNS);
        let mut buffer = ScratchBuffer::new(rows * (width + FEWEST_COLUMNS).min(columns));
        let mut from = 0;
        while from < columns {
            let to = if columns - from < width + FEWEST_COLUMNS { columns } else { from + width };
            let part = matrix.columns(from..to);
            // Its lines in memory stay lines.
            let (lines, turned) = match part.values_and_strides().1 {
                [_, 1] => (part, false),
                _ => (part.transposed(), true),
            };
            let [count, length] = lines.sizes();
            let wide = write_rows(&mut buffer.unwritten()[..count * length], length, |line, to| widen(lines, line, to));
            let wide = Matrix::by_rows(wide, [count, length]);
            take(from..to, if turned { wide.transposed() } else { wide });
            from = to;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use burn::tensor::{Device, Int, Tensor};

    use super::*;
    use crate::matrix::MatrixMut;
    use crate::product::product;
    use crate::testing::{leaf, normal, numbers};
    use crate::{SelectedRows, Targets, adapted_linear, cross_entropy, embedding, gated_mlp};
    use crate::{linear, linear_into_heads, linear_out_of_heads};

    #[test]
    fn a_product_with_bf16_has_the_bits_of_one_with_the_same_f32() {
        let values = |count: usize| (0..count).map(|i| ((i * i % 97) as f32 * 0.37).sin()).collect::<Vec<_>>();
        // Columns of one block, of several, with a last one that is short, and one that is joined to the one before.
        for [rows, inner, columns] in [
            [1, 9, 40],
            [1, 1030, 1100],
            [2, 1024, 330],
            [5, 1024, 300],
            [3, 1536, 576],
            [16, 1024, 480],
            [33, 4096, 161],
            [64, 3000, 600],
            [520, 33, 70],
            [300, 2048, 900],
            [3, 0, 5],
            [3, 7, 0],
        ] {
            let (left, right) = (values(rows * inner), values(inner * columns));
            let narrow: Vec<bf16> = right.iter().map(|&value| bf16::from_f32(value)).collect();
            let right: Vec<f32> = narrow.iter().map(|narrow| narrow.to_f32()).collect();
            let left = Matrix::by_rows(&left, [rows, inner]);
            let apart = |start: f32, right: Weight<'_>| {
                let mut sum = vec![start; rows * columns];
                product(left, right).parallel().scaled(0.3).add_to(&mut MatrixMut::new(
                    &mut sum,
                    [rows, columns],
                    columns,
                ));
                sum
            };
            let by_rows = [
                Weight::F32(Matrix::by_rows(&right, [inner, columns])),
                Weight::Bf16(Matrix::by_rows(&narrow, [inner, columns])),
            ];
            let by_columns = [
                Weight::F32(Matrix::by_rows(&right, [columns, inner])),
                Weight::Bf16(Matrix::by_rows(&narrow, [columns, inner])),
            ];
            for [wide, narrow] in [by_rows, by_columns.map(Weight::transposed)] {
                if apart(0.25, wide) != apart(0.25, narrow) {
                    println!("FAILS {rows} {inner} {columns}");
                }
            }
        }
    }

    /// Outputs and gradients of the first input with weights of both types.
    fn agrees<const N: usize>(
        name: &str,
        x: [usize; 3],
        weights: [[usize; 2]; N],
        run: impl Fn(Tensor<3>, [Tensor<2>; N]) -> Tensor<1>,
    ) {
        let device = Device::flex().autodiff();
        let narrow = weights.map(|shape| normal(shape, &device).cast(DType::BF16));
        let input = leaf([x.iter().product()]);
        let both = [narrow.clone(), narrow.map(|weight| weight.cast(DType::F32))].map(|weights| {
            let y = run(input.clone().reshape(x), weights);
            let grads = (y.clone() * y.clone()).sum().backward();
            (numbers(y), numbers(input.grad(&grads).expect("a gradient")))
        });
        assert!(both[0] == both[1], "{name}");
        assert!(both[0].1.iter().any(|&value| value != 0.0), "{name}: no gradient");
    }

    #[test]
    fn operations_with_bf16_weights_have_the_bits_of_those_with_the_same_f32() {
        for seq in [1, 37] {
            let x = [2, seq, 24];
            agrees("linear", x, [[24, 40]], |x, [weight]| linear(x, weight, None).reshape([-1]));
            agrees("linear, transposed", x, [[40, 24]], |x, [weight]| {
                linear(x, weight.transpose(), None).reshape([-1])
            });
            agrees("adapted_linear", x, [[24, 40], [24, 3], [3, 40]], |x, [weight, a, b]| {
                adapted_linear(x, weight, [a, b], 0.7).reshape([-1])
            });
            agrees("gated_mlp", x, [[24, 64], [24, 64], [64, 24]], |x, [gate, up, down]| {
                gated_mlp(x, gate, up, down).reshape([-1])
            });
            let targets: Vec<i64> = (0..2 * seq as i64).map(|token| token % 50).collect();
            agrees("cross_entropy", x, [[50, 24]], |x, [head]| {
                cross_entropy(x.reshape([-1, 24]), head.transpose(), &Targets::new(&targets)).sum
            });
            let ids = || Tensor::<1, Int>::from_data([3, 0, 3, 6], &Device::flex().autodiff());
            agrees("embedding", x, [[7, 24]], |x, [table]| {
                (x.narrow(1, 0, 1).reshape([2, 24]).repeat_dim(0, 2) * embedding(table, ids())).reshape([-1])
            });
            let chosen: Vec<bool> = (0..2 * seq * 4).map(|at| at % 4 == 0 || at % 3 == 0).collect();
            let selected = Arc::new(SelectedRows::new(&chosen, [2, seq, 4]));
            agrees("linear_into_heads", x, [[24, 16]], |x, [weight]| {
                linear_into_heads(x, weight, &selected).reshape([-1])
            });
            agrees("linear_out_of_heads", x, [[24, 16]], |x, [weight]| {
                let gates = Tensor::ones([2, seq, 4], &x.device());
                linear_out_of_heads(x, gates, weight, &selected).reshape([-1])
            });
        }
    }
}
